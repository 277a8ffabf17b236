"""The benchmark's machine: its hardware, and the speed of disk and memory without other load."""

import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvstore.disk.files import Files

Facts = dict[str, str | int | float]
_DISK_BYTES, _PART_BYTES, _THREADS = 2 << 30, 8 << 20, 4
_COPY_BYTES = 256 << 20


def facts(folder: Path) -> Facts:
    """Facts about this machine and the disk of `folder`, to which it writes for some seconds. Raises OSError."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "memory_copy_gb_per_second": round(_copy_rate() / 1e9, 2),  # by one thread
        **_disk_rates(folder),
    }


def _copy_rate() -> float:
    source, destination = (memoryview(bytearray(b"1" * _COPY_BYTES)) for _ in range(2))
    begun = time.monotonic()
    destination[:] = source
    return _COPY_BYTES / (time.monotonic() - begun)


def _disk_rates(folder: Path) -> Facts:
    """Four threads with 8 MiB requests, with O_DIRECT if the file system supports it."""
    if shutil.disk_usage(folder).free < 2 * _DISK_BYTES:
        return {}
    files, room = Files(), [mmap.mmap(-1, _PART_BYTES) for _ in range(_THREADS)]
    with tempfile.TemporaryDirectory(dir=folder) as own, ThreadPoolExecutor(_THREADS) as pool:
        fd = files.open(Path(own, "rates"), _DISK_BYTES)
        try:
            for buffer in room:
                buffer[:] = os.urandom(1 << 20) * (_PART_BYTES >> 20)

            def rate(move: Callable[[int, list[memoryview], int], None]) -> float:
                def share(thread: int) -> None:
                    for offset in range(thread * _PART_BYTES, _DISK_BYTES, _THREADS * _PART_BYTES):
                        move(fd, [memoryview(room[thread])], offset)

                begun = time.monotonic()
                list(pool.map(share, range(_THREADS)))
                return round(_DISK_BYTES / (time.monotonic() - begun) / 1e9, 2)

            rate(files.write)  # writing to new space is slower
            return {"disk_write_gb_per_second": rate(files.write), "disk_read_gb_per_second": rate(files.read)}
        finally:
            files.close(fd)
