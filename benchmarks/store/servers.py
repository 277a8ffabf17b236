"""The servers and tools of the store's benchmark: how to find, start, check and stop each.

All servers listen on loopback, on free ports. A server's output goes to a file in the benchmark's folder.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.store.peers import MOONCAKE_LEASE_SECONDS, connect

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0  # LMCache's server imports torch first
PEERS = {
    "redis": "Redis, RAM only, persistence off: it has no tier on disk",
    "lmcache": "LMCache's own lm:// server, RAM only: its disk backend is not implemented",
    "mooncake": "Mooncake store over TCP, RAM",
    "mooncake-ssd": "Mooncake store over TCP, SSD offload with io_uring, copies in RAM dropped before each read",
}
_INSTALL = {
    "redis": "apt-get install redis-server",
    "lmcache": "pip install lmcache (0.5.6 was tried) into an environment that --peer-python names",
    "mooncake": "pip install mooncake-transfer-engine-non-cuda (0.3.13 was tried) into one that --peer-python names",
}
# No peer may call home from a benchmark.
_ENVIRONMENT = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "MC_LOG_LEVEL": "ERROR"}


class BenchmarkError(Exception):
    """The benchmark cannot go on, in one line."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise BenchmarkError(f"{name} is not installed: pip install 'kvtier[embedded]'")
    return found


class Process:
    """A child process with its output in a file, or with pipes; `stop` ends it, and only it."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, *, pipes: bool = False, **environment: str):
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **_ENVIRONMENT, **environment},
                text=True,
            )
        self.pid = self.popen.pid

    def line(self) -> str:
        """The next line that a process with pipes says."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended: {self.last_words()}")
        return line.strip()

    def say(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def wait_for(self, address: str) -> None:
        """Wait until it listens on `address`."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.popen.poll() is None:
            with contextlib.suppress(OSError):
                connect(address).close()
                return
            time.sleep(0.05)
        raise BenchmarkError(f"{self.name} does not listen on {address}: {self.last_words()}")

    def last_words(self) -> str:
        return " ".join(self._log.read_text(errors="replace").splitlines()[-3:])

    def stop(self, seconds: float = 15.0) -> None:
        if self.popen.stdin is not None:
            with contextlib.suppress(OSError):
                self.popen.stdin.close()
        else:
            self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class Client(Process):
    """A client process, see benchmarks.store.worker."""

    def __init__(self, name: str, python: str, batch_bytes: int, folder: Path):
        super().__init__(
            name, [python, "-m", "benchmarks.store.worker", "client", str(batch_bytes)], folder, pipes=True
        )

    def ask(self, call: str, **arguments: Any) -> None:
        self.say(json.dumps({"call": call, **arguments}))

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.line())
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def do(self, call: str, **arguments: Any) -> dict[str, Any]:
        self.ask(call, **arguments)
        return self.answer()


# ---- our store


def has_hot_cache() -> bool:
    """Whether this build of the target has a DRAM cache of its own, with the option --hot."""
    command = [sys.executable, "-m", "kvstore", "--help"]
    return "--hot" in subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


class Target(Process):
    """`python -m kvstore` on a folder of its own."""

    def __init__(
        self,
        name: str,
        folder: Path,
        logs: Path,
        capacity: int,
        segment: int,
        unix: str,
        hot: int | None,
        *options: str,
    ):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "kvstore", "--dir", str(folder), "--capacity", str(capacity)]
        command += ["--segment-size", str(segment), "--listen", self.address, "--nats", "", "--unix-socket", unix]
        command += [] if hot is None else ["--hot", str(hot)]
        super().__init__(name, [*command, *options], logs)
        self.wait_for(self.address)


def flush(folder: Path) -> None:
    """Sync all files of a folder to the device."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())


def evict(folder: Path) -> float:
    """Flush a folder's files, and drop them from the page cache. Returns the share of a sample that is still cached."""
    samples: list[bool] = []
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                samples += _cached(file.fileno(), range(0, path.stat().st_size, 16 << 20))
    return sum(samples) / max(1, len(samples))


def _cached(descriptor: int, offsets: Iterable[int]) -> Iterator[bool]:
    """Whether a read at each offset that holds data would be served without the device."""
    for offset in offsets:
        try:
            if os.lseek(descriptor, offset, os.SEEK_DATA) == offset:
                yield os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            yield False
        except OSError:  # no data from here on
            return


def tcp_connections(address: str) -> int:
    """How many established TCP connections end at a port of this host; a UNIX socket needs none."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port}") and row[3] == "01" for row in rows)


# ---- peers


def absent(peer: str, python: str) -> str | None:
    """Why a peer cannot be measured here and how to install it, or None."""
    program = {"redis": "redis-server", "lmcache": "lmcache", "mooncake": "mooncake"}[peer.removesuffix("-ssd")]
    found = False
    if peer == "redis":
        found = shutil.which(program) is not None
    else:
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({program!r}) is None)"
        with contextlib.suppress(OSError):  # no such interpreter
            found = subprocess.run([python, "-c", look], check=False, cwd="/").returncode == 0
    return None if found else f"{program} is not there: {_INSTALL[peer.removesuffix('-ssd')]}"


def version(peer: str, python: str) -> str:
    if peer == "redis":
        return subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    prefix = peer.partition("-")[0]
    code = (
        "from importlib.metadata import distributions\n"
        f"print(*(f'{{d.name}} {{d.version}}' for d in distributions() if d.name.lower().startswith({prefix!r})))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def start_redis(folder: Path, unix: str) -> tuple[Process, str]:
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", unix, "--daemonize", "no"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = Process("redis", command, folder)
    process.wait_for(f"127.0.0.1:{port}")
    return process, f"127.0.0.1:{port}"


def start_lmcache(folder: Path, python: str) -> tuple[Process, str]:
    port = free_port()
    process = Process("lmcache", [python, "-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu"], folder)
    process.wait_for(f"127.0.0.1:{port}")
    return process, f"127.0.0.1:{port}"


class Mooncake:
    """A master, and the process whose memory (and folder, if it has one) holds the values."""

    def __init__(self, name: str, folder: Path, python: str, memory_bytes: int, disk: Path | None = None):
        rpc, metrics = free_port(), free_port()
        command = [str(Path(python).parent / "mooncake_master"), f"--rpc_port={rpc}", "--rpc_address=127.0.0.1"]
        command += [f"--metrics_port={metrics}"]
        if disk:
            command += ["--enable_offload=true", f"--default_kv_lease_ttl={round(MOONCAKE_LEASE_SECONDS * 1000)}"]
        self._settings = {
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "local_buffer_size": 16 << 20,
            "protocol": "tcp",
            "rdma_devices": "",
            "master_server_addr": f"127.0.0.1:{rpc}",
        }
        owns: dict[str, Any] = {**self._settings, "global_segment_size": memory_bytes}
        if disk:
            disk.mkdir(exist_ok=True)
            owns |= {"enable_ssd_offload": True, "ssd_offload_path": str(disk)}
        self.disk = disk
        self._master = Process(f"{name}-master", command, folder)
        self._owner: Process | None = None
        try:
            self._master.wait_for(f"127.0.0.1:{rpc}")
            self._owner = Process(
                f"{name}-owner",
                [python, "-m", "benchmarks.store.worker", "mooncake", json.dumps(owns)],
                folder,
                pipes=True,
                MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS="1",
                MOONCAKE_OFFLOAD_USE_URING="true",
                MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES=str(32 << 20),  # a bucket is written once it is full
            )
            self.host = self._owner.line()
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in (self._master, self._owner) if process]

    def client_settings(self) -> dict[str, Any]:
        return {**self._settings, "global_segment_size": 0}

    def stop(self) -> None:
        if self._owner:
            self._owner.stop()
        self._master.stop()


# ---- tools that measure limits


class Fio:
    """fio with O_DIRECT on one preallocated file, like the segments. It takes the fastest of two engines and two
    depths."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self._size = size
        self.best: dict[tuple[str, int], tuple[str, int]] = {}
        self.found: dict[str, float] = {}  # every setting that was tried: GB/s
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def first_write(self, block: int, part: int, parts: int) -> float:
        """Write one of `parts` parts of the file, which nobody wrote before."""
        share = self._size // parts
        return self._run("write", block, "io_uring", 8, f"--offset={part * share}", f"--io_size={share}")

    def choose(self, operation: str, block: int, tries: int = 2) -> None:
        """Find the setting for an operation and a block size."""
        speeds: dict[tuple[str, int], list[float]] = {}
        for _ in range(tries):
            for engine in ("io_uring", "libaio"):
                for depth in (8, 32):
                    speeds.setdefault((engine, depth), []).append(self._speed(operation, block, engine, depth))
        for (engine, depth), speed in speeds.items():
            self.found[f"{operation} {block} {engine} QD{depth}"] = round(statistics.median(speed), 3)
        self.best[operation, block] = max(speeds, key=lambda setting: statistics.median(speeds[setting]))

    def speed(self, operation: str, block: int) -> float:
        return self._speed(operation, block, *self.best[operation, block])

    def _speed(self, operation: str, block: int, engine: str, depth: int) -> float:
        if operation == "write":  # its buffers were touched when they were filled
            return self._run(operation, block, engine, depth, f"--io_size={min(self._size, 512 << 20)}")
        return self._run(operation, block, engine, depth, "--time_based", "--ramp_time=200ms", "--runtime=500ms")

    def _run(self, operation: str, block: int, engine: str, depth: int, *more: str) -> float:
        command = ["fio", "--name=limit", f"--filename={self.path}", "--direct=1", f"--rw={operation}", f"--bs={block}"]
        command += [f"--ioengine={engine}", f"--iodepth={depth}", f"--size={self._size}", "--output-format=json", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"fio: {done.stderr.strip()}")
        job = json.loads(done.stdout)["jobs"][0][operation]
        return float(job["io_bytes"] / job["runtime"] / 1e6)


class Iperf:
    """iperf3 over loopback."""

    def __init__(self, folder: Path):
        self._port = str(free_port())
        self._server = Process("iperf3", ["iperf3", "-s", "-B", "127.0.0.1", "-p", self._port], folder)
        self._server.wait_for(f"127.0.0.1:{self._port}")

    def speed(self, streams: int, moved_bytes: int) -> float:
        command = ["iperf3", "-c", "127.0.0.1", "-p", self._port, "-P", str(streams), "-l", "1M", "-J"]
        done = subprocess.run([*command, "-n", str(moved_bytes)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"iperf3: {done.stdout.strip()[-200:]}")
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8e9

    def stop(self) -> None:
        self._server.stop()


# ---- facts


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, as /proc/mounts has it."""
    kinds: dict[Path, str] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        kinds[Path(where.replace("\\040", " "))] = kind
    here = folder.resolve()
    return next(kinds[path] for path in (here, *here.parents) if path in kinds)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes, all their threads included."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
