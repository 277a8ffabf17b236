"""A target as its users run it: a process, its signals, its metrics, and its words for bad input."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from graphs.services import free_port
from kvstore.bus import messages, residency
from kvstore.bus.connection import Bus
from kvstore.bus.messages import TargetReport
from kvstore.bus.residency import Mirror
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from tests.commands import run
from tests.conftest import item, key, payload, soon

ROOT = Path(__file__).parents[2]


class Process:
    """`python -m kvstore` with some arguments."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "kvstore", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
        )

    def ready(self) -> "Process":
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "kvstore: ready at" in line, self.end(signal.SIGKILL)
        return self

    def refused(self) -> str:
        """What it says when it does not start."""
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 2, said
        return said

    def end(self, number: int) -> str:
        """Signal it; its exit code must be that of an orderly end, or of the signal. Returns its log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=20)
        return log


@pytest.fixture
def arguments(tmp_path: Path, nats_url: str) -> list[str]:
    address = f"127.0.0.1:{free_port()}"
    return [
        "--dir",
        str(tmp_path),
        "--capacity",
        "64MiB",
        "--segment-size",
        "4MiB",
        "--buffers",
        "32MiB",
        "--listen",
        address,
        "--nats",
        nats_url,
    ]


def client(arguments: list[str]) -> StoreClient:
    return StoreClient(StaticMembership([arguments[arguments.index("--listen") + 1]]))


def read_all(store: StoreClient, count: int) -> None:
    rooms = [memoryview(bytearray(100_000)) for _ in range(count)]
    assert set(store.get([key(n) for n in range(count)], rooms, soon())) == {Outcome.HIT}
    assert all(bytes(room) == payload(n) for n, room in enumerate(rooms))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_all_there_again_after_a_restart(arguments: list[str], number: int) -> None:
    process = Process(*arguments).ready()
    store = client(arguments)
    assert set(store.put([item(n) for n in range(100)], soon())) == {Outcome.STORED}
    process.end(number)
    if number == signal.SIGTERM:
        assert process.process.returncode == 0
        assert not (Path(arguments[1]) / "target.sock").exists()
    again = Process(*arguments).ready()
    read_all(client(arguments), 100)
    again.end(signal.SIGTERM)


async def test_a_mirror_sees_through_kill_9(arguments: list[str], nats_url: str) -> None:
    line = await Bus.connect(nats_url, "test")
    mirror = Mirror()
    following = asyncio.create_task(residency.follow(mirror, line, "default"))
    target = arguments[arguments.index("--listen") + 1]

    async def sees(count: int, seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            loop = asyncio.get_running_loop()
            while mirror.counts(loop.time()).get(target) != count:
                await asyncio.sleep(0.05)

    process = await asyncio.to_thread(Process(*arguments).ready)
    await asyncio.to_thread(client(arguments).put, [item(n) for n in range(30)], soon())
    await sees(30)
    process.end(signal.SIGKILL)
    again = await asyncio.to_thread(Process(*arguments).ready)
    await asyncio.to_thread(client(arguments).put, [item(n) for n in range(30, 40)], soon())
    await sees(40)
    assert mirror.locate(7, [1, 40, 41], asyncio.get_running_loop().time()) == [target, target, None]
    again.end(signal.SIGTERM)
    following.cancel()
    await line.close()


async def test_it_tells_how_busy_it_is(arguments: list[str], nats_url: str) -> None:
    line = await Bus.connect(nats_url, "test")
    reports: asyncio.Queue[TargetReport] = asyncio.Queue()
    await line.subscribe(messages.subject("default", "speed.target"), TargetReport, reports.put)
    process = await asyncio.to_thread(Process(*arguments).ready)
    await asyncio.to_thread(client(arguments).put, [item(n) for n in range(30)], soon())
    async with asyncio.timeout(20):
        while not (report := await reports.get()).received_bytes_per_second:
            pass
    assert report.target == arguments[arguments.index("--listen") + 1]
    assert report.payload_bytes <= 30 * 100_000 < report.capacity_bytes
    wanted = [key(1), key(2)], [memoryview(bytearray(100_000)) for _ in range(2)]
    await asyncio.to_thread(client(arguments).get, *wanted, soon())
    async with asyncio.timeout(20):
        while not (report := await reports.get()).sent_bytes_per_second:
            pass
    (status,) = client(arguments).stat(soon()).values()
    assert status.hot_hits + status.device_hits == 2
    assert report.memory_share == pytest.approx(status.hot_hits / 2)
    process.end(signal.SIGTERM)
    await line.close()


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return answer.read().decode()


def test_metrics_show_what_happened(arguments: list[str]) -> None:
    port = free_port()
    process = Process(*arguments, "--metrics-port", str(port)).ready()
    store = client(arguments)
    store.put([item(1)], soon())
    store.get([key(1), key(2)], [memoryview(bytearray(100_000)) for _ in range(2)], soon())
    time.sleep(0.1)
    text = metrics(port)
    for line in (
        'kvtier_target_operations_total{operation="get",outcome="hit"} 1.0',
        'kvtier_target_operations_total{operation="get",outcome="miss"} 1.0',
        "kvtier_target_received_bytes_total 100000.0",
        "kvtier_target_corrupt_chunks_total 0.0",
        'kvtier_target_operations_total{operation="get",outcome="corrupt"} 0.0',
        "kvtier_target_chunks 1.0",
        "kvtier_target_ghost_hits_total 0.0",
    ):
        assert line in text
    process.end(signal.SIGTERM)


def test_metrics_tell_a_store_that_is_too_small(arguments: list[str]) -> None:
    port = free_port()
    process = Process(*arguments, "--metrics-port", str(port)).ready()
    store = client(arguments)
    for _ in range(2):
        for number in range(80):  # of 1 MB, and there is room for 64 MiB
            store.put([item(number, 1_000_000)], soon())
    text = metrics(port)
    returned = next(line for line in text.splitlines() if line.startswith("kvtier_target_ghost_hits_total "))
    assert float(returned.split()[1]) > 0
    process.end(signal.SIGTERM)


def test_each_start_has_an_epoch_of_its_own_also_of_a_wiped_store(arguments: list[str]) -> None:
    epochs = set()
    for _ in range(2):
        process = Process(*arguments).ready()
        (status,) = client(arguments).stat(soon()).values()
        epochs.add(status.epoch)
        process.end(signal.SIGTERM)
        for path in Path(arguments[1]).iterdir():
            path.unlink()
    assert len(epochs) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--dir": "/nowhere/at/all"}, "dir: '/nowhere/at/all' given, expected a directory that exists"),
        ({"--capacity": "1MiB"}, "capacity: '1.0 MiB' given, expected at least two segments of 4.0 MiB"),
        ({"--capacity": "lots"}, "capacity: 'lots' given, expected a size such as 500G or 1.5TiB"),
        ({"--capacity": "900T"}, "expected at most the"),
        ({"--listen": "nonsense"}, "listen: 'nonsense' given, expected host:port"),
        ({"--namespace": "a b"}, "namespace: 'a b' given, expected 1 to 64 letters"),
        ({"--connections": "0"}, "connections: '0' given, expected at least 1"),
        ({"--nats": "nats://127.0.0.1:9"}, "nats: no server answers at nats://127.0.0.1:9"),
        ({"--etcd": "127.0.0.1:9"}, "etcd: no server answers at 127.0.0.1:9"),
    ],
    ids=lambda value: next(iter(value.items()), None) if isinstance(value, dict) else None,
)
def test_bad_input_is_told_in_one_line(arguments: list[str], changes: dict[str, str], says: str) -> None:
    changed = list(arguments)
    for name, value in changes.items():
        if name in changed:
            changed[changed.index(name) + 1] = value
        else:
            changed += [name, value]
    ended = run("kvstore", *changed)
    assert (ended.code, ended.complained.count("\n")) == (2, 1), ended.complained
    assert "kvstore: error: " in ended.complained
    assert says in ended.complained


def test_a_port_in_use_is_told_in_one_line(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments[arguments.index("--listen") + 1] = f"127.0.0.1:{other.getsockname()[1]}"
        ended = run("kvstore", *arguments)
    assert (ended.code, ended.complained.count("\n")) == (2, 1), ended.complained
    assert "listen: cannot listen on 127.0.0.1" in ended.complained
