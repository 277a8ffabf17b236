"""Builds the page's data once a second: totals, the last minute, lanes of workers and targets, alarms.

Only reads the router's state, and never runs on the path of a request. Single prompts are sampled, with a bound: a
number per second for the distributions, the newest few for the table. Totals are complete: the counters of Prometheus.
"""

import asyncio
import itertools
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from components.router.decisions import Decisions
from components.router.history import KEPT, History
from components.router.records import Considered, Decision
from components.router.series import Totals
from components.router.speeds import LiveSpeeds, prefill_tokens_per_second
from components.router.view import state as states
from components.router.view.alarms import alarms
from components.router.view.state import (
    SOURCES,
    Minute,
    Point,
    Sample,
    Saving,
    State,
    Summary,
    TargetLane,
    Update,
    WorkerLane,
)
from components.router.workers import Workers
from kvstore.bus.residency import Mirror

TICK_SECONDS = 1.0
WINDOW_SECONDS = 60
FAULT_WINDOW_SECONDS = 600
# With a full window, 19 samples lie above the p99, and the scatter plot is still readable.
SAMPLES_PER_SECOND = 32
POINTS_KEPT = 900
_SAMPLES_KEPT = 2048
# Rows for a viewer, at first and per tick: nobody can read more.
ROWS_FIRST, ROWS = 50, 10
# TTL of a worker's queue and memory, which come from the last decision.
_FRESH_SECONDS = 10.0

Item = TypeVar("Item")


class Growth:
    """Increase of counters over the last ticks; tolerates restarts of their owners."""

    def __init__(self, ticks: int):
        self._seen: dict[str, dict[str, int]] = {}
        self._grown: deque[Counter[str]] = deque(maxlen=ticks)

    def take(self, counters: dict[str, dict[str, int]]) -> None:
        """Add the current counters, by owner and name. A new owner counts from its current values on."""
        grown: Counter[str] = Counter()
        for owner, values in counters.items():
            before = self._seen.get(owner, values)
            for name, value in values.items():
                known = before.get(name, 0)
                grown[name] += value - known if value >= known else value
        self._seen = counters
        self._grown.append(grown)

    def total(self) -> dict[str, int]:
        return dict(sum(self._grown, Counter()))


class Pool(NamedTuple):
    """The workers of an endpoint, and what was decided of them."""

    decisions: Decisions
    workers: Workers
    speeds: LiveSpeeds


class Feed:
    """The page's data of the last quarter of an hour. For one event loop.

    `decisions`, `workers` and `speeds` are of the workers that answer. With `prefill`, these are decode workers. A
    prompt is then shown once: its decision on a decode worker, together with the prefill worker's part.
    """

    def __init__(
        self,
        decisions: Decisions,
        workers: Workers,
        speeds: LiveSpeeds,
        mirror: Mirror,
        *,
        prefill: Pool | None = None,
        model: str = "",
        connected: Callable[[], bool] = lambda: True,
    ):
        self.decisions = decisions
        self.points: deque[Point] = deque(maxlen=POINTS_KEPT)
        self.points_made = 0
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES_KEPT)
        self.samples_made = 0
        answering = Pool(decisions, workers, speeds)
        self._pools = {"": answering} if prefill is None else {"prefill": prefill, "decode": answering}
        self._mirror = mirror
        self._model = model
        self._connected = connected
        self._started = time.time()
        self._ticked = time.monotonic()
        self._totals = self._all_totals()
        self._fetched = Growth(WINDOW_SECONDS)
        self._outcomes = Growth(WINDOW_SECONDS)
        self._faults = Growth(FAULT_WINDOW_SECONDS)
        # Decisions that viewers were shown stay available after they have left the last thousand.
        self._shown: OrderedDict[str, Decision] = OrderedDict()
        self._next = asyncio.Event()
        self._minute: Minute | None = None
        self.tick()

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.tick()

    async def next_tick(self) -> None:
        await self._next.wait()

    def tick(self) -> None:
        now, wall = time.monotonic(), time.time()
        passed = max(now - self._ticked, 1e-3)
        before, totals = self._totals, self._all_totals()
        self._ticked, self._totals = now, totals
        answered = list(self.decisions.history.answered_lately)
        self.decisions.history.answered_lately.clear()
        for decision in random.sample(answered, min(len(answered), SAMPLES_PER_SECOND)):
            self.samples.append(_sample(decision, wall))
            self.samples_made += 1
        recent = [one for one in self.samples if one.time > wall - WINDOW_SECONDS]
        decided = sum(totals.decisions.values()) - sum(before.decisions.values())
        rates = {name: (totals.tokens.get(name, 0) - before.tokens.get(name, 0)) / passed for name in SOURCES}
        point = Point(wall, decided / passed, rates, states.ttft(recent), states.tpot(recent))
        self.points.append(point)
        self.points_made += 1
        each = (totals.decision_seconds - before.decision_seconds) / decided if decided else None
        if decided or answered:  # without traffic, the figures of the last prompt stay
            self._minute = self._last_minute(point, recent, each)
        self.state = self._state(totals, point, recent, each, now)
        self.state.alarms = alarms(self.state)
        self._next.set()
        self._next = asyncio.Event()

    def _last_minute(self, point: Point, recent: list[Sample], decision_seconds: float | None) -> Minute:
        points = [
            one
            for one in itertools.islice(reversed(self.points), WINDOW_SECONDS)
            if one.time > point.time - WINDOW_SECONDS
        ]
        if decision_seconds is None and self._minute is not None:
            decision_seconds = self._minute.decision_seconds
        return Minute(
            time=point.time,
            tokens={name: round(sum(one.tokens[name] for one in points)) for name in SOURCES},
            decisions_per_second=sum(one.decisions for one in points) / len(points),
            decision_seconds=decision_seconds,
            ttft=point.ttft,
            tpot=point.tpot,
            prediction=states.spread(recent),
            saving=states.saving(recent),
        )

    def _all_totals(self) -> Totals:
        """Of a prompt that a prefill and a decode worker served, the two decisions are one."""
        totals = self.decisions.totals()
        if (prefill := self._pools.get("prefill")) is not None:
            totals.add_prefill(prefill.decisions.totals())
        return totals

    def history_of(self, worker: str) -> History:
        """The history in which a worker's decisions are; with "" that of the prompts."""
        for pool in self._pools.values():
            if worker and worker.partition(".")[0] in (format(one, "x") for one in pool.workers.cards):
                return pool.decisions.history
        return self.decisions.history

    def find(self, decision_id: str) -> Decision | None:
        every = (pool.decisions.history.find(decision_id) for pool in self._pools.values())
        return next(filter(None, every), None) or self._shown.get(decision_id)

    def show(self, decision: Decision) -> Summary:
        self._shown[decision.id] = self.find(decision.id) or decision
        if len(self._shown) > KEPT:
            self._shown.popitem(last=False)
        return summary(decision)

    def _state(
        self, totals: Totals, point: Point, recent: list[Sample], decision_seconds: float | None, now: float
    ) -> State:
        workers = [
            lane for role, pool in self._pools.items() for lane in self._worker_lanes(role, pool, point.time, now)
        ]
        targets = self._target_lanes(now)
        self._fetched.take({lane.worker: lane.fetched_chunks for lane in workers if lane.heard_seconds is not None})
        self._outcomes.take({"": totals.outcomes})
        self._faults.take({lane.target: {name: getattr(lane, name) for name in _FAULTS} for lane in targets})
        return State(
            time=point.time,
            started=self._started,
            model=self._model,
            block_tokens=self.decisions.block_tokens,
            decisions=sum(totals.decisions.values()),
            tokens={name: totals.tokens.get(name, 0) for name in SOURCES},
            outcomes=totals.outcomes,
            fallbacks=totals.fallbacks,
            output_tokens=totals.output_tokens,
            open=totals.open,
            decisions_per_second=point.decisions,
            tokens_per_second=point.tokens,
            decision_seconds=decision_seconds,
            window_seconds=WINDOW_SECONDS,
            samples_per_second=SAMPLES_PER_SECOND,
            ttft=point.ttft,
            tpot=point.tpot,
            prediction=states.spread(recent),
            fetched_chunks=self._fetched.total(),
            recent_outcomes=self._outcomes.total(),
            recent_faults=self._faults.total(),
            fault_window_seconds=FAULT_WINDOW_SECONDS,
            connected=self._connected(),
            workers=workers,
            targets=targets,
            alarms=[],
            minute=self._minute,
        )

    def _worker_lanes(self, role: str, pool: Pool, wall: float, now: float) -> list[WorkerLane]:
        totals, block_tokens = pool.decisions.totals(), pool.decisions.block_tokens
        last = next(iter(pool.decisions.history.last(1)), None)
        considered: dict[str, Considered] = {}
        if last is not None:
            considered = {one.worker: one for one in last.candidates}
        fresh = last is not None and wall - last.time <= _FRESH_SECONDS
        reports = pool.workers.reports(now)
        open_ = pool.decisions.history.open_by_worker()
        lanes = []
        for worker in sorted(pool.workers.cards):
            name = format(worker, "x")
            ranks = [one for one in considered if one.partition(".")[0] == name] or [name]
            for label in sorted(ranks):
                blocks = totals.blocks.get(label, Counter())
                seen = considered.get(label) if fresh else None
                lane = WorkerLane(
                    worker=label,
                    role=role,
                    decisions=totals.decisions.get(label, 0),
                    tokens={
                        name: block_tokens * blocks.get("missing" if name == "computed" else name, 0)
                        for name in (*SOURCES, *(["handover"] if role == "decode" else []))
                    },
                    open=open_.get(label, 0),
                    queued_tokens=seen.queued_tokens if seen else None,
                    memory_used=seen.memory_used if seen else None,
                    prefill_tokens_per_second=prefill_tokens_per_second(pool.speeds.of_worker(worker)),
                )
                if worker in reports:
                    report, lane.heard_seconds = reports[worker]
                    lane.queue, lane.bytes_in_flight = report.queue, report.bytes_in_flight
                    lane.dram_bytes_per_second = report.dram_bytes_per_second
                    lane.store_bytes_per_second = report.store_bytes_per_second
                    lane.fetched_chunks = report.fetched_chunks if label == sorted(ranks)[0] else {}
                    block_bytes = report.chunk_bytes // report.blocks_per_chunk
                    lane.hbm_bytes = report.hbm_blocks * block_bytes
                    lane.hbm_capacity_bytes = report.hbm_blocks_max * block_bytes
                    lane.dram_bytes = report.dram_chunks * report.chunk_bytes
                    lane.dram_capacity_bytes = report.dram_chunks_max * report.chunk_bytes
                lanes.append(lane)
        return lanes

    def _target_lanes(self, now: float) -> list[TargetLane]:
        reporting, *_ = self._pools.values()  # the workers with a tier
        chunks, reports = self._mirror.counts(now), reporting.speeds.targets(now)
        lanes = []
        for target, age in sorted(self._mirror.ages(now).items()):
            lane = TargetLane(target, age, chunks.get(target, 0))
            if target in reports:
                report, _ = reports[target]
                for name in _REPORTED:
                    setattr(lane, name, getattr(report, name))
            lanes.append(lane)
        return lanes


_FAULTS = ("corrupt_chunks", "failed_writes")
_REPORTED = [name for name in TargetLane.__struct_fields__ if name not in ("target", "heard_seconds", "chunks")]


class Viewer:
    """A viewer's position in the feed, and its filters. A slow viewer skips what it missed."""

    def __init__(self, feed: Feed, worker: str = "", source: str = ""):
        self._feed = feed
        self._worker = worker
        self._source = source
        self._decided: int | None = None
        self._points = 0
        self._samples = 0
        self._open: dict[str, Decision] = {}  # shown, and not ended then

    def update(self) -> Update:
        feed, fresh = self._feed, self._decided is None
        points = _newest(feed.points, feed.points_made - self._points)
        samples = _newest(feed.samples, feed.samples_made - self._samples)
        self._points, self._samples = feed.points_made, feed.samples_made
        ended = [self._open.pop(one.id) for one in list(self._open.values()) if one.outcome != "open"]
        rows = [feed.show(decision) for decision in [*ended, *self._new()]]
        return Update(fresh, feed.state, points, samples, rows)

    def _new(self) -> list[Decision]:
        """A random sample of the new decisions that pass the filters; at first the newest. The oldest comes first."""
        history = self._feed.history_of(self._worker)
        missed = KEPT if self._decided is None else min(KEPT, history.count - self._decided)
        new = [one for one in history.newest(missed) if self._wants(one)]
        if self._decided is None:
            picked = new[ROWS_FIRST - 1 :: -1]
        else:
            # The same sample for all viewers, because building a row on its first view is expensive.
            chance = random.Random(history.count)
            picked = [new[index] for index in sorted(chance.sample(range(len(new)), min(ROWS, len(new))), reverse=True)]
        self._decided = history.count
        self._open |= {one.id: one for one in picked if one.outcome == "open"}
        for forgotten in list(self._open)[:-KEPT]:
            del self._open[forgotten]
        return picked

    def _wants(self, decision: Decision) -> bool:
        if self._worker not in ("", decision.chosen):
            return False
        return not self._source or tokens_of(decision).get(self._source, 0) > 0


def summary(decision: Decision) -> Summary:
    chosen = decision.on_chosen()
    return Summary(
        decision.id,
        decision.time,
        decision.prompt_tokens,
        decision.chosen,
        tokens_of(decision),
        decision.prefilled.fetch_chunks if decision.prefilled else decision.fetch_chunks,
        chosen.price_seconds,
        decision.predicted_ttft_seconds,
        decision.ttft_seconds,
        decision.tpot_seconds,
        decision.output_tokens,
        decision.outcome,
        decision.prefilled.worker if decision.prefilled else "",
    )


def tokens_of(decision: Decision) -> dict[str, int]:
    """Of the prompt, by source."""
    return decision.prefilled.tokens if decision.prefilled else decision.on_chosen().tokens


def _sample(decision: Decision, wall: float) -> Sample:
    assert decision.ttft_seconds is not None
    prefill, without_store = decision.on_chosen().seconds["prefill"], decision.without_store_prefill_seconds
    if decision.prefilled:
        prefill, without_store = decision.prefilled.prefill_seconds, decision.prefilled.without_store_prefill_seconds
    return Sample(
        wall,
        decision.chosen,
        tokens_of(decision),
        decision.predicted_ttft_seconds,
        decision.ttft_seconds,
        decision.tpot_seconds,
        Saving(
            decision.predicted_ttft_seconds,
            decision.without_store_ttft_seconds,
            prefill,
            without_store,
        ),
    )


def _newest(items: deque[Item], count: int) -> list[Item]:
    return list(itertools.islice(items, max(0, len(items) - count), None))
