"""What is rendered is what is committed, has the shape its readers ask for, and runs the commands that exist."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.router.__main__ import parse as parse_router
from components.worker.__main__ import parse as parse_worker
from graphs.render import IMAGES, render
from graphs.serve import dry_run
from graphs.service import load_deployment
from kvstore.__main__ import parse as parse_store
from kvstore.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "graphs" / "configs"
ROUTED = "graphs.agg_router:Frontend"
GRAPHS = [
    (ROUTED, "quickstart"),
    (ROUTED, "single_gpu"),
    (ROUTED, "two_gpu"),
    (ROUTED, "eight_gpu"),
    (ROUTED, "external_store"),
    ("graphs.disagg_router:Frontend", "disagg"),
    ("graphs.store_only:Store", "store"),
]
COMMITTED = [
    ("compose.yaml", "compose", ["--Store.ServiceArgs.workers=2"], "quickstart"),
    ("compose.gpu.yaml", "compose", [], "two_gpu"),
    ("k8s.yaml", "k8s", [], "two_gpu"),
]
# The fields of DynamoGraphDeployment v1alpha1 (deploy/operator/api/v1alpha1 of ai-dynamo/dynamo) that are used here.
COMPONENT = {
    "componentType": str,
    "subComponentType": str,
    "globalDynamoNamespace": bool,
    "replicas": int,
    "envs": list,
    "resources": dict,
    "sharedMemory": dict,
    "extraPodSpec": dict,
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def commands(text: str) -> list[list[str]]:
    """The commands of a compose file's own services, as the containers get them."""
    services = yaml.safe_load(text)["services"].values()
    return [[word.replace("$$", "$") for word in s["command"]] for s in services if "build" in s]


def parsed(command: list[str]) -> None:
    """Raises if the command's own parser does not take its arguments."""
    parsers = {"kvstore": parse_store, "components.router": parse_router, "components.worker": parse_worker}
    assert command[:2] == ["python", "-m"]
    if command[2] in parsers:
        parsers[command[2]](command[3:])
    else:
        assert command[2] in ("dynamo.vllm", "dynamo.frontend")


@pytest.mark.parametrize(("file", "target", "overrides", "config"), COMMITTED, ids=lambda value: str(value))
def test_what_is_committed_is_up_to_date(file: str, target: str, overrides: list[str], config: str) -> None:
    text = render(target, ROUTED, CONFIGS / f"{config}.yaml", overrides, Path("docker"))
    assert (ROOT / "docker" / file).read_text() == text


@pytest.mark.parametrize(("graph", "config"), GRAPHS)
def test_every_graph_runs_and_renders(graph: str, config: str, tmp_path: Path) -> None:
    path = CONFIGS / f"{config}.yaml"
    assert dry_run(load_deployment(graph, path, [], tmp_path))
    for command in commands(render("compose", graph, path, [], Path("docker"))):
        parsed(command)
    kinds = [document["kind"] for document in yaml.safe_load_all(render("k8s", graph, path, [], Path("docker")))]
    assert "DynamoGraphDeployment" in kinds or config == "store"


def test_the_graph_without_a_router_shows_its_workers(tmp_path: Path) -> None:
    overrides = ["--VllmWorker.model=a/b"]
    processes = load_deployment("graphs.agg:Frontend", None, overrides, tmp_path).processes()
    worker = next(process for process in processes if process.service == "VllmWorker")
    assert list(worker.command[-2:]) == ["--endpoint-types", "chat,completions"]


def test_prefill_workers_have_the_tier_beside_nixl(tmp_path: Path) -> None:
    deployment = load_deployment("graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", [], tmp_path)
    processes = {process.name: process for process in deployment.processes()}
    prefill, decode = processes["PrefillWorker-0"], processes["DecodeWorker-0"]
    assert any("MultiConnector" in word for word in prefill.command)
    assert any("KvtierConnector" in word for word in prefill.command)
    assert not any("Kvtier" in word for word in decode.command)
    assert (prefill.env["CUDA_VISIBLE_DEVICES"], decode.env["CUDA_VISIBLE_DEVICES"]) == ("0", "1")


def test_gpus_are_taken_from_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    deployment = load_deployment(ROUTED, CONFIGS / "two_gpu.yaml", [], tmp_path)
    seen = [p.env["CUDA_VISIBLE_DEVICES"] for p in deployment.processes() if p.service == "VllmWorker"]
    assert seen == ["5", "7"]
    with pytest.raises(ConfigError, match="at most the GPUs of CUDA_VISIBLE_DEVICES=5,7"):
        load_deployment(ROUTED, CONFIGS / "eight_gpu.yaml", [], tmp_path).processes()


def test_compose_hangs_together() -> None:
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services: dict[str, Any] = content["services"]
    assert {"nats", "etcd", "store-0", "store-1", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert {"image", "healthcheck", "restart", "cap_drop"} <= set(service), name
        assert set(service.get("depends_on", {})) <= set(services)
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source.startswith((".", "/")) or source in content["volumes"]
        for use in service.get("configs", []):
            assert use["source"] in content["configs"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    scraped = yaml.safe_load(content["configs"]["prometheus"]["content"])["scrape_configs"]
    hosts = {target.partition(":")[0] for job in scraped for target in job["static_configs"][0]["targets"]}
    assert hosts <= set(services)


def test_manifests_have_the_fields_of_the_operators_types() -> None:
    documents = list(yaml.safe_load_all((ROOT / "docker" / "k8s.yaml").read_text()))
    graph = documents[-1]
    assert (graph["apiVersion"], graph["kind"]) == ("nvidia.com/v1alpha1", "DynamoGraphDeployment")
    assert set(graph["spec"]) == {"backendFramework", "services"}
    for name, component in graph["spec"]["services"].items():
        for key, value in component.items():
            assert isinstance(value, COMPONENT[key]), (name, key)
        assert component["componentType"] in ("frontend", "worker")
        main = component["extraPodSpec"]["mainContainer"]
        parsed([*main["command"], *main["args"]])
    worker = graph["spec"]["services"]["VllmWorker"]
    assert worker["resources"] == {"limits": {"gpu": "1"}}
    stateful = next(document for document in documents if document["kind"] == "StatefulSet")
    container = stateful["spec"]["template"]["spec"]["containers"][0]
    parse_store(container["command"][3:])
    assert "$(POD_NAME).kvtier-store:7600" in container["command"]


def test_one_setting_changes_everywhere(tmp_path: Path) -> None:
    config = tmp_path / "changed.yaml"
    config.write_text((CONFIGS / "two_gpu.yaml").read_text().replace("dram: 32GiB", "dram: 48GiB"))
    served = "\n".join(dry_run(load_deployment(ROUTED, config, [], tmp_path)))
    for text in (served, *(render(target, ROUTED, config, [], Path("docker")) for target in ("compose", "k8s"))):
        assert "48GiB" in text
        assert "32GiB" not in text


def test_images_run_without_root() -> None:
    for file in IMAGES.values():
        lines = (ROOT / "docker" / file).read_text().splitlines()
        assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
        for line in lines:
            if line.startswith("COPY ") and "--from" not in line:
                assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


def test_bad_input_is_told() -> None:
    command = [sys.executable, "-m", "graphs.cli", "render", "compose", ROUTED, "-f", "/nowhere.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "config: '/nowhere.yaml' given" in ended.stderr
