"""Goodput and latency of an overloaded target, and of one with misbehaving clients.

    python -m benchmarks.store.overload --json FILE [--dir DIRECTORY] [--repeats N] [--seconds N]

The target is a process on a directory, without a hot cache: every hit is a read of the device. Clients are processes,
with four connections each, over TCP on loopback. Open-loop clients send at times drawn beforehand, whether or not
earlier requests were answered. A value counts if it arrives intact before its deadline, which starts at the drawn time.

(a) goodput: values delivered in time at multiples of the capacity, which closed-loop clients measure just before
(b) the latency of well-behaved clients, alone and beside misbehaving ones. Some of these request much and read nothing,
    some read slowly, some stop within a PUT. Their first requests count, too
(c) the latency of REFUSED at the highest load

Figures are medians over the repeats, with the lowest and the highest. Clients and target share the machine's cores;
`cpu` has the share of each.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from crc32c import crc32c

from benchmarks.store.wire_fuzz import TargetProcess
from kvstore.net import transport, wire
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome, PutItem

VALUE_BYTES = 2 << 20  # a chunk of Llama-3.1-8B
VALUES = 640  # 1.25 GiB: much more than what the target holds in memory
TARGET_OPTIONS = ("--capacity", "2GiB", "--segment-size", "64MiB", "--unix-socket", "")

CLIENTS = 4
CONNECTIONS = 4
VALUES_PER_GET = 4
LOADS = (0.5, 1.0, 1.5, 2.0)
DEADLINE_SECONDS = 0.25
WARM_UP_SECONDS = 0.5

WELL_BEHAVED, WELL_BEHAVED_RATE = 2, 50.0  # processes, and GETs of one value a second of each
STALLED, SLOW, PUTTING = 16, 8, 8
STALLED_VALUES = 64
SLOW_BYTES, SLOW_PAUSE_SECONDS = 64 << 10, 0.05
_PATIENCE_SECONDS = 20.0


def _key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _soon() -> float:
    return time.monotonic() + _PATIENCE_SECONDS


# ---- client processes


class Task(msgspec.Struct):
    """A client process's task."""

    begin: float  # time.monotonic() of all processes of a machine
    seconds: float
    seed: int
    gets_per_second: float = 0.0  # 0: closed loop
    values_per_get: int = VALUES_PER_GET
    deadline_seconds: float = DEADLINE_SECONDS


class Report(msgspec.Struct):
    """The task's results, for GETs that were due after the warm-up."""

    asked: int
    outcomes: dict[str, int]  # of values; `hit` only if in time, otherwise `too late`; `unanswered`
    latencies_ms: list[float]  # of hits
    refusals_ms: list[float]  # from sending to hearing of it
    cpu_seconds: float


class Value(msgspec.Struct):
    due: float
    sent: float
    heard: float = math.inf
    outcome: str = "unanswered"


def connect(address: str, name: str) -> Stream:
    stream = transport.connect(address, _soon())
    stream.send([wire.encode(Header(Op.HELLO), wire.Hello("default", name, "elsewhere"))], _soon())
    stream.receive_control(stream.receive_header(_soon()), _soon())
    return stream


class Line:
    """A connection on which GETs are sent without waiting. `answered` is called for each of them at its end."""

    def __init__(self, address: str, name: str):
        self.answered: Callable[[], None] = lambda: None
        self.values: dict[tuple[int, int], Value] = {}
        self._outgoing = connect(address, name)
        self._incoming = self._outgoing.twin()
        self._room = memoryview(bytearray(VALUE_BYTES))
        self._requests = itertools.count(1)
        self._left: Counter[int] = Counter()
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, numbers: Sequence[int], due: float, deadline: float) -> None:
        request, now = next(self._requests), time.monotonic()
        self._left[request] = len(numbers)
        for place in range(len(numbers)):
            self.values[request, place] = Value(due, now)
        left_ms = max(0, int(1000 * (deadline - now)))
        ask = wire.Get([_key(number) for number in numbers], [VALUE_BYTES] * len(numbers), left_ms)
        self._outgoing.send([wire.encode(Header(Op.GET, request), ask)], _soon())

    def _receive(self) -> None:
        with contextlib.suppress(ConnectionError):
            while self._incoming.wait_for_frame():
                header = self._incoming.receive_header(_soon())
                self._incoming.receive(self._room[: header.data_bytes], _soon())
                outcome = Outcome(header.flags).name.lower()
                if outcome == "hit" and crc32c(self._room) != header.crc:
                    outcome = "corrupt"
                value = self.values[header.request, header.number]
                value.outcome, value.heard = outcome, time.monotonic()
                self._left[header.request] -= 1
                if not self._left[header.request]:
                    del self._left[header.request]
                    self.answered()

    @property
    def quiet(self) -> bool:
        return not self._left


class Client:
    def __init__(self, address: str, number: int):
        self._lines = [Line(address, f"client {number}") for _ in range(CONNECTIONS)]

    def run(self, task: Task) -> Report:
        cpu = time.process_time()
        chance = random.Random(task.seed)
        time.sleep(max(0.0, task.begin - time.monotonic()))
        end = task.begin + task.seconds
        if task.gets_per_second:
            self._open_loop(task, chance, end)
        else:
            self._closed_loop(task, chance, end)
        last = end + task.deadline_seconds + 1
        while time.monotonic() < last and not all(line.quiet for line in self._lines):
            time.sleep(0.01)
        return self._report(task, time.process_time() - cpu)

    def _open_loop(self, task: Task, chance: random.Random, end: float) -> None:
        lines = itertools.cycle(self._lines)
        due = task.begin
        while (due := due + chance.expovariate(task.gets_per_second)) < end:
            time.sleep(max(0.0, due - time.monotonic()))
            next(lines).ask(chance.choices(range(VALUES), k=task.values_per_get), due, due + task.deadline_seconds)

    def _closed_loop(self, task: Task, chance: random.Random, end: float) -> None:
        def again(line: Line) -> None:
            now = time.monotonic()
            if now < end:
                line.ask(chance.choices(range(VALUES), k=task.values_per_get), now, now + _PATIENCE_SECONDS)

        for line in self._lines:
            line.answered = lambda line=line: again(line)  # type: ignore[misc]
            again(line)
        time.sleep(max(0.0, end - time.monotonic()))
        for line in self._lines:
            line.answered = lambda: None

    def _report(self, task: Task, cpu_seconds: float) -> Report:
        outcomes: Counter[str] = Counter()
        latencies, refusals = [], []
        first, allowed = task.begin + WARM_UP_SECONDS, task.deadline_seconds if task.gets_per_second else math.inf
        values = [value for line in self._lines for value in list(line.values.values()) if value.due >= first]
        for line in self._lines:
            line.values.clear()
        end = task.begin + task.seconds
        for value in values:
            if value.outcome == "hit":
                latencies.append(1000 * (value.heard - value.due))
                in_time = value.heard <= value.due + allowed and (task.gets_per_second > 0 or value.heard <= end)
                outcomes["hit" if in_time else "too late"] += 1
            else:
                outcomes[value.outcome] += 1
            if value.outcome == "refused":
                refusals.append(1000 * (value.heard - value.sent))
        return Report(len(values), dict(outcomes), latencies, refusals, cpu_seconds)


class Crowd:
    """Clients that behave badly, until `close`."""

    def __init__(self, address: str):
        self._slow: list[Stream] = []
        self._all: list[Stream] = []
        self._closing = threading.Event()
        for number in range(STALLED):
            self._get(connect(address, f"stalled {number}"), STALLED_VALUES, number)
        for number in range(SLOW):
            stream = connect(address, f"slow {number}")
            self._slow.append(stream)
            self._get(stream, STALLED_VALUES, number)
        for number in range(PUTTING):
            self._put(connect(address, f"putting {number}"))
        threading.Thread(target=self._read_slowly, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        for stream in self._all:
            stream.close()

    def _get(self, stream: Stream, count: int, seed: int) -> None:
        numbers = random.Random(seed).sample(range(VALUES), count)
        ask = wire.Get([_key(number) for number in numbers], [VALUE_BYTES] * count, 1000 * 3600)
        stream.send([wire.encode(Header(Op.GET, 1), ask)], _soon())
        self._all.append(stream)

    def _put(self, stream: Stream) -> None:
        item = PutItem(os.urandom(16), VALUE_BYTES, 0, 0, 7, 2, 0xFFFFFFFF)
        frame = wire.encode(Header(Op.PUT, 1, data_bytes=VALUE_BYTES), wire.Put([item]))
        stream.send([frame, bytes(VALUE_BYTES // 2)], _soon())
        self._all.append(stream)

    def _read_slowly(self) -> None:
        room = memoryview(bytearray(SLOW_BYTES))
        while not self._closing.wait(SLOW_PAUSE_SECONDS):
            for stream in self._slow:
                with contextlib.suppress(OSError):
                    stream.receive(room, time.monotonic() + SLOW_PAUSE_SECONDS)


def serve_client(address: str, number: int) -> None:
    """A client process: tasks come in on stdin, reports go out on stdout, a line each."""
    client = Client(address, number)
    print("ready", flush=True)
    for line in sys.stdin:
        report = client.run(msgspec.json.decode(line, type=Task))
        print(msgspec.json.encode(report).decode(), flush=True)


def serve_crowd(address: str) -> None:
    """The misbehaving clients' process, controlled by lines on stdin."""
    print("ready", flush=True)
    crowd = None
    for _ in sys.stdin:
        if crowd is None:
            crowd = Crowd(address)
        else:
            crowd.close()
            crowd = None
        print("done", flush=True)


# ---- the benchmark


class Child:
    """A process of this module in another role, controlled by lines."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", __spec__.name, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hear()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{self._process.args!r} ended")
        return line

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Figure(msgspec.Struct):
    median: float
    lowest: float
    highest: float


class Load(msgspec.Struct):
    of_capacity: float
    offered_values_per_second: Figure
    goodput_values_per_second: Figure
    of_best: Figure  # goodput over the highest of the repeat
    outcomes: dict[str, float]  # shares of all values asked for, of all repeats together
    latency_p99_ms: Figure  # of hits
    refusal_median_ms: Figure | None
    refusal_p99_ms: Figure | None
    target_cpu: Figure  # cores
    clients_cpu: Figure


class Company(msgspec.Struct):
    """Well-behaved clients beside others."""

    p50_ms: Figure
    p99_ms: Figure
    hits: float  # share of the values asked for that came in time


class Result(msgspec.Struct):
    cores: int
    repeats: int
    value_bytes: int
    seconds: float
    capacity_values_per_second: Figure
    capacity_gbytes_per_second: float
    loads: list[Load]
    alone: Company
    beside_crowd: Company
    p99_ratio: Figure
    wrong: list[str]


class Phase(msgspec.Struct):
    """Reports of one task, put together."""

    seconds: float
    reports: list[Report]
    target_cpu: float  # cores

    def count(self, outcome: str) -> int:
        return sum(report.outcomes.get(outcome, 0) for report in self.reports)

    @property
    def asked(self) -> int:
        return sum(report.asked for report in self.reports)

    @property
    def clients_cpu(self) -> float:
        return sum(report.cpu_seconds for report in self.reports) / (self.seconds + WARM_UP_SECONDS)

    def latencies(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(report.latencies_ms for report in self.reports))

    def refusals(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(report.refusals_ms for report in self.reports))


def _at(ordered: Sequence[float], share: float) -> float:
    """A quantile; infinite if there is nothing."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.inf


class Bench:
    def __init__(self, target: TargetProcess, seconds: float, seed: int):
        self._target = target
        self._seconds = seconds
        self._seeds = itertools.count(1000 * seed)
        self.clients = [Child("--client", target.address, str(number)) for number in range(CLIENTS)]
        self.crowd = Child("--crowd", target.address)

    def close(self) -> None:
        for child in (*self.clients, self.crowd):
            child.end()

    def run(self, clients: Sequence[Child], gets_per_second: float, values_per_get: int = VALUES_PER_GET) -> Phase:
        cpu, begin = self._cpu(), time.monotonic() + 0.1
        for client in clients:
            rate = gets_per_second / len(clients)
            task = Task(begin, self._seconds + WARM_UP_SECONDS, next(self._seeds), rate, values_per_get)
            client.tell(msgspec.json.encode(task).decode())
        reports = [msgspec.json.decode(client.hear(), type=Report) for client in clients]
        return Phase(self._seconds, reports, (self._cpu() - cpu) / (time.monotonic() - begin))

    def with_crowd(self) -> Phase:
        self.crowd.tell("come")
        try:
            return self.well_behaved()
        finally:
            self.crowd.hear()
            self.crowd.tell("go")
            self.crowd.hear()

    def well_behaved(self) -> Phase:
        return self.run(self.clients[:WELL_BEHAVED], WELL_BEHAVED * WELL_BEHAVED_RATE, values_per_get=1)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._target.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Repeat(msgspec.Struct):
    capacity: float
    loads: list[Phase]
    alone: Phase
    beside_crowd: Phase


def repeat(bench: Bench, *, upwards: bool) -> Repeat:
    """Measure all loads in rising or falling order, so that a machine's drift favours none."""
    full = bench.run(bench.clients, 0)
    capacity = full.count("hit") / full.seconds
    loads = [
        bench.run(bench.clients, load * capacity / VALUES_PER_GET) for load in (LOADS if upwards else reversed(LOADS))
    ]
    return Repeat(capacity, loads if upwards else loads[::-1], bench.well_behaved(), bench.with_crowd())


def fill(address: str) -> None:
    client = StoreClient(StaticMembership([address]), name="filler")
    content = random.Random(0).randbytes(VALUE_BYTES)
    for start in range(0, VALUES, 16):
        items = [Item(_key(number), memoryview(content), 0, 7, 2) for number in range(start, start + 16)]
        if set(client.put(items, _soon())) != {Outcome.STORED}:
            raise RuntimeError("the target did not store what it is to be asked for")
    client.close()


def figure(values: Iterable[float], digits: int = 2) -> Figure:
    rounded = [round(value, digits) for value in values]
    return Figure(statistics.median(rounded), min(rounded), max(rounded))


def _load(number: int, repeats: Sequence[Repeat]) -> Load:
    phases = [one.loads[number] for one in repeats]
    best = [max(phase.count("hit") for phase in one.loads) for one in repeats]
    outcomes: Counter[str] = Counter()
    for phase in phases:
        for report in phase.reports:
            outcomes.update(report.outcomes)
    refused = [refusals for phase in phases if (refusals := phase.refusals())]
    return Load(
        of_capacity=LOADS[number],
        offered_values_per_second=figure((phase.asked / phase.seconds for phase in phases), 0),
        goodput_values_per_second=figure((phase.count("hit") / phase.seconds for phase in phases), 0),
        of_best=figure(phase.count("hit") / most for phase, most in zip(phases, best, strict=True)),
        outcomes={name: round(count / outcomes.total(), 4) for name, count in outcomes.items()},
        latency_p99_ms=figure(_at(phase.latencies(), 0.99) for phase in phases),
        refusal_median_ms=figure(_at(refusals, 0.5) for refusals in refused) if refused else None,
        refusal_p99_ms=figure(_at(refusals, 0.99) for refusals in refused) if refused else None,
        target_cpu=figure(phase.target_cpu for phase in phases),
        clients_cpu=figure(phase.clients_cpu for phase in phases),
    )


def _company(phases: Sequence[Phase]) -> Company:
    latencies = [phase.latencies() for phase in phases]
    return Company(
        p50_ms=figure(_at(ordered, 0.5) for ordered in latencies),
        p99_ms=figure(_at(ordered, 0.99) for ordered in latencies),
        hits=round(sum(phase.count("hit") for phase in phases) / sum(phase.asked for phase in phases), 4),
    )


def measure(folder: Path, repeats: int, seconds: float, seed: int) -> Result:
    begin = time.monotonic()
    target = TargetProcess(folder, *TARGET_OPTIONS)
    try:
        fill(target.address)
        bench = Bench(target, seconds, seed)
        done = []
        for number in range(repeats):
            done.append(repeat(bench, upwards=number % 2 == 0))
            print(f"repeat {number + 1}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        bench.close()
    finally:
        wrong = target.stop()
    capacity = figure((one.capacity for one in done), 0)
    return Result(
        cores=os.cpu_count() or 0,
        repeats=repeats,
        value_bytes=VALUE_BYTES,
        seconds=round(time.monotonic() - begin, 1),
        capacity_values_per_second=capacity,
        capacity_gbytes_per_second=round(capacity.median * VALUE_BYTES / 1e9, 2),
        loads=[_load(number, done) for number in range(len(LOADS))],
        alone=_company([one.alone for one in done]),
        beside_crowd=_company([one.beside_crowd for one in done]),
        p99_ratio=figure(_at(one.beside_crowd.latencies(), 0.99) / _at(one.alone.latencies(), 0.99) for one in done),
        wrong=wrong,
    )


def table(result: Result) -> str:
    lines = [
        f"capacity {result.capacity_values_per_second.median:.0f} values/s "
        f"({result.capacity_gbytes_per_second:.2f} GB/s), {result.cores} cores",
        "   load   offered   goodput  of best        p99 ms  REFUSED ms (p99)  cpu target+clients",
    ]
    for load in result.loads:
        refusals = ""
        if load.refusal_median_ms and load.refusal_p99_ms:
            refusals = f"{load.refusal_median_ms.median:.1f} ({load.refusal_p99_ms.median:.1f})"
        lines.append(
            f"  {load.of_capacity:4.1f}x {load.offered_values_per_second.median:9.0f}"
            f" {load.goodput_values_per_second.median:9.0f} {load.of_best.median:8.0%}"
            f" {load.latency_p99_ms.median:13.1f} {refusals:>17}"
            f" {load.target_cpu.median:8.2f}+{load.clients_cpu.median:.2f}  {load.outcomes}"
        )
    for name, company in (("alone", result.alone), ("beside a crowd", result.beside_crowd)):
        lines.append(
            f"{name}: p50 {company.p50_ms.median:.1f} ms, p99 {company.p99_ms.median:.1f} ms, {company.hits:.2%}"
        )
    ratio = result.p99_ratio
    lines.append(f"p99 beside over alone: {ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.overload", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--dir", type=Path, help="where the target's directory is made, on the disk to be read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return serve_client(options.client[0], int(options.client[1]))
    if options.crowd:
        return serve_crowd(options.crowd)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = measure(Path(folder), options.repeats, options.seconds, options.seed)
    print(table(result), file=sys.stderr)
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json:
        options.json.write_text(report + "\n")
    else:
        print(report)
    return None


if __name__ == "__main__":
    main()
