"""The switch in user space: which frames arrive where, and none of them early."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from benchmarks.store import switch as module
from benchmarks.store.switch import Links, Switch

EVERYBODY = b"\xff" * 6


def address(host: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, host])


def frame(to: bytes, host: int, number: int = 0) -> bytes:
    return to + address(host) + number.to_bytes(2, "big")


@pytest.fixture
def hosts() -> Iterator[list[socket.socket]]:
    """Pairs of sockets in place of TAP devices: ours first, then the switch's."""
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for one in (each for pair in pairs for each in pair):
            one.setblocking(False)
            stack.enter_context(one)
        yield [of[side] for side in (0, 1) for of in pairs]


def received(host: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(host.recv(9018))
        except BlockingIOError:
            return found


def made(hosts: list[socket.socket], delay_ms: float = 0.0, loss_percent: float = 0.0) -> Switch:
    """With a bad link to host 0."""
    switch = Switch([host.fileno() for host in hosts[3:]])
    switch.change(Links([delay_ms, 0.0, 0.0], [loss_percent, 0.0, 0.0]))
    return switch


def test_a_frame_goes_to_its_host_and_to_all_until_that_is_known(hosts: list[socket.socket]) -> None:
    switch = made(hosts)
    for sender, to in ((0, EVERYBODY), (1, address(0)), (2, address(9))):
        hosts[sender].send(frame(to, sender))
        switch.run(0.05)
    assert [len(received(host)) for host in hosts[:3]] == [2, 2, 1]
    assert switch.passed.frames == 5


def test_a_frame_waits_for_the_slower_of_its_links_and_keeps_its_place(hosts: list[socket.socket]) -> None:
    switch = made(hosts, delay_ms=100.0)
    for number in range(20):
        hosts[1].send(frame(EVERYBODY, 1, number))
    begun = time.monotonic()
    switch.run(0.02)
    early = received(hosts[0]) if time.monotonic() < begun + 0.1 else []
    switch.run(0.3)
    expected = [frame(EVERYBODY, 1, number) for number in range(20)]
    assert early == []
    assert received(hosts[0]) == received(hosts[2]) == expected


def test_what_is_lost_and_what_finds_no_room_is_counted(
    hosts: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = made(hosts, loss_percent=100.0)
    for _ in range(5):
        hosts[1].send(frame(EVERYBODY, 1))
    switch.run(0.05)
    assert (switch.passed.frames, switch.passed.lost) == (5, 5)
    monkeypatch.setattr(module, "WAITING_MAX", 3)
    switch.change(Links([60_000.0] * 3, [0.0] * 3))
    for _ in range(5):
        hosts[1].send(frame(EVERYBODY, 1))
    switch.run(0.05)
    assert (switch.passed.frames, switch.passed.dropped) == (5, 7)


def test_it_ends_when_somebody_else_has_something_to_say(hosts: list[socket.socket]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"x")
        assert made(hosts).run(10.0, theirs.fileno())
    assert not made(hosts).run(0.01)
