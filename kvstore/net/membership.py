"""The set of live targets (a fixed list, or the leases in etcd), and the placement of keys on them.

A target's address is its name everywhere: in the list, in plans, on the bus. `python -m kvstore.net.membership` prints
the live targets as they change. A process that must not import etcd3 (see etcd.py) runs it as a child.
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

# TTL of a target's lease. Long enough for a machine that stalls; short enough that a dead target fails few requests.
LEASE_SECONDS = 10
POLL_SECONDS = 1.0
COMPLAIN_SECONDS = 60.0  # between log lines while etcd does not answer
TARGETS_MAX = 4096  # placement of a key costs one hash per target


class Membership(Protocol):
    """The live targets. `targets` is thread-safe and does not block."""

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
    """The targets registered under a namespace in etcd. While etcd does not answer, the last known ones."""

    def __init__(self, servers: str, namespace: str):
        self._etcd = Etcd(servers)
        self._prefix = _prefix(namespace)
        self._ignored = 0  # registrations, in the last poll
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
                    logger.warning("keeping the last known targets: %s", error)
        self._etcd.close()

    def _read(self) -> tuple[str, ...]:
        found = {value for value, _ in self._etcd.call(lambda client: list(client.get_prefix(self._prefix)))}
        targets = sorted(address for value in found if (address := _as_address(value)))[:TARGETS_MAX]
        if len(targets) != len(found) - self._ignored:
            self._ignored = len(found) - len(targets)
            if self._ignored:
                logger.warning(
                    "etcd: ignored %d registrations: not host:port, or over the limit of %d targets",
                    self._ignored,
                    TARGETS_MAX,
                )
        return tuple(targets)


class ChildMembership:
    """EtcdMembership in a child process, which writes one JSON list a line to its standard output."""

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
        logger.warning("membership process exited with code %s: keeping the last known targets", self._child.wait())


class Registration:
    """A target's lease in etcd, renewed by a thread until `close`."""

    def __init__(self, servers: str, namespace: str, target: str):
        self._etcd = Etcd(servers)
        self._key = _prefix(namespace) + target
        self._target = target
        self._closed = threading.Event()
        self._lease = self._etcd.call(self._register)
        self._thread = threading.Thread(target=self._keep, name="kvtier-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Revoke the lease, so that clients see the target leave before its TTL ends."""
        self._closed.set()
        self._thread.join(LEASE_SECONDS)
        with contextlib.suppress(UnavailableError):
            self._etcd.call(lambda client: client.revoke_lease(self._lease))
        self._etcd.close()

    def _register(self, client: Any) -> int:
        """Register the target; return the lease's ID."""
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
                    logger.warning("cannot renew the lease of %s, it may expire: %s", self._target, error)


def check_etcd(servers: str) -> None:
    """Raises UnavailableError if no server answers."""
    etcd = Etcd(servers)
    try:
        etcd.call(lambda client: client.revoke_lease(client.lease(LEASE_SECONDS).id))  # needs no access to any key
    finally:
        etcd.close()


def open_membership(stores: str, namespace: str, *, isolated: bool = False) -> Membership:
    """The membership that `stores` describes: a list of targets (`host:port,host:port`), or `etcd://` and a list of
    etcd servers. With `isolated`, this process does not import etcd3. Raises ConfigError and UnavailableError."""
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
        raise ConfigError(field, address, "host:port with a number for the port") from None
    return address


def target_for(key: bytes, targets: Sequence[str]) -> str | None:
    """The target that stores `key`, by rendezvous hashing (Thaler and Ravishankar, 1998): when a target joins or
    leaves, only its share of the keys moves. None without targets."""
    return max(targets, key=lambda target: _weight(key, target), default=None)


def other_target(key: bytes, targets: Sequence[str], target: str | None) -> str | None:
    """The first of the two targets for `key` that is not `target`; None if there is no other."""
    two = heapq.nlargest(2, targets, key=lambda one: _weight(key, one))
    return next((one for one in two if one != target), None)


def _weight(key: bytes, target: str) -> int:
    return xxhash.xxh3_64_intdigest(key + target.encode())


def _as_address(value: bytes) -> str | None:
    """A registered value as an address; None if it is not one."""
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
