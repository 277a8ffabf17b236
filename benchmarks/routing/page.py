"""The cost of the router's page: the same requests with viewers, with a page and no viewer, and without a page.

    python -m benchmarks.routing.page [--viewers N] [--workers N] [--tokens N] [--rounds N] [--seconds N] [--json FILE]

The real router decides and forwards answers as fast as it can, in one process. Dynamo's and the workers' answers are
prepared, so that no wait hides the cost. A viewer reads the page's events in a process of its own. A round runs the
three cases in random order, and compares them. Time is the router's CPU time, so that other processes matter little.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.chat.load import quantile
from components.pricing.cost import Policy, Speeds
from components.router.router import Decided, Router
from components.router.speeds import LiveSpeeds
from components.router.view.access import page_access
from components.router.view.feed import Feed
from components.router.view.page import open_page
from components.router.workers import Workers
from kvstore.bus.messages import Residency, SnapshotPage, WorkerReport
from kvstore.bus.residency import Mirror

_ENDPOINT, _TARGET = "dynamo.backend.generate", "10.0.0.1:7600"
_BLOCK_TOKENS = 16
_OUTPUTS = 8
_PROMPTS = 64
_WAYS = ("without", "closed", "open")
_VIEWER = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(b"GET /events HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
seen = 0
while data := connection.recv(1 << 20):
    seen += data.count(b"data: ")
    print(seen, flush=True)
"""


class Way(msgspec.Struct):
    requests_per_second: list[float]  # per second of the router's CPU time, for each round
    decision_ms: list[float]  # medians


class Ratio(msgspec.Struct):
    """The ratio of two cases within a round."""

    median: float
    lower_quartile: float
    upper_quartile: float


class Result(msgspec.Struct):
    viewers: int
    workers: int
    tokens: int
    events: int  # received by viewers
    ways: dict[str, Way]
    open_to_closed: dict[str, Ratio]
    open_to_without: dict[str, Ratio]


class _Dynamo:
    """A stub of Dynamo's KvRouter that answers at once."""

    def __init__(self, workers: int, tokens: int):
        chance = random.Random(1)
        self._blocks = tokens // _BLOCK_TOKENS
        self._chance = chance
        self.workers = [0x694D9A1C2F1A0000 + number for number in range(workers)]

    async def get_overlap_scores(self, tokens: list[int], **_: object) -> dict[str, Any]:
        def held(worker: int) -> dict[str, int]:
            hbm = self._chance.randrange(self._blocks) if self._chance.random() < 0.3 else 0
            dram = self._chance.randrange(self._blocks - hbm) if self._chance.random() < 0.3 else 0
            return {"worker_id": worker, "dp_rank": 0, "device_blocks": hbm, "host_pinned_extension_blocks": dram}

        return {"workers": [held(worker) for worker in self.workers]}

    async def get_potential_loads(self, tokens: list[int], **_: object) -> list[dict[str, int]]:
        return [
            {
                "worker_id": worker,
                "dp_rank": 0,
                "potential_prefill_tokens": len(tokens) + self._chance.choice([0, 2000]),
                "potential_decode_blocks": self._chance.randrange(2000),
            }
            for worker in self.workers
        ]

    async def generate_from_request(self, *_: object, **__: object) -> AsyncIterator[dict[str, Any]]:
        async def answer() -> AsyncIterator[dict[str, Any]]:
            for number in range(_OUTPUTS):
                yield {"token_ids": [number]}

        return answer()


class _Context:
    """The context of a client that does not disconnect."""

    def __init__(self) -> None:
        self._never = asyncio.Event()

    def is_stopped(self) -> bool:
        return False

    def is_killed(self) -> bool:
        return False

    async def async_killed_or_stopped(self) -> bool:
        return await self._never.wait()


class _Timed(Router):
    took: list[float]  # seconds of each decision

    async def decide(self, request: dict[str, Any], failed: Collection[int] = ()) -> Decided:
        begun = time.process_time()
        decided = await super().decide(request, failed)
        self.took.append(time.process_time() - begun)
        return decided


class _Cluster:
    def __init__(self, workers: int, tokens: int):
        dynamo = _Dynamo(workers, tokens)
        card = {
            "display_name": "m",
            "kv_cache_block_size": _BLOCK_TOKENS,
            "runtime_config": {"total_kv_blocks": 4000},
        }
        self.workers = Workers(_ENDPOINT)
        self.workers.set_cards({str(worker): json.dumps(card) for worker in dynamo.workers})
        self.speeds = LiveSpeeds(Speeds(0.02, 1e-4, 0.0, 25e9, 5e9, 0.002))
        self.mirror = Mirror()
        self.router = _Timed(
            dynamo,
            self.workers,
            self.mirror,
            block_tokens=_BLOCK_TOKENS,
            speeds=self.speeds,
            policy=Policy(0.5, 0.2),
        )
        self._seq = 0
        self._names = dynamo.workers
        chance = random.Random(2)
        self._prompts = [chance.choices(range(128_000), k=tokens) for _ in range(_PROMPTS)]

    def beat(self) -> None:
        now, self._seq = time.monotonic(), self._seq + 1
        for worker in self._names:
            self.workers.heard(WorkerReport(str(worker), _ENDPOINT, 7, _BLOCK_TOKENS, 8, 2 << 20, 0), now)
        self.mirror.apply(Residency(_TARGET, 1, self._seq, 0, 0, [], [], 0), now)
        if self._seq == 1:
            self.mirror.apply_snapshot([SnapshotPage(_TARGET, 1, 1, 1, 1, 7, bytes(8))])

    async def run(self, seconds: float) -> tuple[float, list[float]]:
        """Requests per second of the router's CPU time, and the seconds of each decision."""
        took: list[float] = []
        self.router.took = took
        begun, beats, used = time.perf_counter(), 0, time.process_time()
        while (passed := time.perf_counter() - begun) < seconds:
            if passed >= beats:
                self.beat()
                beats += 1
            request = {"token_ids": self._prompts[len(took) % _PROMPTS], "model": "m"}
            async for _ in self.router.generate(request, _Context()):
                pass
            await asyncio.sleep(0)
        return len(took) / (time.process_time() - used), took


@contextlib.asynccontextmanager
async def _looking(port: int, viewers: int, events: list[int]) -> AsyncIterator[None]:
    """A context with viewers that have received their first event. Each one's number of events is added to `events`."""
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _VIEWER, str(port), stdout=asyncio.subprocess.PIPE)
        for _ in range(viewers)
    ]
    try:
        for viewer in started:
            assert viewer.stdout is not None
            while await viewer.stdout.readline() == b"0\n":
                pass
        yield
    finally:
        for viewer in started:
            viewer.kill()
            output, _ = await viewer.communicate()
            events.append(int((output.split() or [b"1"])[-1]))


async def measure(viewers: int, workers: int, tokens: int, rounds: int, seconds: float) -> Result:
    cluster = _Cluster(workers, tokens)
    cluster.beat()
    ways = {way: Way([], []) for way in _WAYS}
    events: list[int] = []
    for number in range(-1, rounds):  # the first round warms up
        for way in random.sample(_WAYS, len(_WAYS)):
            async with contextlib.AsyncExitStack() as stack:
                if way != "without":
                    feed = Feed(cluster.router.decisions, cluster.workers, cluster.speeds, cluster.mirror)
                    page = await open_page(page_access("127.0.0.1:0"), feed)
                    stack.push_async_callback(page.cleanup)
                    ticking = asyncio.create_task(feed.run())
                    stack.callback(ticking.cancel)
                    if way == "open":
                        await stack.enter_async_context(_looking(page.addresses[0][1], viewers, events))
                rate, took = await cluster.run(seconds)
            if number >= 0:
                ways[way].requests_per_second.append(round(rate, 1))
                ways[way].decision_ms.append(round(1000 * quantile(took, 0.5), 4))
    looked, closed, without = ways["open"], ways["closed"], ways["without"]
    return Result(viewers, workers, tokens, sum(events), ways, _ratios(looked, closed), _ratios(looked, without))


def _ratios(one: Way, other: Way) -> dict[str, Ratio]:
    return {
        "requests_per_second": _ratio(one.requests_per_second, other.requests_per_second),
        "decision_ms": _ratio(one.decision_ms, other.decision_ms),
    }


def _ratio(one: list[float], other: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(round(statistics.median(ratios), 4), round(lower, 4), round(upper, 4))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.page", description=__doc__.split("\n")[0])
    parser.add_argument("--viewers", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2200, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each way in a round")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    result = asyncio.run(measure(options.viewers, options.workers, options.tokens, options.rounds, options.seconds))
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
