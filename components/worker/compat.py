"""Every name that this package takes from vLLM, in one place: later releases rename some of them.

Runs on vLLM 0.26. Every name is there under 0.33, too; its tiering manager, however, keeps its jobs otherwise, which
`check_manager` says when an engine starts, and not in the middle of a request.
"""

from collections.abc import Collection
from dataclasses import dataclass

import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_events import BlockStored, KVCacheEvent
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
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import OffloadingEventsTracker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.forward_context import ForwardContext
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingKVEventsConfig,
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
    make_offload_key,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobId, JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    PendingPromotion,
    TieringOffloadingManager,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

try:
    from vllm.v1.kv_offload.tiering.base import JobMetadata
except ImportError:  # renamed between 0.26 and 0.33
    from vllm.v1.kv_offload.tiering.base import TransferJob as JobMetadata

VLLM_VERSION: str = vllm.__version__

_MANAGER_STATE = ("_transfer_jobs", "_pending_load_submissions", "_req_state")


def job_rows(job: JobMetadata) -> list[int]:
    """The DRAM rows of a job between tiers."""
    rows = job.block_ids if hasattr(job, "block_ids") else job.chunk_ids  # renamed between 0.26 and 0.33
    return [int(row) for row in rows]


def check_manager(manager: TieringOffloadingManager) -> None:
    """Raises RuntimeError if the tiering manager of this vLLM is not one that manager.py knows how to mend."""
    missing = [name for name in _MANAGER_STATE if not hasattr(manager, name)]
    if missing:
        raise RuntimeError(
            f"kvtier: vLLM {VLLM_VERSION} given, expected 0.26: its tiering manager has no {', '.join(missing)}"
        )


def split_promotions(pending: dict[str, PendingPromotion], chunks_max: int) -> None:
    """Cut the promotions that wait to be submitted, one a request, into several of at most so many chunks, in order.
    The stock manager submits them one by one, and goes by their content and not by their name."""
    whole = dict(pending)
    pending.clear()
    for req_id, one in whole.items():
        for start in range(0, len(one.keys), chunks_max):
            part = slice(start, start + chunks_max)
            pending[f"{req_id}/{start}"] = PendingPromotion(one.req_context, one.keys[part], one.block_ids[part])


@dataclass
class LaunchedMetadata(OffloadingWorkerMetadata):
    """What a rank tells the scheduler of a step, and when it had launched it, in seconds of its time.monotonic(). Of
    several ranks the last one counts."""

    launched: float = 0.0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "LaunchedMetadata":
        assert isinstance(other, type(self))
        merged = super().aggregate(other)
        return type(self)(merged.completed_jobs, merged.transfer_stats, max(self.launched, other.launched))


def compute_after_loads(worker: OffloadingWorker, job_ids: Collection[int]) -> None:
    """Whatever the calling thread's stream is given from here on comes after these loads. The GPU waits for them where
    it can be told to; otherwise the caller does."""
    events = getattr(getattr(worker, "_load_handler", None), "_transfer_events", None)
    if events is None:
        worker.wait(set(job_ids))
        return
    for job_id in job_ids:
        current_platform.current_stream().wait_event(events[job_id])


def region_fd(spec: OffloadingSpec) -> int:
    """The file of the shared memory behind the DRAM tier, open in this process, while its secondary tiers are made."""
    return int(spec._scheduler_mmap.fd)


__all__ = [
    "VLLM_VERSION",
    "BlockIDsLoadStoreSpec",
    "BlockPool",
    "BlockStored",
    "CPUPrimaryTierOffloadingManager",
    "CanonicalKVCaches",
    "ForwardContext",
    "GPULoadStoreSpec",
    "GroupOffloadConfig",
    "JobId",
    "JobMetadata",
    "JobResult",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVCacheEvent",
    "KVConnectorFactory",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorWorkerMetadata",
    "LaunchedMetadata",
    "LoadStoreSpec",
    "LookupResult",
    "OffloadKey",
    "OffloadPolicy",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorMetadata",
    "OffloadingConnectorScheduler",
    "OffloadingConnectorStats",
    "OffloadingCounterMetadata",
    "OffloadingEvent",
    "OffloadingEventsTracker",
    "OffloadingKVEventsConfig",
    "OffloadingManager",
    "OffloadingMetricMetadata",
    "OffloadingSpec",
    "OffloadingWorker",
    "OffloadingWorkerMetadata",
    "ReqContext",
    "Request",
    "RequestOffloadState",
    "RequestOffloadingContext",
    "SchedulerOutput",
    "SecondaryTierFactory",
    "SecondaryTierManager",
    "SharedOffloadRegion",
    "TieringOffloadingManager",
    "TieringOffloadingSpec",
    "TransferResult",
    "VllmConfig",
    "check_manager",
    "compute_after_loads",
    "current_platform",
    "generate_block_hash_extra_keys",
    "get_offload_block_hash",
    "get_offload_group_idx",
    "job_rows",
    "make_offload_key",
    "maybe_convert_block_hash",
    "region_fd",
    "split_promotions",
]
