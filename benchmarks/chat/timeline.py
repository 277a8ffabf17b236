"""A long window in steps of a few seconds: the clients' figures over time, and the effect of a fault. One event
loop."""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec

from benchmarks.chat.energy import Meter
from benchmarks.chat.load import Endpoint, Point, Pool, Samples, answered, failures, mean, measure

STEP_SECONDS = 5.0
LOWEST_SECONDS = 30.0
_HITS_POLL_SECONDS = 0.25
_STORE_HITS = "kvtier_fetched_chunks:hit"


class Moment(msgspec.Struct):
    """Figures of the requests that ended in a step; None without any."""

    second: float  # of the window, at the end of the step
    requests_per_second: float
    ttft_ms_mean: float | None
    tpot_ms_mean: float | None
    failed: int


class Fault(msgspec.Struct):
    """A process that was killed and restarted; times are seconds of the window."""

    process: str
    killed: float | None = None
    started: float | None = None  # when it was ready again
    hits_back_seconds: float | None = None  # from `started` until the first fetch from the store


class Timeline(msgspec.Struct):
    mode: str
    clients: int
    moments: list[Moment] = []
    lowest: float | None = None  # requests per second in the lowest 30 s
    lowest_second: float | None = None  # the begin of those 30 s
    whole: Point | None = None  # the whole window, once it has ended
    fault: Fault | None = None


class Breaking(NamedTuple):
    """How to kill a process at a third of the window, and restart it at two thirds."""

    process: str
    kill: Callable[[], Awaitable[None]]
    start: Callable[[], Awaitable[None]]


async def follow(
    endpoint: Endpoint,
    pool: Pool,
    timeline: Timeline,
    *,
    seconds: float,
    ramp_seconds: float,
    tell: Callable[[Moment], None],
    meter: Meter | None = None,
    breaking: Breaking | None = None,
) -> None:
    """Fill in the timeline for `seconds` after the ramp. `tell` is called with each step as it ends."""

    async def watch(samples: Samples) -> None:
        begin, taken = time.monotonic(), len(samples)
        broken = None
        if breaking:
            timeline.fault = Fault(breaking.process)
            broken = asyncio.create_task(_break(endpoint, breaking, timeline.fault, begin, seconds))
        try:
            for step in itertools.count(1):
                await asyncio.sleep(max(0.0, begin + min(step * STEP_SECONDS, seconds) - time.monotonic()))
                ended, taken = samples[taken:], len(samples)
                add(timeline, ended, time.monotonic() - begin)
                tell(timeline.moments[-1])
                if step * STEP_SECONDS >= seconds:
                    break
            if broken:
                await broken
        finally:
            if broken:
                broken.cancel()

    timeline.whole = await measure(
        endpoint,
        pool,
        timeline.mode,
        timeline.clients,
        seconds=seconds,
        ramp_seconds=ramp_seconds,
        meter=meter,
        watch=watch,
    )


async def _break(endpoint: Endpoint, breaking: Breaking, fault: Fault, begin: float, seconds: float) -> None:
    def now() -> float:
        return round(time.monotonic() - begin, 2)

    await asyncio.sleep(max(0.0, seconds / 3 - now()))
    fault.killed = now()
    await breaking.kill()
    await asyncio.sleep(max(0.0, 2 * seconds / 3 - now()))
    await breaking.start()
    fault.started = now()
    before = (await endpoint.counters()).get(_STORE_HITS, 0.0)
    while fault.hits_back_seconds is None:
        await asyncio.sleep(_HITS_POLL_SECONDS)
        if (await endpoint.counters()).get(_STORE_HITS, 0.0) > before:
            fault.hits_back_seconds = round(now() - fault.started, 2)
        elif now() >= seconds:
            return


def add(timeline: Timeline, samples: Samples, second: float) -> None:
    """Add the step that ends at `second`, with the requests that ended in it."""
    earlier = timeline.moments[-1].second if timeline.moments else 0.0
    ended = answered(samples)
    ttfts = [1000 * one.ttft_seconds for one in ended]
    tpots = [1000 * one.tpot_seconds for one in ended if one.output_tokens > 1]
    timeline.moments.append(
        Moment(
            round(second, 2),
            round(len(ended) / (second - earlier), 3),
            round(mean(ttfts), 1) if ttfts else None,
            round(mean(tpots), 2) if tpots else None,
            len(failures(samples)),
        )
    )
    timeline.lowest, timeline.lowest_second = lowest(timeline.moments)


def lowest(moments: Sequence[Moment]) -> tuple[float | None, float | None]:
    """The lowest requests per second over 30 s of whole steps, and its begin; None before 30 s."""
    found: tuple[float, float] | None = None
    begins = [0.0, *(one.second for one in moments)]
    for first, begin in enumerate(begins):
        requests = 0.0
        for one, since in zip(moments[first:], begins[first:], strict=False):
            requests += one.requests_per_second * (one.second - since)
            if one.second - begin >= LOWEST_SECONDS - STEP_SECONDS / 10:
                found = min(found or (math.inf, 0.0), (round(requests / (one.second - begin), 3), begin))
                break
    return found or (None, None)
