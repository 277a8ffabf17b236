"""A simulator of workers, their tiers, the store and the load, to compare routing policies. Everything is simulated.

The numbers are those of Llama-3.1-70B FP8 on one H200: prefill, decode step by batch, KV bytes a token. A worker either
prefills one prompt or decodes a batch; a prefill holds the decodes up but for a token every 2048 prompt tokens, as
chunked prefill does. HBM and DRAM keep whole prefixes, least recently used first out; a hit is of whole blocks in HBM
and of whole chunks below it, whoever routes. Fetches run from a request's arrival on, in the order of arrival, over the
worker's link and that of all targets together. What is computed is in the store once the request has ended.
"""

import heapq
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

STEPS = ((1, 0.022), (16, 0.025), (48, 0.032))  # batch, seconds a decode step
BLOCK_TOKENS = 16
CHUNK_TOKENS = 256
PREFILL_TOKENS = 2048  # at once; then what decodes gets a token


@dataclass(frozen=True)
class Hardware:
    """Of each worker, and of the store."""

    # Through the cold times to first token of 2200 and 8000 tokens (290 and 1135 ms), less what does not keep the GPU.
    overhead_seconds: float = 0.03
    prefill_base_seconds: float = 0.012
    prefill_seconds_per_token: float = 9.68e-5
    prefill_seconds_per_token_squared: float = 9.5e-9
    kv_bytes_per_token: int = 320 << 10
    hbm_tokens: int = 48_000
    dram_tokens: int = 100_000
    dram_bytes_per_second: float = 36e9
    worker_bytes_per_second: float = 5e9
    target_bytes_per_second: float = 5e9
    workers_a_target: int = 2
    store_latency_seconds: float = 0.003

    def prefill_seconds(self, missing: int, context: int) -> float:
        return (
            self.prefill_base_seconds
            + self.prefill_seconds_per_token * missing
            + self.prefill_seconds_per_token_squared * missing * (context + missing / 2)
        )


def step_seconds(batch: int) -> float:
    """A decode step of so many requests, by straight lines through what was measured."""
    for (low, before), (high, after) in itertools.pairwise(STEPS):
        if batch <= high or high == STEPS[-1][0]:
            return before + (after - before) * (batch - low) / (high - low)
    raise AssertionError


@dataclass(frozen=True)
class Shape:
    """Of conversations: turns, tokens of what many share, of the opening, of a question, of an answer; how many
    different shared beginnings there are."""

    name: str
    turns: tuple[int, int]
    opening: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]
    shared_tokens: int = 0
    shared: int = 1


CHAT = Shape("multi-turn", (2, 28), (200, 500), (20, 60), (100, 230))
AGENTS = Shape("agents and documents", (3, 20), (200, 4000), (50, 600), (30, 200), 1536, 8)
# Made up to have the means of the trace of Kimi published with Mooncake (arXiv 2407.00079v3, section 4): 7,590 tokens
# in, 182 out, half of the input seen before. Its distribution and its timing are not reproduced.
KIMI = Shape("means of Mooncake's trace", (1, 4), (500, 3000), (500, 9800), (80, 284), 500, 4)


class Conversation:
    """Its turns; `key` names its prefix, `shared` the beginning it has in common with others."""

    def __init__(self, key: int, shape: Shape, seed: int):
        self.key = key
        self._chance = random.Random(seed * 1_000_003 + key)
        self._shape = shape
        self.shared = -1 - self._chance.randrange(shape.shared)
        self.shared_tokens = shape.shared_tokens
        self.turns, self.turn = self._chance.randint(*shape.turns), 0
        self.prompt_tokens = shape.shared_tokens + self._chance.randint(*shape.opening)
        self.answer_tokens = self._chance.randint(*shape.answer)

    def go_on(self) -> None:
        self.prompt_tokens += self.answer_tokens + self._chance.randint(*self._shape.question)
        self.answer_tokens = self._chance.randint(*self._shape.answer)
        self.turn += 1


Holders = defaultdict[int, Counter[int]]  # key -> worker -> its caches that have it


class Cache:
    """Prefixes by key, least recently used first out. `holders` says for each key which workers' caches have it, and
    how often."""

    def __init__(self, tokens: int, holders: Holders | None = None, worker: int = 0):
        self._holders = holders if holders is not None else defaultdict(Counter)
        self._worker = worker
        self.capacity_tokens = tokens
        self.used_tokens = 0
        self._held: OrderedDict[int, int] = OrderedDict()

    def get(self, key: int) -> int:
        return self._held.get(key, 0)

    def put(self, key: int, tokens: int) -> None:
        before = self._held.pop(key, 0)
        if not before:
            self._holders[key][self._worker] += 1
        self._held[key] = max(tokens, before)
        self.used_tokens += max(tokens, before) - before
        self.shrink(self.capacity_tokens)

    def shrink(self, tokens: int) -> None:
        while self.used_tokens > tokens and self._held:
            key, gone = self._held.popitem(last=False)
            self.used_tokens -= gone
            workers = self._holders[key]
            workers[self._worker] -= 1
            if not workers[self._worker]:
                del workers[self._worker]
            if not workers:
                del self._holders[key]


@dataclass
class Request:
    conversation: Conversation
    arrived: float
    worker: int = 0
    fetch_tokens: int = 0
    loaded_tokens: int = 0
    prefill_tokens: int = 0  # as decided
    predicted_seconds: float = 0.0  # to its first token, where the policy says it
    first: float = 0.0
    ends_at_step: float = 0.0

    @property
    def tokens(self) -> int:
        return self.conversation.prompt_tokens + self.conversation.answer_tokens


@dataclass
class Worker:
    number: int
    hbm: Cache
    dram: Cache
    link_free: float = 0.0
    ready: deque[Request] = field(default_factory=deque)
    fetching: int = 0  # requests that wait for the store
    fetching_tokens: int = 0
    queued_tokens: int = 0  # to compute, not begun
    prefilling: Request | None = None
    prefill_ends: float = 0.0
    steps: float = 0.0
    since: float = 0.0
    version: int = 0
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    running_tokens: int = 0

    @property
    def prefill_tokens(self) -> int:
        """To compute for prompts without a first token, as Dynamo's books have it."""
        return self.queued_tokens + (self.prefilling.prefill_tokens if self.prefilling else 0)


@dataclass(frozen=True)
class Seen:
    """What one worker has of a prompt, in tokens from its start."""

    hbm: int
    dram: int  # or HBM, whichever is more
    store: int


@dataclass(frozen=True)
class Outcome:
    requests_per_second: float
    ttft_ms_mean: float
    ttft_ms_p99: float
    tpot_ms_mean: float


Policy = Callable[["Simulation", Request], tuple[int, int]]  # worker, tokens of the prompt wanted from the store


class Simulation:
    """Closed loop of `clients` over a pool of conversations, each of which waits until all others had a turn. What a
    prefill and a fetch take is off by `noise`, in logarithms; `observe` is told of each first token."""

    def __init__(
        self, hardware: Hardware, workers: int, clients: int, pool: int, shape: Shape, policy: Policy, *,
        store: bool, seed: int = 1, noise: float = 0.0, observe: Callable[[Request], None] | None = None,
    ):  # fmt: skip
        self.hardware = hardware
        self.now = 0.0
        self._holders: Holders = defaultdict(Counter)
        self.workers = [
            Worker(n, Cache(hardware.hbm_tokens, self._holders, n), Cache(hardware.dram_tokens, self._holders, n))
            for n in range(workers)
        ]
        self.store: dict[int, int] | None = {} if store else None
        self.pool_rate = hardware.target_bytes_per_second * max(1, workers // hardware.workers_a_target)
        self.pool_free = 0.0
        self._clients = clients
        self._observe = observe
        self._noise, self._noisy = noise, random.Random(seed + 1)
        self._policy = policy
        self._shape = shape
        self._seed = seed
        self._keys = itertools.count(1)
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._done: list[tuple[float, float, float]] = []  # ended, ttft, tpot
        chance = random.Random(seed)
        self._waiting: deque[Conversation] = deque()
        while len(self._waiting) < pool:
            one = self._new()
            if chance.random() < one.turns / shape.turns[1]:
                for _ in range(chance.randrange(one.turns)):
                    one.go_on()
                self._waiting.append(one)
                self._keep(self.workers[len(self._waiting) % workers], one, one.prompt_tokens)

    def _new(self) -> Conversation:
        return Conversation(next(self._keys), self._shape, self._seed)

    def run(self, seconds: float, ramp_seconds: float) -> Outcome:
        for number in range(self._clients):
            self._at(ramp_seconds / 2 * number / self._clients, self._arrive)
        while self._events and self._events[0][0] <= ramp_seconds + seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()
        done = [(ttft, tpot) for ended, ttft, tpot in self._done if ended >= ramp_seconds]
        if not done:
            return Outcome(0.0, 0.0, 0.0, 0.0)
        ttfts = sorted(ttft for ttft, _ in done)
        return Outcome(
            round(len(done) / seconds, 3),
            round(1000 * sum(ttfts) / len(ttfts), 1),
            round(1000 * ttfts[int(0.99 * len(ttfts))], 1),
            round(1000 * sum(tpot for _, tpot in done) / len(done), 2),
        )

    def seen(self, worker: Worker, one: Conversation) -> Seen:
        most = one.prompt_tokens - 1

        def held(get: Callable[[int], int], unit: int) -> int:
            return min(most, max(get(one.key), min(get(one.shared), one.shared_tokens)) // unit * unit)

        hbm = held(worker.hbm.get, BLOCK_TOKENS)
        dram = max(hbm, held(worker.dram.get, CHUNK_TOKENS))
        store = self.store or {}
        return Seen(hbm, dram, held(lambda key: store.get(key, 0), CHUNK_TOKENS))

    def seen_by_all(self, one: Conversation) -> list[Seen]:
        """By every worker: most have nothing of it."""
        store = self.store or {}
        held = max(store.get(one.key, 0), min(store.get(one.shared, 0), one.shared_tokens))
        nothing = Seen(0, 0, min(one.prompt_tokens - 1, held // CHUNK_TOKENS * CHUNK_TOKENS))
        seen = [nothing] * len(self.workers)
        for key in (one.key, one.shared):
            for number in self._holders.get(key, ()):
                seen[number] = self.seen(self.workers[number], one)
        return seen

    def fetch_ends(self, worker: Worker, tokens: int) -> float:
        """When so many tokens' KV would be in the worker's DRAM, asked for now."""
        size = tokens * self.hardware.kv_bytes_per_token
        by_link = max(self.now, worker.link_free) + size / self.hardware.worker_bytes_per_second
        by_pool = max(self.now, self.pool_free) + size / self.pool_rate
        return max(by_link, by_pool) + self.hardware.store_latency_seconds

    def _off(self) -> float:
        return self._noisy.lognormvariate(0, self._noise) if self._noise else 1.0

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), event))

    def _arrive(self) -> None:
        request = Request(self._waiting.popleft(), self.now)
        number, wanted = self._policy(self, request)
        worker = self.workers[number]
        seen = self.seen(worker, request.conversation)
        request.worker = number
        request.fetch_tokens = max(0, min(wanted, seen.store) - seen.dram)
        request.loaded_tokens = seen.dram + request.fetch_tokens
        request.prefill_tokens = request.conversation.prompt_tokens - request.loaded_tokens
        worker.queued_tokens += request.prefill_tokens
        copied = (request.loaded_tokens - seen.hbm) * self.hardware.kv_bytes_per_token
        ready = self.now + self.hardware.overhead_seconds
        if request.fetch_tokens:
            off = self._off()
            ready += self.fetch_ends(worker, int(request.fetch_tokens * off)) - self.now
            size = request.fetch_tokens * self.hardware.kv_bytes_per_token * off
            worker.link_free = max(self.now, worker.link_free) + size / self.hardware.worker_bytes_per_second
            self.pool_free = max(self.now, self.pool_free) + size / self.pool_rate
            worker.fetching_tokens += request.fetch_tokens
            worker.fetching += 1
        self._at(ready + copied / self.hardware.dram_bytes_per_second, lambda: self._ready(worker, request))

    def _ready(self, worker: Worker, request: Request) -> None:
        worker.fetching_tokens -= request.fetch_tokens
        worker.fetching -= request.fetch_tokens > 0
        worker.ready.append(request)
        self._step(worker)

    def _step(self, worker: Worker) -> None:
        """Bring the worker up to now, and see what it does next."""
        if worker.prefilling is None and worker.running:
            worker.steps += (self.now - worker.since) / step_seconds(len(worker.running))
        worker.since = self.now
        while worker.prefilling is None and worker.running and worker.running[0][0] <= worker.steps + 1e-6:
            self._finish(worker, heapq.heappop(worker.running)[2])
        worker.version += 1
        if worker.prefilling is None and worker.ready:
            request = worker.ready[0]
            if not worker.running or worker.running_tokens + request.tokens <= self.hardware.hbm_tokens:
                self._prefill(worker, worker.ready.popleft())
        version = worker.version
        if worker.prefilling is None and worker.running:
            left = (worker.running[0][0] - worker.steps) * step_seconds(len(worker.running))
            self._at(self.now + max(0.0, left), lambda: self._step(worker) if worker.version == version else None)

    def _prefill(self, worker: Worker, request: Request) -> None:
        one = request.conversation
        worker.prefilling = request
        worker.queued_tokens -= request.prefill_tokens
        worker.running_tokens += request.tokens
        worker.hbm.capacity_tokens = max(0, self.hardware.hbm_tokens - worker.running_tokens)
        worker.hbm.shrink(worker.hbm.capacity_tokens)
        chunks = -(-request.prefill_tokens // PREFILL_TOKENS)
        took = self.hardware.prefill_seconds(request.prefill_tokens, one.prompt_tokens - request.prefill_tokens)
        worker.prefill_ends = self.now + took * self._off()

        def ended() -> None:
            worker.steps += chunks if worker.running else 0
            worker.since = self.now
            worker.prefilling = None
            request.first = self.now
            if self._observe is not None:
                self._observe(request)
            request.ends_at_step = worker.steps + one.answer_tokens - 1
            heapq.heappush(worker.running, (request.ends_at_step, next(self._count), request))
            self._step(worker)

        self._at(worker.prefill_ends, ended)

    def _finish(self, worker: Worker, request: Request) -> None:
        one = request.conversation
        worker.running_tokens -= request.tokens
        worker.hbm.capacity_tokens = max(0, self.hardware.hbm_tokens - worker.running_tokens)
        self._keep(worker, one, request.tokens)
        tpot = (self.now - request.first) / max(1, one.answer_tokens - 1)
        self._done.append((self.now, request.first - request.arrived, tpot))
        one.go_on()
        self._waiting.append(self._new() if one.turn >= one.turns else one)
        self._at(self.now, self._arrive)

    def _keep(self, worker: Worker, one: Conversation, tokens: int) -> None:
        for key, held in ((one.key, tokens), (one.shared, one.shared_tokens)):
            if held:
                worker.hbm.put(key, held)
                worker.dram.put(key, held)
                if self.store is not None:
                    self.store[key] = max(held, self.store.get(key, 0))
