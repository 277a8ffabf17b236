"""A target's start time with a million chunks, and the memory per chunk.

    python -m benchmarks.store.recovery --json FILE [--entries N] [--repeats N] [--value-bytes N]
        [--layout device|directory]

The store is synthetic: sealed segments with valid headers and footers, and holes instead of records, in sparse files.
The chunks themselves would be terabytes. That is fair, because a start that finds footers reads no records. Each repeat
opens the store in a new process. The memory is that process's growth divided by the entries. With direct I/O, as a
target has it, every footer comes from the device each time.
"""

import argparse
import contextlib
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import msgspec

from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.eviction import Queue
from kvstore.disk.files import Files
from kvstore.disk.log import Log
from kvstore.disk.record import PAGE_BYTES, Entry, SegmentHeader, Stamp

_RESERVED_BYTES = 1 << 20  # of a device, before its first segment
_SPARE_SLOTS = 4  # a store with an empty slot has nothing to evict at its start


class Shape(msgspec.Struct):
    """Of a store; a child process gets it on its command line."""

    path: str
    entries: int
    value_bytes: int
    segment_bytes: int
    layout: str

    @property
    def entries_a_segment(self) -> int:
        room = self.segment_bytes - PAGE_BYTES - record.footer_bytes(1)
        most = room // (record.record_bytes(self.value_bytes) + record.ENTRY_BYTES)
        while (
            PAGE_BYTES + most * record.record_bytes(self.value_bytes) + record.footer_bytes(most) > self.segment_bytes
        ):
            most -= 1
        return most

    @property
    def segments(self) -> int:
        return -(-self.entries // self.entries_a_segment)

    @property
    def capacity_bytes(self) -> int:
        reserved = _RESERVED_BYTES if self.layout == "device" else 0
        return (self.segments + _SPARE_SLOTS) * self.segment_bytes + reserved


class Start(msgspec.Struct):
    """The figures of one start."""

    entries: int
    seconds: float
    memory_bytes: int


class Result(msgspec.Struct):
    layout: str
    entries: int
    segments: int
    value_bytes: int
    seconds_median: float
    seconds: list[float]  # of each start, sorted
    memory_bytes_per_entry: float


class SparseFiles(Files):
    """Files whose space is not allocated."""

    def open(self, path: Path, size_bytes: int) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if os.fstat(fd).st_size < size_bytes:
            os.ftruncate(fd, size_bytes)
        return self._direct_fd(path, fd)


@contextlib.contextmanager
def opened(shape: Shape) -> Iterator[Log]:
    """The opened store, without the check of its capacity, which does not exist."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with mock.patch("kvstore.disk.space._DirectorySpace._check_room"):
        log = Log(Path(shape.path), shape.capacity_bytes, segment_bytes=shape.segment_bytes, files=SparseFiles())
    yield log
    log.close()


def build(shape: Shape) -> None:
    """Make the store, and write its headers and footers."""
    path = Path(shape.path)
    if shape.layout == "device":
        with path.open("wb") as file:
            file.truncate(shape.capacity_bytes)
    else:
        path.mkdir()
    chance = random.Random(1)
    files = SparseFiles()
    with opened(shape) as log:
        left = shape.entries
        for slot in range(shape.segments):
            stamp = Stamp(log.store_id, slot + 1)
            header = record.pack_segment_header(SegmentHeader(slot, stamp, shape.segment_bytes, Queue.PROBATION))
            table = _table(shape, min(left, shape.entries_a_segment), chance)
            left -= shape.entries_a_segment
            offset, footer = record.pack_footer(table, stamp, shape.segment_bytes)
            extent = log._device.extent(slot)
            files.write(extent.fd, [_aligned(header)], extent.offset)
            files.write(extent.fd, [_aligned(footer)], extent.offset + offset)


def _table(shape: Shape, entries: int, chance: random.Random) -> bytes:
    pages = record.record_bytes(shape.value_bytes) // PAGE_BYTES
    packed = (
        record.pack_entry(
            Entry(chance.randbytes(16), chance.getrandbits(64), 7, 1 + number * pages, shape.value_bytes, 0, 16)
        )
        for number in range(entries)
    )
    return b"".join(packed)


def _aligned(content: bytes) -> memoryview:
    memory = aligned(len(content) - PAGE_BYTES).view
    memory[:] = content
    return memory


def start(shape: Shape) -> Start:
    """Open the store in this process."""
    before = _resident_bytes()
    begun = time.monotonic()
    with opened(shape) as log:
        seconds = time.monotonic() - begun
        return Start(len(log), seconds, _resident_bytes() - before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(shape: Shape, repeats: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.store.recovery", "--start", msgspec.json.encode(shape).decode()]
    starts = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        starts.append(msgspec.json.decode(done.stdout, type=Start))
        if starts[-1].entries != shape.entries:
            raise SystemExit(f"{starts[-1].entries} entries found, {shape.entries} written")
    return Result(
        layout=shape.layout,
        entries=shape.entries,
        segments=shape.segments,
        value_bytes=shape.value_bytes,
        seconds_median=round(statistics.median(one.seconds for one in starts), 3),
        seconds=sorted(round(one.seconds, 3) for one in starts),
        memory_bytes_per_entry=round(statistics.median(one.memory_bytes for one in starts) / shape.entries, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--value-bytes", type=int, default=2 << 20, help="of a chunk; default 2 MiB")
    parser.add_argument("--segment-bytes", type=int, default=256 << 20, help="as in stores of 200 GiB and more")
    parser.add_argument("--layout", choices=["device", "directory"], default="device")
    parser.add_argument("--dir", type=Path, help="file system to work on; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(msgspec.json.encode(start(msgspec.json.decode(options.start, type=Shape))).decode())
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        store = str(Path(folder) / "store")
        shape = Shape(store, options.entries, options.value_bytes, options.segment_bytes, options.layout)
        build(shape)
        result = measure(shape, options.repeats)
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    print(
        f"{result.entries} entries in {result.segments} segments ({result.layout}): {result.seconds_median} s to open "
        f"({result.seconds[0]} to {result.seconds[-1]}), {result.memory_bytes_per_entry} bytes of memory an entry"
    )
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
