"""Forges KV with valid checksums: the control that a comparison of answers must detect. For tests and benchmarks."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

from kvstore.disk import record
from kvstore.disk.record import Entry


class Record(NamedTuple):
    """A chunk in a segment's file."""

    path: Path
    entry: Entry
    header: record.SegmentHeader
    namespace: int


def records(store: Path, namespace: str = "default") -> Iterator[Record]:
    """All records in the files of a target."""
    owner = record.namespace_id(namespace)
    for path in sorted(store.glob("segment-*.kvt")):
        content = memoryview(path.read_bytes())
        header = record.unpack_segment_header(content[: record.PAGE_BYTES])
        if header is None:
            continue
        for number in range(1, len(content) // record.PAGE_BYTES):
            page = content[number * record.PAGE_BYTES : (number + 1) * record.PAGE_BYTES]
            entry = record.unpack_record_header(page, stamp=header.stamp, page_number=number, namespace=owner)
            if entry is not None:
                yield Record(path, entry, header, owner)


def forge(one: Record, number_bytes: int) -> None:
    """Flip the sign of every number of a chunk and fix its checksums. No target may be running. Numbers are
    little-endian floats of `number_bytes`."""
    path, entry, header, owner = one
    with path.open("r+b") as file:
        file.seek(entry.payload_offset)
        payload = bytearray(file.read(entry.length))
        payload[number_bytes - 1 :: number_bytes] = bytes(
            byte ^ 0x80 for byte in payload[number_bytes - 1 :: number_bytes]
        )
        forged = entry._replace(crc=int(crc32c(payload)))
        file.seek(entry.page * record.PAGE_BYTES)
        file.write(record.pack_record_header(forged, header.stamp, owner))
        file.write(payload)
        file.seek(header.segment_bytes - record.PAGE_BYTES)  # remove a footer, which has the old checksum
        file.write(bytes(record.PAGE_BYTES))
