"""The accuracy of the router's TTFT predictions, on a real cluster with the CPU engine.

    python -m benchmarks.routing.prediction --json FILE [--requests N] [--clients N]

Clients send turns of conversations through the frontend. Some prompts are new, some are in HBM, DRAM or the store. The
figure is the error |predicted / actual - 1| of each decision in the router's history. It is reported for the first 50
decisions, and for later ones, when the router has learnt the speeds.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec

from components.router.records import Decision
from graphs.services import free_port
from graphs.trial import CONFIG, Message, Trial

LEARNING = 50
CONVERSATIONS = 10
TEXT_TOKENS = (100, 900)


class Result(msgspec.Struct):
    requests: int
    clients: int
    error_median_first: float  # of the first 50
    error_median: float  # of later ones
    error_quartiles: tuple[float, float]
    ratio_median: float  # actual over predicted
    ttft_ms_median: float
    by_tier: dict[str, float]  # median error of decisions with most tokens from that tier


async def play(trial: Trial, requests: int, clients: int, seed: int) -> None:
    chance = random.Random(seed)
    waiting: list[list[Message]] = [[] for _ in range(CONVERSATIONS)]
    left = requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            messages = waiting.pop(chance.randrange(len(waiting)))
            if sum(len(one["content"]) for one in messages) > 3000:
                messages = []
            text = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=chance.randint(*TEXT_TOKENS)))
            messages = [*messages, {"role": "user", "content": text}]
            answer = await trial.ask(messages, max_tokens=16)
            waiting.append([*messages, {"role": "assistant", "content": answer.text}])

    await asyncio.gather(*(client() for _ in range(clients)))


def judged(decisions: list[Decision], clients: int) -> Result:
    """`decisions` in their order. Those without a first token are ignored."""
    done = [(one, one.ttft_seconds) for one in decisions if one.ttft_seconds]
    errors = [abs(one.predicted_ttft_seconds / actual - 1) for one, actual in done]
    by_tier: dict[str, list[float]] = {}
    for (one, _), error in list(zip(done, errors, strict=True))[LEARNING:]:
        chosen = one.on_chosen()
        by_tier.setdefault(max(chosen.tokens, key=lambda tier: chosen.tokens[tier]), []).append(error)
    after = errors[LEARNING:]
    low, _, high = statistics.quantiles(after, n=4)
    return Result(
        requests=len(done),
        clients=clients,
        error_median_first=round(statistics.median(errors[:LEARNING]), 3),
        error_median=round(statistics.median(after), 3),
        error_quartiles=(round(low, 3), round(high, 3)),
        ratio_median=round(
            statistics.median(actual / one.predicted_ttft_seconds for one, actual in done[LEARNING:]), 3
        ),
        ttft_ms_median=round(1000 * statistics.median(actual for _, actual in done[LEARNING:]), 1),
        by_tier={tier: round(statistics.median(found), 3) for tier, found in by_tier.items()},
    )


async def run(options: argparse.Namespace, overrides: list[str]) -> Result:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--Router.page=127.0.0.1:{port}", *overrides]
        async with Trial(Path(folder), lambda line: print(line, file=sys.stderr), given, options.file) as trial:
            await play(trial, options.requests, options.clients, options.seed)
            async with trial.http.get(f"http://127.0.0.1:{port}/decisions?limit=1000") as reply:
                decisions = msgspec.json.decode(await reply.read(), type=list[Decision])
    return judged(decisions[::-1], options.clients)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.prediction", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-f", "--file", type=Path, default=CONFIG, help="YAML of the cluster")
    options, overrides = parser.parse_known_args()
    if options.requests < 2 * LEARNING:
        parser.error(f"argument --requests: {options.requests}: expected at least {2 * LEARNING}")
    report = msgspec.json.format(msgspec.json.encode(asyncio.run(run(options, overrides))), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
