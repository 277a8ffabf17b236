"""The cost of an idle connection for a target: threads, and memory of its process, without socket buffers.

    python -m benchmarks.store.connections [--connections 200] [--rounds 5] [--json FILE]

Each round starts a target, opens 20 connections over TCP, then the given number. Each sends an EXISTS. The memory is
the growth of the target's process after the first 20.
"""

import argparse
import re
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks.store.__main__ import choose_folder, command, machine
from benchmarks.store.results import Spread, heading, shown, spread
from benchmarks.store.servers import BenchmarkError, Process, free_port
from kvstore.errors import ConfigError, run_command
from kvstore.net import transport, wire
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op

CALL_SECONDS = 30.0
CONNECTIONS_MAX = 10_000
FIRST = 20


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    kilobytes_a_connection: Spread
    threads_a_connection: Spread


class Usage(msgspec.Struct):
    kilobytes: int
    threads: int


def settled(pid: int) -> Usage:
    """The usage once it stops growing: a target touches its memory for some time after its start."""
    before, now = None, usage(pid)
    while now != before:
        time.sleep(0.5)
        before, now = now, usage(pid)
    return now


def usage(pid: int) -> Usage:
    text = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(number) for name, number in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.MULTILINE)}
    return Usage(found["VmRSS"], found["Threads"])


def connected(address: str, number: int) -> Stream:
    """A connection with one answered request."""
    deadline = time.monotonic() + CALL_SECONDS
    stream = transport.connect(address, deadline)
    hello = wire.Hello("default", f"client-{number}", "another host")
    for frame in (wire.encode(Header(Op.HELLO), hello), wire.encode(Header(Op.EXISTS), wire.Exists([bytes(16)]))):
        stream.send([frame], deadline)
        header = stream.receive_header(deadline)
        if header.op is Op.ERROR:
            raise BenchmarkError("the target refuses a connection")
        stream.receive_control(header, deadline)
    return stream


def cost(options: argparse.Namespace, folder: Path, number: int) -> tuple[float, float]:
    """KB and threads per connection."""
    (own := folder / str(number)).mkdir()
    address = f"127.0.0.1:{free_port()}"
    line = [sys.executable, "-m", "kvstore", "--dir", str(own), "--capacity", "512MiB", "--listen", address]
    line += ["--nats", "", "--buffers", "32MiB", "--connections", str(options.connections + FIRST + 1)]
    with ExitStack() as stack:
        target = Process(f"target-{number}", line, folder)
        stack.callback(target.stop)
        target.wait_for(address)
        used = []
        for count in (FIRST, options.connections):
            for client in range(count):
                stack.callback(connected(address, client).close)
            used.append(settled(target.pid))
    before, after = used
    more = options.connections
    return (after.kilobytes - before.kilobytes) / more, (after.threads - before.threads) / more


def measure(options: argparse.Namespace, parent: Path) -> Report:
    facts = machine(parent)
    with tempfile.TemporaryDirectory(prefix="kvtier-connections-", dir=parent) as folder:
        costs = [cost(options, Path(folder), number) for number in range(options.rounds)]
    return Report(
        shlex.join(["python", "-m", "benchmarks.store.connections", *sys.argv[1:]]),
        facts,
        spread(kilobytes for kilobytes, _ in costs),
        spread(threads for _, threads in costs),
    )


def show(report: Report) -> str:
    lines = heading(report.command, report.machine)
    lines.append(f"KB a connection: {shown(report.kilobytes_a_connection, '.1f')}")
    lines.append(f"threads a connection: {shown(report.threads_a_connection, '.1f')}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.connections", description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    if not 1 <= options.connections <= CONNECTIONS_MAX:
        raise ConfigError("connections", options.connections, f"1 to {CONNECTIONS_MAX}")
    return options


def main() -> None:
    options = parse()
    command(lambda: measure(options, choose_folder(options.dir)), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.connections", main)
