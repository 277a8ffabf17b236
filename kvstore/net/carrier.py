"""Carriers: the client fetches payloads from the target's memory, instead of receiving them on the stream of frames.

The target describes where a payload lies (PLACED), and keeps it there until the client sends TAKEN or disconnects. It
never writes to a client's memory. Invariant: after a call has returned, nothing arrives at its destinations; `nixl`
therefore reads into staging memory first. The checksum detects a target that reused its memory too early.

- `memory`: on the target's host, the client maps the target's memory and copies from it once, not twice as over a
  socket.
- `nixl`: by UCX, with RDMA where there is a device for it, else shared memory or TCP. Without RDMA it is slower than
  the stream (`python -m benchmarks.store`).

Both are off by default.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.disk.buffers import Arena, Buffer, BufferPool
from kvstore.disk.record import PAGE_BYTES
from kvstore.errors import ConfigError
from kvstore.net.transport import Cancelled

MEMORY = "memory"
NAMES = (MEMORY, "nixl")
_REMOTE_BUFFER = struct.Struct("<QQ")  # address, or offset in the mapped memory; length
_MAP_BYTES = 16 << 20
_MADV_POPULATE_READ = 22  # since Linux 5.14; not in mmap
_POLL_SECONDS = 50e-6
_MODULES = ("nixl_cu13", "nixl_cu12", "nixl")


class Lender(Protocol):
    """A target's side. Thread-safe; must not block for long."""

    name: str
    descriptor: int | None  # of a file that a client gets after the WELCOME; None: it needs none

    def greeting(self) -> bytes:
        """What a client needs to reach this target's memory. Differs after each start of the target."""

    def remote_buffer(self, buffer: Buffer) -> bytes:
        """The descriptor of the payload in `buffer`, for the client's `fetch`."""


class Borrower(Protocol):
    """A client's side. Thread-safe."""

    name: str
    needs_descriptor: bool

    def connect(self, greeting: bytes, descriptor: int | None) -> Any:
        """Connect to the target with this greeting. Returns the `target` for `fetch`. The caller closes `descriptor`.
        Raises ConnectionError."""

    def fetch(
        self,
        target: Any,
        remote_buffer: bytes,
        into: Sequence[memoryview],
        deadline: float,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        """Fill the parts of `into`, one after the other. Raises TimeoutError, Cancelled and ConnectionError; nothing is
        written to the parts after that."""


class MemoryLender:
    """Lends the arena of a target's buffers, which is shared memory."""

    name = MEMORY

    def __init__(self, arena: Arena):
        self.descriptor = arena.descriptor
        self._greeting = secrets.token_bytes(16)

    def greeting(self) -> bytes:
        return self._greeting

    def remote_buffer(self, buffer: Buffer) -> bytes:
        return _REMOTE_BUFFER.pack(buffer.offset + PAGE_BYTES, buffer.length)


class MemoryBorrower:
    """Copies out of targets' memory, which is mapped read-only."""

    name = MEMORY
    needs_descriptor = True

    def connect(self, greeting: bytes, descriptor: int | None) -> npt.NDArray[np.uint8]:
        """The target's memory; unmapped with the last reference to it."""
        assert descriptor is not None
        try:
            # If its owner could truncate the file, an access beyond the end would kill this process (SIGBUS).
            if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ConnectionError("memory: the file is not sealed against truncation")
            mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ConnectionError(f"memory: {error}") from None
        threading.Thread(target=_populate, args=(mapped,), name="kvtier-map", daemon=True).start()
        return np.frombuffer(mapped, np.uint8)

    def fetch(
        self,
        target: npt.NDArray[np.uint8],
        remote_buffer: bytes,
        into: Sequence[memoryview],
        deadline: float,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        start, length = _unpacked(remote_buffer, into)
        if start + length > len(target):
            raise ConnectionError(f"memory: a buffer that ends at {start + length}, of {len(target)} bytes")
        if cancelled is not None and cancelled():
            raise Cancelled
        if time.monotonic() > deadline:
            raise TimeoutError
        for part in into:
            ctypes.memmove(_address(part), target.ctypes.data + start, len(part))
            start += len(part)


def _populate(mapped: mmap.mmap) -> None:
    """Fault the pages in ahead of use, in steps that hold the interpreter's lock for a few milliseconds each."""
    with contextlib.suppress(OSError):  # before Linux 5.14
        for start in range(0, len(mapped), _MAP_BYTES):
            mapped.madvise(_MADV_POPULATE_READ, start, min(_MAP_BYTES, len(mapped) - start))
            time.sleep(0.001)


class NixlLender:
    """Lends the arena of a target's buffers."""

    name = "nixl"
    descriptor: int | None = None

    def __init__(self, arena: Arena):
        self._agent, self._lock = _agent("target"), threading.Lock()
        _register(self._agent, arena[0 : arena.total_bytes])

    def greeting(self) -> bytes:
        with self._lock:
            return bytes(self._agent.get_agent_metadata())

    def remote_buffer(self, buffer: Buffer) -> bytes:
        payload = buffer.payload
        return _REMOTE_BUFFER.pack(_address(payload), len(payload))


class NixlBorrower:
    """Fetches into staging memory of `staging_bytes`, and copies from there."""

    name = "nixl"
    needs_descriptor = False

    def __init__(self, staging_bytes: int = 256 << 20):
        self._agent, self._lock = _agent("client"), threading.Lock()
        self._staging = BufferPool(staging_bytes)
        self._transfers: list[_Transfer] = []  # done or abandoned, and not freed yet
        _register(self._agent, self._staging.arena[0 : self._staging.arena.total_bytes])

    def connect(self, greeting: bytes, descriptor: int | None) -> str:
        with self._lock:
            try:
                name = self._agent.add_remote_agent(greeting)
            except Exception as error:
                raise ConnectionError(f"nixl: {error}") from None
        return name.decode() if isinstance(name, bytes) else str(name)

    def fetch(
        self,
        target: str,
        remote_buffer: bytes,
        into: Sequence[memoryview],
        deadline: float,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        address, length = _unpacked(remote_buffer, into)
        self._sweep()
        buffer = self._staging.take(length, deadline)
        if buffer is None:
            raise TimeoutError
        transfer = self._begin(target, buffer, address)
        try:
            while (state := self._state(transfer)) == "PROC":
                if cancelled is not None and cancelled():
                    raise Cancelled
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(_POLL_SECONDS)
            if state != "DONE":
                raise ConnectionError(f"nixl: the transfer ended as {state}")
            start = 0
            for part in into:
                _copy(buffer.payload[start : start + len(part)], part)
                start += len(part)
        finally:
            with self._lock:
                self._transfers.append(transfer)
            self._sweep()

    def _begin(self, target: str, buffer: Buffer, address: int) -> "_Transfer":
        try:
            with self._lock:
                here = self._agent.get_xfer_descs([(_address(buffer.payload), buffer.length, 0)], "DRAM")
                there = self._agent.get_xfer_descs([(address, buffer.length, 0)], "DRAM")
                handle = self._agent.initialize_xfer("READ", here, there, target)
                self._agent.transfer(handle)
                return _Transfer(handle, buffer)
        except Exception as error:
            self._staging.give_back(buffer)
            raise ConnectionError(f"nixl: {error}") from None

    def _state(self, transfer: "_Transfer") -> str:
        with self._lock:
            try:
                return str(self._agent.check_xfer_state(transfer.handle))
            except Exception as error:
                return repr(error)

    def _sweep(self) -> None:
        """Free the memory of finished transfers. Data may still arrive for an abandoned one, so its memory is kept
        until the transfer has ended."""
        with self._lock:
            transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            if self._state(transfer) == "PROC":
                with self._lock:
                    self._transfers.append(transfer)
                continue
            with self._lock:
                self._agent.release_xfer_handle(transfer.handle)
            self._staging.give_back(transfer.buffer)


class _Transfer(NamedTuple):
    handle: Any
    buffer: Buffer  # of the staging memory


def lender(name: str, arena: Arena) -> Lender:
    """The target's side of the carrier `name`. Raises ConfigError."""
    _checked(name)
    return MemoryLender(arena) if name == MEMORY else NixlLender(arena)


def borrower(name: str) -> Borrower:
    """The client's side of the carrier `name`. Raises ConfigError."""
    _checked(name)
    return MemoryBorrower() if name == MEMORY else NixlBorrower()


def _checked(name: str) -> None:
    if name not in NAMES:
        raise ConfigError("carrier", name, f"one of {', '.join(NAMES)}")


def _agent(role: str) -> Any:
    for module in _MODULES:
        try:
            api = import_module(f"{module}._api")
        except ImportError:
            continue
        config = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
        return api.nixl_agent(f"kvtier-{role}-{secrets.token_hex(8)}", config)
    raise ConfigError.missing("nixl-cu12", "a Python package: pip install nixl-cu12", required_by="--carrier nixl")


def _register(agent: Any, memory: memoryview) -> None:
    agent.register_memory([(_address(memory), len(memory), 0, "")], "DRAM")


def _unpacked(remote_buffer: bytes, into: Sequence[memoryview]) -> tuple[int, int]:
    """Address or offset, and length. Raises ConnectionError if the length is not that of `into`."""
    if len(remote_buffer) != _REMOTE_BUFFER.size:
        raise ConnectionError(f"a buffer descriptor of {len(remote_buffer)} bytes, expected {_REMOTE_BUFFER.size}")
    start, length = _REMOTE_BUFFER.unpack(remote_buffer)
    wanted = sum(len(part) for part in into)
    if length != wanted:
        raise ConnectionError(f"a value of {length} bytes, requested {wanted}")
    return start, length


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _copy(source: memoryview, into: memoryview) -> None:
    """Copy without the interpreter's lock."""
    ctypes.memmove(_address(into), _address(source), len(into))
