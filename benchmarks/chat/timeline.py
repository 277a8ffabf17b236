"""A long window in steps: what clients saw every few seconds, and what a fault did to them. One event loop."""

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
    """What ended in a step. None where nothing did."""

    second: float  # of the window, at the end of the step
    requests_per_second: float
    ttft_ms_mean: float | None
    tpot_ms_mean: float | None
    failed: int


class Fault(msgspec.Struct):
    """A process that was killed and started again, in seconds of the window."""

    process: str
    killed: float | None = None
    started: float | None = None  # when it was ready again
    hits_back_seconds: float | None = None  # from then until something was fetched from the store again


class Timeline(msgspec.Struct):
    mode: str
    clients: int
    moments: list[Moment] = []
    lowest: float | None = None  # requests per second in the lowest 30 s
    lowest_second: float | None = None  # when they began
    whole: Point | None = None  # once it has ended
    fault: Fault | None = None


class Breaking(NamedTuple):
    """How a process is killed, at a third of the window, and started again, at two thirds."""

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
    """Fill in the timeline, for so many seconds after the ramp. `tell` gets each step as it ends."""

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
    """The step that ends at `second`, in which these ended."""
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
    """Requests per second in the lowest 30 s of whole steps, and when they began; None before there were as many."""
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
