"""The log: a bounded map that survives anything but a lie, and never serves a wrong byte."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.disk.files import Files
from kvstore.disk.log import Log
from kvstore.disk.record import PAGE_BYTES, Entry
from kvstore.errors import ConfigError
from tests.conftest import MIB, append, key, payload, read

SEGMENT = MIB


def make(folder: Path, *, capacity: int = 8 * SEGMENT, files: Files | None = None) -> Log:
    return Log(folder, capacity, segment_bytes=SEGMENT, files=files)


def test_what_was_put_is_read_and_bounded(tmp_path: Path) -> None:
    log = make(tmp_path)
    for number in range(200):
        assert append(log, number)
    held = [number for number in range(200) if read(log, number) is not None]
    assert all(read(log, number) == payload(number) for number in held)
    # Whole segments, oldest first; one segment is kept empty ahead of the writer.
    assert held == list(range(held[0], 200))
    assert 5 * SEGMENT <= log.stats.payload_bytes <= 8 * SEGMENT
    assert sum(path.stat().st_size for path in tmp_path.glob("segment-*")) <= 8 * SEGMENT
    log.close()


def test_a_restart_finds_everything_and_a_later_epoch(tmp_path: Path) -> None:
    log = make(tmp_path)
    for number in range(30):
        append(log, number)
    before = sorted(log.entries())
    log.close()
    again = make(tmp_path)
    assert sorted(again.entries()) == before
    assert again.epoch == log.epoch + 1
    assert all(read(again, number) == payload(number) for number in range(30))
    assert append(again, 30)
    again.close()


def test_putting_twice_stores_once(tmp_path: Path) -> None:
    log = make(tmp_path)
    assert append(log, 1)
    assert append(log, 1)
    assert log.stats.entries == 1
    log.close()


@pytest.mark.parametrize("length", [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 300_000])
def test_every_length_fits_its_pages(tmp_path: Path, length: int) -> None:
    log = make(tmp_path)
    assert append(log, 1, length)
    assert append(log, 2, length)
    assert read(log, 1) == payload(1, length)
    log.close()
    again = make(tmp_path)
    assert read(again, 2) == payload(2, length)
    again.close()


def test_the_largest_value_fits_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    log = make(tmp_path)
    assert append(log, 1, log.value_bytes_max)
    assert read(log, 1) == payload(1, log.value_bytes_max)
    assert not append(log, 2, log.value_bytes_max + 1)
    log.close()


def test_a_flipped_byte_is_never_served(tmp_path: Path) -> None:
    log = make(tmp_path)
    append(log, 1)
    append(log, 2)
    entry = log.find(key(1))
    assert entry is not None
    place = entry.payload_offset + 5000
    with next(tmp_path.glob("segment-*")).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert read(log, 1) == b""  # found corrupt,
    assert read(log, 1) is None  # and forgotten
    assert log.stats.corrupt_entries == 1
    assert read(log, 2) == payload(2)
    assert append(log, 1)
    assert read(log, 1) == payload(1)
    log.close()


def test_chunks_that_are_used_outlive_a_scan(tmp_path: Path) -> None:
    """Few of each segment: too few to keep the segments, so they are written again, and lie together from then on."""
    log = make(tmp_path, capacity=24 * SEGMENT)
    for number in range(150):
        append(log, number)
    hot = range(0, 150, 30)
    scanned = range(1000, 1800)
    for number in scanned:
        assert append(log, number)
        if number % 10 == 0:
            for one in hot:
                log.used(key(one))
    assert all(read(log, one) == payload(one) for one in hot)
    assert log.stats.rewritten_bytes
    assert sum(key(number) in log for number in scanned) < len(scanned) / 3  # the control: the others went
    log.close()
    again = make(tmp_path, capacity=24 * SEGMENT)
    assert all(read(again, one) == payload(one) for one in hot)
    again.close()


def test_what_moves_while_a_snapshot_is_made_is_in_it(tmp_path: Path) -> None:
    log = make(tmp_path, capacity=24 * SEGMENT)
    for number in range(150):
        append(log, number)
    kept = range(0, 150, 30)
    parts = log.announced(4)
    found: set[int] = set()
    for number in range(1000, 1800):
        append(log, number)
        if number % 10 == 0:
            for one in kept:
                log.used(key(one))
            found |= {int(one) for part in itertools.islice(parts, 1) for one in part["router_hash"]}
    assert log.stats.rewritten_bytes
    found |= {int(one) for part in parts for one in part["router_hash"]}
    assert {entry.router_hash for one in kept if (entry := log.find(key(one)))} <= found
    assert all(key(one) in log for one in kept)
    log.close()


def test_a_place_that_is_read_is_not_reused(tmp_path: Path) -> None:
    """A reader that takes its time still gets the chunk, though it was evicted meanwhile."""

    class SlowFiles(Files):
        slow = False
        begun, go_on = threading.Event(), threading.Event()

        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            if self.slow:
                self.slow = False
                self.begun.set()
                assert self.go_on.wait(20)
            super().read(fd, into, offset)

    files = SlowFiles()
    log = make(tmp_path, capacity=4 * SEGMENT, files=files)
    append(log, 0)
    files.slow = True
    got: list[bytes | None] = []
    reader = threading.Thread(target=lambda: got.append(read(log, 0)))
    reader.start()
    assert files.begun.wait(20)
    number = 0
    while key(0) in log or number < 60:
        number += 1
        assert append(log, number)
    files.go_on.set()
    reader.join()
    assert got == [payload(0)]
    log.close()


WRITER = """
import sys
from pathlib import Path
from kvstore.disk.log import Log
from tests.conftest import append
log = Log(Path(sys.argv[1]), 8 << 20, segment_bytes=1 << 20)
number = int(sys.argv[2])
while True:
    assert append(log, number)
    print(number, flush=True)
    number += 1
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    next_number = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(next_number)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline())]
        time.sleep(chance.uniform(0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        log = make(tmp_path)
        # All but what the ring has dropped since: the last six segments hold at least 40 of these.
        for number in acknowledged[-40:]:
            assert read(log, number) == payload(number)
        for entry in log.entries():
            number = int.from_bytes(entry.key, "big")
            assert read(log, number) == payload(number)
        log.close()
        next_number = acknowledged[-1] + 2


def test_a_torn_record_is_passed_over(tmp_path: Path) -> None:
    """The scan goes on behind a record whose payload never arrived."""
    log = make(tmp_path)
    for number in range(5):
        append(log, number)
    entry = log.find(key(2))
    assert entry is not None
    place = entry.payload_offset
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for path in tmp_path.glob("s*"):
        (crashed / path.name).write_bytes(path.read_bytes())
    with next(crashed.glob("segment-*")).open("r+b") as file:
        file.seek(place)
        file.write(bytes(50_000))
    again = make(crashed)
    assert [read(again, number) is not None for number in range(5)] == [True, True, False, True, True]
    assert append(again, 9)
    assert read(again, 4) == payload(4)
    again.close()
    log.close()


def test_a_damaged_footer_is_replaced_by_a_scan(tmp_path: Path) -> None:
    log = make(tmp_path)
    for number in range(5):
        append(log, number)
    log.close()
    with next(tmp_path.glob("segment-*")).open("r+b") as file:
        file.seek(SEGMENT - 2 * PAGE_BYTES)  # the entries, in front of the trailer
        file.write(b"nonsense")
    again = make(tmp_path)
    assert all(read(again, number) == payload(number) for number in range(5))
    again.close()


class FaultyFiles(Files):
    """Fails, tears, flips, loses and misdirects writes and reads, by a seed."""

    def __init__(self, seed: int, rate: float):
        super().__init__(direct=False)
        self.chance = random.Random(seed)
        self.rate = rate
        self.faults = 0

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        whole = b"".join(bytes(buffer) for buffer in buffers)
        fault = self._draw(["eio", "enospc", "torn", "lost", "misdirected", "flipped"])
        if fault in ("eio", "enospc"):
            raise OSError(fault)
        if fault == "torn":
            whole = whole[: self.chance.randrange(len(whole))]
        elif fault == "flipped":
            place = self.chance.randrange(len(whole))
            whole = whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        elif fault == "misdirected":
            offset = max(0, offset - PAGE_BYTES * self.chance.randrange(1, 4))
        if fault != "lost":
            super().write(fd, [memoryview(whole)], offset)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        fault = self._draw(["eio", "flipped"])
        if fault == "eio":
            raise OSError(fault)
        super().read(fd, into, offset)
        if fault == "flipped":
            part = self.chance.choice(into)
            part[self.chance.randrange(len(part))] ^= 0x04

    def _draw(self, faults: list[str]) -> str:
        if self.chance.random() >= self.rate:
            return ""
        self.faults += 1
        return self.chance.choice(faults)


def test_no_fault_of_the_device_becomes_a_wrong_byte(tmp_path: Path, seed: int) -> None:
    files = FaultyFiles(seed, 0.0)
    log = make(tmp_path, files=files)
    files.rate = 0.1
    chance = random.Random(seed)
    for number in range(400):
        append(log, number, chance.randrange(1, 100_000))
        wanted = chance.randrange(number + 1)
        got = read(log, wanted)
        assert not got or got == payload(wanted, len(got))
    assert files.faults > 30
    files.rate = 0.0
    survivors = {entry.key: entry for entry in log.entries()}
    log._close_files()  # as a crash would: no footer of the newest segment
    again = make(tmp_path)
    for entry in again.entries():
        got = read(again, int.from_bytes(entry.key, "big"))
        assert not got or got == payload(int.from_bytes(entry.key, "big"), entry.length)
    assert survivors
    again.close()


def test_a_full_disk_is_refused_and_the_log_goes_on(tmp_path: Path) -> None:
    class FullDisk(Files):
        full = False

        def open(self, path: Path, size_bytes: int) -> int:
            if self.full:
                raise OSError("no space left on device")
            return super().open(path, size_bytes)

    files = FullDisk()
    log = make(tmp_path, files=files)
    assert append(log, 0)
    files.full = True
    stored = [append(log, number) for number in range(1, 40)]
    assert True in stored
    assert False in stored
    assert read(log, 0) == payload(0)
    files.full = False
    assert append(log, 100)
    log.close()


class Notes:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.visible: set[bytes] = set()

    def stored(self, entry: Entry) -> None:
        assert entry.key not in self.visible
        self.visible.add(entry.key)

    def removed(self, entry: Entry) -> None:
        self.visible.remove(entry.key)


def test_the_observer_hears_of_all_that_comes_and_goes(tmp_path: Path) -> None:
    log = make(tmp_path, capacity=4 * SEGMENT)
    notes = log.observer = Notes()
    for number in range(100):
        append(log, number)
        assert notes.visible == {entry.key for entry in log.entries()}
        hashes = {entry.router_hash for entry in log.entries()}
        assert {int(one) for part in log.announced(3) for one in part["router_hash"]} == hashes
    log.close()


@pytest.mark.parametrize(
    ("capacity", "segment", "says"),
    [
        (MIB, MIB, "capacity: '1.0 MiB' given, expected at least two segments of 1.0 MiB"),
        (64 * MIB, 1000, "segment-size: '1000' given"),
        (1 << 50, None, "capacity: '1.0 PiB' given, expected at most"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, capacity: int, segment: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Log(tmp_path, capacity, segment_bytes=segment)


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a directory that exists"):
        make(tmp_path / "nowhere")
    log = make(tmp_path)
    with pytest.raises(ConfigError, match="no other target is using"):
        make(tmp_path)
    log.close()
    with pytest.raises(ConfigError, match="with which this store was made"):
        Log(tmp_path, 8 * MIB, segment_bytes=2 * MIB)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"store\.json is readable"):
        make(tmp_path)


def test_what_is_live_is_what_the_index_points_to(tmp_path: Path, seed: int) -> None:
    """Through eviction with values written again, corruption, a crash and a restart."""

    def check(log: Log) -> None:
        for segment in log._segments.values():
            numbers = [log._index.get(segment.entry(number).key) for number in range(len(segment))]
            expected = [where == segment.slot << 24 | number for number, where in enumerate(numbers)]
            assert list(map(bool, segment.live)) == expected
        told = [name for part in log.announced(7) for name in part["router_hash"].tolist()]
        assert sorted(told) == sorted(entry.router_hash for entry in log.entries())

    chance = random.Random(seed)
    log = make(tmp_path, capacity=12 * SEGMENT)
    for number in range(300):
        append(log, number, chance.randrange(50_000, 150_000))
        for _ in range(3):
            read(log, chance.randrange(max(0, number - 60), number + 1))
        if number % 40 == 20 and (entry := log.find(key(number - 1))) is not None:
            log._forget(log._segments[log._index[entry.key] >> 24], entry)
        if number % 50 == 0:
            check(log)
    assert log.stats.rewritten_bytes
    check(log)
    log._close_files()
    again = make(tmp_path, capacity=12 * SEGMENT)
    check(again)
    again.close()
