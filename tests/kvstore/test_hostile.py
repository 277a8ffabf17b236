"""The data plane against hostile, slow and too many clients: everything is bounded, and the others are served."""

import contextlib
import errno
import itertools
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks.store.wire_fuzz import KINDS, Frames, SocketFuzz, parse
from kvstore.disk import log as log_module
from kvstore.disk.buffers import Arena, Buffer, BufferPool
from kvstore.disk.files import Files
from kvstore.disk.log import Log, Value
from kvstore.disk.record import PAGE_BYTES, record_bytes
from kvstore.disk.shelf import Rack
from kvstore.net import queues, target, transport, wire
from kvstore.net.backlog import Standing, Write
from kvstore.net.queues import Answer, ConnectionWindow, Read, ReadQueue, Want, WriteQueue
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome, ProtocolError, PutItem
from tests.conftest import MIB, RunningTarget, append, cases, eventually, item, key, payload, soon

LENGTH = 100_000
RECORD = record_bytes(LENGTH)


class Gate(Files):
    """Reads and writes are counted, and wait while their gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = self.waiting = 0
        self._reads, self._writes = threading.Event(), threading.Event()
        self._counting = threading.Lock()
        self.open_all()

    def shut_reads(self) -> None:
        self._reads.clear()

    def shut_writes(self) -> None:
        self._writes.clear()

    def open_all(self) -> None:
        self._reads.set()
        self._writes.set()

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        self.reads += 1
        self._pass(self._reads)
        super().read(fd, into, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.writes += 1
        self._pass(self._writes)
        super().write(fd, buffers, offset)

    def _pass(self, gate: threading.Event) -> None:
        with self._counting:
            self.waiting += 1
        gate.wait(20)
        with self._counting:
            self.waiting -= 1


# ---- the parser


@settings(max_examples=cases(500))
@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda rest: wire.MAGIC + bytes([wire.VERSION]) + rest))
def test_any_bytes_are_a_header_or_a_protocol_error(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        header = wire.decode_header(raw)
        assert isinstance(header, wire.Header)
        assert header.control_bytes <= wire.CONTROL_BYTES_MAX
        assert header.data_bytes <= wire.KEYS_MAX * wire.VALUE_BYTES_MAX


DEEP = st.builds(lambda nested, depth: nested * depth, st.sampled_from([b"\x91", b"\x81\x01"]), st.integers(1, 9000))


@settings(max_examples=cases(500))
@given(st.sampled_from(list(KINDS.values())), st.lists(st.binary(max_size=100) | DEEP, max_size=4).map(b"".join))
def test_any_control_part_is_whole_or_a_protocol_error(kind: type, raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(wire.decode_control(raw, kind), kind)


def test_what_is_nested_too_deep_is_a_protocol_error() -> None:
    hello = wire.encode(Header(Op.HELLO), wire.Hello("a", "b", "c"))[wire.HEADER_BYTES :]
    with pytest.raises(ProtocolError, match="recursion"):
        wire.decode_control(bytes([hello[0] + 1]) + hello[1:] + b"\x91" * 100_000, wire.Hello)


def test_the_fuzz_knows_the_whole_protocol() -> None:
    """What it does not know, it takes for an unknown operation that is to be refused."""
    assert set(Op) - KINDS.keys() == {Op.STAT, Op.VALUE}


@settings(max_examples=cases(300))
@given(st.integers(0, 1 << 64))
def test_mutated_frames_are_accepted_or_refused(frame_seed: int) -> None:
    for raw in itertools.islice(Frames(frame_seed), 10):
        assert parse(raw) in ("accepted", "header refused", "control part refused")


@pytest.mark.parametrize("field", range(3))
def test_names_are_short(field: int) -> None:
    names = ["x" * 257 if number == field else "x" for number in range(3)]
    raw = wire.encode(Header(Op.HELLO), wire.Hello(*names))[wire.HEADER_BYTES :]
    with pytest.raises(ProtocolError, match="length <= 256"):
        wire.decode_control(raw, wire.Hello)


# ---- clients over sockets


def greeted(running: RunningTarget, name: str = "test") -> Stream:
    stream = transport.connect(running.address, soon())
    stream.send([wire.encode(Header(Op.HELLO), wire.Hello("default", name, "elsewhere"))], soon())
    header = stream.receive_header(soon())
    assert header.op is Op.WELCOME
    stream.receive_control(header, soon())
    return stream


def get_frame(numbers: Sequence[int], *, deadline_ms: int = 0xFFFFFFFF) -> bytes:
    return wire.encode(Header(Op.GET, 1), wire.Get([key(n) for n in numbers], [LENGTH] * len(numbers), deadline_ms))


def put_frame(number: int, *, request: int = 1, saved_us: int = 0) -> bytes:
    """All of a PUT of one chunk."""
    content = payload(number, LENGTH)
    one = PutItem(key(number), LENGTH, crc32c(content), 0, 7, 2, saved_us)
    return wire.encode(Header(Op.PUT, request, data_bytes=LENGTH), wire.Put([one])) + content


def stored(stream: Stream) -> tuple[int, Outcome]:
    """The next answer to a PUT of one chunk: which, and what became of it."""
    header = stream.receive_header(soon())
    assert header.op is Op.STORED
    (outcome,) = wire.decode_control(stream.receive_control(header, soon()), wire.Outcomes).outcomes
    return header.request, outcome


def assert_served(running: RunningTarget, numbers: Sequence[int]) -> None:
    """A client like any other gets right bytes."""
    client = running.client()
    rooms = [memoryview(bytearray(LENGTH)) for _ in numbers]
    assert client.get([key(n) for n in numbers], rooms, soon()) == [Outcome.HIT] * len(numbers)
    assert all(bytes(room) == payload(n) for n, room in zip(numbers, rooms, strict=True))
    client.close()


def fill(running: RunningTarget, count: int) -> None:
    client = running.client()
    assert set(client.put([item(n) for n in range(count)], soon())) == {Outcome.STORED}
    client.close()


def is_closed(stream: Stream) -> bool:
    """Whether the target hangs up before long, whatever it says until then."""
    room = memoryview(bytearray(1 << 16))
    with contextlib.suppress(ConnectionError):
        for _ in range(100_000):
            stream.receive(room, soon())
        return False
    return True


def test_complaints_do_not_fill_the_log(start_target, caplog: pytest.LogCaptureFixture) -> None:
    running = start_target()
    for _ in range(100):
        stream = transport.connect(running.address, soon())
        stream.send([bytes(wire.HEADER_BYTES)], soon())
        assert is_closed(stream)
        stream.close()
    lines = [line for line in caplog.messages if "not a kvtier frame" in line]
    assert 1 <= len(lines) <= 20


@pytest.mark.parametrize("dirty_bytes", [0, 4 * MIB])
def test_a_thousand_hostile_frames(start_target, seed: int, dirty_bytes: int) -> None:
    running = start_target(buffer_bytes=32 * MIB, hot_bytes=4 * MIB, dirty_bytes=dirty_bytes)
    fill(running, 8)
    fuzz = SocketFuzz(running.address, seed, [(key(n), LENGTH) for n in range(8)], 1000)
    fuzz.run()
    assert not fuzz.failures
    assert set(fuzz.endings) >= {"ERROR", "closed", "answered"}
    assert_served(running, range(8))
    eventually(lambda: running.target.pool.is_idle)


def assert_served_in_the_end(running: RunningTarget, numbers: Sequence[int]) -> None:
    """While memory is short, some may be refused, but never for long, and nothing worse."""
    client = running.client()
    rooms = {number: memoryview(bytearray(LENGTH)) for number in numbers}
    deadline = soon(10)
    while rooms:
        assert time.monotonic() < deadline, f"still refused: {sorted(rooms)}"
        outcomes = client.get([key(n) for n in rooms], list(rooms.values()), soon())
        assert set(outcomes) <= {Outcome.HIT, Outcome.REFUSED}
        for number in [n for n, outcome in zip(rooms, outcomes, strict=True) if outcome is Outcome.HIT]:
            assert bytes(rooms.pop(number)) == payload(number)
    client.close()


def test_who_reads_nothing_is_bounded_and_closed(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_STALL_LOOK_SECONDS", 0.2)
    running = start_target(buffer_bytes=16 * MIB)
    fill(running, 40)
    greedy = [greeted(running, f"greedy {n}") for n in range(40)]
    for stream in greedy:
        for _ in range(10):
            stream.send([get_frame(range(40))], soon())
    eventually(lambda: running.target.pool.is_short)
    for _ in range(5):
        assert_served_in_the_end(running, range(40))
    eventually(lambda: len(running.target._connections) < 40)
    monkeypatch.setattr(target, "STALL_SECONDS", 0.5)
    for stream in greedy:
        stream.close()
    eventually(lambda: running.target.pool.is_idle)


def test_who_reads_nothing_is_closed_in_the_end(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "STALL_SECONDS", 0.5)
    running = start_target()
    fill(running, 40)
    stream = greeted(running)
    for _ in range(10):
        stream.send([get_frame(range(40))], soon())
    eventually(lambda: not running.target._connections)
    eventually(lambda: running.target.pool.is_idle)
    assert is_closed(stream)


class Lender:
    """A carrier of which nothing is fetched."""

    name = "stub"
    descriptor = None

    def greeting(self) -> bytes:
        return b"hello"

    def remote_buffer(self, buffer: Buffer) -> bytes:
        return b"there"


def test_who_fetches_nothing_is_closed_in_the_end(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(target, "_PINNED_LOOK_SECONDS", 0.1)
    running = start_target()
    fill(running, 10)
    monkeypatch.setattr(running.target, "_lender", Lender())
    stream = transport.connect(running.address, soon())
    stream.send([wire.encode(Header(Op.HELLO), wire.Hello("default", "lazy", "elsewhere", "stub"))], soon())
    stream.send([get_frame(range(10))], soon())
    eventually(lambda: not running.target.pool.is_idle)
    eventually(lambda: running.target.pool.is_idle)
    assert is_closed(stream)


@pytest.mark.parametrize(
    "frame",
    [
        wire.encode(Header(Op.EXISTS, 1), wire.Exists([key(n) for n in range(wire.KEYS_MAX)])),
        wire.encode(Header(Op.STAT, 1)),
        get_frame(range(1000, 1000 + wire.KEYS_MAX)),
    ],
    ids=["exists", "stat", "misses"],
)
def test_answers_that_nobody_takes_are_bounded(start_target, monkeypatch: pytest.MonkeyPatch, frame: bytes) -> None:
    monkeypatch.setattr(target, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(target, "PENDING_BYTES_MAX", 1 << 16)
    monkeypatch.setattr(transport, "SOCKET_BUFFER_BYTES", 1 << 16)
    running = start_target()
    stream = greeted(running)
    many = [frame] * max(1, (1 << 16) // len(frame))
    with contextlib.suppress(ConnectionError, TimeoutError):
        for _ in range(1000):
            stream.send(many, soon())
            for connection in list(running.target._connections):
                assert connection._short_bytes <= (1 << 16) + 2 * wire.KEYS_MAX * wire.HEADER_BYTES
    eventually(lambda: not running.target._connections)
    stream.close()


def test_a_stalled_put_holds_nobody_up(start_target) -> None:
    running = start_target(buffer_bytes=16 * RECORD)
    fill(running, 4)
    stalled = [greeted(running, f"stalled {n}") for n in range(20)]
    for number, stream in enumerate(stalled):
        frame = put_frame(100 + number, saved_us=0xFFFFFFFF)
        stream.send([frame[: len(frame) // 2]], soon())
    eventually(lambda: running.target.pool.available_bytes <= 8 * RECORD)
    assert_served(running, range(4))
    client = running.client()
    assert client.put([item(5)], soon()) == [Outcome.REFUSED]  # half of the memory is for what is coming in
    for stream in stalled:
        stream.close()
    eventually(lambda: running.target.pool.is_idle)
    assert client.put([item(5)], soon()) == [Outcome.STORED]
    client.close()


def ask_for_one(stream: Stream) -> bool:
    stream.send([get_frame([0])], soon())
    header = stream.receive_header(soon())
    stream.receive(memoryview(bytearray(header.data_bytes)), soon())
    return Outcome(header.flags) is Outcome.HIT


def test_thousands_beyond_the_limit_are_refused(start_target) -> None:
    running = start_target(connections_max=20)
    fill(running, 1)
    eventually(lambda: not running.target._connections)
    served = [greeted(running, f"served {n}") for n in range(20)]
    hello = wire.encode(Header(Op.HELLO), wire.Hello("default", "too many", "elsewhere"))
    for _ in range(10):
        crowd = [transport.connect(running.address, soon()) for _ in range(200)]
        for stream in crowd:
            with contextlib.suppress(ConnectionError):
                stream.send([hello], soon())
        assert all(is_closed(stream) for stream in crowd)
        for stream in crowd:
            stream.close()
        assert all(ask_for_one(stream) for stream in served)
    for stream in served:
        stream.close()
    eventually(lambda: not running.target._connections)
    assert_served(running, [0])


def test_when_places_run_out_who_is_idle_for_longest_makes_room(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greeted or not; while nobody is, a client is told why it is turned away."""
    running = start_target(connections_max=3)
    fill(running, 1)
    eventually(lambda: not running.target._connections)
    silent = transport.connect(running.address, soon())
    first, second = (greeted(running, name) for name in ("first", "second"))
    eventually(lambda: len(running.target._connections) == 3)
    client = running.client()
    assert client.exists([key(0)], soon()) == [Outcome.UNREACHABLE]
    assert "all 3 connections of this target are in use" in client.failure(running.address)
    client.close()

    monkeypatch.setattr(target, "IDLE_SECONDS", 0.5)
    time.sleep(0.6)
    assert ask_for_one(first)
    newcomers = [greeted(running, name) for name in ("third", "fourth")]
    assert is_closed(silent)
    assert is_closed(second)
    assert all(ask_for_one(stream) for stream in (first, *newcomers))
    for stream in (silent, first, second, *newcomers):
        stream.close()


def test_a_request_that_comes_as_its_connection_makes_room_is_answered(
    start_target, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    running = start_target(connections_max=1, files=gate)
    fill(running, 1)
    eventually(lambda: not running.target._connections)
    stream = greeted(running, "first")
    (connection,) = running.target._connections
    monkeypatch.setattr(target, "IDLE_SECONDS", 0.1)
    time.sleep(0.2)
    gate.shut_reads()
    drain = connection.drain

    def late() -> None:
        stream.send([get_frame([0])], soon())
        eventually(lambda: connection._pending)
        drain()

    monkeypatch.setattr(connection, "drain", late)
    other = greeted(running, "other")
    gate.open_all()
    header = stream.receive_header(soon())
    assert Outcome(header.flags) is Outcome.HIT
    stream.receive(memoryview(bytearray(header.data_bytes)), soon())
    assert is_closed(stream)
    for one in (stream, other):
        one.close()


def test_a_peer_whose_host_is_gone_is_noticed(start_target) -> None:
    running = start_target()
    stream = greeted(running, "client")
    (connection,) = running.target._connections
    for side in (stream, connection.incoming, connection._outgoing):
        assert side._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert side._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * target.STALL_SECONDS
    stream.close()


def no_descriptor(stream: Stream) -> Stream:
    raise OSError(errno.EMFILE, "too many open files")


def test_accepting_goes_on_when_descriptors_run_out(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start_target()
    fill(running, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "twin", no_descriptor)
        assert is_closed(transport.connect(running.address, soon()))
    assert_served(running, [0])


def test_accepting_goes_on_when_threads_run_out(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start_target()
    fill(running, 1)
    start = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "kvtier-session":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert is_closed(transport.connect(running.address, soon()))
        eventually(lambda: not running.target._connections)
    assert_served(running, [0])


def test_what_has_no_payload_overtakes_those_that_do(start_target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SOCKET_BUFFER_BYTES", 1 << 16)
    running = start_target(buffer_bytes=128 * MIB)
    fill(running, 60)
    stream = greeted(running)
    eventually(lambda: "test" in [one.window.client for one in list(running.target._connections)])
    (connection,) = (one for one in list(running.target._connections) if one.window.client == "test")
    stream.send([get_frame(range(60))], soon())
    eventually(lambda: len(connection._outbox) > 40)  # the socket is full
    asked, status = threading.Event(), running.target.status
    monkeypatch.setattr(running.target, "status", lambda: asked.set() or status())
    stream.send([wire.encode(Header(Op.STAT, 2))], soon())
    assert asked.wait(20)
    order = []
    for _ in range(61):
        header = stream.receive_header(soon())
        stream.receive_control(header, soon())
        stream.receive(memoryview(bytearray(header.data_bytes)), soon())
        order.append(header.op)
    assert order.index(Op.STATUS) < 40
    stream.close()


def test_a_device_that_hangs_is_named_and_does_not_hold_up_the_stop(
    start_target, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_module, "CLOSE_SECONDS", 0.2)
    running = start_target(files=gate, flush_seconds=0.1)
    fill(running, 1)
    (tmp_path / "shared").mkdir()
    rack = Rack([tmp_path / "shared"], 64 * MIB, {"a": 16 * MIB, "b": 16 * MIB}, segment_bytes=4 * MIB, files=gate)
    rack.begin()
    assert all(append(shelf.logs[0], 1) for shelf in rack.shelves.values())
    gate.shut_writes()
    began = time.monotonic()
    running.stop()
    rack.close()
    assert time.monotonic() - began < 5
    hung = [line for line in caplog.messages if "the device does not answer; not closed after 0.2 s" in line]
    assert [line.partition(":")[0] for line in hung] == [str(running.log.path), str(tmp_path / "shared")]


# ---- reads


@pytest.fixture
def gate() -> Iterator[Gate]:
    files = Gate()
    yield files
    files.open_all()


@pytest.fixture
def log(tmp_path: Path, gate: Gate) -> Iterator[Log]:
    one = Log(tmp_path, 64 * MIB, segment_bytes=4 * MIB, files=gate)
    yield one
    gate.open_all()
    one.close()


class Line:
    """A queue with one thread, and what it answered in which order."""

    def __init__(self, log: Log, gate: Gate):
        for number in range(64):
            assert append(log, number)
        gate.reads = 0
        self.gate = gate
        self.pool = BufferPool(32 * MIB)
        self.queue = ReadQueue(log, self.pool, threads=1)
        self.answers: list[tuple[str, int, Outcome]] = []
        self._readers: dict[str, ConnectionWindow] = {}

    def reader(self, client: str) -> ConnectionWindow:
        return self._readers.setdefault(client, ConnectionWindow(client, self.pool))

    def ask(self, client: str, numbers: Sequence[int], deadline: float = math.inf) -> None:
        reader = self.reader(client)

        def done(answers: list[Answer]) -> None:
            for want, outcome, buffer, _ in answers:
                self.answers.append((client, want.number, outcome))
                if buffer is not None:
                    self.pool.give_back(buffer)
                    reader.hold(-want.length)

        self.queue.submit([Read(reader, [Want(n, key(n), LENGTH)], min(deadline, soon(60)), done) for n in numbers])

    def outcome(self, client: str, number: int) -> Outcome | None:
        return next((outcome for who, what, outcome in self.answers if (who, what) == (client, number)), None)

    def begin(self) -> None:
        """One read is under way and stays there."""
        self.gate.shut_reads()
        self.ask("first", [0])
        eventually(lambda: self.gate.waiting == 1)

    def finish(self, count: int) -> list[str]:
        """Let everything go on; who was answered, in order."""
        self.gate.open_all()
        eventually(lambda: len(self.answers) == count)
        assert self.queue.waiting_bytes == self.queue._waiting_chunks == 0
        self.queue.stop()
        return [client for client, _, _ in self.answers]


@pytest.fixture
def line(log: Log, gate: Gate) -> Line:
    return Line(log, gate)


def test_a_batch_does_not_delay_another_clients_get(line: Line) -> None:
    line.begin()
    line.ask("greedy", range(30))
    line.ask("modest", [40])
    assert line.finish(32).index("modest") <= 2


def test_clients_take_turns(line: Line) -> None:
    line.begin()
    line.ask("a", range(20))
    line.ask("b", range(20, 25))
    line.ask("c", range(30, 40))
    order = line.finish(36)[1:]
    assert order == [*"abc" * 5, *"ac" * 5, *"a" * 10]


def test_what_would_come_too_late_is_refused_at_once(line: Line) -> None:
    line.queue._speed, line.queue._speed_until = 10.0 * LENGTH, math.inf
    line.begin()
    line.ask("greedy", range(30))
    line.ask("greedy", [50], soon(2))  # its turn comes in 3 s
    line.ask("modest", [51], soon(2))
    assert line.outcome("greedy", 50) is Outcome.REFUSED
    assert line.outcome("modest", 51) is None
    line.finish(33)
    assert line.outcome("modest", 51) is Outcome.HIT
    assert line.gate.reads == 32


def test_what_could_not_be_sent_in_time_is_refused_at_once(line: Line) -> None:
    line.begin()
    line.reader("slow").sent(LENGTH, 10.0)
    line.ask("slow", [1], soon(5))  # tried: nothing is ahead of it, and the client may be quicker now
    line.ask("slow", [2], soon(5))
    assert line.outcome("slow", 2) is Outcome.REFUSED
    line.finish(3)
    assert line.outcome("slow", 1) is Outcome.HIT
    assert line.gate.reads == 2


def test_what_expired_is_not_read(line: Line) -> None:
    line.begin()
    line.ask("client", [1], time.monotonic() - 1)
    assert line.outcome("client", 1) is Outcome.LATE
    line.ask("client", [2], soon(0.05))
    time.sleep(0.1)
    line.finish(3)
    assert line.outcome("client", 2) is Outcome.LATE
    assert line.gate.reads == 1


def test_who_takes_nothing_leaves_its_turns_to_others(line: Line) -> None:
    line.reader("stalled").hold(queues.WINDOW_BYTES)
    line.ask("stalled", [1], soon(0.2))
    line.ask("stalled", [2])
    line.ask("other", range(10, 20))
    eventually(lambda: line.outcome("stalled", 1) is Outcome.LATE)  # for which there need not be room
    eventually(lambda: len(line.answers) == 11)
    assert line.outcome("stalled", 2) is None
    line.reader("stalled").hold(-queues.WINDOW_BYTES)
    line.finish(12)
    assert line.outcome("stalled", 2) is Outcome.HIT


def test_who_is_gone_is_forgotten(line: Line) -> None:
    line.begin()
    line.ask("gone", range(1, 11))
    line.ask("first", [20])
    line.queue.drop(line.reader("gone"))
    line.finish(2)
    assert line.gate.reads == 2


def test_a_client_leaves_places_to_others(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "WAITING_CHUNKS_MAX", 20)
    line.begin()
    line.ask("greedy", range(1, 31))
    refused = [what for what in range(1, 31) if line.outcome("greedy", what) is Outcome.REFUSED]
    assert refused == list(range(11, 31))
    line.ask("modest", range(40, 45))
    assert not [what for what in range(40, 45) if line.outcome("modest", what)]
    line.finish(36)


def test_the_window_of_a_connection_shrinks_with_the_memory() -> None:
    pool = touched(64 * MIB)
    held = fill_windows([ConnectionWindow(str(n), pool) for n in range(40)], pool, LENGTH)
    assert all(held)
    assert pool.available_bytes > 8 * MIB
    assert ConnectionWindow("new", pool).has_room(4 * MIB)


def test_the_first_value_of_many_connections_leaves_some_memory() -> None:
    pool = touched(64 * MIB)
    held = fill_windows([ConnectionWindow(str(n), pool) for n in range(40)], pool, 4 * MIB)
    assert all(held)
    assert ConnectionWindow("new", pool).has_room(2 * MIB)


def fill_windows(readers: list[ConnectionWindow], pool: BufferPool, length: int) -> list[Buffer | None]:
    """What all of them together may hold of values of this length."""
    held = []
    for reader in itertools.islice(itertools.cycle(readers), 2000):
        if reader.has_room(length):
            reader.hold(length)
            held.append(pool.take(length, soon(0.1)))
    return held


# ---- writes


class Writer:
    """A queue with one thread that is stuck in a write, and room for four more."""

    def __init__(self, log: Log, gate: Gate):
        assert append(log, 0)
        self.gate = gate
        self.pool = BufferPool(32 * RECORD)
        self.queue = WriteQueue(log, self.pool, 4 * RECORD, threads=1)
        self.outcomes: dict[int, list[Outcome]] = {}
        gate.shut_writes()
        assert self.offer(1, 1.0)
        eventually(lambda: gate.waiting == 1)

    def offer(self, number: int, benefit: float) -> bool:
        if not self.queue.expect(key(number), LENGTH, Standing(benefit), 0.0):
            return False
        self.bring(number, benefit)
        return True

    def bring(self, number: int, benefit: float) -> None:
        """What was expected."""
        buffer = self.pool.take(LENGTH, soon())
        assert buffer is not None
        buffer.payload[:] = payload(number, LENGTH)
        value = Value(key(number), buffer, crc32c(buffer.payload), 0, 7, 2)
        self.queue.offer(Write(value, Standing(benefit), [self.outcomes.setdefault(number, []).append]))


@pytest.fixture
def writer(log: Log, gate: Gate) -> Writer:
    return Writer(log, gate)


def test_a_full_queue_sheds_what_is_of_least_benefit(writer: Writer, log: Log) -> None:
    assert all(writer.offer(number, float(number)) for number in (2, 3, 4, 5))
    assert not writer.offer(6, 1.5)
    assert not writer.offer(6, 2.0)
    assert writer.offer(7, 2.5)
    assert writer.outcomes.pop(2) == [Outcome.REFUSED]
    writer.gate.open_all()
    eventually(lambda: all(writer.outcomes.values()))
    assert writer.outcomes == {number: [Outcome.STORED] for number in (1, 3, 4, 5, 7)}
    assert key(2) not in log


def test_nothing_is_shed_for_what_finds_no_room_even_so(writer: Writer) -> None:
    assert all(writer.offer(number, 2.0 if number == 2 else 9.0) for number in (2, 3, 4, 5))
    assert not writer.queue.expect(key(6), 2 * LENGTH, Standing(5.0), 0.0)
    assert not writer.outcomes[2]


def test_what_is_coming_in_counts(writer: Writer) -> None:
    assert all(writer.queue.expect(key(number), LENGTH, Standing(1.0), 0.0) for number in range(3, 7))
    assert not writer.queue.expect(key(7), LENGTH, Standing(9.0), 0.0)  # there is nothing that could be shed
    writer.queue.give_up(key(3), LENGTH)
    assert writer.offer(2, 9.0)


def test_who_finds_no_room_waits_until_something_was_written(writer: Writer) -> None:
    assert all(writer.offer(number, 9.0) for number in (2, 3, 4, 5))
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(writer.queue.expect(key(6), LENGTH, Standing(1.0), soon())))
    waiting.start()
    time.sleep(0.1)
    assert not found
    writer.gate.open_all()
    waiting.join(20)
    assert found == [True]


def test_what_follows_a_chunk_that_somebody_else_brought_is_taken_in(writer: Writer) -> None:
    first, second = Standing(9.0, router_hash=2), Standing(9.0, 1, router_hash=3, parent=2)
    assert all(writer.queue.expect(key(2), LENGTH, first, 0.0) for _ in range(2))  # from two clients
    writer.bring(2, 9.0)
    assert all(writer.offer(number, 9.0) for number in (4, 5))
    assert not writer.queue.expect(key(2), LENGTH, first, 0.0)  # a third, for whom there is no room
    writer.queue.give_up(key(2), LENGTH, first)
    assert not writer.queue.dropped.total()
    assert writer.queue.expect(key(3), LENGTH, second, 0.0)
    writer.queue.give_up(key(3), LENGTH, second)
    assert not writer.queue.expect(key(6), LENGTH, Standing(9.0, 2, router_hash=6, parent=3), soon())


def test_a_key_that_comes_twice_is_written_once(writer: Writer, log: Log) -> None:
    assert writer.queue.expect(key(2), LENGTH, Standing(1.0), 0.0)
    assert writer.offer(2, 1.0)
    writer.bring(2, 1.0)
    assert writer.queue.join(key(2), writer.outcomes[2].append)
    writer.gate.open_all()
    eventually(lambda: writer.outcomes[2] == [Outcome.STORED] * 3)
    assert log.stats.accepted_bytes == 3 * LENGTH
    assert writer.pool.is_idle


def test_benefit_is_what_a_byte_saves_and_counts_more_for_what_returns(start_target, gate: Gate) -> None:
    running = start_target(files=gate, buffer_bytes=10 * RECORD)
    fill(running, 1)
    stream = greeted(running)
    gate.shut_writes()
    for number in (1, 2):  # the queue's two threads
        stream.send([put_frame(number, request=number)], soon())
        eventually(lambda: gate.waiting == number)  # noqa: B023
    for number, saved_us in ((3, 50), (4, 40), (5, 30), (6, 20), (7, 10)):
        stream.send([put_frame(number, request=number, saved_us=saved_us)], soon())
    stream.send([put_frame(8, request=8, saved_us=5)], soon())
    assert stored(stream) == (8, Outcome.REFUSED)
    stream.send([put_frame(9, request=9, saved_us=15)], soon())
    assert stored(stream) == (7, Outcome.REFUSED)
    running.log._ghosts[key(10)] = None
    stream.send([put_frame(10, request=10, saved_us=6)], soon())
    assert stored(stream) == (9, Outcome.REFUSED)
    assert_served(running, [0])  # while no write goes on
    gate.open_all()
    assert sorted(stored(stream) for _ in range(7)) == [(n, Outcome.STORED) for n in (1, 2, 3, 4, 5, 6, 10)]
    stream.close()


def test_puts_of_one_key_in_flight_are_written_once(start_target, gate: Gate) -> None:
    running = start_target(files=gate)
    fill(running, 1)
    streams = [greeted(running) for _ in range(6)]
    gate.shut_writes()
    writes = gate.writes
    frame = put_frame(1)
    half = len(frame) // 2
    streams[0].send([frame[:half]], soon())  # this one's payload is being taken in when the others come
    for stream in streams[1:]:
        stream.send([frame], soon())
    eventually(lambda: gate.waiting == 1)
    streams[0].send([frame[half:]], soon())
    eventually(lambda: len(running.target._writes[running.log]._pending[key(1)].done) == 6)
    gate.open_all()
    assert [stored(stream) for stream in streams] == [(1, Outcome.STORED)] * 6
    assert gate.writes == writes + 1
    for stream in streams:
        stream.close()


# ---- memory


def test_a_hot_hit_costs_no_read(start_target, gate: Gate) -> None:
    running = start_target(files=gate, hot_bytes=16 * MIB)
    fill(running, 20)
    gate.reads = 0
    for _ in range(3):
        assert_served(running, range(20))
    assert gate.reads == 0
    status = running.target.status()
    assert (status.hot_hits, status.device_hits) == (60, 0)


def test_what_was_read_once_is_hot(start_target, gate: Gate) -> None:
    running = start_target(files=gate, hot_bytes=16 * MIB)
    for number in range(5):
        append(running.log, number)
    gate.reads = 0
    assert_served(running, range(5))
    reads = gate.reads
    assert 1 <= reads <= 5
    assert_served(running, range(5))
    assert gate.reads == reads


def touched(total_bytes: int) -> BufferPool:
    """A pool that has all its memory."""
    pool = BufferPool(total_bytes, keeps_values=True)
    eventually(lambda: sum(pool.arena._ends.values()) - sum(pool.arena._starts) == pool.arena.total_bytes)
    return pool


def test_whoever_fits_gets_what_came_back() -> None:
    """The first in line wants more than there is."""
    pool = touched(16 * PAGE_BYTES)
    small, rest = pool.take(3 * PAGE_BYTES, soon()), pool.take(11 * PAGE_BYTES, soon())
    assert small is not None
    assert rest is not None
    got: list[Buffer | None] = []
    threads = []
    for pages in (15, 3):
        threads.append(threading.Thread(target=lambda pages=pages: got.append(pool.take(pages * PAGE_BYTES, soon()))))
        threads[-1].start()
        eventually(lambda: len(pool._returned._waiters) == len(threads))  # type: ignore[attr-defined]
    pool.give_back(small)
    eventually(lambda: got)
    assert got[0] is not None
    pool.give_back(got[0])
    pool.give_back(rest)
    for thread in threads:
        thread.join(20)
    assert all(got)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a model: every buffer is filled with a pattern of its own, so that an overlap shows."""

    PAGES = 48

    def __init__(self) -> None:
        super().__init__()
        self.pool = touched(self.PAGES * PAGE_BYTES)
        self.held: list[Buffer] = []  # a buffer with two holders is here twice
        self.patterns: dict[int, int] = {}  # of held buffers, by id
        self.kept: dict[bytes, tuple[int, int]] = {}  # key -> pattern and length
        self.numbers = itertools.count(1)

    @rule(length=st.integers(1, 20 * PAGE_BYTES))
    def take(self, length: int) -> None:
        buffer = self.pool.take(length, time.monotonic() - 1)
        if buffer is None:
            assert self.held or record_bytes(length) > self.PAGES * PAGE_BYTES
            return
        assert len(buffer.payload) == length
        pattern = next(self.numbers) % 251
        buffer.record[:] = bytes([pattern]) * len(buffer.record)
        self.held.append(buffer)
        self.patterns[id(buffer)] = pattern

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.integers(0, 5))
    def keep(self, data: st.DataObject, name: int) -> None:
        buffer = data.draw(st.sampled_from(self.held))
        pattern = self.patterns[id(buffer)]
        self.pool.keep(key(name), buffer, pattern)
        if buffer.key == key(name):
            self.kept[key(name)] = pattern, buffer.length

    @rule(name=st.integers(0, 5), other_length=st.booleans())
    def find(self, name: int, other_length: bool) -> None:
        pattern, length = self.kept.get(key(name), (0, 1))
        buffer = self.pool.find(key(name), length + other_length)
        if buffer is None:
            assert other_length or not any(one.key == key(name) for one in self.held)
            return
        assert not other_length
        assert (buffer.length, buffer.crc) == (length, pattern)
        self.held.append(buffer)
        self.patterns[id(buffer)] = pattern

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def contents_stay(self) -> None:
        for buffer in self.held:
            assert bytes(buffer.record) == bytes([self.patterns[id(buffer)]]) * len(buffer.record)

    @invariant()
    def bounds_hold(self) -> None:
        held_bytes = sum(len(buffer.record) for buffer in {id(buffer): buffer for buffer in self.held}.values())
        assert self.pool.available_bytes == self.PAGES * PAGE_BYTES - held_bytes
        entries, kept_bytes = self.pool.kept
        assert entries <= 6
        assert kept_bytes <= self.PAGES * PAGE_BYTES


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=cases(40), stateful_step_count=30, deadline=None)


@settings(max_examples=cases(200), deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=80))
def test_extents_never_overlap_and_join_again(steps: list[tuple[bool, int]]) -> None:
    total = 64 * PAGE_BYTES
    arena = Arena(total)
    arena.give_back(0, total)
    taken: list[tuple[int, int]] = []
    for is_take, number in steps:
        size = number * PAGE_BYTES
        if is_take:
            start = arena.take(size)
            if start is not None:
                assert 0 <= start <= total - size
                assert all(start + size <= other or other + length <= start for other, length in taken)
                taken.append((start, size))
        elif taken:
            arena.give_back(*taken.pop(number % len(taken)))
        free = sum(arena._ends[start] - start for start in arena._starts)
        assert free + sum(size for _, size in taken) == total
    for extent in taken:
        arena.give_back(*extent)
    assert arena.take(total) == 0
