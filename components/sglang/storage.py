"""SGLang's HiCache storage backend over the store: moves pages between its host pool and targets, without a copy.

Runs in the scheduler's process of each rank. SGLang calls from threads of its own, for lookups, prefetches and backups.
Every call has a deadline, and a failing store is a miss. Only bad input at start raises.

SGLang names a page by a hash of its tokens, of the tokens before it, and of the request's cache salt and extra key. The
layout digest covers everything else that determines its bytes: the model (identity.py), the host pool, the rank. A page
is stored as one value per contiguous run of memory in the pool. A `layer_first` page has one run per layer, so it is
copied into a single value instead. A page is found if all its values are.
"""

import ctypes
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sglang
import torch
from prometheus_client import Counter as Series
from pydantic import Field
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.utils import storage_namespace_seed
from sglang.srt.observability.metrics_collector import StorageMetrics

from components.plugin import PluginOptions
from components.sglang import identity
from kvstore.errors import ConfigError
from kvstore.keys import chunk_key, fingerprint, layout_digest
from kvstore.net.client import Item
from kvstore.net.wire import VALUE_BYTES_MAX, Outcome
from kvstore.rarely import Rarely
from kvstore.seal import TRAILER_BYTES

logger = logging.getLogger(__name__)

# SGLang's settings in the same JSON.
_SGLANG_SETTINGS = ("backend_name", "module_path", "class_name", "interface_v1")
# One put carries several pages, to save round trips. If a target is too slow for a put, all of its pages are lost.
PUT_BYTES = 32 << 20
# A backup pins pages of the host pool. When SGLang detaches a backend, it waits 10 s for its thread.
PUT_SECONDS = 5.0
DEADLINE_MS_MAX = 9000
COMPLAIN_SECONDS = 10.0
# Limit of batches that SGLang's metrics have not read yet.
BATCHES_MAX = 1024

_PAGES = Series(
    "kvtier_sglang_pages", "HiCache pages, by operation (exists, get, put) and outcome", ["operation", "outcome"]
)
_BYTES = Series("kvtier_sglang_bytes", "Bytes of pages read by get or stored by put", ["operation"])


class Options(PluginOptions):
    """kvtier's settings in `--hicache-storage-backend-extra-config`, checked."""

    # SGLang waits up to this long for a lookup, and again for each batch of 128 pages.
    deadline_ms: int = Field(2000, ge=1, le=DEADLINE_MS_MAX)


class _Batch(NamedTuple):
    operation: str
    pages: int
    gigabytes_per_second: float


class KvtierStorage(HiCacheStorage):
    """See HiCacheStorage for the contract of each method. A page that is found is complete and its checksum is valid.
    After a miss the content of its memory is undefined, and SGLang frees it."""

    def __init__(self, config: HiCacheStorageConfig, _: Mapping[str, object] | None = None):
        """Collective, as in `identity.loaded_model`. Raises ConfigError."""
        extra = config.extra_config or {}
        options = read_options(extra)
        if config.tp_lcm_size:
            expected = "none: pages depend on the tensor parallelism"
            raise ConfigError.conflicting("tp_lcm_size", config.tp_lcm_size, "this backend", expected)
        secrets = options.open_secrets()
        identity.watch()
        self._model = identity.loaded_model()
        self._config = config
        self._interface_v1 = bool(extra.get("interface_v1"))
        self._deadline_seconds = options.deadline_ms / 1000
        self._trailer_bytes = TRAILER_BYTES if secrets.seal is not None else 0
        self._complains = {operation: Rarely(COMPLAIN_SECONDS) for operation in ("exists", "get", "put")}
        self._batches: deque[_Batch] = deque(maxlen=BATCHES_MAX)
        self._sizes: list[int] = []
        self._digest = b""
        self._client = options.open_client("sglang", secrets)

    # ---- at start, on the scheduler's thread

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Raises ConfigError for a pool whose pages cannot be stored."""
        super().register_mem_pool_host(mem_pool_host)
        pool, page_bytes = mem_pool_host, mem_pool_host.size_per_token * mem_pool_host.page_size
        expected = "layer_first, page_first or page_first_direct, with interface_v1 set"
        try:
            self._sizes = self._value_sizes()
        except (ValueError, NotImplementedError) as error:  # from SGLang's pools, for layouts without page access
            raise ConfigError("hicache-mem-layout", pool.layout, f"{expected} (SGLang: {error})") from error
        if sum(self._sizes) != page_bytes:
            raise ConfigError("hicache-mem-layout", pool.layout, expected)
        if max(self._sizes) + self._trailer_bytes > VALUE_BYTES_MAX:
            expected = f"a size whose values have at most {VALUE_BYTES_MAX} bytes, not {max(self._sizes)}"
            raise ConfigError("page-size", pool.page_size, expected)
        self._digest = layout_digest(self._describe())
        logger.info(
            "kvtier: pages of %d bytes in %d values; layout %s", page_bytes, len(self._sizes), self._digest.hex()[:16]
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Raises ConfigError for any pool other than KV."""
        if host_pool_name != PoolName.KV:
            raise ConfigError(
                "host pool", host_pool_name, "only kv: no hybrid, sliding-window or sparse model with this backend"
            )

    def _value_sizes(self) -> list[int]:
        """The lengths of a page's values, in order. Raises the pool's errors if it cannot provide such pages."""
        pool = self.mem_pool_host
        if not self._interface_v1 or pool.layout == "layer_first":
            copied_bytes = pool.get_dummy_flat_data_page().nbytes
        if pool.layout == "layer_first":
            return [copied_bytes]
        return [int(size) for size in pool.get_page_buffer_meta(torch.arange(pool.page_size))[1]]

    def _describe(self) -> dict[str, object]:
        """Everything that determines a page's bytes, except what its hash covers."""
        pool, config = self.mem_pool_host, self._config
        return {
            "engine": f"sglang {sglang.__version__}",
            "hash": storage_namespace_seed("extra key", "cache salt"),
            "model": self._model,
            "pool": [type(pool).__name__, pool.layout, pool.storage_format_tag, self._interface_v1],
            "page": [str(pool.dtype), pool.page_size, pool.layer_num, pool.start_layer, pool.end_layer, self._sizes],
            # MLA's pages are identical on all ranks.
            "tensor": "any" if config.is_mla_model else [config.tp_rank, config.tp_size],
            "pipeline": [config.pp_rank, config.pp_size],
            "context": [config.attn_cp_rank, config.attn_cp_size],
        }

    # ---- SGLang's threads

    def batch_exists(self, keys: Sequence[str], extra_info: object = None) -> int:
        """The number of leading pages that are in the store. They are not pinned: a get may find fewer."""
        if identity.changed():
            return 0
        outcomes = self._client.exists(self._names(keys), time.monotonic() + self._deadline_seconds)
        pages = self._count("exists", outcomes)
        return pages.index(False) if False in pages else len(pages)

    def batch_get_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object = None) -> list[bool]:
        pool = self.mem_pool_host
        if pool.layout != "layer_first":
            return self._get(keys, self._values(host_indices))
        pages = [pool.get_dummy_flat_data_page() for _ in keys]
        found = self._get(keys, self._cut(pages))
        for first, page, hit in zip(host_indices[:: pool.page_size].tolist(), pages, found, strict=True):
            if hit:
                pool.set_from_flat_data_page(first, page)
        return found

    def batch_set_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object = None) -> list[bool]:
        pool = self.mem_pool_host
        if pool.layout != "layer_first":
            return self._put(keys, self._values(host_indices))
        return self._put(keys, self._cut([pool.get_data_page(one) for one in host_indices[:: pool.page_size].tolist()]))

    def batch_get(
        self, keys: Sequence[str], target_locations: Sequence[torch.Tensor], target_sizes: object = None
    ) -> list[torch.Tensor | None]:
        """Without `interface_v1`, SGLang copies pages from and to these tensors."""
        found = self._get(keys, self._cut(target_locations))
        return [page if hit else None for page, hit in zip(target_locations, found, strict=True)]

    def batch_set(
        self,
        keys: Sequence[str],
        values: Sequence[torch.Tensor],
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        return all(self._put(keys, self._cut(values)))

    def get(self, key: str, target_location: torch.Tensor, target_sizes: object = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def set(self, key: str, value: torch.Tensor, target_location: object = None, target_sizes: object = None) -> bool:
        return self.batch_set([key], [value])

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def clear(self) -> None:
        """Does nothing: other engines share the store, and targets evict by themselves."""
        logger.warning("kvtier: clear ignored: other engines share the store, and stale pages cannot be hit")

    def get_stats(self) -> StorageMetrics:
        """Figures for SGLang's own metrics of a storage backend, since the last call."""
        metrics = StorageMetrics()
        while self._batches:
            operation, pages, speed = self._batches.popleft()
            (metrics.prefetch_pgs if operation == "get" else metrics.backup_pgs).append(pages)
            (metrics.prefetch_bandwidth if operation == "get" else metrics.backup_bandwidth).append(speed)
        return metrics

    def close(self) -> None:
        """Running calls end as misses."""
        self._client.close()

    # ---- values of pages

    def _get(self, keys: Sequence[str], values: Sequence[memoryview]) -> list[bool]:
        if identity.changed():
            return [False] * len(keys)
        begun = time.monotonic()
        outcomes = self._client.get(self._names(keys), values, begun + self._deadline_seconds)
        found = self._count("get", outcomes)
        self._note("get", sum(found), sum(found) * sum(self._sizes), time.monotonic() - begun)
        return [False] * len(keys) if identity.changed() else found

    def _put(self, keys: Sequence[str], values: Sequence[memoryview]) -> list[bool]:
        """Put the pages that are not in the store yet."""
        if identity.changed():
            return [False] * len(keys)
        begun = time.monotonic()
        deadline = begun + PUT_SECONDS
        names, short = self._names(keys), fingerprint(self._digest)
        outcomes = self._client.exists(names, deadline)
        missing = [index for index, outcome in enumerate(outcomes) if outcome is Outcome.MISS]
        per_put = max(1, PUT_BYTES // max(self._sizes))
        for first in range(0, len(missing), per_put):
            part = missing[first : first + per_put]
            items = [Item(names[index], values[index], 0, short, 1) for index in part]
            for index, outcome in zip(part, self._client.put(items, deadline), strict=True):
                outcomes[index] = outcome
        stored_bytes = sum(len(values[index]) for index in missing if outcomes[index] is Outcome.STORED)
        pages = self._count("put", outcomes)
        self._note("put", sum(pages), stored_bytes, time.monotonic() - begun)
        return pages

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        return [chunk_key(self._digest, key.encode(), number) for key in keys for number in range(len(self._sizes))]

    def _values(self, host_indices: torch.Tensor) -> list[memoryview]:
        """Views of the values of these pages in the host pool."""
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        return [
            memoryview((ctypes.c_char * size).from_address(pointer)).cast("B")
            for pointer, size in zip(pointers, sizes, strict=True)
        ]

    def _cut(self, pages: Sequence[torch.Tensor]) -> list[memoryview]:
        """Views of the values of pages that are tensors."""
        values = []
        for page in pages:
            content = page.view(-1).view(torch.uint8).numpy().data
            if len(content) != sum(self._sizes):
                raise ValueError(f"a page of {len(content)} bytes, expected {sum(self._sizes)}")
            for size in self._sizes:
                values.append(content[:size])
                content = content[size:]
        return values

    # ---- metrics and logs

    def _count(self, operation: str, outcomes: Sequence[Outcome]) -> list[bool]:
        """Count outcomes by page; for each page, whether all its values are there."""
        counts: Counter[Outcome] = Counter()
        pages = []
        for first in range(0, len(outcomes), len(self._sizes)):
            of_page = outcomes[first : first + len(self._sizes)]
            wrong = [outcome for outcome in of_page if outcome not in (Outcome.HIT, Outcome.STORED)]
            pages.append(not wrong)
            counts[(wrong or of_page)[0]] += 1
        for outcome, count in counts.items():
            _PAGES.labels(operation, outcome.name.lower()).inc(count)
        failed = {outcome.name.lower(): count for outcome, count in counts.items() if outcome not in _EXPECTED}
        if failed and self._complains[operation]():
            logger.warning("kvtier: %s of %d pages: %s", operation, len(pages), failed)
        return pages

    def _note(self, operation: str, pages: int, moved_bytes: int, seconds: float) -> None:
        _BYTES.labels(operation).inc(moved_bytes)
        if self._config.enable_storage_metrics and pages:
            self._batches.append(_Batch(operation, pages, moved_bytes / 1e9 / max(seconds, 1e-9)))


_EXPECTED = (Outcome.HIT, Outcome.MISS, Outcome.STORED)


def read_options(extra: Mapping[str, object]) -> Options:
    """The settings of the extra config that are kvtier's. Raises ConfigError."""
    return Options.read({name: value for name, value in extra.items() if name not in _SGLANG_SETTINGS})
