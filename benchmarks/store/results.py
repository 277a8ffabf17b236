"""Statistics of the store's benchmark: medians, ratios of pairs, the report and its table.

Samples of one round are taken within seconds of each other. Ratios are only between figures of the same round.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

MIB = 1 << 20
GB = 1e9

# Our configurations, the peers that each is compared with, and where that peer holds its values.
RIVALS = {
    "cold": {"mooncake-ssd": "disk"},
    "hot": {"redis": "RAM", "lmcache": "RAM", "mooncake": "RAM"},
    "put": {"redis": "RAM", "lmcache": "RAM", "mooncake": "RAM"},
}


SIDE_NAMES = tuple(RIVALS)


class Sample(NamedTuple):
    """One measurement: GB/s over all clients, and the CPU seconds it took."""

    speed: float
    moved_bytes: int = 0
    server_cpu: float = 0.0
    client_cpu: float = 0.0
    returned_speed: float = 0.0  # puts: before the data was flushed to the device
    refused: int = 0  # puts that our target turned away, and that were offered again


class Spread(msgspec.Struct, frozen=True):
    """Of repeated measurements."""

    median: float
    quartiles: tuple[float, float]


class PeerResult(msgspec.Struct, omit_defaults=True):
    medium: str
    gbytes_per_second: Spread
    ratio_to_limit: Spread | None
    ratio_to_peer: Spread  # ours over the peer's: above 1, we are faster
    server_cpu_seconds_per_gbyte: float
    client_cpu_seconds_per_gbyte: float
    connections: int | None = None  # per client, the better of two; None: the peer's own business


class Result(msgspec.Struct, omit_defaults=True):
    """One configuration of ours, its limit, and its peers."""

    operation: str
    medium: str
    transport: str
    clients: int
    value_bytes: int
    gbytes_per_second: Spread
    limit: str
    limit_gbytes_per_second: Spread | None
    target_cpu_seconds_per_gbyte: float
    client_cpu_seconds_per_gbyte: float
    samples: list[float]
    get_ratio_to_limit: Spread | None = None
    put_ratio_to_limit: Spread | None = None
    returned_gbytes_per_second: Spread | None = None  # puts, as the caller sees them, before the flush
    refused_share: float | None = None  # puts that a busy target turned away and that were offered again, of all values
    peers: dict[str, PeerResult] = {}


class FirstWrite(msgspec.Struct):
    """Writes to preallocated space that was never written, which costs the file system more."""

    value_bytes: int
    gbytes_per_second: Spread
    limit_gbytes_per_second: Spread
    ratio_to_limit: Spread


class Report(msgspec.Struct):
    command: str
    machine: dict[str, str | int | float]
    settings: dict[str, str | int | float]
    notes: list[str]
    peers: dict[str, str]  # what was measured in which version, or why not and how to install it
    disk: dict[str, float]  # every setting of fio that was tried: GB/s
    first_write: FirstWrite | None
    results: list[Result]


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles; of a single value, that."""
    numbers = sorted(values)
    if len(numbers) == 1:
        numbers *= 2
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(round(middle, 3), (round(low, 3), round(high, 3)))


def paired(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """The spread of the ratios, pair by pair."""
    return spread(one / other for one, other in zip(ours, others, strict=True))


class Cell:
    """All samples of one transport and one value size, by (operation, side, clients); the n-th ones belong together."""

    def __init__(self, transport: str, size: int):
        self.transport = transport
        self.size = size
        self.connections: dict[tuple[str, str, int], int] = {}  # what calibration chose
        self._samples: defaultdict[tuple[str, str, int], list[Sample]] = defaultdict(list)

    def add(self, operation: str, side: str, clients: int, sample: Sample) -> None:
        self._samples[operation, side, clients].append(sample)

    def speeds(self, operation: str, side: str, clients: int) -> list[float]:
        return [sample.speed for sample in self._samples.get((operation, side, clients), [])]

    def limits(self, operation: str, medium: str, clients: int) -> list[float]:
        """The limit of each round: the best socket setting, or the disk if that is slower."""
        ways = [self.speeds(operation, side, clients) for side in ("socket-1", "socket-4")]
        ways.append(self.speeds("get", "iperf3", clients))  # once a round: it has one direction
        network = [max(round_) for round_ in zip(*(way for way in ways if way), strict=True)]
        if medium == "hot":
            return network
        disk = self.speeds("read" if operation == "get" else "write", "fio", 0)
        return [min(pair) for pair in zip(network, disk, strict=True)] if disk else []

    def cpu(self, operation: str, side: str, clients: int) -> tuple[float, float]:
        """CPU seconds per GB of server and clients."""
        samples = self._samples[operation, side, clients]
        moved = sum(sample.moved_bytes for sample in samples) / GB
        return (
            round(sum(sample.server_cpu for sample in samples) / moved, 3),
            round(sum(sample.client_cpu for sample in samples) / moved, 3),
        )

    def result(self, side: str, clients: int) -> Result:
        """Of one of our sides: "cold", "hot" or "put"."""
        operation = "put" if side == "put" else "get"
        ours, limits = self.speeds(operation, side, clients), self.limits(operation, side, clients)
        ratio = paired(ours, limits) if limits else None
        server, client = self.cpu(operation, side, clients)
        samples = self._samples[operation, side, clients]
        values = sum(sample.moved_bytes for sample in samples) / self.size
        return Result(
            operation=operation,
            medium="disk" if side == "put" else side,
            transport=self.transport,
            clients=clients,
            value_bytes=self.size,
            gbytes_per_second=spread(ours),
            limit="socket" if side == "hot" else f"min(disk {'write' if side == 'put' else 'read'}, socket)",
            limit_gbytes_per_second=spread(limits) if limits else None,
            target_cpu_seconds_per_gbyte=server,
            client_cpu_seconds_per_gbyte=client,
            samples=[round(speed, 3) for speed in ours],
            get_ratio_to_limit=ratio if operation == "get" else None,
            put_ratio_to_limit=ratio if operation == "put" else None,
            returned_gbytes_per_second=spread(s.returned_speed for s in samples) if operation == "put" else None,
            refused_share=round(sum(s.refused for s in samples) / values, 4) if operation == "put" else None,
            peers={
                peer: self._peer(operation, peer, medium, clients, ours)
                for peer, medium in RIVALS[side].items()
                if self.speeds(operation, peer, clients)
            },
        )

    def _peer(self, operation: str, peer: str, medium: str, clients: int, ours: Sequence[float]) -> PeerResult:
        theirs = self.speeds(operation, peer, clients)
        limits = self.limits(operation, "hot" if medium == "RAM" else "cold", clients)
        server, client = self.cpu(operation, peer, clients)
        return PeerResult(
            medium=medium,
            gbytes_per_second=spread(theirs),
            ratio_to_limit=paired(theirs, limits) if limits else None,
            ratio_to_peer=paired(ours, theirs),
            server_cpu_seconds_per_gbyte=server,
            client_cpu_seconds_per_gbyte=client,
            connections=self.connections.get((operation, peer, clients)),
        )


# ---- the table


def shown(of: Spread, form: str) -> str:
    """Median and quartiles, each in that format."""
    low, high = of.quartiles
    return f"{of.median:{form}} ({low:{form}} to {high:{form}})"


def heading(command: str, machine: Mapping[str, object]) -> list[str]:
    """The first lines of a table."""
    return [command, *(f"{name}: {value}" for name, value in machine.items())]


def size_name(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"


def _cell(value: Spread | None) -> str:
    return f"{value.median:.2f} [{value.quartiles[0]:.2f} {value.quartiles[1]:.2f}]" if value else "-"


def _row(result: Result, rivals: Sequence[str]) -> list[str]:
    return [
        result.operation,
        result.medium,
        result.transport,
        str(result.clients),
        size_name(result.value_bytes),
        _cell(result.gbytes_per_second),
        _cell(result.limit_gbytes_per_second),
        _cell(result.get_ratio_to_limit or result.put_ratio_to_limit),
        *(_cell(result.peers[peer].ratio_to_peer if peer in result.peers else None) for peer in rivals),
        f"{result.target_cpu_seconds_per_gbyte:.2f}",
        f"{result.client_cpu_seconds_per_gbyte:.2f}",
    ]


def table(results: Sequence[Result]) -> str:
    """Ours in GB/s, its limit, and ratios of ours to the limit and to each peer: median [quartiles]."""
    rivals = [
        peer for peer in ("redis", "lmcache", "mooncake", "mooncake-ssd") if any(peer in r.peers for r in results)
    ]
    head = ["op", "medium", "via", "cl.", "value", "GB/s", "limit", "ours/limit", *(f"ours/{peer}" for peer in rivals)]
    rows = [[*head, "CPU s/GB target", "client"], *(_row(result, rivals) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
