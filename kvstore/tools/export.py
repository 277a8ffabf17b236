"""`python -m kvstore export`: writes chunks of running targets to a file."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated

import msgspec
from pydantic import ByteSize, Field

from kvstore import seal
from kvstore.errors import ConfigError, FailedError, UnavailableError, validated
from kvstore.keys import sequence_hashes
from kvstore.net import wire
from kvstore.net.client import StoreClient
from kvstore.net.wire import Listing, Outcome
from kvstore.text import in_units
from kvstore.tools import words
from kvstore.tools.archive import Writer
from kvstore.tools.targets import TargetOptions, add_target_arguments, open_client, open_targets

HELP = """Write chunks of running targets to a file, for `import` into another store: the chunks of some prompts, or all
of a fingerprint. A fingerprint stands for everything that decides what the bytes of a chunk mean: the model, the
engine's version, the KV layout. Without FILE, list the fingerprints. The exit code is 1 if a target did not send a
chunk.

A target lists its chunks to a client that proves its namespace's credential, or that runs as the target's user on the
target's host. Sealed values stay sealed: only workers with the seal key can use them.

  python -m kvstore export 127.0.0.1:7600
  python -m kvstore export 127.0.0.1:7600 documents.kvtier --fingerprint 5e884898da280471
  python -m kvstore export 127.0.0.1:7600 system.kvtier --tokens system.json --block-size 16
"""

_LIST_SECONDS = 10.0
_GET_SECONDS = 30.0
_TRIES = 3
_BATCH_BYTES = 32 << 20
_TOKENS_BYTES_MAX = 64 << 20  # of a file with a prompt's

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Tokenized(msgspec.Struct):
    """A response of vLLM's /tokenize."""

    tokens: list[Token]


class Options(TargetOptions):
    file: Path | None = None
    fingerprint: str | None = None
    tokens: list[Path] = Field([])
    block_size: int | None = Field(None, gt=0)
    lora_name: str | None = None
    cache_salt: str | None = None
    max: ByteSize | None = Field(None, gt=0)
    as_json: bool = False


class Held(msgspec.Struct):
    """The chunks of a fingerprint on all targets."""

    chunks: int = 0
    bytes: int = 0


class Prompt(msgspec.Struct):
    """How much of a prompt is exported. `leading` counts the chunks before the first gap: engines can use only
    those."""

    file: str
    chunks: int
    leading: int


class Exported(msgspec.Struct):
    file: str
    fingerprint: str
    chunks: int = 0
    bytes: int = 0
    sealed: int = 0  # included in `chunks`
    gone: int = 0  # evicted or found corrupt after they were listed
    failed: int = 0  # not sent by their target
    unnamed: int = 0  # without a router hash; left out with --tokens
    cut: bool = False  # --max was reached
    prompts: list[Prompt] = []


def main(argv: list[str]) -> int:
    options = _parse(argv)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    fingerprint = parse_fingerprint(options.fingerprint) if options.fingerprint else None
    prompts = _prompts(options)
    if options.file is not None and options.file.exists():
        raise ConfigError("file", options.file, "a file that does not exist yet")
    membership = open_targets(options)
    with contextlib.closing(open_client(options, membership, "kvtier-export")) as client:
        targets = membership.targets()
        if options.file is None or fingerprint is None:
            held = _held(_listed(client, targets, fingerprint or 0))
            if options.file is None:
                print(msgspec.json.encode(held).decode() if options.as_json else _table(held))
                return 0
            if len(held) != 1:
                raise ConfigError.missing("fingerprint", f"one of {', '.join(held) or '(the targets hold no chunk)'}")
            fingerprint = parse_fingerprint(*held)
        result = Exported(str(options.file), f"{fingerprint:016x}")
        wanted = {number for hashes in prompts.values() for number in hashes} if options.tokens else None
        chosen = _chosen(_listed(client, targets, fingerprint), wanted, result)
        with _created(options.file) as file:
            writer = Writer(file, fingerprint)
            found = _fill(writer, client, chosen, wanted or set(), options.max, result)
            if not writer.chunks:
                what = f"fingerprint {result.fingerprint}" + (" and these tokens" if prompts else "")
                why = f"{result.failed} failed, {result.unnamed} belong to no known prompt"
                raise UnavailableError(f"store: no chunk of {what} can be read ({why}): no file written")
            writer.end()
    result.prompts = [_leading(path, hashes, found) for path, hashes in prompts.items()]
    print(msgspec.json.encode(result).decode() if options.as_json else _summary(result))
    return 1 if result.failed else 0


def _parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore export", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_target_arguments(parser)
    parser.add_argument("file", nargs="?", help="file to write; default: none, list the fingerprints")
    parser.add_argument("--fingerprint", help="of the chunks, in hexadecimal; needed if the targets hold several")
    parser.add_argument(
        "--tokens",
        action="append",
        metavar="FILE",
        help="JSON with a prompt's token ids: a list, or a response of vLLM's /tokenize; may be given several times; "
        "default: all chunks of the fingerprint",
    )
    parser.add_argument("--block-size", help="the engine's (vLLM's --block-size), for --tokens")
    parser.add_argument("--lora-name", help="adapter of the requests with --tokens")
    parser.add_argument("--cache-salt", help="cache_salt of the requests with --tokens")
    parser.add_argument("--max", help="limit of the values' total size, for example 100G; default: no limit")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    return validated(Options, vars(parser.parse_args(argv)))


def parse_fingerprint(text: str) -> int:
    """Raises ConfigError."""
    try:
        number = int(text, 16)
    except ValueError:
        number = 0
    if not 0 < number < 1 << 64:
        raise ConfigError("fingerprint", text, "up to 16 hexadecimal digits, not zero")
    return number


# ---- what is chosen


def _prompts(options: Options) -> dict[Path, list[int]]:
    """The router hash of each block, by the prompt's file. Raises ConfigError."""
    if options.tokens and options.block_size is None:
        raise ConfigError.missing("block-size", "the engine's tokens per block", required_by="--tokens")
    return {
        path: sequence_hashes(
            _tokens(path),
            options.block_size or 0,
            lora_name=options.lora_name,
            cache_namespace=options.cache_salt,
        )
        for path in options.tokens
    }


def _tokens(path: Path) -> list[int]:
    try:
        with path.open("rb") as file:
            raw = file.read(_TOKENS_BYTES_MAX + 1)
        if len(raw) > _TOKENS_BYTES_MAX:
            raise ConfigError("tokens", path, f"a file of at most {_TOKENS_BYTES_MAX} bytes")
        tokens = msgspec.json.decode(raw, type=list[Token] | Tokenized)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError("tokens", path, f"a file with token ids as JSON ({error})") from None
    return tokens.tokens if isinstance(tokens, Tokenized) else tokens


def _listed(client: StoreClient, targets: Sequence[str], fingerprint: int) -> Iterator[tuple[str, Listing]]:
    """All chunks that the targets list. Raises UnavailableError if a target does not answer."""
    for target in targets:
        ask: wire.List | None = wire.List(fingerprint)
        while ask is not None:
            answer = client.listed(target, ask, time.monotonic() + _LIST_SECONDS)
            if answer is None or (answer.cursor is not None and answer.cursor <= ask.cursor):
                reason = client.failure(target) or f"no answer in {_LIST_SECONDS:g} s"
                raise UnavailableError(f"store: {target} does not list its chunks: {reason}")
            yield from ((target, chunk) for chunk in answer.chunks)
            ask = None if answer.cursor is None else wire.List(fingerprint, answer.cursor)


def _held(listed: Iterable[tuple[str, Listing]]) -> dict[str, Held]:
    held: dict[str, Held] = {}
    for _, chunk in listed:
        one = held.setdefault(f"{chunk.fingerprint:016x}", Held())
        one.chunks += 1
        one.bytes += chunk.length
    return held


def _chosen(
    listed: Iterable[tuple[str, Listing]], wanted: set[int] | None, result: Exported
) -> Iterator[tuple[str, Listing]]:
    """Chunks whose router hash is in `wanted`; all chunks if it is None."""
    for target, chunk in listed:
        if wanted is None or chunk.router_hash in wanted:
            yield target, chunk
        elif not chunk.router_hash:
            result.unnamed += 1


# ---- the file


@contextlib.contextmanager
def _created(path: Path) -> Iterator[BufferedIOBase]:
    """A new file that only its owner can read. It appears under its name when the body has succeeded. Raises
    ConfigError, FailedError."""
    try:
        fd, beside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError("file", path, f"a file in a writable directory ({error.strerror})") from None
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.rename(beside, path)
    except OSError as error:
        raise FailedError(f"file: {path} cannot be written: {error.strerror}") from None
    finally:
        Path(beside).unlink(missing_ok=True)


def _fill(
    writer: Writer,
    client: StoreClient,
    chosen: Iterable[tuple[str, Listing]],
    wanted: set[int],
    bytes_max: int | None,
    result: Exported,
) -> dict[int, int]:
    """Get the chunks in batches and write them. Returns the wanted router hashes that were written -> their blocks per
    chunk."""
    found: dict[int, int] = {}
    for batch in _batches(chosen, bytes_max, result):
        for chunk, value in _got(client, batch, result):
            writer.add(chunk, value)
            result.sealed += value[-seal.TRAILER_BYTES :][: len(seal.MAGIC)] == seal.MAGIC
            if chunk.router_hash in wanted:
                found[chunk.router_hash] = chunk.blocks_per_chunk
    result.chunks, result.bytes = writer.chunks, writer.payload_bytes
    return found


def _batches(
    chosen: Iterable[tuple[str, Listing]], bytes_max: int | None, result: Exported
) -> Iterator[list[tuple[str, Listing]]]:
    batch: list[tuple[str, Listing]] = []
    batch_bytes = total = 0
    for target, chunk in chosen:
        total += chunk.length
        if bytes_max is not None and total > bytes_max:
            result.cut = True
            break
        if batch and (batch_bytes + chunk.length > _BATCH_BYTES or len(batch) == wire.KEYS_MAX):
            yield batch
            batch, batch_bytes = [], 0
        batch.append((target, chunk))
        batch_bytes += chunk.length
    if batch:
        yield batch


def _got(
    client: StoreClient, batch: list[tuple[str, Listing]], result: Exported
) -> Iterator[tuple[Listing, memoryview]]:
    """The chunks of a batch that could be read, with their values. Counts the others."""
    for _ in range(_TRIES):
        values = [memoryview(bytearray(chunk.length)) for _, chunk in batch]
        outcomes = client.get(
            [chunk.key for _, chunk in batch],
            values,
            time.monotonic() + _GET_SECONDS,
            targets=[target for target, _ in batch],
        )
        again = []
        for one, value, outcome in zip(batch, values, outcomes, strict=True):
            if outcome is Outcome.HIT:
                yield one[1], value
            elif outcome in (Outcome.MISS, Outcome.CORRUPT):
                result.gone += 1
            else:
                again.append(one)
        if not again:
            return
        batch = again
        time.sleep(1.0)
    result.failed += len(batch)


# ---- what is said


def _leading(path: Path, hashes: Sequence[int], found: Mapping[int, int]) -> Prompt:
    blocks = next((found[number] for number in hashes if number in found), 1)
    chunks = hashes[blocks - 1 :: blocks]
    missing = (place for place, number in enumerate(chunks) if number not in found)
    return Prompt(str(path), len(chunks), next(missing, len(chunks)))


def _table(held: Mapping[str, Held]) -> str:
    rows = [[name, f"{one.chunks:,}", in_units(one.bytes)] for name, one in sorted(held.items())]
    return words.table([["fingerprint", "chunks", "values"], *rows])


def _summary(result: Exported) -> str:
    lines = [
        f"{result.file}: {result.chunks:,} chunks of fingerprint {result.fingerprint}, {in_units(result.bytes)}, "
        f"{result.sealed:,} sealed; {result.gone:,} were gone, {result.failed:,} failed",
        *(f"{one.file}: the first {one.leading:,} of {one.chunks:,} chunks are in it" for one in result.prompts),
    ]
    if result.prompts and result.unnamed:
        lines.append(
            f"{result.unnamed:,} chunks belong to no known prompt and were left out. Models with several KV groups "
            "need them: export such a model without --tokens"
        )
    if result.cut:
        lines.append("--max was reached: more chunks exist")
    return "\n".join(lines)
