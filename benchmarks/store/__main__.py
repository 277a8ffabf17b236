"""Get and put throughput of the store, compared with its peers and with the limits of disk and sockets.

    python -m benchmarks.store --json FILE [--dir DIR] [--peer-python PYTHON] [--quick]

One run starts our targets, the peers and the tools that measure the limits, on the same machine and device. Each gets
and puts the same values in turn. A figure is the median over the rounds; a ratio is between figures of one round. Needs
fio for the limits; iperf3 and redis-server are used if they are installed.
"""

import argparse
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TypeVar

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError

from benchmarks.store import servers
from benchmarks.store.results import MIB, SIDE_NAMES, Cell, Report, Result, table
from benchmarks.store.rounds import Bench, Plan
from benchmarks.store.servers import BenchmarkError
from kvstore.errors import ConfigError, UnavailableError, run_command

Reported = TypeVar("Reported")

SIZES = "256KiB,2MiB,4MiB,16MiB"
NO_DEVICE = {"tmpfs", "ramfs", "devtmpfs"}

NOTES = [
    "GB/s are 10^9 bytes of values a second, over all clients, from their common start to the end of the last one.",
    "get cold: O_DIRECT or, in builds without it, from files dropped from the page cache before each measurement;"
    " values are asked for in the order in which they were put.",
    "put: until the calls have returned and fdatasync of the segments has, too; fio's limit is without a flush."
    " What a busy target turns away is offered again within that time (refused_share).",
    "The limit of each round is the best of all ways that were tried: the bare socket with 1 and 4 connections a client"
    " and, over TCP, iperf3; fio with the better of io_uring and libaio at QD8 and QD32.",
    "Peers in RAM are compared with our hot cache, and their put to RAM with ours to disk."
    " On disk, Redis and LMCache's server have nothing to compare with; Mooncake has SSD offload (mooncake-ssd),"
    " but its put returns once the value is in RAM.",
    "The target that is put to keeps what was written in its DRAM cache, too, if it has one; the cold one has none.",
    "Our client and target check a checksum of every value; none of these peers does by default.",
]


def plan(options: argparse.Namespace) -> Plan:
    clients = [_number("clients", text) for text in options.clients.split(",")]
    quick = options.quick
    batch = 32 * MIB if quick else 64 * MIB
    sizes = [
        _bytes("sizes", text) for text in ("2MiB" if quick and options.sizes == SIZES else options.sizes).split(",")
    ]
    for size in sizes:
        if size < 64 * 1024 or batch % size:
            raise ConfigError("sizes", size, f"a divisor of {batch} from 64KiB on")
    return Plan(
        sizes=sizes,
        clients=clients,
        transports=_chosen("transports", options.transports, ["tcp", "unix"]),
        repeats=(3 if quick else 5) if options.repeats is None else _number("repeats", options.repeats),
        peers=[] if options.peers == "none" else _chosen("peers", options.peers, list(servers.PEERS)),
        peer_python=options.peer_python,
        batch_bytes=batch,
        calls=-(-(4 if quick else 8) // max(clients)) * max(clients),
        cold_batches=8,
        hot_batches=4,
        ring_bytes=(512 if quick else 2048) * MIB,
        segment_bytes=(64 if quick else 256) * MIB,
        hot_cache_bytes=2048 * MIB,
    )


def _number(field: str, text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise ConfigError(field, text, "whole numbers from 1 to 64")
    return int(text)


def _chosen(field: str, text: str, known: list[str]) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(known):
        raise ConfigError(field, text, f"some of {','.join(known)}")
    return chosen


def _bytes(field: str, text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(field, text, "a size such as 256KiB or 4MiB") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument(
        "--dir", type=Path, help="where to make the temporary folder; default: on a file system on disk"
    )
    parser.add_argument("--repeats", help="rounds; default 5, with --quick 3")
    parser.add_argument("--sizes", default=SIZES, help=f"of values; default {SIZES}")
    parser.add_argument("--clients", default="1,4", help="numbers of client processes; default 1,4")
    parser.add_argument("--transports", default="tcp,unix", help="default tcp,unix")
    parser.add_argument("--peers", default=",".join(servers.PEERS), help=f"or none; default {','.join(servers.PEERS)}")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has lmcache and mooncake")
    parser.add_argument(
        "--quick", action="store_true", help="one size, less data: to see that it works, not for figures"
    )
    return parser.parse_args(argv)


def choose_folder(asked: Path | None) -> Path:
    """The given folder, or the first usual one that is on a device."""
    folders = [asked] if asked else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for folder in folders:
        if folder.is_dir() and servers.file_system(folder) not in NO_DEVICE:
            return folder.resolve()
    raise ConfigError("dir", folders[0], "a folder that exists, on a file system that is not kept in memory")


def check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ConfigError("dir", folder, f"{wanted / 2**30:.1f} GiB free, not {free / 2**30:.1f}")


def machine(folder: Path) -> dict[str, str | int | float]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu.partition(":")[2].strip(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "file_system": servers.file_system(folder),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def results(cells: list[Cell], clients: list[int]) -> list[Result]:
    rows = [cell.result(side, number) for cell in cells for side in SIDE_NAMES for number in clients]
    return sorted(rows, key=lambda row: (row.operation, row.medium, row.transport, row.clients, row.value_bytes))


def run(options: argparse.Namespace, folder: Path) -> Report:
    """Run all measurements in a temporary folder."""
    wanted = plan(options)
    check_space(folder, wanted.disk_bytes)
    facts = machine(folder)
    began = time.monotonic()
    with ExitStack() as stack:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-benchmark-", dir=folder)))
        bench = Bench(wanted, own, stack)
        cells = bench.run()
    facts["seconds"] = round(time.monotonic() - began)
    return Report(
        command=shlex.join(["python", "-m", "benchmarks.store", *sys.argv[1:]]),
        machine=facts,
        settings={
            "repeats": wanted.repeats,
            "call_bytes": wanted.batch_bytes,
            "measurement_bytes": wanted.measured_bytes,
            "cold_bytes_per_size": wanted.cold_batches * wanted.batch_bytes,
            "hot_bytes_per_size": wanted.hot_batches * wanted.batch_bytes,
            "disk_bytes_at_most": wanted.disk_bytes,
            "hot_medium": bench.medium_of_hot(),
            "share_of_segments_still_cached_when_cold": round(bench.still_cached, 4),
            "limits": "fio, bare socket, iperf3" if bench.fio else "NO DISK LIMIT: apt-get install fio",
        },
        notes=NOTES,
        peers=bench.peers,
        disk=bench.fio.found if bench.fio else {},
        first_write=bench.first_write,
        results=results(cells, wanted.clients),
    )


def show(report: Report) -> str:
    lines = [report.command, ""]
    lines += [f"{name}: {value}" for name, value in (report.machine | report.settings).items()]
    lines += ["", table(report.results), "", "GB/s and ratios: median [quartiles]. ours/x above 1: we are faster."]
    if report.first_write:
        first = report.first_write
        lines.append(
            f"First write to preallocated space: {first.gbytes_per_second.median:.2f} GB/s,"
            f" fio {first.limit_gbytes_per_second.median:.2f}, ratio {first.ratio_to_limit.median:.2f}"
        )
    lines += [f"{peer}: {text}" for peer, text in report.peers.items()]
    return "\n".join([*lines, *(f"- {note}" for note in report.notes)])


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def command(measure: Callable[[], Reported], show: Callable[[Reported], str], json: Path | None) -> Reported:
    """Measure, print the report, write it to a file, and return it. Started processes are stopped, after SIGTERM,
    too."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        report = measure()
    except BenchmarkError as error:
        raise UnavailableError(str(error)) from None
    print(show(report))
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def main() -> None:
    options = parse()
    command(lambda: run(options, choose_folder(options.dir)), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store", main)
