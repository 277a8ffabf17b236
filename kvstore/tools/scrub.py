"""Reads a stopped store from end to end and reports corruption. Never writes."""

import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from crc32c import crc32c

from kvstore.disk import device, record, recovery
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.record import ENTRY_BYTES, PAGE_BYTES, Entry, Stamp, Trailer
from kvstore.disk.recovery import Ends, Pages, Use
from kvstore.disk.space import Extent, StoppedStore
from kvstore.net.queues import BATCH_BYTES
from kvstore.tools.reports import Flaw, Report

_HEADER = struct.Struct("<8s8xQQ")  # common start of all headers: magic, store, generation
_RECORD_MAGIC, _SEGMENT_MAGIC, _TRAILER_MAGIC = b"KVTIERRC", b"KVTIERSG", b"KVTIERFT"


class Scrub:
    """Checks a store, with one concurrent read per thread of `pool`. Holds memory for those reads, for one segment, and
    for a key per chunk. With a `namespace` (record.namespace_id), chunks of others are corrupt."""

    def __init__(self, store: StoppedStore, files: Files, pool: ThreadPoolExecutor, namespace: int | None = None):
        self._store = store
        self._files = files
        self._namespace = namespace
        self._pool = pool
        self._memory = _Memory()
        block = store.superblock
        self._stores = {device.store_id(block, name) for name in device.names(block)} or {block.store}
        # Keys in the segments checked so far, which are younger than the rest; by store id.
        self._seen: defaultdict[int, set[bytes]] = defaultdict(set)

    def reports(self) -> Iterator[Report]:
        """A report of each segment, the youngest first."""
        heads = [head for head in self._pool.map(self._head, self._store.slots()) if head is not None]
        for head in sorted(heads, key=lambda head: -head.generation):
            yield self._report(head)

    def _head(self, slot: int) -> "_Head | None":
        """The owner of a segment; None if it is unused or another store's."""
        try:
            with self._store.extent(slot) as extent:
                return self._head_at(self._reader(extent), slot)
        except OSError as error:
            return _Head(slot, None, [(0, _unreadable(error))])

    def _head_at(self, pages: Pages, slot: int) -> "_Head | None":
        ends = recovery.read_ends(pages)
        last = len(pages) - 1
        flaws = _unreadable_runs(pages)
        store = self._last_writer(ends)
        use = recovery.last_use(pages, slot, ends, store, self._namespace)
        nobody = Stamp(store, -1)
        stamp = use.stamp if use and use.has_header else None
        if ends.trailer is None and _likeness(ends.tail, _TRAILER_MAGIC, stamp or nobody) > 1:
            flaws.append((last, "footer"))
        if use and not use.has_header:
            flaws = flaws or [(0, "segment header")]
        elif stamp and ends.trailer and ends.trailer.stamp.store == store and ends.trailer.stamp > stamp:
            flaws.append((last, "footer, which is another segment's"))
        is_foreign = ends.header is not None and ends.header.stamp.store not in self._stores
        if use is None and not is_foreign and _likeness(ends.head, _SEGMENT_MAGIC, nobody):
            flaws.append((0, "segment header, which makes the whole segment unreadable"))
        return _Head(slot, use, flaws) if use or flaws else None

    def _last_writer(self, ends: Ends) -> int:
        """The store id of the namespace that a slot belongs to, by the rules of `Device`."""
        last = max(ends.stamps(self._stores), key=lambda stamp: stamp.generation, default=None)
        return last.store if last else self._store.superblock.store

    def _reader(self, extent: Extent) -> Pages:
        return Pages(self._files, extent, self._store.superblock.segment_bytes)

    def _report(self, head: "_Head") -> Report:
        report = Report(str(self._store.path), head.slot, head.generation)
        report.corrupt = [self._flaw(head.slot, page, what) for page, what in head.flaws]
        if head.use is None:
            report.state, report.dead_bytes = "lost", self._store.superblock.segment_bytes
            return report
        if head.use.queue == record.EMPTY:
            report.state, report.free_bytes = "empty", self._store.superblock.segment_bytes - PAGE_BYTES
            return report
        try:
            with self._store.extent(head.slot) as extent:
                self._fill(report, extent, head.use)
        except OSError as error:
            report.state, report.dead_bytes = "lost", self._store.superblock.segment_bytes
            report.corrupt.append(self._flaw(head.slot, 0, _unreadable(error)))
        return report

    def _fill(self, report: Report, extent: Extent, use: Use) -> None:
        table = self._table(report, extent, use.trailer) if use.trailer else None
        if table is not None:
            faults = list(self._faults(extent, use.stamp, table))
            entries, sound = table, [not fault for fault in faults]
            report.corrupt += [
                self._flaw(report.segment, entry.page, fault, entry.key)
                for entry, fault in zip(table, faults, strict=True)
                if fault
            ]
        else:
            # The footer is written last. If there is one, even a damaged one, no write to the segment was cut off.
            report.state = "scanned" if report.corrupt else "open"
            entries = self._scan(report, extent, use.stamp)
            sound = [True] * len(entries)
        footer_bytes = 0 if table is None else record.footer_bytes(len(table))
        self._account(report, use.stamp.store, entries, sound, footer_bytes=footer_bytes)

    def _account(
        self, report: Report, store: int, entries: Sequence[Entry], sound: Sequence[bool], footer_bytes: int
    ) -> None:
        """Count live, superseded and dead chunks. Of two entries with the same key, the later one is live."""
        for entry, good in zip(reversed(entries), reversed(sound), strict=True):
            superseded = entry.key in self._seen[store]
            self._seen[store].add(entry.key)
            if good and superseded:
                report.superseded += 1
            elif good:
                report.live += 1
                report.key_versions[entry.key_version] = report.key_versions.get(entry.key_version, 0) + 1
                report.live_bytes += record.record_bytes(entry.length)
        ends = [entry.page * PAGE_BYTES + record.record_bytes(entry.length) for entry in entries]
        ends += [(flaw.page + 1) * PAGE_BYTES for flaw in report.cut_off]
        used_bytes = max(ends, default=PAGE_BYTES) - PAGE_BYTES
        report.dead_bytes = used_bytes - report.live_bytes
        report.free_bytes = self._store.superblock.segment_bytes - PAGE_BYTES - used_bytes - footer_bytes

    def _table(self, report: Report, extent: Extent, trailer: Trailer) -> list[Entry] | None:
        """The entries of a sealed segment; None if they are damaged, which is added to the report."""
        pages = self._reader(extent)
        table = recovery.read_table(pages, trailer)
        if table is not None:
            return [record.unpack_entry(table, number) for number in range(trailer.table_bytes // ENTRY_BYTES)]
        flaws = _unreadable_runs(pages) or [(trailer.offset // PAGE_BYTES, "footer's entries")]
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in flaws]
        return None

    def _faults(self, extent: Extent, stamp: Stamp, entries: Sequence[Entry]) -> Iterator[str]:
        """The fault in the record of each entry; "" for none."""
        order = sorted(range(len(entries)), key=lambda number: entries[number].page)
        batches = _batches([entries[number] for number in order])
        found = self._pool.map(lambda batch: self._check(extent, stamp, batch), batches)
        by_number = dict(zip(order, (fault for faults in found for fault in faults), strict=True))
        return (by_number[number] for number in range(len(entries)))

    def _check(self, extent: Extent, stamp: Stamp, batch: Sequence[Entry]) -> list[str]:
        """Read adjacent records, and check them."""
        sizes = [record.record_bytes(entry.length) for entry in batch]
        content = self._memory.of(sum(sizes))
        try:
            self._files.read(extent.fd, [content], extent.offset + batch[0].page * PAGE_BYTES)
        except OSError as error:
            if len(batch) > 1:  # retry one by one: a bad page must not fail its neighbours
                return [fault for entry in batch for fault in self._check(extent, stamp, [entry])]
            return [_unreadable(error)]
        faults = []
        for entry, size in zip(batch, sizes, strict=True):
            intact = crc32c(content[PAGE_BYTES : PAGE_BYTES + entry.length]) == entry.crc
            header = self._entry(content, stamp, entry.page)
            # A footer that release 0.1 wrote for records of this release lacks their key versions.
            same = header is not None and header._replace(key_version=entry.key_version) == entry
            wrong = ["" if same else "record header", "" if intact else "payload"]
            faults.append(" and ".join(filter(None, wrong)))
            content = content[size:]
        return faults

    def _entry(self, page: memoryview, stamp: Stamp, number: int) -> Entry | None:
        """The entry in a record's header, if that is intact, at its page, and of the right namespace."""
        page = page[:PAGE_BYTES]
        return record.unpack_record_header(page, stamp=stamp, page_number=number, namespace=self._namespace)

    def _scan(self, report: Report, extent: Extent, stamp: Stamp) -> list[Entry]:
        """The sound records of a segment without a footer. Faults are added to the report: as cut off at the end of an
        open segment, as corrupt otherwise."""
        entries: list[Entry] = []
        flaws: list[Flaw] = []
        pages = self._reader(extent)
        content = pages.read(0, len(pages))
        told = {flaw.page for flaw in report.corrupt}
        unreadable = [flaw for flaw in _unreadable_runs(pages) if flaw[0] not in told]
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in unreadable]
        for number, entry, intact in recovery.scan(content, stamp, self._namespace):
            if entry is not None and intact:
                entries.append(entry)
                report.corrupt += flaws
                flaws = []
            elif entry is not None:
                flaws.append(self._flaw(report.segment, number, "payload", entry.key))
            elif self._was_record(content[number * PAGE_BYTES :], stamp, number):
                flaws.append(self._flaw(report.segment, number, "record header"))
        (report.cut_off if report.state == "open" else report.corrupt).extend(flaws)
        return entries

    def _was_record(self, page: memoryview, stamp: Stamp, number: int) -> bool:
        """Whether a page is a damaged record header. That of an earlier use of the slot is sound by its own stamp."""
        if _likeness(page, _RECORD_MAGIC, stamp) < 2:
            return False
        _, store, generation = _HEADER.unpack_from(page)
        return (store, generation) == stamp or self._entry(page, Stamp(store, generation), number) is None

    def _flaw(self, slot: int, page: int, what: str, key: bytes = b"") -> Flaw:
        offset = self._store.offset(slot) + page * PAGE_BYTES
        return Flaw(what, page, str(self._store.file(slot)), offset, key.hex())


class _Head(NamedTuple):
    """Whose a slot's segment is, and the faults of its first and last page."""

    slot: int
    use: Use | None  # None: not found
    flaws: list[tuple[int, str]]

    @property
    def generation(self) -> int:
        return self.use.stamp.generation if self.use else 0


class _Memory(threading.local):
    """A read buffer per thread."""

    _view = memoryview(b"")

    def of(self, length: int) -> memoryview:
        if len(self._view) < length:
            self._view = aligned(max(length, BATCH_BYTES)).view
        return self._view[:length]


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Split entries, sorted by page, into batches of adjacent records for one read each."""
    run: list[Entry] = []
    end = size = 0
    for entry in entries:
        length = record.record_bytes(entry.length)
        if run and (entry.page * PAGE_BYTES != end or size + length > BATCH_BYTES):
            yield run
            run, size = [], 0
        run.append(entry)
        size += length
        end = entry.page * PAGE_BYTES + length
    if run:
        yield run


def _likeness(page: memoryview, magic: bytes, stamp: Stamp) -> int:
    """How many of magic, store and generation a page has in the place of a header's, whatever its checksum is."""
    its_magic, store, generation = _HEADER.unpack_from(page)
    return sum((its_magic == magic, store == stamp.store, generation == stamp.generation))


def _unreadable_runs(pages: Pages) -> list[tuple[int, str]]:
    """The first of each run of pages that could not be read, as a flaw."""
    bad = pages.unreadable
    return [(page, _unreadable(bad[page])) for page in sorted(bad) if page - 1 not in bad]


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"
