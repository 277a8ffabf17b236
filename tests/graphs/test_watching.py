"""Dashboards, rules and docs/metrics.md are current and fit each other; alerts fire for what a target alone can do."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from graphs import metrics_doc
from graphs.dashboards import DASHBOARDS, FOLDER, as_json
from graphs.metrics_doc import PAGE, queries, rules, series_in
from graphs.services import free_port
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from tests.conftest import eventually, item, key, payload, soon
from tests.kvstore.test_target_process import Process
from tests.prometheus import Prometheus, promtool, watched

ROOT = Path(__file__).parents[2]
ALERTS = [rule for rule in rules() if "alert" in rule]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_committed_dashboards_are_current(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == as_json(name), "python -m graphs.dashboards"


def test_the_page_of_metrics_is_current() -> None:
    assert PAGE.read_text() == metrics_doc.page(), "python -m graphs.metrics_doc"


def test_names_follow_prometheus_conventions() -> None:
    for one in [*metrics_doc.of_target(), *metrics_doc.of_router(), *metrics_doc.of_worker()]:
        assert re.fullmatch(r"(kvtier_(target|router)|vllm:kvtier)_[a-z_]+", one.name)
        assert one.name.endswith("_total") == (one.kind == "counter"), one
        assert not re.search(r"_(ms|us|milliseconds|kib|mib|gib|percent)(_|$)", one.name), one
        assert not re.search(r"_(bytes|seconds|ratio)_(?!total$)", one.name), one  # the unit is last
        assert one.text.rstrip() == one.text != ""


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_have_what_grafana_asks_for(name: str) -> None:
    board = json.loads((FOLDER / f"{name}.json").read_text())
    assert board["uid"] == f"kvtier-{name}"
    assert board["templating"]["list"][0]["type"] == "datasource"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert 0 < len(references) == len(set(references))
        for target in panel["targets"]:
            used = set(re.findall(r"\$(?!__)(\w+)", target["expr"]))
            assert used <= variables, target


def test_grafana_finds_what_is_provisioned() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "kvtier.yml").read_text())["providers"]
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    mounted = [volume for volume in services["grafana"]["volumes"] if isinstance(volume, dict)]
    mounts = {volume["source"]: volume["target"] for volume in mounted}
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    for name in ("datasources", "dashboards"):
        assert mounts[f"./grafana/provisioning/{name}"] == f"/etc/grafana/provisioning/{name}"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (str(home.parent), (FOLDER / home.name).is_file()) == (provider["options"]["path"], True)
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_what_is_asked_for_exists() -> None:
    """Series of this project in dashboards and rules are those that the code has, or that a rule records."""
    known = {one.name for one in [*metrics_doc.of_target(), *metrics_doc.of_router(), *metrics_doc.of_worker()]}
    known |= {rule["record"] for rule in rules() if "record" in rule}
    read = series_in([*queries(), *(rule["expr"] for rule in rules())])
    assert {name for name in read if "kvtier" in name} <= known


def test_every_alert_leads_to_a_place_in_the_runbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/operations.md"
        assert anchor in anchors, rule["alert"]
        assert watched(rule)


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_rules_fire_and_are_silent_when_they_should() -> None:
    text = (Path(__file__).parent / "rules_test.yml").read_text()
    for rule in ALERTS:
        assert f"alertname: {rule['alert']}\n" in text
    promtool("test", "rules", str(Path(__file__).parent / "rules_test.yml"))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    folder = tmp_path / "store"
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    size = ["--capacity", "64MiB", "--segment-size", "4MiB", "--buffers", "32MiB"]
    return ["--dir", str(folder), *size, "--listen", address, "--nats", "", "--metrics-port", str(free_port())]


@pytest.fixture
def prometheus(tmp_path: Path, arguments: list[str]) -> Iterator[Prometheus]:
    job = {"job_name": "store", "static_configs": [{"targets": [f"127.0.0.1:{arguments[-1]}"]}]}
    one = Prometheus(tmp_path / "prometheus", {"rule_files": ["rules.yml"], "scrape_configs": [job]})
    yield one
    one.stop()


def test_a_target_in_trouble_is_told(arguments: list[str], prometheus: Prometheus) -> None:
    """It is too small, its disk flips a bit, and then it is killed: three alerts, each silent before."""
    process = Process(*arguments).ready()
    store = StoreClient(StaticMembership([arguments[arguments.index("--listen") + 1]]))

    def fires(name: str) -> Any:
        return name in prometheus.firing()

    eventually(lambda: prometheus.values("kvtier_target_chunks"))
    assert not fires("KvtierEvictedBeforeReuse")

    def put_all() -> bool:
        for number in range(80):  # of 1 MB, and there is room for 64 MiB
            store.put([item(number, 1_000_000)], soon())
        return fires("KvtierEvictedBeforeReuse")

    eventually(put_all, 60)
    store.put([item(1000)], soon())
    assert not fires("KvtierCorruptReads")
    flip_a_byte(Path(arguments[1]), payload(1000))
    assert store.get([key(1000)], [memoryview(bytearray(100_000))], soon()) == [Outcome.CORRUPT]
    eventually(lambda: fires("KvtierCorruptReads"))
    process.end(signal.SIGKILL)
    eventually(lambda: fires("KvtierStoreDown"))


def flip_a_byte(folder: Path, content: bytes) -> None:
    """Change what lies there, where it lies."""
    for path in folder.glob("segment-*"):
        if (place := path.read_bytes().find(content)) >= 0:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([content[0] ^ 1]))
                os.fsync(file.fileno())
            return
    raise LookupError("it lies nowhere")
