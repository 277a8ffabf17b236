"""Loads from DRAM to HBM: at the head of the step that computes the rest of the prompt, where that pays, and who waits
for another request's.

Stock offloading gives a load steps of its own: the request waits for the worker to report it, which with asynchronous
scheduling takes until two more steps have run, and is computed in the one after. But a step is scheduled while the one
before it still runs: a copy that begins at once is over before its own step begins, or nearly so. The GPU then waits
for the copy, not the scheduler for a report, and the first token comes three steps sooner. What is left of the copy
holds up all who decode, so that only so much is copied in a step as takes IN_STEP_SECONDS, and nothing while a load
between steps is under way: vLLM's copies to HBM come one after the other.

On the scheduler's thread. vLLM asks each connector whether a load is asynchronous; its offloading, however, was written
for loads that are, and what it takes for granted is kept true here:

* it takes blocks that have a hash for present, and blocks of a request that is computed have theirs at once;
* it forbids a request with a load under way to be preempted, or to store.

Stock offloading also holds every request that shares a chunk with a load under way until the whole load is over. Blocks
of a load in its step are found in HBM from then on, so that nobody waits for it, and what is loaded once is copied
once. A load between steps is waited for only by a request whose own copy would take as long as what is left of it.
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

# Of a step that decodes for a 70B model a half to a third, and most of it runs beside the step before. At 50 GB/s it is
# 1 GB: 6,000 tokens of such a model in FP8.
IN_STEP_SECONDS = 0.02


@dataclass
class InStepMetadata(OffloadingConnectorMetadata):
    in_step: frozenset[int] = frozenset()  # those of load_jobs that the step's computation comes after
    computed: bool = False  # whether store_jobs are of steps before this one


@dataclass
class Loads:
    """Which loads are made in their step. `row_bytes` is what a chunk has on all ranks together."""

    scheduler: OffloadingConnectorScheduler
    row_bytes: int
    _admitted: dict[str, float] = field(default_factory=dict)  # in this step: request -> seconds
    _jobs: dict[int, str] = field(default_factory=dict)  # not reported as done yet -> request
    _new: set[int] = field(default_factory=set)  # of this step
    _between: dict[int, float] = field(default_factory=dict)  # loads between steps: when each should be over

    @property
    def possible(self) -> bool:
        """Whether this model's loads can be in a step: of one kind of block, none of which is left out or shifted."""
        groups = self.scheduler.config.kv_group_configs
        return len(groups) == 1 and not groups[0].is_eagle_group and groups[0].sliding_window_size_in_chunks is None

    def worth_loading(self, request: Request, computed_tokens: int, load_tokens: int) -> int:
        """How many of so many tokens after those that are there to load. Of a prompt of which nothing would be left to
        compute, the last chunk is computed, as it is after a hit in HBM: after a load between steps the engine takes
        one token back and computes it two steps later."""
        if not self.possible or computed_tokens + load_tokens < request.num_tokens:
            return load_tokens
        return load_tokens - self.scheduler.config.kv_group_configs[0].tokens_per_chunk

    def admit(self, request: Request, load_tokens: int, bytes_per_second: float) -> bool:
        """Whether the load of so many tokens should be made in the step that is being scheduled, which computes the
        rest. `bytes_per_second` from DRAM to one rank's HBM; 0: not known yet."""
        self._admitted.pop(request.request_id, None)  # there was no room in HBM when it was admitted before
        seconds = self.seconds(load_tokens, bytes_per_second)
        if not seconds:
            return False
        if sum(self._admitted.values()) + seconds > IN_STEP_SECONDS or self._between_steps():
            return False
        self._admitted[request.request_id] = seconds
        return True

    def seconds(self, tokens: int, bytes_per_second: float) -> float:
        """What their copy to HBM takes; 0 where that is not known, or not in a step."""
        return self._copy_seconds(tokens, bytes_per_second) if self.possible else 0.0

    def _copy_seconds(self, tokens: int, bytes_per_second: float) -> float:
        chunks = tokens / self.scheduler.config.kv_group_configs[0].tokens_per_chunk
        return chunks * self.row_bytes / self.scheduler.config.num_workers / (bytes_per_second or float("inf"))

    @contextmanager
    def waited_for(self, tokens: int, bytes_per_second: float) -> Iterator[None]:
        """While stock offloading looks up a request of so many tokens that are not in HBM: let it wait for those loads
        only that will be over before the request's own would be."""
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
        """Whether a load of any request is under way, or about to be, that no step waits for."""
        return any(not job.is_store and job_id not in self._jobs for job_id, job in self.scheduler._jobs.items())

    def allocated(
        self,
        request: Request,
        blocks: KVCacheBlocks,
        load_tokens: int,
        bytes_per_second: float,
        stock: Callable[[Request, KVCacheBlocks, int], None],
    ) -> None:
        """The request has its blocks: let stock offloading make the job, of blocks that are not there yet."""
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
        """The step is scheduled: what stock offloading tells the workers, and which loads come first in it."""
        for job_id in [job_id for job_id in self._jobs if job_id not in self.scheduler._jobs]:
            del self._jobs[job_id]
        hidden = []
        for job_id, req_id in self._jobs.items():
            status = self.scheduler._req_status[req_id]
            if not status.req.is_finished():  # which is kept until its load is reported
                status.transfer_jobs.remove(job_id)
                hidden.append((status, job_id))
        meta = stock(output)
        for status, job_id in hidden:
            status.transfer_jobs.add(job_id)
        new, self._new = frozenset(self._new), set()
        self._admitted.clear()
        return InStepMetadata(meta.load_jobs, meta.store_jobs, meta.jobs_to_flush, new, self.possible)

    def in_step(self, req_id: str) -> bool:
        """Whether the request has a load in a step that is not reported as done yet: until then it stores nothing."""
        return req_id in self._jobs.values()
