"""What lies on disk, byte by byte. Pure packing and checking: no file is opened here.

A segment is a preallocated file, everything in it aligned to a page of 4 KiB:

    | segment header, 1 page | record | record | ... | free | entries | trailer, 1 page |

A record is a header page and its payload, padded to a page. The entries and the trailer are the footer, written when
the segment is sealed; an entry repeats what the record's header says.

Every header carries a `Stamp`: the store's random id, so that no payload can be crafted to look like a header, and the
generation, which grows with every reuse of a slot, so that what an earlier use left behind is never taken for a record.

The segment header's page also holds the read marks: which values were read, so that eviction knows it after a restart.
They are a hint, written over in place and never synced. They lie outside the first 512 bytes, so a torn write of the
page does not harm the header.
"""

import operator
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
from crc32c import crc32c

from kvstore.keys import KEY_BYTES, KEY_VERSION

PAGE_BYTES = 4096
VERSION = 1

_SEGMENT = struct.Struct("<8sHHIQQQ")  # magic, version, queue, slot, store, generation, segment bytes
_SEGMENT_MAGIC = b"KVTIERSG"
_MARKS_AT = 512  # of the segment header's page
# Store, generation, turn, entries crc, a bit for each value.
_MARKS = struct.Struct(f"<QQQI{PAGE_BYTES - _MARKS_AT - 32}s")
EMPTY = 0xFFFF  # in place of the queue: nothing is in the segment, and what looks like records is of an earlier use
_TRAILER = struct.Struct("<8sHxxIQQQI")  # magic, version, entry count, store, generation, entries offset, entries crc
_TRAILER_MAGIC = b"KVTIERFT"
_ENTRY = struct.Struct(f"<{KEY_BYTES}sQQIIIHBx")
ENTRY_BYTES = _ENTRY.size
# Of an entry, one field alone.
_KEY = struct.Struct(f"<{KEY_BYTES}s{_ENTRY.size - KEY_BYTES}x")
_LENGTH = struct.Struct(f"<{KEY_BYTES + 20}xI8x")
_KEY_VERSION_AT = KEY_BYTES + 30
_FIRST_KEY_VERSION = 1  # of entries that do not say: before release 0.2 a zero stood there
_first: Callable[[tuple[Any, ...]], Any] = operator.itemgetter(0)
# Of an entry, what routers are told.
ANNOUNCED = np.dtype(
    {
        "names": ["router_hash", "fingerprint"],
        "formats": ["<u8", "<u8"],
        "offsets": [KEY_BYTES, KEY_BYTES + 8],
        "itemsize": ENTRY_BYTES,
    }
)
Announced: TypeAlias = npt.NDArray[np.void]
_RECORD = struct.Struct(f"<8sHxxIQQQ{ENTRY_BYTES}s")  # magic, version, header bytes, store, generation, namespace
_RECORD_MAGIC = b"KVTIERRC"
_CRC = struct.Struct("<I")


class Entry(NamedTuple):
    """One stored chunk: what a target must know of it besides the payload."""

    key: bytes
    router_hash: int  # 0: not announced to routers
    fingerprint: int
    page: int  # of the record's header, counted from the start of the segment
    length: int  # payload bytes
    crc: int  # crc32c of the payload
    blocks_per_chunk: int
    key_version: int = KEY_VERSION  # 1 to 255

    @property
    def payload_offset(self) -> int:
        return (self.page + 1) * PAGE_BYTES


class Stamp(NamedTuple):
    """Whose header it is: of which store (a random 64-bit id) and of which use of the segment's slot."""

    store: int
    generation: int


@dataclass(frozen=True)
class SegmentHeader:
    slot: int
    stamp: Stamp
    segment_bytes: int
    queue: int  # of eviction.py, where writing goes on after a restart; or EMPTY


class Marks(NamedTuple):
    """What eviction knows of a sealed segment."""

    turn: int
    were_read: bytes  # a byte for each value, not zero if it was read in this turn


def namespace_id(namespace: str) -> int:
    """A namespace as headers carry it."""
    return xxhash.xxh3_64_intdigest(namespace.encode())


def pages(length: int) -> int:
    return -(-length // PAGE_BYTES)


def record_bytes(length: int) -> int:
    """Space that a payload of `length` bytes takes: its header page and its own pages."""
    return (1 + pages(length)) * PAGE_BYTES


def footer_bytes(entries: int) -> int:
    return (pages(entries * ENTRY_BYTES) + 1) * PAGE_BYTES


def pack_entry(entry: Entry) -> bytes:
    return _ENTRY.pack(*entry)


def unpack_entry(table: bytes | bytearray | memoryview, index: int) -> Entry:
    fields = _ENTRY.unpack_from(table, index * ENTRY_BYTES)
    return Entry._make(fields if fields[-1] else (*fields[:-1], _FIRST_KEY_VERSION))


def entry_length(table: bytes | bytearray | memoryview, index: int) -> int:
    """Of that entry, this alone."""
    length: int = _LENGTH.unpack_from(table, index * ENTRY_BYTES)[0]
    return length


def pack_record_header(entry: Entry, stamp: Stamp, namespace: int) -> bytes:
    return _page(_RECORD.pack(_RECORD_MAGIC, VERSION, PAGE_BYTES, *stamp, namespace, pack_entry(entry)))


def unpack_record_header(
    page: bytes | memoryview, *, stamp: Stamp, page_number: int, namespace: int | None
) -> Entry | None:
    """The entry of a record header, or None if this page is not the header of a record of this very place. With no
    namespace given, any will do."""
    fields = _checked(page, _RECORD)
    if fields is None or fields[:3] != (_RECORD_MAGIC, VERSION, PAGE_BYTES):
        return None
    *_, store, generation, its_namespace, packed = fields
    entry = unpack_entry(packed, 0)
    same_place = Stamp(store, generation) == stamp and entry.page == page_number
    return entry if same_place and namespace in (None, its_namespace) else None


def record_namespace(page: bytes | memoryview, stamps: Collection[Stamp]) -> int | None:
    """The namespace (`namespace_id`) of a record with one of these stamps, or None if this page is not its header."""
    fields = _checked(page, _RECORD)
    if fields is None or fields[:3] != (_RECORD_MAGIC, VERSION, PAGE_BYTES):
        return None
    *_, store, generation, namespace, _ = fields
    return int(namespace) if Stamp(store, generation) in stamps else None


def pack_segment_header(header: SegmentHeader) -> bytes:
    return _page(_SEGMENT.pack(_SEGMENT_MAGIC, VERSION, header.queue, header.slot, *header.stamp, header.segment_bytes))


def pack_marked_header(header: SegmentHeader, marks: Marks, table: bytes | bytearray) -> bytes:
    """The same page with the read marks of the segment's entries, as many of them as fit it: 28,416."""
    bits = np.packbits(np.frombuffer(marks.were_read, np.uint8) != 0, bitorder="little").tobytes()
    fields = _MARKS.pack(*header.stamp, marks.turn, crc32c(table), bits)
    return pack_segment_header(header)[:_MARKS_AT] + fields + _CRC.pack(crc32c(fields))


def unpack_marks(page: bytes | memoryview, trailer: "Trailer") -> Marks | None:
    """The read marks on a segment header's page, or None if they are not those of the entries under this trailer."""
    fields = _checked(page[_MARKS_AT:], _MARKS)
    if fields is None or (Stamp(*fields[:2]), fields[3]) != (trailer.stamp, trailer.crc):
        return None
    bits = np.frombuffer(fields[4], np.uint8)
    return Marks(fields[2], np.unpackbits(bits, bitorder="little").tobytes()[: trailer.table_bytes // ENTRY_BYTES])


def unpack_segment_header(page: bytes | memoryview) -> SegmentHeader | None:
    fields = _checked(page, _SEGMENT)
    if fields is None or fields[:2] != (_SEGMENT_MAGIC, VERSION):
        return None
    _, _, queue, slot, store, generation, segment_bytes = fields
    return SegmentHeader(slot, Stamp(store, generation), segment_bytes, queue)


def pack_footer(table: bytes | bytearray, stamp: Stamp, segment_bytes: int) -> tuple[int, bytes]:
    """Offset of the footer in its segment, and its bytes: the entries, then the trailer in the last page."""
    count = len(table) // ENTRY_BYTES
    offset = segment_bytes - footer_bytes(count)
    trailer = _page(_TRAILER.pack(_TRAILER_MAGIC, VERSION, count, *stamp, offset, crc32c(table)))
    return offset, bytes(table).ljust(segment_bytes - offset - PAGE_BYTES, b"\0") + trailer


class Trailer(NamedTuple):
    """The end of a sealed segment: where its entries lie, and their checksum."""

    stamp: Stamp
    offset: int
    table_bytes: int
    crc: int


def unpack_trailer(page: bytes | memoryview, segment_bytes: int) -> Trailer | None:
    fields = _checked(page, _TRAILER)
    if fields is None or fields[:2] != (_TRAILER_MAGIC, VERSION):
        return None
    _, _, count, store, generation, offset, crc = fields
    if offset != segment_bytes - footer_bytes(count):
        return None
    return Trailer(Stamp(store, generation), offset, count * ENTRY_BYTES, crc)


def keys(table: bytes | bytearray) -> Iterator[bytes]:
    """The keys of a table's entries, at a tenth of what unpacking all of them takes."""
    return map(_first, _KEY.iter_unpack(table))


def announced(table: bytes) -> Announced:
    """The table's entries as `ANNOUNCED`."""
    return np.frombuffer(table, ANNOUNCED)


def lengths(table: bytes | bytearray) -> Iterator[int]:
    """The payload lengths of a table's entries."""
    return map(_first, _LENGTH.iter_unpack(table))


def key_versions(table: bytes | bytearray) -> bytes:
    """The key versions of a table's entries, a byte each."""
    return bytes(table[_KEY_VERSION_AT::ENTRY_BYTES]).replace(b"\0", bytes([_FIRST_KEY_VERSION]))


def _page(fields: bytes) -> bytes:
    return (fields + _CRC.pack(crc32c(fields))).ljust(PAGE_BYTES, b"\0")


def _checked(page: bytes | memoryview, layout: struct.Struct) -> tuple[Any, ...] | None:
    if len(page) < layout.size + _CRC.size:
        return None
    (crc,) = _CRC.unpack_from(page, layout.size)
    return layout.unpack_from(page) if crc == crc32c(page[: layout.size]) else None
