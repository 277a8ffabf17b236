"""Multi-turn chat against one engine: with kvtier, with vLLM's own tiers, and with no tier.

    python -m benchmarks.chat --model DIR --hbm-tokens N --dram SIZE --dir DIR --json FILE [--plot FILE.svg]
    python -m benchmarks.chat --url http://HOST:PORT --model NAME --json FILE

Closed loop: N clients play turns of the conversations of a pool, round-robin. The pool's KV exceeds HBM several times.
Before a mode is measured, every conversation is played once, which fills its tiers. Each mode is a fresh engine with
the same HBM, DRAM and pool:

    plain      only vLLM's prefix cache
    dram       vLLM's own offloading to DRAM
    files      vLLM's own file tier under that DRAM
    store      this project: that DRAM, and a target on the same disk, without a hot cache
    store-hot  the same engine, and the target restarted with a hot cache (--hot; as large as the pool's KV)
    store-mac, store-encrypt  as store-hot, with an engine and a store of their own, whose values are sealed

--rounds N      repeat everything N times, every other time in the opposite order; figures are medians over rounds. The
                store keeps its content for later rounds
--over MODE     the mode that others are compared with, round by round
--with FILE     include the points of an earlier run's --json on the same machine
--fresh N       also N uncached prompts per engine, the same for all: the cost of the tier where it cannot help
--first-token N also single prompts of that length, from each tier that can hold them
--timeline S    also run the last number of clients for S seconds, reported every 5 s (--seconds 0 for only this); with
                --kill target the target is killed at a third of it, and restarted at two thirds
--url URL       measure a running server

With GPUs, their power is reported, too, and their idle power.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import msgspec
from pydantic import BaseModel, ByteSize, ConfigDict, Field

from benchmarks.chat.energy import Meter
from benchmarks.chat.load import (
    CHAT,
    FRESH,
    Endpoint,
    FirstToken,
    Point,
    Pool,
    Shape,
    ask_again,
    first_tokens,
    measure,
    measure_all,
    of_tier,
    settled,
    stored_bytes,
    warm_up,
)
from benchmarks.chat.machine import Facts, facts
from benchmarks.chat.plot import plot
from benchmarks.chat.results import Over, Spread, best, medians, over
from benchmarks.chat.timeline import Breaking, Fault, Moment, Timeline, follow
from components.worker.transfer import Options as TierOptions
from components.worker.transfer import transfer_config as tier_config
from graphs.services import free_port
from kvstore.errors import ConfigError, FailedError, run_command, validated
from kvstore.seal import SECRET_BYTES

MODES = ("plain", "dram", "files", "store", "store-hot")
SEALED = {"store-mac": "mac", "store-encrypt": "encrypt"}
MEDIA = {
    "plain": ("cold", "hbm"),
    "dram": ("cold", "hbm", "dram"),
    "files": ("cold", "hbm", "dram", "store"),
    "store": ("cold", "hbm", "dram", "store"),
    "store-hot": ("cold", "hbm", "dram", "store"),
    **dict.fromkeys(SEALED, ("cold", "hbm", "dram", "store")),
}
START_SECONDS = 400.0
SETTLE_SECONDS = 3.0  # without another write; then the warm-up's write-behind has ended
SETTLE_SECONDS_MAX = 30.0
TARGET_FOUND_SECONDS = 5.0  # the time in which workers retry a target that was down
_CPU_THREADS = "VLLM_CPU_OMP_THREADS_BIND"
ENGINE_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    # On the CPU, the same number of threads in all modes: vLLM gives an engine without a connector one less.
    _CPU_THREADS: os.environ.get(_CPU_THREADS, ",".join(map(str, sorted(os.sched_getaffinity(0))))),
}
ROOT = Path(__file__).parents[2]

Positive = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    url: str = ""
    modes: list[str] = list(MODES)
    clients: list[Positive] = [8, 16, 32]
    pool: Positive = 80
    scale: float = Field(1.0, gt=0, le=10)
    seconds: float = Field(30.0, ge=0)
    timeline: float = Field(0.0, ge=0)
    kill: Literal["", "target"] = ""
    ramp: float = Field(12.0, ge=0)
    seed: int = 1
    fresh: int = Field(0, ge=0)
    fills: Positive = 1
    rounds: Positive = 1
    over: str = "plain"
    earlier: list[Path] = []
    first_token: list[Positive] = []
    repeats: Positive = 5
    hbm_tokens: int = Field(0, ge=0)
    block_tokens: Positive = 16
    blocks_per_chunk: Positive = 1
    max_model_len: Positive = 8192
    kv_dtype: str = "auto"
    load_format: str = "auto"
    tensor_parallel: Positive = 1
    dram: ByteSize = ByteSize(8 << 30)
    dir: Path = Path(tempfile.gettempdir())
    capacity: ByteSize = ByteSize(64 << 30)
    hot: ByteSize = ByteSize(16 << 30)
    durability: Literal["written", "memory"] = "written"
    carrier: Literal["", "memory", "nixl"] = ""
    engine: str = ""
    json_file: Path | None = None
    plot: Path | None = None


class Report(msgspec.Struct):
    command: str
    pool_tokens: int
    points: list[Point] = []
    timelines: list[Timeline] = []
    machine: Facts = {}
    energy: str = ""  # the reason, if energy is not measured
    first_tokens: list[FirstToken] = []
    failed: dict[str, str] = {}
    warm_ups: dict[str, dict[str, float]] = {}  # mode -> the tier's counters before the first point
    # mode -> TPOT limit in ms -> the highest requests per second within it, interpolated between numbers of clients
    best: dict[str, dict[str, float]] = {}
    over: list[Over] = []


class EngineError(FailedError):
    """An engine or a target did not start. The text has the end of its log."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder of the model; with --url the name that the server knows it by")
    add("--hbm-tokens", help="KV cache of the engine; default what it finds room for")
    add("--block-tokens", help="default 16; the CPU engine has 128")
    add("--blocks-per-chunk", help="KV blocks that a tier moves at once; default 1")
    add("--max-model-len", help="default 8192")
    add("--kv-dtype", help="auto or fp8")
    add("--load-format", help="auto, or dummy for a folder without weights")
    add("--tensor-parallel", help="default 1")
    add("--dram", help="of the DRAM tier; default 8GiB")
    add("--dir", help="where the file tier and the target keep their files; default: that of temporary files")
    add("--capacity", help="of the target; default 64GiB")
    add("--engine", help="more arguments for the engine, as one string")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clients", help="numbers of clients; default 8,16,32")
    add("--pool", help="conversations; default 80")
    add("--fills", help="how often the pool is asked for before, while that stores more; default 1")
    add("--scale", help="of all lengths, for small models; default 1")
    add("--seconds", help="of each measurement; default 30; 0: no points")
    add("--timeline", help="seconds; then the last number of clients for so long, in steps of 5 s; default 0")
    add("--ramp", help="seconds before each, in which its clients begin: longer than a request takes; default 12")
    add("--seed")
    add("--with", dest="earlier", help="JSON of earlier runs, to be counted in: FILE,FILE")
    add("--hot", help="cache in the target's memory, where it has one; default 16GiB")
    add("--json", dest="json_file", help="where to write the result, after every point")
    add("--plot", help="where to draw it, as SVG")


def check_load(options: Options) -> None:
    if max(options.clients) > options.pool:
        raise ConfigError("clients", max(options.clients), f"at most the pool's {options.pool} conversations")
    for path in options.earlier:
        if not path.is_file():
            raise ConfigError("with", path, "a file that --json wrote")


def split(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with comma-separated values as lists."""
    for name in ("modes", "clients", "first_token", "earlier"):
        if values.get(name) is not None:
            values[name] = values[name].split(",")
    return values


def parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", help="measure this server instead of starting engines")
    add("--modes", help=f"default {','.join(MODES)}; also {', '.join(SEALED)}")
    add("--kill", help="target: during the timelines of the store's modes, at a third of them")
    add("--fresh", help="then also so many prompts that share nothing, with the fewest clients; default 0")
    add("--rounds", help="default 1")
    add("--over", help="mode that the others are compared with; default plain")
    add("--first-token", help="prompt lengths to time one by one, such as 2200,8000")
    add("--repeats", help="of these; default 5")
    add("--durability", help="of a target with a hot cache: written, or memory; default written")
    add("--carrier", help="of target and workers: memory, or nixl; default none")
    add_load_arguments(parser)
    add_engine_arguments(parser)
    values = vars(parser.parse_args(argv))
    options = validated(Options, split(values))
    known = (*MODES, *SEALED)
    for name, mode in [("over", options.over), *(("modes", mode) for mode in options.modes)]:
        if mode not in known:
            raise ConfigError(name, mode, f"{'one' if name == 'over' else 'some'} of {','.join(known)}")
    if options.kill and options.url:
        raise ConfigError.conflicting("kill", options.kill, "--url", "one of the two: targets of others are not killed")
    if options.kill and not options.timeline:
        raise ConfigError.missing("timeline", "more than 0 seconds", required_by="--kill")
    check_load(options)
    check_folders(options)
    return options


def check_folders(options: Options) -> None:
    if not options.dir.is_dir():
        raise ConfigError("dir", options.dir, "a folder that exists")
    if not options.url and not (Path(options.model) / "config.json").is_file():
        raise ConfigError("model", options.model, "a folder with a config.json")


# ---- engines


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is ended with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def leave_on_sigterm() -> None:
    """Exit on SIGTERM, so that started processes are stopped. To be called from the main thread."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)


def last_words(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return " | ".join((errors or lines)[-3:])[-600:]


async def until_ready(endpoint: Endpoint, session: aiohttp.ClientSession, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{endpoint.url}/health", timeout=aiohttp.ClientTimeout(2)) as reply:
                if reply.status == 200:
                    return
        await asyncio.sleep(0.5)
    raise EngineError(f"not ready after {START_SECONDS:.0f} s" if process.poll() is None else "it ended")


def transfer_config(
    options: Options, mode: str, store: str, files: Path, seal_key: Path | None = None
) -> dict[str, object] | None:
    """The value of --kv-transfer-config; with the same DRAM size and chunk size in all modes."""
    stock = {
        "cpu_bytes_to_use": int(options.dram),
        "blocks_per_chunk": options.blocks_per_chunk,
        "offload_prompt_only": False,
    }
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    match mode:
        case "dram":
            return {**connector, "kv_connector_extra_config": stock}
        case "files":
            tier = {"type": "fs", "root_dir": str(files)}
            spec = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [tier]}
            return {**connector, "kv_connector_extra_config": {**stock, **spec}}
        case "store" | "store-hot" | "store-mac" | "store-encrypt":
            given: dict[str, object] = {
                "store": store,
                "dram": int(options.dram),
                "blocks_per_chunk": options.blocks_per_chunk,
                "carrier": options.carrier,
                **({"seal_key": seal_key, "seal": SEALED[mode]} if mode in SEALED else {}),
            }
            return tier_config(validated(TierOptions, given))
    return None


def engine_command(options: Options, port: int, transfer: dict[str, object] | None) -> list[str]:
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    return server + engine_arguments(options, transfer)


def engine_arguments(options: Options, transfer: dict[str, object] | None) -> list[str]:
    arguments = ["--model", options.model, "--max-model-len", str(options.max_model_len)]
    arguments += ["--load-format", options.load_format, "--kv-cache-dtype", options.kv_dtype]
    arguments += ["--tensor-parallel-size", str(options.tensor_parallel), "--block-size", str(options.block_tokens)]
    arguments += ["--prefix-caching-hash-algo", "sha256_cbor", "--enable-prefix-caching"]
    if options.hbm_tokens:
        arguments += ["--num-gpu-blocks-override", str(-(-options.hbm_tokens // options.block_tokens))]
    if transfer is not None:
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    return arguments + shlex.split(options.engine)


@contextlib.contextmanager
def target_running(
    options: Options, mode: str, folder: Path, address: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A running target, until the block ends."""
    hot = 0 if mode == "store" else int(options.hot)
    command = [sys.executable, "-m", "kvstore", "--dir", str(folder), "--capacity", str(int(options.capacity))]
    command += ["--hot", str(hot), "--durability", options.durability if hot else "written"]
    command += ["--carrier", options.carrier]
    with running([*command, "--listen", address, "--nats", ""], {}, log) as target:
        deadline = time.monotonic() + START_SECONDS
        while not listens(address):
            if target.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"the target does not come up: {last_words(log)}")
            time.sleep(0.1)
        yield target


# ---- measuring


class Bench:
    """Runs the load against one engine after the other, and collects the results."""

    def __init__(self, options: Options, logs: Path, *, gpus: int = 0, module: str = "benchmarks.chat"):
        self.options = options
        self.logs = logs
        self._round = 0
        self._of_store: dict[Path, Pool] = {}  # the pool as it was played so far
        self._target_pid = 0
        pool = self._pool(CHAT)
        self.report = Report(shlex.join(["python", "-m", module, *sys.argv[1:]]), pool.prompt_tokens)
        for path in options.earlier:
            earlier = msgspec.json.decode(path.read_bytes(), type=Report)
            self.report.points += earlier.points
            self.report.timelines += earlier.timelines
        try:
            self.meter: Meter | None = Meter(gpus)
        except RuntimeError as error:
            self.meter, self.report.energy = None, f"not measured: {error}"

    def describe_machine(self) -> None:
        """Measure disk and memory for some seconds, before anything else runs."""
        self.report.machine = facts(self.options.dir)
        if self.meter:
            self.report.machine["gpus"] = ", ".join(self.meter.names)

    def _pool(self, shape: Shape, number: int = 0) -> Pool:
        return Pool(self.options.pool, self.options.seed + number, shape, scale=self.options.scale)

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        # vLLM closes idle connections after five seconds: do not reuse one that is about to be closed.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            if self.options.url:
                endpoint, pool = Endpoint(session, self.options.url, self.options.model), self._pool(CHAT)
                await self._idle()
                await self._fill(endpoint, "url", pool)
                for number in range(self.options.rounds):
                    self._round = number
                    await self._measure(endpoint, "url", pool)
                    await self._follow(endpoint, "url", pool)
                    await self._measure_first_tokens(endpoint, "url")
                    if self.options.fresh:
                        await self._measure_fresh(endpoint, "url")
                return
            with tempfile.TemporaryDirectory(prefix="kvtier-turns-", dir=self.options.dir) as folder:
                engines = by_engine(self.options.modes)
                for number in range(self.options.rounds):
                    self._round = number
                    for modes in engines if self._round % 2 == 0 else reversed(engines):
                        await self._try(session, modes, Path(folder))

    async def _try(self, session: aiohttp.ClientSession, modes: list[str], folder: Path) -> None:
        try:
            await self._run_engine(session, modes, folder)
        except (EngineError, ConnectionError, TimeoutError) as error:
            words = last_words(self.logs / "engine.log")
            for mode in modes:
                self.report.failed[mode] = f"{error}: {words}"
            say(f"{modes[0]}: {error}: {words}")
            self.write()

    async def _run_engine(self, session: aiohttp.ClientSession, modes: list[str], folder: Path) -> None:
        options, mode, port = self.options, modes[0], free_port()
        endpoint = Endpoint(session, f"http://127.0.0.1:{port}", options.model)
        address = f"127.0.0.1:{free_port()}"
        with ExitStack() as stack:
            own = folder / (mode if mode in SEALED else "store")
            if mode.startswith("store"):
                own.mkdir(exist_ok=True)
            else:
                own = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            target = stack.enter_context(self._target(mode, own, address))
            begun = time.monotonic()
            transfer = transfer_config(options, mode, address, own, seal_key(folder) if mode in SEALED else None)
            command = engine_command(options, port, transfer)
            engine = stack.enter_context(running(command, ENGINE_ENVIRONMENT, self.logs / "engine.log"))
            await until_ready(endpoint, session, engine)
            say(f"{mode}: up after {time.monotonic() - begun:.0f} s")
            await self._idle()
            pool = self._of_store.get(own)
            if pool is None:
                pool = self._pool(CHAT)
                await self._fill(endpoint, mode, pool)
            elif mode != "store":
                await ask_again(endpoint, pool, max(options.clients))
            if mode.startswith("store"):
                self._of_store[own] = pool
            serving = mode

            async def served_by(wanted: str) -> None:
                nonlocal serving, target
                if wanted != serving:
                    target.close()
                    target = stack.enter_context(self._target(wanted, own, address))
                    await asyncio.sleep(TARGET_FOUND_SECONDS)
                    serving = wanted

            async def kill() -> None:
                os.killpg(self._target_pid, signal.SIGKILL)

            async def start() -> None:
                nonlocal target
                target.close()
                target = stack.enter_context(await asyncio.to_thread(self._target, serving, own, address))

            for mode in modes:
                await served_by(mode)
                await self._measure(endpoint, mode, pool)
                is_broken = options.kill and mode.startswith("store")
                await self._follow(endpoint, mode, pool, Breaking("target", kill, start) if is_broken else None)
            # Last, because it evicts the pool from a store with little free room.
            for mode in reversed(modes) if options.first_token else ():
                await served_by(mode)
                await self._measure_first_tokens(endpoint, mode)
            if options.fresh:
                await served_by(modes[0])
                await self._measure_fresh(endpoint, modes[0])

    def _target(self, mode: str, folder: Path, address: str) -> ExitStack:
        """The target that the mode needs, if any."""
        stack = ExitStack()
        if mode.startswith("store"):
            running = target_running(self.options, mode, folder, address, self.logs / "target.log")
            self._target_pid = stack.enter_context(running).pid
        return stack

    async def _idle(self) -> None:
        """Measure the idle power of an engine that is up."""
        say(f"{await self.meter.measure_idle():.0f} W idle" if self.meter else f"energy {self.report.energy}")

    async def _fill(self, endpoint: Endpoint, mode: str, pool: Pool) -> None:
        begun, clients = time.monotonic(), max(self.options.clients)
        await warm_up(endpoint, pool, clients)
        counted = await settled(endpoint, SETTLE_SECONDS, SETTLE_SECONDS_MAX)
        for _ in range(1, self.options.fills):
            before = stored_bytes(counted)
            await ask_again(endpoint, pool, clients)
            counted = await settled(endpoint, SETTLE_SECONDS, SETTLE_SECONDS_MAX)
            if stored_bytes(counted) == before:
                break
        self.report.warm_ups[mode] = of_tier(counted)
        stored = {name: round(value) for name, value in counted.items() if name.startswith("kvtier_stored_chunks")}
        put = stored_bytes(counted) / 1e9
        say(f"{mode}: warm after {time.monotonic() - begun:.0f} s, {put:.3f} GB put into tiers {stored or ''}")

    async def _measure(self, endpoint: Endpoint, mode: str, pool: Pool) -> None:
        options = self.options
        if not options.seconds:
            return
        for clients in options.clients if self._round % 2 == 0 else reversed(options.clients):
            point = await measure(
                endpoint, pool, mode, clients, seconds=options.seconds, ramp_seconds=options.ramp, meter=self.meter
            )
            self._add(point)

    async def _follow(self, endpoint: Endpoint, mode: str, pool: Pool, breaking: Breaking | None = None) -> None:
        options = self.options
        if not options.timeline or self._round:
            return
        timeline = Timeline(mode, options.clients[-1])
        self.report.timelines.append(timeline)

        def tell(moment: Moment) -> None:
            say(f"{mode}: {moment_line(moment)}")
            self.write()

        await follow(
            endpoint,
            pool,
            timeline,
            seconds=options.timeline,
            ramp_seconds=options.ramp,
            tell=tell,
            meter=self.meter,
            breaking=breaking,
        )
        self.write()

    async def _measure_first_tokens(self, endpoint: Endpoint, mode: str) -> None:
        options = self.options
        known = {(one.mode, one.prompt_tokens) for one in self.report.first_tokens}
        for tokens in options.first_token:
            if (mode, tokens) in known:
                continue  # in an earlier round
            media = MEDIA.get(mode, ("cold", "hbm"))
            found = await first_tokens(endpoint, mode, tokens, options.repeats, options.seed + tokens, media)
            self.report.first_tokens += found
            say(f"{mode}: {tokens} tokens: " + ", ".join(f"{one.medium} {one.ttft_ms_median:.0f} ms" for one in found))
            self.write()

    async def _measure_fresh(self, endpoint: Endpoint, mode: str) -> None:
        pool, clients = self._pool(FRESH, 1 + self._round), min(self.options.clients)
        self._add(await measure_all(endpoint, pool, f"{mode}, fresh", clients, self.options.fresh))

    def _add(self, point: Point) -> None:
        self.report.points.append(point)
        say(line(point))
        self.write()

    def write(self) -> None:
        self.report.best = best(medians(self.report.points))
        self.report.over = over(self.options.over, self.report.points)
        if self.options.json_file:
            content = msgspec.json.format(msgspec.json.encode(self.report), indent=2)
            self.options.json_file.write_bytes(content + b"\n")


def by_engine(modes: list[str]) -> list[list[str]]:
    """Modes in groups that share one engine. Of the store's modes, the one with a hot cache comes first, since the
    warm-up fills it."""
    store = [mode for mode in reversed(MODES) if mode in modes and mode.startswith("store")]
    found = [[mode] for mode in modes if mode not in store]
    return [*found, store] if store else found


def seal_key(folder: Path) -> Path:
    """A file with a key for this run's workers."""
    path = folder / "seal.yaml"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"- {{id: 1, key: '{secrets.token_hex(SECRET_BYTES)}'}}\n")
    return path


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


HEADER = (
    f"{'mode':<13}{'clients':>8}{'requests/s':>12}{'TTFT ms':>9}{'p50':>8}{'p99':>8}{'TPOT ms':>9}{'p50':>7}{'p99':>7}"
    f"{'gap p99':>9}"
    f"{'out tok/s':>11}{'HBM':>6}{'tiers':>7}{'store GB/s':>12}{'failed':>8}"
)


def line(point: Point) -> str:
    return (
        f"{point.mode:<13}{point.clients:>8}{point.requests_per_second:>12.2f}{point.ttft_ms_mean:>9.0f}"
        f"{point.ttft_ms_p50:>8.0f}{point.ttft_ms_p99:>8.0f}{point.tpot_ms_mean:>9.1f}{point.tpot_ms_p50:>7.1f}"
        f"{point.tpot_ms_p99:>7.1f}{point.gap_ms_p99:>9.0f}"
        f"{point.output_tokens_per_second:>11.0f}{point.hbm_hit_share:>6.0%}{point.external_hit_share:>7.0%}"
        f"{point.store_bytes_per_second / 1e9:>12.2f}{point.failed:>8}"
    )


def moment_line(moment: Moment) -> str:
    ttft, tpot = (math.nan if one is None else one for one in (moment.ttft_ms_mean, moment.tpot_ms_mean))
    return (
        f"{moment.second:>6.0f} s {moment.requests_per_second:>8.2f} requests/s, TTFT {ttft:>6.0f} ms,"
        f" TPOT {tpot:>6.1f} ms, {moment.failed} failed"
    )


def energy_line(point: Point) -> str:
    return (
        f"{point.mode}, {point.clients} clients: {point.watts:.0f} W ({point.idle_watts:.0f} idle);"
        f" {point.joules_per_request:.0f} J a request ({point.joules_per_request_over_idle:.0f} over idle),"
        f" {point.joules_per_1000_tokens:.0f} J for 1,000 tokens of output"
        f" ({point.joules_per_1000_tokens_over_idle:.0f} over idle)"
    )


def timeline_lines(timeline: Timeline) -> list[str]:
    name = f"{timeline.mode}, {timeline.clients} clients"
    found = [f"{name}, a time line:", *(f"  {moment_line(one)}" for one in timeline.moments)]
    if timeline.lowest is not None:
        found.append(f"{name}: lowest 30 s {timeline.lowest:.2f} requests/s, from {timeline.lowest_second:.0f} s")
    if timeline.whole is not None:
        found += [HEADER, line(timeline.whole), *([energy_line(timeline.whole)] if timeline.whole.watts else [])]
    if timeline.fault is not None:
        found.append(f"{name}: {fault_line(timeline.fault)}")
    return [*found, ""]


def fault_line(fault: Fault) -> str:
    if fault.killed is None:
        return f"{fault.process} not yet killed"
    if fault.started is None:
        return f"{fault.process} killed at {fault.killed:.1f} s, not up again"
    back = "none seen" if fault.hits_back_seconds is None else f"{fault.hits_back_seconds:.1f} s later"
    return (
        f"{fault.process} killed at {fault.killed:.1f} s, up again at {fault.started:.1f} s; hits of the store: {back}"
    )


def spread(of: Spread) -> str:
    return f"{of[0]:.3f} ({of[1]:.3f} to {of[2]:.3f})"


def table(report: Report) -> str:
    lines = [report.command, f"the pool's prompts have {report.pool_tokens} tokens"]
    lines += [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.machine.items()), ""]
    if report.points:
        points = medians(report.points)
        lines += [HEADER, *map(line, points), ""]
        lines += [
            f"{one.mode}, {one.clients} clients: {one.failed} failed, the first: {one.first_failure}"
            for one in points
            if one.failed
        ]
    lines += [energy_line(one) for one in medians(report.points) if one.watts]
    lines += [f"energy {report.energy}"] if report.energy else []
    for timeline in report.timelines:
        lines += timeline_lines(timeline)
    for mode, of_mode in report.best.items():
        lines += [f"{mode}: {most:.2f} requests/s with TPOT <= {limit} ms" for limit, most in of_mode.items()]
    lines += [
        f"{one.mode}, {one.clients} clients, over {one.base}: requests/s {spread(one.requests_per_second)},"
        f" TTFT {spread(one.ttft)}"
        for one in report.over
    ]
    lines += [
        f"{one.mode}: first token of {one.prompt_tokens} tokens, {one.medium}: {one.ttft_ms_median:.0f} ms"
        f" ({one.ttft_ms[0]:.0f} to {one.ttft_ms[-1]:.0f}), {one.computed_share:.0%} computed"
        for one in report.first_tokens
    ]
    lines += [f"{mode}: NOT MEASURED: {reason}" for mode, reason in report.failed.items()]
    return "\n".join(lines)


def page(report: Report) -> str:
    return plot(medians(report.points), report.timelines, report.machine)


def main() -> int:
    leave_on_sigterm()
    options = parse(sys.argv[1:])
    logs = Path(tempfile.mkdtemp(prefix="kvtier-turns-logs-"))
    bench = Bench(options, logs, gpus=0 if options.url else options.tensor_parallel)
    try:
        if not options.url:
            bench.describe_machine()
        asyncio.run(bench.run())
    finally:
        bench.write()
        shutil.rmtree(logs, ignore_errors=True)
    print(table(bench.report))
    if options.plot:
        options.plot.write_text(page(bench.report))
    return 1 if bench.report.failed else 0


if __name__ == "__main__":
    run_command("benchmarks.chat", main)
