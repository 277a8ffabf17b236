"""The cost of routers' snapshots for a target: GET latency meanwhile, and the time until all mirrors are complete.

    python -m benchmarks.store.mirrors --json FILE [--targets N] [--routers N] [--chunks N] [--rounds N] [--nice N]

Real targets, a real NATS server and mirrors in a process of their own. The stores are synthetic, as in
`benchmarks.store.recovery`, with `--chunks` in each. A client gets single chunks from the targets' memory, with pauses
of a millisecond. It does so first without snapshots, then while all routers start at once. The ratio of p99 is over all
rounds. Targets, mirrors and client share the machine's cores. With fewer cores than processes, the ratio includes the
mirrors' work. So the result also has the CPU seconds of a router and of a target until all mirrors are complete. With
`--nice` the mirrors leave the cores to the others, as if they ran elsewhere.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.chat.load import quantile
from benchmarks.store import recovery
from benchmarks.store.__main__ import command
from benchmarks.store.servers import BenchmarkError, Process, free_port, program
from kvstore.bus.connection import Bus
from kvstore.bus.residency import Announcer, Mirror, announce, follow, new_epoch
from kvstore.disk.shelf import Shelf
from kvstore.errors import run_command, validated
from kvstore.net import transport
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.target import Target
from kvstore.net.wire import Outcome

NAMESPACE = "default"
VALUE_BYTES = 256 << 10
VALUES = 32
SEGMENT_BYTES = 256 << 20
STORED_BYTES = 512 << 10  # of a chunk that is made up: file systems end at 16 TiB
QUIET_SECONDS = 7.0  # longer than a snapshot is handed out: each round makes its own
CONVERGE_SECONDS_MAX = 300.0
_PAUSE_SECONDS = 0.001


class Gets(msgspec.Struct):
    count: int
    p50_ms: float
    p99_ms: float
    longest_ms: float


class Result(msgspec.Struct):
    targets: int
    routers: int
    chunks: int  # on each target
    quiet: Gets
    during: Gets  # snapshots
    p99_ratio: float
    converge_seconds: list[float]  # until the last router knew all, round by round
    router_cpu_seconds: list[float]  # of one router, meanwhile
    target_cpu_seconds: list[float]  # of one target, with the GETs
    router_bytes: list[int]  # that one router got from NATS


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    targets: int = Field(1, ge=1)
    routers: int = Field(1, ge=1)
    chunks: int = Field(1_000_000, ge=1)
    rounds: int = Field(5, ge=1)
    nice: int = Field(0, ge=0, le=19)
    dir: Path | None = None
    json_file: Path | None = Field(None, alias="json")
    nats: str = ""
    serve: str = ""


class Taken(msgspec.Struct):
    """By all routers until the last one knew all."""

    seconds: float
    cpu_seconds: float
    received_bytes: int


class _Getter(threading.Thread):
    """Gets one chunk after the other, and records each one's duration under the phase's name."""

    def __init__(self, client: StoreClient):
        super().__init__(daemon=True)
        self._client = client
        self.phase = ""
        self.seconds: dict[str, list[float]] = {"": [], "quiet": [], "during": []}
        self.misses = 0

    def run(self) -> None:
        room = memoryview(bytearray(VALUE_BYTES))
        number = 0
        while self.phase != "end":
            number = (number + 1) % VALUES
            phase, begun = self.phase, time.perf_counter()
            (outcome,) = self._client.get([_key(number)], [room], time.monotonic() + 60)
            self.seconds[phase].append(time.perf_counter() - begun)
            self.misses += outcome is not Outcome.HIT
            time.sleep(_PAUSE_SECONDS)


def _key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def measure(options: Options, folder: Path) -> Result:
    with ExitStack() as stack:
        port = free_port()
        nats = f"nats://127.0.0.1:{port}"
        server = Process("nats", [program("nats-server"), "--addr", "127.0.0.1", "--port", str(port)], folder)
        stack.callback(server.stop)
        server.wait_for(f"127.0.0.1:{port}")
        targets = [_target(number, nats, options.chunks, folder, stack) for number in range(options.targets)]
        client = StoreClient(StaticMembership([target.line() for target in targets]))
        stack.callback(client.close)
        items = [Item(_key(number), memoryview(bytes(VALUE_BYTES)), 0, 7, 1) for number in range(VALUES)]
        if (outcomes := set(client.put(items, time.monotonic() + 60))) != {Outcome.STORED}:
            raise BenchmarkError(f"not all values were stored: {outcomes}")
        child = [sys.executable, "-m", "benchmarks.store.mirrors", "--nats", nats]
        child += ["--routers", str(options.routers), "--chunks", str(options.chunks * options.targets)]
        child += ["--nice", str(options.nice)]
        routers = Process("routers", child, folder, pipes=True)
        stack.callback(routers.stop)
        routers.line()
        getter = _Getter(client)
        getter.start()
        taken: list[Taken] = []
        cpu: list[float] = []
        for _ in range(options.rounds):
            getter.phase = "quiet"
            time.sleep(QUIET_SECONDS)
            getter.phase = "during"
            before = sum(_cpu_seconds(target.pid) for target in targets)
            routers.say("begin")
            taken.append(msgspec.json.decode(routers.line(), type=Taken))
            cpu.append(round((sum(_cpu_seconds(target.pid) for target in targets) - before) / len(targets), 2))
            getter.phase = ""
            routers.say("forget")
            routers.line()
        getter.phase = "end"
        getter.join()
        if getter.misses:
            raise BenchmarkError(f"{getter.misses} of the gets missed")
    quiet, during = _gets(getter.seconds["quiet"]), _gets(getter.seconds["during"])
    return Result(
        options.targets,
        options.routers,
        options.chunks,
        quiet,
        during,
        round(during.p99_ms / quiet.p99_ms, 2),
        [one.seconds for one in taken],
        [round(one.cpu_seconds / options.routers, 2) for one in taken],
        cpu,
        [one.received_bytes // options.routers for one in taken],
    )


def _cpu_seconds(pid: int) -> float:
    """Of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _target(number: int, nats: str, chunks: int, folder: Path, stack: ExitStack) -> Process:
    """A target with so many chunks. Its first line is its address."""
    shape = recovery.Shape(str(folder / f"store-{number}"), chunks, STORED_BYTES, SEGMENT_BYTES, "device")
    recovery.build(shape)
    command = [sys.executable, "-m", "benchmarks.store.mirrors", "--nats", nats]
    command += ["--serve", msgspec.json.encode(shape).decode()]
    target = Process(f"target-{number}", command, folder, pipes=True)
    stack.callback(target.stop)
    return target


async def run_target(nats: str, shape: recovery.Shape) -> None:
    """A target on a store without room for its chunks (`recovery.SparseFiles`), until standard input ends."""
    listener = transport.listen("127.0.0.1:0")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    line = await Bus.connect(nats, f"target {address}")
    with recovery.opened(shape) as log:
        shelf = Shelf([log])
        epoch = new_epoch()
        announcer = Announcer(address, epoch, shelf.announced)
        shelf.observe(announcer)
        target = Target(shelf, name=address, epoch=epoch, hot_bytes=2 * VALUES * VALUE_BYTES)
        target.serve(listener)
        task = asyncio.create_task(announce(announcer, line, NAMESPACE))
        print(address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        task.cancel()
        await asyncio.to_thread(target.stop)
    await line.close()


def _gets(seconds: list[float]) -> Gets:
    p50, p99, longest = (round(1000 * quantile(seconds, share), 2) for share in (0.5, 0.99, 1.0))
    return Gets(len(seconds), p50, p99, longest)


async def run_routers(nats: str, routers: int, chunks: int) -> None:
    """At each input line, start that many mirrors. Print the cost until all of them know `chunks` chunks."""
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        begun, cpu = time.monotonic(), time.process_time()
        lines = [await Bus.connect(nats, f"router {number}") for number in range(routers)]
        mirrors = [Mirror(max_entries=2 * chunks + 1000) for _ in lines]
        pairs = zip(mirrors, lines, strict=True)
        tasks = [asyncio.create_task(follow(mirror, line, NAMESPACE)) for mirror, line in pairs]
        while any(sum(mirror.counts(time.monotonic()).values()) < chunks for mirror in mirrors):
            if time.monotonic() - begun > CONVERGE_SECONDS_MAX:
                raise BenchmarkError(f"mirrors know {[mirror.counts(time.monotonic()) for mirror in mirrors]}")
            await asyncio.sleep(0.01)
        received = sum(line._client.stats["in_bytes"] for line in lines)
        taken = Taken(round(time.monotonic() - begun, 2), time.process_time() - cpu, received)
        print(msgspec.json.encode(taken).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for task in tasks:
            task.cancel()
        for line in lines:
            await line.close()
        print("forgotten", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.mirrors", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", help="default 1")
    parser.add_argument("--routers", help="that start at once; default 1")
    parser.add_argument("--chunks", help="on each target; default 1000000")
    parser.add_argument("--rounds", help="default 5")
    parser.add_argument("--nice", help="of the routers, 0 to 19; default 0")
    parser.add_argument("--dir", help="file system to work on; default: that of temporary files")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("--nats", help=argparse.SUPPRESS)  # of the processes that this one starts
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = validated(Options, vars(parser.parse_args()))
    if options.serve:
        asyncio.run(run_target(options.nats, msgspec.json.decode(options.serve, type=recovery.Shape)))
        return 0
    if options.nats:
        os.nice(options.nice)
        asyncio.run(run_routers(options.nats, options.routers, options.chunks))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        command(
            lambda: measure(options, Path(folder)),
            lambda report: msgspec.json.format(msgspec.json.encode(report)).decode(),
            options.json_file,
        )
    return 0


if __name__ == "__main__":
    run_command("benchmarks.store.mirrors", main)
