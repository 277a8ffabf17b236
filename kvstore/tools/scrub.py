"""Reads a stopped store from end to end and reports corruption. Never writes."""

import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from crc32c import crc32c

from kvstore.disk import device, record
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.record import ENTRY_BYTES, PAGE_BYTES, Entry, SegmentHeader, Stamp, Trailer
from kvstore.disk.space import Place, StoppedStore
from kvstore.net.queues import BATCH_BYTES
from kvstore.tools.reports import Flaw, Report

_WINDOW_PAGES = 256  # read at once by a scan for the next record
_HEADER = struct.Struct("<8s8xQQQ")  # common start of all headers: magic, store, generation; of a record: namespace
_RECORD_MAGIC, _SEGMENT_MAGIC, _TRAILER_MAGIC = b"KVTIERRC", b"KVTIERSG", b"KVTIERFT"


class Scrub:
    """Checks a store, with one concurrent read per thread of `pool`. Holds memory for those reads, for the entries of
    one segment, and for a key per chunk. With a `namespace` (record.namespace_id), chunks of others are corrupt."""

    def __init__(self, store: StoppedStore, files: Files, pool: ThreadPoolExecutor, namespace: int | None = None):
        self._store = store
        self._files = files
        self._namespace = namespace
        self._pool = pool
        self._pages = store.superblock.segment_bytes // PAGE_BYTES
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
        """The owner of a segment, by the rules of `Log._load`; None if it is unused or another store's."""
        try:
            with self._store.place(slot) as place:
                return self._head_at(place, slot)
        except OSError as error:
            return _Head(slot, None, None, False, [(0, _unreadable(error))])

    def _head_at(self, place: Place, slot: int) -> "_Head | None":
        last = self._pages - 1
        flaws: list[tuple[int, str]] = []
        first_page, last_page = (self._read(place, page, 1, flaws) for page in (0, last))
        header = record.unpack_segment_header(first_page)
        trailer = record.unpack_trailer(last_page, self._store.superblock.segment_bytes)
        store = self._last_writer(header, trailer)
        nobody = Stamp(store, -1)
        stamp = header.stamp if header and (header.slot, header.stamp.store) == (slot, store) else None
        if trailer is None and _likeness(last_page, _TRAILER_MAGIC, stamp or nobody) > 1:
            flaws.append((last, "footer"))
        if trailer and trailer.stamp.store == store and trailer.stamp.generation > (stamp or nobody).generation:
            if self._has_records(place, trailer):
                flaws = flaws or [(0, "segment header")]
                return _Head(slot, trailer.stamp, trailer, False, flaws)
            if stamp:
                flaws.append((last, "footer, which is another segment's"))
        if (
            stamp is None
            and not (header and header.stamp.store not in self._stores)
            and _likeness(first_page, _SEGMENT_MAGIC, nobody)
        ):
            flaws.append((0, "segment header, which makes the whole segment unreadable"))
        if stamp is None and not flaws:
            return None
        empty = header is not None and header.queue == record.EMPTY
        return _Head(slot, stamp, trailer if trailer and trailer.stamp == stamp else None, empty, flaws)

    def _last_writer(self, header: SegmentHeader | None, trailer: Trailer | None) -> int:
        """The store id of the namespace that a slot belongs to, by the rules of `Device`."""
        stamps = [one.stamp for one in (header, trailer) if one is not None and one.stamp.store in self._stores]
        last = max(stamps, key=lambda stamp: stamp.generation, default=None)
        return last.store if last else self._store.superblock.store

    def _has_records(self, place: Place, trailer: Trailer) -> bool:
        """Whether a footer belongs to the segment that it is in: one of its first records is there."""
        table = self._read(place, trailer.offset // PAGE_BYTES, record.pages(trailer.table_bytes), [])
        table = table[: trailer.table_bytes]
        if crc32c(table) != trailer.crc:
            return False
        entries = (
            record.unpack_entry(table, number) for number in range(min(record.PROBES, len(table) // ENTRY_BYTES))
        )
        return any(self._entry(self._read(place, one.page, 1, []), trailer.stamp, one.page) for one in entries)

    def _report(self, head: "_Head") -> Report:
        report = Report(str(self._store.path), head.slot, head.generation)
        report.corrupt = [self._flaw(head.slot, page, what) for page, what in head.flaws]
        if head.stamp is None:
            report.state, report.dead_bytes = "lost", self._store.superblock.segment_bytes
            return report
        if head.empty:
            report.state, report.free_bytes = "empty", self._store.superblock.segment_bytes - PAGE_BYTES
            return report
        try:
            with self._store.place(head.slot) as place:
                self._fill(report, place, head.stamp, head.trailer)
        except OSError as error:
            report.state, report.dead_bytes = "lost", self._store.superblock.segment_bytes
            report.corrupt.append(self._flaw(head.slot, 0, _unreadable(error)))
        return report

    def _fill(self, report: Report, place: Place, stamp: Stamp, trailer: Trailer | None) -> None:
        table = self._table(report, place, trailer) if trailer else None
        if table is not None:
            faults = list(self._faults(place, stamp, table))
            entries, sound = table, [not fault for fault in faults]
            report.corrupt += [
                self._flaw(report.segment, entry.page, fault, entry.key)
                for entry, fault in zip(table, faults, strict=True)
                if fault
            ]
        else:
            # The footer is written last. If there is one, even a damaged one, no write to the segment was cut off.
            report.state = "scanned" if report.corrupt else "open"
            entries = self._scan(report, place, stamp)
            sound = [True] * len(entries)
        self._account(
            report, stamp.store, entries, sound, footer_bytes=0 if table is None else record.footer_bytes(len(table))
        )

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

    def _table(self, report: Report, place: Place, trailer: Trailer) -> list[Entry] | None:
        """The entries of a sealed segment; None if they are damaged, which is added to the report."""
        flaws: list[tuple[int, str]] = []
        page = trailer.offset // PAGE_BYTES
        table = self._read(place, page, record.pages(trailer.table_bytes), flaws)[: trailer.table_bytes]
        if crc32c(table) == trailer.crc:
            return [record.unpack_entry(table, number) for number in range(trailer.table_bytes // ENTRY_BYTES)]
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in flaws or [(page, "footer's entries")]]
        return None

    def _faults(self, place: Place, stamp: Stamp, entries: Sequence[Entry]) -> Iterator[str]:
        """The fault in the record of each entry; "" for none."""
        order = sorted(range(len(entries)), key=lambda number: entries[number].page)
        batches = _batches([entries[number] for number in order])
        found = self._pool.map(lambda batch: self._check(place, stamp, batch), batches)
        by_number = dict(zip(order, (fault for faults in found for fault in faults), strict=True))
        return (by_number[number] for number in range(len(entries)))

    def _check(self, place: Place, stamp: Stamp, batch: Sequence[Entry]) -> list[str]:
        """Read adjacent records, and check them."""
        sizes = [record.record_bytes(entry.length) for entry in batch]
        content = self._memory.of(sum(sizes))
        try:
            self._files.read(place.fd, [content], place.offset + batch[0].page * PAGE_BYTES)
        except OSError as error:
            if len(batch) > 1:  # retry one by one: a bad page must not fail its neighbours
                return [fault for entry in batch for fault in self._check(place, stamp, [entry])]
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
        namespace = self._namespace if self._namespace is not None else _HEADER.unpack_from(page)[3]
        return record.unpack_record_header(page, stamp=stamp, page_number=number, namespace=namespace)

    def _scan(self, report: Report, place: Place, stamp: Stamp) -> list[Entry]:
        """The sound records of a segment without a footer, by the rules of `Log._scan`. Faults are added to the report:
        as cut off at the end of an open segment, as corrupt otherwise."""
        entries: list[Entry] = []
        flaws: list[Flaw] = []
        number, pages = 1, 1
        while number < self._pages - 1:
            entry, fault, number = self._next(report, place, stamp, number, min(pages, self._pages - 1 - number))
            pages = _WINDOW_PAGES
            if fault:
                flaws.append(self._flaw(report.segment, number - 1, fault, entry.key if entry else b""))
            elif entry:
                entries.append(entry)
                number, pages = entry.page + record.record_bytes(entry.length) // PAGE_BYTES, 1
                report.corrupt += flaws
                flaws = []
        (report.cut_off if report.state == "open" else report.corrupt).extend(flaws)
        return entries

    def _next(
        self, report: Report, place: Place, stamp: Stamp, number: int, pages: int
    ) -> tuple[Entry | None, str, int]:
        """The entry of the first record in some pages, None if its header is damaged or there is none; its fault; and
        the page after its header, or after the last page."""
        unreadable: list[tuple[int, str]] = []
        window = self._read(place, number, pages, unreadable)
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in unreadable]
        for passed in range(pages):
            entry, fault = self._scan_page(place, stamp, window[passed * PAGE_BYTES :], number + passed)
            if entry or fault:
                return entry, fault, number + passed + 1
        return None, "", number + pages

    def _scan_page(self, place: Place, stamp: Stamp, page: memoryview, number: int) -> tuple[Entry | None, str]:
        """The entry of the record that begins on this page, and its fault."""
        entry = self._entry(page, stamp, number)
        if entry is not None:
            if number * PAGE_BYTES + record.record_bytes(entry.length) > self._store.superblock.segment_bytes:
                return entry, "payload"
            return entry, self._check(place, stamp, [entry])[0]
        if _likeness(page, _RECORD_MAGIC, stamp) < 2:
            return None, ""
        # The header of an earlier use of the slot is sound by its own stamp.
        _, store, generation, _ = _HEADER.unpack_from(page)
        stale = (store, generation) != stamp and self._entry(page, Stamp(store, generation), number) is not None
        return None, "" if stale else "record header"

    def _read(self, place: Place, page: int, pages: int, flaws: list[tuple[int, str]]) -> memoryview:
        """Pages of a segment. From the first unreadable page on they are zeros, as for `Log`, which is a flaw."""
        content = aligned(pages * PAGE_BYTES).view[: pages * PAGE_BYTES]
        try:
            self._files.read(place.fd, [content], place.offset + page * PAGE_BYTES)
        except OSError as error:
            flaws.append((page, _unreadable(error)))
        return content

    def _flaw(self, slot: int, page: int, what: str, key: bytes = b"") -> Flaw:
        offset = self._store.offset(slot) + page * PAGE_BYTES
        return Flaw(what, page, str(self._store.file(slot)), offset, key.hex())


class _Head(NamedTuple):
    """The content of a slot's first and last page, and their faults by page."""

    slot: int
    stamp: Stamp | None  # None: not found
    trailer: Trailer | None
    empty: bool  # emptied, and not reused yet
    flaws: list[tuple[int, str]]

    @property
    def generation(self) -> int:
        return self.stamp.generation if self.stamp else 0


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
    its_magic, store, generation, _ = _HEADER.unpack_from(page)
    return sum((its_magic == magic, store == stamp.store, generation == stamp.generation))


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"
