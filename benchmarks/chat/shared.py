"""TTFT of many requests that share a long prefix and arrive at once, by the tier that holds the prefix.

    python -m benchmarks.chat.shared --model DIR [--requests 32] [--shared 8000] [--own 40] [--rounds 5] --dir DIR
    python -m benchmarks.chat.shared --tiny --requests 16 --shared 6000 --block-tokens 128 --dtype float32   # on a CPU

The prefix is in HBM, only in the store (hot cache), or uncached. Each request ends with tokens of its own. Every round
has its own prompts and sends them in the three cases. A line has medians over rounds, of the mean and of the highest
TTFT of a round. A single request is timed, too.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import msgspec

from benchmarks.chat.__main__ import (
    ENGINE_ENVIRONMENT,
    EngineError,
    Options,
    add_engine_arguments,
    engine_command,
    last_words,
    leave_on_sigterm,
    running,
    say,
    target_running,
    transfer_config,
    until_ready,
)
from benchmarks.chat.identity import CPU_ENVIRONMENT
from benchmarks.chat.load import SETTLING_TOKENS, Endpoint
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import ConfigError, run_command, validated

WAYS = ("HBM", "store", "cold")
_WRITTEN_SECONDS = 2.0  # until an answer's write-behind has ended
_FIRST, _LAST = 40, 120  # token ids that exist in all models of the benchmarks


class Row(msgspec.Struct):
    prefix: str
    requests: int
    mean_ms: float
    last_ms: float
    from_tiers: float  # tokens of the requests


async def first_tokens(endpoint: Endpoint, prompts: list[list[int]]) -> list[float]:
    """TTFT in milliseconds of prompts that are sent at once."""
    answers = await asyncio.gather(*(endpoint.complete(prompt, 2) for prompt in prompts))
    return [1000 * answer.ttft_seconds for answer in answers]


async def measure(endpoint: Endpoint, given: argparse.Namespace) -> list[Row]:
    chance = random.Random(given.seed)

    def tokens(count: int) -> list[int]:
        return chance.choices(range(_FIRST, _LAST), k=count)

    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(given.rounds + 1):  # the first one warms up: workers learn speeds
        for count in (1, given.requests):
            for way in WAYS:
                shared = tokens(given.shared)
                if way != "cold":
                    await endpoint.complete(shared, 2)
                    await asyncio.sleep(_WRITTEN_SECONDS)
                if way == "store":
                    await endpoint.forget(external=True)
                    # The identity of the weights is checked again; let another prompt wait for that.
                    await endpoint.complete(tokens(SETTLING_TOKENS), 1)
                before = await endpoint.counters()
                took = await first_tokens(endpoint, [shared + tokens(given.own) for _ in range(count)])
                after = await endpoint.counters()
                tiers = sum(
                    after[name] - before.get(name, 0.0) for name in after if name.endswith("external_kv_transfer")
                )
                share = tiers / (count * (given.shared + given.own))
                found.setdefault((way, count), []).append((statistics.mean(took), max(took), share))
        say("round done")
    rows = []
    for (way, count), rounds in found.items():
        mean, last, share = (round(statistics.median(column), 3) for column in zip(*rounds[1:], strict=True))
        rows.append(Row(way, count, round(mean, 1), round(last, 1), share))
    return rows


async def run(options: Options, given: argparse.Namespace, folder: Path) -> list[Row]:
    address, port, own = f"127.0.0.1:{free_port()}", free_port(), folder / "store"
    own.mkdir()
    # vLLM closes idle connections after five seconds: do not reuse one that is about to be closed.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300), connector=connector) as session:
        endpoint = Endpoint(session, f"http://127.0.0.1:{port}", options.model)
        with ExitStack() as stack:
            stack.enter_context(target_running(options, "store-hot", own, address, folder / "target.log"))
            command = engine_command(options, port, transfer_config(options, "store", address, own))
            environment = {**CPU_ENVIRONMENT, **ENGINE_ENVIRONMENT}
            engine = stack.enter_context(running(command, environment, folder / "engine.log"))
            await until_ready(endpoint, session, engine)
            try:
                return await measure(endpoint, given)
            except ConnectionError as error:
                raise EngineError(f"{error}: {last_words(folder / 'engine.log')}") from None


def main() -> None:
    leave_on_sigterm()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.shared", description=__doc__.split("\n")[0])
    add_engine_arguments(parser)
    for action in parser._actions:
        if action.dest == "model":
            action.required = False
    parser.add_argument("--tiny", action="store_true", help="make a small model instead of --model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=32, help="at once; default 32")
    parser.add_argument("--shared", type=int, default=8000, help="tokens of the shared prefix; default 8000")
    parser.add_argument("--hot", default="2GiB", help="the target's hot cache; default 2GiB")
    parser.add_argument("--carrier", help="of target and worker: memory, or nixl; default none")
    parser.add_argument("--own", type=int, default=40, help="tokens of each request after it; default 40")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.tiny is (given.model is not None):
        raise ConfigError("model", given.model, "a folder with a config.json, or --tiny")
    names = set(Options.model_fields) - {"seed", "rounds"}
    with tempfile.TemporaryDirectory(prefix="kvtier-shared-", dir=given.dir) as folder:
        values = {name: value for name, value in vars(given).items() if name in names}
        values["model"] = given.model or str(make_tiny_model(Path(folder) / "model", max_tokens=16384))
        values["dram"] = given.dram or "2GiB"
        values["max_model_len"] = given.shared + given.own + 8
        values["engine"] = f"--dtype {given.dtype} {given.engine or ''}"
        rows = asyncio.run(run(validated(Options, values), given, Path(folder)))
    print(f"{'prefix':<8}{'requests':>9}{'mean ms':>9}{'last ms':>9}{'from tiers':>12}")
    for row in rows:
        print(f"{row.prefix:<8}{row.requests:>9}{row.mean_ms:>9}{row.last_ms:>9}{row.from_tiers:>12.0%}")
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.chat.shared", main)
