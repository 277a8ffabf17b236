"""Hits of the store's eviction policy, compared with FIFO, S3-FIFO, LRU and the offline optimum.

    python -m benchmarks.store.eviction --json FILE [--seed S] [--seeds N] [--capacity-chunks N ...] [--trace FILE ...]

Prompts arrive one after another. Each gets its chunks 0, 1, ... until one is missing, then puts all that the store
lacks, its answer's chunks included. The figure is the hits relative to those of an unbounded store. Capacities are
shares of the bytes that are ever put. `fifo`, `s3_fifo` and `kvtier` evict whole segments and keep one slot empty;
rewrites count as written. `lru` and `optimum` evict single chunks.

Shapes of traffic:
chat       conversations of 2 to 28 turns with 100 to 230 output tokens each, prompts of 2,200 tokens on average that
           begin with one of 20 system prompts; a fifth of the conversations are one prompt that never returns
one_shots  the same, but a fifth of the prompts are such
documents  as in Mooncake's conversation trace (Qin et al., FAST 2025; one hour of Kimi's traffic): 12,000 tokens on
           average, four of five are never continued
Think times have that trace's distribution, too. `--trace` replays such a trace itself (JSON lines with input_length and
hash_ids of 512 tokens), a chunk a hash.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from kvstore.disk.eviction import Eviction, Queue
from kvstore.disk.record import PAGE_BYTES

CHUNK_TOKENS = 128
REPLAY_CHUNK_TOKENS = 512  # Mooncake's
SEGMENT_BYTES = 256 << 20
WRITE_AMPLIFICATION_MAX = 1.1
CAPACITY_SHARES = (0.05, 0.1, 0.2, 0.5)


# ---- traffic


class Turn(NamedTuple):
    prompt_tokens: int
    prompt: list[int]  # its full chunks, which may be hits
    chunks: list[int]  # those and the answer's


class _Draft:
    """A growing conversation: its chunks so far, and its turns."""

    def __init__(self, numbers: Iterator[int], system: list[int], start_seconds: float):
        self._numbers = numbers
        self._chunks = list(system)
        self.tokens = len(system) * CHUNK_TOKENS
        self.seconds = start_seconds

    def turn(self, message_tokens: int, output_tokens: int) -> tuple[float, Turn]:
        prompt_tokens = self.tokens + message_tokens
        self.tokens = prompt_tokens + output_tokens
        stored = (self.tokens - 1) // CHUNK_TOKENS  # the last token sampled is never computed
        self._chunks.extend(itertools.islice(self._numbers, max(0, stored - len(self._chunks))))
        prompt = self._chunks[: min(stored, prompt_tokens // CHUNK_TOKENS)]
        return self.seconds, Turn(prompt_tokens, prompt, self._chunks[:stored])


def _lognormal(chance: random.Random, median: float, sigma: float, most: float = math.inf) -> float:
    return min(chance.lognormvariate(math.log(median), sigma), most)


def _think_seconds(chance: random.Random) -> float:
    return _lognormal(chance, 126, 1.04)


def _in_order(turns: list[tuple[float, Turn]]) -> list[Turn]:
    return [turn for _, turn in sorted(turns, key=lambda timed: timed[0])]


def chat(seed: int, *, conversations: int = 1000, one_shot: float = 0.2, period_seconds: float = 7200) -> list[Turn]:
    """`one_shot` is the share of arrivals with a single prompt. With arrivals over two hours, the active conversations
    are about a fifth of the footprint."""
    chance = random.Random(seed)
    numbers = itertools.count()
    systems = [list(itertools.islice(numbers, chance.randint(1, 3))) for _ in range(20)]
    popularity = [1 / rank for rank in range(1, len(systems) + 1)]
    turns = []
    for _ in range(conversations):
        start = chance.uniform(0, period_seconds)
        if chance.random() < one_shot:
            length = int(_lognormal(chance, 1500, 0.87, 16_000))
            turns.append(_Draft(numbers, [], start).turn(length, chance.randint(100, 230)))
            continue
        draft = _Draft(numbers, chance.choices(systems, popularity)[0], start)
        for _ in range(chance.randint(2, 28)):
            turns.append(draft.turn(chance.randint(20, 70), chance.randint(100, 230)))
            draft.seconds += _think_seconds(chance)
    return _in_order(turns)


def one_shots(seed: int) -> list[Turn]:
    """A fifth of the prompts: four of five arrivals, as the others take 15 turns."""
    return chat(seed, conversations=3300, one_shot=0.79)


def documents(seed: int) -> list[Turn]:
    """The distributions are fitted to the trace's deciles; a fifth of its arrivals, in the same hour."""
    chance = random.Random(seed)
    numbers = itertools.count()
    turns = []
    for _ in range(1700):
        draft = _Draft(numbers, [], chance.uniform(0, 3600))
        message = _lognormal(chance, 5000, 1.3, 120_000)
        continued = 0 if chance.random() < 0.79 else 1 + int(chance.expovariate(0.72))
        for _ in range(1 + continued):
            turns.append(draft.turn(int(message), chance.randint(20, 660)))
            draft.seconds += _think_seconds(chance)
            message = _lognormal(chance, 150, 2.0, 32_000)
    return _in_order(turns)


def replay(path: Path) -> list[Turn]:
    turns = []
    for line in path.read_bytes().splitlines():
        request = msgspec.json.decode(line)
        chunks = request["hash_ids"]
        turns.append(Turn(request["input_length"], chunks[: request["input_length"] // REPLAY_CHUNK_TOKENS], chunks))
    return turns


# ---- stores of single chunks


def hits_unbounded(turns: Sequence[Turn]) -> int:
    known: set[int] = set()
    hits = 0
    for turn in turns:
        hits += _prefix(turn.prompt, known.__contains__)
        known.update(turn.chunks)
    return hits


def hits_lru(turns: Sequence[Turn], capacity: int) -> int:
    """The last chunk of a prompt counts as used first, so that chains are evicted from their end."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for turn in turns:
        hits += _prefix(turn.prompt, kept.__contains__)
        for chunk in reversed(turn.chunks):
            kept[chunk] = None
            kept.move_to_end(chunk)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hits


def hits_optimum(turns: Sequence[Turn], capacity: int) -> int:
    """Belady's algorithm: evict the chunk whose next use is last, of one turn's chunks the deepest. A chunk is never
    read without those before it, so this keeps chains whole, and no policy has more hits. It knows the future, frees
    space by the chunk, and ignores writes."""
    next_uses = _next_uses(turns)
    kept: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = 0
    for turn, uses in zip(turns, next_uses, strict=True):
        hits += _prefix(turn.prompt, kept.__contains__)
        for depth, (chunk, use) in enumerate(zip(turn.chunks, uses, strict=True)):
            if use == len(turns):
                kept.pop(chunk, None)
            else:
                kept[chunk] = use
                heappush(heap, (-use, -depth, chunk))
        while len(kept) > capacity:
            use, _, chunk = heappop(heap)
            if kept.get(chunk) == -use:
                del kept[chunk]
    return hits


def _next_uses(turns: Sequence[Turn]) -> list[list[int]]:
    """For each turn and chunk, the index of the next turn that reads it; without one, the number of turns."""
    upcoming: dict[int, int] = {}
    uses = []
    for number in range(len(turns) - 1, -1, -1):
        uses.append([upcoming.get(chunk, len(turns)) for chunk in turns[number].chunks])
        upcoming.update(dict.fromkeys(turns[number].prompt, number))
    return uses[::-1]


def _prefix(chunks: Sequence[int], known: Callable[[int], bool]) -> int:
    return sum(1 for _ in itertools.takewhile(known, chunks))


# ---- stores of segments


class Live(NamedTuple):
    number: int
    chunk: int
    length: int


class Policy(Protocol):
    """As kvstore.disk.eviction, with more arguments, which S3-FIFO needs."""

    def queue(self, chunk: int) -> Queue: ...
    def opened(self, slot: int, queue: Queue) -> None: ...
    def hit(self, slot: int, number: int) -> None: ...
    def sealed(self, slot: int, values: int) -> None: ...
    def choose(self) -> int | None: ...
    def emptied(self, slot: int, values: Sequence[Live], budget_bytes: int) -> list[int]: ...


class Kvtier:
    def __init__(self, slots: int):
        self._eviction = Eviction(slots)

    def queue(self, chunk: int) -> Queue:
        return Queue.PROBATION

    def opened(self, slot: int, queue: Queue) -> None:
        self._eviction.opened(slot)

    def hit(self, slot: int, number: int) -> None:
        self._eviction.hit(slot, number)

    def sealed(self, slot: int, values: int) -> None:
        self._eviction.sealed(slot, values)

    def choose(self) -> int | None:
        return self._eviction.choose()

    def emptied(self, slot: int, values: Sequence[Live], budget_bytes: int) -> list[int]:
        return self._eviction.emptied(slot, [(value.number, value.length) for value in values], budget_bytes)


class Fifo(Kvtier):
    """kvtier's policy with few slots."""

    def __init__(self, slots: int):
        super().__init__(0)


class S3Fifo:
    """S3-FIFO as published, but over segments. A tenth of the slots is the small queue. There are as many ghosts as
    values; a put that is among them goes to the main queue at once."""

    reused_min = 0.3  # of a segment's values, for it to stay; 0.1, 0.2 and 0.5 are no better

    def __init__(self, slots: int):
        self._slots = slots
        self._small_slots = max(1, slots // 10)
        self._queues: tuple[deque[int], deque[int]] = (deque(), deque())
        self._queue_of: dict[int, Queue] = {}
        self._counters: dict[int, list[int]] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def queue(self, chunk: int) -> Queue:
        return Queue.MAIN if chunk in self._ghosts else Queue.PROBATION

    def opened(self, slot: int, queue: Queue) -> None:
        self._queue_of[slot] = queue
        self._counters[slot] = []

    def hit(self, slot: int, number: int) -> None:
        counters = self._counters[slot]
        counters.extend([0] * (number + 1 - len(counters)))
        counters[number] = min(3, counters[number] + 1)

    def sealed(self, slot: int, values: int) -> None:
        counters = self._counters[slot]
        counters.extend([0] * (values - len(counters)))
        self._queues[self._queue_of[slot]].append(slot)

    def choose(self) -> int | None:
        small, main = self._queues
        for _ in range(64):
            queue = small if small and (len(small) >= self._small_slots or not main) else main
            if not queue:
                return None
            slot = queue.popleft()
            counters = self._counters[slot]
            if sum(map(bool, counters)) <= self.reused_min * len(counters):
                return slot
            self._counters[slot] = [max(0, count - 1) for count in counters]
            main.append(slot)
        return main.popleft()

    def emptied(self, slot: int, values: Sequence[Live], budget_bytes: int) -> list[int]:
        counters, again = self._counters[slot], []
        for number, chunk, length in sorted(values, key=lambda value: -counters[value.number]):
            if counters[number] and length <= budget_bytes:
                budget_bytes -= length
                again.append(number)
            else:
                self._ghosts[chunk] = None
        while len(self._ghosts) > self._slots * len(counters):
            self._ghosts.popitem(last=False)
        return again


class SegmentStore:
    """The log's use of a policy, without the data."""

    def __init__(self, slots: int, segment_chunks: int, policy: Policy):
        self.where: dict[int, tuple[int, int]] = {}
        self.hit = policy.hit
        self.accepted_bytes = 0
        self.written_bytes = 0
        self._policy = policy
        self._segment_chunks = segment_chunks
        self._chunk_bytes = SEGMENT_BYTES // segment_chunks - PAGE_BYTES
        self._segments: list[list[int]] = [[] for _ in range(slots)]
        self._free = deque(range(slots))
        self._heads: dict[Queue, int] = {}

    def put(self, chunk: int) -> None:
        self.accepted_bytes += self._chunk_bytes
        self._write(chunk, self._policy.queue(chunk))

    def _write(self, chunk: int, queue: Queue) -> None:
        slot = self._heads.get(queue)
        while slot is None or len(self._segments[slot]) == self._segment_chunks:
            slot = self._roll(queue, slot)
        segment = self._segments[slot]
        self.where[chunk] = slot, len(segment)
        segment.append(chunk)
        self.written_bytes += self._chunk_bytes + PAGE_BYTES

    def _roll(self, queue: Queue, full: int | None) -> int:
        if full is not None:
            self._policy.sealed(full, len(self._segments[full]))
        slot = self._heads[queue] = self._free.popleft()
        self._policy.opened(slot, queue)
        self.written_bytes += 3 * PAGE_BYTES  # header, footer, trailer
        while not self._free:
            self._empty()
        return self._heads[queue]  # eviction may have filled or replaced it

    def _empty(self) -> None:
        slot = self._policy.choose()
        if slot is None:
            raise AssertionError("no slot to empty")
        chunks, self._segments[slot] = self._segments[slot], []
        live = [
            Live(number, chunk, self._chunk_bytes)
            for number, chunk in enumerate(chunks)
            if self.where.get(chunk) == (slot, number)
        ]
        spare = WRITE_AMPLIFICATION_MAX * self.accepted_bytes - self.written_bytes
        again = self._policy.emptied(slot, live, int(min(max(0, spare), SEGMENT_BYTES)))
        for value in live:
            del self.where[value.chunk]
        self._free.append(slot)
        for number in again:
            self._write(chunks[number], Queue.MAIN)


def hits_segments(
    turns: Sequence[Turn], capacity: int, segment_chunks: int, policy: Callable[[int], Policy]
) -> tuple[int, float]:
    """Hits, and the ratio of written to accepted bytes."""
    slots = capacity // segment_chunks
    store = SegmentStore(slots, segment_chunks, policy(slots))
    hits = 0
    for turn in turns:
        before = hits
        for chunk in turn.prompt:
            place = store.where.get(chunk)
            if place is None:
                break
            store.hit(*place)
            hits += 1
        for chunk in turn.chunks[hits - before :]:
            if chunk not in store.where:
                store.put(chunk)
    return hits, store.written_bytes / max(1, store.accepted_bytes)


# ---- the benchmark


class Figure(msgspec.Struct):
    hits: float  # over those of an unbounded store; median of the seeds
    lowest: float
    highest: float
    hit_ratio: float  # tokens hit over prompt tokens, median
    write_amplification: float | None  # the highest; None where single chunks are evicted


class Point(msgspec.Struct):
    capacity_share: float
    capacity_chunks: int
    policies: dict[str, Figure]


class Shape(msgspec.Struct):
    name: str
    turns: int
    prompt_tokens_mean: float
    footprint_chunks: int
    hit_ratio_unbounded: float
    points: list[Point]


class Result(msgspec.Struct):
    seeds: list[int]
    segment_chunks: int
    seconds: float
    shapes: list[Shape]


class Outcome(NamedTuple):
    hits: int
    write_amplification: float | None


def measure_one(turns: Sequence[Turn], capacity: int, segment_chunks: int) -> dict[str, Outcome]:
    policies: dict[str, Callable[[int], Policy]] = {"fifo": Fifo, "s3_fifo": S3Fifo, "kvtier": Kvtier}
    outcomes = {name: Outcome(*hits_segments(turns, capacity, segment_chunks, each)) for name, each in policies.items()}
    outcomes["lru"] = Outcome(hits_lru(turns, capacity), None)
    outcomes["optimum"] = Outcome(hits_optimum(turns, capacity), None)
    if any(outcome.hits > outcomes["optimum"].hits for outcome in outcomes.values()):
        raise AssertionError("more hits than can be: the simulation is wrong")
    return outcomes


def measure(name: str, traces: Sequence[Sequence[Turn]], tokens: int, options: argparse.Namespace) -> Shape:
    footprints = [len({chunk for turn in turns for chunk in turn.chunks}) for turns in traces]
    prompts = [sum(turn.prompt_tokens for turn in turns) for turns in traces]
    possible = [hits_unbounded(turns) for turns in traces]
    footprint = int(statistics.median(footprints))
    points = []
    for share in options.capacity_shares or [chunks / footprint for chunks in options.capacity_chunks]:
        least = 3 * options.segment_chunks
        capacities = [max(least, round(share * each)) for each in footprints]
        runs = [
            measure_one(turns, capacity, options.segment_chunks)
            for turns, capacity in zip(traces, capacities, strict=True)
        ]
        figures = {policy: _figure([run[policy] for run in runs], possible, prompts, tokens) for policy in runs[0]}
        points.append(Point(round(share, 4), int(statistics.median(capacities)), figures))
    return Shape(
        name=name,
        turns=int(statistics.median(map(len, traces))),
        prompt_tokens_mean=round(sum(prompts) / sum(map(len, traces))),
        footprint_chunks=footprint,
        hit_ratio_unbounded=round(tokens * sum(possible) / sum(prompts), 3),
        points=points,
    )


def _figure(outcomes: Sequence[Outcome], possible: Sequence[int], prompts: Sequence[int], tokens: int) -> Figure:
    shares = [outcome.hits / most for outcome, most in zip(outcomes, possible, strict=True)]
    ratios = [tokens * outcome.hits / prompt for outcome, prompt in zip(outcomes, prompts, strict=True)]
    written = [outcome.write_amplification for outcome in outcomes if outcome.write_amplification is not None]
    return Figure(
        hits=round(statistics.median(shares), 3),
        lowest=round(min(shares), 3),
        highest=round(max(shares), 3),
        hit_ratio=round(statistics.median(ratios), 3),
        write_amplification=round(max(written), 3) if written else None,
    )


def table(result: Result) -> str:
    lines = []
    for shape in result.shapes:
        lines.append(
            f"{shape.name}: {shape.turns} prompts of {shape.prompt_tokens_mean} tokens, "
            f"{shape.footprint_chunks} chunks; {shape.hit_ratio_unbounded:.1%} of the tokens can be hits"
        )
        names = list(shape.points[0].policies)
        lines.append("  capacity" + "".join(f"{name:>23}" for name in names))
        for point in shape.points:
            cells = (_cell(point.policies[name]) for name in names)
            lines.append(f"  {point.capacity_share:8.1%}" + "".join(f"{cell:>23}" for cell in cells))
    lines.append("Percent of the possible hits: median (lowest-highest of the seeds); x write amplification.")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    written = "      " if figure.write_amplification is None else f" x{figure.write_amplification:.2f}"
    return f" {100 * figure.hits:.1f} ({100 * figure.lowest:.0f}-{100 * figure.highest:.0f}){written}"


def run(options: argparse.Namespace) -> Result:
    begin = time.monotonic()
    seeds = list(range(options.seed, options.seed + options.seeds))
    shapes = [
        measure(shape.__name__, [shape(seed) for seed in seeds], CHUNK_TOKENS, options)
        for shape in (chat, one_shots, documents)
    ]
    shapes += [measure(path.stem, [replay(path)], REPLAY_CHUNK_TOKENS, options) for path in options.trace]
    return Result(seeds, options.segment_chunks, round(time.monotonic() - begin, 1), shapes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.eviction", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument("--seeds", type=int, default=5, help="traces of each shape")
    parser.add_argument("--capacity-chunks", type=int, nargs="+", help="instead of 5 to 50 %% of the footprint")
    parser.add_argument("--segment-chunks", type=int, default=32, help="chunks that fill a segment of 256 MiB")
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="files in Mooncake's format, to replay")
    options = parser.parse_args()
    options.capacity_shares = None if options.capacity_chunks else CAPACITY_SHARES
    result = run(options)
    print(table(result), file=sys.stderr)
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json:
        options.json.write_text(report + "\n")
    else:
        print(report)


if __name__ == "__main__":
    main()
