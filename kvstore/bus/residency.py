"""Residency of chunks: targets announce it, a router's mirror replicates it.

Announcements carry an epoch (a random number of one start of a target, compared only for equality) and a sequence
number. A mirror that missed some requests a replay, as long as the target keeps them. Otherwise it requests a snapshot,
page by page, and the announcements since. All of it is plain data; only `announce` and `follow` use the bus.
"""

import asyncio
import contextlib
import itertools
import logging
import mmap
import random
import secrets
import threading
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from kvstore.bus import messages
from kvstore.bus.messages import (
    Replay,
    ReplayRequest,
    Residency,
    SnapshotPage,
    SnapshotRequest,
)
from kvstore.disk.record import Announced, Entry
from kvstore.rarely import Rarely
from kvstore.text import NAME_CHARACTERS_MAX, is_plain, shown

if TYPE_CHECKING:
    from kvstore.bus.connection import Bus, Conversation

logger = logging.getLogger(__name__)

# 256 KiB of hashes a page: a quarter of what NATS carries by default.
PAGE_HASHES = 32_768
# Router hashes in one announcement: 9 bytes each in msgpack.
MESSAGE_HASHES = 32_768
# Limit of changes that are queued while NATS is down. Beyond it the announcer drops them, and mirrors detect the gap.
PENDING_MAX = 1_000_000
# Announcements that a target keeps for replays: 50 per second at most, and 44 bytes per hash in memory.
REPLAY_MESSAGES = 4096
REPLAY_HASHES = 200_000
_REPLAY_ANSWER = 256  # announcements in one answer, of at most as many hashes as one has
# A snapshot is shared by all requests within this time; its later pages stay available while they are requested.
_SNAPSHOT_SECONDS = 5.0
_SNAPSHOT_IDLE_SECONDS = 30.0
_SNAPSHOTS_KEPT = 2
# Entries looked at in one go: 0.05 ms in which no other thread runs. A GET waits for one at a time, with these pauses.
_WALK_ENTRIES = 8192
_WALK_SECONDS, _WALK_PAUSE_SECONDS = 0.0005, 0.001
# Polling interval and timeout of a mirror for a snapshot that is still being made.
_MAKING_ASK_SECONDS, _MAKING_SECONDS_MAX = 0.25, 120.0
_INTERVAL_SECONDS = 0.02  # changes are batched for this long into one message
_SNAPSHOTS_AT_ONCE = 8  # concurrent snapshots of a mirror
# A mirror's bounds. No valid message has more than twice an announcement's hashes. The changes that are kept during
# snapshots take 150 MB at most, as Python integers.
_CHANGES_MAX = 2 * MESSAGE_HASHES
WAITING_HASHES = 4_000_000
_WAITING_MESSAGES = 10_000  # of one target
_TARGETS_MAX = 1024
_NUMBERS = 2 * _TARGETS_MAX  # of targets, from 1 on: those that are being cleared keep theirs
_LAYOUTS_MAX = 64
_PAGES_MAX = 4096  # of a snapshot: over 100 million chunks
# Minimal interval between snapshots of one target, whatever the number of gaps. After a snapshot, the mirror also waits
# this long for a second, conflicting answer.
RESYNC_SECONDS = 1.0
_DOUBT_SECONDS = 5.0
_COMPLAIN_SECONDS = 60.0
FORMER, CONFLICTING = "former_start", "conflicting_snapshots"  # why something is ignored
# After this many consecutive messages with an earlier epoch of a target, the epoch that is known counts as the wrong
# one.
_OLDER_MAX = 5
_FORMER_MAX = 16  # starts of a target that are remembered
_SLOTS_MIN = 1024
# A fuller table needs more than four probes for a miss; an emptier one needs more memory per entry.
_LOAD_MAX = 0.75
_LOAD_FRESH = 0.6  # of a new table: in the room between the two, each entry added moves some slots of the old one
_LOAD_NEXT = 0.65  # the new table's memory is touched from here on: the system clears it then, 2 MiB at a time
_TOUCHED_PER_ENTRY = 24  # more than 2 / (_LOAD_MAX - _LOAD_NEXT): all of it, before it is used
_MOVED_PER_ENTRY = 8  # more than 1 / (_LOAD_MAX - _LOAD_FRESH): the old table is empty before the new one is full
# Entries, or slots, per step of some milliseconds; the event loop runs between steps.
_STEP_ENTRIES, _STEP_SLOTS = 2048, 32_768
_RELEASED_BYTES = 4 << 20
_TOUCHED_SLOTS = 1 << 18  # of a table for a whole snapshot, in one step: a page of 2 MiB
_U64 = (1 << 64) - 1

Hashes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint64]]"
Part = TypeVar("Part")
Steps: TypeAlias = Generator[None, None, bool]
Slots: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
Lanes: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint16]]"


class _Snapshot:
    """All readable chunks at `seq`, as pages of one layout each."""

    def __init__(self, seq: int, pages: list[tuple[int, bytes]]):
        self.seq = seq
        self.token = random.getrandbits(62) | 1
        self.pages = pages or [(0, b"")]
        self.made = self.asked = time.monotonic()


class Announcer:
    """A target's side: collects the changes of the log, and makes announcements and snapshots of them. Thread-safe.

    `announced` returns everything visible now, in parts of at most so many; it is called without the announcer's lock.
    """

    def __init__(self, target: str, epoch: int, announced: Callable[[int], Iterable[Announced]]):
        self.target = target
        self._epoch = epoch
        self._announced = announced
        self._lock = threading.Lock()
        self._seq = 0
        # (fingerprint, blocks per chunk) -> router hash -> is it there now; the last change wins
        self._pending: defaultdict[tuple[int, int], dict[int, bool]] = defaultdict(dict)
        self._pending_count = 0
        self._said: deque[Residency] = deque()  # the last announcements, without a gap
        self._said_hashes = 0
        self._snapshots: list[_Snapshot] = []  # the newest last

    def stored(self, entry: Entry) -> None:
        self._note(entry, True)

    def removed(self, entry: Entry) -> None:
        self._note(entry, False)

    @property
    def has_changes(self) -> bool:
        return self._pending_count > 0

    def announcements(self) -> list[Residency]:
        """The changes since the last call, in at least one message; an empty one is the heartbeat."""
        with self._lock:
            changes, self._pending = self._pending, defaultdict(dict)
            lost, self._pending_count = self._pending_count > PENDING_MAX, 0
            if lost:
                self._seq += 1  # a gap, which makes mirrors request a snapshot
                changes.clear()
                self._said.clear()
                self._said_hashes = 0
                self._snapshots.clear()
            said = [
                self._message(layout, part)
                for layout, hashes in changes.items()
                for part in _batched(hashes.items(), MESSAGE_HASHES)
            ]
            said = said or [self._message((0, 0), [])]
            self._keep(said)
            return said

    def snapshot_page(self, request: SnapshotRequest) -> SnapshotPage | None:
        """Page `request.page` of a snapshot. It may be newer than its `seq`: replaying what follows does no harm. None
        if a new snapshot is asked for, and `make_snapshot` must come first."""
        now = time.monotonic()
        with self._lock:
            found = [one for one in self._snapshots if one.token == request.token]
            if not request.token:
                found = [one for one in self._snapshots[-1:] if now - one.made <= _SNAPSHOT_SECONDS]
                if not found:
                    return None
            if not found or not 0 <= request.page < len(found[0].pages):
                return SnapshotPage(self.target, self._epoch, 0, request.token, 0, 0, b"")
            snapshot = found[0]
            snapshot.asked = now
        layout, hashes = snapshot.pages[request.page]
        return SnapshotPage(self.target, self._epoch, snapshot.seq, snapshot.token, len(snapshot.pages), layout, hashes)

    def not_yet(self) -> SnapshotPage:
        """What is answered while a snapshot is being made."""
        return SnapshotPage(self.target, self._epoch, 0, 0, 0, 0, b"")

    def make_snapshot(self) -> None:
        """Make a new snapshot. Takes long, because it yields to other threads. For one thread at a time."""
        with self._lock:
            seq = self._seq
        pages = list(itertools.islice(_paged(unhurried(self._announced(_WALK_ENTRIES))), _PAGES_MAX))
        with self._lock:
            self._snapshots = [*self._snapshots[1 - _SNAPSHOTS_KEPT :], _Snapshot(seq, pages)]

    def replay(self, request: ReplayRequest) -> Replay:
        with self._lock:
            first = self._said[0].seq if self._said else self._seq + 1
            if request.epoch != self._epoch or request.seq < first:
                return Replay(self._seq, [])
            kept = itertools.islice(self._said, request.seq - first, request.seq - first + _REPLAY_ANSWER)
            messages: list[Residency] = []
            hashes = 0
            for message in kept:
                hashes += _hashes_in(message)
                if messages and hashes > MESSAGE_HASHES:
                    break
                messages.append(message)
            return Replay(self._seq, messages)

    def _keep(self, said: list[Residency]) -> None:
        """Keep announcements for replays, and drop expired snapshots. With the lock held."""
        self._said.extend(said)
        self._said_hashes += sum(map(_hashes_in, said))
        while len(self._said) > REPLAY_MESSAGES or self._said_hashes > REPLAY_HASHES:
            self._said_hashes -= _hashes_in(self._said.popleft())
        if self._snapshots:
            since = time.monotonic() - _SNAPSHOT_IDLE_SECONDS
            self._snapshots = [one for one in self._snapshots if one.asked > since]

    def _note(self, entry: Entry, there: bool) -> None:
        if not entry.router_hash:
            return
        with self._lock:
            self._pending_count += 1
            if self._pending_count <= PENDING_MAX:
                self._pending[entry.fingerprint, entry.blocks_per_chunk][entry.router_hash] = there

    def _message(self, layout: tuple[int, int], changes: Sequence[tuple[int, bool]]) -> Residency:
        self._seq += 1
        stored = [router_hash for router_hash, there in changes if there]
        removed = [router_hash for router_hash, there in changes if not there]
        return Residency(self.target, self._epoch, self._seq, *layout, stored, removed, time.time_ns() // 1_000_000)


def _hashes_in(message: Residency) -> int:
    return len(message.stored) + len(message.removed)


def unhurried(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts, with pauses for other threads in between, because the work on a part holds the interpreter's lock."""
    begun = time.monotonic()
    for part in parts:
        yield part
        if time.monotonic() - begun >= _WALK_SECONDS:
            time.sleep(_WALK_PAUSE_SECONDS)
            begun = time.monotonic()


def _paged(parts: Iterable[Announced]) -> Iterator[tuple[int, bytes]]:
    """Fingerprint and router hashes of each page."""
    waiting: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
    for part in parts:
        names, layouts = part["router_hash"], part["fingerprint"]
        named = names != 0
        alike = bool((layouts == layouts[:1]).all())  # the rule, and sorting them takes three times as long
        for layout in (layouts[:1] if alike else np.unique(layouts)).tolist():
            hashes = waiting[layout]
            hashes.frombytes(names[named & (layouts == layout)].tobytes())
            while len(hashes) >= PAGE_HASHES:
                yield layout, hashes[:PAGE_HASHES].tobytes()
                del hashes[:PAGE_HASHES]
    yield from ((layout, hashes.tobytes()) for layout, hashes in waiting.items() if hashes)


async def announce(announcer: Announcer, line: "Bus", namespace: str) -> None:
    """Publish until cancelled: changes soon, a burst of them in one message, and a heartbeat every second."""

    making: asyncio.Future[None] | None = None

    async def page(request: SnapshotRequest) -> SnapshotPage:
        nonlocal making
        answer = announcer.snapshot_page(request)
        if answer is None and (making is None or making.done()):
            making = asyncio.ensure_future(asyncio.to_thread(announcer.make_snapshot))
            await asyncio.wait([making], timeout=_MAKING_ASK_SECONDS)
            answer = announcer.snapshot_page(request)
        return answer or announcer.not_yet()

    async def replay(request: ReplayRequest) -> Replay:
        return announcer.replay(request)

    target = announcer.target
    asked = [
        await line.subscribe(messages.subject(namespace, "snapshot", target), SnapshotRequest, page),
        await line.subscribe(messages.subject(namespace, "replay", target), ReplayRequest, replay),
    ]
    last = 0.0
    try:
        while True:
            due = time.monotonic() - last >= messages.HEARTBEAT_SECONDS
            if announcer.has_changes or due:
                last = time.monotonic()
                for message in announcer.announcements():
                    await line.publish(messages.subject(namespace, "residency", target), message)
            await asyncio.sleep(_INTERVAL_SECONDS)
    finally:
        for subscription in asked:
            await line.unsubscribe(subscription)  # the namespace may come back, with another announcer


class _Slots:
    """Router hash -> holders, by open addressing, in two arrays of a size that is a power of two. The holders of a
    chunk are the numbers of up to four targets, 16 bits each; 0 is no target."""

    def __init__(self, slots: int, secret: np.uint64):
        self._secret = secret
        self._shift = np.uint64(64 - (slots.bit_length() - 1))
        # Of mmap, which provides zeros when they are touched: malloc clears up to 32 MiB at once.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = [mmap.mmap(-1, 8 * slots, flags=flags) for _ in range(2)]
        for one in self._memory:
            with contextlib.suppress(OSError):
                one.madvise(mmap.MADV_HUGEPAGE)  # or a look-up misses the TLB, too
        self._hashes, self.holders = (np.frombuffer(one, np.uint64) for one in self._memory)  # hash 0: free
        self._touched = self._released = 0  # slots
        self.used = 0  # slots with a hash, its holders maybe none: what goes keeps its slot

    def __len__(self) -> int:
        return len(self.holders)

    def touch(self, slots: int) -> bool:
        """Have the system provide memory for so many more slots of a table that is not in use yet: first for hashes,
        then for holders, so that it clears one large page at a time. False at the end."""
        array, at = (self._hashes, 0) if self._touched < len(self) else (self.holders, len(self))
        array[self._touched - at : self._touched - at + slots] = 0
        self._touched = min(self._touched + slots, at + len(self))
        return self._touched < 2 * len(self)

    def release(self) -> bool:
        """Free some of the memory of an unused table; freeing all at once takes long. False at the end."""
        start, whole = 8 * self._released, 8 * len(self)
        if start >= whole:
            return False
        for one in self._memory:
            one.madvise(mmap.MADV_DONTNEED, start, min(_RELEASED_BYTES, whole - start))
        self._released += _RELEASED_BYTES // 8
        return True

    @property
    def size_bytes(self) -> int:
        return int(self._hashes.nbytes + self.holders.nbytes)

    def held(self, part: slice) -> tuple[Hashes, Hashes]:
        """Hashes and holders of the slots in `part` that have a holder."""
        holders = self.holders[part]
        there = np.flatnonzero(holders)
        return self._hashes[part][there], holders[there]

    def holders_of(self, hashes: Hashes) -> Hashes:
        found, slots = self.find(hashes)
        holders: Hashes = np.where(found, self.holders[slots], np.uint64(0))
        return holders

    def _start(self, hashes: Hashes) -> Slots:
        start: Slots = ((hashes * self._secret) >> self._shift).astype(np.int64)
        return start

    def find(self, hashes: Hashes) -> tuple["np.ndarray[tuple[int], np.dtype[np.bool_]]", Slots]:
        """Whether each hash has a slot, and which. Steps grow by one: with a power of two they visit every slot."""
        last = len(self._hashes) - 1
        slots = self._start(hashes)
        there = self._hashes[slots]
        found = there == hashes
        open_ = np.flatnonzero(~found & (there != 0))
        step = 0
        while len(open_):
            step += 1
            at = (slots[open_] + step) & last
            slots[open_] = at
            there = self._hashes[at]
            match = there == hashes[open_]
            found[open_] = match
            open_ = open_[~match & (there != 0)]
        return found, slots

    def claim(self, hashes: Hashes) -> Slots:
        """The slot of each of `hashes`, which differ; a hash without one gets one. There must be room."""
        last = len(self._hashes) - 1
        slots = self._start(hashes)
        open_ = np.arange(len(hashes))
        step = 0
        while len(open_):
            at, wanted = slots[open_], hashes[open_]
            there = self._hashes[at]
            free = there == 0
            if free.any():
                self._hashes[at[free]] = wanted[free]  # if several hashes want a slot, one gets it
                now = self._hashes[at]
                self.used += int(np.count_nonzero(free & (now == wanted)))
                there = now
            open_ = open_[there != wanted]
            step += 1
            slots[open_] = (slots[open_] + step) & last
        return slots


class _Table:
    """Which targets hold which chunks of one layout: up to four of each chunk, by number. 16 bytes a slot and 21 to 53
    an entry; whole batches are looked up and changed at once. A secret random number salts the slot of a hash, against
    forged hashes that collide.

    The time of a call does not depend on the table's size. A full table moves to a new one incrementally, some slots
    for each added entry; a hash has its holders in one of the two. The number of a removed target is cleared
    incrementally, too.
    """

    def __init__(self) -> None:
        self._secret = np.uint64(random.getrandbits(64) | 1)
        self._now = _Slots(_SLOTS_MIN, self._secret)
        self._before: _Slots | None = None  # what is moved from
        self._moved = 0  # slots of it
        self._next: _Slots | None = None  # in preparation
        self._gone: _Slots | None = None  # whose memory is given back
        self._live = 0  # hashes with a holder
        self.stale: set[int] = set()  # numbers that are being cleared
        self._is_stale = np.zeros(_NUMBERS, np.bool_)
        self._cleared = 0  # slots of `_now` without any of them

    @property
    def size_bytes(self) -> int:
        return sum(table.size_bytes for table in (self._before, self._now, self._next) if table is not None)

    def holders(self, hashes: Hashes) -> Lanes:
        """The numbers of each hash's targets, also stale ones; 0 in free places."""
        holders = self._now.holders_of(hashes)
        if self._before is not None:
            holders |= self._before.holders_of(hashes)
        return _lanes(holders)

    def add(self, hashes: Hashes, number: int) -> int:
        """Add the target to hashes that differ; returns how many did not have it and have it now. A chunk on four
        other targets stays as it is."""
        self._reserve(len(hashes))
        self._move(_MOVED_PER_ENTRY * len(hashes))
        slots = self._now.claim(hashes)
        holders = self._now.holders[slots]
        if self._before is not None:
            found, before = self._before.find(hashes)
            holders[found] |= self._before.holders[before[found]]
            self._before.holders[before[found]] = 0
        fresh = holders == 0
        holders[fresh] = number
        added = int(np.count_nonzero(fresh))
        self._live += added
        if added < len(hashes):
            held = np.flatnonzero(~fresh)
            others = holders[held]
            lanes = self._without_stale(_lanes(others))
            free = lanes == 0
            missing = np.flatnonzero(free.any(axis=1) & (lanes != number).all(axis=1))
            lanes[missing, free[missing].argmax(axis=1)] = number
            holders[held] = others
            added += len(missing)
        self._now.holders[slots] = holders
        return added

    def remove(self, hashes: Hashes, number: int) -> int:
        """Remove the target from hashes that differ; returns how many had it."""
        removed = 0
        for table in (self._now, self._before):
            if table is not None:
                found, slots = table.find(hashes)
                slots = slots[found]
                holders = table.holders[slots]
                held = np.count_nonzero(holders)
                lanes = _lanes(holders)
                had = lanes == number
                lanes[had] = 0
                table.holders[slots] = holders
                self._live -= int(held - np.count_nonzero(holders))
                removed += int(np.count_nonzero(had))
        return removed

    def forget(self, number: int) -> None:
        """Remove the target from all hashes, incrementally. The number must not be reused before `stale` is empty."""
        self.stale.add(number)
        self._is_stale[number] = True
        self._cleared = 0

    def _without_stale(self, lanes: Lanes) -> Lanes:
        """The same lanes, cleared of stale numbers."""
        if self.stale:
            lanes[self._is_stale[lanes]] = 0
        return lanes

    def release(self) -> bool:
        """Free some of the memory of a table that is no longer used; False at the end."""
        return any(one.release() for one in (self._before, self._now, self._next, self._gone) if one is not None)

    def expect(self, entries: int) -> Iterator[None]:
        """Make room for so many more, in steps: with several doublings on the way, adding them takes twice as long."""
        if self._now.used + entries <= _LOAD_NEXT * len(self._now):
            return
        larger = self._next = self._larger(entries)
        while larger.touch(_TOUCHED_SLOTS):
            yield
        while self._before is not None:
            self._move(_STEP_SLOTS)
            yield
        if self._next is larger:
            self._begin_next(larger)

    def _begin_next(self, larger: _Slots) -> None:
        """From now on add to it, and move what is in the other."""
        self._before, self._now, self._next = self._now, larger, None
        self._moved, self._cleared = 0, len(self._now)

    def _reserve(self, entries: int) -> None:
        """Make room for so many more, in a new table if need be."""
        now = self._now
        if now.used + entries <= _LOAD_NEXT * len(now):
            return
        if self._next is None:
            self._next = self._larger(entries + int((_LOAD_MAX - _LOAD_NEXT) * len(now)))
        self._next.touch(2 * _TOUCHED_PER_ENTRY * entries)
        if now.used + entries <= _LOAD_MAX * len(now):
            return
        self._move(len(self._before or ()))  # nothing is left: as many slots were moved as entries needed room
        if self._live + entries > _LOAD_FRESH * len(self._next):
            self._next = self._larger(entries)
        self._begin_next(self._next)

    def _larger(self, entries: int) -> _Slots:
        """A table with room for so many more, of the same size if what is gone makes that room."""
        slots = len(self._now)
        while self._live + entries > _LOAD_FRESH * slots:
            slots *= 2
        return _Slots(slots, self._secret)

    def work(self, slots: int) -> bool:
        """Move or clear so many slots; False if nothing is left to do."""
        if self._before is not None or self._gone is not None:
            self._move(slots)
        elif self._cleared < len(self._now) and self.stale:
            part = self._now.holders[self._cleared : self._cleared + slots]
            held = int(np.count_nonzero(part))
            self._without_stale(_lanes(part))
            self._live -= held - int(np.count_nonzero(part))
            self._cleared += slots
        else:
            self.stale.clear()
            self._is_stale[:] = False
            return False
        return True

    def _move(self, slots: int) -> None:
        if self._gone is not None and not self._gone.release():
            self._gone = None
        if self._before is None:
            return
        part = slice(self._moved, self._moved + slots)
        hashes, holders = self._before.held(part)
        self._without_stale(_lanes(holders))
        live = holders != 0
        self._live -= int(np.count_nonzero(~live))
        self._now.holders[self._now.claim(hashes[live])] = holders[live]
        self._before.holders[part] = 0
        self._moved += slots
        if self._moved >= len(self._before):
            self._before, self._gone = None, self._before


def _lanes(holders: Hashes) -> Lanes:
    """The four numbers in each, in the same memory."""
    return holders.view(np.uint16).reshape(-1, 4)


@dataclass
class _View:
    """A mirror's state of one target."""

    epoch: int = -1
    seq: int = -1
    former: deque[int] = field(default_factory=lambda: deque(maxlen=_FORMER_MAX))  # earlier epochs
    older: int = 0  # consecutive messages of an earlier epoch
    caught_up_seq: int = -1  # of the last snapshot or replay
    sound: bool = False  # what is known was right at (epoch, seq)
    heard: float = 0.0  # time.monotonic() of the last announcement
    complete: bool = False  # False until a snapshot has been applied, and after a gap
    number: int = 0  # the target's number in every table; 0 until a snapshot has been applied
    resident: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # fingerprint -> chunks
    waiting: deque[Residency] = field(default_factory=deque)  # queued announcements, during a snapshot
    joining: bool = False  # whether a snapshot is being applied


class Mirror:
    """A router's copy of the residency of all targets. For one thread; no I/O.

    Long operations are generators of steps of a few milliseconds: `applying` and `joining`, which `apply` and
    `apply_snapshot` run to their end. `work` must be called regularly.

    A target that has been silent for `max_age_seconds` is left out of answers until its next announcement. Beyond
    `max_entries` (pairs of chunk and target), further entries are dropped, and their chunks are recomputed. `ignored`
    counts invalid messages and dropped entries by reason. `resyncs` counts applied snapshots, `replays` counts gaps
    that were filled without one.
    """

    def __init__(self, *, max_age_seconds: float = 10.0, max_entries: int = 50_000_000):
        self._max_age_seconds = max_age_seconds
        self._max_entries = max_entries
        self._views: dict[str, _View] = {}
        self._tables: dict[int, _Table] = {}  # by fingerprint
        self._gone: list[_Table] = []  # whose memory is given back
        self._entries = 0
        self.ignored: Counter[str] = Counter()
        self.resyncs = self.replays = 0
        self._complains = Rarely(_COMPLAIN_SECONDS)
        self._waiting_hashes = 0  # of all targets

    def apply(self, message: Residency, now: float) -> bool:
        """Apply an announcement; True if the mirror must now request a snapshot of the target."""
        return _all_of(self.applying(message, now))

    def applying(self, message: Residency, now: float) -> Steps:
        """`apply`, in steps. The next announcement comes after the last one."""
        view = self._views.get(message.target)
        if view is None and len(self._views) >= _TARGETS_MAX:
            self.forget_silent(now, self._max_age_seconds)
        if reason := self._wrong(message, view):
            self.ignored[reason] += 1  # and not heard, either
            if view is not None and reason == FORMER:
                view.older += 1
                if view.older >= _OLDER_MAX:
                    self._drop(message.target)
            return False
        if view is None:
            view = self._views[message.target] = _View()
        view.heard, view.older = now, 0
        if view.complete and (message.epoch, message.seq) == (view.epoch, view.seq + 1):
            yield from self._change(view, message)
            return False
        if view.complete and message.epoch == view.epoch and message.seq <= view.seq:
            if message.seq <= view.caught_up_seq:
                return False  # the snapshot has it
            self.ignored["duplicate_number"] += 1  # from another sender; only a snapshot can decide
            view.sound = False
        begin = not view.joining and (view.complete or not view.waiting)
        if begin or len(view.waiting) >= _WAITING_MESSAGES or self._waiting_hashes >= WAITING_HASHES:
            self._forget_waiting(view)
        view.complete = False
        view.waiting.append(message)
        self._waiting_hashes += _hashes_in(message)
        return begin

    def _wrong(self, message: Residency, view: _View | None) -> str | None:
        """The reason why the message is invalid, or None. Its hashes are checked later, when they are applied."""
        numbers = message.epoch, message.seq, message.fingerprint, message.blocks_per_chunk
        if not all(0 <= number <= _U64 for number in numbers):
            return "number_out_of_range"
        if not is_plain(message.target, NAME_CHARACTERS_MAX):
            return "invalid_name"
        if len(message.stored) + len(message.removed) > _CHANGES_MAX:
            return "too_many_changes"
        if view is None and len(self._views) >= _TARGETS_MAX:
            return "too_many_targets"
        if view is not None and message.epoch in view.former:
            return FORMER
        return None

    def missing(self, target: str) -> ReplayRequest | None:
        """The request for the missing announcements; None if only a snapshot helps."""
        view = self._views.get(target)
        return ReplayRequest(view.epoch, view.seq + 1) if view is not None and view.sound else None

    def replaying(self, target: str, replayed: Sequence[Residency]) -> Steps:
        """Apply missed announcements and those since; False if a gap remains."""
        view = self._views.get(target)
        if view is None or view.joining or not view.sound:
            return False
        yield from self._catching_up(target, view, replayed)
        self.replays += view.complete
        return view.complete

    def apply_snapshot(self, pages: Sequence[SnapshotPage], replayed: Sequence[Residency] = ()) -> bool:
        """Apply a whole snapshot and the announcements since; False if there is a gap between them."""
        return _all_of(self.joining(pages, replayed))

    def joining(self, pages: Sequence[SnapshotPage], replayed: Sequence[Residency] = ()) -> Steps:
        """`apply_snapshot`, in steps. Announcements that arrive meanwhile are queued. `replayed` are repeated
        announcements, in order."""
        first = pages[0]
        view = self._views.get(first.target)
        if view is None or view.joining:
            return False  # forgotten meanwhile
        sound = all(
            (page.target, page.epoch) == (first.target, first.epoch)
            and 0 <= page.fingerprint <= _U64
            and len(page.hashes) % 8 == 0
            for page in pages
        )
        if not sound:
            self.ignored["invalid_snapshot"] += 1
        elif first.epoch in view.former:
            self.ignored[FORMER] += 1
        known = [*replayed, *view.waiting]
        later = {message.seq for message in known if message.epoch == first.epoch and message.seq > first.seq}
        joins_up = later == set(range(first.seq + 1, first.seq + 1 + len(later)))
        began_again = bool(view.waiting) and view.waiting[-1].epoch != first.epoch
        waiting = [message for message in view.waiting if message.epoch == first.epoch]
        self._forget_waiting(view)
        if not sound or first.epoch in view.former or began_again or not joins_up:
            return False
        if view.epoch not in (-1, first.epoch):
            view.former.append(view.epoch)
        view.waiting.extend(waiting)
        self._waiting_hashes += sum(map(_hashes_in, waiting))
        resident = dict(view.resident)
        self._clear(view)
        view.number = self._free_number()
        view.epoch, view.seq, view.caught_up_seq = first.epoch, first.seq, first.seq
        view.complete, view.joining = False, True
        try:
            yield from self._expect(view, pages, resident)
            for page in pages:
                yield from self._store(view, page.fingerprint, np.frombuffer(page.hashes, "<u8").astype(np.uint64))
        finally:
            view.joining = False
        view.sound = view.number != 0
        yield from self._catching_up(first.target, view, replayed)
        self.resyncs += view.complete
        return view.complete

    def _expect(self, view: _View, pages: Sequence[SnapshotPage], known: dict[int, int]) -> Iterator[None]:
        """Make room for what a snapshot has more than was known of the target."""
        chunks = Counter[int]()
        for page in pages:
            chunks[page.fingerprint] += len(page.hashes) // 8
        for fingerprint, count in chunks.items():
            more = min(count - known.get(fingerprint, 0), self._max_entries - self._entries)
            table = self._table(fingerprint) if more > 0 else None
            if table is not None:
                view.resident[fingerprint] += 0  # or the table is taken for one that nobody needs
                yield from table.expect(more)

    def _catching_up(self, target: str, view: _View, replayed: Sequence[Residency]) -> Iterator[None]:
        """Apply `replayed`, then the queued announcements, up to the first gap. Those that arrive meanwhile are queued,
        too."""
        view.joining = True
        try:
            for message in replayed:
                if reason := "invalid_name" if message.target != target else self._wrong(message, view):
                    self.ignored[reason] += 1
                elif (message.epoch, message.seq) == (view.epoch, view.seq + 1):
                    yield from self._change(view, message)
            view.caught_up_seq = view.seq
            while view.waiting:
                message = view.waiting.popleft()
                self._waiting_hashes -= _hashes_in(message)
                number = message.epoch, message.seq
                if number == (view.epoch, view.seq + 1):
                    yield from self._change(view, message)
                elif message.epoch != view.epoch or message.seq > view.caught_up_seq:  # a gap, or a number used twice
                    view.sound = view.sound and (message.epoch != view.epoch or message.seq > view.seq)
                    self._forget_waiting(view)
                    return
            view.complete = view.sound and self._views.get(target) is view
        finally:
            view.joining = False

    def locate(self, fingerprint: int, router_hashes: list[int], now: float) -> list[str | None]:
        """For each chunk a target that holds it, or None. With several holders the chunk's hash decides, so that they
        share the reads."""
        targets = {
            view.number: target
            for target, view in self._views.items()
            if view.complete and now - view.heard <= self._max_age_seconds and fingerprint in view.resident
        }
        table = self._tables.get(fingerprint)
        if table is None or not targets or not router_hashes:
            return [None] * len(router_hashes)
        answering = np.zeros(_NUMBERS, np.uint16)  # its own number of each target that may be named
        answering[list(targets)] = list(targets)
        hashes = _u64s(router_hashes)
        holders = np.sort(answering[table.holders(hashes)], axis=1)  # nobody first
        several = np.maximum(np.count_nonzero(holders, axis=1), 1).astype(np.uint64)
        lanes = holders.shape[1] - 1 - (hashes % several).astype(np.int64)
        return list(map(targets.get, holders[np.arange(len(holders)), lanes].tolist()))

    def counts(self, now: float) -> dict[str, int]:
        """The number of known chunks on each live target."""
        return {
            target: sum(view.resident.values()) if view.complete else 0
            for target, view in self._views.items()
            if now - view.heard <= self._max_age_seconds
        }

    def ages(self, now: float) -> dict[str, float]:
        """Seconds since each target's last accepted announcement."""
        return {target: now - view.heard for target, view in self._views.items()}

    @property
    def size_bytes(self) -> int:
        """Memory of the tables."""
        return sum(table.size_bytes for table in self._tables.values())

    def forget_silent(self, now: float, after_seconds: float = 60.0) -> None:
        """Drop the state of targets that have been silent for `after_seconds`."""
        for target in [target for target, view in self._views.items() if now - view.heard > after_seconds]:
            self._drop(target)
        wanted = {fingerprint for view in self._views.values() for fingerprint in view.resident}
        self._gone += [self._tables.pop(fingerprint) for fingerprint in self._tables.keys() - wanted]

    def work(self) -> bool:
        """One step of the tables' pending work; False if there is none."""
        if self._gone and not self._gone[-1].release():
            self._gone.pop()
        return bool(self._gone) or any(table.work(_STEP_SLOTS) for table in self._tables.values())

    def distrust(self, target: str) -> None:
        """Note that a snapshot had two answers. The target's state is not used until there is a new snapshot."""
        self.ignored[CONFLICTING] += 1
        if self._complains():
            logger.warning(
                "target %s: conflicting answers: two targets have that address, or one is forged", shown(target)
            )
        if view := self._views.get(target):
            view.complete = view.sound = False
            self._forget_waiting(view)

    def give_up_snapshot(self, target: str) -> None:
        """The next announcement asks for a snapshot again."""
        if view := self._views.get(target):
            self._forget_waiting(view)

    def _forget_waiting(self, view: _View) -> None:
        self._waiting_hashes -= sum(map(_hashes_in, view.waiting))
        view.waiting.clear()

    def _free_number(self) -> int:
        """A number that no view has, and no table any more."""
        while True:
            taken = {view.number for view in self._views.values()}.union(*(one.stale for one in self._tables.values()))
            free = next((number for number in range(1, _NUMBERS) if number not in taken), None)
            if free is not None:
                return free
            self.work()

    def _drop(self, target: str) -> None:
        view = self._views.pop(target)
        self._forget_waiting(view)
        self._clear(view)

    def _clear(self, view: _View) -> None:
        for fingerprint, chunks in view.resident.items():
            self._entries -= chunks
            self._tables[fingerprint].forget(view.number)
        view.resident.clear()
        view.number, view.sound = 0, False

    def _table(self, fingerprint: int) -> _Table | None:
        if fingerprint not in self._tables:
            if len(self._tables) >= _LAYOUTS_MAX:
                self.ignored["too_many_layouts"] += 1
                return None
            self._tables[fingerprint] = _Table()
        return self._tables[fingerprint]

    def _change(self, view: _View, message: Residency) -> Iterator[None]:
        try:
            removed, stored = _u64s(message.removed), _u64s(message.stored)
        except (OverflowError, TypeError):
            self.ignored["hash_out_of_range"] += 1
            view.sound = False
            return  # and the next message finds a gap
        view.seq = message.seq
        for part in _parts(removed):
            table = self._tables.get(message.fingerprint)
            if table is not None and message.fingerprint in view.resident:
                gone = table.remove(_unique(part), view.number)
                view.resident[message.fingerprint] -= gone
                self._entries -= gone
            yield
        yield from self._store(view, message.fingerprint, stored)

    def _store(self, view: _View, fingerprint: int, hashes: Hashes) -> Iterator[None]:
        for part in _parts(hashes):
            if view.number:  # the target is not forgotten
                self._store_part(view, fingerprint, part)
            yield

    def _store_part(self, view: _View, fingerprint: int, hashes: Hashes) -> None:
        hashes = _unique(hashes[hashes != 0])
        table = self._table(fingerprint) if len(hashes) else None
        if table is None:
            return
        room = max(0, self._max_entries - self._entries)
        if len(hashes) > room:
            hashes = hashes[(table.holders(hashes) != view.number).all(axis=1)]  # what is there needs no room
            self.ignored["mirror_full"] += max(0, len(hashes) - room)
            hashes = hashes[:room]
        new = table.add(hashes, view.number)
        view.resident[fingerprint] += new
        self._entries += new


def _parts(hashes: Hashes) -> Iterator[Hashes]:
    return (hashes[start : start + _STEP_ENTRIES] for start in range(0, len(hashes), _STEP_ENTRIES))


def _unique(hashes: Hashes) -> Hashes:
    """`np.unique` in a tenth of the time: numpy 2.3 does not sort, but puts them into a hash table."""
    hashes = np.sort(hashes)
    differ: Hashes = hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))[: len(hashes)]]
    return differ


def _all_of(steps: Steps) -> bool:
    """Run the steps, one after the other; returns what they do."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bool(end.value)


async def _between_others(steps: Steps) -> bool:
    """Run the steps, with a turn for everything else in between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bool(end.value)
        await asyncio.sleep(0)


def new_epoch() -> int:
    """The number of a target's start."""
    return secrets.randbits(63)


def _u64s(numbers: list[int]) -> Hashes:
    packed = array("Q")
    packed.fromlist(numbers)  # four times as fast as array("Q", numbers)
    return np.frombuffer(packed, np.uint64)


async def follow(mirror: Mirror, line: "Bus", namespace: str) -> None:
    """Keep `mirror` up with every target on the bus, until cancelled."""
    resyncs: set[asyncio.Task[None]] = set()
    due: dict[str, float] = {}  # the next resync of each target
    turns = asyncio.Semaphore(_SNAPSHOTS_AT_ONCE)

    async def heard(message: Residency) -> None:
        now = time.monotonic()
        if await _between_others(mirror.applying(message, now)):
            begin = max(now, due.get(message.target, now))
            due[message.target] = begin + RESYNC_SECONDS
            task = asyncio.create_task(_resync(mirror, line, namespace, message.target, begin - now, turns))
            resyncs.add(task)
            task.add_done_callback(resyncs.discard)

    await line.subscribe(messages.subject(namespace, "residency"), Residency, heard)
    forgot = 0.0
    while True:
        await asyncio.sleep(0.005 if mirror.work() else 0.5)
        if time.monotonic() - forgot >= 5:
            forgot = time.monotonic()
            mirror.forget_silent(forgot)
            for target in [target for target, at in due.items() if at < forgot]:
                del due[target]


async def _resync(
    mirror: Mirror, line: "Bus", namespace: str, target: str, wait_seconds: float, turns: asyncio.Semaphore
) -> None:
    await asyncio.sleep(wait_seconds)
    async with (
        line.conversation(messages.subject(namespace, "snapshot", target)) as pages,
        line.conversation(messages.subject(namespace, "replay", target)) as history,
    ):
        missing = mirror.missing(target)
        replayed = await _replayed(history, missing) if missing else []
        if not (replayed and await _between_others(mirror.replaying(target, replayed))):
            progress = bool(replayed) and mirror.missing(target) is not None  # the next announcement asks again
            async with turns:
                if progress or not await _join(mirror, pages, history):
                    mirror.give_up_snapshot(target)
        if any(await asyncio.gather(pages.hears_more(_DOUBT_SECONDS), history.hears_more(_DOUBT_SECONDS))):
            mirror.distrust(target)


async def _join(mirror: Mirror, peer: "Conversation", history: "Conversation") -> bool:
    """Take in a snapshot; False if none is to be had, or it does not join up with what was announced."""
    pages: list[SnapshotPage] = []
    give_up = time.monotonic() + _MAKING_SECONDS_MAX
    while not pages or len(pages) < pages[0].pages:
        page = await peer.ask(SnapshotRequest(pages[0].token if pages else 0, len(pages)), SnapshotPage, seconds=5)
        if page and not (pages or page.pages or page.token) and time.monotonic() < give_up:
            await asyncio.sleep(_MAKING_ASK_SECONDS)
            continue
        if page is None or not 0 < page.pages <= _PAGES_MAX or len(page.hashes) > 8 * PAGE_HASHES:
            return False
        pages.append(page)
    replayed = await _replayed(history, ReplayRequest(pages[0].epoch, pages[0].seq + 1))
    if not await _between_others(mirror.joining(pages, replayed)):
        return False
    logger.info("%s: %d chunks mirrored", shown(pages[0].target), sum(len(page.hashes) // 8 for page in pages))
    return True


async def _replayed(history: "Conversation", missing: ReplayRequest) -> list[Residency]:
    """The announcements from that one on; none if they are not kept any more."""
    replayed: list[Residency] = []
    while len(replayed) < REPLAY_MESSAGES:
        request = ReplayRequest(missing.epoch, missing.seq + len(replayed))
        answer = await history.ask(request, Replay, seconds=5)
        if answer is None or not answer.messages:
            break
        replayed += answer.messages
        if replayed[-1].seq >= answer.seq:
            break
    return replayed


def _batched(items: Iterable[tuple[int, bool]], size: int) -> Iterable[list[tuple[int, bool]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
