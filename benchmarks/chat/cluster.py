"""Multi-turn chat against served clusters, started one after the other: stock Dynamo, and this project's.

    python -m benchmarks.chat.cluster --model DIR --workers N --gpus-per-worker N --modes stock,kvtier-memory \\
        --clients 16,32 --hbm-tokens N --dram SIZE --hot SIZE --capacity SIZE --dir DIR --json FILE [--plot FILE.svg]

A mode is a file in benchmarks/chat/clusters/; all have the same workers, HBM and DRAM, NATS, and files for discovery.
With 1p1d half of the workers prefill and half decode. The pool is played until the tiers store nothing more, at most
--fills times. kvtier-memory and kvtier-disk share one cluster and its filled pool: the target is restarted without its
cache once it has written everything.

Stock frontends return no token ids. So only the prompts of earlier turns are reused, and answers are replaced by other
tokens of the same number. --kill names a process, such as Store-0, VllmWorker-0 or Router-0; it has no effect on modes
without that process. SIGTERM and SIGINT stop the cluster, which takes up to a minute; --json has the results so far.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import Field

from benchmarks.chat.__main__ import (
    ENGINE_ENVIRONMENT,
    ROOT,
    Bench,
    Positive,
    add_engine_arguments,
    add_load_arguments,
    check_folders,
    check_load,
    engine_arguments,
    page,
    say,
    split,
    table,
)
from benchmarks.chat.__main__ import Options as ChatOptions
from benchmarks.chat.clusters import FOLDER
from benchmarks.chat.load import CHAT, Endpoint, page_lines
from benchmarks.chat.timeline import Breaking
from graphs.serve import Supervisor, dry_run
from graphs.service import Deployment, Process, load_deployment
from graphs.services import free_port, frontend_url
from kvstore.errors import ConfigError, FailedError, UnavailableError, run_command, validated

_STOCK = "benchmarks.chat.clusters:Frontend"
GRAPHS = {
    "stock": _STOCK,
    "stock-dram": _STOCK,
    "stock-files": _STOCK,
    "kvtier-disk": "graphs.agg_router:Frontend",
    "kvtier-memory": "graphs.agg_router:Frontend",
    "kvtier-dynamo-router": "graphs.agg:Frontend",
    "1p1d-stock": "benchmarks.chat.clusters:DisaggregatedFrontend",
    "1p1d-kvtier": "graphs.disagg_router:Frontend",
}
DEFAULT_MODES = ("stock", "kvtier-memory")
WORKERS = ("VllmWorker", "PrefillWorker", "DecodeWorker")
MODEL = "chat"
_ANSWER_SECONDS = 120.0
# Timeout for a target to write its dirty data.
_WRITTEN_SECONDS = 120.0


class Options(ChatOptions):
    """The command line, checked."""

    modes: list[str] = Field(default_factory=lambda: list(DEFAULT_MODES))
    workers: Positive = 1
    gpus_per_worker: int = Field(1, ge=0)
    over: str = "stock"
    kill: str = ""  # type: ignore[assignment]
    logs: Path | None = None
    dry_run: bool = False


def parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workers", help="default 1; with 1p1d those of both kinds")
    add("--gpus-per-worker", help="default 1; 0: vLLM's CPU engine. Also the tensor parallelism, if that is not given")
    add("--modes", help=f"of {', '.join(GRAPHS)}; default {','.join(DEFAULT_MODES)}")
    add("--over", help="mode that the others are compared with; default stock")
    add("--kill", help="process to kill at a third of a timeline, and to start again at two thirds")
    add("--logs", help="folder for what the processes say; default: it is gone with each cluster")
    add("--dry-run", action="store_true", help="show the processes, and start none")
    add_load_arguments(parser)
    add_engine_arguments(parser)
    values = split(vars(parser.parse_args(argv)))
    if values["tensor_parallel"] is None and (values["gpus_per_worker"] or "0").isdecimal():
        values["tensor_parallel"] = max(1, int(values["gpus_per_worker"] or 1))
    options = validated(Options, values)
    for name, mode in [("over", options.over), *(("modes", mode) for mode in options.modes)]:
        if mode not in GRAPHS:
            raise ConfigError(name, mode, f"{'one' if name == 'over' else 'some'} of {','.join(GRAPHS)}")
        if mode.startswith("1p1d") and name == "modes" and options.workers % 2:
            raise ConfigError.conflicting("workers", options.workers, f"--modes {mode}", "an even number")
    if options.kill and not options.timeline:
        raise ConfigError.missing("timeline", "more than 0 seconds", required_by="--kill")
    check_load(options)
    check_folders(options)
    return options


def settings_of(arguments: list[str]) -> dict[str, str | bool]:
    """An engine's arguments as a YAML has them: `--key value`, `--key=value` and `--key`."""
    found: dict[str, str | bool] = {}
    key = ""
    for word in arguments:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            found[key] = value if equals else True
        elif not key or found[key] is not True:
            raise ConfigError("engine", word, "arguments such as --key value")
        else:
            found[key] = word
    return found


def by_cluster(modes: Sequence[str]) -> list[list[str]]:
    """Modes in groups that share one cluster. The mode with the target's cache comes first, since the warm-up fills
    it."""
    both = ["kvtier-memory", "kvtier-disk"]
    if not set(both) <= set(modes):
        return [[mode] for mode in modes]
    return [both if mode == both[0] else [mode] for mode in modes if mode != both[1]]


def deployment_of(options: Options, mode: str, folder: Path, beside: Deployment | None = None) -> Deployment:
    """The mode's YAML with this run's sizes, machine and free ports, or with the ports of another mode's."""
    template = string.Template((ROOT / FOLDER / f"{mode}.yaml").read_text())
    sizes = {name: int(getattr(options, name)) for name in ("dram", "capacity", "hot", "blocks_per_chunk")}
    config = folder / f"{mode}.yaml"
    config.write_text(template.substitute(sizes, files=folder / "files"))
    engine = {**settings_of(engine_arguments(options, None)), "served-model-name": MODEL}
    kinds = WORKERS[1:] if mode.startswith("1p1d") else WORKERS[:1]
    given: dict[str, object] = {
        "Nats.listen": f"127.0.0.1:{free_port()}",
        "Frontend.port": free_port(),
    }
    if "stock" not in mode:
        given |= {"Store.listen": f"127.0.0.1:{free_port()}", "Store.metrics-port": free_port()}
    if beside:
        given |= {f"{name}.listen": beside.of(name).flags["listen"] for name in ("Nats", "Store")}
    for kind in kinds:
        given |= {f"{kind}.{key}": value for key, value in engine.items()}
        given[f"{kind}.ServiceArgs.workers"] = options.workers // len(kinds)
        given[f"{kind}.ServiceArgs.resources.gpu"] = options.gpus_per_worker
    overrides = [f"--{name}={json.dumps(value)}" for name, value in given.items()]
    overrides += [f"--{kind}.env.{name}={value}" for kind in kinds for name, value in ENGINE_ENVIRONMENT.items()]
    return load_deployment(GRAPHS[mode], config, overrides, folder / "state")


class ClusterBench(Bench):
    """Runs the same load against one cluster after the other."""

    def __init__(self, options: Options, logs: Path):
        gpus = options.workers * options.gpus_per_worker
        super().__init__(options, logs, gpus=gpus, module="benchmarks.chat.cluster")
        self._cluster = options

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            for modes in by_cluster(self._cluster.modes):
                with tempfile.TemporaryDirectory(prefix=f"kvtier-{modes[0]}-", dir=self._cluster.dir) as folder:
                    try:
                        await self._serve(session, modes, Path(folder))
                    except (FailedError, UnavailableError, ConnectionError, TimeoutError) as error:
                        for mode in modes:
                            if all(point.mode != mode for point in self.report.points):
                                self.report.failed[mode] = str(error)
                        say(f"{modes[0]}: {error}")
                        self.write()

    async def _serve(self, session: aiohttp.ClientSession, modes: list[str], folder: Path) -> None:
        mode, begun = modes[0], time.monotonic()
        deployment = deployment_of(self._cluster, mode, folder)
        supervisor = Supervisor(
            deployment,
            lambda name, line: None,
            status=lambda name, line: say(f"{mode}: {name} {line}"),
            restart=False,
            logs=self._cluster.logs and self._cluster.logs / mode,
        )
        await supervisor.start()
        try:
            workers = [child.process for child in supervisor.children.values() if child.process.service in WORKERS]
            pages = [f"http://127.0.0.1:{worker.metrics_port}/metrics" for worker in workers]
            url = frontend_url(deployment)
            endpoint = Endpoint(session, url, MODEL, asks_ids=False, metrics=pages)
            await until_answered(endpoint)
            say(f"{mode}: up after {time.monotonic() - begun:.0f} s")
            await self._idle()
            pool = self._pool(CHAT)
            await self._fill(endpoint, mode, pool)
            for mode in modes:
                if mode != modes[0]:
                    beside = deployment_of(self._cluster, mode, folder, beside=deployment)
                    await change_targets(session, supervisor, beside)
                await self._measure(endpoint, mode, pool)
                await self._follow(endpoint, mode, pool, breaking(supervisor, self._cluster.kill))
        finally:
            await supervisor.stop()


async def change_targets(session: aiohttp.ClientSession, supervisor: Supervisor, beside: Deployment) -> None:
    """Restart the targets with the settings of `beside`, over the same folders, once they have written everything."""
    targets = [child for child in supervisor.children.values() if child.process.service == "Store"]
    deadline = time.monotonic() + _WRITTEN_SECONDS
    while any([await dirty_bytes(session, child.process) for child in targets]) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    await asyncio.gather(*(supervisor.end(child) for child in targets))
    for process in beside.processes():
        if process.service == "Store":
            await supervisor.launch(process)


async def dirty_bytes(session: aiohttp.ClientSession, target: Process) -> float:
    lines = await page_lines(session, f"http://127.0.0.1:{target.metrics_port}/metrics")
    return sum(float(line.split()[-1]) for line in lines if line.startswith("kvtier_target_dirty_bytes"))


def breaking(supervisor: Supervisor, name: str) -> Breaking | None:
    if name not in supervisor.children:
        return None
    process = supervisor.children[name].process

    async def kill() -> None:
        await supervisor.end(supervisor.children[name], signal.SIGKILL)

    async def start() -> None:
        await supervisor.launch(process)

    return Breaking(name, kill, start)


async def until_answered(endpoint: Endpoint) -> None:
    """Wait until the frontend has found the workers. Raises TimeoutError."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(endpoint.complete([50] * 8, 1), 30)
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {_ANSWER_SECONDS:.0f} s")
        await asyncio.sleep(0.5)


async def run(bench: ClusterBench) -> None:
    """Run until all is measured. SIGTERM and SIGINT stop running processes first."""
    running: Any = asyncio.current_task()

    def stop() -> None:
        if not running.cancelling():  # `timeout` sends it twice
            running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await bench.run()


def main() -> int:
    options = parse(sys.argv[1:])
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            for mode in options.modes:
                print(f"## {mode}\n", *dry_run(deployment_of(options, mode, Path(folder))), sep="\n")
        return 0
    bench = ClusterBench(options, options.dir)
    stopped = False
    try:
        bench.describe_machine()
        asyncio.run(run(bench))
    except asyncio.CancelledError:
        stopped = True
    finally:
        bench.write()
    print(table(bench.report))
    if options.plot:
        options.plot.write_text(page(bench.report))
    return 143 if stopped else 1 if bench.report.failed else 0


if __name__ == "__main__":
    run_command("benchmarks.chat.cluster", main)
