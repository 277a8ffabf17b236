"""The cost of a routing decision beyond Dynamo's overlap query, with millions of chunks in the mirror.

    python -m benchmarks.routing.decision --json FILE [--workers N] [--chunks N] [--tokens N]

Runs in one process, without Dynamo, NATS or an engine. The real router decides, with prepared answers of Dynamo. Each
decision hashes a new prompt, looks up its chunks in the mirror, and prices every worker. The store holds a random
leading part of each prompt, so that lookups hit and miss. Workers differ in their caches and queues, and have reported
their speeds. Ingestion applies decoded announcements. A resync applies a whole snapshot, whose pages are in memory.
Both run in steps, between which the event loop does other work; the longest step is reported.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.chat.load import quantile
from components.pricing.cost import Policy, Speeds
from components.router.decisions import Decisions
from components.router.router import Router
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.bus.messages import Residency, SnapshotPage, WorkerReport
from kvstore.bus.residency import MESSAGE_HASHES, PAGE_HASHES, Mirror, Steps
from kvstore.keys import sequence_hashes

_TARGET = "10.0.0.1:7600"
_FINGERPRINT = 7
_BLOCKS_PER_CHUNK = 2
_ENDPOINT = "dynamo.backend.generate"
_WORKER_BLOCKS = 20_000
_MEASURED = 0.012, 1.0e-4, 3.0e-9, 50e9, 5e9
_SPEEDS = Speeds(*_MEASURED, 0.002)


class Stage(msgspec.Struct):
    """Milliseconds of one step of a decision."""

    p50_ms: float
    p99_ms: float


class Result(msgspec.Struct):
    workers: int
    chunks: int
    tokens: int
    decisions: int
    hash: Stage
    locate: Stage
    price: Stage
    decision: Stage  # sum of the three
    decision_without_hashing: Stage
    show: Stage  # counting, logging and recording, after the prompt was sent
    ingested_entries_per_second: float
    longest_step_ms: float  # CPU time; of ingestion, resync, and removal of old entries
    step_p99_ms: float
    bytes_per_entry: float
    process_bytes_per_entry: float
    resync_seconds: float


def pages_of(hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]", epoch: int) -> list[SnapshotPage]:
    """A snapshot of those hashes at (epoch, 1)."""
    starts = range(0, len(hashes), PAGE_HASHES)
    return [
        SnapshotPage(
            _TARGET, epoch, 1, 1, len(starts), _FINGERPRINT, hashes[start : start + PAGE_HASHES].astype("<u8").tobytes()
        )
        for start in starts
    ]


def announcement(epoch: int, seq: int, stored: list[int]) -> Residency:
    return Residency(_TARGET, epoch, seq, _FINGERPRINT, _BLOCKS_PER_CHUNK, stored, [], 0)


def seconds_of(steps: Steps) -> list[float]:
    """CPU time of each step, so that other processes on the cores do not count."""
    seconds = []
    while True:
        begun = time.thread_time()
        done = next(steps, steps)
        seconds.append(time.thread_time() - begun)
        if done is steps:
            return seconds


def ingest(mirror: Mirror, hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> list[float]:
    """Announce all, a message at a time; returns the seconds of each step."""
    mirror.apply(announcement(1, 1, []), 0.0)
    mirror.apply_snapshot([SnapshotPage(_TARGET, 1, 1, 1, 1, 0, b"")])
    seconds = []
    for number, start in enumerate(range(0, len(hashes), MESSAGE_HASHES)):
        message = announcement(1, number + 2, hashes[start : start + MESSAGE_HASHES].tolist())
        seconds += seconds_of(mirror.applying(message, 0.0))
    return seconds


def resync(mirror: Mirror, hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> list[float]:
    """Replace the mirror's content with a new epoch's snapshot; returns the seconds of each step."""
    pages = pages_of(hashes, 2)
    mirror.apply(announcement(2, 1, []), 0.0)
    seconds = seconds_of(mirror.joining(pages))
    if mirror.counts(0.0) != {_TARGET: len(hashes)}:
        raise SystemExit("the snapshot was not taken in")
    return seconds


def tidy(mirror: Mirror) -> list[float]:
    """Finish pending work; returns the seconds of each step."""
    seconds, more = [], True
    while more:
        begun = time.thread_time()
        more = mirror.work()
        seconds.append(time.thread_time() - begun)
    return seconds


class _Dynamo:
    """Prepared answers of Dynamo's router."""

    def __init__(self, workers: int, prompt_tokens: int, block_tokens: int, chance: random.Random):
        self._workers, self._tokens, self._block_tokens, self._chance = workers, prompt_tokens, block_tokens, chance
        self.refresh()

    def refresh(self) -> None:
        chance, blocks = self._chance, self._tokens // self._block_tokens
        self._overlaps, self._loads = [], []
        for worker in range(1, self._workers + 1):
            hbm = chance.randrange(blocks) if chance.random() < 0.2 else 0
            dram = chance.randrange(blocks - hbm) if chance.random() < 0.2 else 0
            row = {"worker_id": worker, "dp_rank": 0}
            self._overlaps.append({**row, "device_blocks": hbm, "host_pinned_extension_blocks": dram})
            self._loads.append(
                {
                    **row,
                    "potential_prefill_tokens": 1 + chance.choice([0, 0, 2000, 20_000]),
                    "potential_decode_blocks": chance.randrange(_WORKER_BLOCKS),
                    "active_requests": chance.randrange(48),
                }
            )

    async def get_overlap_scores(self, tokens: list[int], **_: object) -> dict[str, object]:
        return {"workers": self._overlaps}

    async def get_potential_loads(self, tokens: list[int], **_: object) -> list[dict[str, int]]:
        return self._loads


class _Timed(Decisions):
    def __init__(self, block_tokens: int):
        super().__init__(block_tokens)
        self.seconds: dict[str, list[float]] = {}

    def took(self, stages: Mapping[str, float]) -> None:
        super().took(stages)
        for stage, seconds in stages.items():
            if stage != "ask":
                self.seconds.setdefault(stage, []).append(seconds)


def report(worker: int, block_tokens: int, ts_ms: int) -> WorkerReport:
    return WorkerReport(
        str(worker), _ENDPOINT, _FINGERPRINT, block_tokens, _BLOCKS_PER_CHUNK, 2 << 20, ts_ms, *_MEASURED
    )


async def decide(
    mirror: Mirror, workers: int, tokens: int, block_tokens: int, decisions: int
) -> dict[str, list[float]]:
    """Seconds of each stage, decision by decision."""
    chance = random.Random(2)
    dynamo = _Dynamo(workers, tokens, block_tokens, chance)
    known, speeds = Workers(_ENDPOINT), LiveSpeeds(_SPEEDS)
    runtime = {"total_kv_blocks": _WORKER_BLOCKS}
    card = {"display_name": "m", "kv_cache_block_size": block_tokens, "runtime_config": runtime}
    known.set_cards({str(worker): json.dumps(card) for worker in range(1, workers + 1)})
    router = Router(
        dynamo, known, mirror, block_tokens=block_tokens, speeds=speeds, policy=Policy(0.5, 0.1), clock=lambda: 0.0
    )
    router.decisions = timed = _Timed(block_tokens)
    gc.freeze()  # as the router does when it is ready
    seq = 1
    for number in range(-3, decisions):  # the first ones warm up
        prompt = chance.choices(range(128_000), k=tokens)
        last_of_chunk = sequence_hashes(prompt, block_tokens)[_BLOCKS_PER_CHUNK - 1 :: _BLOCKS_PER_CHUNK]
        seq += 1
        mirror.apply(announcement(2, seq, last_of_chunk[: chance.randrange(len(last_of_chunk))]), 0.0)
        dynamo.refresh()
        for worker in range(1, workers + 1):
            said = report(worker, block_tokens, number)
            if speeds.heard_worker(said):
                known.heard(said, 0.0)
        if number == 0:
            timed.seconds.clear()
        decided = await router.decide({"token_ids": prompt})
        begun = time.perf_counter()
        timed.decided(*decided)
        timed.seconds.setdefault("show", []).append(time.perf_counter() - begun)
    return timed.seconds


def stage(seconds: list[float]) -> Stage:
    return Stage(round(1000 * quantile(seconds, 0.5), 3), round(1000 * quantile(seconds, 0.99), 3))


def measure(workers: int, chunks: int, tokens: int, block_tokens: int, decisions: int) -> Result:
    hashes = np.frombuffer(random.Random(1).randbytes(8 * chunks), np.uint64)
    before = _resident_bytes()
    ingest(Mirror(), hashes[:1000])  # numpy's one-time initialization
    mirror = Mirror(max_entries=2 * chunks + 1_000_000)
    ingestion = ingest(mirror, hashes)
    process_bytes = _resident_bytes() - before
    resynced, tidied = resync(mirror, hashes), tidy(mirror)
    steps = [*ingestion, *resynced, *tidied]
    known = mirror.counts(0.0)[_TARGET]
    bytes_per_entry = mirror.size_bytes / known
    took = asyncio.run(decide(mirror, workers, tokens, block_tokens, decisions))
    without = [sum(one) for one in zip(took["locate"], took["price"], strict=True)]
    every = [sum(one) for one in zip(without, took["hash"], strict=True)]
    return Result(
        workers=workers,
        chunks=known,
        tokens=tokens,
        decisions=decisions,
        hash=stage(took["hash"]),
        locate=stage(took["locate"]),
        price=stage(took["price"]),
        decision=stage(every),
        decision_without_hashing=stage(without),
        show=stage(took["show"]),
        ingested_entries_per_second=round(chunks / sum(ingestion)),
        longest_step_ms=round(1000 * max(steps), 1),
        step_p99_ms=round(1000 * quantile(steps, 0.99), 1),
        bytes_per_entry=round(bytes_per_entry, 1),
        process_bytes_per_entry=round(process_bytes / known, 1),
        resync_seconds=round(sum(resynced), 2),
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.decision", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=10_000_000, help="mirrored")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each prompt")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=open(os.devnull, "w"))  # noqa: SIM115
    result = measure(options.workers, options.chunks, options.tokens, options.block_tokens, options.decisions)
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
