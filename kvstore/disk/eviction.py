"""Which segment is emptied next, and which of its values are worth writing again.

From S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) this keeps lazy promotion: a
hit only increments a counter, and a value that was hit is kept when its turn to be evicted comes. A log frees space by
the segment. So a whole segment gets another turn, without a write. If too few of its values were hit, those few are
rewritten, as far as the budget goes. New and rewritten values fill segments of their own (Queue), so that values that
outlived a turn are together; both kinds of segments are in one FIFO.

S3-FIFO's other half is left out: a small probationary queue for new values, and its ghosts. Here a value is requested
again after its user has read and typed, and a tenth of a store may not last that long. In
`python -m benchmarks.store.eviction` that queue costs up to 18 percent of the possible hits on long documents. It gains
at most 1.6 percent where a fifth of the prompts are one-shot.

This module knows nothing of files and keys. It is not thread-safe: the log calls it under its lock.
"""

import enum
from collections import OrderedDict
from collections.abc import Sequence

# With fewer slots a second open segment costs more than it brings: up to 14 percent of the hits with four, 0.6 with
# twelve. The figures here are of benchmarks/store/eviction.py with one constant changed.
SLOTS_MIN = 10
_COUNT_MAX = 3  # two bits, as in S3-FIFO; one or four change nothing here
# A segment gets another turn if more of its values were asked for than the budget would let it write again, a share
# between these bounds: with budget to spare it is better to rewrite those and drop the rest, without it to keep all.
# The best fixed share, 0.25, keeps up to 1.2 percent fewer hits; moving a bound changes no more.
_REUSED_MIN, _REUSED_MAX = 0.1, 0.5
# Bounds one `choose`. 16 cost up to 1.2 percent, 256 brought nothing.
_SECOND_CHANCES_MAX = 64


class Queue(enum.IntEnum):
    """Which of the two open segments takes a value."""

    PROBATION = 0  # it is new
    MAIN = 1  # it was asked for, and is written again


class Eviction:
    """The order in which a log of `slots` segments empties them. With fewer than SLOTS_MIN it is plain FIFO, and
    nothing is written again.

    A slot is `opened`, `sealed`, then returned by `choose` once, then `emptied`. After a start the log opens and seals
    what it found, by its turns, and says which values were read.
    """

    def __init__(self, slots: int):
        self.resize(slots)
        self._line: OrderedDict[int, None] = OrderedDict()  # sealed slots, the next to be looked at first
        self._counters: dict[int, bytearray] = {}  # by slot: how often each value was asked for in this turn
        self._turns: dict[int, int] = {}  # by slot: when its turn began
        self._newest = 0  # turn
        self._unsaved: set[int] = set()  # slots of which that changed since `save`
        self._spare = 0.0  # budget that was left by the segment emptied last, over that segment's bytes

    def resize(self, slots: int) -> None:
        """From now on the log has so many."""
        self._chances = _SECOND_CHANCES_MAX if slots >= SLOTS_MIN else 0

    def opened(self, slot: int, turn: int = 0, were_read: bytes = b"") -> None:
        """The slot begins to take values, numbered from 0 in the order of storing. `turn` is a number that grows from
        slot to slot. After a start, it and `were_read` are those saved."""
        self._counters[slot] = bytearray(were_read)
        self._turns[slot] = turn
        self._newest = max(self._newest, turn)
        self._unsaved.discard(slot)

    def hit(self, slot: int, number: int) -> None:
        """A value was asked for again."""
        counters = self._counters[slot]
        if number >= len(counters):
            counters.extend(bytes(number + 1 - len(counters)))
        if counters[number] < _COUNT_MAX:
            if not counters[number]:
                self._unsaved.add(slot)
            counters[number] += 1

    def sealed(self, slot: int, values: int) -> None:
        """The slot takes no more than the `values` it has, and may be chosen from now on."""
        counters = self._counters[slot]
        counters.extend(bytes(max(0, values - len(counters))))
        self._line[slot] = None

    def choose(self) -> int | None:
        """The slot to be emptied next, no longer in the line; None if there is none."""
        for _ in range(min(self._chances, len(self._line) - 1)):
            slot = next(iter(self._line))
            if not self._well_used(slot):
                break
            # Zeroed. S3-FIFO subtracts one, which is as good here, but takes more turns for segments in use no more.
            self._counters[slot] = bytearray(len(self._counters[slot]))
            self._line.move_to_end(slot)
            self._turns[slot] = self._newest
            self._unsaved.add(slot)
        return self._line.popitem(last=False)[0] if self._line else None

    def unsaved(self) -> list[int]:
        """Sealed slots of which turn or reads changed since they were saved, those to be emptied next first."""
        return [slot for slot in self._line if slot in self._unsaved]

    def save(self, slot: int) -> tuple[int, bytes] | None:
        """The slot's turn, and for each value whether it was read: to be saved now. None if that is not needed."""
        if slot not in self._line or slot not in self._unsaved:
            return None
        self._unsaved.discard(slot)
        return self._turns[slot], bytes(self._counters[slot])

    def emptied(self, slot: int, values: Sequence[tuple[int, int]], budget_bytes: int) -> list[int]:
        """Of the slot's live values (number, length), the numbers of those to be written again, hottest first; together
        they have at most `budget_bytes`. Of equally hot ones the earlier go first: they are nearer to the beginning of
        their prompt, and without it the rest is useless."""
        if not self._chances:
            return []
        counters, left, again = self._counters[slot], budget_bytes, []
        for count, number, length in sorted((-counters[number], number, length) for number, length in values):
            if count and length <= left:
                left -= length
                again.append(number)
        self._spare = left / max(1, sum(length for _, length in values))
        return again

    def _well_used(self, slot: int) -> bool:
        counters = self._counters[slot]
        reused = len(counters) - counters.count(0)
        share = min(_REUSED_MAX, max(_REUSED_MIN, self._spare))
        return reused > share * len(counters)
