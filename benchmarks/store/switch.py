"""A switch in user space between network namespaces, whose links delay and lose frames: for kernels without netem.

    python -m benchmarks.store.switch SPACE ...

The process makes a TAP device `eth0` in each namespace. A frame that it reads from one is written to the one that has
its destination, or to all others. A frame waits as long as the slower of its two links delays it. At each line on
standard input, `Links` in JSON, links change, and a line with `Passed` comes back. Python moves each frame
individually. It counts late frames, and frames dropped because too many waited. So a report can state its accuracy.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.store.servers import BenchmarkError
from kvstore.errors import run_command

WAITING_MAX = 10_000  # frames, of all links
_FRAME_BYTES = 9000 + 18  # of the largest
_AT_ONCE = 32  # frames of one device before the next has its turn
_IDLE_SECONDS = 1.0
_LATE_STEP_SECONDS, _LATE_STEPS = 20e-6, 5000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000  # of linux/if_tun.h
_CLONE_NEWNET = 0x40000000  # of linux/sched.h


class Links(msgspec.Struct):
    """Of each namespace, in order."""

    delay_ms: list[float]
    loss_percent: list[float]


class Passed(msgspec.Struct):
    """Since the start."""

    frames: int = 0
    lost: int = 0
    dropped: int = 0  # too many waited, or the device was full
    late_p99_ms: float = 0.0  # beyond the delay
    cpu_seconds: float = 0.0


class Switch:
    def __init__(self, devices: list[int]):
        """`devices`: descriptors that give and take a frame at a time, without blocking."""
        self._devices = devices
        self._links = Links([0.0] * len(devices), [0.0] * len(devices))
        self._places: dict[bytes, int] = {}  # MAC address -> device
        self._waiting: list[tuple[float, int, int, bytes]] = []  # due, number, device, frame
        self._late = [0] * _LATE_STEPS
        self._passed = Passed()
        self._number = 0

    def change(self, links: Links) -> None:
        self._links = links

    @property
    def passed(self) -> Passed:
        self._passed.cpu_seconds = round(time.process_time(), 2)
        self._passed.late_p99_ms = round(self._quantile(0.99) * 1000, 3)
        return self._passed

    def run(self, seconds: float, *others: int) -> bool:
        """Forward frames for `seconds`. Returns True early if one of the `others` can be read."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            due = self._waiting[0][0] if self._waiting else until
            ready, _, _ = select.select([*self._devices, *others], [], [], max(0.0, min(due, until) - now))
            for device, fd in enumerate(self._devices):
                if fd in ready:
                    self._read(device, fd)
            self._write(time.monotonic())
            if not set(others).isdisjoint(ready):
                return True
        return False

    def _read(self, device: int, fd: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                frame = os.read(fd, _FRAME_BYTES)
            except BlockingIOError:
                return
            self._places[frame[6:12]] = device
            place = self._places.get(frame[:6])
            everywhere = [number for number in range(len(self._devices)) if number != device]
            for to in everywhere if place is None else [place]:
                self._take(device, to, frame)

    def _take(self, device: int, to: int, frame: bytes) -> None:
        loss, delay_ms = (max(of[device], of[to]) for of in (self._links.loss_percent, self._links.delay_ms))
        if loss and random.random() * 100 < loss:
            self._passed.lost += 1
        elif len(self._waiting) >= WAITING_MAX:
            self._passed.dropped += 1
        else:
            self._number += 1  # frames that are due at once keep their order
            heapq.heappush(self._waiting, (time.monotonic() + delay_ms / 1000, self._number, to, frame))

    def _write(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            due, _, to, frame = heapq.heappop(self._waiting)
            try:
                os.write(self._devices[to], frame)
            except OSError:
                self._passed.dropped += 1
                continue
            self._passed.frames += 1
            self._late[min(_LATE_STEPS - 1, int((now - due) / _LATE_STEP_SECONDS))] += 1

    def _quantile(self, share: float) -> float:
        """A quantile of the frames' lateness."""
        left = share * self._passed.frames
        for step, count in enumerate(self._late):
            left -= count
            if left <= 0:
                return (step + 1) * _LATE_STEP_SECONDS if self._passed.frames else 0.0
        return _LATE_STEPS * _LATE_STEP_SECONDS


def open_tap(space: str) -> int:
    """A new TAP device `eth0` in a namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as own, (Path("/run/netns") / space).open() as there:
        _enter(libc, there.fileno())
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", b"eth0", _IFF_TAP | _IFF_NO_PI))
        finally:
            _enter(libc, own.fileno())
    return fd


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def main() -> None:
    try:
        switch = Switch([open_tap(space) for space in sys.argv[1:]])
    except OSError as error:
        raise BenchmarkError(f"no TAP device: {error}") from None
    os.nice(-15)  # otherwise a frame waits for other processes
    print("ready", flush=True)
    while True:
        if switch.run(_IDLE_SECONDS, sys.stdin.fileno()):
            line = sys.stdin.readline()
            if not line:
                return
            switch.change(msgspec.json.decode(line, type=Links))
            print(msgspec.json.encode(switch.passed).decode(), flush=True)


if __name__ == "__main__":
    run_command("benchmarks.store.switch", main)
