"""`python -m kvstore import`: puts the chunks of an export file into running targets."""

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvstore.bus import messages
from kvstore.bus.broker import checked_urls
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.errors import ConfigError, FailedError, UnavailableError, validated
from kvstore.net.client import Item, StoreClient
from kvstore.net.wire import KEYS_MAX, Outcome
from kvstore.text import in_units
from kvstore.tools.archive import Reader
from kvstore.tools.export import parse_fingerprint
from kvstore.tools.targets import TargetOptions, add_target_arguments, open_client, open_targets

HELP = """Put the chunks of a file that `export` wrote into running targets, each on the target for its key.

With --fingerprint, or with --nats and running workers, a file of another fingerprint is refused: no worker would find
its chunks. Unless its values are sealed, the file must come from a trusted source. The exit code is 1 if targets
refused chunks.

  python -m kvstore import 10.1.0.7:7600,10.1.0.8:7600 system.kvtier --nats nats://10.1.0.2:4222
"""

_BATCH_BYTES = 32 << 20
_PUT_SECONDS = 60.0
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # backoff between retries, if targets write more slowly than the file is read
_HEAR_SECONDS = 3 * messages.HEARTBEAT_SECONDS


class Options(TargetOptions):
    file: Path
    fingerprint: str | None = None
    nats: str = ""
    as_json: bool = False


class Imported(msgspec.Struct):
    file: str
    fingerprint: str
    stored: int = 0
    known: int = 0  # the targets had them already
    refused: int = 0
    bytes: int = 0  # of the stored ones


def main(argv: list[str]) -> int:
    options = _parse(argv)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    given = parse_fingerprint(options.fingerprint) if options.fingerprint else None
    try:
        file = options.file.open("rb")
    except OSError as error:
        raise ConfigError("file", options.file, f"a file that can be read ({error.strerror})") from None
    with file:
        reader = Reader(file, str(options.file))
        if given is not None:
            _check(reader.fingerprint, {given}, options.file)
        if options.nats:
            urls = checked_urls("nats", options.nats)
            _check(reader.fingerprint, asyncio.run(_reported(urls, options.namespace)), options.file)
        result = Imported(str(options.file), f"{reader.fingerprint:016x}")
        with contextlib.closing(open_client(options, open_targets(options), "kvtier-import")) as client:
            try:
                for batch in _batches(reader):
                    _put(client, batch, result)
            finally:  # also report the chunks before a damaged part
                print(msgspec.json.encode(result).decode() if options.as_json else _summary(result), flush=True)
    return 1 if result.refused else 0


def _parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore import", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_target_arguments(parser)
    parser.add_argument("file", help="file that `export` wrote")
    parser.add_argument("--fingerprint", help="required fingerprint of the file, in hexadecimal")
    parser.add_argument("--nats", help="NATS servers; a worker that reports there must have the file's fingerprint")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    return validated(Options, vars(parser.parse_args(argv)))


async def _reported(urls: str, namespace: str) -> set[int]:
    """The fingerprints of the namespace's workers and of their adapters. Raises UnavailableError if none reports."""
    fingerprints: set[int] = set()

    async def heard(report: WorkerReport) -> None:
        fingerprints.update({report.fingerprint, *report.adapters.values()} - {0})

    bus = await Bus.connect(urls, "kvtier import")
    await bus.subscribe(messages.subject(messages.checked_namespace(namespace), "speed.worker"), WorkerReport, heard)
    await asyncio.sleep(_HEAR_SECONDS)
    await bus.close()
    if not fingerprints:
        raise UnavailableError(
            f"nats: no worker of namespace {namespace!r} reported in {_HEAR_SECONDS:g} s: start one, or give the "
            "required --fingerprint"
        )
    return fingerprints


def _check(fingerprint: int, expected: set[int], path: Path) -> None:
    if fingerprint not in expected:
        raise ConfigError(
            "file",
            path,
            f"a file of fingerprint {' or '.join(f'{one:016x}' for one in sorted(expected))}, not "
            f"{fingerprint:016x}: these workers cannot use chunks of another model, engine version or KV layout",
        )


def _batches(reader: Reader) -> Iterator[list[Item]]:
    batch: list[Item] = []
    batch_bytes = 0
    for chunk, value in reader.chunks():
        if batch and (batch_bytes + chunk.length > _BATCH_BYTES or len(batch) == KEYS_MAX):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(
            Item(
                chunk.key,
                value,
                chunk.router_hash,
                chunk.fingerprint,
                chunk.blocks_per_chunk,
                key_version=chunk.key_version,
            )
        )
        batch_bytes += chunk.length
    if batch:
        yield batch


def _put(client: StoreClient, batch: list[Item], result: Imported) -> None:
    """Put a batch. Raises FailedError if the targets store none of its missing chunks."""
    there = client.exists([item.key for item in batch], time.monotonic() + _PUT_SECONDS)
    result.known += there.count(Outcome.HIT)
    left = [item for item, outcome in zip(batch, there, strict=True) if outcome is not Outcome.HIT]
    missing = len(left)
    for pause in (0.0, *_PAUSES_SECONDS):
        time.sleep(pause)
        outcomes = client.put(left, time.monotonic() + _PUT_SECONDS)
        stored = [item for item, outcome in zip(left, outcomes, strict=True) if outcome is Outcome.STORED]
        result.stored += len(stored)
        result.bytes += sum(len(item.payload) for item in stored)
        left = [item for item, outcome in zip(left, outcomes, strict=True) if outcome is not Outcome.STORED]
        if not left:
            return
    result.refused += len(left)
    if len(left) == missing:
        raise FailedError(
            f"store: none of {missing} chunks was stored ({outcomes[0].name.lower()}); import the file again to "
            "resume: stored chunks are skipped"
        )


def _summary(result: Imported) -> str:
    return (
        f"{result.file}: fingerprint {result.fingerprint}; {result.stored:,} chunks stored, "
        f"{in_units(result.bytes)}; {result.known:,} were there, {result.refused:,} were refused"
    )
