"""Routing policies compared in a simulator (policy_sim.py). Every figure is simulated.

    python -m benchmarks.routing.policy --json FILE [--quick] [--loads NAME ...] [--workers N ...] [--seeds N]
        [--target-gb N]

For each number of workers and each load: the most requests/s with a mean TPOT of at most 40 ms, over a sweep of
clients; the same with a mean TTFT of at most half a second, too; for each of several seeds. Beside the policies stand
an oracle, and a bound that nothing can pass (policy_bound.py). Before that, the simulator against what was
measured on one H200, with the error.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.routing import policy_bound, policy_rules
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_rules import GPU_PRICE, ORACLES, STALL_PRICE
from benchmarks.routing.policy_sim import AGENTS, CHAT, KIMI, Policy, Shape, Simulation

TPOT_MS_MAX = 40.0
TTFT_MS_MAX = 500.0
POOL = 80  # conversations a worker
# Clients, DRAM offload, and the requests/s, mean TTFT ms and TPOT ms measured on one H200 (no store, 80 conversations).
MEASURED = (
    (8, False, 1.54, 285, 31),
    (14, False, 2.14, 469, 39),
    (16, False, 2.29, 395, 42),
    (8, True, 2.04, 149, 24),
    (16, True, 3.50, 167, 27),
)


class Load(msgspec.Struct, frozen=True):
    """What is asked for, and the memory of a worker that it takes."""

    shape: Shape
    hbm_tokens: int = 48_000
    dram_tokens: int = 100_000
    clients: tuple[int, ...] = (4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32)  # a worker


LOADS = {
    "chat": Load(CHAT),
    "agents": Load(AGENTS, clients=tuple(range(2, 17))),
    # Prompts of 7,600 tokens: all that an H200 has left beside these weights, and 130 GB of DRAM.
    "kimi": Load(KIMI, 160_000, 400_000, tuple(range(2, 13))),
}


class Check(msgspec.Struct):
    clients: int
    dram_offload: bool
    measured_requests_per_second: float
    simulated_requests_per_second: float
    error_percent: float
    measured_ttft_ms: float
    simulated_ttft_ms: float
    measured_tpot_ms: float
    simulated_tpot_ms: float


class Row(msgspec.Struct):
    load: str
    workers: int
    policy: str
    seed: int
    clients: int = 0  # with the most requests/s within the bound on TPOT; 0: none was
    requests_per_second: float = 0.0
    ttft_ms_mean: float = 0.0
    ttft_ms_p99: float = 0.0
    tpot_ms_mean: float = 0.0
    prompt_requests_per_second: float = 0.0  # the most within the bound on TTFT, too


class Ratio(msgspec.Struct):
    """Over seeds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


class Report(msgspec.Struct):
    kind: str
    target_gb: float
    took_seconds: float
    checks: list[Check]
    rows: list[Row]
    bounds: dict[str, float]  # requests/s
    ratios: dict[str, dict[str, Ratio]]


def check(quick: bool) -> list[Check]:
    checks = []
    for clients, offload, rate, ttft, tpot in MEASURED:
        hardware = Hardware(dram_tokens=400_000 if offload else 0)
        sim = Simulation(hardware, 1, clients, POOL, CHAT, policy_rules.round_robin(), store=False)
        got = sim.run(60 if quick else 300, 60)
        error = round(100 * (got.requests_per_second / rate - 1), 1)
        checks.append(
            Check(
                clients, offload, rate, got.requests_per_second, error, ttft, got.ttft_ms_mean, tpot, got.tpot_ms_mean
            )
        )
    return checks


def policies(
    seed: int, gpu_price: float = GPU_PRICE, stall_price: float = STALL_PRICE
) -> dict[str, tuple[bool, list[Callable[[], Policy]]]]:
    """Name -> (with a store, what makes the policy; of several the best counts)."""
    return {
        "round robin, no store": (False, [policy_rules.round_robin]),
        "dynamo, no store": (False, [lambda: policy_rules.dynamo(0.0)]),
        "round robin": (True, [policy_rules.round_robin]),
        "dynamo": (True, [lambda: policy_rules.dynamo(0.0)]),
        "dynamo, external": (True, [lambda: policy_rules.dynamo(0.25)]),
        "kvtier": (True, [lambda: policy_rules.ours(seed, gpu_price, stall_price)]),
        "oracle": (True, [lambda prices=prices: policy_rules.oracle(prices) for prices in ORACLES]),  # type: ignore[misc]
    }


def sweep(
    load: Load,
    workers: int,
    name: str,
    make: tuple[bool, list[Callable[[], Policy]]],
    quick: bool,
    seed: int,
    target_gb: float,
) -> Row:
    """The most requests/s within the bounds; more clients until that on TPOT is passed."""
    hardware = Hardware(
        hbm_tokens=load.hbm_tokens, dram_tokens=load.dram_tokens, target_bytes_per_second=target_gb * 1e9
    )
    store, makers = make
    best = Row(load.shape.name, workers, name, seed)
    seconds, ramp = (20.0, 20.0) if quick or workers > 8 else (120.0, 60.0)
    for maker in makers:
        # More clients only ever lengthen decoding, so the sweep ends where the bound is passed.
        for each in load.clients[1::3] if quick or workers > 8 else load.clients:
            sim = Simulation(
                hardware, workers, each * workers, POOL * workers, load.shape, maker(), store=store, seed=seed
            )
            got = sim.run(seconds, ramp)
            if got.tpot_ms_mean > TPOT_MS_MAX:
                break
            rate = got.requests_per_second
            if got.ttft_ms_mean <= TTFT_MS_MAX:
                best.prompt_requests_per_second = max(best.prompt_requests_per_second, rate)
            if rate > best.requests_per_second:
                best.clients, best.requests_per_second = each * workers, rate
                best.ttft_ms_mean, best.ttft_ms_p99 = got.ttft_ms_mean, got.ttft_ms_p99
                best.tpot_ms_mean = got.tpot_ms_mean
    return best


def ratios(rows: list[Row], bound: float) -> dict[str, Ratio]:
    """kvtier's requests/s over others', of one load and one number of workers; each seed's beside its own."""
    found: dict[str, list[float]] = {}

    def over(name: str, ours: float, other: float) -> None:
        if other:  # where the other has no point within the bounds there is no ratio
            found.setdefault(name, []).append(ours / other)

    for seed in {row.seed for row in rows}:
        of = {row.policy: row for row in rows if row.seed == seed}
        rate = {name: row.requests_per_second for name, row in of.items()}
        prompt = {name: row.prompt_requests_per_second for name, row in of.items()}
        over("over best dynamo (goal 1.2)", rate["kvtier"], max(rate["dynamo"], rate["dynamo, external"]))
        over("the same, TTFT bounded", prompt["kvtier"], max(prompt["dynamo"], prompt["dynamo, external"]))
        over("of oracle (goal 0.9)", rate["kvtier"], rate["oracle"])
        over("of the bound", rate["kvtier"], bound)
        over("over round robin, no store", rate["kvtier"], rate["round robin, no store"])
        over("over dynamo, no store", rate["kvtier"], rate["dynamo, no store"])
    return {name: Ratio(statistics.median(every), min(every), max(every)) for name, every in found.items()}


def show_checks(checks: list[Check]) -> None:
    print("simulated against measured on one H200: clients, DRAM offload | requests/s | TTFT ms | TPOT ms")
    for one in checks:
        print(
            f"{one.clients:3} {one.dram_offload!s:5} | {one.simulated_requests_per_second:.2f} "
            f"({one.measured_requests_per_second:.2f}, {one.error_percent:+.0f} %) | {one.simulated_ttft_ms:.0f} "
            f"({one.measured_ttft_ms:.0f}) | {one.simulated_tpot_ms:.1f} ({one.measured_tpot_ms:.0f})"
        )


def show(rows: list[Row], bound: float, found: dict[str, Ratio]) -> None:
    print(f"\n{rows[0].load}, {rows[0].workers} workers (simulated)")
    print("medians over seeds: clients | requests/s, with a bound on TTFT | TTFT ms mean, p99 | TPOT ms")
    for name in dict.fromkeys(row.policy for row in rows):
        of = [row for row in rows if row.policy == name]
        clients, rate, prompt, mean, p99, tpot = (
            statistics.median(getattr(row, column) for row in of)
            for column in (
                "clients", "requests_per_second", "prompt_requests_per_second",
                "ttft_ms_mean", "ttft_ms_p99", "tpot_ms_mean",
            )
        )  # fmt: skip
        print(f"{name:22} {clients:5.0f} | {rate:7.2f} {prompt:7.2f} | {mean:6.0f} {p99:6.0f} | {tpot:.1f}")
    print(f"{'bound':22} {'':5} | {bound:7.2f}")
    for name, ratio in found.items():
        print(f"  kvtier {name}: {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.policy", description=__doc__.split("\n")[0])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    parser.add_argument("--quick", action="store_true", help="shorter, and up to 4 workers")
    parser.add_argument("--target-gb", type=float, default=5.0, help="GB/s of a target, which two workers share")
    parser.add_argument("--gpu-price", type=float, default=GPU_PRICE, help="the router's option of that name")
    parser.add_argument("--stall-price", type=float, default=STALL_PRICE, help="the router's option of that name")
    parser.add_argument("--seeds", type=int, default=3, help="how many; with more than 8 workers it is one")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    begun = time.monotonic()
    report = Report("simulated", options.target_gb, 0.0, check(options.quick), [], {}, {})
    show_checks(report.checks)
    for load in (LOADS[name] for name in options.loads):
        hardware = Hardware(
            hbm_tokens=load.hbm_tokens,
            dram_tokens=load.dram_tokens,
            target_bytes_per_second=options.target_gb * 1e9,
        )
        for workers in [count for count in options.workers if count <= 4 or not options.quick]:
            rows = [
                sweep(load, workers, name, make, options.quick, seed, options.target_gb)
                for seed in range(1, 1 + (options.seeds if workers <= 8 else 1))
                for name, make in policies(seed, options.gpu_price, options.stall_price).items()
            ]
            bound = policy_bound.requests_per_second(load.shape, hardware, workers, POOL, TPOT_MS_MAX / 1000)
            case = f"{load.shape.name}, {workers} workers"
            report.rows += rows
            report.bounds[case] = round(bound, 2)
            report.ratios[case] = ratios(rows, bound)
            show(rows, bound, report.ratios[case])
            report.took_seconds = round(time.monotonic() - begun, 1)
            if options.json:
                options.json.write_text(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


if __name__ == "__main__":
    main()
