"""Where segments lie: directories, devices, several of them; and what a start makes of what a device did to them."""

import errno
import fcntl
import logging
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvstore import descriptors
from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.log import WRITE_AMPLIFICATION_MAX, Log
from kvstore.disk.record import PAGE_BYTES
from kvstore.disk.shelf import Shelf
from kvstore.errors import ConfigError
from kvstore.text import in_units
from tests.conftest import MIB, append, eventually, key, payload, read

KIB = 1 << 10
SEGMENT = MIB
RESERVED = MIB  # of a device, before its first segment


def make_device(folder: Path, size: int = 8 * SEGMENT + RESERVED) -> Path:
    path = folder / "device"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make(path: Path, *, slots: int = 8, files: Files | None = None, sync_seconds: float = 0.0) -> Log:
    reserved = RESERVED if path.is_file() else 0
    capacity = slots * SEGMENT + reserved
    return Log(path, capacity, segment_bytes=SEGMENT, files=files, sync_seconds=sync_seconds)


def crash(log: Log) -> None:
    log._close_files()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def held(log: Log, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if read(log, number) == payload(number)]


# ---- a device


def test_a_device_holds_a_store_over_restarts(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    log = make(device)
    for number in range(20):
        assert append(log, number)
    log.close()
    for epoch in range(2, 6):
        log = make(device)
        assert (log.store_id, log.epoch) == (log.store_id, epoch)
        assert held(log, range(20)) == list(range(20))
        log.close()
    assert device.stat().st_size == 8 * SEGMENT + RESERVED


def test_a_device_is_bounded_and_reused(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    log = make(device)
    for number in range(200):
        assert append(log, number)
    last = held(log, range(200))
    assert last == list(range(last[0], 200))
    assert 40 <= len(last) <= 80
    crash(log)
    log = make(device)
    assert set(last[9:]) <= set(held(log, range(200)))  # recovery may have emptied one more segment
    log.close()


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("starts", [1, 2, 3])
def test_one_damaged_superblock_is_survived(tmp_path: Path, copy: int, starts: int) -> None:
    device = make_device(tmp_path)
    for number in range(starts):
        log = make(device)
        append(log, number)
        log.close()
    overwrite(device, copy * PAGE_BYTES + 20, b"?")
    again = make(device)
    assert again.store_id == log.store_id
    assert held(again, range(starts)) == list(range(starts))
    again.close()
    overwrite(device, 20, b"?")
    overwrite(device, PAGE_BYTES + 20, b"?")
    with pytest.raises(ConfigError, match="a kvtier store or a device that begins with 1 MiB of zeros"):
        make(device)


def test_one_unreadable_superblock_is_survived(tmp_path: Path) -> None:
    class BadPage(Files):
        bad: tuple[int, ...] = ()

        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            if offset in self.bad:
                raise OSError(errno.EIO, "bad page")
            super().read(fd, into, offset)

    device, files = make_device(tmp_path), BadPage()
    log = make(device)
    log.close()
    for files.bad in [(0,), (PAGE_BYTES,)]:
        again = make(device, files=files)
        assert again.store_id == log.store_id
        again.close()
    files.bad = (0, PAGE_BYTES)
    with pytest.raises(ConfigError, match=r"expected a place that can be read and written \(bad page\)"):
        make(device, files=files)


# An MBR's signature, an LVM label, an ext4 superblock, an mdraid superblock, a btrfs superblock.
@pytest.mark.parametrize("offset", [0, 510, 512, 1080, PAGE_BYTES, 64 * KIB + 64])
def test_what_belongs_to_somebody_else_is_left_alone(tmp_path: Path, offset: int) -> None:
    device = make_device(tmp_path)
    overwrite(device, offset, b"not yours")
    before = device.read_bytes()
    with pytest.raises(ConfigError, match="wipe it"):
        make(device)
    assert device.read_bytes() == before


def test_a_device_has_one_user_and_bounds(tmp_path: Path) -> None:
    device = make_device(tmp_path)
    log = make(device)
    with pytest.raises(ConfigError, match="no other target is using"):
        make(device)
    log.close()
    with pytest.raises(ConfigError, match=f"expected at most the {in_units(device.stat().st_size)} of"):
        make(device, slots=9)
    with pytest.raises(ConfigError, match="with which this store was made"):
        Log(device, 8 * MIB, segment_bytes=2 * MIB)
    make(device).close()  # none of these left a lock behind


def test_more_segments_than_open_files_are_refused_and_the_limit_is_raised(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        log = Log(tmp_path, 75 * MIB, segment_bytes=256 * KIB)
        for number in range(290):
            assert append(log, number, 240 * KIB)
        log.close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ConfigError, match="as many open files, and this user may have"):
                Log(tmp_path, hard * 256 * KIB, segment_bytes=256 * KIB)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("asked", "unasked", "each"),
    [(0, 1, 192), (150, 2, 21), (192, 0, 512), (193, 0, None), (191, 2, None)],
)
def test_connections_that_nobody_asked_for_are_as_many_as_fit(
    asked: int, unasked: int, each: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda of: (1024, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda of, limits: None)
    if each is not None:
        assert descriptors.fit("connections", asked, unasked, 512, segments=32) == each
    else:
        with pytest.raises(
            ConfigError, match=f"connections: '{asked + unasked}' given, expected at most 192: each takes"
        ):
            descriptors.fit("connections", asked, unasked, 512, segments=32)


# ---- several of them


def make_shelf(folders: Sequence[Path]) -> Shelf:
    for folder in folders:
        folder.mkdir(exist_ok=True)
    return Shelf([make(folder) for folder in folders])


def fill(shelf: Shelf, numbers: Sequence[int]) -> dict[int, Path]:
    for number in numbers:
        assert append(shelf.of(key(number)), number)
    return {number: shelf.of(key(number)).path for number in numbers}


def test_a_key_lies_in_one_place_whatever_order_they_are_named_in(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    shelf = make_shelf(folders)
    places = fill(shelf, range(90))
    # The stores' ids are random: a fair share is 30, and one below 5 comes about once in ten thousand million runs.
    assert min(Counter(places.values())[folder] for folder in folders) >= 5
    shelf.close()
    again = make_shelf(folders[::-1])
    assert {number: again.of(key(number)).path for number in range(90)} == places
    assert all(key(number) in again for number in range(90))
    assert again.stats().entries == len(again.entries()) == 90
    again.close()


@pytest.mark.parametrize("wiped", [False, True])
def test_a_lost_directory_takes_its_share_alone(tmp_path: Path, wiped: bool) -> None:
    folders = [tmp_path / name for name in "abc"]
    shelf = make_shelf(folders)
    places = fill(shelf, range(90))
    shelf.close()
    shutil.rmtree(folders[1])
    again = make_shelf(folders if wiped else [folders[0], folders[2]])
    there = {number for number in range(90) if read(again.of(key(number)), number) == payload(number)}
    survivors = {number for number, place in places.items() if place != folders[1]}
    # A new store in its place draws a new id, and with it some keys of the others: those are missed, not lost.
    assert there == survivors if not wiped else there <= survivors
    held_at_all = {int.from_bytes(entry.key, "big") for entry in again.entries()}
    assert held_at_all == survivors
    again.close()


# ---- what a start makes of a device's lies


class Meddling(Files):
    """Hands each write to `meddle`, which says whether it is to be done."""

    def __init__(self, meddle: Callable[[bytes, int], bool]):
        super().__init__(direct=False)
        self.meddle = meddle

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        if self.meddle(bytes(buffers[0][:PAGE_BYTES]), offset):
            super().write(fd, buffers, offset)


def test_sealed_segments_do_without_their_headers(tmp_path: Path) -> None:
    """The device loses the write of every segment header but the first few, also of slots that are used again."""
    headers = 0

    def meddle(page: bytes, _: int) -> bool:
        nonlocal headers
        header = record.unpack_segment_header(page)
        headers += header is not None
        return header is None or headers <= 6

    log = make(tmp_path, files=Meddling(meddle))
    for number in range(120):
        assert append(log, number)
    visible = held(log, range(120))
    log.close()
    again = make(tmp_path)
    assert headers > 12
    assert set(visible[9:]) <= set(held(again, range(120)))
    again.close()


def test_a_footer_that_went_astray_hides_nothing(tmp_path: Path) -> None:
    """The device writes the footer of a younger segment over that of an older one."""
    log = make(tmp_path)
    for number in range(30):
        append(log, number)
    log.close()
    older, younger = tmp_path / "segment-000000.kvt", tmp_path / "segment-000002.kvt"
    footer = record.footer_bytes(9)
    overwrite(older, SEGMENT - footer, younger.read_bytes()[SEGMENT - footer :])
    overwrite(younger, SEGMENT - footer, bytes(footer))
    again = make(tmp_path)
    assert held(again, range(30)) == list(range(30))
    again.close()


def test_a_footer_that_was_misread_once_does_not_hide_what_came_after_it(tmp_path: Path) -> None:
    class Blurred(Files):
        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            super().read(fd, into, offset)
            if offset + sum(map(len, into)) == SEGMENT:
                into[-1][-PAGE_BYTES:] = bytes(PAGE_BYTES)

    log = make(tmp_path)
    for number in range(3):
        append(log, number)
    log.close()
    log = make(tmp_path, files=Blurred())
    assert append(log, 3)
    assert len(list(tmp_path.glob("segment-*"))) == 1
    crash(log)
    again = make(tmp_path)
    assert held(again, range(4)) == [0, 1, 2, 3]
    again.close()


def test_writes_that_were_refused_and_done_leave_no_room_for_a_footer(tmp_path: Path) -> None:
    """86 records are found where 85 were counted, whose entries fill a page."""
    refused = False

    class Refusing(Files):
        def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
            super().write(fd, buffers, offset)
            if refused:
                raise OSError(errno.EIO, "it says")

    log = make(tmp_path, files=Refusing())
    for number in range(84):
        append(log, number, 1)
    refused = True
    assert not append(log, 84, 1)
    refused = False
    rest = SEGMENT - PAGE_BYTES - 85 * 2 * PAGE_BYTES - record.footer_bytes(85)
    assert append(log, 85, rest - PAGE_BYTES)
    crash(log)
    again = make(tmp_path)
    assert append(again, 86)  # in the next segment
    for _ in range(2):
        assert [read(again, number) for number in range(85)] == [payload(number, 1) for number in range(85)]
        assert read(again, 85) == payload(85, rest - PAGE_BYTES)
        assert held(again, [86]) == [86]
        crash(again)
        again = make(tmp_path)
    again.close()


def test_a_page_that_cannot_be_read_costs_one_chunk(tmp_path: Path) -> None:
    class BadPage(Files):
        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            if offset <= bad < offset + sum(map(len, into)):
                raise OSError(errno.EIO, "bad page")
            super().read(fd, into, offset)

    log = make(tmp_path)
    for number in range(6):
        append(log, number)
    entry = log.find(key(2))
    assert entry is not None
    bad = entry.payload_offset + 3 * PAGE_BYTES
    crash(log)
    again = make(tmp_path, files=BadPage())
    assert held(again, range(6)) == [0, 1, 3, 4, 5]
    again.close()


def test_a_footer_that_cannot_be_read_costs_nothing(tmp_path: Path) -> None:
    class BadTrailer(Files):
        def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
            if offset + sum(map(len, into)) == SEGMENT:
                raise OSError(errno.EIO, "bad page")
            super().read(fd, into, offset)

    log = make(tmp_path)
    for number in range(6):
        append(log, number)
    log.close()
    again = make(tmp_path, files=BadTrailer())
    assert held(again, range(6)) == list(range(6))
    again.close()


def test_generations_only_grow(tmp_path: Path) -> None:
    """Or what an earlier use of a slot left behind could be taken for the present one's."""
    seen: list[int] = []

    def meddle(page: bytes, _: int) -> bool:
        header = record.unpack_segment_header(page)
        if header is not None:
            seen.append(header.stamp.generation)
        return True

    for start in range(6):
        log = make(tmp_path, slots=3, files=Meddling(meddle))
        for number in range(20):
            append(log, 100 * start + number)
        crash(log)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("end", [Log.close, crash])
def test_a_full_store_evicts_nothing_when_it_is_opened(tmp_path: Path, end: Callable[[Log], None]) -> None:
    """Its emptied slots are still empty."""
    log = make(tmp_path, slots=12)
    for number in range(150):
        append(log, number)
    before = sorted(log.entries())
    for _ in range(3):
        end(log)
        log = make(tmp_path, slots=12)
        assert log.stats.evicted_segments == 0
        assert sorted(log.entries()) == before
    log.close()


# ---- syncing, rewriting, direct I/O


def test_a_segment_is_synced_before_its_first_record_and_when_it_is_sealed(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(Files):
        def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
            calls.append("write")
            super().write(fd, buffers, offset)

        def sync(self, fd: int) -> None:
            calls.append("sync")
            super().sync(fd)

    log = make(tmp_path, files=Noting())
    append(log, 0)
    append(log, 1)
    assert calls == ["write", "sync", "write", "write"]  # the header
    log.close()
    assert calls[4:] == ["write", "sync"]  # the footer


def test_sync_seconds_syncs_what_was_written_since(tmp_path: Path) -> None:
    class Counting(Files):
        syncs = 0

        def sync(self, fd: int) -> None:
            self.syncs += 1
            super().sync(fd)

    lazy, eager = Counting(), Counting()
    (tmp_path / "lazy").mkdir()
    (tmp_path / "eager").mkdir()
    logs = [make(tmp_path / "lazy", files=lazy), make(tmp_path / "eager", files=eager, sync_seconds=0.01)]
    for round_ in range(5):
        before = eager.syncs
        for log in logs:
            append(log, round_)
        eventually(lambda before=before: eager.syncs > before)
    assert lazy.syncs == 1  # of the header
    for log in logs:
        log.close()


def test_hot_chunks_outlive_ten_times_the_capacity_without_many_writes(tmp_path: Path) -> None:
    slots, length = 16, 64 * KIB
    log = make(tmp_path, slots=slots)
    hot = range(0, 60, 10)
    for number in range(10 * slots * SEGMENT // length):
        assert append(log, number, length)
        if number > 60 and number % 10 == 0:
            assert [read(log, one) == payload(one, length) for one in hot] == [True] * len(hot)
    stats = log.stats
    assert stats.rewritten_bytes >= len(hot) * length
    assert stats.accepted_bytes >= 10 * slots * SEGMENT
    assert stats.device_written_bytes <= WRITE_AMPLIFICATION_MAX * stats.accepted_bytes
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("segment-*")) <= slots * SEGMENT
    assert stats.payload_bytes <= slots * SEGMENT
    log.close()


def test_without_direct_io_the_page_cache_is_used_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_it(path, flags, *arguments, **options)

    open_it = os.open
    monkeypatch.setattr("kvstore.disk.files.os.open", refuse)
    with caplog.at_level(logging.WARNING):
        log = make(tmp_path)
        for number in range(30):
            assert append(log, number)
    said = [entry.message for entry in caplog.records]
    assert said == [f"{tmp_path}: no direct I/O here (Invalid argument): going through the page cache"]
    assert held(log, range(30)) == list(range(30))
    log.close()


@pytest.mark.parametrize("direct", [True, False])
def test_direct_io_is_used_where_it_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture, direct: bool) -> None:
    files = Files(direct=direct)
    fd = files.open(tmp_path / "file", MIB)
    refused = "no direct I/O here" in caplog.text
    assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) == (direct and not refused)
    into = aligned(PAGE_BYTES).view
    files.read(fd, [into], 0)
    assert not any(into)
    files.close(fd)
