"""A rack of workers and several targets, over links that delay and lose packets, and with a stopped target.

    python -m benchmarks.store.rack [--workers 64] [--targets 4] [--rounds 3] [--seconds 6] [--json FILE]

Each worker has a client of its own and some conversations. In a turn it gets a prompt's chunks in order, asks which of
the others exist, puts the missing ones, and pauses. Every received value is compared with the put one. A wrong value
passes with probability 1 in 65,536: values are slices of one random buffer, from so many offsets.

Each target has a network namespace, and so has each process of workers. Their links meet at a bridge: jumbo frames,
each sent by itself, so that a lost packet is one frame.

clean     links as they are
delayed   every packet is delayed by --delay, each way, and lost with --loss
lossy     as delayed; the link of one target loses --bad-loss
stopped   clean links; one target gets SIGSTOP for the middle half of the time

Delay needs netem in the kernel. Without netem, a BPF filter loses the packets, and there is no delay. With --switch, a
process of this benchmark replaces the bridge (benchmarks.store.switch), and delays and loses packets. Under load it
uses a core, and the report has its lateness. Without root, ip or tc, everything is on loopback. Conditions that cannot
be measured are left out, and the report says why.
"""

import argparse
import contextlib
import os
import random
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import msgspec
from pydantic import BaseModel, ByteSize, ConfigDict, Field

from benchmarks.store.__main__ import _leave, check_space, choose_folder, command, machine
from benchmarks.store.connections import Usage, usage
from benchmarks.store.results import GB, Spread, heading, shown, spread
from benchmarks.store.servers import BenchmarkError, Process, free_port
from benchmarks.store.switch import Links, Passed
from kvstore.errors import FailedError, run_command, validated
from kvstore.net import transport
from kvstore.net.client import Item, StoreClient, good_connections
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome

CONVERSATIONS = 2  # of a worker
PROMPT_CHUNKS = 8  # at most; then the conversation is replaced by a new one
SYSTEM_PROMPTS, SYSTEM_CHUNKS = 8, 2  # that all workers' conversations begin with
PLACES = 1 << 16  # in the random memory, where values begin
SETTLE_SECONDS = 60.0  # more than a client leaves a target alone
LEAD_SECONDS = 0.2  # between the command to all processes and their common start
PORT = 7600
MTU = 9000
QUEUE_PACKETS = 10_000  # more than a link delays at a time
BPF_RANDOM = 0xFFFFF038  # SKF_AD_OFF + SKF_AD_RANDOM of linux/filter.h: where a load finds a random number
TC_OK, TC_SHOT = 0, 2  # of linux/pkt_cls.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# ---- a process of workers


class Setup(msgspec.Struct):
    """A worker process's settings."""

    seed: int
    workers: list[int]
    targets: list[str]
    connections: int  # of a worker to a target
    value_bytes: int
    pause_seconds: float
    deadline_seconds: float


class Task(msgspec.Struct):
    begin: float  # time.monotonic() of all processes of a machine
    seconds: float


class Tally(msgspec.Struct):
    """Workers' results."""

    milliseconds: list[float] = []  # of each get of a prompt's chunks
    got: dict[str, int] = {}  # outcomes of chunks that the store had acknowledged, or returned before
    put: dict[str, int] = {}  # outcomes of chunks that were offered
    right_bytes: int = 0
    wrong: int = 0


class Worker:
    """A client, and the conversations whose prompts it gets and lengthens."""

    def __init__(self, number: int, setup: Setup, source: bytes):
        self._setup, self._source = setup, source
        self._chance = random.Random(f"{setup.seed} {number}")
        self._client = StoreClient(
            StaticMembership(setup.targets), name=f"worker-{number}", connections_per_target=setup.connections
        )
        region, size = memoryview(bytearray(PROMPT_CHUNKS * setup.value_bytes)), setup.value_bytes
        self._rooms = [region[start : start + size] for start in range(0, len(region), size)]
        chance = random.Random(setup.seed)
        self._system = [[chance.randbytes(16) for _ in range(SYSTEM_CHUNKS)] for _ in range(SYSTEM_PROMPTS)]
        self._prompts = [self._new_prompt() for _ in range(CONVERSATIONS)]
        self._stored: set[bytes] = set()  # acknowledged by the store, or returned

    def fill(self) -> None:
        """Put prompts of several lengths, so that conversations do not end together."""
        for prompt in self._prompts:
            while len(prompt) < self._chance.randint(SYSTEM_CHUNKS, PROMPT_CHUNKS - 1):
                prompt.append(self._chance.randbytes(16))
            self._put(prompt, prompt, Tally())

    def play(self, task: Task) -> Tally:
        tally = Tally()
        end = task.begin + task.seconds
        time.sleep(max(0.0, task.begin - time.monotonic()))
        while time.monotonic() + (pause := self._chance.expovariate(1 / self._setup.pause_seconds)) < end:
            time.sleep(pause)
            self._turn(tally)
        return tally

    def settle(self) -> None:
        """Wait until every target answers again."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while silent := set(self._setup.targets) - set(self._client.stat(time.monotonic() + 1.0)):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"no answer from {', '.join(sorted(silent))}")
            time.sleep(0.1)

    def _turn(self, tally: Tally) -> None:
        place = self._chance.randrange(CONVERSATIONS)
        prompt = self._prompts[place]
        outcomes = self._get(prompt, tally)
        prompt.append(self._chance.randbytes(16))
        missing = [key for key in prompt if outcomes.get(key) is not Outcome.HIT]
        found = zip(missing, self._client.exists(missing, self._deadline()), strict=True)
        self._put(prompt, {key for key, outcome in found if outcome is Outcome.MISS}, tally)
        if len(prompt) == PROMPT_CHUNKS:
            self._prompts[place] = self._new_prompt()

    def _get(self, keys: Sequence[bytes], tally: Tally) -> dict[bytes, Outcome]:
        begun = time.monotonic()
        outcomes = self._client.get(keys, self._rooms[: len(keys)], self._deadline())
        tally.milliseconds.append(1000 * (time.monotonic() - begun))
        for key, room, outcome in zip(keys, self._rooms, outcomes, strict=False):
            if outcome is Outcome.HIT:
                self._stored.add(key)
                right = bytes(room) == self._value(key)
                tally.right_bytes += right * len(room)
                tally.wrong += not right
            if key in self._stored:
                _count(tally.got, outcome)
        return dict(zip(keys, outcomes, strict=True))

    def _put(self, prompt: Sequence[bytes], keys: Collection[bytes], tally: Tally) -> None:
        items = [
            Item(key, memoryview(self._value(key)), _hash(key), 7, 1, position=position, parent=_hash(before))
            for position, (before, key) in enumerate(zip((bytes(16), *prompt), prompt, strict=False))
            if key in keys
        ]
        for item, outcome in zip(items, self._client.put(items, self._deadline()), strict=True):
            _count(tally.put, outcome)
            if outcome is Outcome.STORED:
                self._stored.add(item.key)

    def _deadline(self) -> float:
        return time.monotonic() + self._setup.deadline_seconds

    def _new_prompt(self) -> list[bytes]:
        return list(self._chance.choice(self._system))

    def _value(self, key: bytes) -> bytes:
        start = int.from_bytes(key[:2], "big")
        return self._source[start : start + self._setup.value_bytes]


def _count(counts: dict[str, int], outcome: Outcome) -> None:
    name = outcome.name.lower()
    counts[name] = counts.get(name, 0) + 1


def _hash(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def serve(setup: Setup) -> None:
    """A process of workers: tasks come in on standard input, tallies go out, a line each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection each of many workers to many targets
    for address in setup.targets:
        _wait_for(address)
    source = random.Random(setup.seed).randbytes(PLACES + setup.value_bytes)
    workers = [Worker(number, setup, source) for number in setup.workers]
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(Worker.fill, workers))
        print("ready", flush=True)
        for line in sys.stdin:
            task = msgspec.json.decode(line, type=Task)
            tally = total(pool.map(Worker.play, workers, repeat(task)))
            list(pool.map(Worker.settle, workers))
            print(msgspec.json.encode(tally).decode(), flush=True)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            transport.connect(address, time.monotonic() + 1.0).close()
            return
        time.sleep(0.05)
    raise BenchmarkError(f"nobody listens on {address}")


def total(tallies: Iterable[Tally]) -> Tally:
    whole, got, put = Tally(), Counter[str](), Counter[str]()
    for tally in tallies:
        whole.milliseconds += tally.milliseconds
        whole.right_bytes += tally.right_bytes
        whole.wrong += tally.wrong
        got.update(tally.got)
        put.update(tally.put)
    whole.got, whole.put = dict(got), dict(put)
    return whole


# ---- the network


class Loopback:
    """No links of its own: nothing can be delayed or lost."""

    delays = loses = False

    def __init__(self, reason: str):
        self.said = f"loopback: {reason}"

    def address(self, _host: int) -> str:
        return f"127.0.0.1:{free_port()}"

    def within(self, _host: int, line: Sequence[str]) -> list[str]:
        return list(line)

    def impair(self, host: int, delay_ms: float, loss_percent: float) -> None:
        """With zeros alone: conditions that need more are left out."""


class Namespaces:
    """A network namespace for each host, with a link to the bridge in another namespace.

    The namespaces hold everything that `make` makes: it goes with them, in `close`.
    """

    def __init__(self, hosts: int):
        self._hub = f"kvtier-rack-{os.getpid()}"
        self._names = [f"{self._hub}-{host}" for host in range(hosts)]
        self._impaired: set[int] = set()
        self.delays = self.loses = False

    def make(self) -> None:
        """Raises BenchmarkError where this machine cannot."""
        _run("ip", "netns", "add", self._hub)
        _run("ip", "-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        self.delays = True
        self.delays = self.loses = self._can_impair()
        self.loses = self.loses or self._can_impair()
        for host, name in enumerate(self._names):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"link{host}")
            _run("ip", "-n", name, "link", "set", f"link{host}", "netns", self._hub)
            _run("ip", "-n", self._hub, "link", "set", f"link{host}", "master", "bridge")
            for space, device in self._ends(host):
                _run("ip", "-n", space, "link", "set", device, "up", "mtu", str(MTU), "gso_max_segs", "1")
            self._name_host(host)

    def _name_host(self, host: int) -> None:
        _run("ip", "-n", self._names[host], "address", "add", f"{self._ip(host)}/24", "dev", "eth0")
        _run(*self.within(host, ["true"]))

    @property
    def said(self) -> str:
        if self.delays:
            return "namespaces, delay and loss by netem"
        if self.loses:
            return "namespaces, loss by a BPF filter, no delay: the kernel has no netem"
        return "namespaces, no delay and no loss: the kernel has neither netem nor clsact"

    def address(self, host: int) -> str:
        return f"{self._ip(host)}:{PORT}"

    def within(self, host: int, line: Sequence[str]) -> list[str]:
        """The command line that runs `line` at a host."""
        return ["ip", "netns", "exec", self._names[host], *line]

    def impair(self, host: int, delay_ms: float, loss_percent: float) -> None:
        """Delay and lose packets to and from a host; with zeros, its link is as it was."""
        for space, device in self._ends(host):
            if host in self._impaired:
                _run("tc", "-n", space, "qdisc", "del", "dev", device, "root" if self.delays else "clsact")
            if delay_ms or loss_percent:
                self._impair(space, device, delay_ms, loss_percent)
        self._impaired.discard(host)
        if delay_ms or loss_percent:
            self._impaired.add(host)

    def close(self) -> None:
        """Also if only a part was made. What still runs in the namespaces is killed."""
        for name in (self._hub, *self._names):
            with contextlib.suppress(BenchmarkError):
                for pid in _run("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _run("ip", "netns", "delete", name)

    def _ends(self, host: int) -> list[tuple[str, str]]:
        """Namespace and device, of both ends of a host's link."""
        return [(self._hub, f"link{host}"), (self._names[host], "eth0")]

    def _ip(self, host: int) -> str:
        return f"198.18.0.{host + 1}"  # of a network for benchmarks, RFC 2544

    def _can_impair(self) -> bool:
        try:
            self._impair(self._hub, "lo", 1.0, 1.0)
        except BenchmarkError:
            return False
        return True

    def _impair(self, space: str, device: str, delay_ms: float, loss_percent: float) -> None:
        """What leaves a device. A random number below the threshold drops a packet, where there is no netem."""
        if self.delays:
            netem = ["netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%", "limit", str(QUEUE_PACKETS)]
            _run("tc", "-n", space, "qdisc", "add", "dev", device, "root", *netem)
            return
        threshold = int(loss_percent / 100 * 2**32)
        program = f"4,32 0 0 {BPF_RANDOM},53 1 0 {threshold},6 0 0 {TC_SHOT},6 0 0 {TC_OK}"
        _run("tc", "-n", space, "qdisc", "add", "dev", device, "clsact")
        _run("tc", "-n", space, "filter", "add", "dev", device, "egress", "bpf", "da", "bytecode", program)


class Switched(Namespaces):
    """The same hosts, with a process in place of bridge and links."""

    def __init__(self, hosts: int, folder: Path):
        super().__init__(hosts)
        self._folder = folder
        self._process: Process | None = None
        self._links = Links([0.0] * hosts, [0.0] * hosts)

    def make(self) -> None:
        for name in self._names:
            _run("ip", "netns", "add", name)
        line = [sys.executable, "-m", "benchmarks.store.switch", *self._names]
        self._process = Process("switch", line, self._folder, pipes=True)
        self._process.line()
        for host, name in enumerate(self._names):
            _run("ip", "-n", name, "link", "set", "eth0", "up", "mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS))
            self._name_host(host)
        self.delays = self.loses = True

    @property
    def said(self) -> str:
        of = self._tell()
        late = f"99 % at most {of.late_p99_ms:g} ms late, {of.dropped} dropped, {of.cpu_seconds:g} s of CPU"
        return f"namespaces, delay and loss by a process: {of.frames} frames, {late}"

    def impair(self, host: int, delay_ms: float, loss_percent: float) -> None:
        self._links.delay_ms[host], self._links.loss_percent[host] = delay_ms, loss_percent
        self._tell()

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
        super().close()

    def _tell(self) -> Passed:
        assert self._process is not None
        self._process.say(msgspec.json.encode(self._links).decode())
        return msgspec.json.decode(self._process.line(), type=Passed)


def _run(*line: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{shlex.join(line)}: {done.stderr.strip()}")
    return done.stdout


def open_network(
    hosts: int, loopback: bool, stack: ExitStack, folder: Path, *, switch: bool = False
) -> Loopback | Namespaces:
    """Namespaces where that works, otherwise loopback; `stack` closes it."""
    if loopback:
        return Loopback("--loopback")
    if os.geteuid():
        return Loopback("namespaces need root")
    if missing := [name for name in ("ip", "tc") if not shutil.which(name)]:
        return Loopback(f"{' and '.join(missing)} not found on PATH")
    namespaces = Switched(hosts, folder) if switch else Namespaces(hosts)
    stack.callback(namespaces.close)
    try:
        namespaces.make()
    except BenchmarkError as error:
        return Loopback(str(error))
    return namespaces


# ---- the benchmark


class Condition(NamedTuple):
    """Of the targets' links, and of one target and its link."""

    delay_ms: float = 0.0
    loss_percent: float = 0.0
    bad_loss_percent: float = 0.0
    stops: bool = False


class Figures(msgspec.Struct):
    """Of one condition. Spreads are of rounds, counts of all rounds together."""

    get_p50_ms: Spread
    get_p99_ms: Spread
    goodput_gbytes_per_second: Spread
    hits: Spread  # share of the chunks asked for that had been stored
    got: dict[str, int]
    put: dict[str, int]
    wrong: int
    target_memory_mib: list[int]  # of each target, the highest of the rounds' ends
    target_threads: list[int]


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    seed: int
    network: str
    conditions: dict[str, Figures]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workers: int = Field(64, ge=1, le=1024)
    targets: int = Field(4, ge=1, le=16)
    processes: int = Field(max(2, len(os.sched_getaffinity(0)) // 4), ge=1, le=64)
    connections: int = Field(good_connections(), ge=1, le=64)
    value: ByteSize = Field(ByteSize(512 << 10), ge=1, le=64 << 20)
    hot: ByteSize = Field(ByteSize(256 << 20), ge=1 << 20)
    capacity: ByteSize = Field(ByteSize(2 << 30), ge=1 << 20)
    pause: float = Field(500.0, gt=0)
    deadline: float = Field(1000.0, gt=0)
    delay: float = Field(0.2, ge=0)
    loss: float = Field(0.01, ge=0, lt=100)
    bad_loss: float = Field(2.0, ge=0, lt=100)
    seconds: float = Field(6.0, gt=0)
    rounds: int = Field(3, ge=1)
    seed: int = Field(default_factory=lambda: random.randrange(1 << 32))
    loopback: bool = False
    switch: bool = False
    dir: Path | None = None
    json_file: Path | None = Field(None, alias="json")


class Bench:
    """Targets, workers and the links between them; `stack` takes them down."""

    def __init__(self, options: Options, folder: Path, stack: ExitStack):
        self._options = options
        processes = min(options.processes, options.workers)
        hosts = options.targets + processes
        self.network = open_network(hosts, options.loopback, stack, folder, switch=options.switch)
        addresses = [self.network.address(host) for host in range(options.targets)]
        self._targets: list[Process] = []
        for host, address in enumerate(addresses):
            (own := folder / f"store-{host}").mkdir()
            line = [sys.executable, "-m", "kvstore", "--dir", str(own), "--listen", address, "--nats", ""]
            line += ["--capacity", str(int(options.capacity)), "--hot", str(int(options.hot)), "--unix-socket", ""]
            line += ["--connections", str(options.workers * options.connections + processes)]
            self._targets.append(Process(f"target-{host}", self.network.within(host, line), folder))
            stack.callback(self._targets[-1].stop)
        self._processes: list[Process] = []
        for number in range(processes):
            setup = Setup(
                options.seed,
                list(range(number, options.workers, processes)),
                addresses,
                options.connections,
                int(options.value),
                options.pause / 1000,
                options.deadline / 1000,
            )
            line = [sys.executable, "-m", "benchmarks.store.rack", "--work", msgspec.json.encode(setup).decode()]
            within = self.network.within(options.targets + number, line)
            self._processes.append(Process(f"workers-{number}", within, folder, pipes=True))
            stack.callback(self._processes[-1].stop, 1.0)
        for process in self._processes:
            self._hear(process)  # it is connected, and has filled the store

    @property
    def conditions(self) -> dict[str, Condition]:
        """The conditions that this network supports."""
        options, network = self._options, self.network
        delay = options.delay if network.delays else 0.0
        conditions = {"clean": Condition()}
        if network.delays:
            conditions["delayed"] = Condition(delay, options.loss, options.loss)
        if network.loses:
            conditions["lossy"] = Condition(delay, options.loss, options.bad_loss)
        return conditions | {"stopped": Condition(stops=True)}

    def take(self, condition: Condition) -> Tally:
        for host in range(len(self._targets)):
            loss = condition.loss_percent if host else condition.bad_loss_percent
            self.network.impair(host, condition.delay_ms, loss)
        task = Task(time.monotonic() + LEAD_SECONDS, self._options.seconds)
        for process in self._processes:
            process.say(msgspec.json.encode(task).decode())
        if condition.stops:
            self._stop_one(task)
        return total(msgspec.json.decode(self._hear(process), type=Tally) for process in self._processes)

    def usage(self) -> list[Usage]:
        return [usage(target.pid) for target in self._targets]

    def _hear(self, process: Process) -> str:
        try:
            return process.line()
        except BenchmarkError:
            for target in self._targets:
                if target.popen.poll() is not None:
                    raise BenchmarkError(f"{target.name} ended: {target.last_words()}") from None
            raise

    def _stop_one(self, task: Task) -> None:
        """Stop one target for the middle half of the time."""
        time.sleep(max(0.0, task.begin + task.seconds / 4 - time.monotonic()))
        os.kill(self._targets[0].pid, signal.SIGSTOP)
        try:
            time.sleep(task.seconds / 2)
        finally:
            os.kill(self._targets[0].pid, signal.SIGCONT)


def run(options: Options, folder: Path, stack: ExitStack) -> Report:
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    facts = machine(folder)
    bench = Bench(options, folder, stack)
    conditions = bench.conditions
    bench.take(Condition())  # not counted: connections are opened, and memory is touched for the first time
    tallies: dict[str, list[Tally]] = {name: [] for name in conditions}
    usages: dict[str, list[list[Usage]]] = {name: [] for name in conditions}
    for number in range(options.rounds):
        for name in conditions if number % 2 == 0 else reversed(conditions):
            tallies[name].append(bench.take(conditions[name]))
            usages[name].append(bench.usage())
            if len(tallies[name][-1].milliseconds) < 2:
                raise BenchmarkError(f"no two gets in {options.seconds} s")
    return Report(
        shlex.join(["python", "-m", "benchmarks.store.rack", *sys.argv[1:]]),
        facts,
        options.seed,
        bench.network.said,
        {name: figures(tallies[name], usages[name], options.seconds) for name in conditions},
    )


def figures(tallies: Sequence[Tally], usages: Sequence[Sequence[Usage]], seconds: float) -> Figures:
    whole = total(tallies)
    percentiles = [statistics.quantiles(tally.milliseconds, n=100, method="inclusive") for tally in tallies]
    return Figures(
        spread(of[49] for of in percentiles),
        spread(of[98] for of in percentiles),
        spread(tally.right_bytes / GB / seconds for tally in tallies),
        spread(tally.got.get("hit", 0) / sum(tally.got.values()) for tally in tallies),
        whole.got,
        whole.put,
        whole.wrong,
        [max(one.kilobytes for one in of) // 1024 for of in zip(*usages, strict=True)],
        [max(one.threads for one in of) for of in zip(*usages, strict=True)],
    )


def measure(options: Options, parent: Path) -> Report:
    """Run all measurements in a temporary folder. Signals do not interrupt the cleanup."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with tempfile.TemporaryDirectory(prefix="kvtier-rack-", dir=parent) as folder, ExitStack() as stack:
            try:
                return run(options, Path(folder), stack)
            finally:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(report: Report) -> str:
    lines = heading(report.command, report.machine)
    lines += [f"seed: {report.seed}", f"network: {report.network}", ""]
    lines.append("".join(f"{name:<24}" for name in ("", "get p50, ms", "get p99, ms", "goodput, GB/s", "hits")))
    for name, of in report.conditions.items():
        spreads = (of.get_p50_ms, of.get_p99_ms, of.goodput_gbytes_per_second, of.hits)
        lines.append(f"{name:<24}" + "".join(f"{shown(one, '.4g'):<24}" for one in spreads))
    for name, of in report.conditions.items():
        lines += ["", f"{name}: {of.wrong} wrong values"]
        lines += [f"  chunks got: {_counts(of.got)}", f"  chunks put: {_counts(of.put)}"]
        lines.append(f"  memory of each target, MiB: {', '.join(map(str, of.target_memory_mib))}")
        lines.append(f"  threads of each target: {', '.join(map(str, of.target_threads))}")
    return "\n".join(lines)


def _counts(of: dict[str, int]) -> str:
    names = [outcome.name.lower() for outcome in Outcome]
    return ", ".join(f"{of[name]} {name}" for name in names if name in of)


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.rack", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", help="default 64")
    parser.add_argument("--targets", help="1 to 16; default 4")
    parser.add_argument("--processes", help="that hold the workers; default one for 4 cores, at least 2")
    parser.add_argument("--connections", help="of a worker to a target, at most; default as the client's")
    parser.add_argument("--value", help="size of a chunk; default 512KiB")
    parser.add_argument("--hot", help="hot cache of a target; default 256MiB")
    parser.add_argument("--capacity", help="of a target; default 2GiB, more than is put in three rounds")
    parser.add_argument("--pause", help="of a worker between turns, on average, ms; default 500")
    parser.add_argument("--deadline", help="of each request, ms; default 1000")
    parser.add_argument("--delay", help="of the links, each way, ms; default 0.2")
    parser.add_argument("--loss", help="of the links, each way, percent; default 0.01")
    parser.add_argument("--bad-loss", help="of the bad link, each way, percent; default 2")
    parser.add_argument("--seconds", help="of a measurement; default 6")
    parser.add_argument("--rounds", help="default 3")
    parser.add_argument("--seed", help="of all random choices but the network's; default: another each time")
    parser.add_argument("--loopback", action="store_true", help="make no namespaces")
    parser.add_argument("--switch", action="store_true", help="delay and lose packets in a process, without netem")
    parser.add_argument("--dir", help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", help="where to write the result")
    return validated(Options, vars(parser.parse_args(argv)))


def main() -> None:
    if sys.argv[1:2] == ["--work"]:  # a process that this one starts
        serve(msgspec.json.decode(sys.argv[2], type=Setup))
        return
    options = parse()
    folder = choose_folder(options.dir)
    check_space(folder, options.targets * options.capacity)
    signal.signal(signal.SIGHUP, _leave)
    report = command(lambda: measure(options, folder), show, options.json_file)
    if wrong := sum(of.wrong for of in report.conditions.values()):
        raise FailedError(f"{wrong} values were wrong")


if __name__ == "__main__":
    run_command("benchmarks.store.rack", main)
