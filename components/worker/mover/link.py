"""The engine's end of its mover: starts the process, notices its death, kills it when it hangs, restarts it.

The invariant: a row that a mover may still write to is not given back to the engine. `dead` is therefore true only when
the process has been reaped. Only `stop` and `wait` block, up to a given time.
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

# Backoff. A healthy mover that ends is restarted at once. If the next one ends, too, the delay is the first number,
# then doubles up to the second.
RESTART_SECONDS = (0.2, 30.0)
# A mover that lived this long was healthy: it resets the backoff.
_WELL_SECONDS = 60.0
# Importing and connecting take a second or two, and much longer while a model loads.
START_SECONDS = 60.0
# Commands that wait for a mover to take them.
COMMANDS_MAX = 4096
_ROOT = Path(__file__).parents[3]


@dataclass(eq=False)
class Job:
    """A command with an answer. If it is `done` before the mover has taken it, it is not sent."""

    command: frames.Load | frames.Put
    sent: bool = field(default=False, kw_only=True)
    done: bool = field(default=False, kw_only=True)


class MoverLink:
    """One mover process at a time. For one thread, which must live as long as the engine: the kernel kills a mover
    whose starting thread has ended. Commands wait here, in order and bounded, until the mover takes them."""

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
        """Whether there is no process, so that no row is being accessed."""
        return self._process is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """fork and exec, so that no state of the engine is inherited, above all none of CUDA's."""
        ours, theirs = frames.socket_pair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if path
        )
        # etcd3's generated code needs it; nothing else in the mover uses protobuf.
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
        """Whether the command queue is full."""
        return len(self._waiting) >= COMMANDS_MAX

    def say(self, command: frames.Command) -> bool:
        """Queue a command. False if the queue is full or there is no mover."""
        if self.dead or self.full:
            return False
        self._waiting.append(command)
        self.flush()
        return True

    def add(self, job: Job) -> None:
        """Queue a job for the next `flush`. Precondition: not `full`."""
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
        """Send a command at once, ahead of the queue. False if the mover cannot take it now."""
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
        """The mover's new reports. A mover that violates the protocol is killed."""
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
        """Kill the mover. It may still write to rows until `reap` returns True."""
        if self._process is not None and not self._killed:
            logger.error("kvtier: killing the mover: %s", reason)
            self._killed, self.ready = True, False
            self._process.kill()

    def reap(self) -> bool:
        """True once for each mover that has ended. Its unfinished jobs are abandoned."""
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
        """Seconds until the next mover starts; 0 while there is one."""
        return max(0.0, self._restart_at - time.monotonic()) if self._process is None else 0.0

    def start_when_due(self) -> None:
        if self._process is None and time.monotonic() >= self._restart_at:
            self.start()

    def wait(self, seconds: float) -> None:
        """Block until the mover reports, at most `seconds`."""
        if self._socket is not None:
            poll = select.poll()  # select is limited to descriptors below 1024
            poll.register(self._socket, select.POLLIN)
            poll.poll(1000 * seconds)

    def stop(self, seconds: float) -> None:
        """Let the mover end by itself for `seconds`, then kill it. It has been reaped when this returns."""
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
