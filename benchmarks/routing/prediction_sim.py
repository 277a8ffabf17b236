"""The accuracy of the router's TTFT predictions in the policy simulator. Every figure is simulated.

    python -m benchmarks.routing.prediction_sim --json FILE [--noise N] [--seconds N]

It uses the router's own cost model and live speeds. The router begins with priors that are wrong by a factor of two. It
gets each worker's report once a second, and corrects itself by actual first tokens. Durations of prefills and fetches,
and the reports of them, have lognormal noise (`--noise`). The figure is the error |predicted / actual - 1|, for the
first 50 requests and for later ones. `python -m benchmarks.routing.prediction` measures the same on a real cluster.
"""

import argparse
import random
import statistics
from pathlib import Path

import msgspec

from benchmarks.routing import policy_rules
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_sim import BLOCK_TOKENS, CHAT, CHUNK_TOKENS, ClosedLoop, Request, Simulation
from components.pricing.cost import Choice
from components.router.speeds import LiveSpeeds
from kvstore.bus.messages import WorkerReport

LEARNING = 50
WORKERS, POOL = 2, 160
CLIENTS = (2, 4, 8, 12, 16, 20, 24)  # per worker; with 24, requests wait for HBM
PRIOR_FACTOR = 2.0


class Result(msgspec.Struct):
    kind: str
    clients: int
    noise: float
    requests: int
    error_median_first: float  # of the first 50
    error_median: float  # of later ones
    error_quartiles: tuple[float, float]
    error_p90: float
    ratio_median: float  # actual over predicted


class Predicting:
    """The router as a policy of the simulator, with learnt speeds."""

    def __init__(self, hardware: Hardware, noise: float, seed: int):
        self._noise, self._chance = noise, random.Random(seed)
        slow = 1 / PRIOR_FACTOR
        self._speeds = LiveSpeeds(policy_rules.known_speeds(hardware, PRIOR_FACTOR, slow, slow))
        self._reported = 0
        self._chosen: dict[int, Choice] = {}  # by id of the request, until its first token
        self.errors: list[float] = []
        self.ratios: list[float] = []

    def decide(self, sim: Simulation, request: Request) -> tuple[int, int]:
        while self._reported < sim.now:
            self._reported += 1
            for worker in sim.workers:
                self._speeds.heard_worker(self._report(sim.hardware, worker.number))
        choice = policy_rules.choose(sim, request, self._speeds.of_worker)
        self._chosen[id(request)] = choice
        request.predicted_seconds = choice.ttft_seconds
        request.queued = choice.wait_seconds > 0
        return policy_rules.wanted(choice)

    def observe(self, request: Request) -> None:
        took = request.first - request.arrived
        self.ratios.append(took / request.predicted_seconds)
        self.errors.append(abs(request.predicted_seconds / took - 1))
        choice = self._chosen.pop(id(request))
        if not request.fetch_tokens and not request.queued:
            context = choice.prompt_tokens - choice.missing_tokens
            self._speeds.observed(request.worker, choice.missing_tokens, context, took - choice.copy_seconds)

    def _report(self, hardware: Hardware, worker: int) -> WorkerReport:
        off = [self._chance.lognormvariate(0, self._noise) for _ in range(3)]
        speeds = policy_rules.known_speeds(hardware, *off)
        return WorkerReport(
            worker=str(worker),
            endpoint="",
            fingerprint=0,
            block_tokens=BLOCK_TOKENS,
            blocks_per_chunk=CHUNK_TOKENS // BLOCK_TOKENS,
            chunk_bytes=CHUNK_TOKENS * hardware.kv_bytes_per_token,
            ts_ms=1000 * self._reported,
            prefill_base_seconds=speeds.prefill_base_seconds,
            prefill_seconds_per_token=speeds.prefill_seconds_per_token,
            prefill_seconds_per_token_squared=speeds.prefill_seconds_per_token_squared,
            dram_bytes_per_second=speeds.dram_bytes_per_second,
            store_bytes_per_second=speeds.store_bytes_per_second,
        )


def predict(clients: int, noise: float, seconds: float, seed: int) -> Result:
    """Simulate `clients` per worker for `seconds` of simulated time."""
    hardware = Hardware()
    router = Predicting(hardware, noise, seed)
    sim = ClosedLoop(
        hardware, WORKERS, clients * WORKERS, POOL, CHAT, router.decide,
        store=True, seed=seed, noise=noise, observe=router.observe,
    )  # fmt: skip
    sim.run(seconds, 0)
    after = router.errors[LEARNING:]
    low, _, high = statistics.quantiles(after, n=4)
    return Result(
        kind="simulated",
        clients=clients,
        noise=noise,
        requests=len(router.errors),
        error_median_first=round(statistics.median(router.errors[:LEARNING]), 3),
        error_median=round(statistics.median(after), 3),
        error_quartiles=(round(low, 3), round(high, 3)),
        error_p90=round(statistics.quantiles(after, n=10)[-1], 3),
        ratio_median=round(statistics.median(router.ratios[LEARNING:]), 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.prediction_sim", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seconds", type=int, default=300, help="simulated")
    parser.add_argument("--noise", type=float, default=0.2, help="deviation of durations and reports, in logarithms")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.seconds < 100:
        parser.error(f"argument --seconds: {options.seconds}: expected at least 100")
    results = [predict(clients, options.noise, options.seconds, options.seed) for clients in CLIENTS]
    print("simulated: clients a worker | error of the first 50, after (quartiles), p90 | actual over predicted")
    for one in results:
        low, high = one.error_quartiles
        after = f"{one.error_median:.0%} ({low:.0%} to {high:.0%}), p90 {one.error_p90:.0%}"
        print(f"{one.clients:3} | {one.error_median_first:.0%}, {after} | {one.ratio_median:.2f}")
    if options.json:
        options.json.write_text(msgspec.json.format(msgspec.json.encode(results), indent=2).decode() + "\n")


if __name__ == "__main__":
    main()
