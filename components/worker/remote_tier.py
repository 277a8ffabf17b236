"""The store as a tier of the engine: lookups, fetches, timeouts, and the choice to load or recompute. Writes are in
puts.py.

A state machine on the scheduler's thread. It takes no lock. It blocks only in `await_*` and `wait`, up to a given time.
All network I/O runs in the mover, a process of its own (mover/), with deadlines. Chunks that fail, are late or do not
verify are reported as missing, and the engine computes them.

The invariant: a load is reported as finished only when no process can write to its rows any more. Either the mover has
answered, or the mover is dead and reaped. A request does not wait for that: past its deadline, `gave_up` makes the
manager skip pending chunks.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from components.pricing.patience import due_seconds, worth_waiting_for
from components.pricing.prefill import Prefill
from components.worker import counters
from components.worker.compat import (
    JobId,
    JobResult,
    Locality,
    LookupResult,
    Medium,
    OffloadingConnectorStats,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    Request,
    RequestOffloadingContext,
    SecondaryTierManager,
    TransferJob,
    region_fd,
)
from components.worker.mover import frames
from components.worker.mover.link import MoverLink
from components.worker.puts import Pin, Puts
from components.worker.tier_request import Load, TierRequest, names
from kvstore import credentials
from kvstore.bus.plan import read_plan
from kvstore.keys import fingerprint
from kvstore.net import tls
from kvstore.net.wire import Outcome
from kvstore.seal import open_seal

logger = logging.getLogger(__name__)

TIER_TYPE = "kvtier"
# A chunk that DRAM evicted before its request was scheduled is fetched once more, but not again. Under such pressure
# the request would otherwise wait without end.
FETCHES_PER_CHUNK = 2
# A mover that has not answered a load this long after its deadline hangs. The request does not wait for it, but the
# rows do.
HUNG_SECONDS = 1.0
# Fetches are split into pieces of this size: enough to keep all connections busy, small enough to interleave requests.
JOB_BYTES = 8 << 20
JOB_CHUNKS = 64
# Share of all rows. Rows that are being filled cannot be evicted. The limit also bounds the bytes in flight.
LOAD_SHARE = 0.25
_STOP_SECONDS = 2.0
_DRAIN_SECONDS = 5.0
_WAIT_SECONDS = 0.001
# The store answers a lookup in some 0.6 ms (a target on the same host, UNIX socket). A request that does not wait for
# the answer loses a step, tens of milliseconds. A slower target costs the GPU at most this.
_ANSWER_SECONDS = 0.002

# dynamo.vllm passes its instance id to the engine's process in this variable.
_DYNAMO_WORKER_ID = "DYN_FPM_WORKER_ID"


def blocks_per_chunk(spec: OffloadingSpec) -> int:
    """How many hashed blocks, the router's unit, make a chunk of the first KV group."""
    return int(spec.tokens_per_block[0] * spec.blocks_per_chunk // spec.tokens_per_hash)


class RemoteTier(SecondaryTierManager):
    """The kvtier store as a secondary tier. vLLM constructs it from the `secondary_tiers` entry (frames.Settings). See
    SecondaryTierManager for the contract of each method. `on_load` is called for each fetched chunk, with the token at
    its end. `prefill` is this engine's prefill model, as far as it is fitted. `prefill_share` is the share of its time
    that the engine spends on prompts.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        backpressure_detector: object = None,
        **entry: Any,
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        settings = frames.settings_of(entry)
        # Fail at start: with unreadable files the mover would exit, and the engine would run without the store.
        credentials.load(Path(settings.credential_file) if settings.credential_file else None)
        open_seal(settings.seal_key, settings.seal)
        tls.open_client(settings.tls, settings.carrier)
        rows, row_bytes = primary_kv_view.shape or (0, 0)
        self.row_bytes = row_bytes
        self._block_tokens = offloading_spec.tokens_per_hash
        self._blocks_per_chunk = blocks_per_chunk(offloading_spec)
        self._chunk_tokens = self._block_tokens * self._blocks_per_chunk
        # A plan lists the chunks of one KV group. With several groups, the store is asked.
        self._plans = len(offloading_spec.config.groups) == 1
        self._deadline_seconds = settings.deadline_ms / 1000
        self._lookup_seconds = settings.lookup_ms / 1000
        self._load_rows_max = max(1, int(LOAD_SHARE * rows))
        self._load_rows = 0
        self._promised_rows = 0  # rows of hits that are not submitted yet
        self._waited_seconds = 0.0  # in this step
        self._listened = False  # in this step
        self._requests: dict[str, TierRequest] = {}
        self._by_number: dict[int, TierRequest] = {}
        self._number = 0
        self._loads: dict[JobId, Load] = {}
        self._drain_until = 0.0
        self._suspect = False
        self._finished: list[JobResult] = []
        self._counters = counters.Counters()
        self._store_bytes_per_second = 0.0
        self._identified = frames.Identified(0, {})
        self.on_load: Callable[[Request, OffloadKey, int], None] = lambda request, key, end: None
        self.prefill = Prefill()
        self.prefill_share = 0.0
        self.link = MoverLink(
            frames.Setup(
                settings,
                region_fd=region_fd(offloading_spec),
                region_bytes=rows * row_bytes,
                row_bytes=row_bytes,
                block_tokens=self._block_tokens,
                blocks_per_chunk=self._blocks_per_chunk,
                worker=os.environ.get(_DYNAMO_WORKER_ID, ""),
            )
        )
        self.puts = Puts(self.link, self._counters, self._finished, rows=rows, row_bytes=row_bytes)

    @property
    def job_chunks(self) -> int:
        """How many chunks a load should have at most."""
        return max(1, min(JOB_CHUNKS, JOB_BYTES // max(1, self.row_bytes)))

    # ---- requests

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._step()  # an idle engine has not read its mover's reports
        plan, now = read_plan(req_context.kv_transfer_params) if self._plans else None, time.monotonic()
        self._number += 1
        deadline = now + self._deadline_seconds
        request = TierRequest(self._number, req_context, plan, now, deadline, self._chunk_tokens)
        self._requests[req_context.req_id] = self._by_number[self._number] = request
        # This worker should hold a chunk that no target holds. It was lost in an outage, or evicted while only HBM
        # served it. Offer all of the request again, hits included, to close the gap.
        holes = plan is not None and any(run.target is None for run in plan.runs)
        return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL if holes else OffloadPolicy.CHUNK_LEVEL)

    def arrived(self, request: Request) -> None:
        """Add the request whose context vLLM passed just before."""
        self._requests[request.request_id].engine_request = request

    def identify(self, req_id: str, identity: bytes) -> bool:
        """Set the identity of the request's KV. Returns whether it is new."""
        news = self._requests[req_id].identity != identity
        if news:
            self.forget([req_id])
            self._requests[req_id].identity = identity
        return news

    def forget(self, req_ids: Collection[str]) -> None:
        """The identity of these requests has changed. Their fetches end as misses, nothing already computed is stored,
        and they start as new."""
        for req_id in req_ids:
            request = self._requests.get(req_id)
            if request is not None and request.identity is not None:
                request.identity = None
                self.on_request_finished(request.context)
                self.on_new_request(request.context)
                self._requests[req_id].engine_request = request.engine_request

    def announce(self, base: bytes | None, adapters: dict[str, bytes]) -> None:
        """Tell routers which identity this worker's chunks have, and that of each adapter, by its name."""
        identified = frames.Identified(
            fingerprint(base) if base is not None else 0, {name: fingerprint(one) for name, one in adapters.items()}
        )
        if identified != self._identified:
            self._identified = identified
            self._say_identified()

    def note_identity(self, outcome: str) -> None:
        self._counters.add(counters.IDENTITY, 1, outcome)

    def ask(self, req_id: str, keys: Sequence[OffloadKey]) -> None:
        """For a request without a plan: ask the store which of its leading chunks it holds."""
        request = self._requests.get(req_id)
        if request is None or request.plan is not None or request.asked is not None or request.identity is None:
            return
        request.asked = list(keys[: frames.CHUNKS_MAX])
        request.deadline = min(request.deadline, time.monotonic() + self._lookup_seconds)
        question = frames.Ask(request.number, request.identity, names(request.asked), request.deadline)
        if not keys or not self.link.ready or not self.link.say(question):
            request.targets = {}

    def undecided(self, req_id: str) -> bool:
        """Whether the store's answer for the request is pending."""
        request = self._requests.get(req_id)
        return request is not None and request.undecided

    def await_answer(self, req_id: str, spare_seconds: float) -> None:
        """The engine is about to look the request up: wait shortly for the store's answer, once for each request.
        Blocks for at most `_ANSWER_SECONDS` a step, or for as long as the GPU is busy with an earlier step."""
        request = self._requests.get(req_id)
        if request is None or request.awaited or not request.undecided:
            return
        request.awaited = True
        self._await(lambda: not request.undecided, max(spare_seconds, _ANSWER_SECONDS))

    def await_chunks(self, req_id: str, spare_seconds: float) -> bool:
        """The engine is about to look the request up: wait for its fetch, if it will end within `spare_seconds`. Then
        the request is computed in this step instead of the next one. Returns whether there are finished jobs to
        collect."""
        request, left_seconds = self._requests.get(req_id), spare_seconds - self._waited_seconds
        if request is not None and request.loads and left_seconds > 0:
            if not self._listened:  # once a step, for all requests
                self._step()
            left_bytes = self.row_bytes * sum(len(load.keys) for load in request.loads.values())
            if left_bytes <= left_seconds * self._store_bytes_per_second:
                self._await(lambda: not request.loads or request.gave_up, spare_seconds)
        return bool(self._finished)

    def _await(self, done: Callable[[], bool], seconds: float) -> None:
        """Process the mover's reports until `done`, or until this step has spent `seconds` on waiting."""
        begun, before = time.monotonic(), self._waited_seconds
        while not done() and self._waited_seconds < seconds:
            self.link.wait(seconds - self._waited_seconds)
            self._step()
            self._waited_seconds = before + time.monotonic() - begun

    def fetched_tokens(self, req_id: str, first: int, end: int) -> int:
        """How many of the request's tokens from `first` to `end` were fetched for it. Tokens that were fetched for
        another request count as found in DRAM."""
        request, size = self._requests.get(req_id), self._chunk_tokens
        chunks = request.fetched if request is not None else ()
        return sum(max(0, min(end, (chunk + 1) * size) - max(first, chunk * size)) for chunk in chunks)

    def hurry(self, req_id: str) -> None:
        """Prioritize the request: the engine has a slot for it and could begin now."""
        request = self._requests.get(req_id)
        if request is None or request.hurried:
            return
        request.hurried = True
        now = time.monotonic()
        if not request.submitted and request.asked is None and now > request.until:
            # It queued for longer than a fetch may take, and for lack of rows none began. Its deadline counts from now.
            request.arrived, request.deadline = now, now + self._deadline_seconds
        if request.loads:
            self.link.say(frames.Hurry(request.number))

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        request = self._requests.get(req_context.req_id)
        if request is None or request.identity is None or request.gave_up:
            return LookupResult.MISS
        if request.undecided:
            return LookupResult.RETRY
        if (
            request.target(key) is None
            or not self.link.ready
            or self._suspect
            or request.fetches.get(key, 0) >= FETCHES_PER_CHUNK
        ):
            return LookupResult.MISS
        if not self.has_room:
            # A request that queues, or waits for other chunks anyway, waits for rows. A request that could begin does
            # not.
            return LookupResult.MISS if request.hurried and not request.loads else LookupResult.RETRY
        self._promised_rows += 1
        return LookupResult.HIT

    @property
    def has_room(self) -> bool:
        """Whether another row may be filled."""
        return self._load_rows + self._promised_rows < self._load_rows_max

    def gave_up(self, req_id: str) -> bool:
        """Whether the request no longer waits for this tier, even if fetches are still in flight."""
        request = self._requests.get(req_id)
        return request is not None and request.gave_up

    def cancel(self, req_id: str) -> None:
        """The request is gone: cancel its fetches."""
        request = self._requests.get(req_id)
        if request is not None:
            request.abandoned = True
            for load in list(request.loads.values()):
                self._cancel(load)

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.cancel(req_context.req_id)
        request = self._requests.pop(req_context.req_id, None)
        if request is not None:
            del self._by_number[request.number]
            if request.tokens_sent or request.hurried:
                self.link.say(frames.Forget(request.number))
            request.tokens_sent = 0  # leftovers need them again
            request.gone = True

    # ---- jobs

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys, job_id = list(job_metadata.keys), job_metadata.job_id
        request = self._requests.get(job_metadata.req_context.req_id)
        if (
            request is None
            or request.identity is None
            or self.link.dead
            or len(keys) > frames.CHUNKS_MAX
            or self.link.full
        ):
            self._finished.append(JobResult(job_id, False))
            return
        for key in keys:
            request.fetches[key] = request.fetches.get(key, 0) + 1
        due = due_seconds(request.arrived, request.submitted, self.row_bytes)
        request.submitted += len(keys)
        command = frames.Load(
            job_id,
            request.number,
            request.identity,
            names(keys),
            job_metadata.chunk_ids.tolist(),
            [request.target(key) for key in keys],
            request.until,
            due,
        )
        first_chunk = max(0, min(request.chunk(key) for key in keys))
        self._loads[job_id] = request.loads[job_id] = load = Load(command, keys, request, first_chunk)
        self._load_rows += len(keys)
        self.link.add(load)
        if request.hurried:
            self.link.say(frames.Hurry(request.number))
        self.link.flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        self.puts.submit(job_metadata, self._requests.get(job_metadata.req_context.req_id))

    def store_leftovers(self, pin: Pin) -> None:
        """Put as many leftovers as have room now. Called after `get_finished_jobs`."""
        self.puts.submit_leftovers(pin)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._step()
        finished = self._finished.copy()
        self._finished.clear()
        return finished

    def on_schedule_end(self, context: object) -> None:
        self._promised_rows = 0  # promotions were submitted just before
        self._waited_seconds = 0.0
        self._listened = False

    def has_pending_work(self) -> bool:
        return bool(self._loads or self.puts.pending or self._finished)

    def wait(self) -> None:
        """For an engine with nothing to run and a job in flight: wait for the mover's next report, at most a
        millisecond."""
        if self._loads or self.puts.pending:
            self.link.wait(_WAIT_SECONDS)

    def drained(self) -> bool:
        """End all transfers in flight without blocking. To be called until it returns True. After some seconds the
        mover is killed, and unfinished transfers fail."""
        self.puts.forget_leftovers()
        for load in list(self._loads.values()):
            self._cancel(load)
        self._step()
        if not self._loads and not self.puts.pending:
            self._drain_until = 0.0
            return True
        now = time.monotonic()
        self._drain_until = self._drain_until or now + _DRAIN_SECONDS
        if now > self._drain_until:
            self.puts.retry_none()
            self.link.kill("it did not finish its jobs in time")
        return False

    def drain_jobs(self) -> None:
        """Blocks until `drained`."""
        while not self.drained():
            self.link.wait(0.01)

    def shutdown(self) -> None:
        self.link.stop(_STOP_SECONDS)
        self._end_all()

    # ---- the state machine

    def _step(self) -> None:
        """Process the mover's reports, watch the mover, and cancel fetches that are not worth waiting for."""
        self._listened = True
        for report in self.link.receive():
            match report:
                case frames.Loaded():
                    self._loaded(report)
                case frames.Stored():
                    self.puts.stored(report)
                case frames.Found(number, targets):
                    if (request := self._by_number.get(number)) is not None:
                        request.answer(targets, self._deadline_seconds)
        self._watch(time.monotonic())
        if self.link.reap():
            self._end_all()
        if self.link.dead:
            self.link.start_when_due()
            if not self.link.dead:
                self._counters.add(counters.MOVER_RESTARTS, 1)
                self._say_identified()
                self.puts.mover_started()
            else:
                self.puts.wait_for_mover()
        self.link.flush()
        self._cut()

    def _watch(self, now: float) -> None:
        """Time out overdue loads, and kill a mover that hangs."""
        if not self._loads and not self.puts.pending:
            self._suspect = False
            return
        overdue = [load for load in self._loads.values() if now > load.command.deadline]
        for load in overdue:
            load.overdue = load.overdue or not load.cancelled
            self._cancel(load)
        sent_until = [load.command.deadline for load in self._loads.values() if load.sent]
        # Loads share threads and connections, so a load may end only at another's deadline. Meanwhile none is added.
        self._suspect = any(load.sent and now > load.command.deadline + HUNG_SECONDS for load in overdue)
        if sent_until and now > max(sent_until) + HUNG_SECONDS:
            self.link.kill("a load is not answered past its deadline")
        self.puts.watch(now)

    def _say_identified(self) -> None:
        """Send the identity at once, even before the mover is ready, since an idle engine does not notice that. Routers
        plan only for workers whose identity they know."""
        self.link.send(self._identified)

    def _end_all(self) -> None:
        """The mover is dead: its loads end as misses, its puts may be retried by the next mover."""
        for load in list(self._loads.values()):
            self._finish_load(load, [Outcome.UNREACHABLE] * len(load.keys))
        self.puts.mover_ended()
        for request in self._requests.values():
            request.tokens_sent = 0
            if request.undecided:
                request.answer([], self._deadline_seconds)

    def _cancel(self, load: Load) -> None:
        if not load.sent:
            load.cancelled = True
            self._finish_load(load, [Outcome.LATE] * len(load.keys))
        elif not load.cancelled:
            load.cancelled = self.link.say(frames.Cancel(load.command.job))

    def _loaded(self, report: frames.Loaded) -> None:
        self._store_bytes_per_second = report.store_bytes_per_second
        for reason, values in report.rejected.items():
            self._counters.add(counters.REJECTED, values, reason)
        load = self._loads.get(report.job)
        if load is None or len(report.outcomes) != len(load.keys):
            self.link.kill(f"protocol error: unknown load {report.job}, or a wrong number of outcomes")
            return
        self._finish_load(load, [Outcome(one) for one in report.outcomes])

    def _finish_load(self, load: Load, outcomes: list[Outcome]) -> None:
        """Precondition: no process writes to the load's rows any more."""
        failed = frozenset(key for key, outcome in zip(load.keys, outcomes, strict=True) if outcome is not Outcome.HIT)
        request = load.request
        for key in load.keys:
            if key in failed:
                request.fetches[key] = FETCHES_PER_CHUNK  # no retry for this request
            elif request.engine_request is not None and (end := request.context.get_offload_key_position(key)):
                request.fetched.add((end - 1) // self._chunk_tokens)
                self.on_load(request.engine_request, key, end)
        arrived = [key for key in load.keys if key not in failed]
        for outcome, chunks in Counter(outcomes).items():
            self._counters.add(counters.FETCHED, chunks, outcome.name.lower())
        if load.overdue or not load.cancelled:
            self._counters.add(counters.TIMED_OUT, outcomes.count(Outcome.LATE))
        self._counters.add(counters.FETCHED_BYTES, len(arrived) * self.row_bytes)
        load.done = True
        del self._loads[load.command.job], request.loads[load.command.job]
        self._load_rows -= len(load.keys)
        self._finished.append(JobResult(load.command.job, not failed, arrived))

    # ---- load or recompute

    def _cut(self) -> None:
        """Cancel fetches, from a chunk boundary on, of chunks that the engine computes sooner."""
        if not self._loads:
            return
        now, ahead_bytes = time.monotonic(), 0
        for request in [one for one in self._requests.values() if one.hurried and one.loads]:
            loads = sorted(request.loads.values(), key=lambda load: load.first_chunk)
            left = sum(len(load.keys) for load in loads)
            worth = left
            if not request.gave_up:
                worth = worth_waiting_for(
                    left,
                    chunk_bytes=self.row_bytes,
                    ahead_bytes=ahead_bytes,
                    bytes_per_second=self._store_bytes_per_second,
                    prefill=self.prefill,
                    chunk_tokens=self._chunk_tokens,
                    context_tokens=loads[0].first_chunk * self._chunk_tokens,
                    seconds_left=loads[0].command.deadline - now,
                    prefill_share=self.prefill_share,
                )
            kept = 0
            for load in loads:
                # A piece whose first bytes have arrived is fetched to its end, which is a chunk boundary, too.
                if kept + len(load.keys) > worth and not load.cancelled:
                    self._cancel(load)
                    self._counters.add(counters.ABANDONED, len(load.keys))
                    request.abandoned = request.abandoned or worth == 0
                kept += len(load.keys)
            ahead_bytes += min(kept, worth) * self.row_bytes

    # ---- what others see

    def tell_pace(self, dram_bytes_per_second: float, queue: int, resident: tuple[int, int, int, int]) -> None:
        """Send statistics for the heartbeat, about once a second. `queue` counts requests that have not started.
        `resident` has cached blocks in HBM and cached chunks in DRAM, each with the capacity."""
        bytes_per_token = self.row_bytes // self._chunk_tokens
        in_flight = self._load_rows * self.row_bytes
        self._say_identified()  # again, in case the command queue was full
        rates = (*self.prefill, self.prefill_share, dram_bytes_per_second)
        self.link.say(frames.Pace(*rates, bytes_per_token, in_flight, queue, *resident))

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, object]) -> dict[str, OffloadingMetricMetadata]:
        return counters.DEFINITIONS

    def get_stats(self) -> OffloadingConnectorStats | None:
        return self._counters.take()
