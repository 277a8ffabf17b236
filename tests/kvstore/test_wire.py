"""Frames: what is packed is unpacked, and hostile bytes are refused before they cost memory."""

import contextlib
import random
import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.net import transport, wire
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome, ProtocolError
from tests.conftest import RunningTarget, cases, item, key, payload, soon

U32 = st.integers(0, 2**32 - 1)


@given(st.sampled_from(Op), U32, st.integers(0, 2**16 - 1), U32, U32)
def test_headers_read_back(op: Op, request: int, flags: int, number: int, crc: int) -> None:
    header = Header(op, request, flags, number, crc)
    assert wire.decode_header(wire.encode(header)) == header


@settings(max_examples=cases(500))
@given(st.binary(min_size=wire.HEADER_BYTES, max_size=wire.HEADER_BYTES))
def test_random_bytes_are_no_header(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a kvtier frame"):
        wire.decode_header(raw)


@settings(max_examples=cases(500))
@given(st.binary(min_size=wire.HEADER_BYTES - 6, max_size=wire.HEADER_BYTES - 6))
def test_a_header_announces_no_more_than_its_bounds(rest: bytes) -> None:
    try:
        header = wire.decode_header(wire.MAGIC + bytes([wire.VERSION, Op.PUT]) + rest)
    except ProtocolError:
        return
    assert header.control_bytes <= wire.CONTROL_BYTES_MAX
    assert header.data_bytes <= wire.KEYS_MAX * wire.VALUE_BYTES_MAX


@settings(max_examples=cases(500))
@given(st.sampled_from([wire.Hello, wire.Get, wire.Put, wire.Exists]), st.binary(max_size=300))
def test_random_control_parts_are_refused_or_whole(kind: type, raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(wire.decode_control(raw, kind), kind)


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (wire.Get([b"short"], [1], 1), "length >= 16"),
        (wire.Get([key(1)], [1, 2], 1), "1 keys with 2 sizes"),
        (wire.Get([key(1)], [wire.VALUE_BYTES_MAX + 1], 1), "<= 67108864"),
        (wire.Get([key(n) for n in range(wire.KEYS_MAX + 1)], [1] * wire.KEYS_MAX, 1), "length <= 4096"),
        (wire.Put([wire.PutItem(key(1), 0, 1, 1, 1, 1)]), ">= 1"),
        (wire.Put([wire.PutItem(key(1), 1, 1 << 32, 1, 1, 1)]), "<= 4294967295"),
    ],
)
def test_a_control_part_out_of_bounds_is_refused(control: wire.Get | wire.Put, says: str) -> None:
    raw = wire.encode(Header(Op.GET), control)[wire.HEADER_BYTES :]
    with pytest.raises(ProtocolError, match=says):
        wire.decode_control(raw, type(control))


def test_another_version_is_told_so() -> None:
    raw = bytearray(wire.encode(Header(Op.HELLO)))
    raw[4] = 9
    with pytest.raises(ProtocolError, match="protocol version 9, expected 1"):
        wire.decode_header(raw)


def greeted(target: RunningTarget, namespace: str = "default") -> Stream:
    stream = transport.connect(target.address, soon())
    hello = wire.Hello(namespace, "test", "another host")
    stream.send([wire.encode(Header(Op.HELLO), hello)], soon())
    return stream


def refusal(stream: Stream) -> str:
    header = stream.receive_header(soon())
    assert header.op is Op.ERROR
    return wire.decode_control(stream.receive_control(header, soon()), wire.Failure).message


def test_a_target_tells_what_it_refuses_and_hangs_up(start_target) -> None:
    target = start_target()
    stream = greeted(target, namespace="other")
    assert "namespace 'other' is not served here" in refusal(stream)
    with pytest.raises(ConnectionError):
        stream.receive_header(soon())

    stream = transport.connect(target.address, soon())
    stream.send([wire.encode(Header(Op.STAT))], soon())
    assert "the first frame must be HELLO" in refusal(stream)

    stream = greeted(target)
    welcome = stream.receive_header(soon())
    stream.receive_control(welcome, soon())
    stream.send([wire.encode(Header(Op.VALUE))], soon())
    assert "VALUE is not a request" in refusal(stream)


def test_hostile_bytes_do_not_stop_a_target(start_target, seed: int) -> None:
    """Random bytes, cut frames and broken lengths on many connections; then an honest client is served."""
    target = start_target()
    chance = random.Random(seed)
    honest = wire.encode(Header(Op.GET, 1), wire.Get([key(1)], [10], 100))
    for _ in range(200):
        stream = greeted(target) if chance.random() < 0.7 else transport.connect(target.address, soon())
        hostile = bytearray(honest if chance.random() < 0.7 else chance.randbytes(chance.randrange(1, 200)))
        for _ in range(chance.randrange(4)):
            hostile[chance.randrange(len(hostile))] = chance.randrange(256)
        with contextlib.suppress(OSError):
            stream.send([hostile[: chance.randrange(1, len(hostile) + 1)]], soon())
        stream.close()
    client = target.client()
    assert client.put([item(1)], soon()) == [Outcome.STORED]
    into = memoryview(bytearray(100_000))
    assert client.get([key(1)], [into], soon()) == [Outcome.HIT]
    assert bytes(into) == payload(1)
    client.close()


def test_a_put_that_lies_about_its_length_is_refused(start_target) -> None:
    target = start_target()
    stream = greeted(target)
    stream.receive_control(stream.receive_header(soon()), soon())
    described = wire.Put([wire.PutItem(key(1), 10, 0, 1, 1, 1)])
    stream.send([wire.encode(Header(Op.PUT, 1, data_bytes=11), described), bytes(11)], soon())
    assert "not as long as its items" in refusal(stream)


def test_a_stream_keeps_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    with pytest.raises(TimeoutError):
        stream.receive(memoryview(bytearray(10)), soon(0.05))
    threading.Timer(0.05, theirs.close).start()
    with pytest.raises(ConnectionError):
        stream.receive(memoryview(bytearray(10)), soon())
    stream.close()


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":80", "host:x", "host:70000", "::1:80", "[::1]", "[]:80", "[host]:80", "a[::1]:80"],
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        transport.split_address(address)


def test_addresses_split() -> None:
    assert transport.split_address("a.b:1") == ("a.b", 1)
    assert transport.split_address("[::1]:7600") == ("::1", 7600)
    assert transport.join_address("::1", 7600) == "[::1]:7600"


def test_a_look_up_and_every_address_of_a_name_are_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs holds up nobody for longer, and is not asked again meanwhile."""
    asked: list[str] = []
    release = threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *rest: Any, **more: Any) -> Any:
        if more.get("flags"):
            return real(host, *rest, **more)
        asked.append(host)
        release.wait(60)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", where) for where in (("127.0.0.1", 1), listener.getsockname())
        ]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with transport.listen("127.0.0.1:0") as listener:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                transport.connected("store.example:7600", time.monotonic() + 0.1)
        assert asked == ["store.example"]  # nobody waited for its end, after which it would have been asked again
        release.set()
        transport.connected("store.example:7600", soon()).close()  # the second address; nobody listens at the first


def test_a_listener_takes_ipv6_and_names() -> None:
    for address in ("[::1]:0", "localhost:0"):
        with transport.listen(address) as listener:
            port = listener.getsockname()[1]
            transport.connected(transport.join_address(transport.split_address(address)[0], port), soon()).close()


def test_the_wildcard_of_ipv6_is_reached_over_both() -> None:
    with transport.listen("[::]:0") as listener:
        for host in ("127.0.0.1", "::1"):
            address = transport.join_address(host, listener.getsockname()[1])
            transport.connect(address, soon()).close()
