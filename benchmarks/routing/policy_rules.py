"""The routing policies that policy.py compares, each a function of the simulator's state and a request."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import msgspec

from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_sim import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    Policy,
    Request,
    Simulation,
    Worker,
)
from components.pricing import cost
from components.router.others import REPORT_SECONDS

STALL_PRICE = 0.2  # the router's default
# With more workers than this, kvtier's policy prices only those that hold some of the prompt, and this many of the
# least loaded. Of two workers that hold nothing, the one with the longer queue is hardly ever cheaper.
MANY_WORKERS = 16

# Fields that add up over several routers.
_SUMMED = (
    "fetching",
    "fetching_tokens",
    "fetching_requests_tokens",
    "requests",
    "requests_tokens",
    "queued_tokens",
    "running",
    "running_tokens",
)

# llm-d: the share of a prompt that a worker must hold to be preferred, and how many seconds longer its wait may be (the
# default, and a lower one).
LLMD_AFFINITY = 0.8
LLMD_PENALTY_SECONDS = (18.0, 1.0)
LLMD_CALIBRATION_TOKENS = 8192


def round_robin() -> Policy:
    numbers = itertools.count()
    return lambda sim, request: (next(numbers) % len(sim.workers), request.conversation.prompt_tokens)


def least_loaded() -> Policy:
    """The worker with the fewest unfinished requests, as in Dynamo's and llm-d's policies of that name."""

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        return min((worker.requests, worker.number) for worker in sim.workers)[1], request.prompt_tokens

    return decide


def dynamo(shared_credit: float) -> Policy:
    """Dynamo's KV router: the worker with the fewest blocks to prefill and to keep. A hit subtracts from the blocks to
    prefill: 1 in HBM, 0.75 in DRAM, `shared_credit` in the store, but never below 0. `shared_credit` is 0.5 if Dynamo's
    shared cache is enabled, which is not possible with vLLM, otherwise 0. The engine fetches all hits.

    Dynamo 1.6, lib/kv-router/src/scheduling/selector/default.rs, its defaults."""

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        prompt = request.prompt_tokens
        best = (float("inf"), 0)
        for worker, seen in zip(sim.workers, sim.seen_by_all(request.conversation), strict=True):
            credit = seen.hbm + 0.75 * (seen.dram - seen.hbm) + shared_credit * max(0, seen.store - seen.hbm)
            prefill = max(0.0, _uncached_in_flight(worker) + prompt - credit)
            best = min(best, ((prefill + worker.requests_tokens + prompt) / BLOCK_TOKENS, worker.number))
        return best[1], prompt

    return decide


def llmd(penalty_seconds: float) -> Policy:
    """llm-d: the worker with the fewest tokens to compute, among those that hold most of the prompt. If their estimated
    wait exceeds that of the others by more than `penalty_seconds`, among all workers. The wait is estimated from the
    tokens in flight and the speed of one measured prefill. The engine fetches all hits.

    llm-d-router, prefix-cache-affinity-filter and token-load-scorer, as their READMEs recommend them."""

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        prompt = request.prompt_tokens
        calibration = sim.hardware.prefill_seconds(LLMD_CALIBRATION_TOKENS, 0)
        seen = sim.seen_by_all(request.conversation)
        warm = [one for one in sim.workers if seen[one.number].dram >= LLMD_AFFINITY * prompt]
        cold = [one for one in sim.workers if seen[one.number].dram < LLMD_AFFINITY * prompt]
        among = sim.workers
        if warm and cold:
            most, least = (min(map(_uncached_in_flight, which)) for which in (warm, cold))
            if (most - least) * calibration / LLMD_CALIBRATION_TOKENS <= penalty_seconds:
                among = warm

        def load(worker: Worker) -> tuple[int, int]:
            return _uncached_in_flight(worker) + prompt - seen[worker.number].dram, worker.number

        return min(map(load, among))[1], prompt

    return decide


def lmetric() -> Policy:
    """The worker with the smallest product of its prompt tokens to compute and its batch size, both with this request.
    There are no weights. The engine fetches all hits.

    LMetric: Simple is Better - Multiplication May Be All You Need for LLM Request Scheduling, arXiv 2603.15202."""

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        prompt = request.prompt_tokens
        seen = sim.seen_by_all(request.conversation)

        def score(worker: Worker) -> tuple[int, int]:
            tokens = _uncached_in_flight(worker) + prompt - seen[worker.number].dram
            return tokens * (worker.requests + 1), worker.number

        return min(map(score, sim.workers))[1], prompt

    return decide


def _uncached_in_flight(worker: Worker) -> int:
    """Prompt tokens, of requests without a first token, that were in neither HBM nor DRAM. Fetched ones count, as in
    accounting that knows no store."""
    return worker.prefill_tokens + worker.fetching_tokens


def ours(seed: int, stall_price: float = STALL_PRICE, noise: float = 0.1) -> Policy:
    """This project's router, with speeds that are wrong by some 10%."""
    chance = random.Random(seed)
    speeds: dict[int, cost.Speeds] = {}

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        for number in range(len(speeds), len(sim.workers)):
            prefill, dram, store = (chance.lognormvariate(0, noise) for _ in range(3))
            speeds[number] = known_speeds(sim.workers[number].hardware, prefill, dram, store)
        return wanted(choose(sim, request, speeds.__getitem__, stall_price))

    return decide


def side_by_side(routers: int, seed: int, *, told: bool, noise: float = 0.1) -> Policy:
    """Several of this project's routers, which get requests in turn. Each knows the requests that it has sent. If
    `told`, it also knows the others' load as of their last report."""
    chance = random.Random(seed)
    speeds: dict[int, cost.Speeds] = {}
    sent: list[list[Request]] = [[] for _ in range(routers)]
    reported: list[list[Worker]] = [[] for _ in range(routers)]
    turns, due = itertools.cycle(range(routers)), 0.0

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        nonlocal due
        for number in range(len(speeds), len(sim.workers)):
            prefill, dram, store = (chance.lognormvariate(0, noise) for _ in range(3))
            speeds[number] = known_speeds(sim.workers[number].hardware, prefill, dram, store)
        if told and sim.now >= due:
            due = sim.now + REPORT_SECONDS
            reported[:] = [_sent_by(sim, requests) for requests in sent]
        turn = next(turns)
        known = _sent_by(sim, sent[turn])
        for other, report in enumerate(reported):
            if other != turn and report:
                known = list(map(_together, known, report))
        choice = choose(sim, request, speeds.__getitem__, known=known)
        sent[turn].append(request)
        return wanted(choice)

    return decide


def _sent_by(sim: Simulation, requests: list[Request]) -> list[Worker]:
    """The workers' load, as known to the sender of `requests` alone. Ended requests are removed."""
    decoding = {id(job) for worker in sim.workers for _, _, job in worker.running}
    fetched = {id(job) for worker in sim.workers for job in (*worker.ready, worker.prefilling)}
    requests[:] = [one for one in requests if not one.first or id(one) in decoding]
    workers = [Worker(worker.number, worker.hardware) for worker in sim.workers]
    for one in requests:
        worker = workers[one.worker]
        worker.requests += 1
        worker.requests_tokens += one.prompt_tokens
        if one.first:
            worker.running.append((0.0, 0, one))
            worker.running_tokens += one.tokens
            continue
        worker.queued_tokens += one.prefill_tokens
        if one.fetch_tokens and id(one) not in fetched:
            worker.fetching += 1
            worker.fetching_tokens += one.fetch_tokens
            worker.fetching_requests_tokens += one.prompt_tokens
    return workers


def _together(one: Worker, other: Worker) -> Worker:
    sums = {name: getattr(one, name) + getattr(other, name) for name in _SUMMED}
    return replace(one, **sums)


def known_speeds(hardware: Hardware, prefill: float = 1.0, dram: float = 1.0, store: float = 1.0) -> cost.Speeds:
    """The hardware's speeds, multiplied by these errors."""
    return cost.Speeds(
        prefill_base_seconds=hardware.prefill_base_seconds * prefill,
        prefill_seconds_per_token=hardware.prefill_seconds_per_token * prefill,
        prefill_seconds_per_token_squared=hardware.prefill_seconds_per_token_squared * prefill,
        dram_bytes_per_second=hardware.dram_bytes_per_second * dram,
        store_bytes_per_second=hardware.worker_bytes_per_second * store,
        store_latency_seconds=hardware.store_latency_seconds,
    )


def wanted(choice: cost.Choice) -> tuple[int, int]:
    local = choice.hbm_tokens + choice.dram_tokens
    return choice.candidate.worker, local + choice.store_tokens if choice.fetch_chunks else 0


def choose(
    sim: Simulation,
    request: Request,
    speeds: Callable[[int], cost.Speeds],
    stall_price: float = STALL_PRICE,
    known: list[Worker] | None = None,
) -> cost.Choice:
    """The router's own choice, with these speeds of each worker. `known` is its view of the workers' load, if
    incomplete."""
    random.seed(request.conversation.key)  # cost.choose breaks ties at random
    one, hardware = request.conversation, sim.hardware
    seen = sim.seen_by_all(one)
    workers = known or sim.workers
    if len(workers) > 2 * MANY_WORKERS:
        least = heapq.nsmallest(MANY_WORKERS, workers, key=lambda each: (each.prefill_tokens, each.running_tokens))
        holding = (each for each in workers if seen[each.number].dram)
        workers = list({each.number: each for each in (*least, *holding)}.values())

    def held(worker: Worker, requests: int, prompts_tokens: int) -> float:
        return (prompts_tokens + requests * sim.answers[worker.number].tokens) / hardware.hbm_tokens

    located = ["t"] * (seen[0].store // CHUNK_TOKENS)
    candidates = [
        cost.Candidate(
            worker=worker.number,
            speeds=speeds(worker.number),
            hbm_blocks=seen[worker.number].hbm // BLOCK_TOKENS,
            dram_blocks=seen[worker.number].dram // BLOCK_TOKENS,
            queued_prefill_tokens=worker.prefill_tokens,
            fetching_bytes=worker.fetching_tokens * hardware.kv_bytes_per_token,
            running_requests=len(worker.running),
            waiting_requests=worker.requests - len(worker.running),
            fetching_requests=worker.fetching,
            prefill_share=sim.workers[worker.number].prefill_share(sim.now),
            memory_used=held(worker, worker.requests, worker.requests_tokens),
            memory_fetching=held(worker, worker.fetching, worker.fetching_requests_tokens),
            memory_needed=held(worker, 1, one.prompt_tokens),
            answer_seconds=sim.answers[worker.number].seconds,
            blocks_per_chunk=CHUNK_TOKENS // BLOCK_TOKENS,
            chunk_bytes=CHUNK_TOKENS * hardware.kv_bytes_per_token,
            located=located,
            target_share=1.0,  # all targets count as one
            target_fetching_bytes=int(max(0.0, sim.pool_free - sim.now) * sim.pool_rate),
            target_bytes_per_second=sim.pool_rate,
        )
        for worker in workers
    ]
    return cost.choose(candidates, one.prompt_tokens, BLOCK_TOKENS, cost.Policy(stall_price))[0]


class Prices(msgspec.Struct, frozen=True):
    """An oracle's prices: for a second of prefill, per request that it delays; for a second of the store's link, per
    request that fetches."""

    stall: float
    link: float


# policy.py takes the best in hindsight, which no real policy could know.
ORACLES = (Prices(10.0, 0.0), Prices(1.0, 0.0), Prices(1.0, 1.0), Prices(0.3, 0.3), Prices(0.1, 0.0))


def oracle(prices: Prices) -> Policy:
    """An oracle: it knows all queues, links and speeds exactly, the end of each running request, and the answer's
    length."""

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        one = request.conversation
        best = (float("inf"), 0, 0)
        fetching = sum(worker.fetching for worker in sim.workers)
        for worker, seen in zip(sim.workers, sim.seen_by_all(one), strict=True):
            hardware = worker.hardware
            batch = len(worker.running) + len(worker.ready) + (worker.prefilling is not None)
            wait = _wait_seconds(sim.now, worker, request)
            slower = (
                (hardware.step_seconds(batch + 1) - hardware.step_seconds(max(1, batch)))
                * one.answer_tokens
                * (1 + batch)
            )
            chunks = max(0, seen.store - seen.dram) // CHUNK_TOKENS
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                fetched = max(0, seen.store - seen.dram) if share == 1.0 else int(chunks * share) * CHUNK_TOKENS
                loaded = seen.dram + fetched
                copy = (loaded - seen.hbm) * hardware.kv_bytes_per_token / hardware.dram_bytes_per_second
                fetch = sim.fetch_ends(worker, fetched) - sim.now if fetched else 0.0
                link = fetched * hardware.kv_bytes_per_token / min(hardware.worker_bytes_per_second, sim.pool_rate)
                prefill = hardware.prefill_seconds(one.prompt_tokens - loaded, loaded)
                price = max(wait, fetch + copy) + prefill * (1 + prices.stall * batch) + slower
                price += prices.link * fetching * link
                best = min(best, (price, worker.number, loaded if fetched else 0))
        return best[1], best[2]

    return decide


def _wait_seconds(now: float, worker: Worker, request: Request) -> float:
    """Seconds until the prompts before this one are computed and HBM has room for it."""
    hardware = worker.hardware
    wait = max(0.0, worker.prefill_ends - now) if worker.prefilling else 0.0
    wait += sum(hardware.prefill_seconds(queued.prefill_tokens, queued.loaded_tokens) for queued in worker.ready)
    tokens = worker.running_tokens + sum(queued.tokens for queued in worker.ready) + request.tokens
    if tokens <= hardware.hbm_tokens:
        return wait
    for ends_at_step, _, running in sorted(worker.running):
        tokens -= running.tokens
        if tokens <= hardware.hbm_tokens:
            return wait + (ends_at_step - worker.steps) * hardware.step_seconds(len(worker.running))
    return wait + request.conversation.answer_tokens * hardware.step_seconds(max(1, len(worker.running)))
