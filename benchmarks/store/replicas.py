"""A target is killed under load: the hit ratio of a working set that was read before, with and without replicas.

    python -m benchmarks.store.replicas [--targets 3] [--value 2MiB] [--set 256MiB] [--seconds 4] [--rounds 3]

Each round starts the targets twice, with and without `--peers`. Every other round runs in reverse order. A client puts
the working set and gets all of it repeatedly, in random order. `reading` is its speed while replicas are made. Then one
target is killed. `hits after` is the share of hits in the seconds after that, the first call included.
"""

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks.store.__main__ import _bytes, check_space, choose_folder, command, machine
from benchmarks.store.results import GB, Spread, heading, paired, shown, spread
from benchmarks.store.servers import BenchmarkError, Process, free_port
from kvstore.disk.buffers import aligned
from kvstore.errors import ConfigError, run_command
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome

MODES = ("replicas", "none")
CALL_SECONDS = 30.0
CALL_VALUES = 16


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    reading_gbytes_per_second: dict[str, Spread]
    reading_replicas_to_none: Spread
    hits_after: dict[str, Spread]
    slowest_call_after_seconds: dict[str, Spread]
    made_seconds: Spread  # until all replicas were there


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self._options = options
        self._folder = folder
        self._started = 0
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        region = aligned(CALL_VALUES * options.value).payload
        self._rooms = [region[start : start + options.value] for start in range(0, len(region), options.value)]
        self._content = random.Random(1).randbytes(options.value)
        self._chance = random.Random(2)

    def take(self, mode: str) -> None:
        with ExitStack() as stack:
            targets = self._start(mode, stack)
            client = StoreClient(StaticMembership(targets))
            stack.callback(client.close)
            for number in range(self._options.count):
                item = Item(number.to_bytes(16, "big"), memoryview(self._content), number + 1, 1, 1)
                if client.put([item], time.monotonic() + CALL_SECONDS) != [Outcome.STORED]:
                    raise BenchmarkError("a value was not stored")
            speed, made = self._read(client, mode)
            self.samples[f"reading {mode}"].append(speed)
            if mode == "replicas":
                self.samples["made"].append(made)
            next(iter(targets.values())).popen.kill()
            until, asked, hits, slowest = time.monotonic() + self._options.seconds, 0, 0, 0.0
            while time.monotonic() < until:
                for outcomes, seconds in self._calls(client):
                    asked, hits, slowest = (
                        asked + len(outcomes),
                        hits + outcomes.count(Outcome.HIT),
                        max(slowest, seconds),
                    )
            self.samples[f"hits {mode}"].append(hits / asked)
            self.samples[f"slowest {mode}"].append(slowest)

    def _start(self, mode: str, stack: ExitStack) -> dict[str, Process]:
        """Targets by address."""
        self._started += 1
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(self._options.targets)]
        targets = {}
        for number, address in enumerate(addresses):
            own = self._folder / f"{self._started}-{number}"
            own.mkdir()
            stack.callback(shutil.rmtree, own)
            line = [sys.executable, "-m", "kvstore", "--dir", str(own), "--listen", address, "--nats", ""]
            line += ["--capacity", str(2 * self._options.set + (1 << 29)), "--hot", str(2 * self._options.set)]
            line += ["--peers", ",".join(addresses)] if mode == "replicas" else []
            targets[address] = Process(own.name, line, self._folder)
            stack.callback(targets[address].stop)
        for address, target in targets.items():
            target.wait_for(address)
        return targets

    def _read(self, client: StoreClient, mode: str) -> tuple[float, float]:
        """Get all values until each has a replica, and for some seconds at least. Returns GB/s and the duration."""
        begun, read, made = time.monotonic(), 0, 0.0
        while not made or time.monotonic() < begun + self._options.seconds:
            for outcomes, _ in self._calls(client):
                if set(outcomes) != {Outcome.HIT}:
                    raise BenchmarkError("a value did not come")
                read += len(outcomes) * self._options.value
            entries = sum(status.entries for status in client.stat(time.monotonic() + CALL_SECONDS).values())
            if not made and entries >= self._options.count * (2 if mode == "replicas" else 1):
                made = time.monotonic() - begun
            if time.monotonic() > begun + 10 * CALL_SECONDS:
                raise BenchmarkError("replicas are not made")
        return read / GB / (time.monotonic() - begun), made

    def _calls(self, client: StoreClient) -> list[tuple[list[Outcome], float]]:
        """Get the working set once, in calls of some values. Returns outcomes and seconds of each call."""
        numbers = list(range(self._options.count))
        self._chance.shuffle(numbers)
        calls = []
        for start in range(0, len(numbers), CALL_VALUES):
            keys = [number.to_bytes(16, "big") for number in numbers[start : start + CALL_VALUES]]
            begun = time.monotonic()
            outcomes = client.get(keys, self._rooms[: len(keys)], begun + CALL_SECONDS)
            calls.append((outcomes, time.monotonic() - begun))
        return calls


def measure(options: argparse.Namespace, parent: Path) -> Report:
    facts = machine(parent)
    with tempfile.TemporaryDirectory(prefix="kvtier-replicas-", dir=parent) as folder:
        bench = Bench(options, Path(folder))
        for number in range(options.rounds):
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                bench.take(mode)
    samples = bench.samples
    return Report(
        shlex.join(["python", "-m", "benchmarks.store.replicas", *sys.argv[1:]]),
        facts,
        {mode: spread(samples[f"reading {mode}"]) for mode in MODES},
        paired(samples["reading replicas"], samples["reading none"]),
        {mode: spread(samples[f"hits {mode}"]) for mode in MODES},
        {mode: spread(samples[f"slowest {mode}"]) for mode in MODES},
        spread(samples["made"]),
    )


def show(report: Report) -> str:
    lines = heading(report.command, report.machine)
    for mode in MODES:
        lines.append(f"{f'{mode}: reading':<28}{shown(report.reading_gbytes_per_second[mode], '.3f')} GB/s")
        lines.append(f"{f'{mode}: hits after':<28}{shown(report.hits_after[mode], '.3f')}")
        lines.append(f"{f'{mode}: slowest call after':<28}{shown(report.slowest_call_after_seconds[mode], '.3f')} s")
    lines.append(f"{'reading, replicas over none':<28}{shown(report.reading_replicas_to_none, '.3f')}")
    lines.append(f"{'replicas made within':<28}{shown(report.made_seconds, '.3f')} s")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.replicas", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--value", default="2MiB")
    parser.add_argument("--set", default="256MiB", help="the working set; default 256MiB")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load before and after; default 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder; default: on a disk")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    if options.targets < 2:
        raise ConfigError("targets", options.targets, "at least 2")
    options.value, options.set = _bytes("value", options.value), _bytes("set", options.set)
    options.count = options.set // options.value
    if not options.count:
        raise ConfigError("set", options.set, "at least one value (--value)")
    return options


def main() -> None:
    options = parse()
    folder = choose_folder(options.dir)
    check_space(folder, options.targets * (2 * options.set + (1 << 29)))
    command(lambda: measure(options, folder), show, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.replicas", main)
