"""The offloading spec: vLLM's DRAM tier with our manager, for CUDA and for the CPU engine. Stale regions are deleted
first."""

import contextlib
from typing import Any

from components.worker.compat import (
    CanonicalKVCaches,
    OffloadingConfig,
    OffloadingManager,
    OffloadingWorker,
    SecondaryTierFactory,
    SharedOffloadRegion,
    TieringOffloadingSpec,
    beside_each_other,
    current_platform,
)
from components.worker.manager import HoldingTieringManager
from components.worker.memcpy import MemcpyWorker
from components.worker.remote_tier import TIER_TYPE
from components.worker.shm import MARK, hold_region, sweep_stale_regions

# With fewer rows, the chunks of one prompt evict each other before it is scheduled.
_ROWS_MIN = 8

with contextlib.suppress(ValueError):  # registered already: this module was imported before
    SecondaryTierFactory.register_tier(TIER_TYPE, "components.worker.remote_tier", "RemoteTier")


class KvtierSpec(TieringOffloadingSpec):
    """Constructed from `kv_connector_extra_config`, once in the scheduler's process and once in each rank's."""

    _engine_id: str
    _manager: Any
    _worker: Any

    def __init__(self, config: OffloadingConfig):
        super().__init__(config)
        if self.kv_bytes_per_chunk and self.num_chunks < _ROWS_MIN:
            raise ValueError(
                f"kvtier: the DRAM tier ({self.extra_config['cpu_bytes_to_use']} bytes) holds fewer than {_ROWS_MIN} "
                f"chunks of {self.kv_bytes_per_chunk} bytes: give it more"
            )
        self._engine_id = MARK + self._engine_id
        sweep_stale_regions()
        self._lock_fd = hold_region(self._engine_id)

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            stock = super().get_manager()
            self._manager = HoldingTieringManager(stock.primary_tier, stock.secondary_tiers)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            parallel = self.config.parallel
            if self.config.canonical_layout and all(
                ref.mapping is None for refs in kv_caches.group_data_refs for ref in refs
            ):
                # A block is one piece for all layers, and stock offloading does not know its parts.
                kv_caches = beside_each_other(kv_caches, parallel.world_size, parallel.rank)
            if not current_platform.is_cpu():
                return super().get_worker(kv_caches)
            if self.config.canonical_layout:
                self._validate_canonical_refs(kv_caches)
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemcpyWorker(
                kv_caches, self.blocks_per_chunk, region, canonical=self.config.canonical_layout
            )
        return self._worker
