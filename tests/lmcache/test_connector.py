"""The plug-in inside the real LMCache, which loads it from its own configuration, against a real target process."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.utils import CacheEngineKey, LayerCacheEngineKey, mock_up_broadcast_fn, mock_up_broadcast_object_fn
from lmcache.v1.cache_engine import LMCacheEngine, LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
from lmcache.v1.health_monitor.checks.remote_backend_check import RemoteBackendHealthCheck
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.remote_backend import RemoteBackend
from lmcache.v1.storage_backend.storage_manager import StorageManager

from components.lmcache.connector import KvtierConnector
from graphs.services import free_port
from kvstore.errors import ConfigError
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from tests.conftest import eventually, soon
from tests.kvstore.test_target_process import Process

LAYERS, HEADS, HEAD_SIZE, TOKENS = 4, 2, 8, 16
DEADLINE_MS = 1000
OPTION = "remote_storage_plugin.kvtier."


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")


class Store:
    """A target process on a directory; `start` and `process.end` as often as a test likes."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self.start()

    def start(self) -> None:
        self.process = Process(
            *("--dir", str(self.directory), "--capacity", "64MiB", "--segment-size", "4MiB"),
            *("--listen", self.address, "--nats", ""),
        ).ready()

    def hang(self) -> None:
        self.process.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.process.pid}/task")
        eventually(lambda: all(") T " in stat.read_text() for stat in threads.glob("*/stat")))

    def go_on(self) -> None:
        self.process.process.send_signal(signal.SIGCONT)

    def operations(self) -> dict[str, dict[str, int]]:
        client = StoreClient(StaticMembership([self.address]))
        (status,) = client.stat(soon()).values()
        client.close()
        return status.operations


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.process.end(signal.SIGKILL)


def config(store: str, **changes: Any) -> LMCacheEngineConfig:
    """LMCache's configuration; a change whose name has a dot is one of the plug-in's options."""
    extra = {
        OPTION + "module_path": "components.lmcache.connector",
        OPTION + "class_name": "KvtierAdapter",
        OPTION + "store": store,
        OPTION + "deadline_ms": DEADLINE_MS,
        **{name: changes.pop(name) for name in list(changes) if "." in name},
    }
    settings = {
        "chunk_size": TOKENS,
        "local_cpu": False,
        "max_local_cpu_size": 0.002,
        "pre_caching_hash_algorithm": "sha256_cbor",
        "remote_storage_plugins": ["kvtier"],
        "extra_config": extra,
    }
    return LMCacheEngineConfig.from_defaults(**(settings | changes))


def metadata(**changes: Any) -> LMCacheMetadata:
    settings = {
        "model_name": "llama",
        "world_size": 2,
        "local_world_size": 2,
        "worker_id": 0,
        "local_worker_id": 0,
        "kv_dtype": torch.bfloat16,
        "kv_shape": (LAYERS, 2, TOKENS, HEADS, HEAD_SIZE),
        "chunk_size": TOKENS,
        "role": "worker",
    }
    return LMCacheMetadata(**(settings | changes))


class Worker:
    """LMCache's storage manager, as an engine makes it, with the plug-in as its only place to keep chunks."""

    def __init__(self, config: LMCacheEngineConfig, metadata: LMCacheMetadata):
        self.metadata = metadata
        self.manager = StorageManager(config, metadata, EventManager())
        backend = self.manager.storage_backends["RemoteBackend-kvtier"]
        assert isinstance(backend, RemoteBackend)
        self.backend = backend

    def key(self, number: int, **changes: Any) -> CacheEngineKey:
        m = self.metadata
        fields = {"model_name": m.model_name, "world_size": m.world_size, "worker_id": m.worker_id}
        return CacheEngineKey(**(fields | {"chunk_hash": number, "dtype": m.kv_dtype} | changes))

    def chunk(self, number: int, tokens: int | None = None) -> MemoryObj:
        """Memory of LMCache's allocator with content that can be told from every other chunk's."""
        shapes, dtypes = self.metadata.get_shapes(tokens), self.metadata.get_dtypes()
        kind = MemoryFormat.KV_MLA_FMT if self.metadata.use_mla else MemoryFormat.KV_2LTD
        memory = self.manager.allocate(shapes, dtypes, kind, busy_loop=False)
        assert memory is not None
        memory.tensor.copy_(content(number, shapes[0]))
        return memory

    def put(self, *numbers: int) -> None:
        keys = [self.key(number) for number in numbers]
        self.manager.batched_put(keys, [self.chunk(number) for number in numbers])
        eventually(lambda: self.backend.batched_contains(keys) == len(keys))

    def get(self, number: int) -> MemoryObj | None:
        return self.backend.get_blocking(self.key(number))

    def holds(self, number: int) -> bool:
        """Whether the chunk comes back as it was put."""
        memory = self.get(number)
        if memory is None:
            return False
        same = torch.equal(memory.tensor, content(number, memory.get_shape()))
        memory.ref_count_down()
        return same

    def on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.manager.loop).result(20)

    def chunks_in_use(self) -> int:
        return int(self.manager.allocator_backend.get_memory_allocator().pin_allocator.num_active_allocations)


def content(number: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


@pytest.fixture
def start_worker(store: Store, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., Worker]]:
    """Starts workers, `config` and `metadata` changed as told; all memory must have been given back at the end."""
    workers: list[Worker] = []

    def start(described: LMCacheMetadata | None = None, **changes: Any) -> Worker:
        workers.append(Worker(config(store.address, **changes), described or metadata()))
        return workers[-1]

    yield start
    in_use = []
    for worker in workers:
        with contextlib.suppress(AssertionError):
            eventually(lambda worker=worker: worker.chunks_in_use() == 0)
        in_use.append(worker.chunks_in_use())
        worker.manager.close()
    assert in_use == [0] * len(workers)
    assert not [record for record in caplog.get_records("call") if "garbage collected" in record.getMessage()]


def test_chunks_come_back_by_every_way_that_lmcache_asks(start_worker) -> None:
    """Another worker than the one that put them gets them: alone, in batches, with and without waiting."""
    first, worker = start_worker(), start_worker()
    first.put(1, 2)
    first.put(4)
    keys = [worker.key(number) for number in (1, 2, 3, 4)]
    backend, connector = worker.backend, worker.backend.connection
    assert [backend.contains(key) for key in keys] == [True, True, False, True]
    assert [connector.exists_sync(key) for key in keys] == [True, True, False, True]
    assert backend.batched_contains(keys) == 2
    assert worker.on_loop(backend.batched_async_contains("lookup", keys)) == 2
    assert [worker.holds(number) for number in (1, 2, 3, 4)] == [True, True, False, True]

    found = backend.batched_get_blocking(keys)
    assert [memory is not None for memory in found] == [True, True, False, True]
    prefix = worker.on_loop(backend.batched_get_non_blocking("lookup", keys))
    for memory, number in zip([*found, *prefix], (1, 2, 3, 4, 1, 2), strict=True):
        if memory is not None:
            assert torch.equal(memory.tensor, content(number, memory.get_shape()))
            assert (memory.get_shapes(), memory.get_dtypes()) == (first.metadata.get_shapes(), [torch.bfloat16])
            memory.ref_count_down()
    assert worker.on_loop(connector.list()) == []
    assert backend.remove(keys[0]) is False


def test_a_chunk_that_the_store_holds_is_not_sent_again(start_worker, store: Store) -> None:
    worker = start_worker()
    worker.put(1)
    assert store.operations()["put"] == {"stored": 1}
    worker.put(1, 2)
    assert store.operations()["put"] == {"stored": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "other"},
        {"world_size": 4},
        {"worker_id": 1},
        {"kv_dtype": torch.float16},
        {"kv_shape": (LAYERS, 2, TOKENS, HEADS * 2, HEAD_SIZE // 2)},
        {"kv_shape": (LAYERS * 2, 1, TOKENS, HEADS, HEAD_SIZE), "use_mla": True},
    ],
    ids=str,
)
def test_what_means_something_else_is_never_found(start_worker, changes: dict[str, Any]) -> None:
    """All of these have chunks of the same length, and the same chunk hash."""
    worker, other = start_worker(), start_worker(metadata(**changes))
    worker.put(1)
    assert start_worker().holds(1)
    assert not other.backend.contains(other.key(1))
    assert other.get(1) is None
    other.put(1)
    assert other.backend.contains(other.key(1))
    assert worker.holds(1)


def test_tags_layers_and_settings_are_part_of_the_name(start_worker) -> None:
    worker = start_worker()
    worker.put(1)
    assert worker.backend.contains(worker.key(1))
    for tags in (
        {"lmcache.tag.user": "a"},
        {"lmcache.tag.user": "a@b%c"},
        {"lmcache.tag.user": "a", "lmcache.tag.b": "c"},
    ):
        tagged = worker.key(1, request_configs=tags)
        assert not worker.backend.contains(tagged)
        worker.manager.batched_put([tagged], [worker.chunk(2)])
        eventually(lambda tagged=tagged: worker.backend.contains(tagged))
    layer = LayerCacheEngineKey("llama", 2, 0, 1, torch.bfloat16, layer_id=0)
    assert not worker.backend.contains(layer)
    assert not start_worker(pre_caching_hash_algorithm="sha256").holds(1)
    assert start_worker().holds(1)


def test_an_unfull_chunk_is_not_kept(start_worker) -> None:
    worker = start_worker(save_unfull_chunk=True)
    worker.manager.batched_put([worker.key(1)], [worker.chunk(1, TOKENS - 1)])
    worker.put(2)
    eventually(lambda: worker.chunks_in_use() == 0)
    assert worker.holds(2)
    assert not worker.backend.contains(worker.key(1))


def test_a_dead_target_is_a_miss_until_it_is_back(start_worker, store: Store) -> None:
    worker = start_worker()
    worker.put(1)
    assert worker.holds(1)
    store.process.end(signal.SIGKILL)
    started = time.monotonic()
    assert worker.get(1) is None
    assert not worker.backend.contains(worker.key(1))
    assert worker.backend.batched_get_blocking([worker.key(1), worker.key(2)]) == [None, None]
    worker.manager.batched_put([worker.key(2)], [worker.chunk(2)])
    assert time.monotonic() - started < 5
    store.start()
    eventually(lambda: worker.holds(1))
    worker.put(2)
    assert worker.holds(2)


@pytest.mark.parametrize("ask", ["contains", "exists_sync", "get", "batched_get", "batched_get_non_blocking", "put"])
def test_a_target_that_hangs_costs_the_deadline_and_not_the_loop(start_worker, store: Store, ask: str) -> None:
    worker = start_worker()
    worker.put(1)
    key, backend = worker.key(1), worker.backend
    calls: dict[str, Callable[[], object]] = {
        "contains": lambda: backend.contains(key),
        "exists_sync": lambda: backend.connection.exists_sync(key),
        "get": lambda: backend.get_blocking(key),
        "batched_get": lambda: next(iter(backend.batched_get_blocking([key]))),
        "batched_get_non_blocking": lambda: worker.on_loop(backend.batched_get_non_blocking("", [key])),
        "put": lambda: worker.manager.batched_put([worker.key(2)], [worker.chunk(2)]),
    }
    longest = [0.0]

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest[0] = max(longest[0], time.monotonic() - before)

    store.hang()
    watching = asyncio.run_coroutine_threadsafe(watch(), worker.manager.loop)
    started = time.monotonic()
    assert not calls[ask]()
    took = time.monotonic() - started
    watching.cancel()
    store.go_on()
    assert took < DEADLINE_MS / 1000 + 4
    assert took > DEADLINE_MS / 1000 - 0.1 or ask == "put"
    assert longest[0] < 0.8
    eventually(lambda: worker.holds(1))


def test_a_bit_that_flipped_on_disk_is_a_miss(start_worker, store: Store) -> None:
    worker = start_worker()
    worker.put(1, 2)
    store.process.end(signal.SIGTERM)
    wanted = worker.chunk(1)
    payload = bytes(wanted.byte_array)
    wanted.ref_count_down()
    (segment,) = [path for path in store.directory.glob("segment-*") if payload in path.read_bytes()]
    at = segment.read_bytes().index(payload) + len(payload) // 2
    with segment.open("r+b") as file:
        file.seek(at)
        flipped = bytes([file.read(1)[0] ^ 1])
        file.seek(at)
        file.write(flipped)
    store.start()
    again = start_worker()
    assert again.holds(2)
    assert again.get(1) is None
    worker.put(1)
    assert again.holds(1)


def test_what_nobody_waits_for_any_more_is_given_back(start_worker, store: Store) -> None:
    worker = start_worker(**{OPTION + "deadline_ms": 2000})
    worker.put(1)
    store.hang()
    getting = asyncio.run_coroutine_threadsafe(worker.backend.connection.get(worker.key(1)), worker.manager.loop)
    eventually(lambda: worker.chunks_in_use() == 1)
    getting.cancel()
    with pytest.raises(CancelledError):
        getting.result(20)
    assert worker.chunks_in_use() == 1  # the fetch still writes there
    store.go_on()
    eventually(lambda: worker.chunks_in_use() == 0)
    assert worker.holds(1)


def test_a_chunk_is_held_while_its_put_is_under_way(start_worker, store: Store) -> None:
    worker = start_worker()
    worker.put(1)
    store.hang()
    memory = worker.chunk(2)
    putting = asyncio.run_coroutine_threadsafe(
        worker.backend.connection.put(worker.key(2), memory), worker.manager.loop
    )
    eventually(lambda: memory.get_ref_count() == 2)
    putting.cancel()
    eventually(lambda: memory.get_ref_count() == 1)  # LMCache has let go of it
    assert memory.is_valid()
    store.go_on()
    eventually(lambda: not memory.is_valid())
    assert worker.holds(2)


def test_without_memory_a_get_is_a_miss_and_does_not_wait(start_worker) -> None:
    worker = start_worker()
    worker.put(1, 2)
    keys, taken = [worker.key(1), worker.key(2)], []
    while (memory := worker.manager.allocate(*described(worker), busy_loop=False)) is not None:
        taken.append(memory)
    assert worker.backend.batched_get_blocking(keys) == [None, None]
    taken.pop().ref_count_down()
    first, second = worker.backend.batched_get_blocking(keys)
    assert first is not None
    assert second is None
    for memory in (first, *taken):
        memory.ref_count_down()
    assert worker.holds(2)


def described(worker: Worker) -> tuple[list[torch.Size], list[torch.dtype]]:
    return worker.metadata.get_shapes(), worker.metadata.get_dtypes()


def test_lmcaches_health_check_recovers_more_than_once(start_worker) -> None:
    """It puts other bytes under the same key each time, which the store would not take."""
    worker = start_worker()
    check = RemoteBackendHealthCheck(worker.backend)
    probe = CacheEngineKey("test", 1, 0, 0, torch.bfloat16)
    for number in range(3):
        filler = worker.chunk(number)  # the check does not fill its memory: leave it something else each time
        filler.ref_count_down()
        assert check._put_and_get_check()
        assert worker.backend.contains(probe)
    assert not start_worker().backend.contains(probe)


def test_closing_ends_calls_under_way(store: Store) -> None:
    worker = Worker(config(store.address, **{OPTION + "deadline_ms": 20_000}), metadata())
    assert not worker.backend.contains(worker.key(1))
    store.hang()
    asking = asyncio.run_coroutine_threadsafe(worker.backend.connection.exists(worker.key(1)), worker.manager.loop)
    time.sleep(0.2)
    started = time.monotonic()
    assert not asking.done()
    worker.backend.close()
    assert asking.result(20) is False
    assert time.monotonic() - started < 10
    worker.manager.close()


class Device(MockGPUConnector):
    """A GPU's KV cache: one tensor, given with each call."""

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            memory.tensor.copy_(kwargs["cache"][:, :, start:end])

    def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            kwargs["cache"][:, :, start:end] = memory.tensor


@pytest.fixture
def start_engine(store: Store) -> Iterator[Callable[[str], LMCacheEngine]]:
    started: list[str] = []

    def start(name: str) -> LMCacheEngine:
        device = Device((LAYERS, 2, TOKENS, HEADS, HEAD_SIZE))
        engine = LMCacheEngineBuilder.get_or_create(
            name, config(store.address), metadata(), device, mock_up_broadcast_fn, mock_up_broadcast_object_fn
        )
        started.append(name)
        engine.post_init()
        return engine

    yield start
    for name in started:
        LMCacheEngineBuilder.destroy(name)


def test_one_engine_computes_and_another_retrieves(start_engine) -> None:
    """LMCache's engine from tokens to tensors: three full chunks and a rest, and a prompt that differs at the end."""
    first, second = start_engine("first"), start_engine("second")
    tokens = list(range(3 * TOKENS + 5))
    computed = content(1, torch.Size([2, LAYERS, len(tokens), HEADS * HEAD_SIZE]))
    assert second.lookup(tokens) == 0
    first.store(tokens, cache=computed)
    eventually(lambda: second.lookup(tokens) == 3 * TOKENS)
    for prompt, hits in (
        (tokens, 3 * TOKENS),
        ([*tokens[: 2 * TOKENS], *range(100, 130)], 2 * TOKENS),
        ([7, *tokens], 0),
    ):
        loaded = torch.zeros_like(computed)
        assert int(second.retrieve(prompt, cache=loaded).sum()) == hits
        assert torch.equal(loaded[:, :, :hits], computed[:, :, :hits])
        assert not loaded[:, :, hits:].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({OPTION + "store": ""}, "store: '' given, expected host:port,host:port or etcd://host:port"),
        ({OPTION + "store": "nonsense"}, "store: 'nonsense' given, expected host:port"),
        ({OPTION + "deadline_ms": 0}, "deadline-ms: '0' given, expected greater than or equal to 1"),
        ({OPTION + "deadline_ms": "soon"}, "deadline-ms: 'soon' given, expected a whole number"),
        ({OPTION + "namespace": "a b"}, "namespace: 'a b' given, expected 1 to 64 letters"),
        ({OPTION + "store_tls_cert": "/c"}, "store-tls-key: '' given, expected a file, beside --store-tls-cert"),
        ({OPTION + "dedline_ms": 1}, "dedline_ms: '1' given, expected one of store_tls_ca, "),
        ({"use_layerwise": True}, "use_layerwise: 'True' given, expected False"),
        ({"remote_serde": "kivi"}, "remote_serde: 'kivi' given, expected naive"),
        ({"pre_caching_hash_algorithm": "builtin"}, "pre_caching_hash_algorithm: 'builtin' given, expected sha256"),
        ({"chunk_size": 1 << 19}, "chunk_size: '524288' given, expected chunks of at most 67108864 bytes"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else None,
)
def test_bad_input_is_told_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        connect(**changes)
    assert says in str(error.value)
    assert str(error.value).count("\n") == 0


def test_good_input_is_taken() -> None:
    changes = {OPTION + "namespace": "prod", OPTION + "deadline_ms": "250", OPTION + "b.store": "of another plug-in"}
    connector = connect(**changes).getWrappedConnector()
    assert isinstance(connector, KvtierConnector)
    assert connector._deadline_seconds == 0.25
    asyncio.run(connector.close())


def connect(**changes: Any) -> Any:
    """The connector as LMCache makes it, without the rest of LMCache."""
    settings = config("127.0.0.1:7600", **changes)
    size = settings.chunk_size
    described = metadata(chunk_size=size, kv_shape=(LAYERS, 2, size, HEADS, HEAD_SIZE))
    return CreateConnector("plugin://kvtier", asyncio.new_event_loop(), None, settings, described, "kvtier")
