"""Whether an answer depends on where its prompt's KV came from: tokens and logprobs, to the last digit, batch 1.

    python -m benchmarks.chat.identity --dir DIR [--dtype bfloat16] [--tokens 2200,7000] --json FILE
    python -m benchmarks.chat.identity --dir DIR --dtype float32 --tokens 600,1500 --block-tokens 128   # the CPU engine

A small model with random weights of enough spread is served by an engine without and by one with the tier. Each prompt
is asked for cold, from HBM, from DRAM and from the store. Cold answers must be equal between the engines, and so must
all that come from a cache (a cold prefill and one that goes on from a cache add up in another order). Then the chunks
on disk are made wrong under right checksums: a comparison that does not notice proves nothing.
"""

import argparse
import asyncio
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

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
from graphs.tiny_model import ALPHABET, make_tiny_model
from kvstore.errors import run_command, validated

ANSWER_TOKENS = 32
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB of "HBM", where the engine runs on the CPU
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Answer(msgspec.Struct):
    prompt_tokens: int
    medium: str
    tokens: list[str]
    logprobs: list[float]
    from_tiers: int  # of the prompt's tokens
    from_hbm: int

    def equals(self, other: "Answer") -> bool:
        return self.tokens == other.tokens and self.logprobs == other.logprobs


class Report(msgspec.Struct):
    plain: list[Answer] = []
    store: list[Answer] = []
    forged: list[Answer] = []
    faults: list[str] = []


async def ask(endpoint: Endpoint, session: aiohttp.ClientSession, prompt: list[int], medium: str) -> Answer:
    before = await endpoint.counters()
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 1}
    async with session.post(f"{endpoint.url}/v1/completions", json={**body, "ignore_eos": True}) as reply:
        reply.raise_for_status()
        said = (await reply.json())["choices"][0]["logprobs"]
    await asyncio.sleep(1.5)  # what is written behind the answer is there now, and counted
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
    """And from DRAM and from the store."""
    found = []
    for prompt in prompts:
        for medium in ("dram", "store"):
            await endpoint.forget(external=medium == "store")
            found.append(await ask(endpoint, session, prompt, medium))
    return found


def judge(report: Report) -> list[str]:
    """What does not hold."""
    faults = []
    reference = {(one.prompt_tokens, one.medium): one for one in report.plain}
    for one in report.store:
        medium = "cold" if one.medium == "cold" else "hbm"
        if not one.equals(reference[one.prompt_tokens, medium]):
            faults.append(f"{one.prompt_tokens} tokens, {one.medium}: differs from the engine without the tier")
        if one.medium in ("dram", "store") and one.from_tiers < one.prompt_tokens // 2:
            faults.append(f"{one.prompt_tokens} tokens, {one.medium}: only {one.from_tiers} came from it")
    unnoticed = [one for one in report.forged if one.equals(reference[one.prompt_tokens, "hbm"])]
    return faults + [f"{one.prompt_tokens} tokens: wrong KV was not noticed" for one in unnoticed]


async def measure(options: Options, prompts: list[list[int]], logs: Path, number_bytes: int) -> Report:
    report, environment = Report(), {**CPU_ENVIRONMENT, **ENGINE_ENVIRONMENT}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        with ExitStack() as stack:
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-identity-", dir=options.dir)))
            for mode in ("plain", "store"):
                address, port = f"127.0.0.1:{free_port()}", free_port()
                log = logs / "target.log"
                endpoint = Endpoint(session, f"http://127.0.0.1:{port}", options.model)
                with ExitStack() as inner:
                    serving = ExitStack()
                    if mode == "store":
                        serving.enter_context(target_running(options, mode, own, address, log))
                    command = engine_command(options, port, transfer_config(options, mode, address, own))
                    engine = inner.enter_context(running(command, environment, logs / f"{mode}.log"))
                    with serving:
                        await until_ready(endpoint, session, engine)
                        say(f"{mode}: up")
                        found = await answers(endpoint, session, prompts)
                        if mode == "plain":
                            report.plain = found
                            continue
                        report.store = found + await from_tiers(endpoint, session, prompts)
                    for one in list(records(own)):
                        forge(one, number_bytes)
                    say("store: the chunks on disk are wrong now")
                    with target_running(options, mode, own, address, log):
                        await asyncio.sleep(5)  # until the engine finds it again
                        for prompt in prompts:
                            await endpoint.forget(external=True)
                            report.forged.append(await ask(endpoint, session, prompt, "forged"))
    report.faults = judge(report)
    return report


def main() -> int:
    leave_on_sigterm()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.identity", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for the model and the target")
    parser.add_argument("--dtype", choices=sorted(NUMBER_BYTES), default="bfloat16")
    parser.add_argument("--tokens", default="2200,7000", help="of the prompts; default 2200,7000")
    parser.add_argument("--block-tokens", default="16", help="default 16; the CPU engine has 128")
    parser.add_argument("--engine", default="", help="more arguments for the engine, as one string")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvtier-identity-", dir=given.dir) as folder:
        logs = Path(folder)
        values = {
            "model": str(make_tiny_model(logs / "model", layers=8)),
            "dir": given.dir,
            "dram": 1 << 30,
            "capacity": 4 << 30,
            "block_tokens": given.block_tokens,
            "engine": f"--dtype {given.dtype} {given.engine}",
        }
        chance = random.Random(given.seed)
        spoken = [ord(letter) for letter in ALPHABET]
        prompts = [chance.choices(spoken, k=int(count)) for count in given.tokens.split(",")]
        try:
            report = asyncio.run(measure(validated(Options, values), prompts, logs, NUMBER_BYTES[given.dtype]))
        except EngineError as error:
            words = [last_words(log) for log in sorted(logs.glob("*.log"))]
            raise EngineError(f"{error}: {' || '.join(words)}") from None
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    for one in [*report.plain, *report.store, *report.forged]:
        print(
            f"{one.prompt_tokens:>6} {one.medium:<7} tiers {one.from_tiers:>5} HBM {one.from_hbm:>5} {one.logprobs[0]}"
        )
    print(
        "\n".join(report.faults)
        or f"equal to the last digit; wrong KV was noticed ({time.monotonic() - started:.0f} s)"
    )
    return 1 if report.faults else 0


if __name__ == "__main__":
    run_command("benchmarks.chat.identity", main)
