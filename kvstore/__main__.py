"""A target process: `python -m kvstore --dir /nvme0 --capacity 3T --listen 10.0.0.7:7600`."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from kvstore import certificates, descriptors, memory, tools
from kvstore.bus import messages, residency
from kvstore.bus.broker import DEFAULT_URLS, NatsUrls
from kvstore.bus.residency import Announcer
from kvstore.certificates import Files
from kvstore.client_options import ClientOptions, add_client_arguments
from kvstore.disk.device import Device
from kvstore.disk.log import Log
from kvstore.disk.shelf import Rack, Shelf
from kvstore.errors import ConfigError, UnavailableError, run_command, validated
from kvstore.net import membership, tenants, tls, transport
from kvstore.net.ahead import OUTCOMES as AHEAD_OUTCOMES
from kvstore.net.etcd import checked_servers
from kvstore.net.lobby import Lobby
from kvstore.net.queues import DROP_REASONS
from kvstore.net.replicas import OUTCOMES as REPLICA_OUTCOMES
from kvstore.net.target import FLUSH_SECONDS, Target
from kvstore.net.tls import ServerTls
from kvstore.net.wire import Outcome
from kvstore.scrape import Scrapes
from kvstore.tenancy import Settings, Tenancy, fit_connections, replicate, report, warm
from kvstore.text import in_units, masked

if TYPE_CHECKING:
    from kvstore.bus.connection import Bus

logger = logging.getLogger("kvstore")

_UNIX_PATH_MAX = 108  # sun_path in Linux

HELP = """Keep KV-cache chunks on NVMe and serve them to inference workers.

One process per device: give it a directory on a file system of its own, or the device itself, and a capacity. The index
is rebuilt at every start, so a target can be killed and restarted at any time. Scale out by starting more targets.

  python -m kvstore --dir /nvme0 --capacity 3T --listen 10.0.0.7:7600 --nats nats://broker:4222

Commands for operators ('COMMAND --help' says more):

  python -m kvstore stat 10.0.0.7:7600    show the content and the counts of a running target
  python -m kvstore verify --dir /nvme0   check a stopped target for corruption
  python -m kvstore bench --dir /nvme0    measure how many workers a target here could feed
  python -m kvstore export 10.0.0.7:7600  write chunks of a running target to a file, for 'import' into another
"""


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid")

    dir: list[Path]
    capacity: ByteSize
    segment_size: ByteSize | None = None
    sync: Literal["seal"] | Annotated[float, Field(gt=0)] = "seal"
    hot: ByteSize = ByteSize(0)
    durability: Literal["written", "memory"] = "written"
    dirty: ByteSize | None = Field(None, gt=0)
    flush: float = Field(FLUSH_SECONDS, ge=0, le=3600)
    listen: str = "127.0.0.1:7600"
    advertise: str | None = None
    unix_socket: str | None = None
    unix_uids: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    namespace: str = "default"
    namespaces: Path | None = None
    nats: NatsUrls = Field(DEFAULT_URLS, validate_default=True)
    etcd: str | None = None
    peers: str | None = None
    store_tls_ca: Path | None = None
    store_tls_cert: Path | None = None
    store_tls_key: Path | None = None
    buffers: ByteSize = ByteSize(256 << 20)
    connections: int = Field(512, ge=1)
    carrier: Literal["", "memory", "nixl"] = ""
    metrics_port: int = Field(0, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("sync", mode="before")
    @classmethod
    def _is_sync(cls, sync: object) -> object:
        with contextlib.suppress(ValueError):
            if sync == "seal" or float(str(sync)) > 0:
                return sync
        raise ValueError("seal, or more than 0 milliseconds")

    @field_validator("etcd")
    @classmethod
    def _etcd_servers(cls, servers: str | None) -> str | None:
        if servers is not None:
            checked_servers("etcd", servers)
        return servers

    @property
    def dirty_bytes(self) -> int:
        """Limit of acknowledged bytes that are not written yet; 0: write-behind is off."""
        if self.durability == "written":
            return 0
        return self.hot if self.dirty is None else self.dirty

    def check(self) -> None:
        """Raises ConfigError for options that conflict."""
        if self.namespaces and "namespace" in self.model_fields_set:
            expected = "one of the two: the file names all namespaces"
            raise ConfigError.conflicting("namespace", self.namespace, "--namespaces", expected)
        certificates.checked(self.tls_files, certificates.SERVER)
        self._check_durability()
        self._check_name()
        self._check_peers()

    @property
    def tls_files(self) -> Files:
        return Files(*(str(path or "") for path in (self.tls_cert, self.tls_key, self.tls_client_ca)))

    @property
    def peers_tls_files(self) -> Files:
        return ClientOptions(
            store_tls_ca=self.store_tls_ca, store_tls_cert=self.store_tls_cert, store_tls_key=self.store_tls_key
        ).tls_files

    def _check_peers(self) -> None:
        uses_tls = certificates.checked(self.peers_tls_files, certificates.CLIENT)
        if self.peers is None:
            if uses_tls:
                raise ConfigError.missing("peers", "the targets that hold replicas", required_by="--store-tls-ca")
            return
        if not self.hot:
            raise ConfigError.missing("hot", "a size: replicas are sent from the hot cache", required_by="--peers")
        if self.tls_cert and not uses_tls:
            raise ConfigError.missing("store-tls-ca", "a file", required_by="--peers together with --tls-cert")

    def _check_durability(self) -> None:
        if self.durability == "memory" and not self.hot:
            expected = "a size: the hot cache keeps puts until they are written"
            raise ConfigError.missing("hot", expected, required_by="--durability memory")
        if self.dirty is not None and self.durability == "written":
            raise ConfigError.conflicting("dirty", self.dirty, "--durability written", "--durability memory")
        if self.dirty_bytes > self.hot:
            raise ConfigError("dirty", in_units(self.dirty_bytes), f"at most the {in_units(self.hot)} of --hot")

    def _check_name(self) -> None:
        """The announced address must be one that clients can reach. Raises ConfigError."""
        listening, _ = transport.split_address(membership.checked_address("listen", self.listen))
        if self.advertise is not None:
            host, port = transport.split_address(membership.checked_address("advertise", self.advertise))
            if transport.is_wildcard(host) or not port:
                raise ConfigError("advertise", self.advertise, "host:port that clients can reach")
        elif (self.nats or self.etcd) and transport.is_wildcard(listening):
            expected = "host:port that clients can reach"
            raise ConfigError.missing("advertise", expected, required_by=f"--listen {self.listen}")


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir",
        required=True,
        action="append",
        help="directory or block device for the chunks; given several times, they share the capacity",
    )
    parser.add_argument("--capacity", required=True, help="limit for all --dir together: 500G, 3T, 1.5TiB")
    parser.add_argument(
        "--segment-size",
        help="unit of eviction; default: that of an existing store; for a new one 256MiB, 64MiB below 200GiB",
    )
    parser.add_argument(
        "--sync",
        help="fsync policy. 'seal' (default): when a segment is sealed; a power cut loses the two open segments. N: "
        "every N ms. A killed process loses no written chunk, either way",
    )
    parser.add_argument(
        "--hot", help="size of the hot cache, an in-memory cache of chunks; for example 32G; default: off"
    )
    parser.add_argument(
        "--durability",
        help="when a put is acknowledged and readable. 'written' (default): when it is written; a killed process loses "
        "no acknowledged put. 'memory' (write-behind): when it is in the hot cache; a killed process loses the puts "
        "that were not written yet",
    )
    parser.add_argument(
        "--dirty",
        help="with --durability memory: limit of the chunks in --hot that wait to be written; default: all of it",
    )
    parser.add_argument(
        "--flush",
        help="time limit in seconds for writing dirty chunks when the target stops; the rest is lost; default "
        f"{FLUSH_SECONDS:.0f}",
    )
    parser.add_argument("--listen", help="host:port to serve on; on [::]:port IPv6 and IPv4; default 127.0.0.1:7600")
    parser.add_argument("--advertise", help="host:port under which clients reach it; default: --listen")
    parser.add_argument("--unix-socket", help="path for clients on this host; default: DIR/target.sock, '' for none")
    parser.add_argument(
        "--unix-uids",
        help="user ids that may use the UNIX socket, separated by commas, or 'any'; default: this process's own. "
        "Other users are served over TCP",
    )
    parser.add_argument(
        "--tls-cert",
        help="certificate in PEM, for the host name that clients use: TCP connections must use TLS 1.3; reloaded on "
        "SIGHUP (docs/security.md); default: no TLS",
    )
    parser.add_argument("--tls-key", help="the private key of --tls-cert, in a file that only its owner can read")
    parser.add_argument(
        "--tls-client-ca", help="CAs: clients must have a certificate from one of them; default: clients need none"
    )
    parser.add_argument("--namespace", help="namespace of the chunks; clients must give the same; default 'default'")
    parser.add_argument(
        "--namespaces",
        help="file of namespaces that share the target, each with a credential and a quota (docs/operations.md); "
        "reloaded on SIGHUP",
    )
    parser.add_argument(
        "--nats", help=f"NATS servers for announcements to routers; '' for none; default {masked(DEFAULT_URLS)}"
    )
    parser.add_argument("--etcd", help="host:port of etcd servers to register with; default: not registered")
    parser.add_argument(
        "--peers",
        help="replication: all targets as in workers' --store, including this one. A chunk that is read is also put to "
        "the second target of its key; needs --hot; default: off",
    )
    add_client_arguments(parser)
    parser.add_argument("--buffers", help="memory for payloads in flight; default 256MiB")
    parser.add_argument("--connections", help="limit of connections; default 512")
    parser.add_argument(
        "--carrier",
        help="transport of payloads for clients that ask for it. 'memory': shared memory, for clients of the same host "
        "and user. 'nixl' (needs the package): RDMA. Default: none",
    )
    parser.add_argument("--metrics-port", help="port for Prometheus; default: none")
    parser.add_argument("--log-level", help="debug, info, warning, error; default info")
    options = validated(Options, vars(parser.parse_args(argv)))
    options.check()
    return options


_OUTCOMES = {
    "get": [Outcome.HIT, Outcome.MISS, Outcome.LATE, Outcome.CORRUPT, Outcome.REFUSED],
    "put": [Outcome.STORED, Outcome.REFUSED, Outcome.CORRUPT],
}


def _counter(name: str, text: str, label: str, values: Iterable[str], counts: Mapping[str, int]) -> CounterMetricFamily:
    """A counter with a sample for every value of its label, even if it is 0, so that the first increase shows."""
    found = CounterMetricFamily(name, text, labels=[label])
    for value in values:
        found.add_metric([value], counts.get(value, 0))
    return found


class Metrics(Collector):
    """Exports a target's status to Prometheus."""

    def __init__(self, target: Target):
        self._target = target

    def collect(self) -> Iterator[Metric]:
        status = self._target.status()
        operations = CounterMetricFamily(
            "kvtier_target_operations", "Keys of GET and PUT, by outcome", labels=["operation", "outcome"]
        )
        for operation, outcomes in _OUTCOMES.items():
            counted = status.operations.get(operation, {})
            for outcome in outcomes:  # also those at 0, so that the first increase shows
                operations.add_metric([operation, outcome.name.lower()], counted.get(outcome.name.lower(), 0))
        yield operations
        yield _counter(
            "kvtier_target_dropped_chunks",
            "Chunks that were put but not written, by reason. no_room: the write queue was full; displaced: by chunks "
            "of more benefit; orphaned: the chunk before it in its prompt was dropped; failed: the write failed; "
            "stopped: the target stopped",
            "reason",
            DROP_REASONS,
            status.dropped,
        )
        yield _counter(
            "kvtier_target_read_ahead_chunks",
            "Chunks of prefetches, by outcome. memory: in memory already; absent: not stored; refused: beyond the "
            "peer's share; read; expired: the device was busy; no_room: the hot cache was in use; failed: the read "
            "failed; used: read, and requested by a GET later",
            "outcome",
            AHEAD_OUTCOMES,
            status.read_ahead,
        )
        yield _counter(
            "kvtier_target_replica_chunks",
            "With `--peers`: replicas offered to the other target of a chunk, by outcome. stored; known: it had the "
            "chunk; refused: it refused or did not answer; gone: evicted from the hot cache here, or damaged in it",
            "outcome",
            REPLICA_OUTCOMES,
            status.replicas,
        )
        for name, text, value in (
            ("sent_bytes", "Payload bytes sent", status.sent_bytes),
            ("received_bytes", "Payload bytes received", status.received_bytes),
            ("evicted_chunks", "Chunks evicted", status.evicted_entries),
            (
                "corrupt_chunks",
                "Chunks dropped because their checksum failed on a read: check the device",
                status.corrupt_entries,
            ),
            (
                "failed_writes",
                "Chunks whose write failed in the device or file system: see the log",
                status.failed_writes,
            ),
            ("accepted_bytes", "Payload bytes written, without rewrites", status.accepted_bytes),
            (
                "device_written_bytes",
                "Bytes written to the device, with headers and rewrites. Divided by `accepted_bytes_total`: write "
                "amplification",
                status.device_written_bytes,
            ),
            (
                "rewritten_bytes",
                "Payload bytes that eviction rewrote, because clients had read them",
                status.rewritten_bytes,
            ),
            ("hot_hits", "Chunks sent from the hot cache", status.hot_hits),
            ("device_hits", "Chunks sent that were read from the device", status.device_hits),
        ):
            yield CounterMetricFamily(f"kvtier_target_{name}", text, value=value)
        gauges: list[tuple[str, str, float]] = [
            ("capacity_bytes", "Space that the target may use, of all devices together", status.capacity_bytes),
            ("stored_bytes", "Payload bytes held", status.payload_bytes),
            ("chunks", "Chunks held", status.entries),
            ("connections", "Clients connected", status.connections),
            ("hot_chunks", "Chunks in the hot cache", status.hot_entries),
            ("hot_bytes", "Payload bytes in the hot cache", status.hot_bytes),
            ("read_queue_bytes", "Payload bytes queued for reading", status.waiting_read_bytes),
            ("write_queue_bytes", "Payload bytes queued for writing", status.waiting_write_bytes),
            (
                "dirty_bytes",
                "With `--durability memory`: payload bytes acknowledged and not written yet. Flush rate: see "
                "`accepted_bytes_total`",
                status.dirty_bytes,
            ),
            ("dirty_limit_bytes", "With `--durability memory`: limit of the dirty bytes", status.dirty_bytes_max),
            (
                "eviction_age_seconds",
                "Age of the segment that was evicted last. If it is shorter than the reuse interval of your prompts, "
                "add capacity",
                status.evicted_age_seconds,
            ),
        ]
        for name, text, level in gauges:
            yield GaugeMetricFamily(f"kvtier_target_{name}", text, value=level)


class TlsMetrics(Collector):
    """Exports a target's TLS state to Prometheus; zeros without TLS."""

    def __init__(self, tls: ServerTls | None):
        self._tls = tls

    def collect(self) -> Iterator[Metric]:
        refused, until = (self._tls.refused, self._tls.valid_until) if self._tls else (0, 0.0)
        text = "With --tls-cert: connections whose TLS handshake failed"
        yield CounterMetricFamily("kvtier_target_tls_handshake_failures", text, value=refused)
        text = "With --tls-cert: expiry of the certificate, in seconds since 1970"
        yield GaugeMetricFamily("kvtier_target_certificate_expiry_timestamp_seconds", text, value=until)


class LabelledMetrics(Collector):
    """The same metrics for every namespace of the namespaces file, with a label `namespace`."""

    def __init__(self, lobby: Lobby):
        self._lobby = lobby

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, member in self._lobby.members.items():
            for family in chain(Metrics(member.target).collect(), member.target.registry.collect()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [one._replace(labels={**one.labels, "namespace": name}) for one in family.samples]
        yield from families.values()
        text = "With --namespaces: connections that failed to authenticate to a namespace"
        yield CounterMetricFamily("kvtier_target_authentication_failures", text, value=self._lobby.refused)


async def serve(options: Options) -> None:
    """Run a target until SIGTERM or SIGINT; then let running requests finish, seal the segments, and stop."""
    if options.namespaces:
        await _serve_tenants(options, options.namespaces)
    else:
        await _serve_one(options)


def _open_tls(options: Options) -> ServerTls | None:
    return tls.open_server(options.tls_files, options.carrier)


def _check_peers(peers: str | None, name: str, namespace: str) -> None:
    """Raises ConfigError if the target is not among its peers, and UnavailableError if etcd does not answer."""
    if peers is not None:
        found = membership.open_membership(peers, namespace)
        found.close()
        if not peers.startswith("etcd://") and name not in found.targets():
            raise ConfigError("peers", peers, f"a list with {name}: this target, as workers name it in --store")


async def _check_surroundings(options: Options) -> None:
    """Checks that must come before the first change on disk. Raises ConfigError, UnavailableError."""
    memory.check({"hot": options.hot, "buffers": options.buffers})
    if options.metrics_port:
        host, _ = transport.split_address(membership.checked_address("listen", options.listen))
        is_local, is_v6 = transport.is_loopback(host), ":" in host
        where = ("::1" if is_v6 else "127.0.0.1") if is_local else ("::" if is_v6 else "0.0.0.0")
        await Scrapes().open(where, options.metrics_port)
    if options.etcd:
        membership.check_etcd(options.etcd)


def _unix_uids(options: Options) -> frozenset[int] | None:
    """The users that may use the UNIX socket; None: every user."""
    if options.unix_uids == "any":
        return None
    parts = [part.strip() for part in options.unix_uids.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError("unix-uids", options.unix_uids, "numbers separated by commas, or 'any'")
    return frozenset({os.getuid(), *map(int, parts)})


async def _open_bus(options: Options, name: str) -> "Bus | None":
    if not options.nats:
        return None
    from kvstore.bus.connection import Bus  # takes as long to import as the rest of a target

    return await Bus.connect(options.nats, f"kvtier target {name}")


async def _serve_tenants(options: Options, path: Path) -> None:
    grants, unix_uids, server_tls = tenants.load(path), _unix_uids(options), _open_tls(options)
    await _check_surroundings(options)
    listener = _listen("listen", options.listen)
    name = options.advertise or _actual(listener, options.listen)
    for namespace in grants:
        _check_peers(options.peers, name, namespace)
    rack = Rack(
        options.dir,
        options.capacity,
        grants.quotas,
        segment_bytes=options.segment_size,
        sync_seconds=0.0 if options.sync == "seal" else options.sync / 1000,
    )
    unix_path = _default_unix_path(options.dir[0]) if options.unix_socket is None else options.unix_socket
    with contextlib.ExitStack() as opened:  # an error up to here has changed nothing on disk
        opened.callback(rack.close)
        fit_connections(grants, rack)
        line = await _open_bus(options, name)
        unix_listener = _listen("unix-socket", unix_path) if unix_path else None
        rack.begin()
        opened.pop_all()
    settings = Settings(
        name=name,
        capacity_bytes=options.capacity,
        buffer_bytes=options.buffers,
        hot_bytes=options.hot,
        dirty_bytes=options.dirty_bytes,
        unix_path=unix_path,
        carrier=options.carrier,
        flush_seconds=options.flush,
        etcd=options.etcd,
        unix_uids=unix_uids,
        tls=server_tls,
        peers=options.peers,
        peers_tls=tls.open_client(options.peers_tls_files),
    )
    tenancy = Tenancy(path, rack, settings, line)
    await tenancy.begin(grants)
    _show_metrics(options, LabelledMetrics(tenancy.lobby), TlsMetrics(server_tls))
    if unix_listener:
        tenancy.lobby.serve(unix_listener)
    tenancy.lobby.serve(listener)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        if server_tls:
            server_tls.reload()
        task = asyncio.get_running_loop().create_task(tenancy.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    stop = _stop_signal()
    where = ", ".join(map(str, options.dir))
    await asyncio.to_thread(rack.delete_beyond)
    logger.info("serving %d chunks of %s from %s at %s", tenancy.chunks, ", ".join(grants), where, name)
    print(f"kvstore: ready at {name}", flush=True)
    await stop.wait()
    logger.info("stopping")
    await tenancy.stop()
    if unix_path:
        Path(unix_path).unlink(missing_ok=True)
    if line:
        await line.close()


def _show_metrics(options: Options, *collectors: Collector) -> None:
    if options.metrics_port:
        for collector in collectors:
            REGISTRY.register(collector)


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _serve_one(options: Options) -> None:
    namespace = messages.checked_namespace(options.namespace)
    unix_uids, server_tls = _unix_uids(options), _open_tls(options)
    await _check_surroundings(options)
    listener = _listen("listen", options.listen)
    name = options.advertise or _actual(listener, options.listen)
    _check_peers(options.peers, name, namespace)
    unix_path = _default_unix_path(options.dir[0]) if options.unix_socket is None else options.unix_socket
    with contextlib.ExitStack() as opened:  # an error up to here has changed nothing on disk
        devices = _open_devices(options, namespace)
        for device in devices:
            opened.callback(device.close)
        is_asked = "connections" in options.model_fields_set
        asked, unasked = (options.connections, 0) if is_asked else (0, 1)
        segments = sum(device.space.open_files for device in devices)
        connections = descriptors.fit("connections", asked, unasked, options.connections, segments)
        line = await _open_bus(options, name)
        unix_listener = _listen("unix-socket", unix_path) if unix_path else None
        shelf = _open_shelf(options, namespace, devices)
        opened.pop_all()
    registration = membership.Registration(options.etcd, namespace, name) if options.etcd else None
    epoch = residency.new_epoch()
    announcer = Announcer(name, epoch, shelf.announced)
    shelf.observe(announcer)
    target = Target(
        shelf,
        name=name,
        epoch=epoch,
        namespace=namespace,
        buffer_bytes=options.buffers,
        hot_bytes=options.hot,
        dirty_bytes=options.dirty_bytes,
        flush_seconds=options.flush,
        connections_max=connections,
        unix_path=unix_path,
        carrier=options.carrier,
        unix_uids=unix_uids,
        tls=server_tls,
    )
    if options.peers:
        replicate(target, options.peers, namespace, tls.open_client(options.peers_tls_files))
    _show_metrics(options, Metrics(target), target.registry, TlsMetrics(server_tls))
    if unix_listener:
        target.serve(unix_listener)
    target.serve(listener)
    tasks: list[asyncio.Task[None]] = []
    if line:
        tasks.append(asyncio.create_task(residency.announce(announcer, line, namespace)))
        tasks.append(asyncio.create_task(report(target, line, namespace)))
        tasks.append(asyncio.create_task(warm(target, line, namespace)))
    # Always set: without a handler, SIGHUP would kill a target that has nothing to reload.
    reload = server_tls.reload if server_tls else lambda: None
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    stop = _stop_signal()
    where = ", ".join(map(str, options.dir))
    await asyncio.to_thread(shelf.delete_beyond)
    logger.info("serving %d chunks from %s at %s, epoch %d", shelf.stats().entries, where, name, epoch)
    print(f"kvstore: ready at {name}", flush=True)
    await stop.wait()
    logger.info("stopping")
    if registration:
        await asyncio.to_thread(registration.close)
    await asyncio.to_thread(target.stop)
    for task in tasks:
        task.cancel()
    await asyncio.to_thread(shelf.close)
    if unix_path:
        Path(unix_path).unlink(missing_ok=True)
    if line:
        await line.close()


def _open_devices(options: Options, namespace: str) -> list[Device]:
    """All directories and devices, locked and checked; they share the capacity. Changes nothing on disk."""
    share = options.capacity // len(options.dir)
    with contextlib.ExitStack() as opened:
        devices = []
        for path in options.dir:
            devices.append(Device(path, share, [namespace], segment_bytes=options.segment_size))
            opened.callback(devices[-1].close)
        opened.pop_all()
    return devices


def _open_shelf(options: Options, namespace: str, devices: list[Device]) -> Shelf:
    share = options.capacity // len(options.dir)
    sync_seconds = 0.0 if options.sync == "seal" else options.sync / 1000
    logs: list[Log] = []
    try:
        for device in devices:
            log = Log(device.path, share, namespace=namespace, sync_seconds=sync_seconds, device=device)
            logs.append(log)
    except BaseException:
        Shelf(logs).close()
        raise
    return Shelf(logs)


def _listen(field: str, address: str) -> socket.socket:
    try:
        return transport.listen(address)
    except ValueError:
        raise ConfigError(field, address, "host:port with a number for the port") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnavailableError(f"{field}: cannot listen on {address} ({reason}): free it, or choose another") from None


def _default_unix_path(directory: Path) -> str:
    path = str(directory.resolve() / "target.sock")
    if not directory.is_dir():
        path = f"{tempfile.gettempdir()}/kvtier-{directory.name}.sock"
    if len(path.encode()) < _UNIX_PATH_MAX:
        return path
    logger.info("no UNIX socket: the path %s is too long; give another with --unix-socket", path)
    return ""


def _actual(listener: socket.socket, asked: str) -> str:
    """The listening address, with the port that the kernel chose for port 0."""
    host, _ = transport.split_address(asked)
    return transport.join_address(host, listener.getsockname()[1])


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in tools.COMMANDS:
        sys.exit(tools.run(arguments[0], arguments[1:]))
    options = parse(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options))


if __name__ == "__main__":
    run_command("kvstore", main)
