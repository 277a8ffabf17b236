"""Frames over a socket, with a deadline on every byte. Client and target both use this.

Blocking sockets and one thread per connection: with values of 256 KiB and more, the time is spent in system calls
without the interpreter's lock. A plain sendmsg/recv_into loop saturates the loopback device (benchmarks/store/).
"""

import contextlib
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias

from crc32c import crc32c

from kvstore.net.wire import HEADER_BYTES, Header, decode_header

logger = logging.getLogger(__name__)

_PEER = struct.Struct("iII")  # struct ucred: process, user, group
# A buffer of 1 MiB moves 1 MiB per wake-up; the default of 200 KiB halves the throughput on loopback.
SOCKET_BUFFER_BYTES = 1 << 20
# On one host, a small buffer is received while it is still in the CPU's cache: over TCP, 128 KiB reaches 1.5 times the
# throughput of 1 MiB. A UNIX socket copies less and gains from fewer wake-ups: with many cores, 512 KiB beats 256 KiB,
# and 1 MiB adds nothing; with few cores all three are equal. A network needs the larger buffer for its delay.
_NEAR_TCP_BUFFER_BYTES = 128 << 10
_UNIX_BUFFER_BYTES = 512 << 10
Bytes = bytes | bytearray | memoryview
_SEND_PARTS_MAX = 512  # below IOV_MAX
PATIENCE_SECONDS = 3600.0
# Detects a peer whose host is gone. An idle peer is probed after 15 s. A peer that acknowledges neither data nor probes
# is dropped after 30 s, the timeout of a peer that stalls (target.py).
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms
)
_STALL_LOOK_SECONDS = 1.0
Resolved: TypeAlias = list[tuple[Any, ...]]  # of socket.getaddrinfo
_lookups: dict[tuple[str, int], "Future[Resolved]"] = {}  # in progress
_lookups_lock = threading.Lock()


class Cancelled(Exception):
    """The caller cancelled the transfer."""


class Stream:
    """A connected socket that carries frames. Every `deadline` is a time.monotonic() value. Not thread-safe; `twin`
    gives another thread a stream of its own on the same connection.

    Raises TimeoutError when a deadline passes, ConnectionError when the peer is gone, wire.ProtocolError for a frame
    that violates the protocol. After any of these the stream may be in the middle of a frame and must be closed.
    """

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._header = bytearray(HEADER_BYTES)
        self.received_bytes = 0
        self.carrier_target: Any = None  # client side: the carrier's connection to the target (carrier.py)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in _KEEPALIVE:
                sock.setsockopt(*option)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _send_buffer_bytes(sock))

    def send(self, parts: Sequence[Bytes], deadline: float, given_up: Callable[[], bool] | None = None) -> None:
        """Send the parts one after the other, without joining them. `given_up` is polled after each second without
        progress; if it returns True, this raises TimeoutError before the deadline."""
        rest = [memoryview(part).cast("B") for part in parts if len(part)]
        while rest:
            until = deadline if given_up is None else min(deadline, time.monotonic() + _STALL_LOOK_SECONDS)
            try:
                sent = self._send_some(rest, until)
            except TimeoutError:
                if given_up is None or given_up() or time.monotonic() >= deadline:
                    raise
                continue
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def receive(self, into: memoryview, deadline: float, cancelled: Callable[[], bool] | None = None) -> None:
        """Fill `into` (bytes) directly from the socket. `cancelled` is polled between reads."""
        for _ in self._pieces(into, deadline, cancelled):
            pass

    def receive_checksum(self, into: memoryview, deadline: float, cancelled: Callable[[], bool] | None = None) -> int:
        """Like `receive`; returns the crc32c, computed while the data is still in the CPU's cache."""
        crc = 0
        for piece in self._pieces(into, deadline, cancelled):
            crc = crc32c(piece, crc)
        return crc

    def _pieces(self, into: memoryview, deadline: float, cancelled: Callable[[], bool] | None) -> Iterator[memoryview]:
        done = 0
        while done < len(into):
            if cancelled is not None and cancelled():
                raise Cancelled
            count = self._receive_some(into[done:], deadline)
            if count == 0:
                raise ConnectionResetError("the peer closed the connection")
            yield into[done : done + count]
            done += count
            self.received_bytes += count

    def _send_some(self, parts: Sequence[memoryview], deadline: float) -> int:
        """The number of bytes, from the start of `parts`, that were sent."""
        self._arm(deadline)
        return self._socket.sendmsg(parts[:_SEND_PARTS_MAX])

    def _receive_some(self, into: memoryview, deadline: float) -> int:
        """The number of bytes received into `into`: at least one; 0 at the end of the connection."""
        self._arm(deadline)
        return self._socket.recv_into(into)

    def receive_header(self, deadline: float, cancelled: Callable[[], bool] | None = None) -> Header:
        self.receive(memoryview(self._header), deadline, cancelled)
        return decode_header(self._header)

    def receive_control(self, header: Header, deadline: float) -> bytearray:
        control = bytearray(header.control_bytes)
        self.receive(memoryview(control), deadline)
        return control

    def send_descriptor(self, descriptor: int, deadline: float) -> None:
        """Pass a file descriptor to the peer over a UNIX socket, together with one byte."""
        self._arm(deadline)
        socket.send_fds(self._socket, [b"\0"], [descriptor])

    def receive_descriptor(self, deadline: float) -> int:
        """The descriptor that the peer's `send_descriptor` passed; the caller closes it."""
        self._arm(deadline)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            raise ConnectionError("the peer sent no file descriptor")
        return descriptors[0]

    @property
    def is_unix(self) -> bool:
        return self._socket.family == socket.AF_UNIX

    @property
    def is_own_user(self) -> bool:
        """Whether the peer is on this host and runs as the same user."""
        return self.is_unix and _peer_uid(self._socket) == os.getuid()

    @property
    def peer(self) -> str:
        """The peer's identity from the kernel: an IP address, or a user of this host. Raises OSError."""
        return f"user {_peer_uid(self._socket)}" if self.is_unix else str(self._socket.getpeername()[0])

    def twin(self) -> "Stream":
        return Stream(self._socket.dup())

    def wait_for_frame(self) -> bool:
        """Block, without a deadline, until a frame begins; False if the peer closed the connection instead."""
        # Always with a timeout: without one, the socket would block for its twin, too.
        self._socket.settimeout(PATIENCE_SECONDS)
        while True:
            with contextlib.suppress(TimeoutError):
                return bool(self._socket.recv(1, socket.MSG_PEEK))

    def is_idle(self) -> bool:
        """Whether the connection is open with nothing to receive. For connections from a pool."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def stop_receiving(self) -> None:
        """From another thread: the stream's next read finds the end of the connection. Sends continue."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """From another thread: break the connection for sends and receives that are running."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def _arm(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def _send_buffer_bytes(sock: socket.socket) -> int:
    if sock.family == socket.AF_UNIX:
        return _UNIX_BUFFER_BYTES
    near = sock.getsockname()[0] == sock.getpeername()[0]
    return _NEAR_TCP_BUFFER_BYTES if near else SOCKET_BUFFER_BYTES


def connect(address: str, deadline: float) -> Stream:
    """Open a stream to `host:port`, `[v6]:port` or the path of a UNIX socket (anything with a slash)."""
    return Stream(connected(address, deadline))


def connected(address: str, deadline: float) -> socket.socket:
    """A socket for `connect`. A name's addresses are tried one after the other, each for its share of the time."""
    if "/" in address:
        return _connected(socket.AF_UNIX, address, deadline)
    *others, last = _resolved(*split_address(address), deadline)
    for number, (family, _, _, _, where) in enumerate(others):
        now = time.monotonic()
        with contextlib.suppress(OSError):
            return _connected(family, where, now + (deadline - now) / (len(others) + 1 - number))
    return _connected(last[0], last[4], deadline)


def _connected(family: int, where: Any, deadline: float) -> socket.socket:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(left)
        sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


def _resolved(host: str, port: int, deadline: float) -> Resolved:
    """Addresses of a name. The system's lookup has no deadline, so it runs in a thread; concurrent callers with the
    same name share one lookup. Raises TimeoutError."""
    with contextlib.suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    with _lookups_lock:
        lookup = _lookups.get((host, port))
        if lookup is None:
            lookup = Future()
            threading.Thread(target=_look_up, args=(host, port, lookup), name="kvtier-names", daemon=True).start()
            _lookups[host, port] = lookup
    return lookup.result(max(0.0, deadline - time.monotonic()))


def _look_up(host: str, port: int, lookup: "Future[Resolved]") -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as error:  # from the system, or because the name is invalid
        lookup.set_exception(error)
    finally:
        with _lookups_lock:
            del _lookups[host, port]


def listen(address: str) -> socket.socket:
    """A listening socket on `host:port` or on a UNIX socket path, which is replaced if no process listens there. On
    `[::]:port` it also accepts IPv4, whatever the system's default is."""
    if "/" in address:
        return _listen_unix(address)
    host, port = split_address(address)
    families = {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    both = family == socket.AF_INET6 and is_wildcard(host) and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise  # another process listens there
            Path(path).unlink(missing_ok=True)
            sock.bind(path)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def _peer_uid(sock: socket.socket) -> int:
    """The user of the process at the other end of a UNIX socket, from the kernel."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)


def is_permitted(sock: socket.socket, uids: Collection[int] | None) -> bool:
    """Whether the process at the other end of a UNIX socket runs as one of these users. True for any other socket, and
    if `uids` is None."""
    if uids is None or sock.family != socket.AF_UNIX:
        return True
    uid = _peer_uid(sock)
    if uid not in uids:
        logger.warning("refused user %d on the UNIX socket: not in --unix-uids", uid)
    return uid in uids


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError, whose text says what is expected."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host or "[" in host:
        raise ValueError(f"{address!r} is not host:port; for IPv6 write [host]:port")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether a host means all addresses of the machine: valid for listening, not for connecting."""
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)  # reads "0" as 0.0.0.0
    except (socket.gaierror, UnicodeError):  # a name
        return False
    return all(ipaddress.ip_address(where[0]).is_unspecified for *_, where in found)


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is reachable only from this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def boot_id() -> str:
    """The kernel's boot ID: two processes that read the same ID are on the same host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
