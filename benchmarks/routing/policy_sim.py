"""A simulator of workers, their tiers, the store and the load, to compare routing policies. Everything is simulated.

The engines are those of engine_model.py. HBM and DRAM keep whole prefixes, least recently used first out; a
hit is of whole blocks in HBM and of whole chunks below it, whoever routes. What is computed is in the store once the
request has ended.
"""

import heapq
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.routing import engine_model
from benchmarks.routing.engine_model import Engines, Hardware, Job

BLOCK_TOKENS = 16
CHUNK_TOKENS = 256


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


@dataclass(eq=False, kw_only=True)
class Request(Job):
    conversation: Conversation
    predicted_seconds: float = 0.0  # to its first token, where the policy says it


Worker = engine_model.Worker[Request]


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


class Simulation(Engines[Request]):
    """Closed loop of `clients` over a pool of conversations, each of which waits until all others had a turn. What a
    prefill and a fetch take is off by `noise`, in logarithms; `observe` is told of each first token."""

    def __init__(
        self, hardware: Hardware, workers: int, clients: int, pool: int, shape: Shape, policy: Policy, *,
        store: bool, seed: int = 1, noise: float = 0.0, observe: Callable[[Request], None] | None = None,
    ):  # fmt: skip
        super().__init__(hardware, workers)
        self._now = 0.0
        self._holders: Holders = defaultdict(Counter)
        self._hbm = [Cache(hardware.hbm_tokens, self._holders, number) for number in range(workers)]
        self._dram = [Cache(hardware.dram_tokens, self._holders, number) for number in range(workers)]
        self.store: dict[int, int] | None = {} if store else None
        self._clients = clients
        self._observe = observe
        self._noise, self._noisy = noise, random.Random(seed + 1)
        self._policy = policy
        self._shape = shape
        self._seed = seed
        self._keys = itertools.count(1)
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
                self._keep(len(self._waiting) % workers, one, one.prompt_tokens)

    @property
    def now(self) -> float:
        return self._now

    def _new(self) -> Conversation:
        return Conversation(next(self._keys), self._shape, self._seed)

    def run(self, seconds: float, ramp_seconds: float) -> Outcome:
        for number in range(self._clients):
            self._at(ramp_seconds / 2 * number / self._clients, self._arrive)
        while self._events and self._events[0][0] <= ramp_seconds + seconds:
            self._now, _, event = heapq.heappop(self._events)
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

        hbm = held(self._hbm[worker.number].get, BLOCK_TOKENS)
        dram = max(hbm, held(self._dram[worker.number].get, CHUNK_TOKENS))
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

    def _off(self) -> float:
        return self._noisy.lognormvariate(0, self._noise) if self._noise else 1.0

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), event))

    def _arrive(self) -> None:
        one = self._waiting.popleft()
        request = Request(one.prompt_tokens, one.answer_tokens, self.now, conversation=one)
        request.worker, wanted = self._policy(self, request)
        seen = self.seen(self.workers[request.worker], one)
        request.fetch_tokens = max(0, min(wanted, seen.store) - seen.dram)
        request.loaded_tokens = seen.dram + request.fetch_tokens
        self._admit(request, seen.hbm)

    def _room(self, number: int, tokens: int) -> None:
        self._hbm[number].capacity_tokens = tokens
        self._hbm[number].shrink(tokens)

    def _began(self, request: Request) -> None:
        if self._observe is not None:
            self._observe(request)

    def _ended(self, request: Request) -> None:
        one = request.conversation
        self._keep(request.worker, one, request.tokens)
        tpot = (self.now - request.first) / max(1, one.answer_tokens - 1)
        self._done.append((self.now, request.first - request.arrived, tpot))
        one.go_on()
        self._waiting.append(self._new() if one.turn >= one.turns else one)
        self._at(self.now, self._arrive)

    def _keep(self, number: int, one: Conversation, tokens: int) -> None:
        for key, held in ((one.key, tokens), (one.shared, one.shared_tokens)):
            if held:
                self._hbm[number].put(key, held)
                self._dram[number].put(key, held)
                if self.store is not None:
                    self.store[key] = max(held, self.store.get(key, 0))
