"""The cost of seals and TLS: GB/s of one thread and of two, sealing and opening, compared with crc32c.

    python -m benchmarks.store.seal [--seconds S] [--rounds N] [--json FILE]

A figure is the best of many short windows, as the machine may be shared. `off` is crc32c. Sealing is computed in
addition to it, since the target checks it; opening replaces it. "Lock held" is the longest time that another thread was
blocked while 512 MiB were sealed or opened, divided by the operation's time. It is near 1 if the package holds the
interpreter's lock during a call, near 0 if it releases it.

Then a client puts new values, and gets them from the target's hot cache, all at once and one at a time (`hit`). A round
plays all modes in turn. Figures are medians over rounds; ratios are to another mode in the same round. Also reported
are the bytes per CPU second of the client and of the target. `off`, `mac` and `encrypt` use a UNIX socket; `tcp` and
`tls` use TCP on loopback, without seals.
"""

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cryptography
import msgspec
from crc32c import crc32c

from benchmarks.store.authority import Authority
from benchmarks.store.results import paired, spread
from benchmarks.store.wire_fuzz import TargetProcess
from kvstore.certificates import Files
from kvstore.errors import UnavailableError, run_command
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.tls import ClientTls
from kvstore.net.wire import Outcome
from kvstore.seal import Mode, Seal, SealKey

SIZES = (512 << 10, 2_600_000, 8 << 20)
_LOCK_BYTES = 512 << 20
_LOCK_TRIES = 7
_WINDOW_SECONDS = 0.05
_NAME = bytes(16)
_BATCH_BYTES = 64 << 20  # of a put, and of each get that follows
_GETS = 4
_BOUND_SECONDS = 60.0
_TARGET_OPTIONS = ("--capacity", "4GiB", "--segment-size", "64MiB", "--buffers", "256MiB", "--hot", "512MiB")
MODES: dict[str, Mode | None] = {"off": None, "mac": Mode.MAC, "encrypt": Mode.ENCRYPT}
# What each mode is compared to.
BASES = {"off": "off", "mac": "off", "encrypt": "off", "tcp": "off", "tls": "tcp"}
_OPERATIONS = ("put", "get", "hit")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
Work = Callable[[], object]


class Row(msgspec.Struct):
    mode: str
    action: str
    value_bytes: int
    threads: int
    gbytes_per_second: float


class Moved(msgspec.Struct):
    """Values that went between a client and a target."""

    mode: str
    operation: str
    value_bytes: int
    gbytes_per_second: float
    milliseconds: float  # a value
    base: str
    ratio_to_base: float
    client_gbytes_per_core_second: float
    target_gbytes_per_core_second: float


class Report(msgspec.Struct):
    machine: str
    cores: int
    cryptography: str
    lock_held_share: dict[str, float]
    rows: list[Row]
    moved: list[Moved]


class Value(NamedTuple):
    """What a thread works on; each has its own."""

    payload: memoryview
    key: SealKey

    def seal(self, mode: Mode | None) -> Work:
        if mode is None:
            return lambda: crc32c(self.payload)
        return lambda: self.key.seal(_NAME, self.payload, mode)

    def open(self, mode: Mode | None) -> Work:
        """Decryption works in place, so later runs decrypt garbage, which takes as long."""
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
    """The lowest of some tries, since another process may cause a pause."""
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


class _Path:
    """A client and its target, and what moved between them."""

    def __init__(self, store: StoreClient, target: TargetProcess):
        self.store = store
        self.speeds: dict[str, list[float]] = {operation: [] for operation in _OPERATIONS}
        self.moved_bytes = dict.fromkeys(_OPERATIONS, 0)
        self.client_seconds = dict.fromkeys(_OPERATIONS, 0.0)  # of a core
        self.target_seconds = dict.fromkeys(_OPERATIONS, 0.0)
        self._pid = target.pid

    def run(self, operation: str, moved_bytes: int, call: Work) -> None:
        before = self._core_seconds()
        begin = time.perf_counter()
        call()
        self.speeds[operation].append(moved_bytes / (time.perf_counter() - begin) / 1e9)
        client, target = (after - then for after, then in zip(self._core_seconds(), before, strict=True))
        self.moved_bytes[operation] += moved_bytes
        self.client_seconds[operation] += client
        self.target_seconds[operation] += target

    def _core_seconds(self) -> tuple[float, float]:
        """This process's, and the target's in steps of the kernel's clock."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return time.process_time(), (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def move(size: int, rounds: int, batch_bytes: int = _BATCH_BYTES) -> list[Moved]:
    """Puts, gets and hits of one size, through targets of its own."""
    count = max(1, batch_bytes // size)
    with contextlib.ExitStack() as stack:
        paths = {name: _open(name, stack) for name in BASES}
        rooms = [memoryview(bytearray(os.urandom(size))) for _ in range(count)]
        numbers = itertools.count()
        for number in range(rounds):
            for name in list(paths) if number % 2 else reversed(paths):
                keys = [next(numbers).to_bytes(16, "big") for _ in range(count)]
                _play(paths[name], keys, rooms)
    return [
        Moved(
            name,
            operation,
            size,
            spread(path.speeds[operation]).median,
            round(size / statistics.median(path.speeds[operation]) / 1e6, 3),
            BASES[name],
            paired(path.speeds[operation], paths[BASES[name]].speeds[operation]).median,
            round(path.moved_bytes[operation] / 1e9 / path.client_seconds[operation], 2),
            round(path.moved_bytes[operation] / 1e9 / max(path.target_seconds[operation], 1 / _TICKS_PER_SECOND), 2),
        )
        for name, path in paths.items()
        for operation in _OPERATIONS
    ]


def _open(name: str, stack: contextlib.ExitStack) -> _Path:
    """Each mode has its own target, so that CPU times are not mixed."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    options, tls, seal = [*_TARGET_OPTIONS], None, None
    if name in ("tcp", "tls"):
        options += ["--unix-socket", ""]
    if name == "tls":
        files = Authority(folder).issue("target")
        options += ["--tls-cert", files.cert, "--tls-key", files.key]
        tls = ClientTls(Files(ca=files.ca))
    if mode := MODES.get(name):
        seal = Seal([SealKey(1, os.urandom(32))], mode)
    target = TargetProcess(folder, *options)
    stack.callback(target.stop)
    store = StoreClient(StaticMembership([target.address]), seal=seal, tls=tls)
    stack.callback(store.close)
    return _Path(store, target)


def _play(path: _Path, keys: list[bytes], rooms: list[memoryview]) -> None:
    """A round of one mode."""
    items = [Item(key, room, 0, 7, 1) for key, room in zip(keys, rooms, strict=True)]
    total = sum(map(len, rooms))

    def get(*which: slice) -> None:
        for one in which:
            _all(path.store.get(keys[one], rooms[one], time.monotonic() + _BOUND_SECONDS), Outcome.HIT)

    path.run("put", total, lambda: _all(path.store.put(items, time.monotonic() + _BOUND_SECONDS), Outcome.STORED))
    path.run("get", _GETS * total, lambda: get(*[slice(None)] * _GETS))
    path.run("hit", total, lambda: get(*[slice(number, number + 1) for number in range(len(keys))]))


def _all(outcomes: list[Outcome], wanted: Outcome) -> None:
    if set(outcomes) != {wanted}:
        raise UnavailableError(f"a target that is measured answers {set(outcomes)}, expected {wanted.name}")


def measure(
    seconds: float, rounds: int, sizes: tuple[int, ...] = SIZES, lock_bytes: int = _LOCK_BYTES, **options: int
) -> Report:
    key = SealKey(1, os.urandom(32))
    large = Value(memoryview(bytearray(lock_bytes)), key)
    shares = {
        f"{name} {kind}": lock_held_share(getattr(large, kind)(mode))
        for name, mode in MODES.items()
        for kind in ("seal", "open")
    }
    del large
    rows = []
    for size in sizes:
        values = [Value(memoryview(bytearray(os.urandom(size))), key) for _ in range(2)]
        for name, mode in MODES.items():
            for kind in ("seal", "open"):
                for threads in (1, 2):
                    works = [getattr(value, kind)(mode) for value in values[:threads]]
                    rows.append(Row(name, kind, size, threads, round(rate(works, size, seconds), 2)))
    moved = [row for size in sizes if rounds for row in move(size, rounds, **options)]
    cores = len(os.sched_getaffinity(0))
    return Report(f"{platform.machine()} {platform.release()}", cores, cryptography.__version__, shares, rows, moved)


def table(report: Report) -> str:
    lines = [f"{report.machine}, {report.cores} cores, cryptography {report.cryptography}"]
    lines += [f"lock held, {name}: {share}" for name, share in report.lock_held_share.items()]
    lines.append(f"{'GB/s':<10}{'value bytes':>12}{'seal':>8}{'2 threads':>11}{'open':>8}{'2 threads':>11}")
    found = {(row.mode, row.value_bytes, row.action, row.threads): row.gbytes_per_second for row in report.rows}
    for mode, size in dict.fromkeys((row.mode, row.value_bytes) for row in report.rows):
        cells = [found[mode, size, action, threads] for action in ("seal", "open") for threads in (1, 2)]
        lines.append(f"{mode:<10}{size:>12}{cells[0]:>8}{cells[1]:>11}{cells[2]:>8}{cells[3]:>11}")
    for row in report.moved:
        lines.append(
            f"{row.operation} {row.mode:<8}{row.value_bytes:>10} bytes {row.gbytes_per_second:>7} GB/s, "
            f"{row.milliseconds:.2f} ms each, {row.ratio_to_base} of {row.base}; a second of a core: client "
            f"{row.client_gbytes_per_core_second} GB, target {row.target_gbytes_per_core_second} GB"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.seal", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure; default 1")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=8, help="with a target; default 8, 0 for none")
    options = parser.parse_args()
    report = measure(options.seconds, options.rounds)
    print(table(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.store.seal", main)
