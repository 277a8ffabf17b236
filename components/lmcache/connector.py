"""LMCache's remote connector for the store: whole chunks go between LMCache's CPU memory and targets, without a copy.

A target must be asked for a value by its exact length. LMCache's full chunks all have one; the unfull chunk at the end
of a prompt, which LMCache saves only if told to, is not kept. So nothing but the bytes is stored: shape, dtype and
format are part of the key. Nothing here knows vLLM.

LMCache calls from its event loop and from threads of its own. On the loop nothing waits: calls go to `kvtier-get` and
`kvtier-put` threads, under a deadline that counts from the call. A store that fails is a miss.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import lmcache
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext, extract_plugin_type
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from pydantic import Field, field_validator

from kvstore import credentials
from kvstore.bus.messages import checked_namespace
from kvstore.certificates import ClientOptions
from kvstore.errors import ConfigError, validated
from kvstore.keys import chunk_key, fingerprint, layout_digest
from kvstore.net import tls
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import open_membership
from kvstore.net.wire import VALUE_BYTES_MAX, Outcome

logger = logging.getLogger(__name__)

PLUGIN_TYPE = "kvtier"
GET_THREADS = 4
PUT_THREADS = 2
# Several chunks go in one put, to spare round trips; if a target is too slow for one, all of it is lost.
PUT_BYTES = 32 << 20
# Nobody waits for a put, but its chunks stay in LMCache's CPU memory, whose size is what bounds the queue of puts.
PUT_SECONDS = 10.0

Found = list[MemoryObj | None]


class Options(ClientOptions):
    """What LMCache's `extra_config` says under `remote_storage_plugin.<plugin>.`, checked."""

    store: str = Field("", validate_default=True)
    namespace: str = "default"
    # A request may wait this long for the question what is there, and as long again for the chunks.
    deadline_ms: int = Field(2000, ge=1, le=600_000)

    @field_validator("store")
    @classmethod
    def _not_empty(cls, store: str) -> str:
        if not store.strip(", "):
            raise ValueError("host:port,host:port or etcd://host:port")
        return store


class KvtierAdapter(ConnectorAdapter):
    """What LMCache loads by name: it makes the connector of each plug-in called `kvtier` or `kvtier.NAME`."""

    def __init__(self) -> None:
        super().__init__(f"plugin://{PLUGIN_TYPE}")

    def can_parse(self, url: str) -> bool:
        scheme, _, plugin = url.partition("://")
        return scheme == "plugin" and extract_plugin_type(plugin) == PLUGIN_TYPE

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """Raises ConfigError, which LMCache logs; it then goes on without the store."""
        options = read_options(context.plugin_name or PLUGIN_TYPE, context.config.extra_config or {})
        _check(context.config)
        return KvtierConnector(context, options)


class KvtierConnector(RemoteConnector):
    """See RemoteConnector for the contract of each method. What is found is complete and checked, or it is a miss."""

    def __init__(self, context: ConnectorContext, options: Options):
        super().__init__(context.config, context.metadata)
        if self.full_chunk_size_bytes > VALUE_BYTES_MAX:
            expected = f"chunks of at most {VALUE_BYTES_MAX} bytes, these have {self.full_chunk_size_bytes}"
            raise ConfigError("chunk_size", context.metadata.chunk_size, expected)
        self._memory = context.local_cpu_backend
        self._model = context.metadata.model_name
        self._layout = layout_digest(self._describe(context))
        self._probe = ""
        self._deadline_seconds = options.deadline_ms / 1000
        client_tls = tls.open_client(options.tls_files)
        membership = open_membership(options.store, options.namespace, isolated=True)
        self._client = StoreClient(
            membership,
            namespace=options.namespace,
            name="lmcache",
            credential=credentials.load(None),
            tls=client_tls,
        )
        self._getters = ThreadPoolExecutor(GET_THREADS, thread_name_prefix="kvtier-get")
        self._putters = ThreadPoolExecutor(PUT_THREADS, thread_name_prefix="kvtier-put")

    # ---- LMCache's threads, which wait

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self.batched_contains([key]) == 1

    def batched_contains(self, keys: Sequence[CacheEngineKey]) -> int:
        return self._count_prefix(keys, self._deadline())

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Never: targets evict by themselves."""
        return False

    # ---- LMCache's event loop

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self.batched_async_contains("", [key]) == 1

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        await self.batched_put([key], [memory_obj])

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[CacheEngineKey], pin: bool = False) -> int:
        """How many keys are there before the first that is not. None is pinned: a get may find fewer."""
        return await asyncio.wrap_future(self._getters.submit(self._count_prefix, keys, self._deadline()))

    async def batched_get(self, keys: Sequence[CacheEngineKey]) -> Found:
        fetch = self._getters.submit(self._fetch, keys, self._deadline())
        try:
            return await asyncio.wrap_future(fetch)
        except asyncio.CancelledError:
            fetch.add_done_callback(_drop)  # not before: it is still written to
            raise

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[CacheEngineKey]) -> Sequence[MemoryObj]:
        """The chunks before the first that did not come."""
        found = await self.batched_get(keys)
        count = found.index(None) if None in found else len(found)
        _release(found[count:])
        return found[:count]

    async def batched_put(self, keys: Sequence[CacheEngineKey], memory_objs: Sequence[MemoryObj]) -> None:
        """Holds `memory_objs` until they are no longer read, even if this is cancelled before."""
        if any(key.model_name != self._model for key in keys):
            self._probe = os.urandom(8).hex()
        chunks = [(key, memory) for key, memory in zip(keys, memory_objs, strict=True) if self._is_whole(memory)]
        put = self._putters.submit(self._store, chunks, time.monotonic() + PUT_SECONDS)
        for _, memory in chunks:
            memory.ref_count_up()
        put.add_done_callback(lambda _: _release([memory for _, memory in chunks]))
        await asyncio.wrap_future(put)

    async def close(self) -> None:
        """Calls under way are misses. Returns when no thread touches LMCache's memory any more."""
        for pool in (self._getters, self._putters):
            pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        await asyncio.to_thread(self._getters.shutdown)
        await asyncio.to_thread(self._putters.shutdown)

    def support_batched_get(self) -> bool:
        return True

    def support_batched_put(self) -> bool:
        return True

    def support_batched_contains(self) -> bool:
        return True

    # ---- threads

    def _count_prefix(self, keys: Sequence[CacheEngineKey], deadline: float) -> int:
        outcomes = self._client.exists([self._name(key) for key in keys], deadline)
        return next((index for index, outcome in enumerate(outcomes) if outcome is not Outcome.HIT), len(keys))

    def _fetch(self, keys: Sequence[CacheEngineKey], deadline: float) -> Found:
        rooms = self._allocate(len(keys))
        outcomes = [Outcome.MISS] * len(rooms)
        try:
            names = [self._name(key) for key in keys[: len(rooms)]]
            outcomes = self._client.get(names, [room.byte_array.cast("B") for room in rooms], deadline)
        finally:
            _release([room for room, outcome in zip(rooms, outcomes, strict=True) if outcome is not Outcome.HIT])
        found = [room if outcome is Outcome.HIT else None for room, outcome in zip(rooms, outcomes, strict=True)]
        return [*found, *[None] * (len(keys) - len(found))]

    def _allocate(self, count: int) -> list[MemoryObj]:
        """Memory for `count` chunks, or for as many as there is room now: LMCache would wait for more without end."""
        rooms: list[MemoryObj] = []
        while len(rooms) < count:
            room = self._memory.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt, busy_loop=False)
            if room is None:
                break
            rooms.append(room)
        return rooms

    def _store(self, chunks: Sequence[tuple[CacheEngineKey, MemoryObj]], deadline: float) -> None:
        """Put what the store does not hold yet."""
        short = fingerprint(self._layout)
        items = [Item(self._name(key), memory.byte_array.cast("B"), 0, short, 1) for key, memory in chunks]
        outcomes = self._client.exists([item.key for item in items], deadline)
        missing = [item for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.MISS]
        per_put = max(1, PUT_BYTES // self.full_chunk_size_bytes)
        for start in range(0, len(missing), per_put):
            outcomes += self._client.put(missing[start : start + per_put], deadline)
        lost = Counter(outcome.name.lower() for outcome in outcomes if outcome not in _NOT_LOST)
        if lost:
            logger.warning("of %d chunks not all are stored: %s", len(items), dict(lost))

    # ---- names

    def _describe(self, context: ConnectorContext) -> dict[str, object]:
        """What decides the meaning of a chunk's bytes, beside what its key says."""
        return {
            "engine": f"lmcache {lmcache.__version__}",
            "hash": context.config.pre_caching_hash_algorithm,
            "chunk_tokens": context.metadata.chunk_size,
            "kv": [list(context.metadata.kv_shape), str(context.metadata.kv_dtype)],
            "format": self.meta_fmt.name,
            "groups": [[list(s), str(d)] for s, d in zip(self.meta_shapes, self.meta_dtypes, strict=True)],
        }

    def _name(self, key: CacheEngineKey) -> bytes:
        """The chunk's key in the store. A chunk never changes there, but LMCache's health check puts other bytes each
        time, under a model name of its own, and wants them back: such keys get another name with every put."""
        described = {
            "layout": self._layout.hex(),
            "model": key.model_name,
            "probe": "" if key.model_name == self._model else self._probe,
            "parallel": [key.world_size, key.worker_id],
            "dtype": str(key.dtype),
            "tags": key.tags,
            "layer": getattr(key, "layer_id", None),
        }
        return chunk_key(layout_digest(described), key.chunk_hash_hex.encode())

    def _is_whole(self, memory: MemoryObj) -> bool:
        described = (memory.get_memory_format(), memory.get_shapes(), memory.get_dtypes(), memory.get_size())
        return described == (self.meta_fmt, self.meta_shapes, self.meta_dtypes, self.full_chunk_size_bytes)

    def _deadline(self) -> float:
        return time.monotonic() + self._deadline_seconds

    # Last in the class, for from here on its name hides the type's.
    async def list(self) -> Sequence[str]:
        """Empty: the store knows digests, not names."""
        return []


_NOT_LOST = (Outcome.HIT, Outcome.MISS, Outcome.STORED)  # of a question and of a put


def read_options(plugin: str, extra: Mapping[str, object]) -> Options:
    """The options of one plug-in. Raises ConfigError."""
    prefix = f"remote_storage_plugin.{plugin}."
    given = {name.removeprefix(prefix): value for name, value in extra.items() if name.startswith(prefix)}
    for name, value in given.items():
        # One with a dot belongs to another plug-in, `plugin.NAME`.
        if name not in Options.model_fields and name not in ("module_path", "class_name") and "." not in name:
            raise ConfigError(name, value, f"one of {', '.join(Options.model_fields)}")
    options = validated(Options, {name: given.get(name) for name in Options.model_fields})
    checked_namespace(options.namespace)
    return options


def _check(config: LMCacheEngineConfig) -> None:
    """Raises ConfigError for what the store cannot keep or share, and warns of what it keeps less well."""
    algorithm = config.pre_caching_hash_algorithm
    for name, value, accepted, expected in (
        ("use_layerwise", config.use_layerwise, not config.use_layerwise, "False: the store keeps whole chunks"),
        ("remote_serde", config.remote_serde, config.remote_serde == "naive", "naive: others vary in length"),
        # Others begin with a seed of each process, and two prompts may share a hash.
        ("pre_caching_hash_algorithm", algorithm, algorithm.startswith("sha256"), "sha256_cbor or sha256"),
    ):
        if not accepted:
            raise ConfigError(name, value, expected)
    if config.save_unfull_chunk:
        logger.warning("save_unfull_chunk: the unfull chunk at the end of a prompt is not kept in the store")


def _drop(fetch: Future[Found]) -> None:
    """Give back what a fetch found that nobody waits for any more."""
    if not fetch.cancelled() and fetch.exception() is None:
        _release(fetch.result())


def _release(memories: Sequence[MemoryObj | None]) -> None:
    for memory in memories:
        if memory is not None:
            memory.ref_count_down()
