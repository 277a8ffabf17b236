"""The supervisor behind `dynamo serve`: starts a deployment in order, shows its output, restarts what dies, stops
it."""

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.worker.shm import sweep_stale_regions
from graphs.board import STARTING, Board
from graphs.discovery import forget_all, forget_dead
from graphs.service import Deployment, Process, Service
from kvstore.errors import FailedError, UnavailableError
from kvstore.net.transport import split_address
from kvstore.text import masked_variable

# Timeout for a process to become ready. A 70B model loads in minutes.
READY_SECONDS = 900.0
# Size at which a process's log file is rotated; one older file is kept.
LOG_BYTES_MAX = 64 << 20
# Timeout for a graceful stop: dynamo.vllm lets running requests finish.
STOP_SECONDS = 20.0
# Exponential backoff for restarts of a process that dies, from the first figure to the second.
RESTART_SECONDS = (1.0, 60.0)
# Processes that import etcd3 set it themselves; in engines it would cost speed.
_NOT_INHERITED = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"}
# Timeout for Python's resource trackers, which end when no process holds their pipe.
TRACKERS_SECONDS = 5.0
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's loopback
_COLORS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
_TAIL_LINES = 30
_POLL_SECONDS = 0.2
_DEATH_POLL_SECONDS = 0.05  # requests to a dead service fail until this is noticed
DEFAULT_STATE_DIR = Path(".kvtier")


@dataclass(eq=False)
class Child:
    """A running process of the deployment."""

    process: Process
    running: asyncio.subprocess.Process
    sockets: str  # folder for the engine's sockets, which survive a kill
    started: float = field(default_factory=time.monotonic)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    saw_ready_line: bool = False
    ready: bool = False
    pump: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.running.pid

    @property
    def alive(self) -> bool:
        return self.running.returncode is None

    def signal(self, number: int, *, trackers: bool = True) -> None:
        """Signal the child and everything it started: each child leads a process group. Without `trackers`, Python's
        resource trackers are spared, so that they clean up the shared memory of killed processes."""
        for pid in self.group():
            with contextlib.suppress(OSError):
                if trackers or b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, number)

    def group(self) -> list[int]:
        """The living processes that the child started, and the child itself."""
        members = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                _, _, after_name = stat.read_text().rpartition(")")
                state, _, group = after_name.split()[:3]
                if int(group) == self.pid and state != "Z":
                    members.append(int(stat.parent.name))
        return members


class Supervisor:
    """Runs the processes of a deployment. `show` gets every line of output with the process's name; `status` gets
    changes of its state. Without `status`, both go to `show`."""

    def __init__(
        self,
        deployment: Deployment,
        show: Callable[[str, str], None],
        *,
        status: Callable[[str, str], None] | None = None,
        restart: bool = True,
        logs: Path | None = None,  # default: in the deployment's state folder
    ):
        self.deployment = deployment
        self.children: dict[str, Child] = {}
        self._show = show
        self._status = status or show
        self._restart = restart
        self._logs = logs or deployment.state_dir / "logs"
        self._environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start each service once its dependencies are ready. If one does not become ready, stops the others and raises
        UnavailableError."""
        processes = self.deployment.processes()
        up = {service.name: asyncio.Event() for service in self.deployment.services}

        async def start(service: Service) -> None:
            for needed in service.links:
                await up[needed.name].wait()
            batch = [process for process in processes if process.service == service.name]
            await asyncio.gather(*(self.launch(process) for process in batch))
            up[service.name].set()

        starting = [asyncio.create_task(start(service)) for service in self.deployment.services]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.stop()
            raise
        if self._restart:
            self.watch()

    def watch(self) -> None:
        """From now on, restart processes that die."""
        self._watchers = [asyncio.create_task(self._watch(name)) for name in self.children]

    def unwatch(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()

    async def launch(self, process: Process) -> Child:
        """Start one process and wait until it is ready. Raises UnavailableError."""
        _check_free(process)
        self._status(process.name, STARTING)
        child = await self._spawn(process)
        deadline = time.monotonic() + READY_SECONDS
        while not await self._is_ready(child):
            if not child.alive:
                if child.pump is not None:
                    await child.pump
                raise FailedError(f"{process.name}: {_last_words(child, self._log_of(process))}")
            if time.monotonic() > deadline:
                raise FailedError(f"{process.name}: not ready after {READY_SECONDS:.0f} s; see {self._log_of(process)}")
            await asyncio.sleep(_POLL_SECONDS)
        child.ready = True
        self._status(process.name, f"ready after {time.monotonic() - child.started:.1f} s")
        return child

    async def stop(self) -> None:
        """Stop everything, dependents first. Processes that exceed the timeout are killed."""
        self.unwatch()
        registered = {child.process.env.get("DYN_FILE_KV", "") for child in self.children.values()} - {""}
        for service in reversed(self.deployment.services):
            leaving = [child for child in self.children.values() if child.process.service == service.name]
            await asyncio.gather(*(self._leave(child) for child in leaving))
        for folder in registered:
            await asyncio.to_thread(forget_all, Path(folder))
        sweep_stale_regions()

    async def _leave(self, child: Child) -> None:
        name, began = child.process.name, time.monotonic()
        self._status(name, "stopping")
        await self.end(child)
        self._status(name, f"stopped after {time.monotonic() - began:.1f} s")

    async def end(self, child: Child, number: int = signal.SIGTERM) -> None:
        """Signal a child, and wait until it and everything it started are gone; kill the rest."""
        if number != signal.SIGKILL and child.alive:
            child.running.send_signal(number)  # it signals its own children
            await _emptied(child, STOP_SECONDS)
        await _clear(child)
        await child.running.wait()
        if child.pump is not None:
            await child.pump
        self.children.pop(child.process.name, None)

    async def wait(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def _spawn(self, process: Process) -> Child:
        for folder in (self._logs, *process.folders):
            folder.mkdir(parents=True, exist_ok=True)
        sockets = tempfile.mkdtemp(prefix="kvtier-")
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "graphs.child", *process.command),
            env={
                **self._environment,
                **_no_proxy(self._environment, process),
                "PYTHONUNBUFFERED": "1",
                "VLLM_RPC_BASE_PATH": sockets,
                **process.env,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 20,
        )
        child = self.children[process.name] = Child(process, running, sockets)
        child.pump = asyncio.create_task(self._pump(child))
        return child

    async def _pump(self, child: Child) -> None:
        """Copy the child's output to the log file and to `show`, until every process that holds its output has
        ended."""
        assert child.running.stdout is not None
        path = self._log_of(child.process)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(path.open("ab"))
            while True:
                if log.tell() > LOG_BYTES_MAX:
                    log.close()
                    path.replace(path.with_name(f"{path.name}.1"))
                    log = stack.enter_context(path.open("ab"))
                try:
                    raw = await child.running.stdout.readline()
                except ValueError:
                    continue  # a line beyond the limit: dropped
                if not raw:
                    return
                plain = _COLORS.sub(b"", raw)
                with contextlib.suppress(OSError):  # a full disk must not stop the service
                    log.write(plain)
                    log.flush()
                line = raw.decode(errors="replace").rstrip()
                child.tail.append(plain.decode(errors="replace").rstrip())
                if child.process.ready_line and child.process.ready_line in line:
                    child.saw_ready_line = True
                self._show(child.process.name, line)

    def _log_of(self, process: Process) -> Path:
        return self._logs / f"{process.name}.log"

    async def _is_ready(self, child: Child) -> bool:
        process = child.process
        if process.ready_line:
            return child.saw_ready_line
        return await asyncio.to_thread(_answers, process.ready_url, process.ready_text)

    async def _watch(self, name: str) -> None:
        """Restart the process whenever it dies."""
        shortest, longest = RESTART_SECONDS
        pause = shortest
        while True:
            child = self.children[name]
            while child.alive:  # asyncio's wait would also wait for everything that the process started
                await asyncio.sleep(_DEATH_POLL_SECONDS)
            code = child.running.returncode
            await _clear(child)  # remove leftovers
            if folder := child.process.env.get("DYN_FILE_KV"):
                await asyncio.to_thread(forget_dead, Path(folder))
            if time.monotonic() - child.started > longest:
                pause = shortest
            self._status(name, f"exited with code {code}; restarting in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = min(longest, 2 * pause)
            try:
                await self.launch(child.process)
            except UnavailableError as error:
                self._status(name, f"did not start: {str(error).splitlines()[0]}")
                if self.children[name].alive:  # and never became ready
                    self.children[name].signal(signal.SIGKILL)


async def serve(
    deployment: Deployment, announce: Callable[[], None], logs: Path | None = None, *, verbose: bool = False
) -> None:
    """Run a deployment until SIGINT or SIGTERM; calls `announce` when everything is ready."""
    board = Board([process.name for process in deployment.processes()], verbose=verbose)
    supervisor = Supervisor(deployment, board.output, status=board.status, logs=logs)
    running = asyncio.current_task()
    assert running is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    drawing = asyncio.create_task(board.keep_drawing())
    try:
        await supervisor.start()
        board.settle()
        announce()
        await supervisor.wait()
    except asyncio.CancelledError:
        board.settle()
        print("stopping", flush=True)
    finally:
        board.settle()
        drawing.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
        await supervisor.stop()


def _no_proxy(environment: Mapping[str, str], process: Process) -> dict[str, str]:
    """Exclude the deployment's own hosts from an HTTP proxy: Dynamo's frontend gets models' files from workers over
    HTTP."""
    spared = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = {split_address(address)[0] for address in process.listens} | {"127.0.0.1", "::1", "localhost"}
    if host := process.env.get("DYN_SYSTEM_HOST"):
        hosts.add(host)
    value = ",".join([*([spared] if spared else []), *sorted(hosts)])
    return {"NO_PROXY": value, "no_proxy": value}


async def _emptied(child: Child, seconds: float) -> None:
    """Wait until the child and everything it started are gone, at most for `seconds`."""
    deadline = time.monotonic() + seconds
    while child.group() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)


async def _clear(child: Child) -> None:
    """Kill the child and everything it started, and delete their leftovers: shared memory (by Python's resource
    trackers) and sockets."""
    child.signal(signal.SIGKILL, trackers=False)
    await _emptied(child, TRACKERS_SECONDS)
    child.signal(signal.SIGKILL)
    shutil.rmtree(child.sockets, ignore_errors=True)


def _answers(url: str, text: str) -> bool:
    try:
        with _DIRECTLY.open(url, timeout=2) as answer:
            return answer.status == 200 and text in answer.read().decode(errors="replace")
    except (OSError, urllib.error.URLError):
        return False


def _last_words(child: Child, log: Path) -> str:
    """The process's error message, if it printed one; otherwise the end of its output."""
    errors = [line for line in child.tail if ": error: " in line]
    if errors:
        return errors[-1]
    end = "\n  ".join(child.tail)
    return f"exited with code {child.running.returncode} before it was ready; last lines of {log}:\n  {end}"


def dry_run(deployment: Deployment) -> Sequence[str]:
    """The commands of all processes for a shell, with one setting per line, so that they can be diffed. Secrets are
    hidden."""
    shown = []
    for process in deployment.processes():
        lines = [f"{key}={shlex.quote(masked_variable(key, value))}" for key, value in process.env.items()]
        flags = [number for number, word in enumerate(process.command) if word.startswith("--")]
        for first, beyond in zip([0, *flags], [*flags, len(process.command)], strict=True):
            lines.append(shlex.join(process.command[first:beyond]))
        shown.append(f"# {process.name}\n" + " \\\n  ".join(lines) + "\n")
    return shown


def _check_free(process: Process) -> None:
    """Raises UnavailableError if an address that the process listens on is in use."""
    for address in process.listens:
        host, port = split_address(address)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise UnavailableError(
                    f"{process.service}: cannot listen on {address} ({error.strerror}): free it, or set another port"
                ) from None
