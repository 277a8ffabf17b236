"""Which version of the key a value has, from a client's put to the disk and back; and stores that do not say."""

import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from crc32c import crc32c

import kvstore.__main__ as command
from kvstore.disk import record
from kvstore.disk.log import Log
from kvstore.disk.record import PAGE_BYTES
from kvstore.errors import run_command
from kvstore.keys import KEY_VERSION
from kvstore.net import transport, wire
from kvstore.net.wire import Header, Op, Outcome, ProtocolError
from tests.conftest import MIB, RunningTarget, append, item, key, payload, read, soon, value

SEGMENT = MIB
LENGTH = 100_000
SLOTS = 12  # enough for eviction to write values again
STORE = 0x0123456789ABCDEF

# ---- the format of release 0.1, written out: nothing below is taken from kvstore.disk

OLD_SEGMENT = struct.Struct("<8sHHIQQQ")
OLD_RECORD = struct.Struct("<8sHxxIQQQ")
OLD_ENTRY = struct.Struct("<16sQQIIIHxx")
OLD_TRAILER = struct.Struct("<8sHxxIQQQI")
OLD_NAMESPACE = 0x6C5B964D9473AC1A  # xxh3-64 of "default"
RECORD_PAGES = 1 + -(-LENGTH // PAGE_BYTES)
RECORDS_MAX = (SEGMENT // PAGE_BYTES - 3) // RECORD_PAGES


def old_page(fields: bytes) -> bytes:
    return (fields + struct.pack("<I", crc32c(fields))).ljust(PAGE_BYTES, b"\0")


def old_entry(number: int, page: int) -> bytes:
    return OLD_ENTRY.pack(key(number), number + 1, 7, page, LENGTH, crc32c(payload(number)), 2)


def old_segment(slot: int, generation: int, numbers: Iterable[int], *, sealed: bool) -> bytes:
    """A segment with some chunks, each filled as `conftest.value` does."""
    content = bytearray(SEGMENT)
    header = OLD_SEGMENT.pack(b"KVTIERSG", 1, 0, slot, STORE, generation, SEGMENT)
    content[:PAGE_BYTES] = old_page(header)
    table = b""
    for index, number in enumerate(numbers):
        page = 1 + index * RECORD_PAGES
        entry = old_entry(number, page)
        header = OLD_RECORD.pack(b"KVTIERRC", 1, PAGE_BYTES, STORE, generation, OLD_NAMESPACE) + entry
        start = page * PAGE_BYTES
        content[start : start + PAGE_BYTES] = old_page(header)
        content[start + PAGE_BYTES : start + PAGE_BYTES + LENGTH] = payload(number)
        table += entry
    if sealed:
        offset = SEGMENT - 2 * PAGE_BYTES
        trailer = OLD_TRAILER.pack(b"KVTIERFT", 1, len(table) // 48, STORE, generation, offset, crc32c(table))
        content[offset:] = table.ljust(PAGE_BYTES, b"\0") + old_page(trailer)
    return bytes(content)


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A directory that a target of release 0.1 left when it was killed: chunks 0 to 17 in two sealed segments, 18 to 21
    in one that was open."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "store.json").write_text(json.dumps({"version": 1, "store": STORE, "segment_bytes": SEGMENT, "epoch": 3}))
    numbers = (range(RECORDS_MAX), range(RECORDS_MAX, 2 * RECORDS_MAX), range(18, 22))
    assert RECORDS_MAX == 9
    for slot, some in enumerate(numbers):
        content = old_segment(slot, slot + 1, some, sealed=slot < 2)
        (folder / f"segment-{slot:06d}.kvt").write_bytes(content)
    return folder


OLD = range(22)


def make(folder: Path) -> Log:
    return Log(folder, SLOTS * SEGMENT, segment_bytes=SEGMENT)


def versions(log: Log) -> dict[int, set[int]]:
    """The number of each visible chunk, by the version of its key; the log's own count must say the same."""
    found: dict[int, set[int]] = {}
    for entry in log.entries():
        found.setdefault(entry.key_version, set()).add(int.from_bytes(entry.key, "big"))
    assert log.key_versions() == Counter({version: len(numbers) for version, numbers in found.items()})
    return found


# ---- on disk


def test_the_key_version_takes_no_space_of_other_fields() -> None:
    """Headers of today are those of release 0.1 but for one byte of padding."""
    entry = record.Entry(key(1), 2, 7, 1, LENGTH, 5, 2, key_version=9)
    packed = record.pack_entry(entry)
    old = OLD_ENTRY.pack(key(1), 2, 7, 1, LENGTH, 5, 2)
    assert packed == old[:46] + b"\x09" + old[47:]
    assert OLD_ENTRY.unpack(packed) == entry[:7]  # as release 0.1 reads it
    assert record.unpack_entry(packed, 0) == entry
    assert record.unpack_entry(old, 0) == entry._replace(key_version=1)
    assert record.key_versions(packed + old) == b"\x09\x01"


def test_a_store_of_release_02_opens_and_serves(old_store: Path) -> None:
    log = make(old_store)
    assert log.epoch == 4
    assert versions(log) == {1: set(OLD)}
    assert all(read(log, number) == payload(number) for number in OLD)
    assert append(log, 3)  # it is there
    assert append(log, 100)
    assert versions(log) == {1: set(OLD), KEY_VERSION: {100}}
    log.close()
    again = make(old_store)
    assert versions(again) == {1: set(OLD), KEY_VERSION: {100}}
    assert all(read(again, number) == payload(number) for number in (*OLD, 100))
    again.close()


def test_new_values_join_old_ones_in_the_segment_that_was_open(old_store: Path) -> None:
    log = make(old_store)
    assert append(log, 100)
    log._close_files()  # as a crash would: the segment is scanned at the next start
    again = make(old_store)
    entry, neighbour = again.find(key(100)), again.find(key(21))
    assert entry is not None
    assert neighbour is not None
    assert entry.page == neighbour.page + RECORD_PAGES
    assert (neighbour.key_version, entry.key_version) == (1, KEY_VERSION)
    assert versions(again) == {1: set(OLD), KEY_VERSION: {100}}
    again.close()


def test_old_values_are_evicted_like_any_other(old_store: Path) -> None:
    log = make(old_store)
    for number in range(1000, 1400):
        assert append(log, number)
    assert versions(log).keys() == {KEY_VERSION}
    assert not any(key(number) in log for number in OLD)
    assert all(log.was_evicted(key(number)) for number in OLD)
    log.close()
    again = make(old_store)
    assert versions(again).keys() == {KEY_VERSION}
    again.close()


def test_values_that_are_written_again_keep_their_key_version(old_store: Path) -> None:
    log = make(old_store)
    old, new = 4, 1000
    before = log.find(key(old))
    for number in range(1000, 1400):
        assert append(log, number)
        for one in (old, new):
            log.used(key(one))
    assert log.stats.rewritten_bytes
    after = log.find(key(old))
    assert before is not None
    assert after is not None
    assert before != after
    found = versions(log)
    assert found[1] == {old}
    assert new in found[KEY_VERSION]
    assert all(read(log, one) == payload(one) for one in (old, new))
    log.close()
    again = make(old_store)
    assert versions(again) == found
    again.close()


def test_a_key_that_is_in_two_segments_is_counted_once(old_store: Path) -> None:
    """As after a crash in the middle of a rewrite."""
    content = old_segment(3, 4, [2, 18, 50], sealed=True)
    (old_store / "segment-000003.kvt").write_bytes(content)
    log = make(old_store)
    assert versions(log) == {1: {*OLD, 50}}
    assert log.stats.payload_bytes == 23 * LENGTH
    log.close()


def test_what_is_found_corrupt_is_not_counted(old_store: Path) -> None:
    with (old_store / "segment-000000.kvt").open("r+b") as file:
        file.seek(2 * PAGE_BYTES)
        file.write(b"nonsense")
    log = make(old_store)
    assert read(log, 0) == b""
    assert versions(log) == {1: set(OLD) - {0}}
    assert log.append([value(0)._replace(key_version=5)]) == [True]
    assert versions(log) == {1: set(OLD) - {0}, 5: {0}}
    log.close()


# ---- on the wire


class OldPutItem(msgspec.Struct, array_like=True, frozen=True):
    """As release 0.1 has it."""

    key: bytes
    length: int
    crc: int
    router_hash: int
    fingerprint: int
    blocks_per_chunk: int
    saved_us: int = 0


class OldPut(msgspec.Struct, array_like=True, frozen=True):
    items: list[OldPutItem]


def test_puts_of_release_02_decode_and_its_targets_decode_ours() -> None:
    old = OldPutItem(key(1), LENGTH, 5, 2, 7, 2, 9)
    raw = msgspec.msgpack.encode(OldPut([old]))
    (ours,) = wire.decode_control(raw, wire.Put).items
    assert ours == wire.PutItem(key(1), LENGTH, 5, 2, 7, 2, 9, key_version=1, position=0, parent=0)
    raw = msgspec.msgpack.encode(wire.Put([wire.PutItem(key(1), LENGTH, 5, 2, 7, 2, 9, 2, position=3, parent=8)]))
    assert msgspec.msgpack.decode(raw, type=OldPut) == OldPut([old])


@pytest.mark.parametrize("version", [0, 256])
def test_a_key_version_out_of_bounds_is_refused(version: int) -> None:
    raw = msgspec.msgpack.encode(wire.Put([wire.PutItem(key(1), 1, 1, 1, 1, 1, 0, version)]))
    with pytest.raises(ProtocolError, match="Expected `int`"):
        wire.decode_control(raw, wire.Put)


def test_the_longest_put_fits_its_control_part() -> None:
    u32, u64 = 2**32 - 1, 2**64 - 1
    item = wire.PutItem(b"\xff" * 16, wire.VALUE_BYTES_MAX, u32, u64, u64, 2**16 - 1, u32, 255, u32, u64)
    assert len(msgspec.msgpack.encode(wire.Put([item] * wire.KEYS_MAX))) <= 80 * wire.KEYS_MAX
    assert 80 * wire.KEYS_MAX <= wire.CONTROL_BYTES_MAX


def put_as_release_02(target: RunningTarget, number: int) -> list[Outcome]:
    stream = transport.connect(target.address, soon())
    stream.send([wire.encode(Header(Op.HELLO), wire.Hello("default", "old", "another host"))], soon())
    stream.receive_control(stream.receive_header(soon()), soon())
    content = payload(number)
    described = OldPut([OldPutItem(key(number), LENGTH, crc32c(content), number + 1, 7, 2)])
    stream.send([wire.encode(Header(Op.PUT, 1, data_bytes=LENGTH), described), content], soon())
    header = stream.receive_header(soon())
    outcomes = wire.decode_control(stream.receive_control(header, soon()), wire.Outcomes).outcomes
    stream.close()
    return outcomes


@pytest.fixture
def mixed(start_target: Callable[..., RunningTarget]) -> RunningTarget:
    """A target with chunk 0 of an old client, 1 and 2 of one of today, 3 of one to come."""
    target = start_target()
    assert put_as_release_02(target, 0) == [Outcome.STORED]
    client = target.client()
    items = [item(1), item(2), item(3)._replace(key_version=7)]
    assert client.put(items, soon()) == [Outcome.STORED] * 3
    client.close()
    return target


def test_a_put_carries_its_key_version_to_the_disk(mixed: RunningTarget) -> None:
    assert item(1).key_version == KEY_VERSION
    assert versions(mixed.log) == {1: {0}, KEY_VERSION: {1, 2}, 7: {3}}
    folder = mixed.log.path
    mixed.target.stop()
    mixed.log.close()
    log = Log(folder, 64 * MIB, segment_bytes=4 * MIB)
    assert versions(log) == {1: {0}, KEY_VERSION: {1, 2}, 7: {3}}
    log.close()


# ---- what operators see


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command("kvstore", lambda: command.main([str(argument) for argument in arguments]))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_stat_tells_key_versions(mixed: RunningTarget, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "stat", mixed.address)
    (line,) = [line for line in said.splitlines() if line.startswith("chunks by key version")]
    assert line.endswith("  v1 1, v2 2, v7 1")
    (look,) = map(json.loads, run(capsys, "stat", mixed.address, "--json").splitlines())
    assert look["targets"][mixed.address]["key_versions"] == {"1": 1, "2": 2, "7": 1}


def test_stat_shows_no_key_versions_where_all_are_of_today(
    start_target: Callable[..., RunningTarget], capsys: pytest.CaptureFixture[str]
) -> None:
    target = start_target()
    client = target.client()
    assert client.put([item(1)], soon()) == [Outcome.STORED]
    assert "chunks by key version" not in run(capsys, "stat", target.address)
    assert client.stat(time.monotonic() + 5)[target.address].key_versions == {KEY_VERSION: 1}
    client.close()


def test_a_status_of_release_02_decodes(mixed: RunningTarget) -> None:
    status: dict[str, Any] = msgspec.to_builtins(mixed.target.status())
    del status["key_versions"]
    assert wire.decode_control(msgspec.msgpack.encode(status), wire.Status).key_versions == {}


def test_verify_tells_key_versions(old_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "verify", "--dir", old_store)
    assert said.startswith(str(old_store))
    assert "sound: 3 segments, 22 chunks, 0 superseded, 0 cut off" in said
    assert said.rstrip().endswith("; chunks by key version: v1 22")
    log = make(old_store)
    assert append(log, 100)
    log.close()
    *reports, last = map(json.loads, run(capsys, "verify", "--dir", old_store, "--json").splitlines())
    assert last["total"]["key_versions"] == {"1": 22, "2": 1}
    assert {report["segment"]: report["key_versions"] for report in reports} == {
        0: {"1": 9},
        1: {"1": 9},
        2: {"1": 4, "2": 1},
    }


def test_a_footer_that_release_02_wrote_for_new_records_is_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after going back to release 0.1 and forth: what it scanned it sealed without key versions."""
    log = Log(tmp_path, 4 * SEGMENT, segment_bytes=SEGMENT)
    assert append(log, 1)
    (head,) = log._heads.values()
    head.table[46::48] = b"\0"
    log.close()
    said = run(capsys, "verify", "--dir", tmp_path)
    assert said.startswith(str(tmp_path))
    assert said.rstrip().endswith("; chunks by key version: v1 1")
