"""The queueing model of engines, their links and the store, for any clock: what policy_sim and sim_worker share.

The numbers are those of Llama-3.1-70B FP8 on one H200: prefill, decode step by batch, KV bytes a token. A worker either
prefills one prompt or decodes a batch. During a prefill, decoding requests get one token for every 2048 prompt tokens,
as with chunked prefill. Fetches start when a prompt arrives, and run in order of arrival over the worker's link and the
shared link of all targets. Subclasses define the tiers' content and the clock.
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

PREFILL_TOKENS = 2048  # per chunk of a prefill; after each, decoding requests get a token


@dataclass(frozen=True)
class Hardware:
    """The hardware of each worker, and of the store."""

    # Fitted to the cold TTFT of 2200 and 8000 tokens (290 and 1135 ms), without the part that does not use the GPU.
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
        """A decode step of `batch` requests, interpolated linearly between measurements."""
        for (low, before), (high, after) in itertools.pairwise(self.steps):
            if batch <= high or high == self.steps[-1][0]:
                return before + (after - before) * (batch - low) / (high - low)
        raise AssertionError

    def slower_gpu(self, factor: float) -> "Hardware":
        """The same hardware with prefills and decode steps that take `factor` times as long."""
        return replace(
            self,
            prefill_base_seconds=self.prefill_base_seconds * factor,
            prefill_seconds_per_token=self.prefill_seconds_per_token * factor,
            prefill_seconds_per_token_squared=self.prefill_seconds_per_token_squared * factor,
            steps=tuple((batch, seconds * factor) for batch, seconds in self.steps),
        )

    def slowed(self, factor: float) -> "Hardware":
        """The same hardware with every duration multiplied by `factor`."""
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
    fetching: int = 0  # requests that wait for the store
    fetching_tokens: int = 0
    fetching_requests_tokens: int = 0
    requests: int = 0  # requests without a last token, in any state
    requests_tokens: int = 0  # of their prompts, as Dynamo counts
    queued_tokens: int = 0  # tokens to prefill that have not begun
    prefilling: AnyJob | None = None
    prefill_ends: float = 0.0
    prefills: Throughput = field(default_factory=Throughput)  # seconds spent on prompts per second
    counted: float = 0.0  # the time until which `prefills` is counted
    steps: float = 0.0
    since: float = 0.0
    version: int = 0
    running: list[tuple[float, int, AnyJob]] = field(default_factory=list)
    running_tokens: int = 0

    @property
    def prefill_tokens(self) -> int:
        """Tokens to prefill of prompts without a first token, as Dynamo counts."""
        return self.queued_tokens + (self.prefilling.prefill_tokens if self.prefilling else 0)

    def prefill_share(self, now: float) -> float:
        """As the worker reports it."""
        seconds = now - self.counted
        self.prefills.add(seconds if self.prefilling else 0.0, seconds)
        self.counted = now
        return self.prefills.bytes_per_second


class Engines(ABC, Generic[AnyJob]):
    """Workers and their store. For one thread. With unequal workers, `each` lists their hardware, which they get in
    turn: the same HBM and DRAM, another GPU or link. The store's hardware is `hardware`."""

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
        """`tokens` of the worker's HBM are free for cached prefixes."""

    @abstractmethod
    def _began(self, job: AnyJob) -> None:
        """The job has its first token."""

    @abstractmethod
    def _ended(self, job: AnyJob) -> None:
        """The job has its last token."""

    def _off(self) -> float:
        """The noise factor of the next prefill's or fetch's duration."""
        return 1.0

    def fetch_ends(self, worker: Worker[AnyJob], tokens: int) -> float:
        """When a fetch of `tokens` tokens that is requested now would end."""
        size = tokens * self.hardware.kv_bytes_per_token
        by_link = max(self.now, worker.link_free) + size / worker.hardware.worker_bytes_per_second
        by_pool = max(self.now, self.pool_free) + size / self.pool_rate
        return max(by_link, by_pool) + self.hardware.store_latency_seconds

    def _admit(self, job: AnyJob, hbm_tokens: int) -> None:
        """Queue the job on its worker. Of its tokens, `loaded_tokens` need no prefill: `hbm_tokens` are in HBM,
        `fetch_tokens` come from the store, the others from DRAM."""
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
        """The job's client is gone: the worker drops it, unless it is being fetched or computed; then it drops it
        later."""
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
        """Tokens of the job's answer so far."""
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
        """Advance the worker's decode steps to now."""
        if worker.prefilling is None and worker.running:
            worker.steps += (self.now - worker.since) / worker.hardware.step_seconds(len(worker.running))
        worker.since = self.now

    def _step(self, worker: Worker[AnyJob]) -> None:
        """Advance the worker to now, and start its next work."""
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
