"""vLLM's tiering manager, with four refinements.

* A promotion of many chunks is split into several jobs, so that a long prompt does not block another's first chunks.
* A fetched chunk may be evicted before the request that needs it is scheduled. Here its row is pinned until the request
  is scheduled, gone, or late. Pinned rows are limited to a share of all rows.
* Chunks that a tier had no room to store are offered again while they are in DRAM. A gap in a prompt makes all later
  chunks useless.
* Stock requests wait for a chunk in flight without limit. Here they give up at their deadline.

All of it runs on the scheduler's thread.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

from components.worker.compat import (
    JobMetadata,
    JobResult,
    LookupResult,
    OffloadKey,
    ReqContext,
    SecondaryTierManager,
    TieringOffloadingManager,
    TransferJob,
    check_manager,
    split_promotions,
)

# Chunks are pinned for this long after they came. A request that is scheduled later may find them evicted.
HOLD_SECONDS = 30.0
# Share of all rows. Loads and puts (remote_tier.py, puts.py) may occupy a quarter each. So a tenth is always left for
# newly computed chunks.
HOLD_SHARE = 0.4


@dataclass
class _Holding:
    """Rows that are pinned for a request that is not scheduled yet."""

    context: ReqContext
    until: float
    keys: list[OffloadKey] = field(default_factory=list)


class HoldingTieringManager(TieringOffloadingManager):
    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        check_manager(self)
        self._waiting: set[str] = set()  # not scheduled yet
        self._holdings: dict[str, _Holding] = {}
        self._held_rows = 0
        self._held_rows_max = int(HOLD_SHARE * self.primary_tier._num_chunks)

    def dram_chunks(self) -> tuple[int, int]:
        """Chunks in DRAM, those still being written included, and the capacity in chunks."""
        room: int = self.primary_tier._num_chunks
        return room - self.primary_tier._get_num_free_chunks(), room

    # ---- requests

    def expect(self, req_id: str) -> None:
        """The request is going to be scheduled: pin what is promoted for it."""
        self._waiting.add(req_id)

    def let_go(self, req_id: str) -> None:
        """The request is scheduled, and its loads pin their rows themselves; or it is gone."""
        self._waiting.discard(req_id)
        self._drop(req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext, **options: int | None) -> LookupResult:
        found = super().lookup(key, req_context, **options)
        if found is LookupResult.HIT_PENDING and any(self._gave_up(tier, req_context) for tier in self.secondary_tiers):
            return LookupResult.MISS
        return found

    @staticmethod
    def _gave_up(tier: SecondaryTierManager, req_context: ReqContext) -> bool:
        gave_up = getattr(tier, "gave_up", None)
        return gave_up is not None and gave_up(req_context.req_id)

    def on_request_finished(self, req_context: ReqContext, **options: int | None) -> None:
        self.let_go(req_context.req_id)
        super().on_request_finished(req_context, **options)

    def reset_cache(self) -> None:
        for req_id in list(self._holdings):
            self._drop(req_id)
        waiting, self._waiting = self._waiting, set()  # chunks that arrive meanwhile are not pinned
        super().reset_cache()
        self._waiting = waiting

    # ---- jobs

    def take_in(self) -> None:
        """Take in finished jobs again in this step. Stock does it once a step."""
        self._process_finished_jobs()

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """In the order of the prompt, since a prefix is useful without its tail. Stock keeps a job's keys as a set."""
        in_order = sorted(keys, key=lambda key: req_context.get_offload_key_position(key) or 0)
        super().complete_store(in_order, req_context, success)

    def _process_finished_jobs(self, *tiers: object) -> None:
        super()._process_finished_jobs(*tiers)
        for number, tier in enumerate(self.secondary_tiers):
            if (store_leftovers := getattr(tier, "store_leftovers", None)) is not None:
                store_leftovers(partial(self._pin, number))
        now = time.monotonic()
        for req_id in [req_id for req_id, holding in self._holdings.items() if now > holding.until]:
            self._drop(req_id)

    def _complete_promotion(self, job_metadata: JobMetadata, completed_job: JobResult) -> None:
        super()._complete_promotion(job_metadata, completed_job)
        job = job_metadata.transfer_job
        self._hold(list(job.keys if completed_job.success else completed_job.successful_keys or ()), job.req_context)

    def _pin(self, tier: int, keys: list[OffloadKey], context: ReqContext) -> TransferJob | None:
        """A job that stores those of `keys` that are in DRAM; None if there are none."""
        present = [key for key in keys if self.primary_tier.lookup(key, context) is LookupResult.HIT]
        return self.create_store_job(present, context, tier) if present else None

    def _flush_pending_promotions(self) -> None:
        for tier, pending in self._pending_load_submissions.items():
            chunks_max = getattr(self.secondary_tiers[tier], "job_chunks", None)
            if chunks_max is not None:
                split_promotions(pending, chunks_max)
        super()._flush_pending_promotions()

    def _hold(self, keys: list[OffloadKey], context: ReqContext) -> None:
        room = self._held_rows_max - self._held_rows
        if context.req_id not in self._waiting or room <= 0 or not keys:
            return
        keys = keys[:room]
        self.primary_tier.prepare_read(keys, context)
        holding = self._holdings.setdefault(context.req_id, _Holding(context, time.monotonic() + HOLD_SECONDS))
        holding.keys += keys
        self._held_rows += len(keys)

    def _drop(self, req_id: str) -> None:
        holding = self._holdings.pop(req_id, None)
        if holding is not None:
            self.primary_tier.complete_read(holding.keys, holding.context)
            self._held_rows -= len(holding.keys)
