"""The load of the multi-turn benchmark: conversations, the clients that play them, and the measurements.

Token ids in, token ids out: a turn's prompt is the previous prompt, its answer and the next question. So the cached
tokens of the previous turn are exactly a prefix of this one. One event loop.
"""

import asyncio
import contextlib
import itertools
import json
import math
import random
import re
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
import msgspec

from benchmarks.chat.energy import Meter


class Shape(NamedTuple):
    """The shape of conversations: ranges of turns, and of tokens of the opening, a question and an answer."""

    turns: tuple[int, int]
    opening: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]


# A turn adds 40 + 165 tokens on average, and the average turn is number 9. With this opening, the mean prompt has 2,200
# tokens.
CHAT = Shape((2, 28), (200, 500), (20, 60), (100, 230))
# The same lengths without further turns: a cache can only cost.
FRESH = Shape((1, 1), (400, 4000), (20, 60), (100, 230))
# Ids of plain text in any vocabulary: above the special tokens, and still bytes in a byte tokenizer.
TOKEN_IDS = (40, 120)
REQUEST_SECONDS = 120.0
_BEGINNING = 0.9  # share of the ramp in which clients start; in the rest the last client's first prompt is computed
_COUNTER = re.compile(r'vllm:(?P<name>\w+)_total(?:\{(?:.*(?:source|outcome)="(?P<label>\w+)")?.*\})? (?P<value>\S+)$')


class Conversation:
    """One conversation, decided by its seed: how many turns, and how long each question and answer is."""

    def __init__(self, seed: int, shape: Shape = CHAT, *, scale: float = 1.0):
        self._chance = random.Random(seed)
        self._shape = shape
        self._scale = scale
        self.turns = self._chance.randint(*shape.turns)
        self.turn = 0
        self.known = 0  # leading prompt tokens from earlier turns
        self.prompt: list[int] = self._tokens(shape.opening)
        self.answer_tokens = self._length(shape.answer)

    def _length(self, bounds: tuple[int, int]) -> int:
        return max(1, round(self._scale * self._chance.randint(*bounds)))

    def _tokens(self, bounds: tuple[int, int]) -> list[int]:
        return self._chance.choices(range(*TOKEN_IDS), k=self._length(bounds))

    @property
    def ended(self) -> bool:
        return self.turn >= self.turns

    def go_on(self, answer: Sequence[int]) -> None:
        """Continue after an answered turn with the next question."""
        self.prompt += answer
        self.known = len(self.prompt)
        self.prompt += self._tokens(self._shape.question)
        self.answer_tokens = self._length(self._shape.answer)
        self.turn += 1

    def skip_to(self, turn: int) -> None:
        """Skip to a turn, as if the turns before it had been played."""
        while self.turn < turn:
            self.go_on(self._chance.choices(range(*TOKEN_IDS), k=self.answer_tokens))


class Pool:
    """Conversations at all stages. They take turns in order; one that has ended is replaced by a new one."""

    def __init__(self, size: int, seed: int, shape: Shape = CHAT, *, scale: float = 1.0):
        self._shape = shape
        self._seeds: Iterator[int] = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
        self._scale = scale
        chance = random.Random(seed)
        self._waiting: deque[Conversation] = deque()
        while len(self._waiting) < size:
            one = self._new()
            # Long conversations are sampled in proportion to their turns, at any turn.
            if chance.random() < one.turns / shape.turns[1]:
                one.skip_to(chance.randrange(one.turns))
                self._waiting.append(one)

    def _new(self) -> Conversation:
        return Conversation(next(self._seeds), self._shape, scale=self._scale)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt) for one in self._waiting)

    def take(self) -> Conversation:
        return self._waiting.popleft()

    def put(self, one: Conversation) -> None:
        self._waiting.append(self._new() if one.ended else one)

    def known(self) -> list[list[int]]:
        """The known prefixes of the next turns, in the order of the turns."""
        return [one.prompt[: one.known] for one in self._waiting if one.known]

    def __len__(self) -> int:
        return len(self._waiting)


@dataclass
class Answer:
    """Times of time.monotonic()."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)
    count: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds between chunks of the stream

    @property
    def ttft_seconds(self) -> float:
        return self.first - self.sent

    @property
    def tpot_seconds(self) -> float:
        return (self.last - self.first) / (self.count - 1) if self.count > 1 else math.nan


class Endpoint:
    """An OpenAI-compatible server whose completions take token ids. If it does not return token ids
    (`return_token_ids`), answers are replaced by other tokens of the same number, so only prompts are reused. Stock
    dynamo.frontend rejects that option: `asks_ids`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        *,
        asks_ids: bool = True,
        metrics: Sequence[str] = (),  # URLs of the engines' counters; default: the server's own
    ):
        self._session = session
        self._asks_ids = asks_ids
        self.url = url.rstrip("/")
        self.model = model
        self._metrics = metrics or (f"{self.url}/metrics",)

    async def complete(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Raises ConnectionError or TimeoutError without a complete answer."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"return_token_ids": True} if self._asks_ids else {}),
        }
        answer = Answer(time.monotonic())
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as reply:
                if reply.status != 200:
                    raise ConnectionError(f"{self.url}: status {reply.status}: {(await reply.text())[:300]}")
                async for line in reply.content:
                    if not line.startswith(b"data: {"):
                        continue
                    part = json.loads(line[6:])
                    if part.get("usage"):
                        answer.count = part["usage"]["completion_tokens"]
                    for choice in part.get("choices", ()):
                        ids = choice.get("token_ids") or []
                        if ids or choice.get("text"):
                            now = time.monotonic()
                            if answer.first:
                                answer.gaps.append(now - answer.last)
                            answer.first, answer.last = answer.first or now, now
                            answer.count += len(ids) or 1
                            answer.tokens += ids
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{self.url}: {error!r}") from None
        if not answer.count:
            raise ConnectionError(f"{self.url}: an answer without tokens")
        return answer

    async def counters(self) -> dict[str, float]:
        """The sums of the engines' Prometheus counters, by source or outcome if labelled. Engines that do not answer
        are left out."""
        sums: dict[str, float] = {}
        for line in itertools.chain(*await asyncio.gather(*(page_lines(self._session, url) for url in self._metrics))):
            found = _COUNTER.match(line)
            if found:
                name = f"{found['name']}:{found['label']}" if found["label"] else found["name"]
                sums[name] = sums.get(name, 0.0) + float(found["value"])
        return sums

    async def forget(self, *, external: bool) -> None:
        """Reset the engine's HBM cache and, with `external`, its DRAM tier. A store keeps its content."""
        query = "?reset_external=true" if external else ""
        async with self._session.post(f"{self.url}/reset_prefix_cache{query}") as reply:
            if reply.status != 200:
                raise ConnectionError(f"{self.url}: it does not reset its cache: status {reply.status}")


async def page_lines(session: aiohttp.ClientSession, url: str) -> list[str]:
    """The lines of a metrics page; none if it takes longer than five seconds."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(url, timeout=aiohttp.ClientTimeout(5)) as reply:
            if reply.status == 200:
                return (await reply.text()).splitlines()
    return []


class Point(msgspec.Struct):
    """One mode with one number of clients, over the requests that ended in the window."""

    mode: str
    clients: int
    seconds: float
    requests: int
    failed: int
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_mean: float
    ttft_ms_mean: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_mean: float
    gap_ms_p50: float  # between a request's tokens: the time of a decode step
    gap_ms_p99: float
    hbm_hit_share: float  # share of prompt tokens, by the engine's counters
    external_hit_share: float
    store_bytes_per_second: float  # fetched, if the tier counts them
    tier: dict[str, float]  # the tier's counters in the window
    first_failure: str = ""
    tpot_ms_p50: float = 0.0
    tpot_ms_p99: float = 0.0
    # Energy counters of the GPUs; 0: not measured. `over_idle` is the part above idle power.
    watts: float = 0.0
    idle_watts: float = 0.0
    joules_per_request: float = 0.0
    joules_per_request_over_idle: float = 0.0
    joules_per_1000_tokens: float = 0.0  # of output
    joules_per_1000_tokens_over_idle: float = 0.0


class _Sample(msgspec.Struct):
    ended: float
    prompt_tokens: int
    output_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    gaps: list[float]


Samples = list[_Sample | str]  # in the order in which they ended; of failed ones, the reason


def quantile(values: Sequence[float], share: float) -> float:
    """The value at that rank; NaN without values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


async def warm_up(endpoint: Endpoint, pool: Pool, clients: int) -> None:
    """Send each conversation's prompt, with a synthetic answer, for one output token. After it, all tiers are full, and
    every measured turn continues a known prefix."""
    left = len(pool)
    chance = random.Random(left)

    async def play() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            one = pool.take()
            answer = chance.choices(range(*TOKEN_IDS), k=one.answer_tokens)
            await asyncio.wait_for(endpoint.complete([*one.prompt, *answer], 1), REQUEST_SECONDS)
            one.go_on(answer)
            pool.put(one)

    await asyncio.gather(*(play() for _ in range(clients)))


async def ask_again(endpoint: Endpoint, pool: Pool, clients: int) -> None:
    """Send all known prefixes once more, so that they count as recently read."""
    prompts = iter(pool.known())

    async def ask() -> None:
        for prompt in prompts:
            await asyncio.wait_for(endpoint.complete(prompt, 1), REQUEST_SECONDS)

    await asyncio.gather(*(ask() for _ in range(clients)))


async def settled(endpoint: Endpoint, seconds: float, seconds_max: float) -> dict[str, float]:
    """Wait until nothing was stored for `seconds`; returns the counters. Without counters, wait once."""
    until = time.monotonic() + seconds_max
    counted = await endpoint.counters()
    while True:
        await asyncio.sleep(seconds)
        now = await endpoint.counters()
        if stored_bytes(now) == stored_bytes(counted) or time.monotonic() > until:
            return now
        counted = now


def of_tier(counted: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in counted.items() if name.startswith(("kvtier_", "kv_offload_"))}


def stored_bytes(counted: dict[str, float]) -> float:
    """Stored bytes by the tier's counters: vLLM's from HBM to DRAM, and kvtier's to the store."""
    return counted.get("kv_offload_store_bytes", 0.0) + counted.get("kvtier_stored_bytes", 0.0)


async def play(endpoint: Endpoint, pool: Pool) -> _Sample | str:
    """Play the next turn of a conversation. Returns the reason if it failed."""
    one = pool.take()
    prompt_tokens = len(one.prompt)
    try:
        answer = await asyncio.wait_for(endpoint.complete(one.prompt, one.answer_tokens), REQUEST_SECONDS)
    except (ConnectionError, TimeoutError) as error:
        pool.put(one)
        await asyncio.sleep(0.5)
        return str(error) or f"no answer within {REQUEST_SECONDS:.0f} s"
    one.go_on(answer.tokens or [TOKEN_IDS[0]] * answer.count)
    pool.put(one)
    return _Sample(answer.last, prompt_tokens, answer.count, answer.ttft_seconds, answer.tpot_seconds, answer.gaps)


async def measure(
    endpoint: Endpoint,
    pool: Pool,
    mode: str,
    clients: int,
    *,
    seconds: float,
    ramp_seconds: float,
    meter: Meter | None = None,
    watch: Callable[[Samples], Awaitable[None]] | None = None,
) -> Point:
    """A closed loop: each client plays one turn after the other. Requests that end in the window after the ramp count.
    `watch` runs in the window.

    Clients start one by one over the ramp. If they started together, their first prompts would wait for each other. The
    ramp must be longer than a request, or the window would measure that wait."""
    samples: Samples = []
    begin = time.monotonic() + ramp_seconds
    end = begin + seconds

    async def client(number: int) -> None:
        await asyncio.sleep(_BEGINNING * ramp_seconds * number / clients)
        while time.monotonic() < end:
            samples.append(await play(endpoint, pool))

    players = [asyncio.create_task(client(number)) for number in range(clients)]
    try:
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        before, drawn = await endpoint.counters(), meter.joules() if meter else 0.0
        if watch:
            await watch(samples)
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        after, drawn = await endpoint.counters(), (meter.joules() if meter else 0.0) - drawn
        took = time.monotonic() - begin
        await asyncio.gather(*players)
    finally:
        for player in players:
            player.cancel()
    ended = [one for one in answered(samples) if begin <= one.ended < begin + took]
    point = summary(mode, clients, ended, failures(samples), took, difference(after, before))
    return with_energy(point, drawn, meter.idle_watts) if meter else point


async def measure_all(endpoint: Endpoint, pool: Pool, mode: str, clients: int, requests: int) -> Point:
    """A closed loop over `requests` turns, the same for every engine, until all are answered. It is more precise than a
    window, in which a single request changes the result by some percent."""
    samples: Samples = []
    left = requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            samples.append(await play(endpoint, pool))

    before, begin = await endpoint.counters(), time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    took, after = time.monotonic() - begin, await endpoint.counters()
    return summary(mode, clients, answered(samples), failures(samples), took, difference(after, before))


def answered(samples: Sequence[_Sample | str]) -> list[_Sample]:
    return [one for one in samples if isinstance(one, _Sample)]


def failures(samples: Sequence[_Sample | str]) -> list[str]:
    return [one for one in samples if isinstance(one, str)]


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def summary(
    mode: str,
    clients: int,
    samples: Sequence[_Sample],
    failed: Sequence[str],
    seconds: float,
    counted: dict[str, float],
) -> Point:
    ttfts = [1000 * one.ttft_seconds for one in samples]
    tpots = [1000 * one.tpot_seconds for one in samples if one.output_tokens > 1]
    gaps = [1000 * gap for one in samples for gap in one.gaps]
    computed, hbm, tiers = (
        counted.get(f"prompt_tokens_by_source:{source}", 0.0)
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    )
    prompts = max(1.0, computed + hbm + tiers)
    return Point(
        mode=mode,
        clients=clients,
        seconds=round(seconds, 2),
        requests=len(samples),
        failed=len(failed),
        requests_per_second=round(len(samples) / seconds, 3),
        output_tokens_per_second=round(sum(one.output_tokens for one in samples) / seconds, 1),
        prompt_tokens_mean=round(mean([one.prompt_tokens for one in samples]), 1),
        ttft_ms_mean=round(mean(ttfts), 1),
        ttft_ms_p50=round(quantile(ttfts, 0.5), 1),
        ttft_ms_p99=round(quantile(ttfts, 0.99), 1),
        tpot_ms_mean=round(mean(tpots), 2),
        tpot_ms_p50=round(quantile(tpots, 0.5), 2),
        tpot_ms_p99=round(quantile(tpots, 0.99), 2),
        gap_ms_p50=round(quantile(gaps, 0.5), 2),
        gap_ms_p99=round(quantile(gaps, 0.99), 2),
        hbm_hit_share=round(hbm / prompts, 3),
        external_hit_share=round(tiers / prompts, 3),
        store_bytes_per_second=round(counted.get("kvtier_fetched_bytes", 0.0) / seconds),
        tier=of_tier(counted),
        first_failure=next(iter(failed), ""),
    )


def with_energy(point: Point, joules: float, idle_watts: float) -> Point:
    """The point, with the energy of its window."""
    over_idle = joules - idle_watts * point.seconds
    requests, thousands = point.requests or math.nan, point.output_tokens_per_second * point.seconds / 1000 or math.nan
    return msgspec.structs.replace(
        point,
        watts=round(joules / point.seconds, 1),
        idle_watts=idle_watts,
        joules_per_request=round(joules / requests, 1),
        joules_per_request_over_idle=round(over_idle / requests, 1),
        joules_per_1000_tokens=round(joules / thousands, 1),
        joules_per_1000_tokens_over_idle=round(over_idle / thousands, 1),
    )


class FirstToken(msgspec.Struct):
    """TTFT of single prompts, by the tier that held them."""

    mode: str
    prompt_tokens: int
    medium: str
    ttft_ms_median: float
    ttft_ms: list[float]  # sorted
    computed_share: float  # share of prompt tokens, by the engine's counters; 1: no hit in any tier


SETTLING_TOKENS = 300  # more than a chunk


async def first_tokens(
    endpoint: Endpoint, mode: str, prompt_tokens: int, repeats: int, seed: int, media: Sequence[str]
) -> list[FirstToken]:
    """Each repeat sends a new prompt, then sends it again after clearing one tier after the other."""
    chance, others = random.Random(seed), random.Random(-seed)
    times: dict[str, list[float]] = {medium: [] for medium in media}
    computed = dict.fromkeys(media, 0.0)

    async def ask(prompt: list[int], medium: str, *, counts: bool) -> None:
        before = await endpoint.counters()
        answer = await asyncio.wait_for(endpoint.complete(prompt, 2), REQUEST_SECONDS)
        if counts:
            times[medium].append(round(1000 * answer.ttft_seconds, 1))
            counted = difference(await endpoint.counters(), before)
            computed[medium] += counted.get("prompt_tokens_by_source:local_compute", 0.0)

    for repeat in range(-1, repeats):  # the first one warms up
        prompt = chance.choices(range(*TOKEN_IDS), k=prompt_tokens)
        for medium in media:
            await asyncio.sleep(1.0)  # for the write-behind; the same pause in every mode
            if medium in ("dram", "store"):
                await endpoint.forget(external=medium == "store")
                # With the tier, the identity of the weights is checked again; let another prompt wait for that.
                other = others.choices(range(*TOKEN_IDS), k=SETTLING_TOKENS)
                await asyncio.wait_for(endpoint.complete(other, 1), REQUEST_SECONDS)
            await ask(prompt, medium, counts=repeat >= 0)
    return [
        FirstToken(
            mode,
            prompt_tokens,
            medium,
            statistics.median(found),
            sorted(found),
            round(computed[medium] / (prompt_tokens * len(found)), 3),
        )
        for medium, found in times.items()
        if found
    ]
