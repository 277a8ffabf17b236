"""A strict reading of Kubernetes manifests: every field must be one of its type, and have a value of the right kind.

Kubernetes' own types come from its Python client. Those of Dynamo's operator are written down here, as far as they are
used: DynamoGraphDeployment in nvidia.com/v1beta1, in which the operator stores it, too.
"""

import re
from typing import Any

from kubernetes.client import models

KINDS = {"Deployment": "V1Deployment", "Service": "V1Service", "StatefulSet": "V1StatefulSet"}
_DYNAMO: dict[str, dict[str, str]] = {
    "DynamoGraphDeployment": {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "V1ObjectMeta",
        "spec": "DynamoGraphDeploymentSpec",
    },
    "DynamoGraphDeploymentSpec": {
        "annotations": "dict(str, str)",
        "labels": "dict(str, str)",
        "backendFramework": "vllm|sglang|trtllm",
        "env": "list[V1EnvVar]",
        "components": "list[Component]",
    },
    "Component": {
        "name": "str",
        "type": "frontend|worker|prefill|decode|planner|epp",
        "runtimeVersionOverride": "str",
        "globalDynamoNamespace": "bool",
        "replicas": "int",
        "minAvailable": "int",
        "sharedMemorySize": "str",
        "frontendSidecar": "str",
        "podTemplate": "V1PodTemplateSpec",
    },
}
_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def read(document: dict[str, Any]) -> None:
    """Raises ValueError, which names the field, for a manifest that is not as its kind prescribes."""
    kind = document["kind"]
    _read(document, KINDS.get(kind, kind), kind)


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
    if "|" in kind:
        if value not in kind.split("|"):
            raise ValueError(f"{where}: {value!r} given, expected {kind}")
        return value
    if kind == "object":  # a number or a name
        return value
    _expect(value, (dict,), where)
    if kind in _DYNAMO:
        for name, one in value.items():
            _read(one, _field(_DYNAMO[kind], name, where), f"{where}.{name}")
        if kind == "Component":
            _component(value, where)
        return None
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


def _component(value: dict[str, Any], where: str) -> None:
    """What the operator asks of a component beyond its types."""
    if not re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?", value["name"]):
        raise ValueError(f"{where}.name: {value['name']!r} given")
    if not re.fullmatch(r"\d{1,4}\.\d{1,4}\.\d{1,4}", value["runtimeVersionOverride"]):
        raise ValueError(f"{where}.runtimeVersionOverride: {value['runtimeVersionOverride']!r} given")
    if not [one for one in value["podTemplate"]["spec"]["containers"] if one["name"] == "main" and one["image"]]:
        raise ValueError(f"{where}.podTemplate: no container main with an image")


def _field(known: dict[str, str], name: str, where: str) -> str:
    if name not in known:
        raise ValueError(f"{where}.{name}: no such field; there are {', '.join(known)}")
    return known[name]


def _expect(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{where}: {value!r} given, expected {' or '.join(kind.__name__ for kind in kinds)}")
