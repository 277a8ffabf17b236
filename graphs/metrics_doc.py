"""docs/metrics.md, made from what the processes register: `python -m graphs.metrics_doc` writes it."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prometheus_client import CollectorRegistry

from components.pricing.cost import Speeds
from components.router.decisions import Decisions
from components.router.series import BusCollector
from components.router.speeds import LiveSpeeds
from kvstore.__main__ import LabelledMetrics, Metrics, TlsMetrics
from kvstore.bus.residency import Mirror
from kvstore.disk.log import Log
from kvstore.disk.shelf import Shelf
from kvstore.net.lobby import Lobby
from kvstore.net.target import Target

_ROOT = Path(__file__).parent.parent
PAGE = _ROOT / "docs" / "metrics.md"
RULES = _ROOT / "docker" / "prometheus" / "rules.yml"
DASHBOARDS = _ROOT / "docker" / "grafana" / "dashboards"

_HEAD = """# Metrics

Made by `python -m graphs.metrics_doc` from the code; a test keeps it current. Units end a name, counters in `_total`.

"""
_TARGETS = """## Targets

On `--metrics-port` (7690 in containers). A target is no component of Dynamo and serves any number of models, so its
series have neither's labels. With `--namespaces` each has a label `namespace`.

"""
_ROUTER = """## Router

On its `DYN_SYSTEM_PORT`, beside Dynamo's own series and with their labels: `dynamo_namespace`, `dynamo_component`
(`kvtier_router`), `dynamo_endpoint`, `worker_id` (the router's own), `model`, `model_name`; and on its `--page`,
without those. `worker` is the instance id of a worker, as its `worker_id`.

"""
_WORKERS = """## Workers

On the worker's `DYN_SYSTEM_PORT`, among the engine's own series and with their labels: those above and `engine`.

"""
_OTHERS = """## Of Dynamo and vLLM

Their own series that the dashboards and rules read, too:

"""
_RULES = """## Recorded

By `docker/prometheus/rules.yml`:

"""
_ALERTS = """## Alerts

By the same file; each links to what to do.

"""


class Series(NamedTuple):
    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def of_target() -> list[Series]:
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder), 8 << 20, segment_bytes=4 << 20)
        try:
            target = Target(Shelf([log]), name="", epoch=0, buffer_bytes=64 << 20)
            registry = CollectorRegistry()
            registry.register(Metrics(target))
            registry.register(LabelledMetrics(Lobby()))
            registry.register(TlsMetrics(None))
            return [*_registered(registry), *_registered(target.registry)]
        finally:
            log.close()


def of_router() -> list[Series]:
    decisions = Decisions(16)
    decisions.registry.register(BusCollector([LiveSpeeds(Speeds(0.0, 1.0, 0.0, 1.0, 1.0, 0.0))], Mirror(), {}))
    return list(_registered(decisions.registry))


def of_worker() -> list[Series]:
    from components.worker.remote_tier import RemoteTier  # with it comes vLLM

    definitions = RemoteTier.build_metric_definitions({})
    return [
        Series(f"{name}_total", "counter", tuple(one.labelnames), one.documentation)
        for name, one in definitions.items()
    ]


def _registered(registry: CollectorRegistry) -> Iterator[Series]:
    for collector in registry._collector_to_names:  # prometheus_client tells labels and buckets nowhere else
        for family in collector.collect():
            labels = getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ())
            buckets = getattr(collector, "_kwargs", {}).get("buckets", ())
            kind = f"histogram, {buckets[0]:g} to {buckets[-1]:g}" if buckets else family.type
            total = "_total" if family.type == "counter" else ""
            yield Series(family.name + total, kind, tuple(labels), family.documentation)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    """Of every panel of every committed dashboard."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield target["expr"]


def series_in(expressions: Iterable[str]) -> set[str]:
    """Names of series that expressions read; a histogram's own for those of its parts."""
    found = re.findall(r"\b(?:kvtier|dynamo|vllm)[:_][\w:]+(?=[{\[) ]|$)", "\n".join(expressions), re.MULTILINE)
    return {name.removesuffix("_bucket") for name in found}


def page() -> str:
    tables = [
        _HEAD + _TARGETS + _table(of_target()),
        _ROUTER + _table(of_router()),
        _WORKERS + _table(of_worker()),
    ]
    read = series_in([*queries(), *(rule["expr"] for rule in rules())])
    others = sorted(name for name in read if not name.startswith(("kvtier", "vllm:kvtier")))
    recorded = [f"- `{rule['record']}`\n" for rule in rules() if "record" in rule]
    alerts = ["| alert | severity | says | |\n|---|---|---|---|\n"]
    for rule in rules():
        if "alert" in rule:
            notes = rule["annotations"]
            summary = re.sub(r"{{ *(?:\$labels\.)?([$\w]+)[^}]*}}", r"*\1*", notes["summary"]).replace(
                "*$value*", "*N*"
            )
            link = notes["runbook_url"].removeprefix("docs/")
            alerts.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {summary} | [what to do]({link}) |\n")
    tables.append(_OTHERS + "".join(f"- `{name}`\n" for name in others))
    tables.append(_RULES + "".join(recorded))
    tables.append(_ALERTS + "".join(alerts))
    return "\n".join(tables)


def _table(series: Iterable[Series]) -> str:
    lines = ["| series | kind | labels | |\n|---|---|---|---|\n"]
    lines += [f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.text} |\n" for one in series]
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
