"""What a seal costs: GB/s of one thread and of two, sealing and opening, beside the crc32c without it.

    python -m benchmarks.store.seal [--seconds S] [--json FILE]

A figure is the best of many short windows, as the machine may be shared. `off` is crc32c. Sealing is computed in
addition to it, since the target checks it; opening in its place. "Lock held" is the longest time for which another
thread could not run while a value of 512 MiB was sealed or opened, as a share of that: near 1 where the package holds
the interpreter's lock in one call, near 0 where it releases it.
"""

import argparse
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cryptography
import msgspec
from crc32c import crc32c

from kvstore.seal import Mode, SealKey

SIZES = (512 << 10, 2_600_000, 8 << 20)
_LOCK_BYTES = 512 << 20
_LOCK_TRIES = 7
_WINDOW_SECONDS = 0.05
_NAME = bytes(16)
Work = Callable[[], object]


class Row(msgspec.Struct):
    mode: str
    action: str
    value_bytes: int
    threads: int
    gbytes_per_second: float


class Report(msgspec.Struct):
    machine: str
    cores: int
    cryptography: str
    lock_held_share: dict[str, float]
    rows: list[Row]


class Value(NamedTuple):
    """What a thread works on; each has its own."""

    payload: memoryview
    key: SealKey

    def seal(self, mode: Mode | None) -> Work:
        if mode is None:
            return lambda: crc32c(self.payload)
        return lambda: self.key.seal(_NAME, self.payload, mode)

    def open(self, mode: Mode | None) -> Work:
        """Decrypting changes what it decrypts; how it ends does not change how long it takes."""
        if mode is None:
            return lambda: crc32c(self.payload)
        content, trailer = self.key.seal(_NAME, self.payload, mode)
        return lambda: self.key.open(_NAME, content, trailer)


def rate(works: list[Work], value_bytes: int, seconds: float) -> float:
    """GB/s of all together, each on a thread of its own; the best window."""
    best = 0.0
    for _ in range(max(1, round(seconds / _WINDOW_SECONDS))):
        counts = [0] * len(works)
        start = time.perf_counter()
        until = start + _WINDOW_SECONDS

        def loop(number: int, work: Work, counts: list[int] = counts, until: float = until) -> None:
            while time.perf_counter() < until:
                work()
                counts[number] += 1

        threads = [threading.Thread(target=loop, args=pair) for pair in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(counts) * value_bytes / (time.perf_counter() - start) / 1e9)
    return best


def lock_held_share(work: Work) -> float:
    """The best of some tries: a pause may be another process's doing."""
    shares = []
    for _ in range(_LOCK_TRIES):
        begun, done = threading.Event(), threading.Event()
        took: list[float] = []

        def run(begun: threading.Event = begun, done: threading.Event = done, took: list[float] = took) -> None:
            begun.wait()
            start = time.perf_counter()
            work()
            took.append(time.perf_counter() - start)
            done.set()

        thread = threading.Thread(target=run)
        thread.start()
        begun.set()
        longest, last = 0.0, time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        longest = max(longest, time.perf_counter() - last)
        thread.join()
        shares.append(longest / took[0])
    return min(1.0, round(min(shares), 2))


def measure(seconds: float, sizes: tuple[int, ...] = SIZES, lock_bytes: int = _LOCK_BYTES) -> Report:
    key = SealKey(1, os.urandom(32))
    modes: dict[str, Mode | None] = {"off": None, "mac": Mode.MAC, "encrypt": Mode.ENCRYPT}
    large = Value(memoryview(bytearray(lock_bytes)), key)
    shares = {
        f"{name} {kind}": lock_held_share(getattr(large, kind)(mode))
        for name, mode in modes.items()
        for kind in ("seal", "open")
    }
    del large
    rows = []
    for size in sizes:
        values = [Value(memoryview(bytearray(os.urandom(size))), key) for _ in range(2)]
        for name, mode in modes.items():
            for kind in ("seal", "open"):
                for threads in (1, 2):
                    works = [getattr(value, kind)(mode) for value in values[:threads]]
                    rows.append(Row(name, kind, size, threads, round(rate(works, size, seconds), 2)))
    cores = len(os.sched_getaffinity(0))
    return Report(f"{platform.machine()} {platform.release()}", cores, cryptography.__version__, shares, rows)


def table(report: Report) -> str:
    lines = [f"{report.machine}, {report.cores} cores, cryptography {report.cryptography}"]
    lines += [f"lock held, {name}: {share}" for name, share in report.lock_held_share.items()]
    lines.append(f"{'GB/s':<10}{'value bytes':>12}{'seal':>8}{'2 threads':>11}{'open':>8}{'2 threads':>11}")
    found = {(row.mode, row.value_bytes, row.action, row.threads): row.gbytes_per_second for row in report.rows}
    for mode, size in dict.fromkeys((row.mode, row.value_bytes) for row in report.rows):
        cells = [found[mode, size, action, threads] for action in ("seal", "open") for threads in (1, 2)]
        lines.append(f"{mode:<10}{size:>12}{cells[0]:>8}{cells[1]:>11}{cells[2]:>8}{cells[3]:>11}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.seal", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure; default 1")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    report = measure(options.seconds)
    print(table(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
