"""A strict reading of Kubernetes manifests: every field must be one of its type, and have a value of the right kind.

Kubernetes' own types come from its Python client. Those of operators are read by the schemas of their
CustomResourceDefinitions, in which a field that they do not name is an error here.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
from kubernetes.client import models

KINDS = {
    "ConfigMap": "V1ConfigMap",
    "Deployment": "V1Deployment",
    "NetworkPolicy": "V1NetworkPolicy",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
    "Service": "V1Service",
    "StatefulSet": "V1StatefulSet",
}
GRAPH = "DynamoGraphDeployment"
_SCHEMAS = {
    kind: json.loads((Path(__file__).parent / f"{kind.lower()}.{version}.json").read_text())
    for kind, version in {GRAPH: "v1beta1", "PodMonitor": "v1", "PrometheusRule": "v1"}.items()
}
_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def read(document: dict[str, Any]) -> None:
    """Raises ValueError, which names the field, for a manifest that is not as its kind prescribes."""
    kind = document["kind"]
    if kind not in _SCHEMAS:
        _read(document, KINDS[kind], kind)
        return
    errors = jsonschema.Draft202012Validator(_strict(_SCHEMAS[kind])).iter_errors(document)
    told = [f"{kind}{error.json_path.removeprefix('$')}: {error.message}" for error in errors]
    _read(document["metadata"], "V1ObjectMeta", f"{kind}.metadata")
    for number, component in enumerate(document["spec"]["components"] if kind == GRAPH else ()):
        containers = component["podTemplate"]["spec"]["containers"]
        if not [one for one in containers if one["name"] == "main" and one.get("image")]:
            told.append(f"{GRAPH}.spec.components[{number}]: no container main with an image")
    if told:
        raise ValueError("; ".join(told))


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without leave to have fields that it does not name."""
    content = dict(schema)
    if "properties" in schema:
        content["properties"] = {name: _strict(one) for name, one in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            content["additionalProperties"] = False
    for below in ("items", "additionalProperties"):
        if isinstance(schema.get(below), dict):
            content[below] = _strict(schema[below])
    return content


def _read(value: Any, kind: str, where: str) -> Any:
    """The value as the client's object, if it is one of Kubernetes' types."""
    if nested := re.fullmatch(r"list\[(.+)\]", kind):
        _expect(value, (list,), where)
        return [_read(one, nested[1], f"{where}[{number}]") for number, one in enumerate(value)]
    if nested := re.fullmatch(r"dict\(str, (.+)\)", kind):
        _expect(value, (dict,), where)
        return {name: _read(one, nested[1], f"{where}.{name}") for name, one in value.items()}
    if kind in _PLAIN:
        _expect(value, _PLAIN[kind], where)
        return value
    if kind == "object":  # a number or a name
        return value
    _expect(value, (dict,), where)
    model = getattr(models, kind)
    attributes = {json_name: name for name, json_name in model.attribute_map.items()}
    read_in = {}
    for name, one in value.items():
        attribute = _field(attributes, name, where)
        read_in[attribute] = _read(one, model.openapi_types[attribute], f"{where}.{name}")
    try:
        return model(**read_in)  # which refuses to be without what is required
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _field(known: dict[str, str], name: str, where: str) -> str:
    if name not in known:
        raise ValueError(f"{where}.{name}: no such field; there are {', '.join(known)}")
    return known[name]


def _expect(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{where}: {value!r} given, expected {' or '.join(kind.__name__ for kind in kinds)}")
