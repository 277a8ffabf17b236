"""Admission control of writes: the chunks that wait to be written, and which of them to drop when they do not fit.

A chunk is useful only with all chunks before it in its prompt, so the end of a prompt is dropped first:

- A chunk ranks no higher than the chunk before it in its prompt.
- Of two chunks with equal benefit, the one at the higher position is dropped first.
- A chunk whose predecessor was dropped within the last minute is refused.

This module has no lock and no I/O. It is not thread-safe: the write queue calls it under its lock.
"""

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.disk.log import Value
from kvstore.net.wire import Outcome

# The chunks of a prompt arrive within this time. After it, a successor of a dropped chunk may be useful again: its
# worker may hold the dropped chunk in DRAM, or compute it again.
_DROPPED_SECONDS = 60.0
_DROPPED_MAX = 100_000  # 260 bytes each
# The heap is rebuilt when it has more stale entries (of writes that left the queue) than live ones plus this many.
_STALE_MIN = 64


class Standing(NamedTuple):
    """What a chunk's rank is computed from."""

    benefit: float  # expected seconds saved per byte
    position: int = 0  # in its prompt, counted in chunks
    router_hash: int = 0  # 0: not known
    parent: int = 0  # router hash of the chunk before it; 0: none, or not known
    fingerprint: int = 0  # of its engine's layout: chunks of two models with the same tokens have the same router hash

    @property
    def chunk(self) -> tuple[int, int]:
        return self.fingerprint, self.router_hash

    @property
    def before(self) -> tuple[int, int]:
        """The chunk before it in its prompt."""
        return self.fingerprint, self.parent

    @property
    def rank(self) -> tuple[float, int]:
        """The lowest is dropped first."""
        return self.benefit, -self.position


@dataclass(eq=False)
class Write:
    """A chunk to store. Every callback in `done` (one for each client that offered the chunk) is called once, and must
    not block."""

    value: Value
    standing: Standing
    done: list[Callable[[Outcome], None]]
    kept: bool = False  # not to be dropped

    @property
    def size_bytes(self) -> int:
        return len(self.value.buffer.record)


class Backlog:
    """Waiting writes in order of arrival. A chunk for which `is_used` is true is never dropped, nor are those before it
    in its prompt."""

    def __init__(self, is_used: Callable[[bytes], bool]):
        self.size_bytes = 0
        self._is_used = is_used
        self._writes: OrderedDict[bytes, Write] = OrderedDict()
        self._of_chunk: dict[tuple[int, int], Write] = {}
        self._ranks: list[tuple[tuple[float, int], int, Write]] = []  # a heap; may contain stale entries
        self._count = 0
        self._dropped: OrderedDict[tuple[int, int], float] = OrderedDict()  # chunk -> since when

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, write: Write) -> None:
        self._writes[write.value.key] = write
        self.size_bytes += write.size_bytes
        write.standing = self._within_prompt(write.standing)
        if write.standing.router_hash:
            self._of_chunk[write.standing.chunk] = write
            self._dropped.pop(write.standing.chunk, None)
        self._count += 1
        heapq.heappush(self._ranks, (write.standing.rank, -self._count, write))  # of equals, drop the newest first
        if len(self._ranks) > 2 * len(self._writes) + _STALE_MIN:
            self._ranks = [entry for entry in self._ranks if self._waits(entry[-1])]
            heapq.heapify(self._ranks)

    def take(self, size: int) -> list[Write]:
        """Remove and return the oldest writes, at least `size` bytes together."""
        taken: list[Write] = []
        while self._writes and size > 0:
            write = next(iter(self._writes.values()))
            self._remove(write)
            taken.append(write)
            size -= write.size_bytes
        return taken

    def drop_below(self, standing: Standing, size: int) -> list[Write] | None:
        """Drop at least `size` bytes of chunks that rank below `standing`, lowest first. If there are fewer such bytes,
        drop nothing and return None."""
        rank = self._within_prompt(standing).rank
        chosen: list[tuple[tuple[float, int], int, Write]] = []
        while size > 0 and self._ranks and self._ranks[0][0] < rank:
            entry = heapq.heappop(self._ranks)
            write = entry[-1]
            if not self._waits(write) or self._is_kept(write):
                continue
            chosen.append(entry)
            size -= write.size_bytes
        if size > 0:
            for entry in chosen:
                heapq.heappush(self._ranks, entry)
            return None
        dropped = [write for *_, write in chosen]
        for write in dropped:
            self._remove(write)
        self.note_dropped(write.standing for write in dropped)
        return dropped

    def note_dropped(self, standings: Iterable[Standing]) -> None:
        """Remember chunks that were not stored: their successors are of no use now."""
        now = time.monotonic()
        for standing in standings:
            if standing.router_hash:
                self._dropped[standing.chunk] = now
                self._dropped.move_to_end(standing.chunk)
        while len(self._dropped) > _DROPPED_MAX:
            self._dropped.popitem(last=False)

    def is_orphan(self, standing: Standing) -> bool:
        """Whether the chunk before it was dropped."""
        return time.monotonic() - self._dropped.get(standing.before, -_DROPPED_SECONDS) < _DROPPED_SECONDS

    def clear(self) -> list[Write]:
        """Remove and return all."""
        return self.take(self.size_bytes)

    def _remove(self, write: Write) -> None:
        del self._writes[write.value.key]
        self.size_bytes -= write.size_bytes
        if self._of_chunk.get(write.standing.chunk) is write:
            del self._of_chunk[write.standing.chunk]

    def _waits(self, write: Write) -> bool:
        return self._writes.get(write.value.key) is write

    def _within_prompt(self, standing: Standing) -> Standing:
        """The standing, not above that of the chunk before it."""
        before = self._of_chunk.get(standing.before)
        if before is None:
            return standing
        benefit = min(standing.benefit, before.standing.benefit)
        return standing._replace(benefit=benefit, position=max(standing.position, before.standing.position + 1))

    def _is_kept(self, write: Write) -> bool:
        """Whether a client asked for this chunk, or for a later one of its prompt."""
        if self._is_used(write.value.key):
            before: Write | None = write
            while before is not None and not before.kept:
                before.kept = True
                before = self._of_chunk.get(before.standing.before)
        return write.kept
