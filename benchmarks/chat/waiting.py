"""How long a request should wait for the store: gain and cost of patience. Everything is simulated.

    python -m benchmarks.chat.waiting [--gb-per-second 1.05] [--kv-bytes 163840] [--clients 8 16 24] [--seeds N]

One worker, its disk, and clients of multi-turn chat in a closed loop. Each prompt is in the store, except its last
question. The engine runs in steps: each decoding request gets a token, and the rest of the token budget goes to prompts
in order of arrival. At each step, components.pricing.patience.worth_waiting_for decides, with the given seconds of
patience per second of saved prefill. `none` is no tier, `always` never recomputes stored chunks, `ours` is the workers'
policy. Times are those of engine_model.Hardware, with a GPU that is --gpu times as fast.
"""

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

from benchmarks.chat.load import quantile
from benchmarks.routing.engine_model import Hardware
from components.pricing import patience as rule
from components.pricing.patience import due_seconds, worth_waiting_for
from components.pricing.throughput import Throughput

BUDGET_TOKENS = 8192  # per step
CHUNK_TOKENS = 16
PIECE_CHUNKS = 4
DEADLINE_SECONDS = 2.0
RAMP_SECONDS, WINDOW_SECONDS = 30.0, 120.0
PATIENCE: dict[str, Callable[[float], float]] = {
    "none": lambda share: 0.0,
    "1.25": lambda share: 1.25,
    "2": lambda share: 2.0,
    "3": lambda share: 3.0,
    "6": lambda share: 6.0,
    "always": lambda share: 1e9,
    "ours": rule.patience,
}


@dataclass(eq=False)
class Request:
    arrived: float
    prompt_tokens: int
    answer_tokens: int
    wanted: float  # chunks that the request waits for
    fetched: float = 0.0
    left: int | None = None  # tokens to compute, once that is decided
    first: float = 0.0
    ended: float = 0.0
    answered: int = 0


class Result(NamedTuple):
    requests_per_second: float
    ttft_ms: float
    ttft_ms_p99: float
    tpot_ms: float
    fetched_share: float


class Worker:
    """A worker with `clients` in a closed loop. With `bytes_per_second` 0 it has no store."""

    def __init__(self, hardware: Hardware, bytes_per_second: float, clients: int, seed: int):
        self._hardware = hardware
        self._bytes_per_second = bytes_per_second
        self._chunk_bytes = CHUNK_TOKENS * hardware.kv_bytes_per_token
        self._prefill = hardware.prefill
        self._chance = random.Random(seed)
        self._arrivals = [RAMP_SECONDS * number / clients for number in range(clients)]
        self._now = 0.0
        self._prefills = Throughput()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._done: list[Request] = []

    def run(self) -> Result:
        end = RAMP_SECONDS + WINDOW_SECONDS
        while self._now < end:
            while self._arrivals and self._arrivals[0] <= self._now:
                self._arrive(self._arrivals.pop(0))
            if not self._waiting and not self._running:
                self._prefills.add(0.0, self._arrivals[0] - self._now)
                self._now = self._arrivals[0]
                continue
            self._step()
        done = [one for one in self._done if one.ended >= RAMP_SECONDS]
        ttfts = [1000 * (one.first - one.arrived) for one in done]
        return Result(
            len(done) / WINDOW_SECONDS,
            statistics.fmean(ttfts),
            quantile(ttfts, 0.99),
            statistics.fmean(1000 * (one.ended - one.first) / (one.answer_tokens - 1) for one in done),
            CHUNK_TOKENS * sum(int(one.fetched) for one in done) / sum(one.prompt_tokens for one in done),
        )

    def _arrive(self, when: float) -> None:
        # A turn adds 205 tokens, and the average turn is number 9.
        prompt = 350 + 205 * min(self._chance.randint(0, 27), self._chance.randint(0, 27))
        stored = (prompt - 40) // CHUNK_TOKENS if self._bytes_per_second else 0
        self._waiting.append(Request(when, prompt, self._chance.randint(100, 230), stored))

    def _step(self) -> None:
        budget, ahead_chunks, prefill_seconds = BUDGET_TOKENS - len(self._running), 0.0, 0.0
        began: list[Request] = []
        for one in list(self._waiting):
            if budget <= 0:
                break
            if one.left is None:
                ahead_chunks += self._waits(one, ahead_chunks)
            if one.left is None:
                continue
            tokens = min(budget, one.left)
            prefill_seconds += self._prefill.saved_seconds(tokens, one.prompt_tokens - one.left)
            one.left -= tokens
            budget -= tokens
            if not one.left:
                began.append(one)
                self._waiting.remove(one)
        seconds = self._hardware.step_seconds(max(1, len(self._running))) + prefill_seconds
        self._prefills.add(prefill_seconds, seconds)
        self._fetch(seconds)
        self._now += seconds
        for one in self._running:
            one.answered += 1
            if one.answered == one.answer_tokens:
                one.ended = self._now
                self._done.append(one)
                self._arrivals.append(self._now)
        self._running = [one for one in self._running if not one.ended] + began
        for one in began:
            one.first, one.answered = self._now, 1
        self._arrivals.sort()

    def _waits(self, one: Request, ahead_chunks: float) -> float:
        """The number of chunks to wait for. If 0, sets the tokens to compute."""
        missing = one.wanted - one.fetched
        if missing > 1e-6:
            worth = worth_waiting_for(
                math.ceil(missing),
                chunk_bytes=self._chunk_bytes,
                ahead_bytes=int(ahead_chunks * self._chunk_bytes),
                bytes_per_second=self._bytes_per_second,
                prefill=self._prefill,
                chunk_tokens=CHUNK_TOKENS,
                context_tokens=int(one.fetched) * CHUNK_TOKENS,
                seconds_left=one.arrived + DEADLINE_SECONDS - self._now,
                prefill_share=self._prefills.bytes_per_second,
            )
            if worth:
                one.wanted = one.fetched + min(missing, worth)
                return one.wanted - one.fetched
        one.wanted = one.fetched = float(int(one.fetched + 1e-6))
        one.left = one.prompt_tokens - int(one.fetched) * CHUNK_TOKENS
        return 0.0

    def _fetch(self, seconds: float) -> None:
        """Fetch for `seconds`, one piece after the other in the order of their virtual deadlines."""
        chunks = seconds * self._bytes_per_second / self._chunk_bytes
        wanting = [one for one in self._waiting if one.left is None and one.wanted - one.fetched > 1e-6]
        while chunks > 1e-6 and wanting:
            one = min(wanting, key=lambda one: due_seconds(one.arrived, int(one.fetched), self._chunk_bytes))
            piece = min(chunks, one.wanted - one.fetched, PIECE_CHUNKS)
            one.fetched += piece
            chunks -= piece
            wanting = [one for one in wanting if one.wanted - one.fetched > 1e-6]


def simulate(hardware: Hardware, bytes_per_second: float, clients: int, seeds: int, patience: str) -> Result:
    """Simulate all seeds; returns means over them."""
    rate = 0.0 if patience == "none" else bytes_per_second
    with mock.patch.object(rule, "patience", PATIENCE[patience]):
        found = [Worker(hardware, rate, clients, seed).run() for seed in range(seeds)]
    return Result(*(statistics.fmean(column) for column in zip(*found, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat.waiting", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--gb-per-second", type=float, default=1.05, help="from the store; default 1.05")
    parser.add_argument("--kv-bytes", type=int, default=160 << 10, help="a token; default 163840, an FP8 70B model's")
    parser.add_argument("--gpu", type=float, default=1.0, help="times as fast as one H200; default 1")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    hardware = Hardware(kv_bytes_per_token=options.kv_bytes).slower_gpu(1 / options.gpu)
    print(f"{'clients':>7} {'patience':>8} {'requests/s':>11} {'TTFT ms':>8} {'p99':>6} {'TPOT ms':>8} {'fetched':>8}")
    for clients, patience in itertools.product(options.clients, PATIENCE):
        got = simulate(hardware, 1e9 * options.gb_per_second, clients, options.seeds, patience)
        print(
            f"{clients:>7} {patience:>8} {got.requests_per_second:>11.2f} {got.ttft_ms:>8.0f} {got.ttft_ms_p99:>6.0f}"
            f" {got.tpot_ms:>8.1f} {got.fetched_share:>8.0%}"
        )


if __name__ == "__main__":
    main()
