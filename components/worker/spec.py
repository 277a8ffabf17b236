"""The offloading spec: vLLM's DRAM tier with the guarded manager, on CUDA and on the CPU engine, and a clean start."""

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
    current_platform,
)
from components.worker.manager import GuardedTieringManager
from components.worker.memcpy import MemcpyWorker
from components.worker.remote_tier import TIER_TYPE
from components.worker.shm import MARK, check_room, hold_region, sweep_stale_regions

# Fewer, and the chunks of one prompt push each other out before it is scheduled.
_ROWS_MIN = 8

with contextlib.suppress(ValueError):  # registered already: this module was imported before
    SecondaryTierFactory.register_tier(TIER_TYPE, "components.worker.remote_tier", "RemoteTier")


class KvtierSpec(TieringOffloadingSpec):
    """Made once in the scheduler's process and once in each rank's, from `kv_connector_extra_config`."""

    _engine_id: str
    _manager: Any
    _worker: Any

    def __init__(self, config: OffloadingConfig):
        super().__init__(config)
        if self.kv_bytes_per_chunk and self.num_blocks < _ROWS_MIN:
            raise ValueError(
                f"kvtier: the DRAM tier ({self.extra_config['cpu_bytes_to_use']} bytes) holds fewer than {_ROWS_MIN} "
                f"chunks of {self.kv_bytes_per_chunk} bytes: give it more"
            )
        self._engine_id = MARK + self._engine_id
        sweep_stale_regions()
        check_room(self._engine_id, self.num_blocks * self.kv_bytes_per_chunk)
        self._lock_fd = hold_region(self._engine_id)

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            stock = super().get_manager()
            self._manager = GuardedTieringManager(stock.primary_tier, stock.secondary_tiers)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_blocks=self.num_blocks,
                rank=self.config.parallel.rank,
                kv_bytes_per_block=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemcpyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
