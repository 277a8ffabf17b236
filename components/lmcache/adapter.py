"""LMCache's L2 adapter over the store: moves objects between the L1 memory of its server and targets, without a copy.

LMCache's store and prefetch threads call it, and never block. A task runs on a thread of its kind, with a deadline from
the call on. Its end wakes the caller through an event fd. A failing store is a miss. Only bad input at start raises.

LMCache names an object by a hash of its tokens and all before it, model name, world size and rank, object group and
cache salt. The key covers all of these, and also shapes, dtypes, the setting `identity` and LMCache's version. A large
object is stored as several values (parts), and is found if all of them are. Nothing is locked: targets evict by
themselves, so a load may find less than its lookup.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar

import lmcache
import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier
from prometheus_client import Counter as Series
from pydantic import Field

from components.plugin import PluginOptions
from kvstore.keys import chunk_key, fingerprint, layout_digest
from kvstore.net.client import Item
from kvstore.net.wire import Outcome
from kvstore.rarely import Rarely

logger = logging.getLogger(__name__)

LOOKUP_THREADS = 2
LOAD_THREADS = 4
STORE_THREADS = 2
# Size limit of a part of an object.
PART_BYTES = 32 << 20
# One put carries several values, to save round trips. If a target is too slow for a put, all of its values are lost.
PUT_BYTES = 32 << 20
# No request waits for a store, but its objects stay in L1, whose size bounds the queue.
STORE_SECONDS = 10.0
# LMCache frees the memory that a load writes to after 600 s.
DEADLINE_MS_MAX = 60_000
# Python's builtin hash has 8 bytes and a seed per process, and two prompts may collide.
HASH_BYTES_MIN = 16
COMPLAIN_SECONDS = 10.0
DIGESTS_MAX = 1024

_OBJECTS = Series(
    "kvtier_lmcache_objects", "Objects, by operation (lookup, load, store) and outcome", ["operation", "outcome"]
)
_BYTES = Series("kvtier_lmcache_bytes", "Bytes of objects loaded or stored", ["operation"])

Result = TypeVar("Result")


class Options(PluginOptions):
    """The settings under `adapter_params` of LMCache's configuration, checked."""

    identity: str = ""
    # A request may wait up to this long for a lookup, and again for the objects.
    deadline_ms: int = Field(2000, ge=1, le=DEADLINE_MS_MAX)


class _Tasks(Generic[Result]):
    """Tasks of one kind: threads, results that wait for the caller, and the event fd. Thread-safe."""

    def __init__(self, kind: str, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvtier-{kind}")
        self._ended = create_event_notifier()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._complains = Rarely(COMPLAIN_SECONDS)
        self._results: dict[int, Result] = {}

    @property
    def event_fd(self) -> int:
        return int(self._ended.fileno())

    def submit(self, work: Callable[[], Result], failed: Result) -> int:
        """Start a task; return its number. Its result is that of `work`, or `failed` if `work` raises."""
        number = next(self._numbers)
        self._pool.submit(self._run, number, work, failed)
        return number

    def take(self, number: int) -> Result | None:
        with self._lock:
            return self._results.pop(number, None)

    def take_all(self) -> dict[int, Result]:
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        """Cancel waiting tasks and wait for running ones: after this, no thread touches LMCache's memory."""
        self._pool.shutdown(cancel_futures=True)
        self._ended.close()

    def _run(self, number: int, work: Callable[[], Result], failed: Result) -> None:
        result = failed
        try:
            result = work()
        except Exception:
            with self._lock:
                complains = self._complains()
            if complains:
                logger.exception("kvtier: a task failed")
        with self._lock:
            self._results[number] = result
        self._ended.notify()


class KvtierL2Adapter(L2AdapterInterface):
    """See L2AdapterInterface for the contract of each method. An object that is found is complete and its checksum is
    valid. After a miss the content of its memory is undefined, and LMCache frees it. LMCache is not notified of stored
    objects, because it could not be notified of evictions."""

    def __init__(self, params: Mapping[str, object], l1_memory_desc: object = None):
        """Raises ConfigError."""
        super().__init__()
        options = Options.read(params)
        secrets = options.open_secrets()
        self._identity = options.identity
        self._deadline_seconds = options.deadline_ms / 1000
        self._digests = lru_cache(DIGESTS_MAX)(self._describe)
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._complains = {operation: Rarely(COMPLAIN_SECONDS) for operation in ("lookup", "load", "store")}
        self._client = options.open_client("lmcache", secrets)
        self._lookups = _Tasks[Bitmap]("lookup", LOOKUP_THREADS)
        self._loads = _Tasks[Bitmap]("load", LOAD_THREADS)
        self._stores = _Tasks[L2StoreResult]("store", STORE_THREADS)
        if not options.identity:
            logger.warning(
                "kvtier: no identity is set. LMCache identifies a model only by its name: other weights or engines "
                "under the same name would share KV with this one, and give wrong answers (docs/lmcache.md)"
            )

    # ---- LMCache's threads

    def get_store_event_fd(self) -> int:
        return self._stores.event_fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.event_fd

    def get_load_event_fd(self) -> int:
        return self._loads.event_fd

    def submit_store_task(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> int:
        deadline = time.monotonic() + STORE_SECONDS
        return self._stores.submit(lambda: self._store(keys, objects, deadline), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(
        self, keys: Sequence[ObjectKey], group_layout_descs: Mapping[int, MemoryLayoutDesc]
    ) -> int:
        deadline = time.monotonic() + self._deadline_seconds
        return self._lookups.submit(lambda: self._look_up(keys, group_layout_descs, deadline), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: Sequence[ObjectKey]) -> None:
        """Does nothing: lookups lock nothing."""

    def submit_load_task(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> int:
        deadline = time.monotonic() + self._deadline_seconds
        return self._loads.submit(lambda: self._load(keys, objects, deadline), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.take(task_id)

    def report_status(self) -> dict[str, Any]:
        """Always healthy, even if the store is not: LMCache works without it. `objects` has the same counts as the
        metrics."""
        with self._counting:
            return {"is_healthy": True, "type": type(self).__name__, "objects": dict(self._counts)}

    def close(self) -> None:
        """Running calls end as misses."""
        self._client.close()
        for tasks in (self._lookups, self._loads, self._stores):
            tasks.close()

    # ---- threads of tasks

    def _look_up(self, keys: Sequence[ObjectKey], layouts: Mapping[int, MemoryLayoutDesc], deadline: float) -> Bitmap:
        names: list[list[bytes]] = []
        for key in keys:
            layout = layouts.get(key.object_group_id, _NO_LAYOUT)
            digest = self._digest(key, layout.shapes, layout.dtypes)
            names.append(_names(digest, key, _size(layout.shapes, layout.dtypes)))
        outcomes = self._client.exists([name for of_object in names for name in of_object], deadline)
        return _bitmap(self._count("lookup", [len(of_object) for of_object in names], outcomes))

    def _load(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj], deadline: float) -> Bitmap:
        counts, items = self._items(keys, objects)
        outcomes = self._client.get([item.key for item in items], [item.payload for item in items], deadline)
        found = self._count("load", counts, outcomes)
        _BYTES.labels("load").inc(sum(memory.get_size() for memory, hit in zip(objects, found, strict=True) if hit))
        return _bitmap(found)

    def _store(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj], deadline: float) -> L2StoreResult:
        """Put the objects that are not in the store yet."""
        counts, items = self._items(keys, objects)
        outcomes = self._client.exists([item.key for item in items], deadline)
        missing = [index for index, outcome in enumerate(outcomes) if outcome is Outcome.MISS]
        for batch in _batches(missing, items):
            for index, outcome in zip(batch, self._client.put([items[i] for i in batch], deadline), strict=True):
                outcomes[index] = outcome
        stored_bytes = sum(len(items[index].payload) for index in missing if outcomes[index] is Outcome.STORED)
        _BYTES.labels("store").inc(stored_bytes)
        return L2StoreResult(all(self._count("store", counts, outcomes)), stored_bytes)

    # ---- names and parts

    def _items(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> tuple[list[int], list[Item]]:
        """The number of parts of each object, 0 if it cannot be stored, and the parts of all objects."""
        counts, items = [], []
        for key, memory in zip(keys, objects, strict=True):
            shapes, dtypes = memory.get_shapes(), memory.get_dtypes()
            digest = self._digest(key, shapes, dtypes)
            content = memory.byte_array.cast("B")
            # An object that a `serde` compressed has another length than a lookup would expect.
            names = _names(digest, key, len(content)) if len(content) == _size(shapes, dtypes) else []
            for number, name in enumerate(names):
                part = content[number * PART_BYTES : (number + 1) * PART_BYTES]
                items.append(Item(name, part, 0, fingerprint(digest), 1))
            counts.append(len(names))
        return counts, items

    def _digest(self, key: ObjectKey, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> bytes:
        """Layout digest: everything that determines an object's bytes, except its hash."""
        named = key.model_name, key.kv_rank, key.object_group_id, key.cache_salt
        return self._digests(*named, tuple(shapes), tuple(str(dtype) for dtype in dtypes))

    def _describe(
        self, model: str, rank: int, group: int, salt: str, shapes: tuple[torch.Size, ...], dtypes: tuple[str, ...]
    ) -> bytes:
        return layout_digest(
            {
                "engine": f"lmcache {lmcache.__version__}",
                "identity": self._identity,
                "part": PART_BYTES,
                "model": model,
                "rank": rank,  # and world size
                "group": group,
                "salt": salt,
                "layout": [[list(shape), dtype] for shape, dtype in zip(shapes, dtypes, strict=True)],
            }
        )

    # ---- metrics and logs

    def _count(self, operation: str, counts: Sequence[int], outcomes: Sequence[Outcome]) -> list[bool]:
        """Count outcomes by object; for each object, whether all its parts are there."""
        counted: Counter[str] = Counter()
        objects, left = [], iter(outcomes)
        for count in counts:
            of_object = list(itertools.islice(left, count)) or [Outcome.REFUSED]
            wrong = [outcome for outcome in of_object if outcome not in (Outcome.HIT, Outcome.STORED)]
            objects.append(not wrong)
            counted[(wrong or of_object)[0].name.lower()] += 1
        for outcome, number in counted.items():
            _OBJECTS.labels(operation, outcome).inc(number)
        failed = {outcome: number for outcome, number in counted.items() if outcome not in _EXPECTED}
        with self._counting:
            self._counts.update({f"{operation} {outcome}": number for outcome, number in counted.items()})
            complains = bool(failed) and self._complains[operation]()
        if complains:
            logger.warning("kvtier: %s of %d objects: %s", operation, len(objects), failed)
        return objects


_NO_LAYOUT = MemoryLayoutDesc([], [])
_EXPECTED = ("hit", "miss", "stored")


def _names(digest: bytes, key: ObjectKey, size: int) -> list[bytes]:
    """The store keys of an object's parts; none if its hash is too short to be unique."""
    if len(key.chunk_hash) < HASH_BYTES_MIN:
        return []
    return [chunk_key(digest, key.chunk_hash, number) for number in range(-(-size // PART_BYTES))]


def _size(shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> int:
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))


def _batches(indices: Sequence[int], items: Sequence[Item]) -> Iterator[list[int]]:
    """Split into batches of at most PUT_BYTES, or of one item."""
    batch: list[int] = []
    room = PUT_BYTES
    for index in indices:
        room -= len(items[index].payload)
        if batch and room < 0:
            yield batch
            batch, room = [], PUT_BYTES - len(items[index].payload)
        batch.append(index)
    if batch:
        yield batch


def _bitmap(found: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(found))
    for index, hit in enumerate(found):
        if hit:
            bitmap.set(index)
    return bitmap
