"""The queueing model of engines, their links and the store, for any clock: what policy_sim and sim_worker share.

The numbers are those of Llama-3.1-70B FP8 on one H200: prefill, decode step by batch, KV bytes a token. A worker either
prefills one prompt or decodes a batch; a prefill holds the decodes up but for one token every 2048 prompt tokens, as
chunked prefill does. Fetches run from a prompt's arrival on, in the order of arrival, over the worker's link and that
of all targets together. What tiers hold, and what a clock is, those say who build on this.
"""

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from components.pricing.prefill import Prefill
from components.pricing.throughput import Throughput

PREFILL_TOKENS = 2048  # at once; then what decodes gets a token


@dataclass(frozen=True)
class Hardware:
    """Of each worker, and of the store."""

    # Through the cold times to first token of 2200 and 8000 tokens (290 and 1135 ms), less what does not keep the GPU.
    overhead_seconds: float = 0.03
    prefill_base_seconds: float = 0.012
    prefill_seconds_per_token: float = 9.68e-5
    prefill_seconds_per_token_squared: float = 9.5e-9
    steps: tuple[tuple[int, float], ...] = ((1, 0.022), (16, 0.025), (48, 0.032))  # batch, seconds a decode step
    kv_bytes_per_token: int = 320 << 10
    hbm_tokens: int = 48_000
    dram_tokens: int = 100_000
    dram_bytes_per_second: float = 36e9
    worker_bytes_per_second: float = 5e9
    target_bytes_per_second: float = 5e9
    workers_a_target: int = 2
    store_latency_seconds: float = 0.003

    def prefill_seconds(self, missing: int, context: int) -> float:
        return self.prefill.seconds(missing, context)

    @property
    def prefill(self) -> Prefill:
        return Prefill(
            self.prefill_base_seconds, self.prefill_seconds_per_token, self.prefill_seconds_per_token_squared
        )

    def step_seconds(self, batch: int) -> float:
        """A decode step of so many requests, by straight lines through what was measured."""
        for (low, before), (high, after) in itertools.pairwise(self.steps):
            if batch <= high or high == self.steps[-1][0]:
                return before + (after - before) * (batch - low) / (high - low)
        raise AssertionError

    def slower_gpu(self, factor: float) -> "Hardware":
        """The same with a GPU that takes so many times as long for prefills and decode steps."""
        return replace(
            self,
            prefill_base_seconds=self.prefill_base_seconds * factor,
            prefill_seconds_per_token=self.prefill_seconds_per_token * factor,
            prefill_seconds_per_token_squared=self.prefill_seconds_per_token_squared * factor,
            steps=tuple((batch, seconds * factor) for batch, seconds in self.steps),
        )

    def slowed(self, factor: float) -> "Hardware":
        """The same, every second of it that many seconds."""
        return replace(
            self.slower_gpu(factor),
            overhead_seconds=self.overhead_seconds * factor,
            dram_bytes_per_second=self.dram_bytes_per_second / factor,
            worker_bytes_per_second=self.worker_bytes_per_second / factor,
            target_bytes_per_second=self.target_bytes_per_second / factor,
            store_latency_seconds=self.store_latency_seconds * factor,
        )


@dataclass(eq=False)
class Job:
    """A prompt on a worker, and its answer."""

    prompt_tokens: int
    answer_tokens: int
    arrived: float
    worker: int = 0
    fetch_tokens: int = 0
    loaded_tokens: int = 0
    prefill_tokens: int = 0  # as decided
    first: float = 0.0
    ends_at_step: float = 0.0
    left: bool = False  # by its client

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass
class Worker(Generic[AnyJob]):
    number: int
    hardware: Hardware
    link_free: float = 0.0
    ready: deque[AnyJob] = field(default_factory=deque)
    fetching: int = 0  # that wait for the store
    fetching_tokens: int = 0
    fetching_requests_tokens: int = 0
    requests: int = 0  # without a last token, wherever they are
    requests_tokens: int = 0  # of their prompts, as Dynamo's books have it
    queued_tokens: int = 0  # to compute, not begun
    prefilling: AnyJob | None = None
    prefill_ends: float = 0.0
    prefills: Throughput = field(default_factory=Throughput)  # seconds of prompts a second
    counted: float = 0.0  # until when they are
    steps: float = 0.0
    since: float = 0.0
    version: int = 0
    running: list[tuple[float, int, AnyJob]] = field(default_factory=list)
    running_tokens: int = 0

    @property
    def prefill_tokens(self) -> int:
        """To compute for prompts without a first token, as Dynamo's books have it."""
        return self.queued_tokens + (self.prefilling.prefill_tokens if self.prefilling else 0)

    def prefill_share(self, now: float) -> float:
        """As the worker reports it."""
        seconds = now - self.counted
        self.prefills.add(seconds if self.prefilling else 0.0, seconds)
        self.counted = now
        return self.prefills.bytes_per_second


class Engines(ABC, Generic[AnyJob]):
    """So many workers and their store. For one thread. `each` is the hardware of workers that are unlike, in turns: the
    same HBM and DRAM, another GPU or link; the store is that of `hardware`."""

    def __init__(self, hardware: Hardware, workers: int, each: Sequence[Hardware] = ()):
        self.hardware = hardware
        of_worker = itertools.cycle(each or [hardware])
        self.workers: list[Worker[AnyJob]] = [Worker(number, next(of_worker)) for number in range(workers)]
        self.pool_rate = hardware.target_bytes_per_second * max(1, workers // hardware.workers_a_target)
        self.pool_free = 0.0
        self._count = itertools.count()

    @property
    @abstractmethod
    def now(self) -> float: ...

    @abstractmethod
    def _at(self, when: float, event: Callable[[], None]) -> None:
        """Call `event` at that time."""

    @abstractmethod
    def _room(self, number: int, tokens: int) -> None:
        """So many tokens of the worker's HBM are left for what nobody runs."""

    @abstractmethod
    def _began(self, job: AnyJob) -> None:
        """It has its first token."""

    @abstractmethod
    def _ended(self, job: AnyJob) -> None:
        """It has its last one."""

    def _off(self) -> float:
        """By which factor what a prefill or a fetch takes is off this time."""
        return 1.0

    def fetch_ends(self, worker: Worker[AnyJob], tokens: int) -> float:
        """When so many tokens' KV would be in the worker's DRAM, asked for now."""
        size = tokens * self.hardware.kv_bytes_per_token
        by_link = max(self.now, worker.link_free) + size / worker.hardware.worker_bytes_per_second
        by_pool = max(self.now, self.pool_free) + size / self.pool_rate
        return max(by_link, by_pool) + self.hardware.store_latency_seconds

    def _admit(self, job: AnyJob, hbm_tokens: int) -> None:
        """Put it on its worker, where `loaded_tokens` need no prefill: `hbm_tokens` of them lie in HBM, `fetch_tokens`
        come from the store, the others from DRAM."""
        worker = self.workers[job.worker]
        worker.requests += 1
        worker.requests_tokens += job.prompt_tokens
        job.prefill_tokens = job.prompt_tokens - job.loaded_tokens
        worker.queued_tokens += job.prefill_tokens
        copied = (job.loaded_tokens - hbm_tokens) * self.hardware.kv_bytes_per_token
        ready = self.now + worker.hardware.overhead_seconds
        if job.fetch_tokens:
            off = self._off()
            ready += self.fetch_ends(worker, int(job.fetch_tokens * off)) - self.now
            size = job.fetch_tokens * self.hardware.kv_bytes_per_token * off
            worker.link_free = max(self.now, worker.link_free) + size / worker.hardware.worker_bytes_per_second
            self.pool_free = max(self.now, self.pool_free) + size / self.pool_rate
            worker.fetching_tokens += job.fetch_tokens
            worker.fetching_requests_tokens += job.prompt_tokens
            worker.fetching += 1
        self._at(ready + copied / worker.hardware.dram_bytes_per_second, lambda: self._ready(worker, job))

    def leave(self, job: AnyJob) -> None:
        """Its client is gone: the worker drops it, at once unless it is being fetched for or computed."""
        job.left = True
        worker = self.workers[job.worker]
        if job in worker.ready:
            worker.ready.remove(job)
            worker.queued_tokens -= job.prefill_tokens
            self._gone(worker, job)
        elif any(one is job for _, _, one in worker.running):
            self._decode(worker)
            worker.running = [entry for entry in worker.running if entry[2] is not job]
            heapq.heapify(worker.running)
            self._release(worker, job)
        self._step(worker)

    def produced(self, job: AnyJob) -> int:
        """Tokens of its answer so far."""
        if not job.first:
            return 0
        worker = self.workers[job.worker]
        steps = worker.steps
        if worker.prefilling is None and worker.running:
            steps += (self.now - worker.since) / worker.hardware.step_seconds(len(worker.running))
        return min(job.answer_tokens, max(1, job.answer_tokens - math.ceil(job.ends_at_step - steps)))

    def _ready(self, worker: Worker[AnyJob], job: AnyJob) -> None:
        worker.fetching_tokens -= job.fetch_tokens
        worker.fetching -= job.fetch_tokens > 0
        worker.fetching_requests_tokens -= job.prompt_tokens if job.fetch_tokens else 0
        if job.left:
            worker.queued_tokens -= job.prefill_tokens
            self._gone(worker, job)
            return
        worker.ready.append(job)
        self._step(worker)

    def _decode(self, worker: Worker[AnyJob]) -> None:
        """Bring the worker's steps up to now."""
        if worker.prefilling is None and worker.running:
            worker.steps += (self.now - worker.since) / worker.hardware.step_seconds(len(worker.running))
        worker.since = self.now

    def _step(self, worker: Worker[AnyJob]) -> None:
        """Bring the worker up to now, and see what it does next."""
        self._decode(worker)
        while worker.prefilling is None and worker.running and worker.running[0][0] <= worker.steps + 1e-6:
            job = heapq.heappop(worker.running)[2]
            self._release(worker, job)
            self._ended(job)
        worker.version += 1
        if worker.prefilling is None and worker.ready:
            job = worker.ready[0]
            if not worker.running or worker.running_tokens + job.tokens <= self.hardware.hbm_tokens:
                self._prefill(worker, worker.ready.popleft())
        version = worker.version
        if worker.prefilling is None and worker.running:
            left = (worker.running[0][0] - worker.steps) * worker.hardware.step_seconds(len(worker.running))
            self._at(self.now + max(0.0, left), lambda: self._step(worker) if worker.version == version else None)

    def _prefill(self, worker: Worker[AnyJob], job: AnyJob) -> None:
        worker.prefill_share(self.now)
        worker.prefilling = job
        worker.queued_tokens -= job.prefill_tokens
        worker.running_tokens += job.tokens
        self._room(worker.number, max(0, self.hardware.hbm_tokens - worker.running_tokens))
        chunks = -(-job.prefill_tokens // PREFILL_TOKENS)
        took = worker.hardware.prefill_seconds(job.prefill_tokens, job.loaded_tokens)
        worker.prefill_ends = self.now + took * self._off()

        def ended() -> None:
            worker.steps += chunks if worker.running else 0
            worker.since = self.now
            worker.prefill_share(self.now)
            worker.prefilling = None
            if job.left:
                self._release(worker, job)
            else:
                job.first = self.now
                job.ends_at_step = worker.steps + job.answer_tokens - 1
                heapq.heappush(worker.running, (job.ends_at_step, next(self._count), job))
                self._began(job)
            self._step(worker)

        self._at(worker.prefill_ends, ended)

    def _gone(self, worker: Worker[AnyJob], job: AnyJob) -> None:
        worker.requests -= 1
        worker.requests_tokens -= job.prompt_tokens

    def _release(self, worker: Worker[AnyJob], job: AnyJob) -> None:
        self._gone(worker, job)
        worker.running_tokens -= job.tokens
        self._room(worker.number, max(0, self.hardware.hbm_tokens - worker.running_tokens))
