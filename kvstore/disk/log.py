"""The store engine: a segmented append-only log, with its index in memory.

Two segments are written at a time, one with values that are new and one with those that are kept (eviction.py). A full
one is sealed with a footer and synced. Slots are emptied ahead of need: their chunks are unpublished well before their
space is written over, and not while a reader is still at it, so that neither a reader nor a router's mirror is ever
pointed at space that is used again.

Which values were read is written over the header of their segment, every few minutes and at an orderly stop, so that
eviction goes on where it was. A crash loses the marks that were not written yet, and nothing else.

Start-up reads the footers in parallel, and scans what was not sealed (recovery.py).

A chunk becomes visible when its write has returned, or before, with `show`: until it is written it is dirty then. Of
what was written kill -9 loses nothing; a power cut loses at most what was not synced: the segments that are being
written, or, with `sync_seconds`, what came since.

Any thread may call any method. No lock is held during I/O.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from crc32c import crc32c

from kvstore.disk import record, recovery
from kvstore.disk.buffers import Buffer, aligned
from kvstore.disk.device import SEGMENT_PAGES_MAX, Device
from kvstore.disk.eviction import SLOTS_MIN, Eviction, Queue
from kvstore.disk.files import Files
from kvstore.disk.record import ENTRY_BYTES, PAGE_BYTES, Entry, Marks, SegmentHeader, Stamp
from kvstore.disk.recovery import Ends, Pages, Use
from kvstore.disk.space import Extent
from kvstore.keys import KEY_VERSION
from kvstore.rarely import Rarely

logger = logging.getLogger(__name__)

_COMPLAIN_SECONDS = 60.0  # of a full disk, which fails at every write

_INDEX_BITS = (SEGMENT_PAGES_MAX - 1).bit_length()  # a value is slot << 24 | number of the entry in its segment
_NUMBER_MASK = (1 << _INDEX_BITS) - 1
# Device writes over payload accepted. What headers and footers leave of it goes to writing reused chunks again.
WRITE_AMPLIFICATION_MAX = 1.1
_RECOVERY_THREADS = 8
_RECOVERY_SHARE = 64  # segments that a thread loads while others are made visible
# Evicted keys that are remembered: 100 bytes each.
_GHOSTS_MAX = 100_000
# How often read marks are saved. Each segment of which a chunk was read for the first time costs one page: 0.4 MB/s
# in a store of 8 TB where all are.
MARKS_SECONDS = 300.0
# Bounds one time of that, so that an orderly stop stays within CLOSE_SECONDS: 20,000 segments at 100 us.
_MARKING_SECONDS = 2.0
# Timeout of `close` for a device. A footer and the sync of two segments take a second on a disk.
CLOSE_SECONDS = 10.0
# A reader pins a segment for one read of the device. A writer that waits longer for it is refused.
_READERS_SECONDS = 10.0


class Observer(Protocol):
    """Notified when a chunk becomes readable and when it is unpublished. Called under the log's
    lock: must not block, do I/O, or call the log."""

    def stored(self, entry: Entry) -> None: ...
    def removed(self, entry: Entry) -> None: ...


class NoObserver:
    def stored(self, entry: Entry) -> None: ...
    def removed(self, entry: Entry) -> None: ...


class Value(NamedTuple):
    """A chunk to store. The caller holds `buffer`, filled with the payload, and has checked `crc`; the log writes the
    record's header and padding around it."""

    key: bytes
    buffer: Buffer
    crc: int
    router_hash: int
    fingerprint: int
    blocks_per_chunk: int
    key_version: int = KEY_VERSION

    def entry(self, page: int) -> Entry:
        key, buffer, crc, router_hash, fingerprint, blocks, version = self
        return Entry(key, router_hash, fingerprint, page, buffer.length, crc, blocks, version)


class Found(NamedTuple):
    """The result of a read. If it is not intact, the log has dropped the chunk, and the buffer's content is
    undefined."""

    entry: Entry
    intact: bool


@dataclass
class LogStats:
    entries: int = 0
    payload_bytes: int = 0
    dirty_entries: int = 0  # of these, visible and not written yet
    dirty_bytes: int = 0
    evicted_entries: int = 0
    evicted_segments: int = 0
    evicted_age_seconds: float = 0.0  # of the segment evicted last, from its opening
    corrupt_entries: int = 0
    failed_writes: int = 0
    accepted_bytes: int = 0  # payload written since the start
    device_written_bytes: int = 0
    rewritten_bytes: int = 0  # of these, chunks that were kept by writing them again


@dataclass
class _Segment:
    slot: int
    stamp: Stamp
    extent: Extent
    queue: Queue
    opened: float = field(default_factory=time.monotonic)
    next_page: int = 1
    table: bytearray = field(default_factory=bytearray)  # packed entries, in the order in which they became visible
    live: bytearray = field(default_factory=bytearray)  # a byte for each of them: 1 if the index points to it
    readers: int = 0
    writers: int = 0
    full: bool = False  # takes no more records; sealed once its writers are done
    sealed: bool = False
    dirty: bool = False  # written since the last sync
    marks: Marks | None = None  # as found at the start

    def entry(self, number: int) -> Entry:
        return record.unpack_entry(self.table, number)

    def __len__(self) -> int:
        return len(self.table) // ENTRY_BYTES


class _Record(NamedTuple):
    """A record in a segment; those that lie side by side are read and written at once."""

    number: int  # of the chunk in the caller's list
    segment: _Segment
    entry: Entry


class Log:
    """A bounded map from key to immutable payload, in a directory or on a device.

    `capacity_bytes` bounds the segments together. `namespace` is whose they are; it is stamped on every record. With
    `sync_seconds` what was written is synced so often, otherwise when a segment is sealed. On a shared `device`,
    which its owner has begun and will close, the log is one of several and has its share after `settle`; any other
    device is the log's own from now on. Raises ConfigError if the place cannot hold this store.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        *,
        namespace: str = "default",
        segment_bytes: int | None = None,
        sync_seconds: float = 0.0,
        files: Files | None = None,
        device: Device | None = None,
    ):
        self.path = path
        self.stats = LogStats()
        self.observer: Observer = NoObserver()  # what recovery finds is not told: it is in `entries`
        self.namespace = namespace
        self._namespace = record.namespace_id(namespace)
        self._changed = threading.Condition()
        self._rolling = threading.RLock()
        self._closed = threading.Event()
        self._complains: defaultdict[str, Rarely] = defaultdict(lambda: Rarely(_COMPLAIN_SECONDS))  # by kind
        self._index: dict[bytes, int] = {}
        self._dirty: dict[bytes, Entry] = {}
        self._used: set[bytes] = set()  # dirty chunks that were asked for
        self._key_versions: Counter[int] = Counter()  # of the visible chunks
        self._writing: set[bytes] = set()
        self._segments: dict[int, _Segment] = {}
        self._heads: dict[Queue, _Segment] = {}
        self._emptied: deque[int] = deque()
        self._held: set[int] = set()  # slots that are this log's
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()  # evicted keys, the oldest first
        if device is None:
            device = Device(path, capacity_bytes, [namespace], segment_bytes=segment_bytes, files=files)
        self._owns_device = not device.shared
        if self._owns_device:
            device.begin()
        self._device = device
        self._files = device.files
        self.segment_bytes = device.segment_bytes
        self.store_id, self.epoch = device.store_id(namespace), device.epoch
        self._set_slots(device.slots if self._owns_device else capacity_bytes // self.segment_bytes)
        try:
            self._recover()
            if self._owns_device:
                self.settle()
        except BaseException:
            if self._owns_device:
                device.close()
            raise
        threading.Thread(target=self._save_often, name="kvtier-marks", daemon=True).start()
        if sync_seconds:
            threading.Thread(target=self._sync_often, args=(sync_seconds,), name="kvtier-sync", daemon=True).start()

    def _set_slots(self, slots: int) -> None:
        self.slots = slots
        # One slot to write to while another is emptied; where chunks are written again, one for those, too.
        self._ahead = 1 if slots < SLOTS_MIN else 2

    # ---- what callers do

    @property
    def device(self) -> Device:
        """The log's device, which other logs may share."""
        return self._device

    @property
    def held_bytes(self) -> int:
        """Space that is this log's."""
        return len(self._held) * self.segment_bytes

    def settle(self, capacity_bytes: int | None = None) -> None:
        """Take free slots of the device up to the log's share, or empty segments beyond it and give them back. A given
        capacity becomes the new share."""
        with self._rolling:
            if self._closed.is_set():
                return
            if capacity_bytes is not None:
                with self._changed:
                    self._set_slots(capacity_bytes // self.segment_bytes)
                    self._eviction.resize(self.slots)
                if self.slots < SLOTS_MIN:
                    self._end_rewriting()
            slots = self._device.claim(self.slots - len(self._held))
            with self._changed:
                self._held.update(slots)
                self._emptied.extend(slots)
                self._changed.notify_all()
            while len(self._held) > self.slots:
                slot = self._unread_slot(wait=True)
                if slot is None:
                    break
                with self._changed:
                    self._held.discard(slot)
                    self._segments.pop(slot, None)
                self._device.release([slot])
            self._make_room(self._ahead)

    def delete_beyond(self) -> None:
        """Delete segments of an earlier, larger capacity."""
        self._device.delete_beyond()

    def _end_rewriting(self) -> None:
        """Seal the segment of values written again: of few slots it would keep one for ever. With `_rolling` held, so
        that nobody writes to it."""
        with self._changed:
            main = self._heads.pop(Queue.MAIN, None)
            if main is not None:
                main.full = True
        if main is not None:
            self._seal(main)

    @property
    def capacity_bytes(self) -> int:
        return self.slots * self.segment_bytes

    @property
    def value_bytes_max(self) -> int:
        """The largest payload that fits a segment."""
        return self.segment_bytes - PAGE_BYTES - record.footer_bytes(1) - PAGE_BYTES

    def __contains__(self, key: bytes) -> bool:
        return key in self._dirty or key in self._index  # without the lock: in the order in which a chunk moves

    def __len__(self) -> int:
        return len(self._index) + len(self._dirty)

    def entries(self) -> list[Entry]:
        """Everything that is visible now."""
        with self._changed:
            written = [entry for segment in self._segments.values() for _, entry in self._live(segment)]
            return [*written, *self._dirty.values()]

    def announced(self, count: int) -> Iterator[record.Announced]:
        """Router hash and fingerprint of everything that is visible, in parts of about `count`; the lock is held for a
        copy of each. What comes or goes meanwhile may be missed, and what moves may come twice.

        A chunk moves only from memory to a segment, or to the segment of chunks written again. So memory is looked at
        first, and that segment last, with those that follow it: no chunk moves past."""
        with self._changed:
            dirty = b"".join(map(record.pack_entry, self._dirty.values()))
            segments = sorted(self._segments.values(), key=lambda segment: segment.stamp.generation)
            head = self._heads.get(Queue.MAIN)
        yield record.announced(dirty)
        segments.sort(key=lambda segment: segment is head)
        seen = max((segment.stamp.generation for segment in segments), default=0)
        while segments:
            for segment in segments:
                yield from self._announced(segment, count)
                seen = max(seen, segment.stamp.generation)
            with self._changed:
                rewritten = [one for one in self._segments.values() if one.queue is Queue.MAIN]
            segments = [one for one in rewritten if one.stamp.generation > seen]
            segments.sort(key=lambda segment: segment.stamp.generation)

    def _announced(self, segment: _Segment, count: int) -> Iterator[record.Announced]:
        for number in range(0, len(segment), count):
            with self._changed:
                table = bytes(segment.table[number * ENTRY_BYTES : (number + count) * ENTRY_BYTES])
                live = bytes(segment.live[number : number + count])
            entries = record.announced(table)
            yield entries[np.frombuffer(live, np.bool_)] if 0 in live else entries

    def keys_of(self, fingerprint: int, router_hashes: Sequence[int], count: int) -> Iterator[dict[int, bytes]]:
        """The keys of those visible chunks that have one of `router_hashes`, which are not none. Those stored last come
        first, a part for each `count` entries that were looked at. What comes, goes or moves meanwhile may be
        missed."""
        wanted = np.unique(np.array(router_hashes, np.uint64))
        with self._changed:
            dirty = list(self._dirty.values())
            segments = sorted(self._segments.values(), key=lambda segment: -segment.stamp.generation)
        among = set(router_hashes)
        yield {one.router_hash: one.key for one in dirty if one.router_hash in among and one.fingerprint == fingerprint}
        for segment in segments:
            for number in range(0, len(segment), count):
                table = bytes(segment.table[number * ENTRY_BYTES : (number + count) * ENTRY_BYTES])
                entries = record.announced(table)
                at = np.searchsorted(wanted, entries["router_hash"]) % len(wanted)
                found = (wanted[at] == entries["router_hash"]) & (entries["fingerprint"] == fingerprint)
                matches = [record.unpack_entry(table, int(index)) for index in np.flatnonzero(found)]
                yield {one.router_hash: one.key for one in matches if one.key in self}

    def page(self, cursor: tuple[int, int], count: int) -> tuple[list[Entry], tuple[int, int] | None]:
        """The written chunks among the next `count` entries of one segment, and the cursor to go on from, None at the
        end. A cursor is a segment's generation and the number of an entry, (0, 0) the first. Chunks that come, go or
        move meanwhile may be missed or come twice."""
        generation, number = cursor
        with self._changed:
            segments = [segment for segment in self._segments.values() if segment.stamp.generation >= generation]
            if not segments:
                return [], None
            segment = min(segments, key=lambda segment: segment.stamp.generation)
            if segment.stamp.generation > generation:
                number = 0
            table = bytes(segment.table[number * ENTRY_BYTES : (number + count) * ENTRY_BYTES])
        looked = len(table) // ENTRY_BYTES
        base = segment.slot << _INDEX_BITS
        entries = [record.unpack_entry(table, offset) for offset in range(looked)]
        live = [entry for where, entry in enumerate(entries, base | number) if self._index.get(entry.key) == where]
        more = looked == count
        return live, (segment.stamp.generation, number + looked) if more else (segment.stamp.generation + 1, 0)

    def key_versions(self) -> Counter[int]:
        """How many visible chunks have a key of each version."""
        with self._changed:
            return +self._key_versions

    def find(self, key: bytes) -> Entry | None:
        """What is known of a visible chunk. Of a dirty one the page means nothing."""
        with self._changed:
            where = self._index.get(key)
            if where is None:
                return self._dirty.get(key)
            return self._segments[where >> _INDEX_BITS].entry(where & _NUMBER_MASK)

    def locate(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[int | None]:
        """A number for each chunk that is there and so long, by which reads are put into the order of the device; a
        dirty one needs no read."""
        with self._changed:
            return [self._where(key, length) for key, length in zip(keys, lengths, strict=True)]

    def _where(self, key: bytes, length: int) -> int | None:
        where = self._index.get(key)
        if where is None:
            dirty = self._dirty.get(key)
            return 0 if dirty is not None and dirty.length == length else None
        found = record.entry_length(self._segments[where >> _INDEX_BITS].table, where & _NUMBER_MASK)
        return where if found == length else None

    def was_evicted(self, key: bytes) -> bool:
        """Whether the chunk was evicted recently (a ghost)."""
        return key in self._ghosts

    def used(self, key: bytes) -> None:
        """Note that the chunk was requested and served from memory: for eviction it counts like a read."""
        with self._changed:
            where = self._index.get(key)
            if where is not None:
                self._eviction.hit(where >> _INDEX_BITS, where & _NUMBER_MASK)
            elif key in self._dirty:
                self._used.add(key)

    def is_used(self, key: bytes) -> bool:
        """Whether the chunk is dirty and was asked for."""
        return key in self._used

    def read(self, keys: Sequence[bytes], buffers: Sequence[Buffer], *, are_used: bool = True) -> list[Found | None]:
        """Read each chunk into the buffer at its place; None for those that are not there, or not as long as their
        buffers. Neighbours on the device are read at once. Chunks that are not used yet are not worth more to
        eviction."""
        with self._changed:
            pinned = [self._pin(key, buffer.length, are_used) for key, buffer in zip(keys, buffers, strict=True)]
        found: list[Found | None] = [None] * len(keys)
        try:
            for run in _runs(_Record(number, *pin) for number, pin in enumerate(pinned) if pin is not None):
                self._read_run(run, buffers, found)
        finally:
            with self._changed:
                for pin in pinned:
                    if pin is not None:
                        pin[0].readers -= 1
                self._changed.notify_all()
        return found

    def show(self, value: Value) -> bool:
        """Make a chunk visible that is not written yet. The caller serves it from memory until `append` has stored it,
        or `withdraw` has taken it back. False if it was visible already."""
        with self._changed:
            if value.key in self:
                return False
            entry = value.entry(0)
            self._dirty[value.key] = entry
            self.stats.dirty_entries += 1
            self.stats.dirty_bytes += entry.length
            self._came(entry)
            return True

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Unpublish dirty chunks and notify the observer. After this their memory may be reused."""
        with self._changed:
            for key in keys:
                entry = self._no_more_dirty(key)
                if entry is not None:
                    self._went(entry)

    def append(self, values: Sequence[Value]) -> list[bool]:
        """Write chunks; True for each that is stored now, by this call or before. Neighbours are written at once."""
        return self._append(values, Queue.PROBATION)

    def close(self) -> bool:
        """Wait for running reads and writes, seal the open segments, and give the space back. False if the device does
        not answer (`close_all`)."""
        return not close_all([self])

    def _close(self) -> None:
        self._closed.set()
        with self._rolling:
            with self._changed:
                heads = list(self._heads.values())
                self._heads.clear()
                for head in heads:
                    head.full = True
                self._changed.wait_for(lambda: not self._is_in_use())
            for head in heads:
                if len(head):
                    self._seal(head)
            self._save_marks(closing=True)
            if not self._owns_device:
                self._leave()
        self._close_files()

    def _is_in_use(self) -> bool:
        """Whether there are writes, or reads of files that will be closed. With the lock held."""
        segments = self._segments.values()
        return any(segment.writers or (segment.readers and self._owns_device) for segment in segments)

    def _leave(self) -> None:
        """Release the slots to other logs, except those with running reads or writes: these only after a restart."""
        with self._changed:
            self._index.clear()
            self._dirty.clear()
            unused = [slot for slot in self._held if self._is_unused(slot)]
        empty = [slot for slot in unused if slot in self._emptied]
        left = sorted(set(unused).difference(empty), key=lambda slot: self._segments[slot].stamp.generation)
        self._device.release(empty, left, self.namespace)

    # ---- reading

    def _pin(self, key: bytes, length: int, is_used: bool) -> tuple[_Segment, Entry] | None:
        """Pin the chunk's segment, so that it is not reused until `readers` is decremented."""
        where = self._index.get(key)
        if where is None:
            return None
        slot, number = where >> _INDEX_BITS, where & _NUMBER_MASK
        segment = self._segments[slot]
        entry = segment.entry(number)
        if entry.length != length:
            return None
        if is_used:
            self._eviction.hit(slot, number)
        segment.readers += 1
        return segment, entry

    def _read_run(self, run: list[_Record], buffers: Sequence[Buffer], found: list[Found | None]) -> None:
        segment, first = run[0].segment, run[0].entry
        parts = [buffers[number].record for number, _, _ in run]
        try:
            self._files.read(segment.extent.fd, parts, segment.extent.offset + first.page * PAGE_BYTES)
            failed = False
        except OSError as error:
            logger.error("%s, segment %d: %s", self.path, segment.slot, error)
            failed = True
        if failed and len(run) > 1:  # retry one by one: a bad page must not fail its neighbours
            for one in run:
                self._read_run([one], buffers, found)
            return
        for number, _, entry in run:
            intact = not failed and bool(crc32c(buffers[number].payload) == entry.crc)
            if not intact:
                self._forget(segment, entry)
            found[number] = Found(entry, intact)

    def _forget(self, segment: _Segment, entry: Entry) -> None:
        """Stop serving an entry that turned out corrupt."""
        with self._changed:
            where = self._index.get(entry.key)
            if where is None or self._segments[where >> _INDEX_BITS] is not segment:
                return
            self._unpublish(entry)
            self.stats.corrupt_entries += 1
        logger.warning("chunk %s is corrupt, page %d of segment %d", entry.key.hex(), entry.page, segment.slot)

    # ---- writing

    def _append(self, values: Sequence[Value], queue: Queue) -> list[bool]:
        """To the segments of a queue: new chunks are on probation, and what is written again is in the main queue."""
        stored = [False] * len(values)
        waiting = deque(range(len(values)))
        while waiting:
            reserved, full = self._reserve(values, waiting, stored, queue)
            for run in _runs(reserved):
                written = self._write_run(run, values, queue)
                for index, _, _ in run:
                    stored[index] = written
            if waiting and not self._roll(queue, full):
                break
        return stored

    def _reserve(
        self, values: Sequence[Value], waiting: deque[int], stored: list[bool], queue: Queue
    ) -> tuple[list[_Record], _Segment | None]:
        """Records for the first of the `waiting` values, which are taken off, as far as there is room; and the segment
        that has no more."""
        reserved: list[_Record] = []
        with self._changed:
            head = self._heads.get(queue)
            while waiting:
                value = values[waiting[0]]
                length = value.buffer.length
                known = queue is Queue.PROBATION and value.key in self._index
                if known or value.key in self._writing or not 0 < length <= self.value_bytes_max:
                    stored[waiting.popleft()] = known
                    continue
                if head is None or not self._fits(head, length):
                    break
                reserved.append(_Record(waiting.popleft(), head, value.entry(head.next_page)))
                head.next_page += record.record_bytes(length) // PAGE_BYTES
                head.writers += 1
                self._writing.add(value.key)
        return reserved, head

    def _fits(self, head: _Segment, length: int) -> bool:
        end = head.next_page * PAGE_BYTES + record.record_bytes(length)
        entries = len(head) + head.writers + 1
        return not head.full and end + record.footer_bytes(entries) <= self.segment_bytes

    def _write_run(self, run: list[_Record], values: Sequence[Value], queue: Queue) -> bool:
        """Write neighbouring records at once and make them visible."""
        segment, first = run[0].segment, run[0].entry
        parts = [values[index].buffer.record for index, _, _ in run]
        for part, (_, _, entry) in zip(parts, run, strict=True):
            part[:PAGE_BYTES] = record.pack_record_header(entry, segment.stamp, self._namespace)
            part[PAGE_BYTES + entry.length :] = bytes(len(part) - PAGE_BYTES - entry.length)
        written = self._write(segment, parts, first.page * PAGE_BYTES)
        with self._changed:
            for _, _, entry in run:
                self._writing.discard(entry.key)
                segment.writers -= 1
                if not written:
                    self.stats.failed_writes += 1
                    continue
                self._publish(segment, entry)
                if queue is Queue.MAIN:
                    self.stats.rewritten_bytes += entry.length
                else:
                    self.stats.accepted_bytes += entry.length
            last = segment.full and segment.writers == 0
            segment.writers += last  # until it is sealed, so that nobody closes its file
            self._changed.notify_all()
        if last:
            self._seal(segment)
            with self._changed:
                segment.writers -= 1
                self._changed.notify_all()
        return written

    def _write(self, segment: _Segment, parts: Sequence[memoryview], offset: int) -> bool:
        size = sum(map(len, parts))
        try:
            self._files.write(segment.extent.fd, parts, segment.extent.offset + offset)
        except OSError as error:
            if self._complains["write"]():
                message = "%s: write of %d bytes to segment %d failed: %s"
                logger.error(message, self.path, size, segment.slot, error)
            return False
        segment.dirty = True
        with self._changed:
            self.stats.device_written_bytes += size
        return True

    def _publish(self, segment: _Segment, entry: Entry) -> None:
        """Make an entry visible, or, if it was before, point to this record. With the lock held."""
        known = self._index.get(entry.key)
        if known is not None:
            self._no_more_live(known)
        number = len(segment)
        self._index[entry.key] = segment.slot << _INDEX_BITS | number
        segment.table += record.pack_entry(entry)
        segment.live.append(1)
        if entry.key in self._used:
            self._eviction.hit(segment.slot, number)
        if self._no_more_dirty(entry.key) is None and known is None:
            self._came(entry)

    def _unpublish(self, entry: Entry) -> None:
        self._no_more_live(self._index.pop(entry.key))
        self._went(entry)

    def _no_more_live(self, where: int) -> None:
        self._segments[where >> _INDEX_BITS].live[where & _NUMBER_MASK] = 0

    def _no_more_dirty(self, key: bytes) -> Entry | None:
        entry = self._dirty.pop(key, None)
        if entry is not None:
            self._used.discard(key)
            self.stats.dirty_entries -= 1
            self.stats.dirty_bytes -= entry.length
        return entry

    def _came(self, entry: Entry) -> None:
        """It is visible now."""
        self.stats.entries += 1
        self.stats.payload_bytes += entry.length
        self._key_versions[entry.key_version] += 1
        self.observer.stored(entry)

    def _went(self, entry: Entry) -> None:
        """It is visible no more."""
        self.stats.entries -= 1
        self.stats.payload_bytes -= entry.length
        self._key_versions[entry.key_version] -= 1
        self.observer.removed(entry)

    # ---- segments

    def _roll(self, queue: Queue, full: _Segment | None) -> bool:
        """Begin a segment of `queue` in place of the `full` one, and empty another ahead of need. False if there is no
        slot to be had. The main queue takes what there is: chunks are written again to empty a slot, so that there
        is one again."""
        with self._rolling:
            if self._closed.is_set():
                return False
            if self._heads.get(queue) is not full:
                return True  # another thread was quicker
            slot = self._unread_slot(wait=queue is Queue.PROBATION)
            if slot is None:
                return False
            try:
                opened = self._open_slot(slot, queue)
            except OSError as error:
                if self._complains["begin"]():
                    logger.error("%s: cannot begin segment %d: %s", self.path, slot, error)
                self.stats.failed_writes += 1
                self._emptied.append(slot)
                return False
            with self._changed:
                self._segments[slot] = opened
                self._heads[queue] = opened
                self._eviction.opened(slot, opened.stamp.generation)
                if full is not None:
                    full.full = True
            if full is not None and full.writers == 0:
                self._seal(full)
            if queue is Queue.PROBATION:
                self._make_room(self._ahead)
            return True

    def _unread_slot(self, *, wait: bool) -> int | None:
        """An emptied slot that nobody reads any more; with `wait`, segments are emptied as long as there is none."""
        deadline = time.monotonic() + _READERS_SECONDS
        while True:
            with self._changed:
                for slot in self._emptied:
                    if self._is_unused(slot):
                        self._emptied.remove(slot)
                        return slot
                if not wait:
                    return None
                victim = self._choose()
                if victim is None and not self._changed.wait(deadline - time.monotonic()):
                    if self._complains["empty"]():
                        logger.error("%s: no segment could be emptied", self.path)
                    return None
            if victim is not None:
                self._clear(*victim)

    def _is_unused(self, slot: int) -> bool:
        segment = self._segments.get(slot)
        return segment is None or segment.readers == segment.writers == 0

    def _open_slot(self, slot: int, queue: Queue) -> _Segment:
        segment = self._begin_use(slot, self._device.extent(slot), queue)
        if segment is None:
            raise OSError("its header was not written")
        # A power cut that takes the header and leaves the records would show the slot's last use, overwritten.
        self._files.sync(segment.extent.fd)
        return segment

    def _begin_use(self, slot: int, extent: Extent, queue: Queue | None) -> _Segment | None:
        """Write the header of a slot's next use; with no queue, that it is empty. Called with `_rolling` held."""
        stamp = Stamp(self.store_id, self._device.next_generation())
        segment = _Segment(slot, stamp, extent, queue or Queue.PROBATION)
        page = record.pack_segment_header(self._header(segment, record.EMPTY if queue is None else queue))
        return segment if self._write(segment, [_page_aligned(page)], 0) else None

    def _header(self, segment: _Segment, queue: int) -> SegmentHeader:
        return SegmentHeader(segment.slot, segment.stamp, self.segment_bytes, queue)

    def _make_room(self, ahead: int) -> None:
        """Empty slots until there are `ahead` of them. Called with `_rolling` held."""
        while True:
            with self._changed:
                victim = self._choose() if len(self._emptied) < ahead else None
            if victim is None:
                return
            self._clear(*victim)

    def _choose(self) -> tuple[_Segment, list[int]] | None:
        """The segment to empty next, and which of its entries to keep. Precondition: the lock is held since the caller
        saw that a slot is needed, because the end of a read may change that."""
        slot = self._eviction.choose()
        if slot is None:
            return None
        segment = self._segments[slot]
        live = [(number, entry.length) for number, entry in self._live(segment)]
        budget = WRITE_AMPLIFICATION_MAX * self.stats.accepted_bytes - self.stats.device_written_bytes
        return segment, self._eviction.emptied(slot, live, max(0, int(budget)))

    def _clear(self, segment: _Segment, keep: list[int]) -> None:
        if keep:
            self._rewrite(segment, [segment.entry(number) for number in keep])
        with self._changed:
            self._empty(segment)
        self._begin_use(segment.slot, segment.extent, None)  # or a restart would find it all again

    def _rewrite(self, segment: _Segment, entries: list[Entry]) -> None:
        """Write chunks of a segment that is to be emptied once more, elsewhere."""
        for entry in entries:
            buffer = aligned(entry.length)
            found: list[Found | None] = [None]
            self._read_run([_Record(0, segment, entry)], [buffer], found)
            if found[0] is None or not found[0].intact:
                continue
            key, router_hash, fingerprint, _, _, crc, blocks, version = entry
            if not self._append([Value(key, buffer, crc, router_hash, fingerprint, blocks, version)], Queue.MAIN)[0]:
                return

    def _empty(self, segment: _Segment) -> None:
        """Unpublish what is left in a segment. With the lock held."""
        entries = [entry for _, entry in self._live(segment)]
        for entry in entries:
            self._unpublish(entry)
            self._ghosts[entry.key] = None
        while len(self._ghosts) > _GHOSTS_MAX:
            self._ghosts.popitem(last=False)
        self._emptied.append(segment.slot)
        if entries:
            self.stats.evicted_entries += len(entries)
            self.stats.evicted_segments += 1
            self.stats.evicted_age_seconds = time.monotonic() - segment.opened
        self._changed.notify_all()

    def _live(self, segment: _Segment) -> Iterator[tuple[int, Entry]]:
        """The segment's entries that are visible, by number. With the lock held."""
        for number, live in enumerate(segment.live):
            if live:
                yield number, segment.entry(number)

    def _seal(self, segment: _Segment) -> None:
        """Write the footer and sync: a full segment without writers no longer changes its table."""
        with self._changed:
            if segment.sealed:
                return
            segment.sealed = True
        offset, footer = record.pack_footer(bytes(segment.table), segment.stamp, self.segment_bytes)
        # Writes that failed, and were there after all when it was scanned, may have left no room: it is scanned again.
        if segment.next_page * PAGE_BYTES <= offset:
            self._write(segment, [_page_aligned(footer)], offset)
        self._sync(segment)
        with self._changed:
            self._eviction.sealed(segment.slot, len(segment))
            self._changed.notify_all()

    def _sync(self, segment: _Segment) -> None:
        segment.dirty = False
        try:
            self._files.sync(segment.extent.fd)
        except OSError as error:
            logger.error("%s: segment %d is not synced: %s", self.path, segment.slot, error)

    def _sync_often(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            for head in list(self._heads.values()):
                if head.dirty:
                    self._sync(head)

    # ---- read marks

    def _save_often(self) -> None:
        while not self._closed.wait(MARKS_SECONDS):
            self._save_marks()

    def _save_marks(self, *, closing: bool = False) -> None:
        """Save what eviction knows, of the segments of which it changed. After _MARKING_SECONDS the others wait for the
        next time."""
        deadline = time.monotonic() + _MARKING_SECONDS
        with self._changed:
            slots = self._eviction.unsaved()
        for slot in slots:
            if time.monotonic() > deadline:
                return
            with self._rolling:  # nobody begins the slot's next use meanwhile
                if self._closed.is_set() and not closing:
                    return
                self._save_marks_of(slot)

    def _save_marks_of(self, slot: int) -> None:
        with self._changed:
            saved, segment = self._eviction.save(slot), self._segments.get(slot)
            if saved is None or segment is None:
                return
        header = self._header(segment, segment.queue)
        page = record.pack_marked_header(header, Marks(*saved), segment.table)
        self._write(segment, [_page_aligned(page)], 0)

    # ---- start and end

    def _recover(self) -> None:
        scanning = threading.Lock()  # a scan holds a whole segment in memory: one at a time
        self._eviction = Eviction(self.slots)
        slots = self._device.slots_of(self.namespace)
        shares = [slots[start : start + _RECOVERY_SHARE] for start in range(0, len(slots), _RECOVERY_SHARE)]
        found: list[_Segment] = []
        with ThreadPoolExecutor(_RECOVERY_THREADS, thread_name_prefix="kvtier-recovery") as pool:
            for segment in chain.from_iterable(pool.map(lambda share: self._load(share, scanning), shares)):
                self._adopt(segment)
                found.append(segment)
        found.sort(key=lambda segment: segment.stamp.generation)
        if self.stats.entries > len(self._index):
            self._adopt_again(found)
        for segment in found:
            turn, were_read = segment.marks or (segment.stamp.generation, b"")
            self._eviction.opened(segment.slot, turn, were_read)
        unsealed = [one for one in found if not one.sealed and one.queue is Queue.PROBATION]
        if unsealed and self._unseal(unsealed[-1]):
            self._heads[Queue.PROBATION] = unsealed[-1]
        for segment in sorted(found, key=lambda one: one.marks.turn if one.marks else one.stamp.generation):
            segment.marks = None  # a byte a chunk
            if segment.sealed:
                segment.full = True
                self._eviction.sealed(segment.slot, len(segment))
            elif segment not in self._heads.values():
                segment.full = True
                self._seal(segment)
        self._held.update(self._segments)
        self._device.take(self._held)
        if found:
            logger.info("%s: %d chunks of %s in %d segments", self.path, len(self), self.namespace, len(found))

    def _unseal(self, segment: _Segment) -> bool:
        """Make sure that a segment has no footer before it is written to again: if it was misread now and is sound at
        the next start, it would hide what came after it."""
        return self._write(segment, [_page_aligned(bytes(PAGE_BYTES))], self.segment_bytes - PAGE_BYTES)

    def _load(self, slots: Iterable[int], scanning: threading.Lock) -> list[_Segment]:
        """The segments of this store in these slots, their tables filled but not adopted yet."""
        memory = recovery.ends_memory()
        loaded = (self._load_slot(slot, memory, scanning) for slot in slots)
        return [segment for segment in loaded if segment is not None]

    def _load_slot(self, slot: int, memory: memoryview, scanning: threading.Lock) -> _Segment | None:
        try:
            extent = self._device.extent(slot)
        except OSError as error:
            logger.error("%s, segment %d cannot be opened, its chunks are lost: %s", self.path, slot, error)
            return None
        pages = Pages(self._files, extent, self.segment_bytes)
        ends = recovery.read_ends(pages, memory)
        for stamp in ends.stamps({self.store_id}):
            self._device.saw_generation(stamp.generation)  # never used again: it may have left something
        use = recovery.last_use(pages, slot, ends, self.store_id, self._namespace)
        segment = None
        if use is not None and use.queue != record.EMPTY:
            segment = _Segment(slot, use.stamp, extent, Queue(use.queue))
            self._fill(segment, use, pages, ends, scanning)
        for page, failure in pages.unreadable.items():
            logger.error("%s, segment %d: page %d cannot be read: %s", self.path, slot, page, failure)
        return segment

    def _fill(self, segment: _Segment, use: Use, pages: Pages, ends: Ends, scanning: threading.Lock) -> None:
        """Take in the entries of a segment: by its footer, or if that is missing or damaged, by a scan."""
        table = None if use.trailer is None else recovery.read_table(pages, use.trailer, ends.tail)
        if use.trailer is not None and table is not None:
            segment.table, segment.sealed = bytearray(table), True
            segment.marks = record.unpack_marks(ends.head, use.trailer) if use.has_header else None
            return
        if use.trailer is not None:
            logger.error("%s, segment %d: its footer is damaged, scanning its records", self.path, segment.slot)
        with scanning:
            segment.table, segment.next_page = recovery.scan_table(pages, segment.stamp, self._namespace)

    def _adopt(self, segment: _Segment) -> None:
        """Make a recovered segment's entries visible."""
        self._segments[segment.slot] = segment
        segment.live = bytearray(b"\1") * len(segment)
        base = segment.slot << _INDEX_BITS
        self._index.update(zip(record.keys(segment.table), range(base, base + len(segment)), strict=True))
        self.stats.entries += len(segment)
        self.stats.payload_bytes += sum(record.lengths(segment.table))
        self._key_versions.update(record.key_versions(segment.table))

    def _adopt_again(self, found: Iterable[_Segment]) -> None:
        """In the order of their generations: a key that is in several segments belongs to the youngest."""
        for segment in found:
            self._adopt(segment)
        self.stats.entries = len(self._index)
        self.stats.payload_bytes = 0
        self._key_versions.clear()
        for segment in found:
            table = segment.table
            entries = zip(record.keys(table), record.lengths(table), record.key_versions(table), strict=True)
            for where, (key, length, version) in enumerate(entries, segment.slot << _INDEX_BITS):
                if self._index[key] == where:
                    self.stats.payload_bytes += length
                    self._key_versions[version] += 1
                else:
                    self._no_more_live(where)

    def _close_files(self) -> None:
        if self._owns_device:
            self._device.close()
        self._segments.clear()
        self._index.clear()
        self._dirty.clear()


def close_all(logs: Iterable[Log]) -> list[Log]:
    """Close logs side by side. Those whose devices have not answered after CLOSE_SECONDS are returned: their files stay
    open until they do, or the process ends, and the next start scans their open segments."""
    closing = [(log, threading.Thread(target=log._close, name="kvtier-close", daemon=True)) for log in logs]
    for _, thread in closing:
        thread.start()
    deadline = time.monotonic() + CLOSE_SECONDS
    for _, thread in closing:
        thread.join(max(0.0, deadline - time.monotonic()))
    hung = [log for log, thread in closing if thread.is_alive()]
    for path in dict.fromkeys(log.path for log in hung):
        logger.error("%s: the device does not answer; not closed after %g s", path, CLOSE_SECONDS)
    return hung


def _runs(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    """Group records that lie next to each other."""
    by_segment: defaultdict[int, list[_Record]] = defaultdict(list)
    for one in records:
        by_segment[one.segment.slot].append(one)
    for neighbours in by_segment.values():
        neighbours.sort(key=lambda one: one.entry.page)
        run: list[_Record] = []
        end = 0
        for one in neighbours:
            if run and one.entry.page != end:
                yield run
                run = []
            run.append(one)
            end = one.entry.page + record.record_bytes(one.entry.length) // PAGE_BYTES
        yield run


def _page_aligned(content: bytes) -> memoryview:
    """A copy in memory that may be written with direct I/O; whole pages."""
    memory = aligned(len(content) - PAGE_BYTES).view
    memory[:] = content
    return memory
