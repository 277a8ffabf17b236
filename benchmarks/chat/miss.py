"""The cost of the tier when it cannot help: cold prompts, with and without it.

    python -m benchmarks.chat.miss --json FILE [--pairs N] [--tokens N]

Each pair is one uncached prompt. It is sent to a worker with the tier (through the router, with a running store) and to
a stock worker (directly from the frontend). The order alternates. The figure is the ratio of their TTFTs, pair by pair.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec

from graphs.trial import CONFIG, MODEL, REFERENCE, Trial


class Result(msgspec.Struct):
    pairs: int
    prompt_tokens: int
    with_tier_ms: float  # medians
    without_tier_ms: float
    ratio_median: float
    ratio_quartiles: tuple[float, float]


async def measure(trial: Trial, pairs: int, tokens: int, seed: int) -> Result:
    chance = random.Random(seed)
    times: dict[str, list[float]] = {MODEL: [], REFERENCE: []}
    prompt_tokens = 0
    for number in range(-3, pairs):  # the first three warm up
        text = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens))
        order = [MODEL, REFERENCE] if number % 2 else [REFERENCE, MODEL]
        for model in order:
            answer = await trial.ask([{"role": "user", "content": text}], model=model, max_tokens=4)
            prompt_tokens = answer.prompt_tokens
            if number >= 0:
                times[model].append(answer.ttft_seconds)
        await asyncio.sleep(0.3)  # so that write-behind does not overlap the next pair
    ratios = [with_tier / without for with_tier, without in zip(times[MODEL], times[REFERENCE], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Result(
        pairs=pairs,
        prompt_tokens=prompt_tokens,
        with_tier_ms=round(1000 * statistics.median(times[MODEL]), 2),
        without_tier_ms=round(1000 * statistics.median(times[REFERENCE]), 2),
        ratio_median=round(statistics.median(ratios), 4),
        ratio_quartiles=(round(low, 4), round(high, 4)),
    )


async def run(options: argparse.Namespace, overrides: list[str]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        one_worker = ["--VllmWorker.ServiceArgs.workers=1", *overrides]
        async with Trial(Path(folder), lambda line: print(line, file=sys.stderr), one_worker, options.file) as trial:
            return await measure(trial, options.pairs, options.tokens, options.seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.miss", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-f", "--file", type=Path, default=CONFIG, help="YAML of the cluster")
    options, overrides = parser.parse_known_args()
    result = asyncio.run(run(options, overrides))
    report = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(report)
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
