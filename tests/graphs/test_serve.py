"""Graph files, their YAML, and the supervisor: order, readiness, endings, and words for bad input."""

import asyncio
import io
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from graphs import cli, serve, services
from graphs.board import STARTING, Board
from graphs.discovery import forget_all, forget_dead
from graphs.serve import Supervisor, dry_run
from graphs.service import Deployment, Process, Service, as_flags, load_deployment
from graphs.services import (
    etcd_address,
    free_port,
    frontend_url,
    page_address,
    page_url,
    runtime_env,
    target_addresses,
)
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net.client import StoreClient
from kvstore.net.membership import EtcdMembership
from kvstore.net.transport import split_address
from tests.commands import run

ROOT = Path(__file__).parents[2]
GRAPH = "graphs.agg_router:Frontend"
QUICKSTART = ROOT / "graphs" / "configs" / "quickstart.yaml"


def commands(deployment: Deployment) -> dict[str, str]:
    return {process.name: " ".join(process.command[1:]) for process in deployment.processes()}


def test_no_port_is_given_twice_before_anybody_can_listen_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = free_port(), free_port()
    drawn = iter([first, first, first, second])
    monkeypatch.setattr(services, "_chance", SimpleNamespace(randrange=lambda low, high: next(drawn)))
    monkeypatch.setattr(services, "_given", deque(maxlen=256))
    assert [free_port(), free_port()] == [first, second]


@pytest.mark.parametrize(("seal", "flags"), [("", ""), ("off", "--seal off "), ("encrypt", "--seal encrypt ")])
def test_seals_are_the_workers_alone(tmp_path: Path, seal: str, flags: str) -> None:
    """`off` in YAML is a no, and not the word."""
    given = [f"--VllmWorker.seal={seal}"] if seal else []
    shown = commands(load_deployment(GRAPH, QUICKSTART, ["--VllmWorker.seal-key=/k.yaml", *given], tmp_path))
    assert f"--seal-key /k.yaml {flags}-- " in shown["VllmWorker-0"]
    assert not any("--seal" in command for name, command in shown.items() if not name.startswith("VllmWorker"))


def test_tls_reaches_targets_and_workers(tmp_path: Path) -> None:
    given = ["--Store.tls-cert=/c.pem", "--Store.tls-key=/c.key", "--VllmWorker.store-tls-ca=/ca.pem"]
    shown = commands(load_deployment(GRAPH, QUICKSTART, given, tmp_path))
    assert "--tls-cert /c.pem --tls-key /c.key" in shown["Store-0"]
    assert "--store-tls-ca /ca.pem" in shown["VllmWorker-0"]


def test_the_quickstart_is_what_it_says(tmp_path: Path) -> None:
    deployment = load_deployment(GRAPH, QUICKSTART, [], tmp_path)
    assert [service.name for service in deployment.services] == [
        "Nats",
        "Etcd",
        "Store",
        "VllmWorker",
        "Router",
        "Frontend",
    ]
    shown = commands(deployment)
    assert list(shown) == ["Nats", "Store-0", "VllmWorker-0", "VllmWorker-1", "Router-0", "Frontend-0"]
    ours, _, theirs = shown["VllmWorker-0"].partition(" -- ")
    assert "-m components.worker --store 127.0.0.1:7600 --nats nats://127.0.0.1:4222" in ours
    assert "--dram 256MiB" in ours
    assert "--enforce-eager" in theirs
    assert "--model-name tiny --model-path .kvtier/model" in shown["Router-0"]
    env = {process.name: process.env for process in deployment.processes()}
    assert env["VllmWorker-0"]["VLLM_CPU_OMP_THREADS_BIND"] == env["VllmWorker-0"]["KVTIER_CORES"]
    assert env["Router-0"]["DYN_FILE_KV"] == env["Frontend-0"]["DYN_FILE_KV"]


def test_each_router_has_a_page(tmp_path: Path) -> None:
    overrides = ["--Router.ServiceArgs.workers=2", "--Router.page='[::1]:8300'"]
    deployment = load_deployment(GRAPH, QUICKSTART, overrides, tmp_path)
    shown = commands(deployment)
    assert shown["Router-0"].endswith("--page [::1]:8300")
    assert shown["Router-1"].endswith("--page [::1]:8301")
    assert page_address(load_deployment(GRAPH, QUICKSTART, [], tmp_path)) == "127.0.0.1:8300"
    with pytest.raises(ConfigError, match="page"):
        load_deployment(GRAPH, QUICKSTART, ["--Router.page=8300"], tmp_path).processes()


def test_overrides_replicas_and_gpus(tmp_path: Path) -> None:
    overrides = [
        "--VllmWorker.ServiceArgs.workers=3",
        "--VllmWorker.ServiceArgs.resources.gpu=2",
        "--Store.ServiceArgs.workers=2",
        "--VllmWorker.system-port=9100",
        "--VllmWorker.tier=false",
        "--Nats.ServiceArgs.workers=0",
        "--Nats.listen=10.0.0.1:4222",
    ]
    deployment = load_deployment(GRAPH, QUICKSTART, overrides, tmp_path)
    shown = commands(deployment)
    assert "Nats" not in shown
    assert "--listen 127.0.0.1:7601" in shown["Store-1"]
    assert "--dir " + str(tmp_path / "store" / "1") in shown["Store-1"]
    assert "--nats nats://10.0.0.1:4222" in shown["Router-0"]
    assert shown["VllmWorker-2"].startswith("-m dynamo.vllm")
    assert "--dram" not in shown["VllmWorker-2"]
    env = {process.name: process.env for process in deployment.processes()}
    assert env["VllmWorker-2"]["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert env["VllmWorker-2"]["DYN_SYSTEM_PORT"] == "9102"
    assert any("DYN_SYSTEM_PORT=9102" in line for line in dry_run(deployment))
    # Each engine looks for free ports from a place of its own, below those that the kernel hands out.
    ports = [int(env[name]["VLLM_PORT"]) for name in env if name.startswith("VllmWorker")]
    assert len(set(ports)) == len(ports) > 1
    assert max(ports) < 32_768


def test_brokers_that_run_already_and_their_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children read the secrets from the environment, as this process does; a command line shows none."""
    monkeypatch.setenv("NATS_AUTH_PASSWORD", "s3cret")
    overrides = ["--Nats.servers=tls://a:4222,tls://b:4222"]
    config = tmp_path / "my.yaml"
    config.write_text(QUICKSTART.read_text().replace("  env:\n", "  env:\n    HF_TOKEN: s3cret\n"))
    deployment = load_deployment(GRAPH, config, overrides, tmp_path)
    lines = "\n".join(dry_run(deployment))
    assert "--nats tls://a:4222,tls://b:4222" in lines
    assert "NATS_SERVER=tls://a:4222,tls://b:4222" in lines
    assert "HF_TOKEN='***'" in lines
    assert "s3cret" not in lines
    with pytest.raises(ConfigError, match=r"Nats\.servers.*NATS_AUTH_USERNAME") as raised:
        load_deployment(GRAPH, QUICKSTART, ["--Nats.servers=nats://me:s3cret@a:4222"], tmp_path).processes()
    assert "s3cret" not in str(raised.value)


def test_flags() -> None:
    flags = {"a": 1, "b": True, "c": False, "d": "x y"}
    assert as_flags(flags) == ["--a", "1", "--b", "--d", "x y"]
    assert as_flags(flags, negates=True) == ["--a", "1", "--b", "--no-c", "--d", "x y"]


def test_false_and_underscores_reach_the_programs_as_they_write_them(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        "Common: {max_model_len: 100}\n"
        "VllmWorker:\n"
        "  model: a/b\n"
        "  common-configs: [max_model_len]\n"
        "  blocks_per_chunk: 2\n"
        "  enable_prefix_caching: false\n"
        "  share-images: false\n"
    )
    overrides = ["--VllmWorker.gpu_memory_utilization=0.5", "--Frontend.router_replica_sync=false"]
    shown = commands(load_deployment(GRAPH, config, overrides, tmp_path))
    ours, _, theirs = shown["VllmWorker-0"].partition(" -- ")
    assert ours.endswith("--model a/b --blocks-per-chunk 2")
    assert theirs == "--max-model-len 100 --no-enable-prefix-caching --gpu-memory-utilization 0.5"
    assert shown["Frontend-0"].endswith("--no-router-replica-sync")


def test_variables_keep_their_spelling(tmp_path: Path) -> None:
    written = {"A": "1e3", "B": "007", "C": "yes", "D": "0x10", "E": "2026-01-01", "F": "1_000", "ON": "", "G_H": "~"}
    config = tmp_path / "my.yaml"
    lines = [f"    {name}: {value}" for name, value in written.items()]
    config.write_text("\n".join(["Common: {port: &port 8080}", "Nats:", "  env:", "    P: *port", *lines]))
    deployment = load_deployment(GRAPH, config, ["--Nats.env.I_J=no"], tmp_path)
    assert deployment.of("Nats").env == {"P": "8080", **written, "I_J": "no"}


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("127.0.0.2", "127.0.0.2")]
)
def test_a_service_is_probed_where_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, reached: str
) -> None:
    monkeypatch.setenv("DYN_SYSTEM_HOST", host)
    at = f"[{host}]" if ":" in host else host
    overrides = [f"--{name}.listen='{at}:{free_port()}'" for name in ("Nats", "Etcd")]
    overrides += ["--Etcd.ServiceArgs.workers=1", f"--Frontend.host='{host}'", f"--Router.page='{at}:8300'"]
    deployment = load_deployment(GRAPH, QUICKSTART, [*overrides, "--Router.page-open=true"], tmp_path)
    processes = deployment.processes()
    probed = {urlsplit(process.ready_url).netloc.rpartition(":")[0] for process in processes if process.ready_url}
    assert probed == {reached}
    listening = [process for process in processes if process.service != "Store"]
    assert {split_address(address)[0] for process in listening for address in process.listens} == {host}
    assert frontend_url(deployment) == f"http://{reached}:8000"
    assert page_url(deployment) == f"http://{reached}:8300/"


def test_a_target_is_told_to_workers_by_an_address_that_they_reach(tmp_path: Path) -> None:
    deployment = load_deployment(GRAPH, QUICKSTART, ["--Store.listen=0.0.0.0:7600"], tmp_path)
    with pytest.raises(ConfigError, match=r"Store\.listen: '0.0.0.0:7600' given, expected an address of this machine"):
        deployment.processes()


def test_probes_of_this_machine_go_to_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ready")

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert serve._answers(f"http://127.0.0.1:{server.server_port}/", "ready")
        server.shutdown()


# What is wrong, and what is printed; docs/operations.md shows the same.
BROKEN = [
    (
        "VllmWorker: {model: a/b}\nStore: {capacity: 1G",
        "my.yaml:2: 'Store: {capacity: 1G' given, expected YAML (expected ',' or '}', but got '<stream end>')",
    ),
    (
        "Stroe: {capacity: 1G}",
        "my.yaml:1: Stroe: unknown, expected one of Common, Containers, Etcd, Frontend, Nats, "
        "Router, Store, VllmWorker; did you mean Store?",
    ),
    (
        "Router:\n  model-name: m\nRouter:\n  page: 127.0.0.1:8300",
        "my.yaml:3: Router: 'Router' is a duplicate of line 1, expected it once",
    ),
    ("Store:\n  capacity: lots", "my.yaml:2: Store.capacity: 'lots' given, expected a size such as 500G or 1.5TiB"),
    (
        "VllmWorker: {model: a/b}\nFrontend:\n  rooter-mode: kv",
        "my.yaml:3: Frontend.rooter-mode: unknown, expected a setting of Frontend: router-mode",
    ),
    (
        "Store:\n  ServiceArgs: {worker: 2}",
        "my.yaml:2: Store.ServiceArgs.worker: unknown, expected one of workers, resources; did you mean workers?",
    ),
    (
        "VllmWorker:\n  ServiceArgs:\n    resources: {gpus: 1}",
        "my.yaml:3: VllmWorker.ServiceArgs.resources.gpus: unknown, expected one of gpu, cpu, memory; did you mean "
        "gpu?",
    ),
    (
        "Common: {model: a/b}\nVllmWorker:\n  common-configs: [modle]",
        "my.yaml:3: VllmWorker.common-configs: 'modle' given, expected a key of Common: model",
    ),
    (
        "VllmWorker:\n  ServiceArgs: {workers: 2}",
        "my.yaml:1: VllmWorker.model: missing, expected a folder with a config.json, or a name on the hub "
        "(owner/model)",
    ),
    (
        "VllmWorker: {model: a/b}\nFrontend: {port: 99999}",
        "my.yaml:2: Frontend.port: '99999' given, expected a port number up to 32767",
    ),
    (
        "VllmWorker: {model: a/b, system-port: 8000}\nFrontend: {port: 8000}",
        "my.yaml:2: Frontend-0.port: '8000' conflicts with VllmWorker-0, expected another port",
    ),
    (
        "VllmWorker: {model: a/b}\nStore:\n  addresses: 10.0.0.7",
        "my.yaml:3: Store.addresses: '10.0.0.7' given, expected host:port with a number for the port",
    ),
    (
        "VllmWorker:\n  model: a/b\n  ServiceArgs: {workers: 3, resources: {gpu: 1}}",
        "my.yaml:3: VllmWorker.ServiceArgs.resources.gpu: '1' given, expected at most the GPUs of "
        "CUDA_VISIBLE_DEVICES=0,1",
    ),
]


def broken(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of a configuration."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_deployment(GRAPH, Path("my.yaml"), [], tmp_path).processes()
    return str(raised.value)


@pytest.mark.parametrize(("text", "says"), BROKEN)
def test_a_broken_configuration_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    assert broken(tmp_path, text, monkeypatch) == says
    assert says in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "a mapping of services"),
        ("Store: 5", "my.yaml:1: Store: '5' given, expected a mapping"),
        ("Store: {ServiceArgs: {workers: many}}", "workers: 'many' given, expected a whole number"),
        ("Store: {ServiceArgs: {workers: -1}}", "expected at least 0"),
        ("Store: {ServiceArgs: [1]}", "my.yaml:1: Store.ServiceArgs: '[1]' given, expected a mapping"),
        ("Store: {env: [1]}", "my.yaml:1: Store.env: '[1]' given, expected a mapping"),
        ("Store: {common-configs: model}", "my.yaml:1: Store.common-configs: 'model' given, expected a list"),
        (
            "Store: {ServiceArgs: {workers: 0}}",
            "Store.ServiceArgs.workers: '0' given, expected at least 1, or Store.addr",
        ),
        ("Store: {capacity: [1]}", "Store.capacity: '[1]' given"),
        (
            "Store: {capacity: 1G, sise: 2}",
            "my.yaml:1: Store.sise: unknown, expected a setting of Store: ServiceArgs",
        ),
        ("Store: {common-configs: [model]}", "Store.common-configs: 'model' given, expected a key of Common"),
        ("Nats: {listen: 4222}", "my.yaml:1: Nats.listen: '4222' given, expected host:port"),
        ("Nats: {env: {A: [1]}}", "my.yaml:1: Nats.env.A: '[1]' given, expected a text"),
        (
            "Store: {hot_cache: 1G, hot-cache: 2G}",
            "my.yaml:1: Store.hot-cache: 'hot-cache' is a duplicate of line 1, expected it once",
        ),
        ("Containers: {registri: a}", "my.yaml:1: Containers.registri: unknown, expected one of registry, tag, "),
        ("Containers: {monitoring: prometheus}", "my.yaml:1: Containers.monitoring: 'prometheus' given, expected a"),
    ],
)
def test_bad_yaml_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    assert says in broken(tmp_path, text, monkeypatch)


@pytest.mark.parametrize(
    ("graph", "overrides", "says"),
    [
        ("graphs.agg_router", [], "expected module:Service"),
        ("graphs.nothing:Frontend", [], "No module named"),
        ("graphs.agg_router:Nothing", [], "has no attribute"),
        ("graphs.serve:serve", [], "serve is a function"),
        (GRAPH, ["--Store"], "override: '--Store' given, expected --Service.key=value"),
        (GRAPH, ["--Store.a.b=1", "--Store.a.b.c=1"], "a setting of a mapping, which b is not"),
    ],
)
def test_a_bad_graph_or_override_is_told(tmp_path: Path, graph: str, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_deployment(graph, None, overrides, tmp_path)
    assert says in str(raised.value)


def test_circles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import graphs.agg_router

    one, other = Service("One", lambda *_: []), Service("Other", lambda *_: [])
    one.link(other).link(one)
    monkeypatch.setattr(graphs.agg_router, "One", one, raising=False)
    with pytest.raises(ConfigError, match="One -> Other -> One"):
        load_deployment("graphs.agg_router:One", None, [], tmp_path)


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def deployment(tmp_path: Path, *processes: Process, links: dict[str, list[str]] | None = None) -> Deployment:
    services = {p.service: Service(p.service, lambda *_, p=p: [p]) for p in processes}
    for name, needed in (links or {}).items():
        for other in needed:
            services[name].link(services[other])
    return Deployment(list(services.values()), {}, tmp_path)


WAIT = "import time; print('up', flush=True); time.sleep(60)"


async def test_services_start_when_those_they_need_are_ready(tmp_path: Path) -> None:
    slow = "import time; time.sleep(0.5); " + WAIT
    seen: list[str] = []
    processes = [
        Process("base", "Base", script(slow), {}, ready_line="up"),
        Process("top", "Top", script(WAIT), {}, ready_line="up"),
    ]
    supervisor = Supervisor(
        deployment(tmp_path, *processes, links={"Top": ["Base"]}),
        lambda name, line: seen.append(f"{name} {line}"),
        restart=False,
    )
    await supervisor.start()
    assert seen.index("base up") < seen.index("top up")
    pids = [child.pid for child in supervisor.children.values()]
    await supervisor.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (tmp_path / "logs" / "base.log").read_text() == "up\n"


async def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    grandchild = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {WAIT!r}], stdout=subprocess.DEVNULL); "
        "print('up', p.pid, flush=True); time.sleep(60)"
    )
    lines: list[str] = []
    supervisor = Supervisor(
        deployment(tmp_path, Process("a", "A", script(grandchild), {}, ready_line="up")),
        lambda name, line: lines.append(line),
        restart=False,
    )
    await supervisor.start()
    pid = int(next(line for line in lines if line.startswith("up")).split()[1])
    child = supervisor.children["a"]
    assert pid in child.group()
    await supervisor.end(child, signal.SIGKILL)
    assert child.group() == []


SHARES = (
    "import multiprocessing, os, pathlib, time; from multiprocessing import shared_memory; "
    "pathlib.Path(os.environ['VLLM_RPC_BASE_PATH'], 'socket').touch(); "
    "shared = shared_memory.SharedMemory(create=True, size=4096); "
    "lock = multiprocessing.get_context('spawn').Lock(); "
    "print('made', os.environ['VLLM_RPC_BASE_PATH'], '/dev/shm/' + shared.name, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "is killed"])
async def test_a_killed_child_leaves_no_shared_memory_and_no_sockets(tmp_path: Path, dies: bool) -> None:
    lines: list[str] = []
    process = Process("a", "A", script(SHARES), {}, ready_line="made")
    supervisor = Supervisor(deployment(tmp_path, process), lambda _, line: lines.append(line), status=lambda *_: None)
    await supervisor.start()
    made = [Path(word) for word in lines[0].split()[1:]]
    assert len(made) == 2
    assert all(path.exists() for path in made)
    if dies:
        first = supervisor.children["a"]
        os.kill(first.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while supervisor.children["a"] is first or not supervisor.children["a"].ready:
                await asyncio.sleep(0.05)
    supervisor.unwatch()
    await supervisor.end(supervisor.children["a"], signal.SIGKILL)
    assert not any(path.exists() for path in made)


async def test_children_reach_each_other_where_there_is_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "intranet")
    show = "import os; print(os.environ['NO_PROXY'], os.environ['no_proxy']); " + WAIT
    lines: list[str] = []
    process = Process("a", "A", script(show), {"DYN_SYSTEM_HOST": "127.0.0.2"}, ready_line="up")
    supervisor = Supervisor(deployment(tmp_path, process), lambda _, line: lines.append(line), status=lambda *_: None)
    await supervisor.start()
    await supervisor.stop()
    assert set(lines[0].split()) == {"intranet,127.0.0.1,127.0.0.2,::1,localhost"}


async def test_who_waits_for_the_end_sees_what_stops(tmp_path: Path) -> None:
    told: list[str] = []
    process = Process("a", "A", script(WAIT), {}, ready_line="up")
    supervisor = Supervisor(deployment(tmp_path, process), lambda *_: None, status=lambda _, text: told.append(text))
    await supervisor.start()
    await supervisor.stop()
    assert told[-2] == "stopping"
    assert re.fullmatch(r"stopped after \d\.\d s", told[-1])


async def test_a_log_file_has_no_colours(tmp_path: Path) -> None:
    talk = "print('\\033[32mgreen\\033[0m'); " + WAIT
    supervisor = Supervisor(deployment(tmp_path, Process("a", "A", script(talk), {}, ready_line="up")), lambda *_: None)
    await supervisor.start()
    await supervisor.stop()
    assert (tmp_path / "logs" / "a.log").read_text() == "green\nup\n"


async def test_a_child_that_does_not_come_up_stops_the_start(tmp_path: Path) -> None:
    bad = "import sys; print('thing: error: port: it is taken'); sys.exit(2)"
    processes = [
        Process("good", "Good", script(WAIT), {}, ready_line="up"),
        Process("bad", "Bad", script(bad), {}, ready_line="up"),
    ]
    supervisor = Supervisor(deployment(tmp_path, *processes), lambda *_: None)
    with pytest.raises(UnavailableError, match="bad: thing: error: port: it is taken"):
        await supervisor.start()
    assert not supervisor.children


async def test_a_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "LOG_BYTES_MAX", 1000)
    talk = "[print('x' * 99) for _ in range(60)]; print('up', flush=True); import time; time.sleep(60)"
    process = Process("a", "A", script(talk), {}, ready_line="up")
    supervisor = Supervisor(deployment(tmp_path, process), lambda *_: None, logs=tmp_path / "elsewhere")
    await supervisor.start()
    await supervisor.stop()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "elsewhere").iterdir()}
    assert sizes.keys() == {"a.log", "a.log.1"}
    assert max(sizes.values()) < 1200


def test_a_service_that_fails_ends_the_command_with_1_and_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graphs.cli", "serve", "graphs.store_only:Store", "--Store.capacity=1K"]
    command += [f"--{one}.listen=127.0.0.1:{free_port()}" for one in ("Nats", "Store")]
    command += ["--state-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "error: Store-0: kvstore: error: capacity: " in ended.stderr


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    supervisor = Supervisor(deployment(tmp_path, Process("a", "A", script(WAIT), {}, ready_line="up")), lambda *_: None)
    await supervisor.start()
    first = supervisor.children["a"].pid
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        while supervisor.children["a"].pid == first or not supervisor.children["a"].saw_ready_line:
            await asyncio.sleep(0.05)
    await supervisor.stop()


async def test_a_child_whose_own_children_live_on_is_started_again(tmp_path: Path) -> None:
    """As an engine does that outlives its worker, they hold its output open."""
    grandchild = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAIT!r}]); " + WAIT
    process = Process("a", "A", script(grandchild), {}, ready_line="up")
    told: list[str] = []
    supervisor = Supervisor(deployment(tmp_path, process), lambda *_: None, status=lambda _, text: told.append(text))
    await supervisor.start()
    first = supervisor.children["a"]
    os.kill(first.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while supervisor.children["a"] is first or not supervisor.children["a"].ready:
            await asyncio.sleep(0.05)
    assert first.group() == []
    assert told[2] == "exited with code -9; restarting in 1 s"
    supervisor.unwatch()
    await supervisor.end(supervisor.children["a"], signal.SIGKILL)


async def test_a_child_that_does_not_come_back_is_tried_again_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "RESTART_SECONDS", (0.05, 10.0))
    once = f"import os, sys; os.path.exists('{tmp_path}/ran') and sys.exit(3); open('{tmp_path}/ran', 'w'); " + WAIT
    told: list[str] = []
    process = Process("a", "A", script(once), {}, ready_line="up")
    supervisor = Supervisor(deployment(tmp_path, process), lambda *_: None, status=lambda _, text: told.append(text))
    await supervisor.start()
    os.kill(supervisor.children["a"].pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while sum(text.startswith("did not start: a: exited with code 3 before") for text in told) < 2:
            await asyncio.sleep(0.05)
    pauses = [float(text.split()[-2]) for text in told if text.startswith("exited with")]
    assert pauses == sorted(pauses)
    await supervisor.stop()


def test_where_the_dead_were_reached_is_forgotten(tmp_path: Path) -> None:
    instances = tmp_path / "v1" / "instances"
    instances.mkdir(parents=True)
    with socket.socket() as alive:
        alive.bind(("127.0.0.1", 0))
        alive.listen()
        for name, port in (("living", alive.getsockname()[1]), ("dead", free_port())):
            content = {"transport": {"tcp": f"127.0.0.1:{port}/{name}/generate"}}
            (instances / f"dynamo%2Fbackend%2Fgenerate%2F{name}").write_text(json.dumps(content))
        (instances / "half-written").write_text("{")
        forget_dead(tmp_path)
    assert {path.name for path in instances.iterdir()} == {"dynamo%2Fbackend%2Fgenerate%2Fliving", "half-written"}


def test_when_all_are_gone_nothing_stays_registered(tmp_path: Path) -> None:
    for name in ("instances", "mdc", "event_channels"):
        (tmp_path / "v1" / name).mkdir(parents=True)
        (tmp_path / "v1" / name / f"{name}%2F1").write_text("{}")
    instance = tmp_path / "v1" / "instances" / "instances%2F1"
    with socket.socket() as alive:
        alive.bind(("127.0.0.1", 0))
        alive.listen()
        instance.write_text(json.dumps({"transport": {"tcp": f"127.0.0.1:{alive.getsockname()[1]}/1/generate"}}))
        forget_all(tmp_path)
        assert len(list((tmp_path / "v1").glob("*/*"))) == 3
    forget_all(tmp_path)
    assert list((tmp_path / "v1").glob("*/*")) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_on_a_terminal_there_is_a_line_a_process_that_is_kept_up_to_date() -> None:
    out = Terminal()
    board = Board(["Nats", "Store-0"], out=out)
    board.status("Nats", STARTING)
    board.output("Nats", "\033[32mlistening\033[0m")
    drawing = asyncio.create_task(board.keep_drawing())
    async with asyncio.timeout(10):
        while "listening" not in out.getvalue():
            await asyncio.sleep(0.01)
    board.status("Nats", "ready after 0.2 s")
    board.settle()
    drawing.cancel()
    drawn = out.getvalue().split("\033[2A")[-1]
    assert [line.strip() for line in drawn.replace("\033[2K", "").splitlines()] == [
        "Nats  ready after 0.2 s",
        "Store-0  waiting",
    ]
    board.status("Store-0", "exited with code 1; restarting in 1 s")
    assert out.getvalue().endswith("exited with code 1; restarting in 1 s\n")


def test_elsewhere_there_is_a_line_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        board = Board(["Nats"], verbose=verbose)
        board.status("Nats", STARTING)
        board.output("Nats", "hello")
        said = capsys.readouterr().out.splitlines()
        assert said == ["          Nats | starting"] + ["          Nats | hello"] * verbose


async def test_targets_and_dynamo_meet_in_etcd_if_asked_to(tmp_path: Path) -> None:
    """NATS, etcd, a target that registers there, and a stock frontend that is found there."""
    overrides = [f"--{name}.listen=127.0.0.1:{free_port()}" for name in ("Nats", "Etcd", "Store")]
    one = load_deployment("graphs.store_only:Store", None, [*overrides, "--Etcd.ServiceArgs.workers=1"], tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    frontend = Process("F", "F", command, runtime_env(one), ready_url=f"http://127.0.0.1:{port}/health")
    supervisor = Supervisor(one, lambda *_: None, restart=False)
    await supervisor.start()
    try:
        await supervisor.launch(frontend)
        membership = await asyncio.to_thread(EtcdMembership, etcd_address(one), "default")
        client = StoreClient(membership)
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(client.stat, time.monotonic() + 2):
                await asyncio.sleep(0.05)
        assert list(await asyncio.to_thread(client.stat, time.monotonic() + 2)) == target_addresses(one)
        client.close()
        await supervisor.end(supervisor.children["F"])
    finally:
        await supervisor.stop()


def test_where_dynamo_has_a_command_of_that_name_ours_stands_aside(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import sys\ndef main():\n    print('theirs', sys.argv[1:])\n    return 7\n")
    info = tmp_path / "ai_dynamo_next-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ai-dynamo-next\nVersion: 9.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\ndynamo = theirs:main\n")
    for name, code, says in (
        ("dynamo", 7, "dynamo: this is the command of ai-dynamo-next 9.0; use `kvtier serve` for kvtier"),
        ("kvtier", 0, "usage: kvtier serve"),
    ):
        run = f"import sys; sys.argv = ['{name}', 'serve', '--help']; from graphs.cli import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", run],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        assert says in ended.stdout + ended.stderr
        assert ("theirs ['serve', '--help']" in ended.stdout) == (name == "dynamo")


async def test_a_port_that_is_taken_is_told_before_anything_runs(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    process = Process("a", "A", script("print('ran')"), {}, ready_line="up", listens=[address])
    supervisor = Supervisor(deployment(tmp_path, process), lambda *_: None)
    with pytest.raises(UnavailableError, match=f"A: cannot listen on {address}"):
        await supervisor.start()
    server.close()
    assert not (tmp_path / "logs").exists()


def test_killing_the_supervisor_ends_its_children(tmp_path: Path) -> None:
    port = free_port()
    overrides = [f"--Nats.listen=127.0.0.1:{port}", "--VllmWorker.model=/nowhere"]
    command = [sys.executable, "-m", "graphs.cli", "serve", "graphs.services:Nats", *overrides[:1]]
    served = subprocess.Popen(
        [*command, "--state-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert served.stdout is not None
    for line in served.stdout:
        if "everything is up" in line:
            break
    served.kill()
    served.wait()
    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "usage:"),
        (["--help"], 0, "serve"),
        (["fly"], 2, "error: fly: unknown, expected a command: serve, render, store, connector, top, "),
        (["serve", "graphs.nothing:X"], 2, "error: graph: 'graphs.nothing:X' given"),
        (["serve", GRAPH, "-f", "/nowhere.yaml"], 2, "error: config: '/nowhere.yaml' given"),
        (
            ["store", "--dir", "/nowhere", "--capacity", "1G", "--listen", f"127.0.0.1:{free_port()}"],
            2,
            "error: dir: '/nowhere' given",
        ),
        (["connector"], 2, "arguments are required: --store"),
        (["connector", "--store", "nowhere"], 2, "connector: error: store: 'nowhere' given, expected host:port"),
        (["connector", "--store", "a:1", "--dram", "x"], 2, "error: dram: 'x' given, expected a size"),
        (["connector", "--store", "a:1", "--seal-key", "/nowhere"], 2, "error: seal-key: '/nowhere' given"),
        (["connector", "--store", "a:1", "--credential-file", "/nowhere"], 2, "credential-file: '/nowhere' given"),
        (["serve", GRAPH, "-f", str(QUICKSTART), "--dry-run"], 0, "-m components.router"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_the_command_line(arguments: list[str], code: int, says: str) -> None:
    ended = run("graphs.cli", *arguments)
    assert ended.code == code, ended.complained
    assert says in ended.said + ended.complained


def test_who_started_it_is_told_how_to_see_a_hit_and_that_weights_are_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def up(deployment: Deployment, announce: Callable[[], None], *_: object, verbose: bool) -> None:
        announce()

    monkeypatch.setattr(serve, "serve", up)
    (tmp_path / "config.json").write_text('{"kvtier_random_weights": true}')
    with pytest.raises(SystemExit, match="0"):
        cli.main(["serve", GRAPH, "-f", str(QUICKSTART), f"--Common.model={tmp_path}", f"--state-dir={tmp_path}"])
    said = capsys.readouterr().out
    assert " try --frontend http://127.0.0.1:8000 --url http://127.0.0.1:8300" in said
    assert "weights are random" in said


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("components.worker", ["--model", "/nowhere", "--store", "a:1"], "model: '/nowhere' given"),
        ("components.worker", ["--model", "nobody", "--store", "a:1"], "model: 'nobody' given"),
        ("components.worker", ["--model", "a/b", "--store", "nowhere"], "store: 'nowhere' given, expected host:port"),
        ("components.worker", ["--model", "a/b", "--store", "a:1", "--dram", "x"], "dram: 'x' given"),
        ("components.worker", ["--model", "a/b", "--store", "a:1", "--endpoint", "x"], "endpoint: 'x' given"),
        ("components.worker", ["--model", "a/b", "--store", "a:1", "--nats", "nats://127.0.0.1:9"], "nats: no server"),
        ("components.router", ["--model-name", "m", "--model-path", "/nowhere"], "model-path: '/nowhere' given"),
        ("components.router", ["--model-name", "m", "--block-size", "0"], "block-size: '0' given"),
        ("components.router", ["--model-name", "m", "--stall-price", "x"], "stall-price: 'x' given, expected a number"),
    ],
)
def test_components_tell_bad_input_in_one_line(module: str, arguments: list[str], says: str) -> None:
    ended = run(module, *arguments)
    assert (ended.code, ended.complained.count("\n")) == (2, 1), ended.complained
    assert f"{module}: error: {says}" in ended.complained


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("kvstore", ["--dir", "/nowhere", "--capacity", "1G", "--listen", "127.0.0.1:0"], "dir: '/nowhere' given"),
        ("kvstore", ["stat", "nonsense"], "address: 'nonsense' given"),
        ("components.worker", ["--model", "/nowhere", "--store", "a:1"], "model: '/nowhere' given"),
        ("components.router", ["--model-name", "m", "--nats", "nats://127.0.0.1:9"], "nats: no server answers"),
        ("graphs.cli", ["fly"], "fly: unknown, expected a command"),
    ],
)
def test_a_process_with_bad_input_ends_with_2_and_one_line(module: str, arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert f"error: {says}" in ended.stderr


def test_the_worker_shows_what_it_would_run() -> None:
    said = run("components.worker", "--model", "a/b", "--store", "a:1,b:2", "--print", "--", "--x").said
    assert "export DYN_EVENT_PLANE=nats" in said
    assert '"kv_load_failure_policy": "recompute"' in said
    assert said.rstrip().endswith("--x")


def test_vllm_serve_is_told_what_dynamos_workers_are_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = secrets.token_hex(32)
    for name, text in {"credential": secret, "seal": f"[{{id: 1, key: '{secret}'}}]"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    options = ["--store", "a:1,b:2", "--dram", "1G", "--credential-file", "credential", "--seal-key", "seal"]
    said = []
    for command in (
        ["graphs.cli", "connector", *options],
        ["components.worker", "--print", "--model", "a/b", *options, "--nats", ""],
    ):
        ended = run(*command)
        assert ended.code == 0, ended.complained
        assert secret not in ended.said + ended.complained
        said.append(ended.said)
    words = shlex.split(said[1].splitlines()[-1])
    told = json.loads(said[0])
    assert told == json.loads(words[words.index("--kv-transfer-config") + 1])
    (tier,) = told["kv_connector_extra_config"]["secondary_tiers"]
    assert (tier["credential_file"], tier["seal_key"]) == (str(tmp_path / "credential"), str(tmp_path / "seal"))
    assert told["kv_connector_extra_config"]["cpu_bytes_to_use"] == 10**9
