"""What a decision costs the router beyond Dynamo's own overlap query, with millions of chunks mirrored.

    python -m benchmarks.router --json FILE [--workers N] [--chunks N] [--tokens N]

In one process, without Dynamo, NATS or an engine. Each decision hashes a new prompt, asks the mirror where its chunks
are, and prices every worker (`cost.choose`). The store holds a random leading part of each prompt, so that lookups hit
and miss; workers differ in what they hold and in their queues. Ingestion is of announcements as they come decoded off
the bus; a resync takes a whole snapshot, its pages at hand.
"""

import argparse
import os
import random
import time
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.multi_turn_load import quantile
from components.router import cost
from components.router.cost import Candidate, Policy, Speeds
from kvstore.bus import Residency, SnapshotPage
from kvstore.keys import sequence_hashes
from kvstore.residency import MESSAGE_HASHES, PAGE_HASHES, Mirror

_TARGET = "10.0.0.1:7600"
_FINGERPRINT = 7
_BLOCKS_PER_CHUNK = 2
_SPEEDS = Speeds(0.012, 1.0e-4, 3.0e-9, 50e9, 5e9, 0.002)


class Stage(msgspec.Struct):
    """Milliseconds of one step of a decision."""

    p50_ms: float
    p99_ms: float


class Result(msgspec.Struct):
    workers: int
    chunks: int
    tokens: int
    decisions: int
    hashing: Stage
    locate: Stage
    choose: Stage
    decision: Stage  # the three together
    decision_without_hashing: Stage
    ingested_entries_per_second: float
    longest_message_ms: float  # of MESSAGE_HASHES entries; the longest makes the table anew
    bytes_per_entry: float
    process_bytes_per_entry: float
    resync_seconds: float


def pages_of(hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]", epoch: int) -> list[SnapshotPage]:
    """A snapshot at (epoch, 1) of those hashes."""
    starts = range(0, len(hashes), PAGE_HASHES)
    return [
        SnapshotPage(
            _TARGET, epoch, 1, 1, len(starts), _FINGERPRINT, hashes[start : start + PAGE_HASHES].astype("<u8").tobytes()
        )
        for start in starts
    ]


def announcement(epoch: int, seq: int, stored: list[int]) -> Residency:
    return Residency(_TARGET, epoch, seq, _FINGERPRINT, _BLOCKS_PER_CHUNK, stored, [], 0)


def ingest(mirror: Mirror, hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> list[float]:
    """Announce all, a message at a time; returns the seconds of each."""
    mirror.apply(announcement(1, 1, []), 0.0)
    mirror.apply_snapshot([SnapshotPage(_TARGET, 1, 1, 1, 1, 0, b"")])
    seconds = []
    for number, start in enumerate(range(0, len(hashes), MESSAGE_HASHES)):
        message = announcement(1, number + 2, hashes[start : start + MESSAGE_HASHES].tolist())
        begun = time.perf_counter()
        mirror.apply(message, 0.0)
        seconds.append(time.perf_counter() - begun)
    return seconds


def resync(mirror: Mirror, hashes: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> float:
    """Seconds to take in a new epoch's snapshot in place of what is known."""
    pages = pages_of(hashes, 2)
    mirror.apply(announcement(2, 1, []), 0.0)
    begun = time.perf_counter()
    if not mirror.apply_snapshot(pages):
        raise SystemExit("the snapshot was not taken in")
    return time.perf_counter() - begun


def candidates(workers: int, prompt_blocks: int, located: list[str | None], chance: random.Random) -> list[Candidate]:
    made = []
    for worker in range(workers):
        hbm = chance.randrange(prompt_blocks) if chance.random() < 0.2 else 0
        made.append(
            Candidate(
                worker=worker,
                speeds=_SPEEDS,
                hbm_blocks=hbm,
                dram_blocks=hbm + (chance.randrange(prompt_blocks - hbm) if chance.random() < 0.2 else 0),
                queued_prefill_tokens=chance.choice([0, 0, 2000, 20_000]),
                fetching_bytes=chance.choice([0, 100 << 20]),
                memory_used=chance.random(),
                blocks_per_chunk=_BLOCKS_PER_CHUNK,
                chunk_bytes=2 << 20,
                located=located,
            )
        )
    return made


def decide(mirror: Mirror, workers: int, tokens: int, block_tokens: int, decisions: int) -> dict[str, list[float]]:
    """Seconds of each stage, decision by decision."""
    chance = random.Random(2)
    policy = Policy(gpu_price=1.0, pressure_seconds=0.2)
    seconds: dict[str, list[float]] = {"hashing": [], "locate": [], "choose": []}
    seq = 1
    for number in range(-3, decisions):  # some to warm up
        prompt = chance.choices(range(128_000), k=tokens)
        last_of_chunk = sequence_hashes(prompt, block_tokens)[_BLOCKS_PER_CHUNK - 1 :: _BLOCKS_PER_CHUNK]
        seq += 1
        mirror.apply(announcement(2, seq, last_of_chunk[: chance.randrange(len(last_of_chunk))]), 0.0)
        begun = time.perf_counter()
        hashes = sequence_hashes(prompt, block_tokens)
        hashed = time.perf_counter()
        located = mirror.locate(_FINGERPRINT, hashes[_BLOCKS_PER_CHUNK - 1 :: _BLOCKS_PER_CHUNK], 0.0)
        found = time.perf_counter()
        found_by = candidates(workers, len(hashes), located, chance)
        priced = time.perf_counter()
        cost.choose(found_by, tokens, block_tokens, policy)
        done = time.perf_counter()
        if number >= 0:
            for stage, took in (("hashing", hashed - begun), ("locate", found - hashed), ("choose", done - priced)):
                seconds[stage].append(took)
    return seconds


def stage(seconds: list[float]) -> Stage:
    return Stage(round(1000 * quantile(seconds, 0.5), 3), round(1000 * quantile(seconds, 0.99), 3))


def measure(workers: int, chunks: int, tokens: int, block_tokens: int, decisions: int) -> Result:
    hashes = np.frombuffer(random.Random(1).randbytes(8 * chunks), np.uint64)
    before = _resident_bytes()
    mirror = Mirror(max_entries=2 * chunks + 1_000_000)
    ingestion = ingest(mirror, hashes)
    process_bytes = _resident_bytes() - before
    resync_seconds = resync(mirror, hashes)
    known = mirror.counts(0.0)[_TARGET]
    bytes_per_entry = mirror.size_bytes / known
    took = decide(mirror, workers, tokens, block_tokens, decisions)
    without = [sum(one) for one in zip(took["locate"], took["choose"], strict=True)]
    return Result(
        workers=workers,
        chunks=known,
        tokens=tokens,
        decisions=decisions,
        hashing=stage(took["hashing"]),
        locate=stage(took["locate"]),
        choose=stage(took["choose"]),
        decision=stage([sum(one) for one in zip(*took.values(), strict=True)]),
        decision_without_hashing=stage(without),
        ingested_entries_per_second=round(chunks / sum(ingestion)),
        longest_message_ms=round(1000 * max(ingestion), 1),
        bytes_per_entry=round(bytes_per_entry, 1),
        process_bytes_per_entry=round(process_bytes / known, 1),
        resync_seconds=round(resync_seconds, 2),
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=10_000_000, help="mirrored")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each prompt")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    result = measure(options.workers, options.chunks, options.tokens, options.block_tokens, options.decisions)
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
