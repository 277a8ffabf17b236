"""The store as a tier of the engine: lookups, fetches, timeouts, and load or recompute. Stores are in puts.py.

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
# A chunk that was fetched and pushed out of DRAM again before its request was scheduled is fetched once more, not more
# often: under such pressure the request would wait for ever.
FETCHES_PER_CHUNK = 2
# A load that the mover has not answered so long after its deadline is in the hands of a mover that hangs. A request
# does not wait for it; its rows do.
HUNG_SECONDS = 1.0
# Pieces of this size keep every connection busy and let another request's first chunks in between.
JOB_BYTES = 8 << 20
JOB_CHUNKS = 64
# Of all rows. Those that are being filled cannot be evicted; the bound on rows is one on bytes in flight, too.
LOAD_SHARE = 0.25
_STOP_SECONDS = 2.0
_DRAIN_SECONDS = 5.0
_WAIT_SECONDS = 0.001
# What the store holds is known some 0.6 ms after it was asked (a target on the same host, UNIX socket); a request that
# does not wait for that loses a step, tens of milliseconds. A target that is slower costs the GPU no more than this.
_ANSWER_SECONDS = 0.002

# dynamo.vllm leaves its instance id here for the engine's process.
_DYNAMO_WORKER_ID = "DYN_FPM_WORKER_ID"


def blocks_per_chunk(spec: OffloadingSpec) -> int:
    """How many hashed blocks, which are what a router counts in, make a chunk of the first group."""
    return int(spec.tokens_per_block[0] * spec.blocks_per_chunk // spec.tokens_per_hash)


class RemoteTier(SecondaryTierManager):
    """The kvtier store as a secondary tier. vLLM makes it from the `secondary_tiers` entry (frames.Settings); see
    SecondaryTierManager for the contract of each method. `on_load` is called for each fetched chunk, with the token
    that it ends at; `prefill` is what computing costs here, as far as it is known, and `prefill_share` how much of its
    time the engine spends on prompts.
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
        # Files that cannot be read would end the mover, and the engine would go on without the store.
        credentials.load(Path(settings.credential_file) if settings.credential_file else None)
        open_seal(settings.seal_key, settings.seal)
        tls.open_client(settings.tls, settings.carrier)
        rows, row_bytes = primary_kv_view.shape or (0, 0)
        self.row_bytes = row_bytes
        self._block_tokens = offloading_spec.tokens_per_hash
        self._blocks_per_chunk = blocks_per_chunk(offloading_spec)
        self._chunk_tokens = self._block_tokens * self._blocks_per_chunk
        # A plan knows the chunks of one group. Where there are more, the store itself is asked.
        self._plans = len(offloading_spec.config.groups) == 1
        self._deadline_seconds = settings.deadline_ms / 1000
        self._lookup_seconds = settings.lookup_ms / 1000
        self._load_rows_max = max(1, int(LOAD_SHARE * rows))
        self._load_rows = 0
        self._promised_rows = 0  # looked up as there, not submitted yet
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
        self._step()  # an engine that was idle has not listened to its mover
        plan, now = read_plan(req_context.kv_transfer_params) if self._plans else None, time.monotonic()
        self._number += 1
        deadline = now + self._deadline_seconds
        request = TierRequest(self._number, req_context, plan, now, deadline, self._chunk_tokens)
        self._requests[req_context.req_id] = self._by_number[self._number] = request
        # A chunk that this worker should hold and no target does was lost to an outage, or evicted while it was read
        # from HBM alone: offer all of the request again, hits included, and the store is whole again.
        holes = plan is not None and any(run.target is None for run in plan.runs)
        return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL if holes else OffloadPolicy.CHUNK_LEVEL)

    def arrived(self, request: Request) -> None:
        """The request whose context came just before."""
        self._requests[request.request_id].engine_request = request

    def identify(self, req_id: str, identity: bytes) -> bool:
        """The request's KV is computed with this. Whether that is news."""
        news = self._requests[req_id].identity != identity
        if news:
            self.forget([req_id])
            self._requests[req_id].identity = identity
        return news

    def forget(self, req_ids: Collection[str]) -> None:
        """What these requests' KV is computed with has changed: what is under way for them ends as if it were missing,
        nothing that was computed is stored, and they are as new."""
        for req_id in req_ids:
            request = self._requests.get(req_id)
            if request is not None and request.identity is not None:
                request.identity = None
                self.on_request_finished(request.context)
                self.on_new_request(request.context)
                self._requests[req_id].engine_request = request.engine_request

    def announce(self, base: bytes | None, adapters: dict[str, bytes]) -> None:
        """For routers: which chunks this worker can use, and those of requests with an adapter by its name."""
        identified = frames.Identified(
            fingerprint(base) if base is not None else 0, {name: fingerprint(one) for name, one in adapters.items()}
        )
        if identified != self._identified:
            self._identified = identified
            self._say_identified()

    def note_identity(self, outcome: str) -> None:
        self._counters.add(counters.IDENTITY, 1, outcome)

    def ask(self, req_id: str, keys: Sequence[OffloadKey]) -> None:
        """For a request without a plan: find out which of its leading chunks, in order, the store holds."""
        request = self._requests.get(req_id)
        if request is None or request.plan is not None or request.asked is not None or request.identity is None:
            return
        request.asked = list(keys[: frames.CHUNKS_MAX])
        request.deadline = min(request.deadline, time.monotonic() + self._lookup_seconds)
        question = frames.Ask(request.number, request.identity, names(request.asked), request.deadline)
        if not keys or not self.link.ready or not self.link.say(question):
            request.targets = {}

    def undecided(self, req_id: str) -> bool:
        """Whether it is not known yet what the store holds of the request, and may be soon."""
        request = self._requests.get(req_id)
        return request is not None and request.undecided

    def await_answer(self, req_id: str, spare_seconds: float) -> None:
        """The engine is about to look the request up: let the store's answer come first if it comes at once. Once for
        each request; blocks for `_ANSWER_SECONDS` a step at most, or for as long as the GPU is busy without it."""
        request = self._requests.get(req_id)
        if request is None or request.awaited or not request.undecided:
            return
        request.awaited = True
        self._await(lambda: not request.undecided, max(spare_seconds, _ANSWER_SECONDS))

    def await_chunks(self, req_id: str, spare_seconds: float) -> bool:
        """The engine is about to look the request up: let what is fetched for it come first if it comes within so many
        seconds. The request is computed in this step then, and not in the next one. Whether there are finished jobs
        that nobody has asked for."""
        request, left_seconds = self._requests.get(req_id), spare_seconds - self._waited_seconds
        if request is not None and request.loads and left_seconds > 0:
            if not self._listened:  # once a step: it looks at whatever is under way
                self._step()
            left_bytes = self.row_bytes * sum(len(load.keys) for load in request.loads.values())
            if left_bytes <= left_seconds * self._store_bytes_per_second:
                self._await(lambda: not request.loads or request.gave_up, spare_seconds)
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
        request, size = self._requests.get(req_id), self._chunk_tokens
        chunks = request.fetched if request is not None else ()
        return sum(max(0, min(end, (chunk + 1) * size) - max(first, chunk * size)) for chunk in chunks)

    def hurry(self, req_id: str) -> None:
        """The engine has a slot for the request, and could begin now."""
        request = self._requests.get(req_id)
        if request is None or request.hurried:
            return
        request.hurried = True
        now = time.monotonic()
        if not request.submitted and request.asked is None and now > request.until:
            # It queued for longer than a fetch may take, and none was begun, for want of rows: its time begins now.
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
            # A request that queues, or waits for other chunks anyway, takes its turn; one that could begin does.
            return LookupResult.MISS if request.hurried and not request.loads else LookupResult.RETRY
        self._promised_rows += 1
        return LookupResult.HIT

    @property
    def has_room(self) -> bool:
        """Whether another row may be filled."""
        return self._load_rows + self._promised_rows < self._load_rows_max

    def gave_up(self, req_id: str) -> bool:
        """Whether the request waits for nothing of this tier any more, whatever is still under way for it."""
        request = self._requests.get(req_id)
        return request is not None and request.gave_up

    def cancel(self, req_id: str) -> None:
        """The request is gone: stop what is fetched for it."""
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
            request.tokens_sent = 0  # what is left over needs them again
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
        """Store what had no room, as far as there is some now; called after `get_finished_jobs`."""
        self.puts.submit_leftovers(pin)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._step()
        finished = self._finished.copy()
        self._finished.clear()
        return finished

    def on_schedule_end(self, context: object) -> None:
        self._promised_rows = 0  # those that were promoted were submitted just before
        self._waited_seconds = 0.0
        self._listened = False

    def has_pending_work(self) -> bool:
        return bool(self._loads or self.puts.pending or self._finished)

    def wait(self) -> None:
        """With nothing to run and a job under way: until the mover says something, at most for a millisecond."""
        if self._loads or self.puts.pending:
            self.link.wait(_WAIT_SECONDS)

    def drained(self) -> bool:
        """End what is under way, without blocking; True once it has ended. To be called until then. After some seconds
        the mover is killed, and what it had not finished has failed."""
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
        """Take in what the mover said, look after it, and give up what is not worth waiting for."""
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
        """End what is past its deadline, and a mover that does not."""
        if not self._loads and not self.puts.pending:
            self._suspect = False
            return
        overdue = [load for load in self._loads.values() if now > load.command.deadline]
        for load in overdue:
            load.overdue = load.overdue or not load.cancelled
            self._cancel(load)
        sent_until = [load.command.deadline for load in self._loads.values() if load.sent]
        # Loads share threads and connections, so that one may end with another's deadline; none is added meanwhile.
        self._suspect = any(load.sent and now > load.command.deadline + HUNG_SECONDS for load in overdue)
        if sent_until and now > max(sent_until) + HUNG_SECONDS:
            self.link.kill("a load is not answered past its deadline")
        self.puts.watch(now)

    def _say_identified(self) -> None:
        """Not kept until the mover is ready, of which an idle engine does not hear: routers plan for no worker whose
        identity they do not know."""
        self.link.send(self._identified)

    def _end_all(self) -> None:
        """The mover is no more: what it had not loaded is missing; what it had not stored, the next one may try."""
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
        """Nobody writes to the load's rows any more."""
        failed = frozenset(key for key, outcome in zip(load.keys, outcomes, strict=True) if outcome is not Outcome.HIT)
        request = load.request
        for key in load.keys:
            if key in failed:
                request.fetches[key] = FETCHES_PER_CHUNK  # not again for this request
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
        """Stop fetching, from a chunk boundary on, what the engine has sooner by computing it."""
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
                # What began to come in is let through up to the end of its piece, a boundary in any case.
                if kept + len(load.keys) > worth and not load.cancelled:
                    self._cancel(load)
                    self._counters.add(counters.ABANDONED, len(load.keys))
                    request.abandoned = request.abandoned or worth == 0
                kept += len(load.keys)
            ahead_bytes += min(kept, worth) * self.row_bytes

    # ---- what others see

    def tell_pace(self, dram_bytes_per_second: float, queue: int, resident: tuple[int, int, int, int]) -> None:
        """For the heartbeat, about once a second. `queue` counts requests that the engine has not begun with,
        `resident` blocks in HBM and chunks in DRAM that can be hit, each with the room for them."""
        bytes_per_token = self.row_bytes // self._chunk_tokens
        in_flight = self._load_rows * self.row_bytes
        self._say_identified()  # again, in case that there was no room for it
        rates = (*self.prefill, self.prefill_share, dram_bytes_per_second)
        self.link.say(frames.Pace(*rates, bytes_per_token, in_flight, queue, *resident))

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, object]) -> dict[str, OffloadingMetricMetadata]:
        return counters.DEFINITIONS

    def get_stats(self) -> OffloadingConnectorStats | None:
        return self._counters.take()
