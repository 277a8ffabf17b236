"""Hostile frames against the parser and against a running target: nothing crashes, hangs, grows or serves wrong bytes.

    python -m benchmarks.store.wire_fuzz --frames 1000000 --seed S --json FILE [--socket-frames N]

Every frame is decided by the seed. Most go to `decode_header` and `decode_control`, which must return or raise
ProtocolError. The others go over sockets to a target process. A model of the protocol gives the expected end of each
connection: all answers, or an ERROR. After a truncated frame, it is a close once the stream ends. A connection without
its expected end within the time limit has failed. Meanwhile an honest client reads what it wrote, and the target's
memory is watched. The exit code is 1 if anything failed.
"""

import argparse
import contextlib
import enum
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from crc32c import crc32c

from kvstore.net import transport, wire
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.target import STALL_SECONDS
from kvstore.net.transport import Stream
from kvstore.net.wire import (
    CONTROL_BYTES_MAX,
    HEADER,
    HEADER_BYTES,
    KEYS_MAX,
    VALUE_BYTES_MAX,
    Header,
    Op,
    ProtocolError,
)

NAMESPACE = "default"
# An answer, an ERROR or a close comes within this; it is waited for with the machine busy.
BOUND_SECONDS = 20.0
FRAMES_PER_CONNECTION = 8
FUZZERS = 4
STALLED_CONNECTIONS = 32
HONEST_VALUES, HONEST_BYTES = 16, 64 << 10
HONEST_PAUSE_SECONDS = 0.05
TARGET_OPTIONS = ("--capacity", "1GiB", "--segment-size", "16MiB", "--buffers", "64MiB", "--hot", "16MiB")
WARM_UP_FRAMES = 1000  # until all pools, threads and code are there
_PARSED_AT_ONCE = 5_000
_FAILURES_SHOWN = 20

# ---- frames

_SCALARS: list[Any] = [
    *(None, True, False, -1, 0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(1.5, float("nan"), float("inf"), "", "default", "x" * 300, b"", bytes(15), bytes(16), bytes(17)),
    *(msgspec.msgpack.Ext(5, b"?"), msgspec.msgpack.Ext(-1, b"\xff" * 12)),
]
# As many bytes as follow, or one element for each count up to 2**32.
_COUNTED = b"\xc4\xc5\xc6\xc7\xc8\xc9\xd9\xda\xdb\xdc\xdd\xde\xdf"
_NESTED = (b"\x91", b"\x81\x01", b"\xdc\x00\x01", b"\xc0")
_LENGTHS = (
    0,
    1,
    HEADER_BYTES,
    CONTROL_BYTES_MAX,
    VALUE_BYTES_MAX,
    KEYS_MAX * VALUE_BYTES_MAX,
    *((1 << n) for n in (31, 32, 63, 64)),
)
_DEADLINES = (0, 1, 50, 1000, 0xFFFFFFFF)
KINDS: dict[Op, type[msgspec.Struct]] = {  # of all that have a control part
    Op.HELLO: wire.Hello,
    Op.WELCOME: wire.Welcome,
    Op.GET: wire.Get,
    Op.PUT: wire.Put,
    Op.STORED: wire.Outcomes,
    Op.EXISTS: wire.Exists,
    Op.FOUND: wire.Outcomes,
    Op.STATUS: wire.Status,
    Op.LIST: wire.List,
    Op.LISTED: wire.Listed,
    Op.PREFETCH: wire.Prefetch,
    Op.PREFETCHED: wire.Outcomes,
    Op.TAKEN: wire.Taken,
    Op.PLACED: wire.Placed,
    Op.CHALLENGE: wire.Challenge,
    Op.PROVE: wire.Prove,
    Op.ERROR: wire.Failure,
}
_encode = msgspec.msgpack.Encoder().encode


class Frame(NamedTuple):
    header: Header
    control: msgspec.Struct | None = None
    data: bytes = b""

    def __bytes__(self) -> bytes:
        return wire.encode(self.header._replace(data_bytes=len(self.data)), self.control) + self.data


class Frames:
    """An endless stream of hostile frames. `known` are keys that a target has, and their lengths."""

    def __init__(self, seed: int | str, known: Sequence[tuple[bytes, int]] = ()):
        self._chance = random.Random(seed)
        self._known = known
        often = [self._get, self._put]
        requests = [*often, self._exists, self._prefetch, self._stat, self._list, self._hello, self._taken]
        self._valid = [*requests, *requests, *often, *often, self._answer]
        self._hostile = [
            *(self._as_is, self._flipped, self._flipped, self._truncated, self._extended, self._spliced),
            *(self._lengths, self._swapped, self._misshapen, self._misshapen, self._packed, self._noise),
        ]

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self._chance.choice(self._hostile)()

    def valid(self) -> Frame:
        return self._chance.choice(self._valid)()

    # valid frames, some of which only a target may send

    def _key(self) -> tuple[bytes, int]:
        if self._known and self._chance.random() < 0.5:
            return self._chance.choice(self._known)
        return self._chance.randbytes(16), self._chance.choice((1, 4096, HONEST_BYTES, VALUE_BYTES_MAX))

    def _count(self) -> int:
        return KEYS_MAX if self._chance.random() < 0.001 else self._chance.choice((0, 1, 1, 2, 5))

    def _header(self, op: Op) -> Header:
        return Header(op, self._chance.getrandbits(32))

    def _hello(self) -> Frame:
        namespace = self._chance.choice((NAMESPACE, NAMESPACE, "other", "", "\U0010ffff" * 1000))
        return Frame(self._header(Op.HELLO), wire.Hello(namespace, "fuzz" * self._chance.randrange(3), "elsewhere"))

    def _get(self) -> Frame:
        wanted = [self._key() for _ in range(self._count())]
        ask = wire.Get([key for key, _ in wanted], [size for _, size in wanted], self._chance.choice(_DEADLINES))
        return Frame(self._header(Op.GET), ask)

    def _put(self) -> Frame:
        payloads = [self._chance.randbytes(self._chance.choice((1, 100, 5000))) for _ in range(min(5, self._count()))]
        items = [self._item(payload) for payload in payloads]
        return Frame(self._header(Op.PUT), wire.Put(items), b"".join(payloads))

    def _item(self, payload: bytes) -> wire.PutItem:
        chance = self._chance
        crc = crc32c(payload) if chance.random() < 0.8 else chance.getrandbits(32)
        saved = chance.choice((0, 1000, 0xFFFFFFFF))
        position, parent = chance.choice((0, 5, 0xFFFFFFFF)), chance.choice((0, 1, 2, chance.getrandbits(64)))
        router_hash = chance.choice((0, 1, 2, chance.getrandbits(64)))
        return wire.PutItem(
            chance.randbytes(16), len(payload), crc, router_hash, 7, 2, saved, position=position, parent=parent
        )

    def _exists(self) -> Frame:
        return Frame(self._header(Op.EXISTS), wire.Exists([self._key()[0] for _ in range(self._count())]))

    def _prefetch(self) -> Frame:
        return Frame(self._header(Op.PREFETCH), wire.Prefetch([self._key()[0] for _ in range(self._count())]))

    def _stat(self) -> Frame:
        return Frame(self._header(Op.STAT))

    def _list(self) -> Frame:
        cursor = (self._chance.getrandbits(16), self._chance.getrandbits(64), self._chance.getrandbits(32))
        return Frame(
            self._header(Op.LIST), wire.List(self._chance.choice((0, 7)), self._chance.choice((cursor, (0, 0, 0))))
        )

    def _taken(self) -> Frame:
        return Frame(self._header(Op.TAKEN), wire.Taken(self._chance.getrandbits(16)))

    def _answer(self) -> Frame:
        outcomes = wire.Outcomes([wire.Outcome.STORED] * self._count())
        return self._chance.choice(
            [
                Frame(self._header(Op.WELCOME), wire.Welcome("there:1", 1, VALUE_BYTES_MAX, "")),
                Frame(self._header(Op.VALUE)._replace(number=3, crc=1), None, bytes(self._chance.choice((0, 1, 5000)))),
                Frame(self._header(Op.STORED), outcomes),
                Frame(self._header(Op.FOUND), outcomes),
                Frame(self._header(Op.PLACED), wire.Placed(b"there")),
                Frame(self._header(Op.ERROR), wire.Failure("no")),
            ]
        )

    # what is done to them

    def _as_is(self) -> bytes:
        return bytes(self.valid())

    def _flipped(self) -> bytes:
        frame = bytearray(bytes(self.valid()))
        for _ in range(self._chance.choice((1, 1, 2, 8))):
            # Most of the meaning is at the front.
            place = self._chance.randrange(min(len(frame), self._chance.choice((HEADER_BYTES, 80, len(frame)))))
            frame[place] ^= 1 << self._chance.randrange(8)
        return bytes(frame)

    def _truncated(self) -> bytes:
        frame = bytes(self.valid())
        return frame[: self._chance.randrange(len(frame))]

    def _extended(self) -> bytes:
        return bytes(self.valid()) + self._chance.randbytes(self._chance.choice((1, 31, 32, 33, 500)))

    def _spliced(self) -> bytes:
        """The header of one, the rest of another."""
        return bytes(self.valid())[:HEADER_BYTES] + bytes(self.valid())[HEADER_BYTES:]

    def _lengths(self) -> bytes:
        """Lengths at and beyond their bounds, with less behind them than they announce."""
        frame = self.valid()
        control, data = (max(0, self._chance.choice(_LENGTHS) + self._chance.choice((-1, 0, 1))) for _ in range(2))
        op = self._chance.choice((int(frame.header.op), self._chance.randrange(256)))
        version = self._chance.choice((wire.VERSION, wire.VERSION, wire.VERSION, 0, 2, 255))
        raw = HEADER.pack(wire.MAGIC, version, op, 0, 1, 0, 0, control & 0xFFFFFFFF, data & (1 << 64) - 1)
        return raw + bytes(frame)[HEADER_BYTES:]

    def _swapped(self) -> bytes:
        """A header whose fields have changed places."""
        frame = self.valid()
        fields = list(HEADER.unpack(bytes(frame)[:HEADER_BYTES]))
        one, other = self._chance.sample(range(1, len(fields)), 2)
        fields[one], fields[other] = fields[other], fields[one]
        limits = (0, 0xFF, 0xFF, 0xFFFF, *[0xFFFFFFFF] * 4, (1 << 64) - 1)
        masked = [fields[0], *(number & limit for number, limit in zip(fields[1:], limits[1:], strict=True))]
        return HEADER.pack(*masked) + bytes(frame)[HEADER_BYTES:]

    def _misshapen(self) -> bytes:
        """A control part with a field that is absent, twice there, of another type, or much too long."""
        frame = self.valid()
        fields = msgspec.msgpack.decode(_encode(frame.control)) if frame.control else []
        place = fields
        while isinstance(place, list) and place and self._chance.random() < 0.6:
            inner = self._chance.choice(place)
            if not isinstance(inner, list):
                break
            place = inner
        if isinstance(place, list):
            self._spoil(place)
        return self._with_control(frame, _encode(fields))

    def _spoil(self, fields: list[Any]) -> None:
        index = self._chance.randrange(len(fields)) if fields else 0
        what = self._chance.randrange(5 if fields else 1)
        if what == 0:
            fields.insert(index, self._tree())
        elif what == 1:
            fields[index] = self._tree()
        elif what == 2:
            del fields[index]
        elif what == 3:
            fields.insert(index, fields[index])
        else:
            fields.extend([fields[index]] * (KEYS_MAX if self._chance.random() < 0.01 else 3))

    def _tree(self, depth: int = 0) -> Any:
        """Something that msgpack can say."""
        if depth > 3 or self._chance.random() < 0.7:
            return self._chance.choice(_SCALARS)
        inner = [self._tree(depth + 1) for _ in range(self._chance.randrange(4))]
        return inner if self._chance.random() < 0.7 else dict(enumerate(inner))

    def _packed(self) -> bytes:
        """msgpack that is deep, or that announces much more than follows, alone or behind good fields."""
        chance = self._chance
        if chance.random() < 0.5:
            deep = CONTROL_BYTES_MAX - 1000 if chance.random() < 0.002 else 5000
            nested = chance.choice(_NESTED)
            bad = nested * (deep // len(nested))
        else:
            bad = bytes([chance.choice(_COUNTED)]) + chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\x10\x01"))
        frame = self.valid()
        good = _encode(frame.control) if frame.control else b"\x90"
        behind = bytes([min(0x9F, good[0] + 1)]) + good[1:] + bad if 0x90 <= good[0] < 0x9F else bad
        return self._with_control(frame, behind if chance.random() < 0.6 else bad)

    def _noise(self) -> bytes:
        noise = self._chance.randbytes(self._chance.choice((1, 31, 32, 64, 300)))
        return noise if self._chance.random() < 0.3 else wire.MAGIC + bytes([wire.VERSION]) + noise

    def _with_control(self, frame: Frame, control: bytes) -> bytes:
        header = frame.header
        fields = (header.op, header.flags, header.request, header.number, header.crc, len(control), len(frame.data))
        return HEADER.pack(wire.MAGIC, wire.VERSION, *fields) + control + frame.data


# ---- the parser


def parse(raw: bytes) -> str:
    """The parser's result for a frame. Exceptions other than ProtocolError propagate."""
    try:
        header = wire.decode_header(raw[:HEADER_BYTES])
    except ProtocolError:
        return "header refused"
    control = raw[HEADER_BYTES : HEADER_BYTES + header.control_bytes]
    kind = KINDS.get(header.op)
    if kind is None:
        return "accepted"
    try:
        wire.decode_control(control, kind)
    except ProtocolError:
        return "control part refused"
    return "accepted"


class ParserResult(msgspec.Struct):
    frames: int = 0
    bytes: int = 0
    parse_seconds: float = 0.0
    frames_per_second: int = 0
    slowest_ms: float = 0.0  # of the processor's time
    peak_rss_growth_mib: float = 0.0
    results: dict[str, int] = {}
    failures: list[str] = []


def fuzz_parser(frames: Iterator[bytes], count: int) -> ParserResult:
    result, results = ParserResult(frames=count), Counter[str]()
    memory = Memory(os.getpid())
    for start in range(0, count, _PARSED_AT_ONCE):
        batch = [next(frames) for _ in range(min(_PARSED_AT_ONCE, count - start))]
        result.bytes += sum(map(len, batch))
        begin = time.perf_counter()
        for raw in batch:
            before = time.thread_time()
            try:
                outcome = parse(raw)
            except Exception as error:
                outcome = "escaped"
                result.failures.append(f"{error!r} of {raw[:100].hex()}, {len(raw)} bytes")
            results[outcome] += 1
            result.slowest_ms = max(result.slowest_ms, 1000 * (time.thread_time() - before))
        result.parse_seconds += time.perf_counter() - begin
    result.frames_per_second = int(count / max(1e-9, result.parse_seconds))
    result.results = dict(results)
    result.failures = result.failures[:_FAILURES_SHOWN]
    result.peak_rss_growth_mib = memory.growth_mib()
    result.slowest_ms, result.parse_seconds = round(result.slowest_ms, 2), round(result.parse_seconds, 2)
    return result


class Memory:
    """A process's resident memory: how far it grew beyond what it was."""

    def __init__(self, pid: int):
        self._process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            (self._process / "clear_refs").write_text("5")  # the peak begins anew
        self.first_mib = self._read("VmRSS")

    def growth_mib(self) -> float:
        return round(self._read("VmHWM") - self.first_mib, 1)

    def _read(self, name: str) -> float:
        for line in (self._process / "status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise ProcessLookupError(self._process)


# ---- a model of what a target owes a connection


class Verdict(enum.Enum):
    ANSWERED = "answered"  # and more may be sent
    REFUSED = "refused"  # with an ERROR, or a close if that was lost on the way
    CUT = "cut short"  # the target waits for the rest


class Ledger:
    """The answers that a connection must get, after each frame sent on it."""

    def __init__(self) -> None:
        self.greeted = False
        self.answers = 0

    def take(self, raw: bytes) -> Verdict:
        """`raw` begins a frame and may hold more or less than it."""
        try:
            while raw:
                raw = self._frame(raw)
        except ProtocolError:
            return Verdict.REFUSED
        except EOFError:
            return Verdict.CUT
        return Verdict.ANSWERED

    def _frame(self, raw: bytes) -> bytes:
        header, raw = wire.decode_header(_take(raw, HEADER_BYTES)), raw[HEADER_BYTES:]
        if not self.greeted and header.op is not Op.HELLO:
            raise ProtocolError
        control, raw = _take(raw, header.control_bytes), raw[header.control_bytes :]
        if not self.greeted:
            if wire.decode_control(control, wire.Hello).namespace != NAMESPACE:
                raise ProtocolError
            self.greeted = True
            self.answers += 1
            return raw
        self.answers += self._owed(header, control)
        _take(raw, header.data_bytes)
        return raw[header.data_bytes :]

    def _owed(self, header: Header, control: bytes) -> int:
        match header.op:
            case Op.GET:
                return len(wire.decode_control(control, wire.Get).keys)
            case Op.PUT:
                if sum(item.length for item in wire.decode_control(control, wire.Put).items) != header.data_bytes:
                    raise ProtocolError
            case Op.EXISTS:
                wire.decode_control(control, wire.Exists)
            case Op.TAKEN:
                wire.decode_control(control, wire.Taken)
                return 0
            case Op.PREFETCH:
                wire.decode_control(control, wire.Prefetch)
            case Op.STAT:
                pass
            case _:  # LIST, too: chunks are not listed over TCP for clients without a credential
                raise ProtocolError
        return 1


def _take(raw: bytes, count: int) -> bytes:
    if len(raw) < count:
        raise EOFError
    return raw[:count]


# ---- a target


class Script(NamedTuple):
    """What one connection sends: frames until one is not answered."""

    frames: list[bytes]
    verdict: Verdict
    answers: int


def script(frames: Iterator[bytes], chance: random.Random) -> Script:
    ledger, sent, verdict = Ledger(), [], Verdict.ANSWERED
    if chance.random() < 0.9:
        sent.append(wire.encode(Header(Op.HELLO), wire.Hello(NAMESPACE, "fuzz", "elsewhere")))
        verdict = ledger.take(sent[0])
    frames_max = chance.randint(1, FRAMES_PER_CONNECTION)
    for raw in frames:
        if verdict is not Verdict.ANSWERED or len(sent) > frames_max:
            break
        if raw:
            sent.append(raw)
            verdict = ledger.take(raw)
    return Script(sent, verdict, ledger.answers)


def play(address: str, played: Script, chance: random.Random) -> str:
    """Send all frames, and check the target's answers. Raises AssertionError with the difference."""
    sock = socket.create_connection(transport.split_address(address), BOUND_SECONDS)
    stream = Stream(sock)
    try:
        with contextlib.suppress(ConnectionError):  # it may close before it has heard everything
            for part in _cut(b"".join(played.frames), chance):
                stream.send([part], time.monotonic() + BOUND_SECONDS)
            if played.verdict is Verdict.CUT:
                sock.shutdown(socket.SHUT_WR)
        return _receive(stream, played, time.monotonic() + BOUND_SECONDS)
    except TimeoutError:
        raise AssertionError("hung") from None
    finally:
        stream.close()


def _cut(raw: bytes, chance: random.Random) -> tuple[bytes, bytes]:
    place = chance.randrange(len(raw))
    return raw[:place], raw[place:]


def _receive(stream: Stream, played: Script, deadline: float) -> str:
    """Receive all expected answers, or those until the connection ends. Returns how it ended."""
    all_is_well = played.verdict is Verdict.ANSWERED
    count = 0
    try:
        while not all_is_well or count < played.answers:
            header = stream.receive_header(deadline)
            stream.receive_control(header, deadline)
            _skip(stream, header.data_bytes, deadline)
            if header.op is Op.ERROR:
                assert played.verdict is Verdict.REFUSED, "an ERROR for nothing"
                return "ERROR"
            count += 1
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        assert not all_is_well, f"closed after {count} of {played.answers} answers"
        return "closed"
    return "answered"


def _skip(stream: Stream, count: int, deadline: float) -> None:
    scratch = memoryview(bytearray(min(count, 1 << 18)))
    for start in range(0, count, 1 << 18):
        stream.receive(scratch[: count - start], deadline)


class SocketsResult(msgspec.Struct):
    frames: int
    connections: int
    seconds: float
    frames_per_second: int
    verdicts: dict[str, int]  # what each connection was owed
    endings: dict[str, int]  # how it ended
    slowest_seconds: float
    stalled_closed: int
    stalled_slowest_seconds: float
    honest: dict[str, int]  # outcomes of the honest client's gets, by key
    wrong_bytes: int
    first_rss_mib: float
    peak_rss_growth_mib: float
    failures: list[str]


class TargetProcess:
    """`python -m kvstore` on a directory, by default with little memory; its log goes to a file beside."""

    def __init__(self, folder: Path, *options: str):
        store = folder / "store"
        store.mkdir()
        self._log = folder / "target.log"
        command = [sys.executable, "-m", "kvstore", "--dir", str(store), "--nats", "", "--listen", "127.0.0.1:0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().rpartition(" ")[2].strip()
        if not self.address:
            raise ChildProcessError(self.log())

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> list[str]:
        """Stop the target. Returns the problems with its exit and its log."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        wrong = [line for line in self.log().splitlines() if line.startswith(("Traceback", "Exception in"))]
        return [*([f"the target ended with {code}"] if code else []), *wrong]


class Honest:
    """A client that repeatedly reads its values, and writes evicted ones again."""

    def __init__(self, address: str):
        self.outcomes: Counter[str] = Counter()
        self.wrong_bytes = 0
        self._client = StoreClient(StaticMembership([address]), name="honest", connections_per_target=2)
        self._values = {number.to_bytes(16, "big"): os.urandom(HONEST_BYTES) for number in range(HONEST_VALUES)}
        self._rooms = [memoryview(bytearray(HONEST_BYTES)) for _ in self._values]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def known(self) -> list[tuple[bytes, int]]:
        return [(key, len(value)) for key, value in self._values.items()]

    def start(self) -> None:
        self.round()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def round(self) -> None:
        outcomes = self._client.get(list(self._values), self._rooms, time.monotonic() + BOUND_SECONDS)
        missing = []
        for (key, value), room, outcome in zip(self._values.items(), self._rooms, outcomes, strict=True):
            self.outcomes[outcome.name.lower()] += 1
            self.wrong_bytes += outcome is wire.Outcome.HIT and room != value
            if outcome is wire.Outcome.MISS:
                missing.append(Item(key, memoryview(value), 0, 7, 2))
        if missing:
            self._client.put(missing, time.monotonic() + BOUND_SECONDS)

    def _work(self) -> None:
        while not self._stopping.wait(HONEST_PAUSE_SECONDS):
            self.round()


class SocketFuzz:
    """Hostile connections to a target, from some threads; all that they send is decided by the seed."""

    def __init__(self, address: str, seed: int, known: Sequence[tuple[bytes, int]], frames_max: int):
        self.frames = 0
        self.connections = 0
        self.slowest_seconds = 0.0
        self.verdicts: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.failures: list[str] = []
        self._address = address
        self._seed = seed
        self._known = known
        self._frames_max = frames_max
        self._lock = threading.Lock()

    def run(self, threads: int = FUZZERS) -> None:
        fuzzers = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for fuzzer in fuzzers:
            fuzzer.start()
        for fuzzer in fuzzers:
            fuzzer.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self.frames >= self._frames_max:
                    return
                self.connections += 1
                number = self.connections
            self._connection(number)

    def _connection(self, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        played = script(iter(Frames(f"{self._seed}/{number}/frames", self._known)), chance)
        begin = time.monotonic()
        try:
            ending = play(self._address, played, chance)
        except (AssertionError, OSError) as error:
            ending = "failed"
            self.failures.append(f"connection {number}, to be {played.verdict.value}: {error!r}")
        with self._lock:
            self.frames += len(played.frames)
            self.verdicts[played.verdict.value] += 1
            self.endings[ending] += 1
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begin)


class Stalled:
    """Connections that stop within a frame and stay open."""

    def __init__(self, address: str, seed: int, count: int):
        self._begin = time.monotonic()
        self._open: list[Stream] = []
        chance = random.Random(seed)
        frames = iter(Frames(f"{seed}/stalled"))
        while len(self._open) < count:
            played = script(frames, chance)
            if played.verdict is Verdict.CUT:
                stream = transport.connect(address, time.monotonic() + BOUND_SECONDS)
                stream.send(played.frames, time.monotonic() + BOUND_SECONDS)
                self._open.append(stream)

    def wait(self) -> list[float]:
        """The seconds until each was closed. Open ones are left out."""
        deadline = self._begin + STALL_SECONDS + BOUND_SECONDS
        seconds = []
        for stream in self._open:
            with contextlib.suppress(TimeoutError):
                try:
                    while True:
                        stream.receive(memoryview(bytearray(1)), deadline)
                except ConnectionError:
                    seconds.append(time.monotonic() - self._begin)
            stream.close()
        return seconds


def fuzz_target(folder: Path, seed: int, frames: int, durability: str) -> SocketsResult:
    target = TargetProcess(folder, *TARGET_OPTIONS, "--durability", durability)
    try:
        result = _fuzz_target(target, seed, frames)
    finally:
        wrong = target.stop()
    result.failures = [*result.failures, *wrong][:_FAILURES_SHOWN]
    return result


def _fuzz_target(target: TargetProcess, seed: int, frames: int) -> SocketsResult:
    honest = Honest(target.address)
    honest.start()
    SocketFuzz(target.address, seed + 1, honest.known, WARM_UP_FRAMES).run()
    memory = Memory(target.pid)
    begin = time.monotonic()
    stalled = Stalled(target.address, seed, STALLED_CONNECTIONS)
    fuzz = SocketFuzz(target.address, seed, honest.known, frames)
    fuzz.run()
    seconds = time.monotonic() - begin
    stalls = stalled.wait()
    honest.stop()
    honest.round()
    failures = list(fuzz.failures)
    if len(stalls) < STALLED_CONNECTIONS:
        failures.append(f"{STALLED_CONNECTIONS - len(stalls)} stalled connections were not closed")
    if honest.wrong_bytes or honest.outcomes.keys() - {"hit", "miss"}:
        failures.append(f"the honest client was not served: {dict(honest.outcomes)}, {honest.wrong_bytes} wrong")
    return SocketsResult(
        frames=fuzz.frames,
        connections=fuzz.connections,
        seconds=round(seconds, 1),
        frames_per_second=int(fuzz.frames / seconds),
        verdicts=dict(fuzz.verdicts),
        endings=dict(fuzz.endings),
        slowest_seconds=round(fuzz.slowest_seconds, 2),
        stalled_closed=len(stalls),
        stalled_slowest_seconds=round(max(stalls, default=0.0), 1),
        honest=dict(honest.outcomes),
        wrong_bytes=honest.wrong_bytes,
        first_rss_mib=round(memory.first_mib, 1),
        peak_rss_growth_mib=memory.growth_mib(),
        failures=failures,
    )


class Result(msgspec.Struct):
    seed: int
    parser: ParserResult
    sockets: SocketsResult


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.wire_fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--frames", type=int, default=1_000_000, help="in all")
    parser.add_argument("--socket-frames", type=int, default=50_000, help="of these, over sockets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where the target's directory is made")
    parser.add_argument("--durability", choices=["written", "memory"], default="written", help="of the target")
    options = parser.parse_args()
    parsed = fuzz_parser(iter(Frames(options.seed)), options.frames - options.socket_frames)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = Result(
            options.seed, parsed, fuzz_target(Path(folder), options.seed, options.socket_frames, options.durability)
        )
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")
    return 1 if result.parser.failures or result.sockets.failures else 0


if __name__ == "__main__":
    sys.exit(main())
