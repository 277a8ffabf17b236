"""A simulator of workers, their tiers, the store and the load, to compare routing policies. Everything is simulated.

The engines are those of engine_model.py. HBM and DRAM keep whole prefixes with LRU eviction. With every policy, hits
have whole blocks in HBM and whole chunks in DRAM and store. Computed KV is in the store once the request has ended.
"""

import heapq
import itertools
import random
from abc import abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.routing import engine_model
from benchmarks.routing.engine_model import Engines, Hardware, Job
from benchmarks.routing.trace import Traced
from components.pricing.answers import Answers

BLOCK_TOKENS = 16
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """The shape of conversations: ranges of turns, and of tokens of the shared prefix, opening, question and answer;
    the number of different shared prefixes."""

    name: str
    turns: tuple[int, int]
    opening: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]
    shared_tokens: int = 0
    shared: int = 1


CHAT = Shape("multi-turn", (2, 28), (200, 500), (20, 60), (100, 230))
AGENTS = Shape("agents and documents", (3, 20), (200, 4000), (50, 600), (30, 200), 1536, 8)
# Synthetic, with the means of the Kimi trace that Mooncake published (arXiv 2407.00079v3, section 4). These are 7,590
# tokens in, 182 out, half of the input seen before. Its distribution and timing are not reproduced.
KIMI = Shape("means of Mooncake's trace", (1, 4), (500, 3000), (500, 9800), (80, 284), 500, 4)


class Prompt(Protocol):
    """A request's prompt."""

    @property
    def key(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def answer_tokens(self) -> int: ...
    def path(self, tokens: int) -> Sequence[tuple[int, int]]:
        """The parts of its first `tokens`, as key and tokens: prompts share a part that has the same key."""


class Conversation:
    """A conversation's turns. `key` identifies its own prefix, `shared` the prefix that it shares with others."""

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

    def path(self, tokens: int) -> Sequence[tuple[int, int]]:
        own = (self.key, tokens - self.shared_tokens)
        return ((self.shared, self.shared_tokens), own) if self.shared_tokens else (own,)


Holders = defaultdict[int, Counter[int]]  # key -> worker -> how many of its caches hold it


class Cache:
    """An LRU cache of prefixes by key. `holders` counts for each key the caches of each worker that hold it."""

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
    conversation: Prompt
    predicted_seconds: float = 0.0  # predicted TTFT, if the policy predicts
    queued: bool = False  # predicted to queue, if the policy predicts


Worker = engine_model.Worker[Request]


@dataclass(frozen=True)
class Seen:
    """The cached tokens of a prompt on one worker, from its start."""

    hbm: int
    dram: int  # or in HBM, whichever is more
    store: int


@dataclass(frozen=True)
class Outcome:
    requests_per_second: float
    ttft_ms_mean: float
    ttft_ms_median: float
    ttft_ms_p99: float
    tpot_ms_mean: float


Policy = Callable[["Simulation", Request], tuple[int, int]]  # -> worker, prompt tokens to fetch from the store


class Simulation(Engines[Request]):
    """Workers, tiers and the store with a policy. Subclasses define the load. The durations of prefills and fetches
    have lognormal `noise`. `observe` is called at each first token. `each` lists unequal workers' hardware."""

    def __init__(
        self, hardware: Hardware, workers: int, policy: Policy, *, store: bool, seed: int = 1, noise: float = 0.0,
        each: Sequence[Hardware] = (), observe: Callable[[Request], None] | None = None,
    ):  # fmt: skip
        super().__init__(hardware, workers, each)
        self._now = 0.0
        self._holders: Holders = defaultdict(Counter)
        self._hbm = [Cache(hardware.hbm_tokens, self._holders, number) for number in range(workers)]
        self._dram = [Cache(hardware.dram_tokens, self._holders, number) for number in range(workers)]
        self.store: dict[int, int] | None = {} if store else None
        self._observe = observe
        self._noise, self._noisy = noise, random.Random(seed + 1)
        self._policy = policy
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._done: list[tuple[float, float, float]] = []  # ended, ttft, tpot
        self.answers = [Answers() for _ in range(workers)]

    @abstractmethod
    def _answered(self, request: Request) -> None:
        """The request has its last token."""

    @property
    def now(self) -> float:
        return self._now

    def _play(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self._now, _, event = heapq.heappop(self._events)
            event()

    def _outcome(self, since: float, seconds: float) -> Outcome:
        """The result of the requests that ended in the `seconds` after `since`."""
        done = [(ttft, tpot) for ended, ttft, tpot in self._done if ended >= since]
        if not done:
            return Outcome(0.0, 0.0, 0.0, 0.0, 0.0)
        ttfts = sorted(ttft for ttft, _ in done)
        return Outcome(
            round(len(done) / seconds, 3),
            round(1000 * sum(ttfts) / len(ttfts), 1),
            round(1000 * ttfts[len(ttfts) // 2], 1),
            round(1000 * ttfts[int(0.99 * len(ttfts))], 1),
            round(1000 * sum(tpot for _, tpot in done) / len(done), 2),
        )

    def seen(self, worker: Worker, one: Prompt) -> Seen:
        hbm = _held(one, self._hbm[worker.number].get, BLOCK_TOKENS)
        dram = max(hbm, _held(one, self._dram[worker.number].get, CHUNK_TOKENS))
        return Seen(hbm, dram, self._stored(one))

    def seen_by_all(self, one: Prompt) -> list[Seen]:
        """The cached tokens on every worker. Most have none."""
        seen = [Seen(0, 0, self._stored(one))] * len(self.workers)
        first, _ = one.path(one.prompt_tokens)[0]
        for number in self._holders.get(first, ()):
            seen[number] = self.seen(self.workers[number], one)
        return seen

    def _stored(self, one: Prompt) -> int:
        store = self.store or {}
        return _held(one, lambda key: store.get(key, 0), CHUNK_TOKENS)

    def _off(self) -> float:
        return self._noisy.lognormvariate(0, self._noise) if self._noise else 1.0

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), event))

    def _ask(self, one: Prompt) -> None:
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
        self._keep(request.worker, request.conversation, request.tokens)
        self.answers[request.worker].add(request.answer_tokens, self.now - request.first)
        tpot = (self.now - request.first) / max(1, request.answer_tokens - 1)
        self._done.append((self.now, request.first - request.arrived, tpot))
        self._answered(request)

    def _keep(self, number: int, one: Prompt, tokens: int) -> None:
        """Touch the beginning last, so that it is evicted after what follows it."""
        for key, held in reversed(one.path(tokens)):
            self._hbm[number].put(key, held)
            self._dram[number].put(key, held)
            if self.store is not None:
                self.store[key] = max(held, self.store.get(key, 0))


def _held(one: Prompt, get: Callable[[int], int], unit: int) -> int:
    """Cached tokens of the prompt from its start, in whole units. The last token is always computed."""
    total = 0
    for key, tokens in one.path(one.prompt_tokens):
        found = min(tokens, get(key))
        total += found
        if found < tokens:
            break
    return min(one.prompt_tokens - 1, total) // unit * unit


class ClosedLoop(Simulation):
    """A closed loop: `clients` over a pool of conversations, which take turns in order."""

    def __init__(
        self, hardware: Hardware, workers: int, clients: int, pool: int, shape: Shape, policy: Policy, *,
        store: bool, seed: int = 1, noise: float = 0.0, each: Sequence[Hardware] = (),
        observe: Callable[[Request], None] | None = None,
    ):  # fmt: skip
        super().__init__(hardware, workers, policy, store=store, seed=seed, noise=noise, each=each, observe=observe)
        self._clients = clients
        self._shape = shape
        self._seed = seed
        self._keys = itertools.count(1)
        chance = random.Random(seed)
        self._waiting: deque[Conversation] = deque()
        while len(self._waiting) < pool:
            one = self._new()
            if chance.random() < one.turns / shape.turns[1]:
                for _ in range(chance.randrange(one.turns)):
                    one.go_on()
                self._waiting.append(one)
                self._keep(len(self._waiting) % workers, one, one.prompt_tokens)

    def _new(self) -> Conversation:
        return Conversation(next(self._keys), self._shape, self._seed)

    def run(self, seconds: float, ramp_seconds: float) -> Outcome:
        for number in range(self._clients):
            self._at(ramp_seconds / 2 * number / self._clients, lambda: self._ask(self._waiting.popleft()))
        self._play(ramp_seconds + seconds)
        return self._outcome(ramp_seconds, seconds)

    def _answered(self, request: Request) -> None:
        one = request.conversation
        assert isinstance(one, Conversation)
        one.go_on()
        self._waiting.append(self._new() if one.turn >= one.turns else one)
        self._at(self.now, lambda: self._ask(self._waiting.popleft()))


class Replay(Simulation):
    """A trace: each request at its own time, `pace` times as fast. A turn waits for the answer before it, and then for
    `think_seconds`. With a higher pace, more turns wait. Requests that no worker's HBM could hold are left out and
    counted in `left_out`."""

    def __init__(
        self, hardware: Hardware, workers: int, trace: Sequence[Traced], policy: Policy, *, pace: float,
        think_seconds: float, store: bool, seed: int = 1, noise: float = 0.0, each: Sequence[Hardware] = (),
    ):  # fmt: skip
        super().__init__(hardware, workers, policy, store=store, seed=seed, noise=noise, each=each)
        self._trace = [one for one in trace if one.prompt_tokens + one.answer_tokens <= hardware.hbm_tokens]
        self.left_out = len(trace) - len(self._trace)
        self._pace, self._think = pace, think_seconds
        self._open = {one.key for one in self._trace}
        self._next_turns: defaultdict[int, list[Traced]] = defaultdict(list)  # by the turn that they wait for

    def run(self) -> Outcome:
        for one in self._trace:
            self._at(one.seconds / self._pace, lambda one=one: self._due(one))  # type: ignore[misc]
        self._play(float("inf"))
        return self._outcome(0, self.now)

    def _due(self, one: Traced) -> None:
        if one.follows in self._open:
            self._next_turns[one.follows].append(one)
        else:
            self._ask(one)

    def _answered(self, request: Request) -> None:
        key = request.conversation.key
        self._at(self.now + self._think, lambda: self._thought(key))

    def _thought(self, key: int) -> None:
        """The think time after an answer is over: send the next turn."""
        self._open.remove(key)
        for one in self._next_turns.pop(key, ()):
            self._ask(one)
