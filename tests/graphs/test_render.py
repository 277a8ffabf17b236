"""What is rendered is what is committed, has the shape its readers ask for, and runs the commands that exist."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo.frontend.frontend_args import FrontendArgGroup

from components.router.__main__ import parse as parse_router
from components.worker.__main__ import parse as parse_worker
from graphs.render import IMAGES, PLACES, render
from graphs.serve import dry_run
from graphs.service import load_deployment
from kvstore.__main__ import parse as parse_store
from kvstore.errors import ConfigError
from tests.graphs import manifests

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "graphs" / "configs"
ROUTED = "graphs.agg_router:Frontend"
GRAPHS = [
    ("graphs.agg:Frontend", "agg"),
    (ROUTED, "quickstart"),
    (ROUTED, "single_gpu"),
    (ROUTED, "two_gpu"),
    (ROUTED, "eight_gpu"),
    (ROUTED, "external_store"),
    ("graphs.disagg_router:Frontend", "disagg"),
    ("graphs.disagg_router:Frontend", "disagg_quickstart"),
    ("graphs.store_only:Store", "store"),
]
COMMITTED = [
    ("compose.yaml", "compose", ["--Store.ServiceArgs.workers=2"], "quickstart"),
    ("compose.gpu.yaml", "compose", [], "two_gpu"),
    ("prometheus/prometheus.yml", "prometheus", ["--Store.ServiceArgs.workers=2"], "quickstart"),
    ("k8s.yaml", "k8s", [], "two_gpu"),
]


# Every setting of containers, and memory.
EVERYTHING = [
    "--Containers.registry=registry.example:5000/team/",
    "--Containers.tag=nightly",
    "--Containers.pull-secrets=[registry]",
    "--Containers.model_cache=models",
    "--Containers.storage-class=local-nvme",
    "--Containers.nodes={Store: {disks: nvme}}",
    "--Containers.tolerations.Store=[{key: storage, operator: Exists, effect: NoSchedule}]",
    "--Containers.monitoring={release: prometheus}",
    "--Store.ServiceArgs.resources={cpu: 4, memory: 24GiB}",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def commands(text: str) -> list[list[str]]:
    """The commands of a compose file's own services, as the containers get them."""
    services = yaml.safe_load(text)["services"].values()
    return [[word.replace("$$", "$") for word in s["command"]] for s in services if "build" in s]


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """Source and target of each volume of a compose service."""
    listed = service.get("volumes", [])
    return [tuple(one.split(":")[:2]) if isinstance(one, str) else (one["source"], one["target"]) for one in listed]


def parse_frontend(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    FrontendArgGroup().add_arguments(parser)
    parser.parse_args(arguments)


def parsed(command: list[str]) -> None:
    """Raises if the command's own parser does not take its arguments. Those of dynamo.vllm: tests/engine."""
    parsers = {
        "kvstore": parse_store,
        "components.router": parse_router,
        "components.worker": parse_worker,
        "dynamo.frontend": parse_frontend,
    }
    assert command[:2] == ["python", "-m"]
    if command[2] != "dynamo.vllm":
        parsers[command[2]](command[3:])


@pytest.mark.parametrize(("file", "target", "overrides", "config"), COMMITTED, ids=lambda value: str(value))
def test_what_is_committed_is_up_to_date(file: str, target: str, overrides: list[str], config: str) -> None:
    text = render(target, ROUTED, CONFIGS / f"{config}.yaml", overrides, Path("docker"))
    assert (ROOT / "docker" / file).read_text() == text


def test_no_graph_and_no_example_is_left_out() -> None:
    """docs/operations.md says so."""
    assert {config for _, config in GRAPHS} == {path.stem for path in CONFIGS.glob("*.yaml")}
    linked = re.compile(r"^\w+\.link\(", re.MULTILINE)
    graphs = {path.stem for path in CONFIGS.parent.glob("*.py") if linked.search(path.read_text())}
    assert {graph.partition(":")[0].removeprefix("graphs.") for graph, _ in GRAPHS} == graphs


@pytest.mark.parametrize(("graph", "config"), GRAPHS)
def test_every_graph_runs_and_renders(graph: str, config: str, tmp_path: Path) -> None:
    """Compose files are read by Docker Compose itself, manifests by Kubernetes' own types and Dynamo's."""
    path = CONFIGS / f"{config}.yaml"
    assert dry_run(load_deployment(graph, path, [], tmp_path))
    text = render("compose", graph, path, [], Path("docker"))
    for command in commands(text):
        parsed(command)
    compose_accepts(text, tmp_path)
    for overrides in ([], EVERYTHING):
        documents = list(yaml.safe_load_all(render("k8s", graph, path, overrides, Path("docker"))))
        for document in documents:
            manifests.read(document)
        assert manifests.GRAPH in {document["kind"] for document in documents} or config == "store"


def manifest(kind: str, overrides: list[str], config: str = "two_gpu") -> Any:
    """The last of its kind."""
    text = render("k8s", ROUTED, CONFIGS / f"{config}.yaml", overrides, Path("docker"))
    return [one for one in yaml.safe_load_all(text) if one["kind"] == kind][-1]


def test_what_the_settings_say_of_containers_is_in_all_of_them() -> None:
    stateful = manifest("StatefulSet", EVERYTHING)["spec"]
    components = manifest(manifests.GRAPH, EVERYTHING)["spec"]["components"]
    pods = [stateful["template"]["spec"], *(one["podTemplate"]["spec"] for one in components)]
    for pod in pods:
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert re.fullmatch(r"registry\.example:5000/team/kvtier/[a-z]+:nightly", pod["containers"][0]["image"])
    assert pods[0]["nodeSelector"] == {"disks": "nvme"}
    assert pods[0]["tolerations"] == [{"key": "storage", "operator": "Exists", "effect": "NoSchedule"}]
    assert not {"nodeSelector", "tolerations"} & pods[1].keys()
    assert stateful["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "local-nvme"
    assert pods[0]["containers"][0]["resources"] == {
        "requests": {"cpu": "4", "memory": "24576Mi"},
        "limits": {"memory": "24576Mi"},
    }
    for pod in pods[1:]:
        (cache,) = pod["volumes"]
        assert cache["persistentVolumeClaim"] == {"claimName": "models"}
        assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/cache"]
    compose = yaml.safe_load(render("compose", ROUTED, CONFIGS / "two_gpu.yaml", EVERYTHING, Path("docker")))
    store = compose["services"]["store-0"]
    assert store["image"] == "registry.example:5000/team/kvtier/store:nightly"
    assert store["mem_limit"] == 24 << 30


def test_prometheus_finds_every_pod_under_the_job_that_alerts_look_for() -> None:
    labels = [manifest("StatefulSet", EVERYTHING)["spec"]["template"]["metadata"]["labels"]]
    graph = manifest(manifests.GRAPH, EVERYTHING)
    labels += [one["podTemplate"]["metadata"]["labels"] for one in graph["spec"]["components"]]
    monitor, rules = manifest("PodMonitor", EVERYTHING), manifest("PrometheusRule", EVERYTHING)
    label = monitor["spec"]["jobLabel"]
    assert [one[label] for one in labels] == ["store", "vllmworker", "router", "frontend"]
    assert graph["metadata"]["annotations"] == {"nvidia.com/enable-metrics": "false"}  # or all would be counted twice
    assert monitor["metadata"]["labels"] == rules["metadata"]["labels"] == {"release": "prometheus"}
    assert rules["spec"] == yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())
    board = manifest("ConfigMap", EVERYTHING)
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    (text,) = board["data"].values()
    assert json.loads(text)["uid"] == "kvtier-workers"


def test_brokers_that_run_already_are_used_and_none_is_rendered() -> None:
    overrides = ["--Nats.servers=nats://platform-nats.dynamo:4222", "--Etcd.servers=a.dynamo:2379,b.dynamo:2379"]
    text = render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", overrides, Path("docker"))
    assert "kvtier-nats" not in text
    assert "kvtier-etcd" not in text
    container = manifest("StatefulSet", overrides)["spec"]["template"]["spec"]["containers"][0]
    options = parse_store(container["command"][3:])
    assert (options.nats, options.etcd) == ("nats://platform-nats.dynamo:4222", "a.dynamo:2379,b.dynamo:2379")
    worker = manifest(manifests.GRAPH, overrides)["spec"]["components"][0]["podTemplate"]["spec"]["containers"][0]
    variables = {one["name"]: one.get("value") for one in worker["env"]}
    assert variables["NATS_SERVER"] == "nats://platform-nats.dynamo:4222"
    assert variables["ETCD_ENDPOINTS"] == "http://a.dynamo:2379,http://b.dynamo:2379"
    assert worker["args"][worker["args"].index("--store") + 1] == "etcd://a.dynamo:2379,b.dynamo:2379"


def test_who_writes_manifests_is_told_how_to_reach_what_they_make(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graphs.cli", "render", "k8s", ROUTED, "-f", str(CONFIGS / "quickstart.yaml")]
    written = [*command, "-o", str(tmp_path / "k8s.yaml")]
    ended = subprocess.run(written, capture_output=True, text=True, timeout=60, check=True)
    assert "kubectl port-forward svc/kvtier-frontend 8000" in ended.stdout
    assert re.search(r"kubectl port-forward \$\(kubectl get pods -o name -l kvtier/job=router .*\) 8300", ended.stdout)


def compose_accepts(text: str, tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "compose.yaml").write_text(text)
    program = str(Path(sys.executable).parent / "docker-compose")
    command = [program, "-f", str(tmp_path / "compose.yaml"), "config", "--quiet"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not ended.stderr, ended.stderr
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("capacities: 3", "services.nats.capacities false schema"),
        ("ports: true", "services.nats.ports must be a array"),
        ("depends_on: [nobody]", "depends on undefined service"),
    ],
)
def test_compose_would_refuse_what_is_wrong(tmp_path: Path, wrong: str, says: str) -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text().replace("  nats:\n", f"  nats:\n    {wrong}\n", 1)
    with pytest.raises(AssertionError, match=says):
        compose_accepts(text, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("replicas: 2\n    sharedM", "replicas: two\n    sharedM", r"components\[0\].replicas: 'two' is not of type"),
        ("sharedMemorySize:", "sharedMemory:", r"components\[0\]: .* \('sharedMemory' was unexpected"),
        ("httpGet:", "httpPut:", "'httpPut' was unexpected"),
        ("readOnlyRootFilesystem", "readonlyRootFilesystem", "securityContext.readonlyRootFilesystem: no such field"),
        ("type: frontend", "type: front", "'front' is not one of"),
        ("name: main", "name: mine", "no container main"),
        (
            "serviceName: kvtier-store",
            "podManagementPolicy: Parallel",
            "StatefulSet.spec: Invalid value for `service_name`",
        ),
    ],
)
def test_manifests_that_are_wrong_are_noticed(old: str, new: str, says: str) -> None:
    text = (ROOT / "docker" / "k8s.yaml").read_text()
    assert old in text
    documents = list(yaml.safe_load_all(text.replace(old, new)))
    with pytest.raises(ValueError, match=says):
        list(map(manifests.read, documents))


def test_the_graph_without_a_router_shows_its_workers(tmp_path: Path) -> None:
    overrides = ["--VllmWorker.model=a/b"]
    processes = load_deployment("graphs.agg:Frontend", None, overrides, tmp_path).processes()
    worker = next(process for process in processes if process.service == "VllmWorker")
    assert list(worker.command[-2:]) == ["--endpoint-types", "chat,completions"]


def test_prefill_and_decode_workers_have_the_tier_beside_nixl(tmp_path: Path) -> None:
    deployment = load_deployment("graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", [], tmp_path)
    processes = {process.name: process for process in deployment.processes()}
    prefill, decode = processes["PrefillWorker-0"], processes["DecodeWorker-0"]
    for worker in (prefill, decode):
        transfer = json.loads(worker.command[-1])
        nixl, ours = transfer["kv_connector_extra_config"]["connectors"]
        names = [one["kv_connector"] for one in (transfer, nixl, ours)]
        assert names == ["MultiConnector", "NixlConnector", "KvtierConnector"]  # what is handed over comes by NIXL
        assert ours["kv_connector_extra_config"]["kv_cache_layout"] is None  # NIXL asks for one, and they must agree
    assert " --endpoint dynamo.prefill.generate" in " ".join(prefill.command)
    ports = [process.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for process in (prefill, decode)]
    assert len(set(ports)) == 2
    assert (prefill.env["CUDA_VISIBLE_DEVICES"], decode.env["CUDA_VISIBLE_DEVICES"]) == ("0", "1")


def test_cpu_workers_that_hand_over_by_nixl_reach_every_core(tmp_path: Path) -> None:
    """vLLM's connector moves to the machine's last core, and ends the worker where it may not."""
    text = render("compose", "graphs.disagg_router:Frontend", CONFIGS / "disagg_quickstart.yaml", [], tmp_path)
    services = yaml.safe_load(text)["services"]
    workers = [services[name] for name in ("prefillworker-0", "decodeworker-0")]
    assert not any("cpuset" in worker for worker in workers)
    assert [worker["environment"]["VLLM_CPU_OMP_THREADS_BIND"] for worker in workers] == ["0", "1"]


def test_prefill_and_decode_workers_are_found_by_their_router_alone(tmp_path: Path) -> None:
    namespaces = [f"--{name}.namespace=ours" for name in ("PrefillWorker", "DecodeWorker")]
    overrides = ["--PrefillWorker.endpoint=dynamo.readers.generate", *namespaces]
    deployment = load_deployment("graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", overrides, tmp_path)
    shown = {process.name: " ".join(process.command) for process in deployment.processes()}
    names = ["Nats", "Store-0", "PrefillWorker-0", "DecodeWorker-0", "Router-0", "Frontend-0"]
    assert list(shown) == names
    router = shown["Router-0"]
    assert "--model-name llama-8b --model-path meta-llama/Llama-3.1-8B-Instruct" in router
    both = "--endpoint dynamo.readers.generate --worker-type prefill --decode-endpoint dynamo.backend.generate"
    assert f"{both} --namespace ours" in router
    assert "--served-model-name llama-8b-prefill" in shown["PrefillWorker-0"]
    assert "--served-model-name llama-8b-decode " in shown["DecodeWorker-0"]
    assert "-m components.worker " in shown["DecodeWorker-0"]
    assert "--router-mode" not in shown["Frontend-0"]
    stock = load_deployment(
        "graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", ["--DecodeWorker.tier=false"], tmp_path
    )
    (decode,) = [" ".join(process.command) for process in stock.processes() if process.name == "DecodeWorker-0"]
    assert "-m dynamo.vllm " in decode
    assert "--endpoint-types none --kv-events-config" in decode
    assert "Kvtier" not in decode
    with pytest.raises(ConfigError, match=r"DecodeWorker.namespace: 'default' conflicts with PrefillWorker.namespace"):
        load_deployment("graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", overrides[:2], tmp_path).processes()
    apart = ["--PrefillWorker.blocks-per-chunk=4"]
    with pytest.raises(ConfigError, match=r"DecodeWorker.blocks-per-chunk: '.*' conflicts with PrefillWorker"):
        load_deployment("graphs.disagg_router:Frontend", CONFIGS / "disagg.yaml", apart, tmp_path).processes()


def test_gpus_are_taken_from_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    deployment = load_deployment(ROUTED, CONFIGS / "two_gpu.yaml", [], tmp_path)
    seen = [p.env["CUDA_VISIBLE_DEVICES"] for p in deployment.processes() if p.service == "VllmWorker"]
    assert seen == ["5", "7"]
    with pytest.raises(ConfigError, match="at most the GPUs of CUDA_VISIBLE_DEVICES=5,7"):
        load_deployment(ROUTED, CONFIGS / "eight_gpu.yaml", [], tmp_path).processes()


def test_cores_are_given_out_in_turn() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    for name, core in (("vllmworker-0", "0"), ("vllmworker-1", "1")):
        assert services[name]["cpuset"] == services[name]["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == core


def test_compose_hangs_together() -> None:
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services: dict[str, Any] = content["services"]
    assert {"nats", "etcd", "store-0", "store-1", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert {"image", "healthcheck", "restart", "cap_drop"} <= set(service), name
        assert set(service.get("depends_on", {})) <= set(services)
        for source, _ in mounts(service):
            assert source.startswith((".", "/")) or source in content["volumes"]
        for use in service.get("configs", []):
            assert use["source"] in content["configs"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    scraped = yaml.safe_load(content["configs"]["prometheus"]["content"])["scrape_configs"]
    hosts = {target.partition(":")[0] for job in scraped for target in job["static_configs"][0]["targets"]}
    assert hosts <= set(services)


def test_manifests_run_the_commands_that_exist() -> None:
    documents = list(yaml.safe_load_all((ROOT / "docker" / "k8s.yaml").read_text()))
    graph = documents[-1]["spec"]["components"]
    mains = {component["name"]: component["podTemplate"]["spec"]["containers"][0] for component in graph}
    for main in mains.values():
        parsed([*main["command"], *main["args"]])
    assert mains["VllmWorker"]["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    stateful = next(document for document in documents if document["kind"] == "StatefulSet")
    container = stateful["spec"]["template"]["spec"]["containers"][0]
    parse_store(container["command"][3:])
    assert "$(POD_NAME).kvtier-store:7600" in container["command"]


def test_images_have_what_their_services_use() -> None:
    """Folders that are mounted are the user's own; ports are declared; and nobody is root."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    processes = load_deployment(ROUTED, CONFIGS / "quickstart.yaml", [], Path("/data"), PLACES["compose"]).processes()
    ports = {process.name.lower(): {process.port, process.metrics_port} - {0} for process in processes}
    for name, service in services.items():
        if "build" not in service:
            continue
        image = (ROOT / service["build"]["dockerfile"]).read_text()
        for _, folder in mounts(service):
            assert re.search(rf"install -d -o (1000|kvtier) .*{folder if folder.count('/') == 1 else '/models'}", image)
        exposed = {int(port) for line in re.findall(r"^EXPOSE (.*)$", image, re.MULTILINE) for port in line.split()}
        assert ports.get(name, set()) <= exposed, name


def test_one_setting_changes_everywhere(tmp_path: Path) -> None:
    config = tmp_path / "changed.yaml"
    config.write_text((CONFIGS / "two_gpu.yaml").read_text().replace("dram: 32GiB", "dram: 48GiB"))
    served = "\n".join(dry_run(load_deployment(ROUTED, config, [], tmp_path)))
    for text in (served, *(render(target, ROUTED, config, [], Path("docker")) for target in ("compose", "k8s"))):
        assert "48GiB" in text
        assert "32GiB" not in text


@pytest.mark.parametrize(
    ("said", "host"),
    [
        ([], "127.0.0.1"),
        (["--Router.page-token-file=/etc/kvtier/page.token"], "0.0.0.0"),
        (["--Router.page-open=true"], "0.0.0.0"),
    ],
)
def test_a_page_in_a_network_with_others_is_the_pods_own_until_it_is_said_who_may_look(
    said: list[str], host: str
) -> None:
    """Otherwise the router would end at its start."""
    text = render("k8s", ROUTED, CONFIGS / "quickstart.yaml", said, Path("docker"))
    command = [str(word) for word in re.findall(r"^ *- (\S+)$", text, re.MULTILINE)]
    assert command[command.index("--page") + 1] == f"{host}:8300"


def secret_settings(folder: Path) -> list[str]:
    """Settings of a secret in every place that takes one; the secret is SECRET."""
    entries = [
        {"name": "a", "quota": "1GiB", "credential-file": "a.secret"},
        {"name": "b", "quota": "1GiB", "credential-env": "B_CREDENTIAL"},
        {"name": "c", "quota": "1GiB", "credential": SECRET},
    ]
    (folder / "namespaces.yaml").write_text(yaml.safe_dump({"namespaces": entries}))
    for name in ("a.secret", "keys.yaml", "credential", "token"):
        (folder / name).write_text(SECRET)
    return [
        f"--Store.namespaces={folder}/namespaces.yaml",
        f"--VllmWorker.seal-key={folder}/keys.yaml",
        f"--VllmWorker.credential-file={folder}/credential",
        "--VllmWorker.model=owner/model",
        f"--VllmWorker.env.HF_TOKEN={SECRET}",
        f"--Router.env.NATS_AUTH_PASSWORD={SECRET}",
        "--Router.page=127.0.0.1:8300",
        f"--Router.page-token-file={folder}/token",
    ]


SECRET = "marked-secret-$HOME"


@pytest.mark.parametrize("target", ["compose", "k8s"])
def test_secrets_are_passed_and_never_written(target: str, tmp_path: Path) -> None:
    text = render(target, ROUTED, CONFIGS / "quickstart.yaml", secret_settings(tmp_path), tmp_path)
    assert "marked-secret" not in text
    if target == "compose":
        compose_accepts(text, tmp_path)
        content = yaml.safe_load(text)
        services = content["services"]
        for service, names in {
            "vllmworker-0": {"seal-key", "credential-file"},
            "store-0": {"namespaces", "a.secret"},
            "router-0": {"page-token-file"},
        }.items():
            uses = services[service]["secrets"]
            assert {use["target"] for use in uses} == names
            assert all((tmp_path / content["secrets"][use["source"]]["file"]).is_file() for use in uses)
        assert services["store-0"]["environment"] == {"B_CREDENTIAL": None}
        assert services["vllmworker-0"]["environment"]["HF_TOKEN"] is None
        assert services["router-0"]["environment"]["NATS_AUTH_PASSWORD"] is None
        command = services["vllmworker-0"]["command"]
        assert command[command.index("--seal-key") + 1] == "/run/secrets/seal-key"
        return
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        manifests.read(document)
    worker = documents[-1]["spec"]["components"][0]["podTemplate"]["spec"]
    (volume,) = worker["volumes"]
    items = {item["key"]: item["path"] for item in volume["secret"]["items"]}
    assert items == {"vllmworker-seal-key": "seal-key", "vllmworker-credential-file": "credential-file"}
    variables = {one["name"]: one for one in worker["containers"][0]["env"]}
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hf-token-secret"
    assert f"--from-file=vllmworker-seal-key={tmp_path}/keys.yaml" in text


def test_folders_are_mounted_whatever_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder that looks like owner/model is the same to serve and render."""
    monkeypatch.chdir(tmp_path)
    name = "owner/a $HOME: of models"
    (tmp_path / name).mkdir(parents=True)
    text = render("compose", ROUTED, CONFIGS / "quickstart.yaml", [f"--VllmWorker.model='{name}'"], tmp_path / "out")
    compose_accepts(text, tmp_path / "out")
    resolved = [str(Path(sys.executable).parent / "docker-compose"), "-f", str(tmp_path / "out/compose.yaml"), "config"]
    ended = subprocess.run([*resolved, "--format=json"], capture_output=True, text=True, timeout=60, check=True)
    volumes = json.loads(ended.stdout)["services"]["vllmworker-0"]["volumes"]
    assert str(tmp_path / name) in {volume["source"].replace("$$", "$") for volume in volumes}


def test_what_compose_writes_into_a_container_can_be_written() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    assert not any(service.get("read_only") for service in services if "configs" in service)


def test_targets_keep_chunks_in_the_folders_that_the_settings_name() -> None:
    """As under `dynamo serve`, and not on the disk on which Docker has its volumes."""
    text = render("compose", ROUTED, CONFIGS / "two_gpu.yaml", [], Path("docker"))
    services = yaml.safe_load(text)["services"]
    for name, folder in (("store-0", "/nvme/0"), ("store-1", "/nvme/1")):
        (volume,) = services[name]["volumes"]
        assert (volume["source"], volume["target"], volume.get("read_only", False)) == (folder, "/data", False)
    assert "# It needs: install -d -o 1000 -g 1000 /nvme/0 /nvme/1\n" in text


def test_a_page_that_other_machines_reach_asks_for_a_token() -> None:
    overrides = ["--Router.page=0.0.0.0:8300"]
    text = render("compose", ROUTED, CONFIGS / "quickstart.yaml", overrides, Path("docker"))
    router = yaml.safe_load(text)["services"]["router-0"]
    assert "--page-open" not in router["command"]
    assert router["environment"]["KVTIER_PAGE_TOKEN"] is None  # of whoever calls compose


def test_targets_have_the_time_to_stop_that_they_may_flush() -> None:
    overrides = ["--Store.flush=300", "--Store.durability=memory"]
    text = render("compose", ROUTED, CONFIGS / "two_gpu.yaml", overrides, Path("docker"))
    services = yaml.safe_load(text)["services"]
    grace = manifest("StatefulSet", overrides)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert (services["store-0"]["stop_grace_period"], services["router-0"]["stop_grace_period"]) == ("340s", "60s")
    assert grace == 340


def test_a_namespace_that_restricts_pods_takes_all_of_them() -> None:
    """The Pod Security Standard `restricted`."""
    text = render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", ["--Etcd.ServiceArgs.workers=1"], Path("docker"))
    documents = list(yaml.safe_load_all(text))
    pods = [one["spec"]["template"]["spec"] for one in documents if one["kind"] in ("Deployment", "StatefulSet")]
    pods += [one["podTemplate"]["spec"] for one in documents[-1]["spec"]["components"]]
    assert len(pods) == 6
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("target", ["compose", "k8s"])
def test_values_reach_the_process_as_they_are_written(target: str) -> None:
    """Compose takes $ for a variable of its own, Kubernetes $(NAME) for one of the container's."""
    value = "a\n$(POD_NAME) $$ $HOME: b"
    text = render(target, ROUTED, CONFIGS / "two_gpu.yaml", [f"--VllmWorker.env.VALUE={value}"], Path("docker"))
    documents = list(yaml.safe_load_all(text))
    assert documents[0].get("name", "kvtier-two_gpu") == "kvtier-two_gpu"
    if target == "compose":
        given = documents[0]["services"]["vllmworker-0"]["environment"]["VALUE"]
    else:
        worker = documents[-1]["spec"]["components"][0]["podTemplate"]["spec"]["containers"][0]
        (given,) = [one["value"] for one in worker["env"] if one["name"] == "VALUE"]
    assert re.sub(r"\$\$", "$", given) == value
    assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", given)
    assert shlex.split(text.splitlines()[0])[:3] == ["#", "dynamo", "render"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--Frontend.host=gateway"], r"Frontend\.host: 'gateway' given, expected an IP address"),
        (["--Router.page=127.0.0.1:8000"], "frontend-0.port: '8000' conflicts with router-0, expected another port"),
        (["--Router.page=127.0.0.1:3000"], "grafana.port: '3000' conflicts with router-0, expected another port"),
        (["--Router.page=127.0.0.1:9200"], r"Router-0\.port: '9200' conflicts with "),
        (["--Store.dir=/dev/nvme1n1"], r"Store\.dir: '/dev/nvme1n1.*' given, expected a folder"),
        (["--Nats.ServiceArgs.workers=0"], r":10: Nats\.listen: '127.0.0.1:4222' given, expected an address that"),
        (["--Nats.servers=localhost:4222"], r"Nats\.servers: 'localhost:4222' given, expected an address that"),
        (["--Etcd.servers='[::1]:2379'"], r"Etcd\.servers: '\[::1\]:2379' given, expected an address that"),
        (["--Store.addresses=127.0.0.1:7600"], r"Store\.addresses: '127.0.0.1:7600' given, expected an address that"),
        (
            ["--Store.durability=memory", "--Store.hot=0"],
            r"Store\.hot: missing, required by --durability memory",
        ),
        (["--Store.tls-cert=c.pem"], r"Store\.tls-key: missing, required by --tls-cert"),
        (["--Store.ServiceArgs.resources.memory=1XB"], r"memory: '1XB' given, expected a size such as 500G"),
        (["--Containers.tag=1.0"], r"Containers\.tag: '1.0' given, expected a text, in quotes"),
        (["--Containers.tag=-a"], r"Containers\.tag: '-a' given, expected at most 128 letters"),
        (["--Containers.registry=https://a"], r"Containers\.registry: 'https://a' given, expected host, host:port or"),
        (["--Containers.project=A"], r"Containers\.project: 'A' given, expected lower-case letters"),
        (["--Containers.nodes.Stroe={a: b}"], r"Containers\.nodes: 'Stroe' given, expected a service of the graph: "),
        (
            ["--Containers.tolerations.Store=[{keys: a}]"],
            r"tolerations\.Store\.0\.keys: unknown, expected one of key, operator, value, effect, tolerationSeconds",
        ),
    ],
)
def test_what_containers_could_not_start_with_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        render("compose", ROUTED, CONFIGS / "two_gpu.yaml", overrides, Path("docker"))


def test_a_file_whose_name_no_secret_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text("namespaces: [{name: a, quota: 1GiB, credential-file: a b}]")
    (tmp_path / "a b").write_text("a" * 32)
    for target in ("compose", "k8s"):
        with pytest.raises(ConfigError, match="namespaces: 'a b' given, expected a name of letters"):
            render(target, ROUTED, CONFIGS / "two_gpu.yaml", [f"--Store.namespaces={tmp_path}/names.yaml"], tmp_path)


def test_a_file_that_a_secret_is_made_of_is_quoted(tmp_path: Path) -> None:
    text = render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", [f"--VllmWorker.seal-key={tmp_path}/a key"], tmp_path)
    (line,) = [line for line in text.splitlines() if "kubectl create secret" in line]
    assert shlex.split(line)[-1] == f"--from-file=vllmworker-seal-key={tmp_path}/a key"


def test_published_ports_are_loopbacks_and_each_is_once() -> None:
    overrides = ["--Frontend.ServiceArgs.workers=2", "--Router.ServiceArgs.workers=2", "--Frontend.host=localhost"]
    text = render("compose", ROUTED, CONFIGS / "quickstart.yaml", overrides, Path("docker"))
    ports = [port for service in yaml.safe_load(text)["services"].values() for port in service.get("ports", [])]
    assert {"127.0.0.1:8000:8000", "127.0.0.1:8001:8000", "127.0.0.1:8300:8300", "127.0.0.1:8301:8300"} <= set(ports)
    assert len({port.rpartition(":")[0] for port in ports}) == len(ports)
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_two_clusters_of_one_machine_share_no_name_and_no_port() -> None:
    other = ["--Containers.prometheus-port=9191", "--Containers.grafana_port=3100", "--Frontend.port=8100"]
    rendered = [
        yaml.safe_load(render("compose", ROUTED, CONFIGS / f"{config}.yaml", overrides, Path("docker")))
        for config, overrides in (("quickstart", []), ("two_gpu", [*other, "--Router.page=127.0.0.1:8400"]))
    ]
    names = [one["name"] for one in rendered]
    published = [
        {port.rpartition(":")[0] for service in one["services"].values() for port in service.get("ports", [])}
        for one in rendered
    ]
    assert names == ["kvtier-quickstart", "kvtier-two_gpu"]
    assert not published[0] & published[1]


def test_a_routers_flag_changes_no_worker() -> None:
    """The operator restarts all components of type worker, prefill or decode when one of them changes."""
    rendered = [
        yaml.safe_load_all(render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", overrides, Path("docker")))
        for overrides in ([], ["--Router.stall-price=0.7"])
    ]
    graphs = [next(one for one in documents if one["kind"] == manifests.GRAPH) for documents in rendered]
    workers = [[one for one in graph["spec"]["components"] if "type" in one] for graph in graphs]
    assert workers[0] == workers[1]
    assert graphs[0] != graphs[1]


@pytest.mark.parametrize(("variable", "shown"), [("PLACE", "rack-1"), ("A_TOKEN", r"\*\*\*")])
def test_replicas_of_a_kubernetes_service_must_be_alike_and_no_secret_is_shown(variable: str, shown: str) -> None:
    overrides = ["--VllmWorker.ServiceArgs.workers=2", f"--VllmWorker.env.{variable}=rack-{{replica}}"]
    with pytest.raises(ConfigError, match=rf"VllmWorker\.env\.{variable}: '{shown}' given, expected no {{replica}}"):
        render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", overrides, Path("docker"))


def test_the_operator_finds_the_frontend_at_its_own_port() -> None:
    with pytest.raises(ConfigError, match=r"Frontend\.port: '8001' given, expected 8000"):
        render("k8s", ROUTED, CONFIGS / "two_gpu.yaml", ["--Frontend.port=8001"], Path("docker"))


def test_images_run_without_root() -> None:
    for file in IMAGES.values():
        lines = (ROOT / "docker" / file).read_text().splitlines()
        assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
        for line in lines:
            if line.startswith("COPY ") and "--from" not in line:
                assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


@pytest.mark.parametrize("image", IMAGES)
def test_a_change_of_the_sources_keeps_the_layer_with_the_requirements(image: str) -> None:
    text = (ROOT / "docker" / IMAGES[image]).read_text()
    order = ["COPY pyproject.toml ./\n", "-r pyproject.toml", "COPY kvstore kvstore\n", "--no-deps .\n"]
    places = [text.index(line) for line in order]
    assert places == sorted(places)
    assert "LABEL org.opencontainers.image.title=" in text


def test_what_runs_read_only_writes_to_a_volume_alone() -> None:
    """A home of root's, or in the image, ends the frontend at its start."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    (home,) = re.findall(r"\bHOME=(\S+)", (ROOT / "docker" / IMAGES["router"]).read_text())
    for name in ("frontend-0", "router-0"):
        assert services[name]["read_only"]
        assert home in {target for _, target in mounts(services[name])}


def test_memory_is_locked_by_gpu_workers_alone() -> None:
    """A limit that a machine does not allow ends the container at its start."""
    for file, has_gpus in (("compose.yaml", False), ("compose.gpu.yaml", True)):
        services = yaml.safe_load((ROOT / "docker" / file).read_text())["services"]
        limited = {name for name, service in services.items() if "ulimits" in service}
        assert limited == ({"vllmworker-0", "vllmworker-1"} if has_gpus else set())


def test_processes_of_ours_get_the_signals_that_stop_them() -> None:
    """The kernel ignores a signal to PID 1 that has no handler."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    ours = [service for service in services.values() if "build" in service]
    assert len(ours) == 6
    assert all(service["init"] and service["stop_grace_period"] == "60s" for service in ours)


def test_bad_input_is_told() -> None:
    command = [sys.executable, "-m", "graphs.cli", "render", "compose", ROUTED, "-f", "/nowhere.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "config: '/nowhere.yaml' given" in ended.stderr
