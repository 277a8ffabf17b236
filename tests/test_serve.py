"""Graph files, their YAML, and the supervisor: order, readiness, endings, and words for bad input."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphs import serve
from graphs.serve import Supervisor, dry_run
from graphs.service import Deployment, Process, Service, as_flags, load_deployment
from graphs.services import free_port
from kvstore.errors import ConfigError, UnavailableError

ROOT = Path(__file__).parent.parent
GRAPH = "graphs.agg_router:Frontend"
QUICKSTART = ROOT / "graphs" / "configs" / "quickstart.yaml"


def commands(deployment: Deployment) -> dict[str, str]:
    return {process.name: " ".join(process.command[1:]) for process in deployment.processes()}


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


def test_flags() -> None:
    assert as_flags({"a": 1, "b": True, "c": False, "d": "x y"}) == ["--a", "1", "--b", "--d", "x y"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "YAML (line"),
        ("- 1", "a mapping of services"),
        ("Nobody: {x: 1}", "config.yaml:1: Nobody: 'a section' given, expected Common or a service of the graph"),
        ("Store: 5", "Store: '5' given, expected a mapping"),
        ("Store: {ServiceArgs: {workers: many}}", "workers: 'many' given, expected a whole number"),
        ("Store: {ServiceArgs: {workers: -1}}", "greater than or equal to 0"),
        ("Store: {ServiceArgs: {replicas: 1}}", "replicas"),
        ("Store: {capacity: [1]}", "Store.capacity: '[1]' given"),
        ("Store: {capacity: 1G, sise: 2}", "config.yaml:1: Store.sise: '2' given, expected a setting of Store:"),
        ("Store:\n  capacity: lots", "config.yaml:2: Store.capacity: 'lots' given, expected a size"),
        ("Store: {common-configs: [model]}", "Store.common-configs: 'model' given, expected a key of Common"),
        (
            "Common: {model: m}\nVllmWorker: {common-configs: [model]}\nFrontend: {port: 99999}",
            "config.yaml:3: Frontend.port: '99999' given, expected a port number",
        ),
    ],
)
def test_bad_yaml_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_deployment(GRAPH, path, [], tmp_path).processes()
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("graph", "overrides", "says"),
    [
        ("graphs.agg_router", [], "expected module:Service"),
        ("graphs.nothing:Frontend", [], "No module named"),
        ("graphs.agg_router:Nothing", [], "has no attribute"),
        ("graphs.serve:console", [], "console is a function"),
        (GRAPH, ["--Store"], "override: '--Store' given, expected --Service.key=value"),
        (GRAPH, ["--Store.a.b=1", "--Store.a.b.c=1"], "b to be a mapping"),
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
    command += [f"--Nats.listen=127.0.0.1:{free_port()}", "--state-dir", str(tmp_path)]
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
    import socket

    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "usage:"),
        (["--help"], 0, "serve"),
        (["fly"], 2, "usage:"),
        (["serve", "graphs.nothing:X"], 2, "error: graph: 'graphs.nothing:X' given"),
        (["serve", GRAPH, "-f", "/nowhere.yaml"], 2, "error: config: '/nowhere.yaml' given"),
        (["store", "--dir", "/nowhere", "--capacity", "1G"], 2, "error: dir: '/nowhere' given"),
        (["serve", GRAPH, "-f", str(QUICKSTART), "--dry-run"], 0, "-m components.router"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_the_command_line(arguments: list[str], code: int, says: str) -> None:
    command = [sys.executable, "-m", "graphs.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


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
        ("components.router", ["--model-name", "m", "--gpu-price", "x"], "gpu-price: 'x' given, expected a number"),
        ("components.router", ["--model-name", "m", "--nats", "nats://127.0.0.1:9"], "nats: no server answers"),
    ],
)
def test_components_tell_bad_input_in_one_line(module: str, arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert f"{module}: error: {says}" in ended.stderr


def test_the_worker_shows_what_it_would_run() -> None:
    command = [
        sys.executable,
        "-m",
        "components.worker",
        "--model",
        "a/b",
        "--store",
        "a:1,b:2",
        "--print",
        "--",
        "--x",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert "export PYTHONHASHSEED=0" in ended.stdout
    assert '"kv_load_failure_policy": "recompute"' in ended.stdout
    assert ended.stdout.rstrip().endswith("--x")
