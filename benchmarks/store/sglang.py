"""SGLang's HiCache on several storage backends: pages stored and loaded as by SGLang's controller.

    python -m benchmarks.store.sglang [--dir DIR] [--page-tokens 16,64] [--pages N] [--rounds N] [--json FILE]

Pages are those of Llama-3.1-8B in BF16 (128 KiB a token), in a host pool of layout page_first. `set` and `get` are the
functions that the controller has chosen for a backend, on one batch. The time includes copies between host pool and
backend, if the backend needs them. In each round every side stores new pages, then loads and compares them. A figure is
the median over the rounds, with quartiles. A ratio is to the file backend in the same round.

Memory:
- `file`: SGLang's HiCacheFile in DIR, which writes to the page cache and reads from it;
- `kvtier`: a target with a hot cache and durability memory;
- `mooncake`: Mooncake's store over TCP, with the values in another process (left out unless mooncake-transfer-engine is
  in this environment).

Disk: `file` includes an fdatasync of each file, and reads after the page cache was dropped. The target has durability
written, and reads without a hot cache.
"""

import argparse
import importlib.util
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec
import torch
from sglang.srt.managers.cache_controller import STORAGE_BATCH_SIZE, PrefetchOperation
from sglang.srt.mem_cache.hicache_storage import HiCacheFile
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from benchmarks.store.__main__ import command
from benchmarks.store.hicache import HiCache, kvtier, load
from benchmarks.store.results import Spread, paired, size_name, spread
from benchmarks.store.servers import Mooncake
from benchmarks.store.wire_fuzz import TargetProcess
from kvstore.errors import ConfigError, UnavailableError, run_command

_LAYERS, _SHAPE = 32, {"head_num": 8, "head_dim": 128}
_TARGET_OPTIONS = ("--capacity", "8GiB", "--buffers", "512MiB")
_HOT_OPTIONS = ("--hot", "2GiB", "--durability", "memory", "--dirty", "1GiB")
_FILES = {"memory": "file", "disk": "file, fdatasync"}  # what sides of a medium are compared with


class Row(msgspec.Struct):
    page_bytes: int
    batch_pages: int
    medium: str
    operation: str
    side: str
    gbytes_per_second: Spread
    pages_per_second: float
    ratio_to_file: Spread


class Report(msgspec.Struct):
    machine: str
    cores: int
    sglang: str
    rounds: int
    rows: list[Row]


class Side(NamedTuple):
    """A backend in a HiCache of its own."""

    cache: HiCache
    medium: str = "memory"
    flush: Callable[[], None] = lambda: None  # called once it has stored


def measure(folder: Path, page_tokens: int, pages: int, rounds: int) -> list[Row]:
    speeds: dict[tuple[str, str], list[float]] = {}
    with TemporaryDirectory(dir=folder) as place, ExitStack() as stack:
        sides = _open(Path(place), page_tokens, pages, stack)
        some = next(iter(sides.values())).cache.pool
        page_bytes = some.size_per_token * page_tokens
        content = torch.empty(pages * page_bytes, dtype=torch.uint8).random_().view(pages, -1)
        for side in sides.values():
            for number, page in enumerate(content):
                side.cache.pool.set_from_flat_data_page(number * page_tokens, page.view(some.dtype))
        for number in range(rounds + 1):  # the first warms up
            for name in list(sides) if number % 2 else reversed(sides):
                hashes = [f"{list(sides).index(name):016x}{number:016x}{page:032x}" for page in range(pages)]
                for operation, seconds in zip(("set", "get"), _play(sides[name], hashes, content), strict=True):
                    if number:
                        speeds.setdefault((operation, name), []).append(pages * page_bytes / seconds / 1e9)
    return [
        Row(
            page_bytes,
            pages,
            sides[name].medium,
            operation,
            name,
            spread(found),
            round(spread(found).median * 1e9 / page_bytes, 1),
            paired(found, speeds[operation, _FILES[sides[name].medium]]),
        )
        for (operation, name), found in speeds.items()
    ]


def _open(folder: Path, page_tokens: int, pages: int, stack: ExitStack) -> dict[str, Side]:
    def attached(backend: str, extra_config: dict[str, object]) -> HiCache:
        cache = HiCache(MHATokenToKVPool, _SHAPE, layers=_LAYERS, page_tokens=page_tokens, pages=2 * pages)
        cache.attach_backend(backend, extra_config)
        stack.callback(cache.detach)
        return cache

    def target(*options: str) -> str:
        process = TargetProcess(Path(tempfile.mkdtemp(dir=folder)), *_TARGET_OPTIONS, *options)
        stack.callback(process.stop)
        return process.address

    files = folder / "files"
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(files)
    sides = {
        "file": Side(attached("file", {})),
        "file, fdatasync": Side(attached("file", {}), "disk", lambda: _flush(files)),
        "kvtier, UNIX": Side(attached("dynamic", kvtier(target(*_HOT_OPTIONS)))),
        "kvtier, TCP": Side(attached("dynamic", kvtier(target(*_HOT_OPTIONS, "--unix-socket", "")))),
        "kvtier, written": Side(attached("dynamic", kvtier(target())), "disk"),
    }
    if importlib.util.find_spec("mooncake"):
        owner = Mooncake("mooncake", folder, sys.executable, 4 << 30)
        stack.callback(owner.stop)
        settings = owner.client_settings()
        settings["master_server_address"] = settings.pop("master_server_addr")
        sides["mooncake, TCP"] = Side(attached("mooncake", settings))
    return sides


def _play(side: Side, hashes: list[str], content: torch.Tensor) -> tuple[float, float]:
    """Store a batch from the first half of the host pool, and load it into the second: seconds of both."""
    controller, pool, page_tokens = side.cache.controller, side.cache.pool, side.cache.page_tokens
    tokens = len(hashes) * page_tokens
    indices = torch.arange(2 * tokens)
    begun = time.perf_counter()
    stored = controller.page_set_func(hashes, indices[:tokens])
    side.flush()
    set_seconds = time.perf_counter() - begun
    for first in range(tokens, 2 * tokens, page_tokens):
        pool.set_from_flat_data_page(first, torch.zeros_like(pool.get_dummy_flat_data_page()))
    operation = PrefetchOperation("request", [])
    begun = time.perf_counter()
    loaded = controller.page_get_func(operation, hashes, indices[tokens:])
    get_seconds = time.perf_counter() - begun
    found = [pool.get_data_page(first).view(torch.uint8) for first in range(tokens, 2 * tokens, page_tokens)]
    if not stored or loaded != len(hashes) or not all(map(torch.equal, found, content)):
        raise UnavailableError(
            f"{controller.storage_backend}: stored: {stored}, loaded: {loaded} of {len(hashes)} pages"
        )
    if isinstance(controller.storage_backend, HiCacheFile):
        controller.storage_backend.clear()
    return set_seconds, get_seconds


def _flush(folder: Path) -> None:
    """Sync a folder's files, and drop them from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def table(report: Report) -> str:
    lines = [f"{report.machine}, {report.cores} cores, SGLang {report.sglang}, {report.rounds} rounds"]
    lines.append(
        f"{'page':>8}  {'':<12}{'':<17}{'GB/s':>6}  {'quartiles':<14}{'pages/s':>8}  {'over file':<10}quartiles"
    )
    for row in sorted(report.rows, key=lambda row: (row.page_bytes, row.medium != "memory", row.operation != "set")):
        speed, ratio = row.gbytes_per_second, row.ratio_to_file
        lines.append(
            f"{size_name(row.page_bytes):>8}  {row.operation} {row.medium:<8}{row.side:<17}{speed.median:>6.2f}  "
            f"{_range(speed):<14}{row.pages_per_second:>8.0f}  {ratio.median:<10.2f}{_range(ratio)}"
        )
    return "\n".join(lines)


def _range(found: Spread) -> str:
    return f"{found.quartiles[0]:.2f} to {found.quartiles[1]:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.sglang", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for files and targets")
    parser.add_argument("--page-tokens", default="16,64", help="tokens in a page, comma-separated; default 16,64")
    parser.add_argument("--pages", type=int, default=32, help="in a batch, 1 to 128; default 32")
    parser.add_argument("--rounds", type=int, default=8, help="default 8")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    if not 1 <= options.pages <= STORAGE_BATCH_SIZE:
        raise ConfigError("pages", options.pages, f"1 to {STORAGE_BATCH_SIZE}, SGLang's batch")
    if options.rounds < 1:
        raise ConfigError("rounds", options.rounds, "at least 1")
    try:
        sizes = [int(size) for size in options.page_tokens.split(",")]
    except ValueError:
        raise ConfigError("page-tokens", options.page_tokens, "whole numbers, comma-separated") from None
    logging.disable(logging.WARNING)  # SGLang's of this machine

    def run() -> Report:
        rows = []
        with TemporaryDirectory() as model:
            load(Path(model), sizes[0])
        for size in sizes:
            rows += measure(options.dir, size, options.pages, options.rounds)
        cores = len(os.sched_getaffinity(0))
        machine = f"{platform.machine()} {platform.release()}"
        return Report(machine, cores, version("sglang"), options.rounds, rows)

    command(run, table, options.json)


if __name__ == "__main__":
    run_command("benchmarks.store.sglang", main)
