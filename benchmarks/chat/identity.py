"""Whether an answer depends on where its prompt's KV came from: tokens and logprobs, to the last digit, batch 1.

    python -m benchmarks.chat.identity --dir DIR [--dtype bfloat16] [--tokens 2200,7000] --json FILE
    python -m benchmarks.chat.identity --dir DIR --dtype float32 --tokens 600,1500 --block-tokens 128   # the CPU engine
    python -m benchmarks.chat.identity --dir DIR --tensor-parallel 2,1     # and one rank reads what two have written
    python -m benchmarks.chat.identity --dir DIR --kind mixed              # another kind of model: graphs/tiny_kinds.py

A small model with random weights is served by an engine without the tier and by one with it. Each prompt is sent cold,
from HBM, from DRAM and from the store. Cold answers must be equal between the engines. All answers from a cache must be
equal, too. They may differ from cold ones, because a prefill that continues from a cache adds in a different order. As
a control, the chunks on disk are then forged with valid checksums: a comparison that does not detect this proves
nothing.

Engines of other tensor parallelism read the first engine's chunks from the store. They round differently. So an
answer's first logprob may differ from the reader's own by a few times the difference between the engines' cold answers.
"""

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from benchmarks.chat.__main__ import (
    ENGINE_ENVIRONMENT,
    EngineError,
    Options,
    engine_command,
    last_words,
    leave_on_sigterm,
    running,
    say,
    target_running,
    transfer_config,
    until_ready,
)
from benchmarks.chat.load import Endpoint
from graphs.forgery import forge, records
from graphs.services import free_port
from graphs.tiny_kinds import KINDS, make_tiny_kind, speculative
from graphs.tiny_model import ALPHABET, make_tiny_model
from kvstore.errors import run_command, validated

ANSWER_TOKENS = 32
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB of "HBM" of the CPU engine
# The limit for an answer from another engine's KV: so many times the difference of cold answers, but at least this.
ROUNDING, ROUNDING_MIN = 4.0, 1e-4
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Answer(msgspec.Struct):
    prompt_tokens: int
    medium: str
    tokens: list[str]
    logprobs: list[float]
    from_tiers: int  # of the prompt's tokens
    from_hbm: int
    ranks: int = 1

    def equals(self, other: "Answer") -> bool:
        return self.tokens == other.tokens and self.logprobs == other.logprobs

    def off(self, other: "Answer") -> float:
        """The difference of the first logprob; infinite if the token differs."""
        return abs(self.logprobs[0] - other.logprobs[0]) if self.tokens[0] == other.tokens[0] else math.inf


class Report(msgspec.Struct):
    plain: list[Answer] = []
    store: list[Answer] = []
    read: list[Answer] = []  # by engines of other tensor parallelism
    forged: list[Answer] = []
    faults: list[str] = []


async def ask(endpoint: Endpoint, session: aiohttp.ClientSession, prompt: list[int], medium: str) -> Answer:
    before = await endpoint.counters()
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 1}
    async with session.post(f"{endpoint.url}/v1/completions", json={**body, "ignore_eos": True}) as reply:
        reply.raise_for_status()
        said = (await reply.json())["choices"][0]["logprobs"]
    await asyncio.sleep(1.5)  # by now, the answer's write-behind has ended and is counted
    after = await endpoint.counters()
    tiers, hbm = (
        round(after.get(name, 0.0) - before.get(name, 0.0))
        for name in ("prompt_tokens_by_source:external_kv_transfer", "prompt_tokens_by_source:local_cache_hit")
    )
    return Answer(len(prompt), medium, said["tokens"], said["token_logprobs"], tiers, hbm)


async def answers(endpoint: Endpoint, session: aiohttp.ClientSession, prompts: list[list[int]]) -> list[Answer]:
    """Each prompt cold and from HBM."""
    found = []
    for prompt in prompts:
        found += [await ask(endpoint, session, prompt, medium) for medium in ("cold", "hbm")]
    return found


async def from_tiers(endpoint: Endpoint, session: aiohttp.ClientSession, prompts: list[list[int]]) -> list[Answer]:
    """Each prompt from DRAM and from the store."""
    found = []
    for prompt in prompts:
        for medium in ("dram", "store"):
            await endpoint.forget(external=medium == "store")
            found.append(await ask(endpoint, session, prompt, medium))
    return found


def judge(report: Report) -> list[str]:
    """The violations, one text each."""
    faults = []
    reference = {(one.ranks, one.prompt_tokens, one.medium): one for one in report.plain}
    for one in report.store:
        medium = "cold" if one.medium == "cold" else "hbm"
        if not one.equals(reference[one.ranks, one.prompt_tokens, medium]):
            faults.append(f"{one.prompt_tokens} tokens, {one.medium}: differs from the engine without the tier")
    for one in report.read:
        own = reference[one.ranks, one.prompt_tokens, "hbm"]
        others = reference[report.store[0].ranks, one.prompt_tokens, "hbm"]
        if one.off(own) > max(ROUNDING * own.off(others), ROUNDING_MIN):
            faults.append(f"{one.prompt_tokens} tokens, {one.ranks} ranks: off by {one.off(own)} with others' KV")
    faults += [
        f"{one.prompt_tokens} tokens, {one.medium}: only {one.from_tiers} came from it"
        for one in report.store + report.read
        if one.medium in ("dram", "store") and one.from_tiers < one.prompt_tokens // 2
    ]
    unnoticed = [one for one in report.forged if one.equals(reference[one.ranks, one.prompt_tokens, "hbm"])]
    return faults + [f"{one.prompt_tokens} tokens: wrong KV was not noticed" for one in unnoticed]


def tiny_model(folder: Path, kind: str) -> tuple[Path, str]:
    """A model of the kind, and its engine's further arguments."""
    if kind == "dense":
        return make_tiny_model(folder, layers=8), ""
    make_tiny_kind(folder, kind)
    drafts = speculative(folder, kind)
    return folder, f"--speculative-config '{json.dumps(drafts)}'" if drafts else ""


class Identity:
    """The engines, one after the other, over one store."""

    def __init__(self, options: Options, prompts: list[list[int]], logs: Path, session: aiohttp.ClientSession):
        self.options, self.prompts, self.logs, self.session = options, prompts, logs, session
        self.report = Report()
        self.address = f"127.0.0.1:{free_port()}"

    @contextmanager
    def engine(self, mode: str, ranks: int, own: Path) -> Iterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
        options = self.options.model_copy(update={"tensor_parallel": ranks})
        port = free_port()
        environment = {**CPU_ENVIRONMENT, **ENGINE_ENVIRONMENT}
        if ranks > 1:  # on the CPU: assign cores to ranks
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[:ranks]))
        transfer: Any = transfer_config(options, mode, self.address, own)
        if transfer is not None:  # long timeouts, so that a slow machine does not cause recompute
            transfer["kv_connector_extra_config"]["secondary_tiers"][0] |= {"deadline_ms": 60_000, "lookup_ms": 60_000}
        command = engine_command(options, port, transfer)
        with running(command, environment, self.logs / f"{mode}-{ranks}.log") as process:
            yield Endpoint(self.session, f"http://127.0.0.1:{port}", options.model), process

    def target(self, own: Path) -> AbstractContextManager[object]:
        return target_running(self.options, "store", own, self.address, self.logs / "target.log")

    async def run(self, own: Path, parallel: list[int], number_bytes: int) -> None:
        for ranks in parallel:
            with self.engine("plain", ranks, own) as (endpoint, process):
                await until_ready(endpoint, self.session, process)
                say(f"without the tier, {ranks} ranks: up")
                self.report.plain += self.of(ranks, await answers(endpoint, self.session, self.prompts))
            with ExitStack() as serving, self.engine("store", ranks, own) as (endpoint, process):
                serving.enter_context(self.target(own))
                await until_ready(endpoint, self.session, process)
                say(f"with the tier, {ranks} ranks: up")
                if ranks == parallel[0]:
                    found = await answers(endpoint, self.session, self.prompts)
                    found += await from_tiers(endpoint, self.session, self.prompts)
                    self.report.store = self.of(ranks, found)
                else:
                    found = [await ask(endpoint, self.session, prompt, "store") for prompt in self.prompts]
                    self.report.read += self.of(ranks, found)
                serving.close()
                if ranks == parallel[-1]:
                    await self.forge(own, endpoint, ranks, number_bytes)
        self.report.faults = judge(self.report)

    async def forge(self, own: Path, endpoint: Endpoint, ranks: int, number_bytes: int) -> None:
        for one in list(records(own)):
            forge(one, number_bytes)
        say("the chunks on disk are wrong now")
        with self.target(own):
            await asyncio.sleep(5)  # until the engine finds the target again
            for prompt in self.prompts:
                await endpoint.forget(external=True)
                self.report.forged += self.of(ranks, [await ask(endpoint, self.session, prompt, "forged")])

    @staticmethod
    def of(ranks: int, found: list[Answer]) -> list[Answer]:
        return [msgspec.structs.replace(one, ranks=ranks) for one in found]


async def measure(
    options: Options, prompts: list[list[int]], logs: Path, number_bytes: int, parallel: list[int]
) -> Report:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        with tempfile.TemporaryDirectory(prefix="kvtier-identity-", dir=options.dir) as own:
            identity = Identity(options, prompts, logs, session)
            await identity.run(Path(own), parallel, number_bytes)
            return identity.report


def main() -> int:
    leave_on_sigterm()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.identity", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for the model and the target")
    parser.add_argument("--dtype", choices=sorted(NUMBER_BYTES), default="bfloat16")
    parser.add_argument("--tokens", default="2200,7000", help="of the prompts; default 2200,7000")
    parser.add_argument("--block-tokens", default="16", help="default 16; the CPU engine has 128")
    parser.add_argument(
        "--tensor-parallel",
        default="1",
        help="of the engines, such as 1,2: the first writes, the others read; default 1",
    )
    parser.add_argument("--kind", choices=KINDS, default="dense", help="of model; default dense")
    parser.add_argument("--engine", default="", help="more arguments for the engine, as one string")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvtier-identity-", dir=given.dir) as folder:
        logs = Path(folder)
        model, more = tiny_model(logs / "model", given.kind)
        values = {
            "model": str(model),
            "dir": given.dir,
            "dram": 1 << 30,
            "capacity": 4 << 30,
            "block_tokens": given.block_tokens,
            "engine": f"--dtype {given.dtype} {more} {given.engine}",
        }
        chance = random.Random(given.seed)
        spoken = [ord(letter) for letter in ALPHABET]
        prompts = [chance.choices(spoken, k=int(count)) for count in given.tokens.split(",")]
        try:
            parallel = [int(one) for one in given.tensor_parallel.split(",")]
            report = asyncio.run(
                measure(validated(Options, values), prompts, logs, NUMBER_BYTES[given.dtype], parallel)
            )
        except EngineError as error:
            words = [last_words(log) for log in sorted(logs.glob("*.log"))]
            raise EngineError(f"{error}: {' || '.join(words)}") from None
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    for one in [*report.plain, *report.store, *report.read, *report.forged]:
        print(
            f"{one.ranks} {one.prompt_tokens:>6} {one.medium:<7} tiers {one.from_tiers:>5} HBM {one.from_hbm:>5} "
            f"{one.logprobs[0]}"
        )
    print(
        "\n".join(report.faults)
        or f"equal to the last digit; wrong KV was noticed ({time.monotonic() - started:.0f} s)"
    )
    return 1 if report.faults else 0


if __name__ == "__main__":
    run_command("benchmarks.chat.identity", main)
