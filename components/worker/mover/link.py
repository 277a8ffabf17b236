"""The engine's end of its mover: starts the process, notices its death, kills it when it hangs, starts it again.

What matters most: a row that a mover may still write to must not be given back to the engine. `dead` is therefore true
only when the process has been reaped. No method blocks, but `stop` and `wait`, which take a time.
"""

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from components.worker.mover import frames
from components.worker.mover.frames import Setup

logger = logging.getLogger(__name__)

# A mover that was well is started again at once; if that one ends, too, after this long, then after twice as long, up
# to the second figure.
RESTART_SECONDS = (0.2, 30.0)
# One that lived this long was well: the next failure begins a new count.
_WELL_SECONDS = 60.0
# Importing and connecting take a second or two, on a machine that loads a model many more.
START_SECONDS = 60.0
# Commands that wait for a mover to take them.
COMMANDS_MAX = 4096
_ROOT = Path(__file__).parents[3]


@dataclass(eq=False)
class Job:
    """A command that is answered. One that is `done` before the mover has taken it is not sent."""

    command: frames.Load | frames.Put
    sent: bool = field(default=False, kw_only=True)
    done: bool = field(default=False, kw_only=True)


class MoverLink:
    """One mover process at a time. For one thread, which should live as long as the engine: the kernel kills a mover
    whose starting thread has ended. What it is told waits here, in order and bounded, until it can take it."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: deque[frames.Command | Job] = deque()
        self._failures = 0
        self._started = 0.0
        self._restart_at = 0.0
        self._killed = False
        self.ready = False
        self.starts = 0
        self.start()

    @property
    def dead(self) -> bool:
        """Whether there is no process, and so nobody who touches a row."""
        return self._process is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """fork and exec: nothing of the engine's state, CUDA's least of all, is inherited."""
        ours, theirs = frames.socket_pair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if path
        )
        # etcd3's generated code needs it, and the mover has no other use for protobuf.
        environment["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
        settings = msgspec.json.encode(self._setup).decode()
        command = [sys.executable, "-m", "components.worker.mover", str(theirs.fileno()), str(os.getpid()), settings]
        self._started = time.monotonic()
        self.starts += 1
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._setup.region_fd),
                env=environment,
            )
        except OSError as error:
            logger.error("kvtier: the mover does not start: %r", error)
            ours.close()
            self._note_failure()
            return
        finally:
            theirs.close()
        self._socket, self.ready, self._killed = ours, False, False

    @property
    def full(self) -> bool:
        """Whether as many commands wait as may."""
        return len(self._waiting) >= COMMANDS_MAX

    def say(self, command: frames.Command) -> bool:
        """Have the mover told, after what was said before. False if there is no room or nobody to hear it."""
        if self.dead or self.full:
            return False
        self._waiting.append(command)
        self.flush()
        return True

    def add(self, job: Job) -> None:
        """Said with the next `flush`. The caller looks whether there is room."""
        self._waiting.append(job)

    def flush(self) -> None:
        while self._waiting and self.ready:
            one = self._waiting[0]
            if not isinstance(one, Job):
                if not self.send(one):
                    return
            elif not one.done:
                if not self.send(one.command):
                    return
                one.sent = True
            self._waiting.popleft()

    def send(self, command: frames.Command) -> bool:
        """At once, before what waits. False if the mover cannot take it now."""
        if self._socket is None:
            return False
        try:
            self._socket.send(frames.encode(command))
        except BlockingIOError:
            return False
        except OSError:
            self.kill("does not listen")
            return False
        return True

    def receive(self) -> Iterator[frames.Report]:
        """What the mover has said since. Ends it if it said nonsense."""
        while self._socket is not None:
            try:
                packet = self._socket.recv(frames.FRAME_BYTES_MAX)
                if not packet:
                    return
                report = frames.decode_report(packet)
            except BlockingIOError:
                return
            except (OSError, msgspec.DecodeError) as error:
                self.kill(repr(error))
                return
            if isinstance(report, frames.Ready):
                self.ready = True
            else:
                yield report

    def kill(self, reason: str) -> None:
        """It is gone when `reap` says so."""
        if self._process is not None and not self._killed:
            logger.error("kvtier: killing the mover: %s", reason)
            self._killed, self.ready = True, False
            self._process.kill()

    def reap(self) -> bool:
        """True once for each mover that has ended: what it had not finished, nobody works on any more."""
        if self._process is None:
            return False
        if not self.ready and time.monotonic() > self._started + START_SECONDS:
            self.kill(f"not ready after {START_SECONDS:.0f} s")
        status = self._process.poll()
        if status is None:
            return False
        self._close()
        self._note_failure()
        logger.error(
            "kvtier: the mover exited with code %d; restarting in %.1f s, and until then the store is not used",
            status,
            self._restart_at - time.monotonic(),
        )
        return True

    @property
    def gone_seconds(self) -> float:
        """How long there is going to be no process."""
        return max(0.0, self._restart_at - time.monotonic()) if self._process is None else 0.0

    def start_when_due(self) -> None:
        if self._process is None and time.monotonic() >= self._restart_at:
            self.start()

    def wait(self, seconds: float) -> None:
        """Until the mover says something, at most so long."""
        if self._socket is not None:
            poll = select.poll()  # which takes any descriptor, where select ends at 1024
            poll.register(self._socket, select.POLLIN)
            poll.poll(1000 * seconds)

    def stop(self, seconds: float) -> None:
        """Let it end by itself, or kill it then; it is gone when this returns."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            self._process.kill()
            self._process.wait()
        self._close()
        self._restart_at = float("inf")

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._process, self.ready = None, None, False
        self._waiting.clear()

    def _note_failure(self) -> None:
        now = time.monotonic()
        if now > self._started + _WELL_SECONDS:
            self._failures = 0
        first, longest = RESTART_SECONDS
        self._restart_at = now if not self._failures else now + min(longest, first * 2 ** (self._failures - 1))
        self._failures += 1
