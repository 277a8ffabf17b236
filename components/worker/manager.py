"""vLLM's tiering manager, with two faults mended and four refinements.

* Stock 0.26 forgets a request when it finishes, and only then builds the stores of its last chunks, which look the
  request up: KeyError, and the engine dies. Here a request is remembered until `release`, which the connector calls
  after those stores were built.
* A promotion is one job for all chunks of a request; stock counts it as failed if one chunk failed. Here a result may
  name the chunks that failed, and the others are kept. And a promotion of many chunks is several jobs, so that one
  request's hundreds of chunks do not stand before another's first ones.
* A chunk that came from a lower tier may be evicted before the request that wanted it is scheduled. Here its row is
  held for the request until that is scheduled, gone, or late, within a share of all rows.
* What a tier had no room to store is offered again while it is in DRAM: a hole in the middle of a prompt makes what
  follows it useless.
* A request waits for a chunk that is on its way however long that takes. Here it passes over it past its deadline.

All of it runs on the scheduler's thread.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from components.worker.compat import (
    JobMetadata,
    JobResult,
    LookupResult,
    OffloadKey,
    ReqContext,
    SecondaryTierManager,
    TieringOffloadingManager,
    check_manager,
    split_promotions,
)

# A request that has not been scheduled so long after its chunks came may find them evicted.
HOLD_SECONDS = 30.0
# Of all rows. With those being filled and those that wait to be put (remote_tier.py, a quarter each) a tenth is
# left in any case for what the engine computes.
HOLD_SHARE = 0.4


@dataclass
class PartialResult(JobResult):
    """A finished promotion of which some chunks did not arrive."""

    failed: frozenset[OffloadKey] = frozenset()


@dataclass
class _Holding:
    """Rows that are held for a request that is not scheduled yet."""

    context: ReqContext
    until: float
    keys: list[OffloadKey] = field(default_factory=list)


class GuardedTieringManager(TieringOffloadingManager):
    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        check_manager(self)
        self._held: set[str] = set()
        self._waiting: set[str] = set()  # not scheduled yet
        self._holdings: dict[str, _Holding] = {}
        self._held_rows = 0
        self._held_rows_max = int(HOLD_SHARE * self.primary_tier._num_blocks)

    # ---- requests

    def expect(self, req_id: str) -> None:
        """The request is going to be scheduled: hold what is promoted for it."""
        self._waiting.add(req_id)

    def let_go(self, req_id: str) -> None:
        """The request is scheduled, and its loads hold their rows themselves; or it is gone."""
        self._waiting.discard(req_id)
        self._drop(req_id)

    def lookup(
        self, key: OffloadKey, req_context: ReqContext, *, exclude_tier: SecondaryTierManager | None = None
    ) -> LookupResult:
        found = super().lookup(key, req_context, exclude_tier=exclude_tier)
        if found is LookupResult.HIT_PENDING and any(self._gave_up(tier, req_context) for tier in self.secondary_tiers):
            return LookupResult.MISS
        return found

    @staticmethod
    def _gave_up(tier: SecondaryTierManager, req_context: ReqContext) -> bool:
        gave_up = getattr(tier, "gave_up", None)
        return gave_up is not None and gave_up(req_context.req_id)

    def on_request_finished(self, req_context: ReqContext, *, exclude_tier: SecondaryTierManager | None = None) -> None:
        self.let_go(req_context.req_id)
        if exclude_tier is None:  # otherwise it is a tier's own request, which the engine never reports as finished
            self._held.add(req_context.req_id)
        super().on_request_finished(req_context, exclude_tier=exclude_tier)

    def release(self, req_ids: Iterable[str]) -> None:
        """No more stores will be built for these finished requests: forget each once its last store is done."""
        for req_id in self._held.intersection(req_ids):
            self._held.remove(req_id)
            if req_id in self._req_state:
                self._maybe_finalize_request(req_id)

    def is_arriving(self, key: OffloadKey) -> bool:
        """Whether DRAM has a row for the chunk that is not filled yet."""
        block = self.primary_tier._policy.get(key)
        return block is not None and not block.is_ready

    def reset_cache(self) -> None:
        for req_id in list(self._holdings):
            self._drop(req_id)
        waiting, self._waiting = self._waiting, set()  # what comes in meanwhile is not worth holding
        super().reset_cache()
        self._waiting = waiting
        self._held.intersection_update(self._req_state)

    def _maybe_finalize_request(self, req_id: str, exclude_tier: SecondaryTierManager | None = None) -> None:
        if req_id not in self._held:
            super()._maybe_finalize_request(req_id, exclude_tier)

    # ---- jobs

    def take_in(self) -> None:
        """What has come since the last lookup of this step; stock looks once a step."""
        self._process_finished_jobs()

    def _process_finished_jobs(self) -> None:
        for tier in self.secondary_tiers:
            for result in tier.get_finished_jobs():
                job = self._transfer_jobs.pop(result.job_id)
                if not job.is_promotion:
                    self.primary_tier.complete_read(job.keys, job.req_context)
                    continue
                failed = result.failed if isinstance(result, PartialResult) else frozenset()
                if failed:
                    self.primary_tier.complete_write(failed, job.req_context, False)
                arrived = [key for key in job.keys if key not in failed]
                self.primary_tier.complete_write(arrived, job.req_context, result.success)
                if result.success:
                    self._hold(arrived, job.req_context)
            if (store_leftovers := getattr(tier, "store_leftovers", None)) is not None:
                store_leftovers(self._pin)
        now = time.monotonic()
        for req_id in [req_id for req_id, holding in self._holdings.items() if now > holding.until]:
            self._drop(req_id)

    def _pin(self, keys: list[OffloadKey], context: ReqContext) -> JobMetadata | None:
        """A job to store those of `keys` that are in DRAM, or None if none is."""
        present = [key for key in keys if self.primary_tier.lookup(key, context) is LookupResult.HIT]
        return self.create_store_job(present, context) if present else None

    def _flush_pending_promotions(self) -> None:
        for tier in self._pending_load_submissions:
            chunks_max = getattr(tier, "job_chunks", None)
            if chunks_max is not None:
                split_promotions(self._pending_load_submissions[tier], chunks_max)
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
