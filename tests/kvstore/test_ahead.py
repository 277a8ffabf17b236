"""Read-ahead: what a PREFETCH names comes out of memory later, and never at the cost of others."""

import time
from collections.abc import Callable, Iterator

import pytest

from kvstore.disk.buffers import BufferPool
from kvstore.disk.record import record_bytes
from kvstore.net import ahead
from kvstore.net.client import StoreClient
from kvstore.net.target import Target
from kvstore.net.wire import Outcome
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon
from tests.kvstore.test_hostile import Gate

LENGTH = 100_000
RECORD = record_bytes(LENGTH)
POOL = 16 * MIB
ALONE = POOL // 8 // RECORD  # chunks that a peer alone may have read ahead
KEYS = [key(number) for number in range(40)]


@pytest.fixture
def files() -> Gate:
    return Gate()


@pytest.fixture
def running(start_target: Callable[..., RunningTarget], files: Gate) -> Iterator[RunningTarget]:
    """Has a chain on disk, and nothing in memory."""
    before = start_target(buffer_bytes=POOL)
    client = before.client()
    assert set(client.put([item(number) for number in range(40)], soon())) == {Outcome.STORED}
    client.close()
    before.stop()
    yield start_target(files=files, buffer_bytes=POOL // 2, hot_bytes=POOL // 2)
    files.open_all()


@pytest.fixture
def client(running: RunningTarget) -> Iterator[StoreClient]:
    client = running.client()
    yield client
    client.close()


def get(client: StoreClient, numbers: range) -> list[Outcome]:
    rooms = [memoryview(bytearray(LENGTH)) for _ in numbers]
    outcomes = client.get([key(number) for number in numbers], rooms, soon())
    for number, room, outcome in zip(numbers, rooms, outcomes, strict=True):
        assert outcome is not Outcome.HIT or room == payload(number, LENGTH)
    return outcomes


def counts(running: RunningTarget) -> dict[str, int]:
    return running.target.status().read_ahead


def test_what_was_read_ahead_comes_out_of_memory(running: RunningTarget, client: StoreClient, files: Gate) -> None:
    before = files.reads
    assert client.prefetch([*KEYS[:8], key(99)], soon()) == [Outcome.STORED] * 8 + [Outcome.MISS]
    eventually(lambda: counts(running)["read"] == 8)
    assert files.reads - before < 8  # neighbours at once
    assert client.prefetch(KEYS[:8], soon()) == [Outcome.HIT] * 8
    before = files.reads
    assert get(client, range(8)) == [Outcome.HIT] * 8
    assert files.reads == before
    found = counts(running)
    assert {name: found[name] for name in found if found[name]} == {"absent": 1, "memory": 8, "read": 8, "used": 8}
    assert running.target.status().hot_hits == 8


@pytest.mark.parametrize("whose", ["get", "put", "another namespace's"])
def test_a_device_with_something_to_do_reads_nothing_ahead(
    running: RunningTarget, client: StoreClient, files: Gate, whose: str
) -> None:
    if whose == "get":
        files.shut_reads()
        reader = running.client()
        busy = reader._pool.submit(get, reader, range(39, 40))
        eventually(lambda: files.waiting == 1)
    elif whose == "put":
        files.shut_writes()
        writer = running.client()
        busy = writer._pool.submit(writer.put, [item(50)], soon())
        eventually(lambda: files.waiting == 1)
    else:
        running.log.device.users.append(lambda: True)
    reads = files.reads
    assert client.prefetch(KEYS[:2], soon()) == [Outcome.STORED] * 2
    time.sleep(10 * ahead.BUSY_SECONDS)
    assert files.reads == reads
    assert not counts(running)["read"]
    running.log.device.users[1:] = []
    files.open_all()
    eventually(lambda: counts(running)["read"] == 2)
    if whose != "another namespace's":
        assert busy.result() in ([Outcome.HIT], [Outcome.STORED])


def test_a_device_that_stays_busy_drops_what_was_to_be_read(
    running: RunningTarget, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "AHEAD_SECONDS", 0.05)
    running.log.device.users.append(lambda: True)
    client.prefetch(KEYS[:5], soon())
    eventually(lambda: counts(running)["expired"] == 5)


def test_values_in_use_stay_in_memory(
    running: RunningTarget, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hot cache is full of values that were just written; those make room once nobody has asked for them lately."""
    numbers = range(100, 100 + POOL // RECORD + 10)
    assert set(client.put([item(number) for number in numbers], soon())) == {Outcome.STORED}
    kept = running.target.pool.kept
    client.prefetch(KEYS[:5], soon())
    eventually(lambda: counts(running)["no_room"] == 5)
    assert running.target.pool.kept == kept
    monkeypatch.setattr(ahead, "UNUSED_SECONDS", 0.0)
    client.prefetch(KEYS[:5], soon())
    eventually(lambda: counts(running)["read"] == 5)


def test_a_peer_has_its_share_and_the_ends_of_prompts_are_refused(running: RunningTarget, client: StoreClient) -> None:
    outcomes = client.prefetch(KEYS, soon())
    assert outcomes == [Outcome.STORED] * ALONE + [Outcome.REFUSED] * (len(KEYS) - ALONE)
    assert set(client.prefetch(KEYS[ALONE:], soon())) == {Outcome.REFUSED}
    others = running.target.prefetch(KEYS[ALONE:], "10.0.0.9")
    granted = others.count(Outcome.STORED)
    assert ALONE // 2 <= granted < ALONE
    eventually(lambda: counts(running)["read"] == ALONE + granted)
    share = running.target._ahead._shares["127.0.0.1"]
    share.until = time.monotonic()  # half a minute later
    assert client.prefetch(KEYS[-1:], soon()) == [Outcome.STORED]


def test_reading_ahead_counts_for_nothing_in_eviction(running: RunningTarget, client: StoreClient) -> None:
    client.prefetch(KEYS[:8], soon())
    eventually(lambda: counts(running)["read"] == 8)
    counters = running.log._eviction._counters
    assert not any(any(one) for one in counters.values())
    get(client, range(8))
    assert sum(sum(one) for one in counters.values()) == 8


def test_a_target_that_does_not_say_that_it_prefetches_is_not_asked(
    start_target: Callable[..., RunningTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a hot cache; one of an earlier release says as little."""
    running = start_target(buffer_bytes=POOL)
    monkeypatch.setattr(Target, "_send_outcomes", None)
    client = running.client()
    assert client.prefetch(KEYS[:2], soon()) == [Outcome.REFUSED] * 2
    client.close()


def test_looking_for_room_drops_no_more_than_twice_the_room() -> None:
    """Old values lie between such as are in use: whatever is dropped, no large one fits."""
    pool = BufferPool(4 * MIB, keeps_values=True)
    eventually(lambda: pool.available_bytes == 4 * MIB)
    count = 4 * MIB // record_bytes(60_000)
    for number in range(count):
        buffer = pool.take(60_000, soon())
        assert buffer is not None
        pool.keep(key(number), buffer, 0)
        pool.give_back(buffer)
    now = time.monotonic()
    for number in range(0, count, 4):
        pool.touch(key(number))
    assert pool.take_unused(MIB, now) is None
    kept = sum(key(number) in pool for number in range(count))
    assert count - kept <= 2 * record_bytes(MIB) // 60_000 + 1
