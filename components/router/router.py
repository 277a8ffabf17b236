"""The request path: price every worker, pin the cheapest, attach the fetch plan, stream the response.

Dynamo's KvRouter knows the blocks in HBM and DRAM, accounts the load, and transports the request. The mirror knows the
chunks in the store. If a worker fails before its first token, or misses the deadline for it, the router decides again
without that worker.
"""

import asyncio
import logging
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from components.pricing import cost
from components.pricing.cost import Candidate, Choice, Choices, Policy
from components.router.constraints import Constraints
from components.router.deadlines import ALIVE_FACTOR, Deadlines, Suspects
from components.router.decisions import Decisions
from components.router.failures import (
    Disconnected,
    GivenUp,
    Late,
    NoWorker,
    Refused,
    RequestError,
    WorkerError,
    frame,
    of_dynamo,
)
from components.router.hints import Hints
from components.router.others import TOKENS_MAX, Others
from components.router.records import Decision, Prefilled, explained, label, sources
from components.router.sessions import Sessions, session_of
from components.router.speeds import LiveSpeeds
from components.router.workers import Card, Workers
from kvstore.bus.messages import Load, RouterReport, WorkerReport
from kvstore.bus.plan import FIELD, Plan, make_plan
from kvstore.bus.residency import Mirror
from kvstore.keys import sequence_hashes
from kvstore.text import shown

logger = logging.getLogger(__name__)

# Limit of workers that a failing prompt is tried on before the client gets the error. Workers that miss a deadline do
# not count: the total timeout bounds them.
ATTEMPTS = 3
# Timeout. Dynamo's router is in this process, and answers within a millisecond.
_ASK_SECONDS = 1.0
# Polling interval for another worker for a prompt that waits on a suspect one.
_LOOK_SECONDS = 1.0

# The field of a request in which Dynamo passes a prefill worker's result to a decode worker.
HANDED_OVER = "prefill_result"

Request = dict[str, Any]
Result = TypeVar("Result")
Key = TypeVar("Key")


class Decided(NamedTuple):
    id: str
    prompt_tokens: int
    chosen: Choice
    choices: Choices
    prefilled: Prefilled | None = None


class Handover(NamedTuple):
    """The transfer of a prompt's KV to decode workers: from which workers, and how fast."""

    prefill_workers: Workers
    bytes_per_second: float


_NO_CARD = Card(0, 0, "")


class _Located(NamedTuple):
    """The target of each of a prompt's chunks, and the load of the target that holds most of them."""

    chunks: Sequence[str | None] = ()
    share: float = 0.0
    fetching_bytes: int = 0
    bytes_per_second: float = math.inf


_NOWHERE = _Located()


class Router:
    """Serves `generate` for one model. For one event loop.

    - `kv_router`: a dynamo.llm.KvRouter on the workers' endpoint with `block_tokens`.
    - `own_id`: the router's own instance id, as frontends know it.
    - `handover`: only for decode workers, whose prompts may come from prefill workers.
    - `others`: the load from other routers.
    - `has_fallback`: the caller can serve a prompt in another way if no worker is trusted.
    """

    def __init__(
        self,
        kv_router: Any,
        workers: Workers,
        mirror: Mirror,
        *,
        block_tokens: int,
        speeds: LiveSpeeds,
        policy: Policy,
        deadline_ms: tuple[int, int] = (100, 2000),
        deadlines: Deadlines | None = None,
        session_idle_seconds: float = 0.0,
        own_id: int | None = None,
        handover: Handover | None = None,
        others: Others | None = None,
        has_fallback: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._kv_router = kv_router
        self._workers = workers
        self._mirror = mirror
        self._block_tokens = block_tokens
        self._speeds = speeds
        self._policy = policy
        self._deadline_ms = deadline_ms
        self._deadlines = deadlines or Deadlines()
        self._sessions = Sessions(session_idle_seconds)
        self._own_id = own_id
        self._handover = handover
        self._others = others
        self._has_fallback = has_fallback
        self._clock = clock
        self._suspects = Suspects()
        # By worker, for prompts without a first token: their fetches, which Dynamo's load accounting counts as tokens
        # to prefill.
        self._fetching_tokens: defaultdict[int, int] = defaultdict(int)
        self._fetching_bytes: defaultdict[int, int] = defaultdict(int)
        # KV memory, in tokens, that prompts will need once their fetches have arrived.
        self._memory_later: defaultdict[int, int] = defaultdict(int)
        # Bytes in flight by target.
        self._target_bytes: defaultdict[str, int] = defaultdict(int)
        # Prompts without a first token, and of these, those whose fetch is not predicted to have arrived.
        self._waiting: defaultdict[int, int] = defaultdict(int)
        self._fetching: defaultdict[int, int] = defaultdict(int)
        # Prompts in Dynamo's accounts without a first token; the others there decode.
        self._prefilling: defaultdict[int, int] = defaultdict(int)
        # Prompts in Dynamo's accounts with a hint of the answer's length, and the sum of these hints.
        self._hinted: defaultdict[tuple[int, int], int] = defaultdict(int)  # by worker and rank
        self._hinted_tokens: defaultdict[tuple[int, int], int] = defaultdict(int)
        # Prompts that are decided but not yet in Dynamo's accounts. Without these, prompts that arrive together would
        # all go to the same worker.
        self._unbooked_tokens: defaultdict[int, int] = defaultdict(int)
        self.decisions = Decisions(block_tokens)
        self.decisions.distributions.suspects.set_function(lambda: self._suspects.count(self._clock()))

    def booked(self) -> dict[str, int]:
        """The sums of all accounts of running prompts, over all workers. All are 0 once no prompt runs."""
        return {
            "fetching tokens": sum(self._fetching_tokens.values()),
            "fetching bytes": sum(self._fetching_bytes.values()),
            "memory later": sum(self._memory_later.values()),
            "fetching bytes by target": sum(self._target_bytes.values()),
            "waiting": sum(self._waiting.values()),
            "fetching": sum(self._fetching.values()),
            "prefilling": sum(self._prefilling.values()),
            "unbooked tokens": sum(self._unbooked_tokens.values()),
            "hinted": sum(self._hinted.values()) + sum(self._hinted_tokens.values()),
        }

    async def load_report(self) -> RouterReport:
        """This router's load, for other routers. Raises the errors of Dynamo's router."""
        assert self._others is not None
        async with asyncio.timeout(_ASK_SECONDS):
            loads = map(self._own_load, await self._kv_router.get_potential_loads([0]))
        busy = [load for load in loads if load != Load(load.worker, load.dp_rank)]
        return RouterReport(self._others.own_name, self._others.endpoint, busy, dict(self._target_bytes))

    def handle(self, request: Request, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Dynamo's handler: like `generate`, but an error of the request is the last item of the stream."""
        return framed(self.generate(request, context), context)

    async def generate(
        self,
        request: Request,
        context: Any,
        *,
        prefilled: Prefilled | None = None,
        finished: Callable[[Decision], None] = lambda decision: None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A preprocessed request in, the worker's outputs out. Raises RequestError. `prefilled` is what a prefill
        worker did with it; `finished` is called with the decision after the last output."""
        tried: set[int] = set()  # workers that failed this prompt
        failures = 0
        last: RequestError | None = None
        arrived = self._clock()
        while True:
            try:
                decided = (await self.decide(request, tried))._replace(prefilled=prefilled)
            except NoWorker as error:
                raise last or error from None
            worker, decision_id = decided.chosen.candidate.worker, decided.id
            started, outcome = False, "cancelled"  # the outcome if the caller drops this generator
            try:
                async with aclosing(self._serve(request, context, decided, tried, arrived)) as outputs:
                    async for output in outputs:
                        if not started:
                            started = True
                            self._suspects.clear(worker)
                            for one in tried:  # this worker can serve what they could not
                                self._suspects.add(one, self._clock())
                        yield output
                outcome = "finished"
                return
            except Disconnected:
                logger.info("decision %s: the client disconnected", decision_id)
                return
            except RequestError as error:
                outcome = "failed"
                failures += not isinstance(error, Late)
                if started or isinstance(error, Refused | GivenUp) or failures == ATTEMPTS:
                    raise
                logger.warning("decision %s: worker %s failed: %s", decision_id, label(decided.chosen), shown(error))
                last = error.with_traceback(None)  # the traceback would hold Dynamo's stream, and the stream this frame
                tried.add(worker)
                if not isinstance(error, WorkerError):
                    self._suspects.add(worker, self._clock())
                self.decisions.retried(decided.chosen)
            except Exception:
                outcome = "failed"
                raise
            finally:
                decision = self.decisions.ended(decision_id, outcome)
                if decision is not None and outcome == "finished":
                    finished(decision)

    async def decide(self, request: Request, failed: Collection[int] = ()) -> Decided:
        """Price the live workers except those in `failed`, and choose. Raises NoWorker, and Refused for a prompt that
        is too long for all of them."""
        chosen, choices, stages = await self._priced(request, failed, self.decisions.fell_back)
        now = self._clock()
        self.decisions.took(stages)
        self._suspects.sent(chosen.candidate.worker, now)
        self._sessions.bind(session_of(request), (chosen.candidate.worker, chosen.candidate.dp_rank), now)
        return Decided(uuid.uuid4().hex[:12], len(request["token_ids"]), chosen, choices)

    async def price(self, request: Request) -> Choice:
        """What `decide` would choose now. Sends, counts and keeps nothing. Raises the same errors."""
        return (await self._priced(request, (), lambda missing: None))[0]

    def handover_seconds(self, tokens: int) -> float:
        """Time to transfer the KV of `tokens` to a decode worker; 0 if no prefill worker reports its block size."""
        if self._handover is None:
            return 0.0
        block_bytes = self._handover.prefill_workers.block_bytes()
        return tokens / self._block_tokens * block_bytes / self._handover.bytes_per_second

    async def explain(self, request: Request) -> Decision:
        """What `decide` would decide now, in full. Sends, counts and keeps nothing. Raises the same errors."""
        chosen, choices, _ = await self._priced(request, (), lambda missing: None)
        return explained("", len(request["token_ids"]), chosen, choices)

    def stored(self, request: Request) -> tuple[int, dict[tuple[str, int], list[int]]]:
        """The number of the prompt's full blocks; and, by target and fingerprint, the hashes of its chunks that are in
        the store, in order."""
        identity, now = _identity(request), self._clock()
        hashes = sequence_hashes(request["token_ids"], self._block_tokens, **identity)
        reports = (self._workers.report(worker, self._block_tokens, now) for worker in self._workers.cards)
        found: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for fingerprint, blocks_per_chunk in {_layout(one, identity["lora_name"]) for one in reports if one}:
            chunks = hashes[blocks_per_chunk - 1 :: blocks_per_chunk]
            for chunk, target in zip(chunks, self._mirror.locate(fingerprint, chunks, now), strict=True):
                if target is not None:
                    found[target, fingerprint].append(chunk)
        return len(hashes), found

    async def _priced(
        self, request: Request, failed: Collection[int], fell_back: Callable[[str], None]
    ) -> tuple[Choice, Choices, dict[str, float]]:
        """The choice, the cheapest option of each candidate, and the duration of each stage in seconds."""
        tokens, hints = request["token_ids"], self._hints(request)
        routing = request.get("routing") or {}
        identity = _identity(request)
        begun = time.perf_counter()
        hashes = sequence_hashes(tokens, self._block_tokens, **identity)
        hashed = time.perf_counter()
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                overlaps, loads = await self._known_to_dynamo(tokens, identity)
        except Exception as error:
            fell_back("overlap_query")
            logger.warning("overlap query to Dynamo's router failed: %r", error)
            overlaps, loads = self._nothing_known(), []
        asked = time.perf_counter()
        constraints = Constraints.of(routing, self._own_id)
        candidates = self._candidates(
            overlaps,
            loads,
            hashes,
            constraints,
            failed,
            fell_back,
            tokens=len(tokens),
            adapter=identity["lora_name"],
            hints=hints,
        )
        if self._handover is not None and request.get(HANDED_OVER):
            candidates = [self._handed_over(one, len(tokens), self._handover) for one in candidates]
        located = time.perf_counter()
        now = self._clock()
        if not candidates:
            raise self._no_candidate(tokens)
        trusted = [one for one in candidates if self._suspects.trusts(one.worker, now)]
        if not trusted and self._has_fallback:
            raise NoWorker("every worker is suspect")
        if not trusted:
            fewest = min(self._suspects.failures(one.worker) for one in candidates)
            trusted = [one for one in candidates if self._suspects.failures(one.worker) == fewest]
        candidates = trusted
        if bound := self._sessions.bound_worker(session_of(request), now):
            candidates = [one for one in candidates if (one.worker, one.dp_rank) == bound] or candidates
        policy = self._policy_for(hints, candidates)
        chosen, choices = cost.choose(candidates, len(tokens), self._block_tokens, policy)
        stages = {
            "hash": hashed - begun,
            "ask": asked - hashed,
            "locate": located - asked,
            "price": time.perf_counter() - located,
        }
        return chosen, choices, stages

    def _hints(self, request: Request) -> Hints:
        """The request's hints. The expected length is capped at the room that a worker has, because it counts in the
        prices of other requests. Raises Refused."""
        hints = Hints.of(request)
        if not hints.output_tokens:
            return hints
        kv_blocks = max((card.total_blocks for card in self._workers.cards.values()), default=0)
        most = self._workers.context_tokens() or kv_blocks * self._block_tokens
        room = max(1, most - len(request["token_ids"]))
        return hints._replace(output_tokens=min(hints.output_tokens, room)) if most else hints

    def _policy_for(self, hints: Hints, candidates: Sequence[Candidate]) -> Policy:
        if hints.weight == 1 and not hints.output_tokens:
            return self._policy
        usual = sum(self._speeds.answers(one.worker).tokens for one in candidates) / len(candidates)
        length = hints.expected(usual) / usual if usual else 1.0
        return msgspec.structs.replace(self._policy, weight=hints.weight, answer_length=length)

    async def _known_to_dynamo(
        self, tokens: list[int], identity: dict[str, Any]
    ) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
        """Overlaps and loads by worker. Loads are queried with one token of the prompt. The whole prompt would double
        the query's time, and add nothing about other requests."""
        overlaps, loads = await asyncio.gather(
            self._kv_router.get_overlap_scores(tokens, include_shared=False, **identity),
            self._kv_router.get_potential_loads(tokens[:1]),
        )
        return overlaps["workers"], loads

    def _fits(self, card: Card, tokens: int) -> bool:
        """Whether a worker with this card can take a prompt of this length."""
        return card.block_tokens in (0, self._block_tokens) and not 0 < card.context_tokens <= tokens

    def _no_candidate(self, tokens: Sequence[int]) -> RequestError:
        """The error that says why there is no candidate."""
        context = self._workers.context_tokens()
        if 0 < context <= len(tokens):
            return Refused(f"the prompt has {len(tokens)} tokens, expected less than {context}, the context length")
        return NoWorker("no worker is live that could serve this prompt")

    def _nothing_known(self) -> list[dict[str, int]]:
        """Overlaps of zero for all workers, if Dynamo's router fails: prompts are still served, and still use the
        store."""
        empty = {"dp_rank": 0, "device_blocks": 0, "host_pinned_extension_blocks": 0}
        return [{"worker_id": worker, **empty} for worker in self._workers.cards]

    def _candidates(
        self,
        overlaps: list[dict[str, int]],
        loads: list[dict[str, int]],
        hashes: list[int],
        constraints: Constraints,
        failed: Collection[int],
        fell_back: Callable[[str], None],
        *,
        tokens: int,
        adapter: str | None,
        hints: Hints,
    ) -> list[Candidate]:
        now = self._clock()
        load_of = {(load["worker_id"], load["dp_rank"]): load for load in loads}
        stores: dict[tuple[int, int], _Located] = {}  # shared by workers of one layout
        candidates = []
        is_unreported = False
        for row in overlaps:
            worker, rank = row["worker_id"], row["dp_rank"]
            card = self._workers.cards.get(worker, _NO_CARD)
            if worker in failed or not self._fits(card, tokens) or not constraints.allow(worker, rank, card.taints):
                continue
            hbm = row["device_blocks"]
            load = self._own_load(load_of.get((worker, rank)) or {"worker_id": worker, "dp_rank": rank})
            if self._others is not None:
                load = self._others.added_to(load)
            answers, memory = self._speeds.answers(worker), card.total_blocks * self._block_tokens or math.inf
            report = self._workers.report(worker, self._block_tokens, now)
            if report is None:
                is_unreported = self._handover is None
                store, blocks_per_chunk, chunk_bytes, prefill_share = _NOWHERE, 0, 0, 0.0
            else:
                blocks_per_chunk, chunk_bytes = report.blocks_per_chunk, report.chunk_bytes
                prefill_share = report.prefill_share
                layout = _layout(report, adapter)
                if layout not in stores:
                    stores[layout] = self._locate(*layout, hashes, now)
                store = stores[layout]
            candidates.append(
                Candidate(
                    worker=worker,
                    speeds=self._speeds.of_worker(worker),
                    dp_rank=rank,
                    hbm_blocks=hbm,
                    # Only the extension fields prove a hit: the cumulative ones repeat the tier above.
                    dram_blocks=hbm + row["host_pinned_extension_blocks"],
                    queued_prefill_tokens=load.prefill_tokens,
                    fetching_bytes=load.fetching_bytes,
                    running_requests=load.decoding,
                    waiting_requests=load.waiting,
                    fetching_requests=load.fetching,
                    prefill_share=prefill_share,
                    memory_used=load.memory_tokens / memory,
                    memory_fetching=load.fetching_memory_tokens / memory,
                    memory_needed=(tokens + hints.expected(answers.tokens)) / memory,
                    answer_seconds=answers.seconds,
                    blocks_per_chunk=blocks_per_chunk,
                    chunk_bytes=chunk_bytes,
                    located=store.chunks,
                    target_share=store.share,
                    target_fetching_bytes=store.fetching_bytes,
                    target_bytes_per_second=store.bytes_per_second,
                )
            )
        if is_unreported:  # count once per decision
            fell_back("worker_report")
        return candidates

    def _own_load(self, load: dict[str, int]) -> Load:
        """This router's load on a worker's rank, from Dynamo's accounts (minus the one token of the query) and its
        own."""
        worker, place = load["worker_id"], (load["worker_id"], load["dp_rank"])
        queued = load.get("potential_prefill_tokens", 1) - 1
        queued += self._unbooked_tokens.get(worker, 0) - self._fetching_tokens.get(worker, 0)
        running = load.get("active_requests", 0)
        answers = max(0, running - self._hinted.get(place, 0)) * self._speeds.answers(worker).tokens
        memory = load.get("potential_decode_blocks", 0) * self._block_tokens + self._hinted_tokens.get(place, 0)
        return Load(
            worker,
            load["dp_rank"],
            max(0, queued),
            min(round(memory + answers), TOKENS_MAX),
            max(0, running - self._prefilling.get(worker, 0)),
            self._fetching_bytes.get(worker, 0),
            self._memory_later.get(worker, 0),
            self._waiting.get(worker, 0),
            self._fetching.get(worker, 0),
        )

    def _handed_over(self, candidate: Candidate, tokens: int, handover: Handover) -> Candidate:
        """The candidate for a prompt that was prefilled elsewhere: the KV that its HBM lacks comes from a prefill
        worker, priced as if from DRAM."""
        return msgspec.structs.replace(
            candidate,
            speeds=msgspec.structs.replace(candidate.speeds, dram_bytes_per_second=handover.bytes_per_second),
            dram_blocks=-(-tokens // self._block_tokens),
            is_handed_over=True,
            blocks_per_chunk=1,
            chunk_bytes=handover.prefill_workers.block_bytes(),
            located=(),
        )

    def _locate(self, fingerprint: int, blocks_per_chunk: int, hashes: list[int], now: float) -> "_Located":
        if not self._mirror.counts(now):  # no live target
            return _NOWHERE
        chunks = self._mirror.locate(fingerprint, hashes[blocks_per_chunk - 1 :: blocks_per_chunk], now)
        held = Counter(chunks)
        del held[None]
        if not held:
            return _Located(chunks)
        ((target, count),) = held.most_common(1)
        speed = self._speeds.of_target(str(target), now)
        if speed is None:
            return _Located(chunks)
        return _Located(
            chunks,
            share=count / held.total(),
            # The target's report is up to a second old and covers all routers. This router's account is current, and
            # those of other routers nearly.
            fetching_bytes=max(speed.waiting_bytes, self._fetching_from(str(target))),
            bytes_per_second=speed.bytes_per_second,
        )

    def _fetching_from(self, target: str) -> int:
        others = self._others.fetching_bytes(target) if self._others else 0
        return self._target_bytes.get(target, 0) + others

    async def _serve(
        self, request: Request, context: Any, decided: Decided, tried: Collection[int], arrived: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send the request to the chosen worker. Dropping Dynamo's stream stops the worker's generation. So if the
        client disconnects or a deadline is missed, this raises, which drops the stream. Before the first token that
        works only with a response buffer of 0. A buffered stream notices it only when it has an item to deliver."""
        choice, decision_id = decided.chosen, decided.id
        sent = self._clock()
        prepared, hints = self._prepared(request, choice, decision_id), self._hints(request)
        with ExitStack() as booked, _Client(context, self._clock) as client:
            worker, tokens = choice.candidate.worker, choice.missing_tokens + choice.store_tokens
            late = self._first_token_check(client, request, choice, tried, arrived, sent)
            if hints.output_tokens:
                place = worker, choice.candidate.dp_rank
                booked.enter_context(_added(self._hinted, place, 1))
                booked.enter_context(_added(self._hinted_tokens, place, hints.output_tokens))
            with self._counted(choice, hints), _checked(late):
                with _added(self._unbooked_tokens, worker, tokens):
                    coming = self._kv_router.generate_from_request(prepared, response_buffer_size=0)
                    decision = self.decisions.decided(*decided)  # slow, so only after the prompt was sent
                    outputs = aiter(await client.waits_for(coming))
                with _added(self._prefilling, worker, 1):
                    first = await client.next_of(outputs)
            if first is None:
                return
            took = self._clock() - sent
            self.decisions.first_token(decision, took)
            if not choice.fetch_chunks and not choice.wait_seconds:
                context = choice.prompt_tokens - choice.missing_tokens
                self._speeds.observed(worker, choice.missing_tokens, context, took - choice.copy_seconds)
            begun, tokens = self._clock(), 0
            # It names the worker. The frontend expects this router's id, and would log an error for each response.
            first.pop("routing_data", None)
            self._workers.progressed(worker, begun)
            told = _told(choice, took) if _wants_engine_data(request) else {}
            yield _with_engine_data(first, told)
            with _checked(self._next_token_check(client, choice)):
                while (output := await client.next_of(outputs)) is not None:
                    tokens += _tokens(output)
                    self._workers.progressed(worker, client.heard)
                    yield _with_engine_data(output, told)
        seconds = self._clock() - begun
        self.decisions.answered(decision, _tokens(first), tokens, seconds)
        self._speeds.answered(worker, _tokens(first) + tokens, seconds)

    def _first_token_check(
        self,
        client: "_Client",
        request: Request,
        choice: Choice,
        tried: Collection[int],
        arrived: float,
        sent: float,
    ) -> Callable[[], float | None]:
        """A check whether the first token is late. The worker becomes suspect if it produces no token for any request
        until then, or none for this prompt for several times as long. The prompt moves only if another worker is
        trusted; otherwise it keeps its place."""
        worker = choice.candidate.worker
        patience = self._deadlines.first_token(choice.ttft_seconds)
        last = max(arrived + self._deadlines.first_token_max, sent + patience)
        suspected = False

        def check() -> float | None:
            nonlocal suspected
            now = self._clock()
            if now >= last:
                self.decisions.missed("request")
                client.interrupt(GivenUp(f"no worker produced a first token within {now - arrived:.0f} s"))
                return None
            silent_until = max(sent, self._workers.last_progress(worker)) + patience
            due = min(silent_until, sent + ALIVE_FACTOR * patience, last)
            if now < due:
                return due - now
            if not suspected:
                suspected = True
                self._suspects.add(worker, now)
                self.decisions.missed("first_token")
                logger.warning(
                    "worker %s: no first token after %.1f s, predicted %.1f s: marked suspect",
                    label(choice),
                    now - sent,
                    choice.ttft_seconds,
                )
            if self._has_fallback or self._another(request, {*tried, worker}, now):
                client.interrupt(Late(f"no first token after {now - sent:.1f} s"))
                return None
            return min(_LOOK_SECONDS, last - now)

        return check

    def _next_token_check(self, client: "_Client", choice: Choice) -> Callable[[], float | None]:
        """A check whether the next token is late. Time in which the client does not read does not count."""
        bound = self._deadlines.next_token

        def check() -> float | None:
            waited = client.waited
            if waited < bound:
                return bound - waited
            self.decisions.missed("next_token")
            if self._clock() - self._workers.last_progress(choice.candidate.worker) >= bound:
                self._suspects.add(choice.candidate.worker, self._clock())
            client.interrupt(Late(f"no token for {waited:.0f} s: the answer is incomplete"))
            return None

        return check

    def _another(self, request: Request, tried: Collection[int], now: float) -> bool:
        """Whether there is a trusted worker that has not tried this prompt."""
        constraints = Constraints.of(request.get("routing") or {}, self._own_id)
        tokens = len(request["token_ids"])
        return any(
            worker not in tried
            and self._suspects.trusts(worker, now)
            and self._fits(card, tokens)
            and constraints.allow(worker, constraints.dp_rank or 0, card.taints)
            for worker, card in self._workers.cards.items()
        )

    @contextmanager
    def _counted(self, choice: Choice, hints: Hints) -> Iterator[None]:
        """Account for the prompt's fetches until its first token."""
        candidate = choice.candidate
        fetched = candidate.located[choice.first_chunk : choice.first_chunk + choice.fetch_chunks]
        by_target = Counter(target for target in fetched if target is not None)
        with ExitStack() as booked:
            book = booked.enter_context
            book(_added(self._waiting, candidate.worker, 1))
            book(_added(self._fetching_tokens, candidate.worker, choice.store_tokens))
            book(_added(self._fetching_bytes, candidate.worker, choice.fetch_chunks * candidate.chunk_bytes))
            if fetched:
                answer_tokens = round(hints.expected(self._speeds.answers(candidate.worker).tokens))
                later = book(ExitStack())  # closed earlier, when the fetch is predicted to have arrived
                later.enter_context(_added(self._memory_later, candidate.worker, choice.prompt_tokens + answer_tokens))
                later.enter_context(_added(self._fetching, candidate.worker, 1))
                timer = asyncio.get_running_loop().call_later(choice.fetch_seconds, later.close)
                booked.callback(timer.cancel)
            for target, chunks in by_target.items():
                book(_added(self._target_bytes, target, chunks * candidate.chunk_bytes))
            yield

    def _prepared(self, request: Request, choice: Choice, decision_id: str) -> Request:
        """The request with the worker pinned, and with the plan in a field that a stock worker passes to the engine."""
        candidate = choice.candidate
        routing = dict(request.get("routing") or {})
        routing["backend_instance_id"] = candidate.worker
        routing["dp_rank"] = candidate.dp_rank  # required for a worker with several ranks
        extra_args = dict(request.get("extra_args") or {})
        options = dict(extra_args.get("sampling_options") or {})
        engine_args = dict(options.get("extra_args") or {})
        engine_args[FIELD] = msgspec.to_builtins(self._plan(choice, decision_id))
        options["extra_args"] = engine_args
        extra_args["sampling_options"] = options
        return {**request, "routing": routing, "extra_args": extra_args}

    def _plan(self, choice: Choice, decision_id: str) -> Plan:
        """The fetch plan. Its deadline is the time that the request queues anyway plus the time to recompute what is
        fetched. So a store that fails at the worst moment costs the time of one recomputation at most."""
        candidate = choice.candidate
        context = choice.hbm_tokens + choice.dram_tokens
        recompute = candidate.speeds.prefill.seconds(choice.store_tokens, context)
        least, most = self._deadline_ms
        chunk_tokens = candidate.blocks_per_chunk * self._block_tokens
        return make_plan(
            choice.targets,
            fetch=choice.fetch_chunks,
            deadline_ms=min(most, max(least, 1000 * (choice.wait_seconds + recompute))),
            chunk_ms=1000 * candidate.speeds.prefill_seconds_per_token * chunk_tokens,
            decision_id=decision_id,
        )


async def framed(answers: AsyncGenerator[dict[str, Any], None], context: Any) -> AsyncGenerator[dict[str, Any], None]:
    """Pass the answers through; an error of the request becomes the last item of the stream."""
    try:
        async with aclosing(answers) as outputs:
            async for output in outputs:
                yield output
    except RequestError as error:
        level = logging.INFO if isinstance(error, Refused) else logging.WARNING
        logger.log(level, "request %s: %s: %s", context.id(), type(error).__name__, error)
        yield frame(error)


@contextmanager
def _added(amounts: defaultdict[Key, int], key: Key, amount: int) -> Iterator[None]:
    amounts[key] += amount
    try:
        yield
    finally:
        amounts[key] -= amount
        if not amounts[key]:
            del amounts[key]


@contextmanager
def _checked(check: Callable[[], float | None]) -> Iterator[None]:
    """While the body runs, call `check` repeatedly. It returns the seconds until the next call, or None to stop."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer
        seconds = check()
        timer = None if seconds is None else loop.call_later(seconds, look)

    look()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _wants_engine_data(request: Request) -> bool:
    """Whether the client lists engine_data in `nvext.extra_fields`; otherwise the frontend does not pass it on."""
    nvext = (request.get("extra_args") or {}).get("nvext") or {}
    return "engine_data" in (nvext.get("extra_fields") or ())


def _told(choice: Choice, took: float) -> dict[str, Any]:
    """The decision as shown to the client: predicted tokens by source, predicted and actual TTFT in seconds."""
    times = {"predicted_ttft_seconds": choice.ttft_seconds, "ttft_seconds": took}
    return {"predicted_tokens": sources(choice), **times}


def _with_engine_data(output: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """The output; if it is the last one, with the decision and, if the worker reports them, the actual tokens by
    source."""
    if not told or not (output.get("finish_reason") or output.get("disaggregated_params")):
        return output
    found: dict[str, Any] = {}
    engine_data = output.get("engine_data") or {}
    for holder in (engine_data, output.get("disaggregated_params") or {}):
        if cached := (holder.get("kv_transfer_params") or {}).get(FIELD):
            # At least 0: with images, the engine counts more tokens than the router.
            computed = max(0, sum(told["predicted_tokens"].values()) - sum(cached.values()))
            found = {"tokens": {**cached, "computed": computed}}
    return {**output, "engine_data": {**engine_data, FIELD: {**found, **told}}}


def _identity(request: Request) -> dict[str, Any]:
    """The part of a prompt's identity that is not in its tokens."""
    routing = request.get("routing") or {}
    return {"lora_name": routing.get("lora_name"), "cache_namespace": routing.get("cache_salt")}


def _layout(report: WorkerReport, adapter: str | None) -> tuple[int, int]:
    """The fingerprint of a worker's chunks, and the blocks per chunk."""
    # Workers may have different adapters under one name. 0, which no chunk has, for an unknown adapter.
    return report.adapters.get(adapter, 0) if adapter else report.fingerprint, report.blocks_per_chunk


def _tokens(output: dict[str, Any]) -> int:
    return len(output.get("token_ids") or ())


class _Client:
    """The client of a response. If it disconnects or a deadline passes, the pending await is cancelled."""

    def __init__(self, context: Any, clock: Callable[[], float]):
        self._gone = asyncio.ensure_future(context.async_killed_or_stopped())
        self._gone.add_done_callback(self._left)
        self._clock = clock
        self._awaited: asyncio.Future[Any] | None = None
        self._since = 0.0
        self._error: RequestError | None = None
        self.heard = 0.0  # when the last await ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.cancel()

    @property
    def waited(self) -> float:
        """Seconds since the pending await began; 0 if there is none."""
        return self._clock() - self._since if self._awaited else 0.0

    def _left(self, gone: asyncio.Future[Any]) -> None:
        if not gone.cancelled():
            self.interrupt(Disconnected())

    def interrupt(self, error: RequestError) -> None:
        """Raise the error in the pending await, or in the next one."""
        self._error = self._error or error
        if self._awaited is not None:
            self._awaited.cancel()

    def _take_error(self) -> RequestError:
        """Remove and return the error. Once raised, its traceback references Dynamo's stream; a reference from here
        would keep both alive until the garbage collector runs."""
        error, self._error = self._error, None
        assert error is not None
        return error

    async def next_of(self, outputs: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next output; None at the end. Raises RequestError."""
        try:
            # Not anext(): Dynamo's stream returns a future here, which saves a task per token.
            return await self.waits_for(outputs.__anext__())
        except StopAsyncIteration:
            return None

    async def waits_for(self, result: Awaitable[Result]) -> Result:
        """Await the result. Raises RequestError; Disconnected as soon as the client is gone, without waiting for an
        output."""
        self._awaited = asyncio.ensure_future(result)
        self._since = self._clock()
        if self._error is not None:
            self._awaited.cancel()
        try:
            return await self._awaited
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._error is not None and not (task and task.cancelling()):
                raise self._take_error() from None
            raise
        except StopAsyncIteration:
            raise
        except Exception as error:
            raise of_dynamo(error) from None
        finally:
            self._awaited = None
            self.heard = self._clock()
