"""The store's benchmark: its processes, measurements, and their order.

Measurements run in rounds, alternately in forward and reverse order, so that drift affects all sides equally.
"""

import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.store import servers
from benchmarks.store.results import GB, MIB, SIDE_NAMES, Cell, FirstWrite, Sample, paired, size_name, spread
from benchmarks.store.servers import BenchmarkError, Client, Fio, Iperf, Mooncake, Process, Target

CONNECTIONS = (1, 4)  # what the bare socket and the peers without a pool of their own are tried with
LEAD_SECONDS = 0.03  # between the command to all clients and their common start
CALIBRATION_TRIES = 2


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """The numbers of values, batches and rounds."""

    sizes: list[int]
    clients: list[int]
    transports: list[str]
    repeats: int
    peers: list[str]
    peer_python: str
    batch_bytes: int  # of a call
    calls: int  # of a measurement, over all clients
    cold_batches: int
    hot_batches: int
    ring_bytes: int
    segment_bytes: int
    hot_cache_bytes: int

    @property
    def measured_bytes(self) -> int:
        return self.calls * self.batch_bytes

    def capacity(self, batches: int) -> int:
        """For `batches` of each size: large values leave the end of a segment empty, and some segments are open."""
        need = sum(self._segments(size, batches) for size in self.sizes)
        return (need + need // 16 + 4) * self.segment_bytes

    def _segments(self, size: int, batches: int) -> int:
        fit = (self.segment_bytes - MIB) // (size + 4096)
        return math.ceil(batches * self.batch_bytes / size / fit)

    @property
    def fio_bytes(self) -> int:
        return max(self.ring_bytes // 2, 64 * MIB)

    @property
    def disk_bytes(self) -> int:
        ours = self.capacity(self.cold_batches) + self.capacity(self.hot_batches) + self.ring_bytes
        offload = len(self.sizes) * (self.hot_batches + 2) * self.batch_bytes if "mooncake-ssd" in self.peers else 0
        return ours + self.fio_bytes + offload


@dataclass
class Side:
    """A server under test and the clients that are connected to it."""

    clients: list[Client]
    pids: list[int]
    server: Target | Mooncake | None = None


class Bench:
    """Everything that runs, and the measurements on it. `stack` stops it all."""

    def __init__(self, plan: Plan, folder: Path, stack: ExitStack):
        self.plan = plan
        self.folder = folder
        self._stack = stack
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-")))
        self._sides: dict[str, Side] = {}
        self._next_cold = 0
        self._next_put = 0
        self._loaded = False
        self._has_hot_cache = servers.has_hot_cache()
        self.still_cached = 0.0  # the largest share of the segments found in the page cache after it was dropped
        self.first_write: FirstWrite | None = None
        self.peers = {peer: self._availability(peer) for peer in plan.peers}
        self._running = [peer for peer in plan.peers if not servers.absent(peer, plan.peer_python)]
        self.clients = self._start_clients(sys.executable, "client")
        self.fio = self._start_fio()
        self._iperf = self._start_iperf()
        self._redis = self._keep(servers.start_redis(self._logs, self._unix("redis"))) if self._has("redis") else None
        self._lmcache = (
            self._keep(servers.start_lmcache(self._logs, plan.peer_python)) if self._has("lmcache") else None
        )
        self._start_mooncake()

    # ---- starting

    def _has(self, peer: str) -> bool:
        return peer in self._running

    def _availability(self, peer: str) -> str:
        reason = servers.absent(peer, self.plan.peer_python)
        if reason:
            return f"ABSENT, not measured: {reason}"
        return f"{servers.PEERS[peer]} ({servers.version(peer, self.plan.peer_python)})"

    def _unix(self, name: str) -> str:
        return str(self._sockets / name)

    def _keep(self, started: tuple[Process, str]) -> tuple[Process, str]:
        self._stack.callback(started[0].stop)
        return started

    def _start_clients(self, python: str, name: str) -> list[Client]:
        clients = []
        for number in range(max(self.plan.clients)):
            clients.append(Client(f"{name}-{number}", python, self.plan.batch_bytes, self._logs))
            self._stack.callback(clients[-1].stop)
        for client in clients:
            client.answer()
        return clients

    def _start_fio(self) -> Fio | None:
        if shutil.which("fio") is None:
            return None
        fio = Fio(self.folder / "fio.data", self.plan.fio_bytes)
        self._stack.callback(fio.path.unlink)
        return fio

    def _start_iperf(self) -> Iperf | None:
        if shutil.which("iperf3") is None or "tcp" not in self.plan.transports:
            return None
        iperf = Iperf(self._logs)
        self._stack.callback(iperf.stop)
        return iperf

    def _start_mooncake(self) -> None:
        names = [peer for peer in self._running if peer.startswith("mooncake") and "tcp" in self.plan.transports]
        if not names:
            return
        clients = self._start_clients(self.plan.peer_python, "peer-client")
        memory = max(2 * self.plan.measured_bytes, 512 * MIB)
        for name in names:
            disk = self.folder / name if name.endswith("-ssd") else None
            server = Mooncake(name, self._logs, self.plan.peer_python, memory, disk)
            self._stack.callback(server.stop)
            self._open(name, "mooncake", server.client_settings(), server.pids, clients=clients, server=server)

    def _open(
        self,
        name: str,
        kind: str,
        where: object,
        pids: list[int],
        *,
        connections: int = 1,
        clients: list[Client] | None = None,
        server: Target | Mooncake | None = None,
    ) -> None:
        side = self._sides[name] = Side(self.clients if clients is None else clients, pids, server)
        for client in side.clients:
            client.do("open", name=name, kind=kind, where=where, connections=connections)

    @contextlib.contextmanager
    def transport(self, transport: str) -> Iterator[None]:
        """Our targets and all connections over one transport; the folders, and so the values, stay the same."""
        plan = self.plan
        capacities = {
            "cold": (plan.capacity(plan.cold_batches), 0),
            "hot": (plan.capacity(plan.hot_batches), plan.hot_cache_bytes),
            "put": (plan.ring_bytes, plan.hot_cache_bytes // 4),
        }
        with ExitStack() as stack:
            for name, (capacity, hot) in capacities.items():
                unix = self._unix(name) if transport == "unix" else ""
                cache = hot if self._has_hot_cache else None
                target = Target(name, self.folder / name, self._logs, capacity, plan.segment_bytes, unix, cache)
                stack.callback(target.stop)
                self._open(name, "kvtier", target.address, [target.pid], server=target)
            address = self._unix("socket") if transport == "unix" else f"127.0.0.1:{servers.free_port()}"
            memory_bytes = plan.hot_batches * plan.batch_bytes
            command = [sys.executable, "-m", "benchmarks.store.worker", "socket", address, str(memory_bytes)]
            bare = Process("socket", command, self._logs)
            stack.callback(bare.stop)
            bare.wait_for(address)
            pooled = {"socket": (bare, address)}
            if self._redis:
                pooled["redis"] = (self._redis[0], self._redis[1] if transport == "tcp" else self._unix("redis"))
            if self._lmcache and transport == "tcp":
                pooled["lmcache"] = self._lmcache
            for kind, (process, where) in pooled.items():
                for connections in CONNECTIONS:
                    self._open(f"{kind}-{connections}", kind, where, [process.pid], connections=connections)
            try:
                yield
            finally:
                kept = {name: side for name, side in self._sides.items() if name.startswith("mooncake")}
                self._sides = kept

    # ---- measuring

    def _measure(
        self,
        name: str,
        operation: str,
        size: int,
        batches: Sequence[int],
        clients: int,
        dataset: str = "",
        flushes: bool = False,
    ) -> Sample:
        """Deal the batches out to the clients and have them start together."""
        side = self._sides[name]
        chosen = side.clients[:clients]
        client_pids = [client.pid for client in chosen]
        server_cpu, client_cpu = servers.cpu_seconds(side.pids), servers.cpu_seconds(client_pids)
        at = time.monotonic() + LEAD_SECONDS
        for number, client in enumerate(chosen):
            share = list(batches[number::clients])
            client.ask("run", name=name, operation=operation, dataset=dataset or name, size=size, batches=share, at=at)
        answers = [client.answer() for client in chosen]
        start, returned = min(answer["start"] for answer in answers), max(answer["end"] for answer in answers)
        end = returned
        if flushes and isinstance(side.server, Target):
            servers.flush(side.server.folder)
            end = time.monotonic()
        server_cpu, client_cpu = (
            servers.cpu_seconds(side.pids) - server_cpu,
            servers.cpu_seconds(client_pids) - client_cpu,
        )
        for client, answer in zip(chosen, answers, strict=True):
            if answer["good"] != answer["asked"]:
                count = f"{answer['good']} of {answer['asked']} values were good"
                raise BenchmarkError(f"{operation} {name}: {count}; {client.last_words()}")
        if operation == "get" and not name.startswith("socket"):
            for client in chosen:
                client.do("check")
        moved = len(batches) * self.plan.batch_bytes
        return Sample(
            moved / GB / (end - start),
            moved,
            server_cpu,
            client_cpu,
            returned_speed=moved / GB / (returned - start),
            refused=sum(answer["refused"] for answer in answers),
        )

    def _get_cold(self, size: int, clients: int) -> Sample:
        target = self._sides["cold"].server
        assert isinstance(target, Target)
        self.still_cached = max(self.still_cached, servers.evict(target.folder))
        first = self._next_cold
        self._next_cold += self.plan.calls
        batches = [number % self.plan.cold_batches for number in range(first, self._next_cold)]
        return self._measure("cold", "get", size, batches, clients)

    def _get_hot(self, size: int, clients: int) -> Sample:
        return self._measure("hot", "get", size, self._few_batches(), clients)

    def _put(self, size: int, clients: int) -> Sample:
        first = self._next_put
        self._next_put += self.plan.calls
        return self._measure("put", "put", size, range(first, self._next_put), clients, flushes=True)

    def _few_batches(self) -> list[int]:
        """As many calls as any measurement, over few batches: what a DRAM cache holds."""
        return [number % self.plan.hot_batches for number in range(self.plan.calls)]

    def _peer(self, peer: str, operation: str, size: int, clients: int, connections: int | None) -> Sample:
        """The same calls to a peer; those that have no pool are given a number of connections."""
        name = f"{peer}-{connections}" if connections else peer
        if peer == "mooncake" and operation == "put":  # it does not put what it has
            self._sides[name].clients[0].do("clear", name=name)
            return self._measure(name, operation, size, range(self.plan.calls), clients, peer)
        if peer == "mooncake-ssd":
            server = self._sides[name].server
            assert isinstance(server, Mooncake)
            assert server.disk is not None
            servers.evict(server.disk)
            return self._measure(name, operation, size, range(self.plan.hot_batches), clients, peer)
        return self._measure(name, operation, size, self._few_batches(), clients, peer)

    # ---- before the rounds of a size

    def load(self) -> None:
        """Put the values that are read later. Run the first laps of the put ring and of fio's file, which are slow."""
        everyone = max(self.plan.clients)
        for size in self.plan.sizes:
            say(f"loading {size_name(size)}")
            self._measure("cold", "put", size, range(self.plan.cold_batches), everyone)
            self._measure("hot", "put", size, range(self.plan.hot_batches), everyone)
        size = self.plan.sizes[len(self.plan.sizes) // 2]
        laps = max(1, self.plan.ring_bytes // self.plan.measured_bytes)
        ours, limits = [], []
        for part in range(laps):
            sample = self._put(size, 1)
            ours.append(sample.speed)
            if self.fio:
                limits.append(self.fio.first_write(size, part, laps))
        if limits:
            self.first_write = FirstWrite(size, spread(ours), spread(limits), paired(ours, limits))

    def prepare(self, cell: Cell) -> list[str]:
        """Choose settings, warm everything up. The peers that take part."""
        size, few = cell.size, range(self.plan.hot_batches)
        if self.fio and ("read", size) not in self.fio.best:
            self.fio.choose("read", size, CALIBRATION_TRIES)
            self.fio.choose("write", size, CALIBRATION_TRIES)
        for _ in range(2):  # a cache may admit a value only at its second use
            self._measure("hot", "get", size, few, 1)
        for clients in self.plan.clients:
            for connections in CONNECTIONS:
                self._measure(f"socket-{connections}", "get", size, few, clients)
            self._get_cold(size, clients)
            self._put(size, clients)
        self._check_transport(cell.transport)
        peers = self._peers_over(cell.transport)
        if "mooncake-ssd" in peers and not self._offload(size):
            self.peers["mooncake-ssd"] += f"; {size_name(size)}: NOT MEASURED, its values did not reach its disk"
            peers.remove("mooncake-ssd")
        for peer in peers:
            if peer != "mooncake-ssd":
                self._calibrate(cell, peer)
        return peers

    def _peers_over(self, transport: str) -> list[str]:
        """The peers with this transport. Mooncake supports only TCP, and keeps running while the transport changes."""
        return [
            peer
            for peer in self._running
            if f"{peer}-{CONNECTIONS[0]}" in self._sides or (peer in self._sides and transport == "tcp")
        ]

    def _check_transport(self, transport: str) -> None:
        for name in SIDE_NAMES:
            target = self._sides[name].server
            assert isinstance(target, Target)
            if bool(servers.tcp_connections(target.address)) != (transport == "tcp"):
                raise BenchmarkError(f"{name}: the clients do not use {transport}")

    def _offload(self, size: int) -> bool:
        """Put values into Mooncake and wait until it has them on disk only."""
        side = self._sides["mooncake-ssd"]
        server, client = side.server, side.clients[0]
        assert isinstance(server, Mooncake)
        client.do("clear", name="mooncake-ssd")
        self._measure("mooncake-ssd", "put", size, range(self.plan.hot_batches + 2), 1)  # the last ones evict the first
        batches = list(range(self.plan.hot_batches))
        where = {"name": "mooncake-ssd", "owner": server.host, "dataset": "mooncake-ssd"}
        return bool(client.do("to_disk", **where, size=size, batches=batches)["on_disk"])

    def _calibrate(self, cell: Cell, peer: str) -> None:
        """Fill a peer, and find how many connections serve it best."""
        choices: Sequence[int | None] = [None] if peer in self._sides else CONNECTIONS
        for clients in self.plan.clients:
            for operation in ("put", "get"):
                tries = CALIBRATION_TRIES if len(choices) > 1 else 1  # one fills it and warms it up
                speeds = {
                    choice: max(self._peer(peer, operation, cell.size, clients, choice).speed for _ in range(tries))
                    for choice in choices
                }
                best = max(speeds, key=lambda choice: speeds[choice])
                if best is not None:
                    cell.connections[operation, peer, clients] = best

    # ---- rounds

    def tasks(self, cell: Cell, peers: Sequence[str]) -> list[Callable[[], None]]:
        """One measurement of everything, what is compared side by side."""
        tasks: list[Callable[[], None]] = []

        def task(operation: str, side: str, clients: int, take: Callable[[], Sample]) -> None:
            tasks.append(lambda: cell.add(operation, side, clients, take()))

        for operation in ("get", "put"):
            if self.fio:
                task("read" if operation == "get" else "write", "fio", 0, self._fio_task(operation, cell.size))
            for clients in self.plan.clients:
                for side, take in self._limits_and_ours(operation, cell, clients):
                    task(operation, side, clients, take)
                for peer in peers:
                    if operation == "get" or peer != "mooncake-ssd":
                        task(operation, peer, clients, self._peer_task(operation, cell, peer, clients))
        return tasks

    def _fio_task(self, operation: str, size: int) -> Callable[[], Sample]:
        assert self.fio is not None
        fio = self.fio
        return lambda: Sample(fio.speed("read" if operation == "get" else "write", size))

    def _limits_and_ours(self, operation: str, cell: Cell, clients: int) -> Iterator[tuple[str, Callable[[], Sample]]]:
        size, batches = cell.size, self._few_batches()
        if operation == "get":
            yield "cold", lambda: self._get_cold(size, clients)
        else:
            yield "put", lambda: self._put(size, clients)
        yield "socket-1", lambda: self._measure("socket-1", operation, size, batches, clients)
        yield "socket-4", lambda: self._measure("socket-4", operation, size, batches, clients)
        if operation == "get":
            if self._iperf and cell.transport == "tcp":
                iperf = self._iperf
                yield "iperf3", lambda: Sample(iperf.speed(clients, self.plan.measured_bytes))
            yield "hot", lambda: self._get_hot(size, clients)

    def _peer_task(self, operation: str, cell: Cell, peer: str, clients: int) -> Callable[[], Sample]:
        connections = cell.connections.get((operation, peer, clients))
        return lambda: self._peer(peer, operation, cell.size, clients, connections)

    def run(self) -> list[Cell]:
        cells = []
        for transport in self.plan.transports:
            with self.transport(transport):
                if not self._loaded:
                    self.load()
                    self._loaded = True
                for size in self.plan.sizes:
                    cells.append(cell := Cell(transport, size))
                    say(f"{transport}, {size_name(size)}")
                    tasks = self.tasks(cell, self.prepare(cell))
                    for number in range(self.plan.repeats):
                        for task in reversed(tasks) if number % 2 else tasks:
                            task()
        return cells

    def medium_of_hot(self) -> str:
        return "the target's DRAM hot cache" if self._has_hot_cache else "page cache: this build has no --hot"
