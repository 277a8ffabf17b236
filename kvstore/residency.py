"""Which chunks are where: a target announces it, a mirror keeps up with it.

Announcements carry an epoch (one start of a target) and a sequence number. A mirror that missed one asks for a
snapshot, page by page, and replays what was announced meanwhile. All of it is plain data; `follow` is the only part
that talks to the bus.
"""

import asyncio
import itertools
import logging
import random
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvstore import bus
from kvstore.bus import Bus, Residency, SnapshotPage, SnapshotRequest
from kvstore.record import Entry

logger = logging.getLogger(__name__)

# 256 KiB of hashes a page: a quarter of what NATS carries by default.
PAGE_HASHES = 32_768
# Router hashes in one announcement: 9 bytes each in msgpack.
MESSAGE_HASHES = 32_768
# With NATS away, changes collect; beyond this the announcer forgets them and lets mirrors find the gap.
PENDING_MAX = 1_000_000
_SNAPSHOTS_KEPT = 2


class Announcer:
    """A target's side: notes what the log says, and turns it into announcements and snapshots. Thread-safe.

    `entries` returns everything visible now; it is called without the announcer's lock.
    """

    def __init__(self, target: str, epoch: int, entries: Callable[[], Iterable[Entry]]):
        self.target = target
        self._epoch = epoch
        self._entries = entries
        self._lock = threading.Lock()
        self._seq = 0
        # (fingerprint, blocks per chunk) -> router hash -> is it there now; the last change wins
        self._pending: defaultdict[tuple[int, int], dict[int, bool]] = defaultdict(dict)
        self._pending_count = 0
        self._snapshots: dict[int, list[tuple[int, int, bytes]]] = {}  # token -> (seq, fingerprint, hashes) a page

    def stored(self, entry: Entry) -> None:
        self._note(entry, True)

    def removed(self, entry: Entry) -> None:
        self._note(entry, False)

    @property
    def has_changes(self) -> bool:
        return self._pending_count > 0

    def announcements(self) -> list[Residency]:
        """What changed since the last call, at least one message: an empty one is the heartbeat."""
        with self._lock:
            changes, self._pending = self._pending, defaultdict(dict)
            lost, self._pending_count = self._pending_count > PENDING_MAX, 0
            if lost:
                self._seq += 1  # the gap that sends mirrors to the snapshot
                changes.clear()
            messages = [
                self._message(layout, part)
                for layout, hashes in changes.items()
                for part in _batched(hashes.items(), MESSAGE_HASHES)
            ]
            return messages or [self._message((0, 0), [])]

    def snapshot_page(self, request: SnapshotRequest) -> SnapshotPage:
        """Page `request.page` of a snapshot. It may be newer than its `seq`: replaying what follows does no harm."""
        token = request.token or self._take_snapshot()
        pages = self._snapshots.get(token)
        if pages is None or not 0 <= request.page < len(pages):
            return SnapshotPage(self.target, self._epoch, 0, token, 0, 0, b"")
        seq, layout, hashes = pages[request.page]
        return SnapshotPage(self.target, self._epoch, seq, token, len(pages), layout, hashes)

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

    def _take_snapshot(self) -> int:
        with self._lock:
            seq = self._seq
        by_layout: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
        for entry in self._entries():
            if entry.router_hash:
                by_layout[entry.fingerprint].append(entry.router_hash)
        pages = [
            (seq, layout, hashes[start : start + PAGE_HASHES].tobytes())
            for layout, hashes in by_layout.items()
            for start in range(0, len(hashes), PAGE_HASHES)
        ]
        token = random.getrandbits(62) | 1
        self._snapshots[token] = pages or [(seq, 0, b"")]
        while len(self._snapshots) > _SNAPSHOTS_KEPT:
            self._snapshots.pop(next(iter(self._snapshots)))
        return token


async def announce(announcer: Announcer, line: Bus, namespace: str, *, interval_seconds: float = 0.02) -> None:
    """Publish until cancelled: changes soon, a burst of them in one message, and a heartbeat every second."""

    async def page(request: SnapshotRequest) -> SnapshotPage:
        return await asyncio.to_thread(announcer.snapshot_page, request)

    target = announcer.target
    await line.subscribe(bus.subject(namespace, "snapshot", target), SnapshotRequest, page)
    last = 0.0
    while True:
        due = time.monotonic() - last >= bus.HEARTBEAT_SECONDS
        if announcer.has_changes or due:
            last = time.monotonic()
            for message in announcer.announcements():
                await line.publish(bus.subject(namespace, "residency", target), message)
        await asyncio.sleep(interval_seconds)


@dataclass
class _View:
    """What a mirror knows of one target."""

    epoch: int = -1
    seq: int = -1
    heard: float = 0.0  # time.monotonic() of the last announcement
    complete: bool = False  # False until a snapshot has been taken in
    resident: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    waiting: list[Residency] = field(default_factory=list)  # announced while a snapshot is under way


class Mirror:
    """A router's copy of what every target holds. For one thread; no I/O.

    A target that has been silent for `max_age_seconds` is left out of answers until it is heard again.
    """

    def __init__(self, *, max_age_seconds: float = 10.0, waiting_max: int = 10_000):
        self._max_age_seconds = max_age_seconds
        self._waiting_max = waiting_max
        self._views: defaultdict[str, _View] = defaultdict(_View)

    def apply(self, message: Residency, now: float) -> bool:
        """Take in an announcement; True if the target must be asked for a snapshot now."""
        view = self._views[message.target]
        view.heard = now
        if view.complete and (message.epoch, message.seq) == (view.epoch, view.seq + 1):
            self._change(view, message)
            return False
        if view.complete and message.epoch == view.epoch and message.seq <= view.seq:
            return False  # heard before
        begin = view.complete or not view.waiting
        if begin or len(view.waiting) >= self._waiting_max:
            view.waiting.clear()
        view.complete = False
        view.waiting.append(message)
        return begin

    def apply_snapshot(self, pages: Sequence[SnapshotPage]) -> bool:
        """Take in a whole snapshot and what was announced since; False if it does not join up with that."""
        first = pages[0]
        view = self._views[first.target]
        later = [message for message in view.waiting if message.epoch == first.epoch and message.seq > first.seq]
        expected = range(first.seq + 1, first.seq + 1 + len(later))
        if [message.seq for message in later] != list(expected):
            view.waiting.clear()
            return False
        view.epoch, view.seq, view.complete = first.epoch, first.seq, True
        view.resident.clear()
        for page in pages:
            hashes = array("Q")
            hashes.frombytes(page.hashes)
            view.resident[page.fingerprint].update(hashes)
        view.waiting.clear()
        for message in later:
            self._change(view, message)
        return True

    def locate(self, fingerprint: int, router_hashes: Sequence[int], now: float) -> list[str | None]:
        """For each chunk a target that holds it, or None."""
        holders = [
            (target, view.resident[fingerprint])
            for target, view in self._views.items()
            if view.complete and now - view.heard <= self._max_age_seconds and fingerprint in view.resident
        ]
        return [
            next((target for target, resident in holders if router_hash in resident), None)
            for router_hash in router_hashes
        ]

    def counts(self, now: float) -> dict[str, int]:
        """Chunks known on each target that is heard."""
        return {
            target: sum(map(len, view.resident.values())) if view.complete else 0
            for target, view in self._views.items()
            if now - view.heard <= self._max_age_seconds
        }

    def forget_silent(self, now: float, after_seconds: float = 60.0) -> None:
        """Free what is known of targets that have been gone for long."""
        for target in [target for target, view in self._views.items() if now - view.heard > after_seconds]:
            del self._views[target]

    def give_up_snapshot(self, target: str) -> None:
        """The next announcement asks for a snapshot again."""
        self._views[target].waiting.clear()

    def _change(self, view: _View, message: Residency) -> None:
        view.seq = message.seq
        resident = view.resident[message.fingerprint]
        resident.difference_update(message.removed)
        resident.update(message.stored)


async def follow(mirror: Mirror, line: Bus, namespace: str) -> None:
    """Keep `mirror` up with every target on the bus, until cancelled."""
    snapshots: set[asyncio.Task[None]] = set()

    async def heard(message: Residency) -> None:
        if mirror.apply(message, time.monotonic()):
            task = asyncio.create_task(_fetch_snapshot(mirror, line, namespace, message.target))
            snapshots.add(task)
            task.add_done_callback(snapshots.discard)

    await line.subscribe(bus.subject(namespace, "residency"), Residency, heard)
    while True:
        await asyncio.sleep(5)
        mirror.forget_silent(time.monotonic())


async def _fetch_snapshot(mirror: Mirror, line: Bus, namespace: str, target: str) -> None:
    to = bus.subject(namespace, "snapshot", target)
    pages: list[SnapshotPage] = []
    while not pages or len(pages) < pages[0].pages:
        request = SnapshotRequest(pages[0].token if pages else 0, len(pages))
        page = await line.request(to, request, SnapshotPage, seconds=5)
        if page is None or not page.pages:
            mirror.give_up_snapshot(target)
            return
        pages.append(page)
    if mirror.apply_snapshot(pages):
        logger.info("%s: %d chunks mirrored", target, sum(len(page.hashes) // 8 for page in pages))


def _batched(items: Iterable[tuple[int, bool]], size: int) -> Iterable[list[tuple[int, bool]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
