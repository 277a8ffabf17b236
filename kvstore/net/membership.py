"""Which targets there are: a fixed list, or those that hold a lease in etcd. Also where each key belongs.

A target is known by its address everywhere: in the list, in plans, on the bus. `python -m kvstore.net.membership`
prints the live targets as they change; a process that must not import etcd3 (see `_etcd`) reads them from there.
"""

import argparse
import contextlib
import heapq
import logging
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec
import xxhash

from kvstore.errors import ConfigError, UnavailableError, run_command
from kvstore.net.etcd import Etcd, checked_servers
from kvstore.net.transport import split_address
from kvstore.rarely import Rarely
from kvstore.text import NAME_CHARACTERS_MAX, is_plain

logger = logging.getLogger(__name__)

# Long enough for a stalled machine to come back, short enough that a dead target is not asked for many requests.
LEASE_SECONDS = 10
POLL_SECONDS = 1.0
COMPLAIN_SECONDS = 60.0  # of an etcd that is away
TARGETS_MAX = 4096  # each is looked at for every key


class Membership(Protocol):
    """The live targets. `targets` may be called from any thread, at any time, and does not block."""

    def targets(self) -> Sequence[str]: ...
    def close(self) -> None: ...


class StaticMembership:
    """A fixed list of addresses."""

    def __init__(self, addresses: Iterable[str]):
        self._addresses = tuple(dict.fromkeys(addresses))
        for address in self._addresses:
            checked_address("store", address)

    def targets(self) -> Sequence[str]:
        return self._addresses

    def close(self) -> None:
        pass


class EtcdMembership:
    """The targets registered under a namespace in etcd; the last known ones while etcd does not answer."""

    def __init__(self, servers: str, namespace: str):
        self._etcd = Etcd(servers)
        self._prefix = _prefix(namespace)
        self._ignored = 0  # registrations, in the last look
        self._closed = threading.Event()
        self._targets = self._read()
        threading.Thread(target=self._poll, name="kvtier-etcd", daemon=True).start()

    def targets(self) -> Sequence[str]:
        return self._targets

    def close(self) -> None:
        self._closed.set()

    def _poll(self) -> None:
        complains = Rarely(COMPLAIN_SECONDS)
        while not self._closed.wait(POLL_SECONDS):
            try:
                self._targets = self._read()
            except UnavailableError as error:
                if complains():
                    logger.warning("keeping the targets known: %s", error)
        self._etcd.close()

    def _read(self) -> tuple[str, ...]:
        found = {value for value, _ in self._etcd.call(lambda client: list(client.get_prefix(self._prefix)))}
        targets = sorted(address for value in found if (address := _as_address(value)))[:TARGETS_MAX]
        if len(targets) != len(found) - self._ignored:
            self._ignored = len(found) - len(targets)
            if self._ignored:
                logger.warning("etcd: %d registrations are ignored: no addresses, or too many", self._ignored)
        return tuple(targets)


class ChildMembership:
    """EtcdMembership in a process of its own: one JSON list a line comes through its standard output."""

    def __init__(self, servers: str, namespace: str):
        self._targets: tuple[str, ...] = ()
        command = [sys.executable, "-m", "kvstore.net.membership", "--etcd", servers, "--namespace", namespace]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, name="kvtier-membership", daemon=True).start()

    def targets(self) -> Sequence[str]:
        return self._targets

    def close(self) -> None:
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(2)

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._targets = tuple(msgspec.json.decode(line, type=list[str]))
        logger.warning("the membership process ended with %s, keeping the targets known", self._child.wait())


class Registration:
    """A target's own lease."""

    def __init__(self, servers: str, namespace: str, target: str):
        self._etcd = Etcd(servers)
        self._key = _prefix(namespace) + target
        self._target = target
        self._closed = threading.Event()
        self._lease = self._etcd.call(self._register)
        self._thread = threading.Thread(target=self._keep, name="kvtier-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave at once, rather than when the lease runs out."""
        self._closed.set()
        self._thread.join(LEASE_SECONDS)
        with contextlib.suppress(UnavailableError):
            self._etcd.call(lambda client: client.revoke_lease(self._lease))
        self._etcd.close()

    def _register(self, client: Any) -> int:
        """The lease's number."""
        lease = client.lease(LEASE_SECONDS)
        client.put(self._key, self._target, lease=lease)
        return int(lease.id)

    def _keep(self) -> None:
        complains = Rarely(COMPLAIN_SECONDS)
        while not self._closed.wait(LEASE_SECONDS / 3):
            try:
                (answer,) = self._etcd.call(lambda client: list(client.refresh_lease(self._lease)))
                if answer.TTL <= 0:
                    self._lease = self._etcd.call(self._register)
            except UnavailableError as error:
                if complains():
                    logger.warning("the lease of %s may run out: %s", self._target, error)


def check_etcd(servers: str) -> None:
    """Raises UnavailableError if no server answers."""
    etcd = Etcd(servers)
    try:
        etcd.call(lambda client: client.revoke_lease(client.lease(LEASE_SECONDS).id))  # a role may be for one key
    finally:
        etcd.close()


def open_membership(stores: str, namespace: str, *, isolated: bool = False) -> Membership:
    """The membership that `stores` describes: `host:port,host:port`, or `etcd://` and the same of etcd's servers. With
    `isolated`, etcd3 is not imported into this process. Raises ConfigError and UnavailableError."""
    if stores.startswith("etcd://"):
        servers = stores.removeprefix("etcd://").rstrip("/")
        checked_servers("store", servers)
        return ChildMembership(servers, namespace) if isolated else EtcdMembership(servers, namespace)
    return StaticMembership(part.strip() for part in stores.split(",") if part.strip())


def checked_address(field: str, address: str) -> str:
    """The address, if it is host:port. Raises ConfigError."""
    try:
        split_address(address)
    except ValueError:
        raise ConfigError(field, address, "host:port") from None
    return address


def place(key: bytes, targets: Sequence[str]) -> str | None:
    """The target that keeps `key`, by rendezvous hashing (Thaler and Ravishankar, 1998): when a target comes or goes,
    only its share moves."""
    return max(targets, key=lambda target: _weight(key, target), default=None)


def other_place(key: bytes, targets: Sequence[str], target: str | None) -> str | None:
    """Of the two targets that may keep `key` the first that is not `target`; None if there is no other."""
    two = heapq.nlargest(2, targets, key=lambda one: _weight(key, one))
    return next((one for one in two if one != target), None)


def _weight(key: bytes, target: str) -> int:
    return xxhash.xxh3_64_intdigest(key + target.encode())


def _as_address(value: bytes) -> str | None:
    """What somebody registered, if it is the address of a target."""
    address = value.decode("ascii", errors="replace")
    try:
        split_address(address)
    except ValueError:
        return None
    return address if is_plain(address, NAME_CHARACTERS_MAX) else None


def _prefix(namespace: str) -> str:
    return f"/kvtier/{namespace}/targets/"


def main() -> None:
    """Print the live targets, one JSON list a line, when they change; end when standard input does."""
    parser = argparse.ArgumentParser(prog="python -m kvstore.net.membership", description=main.__doc__)
    parser.add_argument("--etcd", required=True, help="host:port of an etcd server, or of several")
    parser.add_argument("--namespace", default="default")
    options = parser.parse_args()
    membership = EtcdMembership(options.etcd, options.namespace)
    shown: Sequence[str] | None = None
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        if membership.targets() != shown:
            shown = membership.targets()
            print(msgspec.json.encode(list(shown)).decode(), flush=True)


if __name__ == "__main__":
    run_command("kvstore.net.membership", main)
