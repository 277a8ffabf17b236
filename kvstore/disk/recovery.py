"""What the slots of a store hold after a stop or a crash: whose a segment is, and which of its records count.

Reads only. At its start the log adopts what is found here; `python -m kvstore verify` reports it.

A sealed segment is known by its footer. Any other is scanned: a record counts if its header and its payload check out,
and past a torn one the scan goes on page by page. A page that cannot be read counts as zeros.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from crc32c import crc32c

from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.eviction import Queue
from kvstore.disk.files import Files
from kvstore.disk.record import ENTRY_BYTES, PAGE_BYTES, Entry, SegmentHeader, Stamp, Trailer
from kvstore.disk.space import Extent

PROBES = 16  # entries of a footer whose records are looked at to learn whose it is
_PIECE_BYTES = 1 << 20  # of what is read at once
_TAIL_BYTES = 32 << 10  # of a segment: the footer of up to 595 entries
_NO_TAIL = memoryview(b"")


class Pages:
    """Reads of one segment, in whole pages. Those that cannot be read are zeros, and in `unreadable`."""

    def __init__(self, files: Files, extent: Extent, segment_bytes: int):
        self.segment_bytes = segment_bytes
        self.unreadable: dict[int, OSError] = {}
        self._files = files
        self._extent = extent

    def __len__(self) -> int:
        return self.segment_bytes // PAGE_BYTES

    def read(self, page: int, count: int = 1) -> memoryview:
        content = aligned((count - 1) * PAGE_BYTES).view
        for start in range(0, len(content), _PIECE_BYTES):
            self.fill(content[start : start + _PIECE_BYTES], page + start // PAGE_BYTES)
        return content

    def fill(self, into: memoryview, page: int) -> None:
        try:
            self._files.read(self._extent.fd, [into], self._extent.offset + page * PAGE_BYTES)
        except OSError as error:
            half = len(into) // PAGE_BYTES // 2
            if half:  # one bad page must not cost its neighbours
                self.fill(into[: half * PAGE_BYTES], page)
                self.fill(into[half * PAGE_BYTES :], page + half)
            else:
                self.unreadable[page] = error
                into[:] = bytes(len(into))


class Ends(NamedTuple):
    """A segment's first page, and its last ones."""

    head: memoryview
    tail: memoryview
    header: SegmentHeader | None
    trailer: Trailer | None

    def stamps(self, stores: Collection[int]) -> list[Stamp]:
        """On the header and the trailer, if they are of one of these stores."""
        found = (one.stamp for one in (self.header, self.trailer) if one is not None)
        return [stamp for stamp in found if stamp.store in stores]


def ends_memory() -> memoryview:
    """For `read_ends`: enough that most footers are in the tail. To be used again: taking it costs more than a read."""
    return aligned(_TAIL_BYTES).view


def read_ends(pages: Pages, memory: memoryview | None = None) -> Ends:
    memory = aligned(PAGE_BYTES).view if memory is None else memory
    head, tail = memory[:PAGE_BYTES], memory[PAGE_BYTES:]
    pages.fill(head, 0)
    pages.fill(tail, len(pages) - len(tail) // PAGE_BYTES)
    trailer = record.unpack_trailer(tail[-PAGE_BYTES:], pages.segment_bytes)
    return Ends(head, tail, record.unpack_segment_header(head), trailer)


class Use(NamedTuple):
    """A use of a slot: who began it, for which queue, and whether it was sealed."""

    stamp: Stamp
    queue: int  # or record.EMPTY
    trailer: Trailer | None  # None: it is not sealed
    has_header: bool = True


def last_use(pages: Pages, slot: int, ends: Ends, store: int, namespace: int | None) -> Use | None:
    """The store's last use of the slot; None if what lies there is not the store's. If a footer is of a later use than
    the header, either the header's write was lost, or the footer went astray: the footer's records tell."""
    header, trailer = ends.header, ends.trailer
    if header is not None and (header.slot, header.stamp.store) != (slot, store):
        header = None
    if trailer is not None and trailer.stamp.store != store:
        trailer = None
    is_later = trailer is not None and (header is None or trailer.stamp.generation > header.stamp.generation)
    if trailer is not None and is_later and _has_records(pages, trailer, ends.tail, namespace):
        return Use(trailer.stamp, Queue.MAIN, trailer, has_header=False)
    if header is None:
        return None
    is_sealed = trailer is not None and trailer.stamp == header.stamp
    return Use(header.stamp, header.queue, trailer if is_sealed else None)


def _has_records(pages: Pages, trailer: Trailer, tail: memoryview, namespace: int | None) -> bool:
    """Whether a footer belongs to the segment that it is in: one of its first records is there."""
    table = read_table(pages, trailer, tail)
    return table is not None and any(
        record.unpack_record_header(pages.read(page), stamp=trailer.stamp, page_number=page, namespace=namespace)
        for page in probes(table, trailer)
    )


def probes(table: memoryview, trailer: Trailer) -> list[int]:
    """The pages of a footer's first records."""
    count = min(PROBES, trailer.table_bytes // ENTRY_BYTES)
    return [record.unpack_entry(table, number).page for number in range(count)]


def read_table(pages: Pages, trailer: Trailer, tail: memoryview = _NO_TAIL) -> memoryview | None:
    """The packed entries of a sealed segment, of which the `tail` was read before; None if they are damaged."""
    start = trailer.offset - (pages.segment_bytes - len(tail))
    if start < 0:
        first = trailer.offset // PAGE_BYTES
        tail, start = pages.read(first, len(pages) - first), 0
    table = tail[start : start + trailer.table_bytes]
    return table if crc32c(table) == trailer.crc else None


class Scanned(NamedTuple):
    """A page at which a record may begin."""

    number: int
    entry: Entry | None  # None: there is no record's header
    intact: bool  # the payload is sound, too


def scan(content: memoryview, stamp: Stamp, namespace: int | None) -> Iterator[Scanned]:
    """The records of a segment without a footer. After an intact one the next begins where it ends."""
    number, trailer = 1, len(content) // PAGE_BYTES - 1
    while number < trailer:
        page = content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
        entry = record.unpack_record_header(page, stamp=stamp, page_number=number, namespace=namespace)
        intact = False
        if entry is not None:
            payload = content[entry.payload_offset : entry.payload_offset + entry.length]
            intact = len(payload) == entry.length and crc32c(payload) == entry.crc
        yield Scanned(number, entry, intact)
        number += record.record_bytes(entry.length) // PAGE_BYTES if entry is not None and intact else 1


def scan_table(pages: Pages, stamp: Stamp, namespace: int) -> tuple[bytearray, int]:
    """The packed entries of the intact records, and the page after the last. Holds the whole segment in memory."""
    table, end = bytearray(), 1
    for number, entry, intact in scan(pages.read(0, len(pages)), stamp, namespace):
        if entry is not None and intact:
            table += record.pack_entry(entry)
            end = number + record.record_bytes(entry.length) // PAGE_BYTES
    return table, end
