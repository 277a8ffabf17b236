"""The store as a tier of the engine: what is asked of it, what is under way, and what is no longer waited for.

A state machine on the scheduler's thread. It takes no lock, and blocks only where it is told for how long (`await_*`,
`wait`): whatever touches the network is done by the mover, a process of its own (mover/), under a deadline. What
fails, is late or does not check out is reported as missing, and the engine computes it.

One rule stands above speed: a load is reported as finished only when nobody can write into its rows any more. Either
the mover says so, or the mover is dead and reaped. A request does not wait for that: past its deadline `gave_up` tells
the manager to pass over what is still pending.
"""

import logging
import os
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.pricing.patience import due_seconds, worth_waiting_for
from components.pricing.prefill import Prefill
from components.worker.compat import (
    JobId,
    JobResult,
    Locality,
    LookupResult,
    Medium,
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
    TransferJob,
    get_offload_block_hash,
    get_offload_group_idx,
    region_fd,
)
from components.worker.mover import frames
from components.worker.mover.frames import (
    Ask,
    Cancel,
    Forget,
    Found,
    Hurry,
    Identified,
    Load,
    Loaded,
    Pace,
    Put,
    Setup,
    Stored,
    Tokens,
)
from components.worker.mover.link import MoverLink
from kvstore import credentials
from kvstore.bus.plan import Plan, read_plan
from kvstore.certificates import Files
from kvstore.keys import fingerprint
from kvstore.net import tls
from kvstore.net.client import good_connections
from kvstore.net.wire import Outcome
from kvstore.seal import Reason, open_seal

logger = logging.getLogger(__name__)

TIER_TYPE = "kvtier"
# A chunk that was fetched and pushed out of DRAM again before its request was scheduled is fetched once more, not more
# often: under such pressure the request would wait for ever.
FETCHES_PER_CHUNK = 2
# A load that the mover has not answered so long after its deadline is in the hands of a mover that hangs. A request
# does not wait for it; its rows do.
HUNG_SECONDS = 1.0
# With puts under way, the mover answers one at least so often, unless it hangs: it gives a piece 10 seconds, and gives
# way to loads for a moment before each 8 MiB of it.
PUT_HUNG_SECONDS = 60.0
# Puts wait for a mover that is back so soon; for longer their rows are not kept from the engine.
PUT_GONE_SECONDS = 1.0
# Pieces of this size keep every connection busy and let another request's first chunks in between.
JOB_BYTES = 8 << 20
JOB_CHUNKS = 64
PUT_CHUNKS = 256
PUT_PIECE_BYTES = 64 << 20
# Commands that wait for a mover to take them.
_OUTBOX_MAX = 4096
_STOP_SECONDS = 2.0
_DRAIN_SECONDS = 5.0
_WAIT_SECONDS = 0.001
# What the store holds is known some 0.6 ms after it was asked (a target on the same host, UNIX socket); a request that
# does not wait for that loses a step, tens of milliseconds. A target that is slower costs the GPU no more than this.
_ANSWER_SECONDS = 0.002

# dynamo.vllm leaves its instance id here for the engine's process.
_DYNAMO_WORKER_ID = "DYN_FPM_WORKER_ID"

_FETCHED = "vllm:kvtier_fetched_chunks"
_STORED = "vllm:kvtier_stored_chunks"
_FETCHED_BYTES = "vllm:kvtier_fetched_bytes"
_STORED_BYTES = "vllm:kvtier_stored_bytes"
_ABANDONED = "vllm:kvtier_fetch_abandoned_chunks"
_TIMED_OUT = "vllm:kvtier_fetch_timeout_chunks"
_MOVER_RESTARTS = "vllm:kvtier_mover_restarts"
_IDENTITY = "vllm:kvtier_identity_checks"
_REJECTED = "vllm:kvtier_rejected_values"
_FETCHED_OUTCOMES = [outcome.name.lower() for outcome in Outcome if outcome is not Outcome.STORED]
_IDENTITY_OUTCOMES = ["same", "changed", "failed", "adapter", "adapter_changed"]
_STORED_OUTCOMES = ["stored", "known", "dropped", "refused", "unreachable"]


def blocks_per_chunk(spec: OffloadingSpec) -> int:
    """How many hashed blocks, which are what a router counts in, make a chunk of the first group."""
    return int(spec.tokens_per_block[0] * spec.blocks_per_chunk // spec.tokens_per_hash)


@dataclass(eq=False)
class _RequestState:
    """What the tier knows of a request that is in the engine."""

    number: int
    context: ReqContext
    plan: Plan | None
    arrived: float
    deadline: float  # after it the request waits for nothing of this tier
    identity: bytes | None = None  # what its KV is computed with; None: not known, and nothing is loaded or stored
    submitted: int = 0  # chunks whose fetch was begun
    request: Request | None = None
    asked: bool = False  # without a plan the store itself is asked; this says that it has been
    answered: bool = False
    awaited: bool = False
    hurried: bool = False
    tokens_sent: int = 0
    cut: bool = False
    asked_keys: list[OffloadKey] = field(default_factory=list)
    targets: dict[OffloadKey, str | None] = field(default_factory=dict)  # found by asking
    planned: list[str | None] = field(default_factory=list)  # by chunk, from the plan
    fetches: dict[OffloadKey, int] = field(default_factory=dict)
    loads: dict[JobId, "_Load"] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)  # chunks of which something came from the store
    cancelled: bool = False

    @property
    def until(self) -> float:
        """When the request stops waiting."""
        if self.plan is None:
            return self.deadline
        return min(self.deadline, self.arrived + self.plan.wait_seconds(max(self.submitted, self.plan.fetch)))

    @property
    def plain(self) -> bool:
        """Whether blocks depend on nothing but tokens, LoRA and salt, so that a router can compute their hashes."""
        return self.request is not None and not self.request.mm_features and self.request.prompt_embeds is None


@dataclass(eq=False)
class _Load:
    job_id: JobId
    keys: list[OffloadKey]
    state: _RequestState
    first_chunk: int
    deadline: float
    command: Load
    sent: bool = False
    done: bool = False
    cancelled: bool = False
    overdue: bool = False  # its deadline came first


@dataclass(eq=False)
class _Put:
    """A part of a job to store. Another mover may try it if the first one ends: to put twice does no harm."""

    job_id: JobId
    state: _RequestState
    command: Put
    done: bool = False
    retried: bool = False


@dataclass(eq=False)
class _Leftover:
    """What of a job to store had no room, in the order of the prompt."""

    context: ReqContext
    state: _RequestState
    keys: list[OffloadKey]


class RemoteTier(SecondaryTierManager):
    """The kvtier store as a secondary tier. vLLM makes it from the `secondary_tiers` entry; see SecondaryTierManager
    for the contract of each method. `nats` and `endpoint` are for telling routers, and may be left out; so may
    `credential_file` (kvstore.credentials.load), `seal_key` and `seal` (kvstore.seal.open_seal), and `store_tls_ca`,
    `store_tls_cert` and `store_tls_key` (kvstore.net.tls.open_client). `on_load` is called for each fetched chunk, with
    the token that it ends at; `prefill` is what computing costs here, as far as it is known, and `prefill_share`
    how much of its time the engine spends on prompts.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        store: str,
        backpressure_detector: object = None,
        namespace: str = "default",
        nats: str = "",
        endpoint: str = "",
        deadline_ms: int = 2000,
        lookup_ms: int = 200,
        fetch_threads: int | None = None,
        put_threads: int = 2,
        connections_per_target: int | None = None,
        carrier: str = "",
        put_queue_share: float = 0.25,
        load_share: float = 0.25,
        credential_file: str = "",
        seal_key: str = "",
        seal: str = "",
        store_tls_ca: str = "",
        store_tls_cert: str = "",
        store_tls_key: str = "",
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        credentials.load(Path(credential_file) if credential_file else None)
        open_seal(seal_key, seal)  # or the mover would end over it, and the engine go on without the store
        tls_files = Files(store_tls_cert, store_tls_key, store_tls_ca)
        tls.open_client(tls_files, carrier)
        rows, row_bytes = primary_kv_view.shape or (0, 0)
        self.row_bytes = row_bytes
        self._block_tokens = offloading_spec.tokens_per_hash
        self._blocks_per_chunk = blocks_per_chunk(offloading_spec)
        self._chunk_tokens = self._block_tokens * self._blocks_per_chunk
        # A plan knows the chunks of one group. Where there are more, the store itself is asked.
        self._plans = len(offloading_spec.config.groups) == 1
        self._deadline_seconds = deadline_ms / 1000
        self._lookup_seconds = lookup_ms / 1000
        # Rows waiting for a put cannot be evicted: beyond this share of DRAM the tier would stand in the engine's way.
        self._put_rows_max = int(put_queue_share * rows)
        self._put_rows = 0
        # What was not put for want of room is put later, if it is still in DRAM: there is no use in more than that.
        self._leftovers: deque[_Leftover] = deque()
        self._leftover_chunks = 0
        self._leftover_chunks_max = rows
        # Nor can rows that are being filled; the bound on rows is one on bytes in flight, too.
        self._load_rows_max = max(1, int(load_share * rows))
        self._load_rows = 0
        self._promised_rows = 0  # looked up as there, not submitted yet
        self._waited_seconds = 0.0  # in this step
        self._listened = False  # in this step
        self._states: dict[str, _RequestState] = {}
        self._by_number: dict[int, _RequestState] = {}
        self._requests = 0
        self._loads: dict[JobId, _Load] = {}
        self._puts: dict[int, _Put] = {}  # by a number of their own
        self._put_parts: dict[JobId, int] = {}  # how many are still under way
        self._put_number = 0
        self._put_progress = 0.0
        self._drain_until = 0.0
        self._suspect = False
        self._outbox: deque[frames.Command | _Load | _Put] = deque()
        self._finished: list[JobResult] = []
        self._stats = _zeros()
        self._store_bytes_per_second = 0.0
        self._identified = Identified(0, {})
        self.on_load: Callable[[Request, OffloadKey, int], None] = lambda request, key, end: None
        self.prefill = Prefill()
        self.prefill_share = 0.0
        self.link = MoverLink(
            Setup(
                region_fd=region_fd(offloading_spec),
                region_bytes=rows * row_bytes,
                row_bytes=row_bytes,
                store=store,
                namespace=namespace,
                carrier=carrier,
                nats=nats,
                endpoint=endpoint,
                worker=os.environ.get(_DYNAMO_WORKER_ID, ""),
                block_tokens=self._block_tokens,
                blocks_per_chunk=self._blocks_per_chunk,
                connections_per_target=connections_per_target or good_connections(),
                fetch_threads=fetch_threads or good_connections(),
                put_threads=put_threads,
                credential_file=credential_file,
                seal_key=seal_key,
                seal=seal,
                tls=tls_files,
            )
        )

    @property
    def job_chunks(self) -> int:
        """How many chunks a load should have at most."""
        return max(1, min(JOB_CHUNKS, JOB_BYTES // max(1, self.row_bytes)))

    # ---- requests

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._step()  # an engine that was idle has not listened to its mover
        plan, now = read_plan(req_context.kv_transfer_params) if self._plans else None, time.monotonic()
        self._requests += 1
        state = _RequestState(self._requests, req_context, plan, now, now + self._deadline_seconds)
        if plan is not None:
            state.planned = plan.targets()
        self._states[req_context.req_id] = self._by_number[state.number] = state
        # A chunk that this worker should hold and no target does was lost to an outage, or evicted while it was read
        # from HBM alone: offer all of the request again, hits included, and the store is whole again.
        holes = plan is not None and any(run.target is None for run in plan.runs)
        return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL if holes else OffloadPolicy.CHUNK_LEVEL)

    def arrived(self, request: Request) -> None:
        """The request whose context came just before."""
        self._states[request.request_id].request = request

    def identify(self, req_id: str, identity: bytes) -> bool:
        """The request's KV is computed with this. Whether that is news."""
        news = self._states[req_id].identity != identity
        if news:
            self.forget([req_id])
            self._states[req_id].identity = identity
        return news

    def forget(self, req_ids: Collection[str]) -> None:
        """What these requests' KV is computed with has changed: what is under way for them ends as if it were missing,
        nothing that was computed is stored, and they are as new."""
        for req_id in req_ids:
            state = self._states.get(req_id)
            if state is not None and state.identity is not None:
                state.identity = None
                self.on_request_finished(state.context)
                self.on_new_request(state.context)
                self._states[req_id].request = state.request

    def announce(self, base: bytes | None, adapters: dict[str, bytes]) -> None:
        """For routers: which chunks this worker can use, and those of requests with an adapter by its name."""
        identified = Identified(
            fingerprint(base) if base is not None else 0, {name: fingerprint(one) for name, one in adapters.items()}
        )
        if identified != self._identified:
            self._identified = identified
            self._say_identified()

    def note_identity(self, outcome: str) -> None:
        self._stats.increase_counter(_IDENTITY, 1, (outcome,))

    def ask(self, req_id: str, keys: Sequence[OffloadKey]) -> None:
        """For a request without a plan: find out which of its leading chunks, in order, the store holds."""
        state = self._states.get(req_id)
        if state is None or state.plan is not None or state.asked or state.identity is None:
            return
        now = time.monotonic()
        state.asked = True
        state.asked_keys = list(keys[: frames.CHUNKS_MAX])
        state.deadline = min(state.deadline, now + self._lookup_seconds)
        state.answered = not keys or not self.link.ready
        if not state.answered:
            names = [_name(key) for key in state.asked_keys]
            state.answered = not self._say(Ask(state.number, state.identity, names, state.deadline))

    def _chunk(self, state: _RequestState, key: OffloadKey) -> int:
        """Which chunk of the request it is; -1: not a whole one, or not known."""
        end = state.context.get_offload_key_position(key)
        return end // self._chunk_tokens - 1 if end is not None and end % self._chunk_tokens == 0 else -1

    def _target(self, state: _RequestState, key: OffloadKey) -> str | None:
        """Where the store has the chunk, if it has."""
        if state.plan is None:
            return state.targets.get(key)
        chunk = self._chunk(state, key)
        return state.planned[chunk] if 0 <= chunk < len(state.planned) else None

    def undecided(self, req_id: str) -> bool:
        """Whether it is not known yet what the store holds of the request, and may be soon."""
        state = self._states.get(req_id)
        return state is not None and _undecided(state)

    def await_answer(self, req_id: str, spare_seconds: float) -> None:
        """The engine is about to look the request up: let the store's answer come first if it comes at once. Once for
        each request; blocks for `_ANSWER_SECONDS` a step at most, or for as long as the GPU is busy without it."""
        state = self._states.get(req_id)
        if state is None or state.awaited or not _undecided(state):
            return
        state.awaited = True
        self._await(lambda: not _undecided(state), max(spare_seconds, _ANSWER_SECONDS))

    def await_chunks(self, req_id: str, spare_seconds: float) -> bool:
        """The engine is about to look the request up: let what is fetched for it come first if it comes within so many
        seconds. The request is computed in this step then, and not in the next one. Whether there are finished jobs
        that nobody has asked for."""
        state, left_seconds = self._states.get(req_id), spare_seconds - self._waited_seconds
        if state is not None and state.loads and left_seconds > 0:
            if not self._listened:  # once a step: it looks at whatever is under way
                self._step()
            left_bytes = self.row_bytes * sum(len(load.keys) for load in state.loads.values())
            if left_bytes <= left_seconds * self._store_bytes_per_second:
                self._await(lambda: not state.loads or self._gave_up(state), spare_seconds)
        return bool(self._finished)

    def _await(self, done: Callable[[], bool], seconds: float) -> None:
        """Hear what the mover says until that is so, or so many seconds of this step were spent on waiting."""
        begun, before = time.monotonic(), self._waited_seconds
        while not done() and self._waited_seconds < seconds:
            self.link.wait(seconds - self._waited_seconds)
            self._step()
            self._waited_seconds = before + time.monotonic() - begun

    def fetched_tokens(self, req_id: str, first: int, end: int) -> int:
        """How many of the request's tokens from `first` to `end` were fetched for it. What was for another request
        first, this one found in DRAM."""
        state, size = self._states.get(req_id), self._chunk_tokens
        chunks = state.fetched if state is not None else ()
        return sum(max(0, min(end, (chunk + 1) * size) - max(first, chunk * size)) for chunk in chunks)

    def hurry(self, req_id: str) -> None:
        """The engine has a slot for the request, and could begin now."""
        state = self._states.get(req_id)
        if state is None or state.hurried:
            return
        state.hurried = True
        now = time.monotonic()
        if not state.submitted and not state.asked and now > state.until:
            # It queued for longer than a fetch may take, and none was begun, for want of rows: its time begins now.
            state.arrived, state.deadline = now, now + self._deadline_seconds
        if state.loads:
            self._say(Hurry(state.number))

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        state = self._states.get(req_context.req_id)
        if state is None or state.identity is None or self._gave_up(state):
            return LookupResult.MISS
        if _undecided(state):
            return LookupResult.RETRY
        if (
            self._target(state, key) is None
            or not self.link.ready
            or self._suspect
            or state.fetches.get(key, 0) >= FETCHES_PER_CHUNK
        ):
            return LookupResult.MISS
        if not self.has_room:
            # A request that queues, or waits for other chunks anyway, takes its turn; one that could begin does.
            return LookupResult.MISS if state.hurried and not state.loads else LookupResult.RETRY
        self._promised_rows += 1
        return LookupResult.HIT

    @property
    def has_room(self) -> bool:
        """Whether another row may be filled."""
        return self._load_rows + self._promised_rows < self._load_rows_max

    def gave_up(self, req_id: str) -> bool:
        """Whether the request waits for nothing of this tier any more, whatever is still under way for it."""
        state = self._states.get(req_id)
        return state is not None and self._gave_up(state)

    def _gave_up(self, state: _RequestState) -> bool:
        return state.cancelled or state.cut or time.monotonic() > state.until

    def cancel(self, req_id: str) -> None:
        """The request is gone: stop what is fetched for it."""
        state = self._states.get(req_id)
        if state is not None:
            state.cancelled = True
            for load in list(state.loads.values()):
                self._cancel(load)

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.cancel(req_context.req_id)
        state = self._states.pop(req_context.req_id, None)
        if state is not None:
            del self._by_number[state.number]
            if state.tokens_sent or state.hurried:
                self._say(Forget(state.number))
            state.tokens_sent = 0  # what is left over needs them again

    # ---- jobs

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys, rows = list(job_metadata.keys), job_metadata.chunk_ids.tolist()
        state = self._states.get(job_metadata.req_context.req_id)
        if (
            state is None
            or state.identity is None
            or self.link.dead
            or len(keys) > frames.CHUNKS_MAX
            or len(self._outbox) >= _OUTBOX_MAX
        ):
            self._finished.append(JobResult(job_metadata.job_id, False))
            return
        for key in keys:
            state.fetches[key] = state.fetches.get(key, 0) + 1
        due = due_seconds(state.arrived, state.submitted, self.row_bytes)
        state.submitted += len(keys)
        deadline = state.until
        targets = [self._target(state, key) for key in keys]
        names = [_name(key) for key in keys]
        command = Load(job_metadata.job_id, state.number, state.identity, names, rows, targets, deadline, due)
        first = max(0, min(self._chunk(state, key) for key in keys))
        load = _Load(job_metadata.job_id, keys, state, first, deadline, command)
        self._loads[load.job_id] = state.loads[load.job_id] = load
        self._load_rows += len(keys)
        self._outbox.append(load)
        if state.hurried:
            self._say(Hurry(state.number))
        self._flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        context = job_metadata.req_context
        state = self._states.get(context.req_id)
        if state is None or state.identity is None:
            self._stats.increase_counter(_STORED, len(job_metadata.keys), ("dropped",))
            self._finished.append(JobResult(job_metadata.job_id, True))
            return
        # What waits goes first; and the leading chunks are of use without the rest, not the other way round.
        kept = 0 if self._leftovers else self._put_room
        chunks = _rows_of(job_metadata)
        self._leave_over(_Leftover(context, state, [key for key, _ in chunks[kept:]]))
        self._submit_store(job_metadata.job_id, state, chunks[:kept])

    def store_leftovers(self, pin: Callable[[list[OffloadKey], ReqContext], TransferJob | None]) -> None:
        """Store what had no room, as far as there is some now. `pin` makes a job of those keys that are in DRAM still;
        None: none is."""
        while self._leftovers and self._put_room >= min(self._piece_chunks, self._put_rows_max):
            leftover = self._leftovers[0]
            keys = leftover.keys[: self._piece_chunks]
            self._take_over(leftover, len(keys))
            job = pin(keys, leftover.context) if leftover.state.identity is not None else None
            stored = 0 if job is None else len(job.keys)
            if stored < len(keys):
                self._stats.increase_counter(_STORED, len(keys) - stored, ("dropped",))
            if job is not None:
                self._submit_store(job.job_id, leftover.state, _rows_of(job))

    @property
    def _piece_chunks(self) -> int:
        return max(1, min(PUT_CHUNKS, PUT_PIECE_BYTES // max(1, self.row_bytes)))

    @property
    def _put_room(self) -> int:
        """How many more rows may wait for a put."""
        if self.link.gone_seconds > PUT_GONE_SECONDS or len(self._outbox) >= _OUTBOX_MAX:
            return 0
        return max(0, self._put_rows_max - self._put_rows)

    def _leave_over(self, leftover: _Leftover) -> None:
        if not leftover.keys:
            return
        self._leftovers.append(leftover)
        self._leftover_chunks += len(leftover.keys)
        while (excess := self._leftover_chunks - self._leftover_chunks_max) > 0:
            oldest = self._leftovers[0]
            dropped = min(excess, len(oldest.keys))
            self._take_over(oldest, dropped)
            self._stats.increase_counter(_STORED, dropped, ("dropped",))

    def _take_over(self, leftover: _Leftover, count: int) -> None:
        """Take the leading chunks from the leftover that is first in the queue."""
        del leftover.keys[:count]
        self._leftover_chunks -= count
        if not leftover.keys:
            self._leftovers.popleft()

    def _submit_store(self, job_id: JobId, state: _RequestState, kept: list[tuple[OffloadKey, int]]) -> None:
        if not kept or state.identity is None:
            self._finished.append(JobResult(job_id, True))
            return
        keys, rows = [key for key, _ in kept], [row for _, row in kept]
        chunks = [self._chunk(state, key) for key in keys]
        saved = 0.0 if state.plan is None else state.plan.chunk_ms / 1000
        if not self._puts:
            self._put_progress = time.monotonic()
        starts = range(0, len(keys), self._piece_chunks)
        for start in starts:
            part = slice(start, start + self._piece_chunks)
            self._put_number += 1
            names = [_name(key) for key in keys[part]]
            command = Put(self._put_number, state.number, state.identity, names, rows[part], chunks[part], saved)
            self._puts[self._put_number] = put = _Put(job_id, state, command)
            if not self.link.dead:
                self._queue(put)
        self._put_parts[job_id] = len(starts)
        self._put_rows += len(keys)
        self._flush()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._step()
        finished, self._finished = self._finished, []
        return finished

    def on_schedule_end(self, context: object) -> None:
        self._promised_rows = 0  # those that were promoted were submitted just before
        self._waited_seconds = 0.0
        self._listened = False

    def has_pending_work(self) -> bool:
        return bool(self._loads or self._puts or self._finished)

    def wait(self) -> None:
        """With nothing to run and a job under way: until the mover says something, at most for a millisecond."""
        if self._loads or self._puts:
            self.link.wait(_WAIT_SECONDS)

    def drained(self) -> bool:
        """End what is under way, without blocking; True once it has ended. To be called until then. After some seconds
        the mover is killed, and what it had not finished has failed."""
        while self._leftovers:  # their rows are about to go
            self._take_over(self._leftovers[0], len(self._leftovers[0].keys))
        for load in list(self._loads.values()):
            self._cancel(load)
        self._step()
        if not self._loads and not self._puts:
            self._drain_until = 0.0
            return True
        now = time.monotonic()
        self._drain_until = self._drain_until or now + _DRAIN_SECONDS
        if now > self._drain_until:
            for put in self._puts.values():
                put.retried = True
            self.link.kill("it did not finish its jobs in time")
        return False

    def drain_jobs(self) -> None:
        """Blocks until `drained`."""
        while not self.drained():
            self.link.wait(0.01)

    def shutdown(self) -> None:
        self.link.stop(_STOP_SECONDS)
        self._end_all(retry=False)

    # ---- the state machine

    def _step(self) -> None:
        """Take in what the mover said, look after it, and give up what is not worth waiting for."""
        self._listened = True
        for report in self.link.receive():
            match report:
                case Loaded():
                    self._loaded(report)
                case Stored():
                    self._stored(report)
                case Found(request, targets):
                    state = self._by_number.get(request)
                    if state is not None:
                        self._answer(state, list(targets))
        self._watch(time.monotonic())
        if self.link.reap():
            self._end_all(retry=True)
        if self.link.dead:
            self.link.start_when_due()
            if not self.link.dead:
                self._stats.increase_counter(_MOVER_RESTARTS, 1)
                self._say_identified()
                self._put_progress = time.monotonic()
                for put in self._puts.values():
                    self._queue(put)
            elif self.link.gone_seconds > PUT_GONE_SECONDS:
                for put in list(self._puts.values()):
                    self._give_up(put)
        self._flush()
        self._cut()

    def _watch(self, now: float) -> None:
        """End what is past its deadline, and a mover that does not."""
        if not self._loads and not self._puts:
            self._suspect = False
            return
        overdue = [load for load in self._loads.values() if now > load.deadline]
        for load in overdue:
            load.overdue = load.overdue or not load.cancelled
            self._cancel(load)
        sent_until = [load.deadline for load in self._loads.values() if load.sent]
        # Loads share threads and connections, so that one may end with another's deadline; none is added meanwhile.
        self._suspect = any(load.sent and now > load.deadline + HUNG_SECONDS for load in overdue)
        if sent_until and now > max(sent_until) + HUNG_SECONDS:
            self.link.kill("a load is not answered past its deadline")
        if not self.link.ready:
            self._put_progress = now  # how long a mover may take to start is the link's business
        if self._puts and now > self._put_progress + PUT_HUNG_SECONDS:
            self.link.kill("a put is not answered")

    def _say(self, command: frames.Command) -> bool:
        """Queue a command; False if there is no room or nobody to hear it."""
        if self.link.dead or len(self._outbox) >= _OUTBOX_MAX:
            return False
        self._outbox.append(command)
        self._flush()
        return True

    def _say_identified(self) -> None:
        """Not kept until the mover is ready, of which an idle engine does not hear: routers plan for no worker whose
        identity they do not know."""
        self.link.send(self._identified)

    def _flush(self) -> None:
        while self._outbox and self.link.ready:
            one = self._outbox[0]
            if isinstance(one, _Load | _Put):
                if not one.done:
                    if not self.link.send(one.command):
                        return
                    if isinstance(one, _Load):
                        one.sent = True
            elif not self.link.send(one):
                return
            self._outbox.popleft()

    def _queue(self, put: _Put) -> None:
        """Have a put done, its request's tokens first, of which the chunks' router hashes are made."""
        state = put.state
        self._send_tokens(state, max(put.command.chunks, default=-1))
        self._outbox.append(put)
        if state.number not in self._by_number and self._say(Forget(state.number)):
            state.tokens_sent = 0

    def _end_all(self, *, retry: bool) -> None:
        """The mover is no more: what it had not loaded is missing; what it had not stored, the next one may try."""
        self._outbox.clear()
        for load in list(self._loads.values()):
            self._finish_load(load, [Outcome.UNREACHABLE] * len(load.keys))
        for put in list(self._puts.values()):
            put.state.tokens_sent = 0
            if retry and not put.retried and self.link.gone_seconds <= PUT_GONE_SECONDS:
                put.retried = True
            else:
                self._give_up(put)
        for state in self._states.values():
            state.tokens_sent = 0
            if _undecided(state):
                self._answer(state, [])

    def _answer(self, state: _RequestState, targets: list[str | None]) -> None:
        if not state.answered:
            state.targets = dict(
                zip(state.asked_keys, targets, strict=False)
            )  # none of those after an answer cut short
            state.deadline += self._deadline_seconds
            state.answered = True

    def _cancel(self, load: _Load) -> None:
        if not load.sent:
            load.cancelled = True
            self._finish_load(load, [Outcome.LATE] * len(load.keys))
        elif not load.cancelled:
            load.cancelled = self._say(Cancel(load.job_id))

    def _loaded(self, report: Loaded) -> None:
        self._store_bytes_per_second = report.store_bytes_per_second
        for reason, values in report.rejected.items():
            self._stats.increase_counter(_REJECTED, values, (reason,))
        load = self._loads.get(report.job)
        if load is None or len(report.outcomes) != len(load.keys):
            self.link.kill(f"protocol error: unknown load {report.job}, or a wrong number of outcomes")
            return
        self._finish_load(load, [Outcome(one) for one in report.outcomes])

    def _finish_load(self, load: _Load, outcomes: list[Outcome]) -> None:
        """Nobody writes to the load's rows any more."""
        failed = frozenset(key for key, outcome in zip(load.keys, outcomes, strict=True) if outcome is not Outcome.HIT)
        state = load.state
        for key in load.keys:
            if key in failed:
                state.fetches[key] = FETCHES_PER_CHUNK  # not again for this request
            elif state.request is not None and (end := state.context.get_offload_key_position(key)):
                state.fetched.add((end - 1) // self._chunk_tokens)
                self.on_load(state.request, key, end)
        for outcome, chunks in Counter(outcomes).items():
            self._stats.increase_counter(_FETCHED, chunks, (outcome.name.lower(),))
        if load.overdue or not load.cancelled:
            self._stats.increase_counter(_TIMED_OUT, outcomes.count(Outcome.LATE))
        self._stats.increase_counter(_FETCHED_BYTES, (len(load.keys) - len(failed)) * self.row_bytes)
        load.done = True
        del self._loads[load.job_id], state.loads[load.job_id]
        self._load_rows -= len(load.keys)
        arrived = [key for key in load.keys if key not in failed]
        self._finished.append(JobResult(load.job_id, not failed, arrived))

    def _give_up(self, put: _Put) -> None:
        self._finish_put(put, [Outcome.UNREACHABLE.name.lower()] * len(put.command.rows))

    def _stored(self, report: Stored) -> None:
        put = self._puts.get(report.job)
        if put is None:
            self.link.kill(f"protocol error: unknown put {report.job}")
            return
        self._finish_put(put, report.outcomes)

    def _finish_put(self, put: _Put, outcomes: list[str]) -> None:
        for name, chunks in Counter(outcomes).items():
            self._stats.increase_counter(_STORED, chunks, (name,))
        self._stats.increase_counter(_STORED_BYTES, outcomes.count("stored") * self.row_bytes)
        put.done = True
        self._put_progress = time.monotonic()
        del self._puts[put.command.job]
        self._put_rows -= len(put.command.rows)
        self._put_parts[put.job_id] -= 1
        if not self._put_parts[put.job_id]:
            del self._put_parts[put.job_id]
            self._finished.append(JobResult(put.job_id, True))

    def _send_tokens(self, state: _RequestState, chunk: int) -> None:
        """Let the mover know the request's tokens up to the end of the chunk, which its router hash is made of."""
        request = state.request
        if request is None or not state.plain:
            return
        end = (chunk + 1) * self._blocks_per_chunk * self._block_tokens
        salt = (request.cache_salt or "").removeprefix("dynamo-cache-salt:") or None
        lora = request.lora_request.name if request.lora_request else None
        while state.tokens_sent < end:
            first = state.tokens_sent
            tokens = array("I", request.all_token_ids[first : min(end, first + frames.TOKENS_MAX)])
            if not tokens or not self._say(Tokens(state.number, first, tokens.tobytes(), lora, salt)):
                return
            state.tokens_sent += len(tokens)

    # ---- load or recompute

    def _cut(self) -> None:
        """Stop fetching, from a chunk boundary on, what the engine has sooner by computing it."""
        if not self._loads:
            return
        now, ahead_bytes = time.monotonic(), 0
        hurried = [state for state in self._states.values() if state.hurried and state.loads]
        for state in hurried:
            loads = sorted(state.loads.values(), key=lambda load: load.first_chunk)
            left = sum(len(load.keys) for load in loads)
            worth = left
            if not self._gave_up(state):
                worth = worth_waiting_for(
                    left,
                    chunk_bytes=self.row_bytes,
                    ahead_bytes=ahead_bytes,
                    bytes_per_second=self._store_bytes_per_second,
                    prefill=self.prefill,
                    chunk_tokens=self._blocks_per_chunk * self._block_tokens,
                    context_tokens=loads[0].first_chunk * self._blocks_per_chunk * self._block_tokens,
                    seconds_left=loads[0].deadline - now,
                    prefill_share=self.prefill_share,
                )
            kept = 0
            for load in loads:
                # What began to come in is let through up to the end of its piece, a boundary in any case.
                if kept + len(load.keys) > worth and not load.cancelled:
                    self._cancel(load)
                    self._stats.increase_counter(_ABANDONED, len(load.keys))
                    state.cut = state.cut or worth == 0
                kept += len(load.keys)
            ahead_bytes += min(kept, worth) * self.row_bytes

    # ---- what others see

    def tell_pace(self, dram_bytes_per_second: float, queue: int, resident: tuple[int, int, int, int]) -> None:
        """For the heartbeat, about once a second. `queue` counts requests that the engine has not begun with,
        `resident` blocks in HBM and chunks in DRAM that can be hit, each with the room for them."""
        bytes_per_token = self.row_bytes // (self._blocks_per_chunk * self._block_tokens)
        in_flight = self._load_rows * self.row_bytes
        self._say_identified()  # again, in case that there was no room for it
        rates = (*self.prefill, self.prefill_share, dram_bytes_per_second)
        self._say(Pace(*rates, bytes_per_token, in_flight, queue, *resident))

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, object]) -> dict[str, OffloadingMetricMetadata]:
        return {
            _FETCHED: OffloadingCounterMetadata(
                "Chunks requested from the kvtier store, by outcome. A miss is a false hit: the plan or the store "
                "listed the chunk, the target did not have it",
                ("outcome",),
            ),
            _STORED: OffloadingCounterMetadata(
                "Chunks offered to the kvtier store, by outcome. known: stored already (deduplicated). dropped: the "
                "write queue was full, and the chunk was evicted from DRAM before there was room",
                ("outcome",),
            ),
            _FETCHED_BYTES: OffloadingCounterMetadata("Bytes loaded from the kvtier store into DRAM"),
            _STORED_BYTES: OffloadingCounterMetadata("Bytes written from DRAM to the kvtier store"),
            _ABANDONED: OffloadingCounterMetadata(
                "Chunks whose fetch the worker cancelled: a prefill is estimated faster, or the deadline cannot be met"
            ),
            _TIMED_OUT: OffloadingCounterMetadata("Chunks whose fetch timed out: it was in flight at its deadline"),
            _IDENTITY: OffloadingCounterMetadata(
                "Checks of the weights and adapters that ranks compute with, by result. After changed, failed and "
                "adapter_changed the DRAM tier is empty; after failed the tier is off",
                ("outcome",),
            ),
            _REJECTED: OffloadingCounterMetadata(
                "Values from the kvtier store whose seal did not hold, by reason: planted, altered or damaged. They "
                "were not used",
                ("reason",),
            ),
            _MOVER_RESTARTS: OffloadingCounterMetadata("Restarts of the mover process: look at the worker's log"),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Recency is the target's own business."""


def _zeros() -> OffloadingConnectorStats:
    """Every series from the beginning: Prometheus sees no growth in one that appears with its first count."""
    stats = OffloadingConnectorStats()
    series = ((_FETCHED, _FETCHED_OUTCOMES), (_STORED, _STORED_OUTCOMES), (_IDENTITY, _IDENTITY_OUTCOMES))
    for name, outcomes in series:
        for outcome in outcomes:
            stats.increase_counter(name, 0, (outcome,))
    for reason in Reason:
        stats.increase_counter(_REJECTED, 0, (str(reason),))
    for name in (_FETCHED_BYTES, _STORED_BYTES, _ABANDONED, _TIMED_OUT, _MOVER_RESTARTS):
        stats.increase_counter(name, 0)
    return stats


def _name(key: OffloadKey) -> frames.Name:
    return get_offload_block_hash(key), get_offload_group_idx(key)


def _rows_of(job: TransferJob) -> list[tuple[OffloadKey, int]]:
    return list(zip(job.keys, job.chunk_ids.tolist(), strict=True))


def _undecided(state: _RequestState) -> bool:
    return state.asked and not state.answered and time.monotonic() <= state.deadline
