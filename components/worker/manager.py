"""vLLM's tiering manager, with two faults mended and one refinement.

* Stock 0.26 forgets a request when it finishes, and only then builds the stores of its last chunks, which look the
  request up: KeyError, and the engine dies. Here a request is remembered until `release`, which the connector calls
  after those stores were built.
* A promotion is one job for all chunks of a request; stock counts it as failed if one chunk failed. Here a result may
  name the chunks that failed, and the others are kept.

All of it runs on the scheduler's thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from components.worker.compat import JobResult, OffloadKey, ReqContext, SecondaryTierManager, TieringOffloadingManager


@dataclass
class PartialResult(JobResult):
    """A finished promotion of which some chunks did not arrive."""

    failed: frozenset[OffloadKey] = frozenset()


class GuardedTieringManager(TieringOffloadingManager):
    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self._held: set[str] = set()

    def on_request_finished(self, req_context: ReqContext, *, exclude_tier: SecondaryTierManager | None = None) -> None:
        if exclude_tier is None:  # otherwise it is a tier's own request, which the engine never reports as finished
            self._held.add(req_context.req_id)
        super().on_request_finished(req_context, exclude_tier=exclude_tier)

    def release(self, req_ids: Iterable[str]) -> None:
        """No more stores will be built for these finished requests: forget each once its last store is done."""
        for req_id in self._held.intersection(req_ids):
            self._held.remove(req_id)
            if req_id in self._req_state:
                self._maybe_finalize_request(req_id)

    def reset_cache(self) -> None:
        super().reset_cache()
        self._held.intersection_update(self._req_state)

    def _maybe_finalize_request(self, req_id: str, exclude_tier: SecondaryTierManager | None = None) -> None:
        if req_id not in self._held:
            super()._maybe_finalize_request(req_id, exclude_tier)

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
