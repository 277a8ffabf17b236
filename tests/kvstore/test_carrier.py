"""Payloads by NIXL, over UCX's shared memory or TCP, as there is no RDMA here: the same outcomes as by the stream."""

import os
import threading

import pytest

os.environ.setdefault("UCX_TLS", "tcp,self")
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
pytest.importorskip("nixl_cu12", reason="pip install nixl-cu12")

from kvstore.errors import ConfigError
from kvstore.net.carrier import borrower
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from kvstore.seal import Mode, Seal, SealKey
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon

LENGTH = 100_000


def client(target: RunningTarget) -> StoreClient:
    return StoreClient(StaticMembership([target.address]), carrier=borrower("nixl"))


def rooms(count: int, length: int = LENGTH) -> list[memoryview]:
    return [memoryview(bytearray(length)) for _ in range(count)]


def test_values_come_by_the_carrier(start_target) -> None:
    target = start_target(carrier="nixl", buffer_bytes=64 * MIB, hot_bytes=16 * MIB)
    store = client(target)
    assert set(store.put([item(n) for n in range(20)], soon())) == {Outcome.STORED}
    sent = []
    lend = type(target.target._lender).place
    target.target._lender.place = lambda buffer: sent.append(buffer) or lend(target.target._lender, buffer)
    for _ in range(2):  # from wherever, then from the hot cache
        into = rooms(25)
        assert store.get([key(n) for n in range(25)], into, soon(20)) == [Outcome.HIT] * 20 + [Outcome.MISS] * 5
        assert all(bytes(into[n]) == payload(n) for n in range(20))
    assert len(sent) == 40
    eventually(lambda: not any(connection._lent for connection in list(target.target._connections)))  # all taken
    store.close()


def test_a_client_without_it_is_served_by_the_stream(start_target) -> None:
    target = start_target(carrier="nixl", buffer_bytes=64 * MIB)
    store = target.client()
    store.put([item(1)], soon())
    into = rooms(1)
    assert store.get([key(1)], into, soon()) == [Outcome.HIT]
    assert bytes(into[0]) == payload(1)
    store.close()


def test_memory_that_changed_under_the_client_is_corrupt(start_target) -> None:
    target = start_target(carrier="nixl", buffer_bytes=64 * MIB)
    store = client(target)
    store.put([item(1)], soon())
    place = target.target._lender.place

    def spoil(buffer) -> bytes:
        buffer.payload[5000] ^= 1
        return place(buffer)

    target.target._lender.place = spoil
    assert store.get([key(1)], rooms(1), soon(20)) == [Outcome.CORRUPT]
    target.target._lender.place = place
    into = rooms(1)
    assert store.get([key(1)], into, soon(20)) == [Outcome.HIT]
    store.close()


@pytest.mark.parametrize("mode", list(Mode))
def test_sealed_values_come_by_the_carrier(start_target, mode: Mode) -> None:
    target = start_target(carrier="nixl", buffer_bytes=64 * MIB)
    seal = Seal([SealKey(1, bytes([1]) * 32)], mode)
    store = StoreClient(StaticMembership([target.address]), carrier=borrower("nixl"), seal=seal)
    assert set(store.put([item(n) for n in range(5)], soon())) == {Outcome.STORED}
    into = rooms(5)
    assert store.get([key(n) for n in range(5)], into, soon(20)) == [Outcome.HIT] * 5
    assert all(bytes(into[n]) == payload(n) for n in range(5))
    place = target.target._lender.place

    def spoil(buffer) -> bytes:
        buffer.payload[LENGTH + 40] ^= 1  # in the trailer
        return place(buffer)

    target.target._lender.place = spoil
    assert store.get([key(1)], rooms(1), soon(20)) == [Outcome.CORRUPT]
    assert seal.rejected == {"altered": 1}
    store.close()


def test_what_a_client_never_takes_is_freed_when_it_goes(start_target) -> None:
    target = start_target(carrier="nixl", buffer_bytes=64 * MIB)
    store = client(target)
    store.put([item(1)], soon())
    gone = threading.Event()

    def never(*_: object) -> None:
        gone.set()
        raise TimeoutError

    store._carrier.fetch = never
    assert store.get([key(1)], rooms(1), soon(2)) == [Outcome.LATE]
    assert gone.is_set()
    eventually(lambda: not any(connection._lent for connection in list(target.target._connections)))
    store.close()


def test_a_carrier_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="carrier: 'pigeon' given, expected one of nixl"):
        borrower("pigeon")
