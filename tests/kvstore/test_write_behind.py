"""Durability `memory`: what is acknowledged before it is written is served, written in order, or gone, never wrong."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.__main__ import parse
from kvstore.credentials import Credential
from kvstore.disk.buffers import BufferPool, aligned
from kvstore.disk.log import Log, Value
from kvstore.disk.record import Entry, record_bytes
from kvstore.errors import ConfigError
from kvstore.net.backlog import Backlog, Standing, Write
from kvstore.net.client import Item
from kvstore.net.lobby import Lobby
from kvstore.net.queues import WriteQueue
from kvstore.net.wire import Outcome
from tests.conftest import MIB, RunningTarget, cases, eventually, key, payload, soon
from tests.kvstore.test_hostile import Gate

LENGTH = 100_000
RECORD = record_bytes(LENGTH)
HOT = 64 * RECORD


class Broken(Gate):
    """Refuses writes when told to."""

    broken = False

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.sizes = [*getattr(self, "sizes", []), sum(map(len, buffers))]
        super().write(fd, buffers, offset)
        if self.broken:
            raise OSError(errno.EIO, "injected")


class Diary:
    """An observer."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def stored(self, entry: Entry) -> None:
        self.told.append(("stored", entry.router_hash))

    def removed(self, entry: Entry) -> None:
        self.told.append(("removed", entry.router_hash))


@pytest.fixture
def files() -> Broken:
    return Broken()


@pytest.fixture
def running(start_target: Callable[..., RunningTarget], files: Broken) -> Iterator[RunningTarget]:
    """With a segment begun, so that the next write is one of records."""
    one = start_target(files=files, buffer_bytes=8 * MIB, hot_bytes=HOT, dirty_bytes=HOT, flush_seconds=5.0)
    put(one, item(5000))
    eventually(lambda: not one.target.status().dirty_bytes)
    yield one
    files.open_all()


def item(number: int, **more: float) -> Item:
    return Item(key(number), memoryview(payload(number, LENGTH)), number + 1, 7, 2, **more)


def put(running: RunningTarget, *items: Item) -> list[Outcome]:
    client = running.client()
    outcomes = client.put(items, soon())
    client.close()
    return outcomes


def get(running: RunningTarget, numbers: Sequence[int]) -> list[Outcome]:
    """Every hit must have the right bytes."""
    client = running.client()
    rooms = [memoryview(bytearray(LENGTH)) for _ in numbers]
    outcomes = client.get([key(number) for number in numbers], rooms, soon())
    client.close()
    for number, room, outcome in zip(numbers, rooms, outcomes, strict=True):
        assert outcome is not Outcome.HIT or room == payload(number, LENGTH)
    return outcomes


def test_a_put_is_visible_before_it_is_written(running: RunningTarget, files: Broken, tmp_path: Path) -> None:
    running.log.observer = diary = Diary()
    files.shut_writes()
    reads = files.reads
    assert put(running, *map(item, range(20))) == [Outcome.STORED] * 20
    assert diary.told == [("stored", number + 1) for number in range(20)]
    assert {entry.key for entry in running.log.entries()} == {key(number) for number in (5000, *range(20))}
    client = running.client()
    assert client.exists([key(number) for number in range(21)], soon()) == [Outcome.HIT] * 20 + [Outcome.MISS]
    client.close()
    assert get(running, range(21)) == [Outcome.HIT] * 20 + [Outcome.MISS]
    assert put(running, item(3)) == [Outcome.STORED]  # again
    status = running.target.status()
    assert (status.dirty_entries, status.dirty_bytes, status.entries) == (20, 20 * LENGTH, 21)
    assert files.reads == reads

    files.open_all()
    eventually(lambda: running.target.status().dirty_bytes == 0)
    assert len(diary.told) == 20
    assert running.target.status().payload_bytes == 21 * LENGTH
    assert get(running, range(20)) == [Outcome.HIT] * 20
    assert files.reads == reads  # they are in the hot cache, as before
    running.stop()
    log = Log(tmp_path / "store", 64 * MIB, segment_bytes=4 * MIB)
    assert {entry.key for entry in log.entries()} == {key(number) for number in (5000, *range(20))}
    log.close()


def test_what_came_together_is_written_together(running: RunningTarget, files: Broken) -> None:
    files.shut_writes()
    for number in (101, 102):  # the queue's two threads
        put(running, item(number))
        eventually(lambda number=number: files.waiting == number - 100)
    files.sizes = []
    put(running, *map(item, range(60)))
    files.open_all()
    eventually(lambda: not running.target.status().dirty_bytes)
    records = [size for size in files.sizes if size % RECORD == 0]
    assert sum(records) == 60 * RECORD
    assert max(records) >= 2 * MIB
    assert len(records) <= 6  # two writes of 4 MiB, cut where segments of 4 MiB end


def test_a_failed_write_unpublishes(running: RunningTarget, files: Broken) -> None:
    running.log.observer = diary = Diary()
    files.broken = True
    assert put(running, *map(item, range(1, 9))) == [Outcome.STORED] * 8
    eventually(lambda: running.target.status().dropped.get("failed") == 8)
    assert sorted(diary.told) == sorted((what, number + 1) for number in range(1, 9) for what in ("stored", "removed"))
    assert get(running, [5000, *range(1, 9)]) == [Outcome.HIT] + [Outcome.MISS] * 8
    status = running.target.status()
    assert (status.entries, status.payload_bytes, status.dirty_bytes) == (1, LENGTH, 0)
    eventually(lambda: running.target.pool.is_idle)
    files.broken = False
    assert put(running, item(1)) == [Outcome.STORED]
    eventually(lambda: get(running, [1]) == [Outcome.HIT] and not running.target.status().dirty_bytes)


def test_dirty_bytes_are_bounded_and_leave_memory_for_reads(running: RunningTarget, files: Broken) -> None:
    files.shut_writes()
    outcomes = put(running, *map(item, range(70)))
    assert outcomes == [Outcome.STORED] * 64 + [Outcome.REFUSED] * 6
    assert running.target.status().dirty_bytes == 64 * LENGTH
    assert not running.target.pool.is_short
    assert get(running, [5000]) == [Outcome.HIT]
    assert get(running, range(64)) == [Outcome.HIT] * 64
    assert running.target.status().dropped == {"no_room": 6}


def test_a_bound_below_one_chunk_has_room_for_one(start_target: Callable[..., RunningTarget]) -> None:
    """However large the buffers are; and half of the capacity is the most, also once that has changed."""
    files = Broken()
    one = start_target(files=files, buffer_bytes=32 * MIB, hot_bytes=HOT, dirty_bytes=RECORD // 2)
    put(one, item(5000))
    eventually(lambda: not one.target.status().dirty_bytes)
    files.shut_writes()
    assert put(one, item(1), item(2)) == [Outcome.STORED, Outcome.REFUSED]
    assert one.target.status().dirty_bytes == LENGTH
    files.open_all()
    eventually(lambda: not one.target.status().dirty_bytes)
    assert put(one, item(2)) == [Outcome.STORED]
    queue = WriteQueue(one.log, one.target.pool, 1 << 40, behind=True)
    assert queue.bytes_max == 32 * MIB
    one.log.settle(16 * MIB)
    assert queue.bytes_max == 8 * MIB


def test_of_a_full_memory_the_least_useful_goes_and_prompts_from_their_end(
    running: RunningTarget, files: Broken
) -> None:
    files.shut_writes()
    for number in (1000, 1001):  # being written: it stays
        put(running, item(number))
        eventually(lambda number=number: files.waiting == number - 999)
    prompts = {first: [item(first + n, saved_seconds=1, position=n, parent=first + n) for n in range(31)]
               for first in (100, 200)}  # fmt: skip
    for chunks in prompts.values():
        chunks[0] = chunks[0]._replace(parent=0)
        assert set(put(running, *chunks)) == {Outcome.STORED}
    assert get(running, [230]) == [Outcome.HIT]  # of this one all chunks stay
    running.log.observer = diary = Diary()
    assert put(running, item(1, saved_seconds=1, position=0)) == [Outcome.STORED]
    assert put(running, item(2, saved_seconds=9, position=90)) == [Outcome.STORED]
    assert put(running, item(3, saved_seconds=0.5, position=0)) == [Outcome.REFUSED]
    assert [number - 1 for what, number in diary.told if what == "removed"] == [130, 129]
    assert put(running, item(131, saved_seconds=99, position=31, parent=131)) == [Outcome.REFUSED]  # without 130
    expected = [Outcome.HIT] * 29 + [Outcome.MISS] * 2
    assert get(running, range(100, 131)) == expected
    files.open_all()
    eventually(lambda: not running.target.status().dirty_bytes)
    assert get(running, range(100, 131)) == expected
    assert get(running, range(200, 231)) == [Outcome.HIT] * 31
    assert running.target.status().dropped == {"displaced": 2, "no_room": 1, "orphaned": 1}


@pytest.mark.parametrize("stuck", [False, True])
def test_a_stop_writes_what_is_dirty_within_its_bound(
    running: RunningTarget, files: Broken, tmp_path: Path, stuck: bool
) -> None:
    files.shut_writes()
    put(running, *map(item, range(50)))
    running.target._flush_seconds = 0.5 if stuck else 10.0
    if not stuck:
        files.open_all()
    begun = time.monotonic()
    running.target.stop(drain_seconds=1)
    assert time.monotonic() - begun < 5
    files.open_all()
    running.log.close()
    log = Log(tmp_path / "store", 64 * MIB, segment_bytes=4 * MIB)
    assert len(log) == 51 if not stuck else len(log) < 51
    dropped = running.target.status().dropped  # a write that the log's end stops has failed
    assert sum(dropped.values()) == 51 - len(log)
    assert dropped.keys() <= {"stopped", "failed"}
    log.close()


def test_a_namespace_that_leaves_holds_up_no_reload(running: RunningTarget, files: Broken) -> None:
    running.target._flush_seconds = 60.0
    lobby = Lobby()
    lobby.admit("leaves", running.target, Credential.random())
    files.shut_writes()
    put(running, *map(item, range(50)))
    begun = time.monotonic()
    lobby.expel("leaves")
    assert time.monotonic() - begun < 5
    assert running.target.status().dropped["stopped"]


def test_a_dirty_value_survives_any_number_of_reads_and_never_another_value() -> None:
    pool = BufferPool(8 * RECORD, keeps_values=True)
    eventually(lambda: pool.available_bytes == 8 * RECORD and pool.take_all([LENGTH], 0.0)[0] is not None)
    buffers = [pool.take(LENGTH, soon()) for _ in range(3)]
    for number, buffer in enumerate(buffers):
        assert buffer is not None
        buffer.payload[:] = payload(number, LENGTH)
        pool.keep_dirty(key(number), buffer, number)
    for number in range(20):  # push out what can be
        buffer = pool.take(LENGTH, soon())
        assert buffer is not None
        pool.keep(key(50 + number), buffer, 0)
        pool.give_back(buffer)
    found = pool.find(key(0), LENGTH)
    assert found is not None
    pool.discard(key(0))
    assert key(0) not in pool
    pool.give_back(buffers[0])  # type: ignore[arg-type]
    assert found.payload == payload(0, LENGTH)  # somebody is sending it
    pool.give_back(found)
    pool.clean(key(1))
    pool.give_back(buffers[1])  # type: ignore[arg-type]
    assert all(key(number) in pool for number in (1, 2))
    assert pool.available_bytes == 6 * RECORD  # one was taken at the beginning, one is dirty


Chunk = tuple[int, int]  # prompt, position


@settings(max_examples=cases(300))
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=120),
    st.integers(1, 20),
    st.lists(st.integers(0, 119), max_size=30),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 20)), max_size=3),
)
def test_no_prompt_has_a_hole(
    arrivals: list[tuple[int, int]], room: int, written_at: list[int], used: set[Chunk]
) -> None:
    """Chunks of five prompts arrive in their order, with any benefits; some are written in between."""
    numbers: dict[bytes, Chunk] = {}
    backlog = Backlog(lambda name: numbers[name] in used)
    kept: set[Chunk] = set()
    lengths = [0] * 5
    for step, (prompt, benefit) in enumerate(arrivals):
        position, lengths[prompt] = lengths[prompt], lengths[prompt] + 1
        one = Standing(benefit, position, 1 + 1000 * prompt + position, 1000 * prompt + position if position else 0)
        if backlog.is_orphan(one):
            backlog.note_dropped([one])
            continue
        buffer = aligned(100)
        displaced = backlog.drop_below(one, len(backlog) + 1 - room and (len(backlog) + 1 - room) * len(buffer.record))
        if displaced is None:
            backlog.note_dropped([one])
        else:
            kept -= {numbers[write.value.key] for write in displaced}
            name = key(1000 * prompt + position)
            numbers[name] = (prompt, position)
            backlog.add(Write(Value(name, buffer, crc32c(b""), one.router_hash, 7, 2), one, []))
            kept.add((prompt, position))
        if step in written_at:
            backlog.take(1)
        assert len(backlog) <= room
    for prompt in range(5):
        positions = sorted(position for owner, position in kept if owner == prompt)
        assert positions == list(range(len(positions)))


def test_models_with_the_same_tokens_leave_each_others_prompts_alone() -> None:
    """Their chunks have the same router hashes."""
    backlog = Backlog(lambda name: False)
    first = Standing(1.0, 0, 1, 0, fingerprint=7)
    after, other = (Standing(5.0, 1, 2, 1, fingerprint) for fingerprint in (7, 8))
    backlog.note_dropped([first])
    assert (backlog.is_orphan(after), backlog.is_orphan(other)) == (True, False)
    for standing in (first, after, other):
        buffer = aligned(100)
        backlog.add(Write(Value(key(len(backlog)), buffer, 0, 1, 7, 2), standing, []))
    assert [write.standing.benefit for write in backlog.clear()] == [1.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--durability", "memory"], "hot: missing, required by --durability memory, expected a size"),
        (["--durability", "disk"], "durability: 'disk' given"),
        (["--hot", "1G", "--dirty", "1G"], "dirty: '1.*' conflicts with --durability written"),
        (
            ["--durability", "memory", "--hot", "1G", "--dirty", "2G"],
            r"dirty: '1\.9 GiB' given, expected at most the 953\.7 MiB of --hot",
        ),
        (["--durability", "memory", "--hot", "1G", "--flush", "-1"], "flush: '-1' given"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["--dir", "/nvme0", "--capacity", "10G", *arguments])


def test_all_of_the_hot_cache_may_be_dirty_by_default() -> None:
    arguments = ["--dir", "/nvme0", "--capacity", "10G", "--hot", "2G"]
    assert parse(arguments).dirty_bytes == 0
    assert parse([*arguments, "--durability", "memory"]).dirty_bytes == 2 * 10**9
    assert parse([*arguments, "--durability", "memory", "--dirty", "1G"]).dirty_bytes == 10**9
