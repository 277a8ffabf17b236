"""Frames over a socket, with a deadline on every byte. Both sides of the protocol stand on this.

Blocking sockets and one thread a connection: with values of 256 KiB and more the interpreter is idle in the system
call, and a plain sendmsg/recv_into loop reaches what the loopback device can carry (benchmarks/store/).
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
# 1 MiB of socket buffer lets one wake-up move one MiB; the default of 200 KiB halves the speed on loopback.
SOCKET_BUFFER_BYTES = 1 << 20
# On one host what is sent is better received while it is still in the processor's cache: over TCP 128 KiB carry half as
# much again as 1 MiB. A UNIX socket copies less and gains from fewer wake-ups: where cores are many 512 KiB carry more
# than 256 KiB, and 1 MiB no more than that; where they are few all three are alike. A network needs more for its delay.
_NEAR_TCP_BUFFER_BYTES = 128 << 10
_UNIX_BUFFER_BYTES = 512 << 10
Bytes = bytes | bytearray | memoryview
_SEND_PARTS_MAX = 512  # below IOV_MAX
PATIENCE_SECONDS = 3600.0
# A peer whose host is gone says nothing any more. One that is idle is probed after 15 s; one that does not acknowledge
# what it was sent, or answers no probe, is given up after as long as one that stalls (target.py).
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms
)
_STALL_LOOK_SECONDS = 1.0
Resolved: TypeAlias = list[tuple[Any, ...]]  # of socket.getaddrinfo
_lookups: dict[tuple[str, int], "Future[Resolved]"] = {}  # under way
_lookups_lock = threading.Lock()


class Cancelled(Exception):
    """The caller no longer wants what it waits for."""


class Stream:
    """A connected socket that carries frames. Every `deadline` is a time.monotonic() value. Not thread-safe; `twin`
    gives another thread a stream of its own on the same connection.

    Raises TimeoutError when a deadline passes, ConnectionError when the peer is gone, wire.ProtocolError for nonsense.
    After any of them the stream is in the middle of something and must be closed.
    """

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._header = bytearray(HEADER_BYTES)
        self.received_bytes = 0
        self.carrier_target: Any = None  # of a client: how payloads are fetched (carrier.py)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in _KEEPALIVE:
                sock.setsockopt(*option)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _send_buffer_bytes(sock))

    def send(self, parts: Sequence[Bytes], deadline: float, given_up: Callable[[], bool] | None = None) -> None:
        """Send the parts one after the other, without joining them. `given_up` is asked when the peer has taken nothing
        for a second: if so, that is a TimeoutError before the deadline."""
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
        """Fill `into` (bytes) straight from the socket. `cancelled` is asked between reads."""
        for _ in self._pieces(into, deadline, cancelled):
            pass

    def receive_checksum(self, into: memoryview, deadline: float, cancelled: Callable[[], bool] | None = None) -> int:
        """Like `receive`; returns the crc32c, computed while the data is still in the processor's cache."""
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
        """How many bytes from the first part on need not be sent again."""
        self._arm(deadline)
        return self._socket.sendmsg(parts[:_SEND_PARTS_MAX])

    def _receive_some(self, into: memoryview, deadline: float) -> int:
        """How many bytes of `into` were filled: at least one, or 0 at the end of the connection."""
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
        """Give the peer, on a UNIX socket, a file of this process: with a byte of its own."""
        self._arm(deadline)
        socket.send_fds(self._socket, [b"\0"], [descriptor])

    def receive_descriptor(self, deadline: float) -> int:
        """What `send_descriptor` sent; the caller closes it."""
        self._arm(deadline)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            raise ConnectionError("a file was expected of the peer, none came")
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
        """Who is at the other end, as the kernel says: an IP address, or a user of this host. Raises OSError."""
        return f"user {_peer_uid(self._socket)}" if self.is_unix else str(self._socket.getpeername()[0])

    def twin(self) -> "Stream":
        return Stream(self._socket.dup())

    def wait_for_frame(self) -> bool:
        """Block, without a deadline, until a frame begins; False if the peer closed the connection instead."""
        # Never without a timeout: that would make the socket a blocking one for its twin, too.
        self._socket.settimeout(PATIENCE_SECONDS)
        while True:
            with contextlib.suppress(TimeoutError):
                return bool(self._socket.recv(1, socket.MSG_PEEK))

    def is_idle(self) -> bool:
        """Whether the peer is still there and has nothing to say; for a connection that waited in a pool."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def stop_receiving(self) -> None:
        """From another thread: the stream's next read finds the end, what is being sent is still sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """From another thread: whoever sends or receives finds the connection broken."""
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
    """The system's look-up knows no deadline: it has a thread of its own, which all share who ask for the same name."""
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
    except Exception as error:  # of the system, or of a name that is none
        lookup.set_exception(error)
    finally:
        with _lookups_lock:
            del _lookups[host, port]


def listen(address: str) -> socket.socket:
    """A listening socket on `host:port` or on a UNIX socket path, which is replaced if nobody listens there. On
    `[::]:port` it takes IPv4, too, whatever the system's default is."""
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
                    raise  # somebody answers: it is theirs
            Path(path).unlink(missing_ok=True)
            sock.bind(path)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def _peer_uid(sock: socket.socket) -> int:
    """The user of the process at the other end of a UNIX socket, as the kernel says."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)


def is_permitted(sock: socket.socket, uids: Collection[int] | None) -> bool:
    """Whether the process at the other end of a UNIX socket runs as one of these users; True on any other socket, and
    if anybody may."""
    if uids is None or sock.family != socket.AF_UNIX:
        return True
    uid = _peer_uid(sock)
    if uid not in uids:
        logger.warning("user %d may not use the UNIX socket; --unix-uids names those who may", uid)
    return uid in uids


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError that says what is expected."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host or "[" in host:
        raise ValueError(f"{address!r} is not host:port; of IPv6 that is [host]:port")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether a host stands for all addresses of the machine: one can listen there, and reach nobody."""
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)  # it takes 0 for 0.0.0.0
    except (socket.gaierror, UnicodeError):  # a name
        return False
    return all(ipaddress.ip_address(where[0]).is_unspecified for *_, where in found)


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine and nobody else reaches it there."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def boot_id() -> str:
    """The kernel's own id: two processes that read the same one are on the same host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
