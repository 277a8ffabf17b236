"""Gets from a target's memory on the same host: over the UNIX socket, and copied from mapped memory.

    python -m benchmarks.store.near [--value 2560KiB] [--batch 256MiB] [--connections 0] [--rounds 5] [--json FILE]

Two targets with the same values in their hot caches. In each round the clients get a batch several times, one after the
other. Every other round runs in reverse order. Both check each value's checksum. The limit is a copy of the same bytes
by one thread.
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.store.__main__ import _bytes, choose_folder, command, machine
from benchmarks.store.results import GB, MIB, Spread, heading, paired, shown, spread
from benchmarks.store.servers import Process, free_port
from kvstore.disk.buffers import aligned
from kvstore.disk.record import record_bytes
from kvstore.errors import ConfigError, UnavailableError, run_command
from kvstore.net.carrier import MEMORY, borrower
from kvstore.net.client import Item, StoreClient, good_connections
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome

WAYS = ("socket", MEMORY)
CALL_SECONDS = 60.0
GETS = 8  # of a batch, in each round


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    connections: int
    gbytes_per_second: dict[str, Spread]
    memory_to_socket: Spread
    copy_gbytes_per_second: Spread


class Near:
    """One target with the values, and a client of it."""

    def __init__(self, way: str, options: argparse.Namespace, folder: Path, stack: ExitStack):
        (own := folder / way).mkdir()
        address = f"127.0.0.1:{free_port()}"
        room = 2 * options.count * record_bytes(options.value) + (256 << 20)
        line = [sys.executable, "-m", "kvstore", "--dir", str(own), "--capacity", str(room), "--hot", str(room)]
        carrier = MEMORY if way == MEMORY else ""
        target = Process(way, [*line, "--listen", address, "--nats", "", "--carrier", carrier], folder)
        stack.callback(target.stop)
        target.wait_for(address)
        self._client = StoreClient(
            StaticMembership([address]),
            connections_per_target=options.connections,
            carrier=borrower(carrier) if carrier else None,
        )
        stack.callback(self._client.close)
        self._keys = [number.to_bytes(16, "big") for number in range(options.count)]
        content = random.Random(1).randbytes(options.value)
        for number, key in enumerate(self._keys):
            item = Item(key, memoryview(content), number + 1, 1, 1)
            if self._client.put([item], time.monotonic() + CALL_SECONDS) != [Outcome.STORED]:
                raise UnavailableError(f"{way}: a value was not stored")

    def get(self, rooms: list[memoryview]) -> float:
        """Bytes a second."""
        begun = time.monotonic()
        if set(self._client.get(self._keys, rooms, begun + CALL_SECONDS)) != {Outcome.HIT}:
            raise UnavailableError("a value did not come")
        return sum(map(len, rooms)) / (time.monotonic() - begun)


def measure(options: argparse.Namespace, parent: Path) -> Report:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-near-", dir=parent)))
        nears = {way: Near(way, options, folder, stack) for way in WAYS}
        region = aligned(options.count * options.value).payload
        rooms = [region[start : start + options.value] for start in range(0, len(region), options.value)]
        for near in nears.values():
            near.get(rooms)  # touches what is touched for the first time
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        copies = []
        source, into = np.ones((2, 64 * MIB), np.uint8)
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                speeds[way].append(statistics.median(nears[way].get(rooms) / GB for _ in range(GETS)))
            begun = time.monotonic()
            np.copyto(into, source)
            copies.append(len(into) / (time.monotonic() - begun) / GB)
    return Report(
        shlex.join(["python", "-m", "benchmarks.store.near", *sys.argv[1:]]),
        machine(parent),
        options.connections,
        {way: spread(of_way) for way, of_way in speeds.items()},
        paired(speeds[MEMORY], speeds["socket"]),
        spread(copies),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.near", description=__doc__.split("\n")[0])
    parser.add_argument("--value", default="2560KiB", help="16 tokens of a 70B model with FP8 KV: 2560KiB, the default")
    parser.add_argument("--batch", default="256MiB", help="asked for at once; default 256MiB")
    parser.add_argument("--connections", type=int, default=0, help="default 0: as many as a worker has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    options.value = _bytes("value", options.value)
    options.count = _bytes("batch", options.batch) // options.value
    if not options.count:
        raise ConfigError("batch", options.batch, "at least one value (--value)")
    options.connections = options.connections or good_connections()
    return options


def show(report: Report) -> str:
    lines = heading(report.command, report.machine)
    lines.append(f"connections: {report.connections}")
    lines += [f"{way:<22}{shown(speed, '.2f')} GB/s" for way, speed in report.gbytes_per_second.items()]
    lines.append(f"{'memory over socket':<22}{shown(report.memory_to_socket, '.2f')}")
    lines.append(f"{'copy by one thread':<22}{shown(report.copy_gbytes_per_second, '.2f')} GB/s")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    command(lambda: measure(options, choose_folder(options.dir)), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.near", main)
