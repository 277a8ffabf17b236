"""Isolation of tenants on one target: visibility of chunks, quotas, and the effect of a flood on the others.

    python -m benchmarks.store.tenants --operations 100000 --seed 1

Three namespaces put, get and look up the same keys, each with its own values. The order is random, the connections are
real, and the target is restarted in between. A crossing is any answer that another namespace's chunks affect: wrong
bytes, a false hit, a wrong count. Then a namespace's hit rate is measured alone, and while another namespace floods the
target with new chunks. The control is the same load without namespaces and quotas. Last, the time of EXISTS is compared
for keys that another namespace has and for keys that no namespace has.

The exit code is 1 for a crossing, a quota exceeded by more than a segment, or a hit ratio changed by more than 5
percent.
"""

import argparse
import hashlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from kvstore.credentials import Credential
from kvstore.disk.log import Log
from kvstore.disk.shelf import Rack, Shelf
from kvstore.errors import run_command, validated
from kvstore.net import transport
from kvstore.net.client import Item, StoreClient
from kvstore.net.lobby import Lobby
from kvstore.net.membership import StaticMembership
from kvstore.net.target import Target
from kvstore.net.wire import Outcome

MIB = 1 << 20
SEGMENT_BYTES = MIB
VALUE_BYTES = 16 << 10
NAMES = ("red", "green", "blue")
SLOTS = 36  # of the device
CHANGE_MAX = 0.05
_KEYS = 2000  # more than fit a quota: there is eviction all the time
_BATCH_MAX = 16
_RESTARTS = 5
_SECONDS = 30.0
_BUFFER_BYTES = 32 * MIB


class Crossings(msgspec.Struct):
    operations: int = 0
    keys: int = 0
    hits: int = 0
    crossed: int = 0
    lost_restarts: int = 0  # starts after which a namespace had nothing
    over_quota_bytes: int = 0  # the most that any namespace held beyond its quota
    evicted: dict[str, int] = {}


class Flood(msgspec.Struct):
    alone: float  # hit ratio
    flooded: float
    flooded_without_quotas: float

    @property
    def change(self) -> float:
        return abs(self.flooded - self.alone) / self.alone


class Timing(msgspec.Struct):
    """Median microseconds of an EXISTS."""

    of_another: float
    of_nobody: float


class Result(msgspec.Struct):
    seed: int
    crossings: Crossings
    flood: Flood
    timing: Timing


def content(name: str, number: int) -> bytes:
    """The content, which differs between namespaces under the same key."""
    return hashlib.shake_128(f"{name} {number}".encode()).digest(VALUE_BYTES)


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def item(name: str, number: int) -> Item:
    return Item(key(number), memoryview(content(name, number)), NAMES.index(name) << 32 | number + 1, 7, 2)


class Site:
    """A target of several namespaces in this process, and a client of each."""

    def __init__(
        self, folder: Path, quotas: dict[str, int], credentials: dict[str, Credential], *, mixed: bool = False
    ):
        self.rack = Rack([folder], SLOTS * SEGMENT_BYTES, quotas, segment_bytes=SEGMENT_BYTES)
        self.rack.begin()
        self.lobby = Lobby()
        listener = transport.listen("127.0.0.1:0")
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.shelves = dict(self.rack.shelves)
        if mixed:  # the control: one shelf for all namespaces
            self.shelves = dict.fromkeys(quotas, next(iter(self.rack.shelves.values())))
        for name, shelf in self.shelves.items():
            target = Target(shelf, name=address, epoch=1, namespace=name, buffer_bytes=_BUFFER_BYTES)
            self.lobby.admit(name, target, credentials[name])
        self.lobby.serve(listener)
        self.clients = {
            name: StoreClient(StaticMembership([address]), namespace=name, credential=credentials[name])
            for name in quotas
        }

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        self.lobby.stop()
        self.rack.close()


@contextmanager
def running(folder: Path, quotas: dict[str, int], *, mixed: bool = False) -> Iterator[Site]:
    site = Site(folder, quotas, {name: Credential.random() for name in quotas}, mixed=mixed)
    try:
        yield site
    finally:
        site.close()


def soon() -> float:
    return time.monotonic() + _SECONDS


class Tenants:
    """Random operations of three namespaces, each checked against what that namespace has done itself."""

    def __init__(self, folder: Path, seed: int, *, mixed: bool = False):
        self._folder = folder
        self._mixed = mixed
        self._chance = random.Random(seed)
        self._put: dict[str, set[int]] = {name: set() for name in NAMES}
        self._quotas = {name: (8 + 4 * place) * SEGMENT_BYTES for place, name in enumerate(NAMES)}
        self.result = Crossings(evicted=dict.fromkeys(NAMES, 0))

    def run(self, operations: int) -> Crossings:
        for _ in range(_RESTARTS):
            with running(self._folder, self._quotas, mixed=self._mixed) as site:
                self._check_restart(site)
                for number in range(operations // _RESTARTS):
                    self._operate(site)
                    if number % 100 == 0:
                        self._check_space(site)
                for name, shelf in site.shelves.items():
                    self.result.evicted[name] += shelf.stats().evicted_entries
        return self.result

    def _operate(self, site: Site) -> None:
        name = self._chance.choice(NAMES)
        # As with shared prefixes, some keys are much more frequent.
        first = int(_KEYS * self._chance.random() ** 2)
        numbers = list(range(first, first + self._chance.randint(1, _BATCH_MAX)))
        operation = self._chance.choices((self._do_put, self._do_get, self._do_exists, self._do_stat), (4, 4, 3, 1))[0]
        operation(site.clients[name], name, numbers)
        self.result.operations += 1
        self.result.keys += len(numbers)

    def _do_put(self, client: StoreClient, name: str, numbers: Sequence[int]) -> None:
        self._put[name].update(numbers)
        client.put([item(name, number) for number in numbers], soon())

    def _do_get(self, client: StoreClient, name: str, numbers: Sequence[int]) -> None:
        rooms = [memoryview(bytearray(VALUE_BYTES)) for _ in numbers]
        outcomes = client.get([key(number) for number in numbers], rooms, soon())
        for number, room, outcome in zip(numbers, rooms, outcomes, strict=True):
            own = number in self._put[name]
            if outcome is Outcome.HIT:
                self.result.hits += 1
                self._judge(own and bytes(room) == content(name, number))
            else:
                self._judge(own or outcome is Outcome.MISS)

    def _do_exists(self, client: StoreClient, name: str, numbers: Sequence[int]) -> None:
        outcomes = client.exists([key(number) for number in numbers], soon())
        for number, outcome in zip(numbers, outcomes, strict=True):
            self._judge(outcome is Outcome.MISS or (outcome is Outcome.HIT and number in self._put[name]))

    def _do_stat(self, client: StoreClient, name: str, numbers: Sequence[int]) -> None:
        for status in client.stat(soon()).values():
            self._judge(status.entries <= len(self._put[name]) and status.connections <= 8)
            self._judge(status.payload_bytes <= self._quotas[name] == status.capacity_bytes)

    def _judge(self, sound: bool) -> None:
        self.result.crossed += not sound

    def _check_space(self, site: Site) -> None:
        for name, shelf in site.shelves.items():
            over = shelf.held_bytes - self._quotas[name]
            self.result.over_quota_bytes = max(self.result.over_quota_bytes, over)

    def _check_restart(self, site: Site) -> None:
        for name, shelf in site.shelves.items():
            entries = shelf.entries()
            self._judge(all(entry.router_hash >> 32 == NAMES.index(name) for entry in entries))
            self.result.lost_restarts += bool(self._put[name]) and not entries


def flood(folder: Path, seed: int, accesses: int) -> Flood:
    """The hit ratio of a namespace with recurring prompts, beside one that puts chunks that never recur."""
    quotas = {"red": 16 * SEGMENT_BYTES, "green": 20 * SEGMENT_BYTES}
    ratios = []
    for flooding in (0, _BATCH_MAX):
        (folder / str(flooding)).mkdir()
        with running(folder / str(flooding), quotas) as site:
            ratios.append(_hit_ratio(site.clients["red"], site.clients["green"], seed, accesses, flooding))
    (folder / "one").mkdir()
    with ExitStack() as stack:  # as large, and one namespace for both
        log = Log(folder / "one", SLOTS * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
        stack.callback(log.close)
        listener = transport.listen("127.0.0.1:0")
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        target = Target(Shelf([log]), name=address, epoch=log.epoch, buffer_bytes=2 * _BUFFER_BYTES)
        target.serve(listener)
        stack.callback(target.stop)
        client = StoreClient(StaticMembership([address]))
        stack.callback(client.close)
        ratios.append(_hit_ratio(client, client, seed, accesses, _BATCH_MAX))
    return Flood(*ratios)


def _hit_ratio(calm: StoreClient, other: StoreClient, seed: int, accesses: int, flooding: int) -> float:
    chance = random.Random(seed)
    working_set = 14 * SEGMENT_BYTES // (VALUE_BYTES + 4096)
    new = 1 << 30
    hits = 0
    room = memoryview(bytearray(VALUE_BYTES))
    for access in range(2 * accesses):  # the first half fills the store
        number = int(working_set * chance.random() ** 1.5)
        (outcome,) = calm.get([key(number)], [room], soon())
        if outcome is Outcome.HIT:
            assert bytes(room) == content("red", number)
            hits += access >= accesses
        else:
            calm.put([item("red", number)], soon())
        if flooding:
            other.put([item("green", new + number) for number in range(flooding)], soon())
            new += flooding
    return hits / accesses


def timing(folder: Path, looks: int) -> Timing:
    quotas = dict.fromkeys(("red", "green"), 16 * SEGMENT_BYTES)
    seconds: tuple[list[float], list[float]] = ([], [])
    with running(folder, quotas) as site:
        site.clients["red"].put([item("red", number) for number in range(200)], soon())
        for look in range(looks):
            for base, into in zip((0, 1 << 20), seconds, strict=True):  # in turns: whatever else happens hits both
                asked = [key(base + look % 200)]
                begin = time.perf_counter()
                outcomes = site.clients["green"].exists(asked, soon())
                into.append(time.perf_counter() - begin)
                assert outcomes == [Outcome.MISS]
    return Timing(*(round(1e6 * statistics.median(one), 1) for one in seconds))


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    operations: int = Field(100_000, ge=100)
    seed: int | None = None
    dir: Path | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store.tenants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--operations", help="random operations of the three namespaces; default 100000")
    parser.add_argument("--seed", help="of all random choices; default: another each time")
    parser.add_argument("--dir", help="where the stores are made; default: a temporary directory")
    options = validated(Options, vars(parser.parse_args()))
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folders = [Path(name) / part for part in ("crossings", "flood", "timing")]
        for folder in folders:
            folder.mkdir()
        crossings = Tenants(folders[0], seed).run(options.operations)
        result = Result(
            seed, crossings, flood(folders[1], seed, max(500, options.operations // 50)), timing(folders[2], 3000)
        )
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    flooded, seen = result.flood, result.timing
    print(
        f"{crossings.operations} operations on {crossings.keys} keys, {crossings.hits} hits: {crossings.crossed} "
        f"crossings; beyond quota {crossings.over_quota_bytes} bytes; hit ratio {flooded.alone:.3f} alone, "
        f"{flooded.flooded:.3f} beside a flood ({flooded.change:.1%} of it), {flooded.flooded_without_quotas:.3f} "
        f"without quotas; EXISTS of another's key {seen.of_another} µs, of nobody's {seen.of_nobody} µs"
    )
    failed = crossings.crossed or crossings.over_quota_bytes > SEGMENT_BYTES or result.flood.change > CHANGE_MAX
    return 1 if failed else 0


if __name__ == "__main__":
    run_command("tenants", main)
