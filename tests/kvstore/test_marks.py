"""Read marks: a target that starts again knows which chunks were read, and never trusts a mark that is not its own."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c

from kvstore.disk import log as log_module
from kvstore.disk import record
from kvstore.disk.files import Files
from kvstore.disk.log import Log
from kvstore.disk.record import PAGE_BYTES
from kvstore.disk.space import segment_file
from tests.conftest import MIB, append, key, payload, read

SEGMENT = MIB
SLOTS = 12  # enough for eviction to give a segment another turn
LENGTH = 100_000
IN_SEGMENT = 9
USED = range(2 * IN_SEGMENT)  # the two oldest segments


def make(folder: Path, *, slots: int = SLOTS, files: Files | None = None) -> Log:
    return Log(folder, slots * SEGMENT, segment_bytes=SEGMENT, files=files)


def fill(log: Log, segments: int = SLOTS - 3, first: int = 0) -> None:
    for number in range(first * IN_SEGMENT, (first + segments) * IN_SEGMENT):
        assert append(log, number, LENGTH)


def use(log: Log) -> None:
    for number in USED:
        assert read(log, number) == payload(number, LENGTH)


def kept(log: Log) -> int:
    """How many of the used chunks outlive so many new ones that first in, first out would keep none."""
    fill(log, SLOTS - 5, first=100)
    return sum(key(number) in log for number in USED)


def stopped(folder: Path) -> None:
    """A store whose oldest chunks were read, after an orderly stop."""
    log = make(folder)
    fill(log)
    use(log)
    log.close()


def header_page(folder: Path, slot: int) -> bytes:
    return segment_file(folder, slot).read_bytes()[:PAGE_BYTES]


def write_at(folder: Path, slot: int, offset: int, content: bytes) -> None:
    with segment_file(folder, slot).open("r+b") as file:
        file.seek(offset)
        file.write(content)


def marked_slots(folder: Path) -> list[int]:
    return [slot for slot in range(SLOTS - 3) if any(header_page(folder, slot)[512:])]


def test_what_was_read_before_an_orderly_stop_outlives_a_scan_after_it(tmp_path: Path) -> None:
    stopped(tmp_path)
    log = make(tmp_path)
    assert kept(log) == len(USED)
    log.close()


def test_a_store_without_marks_evicts_first_in_first_out(tmp_path: Path) -> None:
    """The control: as after a release that kept none."""
    stopped(tmp_path)
    for slot in range(SLOTS):
        if segment_file(tmp_path, slot).exists():
            write_at(tmp_path, slot, 512, bytes(PAGE_BYTES - 512))
    log = make(tmp_path)
    assert kept(log) == 0
    log.close()


def test_a_turn_that_was_given_is_not_taken_back(tmp_path: Path) -> None:
    """Another turn sets the marks of a segment to zero. Its place in the line is saved with them."""
    log = make(tmp_path)
    fill(log)
    use(log)
    fill(log, 5, first=100)
    assert all(key(number) in log for number in USED)
    line = list(log._eviction._line)
    log.close()
    again = make(tmp_path)
    assert [slot for slot in again._eviction._line if slot in line] == line
    fill(again, 2, first=200)
    assert all(key(number) in again for number in USED)
    again.close()


def test_only_segments_of_which_something_changed_are_written(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert len(marked_slots(tmp_path)) == 2
    log = make(tmp_path)
    use(log)  # nothing new
    written = log.stats.device_written_bytes
    log._save_marks()
    assert log.stats.device_written_bytes == written
    read(log, 3 * IN_SEGMENT)
    log._save_marks()
    assert log.stats.device_written_bytes == written + PAGE_BYTES
    log.close()


def test_kill_9_loses_at_most_the_marks_since_the_last_time(tmp_path: Path) -> None:
    """The child reads the first segment, saves its marks in time, reads the second and is killed."""
    script = f"""
import sys, time
from pathlib import Path
from kvstore.disk import log as log_module
from tests.kvstore import test_marks as here
log_module.MARKS_SECONDS = 0.05
log = here.make(Path({str(tmp_path)!r}))
here.fill(log)
for number in here.USED[:here.IN_SEGMENT]:
    here.read(log, number)
until = time.monotonic() + 30
while log._eviction.unsaved() and time.monotonic() < until:
    time.sleep(0.01)
log._save_marks = lambda **_: None
for number in here.USED[here.IN_SEGMENT:]:
    here.read(log, number)
print("ready", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    try:
        assert child.stdout.readline() == b"ready\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdin.close()
        child.stdout.close()
    log = make(tmp_path)
    assert len(log) == (SLOTS - 3) * IN_SEGMENT
    fill(log, SLOTS - 5, first=100)
    assert [key(number) in log for number in USED] == [number < IN_SEGMENT for number in USED]
    log.close()


def cut_short(page: bytes) -> bytes:
    """The write that was torn after its first sectors."""
    return page[:1024] + bytes(PAGE_BYTES - 1024)


def flipped(page: bytes) -> bytes:
    return page[:600] + bytes([page[600] ^ 1]) + page[601:]


def of_another_use(page: bytes) -> bytes:
    """Marks under a right checksum, of a generation that is gone."""
    fields = bytearray(page[512:-4])
    struct.pack_into("<Q", fields, 8, 12345)
    return page[:512] + bytes(fields) + struct.pack("<I", crc32c(bytes(fields)))


def of_another_table(page: bytes) -> bytes:
    fields = bytearray(page[512:-4])
    struct.pack_into("<I", fields, 24, 12345)
    return page[:512] + bytes(fields) + struct.pack("<I", crc32c(bytes(fields)))


@pytest.mark.parametrize("damage", [cut_short, flipped, of_another_use, of_another_table])
def test_marks_that_do_not_fit_their_segment_are_ignored(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """And the segment's chunks are all there."""
    stopped(tmp_path)
    for slot in marked_slots(tmp_path):
        write_at(tmp_path, slot, 0, damage(header_page(tmp_path, slot)))
    log = make(tmp_path)
    assert len(log) == (SLOTS - 3) * IN_SEGMENT
    use(log)
    assert log._eviction.unsaved() == marked_slots(tmp_path)  # read for the first time, as far as it knows
    log.close()


def test_a_segment_that_was_scanned_has_no_marks(tmp_path: Path) -> None:
    """Its footer is damaged: its chunks are numbered anew."""
    stopped(tmp_path)
    write_at(tmp_path, 0, SEGMENT - 2 * PAGE_BYTES, b"\xff" * 16)
    write_at(tmp_path, 0, 2 * PAGE_BYTES, b"\xff" * 16)  # the first chunk is lost
    log = make(tmp_path)
    assert (key(0) in log, key(1) in log) == (False, True)
    assert not any(log._eviction._counters[0])
    assert all(log._eviction._counters[1])
    log.close()


def test_a_slot_that_is_used_anew_has_no_marks(tmp_path: Path) -> None:
    stopped(tmp_path)
    log = make(tmp_path)
    with log._changed:
        for slot in range(2):
            log._eviction._counters[slot] = bytearray(IN_SEGMENT)  # in use no more
    fill(log, SLOTS - 5, first=100)
    log.close()
    assert marked_slots(tmp_path) == []


def test_a_wiped_store_and_one_of_another_size_take_what_fits(tmp_path: Path) -> None:
    stopped(tmp_path)
    larger = make(tmp_path, slots=SLOTS + 8)
    assert larger._eviction.unsaved() == []
    use(larger)
    assert larger._eviction.unsaved() == []
    larger.close()
    block = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**block, "store": block["store"] ^ 1}))
    other = make(tmp_path)
    assert len(other) == 0
    assert not other._eviction.unsaved()
    other.close()


def test_more_values_than_a_page_has_bits_for() -> None:
    header = record.SegmentHeader(3, record.Stamp(1, 2), 1 << 30, 0)
    table = bytes(40_000 * record.ENTRY_BYTES)
    page = record.pack_marked_header(header, record.Marks(7, b"\1" * 40_000), table)
    assert len(page) == PAGE_BYTES
    assert record.unpack_segment_header(page) == header
    marks = record.unpack_marks(page, record.Trailer(header.stamp, 0, len(table), crc32c(table)))
    assert marks == record.Marks(7, b"\1" * 28_416)


def test_marks_that_cannot_be_written_cost_nothing_else(tmp_path: Path) -> None:
    class Full(Files):
        fails = False

        def write(self, fd: int, buffers: list[memoryview], offset: int) -> None:  # type: ignore[override]
            if self.fails:
                raise OSError("no")
            super().write(fd, buffers, offset)

    files = Full()
    log = make(tmp_path, files=files)
    fill(log)
    use(log)
    files.fails = True
    log._save_marks()
    files.fails = False
    use(log)
    log.close()


def test_saving_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that is slow, an orderly stop waits for some of the marks."""
    log = make(tmp_path)
    fill(log)
    use(log)
    monkeypatch.setattr(log_module, "_MARKING_SECONDS", -1.0)
    log.close()
    assert marked_slots(tmp_path) == []
    assert os.listdir(tmp_path)


def test_a_release_without_marks_reads_the_same_header() -> None:
    """It checks the first 44 bytes, which marks leave as they are."""
    header = record.SegmentHeader(3, record.Stamp(1, 2), SEGMENT, 1)
    marked = record.pack_marked_header(header, record.Marks(7, b"\1" * 9), bytes(9 * record.ENTRY_BYTES))
    fields = struct.pack("<8sHHIQQQ", b"KVTIERSG", 1, 1, 3, 1, 2, SEGMENT)
    assert marked[:512] == (fields + struct.pack("<I", crc32c(fields))).ljust(512, b"\0")
