"""The format on disk: what is written reads back, and nothing else is taken for it."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.disk import record
from kvstore.disk.record import PAGE_BYTES, Entry, SegmentHeader, Stamp

ENTRIES = st.builds(
    Entry,
    key=st.binary(min_size=16, max_size=16),
    router_hash=st.integers(0, 2**64 - 1),
    fingerprint=st.integers(0, 2**64 - 1),
    page=st.integers(0, 2**32 - 1),
    length=st.integers(1, 2**26),
    crc=st.integers(0, 2**32 - 1),
    blocks_per_chunk=st.integers(0, 2**16 - 1),
    key_version=st.integers(1, 2**8 - 1),
)
STAMPS = st.builds(Stamp, st.integers(0, 2**63), st.integers(0, 2**63))


@given(ENTRIES, STAMPS, st.integers(0, 2**64 - 1))
def test_a_header_is_found_in_its_place_alone(entry: Entry, stamp: Stamp, namespace: int) -> None:
    page = record.pack_record_header(entry, stamp, namespace)
    assert len(page) == PAGE_BYTES
    right = {"stamp": stamp, "page_number": entry.page, "namespace": namespace}
    assert record.unpack_record_header(page, **right) == entry
    for wrong in (
        {"stamp": stamp._replace(generation=stamp.generation + 1)},
        {"stamp": stamp._replace(store=stamp.store + 1)},
        {"page_number": entry.page + 1},
        {"namespace": namespace ^ 1},
    ):
        assert record.unpack_record_header(page, **{**right, **wrong}) is None


@given(ENTRIES, STAMPS, st.data())
def test_a_flipped_bit_in_a_header_is_noticed(entry: Entry, stamp: Stamp, data: st.DataObject) -> None:
    page = bytearray(record.pack_record_header(entry, stamp, 0))
    used = len(bytes(page).rstrip(b"\0"))
    page[data.draw(st.integers(0, used - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert record.unpack_record_header(bytes(page), stamp=stamp, page_number=entry.page, namespace=0) is None


@given(st.lists(ENTRIES, max_size=200), STAMPS)
def test_a_footer_reads_back(entries: list[Entry], stamp: Stamp) -> None:
    segment_bytes = 1 << 20
    table = b"".join(map(record.pack_entry, entries))
    offset, footer = record.pack_footer(table, stamp, segment_bytes)
    assert offset + len(footer) == segment_bytes
    assert len(footer) == record.footer_bytes(len(entries))
    trailer = record.unpack_trailer(footer[-PAGE_BYTES:], segment_bytes)
    assert trailer is not None
    assert (trailer.stamp, trailer.offset) == (stamp, offset)
    assert [record.unpack_entry(footer[: trailer.table_bytes], number) for number in range(len(entries))] == entries
    assert list(record.keys(table)) == [entry.key for entry in entries]
    assert list(record.lengths(table)) == [entry.length for entry in entries]
    assert list(record.key_versions(table)) == [entry.key_version for entry in entries]
    assert record.unpack_trailer(footer[-PAGE_BYTES:], 2 * segment_bytes) is None


def test_a_segment_header_reads_back() -> None:
    header = SegmentHeader(3, Stamp(5, 7), 1 << 26, 1)
    page = record.pack_segment_header(header)
    assert record.unpack_segment_header(page) == header
    assert record.unpack_segment_header(bytes(PAGE_BYTES)) is None
