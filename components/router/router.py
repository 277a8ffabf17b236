"""The request path: price every worker, pin the cheapest, attach the fetch plan, pass the answer through.

Dynamo's KvRouter says what lies in HBM and DRAM, keeps the books on load, and carries the request; the mirror says what
lies in the store. A worker that fails before its first token is left out and the prompt is decided again.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any, TypeVar

import msgspec

from components.router import cost
from components.router.cost import Candidate, Choice, Policy
from components.router.decisions import Decisions, label
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.keys import sequence_hashes
from kvstore.plan import FIELD, Plan, make_plan
from kvstore.residency import Mirror

logger = logging.getLogger(__name__)

# A prompt is tried on this many workers; then the client hears of it.
ATTEMPTS = 3
# A worker that failed is not chosen for this long, unless there is no other: discovery takes seconds to notice.
SUSPECT_SECONDS = 10.0

Request = dict[str, Any]
Result = TypeVar("Result")
Key = TypeVar("Key")


class NoWorker(Exception):
    """There is nobody to send the prompt to."""


class Disconnected(Exception):
    """The client is gone."""


class Router:
    """Serves `generate` for one model. For one event loop.

    `kv_router` is a dynamo.llm.KvRouter on the workers' endpoint with `block_tokens`.
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
        clock: Callable[[], float] = time.monotonic,
    ):
        self._kv_router = kv_router
        self._workers = workers
        self._mirror = mirror
        self._block_tokens = block_tokens
        self._speeds = speeds
        self._policy = policy
        self._deadline_ms = deadline_ms
        self._clock = clock
        self._suspects: dict[int, float] = {}
        # By worker, for prompts whose first token is still to come: what they fetch, which Dynamo's books on load
        # take for tokens to prefill.
        self._fetching_tokens: defaultdict[int, int] = defaultdict(int)
        self._fetching_bytes: defaultdict[int, int] = defaultdict(int)
        # And by target.
        self._target_bytes: defaultdict[str, int] = defaultdict(int)
        # And prompts that were decided and are not in Dynamo's books yet: without them, prompts that come together
        # would all go to the same worker.
        self._unbooked_tokens: defaultdict[int, int] = defaultdict(int)
        self.decisions = Decisions(block_tokens)

    async def generate(self, request: Request, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Dynamo's handler: a preprocessed request in, the worker's outputs out."""
        failed: set[int] = set()
        for attempt in range(1, ATTEMPTS + 1):
            choice, decision_id = await self.decide(request, failed)
            started, outcome = False, "left"  # what a caller that drops this generator leaves behind
            try:
                async with aclosing(self._serve(request, context, choice, decision_id)) as outputs:
                    async for output in outputs:
                        started = True
                        yield output
                outcome = "finished"
                return
            except Disconnected:
                logger.info("decision %s: the client left", decision_id)
                return
            except Exception as error:
                outcome = "failed"
                if started or attempt == ATTEMPTS:
                    raise
                logger.warning("decision %s: worker %s failed: %s", decision_id, label(choice), error)
                failed.add(choice.candidate.worker)
                self._suspects[choice.candidate.worker] = self._clock() + SUSPECT_SECONDS
                self.decisions.retried(choice)
            finally:
                self.decisions.ended(decision_id, outcome)

    async def decide(self, request: Request, failed: set[int]) -> tuple[Choice, str]:
        """Price the live workers but for those in `failed`, choose, and show it. Raises NoWorker."""
        tokens = request["token_ids"]
        routing = request.get("routing") or {}
        identity = {"lora_name": routing.get("lora_name"), "cache_namespace": routing.get("cache_salt")}
        begun = time.perf_counter()
        overlaps, loads = await self._known_to_dynamo(tokens, identity)
        asked = time.perf_counter()
        hashes = sequence_hashes(tokens, self._block_tokens, **identity)
        candidates = self._candidates(overlaps, loads, hashes, len(tokens), failed)
        located = time.perf_counter()
        pinned = routing.get("backend_instance_id")
        if pinned is not None:  # the client insists on a worker
            candidates = [candidate for candidate in candidates if candidate.worker == pinned]
        now = self._clock()
        self._suspects = {worker: until for worker, until in self._suspects.items() if until > now}
        trusted = [candidate for candidate in candidates if candidate.worker not in self._suspects]
        candidates = trusted or candidates
        if not candidates:
            raise NoWorker("no worker is live that could serve this prompt")
        chosen, choices = cost.choose(candidates, len(tokens), self._block_tokens, self._policy)
        priced = time.perf_counter()
        decision_id = uuid.uuid4().hex[:12]
        self.decisions.decided(decision_id, len(tokens), chosen, choices)
        self.decisions.took({"ask": asked - begun, "locate": located - asked, "price": priced - located})
        return chosen, decision_id

    async def _known_to_dynamo(
        self, tokens: list[int], identity: dict[str, Any]
    ) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
        """Overlaps and loads by worker. If Dynamo's router fails, its workers are as good as empty: the store still
        tells them apart from nothing, and prompts are served."""
        try:
            overlaps, loads = await asyncio.gather(
                self._kv_router.get_overlap_scores(tokens, include_shared=False, **identity),
                self._kv_router.get_potential_loads(tokens, **identity),
            )
        except Exception as error:
            self.decisions.fell_back("overlap query")
            logger.warning("Dynamo's router does not say what workers hold: %s", error)
            empty = {"dp_rank": 0, "device_blocks": 0, "host_pinned_extension_blocks": 0}
            return [{"worker_id": worker, **empty} for worker in self._workers.cards], []
        return overlaps["workers"], loads

    def _candidates(
        self,
        overlaps: list[dict[str, int]],
        loads: list[dict[str, int]],
        hashes: list[int],
        prompt_tokens: int,
        failed: set[int],
    ) -> list[Candidate]:
        now = self._clock()
        load_of = {(load["worker_id"], load["dp_rank"]): load for load in loads}
        located: dict[tuple[int, int], list[str | None]] = {}  # workers of one layout share the answer
        candidates = []
        for row in overlaps:
            worker, rank = row["worker_id"], row["dp_rank"]
            card = self._workers.cards.get(worker)
            if worker in failed or (card is not None and card.block_tokens != self._block_tokens):
                continue
            hbm = row["device_blocks"]
            # The extension fields alone prove a hit: the cumulative ones repeat the tier above.
            dram = hbm + row["host_pinned_extension_blocks"]
            load = load_of.get((worker, rank), {})
            own = prompt_tokens - hbm * self._block_tokens
            queued = load.get("potential_prefill_tokens", own) - own
            queued += self._unbooked_tokens.get(worker, 0) - self._fetching_tokens.get(worker, 0)
            report = self._workers.report(worker, self._block_tokens, now)
            chunks: list[str | None] = []
            if report is None:
                self.decisions.fell_back("worker report")
            else:
                layout = report.fingerprint, report.blocks_per_chunk
                if layout not in located:
                    last_of_chunk = hashes[report.blocks_per_chunk - 1 :: report.blocks_per_chunk]
                    heard = self._mirror.counts(now)  # without any target there is nothing to say of chunks
                    located[layout] = self._mirror.locate(report.fingerprint, last_of_chunk, now) if heard else []
                chunks = located[layout]
            candidates.append(
                Candidate(
                    worker=worker,
                    speeds=self._speeds.of_worker(worker),
                    dp_rank=rank,
                    hbm_blocks=hbm,
                    dram_blocks=dram,
                    queued_prefill_tokens=max(0, queued),
                    fetching_bytes=self._fetching_bytes.get(worker, 0),
                    memory_used=load.get("potential_decode_blocks", 0) / card.total_blocks
                    if card is not None and card.total_blocks
                    else 0.0,
                    blocks_per_chunk=report.blocks_per_chunk if report else 0,
                    chunk_bytes=report.chunk_bytes if report else 0,
                    located=chunks,
                    **self._narrowest(chunks, now),
                )
            )
        return candidates

    def _narrowest(self, chunks: list[str | None], now: float) -> dict[str, Any]:
        """What a candidate must know of the target that holds most of its chunks."""
        held = Counter(target for target in chunks if target is not None)
        if not held:
            return {}
        target, count = held.most_common(1)[0]
        speed = self._speeds.of_target(target, now)
        if speed is None:
            return {}
        return {
            "target_share": count / held.total(),
            # Its own word is a second old, and other routers' fetches are in it; ours are known now.
            "target_fetching_bytes": max(speed.waiting_bytes, self._target_bytes.get(target, 0)),
            "target_bytes_per_second": speed.bytes_per_second,
        }

    async def _serve(
        self, request: Request, context: Any, choice: Choice, decision_id: str
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send the request to the chosen worker. Dropping Dynamo's stream stops the worker's generation, so whenever
        the client is gone this returns or raises, and the stream goes with it. A response buffer of 0 is what makes
        that work before the first token, too: a buffered stream notices only when it has something to pass on."""
        decided = self._clock()
        prepared = self._prepared(request, choice, decision_id)
        with self._counted(choice):
            with _added(self._unbooked_tokens, choice.candidate.worker, choice.missing_tokens + choice.store_tokens):
                stream = await _unless_gone(
                    self._kv_router.generate_from_request(prepared, response_buffer_size=0), context
                )
            outputs = aiter(stream)
            # While the prompt queues and fetches, nothing comes that would show that the client has left.
            first = await _unless_gone(anext(outputs, None), context)
        if first is None:
            return
        took = self._clock() - decided
        self.decisions.first_token(decision_id, choice, took)
        if not choice.fetch_chunks:
            self._speeds.observed(choice.candidate.worker, choice.ttft_seconds, took)
        begun, tokens = self._clock(), 0
        yield first
        async for output in outputs:
            if context.is_stopped() or context.is_killed():
                raise Disconnected
            tokens += _tokens(output)
            yield output
        self.decisions.answered(decision_id, _tokens(first), tokens, self._clock() - begun)

    @contextmanager
    def _counted(self, choice: Choice) -> Iterator[None]:
        """Count what the prompt fetches for as long as it has no token."""
        candidate = choice.candidate
        fetched = candidate.located[choice.first_chunk : choice.first_chunk + choice.fetch_chunks]
        by_target = Counter(target for target in fetched if target is not None)
        with ExitStack() as booked:
            book = booked.enter_context
            book(_added(self._fetching_tokens, candidate.worker, choice.store_tokens))
            book(_added(self._fetching_bytes, candidate.worker, choice.fetch_chunks * candidate.chunk_bytes))
            for target, chunks in by_target.items():
                book(_added(self._target_bytes, target, chunks * candidate.chunk_bytes))
            yield

    def _prepared(self, request: Request, choice: Choice, decision_id: str) -> Request:
        """The request with the worker pinned and the plan where the stock worker passes it on to the engine."""
        candidate = choice.candidate
        routing = dict(request.get("routing") or {})
        routing["backend_instance_id"] = candidate.worker
        if candidate.dp_rank:
            routing["dp_rank"] = candidate.dp_rank
        plan = self._plan(choice, decision_id)
        extra_args = dict(request.get("extra_args") or {})
        options = dict(extra_args.get("sampling_options") or {})
        engine_args = dict(options.get("extra_args") or {})
        transfer = dict(engine_args.get("kv_transfer_params") or {})
        transfer[FIELD] = msgspec.to_builtins(plan)
        engine_args["kv_transfer_params"] = transfer
        options["extra_args"] = engine_args
        extra_args["sampling_options"] = options
        return {**request, "routing": routing, "extra_args": extra_args}

    def _plan(self, choice: Choice, decision_id: str) -> Plan:
        """Wait for the store as long as the request waits anyway, and then as long as computing what is fetched would
        take: a store that fails at the worst moment costs the time of one recomputation, never more."""
        candidate = choice.candidate
        context = choice.hbm_tokens + choice.dram_tokens
        recompute = cost.prefill_seconds(candidate.speeds, choice.store_tokens, context)
        least, most = self._deadline_ms
        chunk_tokens = candidate.blocks_per_chunk * self._block_tokens
        return make_plan(
            choice.targets,
            fetch=choice.fetch_chunks,
            deadline_ms=min(most, max(least, 1000 * (choice.wait_seconds + recompute))),
            chunk_ms=1000 * candidate.speeds.prefill_seconds_per_token * chunk_tokens,
            decision_id=decision_id,
        )


@contextmanager
def _added(amounts: defaultdict[Key, int], key: Key, amount: int) -> Iterator[None]:
    amounts[key] += amount
    try:
        yield
    finally:
        amounts[key] -= amount
        if not amounts[key]:
            del amounts[key]


def _tokens(output: dict[str, Any]) -> int:
    return len(output.get("token_ids") or ())


async def _unless_gone(result: Awaitable[Result], context: Any) -> Result:
    """The result, or Disconnected as soon as the client is gone; then whatever would give the result is cancelled."""
    wanted = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(context.async_killed_or_stopped())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise Disconnected
        return wanted.result()
    finally:
        wanted.cancel()
        gone.cancel()
