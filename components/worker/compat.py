"""All names that this package imports from vLLM, and the differences between vLLM's releases.

Runs on vLLM 0.31, which Dynamo 1.6 pins, and on 0.32. All names exist in 0.33, too. What 0.33 changes for the callers
of this module:

* The tiering manager has a lock. Calls outside `schedule()` must hold it (`manager_lock`).
* Stock offloading runs small loads inside their step (`sync_load_budget_bytes`, `TransferJob.sync`), so most of
  loads.py can go. But it blocks the rank's thread on them; ours makes the GPU's stream wait.
* `SecondaryTierManager` has `config_info` and `cache_hit_source`, with which an answer's usage distinguishes DRAM from
  the store. `reset_cache` holds promotions until ranks have reported all transfers in flight.
* `CachePolicy.insert` takes the request's context; workers take `submit_load(..., expedited=True)`.
"""

import contextlib
import functools
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import OffloadingEventsTracker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import ForwardContext
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock, generate_block_hash_extra_keys
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    CanonicalPageMapping,
    CopyRun,
    GPULoadStoreSpec,
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    TransferResult,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobId, JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import JobMetadata, PendingPromotion, TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

VLLM_VERSION: str = vllm.__version__

_MANAGER_STATE = ("_jobs", "_pending_load_submissions", "_complete_promotion", "_flush_pending_promotions")


def check_manager(manager: TieringOffloadingManager) -> None:
    """Raises RuntimeError if the tiering manager of this vLLM is not one that manager.py knows how to extend."""
    missing = [name for name in _MANAGER_STATE if not hasattr(manager, name)]
    if missing:
        raise RuntimeError(
            f"kvtier: vLLM {VLLM_VERSION} given, expected 0.31 to 0.33: its tiering manager has no {', '.join(missing)}"
        )


def manager_lock(manager: OffloadingManager) -> AbstractContextManager[object]:
    """The lock to hold while calling the manager outside `schedule()`. Before 0.33 there is none."""
    lock: AbstractContextManager[object] = getattr(manager, "lock", contextlib.nullcontext())
    return lock


def split_promotions(pending: dict[str, PendingPromotion], chunks_max: int) -> None:
    """Split each pending promotion (there is one for each request) into several of at most `chunks_max` chunks, in
    order. The stock manager submits them one by one and does not look at their names."""
    whole = dict(pending)
    pending.clear()
    for req_id, one in whole.items():
        for start in range(0, len(one.keys), chunks_max):
            part = slice(start, start + chunks_max)
            pending[f"{req_id}/{start}"] = PendingPromotion(one.req_context, one.keys[part], one.chunk_ids[part])


@dataclass
class LaunchedMetadata(OffloadingWorkerMetadata):
    """A rank's report on a step, with the time.monotonic() at which the rank had launched it. With several ranks, the
    last one counts."""

    launched: float = 0.0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "LaunchedMetadata":
        assert isinstance(other, type(self))
        merged = super().aggregate(other)
        return type(self)(merged.completed_jobs, merged.transfer_stats, max(self.launched, other.launched))


def compute_after_loads(worker: OffloadingWorker, job_ids: Collection[int]) -> None:
    """Order all later work on the calling thread's stream after these loads. The GPU waits for them if it can;
    otherwise this call blocks."""
    events = getattr(getattr(worker, "_load_handler", None), "_transfer_events", None)
    if events is None:
        worker.wait(set(job_ids))
        return
    for job_id in job_ids:
        current_platform.current_stream().wait_event(events[job_id])


@functools.cache
def _idle_stream() -> Any:
    return current_platform.Stream()


def beside_computing() -> AbstractContextManager[object]:
    """A context for copies that must not wait for earlier work on the calling thread's stream."""
    if current_platform.is_cpu():
        return contextlib.nullcontext()
    stream: AbstractContextManager[object] = current_platform.stream(_idle_stream())
    return stream


def region_fd(spec: OffloadingSpec) -> int:
    """The open file of the DRAM tier's shared memory. Valid while the secondary tiers are constructed."""
    return int(spec._scheduler_mmap.fd)


def beside_each_other(kv_caches: CanonicalKVCaches, ranks: int, rank: int) -> CanonicalKVCaches:
    """The same caches with another order within a chunk: block after block, and in each block rank after rank. Each
    rank's part of a block must be contiguous. (Stock offloading stores rank after rank, so its order depends on the
    number of ranks.)"""

    def placed(ref: CanonicalKVCacheRef) -> CanonicalKVCacheRef:
        page = ref.page_size_bytes
        run = CopyRun(0, rank * page, page, 1, page, page)
        return replace(ref, mapping=CanonicalPageMapping(ranks * page, page, (run,), 1, 0, True))

    return CanonicalKVCaches(kv_caches.tensors, [[placed(ref) for ref in refs] for refs in kv_caches.group_data_refs])
