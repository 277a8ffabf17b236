"""The plug-in inside LMCache's own storage manager, made from its own command line, against real targets."""

import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache is not installed")

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.memory_management import GDSMemoryObject
from prometheus_client import REGISTRY

from benchmarks.store.authority import Authority
from benchmarks.store.tenants import Site
from components.lmcache.adapter import PART_BYTES
from graphs.services import free_port
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.net.carrier import MEMORY
from kvstore.net.client import Item
from kvstore.net.tls import ServerTls
from kvstore.net.wire import Outcome
from kvstore.seal import TRAILER_BYTES, read_keys
from tests.conftest import MIB, FullDisk, RunningTarget, eventually, soon
from tests.kvstore.test_target_process import ROOT, Process
from tests.lmcache.server import LAYOUT, Server, key, size

Start = Callable[..., RunningTarget]
Make = Callable[..., Server]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")


@pytest.fixture
def server() -> Iterator[Make]:
    """Starts LMCache's storage; each is closed at the end of the test."""
    made: list[Server] = []

    def make(store: str, **changes: Any) -> Server:
        made.append(Server(store, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Store:
    """A target process that can be killed, and started again on its directory."""

    def __init__(self, folder: Path):
        self.address = f"127.0.0.1:{free_port()}"
        self._arguments = ["--dir", str(folder), "--capacity", "64MiB", "--segment-size", "4MiB", "--nats", ""]
        self._arguments += ["--buffers", "32MiB"]
        self.start()

    def start(self) -> None:
        self.process = Process(*self._arguments, "--listen", self.address).ready()

    def signal(self, number: int) -> None:
        self.process.process.send_signal(number)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.process.end(signal.SIGKILL)


# ---- what is found


def test_another_server_finds_objects_bit_by_bit(server: Make, start_target: Start) -> None:
    target = start_target()
    first, second = server(target.address), server(target.address)
    assert first.write(key(1), key(2), key(4)) == {"stored": 3}
    assert second.read(key(1), key(2), key(3), key(4)) == [True, True, False, True]
    assert second.counts("load") == {"hit": 3}
    bytes_read = REGISTRY.get_sample_value("kvtier_lmcache_bytes_total", {"operation": "load"})
    assert bytes_read is not None
    assert bytes_read >= 3 * size(LAYOUT)
    assert second.write(key(1), key(5)) == {"hit": 1, "stored": 1}


def test_an_object_larger_than_a_value_comes_in_parts(server: Make, tmp_path: Path) -> None:
    large = MemoryLayoutDesc([torch.Size([2, PART_BYTES + 4096])], [torch.uint8])
    address = f"127.0.0.1:{free_port()}"
    process = Process("--dir", str(tmp_path), "--capacity", "512MiB", "--listen", address, "--nats", "").ready()
    try:
        made = server(address, l1_gb=0.25, deadline_ms=20_000)
        assert made.write(key(1), layout=large) == {"stored": 1}
        assert made.read(key(1), key(2), layout=large) == [True, False]
    finally:
        process.end(signal.SIGKILL)


def test_an_object_of_several_tensors_comes_back(server: Make, start_target: Start) -> None:
    several = MemoryLayoutDesc([torch.Size([2, 4, 16]), torch.Size([4, 8])], [torch.bfloat16, torch.float32])
    made = server(start_target().address)
    made.write(key(1), layout=several)
    assert made.read(key(1), layout=several) == [True]


def test_objects_come_out_of_the_memory_of_a_target_on_this_host(server: Make, start_target: Start) -> None:
    target = start_target(unix=True, carrier=MEMORY, buffer_bytes=64 * MIB)
    made = server(target.address, carrier=MEMORY)
    made.write(key(1), key(2))
    lent = target.lent()
    assert made.read(key(1), key(2), key(3)) == [True, True, False]
    assert len(lent) == 2


# ---- what is not


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_salt": "b"},
        {"model_name": "other"},
        {"object_group_id": 1},
        {"kv_rank": ObjectKey.ComputeKVRank(world_size=2, global_rank=1, local_world_size=2, local_rank=1)},
        {"kv_rank": ObjectKey.ComputeKVRank(world_size=4, global_rank=0, local_world_size=4, local_rank=0)},
    ],
    ids=str,
)
def test_what_lmcache_tells_apart_is_told_apart(server: Make, start_target: Start, changes: dict[str, Any]) -> None:
    made = server(start_target().address)
    made.write(key(1, cache_salt="a"))
    other = key(1, **({"cache_salt": "a"} | changes))
    assert made.read(other) == [False]
    made.write(other)
    assert made.read(other) == [True]
    assert made.read(key(1, cache_salt="a")) == [True]


@pytest.mark.parametrize(
    "other",
    [
        MemoryLayoutDesc(LAYOUT.shapes, [torch.float16]),
        MemoryLayoutDesc([torch.Size([2, 4, 32, 16])], LAYOUT.dtypes),
    ],
    ids=["dtype", "shape"],
)
def test_another_layout_of_the_same_length_is_not_found(
    server: Make, start_target: Start, other: MemoryLayoutDesc
) -> None:
    made = server(start_target().address)
    made.write(key(1))
    assert made.read(key(1), layout=other) == [False]
    assert made.read(key(1)) == [True]


def test_another_identity_is_not_found_and_none_is_warned_of(
    server: Make, start_target: Start, caplog: pytest.LogCaptureFixture
) -> None:
    target = start_target()
    made = server(target.address, identity="weights a")
    assert "no identity is set" not in caplog.text
    made.write(key(1))
    for identity in ("weights b", ""):
        assert server(target.address, identity=identity).read(key(1)) == [False]
    assert "no identity is set. LMCache identifies a model only by its name" in caplog.text
    assert server(target.address, identity="weights a").read(key(1)) == [True]


def test_a_hash_too_short_to_name_its_tokens_is_refused(server: Make, start_target: Start) -> None:
    made = server(start_target().address)
    short = key(1, chunk_hash=(1).to_bytes(8, "big"))
    assert made.write(short) == {"refused": 1}
    assert made.read(short, key(2)) == [False, False]
    assert made.counts("lookup") == {"refused": 1, "miss": 1}


def test_memory_that_cannot_be_read_fails_its_task_alone(server: Make, start_target: Start) -> None:
    """Of an L1 on a disk (`--gds-l1-path`)."""
    made = server(start_target().address)
    with made.room(key(1)) as memory:
        elsewhere = GDSMemoryObject(memory.metadata)
        made.adapter.submit_store_task([key(1)], [elsewhere])
        load = made.adapter.submit_load_task([key(1), key(2)], [memory, elsewhere])
        eventually(lambda: (found := made.adapter.query_load_result(load)) and not (found.test(0) or found.test(1)))
    assert made.write(key(1)) == {"stored": 1}
    assert made.read(key(1)) == [True]


# ---- a store that fails, or lies


def test_a_killed_target_is_a_miss_until_it_is_back(
    server: Make, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.net.client.BACKOFF_SECONDS", (0.1, 0.1))
    made = server(store.address)
    made.write(key(1))
    assert made.read(key(1)) == [True]
    store.process.end(signal.SIGKILL)
    begun = time.monotonic()
    assert made.read(key(1)) == [False]
    assert made.write(key(2)) == {"unreachable": 1}
    assert time.monotonic() - begun < 5.0
    store.start()
    eventually(lambda: made.read(key(1)) == [True])
    assert made.write(key(3)) == {"stored": 1}


def test_a_target_that_hangs_costs_one_deadline_for_a_lookup_and_one_for_a_load(server: Make, store: Store) -> None:
    made = server(store.address, deadline_ms=1000)
    made.write(key(1))
    store.signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert made.read(key(1)) == [False]
    took = time.monotonic() - begun
    with made.room(key(1)) as memory:
        task = made.adapter.submit_load_task([key(1)], [memory])
        eventually(lambda: (found := made.adapter.query_load_result(task)) and not found.test(0))
    assert time.monotonic() - begun - took < 5.0
    store.signal(signal.SIGCONT)
    assert 0.9 < took < 5.0
    assert not made.counts("load").get("hit")
    eventually(lambda: made.read(key(1)) == [True])


def test_what_a_full_disk_refuses_is_a_miss_and_the_rest_stays(server: Make, start_target: Start) -> None:
    disk = FullDisk()
    made = server(start_target(files=disk).address)
    made.write(key(1))
    disk.full = True
    assert made.write(key(2)) == {"refused": 1}
    assert made.read(key(1), key(2)) == [True, False]
    disk.full = False
    assert made.write(key(2), key(3)) == {"stored": 2}
    assert made.read(key(1), key(2), key(3)) == [True, True, True]


def test_closing_does_not_wait_for_a_target_that_hangs(store: Store) -> None:
    made = Server(store.address, deadline_ms=60_000)
    made.write(key(1))
    store.signal(signal.SIGSTOP)
    made.adapter.submit_lookup_and_lock_task([key(1)], {0: LAYOUT})
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 10.0


def plant(made: Server, target: RunningTarget, content: bytes, seal_key: Any = None) -> None:
    """Put a value where object 1 would lie, as whoever has the target can."""
    with made.room(key(1)) as memory:
        _, ((name, *_),) = made.adapter._items([key(1)], [memory])
    store = target.client()
    item = Item(seal_key.name(name) if seal_key else name, memoryview(content), 0, 7, 1)
    assert store.put([item], soon()) == [Outcome.STORED]
    store.close()


def test_a_value_of_another_length_is_a_miss(server: Make, start_target: Start) -> None:
    target = start_target()
    made = server(target.address)
    plant(made, target, bytes(size(LAYOUT) - 1))
    assert made.read(key(1)) == [False]
    assert made.counts("lookup") == {"hit": 1}
    assert made.counts("load") == {"miss": 1}


@pytest.mark.parametrize("mode", ["mac", "encrypt"])
def test_with_a_seal_what_others_planted_is_a_miss(
    server: Make, start_target: Start, tmp_path: Path, mode: str
) -> None:
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for number, file in enumerate(files, 1):
        file.write_text(json.dumps([{"id": number, "key": f"{number:02x}" * 32}]))
        file.chmod(0o600)
    target = start_target()
    made = server(target.address, seal_key=str(files[0]), seal=mode)
    assert made.write(key(2)) == {"stored": 1}
    assert made.read(key(2)) == [True]
    assert server(target.address, seal_key=str(files[1]), seal=mode).read(key(2)) == [False]
    assert server(target.address).read(key(2)) == [False]
    plant(made, target, bytes(size(LAYOUT) + TRAILER_BYTES), read_keys(files[0])[0])
    assert made.read(key(1), key(2)) == [False, True]
    assert made.counts("load") == {"hit": 2, "corrupt": 1}


# ---- settings


def test_objects_of_a_namespace_are_for_those_with_its_credential(server: Make, tmp_path: Path) -> None:
    path = tmp_path / "credential"
    path.write_text("a secret of tenants, long enough")
    site = Site(tmp_path, {"a": 16 << 20}, {"a": Credential(path.read_bytes())})
    try:
        (address,) = site.clients["a"]._membership.targets()
        member = server(address, namespace="a", credential_file=str(path))
        assert member.write(key(1)) == {"stored": 1}
        assert member.read(key(1)) == [True]
        assert server(address, namespace="a").read(key(1)) == [False]
    finally:
        site.close()


def test_a_target_with_tls_is_reached_by_certificate(server: Make, start_target: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    target = start_target(tls=ServerTls(authority.issue("target")))
    cert, secret, ca = authority.issue("lmcache")
    files = {"store_tls_cert": str(cert), "store_tls_key": str(secret), "store_tls_ca": str(ca)}
    made = server(target.address, **files)
    assert made.write(key(1)) == {"stored": 1}
    assert made.read(key(1)) == [True]
    assert server(target.address).read(key(1)) == [False]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"store": ""}, "store: missing, expected host:port"),
        ({"store": "nowhere"}, "store: 'nowhere' given, expected host:port"),
        ({"deadline_ms": 0}, "deadline-ms: '0' given"),
        ({"namespace": "a b"}, "namespace: 'a b' given"),
        ({"carrier": "rdma"}, "carrier: 'rdma' given, expected"),
        ({"seal": "mac"}, "seal-key: missing, required by seal mac, expected a file of keys"),
        ({"sotre": "host:1"}, "sotre: unknown, expected one of store_tls_ca"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named(params: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Server(**({"store": "127.0.0.1:1"} | params))
    assert said in str(caught.value)


def test_the_page_of_configuration_works_as_written(start_target: Start) -> None:
    """LMCache's command from docs/lmcache.md, its target's address changed; and vLLM's beside it."""
    page = (ROOT / "docs/lmcache.md").read_text()
    commands = {}
    for block in page.split("\n\n"):
        if block.startswith("    "):
            words = shlex.split(block)
            commands[" ".join(words[:2])] = words[2:]
    target = start_target()
    written = [word.replace("127.0.0.1:7600", target.address) for word in commands["lmcache server"]]
    assert written != commands["lmcache server"]
    written[written.index("--l1-size-gb") + 1] = "0.05"
    made = Server("", arguments=written)
    assert made.write(key(1)) == {"stored": 1}
    assert made.read(key(1)) == [True]
    made.close()
    transfer = json.loads(commands["vllm serve"][commands["vllm serve"].index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "LMCacheMPConnector"
