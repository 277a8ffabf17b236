"""The client against real targets: what is stored comes back, and whatever fails is an outcome in time."""

import random
import socket
import threading
import time
from collections.abc import Callable

import pytest
from crc32c import crc32c

from kvstore.net import wire
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership, target_for
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome
from tests.conftest import MIB, eventually, item, key, payload, soon

LENGTH = 100_000


def rooms(count: int, length: int = LENGTH) -> list[memoryview]:
    return [memoryview(bytearray(length)) for _ in range(count)]


@pytest.mark.parametrize("unix", [False, True])
def test_put_get_and_exists(start_target, unix: bool) -> None:
    target = start_target(unix=unix)
    client = target.client()
    numbers = range(40)
    assert client.put([item(n) for n in numbers], soon()) == [Outcome.STORED] * 40
    assert client.exists([key(n) for n in range(45)], soon()) == [Outcome.HIT] * 40 + [Outcome.MISS] * 5
    into = rooms(45)
    assert client.get([key(n) for n in range(45)], into, soon()) == [Outcome.HIT] * 40 + [Outcome.MISS] * 5
    assert all(bytes(into[n]) == payload(n) for n in numbers)
    if unix:
        assert client._line(target.address)._near.unix_path == target.target._unix_path
    status = client.stat(soon())[target.address]
    assert (status.entries, status.operations["get"]) == (40, {"hit": 40, "miss": 5})
    client.close()


def test_large_batches_go_over_several_connections(start_target) -> None:
    target = start_target()
    client = target.client()
    assert set(client.put([item(n, MIB) for n in range(30)], soon(20))) == {Outcome.STORED}
    into = rooms(30, MIB)
    assert set(client.get([key(n) for n in range(30)], into, soon(20))) == {Outcome.HIT}
    assert all(bytes(into[n]) == payload(n, MIB) for n in range(30))
    assert client.stat(soon())[target.address].connections > 1
    client.close()


def test_another_length_is_a_miss(start_target) -> None:
    target = start_target()
    client = target.client()
    client.put([item(1)], soon())
    assert client.get([key(1)], rooms(1, LENGTH + 1), soon()) == [Outcome.MISS]
    client.close()


def test_keys_are_spread_and_a_lost_target_loses_only_its_own(start_target) -> None:
    targets = [start_target(f"store{number}") for number in range(3)]
    addresses = [target.address for target in targets]
    client = StoreClient(StaticMembership(addresses))
    keys = [key(n) for n in range(60)]
    assert set(client.put([item(n) for n in range(60)], soon())) == {Outcome.STORED}
    assert all(len(target.log) > 5 for target in targets)
    targets[0].stop()
    outcomes = client.get(keys, rooms(60), soon())
    for one, outcome in zip(keys, outcomes, strict=True):
        lost = target_for(one, addresses) == addresses[0]
        assert outcome is (Outcome.UNREACHABLE if lost else Outcome.HIT)
    client.close()


def test_a_plan_says_where_to_look_among_members(start_target) -> None:
    """A target that has left is not asked: where the key is placed among those that are live, is."""
    targets = [start_target(f"store{number}") for number in range(2)]
    client = StoreClient(StaticMembership([target.address for target in targets]))
    here, there = (target.address for target in targets)
    placed, elsewhere = (
        next(n for n in range(1, 99) if target_for(key(n), [here, there]) == at) for at in (here, there)
    )
    targets[0].client().put([item(placed), item(elsewhere)], soon())
    gone = "10.0.0.1:7600"
    for number, at_gone in ((placed, Outcome.HIT), (elsewhere, Outcome.UNREACHABLE)):
        outcomes = client.get([key(number)] * 4, rooms(4), soon(), targets=[here, there, gone, None])
        assert outcomes == [Outcome.HIT, Outcome.MISS, at_gone, Outcome.UNREACHABLE], number
    client.close()


def test_a_restarted_target_is_found_again(start_target) -> None:
    """Connections that waited in the pool are dead; nobody is told, and no call fails for it."""
    target = start_target()
    client = target.client()
    client.put([item(1)], soon())
    target.stop()
    port = int(target.address.rpartition(":")[2])
    from kvstore.disk.log import Log
    from kvstore.disk.shelf import Shelf
    from kvstore.net import transport
    from kvstore.net.target import Target

    log = Log(target.log.path, 64 * MIB, segment_bytes=4 * MIB)
    again = Target(Shelf([log]), name=target.address, epoch=log.epoch)
    again.serve(transport.listen(f"127.0.0.1:{port}"))
    into = rooms(1)
    assert client.get([key(1)], into, soon()) == [Outcome.HIT]
    assert bytes(into[0]) == payload(1)
    client.close()
    again.stop()
    log.close()


def test_an_unreachable_target_is_left_alone_for_a_while() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    client = StoreClient(StaticMembership([address]))
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.UNREACHABLE]
    line = client._line(address)
    assert line._retry_at > time.monotonic()
    first = line._retry_at
    assert client.put([item(1)], soon()) == [Outcome.UNREACHABLE]
    assert line._retry_at == first  # not even tried
    assert client.stat(soon()) == {}
    client.close()


class Impostor:
    """A target that greets and then answers each request as it was told to."""

    def __init__(self, answer: Callable[[Stream, Header, bytes], None]):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def client(self) -> StoreClient:
        return StoreClient(StaticMembership([self.address]))

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(Stream(sock),), daemon=True).start()

    def _serve(self, stream: Stream) -> None:
        try:
            stream.receive_control(stream.receive_header(soon()), soon())
            stream.send([wire.encode(Header(Op.WELCOME), wire.Welcome(self.address, 1, 1 << 26, ""))], soon())
            while stream.wait_for_frame():
                header = stream.receive_header(soon())
                control = bytes(stream.receive_control(header, soon()))
                self.requests += 1
                self._answer(stream, header, control)
        except OSError:
            pass
        finally:
            stream.close()


def value(header: Header, content: bytes, *, number: int = 0, crc: int | None = None, flags: int = 0) -> list[bytes]:
    crc = crc32c(content) if crc is None else crc
    frame = Header(Op.VALUE, header.request, flags, number, crc, data_bytes=len(content))
    return [wire.encode(frame), content]


def test_bytes_that_changed_on_the_way_are_corrupt() -> None:
    content = payload(1)
    impostor = Impostor(lambda stream, header, _: stream.send(value(header, content, crc=1), soon()))
    client = impostor.client()
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.CORRUPT]
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda stream, header, _: stream.send(value(header, b"short"), soon()),
        lambda stream, header, _: stream.send(value(header, payload(1), number=5), soon()),
        lambda stream, header, _: stream.send(value(header, payload(1), flags=77), soon()),
        lambda stream, header, _: stream.send(value(header._replace(request=9), payload(1)), soon()),
        lambda stream, header, _: stream.send([wire.encode(Header(Op.FOUND, header.request))], soon()),
        lambda stream, header, _: stream.send([b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99)], soon()),
        lambda stream, header, _: stream.close(),
    ],
    ids=["short value", "other key", "no outcome", "other request", "other answer", "other protocol", "hang-up"],
)
def test_a_target_that_talks_nonsense_is_unreachable(answer: Callable[[Stream, Header, bytes], None]) -> None:
    client = Impostor(answer).client()
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.UNREACHABLE]
    client.close()


def test_a_silent_target_is_late_and_then_left_alone() -> None:
    impostor = Impostor(lambda stream, header, _: None)
    client = impostor.client()
    assert client.get([key(1)], rooms(1), soon(0.1)) == [Outcome.LATE]  # it may be busy
    started = time.monotonic()
    assert client.get([key(1)], rooms(1), soon(0.6)) == [Outcome.LATE]
    assert 0.5 < time.monotonic() - started < 5
    assert client.get([key(1)], rooms(1), soon(0.2)) == [Outcome.UNREACHABLE]
    assert impostor.requests == 2
    client.close()


def test_a_refused_connection_leaves_those_that_work(start_target) -> None:
    target = start_target(connections_max=1)
    client = target.client(connections_per_target=2)
    assert client.put([item(100)], soon()) == [Outcome.STORED]
    assert set(client.put([item(n, MIB) for n in range(20)], soon())) == {Outcome.STORED}
    assert "all 1 connections of this target are in use" in client.failure(target.address)
    assert set(client.get([key(n) for n in range(20)], rooms(20, MIB), soon())) == {Outcome.HIT}
    client.close()


def hangs_up_on_key_2(stream: Stream, header: Header, control: bytes) -> None:
    if wire.decode_control(control, wire.Get).keys == [key(2)]:
        stream.abort()
    else:
        stream.send(value(header, payload(1)), soon())


def test_a_lost_connection_leaves_those_that_work() -> None:
    both = threading.Barrier(2)

    def answer(stream: Stream, header: Header, control: bytes) -> None:
        if not both.broken:
            both.wait(20)
        hangs_up_on_key_2(stream, header, control)

    impostor = Impostor(answer)
    client = impostor.client()
    first = threading.Thread(target=client.get, args=([key(1)], rooms(1), soon()))
    first.start()
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.HIT]
    first.join()
    both.abort()
    assert client.get([key(2)], rooms(1), soon()) == [Outcome.UNREACHABLE]
    (left,) = client._line(impostor.address)._free
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.HIT]
    assert client._line(impostor.address)._free == [left]
    assert client.get([key(2)], rooms(1), soon()) == [Outcome.UNREACHABLE]
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.UNREACHABLE]  # none works: it is left alone
    client.close()


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda client: client.get([key(1)], rooms(1), soon()), [Outcome.HIT]),
        (lambda client: client.put([item(1)], soon()), [Outcome.STORED]),
        (lambda client: client.exists([key(1)], soon()), [Outcome.HIT]),
    ],
    ids=["get", "put", "exists"],
)
def test_a_request_on_a_connection_that_the_target_closes_is_made_again(
    start_target, monkeypatch: pytest.MonkeyPatch, ask: Callable[[StoreClient], list[Outcome]], answer: list[Outcome]
) -> None:
    """It was idle, and makes room for another client's in the moment in which it is taken."""
    target = start_target()
    client = target.client()
    client.put([item(1)], soon())
    monkeypatch.setattr(Stream, "is_idle", lambda stream: True)
    target.target.disconnect()
    eventually(lambda: not target.target._connections)
    assert ask(client) == answer
    assert client.failure(target.address) == ""
    client.close()


def test_what_came_before_the_deadline_is_kept() -> None:
    def half(stream: Stream, header: Header, _: bytes) -> None:
        stream.send(value(header, payload(0)), soon())
        time.sleep(2)

    client = Impostor(half).client()
    assert client.get([key(0), key(1)], rooms(2), soon(1)) == [Outcome.HIT, Outcome.LATE]
    client.close()


def test_nobody_writes_to_a_destination_after_the_call() -> None:
    """The rest of a late value arrives after the caller has been told, and has reused the memory."""
    arrived = threading.Event()

    def trickle(stream: Stream, header: Header, _: bytes) -> None:
        first, rest = value(header, b"\xff" * LENGTH)
        stream.send([first, rest[:1000]], soon())
        time.sleep(0.5)
        try:
            stream.send([rest[1000:]], soon())
        finally:
            arrived.set()

    client = Impostor(trickle).client()
    into = rooms(1)
    assert client.get([key(1)], into, soon(0.2)) == [Outcome.LATE]
    into[0][:] = bytes(LENGTH)
    arrived.wait(20)
    time.sleep(0.1)
    assert bytes(into[0]) == bytes(LENGTH)
    client.close()


def test_a_cancelled_get_stops_between_reads() -> None:
    def endless(stream: Stream, header: Header, _: bytes) -> None:
        first, rest = value(header, b"\xff" * LENGTH)
        stream.send([first], soon())
        for start in range(0, LENGTH, 1000):
            stream.send([rest[start : start + 1000]], soon())
            time.sleep(0.02)

    client = Impostor(endless).client()
    started = time.monotonic()
    outcome = client.get([key(1)], rooms(1), soon(10), cancelled=lambda: time.monotonic() - started > 0.2)
    assert outcome == [Outcome.LATE]
    assert time.monotonic() - started < 5
    client.close()


def test_a_deadline_that_is_past_says_nothing_about_the_target(start_target) -> None:
    target = start_target()
    client = target.client()
    assert client.get([key(1)], rooms(1), time.monotonic() - 1) == [Outcome.LATE]
    assert client.get([key(1)], rooms(1), soon()) == [Outcome.MISS]
    client.close()


def test_closing_ends_a_greeting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = StoreClient(StaticMembership([f"127.0.0.1:{silent.getsockname()[1]}"]))
        outcomes: list[Outcome] = []
        call = threading.Thread(target=lambda: outcomes.extend(client.get([key(1)], rooms(1), soon(30))))
        call.start()
        eventually(lambda: client._line(next(iter(client._targets)))._busy if client._targets else False)
        client.close()
        call.join(20)
        assert outcomes == [Outcome.UNREACHABLE]


def test_closing_ends_calls_under_way() -> None:
    client = Impostor(lambda stream, header, _: None).client()
    outcomes: list[Outcome] = []
    call = threading.Thread(target=lambda: outcomes.extend(client.get([key(1)], rooms(1), soon(30))))
    call.start()
    time.sleep(0.2)
    client.close()
    call.join(20)
    assert outcomes == [Outcome.UNREACHABLE]


def test_many_clients_at_once_read_what_they_wrote(start_target, seed: int) -> None:
    target = start_target(capacity=256 * MIB)
    wrong: list[int] = []

    def work(worker: int) -> None:
        chance = random.Random(seed + worker)
        client = target.client(connections_per_target=2)
        for _ in range(15):
            numbers = chance.sample(range(200), 5)
            client.put([item(n) for n in numbers], soon(20))
            into = rooms(5)
            outcomes = client.get([key(n) for n in numbers], into, soon(20))
            wrong.extend(
                n
                for n, room, outcome in zip(numbers, into, outcomes, strict=True)
                if outcome is not Outcome.MISS and (outcome is not Outcome.HIT or bytes(room) != payload(n))
            )
        client.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_expired_request_costs_no_read(start_target) -> None:
    target = start_target()
    client = target.client()
    client.put([item(n) for n in range(3)], soon())
    stream = client._line(target.address)._connected(soon())
    ask = wire.Get([key(n) for n in range(3)], [LENGTH] * 3, 0)
    stream.send([wire.encode(Header(Op.GET, 1), ask)], soon())
    for _ in range(3):
        assert Outcome(stream.receive_header(soon()).flags) is Outcome.LATE
    stream.close()
    eventually(lambda: target.target.status().operations["get"] == {"late": 3})
    client.close()
