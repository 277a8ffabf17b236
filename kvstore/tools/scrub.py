"""Reads a stopped store from end to end and says what in it is sound. Nothing is written."""

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

_WINDOW_PAGES = 256  # of a scan that looks for the next record
_HEADER = struct.Struct("<8s8xQQQ")  # how every header begins: magic, store, generation; of a record: namespace
_RECORD_MAGIC, _SEGMENT_MAGIC, _TRAILER_MAGIC = b"KVTIERRC", b"KVTIERSG", b"KVTIERFT"


class Scrub:
    """Checks a store, with as many reads under way as `pool` has threads. It holds memory for those, the entries of one
    segment, and a key a chunk. With a `namespace` (record.namespace_id), chunks of any other one are corrupt."""

    def __init__(self, store: StoppedStore, files: Files, pool: ThreadPoolExecutor, namespace: int | None = None):
        self._store = store
        self._files = files
        self._namespace = namespace
        self._pool = pool
        self._pages = store.superblock.segment_bytes // PAGE_BYTES
        self._memory = _Memory()
        block = store.superblock
        self._stores = {device.store_id(block, name) for name in device.names(block)} or {block.store}
        # By store id, keys in the segments that were checked, which are younger than those to come.
        self._seen: defaultdict[int, set[bytes]] = defaultdict(set)

    def reports(self) -> Iterator[Report]:
        """A report of each segment, the youngest first."""
        heads = [head for head in self._pool.map(self._head, self._store.slots()) if head is not None]
        for head in sorted(heads, key=lambda head: -head.generation):
            yield self._report(head)

    def _head(self, slot: int) -> "_Head | None":
        """Whose segment it is, by the rules of `Log._load`; None if it is nobody's or another store's."""
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
            flaws.append((0, "segment header, and without it all in the segment"))
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
        """Whether a footer is in the segment that it describes: some of its records are there."""
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
            # A footer is written last: with one, damaged as it may be, nothing in the segment was cut off.
            report.state = "scanned" if report.corrupt else "open"
            entries = self._scan(report, place, stamp)
            sound = [True] * len(entries)
        self._account(
            report, stamp.store, entries, sound, footer_bytes=0 if table is None else record.footer_bytes(len(table))
        )

    def _account(
        self, report: Report, store: int, entries: Sequence[Entry], sound: Sequence[bool], footer_bytes: int
    ) -> None:
        """Count what is live, superseded and dead. Of two entries with one key the later one in the table counts."""
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
        """The entries of a sealed segment; None if they are damaged, which goes into the report."""
        flaws: list[tuple[int, str]] = []
        page = trailer.offset // PAGE_BYTES
        table = self._read(place, page, record.pages(trailer.table_bytes), flaws)[: trailer.table_bytes]
        if crc32c(table) == trailer.crc:
            return [record.unpack_entry(table, number) for number in range(trailer.table_bytes // ENTRY_BYTES)]
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in flaws or [(page, "footer's entries")]]
        return None

    def _faults(self, place: Place, stamp: Stamp, entries: Sequence[Entry]) -> Iterator[str]:
        """What is wrong with the record of each entry; "" if nothing is."""
        order = sorted(range(len(entries)), key=lambda number: entries[number].page)
        batches = _batches([entries[number] for number in order])
        found = self._pool.map(lambda batch: self._check(place, stamp, batch), batches)
        by_number = dict(zip(order, (fault for faults in found for fault in faults), strict=True))
        return (by_number[number] for number in range(len(entries)))

    def _check(self, place: Place, stamp: Stamp, batch: Sequence[Entry]) -> list[str]:
        """Read records that lie side by side, and check them."""
        sizes = [record.record_bytes(entry.length) for entry in batch]
        content = self._memory.of(sum(sizes))
        try:
            self._files.read(place.fd, [content], place.offset + batch[0].page * PAGE_BYTES)
        except OSError as error:
            if len(batch) > 1:  # one bad page must not cost its neighbours
                return [fault for entry in batch for fault in self._check(place, stamp, [entry])]
            return [_unreadable(error)]
        faults = []
        for entry, size in zip(batch, sizes, strict=True):
            intact = crc32c(content[PAGE_BYTES : PAGE_BYTES + entry.length]) == entry.crc
            header = self._entry(content, stamp, entry.page)
            # A footer that release 0.1 wrote for records of this one does not say their key versions.
            same = header is not None and header._replace(key_version=entry.key_version) == entry
            wrong = ["" if same else "record header", "" if intact else "payload"]
            faults.append(" and ".join(filter(None, wrong)))
            content = content[size:]
        return faults

    def _entry(self, page: memoryview, stamp: Stamp, number: int) -> Entry | None:
        """The entry in a record's header, if that is sound, in its place, and of the right namespace."""
        page = page[:PAGE_BYTES]
        namespace = self._namespace if self._namespace is not None else _HEADER.unpack_from(page)[3]
        return record.unpack_record_header(page, stamp=stamp, page_number=number, namespace=namespace)

    def _scan(self, report: Report, place: Place, stamp: Stamp) -> list[Entry]:
        """The sound records of a segment without a footer, by the rules of `Log._scan`. What is wrong goes into the
        report: as corrupt if a sound record follows, otherwise as cut off, if the segment is open."""
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
        """The first record, or what is left of one, in some pages; what is wrong with it; and the page after its
        header, or after all of them."""
        unreadable: list[tuple[int, str]] = []
        window = self._read(place, number, pages, unreadable)
        report.corrupt += [self._flaw(report.segment, *flaw) for flaw in unreadable]
        for passed in range(pages):
            entry, fault = self._scan_page(place, stamp, window[passed * PAGE_BYTES :], number + passed)
            if entry or fault:
                return entry, fault, number + passed + 1
        return None, "", number + pages

    def _scan_page(self, place: Place, stamp: Stamp, page: memoryview, number: int) -> tuple[Entry | None, str]:
        """The entry of the record that begins on this page, and what is wrong with it."""
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
        """Pages of a segment; those from the first that cannot be read are zeros, as `Log` takes them, and a flaw."""
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
    """What the first and the last page of a slot say, and what is wrong with them, by page."""

    slot: int
    stamp: Stamp | None  # None: not to be found
    trailer: Trailer | None
    empty: bool  # emptied, and not used again yet
    flaws: list[tuple[int, str]]

    @property
    def generation(self) -> int:
        return self.stamp.generation if self.stamp else 0


class _Memory(threading.local):
    """Memory of a thread, for one read at a time."""

    _view = memoryview(b"")

    def of(self, length: int) -> memoryview:
        if len(self._view) < length:
            self._view = aligned(max(length, BATCH_BYTES)).view
        return self._view[:length]


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Cut entries, sorted by page, into runs that lie side by side and are worth one read."""
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
    """How many of magic, store and generation stand where a header has them, whatever its checksum says."""
    its_magic, store, generation, _ = _HEADER.unpack_from(page)
    return sum((its_magic == magic, store == stamp.store, generation == stamp.generation))


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"
