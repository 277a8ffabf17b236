"""`python -m kvstore bench`: the throughput of this machine or a running target, and how many workers it can feed."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from pydantic import ByteSize, ConfigDict, Field

from kvstore import credentials
from kvstore.bus import messages
from kvstore.client_options import ClientOptions
from kvstore.disk.record import PAGE_BYTES
from kvstore.errors import ConfigError, validated
from kvstore.net import tls
from kvstore.net.wire import VALUE_BYTES_MAX
from kvstore.text import in_units
from kvstore.tools import speeds, words
from kvstore.tools.speeds import Speed, StoreSpeeds
from kvstore.tools.targets import add_namespace_arguments

HELP = """Measure the throughput of a target, and compute how many workers it can feed at their prefill speed.

--dir measures the device under a directory, through a scratch file, and the network stack of this machine. --store
measures a running target instead, with chunks of its own; run it where the workers are. With both, --dir measures this
machine's device.

  python -m kvstore bench --dir /nvme0
  python -m kvstore bench --store 10.0.0.7:7600
  python -m kvstore bench --dir /nvme0 --bytes-per-token 160KiB --tokens-per-second 12000
"""


class Model(NamedTuple):
    """A worker's prefill: KV bytes per token, and tokens per second."""

    name: str
    bytes_per_token: int
    tokens_per_second: float
    fp8_kv: bool = False


# Prefill measured on one H200 with vLLM 0.26: docs/operations.md.
MODELS = (
    Model("Llama-3.1-8B, bf16", 128 << 10, 41_000),
    Model("Llama-3.1-70B, FP8 weights", 320 << 10, 8_900),
    Model("Llama-3.1-70B, FP8 weights and KV", 160 << 10, 8_900, fp8_kv=True),
)


_SLOW = """An FP8 KV cache (vLLM's --kv-cache-dtype fp8) halves the bytes of bf16. Several targets add their throughput.
Loading that is slower than computing still frees a busy GPU: routers and workers load where others wait for it."""


class Verdict(msgspec.Struct):
    """How many workers of a model a target feeds."""

    model: str
    bytes_per_token: int
    worker_tokens_per_second: float  # its prefill
    worker_bytes_per_second: float  # KV bytes of that prefill: the throughput that a target needs to feed the worker
    fed_tokens_per_second: float
    fed_workers: float
    advice: str


class Options(ClientOptions):
    model_config = ConfigDict(extra="forbid")

    dir: Path | None = None
    store: str | None = None
    namespace: str = "default"
    credential_file: Path | None = None
    size: ByteSize = Field(ByteSize(2 << 20), ge=PAGE_BYTES, le=VALUE_BYTES_MAX)
    seconds: float = Field(5.0, gt=0)
    tokens_per_second: float | None = Field(None, gt=0)
    bytes_per_token: ByteSize | None = Field(None, gt=0)
    as_json: bool = False


class Result(msgspec.Struct):
    chunk_bytes: int
    speeds: list[Speed]
    limit: str  # the name of the bottleneck
    fed_bytes_per_second: float
    verdicts: list[Verdict]
    from_memory: float | None = None
    failed: dict[str, int] = {}


def main(argv: list[str]) -> int:
    options = _parse(argv)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    logging.getLogger("kvstore.disk.files").setLevel(
        logging.WARNING
    )  # direct I/O may be unavailable, which changes the figures
    models = _models(options)
    messages.checked_namespace(options.namespace)
    if options.dir is None and options.store is None:
        raise ConfigError.missing("dir", "a directory on the device to measure, or --store with a target")
    if options.dir is not None and not options.dir.is_dir():
        raise ConfigError("dir", options.dir, "a directory that exists; measure a target on a raw device with --store")
    measured: list[Speed] = []
    seconds = options.seconds / speeds.RUNS
    if options.dir is not None:
        measured += speeds.of_device(options.dir, options.size, seconds)
    store: StoreSpeeds | None = None
    if options.store is None:
        measured += speeds.of_network(options.size, seconds)
    else:
        store = speeds.of_store(
            options.store,
            options.namespace,
            options.size,
            seconds,
            credential=credentials.load(options.credential_file),
            tls=tls.open_client(options.tls_files),
        )
        measured += [store.put, store.get]
    limit = slowest(measured)
    result = Result(
        int(options.size), measured, limit.name, limit.median, [verdict(limit.median, one) for one in models]
    )
    if store is not None:
        result.from_memory, result.failed = store.from_memory, store.failed
    print(msgspec.json.encode(result).decode() if options.as_json else _as_text(result, options.seconds))
    return 0


def _parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore bench", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", help="directory on the device; needs up to 1 GiB of free space while it runs")
    parser.add_argument("--store", help="targets to measure: host:port, separated by commas, or etcd://host:port")
    add_namespace_arguments(parser)
    parser.add_argument("--size", help="bytes of a chunk; default 2MiB")
    parser.add_argument("--seconds", help="duration of each measurement; default 5")
    parser.add_argument("--tokens-per-second", help="prefill speed of one of your workers, for your own model")
    parser.add_argument("--bytes-per-token", help="KV bytes per token of that model, for example 320KiB")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    return validated(Options, vars(parser.parse_args(argv)))


def _models(options: Options) -> Sequence[Model]:
    given = (options.bytes_per_token, options.tokens_per_second)
    if given == (None, None):
        return MODELS
    if options.bytes_per_token is None:
        raise ConfigError.missing("bytes-per-token", "the model's KV bytes per token", "--tokens-per-second")
    if options.tokens_per_second is None:
        raise ConfigError.missing("tokens-per-second", "a worker's prefill speed", "--bytes-per-token")
    return [Model("your model", int(options.bytes_per_token), options.tokens_per_second)]


def slowest(measured: Sequence[Speed]) -> Speed:
    """The bottleneck: reading or sending, whichever is slower. A UNIX socket does not count: it serves only workers on
    the target's machine."""
    reading = [speed for speed in measured if speed.name in ("device read", "TCP on loopback", "store get")]
    return min(reading, key=lambda speed: speed.median)


def verdict(fed_bytes_per_second: float, model: Model) -> Verdict:
    """How many workers of `model` a target can feed at their prefill speed."""
    tokens_per_second = fed_bytes_per_second / model.bytes_per_token
    return Verdict(
        model=model.name,
        bytes_per_token=model.bytes_per_token,
        worker_tokens_per_second=model.tokens_per_second,
        worker_bytes_per_second=model.tokens_per_second * model.bytes_per_token,
        fed_tokens_per_second=tokens_per_second,
        fed_workers=tokens_per_second / model.tokens_per_second,
        advice=_advice(tokens_per_second / model.tokens_per_second, model),
    )


def _advice(workers: float, model: Model) -> str:
    if workers >= 1:
        return f"this target feeds {_tenths(workers)} workers at prefill speed"
    targets = math.ceil(1 / workers)
    told = f"loading takes {1 / workers:.1f} times as long as computing; {targets} such targets feed one worker"
    if model.fp8_kv:
        return told
    return f"{told}, {math.ceil(1 / (2 * workers))} with an FP8 KV cache"


def _tenths(number: float) -> str:
    """With one decimal, rounded down: a target must not promise more workers than it feeds."""
    return f"{math.floor(10 * number) / 10:.1f}"


def _as_text(result: Result, seconds: float) -> str:
    measured = [["", "median", "lowest", "highest", "in flight"]]
    measured += [
        [speed.name, *map(words.speed, (speed.median, min(speed.runs), max(speed.runs))), str(speed.in_flight)]
        for speed in result.speeds
    ]
    fed = [["", "KV a token", "a worker computes", "that is", "this target feeds", "workers"]]
    fed += [
        [
            one.model,
            in_units(one.bytes_per_token),
            f"{one.worker_tokens_per_second:,.0f} tokens/s",
            words.speed(one.worker_bytes_per_second),
            f"{one.fed_tokens_per_second:,.0f} tokens/s",
            f"{one.fed_workers:.2f}",
        ]
        for one in result.verdicts
    ]
    lines = [
        f"A short benchmark: chunks of {in_units(result.chunk_bytes)}, {speeds.RUNS} runs of "
        f"{seconds / speeds.RUNS:g} s each. Includes the effect of caches and of other load on the machine.",
        "",
        words.table(measured),
        *_caveats(result),
        "",
        f"It can feed {words.speed(result.fed_bytes_per_second)}. The bottleneck is: {result.limit}.",
        "",
        words.table(fed),
        "",
        *(f"{one.model}: {one.advice}." for one in result.verdicts),
    ]
    if any(one.fed_workers < 1 for one in result.verdicts):
        lines.append(_SLOW)
    return "\n".join(lines)


def _caveats(result: Result) -> list[str]:
    lines = []
    if result.from_memory is None:
        lines.append(
            "Both ends of the streams ran on this machine. The network to your workers may be slower: use --store."
        )
    elif result.from_memory:
        share = f"{result.from_memory:.0%} of the chunks came from the target's memory (its --hot)"
        lines.append(f"{share}. To measure its device, run --dir on its machine.")
    if result.failed:
        lines.append("Not served: " + ", ".join(f"{keys} {name}" for name, keys in result.failed.items()) + ".")
    return lines
