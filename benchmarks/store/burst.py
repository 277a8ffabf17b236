"""Put throughput of a target with durability memory and written: a burst of the hot cache's size, and sustained puts.

    python -m benchmarks.store.burst [--hot 1GiB] [--repeats 5] [--clients 2] [--transport unix] [--json FILE]

Each round measures all figures on new targets. Every other round runs in reverse order.

- burst: puts as many bytes as the hot cache has. In all cases, refused puts are not retried.
- sustained: three times as many, into a store with room for them.
- evicting: three times as many, into a full store that holds half of them.

`acknowledged`: bytes answered STORED, until the last answer. `written`: bytes on the device, until the last write.
`lost`: the share of the offered bytes that was not written. Limits, measured in the same round: a bare socket with the
same bytes, and a copy in memory by one thread. The disk's limit is writes of 4 MiB to one file, four at a time, with
O_DIRECT.
"""

import argparse
import random
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.store import servers
from benchmarks.store.__main__ import _bytes, check_space, choose_folder, command, machine
from benchmarks.store.results import GB, MIB, Spread, paired, spread
from benchmarks.store.servers import BenchmarkError, Client, Process, Target
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.record import PAGE_BYTES
from kvstore.errors import ConfigError, run_command
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Status

BATCH_BYTES = 64 * MIB
SEGMENT_BYTES = 64 * MIB
WRITE_BYTES = 4 * MIB
LIMIT_BYTES = 512 * MIB
LEAD_SECONDS = 0.05
TOUCHED_BYTES_A_SECOND = 0.5 * GB  # by a target that starts (disk/buffers.py), at least
FLUSH_SECONDS = 120.0
DURABILITIES = ("memory", "written")
# Operation -> bytes put and capacity, both in multiples of the hot cache.
SHAPES = {"burst": (1, 4), "sustained": (3, 4), "evicting": (3, 1.5)}


class Row(msgspec.Struct):
    operation: str
    durability: str
    acknowledged_gbytes_per_second: Spread
    written_gbytes_per_second: Spread
    ratio_to_socket: Spread  # of what was acknowledged
    ratio_to_disk: Spread  # of what was written
    acknowledged_to_written: Spread | None  # memory over written, in one round
    refused_share: Spread
    lost_share: Spread


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    socket_gbytes_per_second: Spread
    disk_gbytes_per_second: Spread
    copy_gbytes_per_second: Spread
    rows: list[Row]


class Sample(msgspec.Struct):
    acknowledged: float  # GB/s
    written: float
    refused: float  # shares
    lost: float


class Bench:
    """All processes; `stack` stops them."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack):
        self.hot_bytes = options.hot
        self._size = options.value
        self._transport = options.transport
        self._folder = folder
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._count = 0
        self._clients = [
            Client(f"client-{number}", sys.executable, BATCH_BYTES, self._logs) for number in range(options.clients)
        ]
        for client in self._clients:
            stack.callback(client.stop)
            client.answer()
        self._files = Files()
        self._file = self._files.open(folder / "limit.data", LIMIT_BYTES)
        stack.callback(self._files.close, self._file)
        self.disk()  # the first write to preallocated space is slower
        self._socket = self._address("socket")
        command = [sys.executable, "-m", "benchmarks.store.worker", "socket", self._socket, str(1 << 30)]
        bare = Process("socket", command, self._logs)
        stack.callback(bare.stop)
        bare.wait_for(self._socket)
        self._open("socket", "socket", self._socket)

    def _address(self, name: str) -> str:
        return str(self._folder / name) if self._transport == "unix" else f"127.0.0.1:{servers.free_port()}"

    def _open(self, name: str, kind: str, where: str) -> None:
        for client in self._clients:
            client.do("open", name=name, kind=kind, where=where, connections=1)

    def _put(self, name: str, size_bytes: int) -> tuple[float, float]:
        """Seconds until the last answer, and the share of the values that was accepted."""
        batches = range(size_bytes // BATCH_BYTES)
        at = time.monotonic() + LEAD_SECONDS
        for number, client in enumerate(self._clients):
            share = list(batches[number :: len(self._clients)])
            client.ask("run", name=name, operation="put", dataset=name, size=self._size, batches=share, at=at)
        answers = [client.answer() for client in self._clients]
        seconds = max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)
        return seconds, sum(answer["good"] for answer in answers) / sum(answer["asked"] for answer in answers)

    def socket(self) -> float:
        seconds, _ = self._put("socket", self.hot_bytes)
        return float(self.hot_bytes / GB / seconds)

    def disk(self) -> float:
        content = aligned(WRITE_BYTES - PAGE_BYTES).view
        content[:] = random.Random(1).randbytes(WRITE_BYTES)
        offsets = range(0, LIMIT_BYTES, WRITE_BYTES)
        with ThreadPoolExecutor(4) as pool:
            begin = time.monotonic()
            list(pool.map(lambda offset: self._files.write(self._file, [content], offset), offsets))
            seconds = time.monotonic() - begin
        return LIMIT_BYTES / GB / seconds

    def copy(self) -> float:
        source, destination = np.ones(256 * MIB, np.uint8), np.ones(256 * MIB, np.uint8)
        begin = time.monotonic()
        np.copyto(destination, source)
        return 256 * MIB / GB / (time.monotonic() - begin)

    def take(self, operation: str, durability: str) -> Sample:
        self._count += 1
        name = f"{operation}-{durability}-{self._count}"
        put, capacity = (int(part * self.hot_bytes) for part in SHAPES[operation])
        unix = self._address(name) if self._transport == "unix" else ""
        options = ("--durability", durability)
        target = Target(
            name, self._folder / f"{name}.d", self._logs, capacity, SEGMENT_BYTES, unix, self.hot_bytes, *options
        )
        try:
            if operation == "evicting":  # fill it first, so that all its files were written once
                self._open(f"fill-{name}", "kvtier", target.address)
                self._put(f"fill-{name}", capacity)
                self._flushed(target)
            time.sleep(self.hot_bytes / TOUCHED_BYTES_A_SECOND)
            self._open(name, "kvtier-once", target.address)
            before = self._flushed(target)
            begin = time.monotonic()
            seconds, good = self._put(name, put)
            status = self._flushed(target)
            written_seconds = time.monotonic() - begin - LEAD_SECONDS
        finally:
            target.stop()
        written = status.accepted_bytes - before.accepted_bytes
        for path in target.folder.iterdir():
            path.unlink()
        return Sample(good * put / GB / seconds, written / GB / written_seconds, 1 - good, 1 - written / put)

    def _flushed(self, target: Target) -> Status:
        """Its status once all data is written."""
        client = StoreClient(StaticMembership([target.address]))
        deadline = time.monotonic() + FLUSH_SECONDS
        try:
            while time.monotonic() < deadline:
                status = client.stat(deadline)[target.address]
                if not status.dirty_bytes and not status.waiting_write_bytes:
                    return status
                time.sleep(0.01)
        finally:
            client.close()
        raise BenchmarkError(f"{target.name} has not written all after {FLUSH_SECONDS:.0f} s")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    facts = machine(folder)
    limits: defaultdict[str, list[float]] = defaultdict(list)
    samples: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    with ExitStack() as stack:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-burst-", dir=folder)))
        bench = Bench(options, own, stack)
        for number in range(options.repeats):
            for name, limit in (("socket", bench.socket), ("disk", bench.disk), ("copy", bench.copy)):
                limits[name].append(limit())
            pairs = [(operation, durability) for operation in SHAPES for durability in DURABILITIES]
            for pair in reversed(pairs) if number % 2 else pairs:
                samples[pair].append(bench.take(*pair))
                print(f"{time.strftime('%H:%M:%S')} {' '.join(pair)}: {samples[pair][-1]}", file=sys.stderr, flush=True)
    return Report(
        command=shlex.join(["python", "-m", "benchmarks.store.burst", *sys.argv[1:]]),
        machine=facts,
        socket_gbytes_per_second=spread(limits["socket"]),
        disk_gbytes_per_second=spread(limits["disk"]),
        copy_gbytes_per_second=spread(limits["copy"]),
        rows=[_row(*pair, samples, limits) for pair in samples],
    )


def _row(
    operation: str,
    durability: str,
    samples: dict[tuple[str, str], list[Sample]],
    limits: dict[str, list[float]],
) -> Row:
    ours = samples[operation, durability]
    acknowledged, written = [one.acknowledged for one in ours], [one.written for one in ours]
    other = [one.acknowledged for one in samples[operation, "written"]]
    return Row(
        operation=operation,
        durability=durability,
        acknowledged_gbytes_per_second=spread(acknowledged),
        written_gbytes_per_second=spread(written),
        ratio_to_socket=paired(acknowledged, limits["socket"]),
        ratio_to_disk=paired(written, limits["disk"]),
        acknowledged_to_written=paired(acknowledged, other) if durability == "memory" else None,
        refused_share=spread(one.refused for one in ours),
        lost_share=spread(one.lost for one in ours),
    )


def show(report: Report) -> str:
    def cell(value: Spread | None) -> str:
        return f"{value.median:.2f} [{value.quartiles[0]:.2f} {value.quartiles[1]:.2f}]" if value else "-"

    head = [
        "",
        "durability",
        "acknowledged GB/s",
        "written GB/s",
        "/socket",
        "/disk",
        "memory/written",
        "refused",
        "lost",
    ]
    rows = [
        [
            row.operation,
            row.durability,
            cell(row.acknowledged_gbytes_per_second),
            cell(row.written_gbytes_per_second),
            cell(row.ratio_to_socket),
            cell(row.ratio_to_disk),
            cell(row.acknowledged_to_written),
            cell(row.refused_share),
            cell(row.lost_share),
        ]
        for row in report.rows
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    limits = (
        f"limits, GB/s: socket {cell(report.socket_gbytes_per_second)}, disk {cell(report.disk_gbytes_per_second)}, "
        f"copy in memory {cell(report.copy_gbytes_per_second)}"
    )
    return "\n".join([report.command, *(f"{name}: {value}" for name, value in report.machine.items()), limits, *lines])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.burst", description=__doc__.split("\n")[0])
    parser.add_argument("--hot", default="1GiB", help="hot cache of the targets; default 1GiB")
    parser.add_argument("--value", default="2MiB", help="of values; default 2MiB")
    parser.add_argument("--clients", type=int, default=2, help="processes; default 2")
    parser.add_argument("--transport", choices=["tcp", "unix"], default="unix")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    options.hot, options.value = _bytes("hot", options.hot), _bytes("value", options.value)
    if options.hot < 2 * BATCH_BYTES or options.hot % (2 * BATCH_BYTES):
        raise ConfigError("hot", options.hot, f"a multiple of {2 * BATCH_BYTES}")
    if BATCH_BYTES % options.value:
        raise ConfigError("value", options.value, f"a divisor of {BATCH_BYTES}")
    return options


def main() -> None:
    options = parse()
    folder = choose_folder(options.dir)
    check_space(folder, 6 * options.hot + (1 << 30))
    command(lambda: measure(options, folder), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.burst", main)
