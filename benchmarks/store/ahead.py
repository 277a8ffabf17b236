"""Read-ahead: a prompt's chunks from disk, after a PREFETCH, and from the hot cache; and GETs during read-ahead.

    python -m benchmarks.store.ahead [--value 2560KiB] [--chain 160MiB] [--rounds 5] [--json FILE]

Each round restarts the target, so that its memory is empty. It reads with O_DIRECT if the file system allows it. Every
other round runs in reverse order. `warming` is the time from the PREFETCH until all chunks are in memory. `alone` and
`beside` are 40 consecutive GETs of single values on disk: on an idle target, and during read-ahead of a chain. Medians
are compared round by round. p99 is over the GETs of all rounds, so it needs many rounds.
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.chat.load import quantile
from benchmarks.store.__main__ import _bytes, check_space, choose_folder, command, machine
from benchmarks.store.results import GB, Spread, heading, paired, shown, spread
from benchmarks.store.servers import BenchmarkError, Process, free_port
from kvstore.disk.buffers import aligned
from kvstore.disk.record import record_bytes
from kvstore.errors import ConfigError, run_command
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome

CALL_SECONDS = 60.0
GETS = 40
# A client may use an eighth of the target's memory for read-ahead, and a round has two chains.
HOT_CHAINS = 20
WAYS = ("cold", "ahead")
BESIDE = ("alone", "beside")


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    gbytes_per_second: dict[str, Spread]  # cold, ahead, hot
    ahead_to_cold: Spread
    ahead_to_hot: Spread
    warming_seconds: Spread
    median_get_seconds: dict[str, Spread]
    beside_to_alone: Spread
    p99_get_seconds: dict[str, float]
    p99_beside_to_alone: float
    chunks_read_beside: Spread


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self._folder = folder
        self._count = options.count
        self._value = options.value
        region = aligned(options.count * options.value).payload
        self._rooms = [region[start : start + options.value] for start in range(0, len(region), options.value)]
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self.gets: defaultdict[str, list[float]] = defaultdict(list)  # seconds of single GETs
        content = random.Random(1).randbytes(options.value)
        with self._target(hot=False) as client:
            for number in range(4 * options.count + 2 * GETS):  # chains, and single values
                item = Item(self._key(number), memoryview(content), number + 1, 1, 1)
                if client.put([item], time.monotonic() + CALL_SECONDS) != [Outcome.STORED]:
                    raise BenchmarkError("a value was not stored")

    @staticmethod
    def _key(number: int) -> bytes:
        return number.to_bytes(16, "big")

    def _chain(self, number: int) -> list[bytes]:
        return [self._key(number * self._count + at) for at in range(self._count)]

    @contextmanager
    def _target(self, *, hot: bool) -> Iterator[StoreClient]:
        address = f"127.0.0.1:{free_port()}"
        chain = self._count * record_bytes(self._value)
        line = [sys.executable, "-m", "kvstore", "--dir", str(self._folder / "store"), "--listen", address]
        line += ["--capacity", str(8 * chain + (1 << 30)), "--hot", str(HOT_CHAINS * chain if hot else 0), "--nats", ""]
        target = Process("target", line, self._folder)
        try:
            target.wait_for(address)
            client = StoreClient(StaticMembership([address]))
            self._address = address
            yield client
            client.close()
        finally:
            target.stop()

    def _get(self, client: StoreClient, keys: list[bytes]) -> float:
        """Seconds."""
        begun = time.monotonic()
        outcomes = set(client.get(keys, self._rooms[: len(keys)], begun + CALL_SECONDS))
        if outcomes != {Outcome.HIT}:
            raise BenchmarkError(f"a value did not come: {', '.join(sorted(one.name for one in outcomes))}")
        return time.monotonic() - begun

    def _prefetch(self, client: StoreClient, keys: list[bytes]) -> None:
        if Outcome.REFUSED in client.prefetch(keys, time.monotonic() + CALL_SECONDS):
            raise BenchmarkError("the target does not read so much ahead")

    def _wait_until_read(self, client: StoreClient, count: int) -> None:
        deadline = time.monotonic() + CALL_SECONDS
        while self._read(client) < count:
            if time.monotonic() > deadline:
                raise BenchmarkError("the target has not read all of it ahead")
            time.sleep(0.002)

    def _read(self, client: StoreClient) -> int:
        return client.stat(time.monotonic() + CALL_SECONDS)[self._address].read_ahead["read"]

    def round(self, number: int) -> None:
        add = self.samples
        size = self._count * self._value / GB
        with self._target(hot=True) as client:
            self._get(client, self._chain(3))  # opens connections
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                if way == "cold":
                    add["cold"].append(size / self._get(client, self._chain(0)))
                else:
                    begun = time.monotonic()
                    self._prefetch(client, self._chain(1))
                    self._wait_until_read(client, self._count)
                    add["warming"].append(time.monotonic() - begun)
                    add["ahead"].append(size / self._get(client, self._chain(1)))
                    add["hot"].append(size / self._get(client, self._chain(1)))
            for way in BESIDE if number % 2 == 0 else reversed(BESIDE):
                if way == "beside":
                    self._prefetch(client, self._chain(2))
                first = 4 * self._count + (GETS if way == "beside" else 0)
                gets = [self._get(client, [self._key(first + at)]) for at in range(GETS)]
                add[way].append(statistics.median(gets))
                self.gets[way] += gets
                if way == "beside":
                    add["read beside"].append(self._read(client) - self._count)
                    self._wait_until_read(client, 2 * self._count)


def measure(options: argparse.Namespace, parent: Path) -> Report:
    facts = machine(parent)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-ahead-", dir=parent)))
        (folder / "store").mkdir()
        bench = Bench(options, folder)
        for number in range(options.rounds):
            bench.round(number)
        samples, p99 = bench.samples, {way: quantile(bench.gets[way], 0.99) for way in BESIDE}
    return Report(
        shlex.join(["python", "-m", "benchmarks.store.ahead", *sys.argv[1:]]),
        facts,
        {way: spread(samples[way]) for way in ("cold", "ahead", "hot")},
        paired(samples["ahead"], samples["cold"]),
        paired(samples["ahead"], samples["hot"]),
        spread(samples["warming"]),
        {way: spread(samples[way]) for way in BESIDE},
        paired(samples["beside"], samples["alone"]),
        p99,
        p99["beside"] / p99["alone"],
        spread(samples["read beside"]),
    )


def show(report: Report) -> str:
    lines = heading(report.command, report.machine)
    lines += [f"{f'get {way}':<28}{shown(speed, '.3f')} GB/s" for way, speed in report.gbytes_per_second.items()]
    lines.append(f"{'ahead over cold':<28}{shown(report.ahead_to_cold, '.3f')}")
    lines.append(f"{'ahead over hot':<28}{shown(report.ahead_to_hot, '.3f')}")
    lines.append(f"{'warming':<28}{shown(report.warming_seconds, '.3f')} s")
    lines += [f"{f'median get {way}':<28}{shown(of, '.3f')} s" for way, of in report.median_get_seconds.items()]
    lines.append(f"{'beside over alone':<28}{shown(report.beside_to_alone, '.3f')}")
    lines += [f"{f'p99 of GETs {way}':<28}{of:.3f} s" for way, of in report.p99_get_seconds.items()]
    lines.append(f"{'p99 beside over alone':<28}{report.p99_beside_to_alone:.3f}")
    lines.append(f"{'chunks read ahead beside':<28}{shown(report.chunks_read_beside, '.3f')}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--value", default="2560KiB", help="16 tokens of a 70B model with FP8 KV: 2560KiB, the default")
    parser.add_argument("--chain", default="160MiB", help="a prompt's chunks; default 160MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    options.value = _bytes("value", options.value)
    options.count = _bytes("chain", options.chain) // options.value
    if not options.count:
        raise ConfigError("chain", options.chain, "at least one value (--value)")
    return options


def main() -> None:
    options = parse()
    folder = choose_folder(options.dir)
    check_space(folder, 8 * options.count * options.value + (1 << 30))
    command(lambda: measure(options, folder), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.ahead", main)
