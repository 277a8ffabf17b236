"""Chunks that wait to be written, and which of them are dropped when more come than fit: admission control.

A chunk is of use only with all chunks before it in its prompt. So of a prompt the end is dropped first: a chunk's
benefit counts for no more than that of the chunk before it, and of equal benefits the chunk at the higher position in
its prompt is dropped. A chunk that follows a dropped one is refused, for a while.

This module knows no lock and no I/O. It is not thread-safe: the write queue calls it under its lock.
"""

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.disk.log import Value
from kvstore.net.wire import Outcome

# A prompt's chunks come within this time of each other. Later a chunk that follows a dropped one may be of use: its
# worker may hold that one in DRAM, or compute it again.
_DROPPED_SECONDS = 60.0
_DROPPED_MAX = 100_000  # 260 bytes each
# Beyond half of the heap so many of its entries may be of writes that wait no more.
_STALE_MIN = 64


class Standing(NamedTuple):
    """What decides whether a chunk stays."""

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
    """A chunk to store. `done` is called once for everybody who offered it, and must not block."""

    value: Value
    standing: Standing
    done: list[Callable[[Outcome], None]]
    kept: bool = False  # not to be dropped

    @property
    def size_bytes(self) -> int:
        return len(self.value.buffer.record)


class Backlog:
    """Waiting writes, in the order of their coming. Of a chunk for which `is_used` is true, and of those before it in
    its prompt, none is dropped."""

    def __init__(self, is_used: Callable[[bytes], bool]):
        self.size_bytes = 0
        self._is_used = is_used
        self._writes: OrderedDict[bytes, Write] = OrderedDict()
        self._of_chunk: dict[tuple[int, int], Write] = {}
        self._ranks: list[tuple[tuple[float, int], int, Write]] = []  # a heap, with entries that wait no more
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
        heapq.heappush(self._ranks, (write.standing.rank, -self._count, write))  # of equals the last goes first
        if len(self._ranks) > 2 * len(self._writes) + _STALE_MIN:
            self._ranks = [entry for entry in self._ranks if self._waits(entry[-1])]
            heapq.heapify(self._ranks)

    def take(self, size: int) -> list[Write]:
        """The first, off the line, until they have at least `size` bytes together."""
        taken: list[Write] = []
        while self._writes and size > 0:
            write = next(iter(self._writes.values()))
            self._take_off(write)
            taken.append(write)
            size -= write.size_bytes
        return taken

    def drop_below(self, standing: Standing, size: int) -> list[Write] | None:
        """Drop chunks of a lower rank than `standing`, lowest first, that have at least `size` bytes; None, and none is
        dropped, if they have less."""
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
            self._take_off(write)
        self.note_dropped(write.standing for write in dropped)
        return dropped

    def note_dropped(self, standings: Iterable[Standing]) -> None:
        """These chunks are not stored: those that follow them are of no use now."""
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
        """All, off the line."""
        return self.take(self.size_bytes)

    def _take_off(self, write: Write) -> None:
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
        """Whether it was asked for, or one after it was."""
        if self._is_used(write.value.key):
            before: Write | None = write
            while before is not None and not before.kept:
                before.kept = True
                before = self._of_chunk.get(before.standing.before)
        return write.kept
