"""Loads from DRAM to HBM inside the step that computes the rest of the prompt, and which requests wait for another's
load.

Stock offloading loads between steps. The request waits for the worker's report, which with asynchronous scheduling
takes two more steps, and is computed in the step after. But a step is scheduled while the step before it still runs. A
copy that begins at once is over, or nearly over, when its own step begins. So the GPU waits for the copy, not the
scheduler for a report, and the first token comes three steps earlier. The rest of the copy delays all decoding
requests. Therefore a step's copies are limited to IN_STEP_SECONDS. While a load between steps is in flight, a step has
none, since vLLM runs copies to HBM one after the other.

Runs on the scheduler's thread. vLLM asks each connector whether a load is asynchronous, but its offloading was written
for asynchronous loads only. Two of its assumptions have to be kept:

* blocks with a hash are present; but blocks of a computed request get their hash at once;
* a request with a load in flight is not preempted and does not store.

Stock offloading also holds every request that shares a chunk with a load in flight until the whole load is over. Here,
the blocks of a load inside a step are HBM hits from then on: no request waits, and each chunk is copied once. A request
waits for a load between steps only if its own copy would take longer than the rest of that load.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from components.worker.compat import (
    KVCacheBlock,
    KVCacheBlocks,
    OffloadingConnectorMetadata,
    OffloadingConnectorScheduler,
    Request,
    SchedulerOutput,
)

# A third to a half of a 70B model's decode step, and most of it overlaps the step before. At 50 GB/s it is 1 GB: 6,000
# tokens of such a model in FP8.
IN_STEP_SECONDS = 0.02


@dataclass
class InStepMetadata(OffloadingConnectorMetadata):
    in_step: frozenset[int] = frozenset()  # the load_jobs that the step's computation waits for
    computed: bool = False  # whether store_jobs are of steps before this one


@dataclass
class Loads:
    """Decides which loads run inside their step. `row_bytes` is the size of a chunk on all ranks together."""

    scheduler: OffloadingConnectorScheduler
    row_bytes: int
    _admitted: dict[str, float] = field(default_factory=dict)  # in this step: request -> seconds
    _jobs: dict[int, str] = field(default_factory=dict)  # not reported as done yet -> request
    _new: set[int] = field(default_factory=set)  # of this step
    _between: dict[int, float] = field(default_factory=dict)  # loads between steps: when each should be over

    @property
    def possible(self) -> bool:
        """Whether this model's loads can run inside a step: it has one KV group, without sliding window or EAGLE."""
        groups = self.scheduler.config.kv_group_configs
        return len(groups) == 1 and not groups[0].is_eagle_group and groups[0].sliding_window_size_in_chunks is None

    def worth_loading(self, request: Request, computed_tokens: int, load_tokens: int) -> int:
        """How many of the `load_tokens` after the computed ones to load. If nothing would be left to compute, the last
        chunk is recomputed, as after a hit in HBM. A load of all would run between steps, and the engine would
        recompute one token two steps later."""
        if not self.possible or computed_tokens + load_tokens < request.num_tokens:
            return load_tokens
        return load_tokens - self.scheduler.config.kv_group_configs[0].tokens_per_chunk

    def admit(self, request: Request, load_tokens: int, bytes_per_second: float) -> bool:
        """Whether to load these tokens inside the step that is being scheduled and computes the rest.
        `bytes_per_second` is the speed from DRAM to one rank's HBM; 0: not known yet."""
        self._admitted.pop(request.request_id, None)  # an earlier admission found no room in HBM
        seconds = self.seconds(load_tokens, bytes_per_second)
        if not seconds:
            return False
        if sum(self._admitted.values()) + seconds > IN_STEP_SECONDS or self._between_steps():
            return False
        self._admitted[request.request_id] = seconds
        return True

    def seconds(self, tokens: int, bytes_per_second: float) -> float:
        """The duration of their copy to HBM inside a step; 0 if it is unknown, or if such loads are not possible."""
        return self._copy_seconds(tokens, bytes_per_second) if self.possible else 0.0

    def _copy_seconds(self, tokens: int, bytes_per_second: float) -> float:
        chunks = tokens / self.scheduler.config.kv_group_configs[0].tokens_per_chunk
        return chunks * self.row_bytes / self.scheduler.config.num_workers / (bytes_per_second or float("inf"))

    @contextmanager
    def waited_for(self, tokens: int, bytes_per_second: float) -> Iterator[None]:
        """A context for stock offloading's lookup of a request with `tokens` tokens that are not in HBM. In it, the
        request waits only for loads that will end before its own load would."""
        loading, jobs = self.scheduler._chunks_being_loaded, self.scheduler._jobs
        self._between = {job_id: ends for job_id, ends in self._between.items() if job_id in jobs}
        until = time.monotonic() + self._copy_seconds(tokens, bytes_per_second)
        longer = [jobs[job_id].keys for job_id, ends in self._between.items() if ends > until]
        if longer and loading is not None:  # None: the engine's prefix caching is off
            soon = [jobs[job_id].keys for job_id, ends in self._between.items() if ends <= until]
            self.scheduler._chunks_being_loaded = loading.difference(*longer).union(*soon)
        try:
            yield
        finally:
            self.scheduler._chunks_being_loaded = loading

    def _between_steps(self) -> bool:
        """Whether any request has a load between steps in flight or pending."""
        return any(not job.is_store and job_id not in self._jobs for job_id, job in self.scheduler._jobs.items())

    def allocated(
        self,
        request: Request,
        blocks: KVCacheBlocks,
        load_tokens: int,
        bytes_per_second: float,
        stock: Callable[[Request, KVCacheBlocks, int], None],
    ) -> None:
        """The request has its blocks: let stock offloading create the job for those that are not in HBM."""
        req_id = request.request_id
        status = self.scheduler._req_status.get(req_id)
        if not load_tokens or req_id not in self._admitted:
            stock(request, blocks, load_tokens)
            if load_tokens:
                (job_id,) = status.transfer_jobs
                self._between[job_id] = time.monotonic() + self._copy_seconds(load_tokens, bytes_per_second)
            return
        there = status.num_locally_computed_tokens // self.scheduler.config.kv_group_configs[0].tokens_per_block
        (of_group,) = blocks.blocks
        absent = [KVCacheBlock(block.block_id, is_null=block.is_null) for block in of_group[there:]]
        stock(request, KVCacheBlocks(([*of_group[:there], *absent],)), load_tokens)
        (job_id,) = status.transfer_jobs
        self._jobs[job_id] = req_id
        self._new.add(job_id)
        if self.scheduler._chunks_being_loaded is not None:
            self.scheduler._chunks_being_loaded -= self.scheduler._jobs[job_id].keys

    def scheduled(
        self, output: SchedulerOutput, stock: Callable[[SchedulerOutput], OffloadingConnectorMetadata]
    ) -> InStepMetadata:
        """The step is scheduled: stock offloading's metadata for the workers, with the loads inside the step."""
        for job_id in [job_id for job_id in self._jobs if job_id not in self.scheduler._jobs]:
            del self._jobs[job_id]
        hidden = []
        for job_id, req_id in self._jobs.items():
            status = self.scheduler._req_status[req_id]
            if not status.req.is_finished():  # a finished request is kept until its load is reported
                status.transfer_jobs.remove(job_id)
                hidden.append((status, job_id))
        meta = stock(output)
        for status, job_id in hidden:
            status.transfer_jobs.add(job_id)
        new, self._new = frozenset(self._new), set()
        self._admitted.clear()
        return InStepMetadata(meta.load_jobs, meta.store_jobs, meta.jobs_to_flush, new, self.possible)

    def in_step(self, req_id: str) -> bool:
        """Whether the request has an unreported load inside a step. Until the report, it stores nothing."""
        return req_id in self._jobs.values()
