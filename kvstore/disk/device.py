"""A directory or block device that the logs of several namespaces share: owners of slots, and free slots.

Every namespace has a store id of its own, and every header on disk contains the store id of its writer (record.py). So
the namespace of a segment is known, and for a log the segments of all others look like those of a foreign store: they
cannot be served by mistake. The ids are derived from the superblock's random id and the namespace's name; the
superblock lists the names.
"""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstore.disk import record, recovery
from kvstore.disk.files import Files
from kvstore.disk.record import PAGE_BYTES, Stamp
from kvstore.disk.recovery import Pages
from kvstore.disk.space import (
    Extent,
    Space,
    Superblock,
    open_space,
    say_foreign,
    segment_file,
    stored_segment_bytes,
)
from kvstore.errors import ConfigError
from kvstore.text import in_units

logger = logging.getLogger(__name__)

GIB = 1 << 30
SEGMENT_PAGES_MAX = 1 << 24  # the log's index has so many bits for a place in a segment
SLOTS_FEWEST = 2  # per log: one is written while one is emptied
_THREADS = 8
# How long a device that was busy counts as busy.
BUSY_SECONDS = 0.005


def default_segment_bytes(capacity_bytes: int) -> int:
    """256 MiB, which suits flash; 64 MiB in small stores, where eviction by segment would be too coarse."""
    return 256 << 20 if capacity_bytes >= 200 * GIB else 64 << 20


def store_id(block: Superblock, namespace: str) -> int:
    """The store id in a namespace's headers. The store's first namespace has the superblock's id, which releases before
    0.2 used for everything."""
    if namespace == block.namespace:
        return block.store
    digest = hashlib.blake2b(namespace.encode(), digest_size=8, key=block.store.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") >> 1


def names(block: Superblock) -> list[str]:
    """The namespaces whose values may be in a store."""
    return [name for name in (block.namespace, *block.namespaces) if name]


class Device:
    """Opened in two steps: the constructor locks and checks, and changes nothing on disk; `begin` increments the epoch.

    Without `segment_bytes` a store keeps its own segment size.

    With `shared`, `namespaces` are those of a namespaces file, and whatever else lies there is left alone until its
    space is needed. Without, the store must belong to the one namespace given. Raises ConfigError if the place cannot
    hold this store. `claim`, `release`, `extent` and the generations may be called from any thread.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        namespaces: Sequence[str],
        *,
        shared: bool = False,
        segment_bytes: int | None = None,
        files: Files | None = None,
    ):
        self.path = path
        self.files = files or Files()
        self.segment_bytes = int(segment_bytes or stored_segment_bytes(path) or default_segment_bytes(capacity_bytes))
        self.shared = shared
        # Callbacks of the device's users: whether they have reads or writes. Low-priority work checks `is_busy`.
        self.users: list[Callable[[], bool]] = []
        self._busy_until = 0.0
        self._closed = False
        self._namespaces = list(namespaces)
        self._lock = threading.Lock()
        self._generation = 0
        self._owners: dict[int, int] = {}  # slot -> store id, as found at the start
        self._stores: set[int] = set()  # ids of all namespaces that were there at the start, or came then
        _check_size(capacity_bytes, self.segment_bytes)
        self.space: Space = open_space(path, capacity_bytes, self.segment_bytes, self.files)
        self.slots = self.space.slots
        self._free = deque(range(self.slots))
        try:
            _check_slots(self.slots, capacity_bytes, self.segment_bytes)
            self._block = self._checked_block(namespaces)
            self._stores = {self._block.store, *(self.store_id(name) for name in names(self._block))}
        except BaseException:
            self.space.close()
            raise

    @property
    def epoch(self) -> int:
        """Grows with every start, and with every namespace that comes while the target runs."""
        return self._block.epoch

    @property
    def is_busy(self) -> bool:
        """Whether any user has reads or writes. True is cached for BUSY_SECONDS, because all prefetches ask for it."""
        if time.monotonic() < self._busy_until:
            return True
        if not any(is_busy() for is_busy in self.users.copy()):
            return False
        self._busy_until = time.monotonic() + BUSY_SECONDS
        return True

    def begin(self) -> None:
        """Make the device ready to be written to. Raises ConfigError."""
        try:
            if self.shared:
                self._find_owners()
                kept = {self._block.namespace, *self._namespaces, *self._left_behind()}
                self._block.namespaces = [name for name in self._block.namespaces if name in kept]
            self._write()
        except BaseException:
            self.close()
            raise

    def delete_beyond(self) -> None:
        """Delete this store's segments of an earlier, larger capacity: once nothing can refuse this start any more."""
        foreign = []
        for slot in self.space.used_slots():
            if slot >= self.slots and self._is_own(slot):
                self.space.delete(slot)
            elif slot >= self.slots:
                foreign.append(segment_file(self.path, slot).name)
        say_foreign(self.path, foreign)

    def _is_own(self, slot: int) -> bool:
        try:
            with self.space.reading(slot) as extent:
                return bool(self._stamps(extent, self._stores))
        except OSError:
            return False

    def add(self, namespace: str) -> None:
        """Add a namespace, with a new epoch even if it existed before."""
        new = namespace not in names(self._block)
        if new:
            self._block.namespaces.append(namespace)
        try:
            self._write()
        except ConfigError:
            if new:
                self._block.namespaces.remove(namespace)
            raise

    def store_id(self, namespace: str) -> int:
        return store_id(self._block, namespace)

    def slots_of(self, namespace: str) -> list[int]:
        """Free slots in which segments of a namespace may lie."""
        with self._lock:
            free = set(self._free)
        used = [slot for slot in self.space.used_slots() if slot in free]
        if not self.shared:
            return used
        store = self.store_id(namespace)
        return [slot for slot in used if self._owners.get(slot) == store]

    def extent(self, slot: int) -> Extent:
        return self.space.extent(slot)

    def next_generation(self) -> int:
        with self._lock:
            self._generation += 1
            return self._generation

    def saw_generation(self, generation: int) -> None:
        """Note a generation that was used, so that it is never reused."""
        with self._lock:
            self._generation = max(self._generation, generation)

    def take(self, slots: Collection[int]) -> None:
        """These slots are a log's now."""
        with self._lock:
            self._free = deque(slot for slot in self._free if slot not in slots)

    def claim(self, count: int) -> list[int]:
        """Up to `count` free slots; those with values of a namespace that left, which may come back, at last."""
        with self._lock:
            return [self._free.popleft() for _ in range(min(count, len(self._free)))]

    def release(self, empty: Iterable[int], left: Iterable[int] = (), namespace: str = "") -> None:
        """Give slots back: empty ones, and those that still hold values of `namespace`."""
        with self._lock:
            for slot in empty:
                self._owners.pop(slot, None)
                self._free.appendleft(slot)
            for slot in left:
                self._owners[slot] = self.store_id(namespace)
                self._free.append(slot)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.space.close()

    # ---- whose store it is

    def _checked_block(self, namespaces: Sequence[str]) -> Superblock:
        """The superblock to write for this start, with these namespaces."""
        block = self.space.superblock() or self.space.new_superblock("" if self.shared else namespaces[0])
        if not names(block) and block.epoch:
            self._name(block, namespaces)
        if self.shared:
            block.namespaces += [name for name in namespaces if name not in names(block)]
        elif strangers := [name for name in names(block) if name not in namespaces]:
            expected = f"{strangers[0]!r}, whose values are in {self.path}"
            if len(names(block)) > 1:
                expected = f"--namespaces: {self.path} has values of {', '.join(names(block))}"
            raise ConfigError("namespace", namespaces[0], expected)
        self.space.check_superblock(block)
        return block

    def _name(self, block: Superblock, namespaces: Sequence[str]) -> None:
        """Name the namespace of a store that does not: releases before 0.2 wrote it in the records alone."""
        found = self._namespace_ids(block.store)
        named = {record.namespace_id(name): name for name in namespaces}
        if not found and not self.shared:
            block.namespace = namespaces[0]
        elif len(found) == 1 and found <= named.keys():
            block.namespace = named[found.pop()]
        elif not self.shared:
            expected = f"the one whose values are in {self.path}: another wrote them. Take its name, or empty the store"
            raise ConfigError("namespace", namespaces[0], expected)
        elif found:
            logger.warning("%s: its values belong to no namespace of the file, and are not served", self.path)

    def _namespace_ids(self, store: int) -> set[int]:
        """Whose values are in a store: of each segment the first record says it, or one that its footer names."""
        found: set[int | None] = set()
        for slot in self.space.used_slots():
            try:
                with self.space.reading(slot) as extent:
                    found.add(self._namespace_of(extent, store))
            except OSError as error:
                logger.error("%s, segment %d cannot be read: %s", self.path, slot, error)
        return {one for one in found if one is not None}

    def _namespace_of(self, extent: Extent, store: int) -> int | None:
        pages = Pages(self.files, extent, self.segment_bytes)
        ends = recovery.read_ends(pages)
        if ends.header is not None and ends.header.queue == record.EMPTY:
            return None
        stamps = ends.stamps({store})
        probes = [1]
        if ends.trailer is not None and ends.trailer.stamp in stamps:
            probes += recovery.probes(pages.read(ends.trailer.offset // PAGE_BYTES), ends.trailer)
        owners = (record.record_namespace(pages.read(page), stamps) for page in probes if page < len(pages))
        return next((owner for owner in owners if owner is not None), None)

    def _find_owners(self) -> None:
        """Learn from headers and trailers which namespace wrote last in each slot. The generation tells: all namespaces
        count in one row."""
        stores = {self.store_id(name) for name in names(self._block)}

        def look(slot: int) -> tuple[int, int] | None:
            try:
                stamps = self._stamps(self.space.extent(slot), stores)
            except OSError:
                return None  # the log that looks for it will say so
            return max(((stamp.generation, stamp.store) for stamp in stamps), default=None)

        slots = [slot for slot in self.space.used_slots() if slot < self.slots]  # those beyond will be deleted
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kvtier-recovery") as pool:
            found = dict(zip(slots, pool.map(look, slots), strict=True))
        for slot, last in found.items():
            if last is not None:
                self._generation = max(self._generation, last[0])
                self._owners[slot] = last[1]
        # Slots without an owner are used first, so that a namespace that comes back may find its values.
        self._free = deque(sorted(self._free, key=lambda slot: (slot in self._owners, slot)))

    def _stamps(self, extent: Extent, stores: Collection[int]) -> list[Stamp]:
        """On a segment's header and trailer, if they are of one of these stores."""
        return recovery.read_ends(Pages(self.files, extent, self.segment_bytes)).stamps(stores)

    def _left_behind(self) -> list[str]:
        """The namespaces that have values there."""
        stores = set(self._owners.values())
        return [name for name in names(self._block) if self.store_id(name) in stores]

    def _write(self) -> None:
        with self._lock:
            self._block.epoch += 1
            self.space.write(self._block)


def _check_size(capacity_bytes: int, segment_bytes: int) -> None:
    if segment_bytes % PAGE_BYTES or segment_bytes < 64 * PAGE_BYTES:
        raise ConfigError("segment-size", segment_bytes, f"a multiple of {PAGE_BYTES}, at least 256 KiB")
    if capacity_bytes // segment_bytes >> 30:
        raise ConfigError("segment-size", segment_bytes, "a larger segment: the capacity makes too many of them")
    if segment_bytes // PAGE_BYTES >= SEGMENT_PAGES_MAX:
        raise ConfigError("segment-size", segment_bytes, "a smaller segment: it could hold too many chunks")


def _check_slots(slots: int, capacity_bytes: int, segment_bytes: int) -> None:
    if slots < SLOTS_FEWEST:
        raise ConfigError(
            "capacity",
            in_units(capacity_bytes),
            f"at least two segments of {in_units(segment_bytes)} (one is written while one is emptied); "
            "give more, or a smaller --segment-size",
        )
