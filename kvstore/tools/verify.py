"""`python -m kvstore verify`: reads a stopped store from end to end and reports corruption. It never writes to it.

Nothing needs a repair. A target never serves a chunk whose checksum fails: it drops the chunk when a client reads it,
and stores it again when a worker offers it. A damaged footer is replaced by a scan at the next start.
"""

import argparse
import contextlib
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict

from kvstore.bus import messages
from kvstore.disk import record
from kvstore.disk.files import Files
from kvstore.disk.space import StoppedStore
from kvstore.errors import validated
from kvstore.text import in_units
from kvstore.tools import words
from kvstore.tools.reports import TITLES, Total, as_lines, summary
from kvstore.tools.scrub import Scrub

HELP = """Read every chunk of a stopped store and check headers, footers and the checksum of each payload. Never writes.
Prints a line for each segment, newest first, and its damage. The exit code is 1 if anything is corrupt.

superseded  a later segment has the chunk, too
dead        space of superseded and corrupt chunks, and of writes that were cut off
cut off     the last writes to a segment that was open when the target died: normal after a crash, not corrupt
key version version of a chunk's key; shown if another release made some. v1: releases before 0.2

  python -m kvstore verify --dir /nvme0
"""

# Concurrent reads of 4 MiB, about as many as a device needs for its full throughput; each holds its memory.
_THREADS = 4
_PROGRESS_SECONDS = 5.0


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dir: list[Path]
    namespace: str | None = None
    as_json: bool = False


def main(argv: list[str]) -> int:
    options = _parse(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    namespace = (
        None if options.namespace is None else record.namespace_id(messages.checked_namespace(options.namespace))
    )
    total = Total()
    with contextlib.ExitStack() as stack:
        files, stores = Files(), []
        for path in options.dir:  # open all first, so that an error shows before hours of reading
            stores.append(StoppedStore(path, files))
            stack.callback(stores[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="kvtier-verify"))
        progress = _Progress(sum(len(store.slots()) * store.superblock.segment_bytes for store in stores))
        for store in stores:
            if not options.as_json:
                print(f"{store.path}\n{TITLES}", flush=True)
            for report in Scrub(store, files, pool, namespace).reports():
                total.add(report)
                print(msgspec.json.encode(report).decode() if options.as_json else as_lines(report), flush=True)
                progress.step(store.superblock.segment_bytes, total.corrupt)
    print(msgspec.json.encode({"total": total}).decode() if options.as_json else summary(total))
    return 1 if total.corrupt else 0


def _parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore verify", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", required=True, action="append", help="directory or device of the store; may be given again"
    )
    parser.add_argument("--namespace", help="report chunks of other namespaces as corrupt; default: accept all")
    parser.add_argument("--json", action="store_true", dest="as_json", help="a JSON object a segment, then the total")
    return validated(Options, vars(parser.parse_args(argv)))


class _Progress:
    """Prints the progress of a long run to stderr."""

    def __init__(self, total_bytes: int):
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._begun = self._told = time.monotonic()

    def step(self, done_bytes: int, corrupt: int) -> None:
        self._done_bytes += done_bytes
        now = time.monotonic()
        if now - self._told < _PROGRESS_SECONDS:
            return
        self._told = now
        done, total = in_units(self._done_bytes), in_units(self._total_bytes)
        speed = words.speed(self._done_bytes / (now - self._begun))
        print(f"verify: {done} of {total}, {speed}, {corrupt} corrupt", file=sys.stderr, flush=True)
