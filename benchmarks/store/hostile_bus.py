"""An adversary on the bus and in etcd: forged messages, rogue registrations, and a router's time to recover.

    python -m benchmarks.store.hostile --seed S

A real target announces over a real NATS server and is registered in a real etcd. A router's half (mirror, speeds,
workers) and a client with seals follow. The adversary publishes in the names of the target and a worker, and answers
the router's snapshot requests. It registers rogue targets, which answer every GET with a hit of random bytes.
"""

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.store.adversary import Adversary, Answer
from benchmarks.store.servers import BenchmarkError, Process, free_port, program
from components.pricing.cost import Speeds
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.bus import messages, residency
from kvstore.bus.connection import Bus
from kvstore.bus.messages import Residency, SnapshotPage, TargetReport, WorkerReport
from kvstore.bus.residency import Mirror
from kvstore.net.client import Item, StoreClient
from kvstore.net.etcd import Etcd
from kvstore.net.membership import EtcdMembership
from kvstore.net.wire import Outcome
from kvstore.seal import Mode, Seal, SealKey

CHUNKS = 48
CHUNK_BYTES = 10_000
NAMESPACE, ENDPOINT, WORKER, LAYOUT = "hostile", "dynamo.backend.generate", "26", 7
FORGED_FIRST = 1 << 40  # router hashes of chunks that do not exist begin here
RECOVERY_SECONDS_MAX = 20.0
START_SECONDS = 60.0
PRIOR = Speeds(0.04, 1e-4, 0.0, 25e9, 3e9, 0.002)
ESCAPES = "\x1b[31mred\r\n\u202etxt\x00"


class Forged(msgspec.Struct):
    """The results."""

    messages: int  # published
    snapshots: int  # answered in the target's place
    messages_by_kind: dict[str, int]
    ignored: dict[str, int]  # by the router, by reason
    resyncs: int  # snapshots that the mirror took in
    targets_most: int  # that the mirror knew at once
    table_bytes_most: int
    wrong_values: int  # answered by rogue targets
    accepted: int  # of these
    uncounted: int
    gets: int
    hits: int  # with the bytes that were put
    recovered_seconds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        failed = []
        if self.accepted:
            failed.append(f"bus: {self.accepted} values of rogue targets were accepted")
        if self.uncounted:
            failed.append(f"bus: {self.uncounted} values of rogue targets were not counted")
        if not self.wrong_values or not self.snapshots or not self.hits:
            failed.append("bus: the adversary was not asked, or nobody else was")
        failed += [
            f"bus: {what} was not right again within {RECOVERY_SECONDS_MAX:.0f} s"
            for what, seconds in self.recovered_seconds.items()
            if seconds > RECOVERY_SECONDS_MAX
        ]
        return failed


def play(seed: int, rounds: int) -> Forged:
    """Send `rounds` forged messages of each kind."""
    with tempfile.TemporaryDirectory() as folder, _servers(Path(folder)) as (nats_url, etcd, target):
        return asyncio.run(_Game(seed, nats_url, etcd, target).run(rounds))


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The addresses of NATS, etcd and a target."""
    port, client, peers, address = free_port(), free_port(), free_port(), f"127.0.0.1:{free_port()}"
    nats_url, etcd = f"nats://127.0.0.1:{port}", f"127.0.0.1:{client}"
    (folder / "store").mkdir()
    target = [
        *(sys.executable, "-m", "kvstore", "--dir", str(folder / "store"), "--capacity", "256MiB"),
        *("--segment-size", "8MiB", "--listen", address, "--nats", nats_url, "--etcd", etcd, "--namespace", NAMESPACE),
        *("--unix-socket", ""),
    ]
    commands = {
        "nats-server": [program("nats-server"), "--addr", "127.0.0.1", "--port", str(port)],
        "etcd": [
            *(program("etcd"), f"--data-dir={folder / 'etcd'}", f"--listen-client-urls=http://{etcd}"),
            *(f"--advertise-client-urls=http://{etcd}", f"--listen-peer-urls=http://127.0.0.1:{peers}"),
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
        ],
        "target": target,
    }
    with contextlib.ExitStack() as stack:
        for name, at in (("nats-server", f"127.0.0.1:{port}"), ("etcd", etcd), ("target", address)):
            process = Process(name, commands[name], folder)
            stack.callback(process.stop)
            process.wait_for(at)
        yield nats_url, etcd, address


class _Game:
    """One router and one client against the adversary."""

    def __init__(self, seed: int, nats_url: str, etcd: str, target: str):
        self._chance = random.Random(seed)
        self._nats_url, self._etcd, self._target = nats_url, etcd, target
        self._mirror, self._speeds, self._workers = Mirror(), LiveSpeeds(PRIOR), Workers(ENDPOINT)
        self._seal = Seal([SealKey(1, self._chance.randbytes(32))], Mode.MAC)
        self._contents = [self._chance.randbytes(CHUNK_BYTES) for _ in range(CHUNKS)]
        self._rogues = [Adversary() for _ in range(3)]
        self._wrong_values = 0
        self._accepted = 0
        self._snapshots = 0
        self._published: Counter[str] = Counter()
        self._answered = False  # whether snapshot requests are answered in the target's place
        self._epoch, self._seq = 0, 0  # of what the target announced last
        for rogue in self._rogues:
            rogue.answer = self._made_up
        self._kinds: dict[str, Callable[[], tuple[str, msgspec.Struct]]] = {
            "stored that is not": lambda: self._residency(self._seq + 1, stored=self._hashes()),
            "removed that is there": lambda: self._residency(self._seq + 1, removed=list(range(1, CHUNKS + 1))),
            "absurd number": lambda: self._residency(self._chance.getrandbits(63)),
            "later epoch": lambda: self._residency(1, epoch=(1 << 63) + self._chance.getrandbits(60)),
            "older epoch": lambda: self._residency(1, epoch=0),
            "huge": lambda: self._residency(self._seq + 1, stored=self._hashes(90_000)),
            "layouts": lambda: self._residency(self._seq + 1, layout=self._chance.getrandbits(60), stored=[1]),
            "targets": lambda: self._residency(1, name=f"10.0.0.{self._chance.getrandbits(30)}:1", stored=[1]),
            "name": lambda: self._residency(1, name=ESCAPES),
            "speed of a target": self._target_report,
            "speed of a worker": self._worker_report,
            "another worker's layout": lambda: self._report(fingerprint=self._chance.getrandbits(60)),
            "worker's name": lambda: self._report(worker=self._chance.choice([ESCAPES, "\u00b2", "1" * 40, ""])),
        }

    async def run(self, rounds: int) -> Forged:
        line = await Bus.connect(self._nats_url, "hostile router")
        forger = await nats.connect(self._nats_url, pending_size=64 << 20)
        members = await asyncio.to_thread(EtcdMembership, self._etcd, NAMESPACE)
        client = StoreClient(members, namespace=NAMESPACE, connections_per_target=1, seal=self._seal)
        tasks = [asyncio.create_task(residency.follow(self._mirror, line, NAMESPACE))]
        try:
            await self._listen(line)
            await self._answer_snapshots(forger)
            tasks.append(asyncio.create_task(self._be_a_worker(line)))
            if await self._until(lambda: list(members.targets()) == [self._target], START_SECONDS) > START_SECONDS:
                raise BenchmarkError("the target is not registered")
            await asyncio.to_thread(self._put, client)
            for what in (self._mirror_is_right, self._speeds_are_right):
                if await self._until(what, START_SECONDS) > START_SECONDS:
                    raise BenchmarkError(f"nothing was attacked yet, and {what.__name__[1:]} does not come true")
            return await self._attack(forger, client, members, rounds)
        finally:
            for task in tasks:
                task.cancel()
            client.close()
            members.close()
            for rogue in self._rogues:
                rogue.close()
            await forger.close()
            await line.close()

    async def _attack(self, forger: Client, client: StoreClient, members: EtcdMembership, rounds: int) -> Forged:
        etcd = Etcd(self._etcd)
        prefix = f"/kvtier/{NAMESPACE}/targets/"
        names = [rogue.address.encode() for rogue in self._rogues]
        values = [*names, b"\xff\xfe", ESCAPES.encode(), b"no address", b"a" * 5000 + b":1"]
        etcd.call(lambda client: [client.put(f"{prefix}rogue-{at}", value) for at, value in enumerate(values)])
        resyncs = self._mirror.resyncs
        self._answered = True
        targets_most = bytes_most = gets = hits = 0
        order = [kind for kind in self._kinds for _ in range(rounds)]
        self._chance.shuffle(order)
        for number, kind in enumerate(order):
            subject, message = self._kinds[kind]()
            await forger.publish(subject, msgspec.msgpack.encode(message))
            self._published[kind] += 1
            targets_most = max(targets_most, len(self._mirror.ages(time.monotonic())))
            bytes_most = max(bytes_most, self._mirror.size_bytes)
            if number % 20 == 0:
                right, wrong = await asyncio.to_thread(self._get, client)
                gets, hits = gets + CHUNKS, hits + right
                self._accepted += wrong
            await asyncio.sleep(0.001)
        await forger.flush()
        self._answered = False
        etcd.call(lambda client: [client.delete(f"{prefix}rogue-{at}") for at in range(len(values))])
        seconds = await asyncio.gather(
            self._until(self._mirror_is_right),
            self._until(self._speeds_are_right),
            self._until(lambda: list(members.targets()) == [self._target]),
        )
        rejected = sum(self._seal.rejected.values())
        return Forged(
            messages=self._published.total(),
            snapshots=self._snapshots,
            messages_by_kind=dict(self._published),
            ignored={**self._mirror.ignored, **self._speeds.ignored},
            resyncs=self._mirror.resyncs - resyncs,
            targets_most=targets_most,
            table_bytes_most=bytes_most,
            wrong_values=self._wrong_values,
            accepted=self._accepted,
            uncounted=abs(self._wrong_values - rejected - self._accepted),
            gets=gets,
            hits=hits,
            recovered_seconds=dict(zip(("mirror", "speeds", "targets"), seconds, strict=True)),
        )

    # ---- the honest part

    async def _listen(self, line: Bus) -> None:
        async def heard(report: WorkerReport) -> None:
            if report.endpoint == ENDPOINT and self._speeds.heard_worker(report):
                self._workers.heard(report, time.monotonic())

        async def heard_target(report: TargetReport) -> None:
            self._speeds.heard_target(report, time.monotonic())

        async def announced(message: Residency) -> None:
            if message.target == self._target and self._chance_of_truth(message):
                self._epoch, self._seq = message.epoch, message.seq

        await line.subscribe(messages.subject(NAMESPACE, "speed.worker"), WorkerReport, heard)
        await line.subscribe(messages.subject(NAMESPACE, "speed.target"), TargetReport, heard_target)
        await line.subscribe(messages.subject(NAMESPACE, "residency"), Residency, announced)

    async def _be_a_worker(self, line: Bus) -> None:
        while True:
            await line.publish(messages.subject(NAMESPACE, "speed.worker", WORKER), self._honest_report())
            await asyncio.sleep(messages.HEARTBEAT_SECONDS)

    def _put(self, client: StoreClient) -> None:
        items = [
            Item(_key(number), memoryview(content), number + 1, LAYOUT, 1)
            for number, content in enumerate(self._contents)
        ]
        outcomes = client.put(items, time.monotonic() + START_SECONDS)
        if set(outcomes) != {Outcome.STORED}:
            raise BenchmarkError(f"not all was stored: {outcomes}")

    def _get(self, client: StoreClient) -> tuple[int, int]:
        """The numbers of right and of wrong hits."""
        rooms = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(CHUNKS)]
        outcomes = client.get([_key(number) for number in range(CHUNKS)], rooms, time.monotonic() + 10)
        answers = zip(outcomes, rooms, self._contents, strict=True)
        hits = [bytes(room) == content for outcome, room, content in answers if outcome is Outcome.HIT]
        return hits.count(True), hits.count(False)

    def _mirror_is_right(self) -> bool:
        now = time.monotonic()
        ours = self._mirror.locate(LAYOUT, list(range(1, CHUNKS + 1)), now)
        forged = self._mirror.locate(LAYOUT, list(range(FORGED_FIRST, FORGED_FIRST + 100_000)), now)
        return set(ours) == {self._target} and set(forged) == {None}

    def _speeds_are_right(self) -> bool:
        now = time.monotonic()
        worker, targets = self._workers.report(int(WORKER), 16, now), self._speeds.targets(now)
        report, heard_seconds = targets.get(self._target, (None, 99.0))
        return (
            worker is not None
            and worker.fingerprint == LAYOUT
            and report is not None
            and heard_seconds < 3
            and abs(time.time() - report.ts_ms / 1000) < 5
        )

    async def _until(self, holds: Callable[[], bool], bound: float = 2 * RECOVERY_SECONDS_MAX) -> float:
        """The time until `holds`, for two seconds; more than `bound` if it never does."""
        begin, since = time.monotonic(), None
        while time.monotonic() - begin < bound + 2:
            now = time.monotonic()
            since = (since or now) if holds() else None
            if since is not None and now - since >= 2:
                return round(since - begin, 2)
            await asyncio.sleep(0.05)
        return bound + 2

    # ---- the adversary's

    def _made_up(self, name: bytes, size: int) -> Answer:
        self._wrong_values += 1
        return Answer(random.randbytes(size))

    async def _answer_snapshots(self, forger: Client) -> None:
        async def answer(raw: Msg) -> None:
            if self._answered:
                self._snapshots += 1
                hashes = b"".join(one.to_bytes(8, "little") for one in self._hashes(1000))
                page = SnapshotPage(self._target, self._epoch, self._seq, 9, 1, LAYOUT, hashes)
                await raw.respond(msgspec.msgpack.encode(page))

        await forger.subscribe(messages.subject(NAMESPACE, "snapshot"), cb=answer)

    def _chance_of_truth(self, message: Residency) -> bool:
        """The adversary distinguishes the target's messages from its own by their clock."""
        return message.ts_ms > 0

    def _hashes(self, count: int = 100) -> list[int]:
        return [FORGED_FIRST + self._chance.randrange(100_000) for _ in range(count)]

    def _residency(
        self,
        seq: int,
        *,
        name: str = "",
        epoch: int | None = None,
        layout: int = LAYOUT,
        stored: list[int] | None = None,
        removed: list[int] | None = None,
    ) -> tuple[str, Residency]:
        name = name or self._target
        message = Residency(
            name, self._epoch if epoch is None else epoch, seq, layout, 1, stored or [], removed or [], 0
        )
        return messages.subject(NAMESPACE, "residency", name), message

    def _target_report(self) -> tuple[str, TargetReport]:
        absurd = self._chance.choice([float("nan"), -1.0, 1e300, float("inf"), 1e9])
        epoch, later = self._chance.choice([self._epoch, 1 << 62]), 1 << 62
        report = TargetReport(self._target, epoch, 0, 0, absurd, 0, 0, 1, 1, 1, later)
        return messages.subject(NAMESPACE, "speed.target", self._target), report

    def _worker_report(self) -> tuple[str, WorkerReport]:
        absurd = self._chance.choice([float("nan"), -1.0, 1e300, float("inf")])
        name = self._chance.choice(["store_bytes_per_second", "prefill_seconds_per_token", "dram_bytes_per_second"])
        return self._report(**{name: absurd})

    def _report(self, **changes: object) -> tuple[str, WorkerReport]:
        report = msgspec.structs.replace(self._honest_report(), ts_ms=1 << 62, **changes)
        return messages.subject(NAMESPACE, "speed.worker", WORKER), report

    def _honest_report(self) -> WorkerReport:
        return WorkerReport(WORKER, ENDPOINT, LAYOUT, 16, 1, CHUNK_BYTES, time.time_ns() // 1_000_000)


def _key(number: int) -> bytes:
    return number.to_bytes(16, "big")
