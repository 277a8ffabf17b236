"""The store as a tier of the engine: chunks move between rows of the DRAM tier and targets, on threads of their own.

The scheduler's thread only ever takes a lock, looks into a dictionary or appends to a queue. Everything that touches
the network runs on `kvtier-fetch` and `kvtier-put` threads, under a deadline; what fails, is late or does not check out
is reported as missing, and the engine computes it.
"""

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from components.worker.compat import (
    JobId,
    JobMetadata,
    JobResult,
    LookupResult,
    OffloadingConnectorStats,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    Request,
    RequestOffloadingContext,
    SecondaryTierManager,
    get_offload_block_hash,
    get_offload_group_idx,
)
from components.worker.manager import PartialResult
from components.worker.report import Reporter
from kvstore.bus import WorkerReport
from kvstore.carrier import borrower
from kvstore.client import Item, StoreClient
from kvstore.keys import SequenceHasher, chunk_key, fingerprint
from kvstore.membership import open_membership, place
from kvstore.plan import Plan, read_plan
from kvstore.wire import Outcome

logger = logging.getLogger(__name__)

TIER_TYPE = "kvtier"
# A chunk that was fetched and pushed out of DRAM again before its request was scheduled is fetched once more, not more
# often: under such pressure the request would wait for ever.
FETCHES_PER_CHUNK = 2
# Several chunks go in one put, to spare round trips; each is pinned in DRAM until its put is done.
PUT_BYTES = 32 << 20
PUT_SECONDS = 10.0

# dynamo.vllm leaves its instance id here for the engine's process.
_DYNAMO_WORKER_ID = "DYN_FPM_WORKER_ID"

_FETCHED = "vllm:kvtier_fetched_chunks"
_STORED = "vllm:kvtier_stored_chunks"
_FETCHED_BYTES = "vllm:kvtier_fetched_bytes"
_STORED_BYTES = "vllm:kvtier_stored_bytes"


def blocks_per_chunk(spec: OffloadingSpec) -> int:
    """How many hashed blocks, which are what a router counts in, make a chunk of the first group."""
    return int(spec.tokens_per_block[0] * spec.blocks_per_chunk // spec.tokens_per_hash)


class RouterHashes:
    """The router hash of each chunk of a request, computed on the thread that needs it. Thread-safe.

    0, which is never announced, for requests whose blocks depend on more than tokens, LoRA and salt.
    """

    def __init__(self, request: Request, block_tokens: int, blocks_per_chunk: int):
        self._tokens = request.all_token_ids
        self._blocks_per_chunk = blocks_per_chunk
        self._plain = not request.mm_features and request.prompt_embeds is None
        salt = (request.cache_salt or "").removeprefix("dynamo-cache-salt:")
        lora = request.lora_request.name if request.lora_request else None
        self._hasher = SequenceHasher(block_tokens, lora_name=lora, cache_namespace=salt or None)
        self._lock = threading.Lock()

    def of_chunk(self, chunk: int) -> int:
        if not self._plain:
            return 0
        blocks = (chunk + 1) * self._blocks_per_chunk
        with self._lock:
            return self._hasher.extend(self._tokens, blocks)[blocks - 1]


@dataclass
class _RequestState:
    """What the tier knows of a request that is in the engine."""

    plan: Plan | None
    targets: list[str | None]  # by chunk; from the plan, or found by asking
    arrived: float
    deadline: float  # after it the request waits for nothing of this tier
    submitted: int = 0  # chunks whose fetch was begun
    request: Request | None = None
    asked: bool = False  # without a plan the store itself is asked; this says that it has been
    answered: bool = False
    hashes: RouterHashes | None = None
    chunk_of: dict[OffloadKey, int] = field(default_factory=dict)
    fetches: dict[OffloadKey, int] = field(default_factory=dict)
    cancelled: bool = False


@dataclass
class _Fetch:
    job_id: JobId
    keys: list[OffloadKey]
    rows: list[int]
    targets: list[str | None]
    state: _RequestState
    deadline: float


@dataclass
class _Put:
    job_id: JobId
    keys: list[OffloadKey]
    rows: list[int]
    chunks: list[int | None]
    hashes: RouterHashes | None
    payload_bytes: int
    saved_seconds: float  # what computing a chunk takes, as far as the router said


class RemoteTier(SecondaryTierManager):
    """The kvtier store as a secondary tier. vLLM makes it from the `secondary_tiers` entry; see SecondaryTierManager
    for the contract of each method. `layout_digest` names what the bytes mean (layout.py); `nats` and `endpoint` are
    for telling routers, and may be left out. `on_load` is called for each chunk that is going to be fetched.
    """

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        store: str,
        layout_digest: str,
        namespace: str = "default",
        nats: str = "",
        endpoint: str = "",
        deadline_ms: int = 2000,
        lookup_ms: int = 50,
        fetch_threads: int = 4,
        put_threads: int = 2,
        connections_per_target: int = 4,
        carrier: str = "",
        put_queue_share: float = 0.25,
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        rows, row_bytes = primary_kv_view.shape or (0, 0)
        self._row_bytes = row_bytes
        self._memory = primary_kv_view.cast("B") if rows * row_bytes else memoryview(bytearray())
        self._digest = bytes.fromhex(layout_digest)
        self._fingerprint = fingerprint(self._digest)
        self._block_tokens = offloading_spec.tokens_per_hash
        self._blocks_per_chunk = blocks_per_chunk(offloading_spec)
        self._deadline_seconds = deadline_ms / 1000
        self._lookup_seconds = lookup_ms / 1000
        # Rows waiting for a put cannot be evicted: beyond this share of DRAM the tier would stand in the engine's way.
        self._put_queue_bytes_max = int(put_queue_share * rows * row_bytes)
        self._put_queue_bytes = 0
        self._membership = open_membership(store, namespace, isolated=True)
        self._client = StoreClient(
            self._membership,
            namespace=namespace,
            name="worker",
            connections_per_target=connections_per_target,
            carrier=borrower(carrier) if carrier else None,
        )
        self._states: dict[str, _RequestState] = {}
        self._lock = threading.Condition()
        self._fetches: deque[_Fetch] = deque()
        self._questions: deque[tuple[_RequestState, list[OffloadKey]]] = deque()
        self._puts: deque[_Put] = deque()
        self._finished: list[JobResult] = []
        self._jobs_under_way = 0
        self._stats = OffloadingConnectorStats()
        self._stopping = False
        self.on_load: Callable[[Request, OffloadKey, int], None] = lambda request, key, chunk: None
        self._endpoint = endpoint
        self._reporter = Reporter(nats, namespace, f"{os.getpid()}-{id(self)}", self._report) if nats else None
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"kvtier-{name}", daemon=True)
            for name, count, loop in (
                ("fetch", fetch_threads, self._fetch_next),
                ("put", put_threads, self._put_next),
                ("ask", 1, self._ask_next),
            )
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    # ---- the scheduler's thread: requests

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        plan, now = read_plan(req_context.kv_transfer_params), time.monotonic()
        state = _RequestState(plan, plan.targets() if plan else [], now, now + self._deadline_seconds)
        self._states[req_context.req_id] = state
        # A chunk that this worker should hold and no target does was lost to an outage, or evicted while it was read
        # from HBM alone: offer all of the request again, hits included, and the store is whole again.
        holes = plan is not None and any(run.target is None for run in plan.runs)
        return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL if holes else OffloadPolicy.BLOCK_LEVEL)

    def describe(self, request: Request, chunk: int, key: OffloadKey) -> None:
        """Tell which chunk of the request `key` is. Comes before any lookup or store of the key."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        if state.hashes is None:
            state.request = request
            state.hashes = RouterHashes(request, self._block_tokens, self._blocks_per_chunk)
        state.chunk_of[key] = chunk

    def ask(self, req_id: str) -> None:
        """For a request without a plan: find out on another thread which of its chunks the store holds."""
        state = self._states.get(req_id)
        if state is None or state.plan is not None or state.asked:
            return
        state.asked = True
        state.deadline = min(state.deadline, time.monotonic() + self._lookup_seconds)
        with self._lock:
            self._questions.append((state, list(state.chunk_of)))
            self._lock.notify_all()

    def undecided(self, req_id: str) -> bool:
        """Whether it is not known yet what the store holds of the request."""
        state = self._states.get(req_id)
        return state is not None and state.asked and not state.answered

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        state = self._states.get(req_context.req_id)
        chunk = None if state is None else state.chunk_of.get(key)
        if state is None or chunk is None or state.cancelled or time.monotonic() > state.deadline:
            return LookupResult.MISS
        if state.asked and not state.answered:
            return LookupResult.RETRY
        target = state.targets[chunk] if chunk < len(state.targets) else None
        if target is None or state.fetches.get(key, 0) >= FETCHES_PER_CHUNK:
            return LookupResult.MISS
        return LookupResult.HIT

    def cancel(self, req_id: str) -> None:
        """The request is gone: stop what is fetched for it."""
        state = self._states.get(req_id)
        if state is not None:
            state.cancelled = True

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.cancel(req_context.req_id)
        self._states.pop(req_context.req_id, None)

    # ---- the scheduler's thread: jobs

    def submit_load(self, job_metadata: JobMetadata) -> None:
        keys = list(job_metadata.keys)
        state = self._states.get(job_metadata.req_context.req_id)
        with self._lock:
            if state is None:
                self._finished.append(JobResult(job_metadata.job_id, False))
                return
            for key in keys:
                state.fetches[key] = state.fetches.get(key, 0) + 1
            chunks = [state.chunk_of[key] for key in keys]
            targets = [state.targets[chunk] for chunk in chunks]
            state.submitted += len(keys)
            deadline = state.deadline
            if state.plan is not None:
                deadline = min(deadline, state.arrived + state.plan.wait_seconds(state.submitted))
            self._fetches.append(
                _Fetch(job_metadata.job_id, keys, list(job_metadata.block_ids), targets, state, deadline)
            )
            self._jobs_under_way += 1
            self._lock.notify_all()
        if state.request is not None:
            for key, chunk in zip(keys, chunks, strict=True):
                self.on_load(state.request, key, chunk)

    def submit_store(self, job_metadata: JobMetadata) -> None:
        keys = list(job_metadata.keys)
        payload_bytes = len(keys) * self._row_bytes
        state = self._states.get(job_metadata.req_context.req_id)
        chunks = [None if state is None else state.chunk_of.get(key) for key in keys]
        hashes = None if state is None else state.hashes
        saved = 0.0 if state is None or state.plan is None else state.plan.chunk_ms / 1000
        with self._lock:
            if self._stopping or self._put_queue_bytes + payload_bytes > self._put_queue_bytes_max:
                self._stats.increase_counter(_STORED, len(keys), ("dropped",))
                self._finished.append(JobResult(job_metadata.job_id, True))
                return
            self._put_queue_bytes += payload_bytes
            self._puts.append(
                _Put(job_metadata.job_id, keys, list(job_metadata.block_ids), chunks, hashes, payload_bytes, saved)
            )
            self._jobs_under_way += 1
            self._lock.notify_all()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        with self._lock:
            self._expire()
            finished, self._finished = self._finished, []
        return finished

    def has_pending_work(self) -> bool:
        return self._jobs_under_way > 0 or bool(self._finished)

    def drain_jobs(self) -> None:
        """Bounded by the deadlines of the jobs under way."""
        with self._lock:
            self._lock.wait_for(lambda: self._jobs_under_way == 0)

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._puts.clear()
            self._lock.notify_all()
        if self._reporter is not None:
            self._reporter.close()
        self._client.close()
        for thread in self._threads:
            thread.join(2)
        self._memory.release()

    def _expire(self) -> None:
        """Fail the fetches that are still queued and that nobody can use any more. Called with the lock held."""
        now = time.monotonic()
        waiting, self._fetches = self._fetches, deque()
        for fetch in waiting:
            if fetch.state.cancelled or now > fetch.deadline:
                self._stats.increase_counter(_FETCHED, len(fetch.keys), (Outcome.LATE.name.lower(),))
                self._finish(JobResult(fetch.job_id, False))
            else:
                self._fetches.append(fetch)

    def _finish(self, result: JobResult) -> None:
        self._jobs_under_way -= 1
        self._finished.append(result)
        self._lock.notify_all()

    # ---- threads

    def _run(self, step: Callable[[], None]) -> None:
        while not self._stopping:
            try:
                step()
            except Exception:
                if self._stopping:
                    return
                logger.exception("kvtier: a transfer failed in an unforeseen way")

    def _fetch_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._fetches or self._stopping)
            if self._stopping:
                return
            fetch = self._fetches.popleft()
        outcomes = [Outcome.UNREACHABLE] * len(fetch.keys)
        try:
            outcomes = self._client.get(
                [self._key(key) for key in fetch.keys],
                [self._row(row) for row in fetch.rows],
                fetch.deadline,
                targets=fetch.targets,
                cancelled=lambda: fetch.state.cancelled,
            )
        finally:
            failed = frozenset(
                key for key, outcome in zip(fetch.keys, outcomes, strict=True) if outcome is not Outcome.HIT
            )
            with self._lock:
                for key in failed:
                    fetch.state.fetches[key] = FETCHES_PER_CHUNK  # not again for this request
                for outcome in outcomes:
                    self._stats.increase_counter(_FETCHED, 1, (outcome.name.lower(),))
                self._stats.increase_counter(_FETCHED_BYTES, (len(fetch.keys) - len(failed)) * self._row_bytes)
                self._finish(PartialResult(fetch.job_id, True, failed))

    def _put_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._puts or self._stopping)
            if self._stopping:
                return
            put = self._puts.popleft()
        try:
            self._store(put)
        finally:
            with self._lock:
                self._put_queue_bytes -= put.payload_bytes
                self._finish(JobResult(put.job_id, True))

    def _store(self, put: _Put) -> None:
        """Put what the store does not hold yet."""
        deadline = time.monotonic() + PUT_SECONDS
        keys = [self._key(key) for key in put.keys]
        there = self._client.exists(keys, deadline)
        outcomes = ["known" if outcome is Outcome.HIT else outcome.name.lower() for outcome in there]
        missing = [index for index, outcome in enumerate(there) if outcome is Outcome.MISS]
        per_put = max(1, PUT_BYTES // self._row_bytes)
        for start in range(0, len(missing), per_put):
            part = missing[start : start + per_put]
            items = [
                Item(
                    keys[index],
                    self._row(put.rows[index]),
                    self._router_hash(put, index),
                    self._fingerprint,
                    self._blocks_per_chunk,
                    put.saved_seconds,
                )
                for index in part
            ]
            for index, outcome in zip(part, self._client.put(items, deadline), strict=True):
                outcomes[index] = outcome.name.lower()
        with self._lock:
            for outcome_name in outcomes:
                self._stats.increase_counter(_STORED, 1, (outcome_name,))
            self._stats.increase_counter(_STORED_BYTES, outcomes.count("stored") * self._row_bytes)

    def _ask_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._questions or self._stopping)
            if self._stopping:
                return
            state, offload_keys = self._questions.popleft()
        keys = [self._key(key) for key in offload_keys]
        found: dict[int, str | None] = {}
        try:
            live = self._membership.targets()
            for offload_key, key, outcome in zip(
                offload_keys, keys, self._client.exists(keys, state.deadline), strict=True
            ):
                if outcome is Outcome.HIT:
                    found[state.chunk_of[offload_key]] = place(key, live)
        finally:
            first_missing = next(chunk for chunk in itertools.count() if chunk not in found)
            state.targets = [found[chunk] for chunk in range(first_missing)]
            state.deadline += self._deadline_seconds
            state.answered = True

    def _key(self, key: OffloadKey) -> bytes:
        return chunk_key(self._digest, get_offload_block_hash(key), get_offload_group_idx(key))

    def _row(self, row: int) -> memoryview:
        return self._memory[row * self._row_bytes : (row + 1) * self._row_bytes]

    def _router_hash(self, put: _Put, index: int) -> int:
        """0, not announced, for groups but the first: they are stored beside it, and one announcement is enough."""
        chunk = put.chunks[index]
        if chunk is None or put.hashes is None or get_offload_group_idx(put.keys[index]) != 0:
            return 0
        return put.hashes.of_chunk(chunk)

    # ---- what others see

    def _report(self) -> WorkerReport:
        return WorkerReport(
            worker=os.environ.get(_DYNAMO_WORKER_ID, ""),
            endpoint=self._endpoint,
            fingerprint=self._fingerprint,
            block_tokens=self._block_tokens,
            blocks_per_chunk=self._blocks_per_chunk,
            chunk_bytes=self._row_bytes,
            ts_ms=time.time_ns() // 1_000_000,
        )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, object]) -> dict[str, OffloadingMetricMetadata]:
        return {
            _FETCHED: OffloadingCounterMetadata("Chunks asked of the kvtier store, by outcome", ("outcome",)),
            _STORED: OffloadingCounterMetadata("Chunks offered to the kvtier store, by outcome", ("outcome",)),
            _FETCHED_BYTES: OffloadingCounterMetadata("Bytes loaded from the kvtier store into DRAM"),
            _STORED_BYTES: OffloadingCounterMetadata("Bytes written from DRAM to the kvtier store"),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        with self._lock:
            stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Recency is the target's own business."""
