"""Payloads by a carrier: the same outcomes as by the stream. NIXL runs over UCX's TCP, as there is no RDMA here."""

import gc
import importlib.util
import mmap
import os
import socket
import tempfile
import threading
import time
import weakref
from pathlib import Path

import pytest

os.environ.setdefault("UCX_TLS", "tcp,self")
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

from kvstore.disk.buffers import Arena
from kvstore.disk.log import Log
from kvstore.disk.shelf import Shelf
from kvstore.errors import ConfigError
from kvstore.net import transport
from kvstore.net.carrier import MEMORY, borrower
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.target import Target
from kvstore.net.wire import Outcome
from kvstore.seal import Mode, Seal, SealKey
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon

LENGTH = 100_000


needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="pip install nixl-cu12")


@pytest.fixture(params=[MEMORY, pytest.param("nixl", marks=needs_nixl)])
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def client(target: RunningTarget, carrier: str) -> StoreClient:
    return StoreClient(StaticMembership([target.address]), carrier=borrower(carrier))


def rooms(count: int, length: int = LENGTH) -> list[memoryview]:
    return [memoryview(bytearray(length)) for _ in range(count)]


def test_values_come_by_the_carrier(start_target, carrier: str) -> None:
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB, hot_bytes=16 * MIB)
    store = client(target, carrier)
    assert set(store.put([item(n) for n in range(20)], soon())) == {Outcome.STORED}
    lent = target.lent()
    for _ in range(2):  # from wherever, then from the hot cache
        into = rooms(25)
        assert store.get([key(n) for n in range(25)], into, soon(20)) == [Outcome.HIT] * 20 + [Outcome.MISS] * 5
        assert all(bytes(into[n]) == payload(n) for n in range(20))
    assert len(lent) == 40
    eventually(lambda: not any(connection._pinned for connection in list(target.target._connections)))  # all taken
    store.close()


def test_a_client_without_it_is_served_by_the_stream(start_target, carrier: str) -> None:
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB)
    store = target.client()
    store.put([item(1)], soon())
    into = rooms(1)
    assert store.get([key(1)], into, soon()) == [Outcome.HIT]
    assert bytes(into[0]) == payload(1)
    store.close()


def test_memory_that_changed_under_the_client_is_corrupt(start_target, carrier: str) -> None:
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB)
    store = client(target, carrier)
    store.put([item(1)], soon())
    place = target.target._lender.remote_buffer

    def spoil(buffer) -> bytes:
        buffer.payload[5000] ^= 1
        return place(buffer)

    target.target._lender.remote_buffer = spoil
    assert store.get([key(1)], rooms(1), soon(20)) == [Outcome.CORRUPT]
    target.target._lender.remote_buffer = place
    into = rooms(1)
    assert store.get([key(1)], into, soon(20)) == [Outcome.HIT]
    store.close()


@pytest.mark.parametrize("mode", list(Mode))
def test_sealed_values_come_by_the_carrier(start_target, carrier: str, mode: Mode) -> None:
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB)
    seal = Seal([SealKey(1, bytes([1]) * 32)], mode)
    store = StoreClient(StaticMembership([target.address]), carrier=borrower(carrier), seal=seal)
    assert set(store.put([item(n) for n in range(5)], soon())) == {Outcome.STORED}
    into = rooms(5)
    assert store.get([key(n) for n in range(5)], into, soon(20)) == [Outcome.HIT] * 5
    assert all(bytes(into[n]) == payload(n) for n in range(5))
    place = target.target._lender.remote_buffer

    def spoil(buffer) -> bytes:
        buffer.payload[LENGTH + 40] ^= 1  # in the trailer
        return place(buffer)

    target.target._lender.remote_buffer = spoil
    assert store.get([key(1)], rooms(1), soon(20)) == [Outcome.CORRUPT]
    assert seal.rejected == {"altered": 1}
    store.close()


def test_what_a_client_never_takes_is_freed_when_it_goes(start_target, carrier: str) -> None:
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB)
    store = client(target, carrier)
    store.put([item(1)], soon())
    gone = threading.Event()

    def never(*_: object) -> None:
        gone.set()
        raise TimeoutError

    store._carrier.fetch = never
    assert store.get([key(1)], rooms(1), soon(2)) == [Outcome.LATE]
    assert gone.is_set()
    eventually(lambda: not any(connection._pinned for connection in list(target.target._connections)))
    store.close()


def test_memory_is_for_those_who_may_list_what_is_in_it(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others, and those of another host, are served by the stream."""
    monkeypatch.setattr(transport.Stream, "is_own_user", property(lambda stream: False))
    other_user = start_target("other user", unix=True, carrier=MEMORY, buffer_bytes=64 * MIB)
    monkeypatch.undo()
    elsewhere = start_target("elsewhere", carrier=MEMORY, buffer_bytes=64 * MIB)
    monkeypatch.setattr(transport.Stream, "is_own_user", property(lambda stream: False))
    for target in (other_user, elsewhere):
        store = client(target, MEMORY)
        store.put([item(1)], soon())
        into = rooms(1)
        assert store.get([key(1)], into, soon()) == [Outcome.HIT]
        assert bytes(into[0]) == payload(1)
        assert not any(connection.lender for connection in target.target._connections)
        store.close()


def test_a_target_that_starts_anew_is_read_anew(start_target, tmp_path: Path) -> None:
    first = start_target(unix=True, carrier=MEMORY, buffer_bytes=64 * MIB)
    store = client(first, MEMORY)
    store.put([item(n) for n in range(5)], soon())
    (line,) = store._targets.values()
    # Under load the first one may come by the socket.
    eventually(lambda: store.get([key(0)], rooms(1), soon()) == [Outcome.HIT] and line._carrier_target is not None)
    memory = weakref.ref(line._carrier_target)
    first.stop()
    log = Log(tmp_path / "store", 64 * MIB, segment_bytes=4 * MIB)
    unix_path = first.target._unix_path
    again = Target(Shelf([log]), name=first.address, epoch=log.epoch, unix_path=unix_path, carrier=MEMORY)
    again.serve(transport.listen(first.address))
    again.serve(transport.listen(unix_path))
    try:
        into = rooms(5)
        eventually(lambda: store.get([key(n) for n in range(5)], into, soon()) == [Outcome.HIT] * 5)
        assert all(bytes(into[n]) == payload(n) for n in range(5))
        assert any(connection.lender for connection in again._connections)
        eventually(lambda: gc.collect() >= 0 and memory() is None)  # what the first one had is free
    finally:
        store.close()
        again.stop()
        log.close()


def test_what_a_target_shows_can_only_be_read() -> None:
    arena = Arena(1 * MIB, shared=True)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, MIB)
    with pytest.raises(PermissionError):
        os.pwrite(arena.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, 0)
    arena[0:1][0] = 7  # but by the target


@pytest.mark.parametrize("place", [b"", bytes(15), (64 * MIB).to_bytes(8, "little") + LENGTH.to_bytes(8, "little")])
def test_places_that_are_none_are_refused(place: bytes) -> None:
    arena = Arena(1 * MIB, shared=True)
    memory = borrower(MEMORY)
    reached = memory.connect(b"", arena.descriptor)
    with pytest.raises(ConnectionError):
        memory.fetch(reached, place, rooms(1), soon(), None)


def test_memory_is_not_copied_for_who_left_or_came_too_late() -> None:
    arena = Arena(1 * MIB, shared=True)
    memory, (room,) = borrower(MEMORY), rooms(1)
    arena[0:LENGTH][:] = payload(1)
    reached, place = memory.connect(b"", arena.descriptor), bytes(8) + LENGTH.to_bytes(8, "little")
    with pytest.raises(transport.Cancelled):
        memory.fetch(reached, place, [room], soon(), lambda: True)
    with pytest.raises(TimeoutError):
        memory.fetch(reached, place, [room], time.monotonic() - 1, None)
    assert bytes(room) == bytes(LENGTH)
    memory.fetch(reached, place, [room], soon(), lambda: False)
    assert bytes(room) == payload(1)


def test_a_peer_that_sends_no_file_is_no_target() -> None:
    ours, theirs = socket.socketpair()
    theirs.send(b"\0")
    with pytest.raises(ConnectionError, match="sent no file descriptor"):
        transport.Stream(ours).receive_descriptor(soon())
    ours.close()
    theirs.close()


def test_a_file_that_could_be_cut_short_is_not_mapped() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(MIB)
        with pytest.raises(ConnectionError):
            borrower(MEMORY).connect(b"", file.fileno())


@pytest.mark.parametrize("lent", [False, True])
def test_a_connection_that_leaves_takes_no_memory_from_its_client(start_target, carrier: str, lent: bool) -> None:
    """It makes room, or its target stops, as an answer is made, or while the client fetches one."""
    target = start_target(unix=True, carrier=carrier, buffer_bytes=64 * MIB)
    store = client(target, carrier)
    store.put([item(1)], soon())
    eventually(lambda: len(target.target._connections) == 1)
    (connection,) = target.target._connections
    place, fetch = target.target._lender.remote_buffer, store._carrier.fetch

    def leaves(*arguments: object) -> bytes:
        connection.drain()
        return place(*arguments)

    def fetches(*arguments: object) -> None:
        connection.drain()
        time.sleep(0.2)
        assert connection.has_pinned
        fetch(*arguments)

    if lent:
        store._carrier.fetch = fetches
    else:
        target.target._lender.remote_buffer = leaves
    into = rooms(1)
    assert store.get([key(1)], into, soon(20)) == [Outcome.HIT]
    assert bytes(into[0]) == payload(1)
    eventually(lambda: connection not in target.target._connections)
    assert target.target.pool.is_idle
    store.close()


def test_a_carrier_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="carrier: 'pigeon' given, expected one of memory, nixl"):
        borrower("pigeon")
