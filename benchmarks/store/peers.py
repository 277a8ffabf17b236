"""Clients of the store's benchmark: for our store, its peers, and the bare socket that limits them all.

All have the same two calls, `put` and `get` of a batch, from and to the caller's memory. Only the standard library is
imported at the top: a peer's own interpreter runs this file, too.
"""

import contextlib
import ctypes
import importlib
import itertools
import mmap
import random
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

SOCKET_BUFFER_BYTES = 1 << 20
CALL_SECONDS = 60
SEED = 7
# Of Mooncake's values on disk: longer than any batch takes, and short enough to wait for (its default is 10 s).
MOONCAKE_LEASE_SECONDS = 2.0

Keys = Sequence[bytes]
Views = Sequence[memoryview]


class Client(Protocol):
    """A store's client. Each call returns the number of stored or received values."""

    def put(self, keys: Keys, values: Views) -> int: ...
    def get(self, keys: Keys, rooms: Views) -> int: ...


# ---- sockets


def connect(address: str) -> socket.socket:
    """A stream to `host:port` or to the path of a UNIX socket, with buffers of 1 MiB and a deadline on every call."""
    if "/" in address:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(address)
    else:
        host, _, port = address.rpartition(":")
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Python's own time-outs poll before every call; the kernel's cost nothing.
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", CALL_SECONDS, 0))
    return _enlarge(sock)


def _enlarge(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return sock


def receive(sock: socket.socket, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = sock.recv_into(into[done:])
        if not count:
            raise ConnectionResetError("the server closed the connection")
        done += count


def receive_bytes(sock: socket.socket, count: int) -> bytes:
    room = bytearray(count)
    receive(sock, memoryview(room))
    return bytes(room)


def send(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send the parts one after the other, without joining them."""
    rest = [memoryview(part) for part in parts]
    while rest:
        sent = sock.sendmsg(rest)
        while rest and sent >= len(rest[0]):
            sent -= len(rest.pop(0))
        if sent:
            rest[0] = rest[0][sent:]


class Pooled(ABC):
    """A batch in equal parts over `connections` connections, a thread for each."""

    def __init__(self, address: str, connections: int):
        self._sockets = [connect(address) for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)

    def put(self, keys: Keys, values: Views) -> int:
        return self._spread(self.put_part, keys, values)

    def get(self, keys: Keys, rooms: Views) -> int:
        return self._spread(self.get_part, keys, rooms)

    def _spread(self, call: Callable[[socket.socket, Keys, Views], int], keys: Keys, views: Views) -> int:
        share = -(-len(keys) // len(self._sockets))
        parts = [(keys[start : start + share], views[start : start + share]) for start in range(0, len(keys), share)]
        jobs = [
            self._threads.submit(call, sock, *part) for sock, part in zip(self._sockets[1:], parts[1:], strict=False)
        ]
        return call(self._sockets[0], *parts[0]) + sum(job.result() for job in jobs)

    @abstractmethod
    def put_part(self, sock: socket.socket, keys: Keys, values: Views) -> int: ...

    @abstractmethod
    def get_part(self, sock: socket.socket, keys: Keys, rooms: Views) -> int: ...


# ---- the bare socket: what any store behind one is limited by

_ASK = struct.Struct("<cQQ")  # operation, bytes a value, values


class BareSocket(Pooled):
    """sendall on one side, recv_into on the other."""

    def put_part(self, sock: socket.socket, keys: Keys, values: Views) -> int:
        sock.sendall(_ASK.pack(b"P", len(values[0]), len(values)))
        for value in values:
            sock.sendall(value)
        receive_bytes(sock, 1)
        return len(keys)

    def get_part(self, sock: socket.socket, keys: Keys, rooms: Views) -> int:
        sock.sendall(_ASK.pack(b"G", len(rooms[0]), len(rooms)))
        for room in rooms:
            receive(sock, room)
        return len(keys)


def serve_bare_socket(address: str, memory_bytes: int) -> None:
    """Answer BareSocket clients, with a thread each, from and to memory of that size, in a ring. The ring is larger
    than the CPU's cache, as a hot cache is."""
    memory = allocate(memory_bytes, random_content(memory_bytes))
    if "/" in address:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(64)
    else:
        host, _, port = address.rpartition(":")
        listener = socket.create_server((host, int(port)), backlog=64)

    rounds = itertools.count()

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), sock:
            while True:
                operation, size, count = _ASK.unpack(receive_bytes(sock, _ASK.size))
                for _ in range(count):
                    start = next(rounds) % (memory_bytes // size) * size
                    if operation == b"G":
                        sock.sendall(memory[start : start + size])
                    else:
                        receive(sock, memory[start : start + size])
                if operation == b"P":
                    sock.sendall(b".")

    while True:
        sock = _enlarge(listener.accept()[0])
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


# ---- our store


class Kvtier:
    """StoreClient as the worker plug-in uses it: it checks a checksum of every value, which no peer here does."""

    def __init__(self, address: str):
        from kvstore.net.client import Item, StoreClient
        from kvstore.net.membership import StaticMembership
        from kvstore.net.wire import Outcome

        self._item, self._outcome = Item, Outcome
        self._store = StoreClient(StaticMembership([address]))
        self.refused = 0  # puts that a busy target turned away; they were offered again

    def put(self, keys: Keys, values: Views) -> int:
        """Retry until everything is stored: a target refuses puts beyond its device's speed."""
        items = [self._item(key, value, 0, 0, 1) for key, value in zip(keys, values, strict=True)]
        deadline = time.monotonic() + CALL_SECONDS
        good = 0
        while items and time.monotonic() < deadline:
            outcomes = self._store.put(items, deadline)
            stored = outcomes.count(self._outcome.STORED)
            items = [item for item, one in zip(items, outcomes, strict=True) if one == self._outcome.REFUSED]
            good += stored
            self.refused += len(items)
            if good + len(items) < len(keys):
                break
            if not stored:
                time.sleep(0.001)
        return good

    def get(self, keys: Keys, rooms: Views) -> int:
        return self._store.get(keys, rooms, time.monotonic() + CALL_SECONDS).count(self._outcome.HIT)


class KvtierOnce(Kvtier):
    """The same, without retries of refused puts."""

    def put(self, keys: Keys, values: Views) -> int:
        items = [self._item(key, value, 0, 0, 1) for key, value in zip(keys, values, strict=True)]
        return self._store.put(items, time.monotonic() + CALL_SECONDS).count(self._outcome.STORED)


# ---- peers


class Redis(Pooled):
    """MGET and pipelined SET; the length of every header is known before it comes, so none is searched for."""

    def put_part(self, sock: socket.socket, keys: Keys, values: Views) -> int:
        for key, value in zip(keys, values, strict=True):
            send(sock, b"*3\r\n$3\r\nSET\r\n$16\r\n%b\r\n$%d\r\n" % (key, len(value)), value, b"\r\n")
        answer = b"+OK\r\n" * len(keys)
        return len(keys) if receive_bytes(sock, len(answer)) == answer else 0

    def get_part(self, sock: socket.socket, keys: Keys, rooms: Views) -> int:
        ask = b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1) + b"".join(b"$16\r\n%b\r\n" % key for key in keys)
        sock.sendall(ask)
        good, before = 0, b"*%d\r\n" % len(keys)
        for room in rooms:
            before += b"$%d\r\n" % len(room)
            if receive_bytes(sock, len(before)) != before:
                raise ConnectionError("Redis lacks a value that it was given")
            receive(sock, room)
            good, before = good + 1, b"\r\n"
        receive_bytes(sock, len(before))
        return good


class LMCache(Pooled):
    """The protocol of LMCache's server (lmcache.v1.protocol, 0.5.6), pipelined, which LMCache's own client is not."""

    _ASK = struct.Struct("iiiiiiiii150s")  # command, length, format, dtype, location, shape, key
    _ANSWER = struct.Struct("iiiiiiiii")  # code, length, format, dtype, shape, location
    _PUT, _GET, _EXIST = 1, 2, 3
    _BINARY, _UINT8, _SUCCESS = 4, 6, 200

    def _ask(self, command: int, key: bytes, length: int) -> bytes:
        name = f"benchmark@1@0@{key.hex()}@uint8".encode().ljust(150)
        return self._ASK.pack(command, length, self._BINARY, self._UINT8, 0, length, 0, 0, 0, name)

    def put_part(self, sock: socket.socket, keys: Keys, values: Views) -> int:
        for key, value in zip(keys, values, strict=True):
            send(sock, self._ask(self._PUT, key, len(value)), value)
        sock.sendall(self._ask(self._EXIST, keys[-1], 0))  # a PUT has no answer; this one comes when all are stored
        code, *_ = self._ANSWER.unpack(receive_bytes(sock, self._ANSWER.size))
        return len(keys) if code == self._SUCCESS else 0

    def get_part(self, sock: socket.socket, keys: Keys, rooms: Views) -> int:
        sock.sendall(b"".join(self._ask(self._GET, key, 0) for key in keys))
        for room in rooms:
            code, length, *_ = self._ANSWER.unpack(receive_bytes(sock, self._ANSWER.size))
            if (code, length) != (self._SUCCESS, len(room)):
                raise ConnectionError("LMCache's server lacks a value that it was given")
            receive(sock, room)
        return len(keys)


def mooncake(settings: dict[str, Any]) -> Any:
    """A MooncakeDistributedStore, set up."""
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    code = store.setup(**settings)
    if code:
        raise ConnectionError(f"Mooncake's setup answers {code}")
    return store


class Mooncake:
    """Zero-copy batches (batch_put_from, batch_get_into) over Mooncake's TCP transport."""

    def __init__(self, settings: dict[str, Any], memories: Sequence[memoryview]):
        self.store = mooncake(settings)
        for memory in memories:
            if self.store.register_buffer(address_of(memory), len(memory)):
                raise ConnectionError("Mooncake does not register the memory")

    def put(self, keys: Keys, values: Views) -> int:
        names, addresses, sizes = self._describe(keys, values)
        return int(self.store.batch_put_from(names, addresses, sizes).count(0))

    def get(self, keys: Keys, rooms: Views) -> int:
        names, addresses, sizes = self._describe(keys, rooms)
        got = self.store.batch_get_into(names, addresses, sizes)
        return sum(length == len(room) for length, room in zip(got, rooms, strict=True))

    def _describe(self, keys: Keys, views: Views) -> tuple[list[str], list[int], list[int]]:
        return [key.hex() for key in keys], [address_of(view) for view in views], [len(view) for view in views]

    def clear(self) -> None:
        self.store.remove_all(True)

    def to_disk(self, keys: Keys, owner: str, seconds: float = 30) -> bool:
        """Wait until every value is on the owner's disk, then drop the copies in its memory."""
        names = [key.hex() for key in keys]
        deadline = time.monotonic() + seconds
        while not all(self._kinds(names, "is_local_disk_replica")):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        time.sleep(1.2 * MOONCAKE_LEASE_SECONDS)  # asking gave them a lease, which keeps them in memory
        self.store.batch_replica_clear(names, owner)
        return not any(self._kinds(names, "is_memory_replica"))

    def _kinds(self, names: list[str], kind: str) -> list[bool]:
        replicas = self.store.batch_get_replica_desc(names)
        return [any(getattr(replica, kind)() for replica in replicas.get(name, ())) for name in names]


# ---- memory and values


def random_content(count: int) -> bytes:
    """Random bytes with a period of 64 MiB, too long for any compression or deduplication here."""
    piece = random.Random(SEED).randbytes(min(count, 64 << 20))
    return (piece * -(-count // len(piece)))[:count]


def allocate(count: int, content: bytes | None = None) -> memoryview:
    """Page-aligned memory, every page of it touched."""
    memory = memoryview(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    memory[:] = content if content is not None else b"\1" * count
    return memory


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
