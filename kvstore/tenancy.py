"""The namespaces of one target: each has a shelf within its quota, buffers, queues and announcements. Also applies
changes of the namespaces file."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore import descriptors
from kvstore.bus import messages, residency
from kvstore.bus.messages import TargetReport, Warm, Warmed
from kvstore.bus.residency import Announcer, unhurried
from kvstore.credentials import Credential
from kvstore.disk.shelf import Rack
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net import tenants
from kvstore.net.client import StoreClient
from kvstore.net.lobby import Lobby
from kvstore.net.membership import Registration, open_membership
from kvstore.net.target import Target
from kvstore.net.tenants import Grants, Tenant
from kvstore.net.tls import ClientTls, ServerTls
from kvstore.net.wire import Outcome

if TYPE_CHECKING:
    from kvstore.bus.connection import Bus

logger = logging.getLogger(__name__)

# Each namespace gets the share of --buffers, --hot and --dirty that its quota has of the capacity, but at least this
# much of --buffers: less would hold only a few chunks of some MiB in flight.
BUFFER_BYTES_MIN = 32 << 20
# Queue limit for warm-up requests; more are dropped. They are answered one after the other. Each walks the target's
# entries, about 0.1 s per million, while GETs continue.
_WARMS_WAITING_MAX = 8
# Hits of the seconds before count less by this factor a second: the last five or so decide.
_HITS_KEPT = 0.8
_WALK_ENTRIES = 4096  # per step of the walk: 0.1 ms


@dataclass(frozen=True)
class Settings:
    """Settings that all namespaces of a target share."""

    name: str
    capacity_bytes: int
    buffer_bytes: int
    hot_bytes: int
    dirty_bytes: int
    flush_seconds: float
    unix_path: str
    carrier: str
    etcd: str | None
    unix_uids: frozenset[int] | None
    tls: ServerTls | None
    peers: str | None  # the targets for replication, as in workers' --store; None: no replication
    peers_tls: ClientTls | None


@dataclass
class _Served:
    target: Target
    tasks: list[asyncio.Task[None]]
    registration: Registration | None
    replicates_as: Credential | None = None


class Tenancy:
    """Serves the namespaces of a file. For one event loop. Owns `rack`: `stop` closes it."""

    def __init__(self, path: Path, rack: Rack, settings: Settings, line: "Bus | None"):
        self.lobby = Lobby(settings.unix_uids, settings.tls)
        self._path = path
        self._rack = rack
        self._settings = settings
        self._line = line
        self._served: dict[str, _Served] = {}
        self._changing = asyncio.Lock()

    @property
    def chunks(self) -> int:
        return sum(shelf.stats().entries for shelf in self._rack.shelves.values())

    async def begin(self, grants: Grants) -> None:
        for tenant, credential in grants.values():
            await self._open(tenant, credential)

    async def reload(self) -> None:
        """Read the file again and apply it. An invalid file is logged, and changes nothing."""
        async with self._changing:
            try:
                grants = await asyncio.to_thread(tenants.load, self._path)
                self._rack.check(grants.quotas)
                fit_connections(grants, self._rack)
            except ConfigError as error:
                logger.error("keeping the old namespaces: %s", error)
                return
            try:
                await self._change(grants)
            except (ConfigError, UnavailableError) as error:
                logger.error("the namespaces file was applied only in part: %s", error)
            except Exception:
                logger.exception("the namespaces file was applied only in part")
            else:
                logger.info("serving the namespaces %s", ", ".join(self._served))

    async def stop(self) -> None:
        async with self._changing:
            for served in self._served.values():
                if served.registration:
                    await asyncio.to_thread(served.registration.close)
            await asyncio.to_thread(self.lobby.stop)
            for served in self._served.values():
                for task in served.tasks:
                    task.cancel()
            await asyncio.to_thread(self._rack.close)

    async def _change(self, grants: Grants) -> None:
        for name in [name for name in self._served if name not in grants]:
            await self._close(name)
        await asyncio.to_thread(self._rack.change, grants.quotas)
        for name, (tenant, credential) in grants.items():
            if name not in self._served:
                await self._open(tenant, credential)
                continue
            target = self._served[name].target
            target.connections_max = tenant.connections
            target.readable, target.writable = _rights(tenant)
            self.lobby.admit(name, target, credential)
            await self._replicate(name, credential)

    async def _open(self, tenant: Tenant, credential: Credential) -> None:
        settings, shelf = self._settings, self._rack.shelves[tenant.name]
        registration = None
        if settings.etcd:
            registration = await asyncio.to_thread(Registration, settings.etcd, tenant.name, settings.name)
        epoch = residency.new_epoch()
        announcer = Announcer(settings.name, epoch, shelf.announced)
        shelf.observe(announcer)
        share = tenant.quota / settings.capacity_bytes
        readable, writable = _rights(tenant)
        target = Target(
            shelf,
            name=settings.name,
            epoch=epoch,
            namespace=tenant.name,
            buffer_bytes=max(BUFFER_BYTES_MIN, int(settings.buffer_bytes * share)),
            hot_bytes=int(settings.hot_bytes * share),
            dirty_bytes=int(settings.dirty_bytes * share),
            flush_seconds=settings.flush_seconds,
            connections_max=tenant.connections,
            unix_path=settings.unix_path,
            carrier=settings.carrier,
            readable=readable,
            writable=writable,
        )
        tasks = []
        if self._line:
            tasks.append(asyncio.create_task(residency.announce(announcer, self._line, tenant.name)))
            tasks.append(asyncio.create_task(report(target, self._line, tenant.name)))
            tasks.append(asyncio.create_task(warm(target, self._line, tenant.name)))
        self._served[tenant.name] = _Served(target, tasks, registration)
        self.lobby.admit(tenant.name, target, credential)
        await self._replicate(tenant.name, credential)

    async def _replicate(self, name: str, credential: Credential) -> None:
        """Start replication with this credential. If that fails, clients are served without it, and the next reload
        retries."""
        peers, tls, served = self._settings.peers, self._settings.peers_tls, self._served[name]
        if not peers or served.replicates_as == credential:
            return
        try:
            await asyncio.to_thread(replicate, served.target, peers, name, tls, credential=credential)
        except UnavailableError as error:
            logger.error("namespace %s: cannot start replication, the next reload retries: %s", name, error)
        else:
            served.replicates_as = credential

    async def _close(self, name: str) -> None:
        served = self._served.pop(name)
        if served.registration:
            await asyncio.to_thread(served.registration.close)
        await asyncio.to_thread(self.lobby.expel, name)
        for task in served.tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def fit_connections(grants: Grants, rack: Rack) -> None:
    """If there are too few descriptors, lower the connections of the tenants that set no number. Raises ConfigError if
    that is not enough."""
    asked = sum(tenant.connections for tenant, _ in grants.values() if "connections" in tenant.model_fields_set)
    others = [name for name, (tenant, _) in grants.items() if "connections" not in tenant.model_fields_set]
    each = descriptors.fit("namespaces: connections", asked, len(others), tenants.CONNECTIONS, rack.open_files)
    for name in others:
        tenant, credential = grants[name]
        grants[name] = tenant.model_copy(update={"connections": each}), credential


def _rights(tenant: Tenant) -> tuple[bool, bool]:
    return tenant.access != "write", tenant.access != "read"


def replicate(
    target: Target, peers: str, namespace: str, tls: ClientTls | None, *, credential: Credential | None = None
) -> None:
    """Start replication of the chunks that are read to `peers`. Raises UnavailableError if etcd does not answer."""
    targets = open_membership(peers, namespace)
    client = StoreClient(
        targets, namespace=namespace, name="replicas", connections_per_target=1, credential=credential, tls=tls
    )
    target.replicate(client, targets)


async def warm(target: Target, line: "Bus", namespace: str) -> None:
    """Prefetch what routers request, until cancelled. All routers share one peer's limits, because the bus does not
    authenticate them."""

    async def asked(request: Warm) -> Warmed:
        return await asyncio.to_thread(_warmed, target, request)

    to = messages.subject(namespace, "warm", target.name)
    subscription = await line.subscribe(to, Warm, asked, waiting_max=_WARMS_WAITING_MAX)
    try:
        await asyncio.Event().wait()
    finally:
        await line.unsubscribe(subscription)  # the namespace may come back, with another target


def _warmed(target: Target, request: Warm) -> Warmed:
    keys: dict[int, bytes] = {}
    for part in unhurried(target.shelf.keys_of(request.fingerprint, request.hashes, _WALK_ENTRIES)):
        keys = part | keys
        if len(keys) == len(set(request.hashes)):
            break
    outcomes = Counter(target.prefetch([keys[one] for one in request.hashes if one in keys], "bus"))
    reading, refused = outcomes[Outcome.STORED], outcomes[Outcome.REFUSED]
    absent = len(request.hashes) - outcomes[Outcome.HIT] - reading - refused
    return Warmed(target.name, outcomes[Outcome.HIT], reading, refused, absent)


async def report(target: Target, line: "Bus", namespace: str) -> None:
    """Publish the target's load to the routers once a second, until cancelled."""
    before, then = target.status(), time.monotonic()
    from_memory = from_devices = 0.0
    while True:
        await asyncio.sleep(messages.HEARTBEAT_SECONDS)
        status, now = target.status(), time.monotonic()
        from_memory = _HITS_KEPT * from_memory + status.hot_hits - before.hot_hits
        from_devices = _HITS_KEPT * from_devices + status.device_hits - before.device_hits
        report = TargetReport(
            target=status.target,
            epoch=status.epoch,
            sent_bytes_per_second=(status.sent_bytes - before.sent_bytes) / (now - then),
            received_bytes_per_second=(status.received_bytes - before.received_bytes) / (now - then),
            device_bytes_per_second=target.device_bytes_per_second,
            waiting_read_bytes=status.waiting_read_bytes,
            waiting_write_bytes=status.waiting_write_bytes,
            capacity_bytes=status.capacity_bytes,
            payload_bytes=status.payload_bytes,
            connections=status.connections,
            ts_ms=time.time_ns() // 1_000_000,
            evicted_age_seconds=status.evicted_age_seconds,
            corrupt_chunks=status.corrupt_entries,
            failed_writes=status.failed_writes,
            memory_share=from_memory / hits if (hits := from_memory + from_devices) else 0.0,
        )
        await line.publish(messages.subject(namespace, "speed.target", target.name), report)
        before, then = status, now
