"""Routing policies compared in a simulator (policy_sim.py). Every figure is simulated.

    python -m benchmarks.routing.policy --json FILE [--quick] [--loads NAME ...] [--workers N ...] [--seeds N]
        [--unequal no|gpus|links ...] [--clients N ...] [--seconds N] [--target-gb N]
    python -m benchmarks.routing.policy --trace FILE --json FILE [--paces X ...] [--workers N ...] [--seeds N] ...

It sweeps the number of clients for each number of workers, load, policy and seed. The figure is the highest requests/s
with a mean TPOT of at most 40 ms; a second one also limits the mean TTFT to half a second. For comparison there are an
oracle, and an upper bound for any policy (policy_bound.py). First, it compares the simulator with measurements on one
H200, and prints the error.

With --trace, it replays a trace in Mooncake's JSON lines instead (trace.py), at its own pace or faster. The figures are
each policy's TTFT and TPOT at each pace.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.routing import policy_bound, policy_rules, trace
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_rules import LLMD_PENALTY_SECONDS, ORACLES, STALL_PRICE
from benchmarks.routing.policy_sim import AGENTS, CHAT, KIMI, ClosedLoop, Outcome, Policy, Replay, Shape
from benchmarks.routing.trace import Traced
from kvstore.errors import ConfigError, run_command

TPOT_MS_MAX = 40.0
TTFT_MS_MAX = 500.0
POOL = 80  # conversations a worker
SLOWER = 2.0  # factor of every other worker's GPU, with unequal GPUs
NARROWER = 5.0  # factor of every other worker's link, with unequal links
TRACE_NOISE = 0.1  # of durations, in logarithms: the only difference between a replay's seeds
# Other projects' policies over the same store. kvtier is compared with the best of them.
OTHERS = ("round robin", "least loaded", "dynamo", "dynamo, shared", "llm-d", "lmetric")
# Clients, DRAM offload, and the requests/s, mean TTFT ms and TPOT ms measured on one H200 (no store, 80 conversations).
MEASURED = (
    (8, False, 1.54, 285, 31),
    (14, False, 2.14, 469, 39),
    (16, False, 2.29, 395, 42),
    (8, True, 2.04, 149, 24),
    (16, True, 3.50, 167, 27),
)


class Load(msgspec.Struct, frozen=True):
    """A load, and a worker's memory for it."""

    shape: Shape
    hbm_tokens: int = 48_000
    dram_tokens: int = 100_000
    clients: tuple[int, ...] = (4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32)  # per worker


LOADS = {
    "chat": Load(CHAT),
    "agents": Load(AGENTS, clients=tuple(range(2, 17))),
    # For prompts of 7,600 tokens: all HBM of an H200 without these weights, and 130 GB of DRAM.
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
    unequal: str
    policy: str
    seed: int
    clients: int = 0  # with the highest requests/s within the TPOT limit; 0: none
    requests_per_second: float = 0.0
    ttft_ms_mean: float = 0.0
    ttft_ms_p99: float = 0.0
    tpot_ms_mean: float = 0.0
    prompt_requests_per_second: float = 0.0  # the highest within the TTFT limit, too
    p99_by_clients: dict[int, float] = {}  # TTFT in ms


class Replayed(msgspec.Struct):
    """The result of a trace with a policy."""

    workers: int
    unequal: str
    pace: float
    policy: str
    seed: int
    requests_per_second: float
    ttft_ms_mean: float
    ttft_ms_median: float
    ttft_ms_p99: float
    tpot_ms_mean: float


class Ratio(msgspec.Struct):
    """A ratio over seeds."""

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
    replayed: list[Replayed]
    bounds: dict[str, float]  # requests/s
    ratios: dict[str, dict[str, Ratio]]


def check(quick: bool) -> list[Check]:
    checks = []
    for clients, offload, rate, ttft, tpot in MEASURED:
        hardware = Hardware(dram_tokens=400_000 if offload else 0)
        sim = ClosedLoop(hardware, 1, clients, POOL, CHAT, policy_rules.round_robin(), store=False)
        got = sim.run(60 if quick else 300, 60)
        error = round(100 * (got.requests_per_second / rate - 1), 1)
        checks.append(
            Check(
                clients, offload, rate, got.requests_per_second, error, ttft, got.ttft_ms_mean, tpot, got.tpot_ms_mean
            )
        )
    return checks


Makers = tuple[bool, list[Callable[[], Policy]]]


def policies(seed: int, stall_price: float = STALL_PRICE, routers: int = 1) -> dict[str, Makers]:
    """Name -> (whether there is a store, constructors of the policy's variants). The best variant counts."""
    found: dict[str, Makers] = {
        "round robin, no store": (False, [policy_rules.round_robin]),
        "dynamo, no store": (False, [lambda: policy_rules.dynamo(0.0)]),
        "round robin": (True, [policy_rules.round_robin]),
        "least loaded": (True, [policy_rules.least_loaded]),
        "dynamo": (True, [lambda: policy_rules.dynamo(0.0)]),
        "dynamo, shared": (True, [lambda: policy_rules.dynamo(0.5)]),
        "llm-d": (True, [lambda bound=bound: policy_rules.llmd(bound) for bound in LLMD_PENALTY_SECONDS]),  # type: ignore[misc]
        "lmetric": (True, [policy_rules.lmetric]),
        "kvtier": (True, [lambda: policy_rules.ours(seed, stall_price)]),
        "oracle": (True, [lambda prices=prices: policy_rules.oracle(prices) for prices in ORACLES]),  # type: ignore[misc]
    }
    if routers > 1:
        found[f"kvtier, {routers} routers"] = True, [lambda: policy_rules.side_by_side(routers, seed, told=True)]
        found[f"kvtier, {routers} apart"] = True, [lambda: policy_rules.side_by_side(routers, seed, told=False)]
    return found


def unlike(hardware: Hardware, unequal: str) -> Sequence[Hardware]:
    """The workers' hardware, in turn."""
    return {
        "no": [],
        "gpus": [hardware, hardware.slower_gpu(SLOWER)],
        "links": [
            hardware,
            replace(hardware, worker_bytes_per_second=hardware.worker_bytes_per_second / NARROWER),
        ],
    }[unequal]


def sweep(
    load: Load, hardware: Hardware, workers: int, unequal: str, name: str, make: Makers, seed: int, seconds: float
) -> Row:
    """The highest requests/s within the limits: more clients until the TPOT limit is exceeded."""
    store, makers = make
    best = Row(load.shape.name, workers, unequal, name, seed)
    ramp = max(20.0, seconds / 2)
    for maker in makers:
        # TPOT only rises with the number of clients, so the sweep ends when it exceeds the limit.
        for each in load.clients:
            sim = ClosedLoop(
                hardware, workers, each * workers, POOL * workers, load.shape, maker(),
                store=store, seed=seed, each=unlike(hardware, unequal),
            )  # fmt: skip
            got = sim.run(seconds, ramp)
            p99 = best.p99_by_clients.get(each * workers, got.ttft_ms_p99)
            best.p99_by_clients[each * workers] = min(p99, got.ttft_ms_p99)
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


def over_others(rows: list[Row], bound: float) -> dict[str, Ratio]:
    """kvtier's requests/s divided by the others', for one load and one number of workers, seed by seed."""
    found: dict[str, list[float]] = {}

    def over(name: str, ours: float, other: float) -> None:
        if other:  # without a point within the limits there is no ratio
            found.setdefault(name, []).append(ours / other)

    for seed in {row.seed for row in rows}:
        of = {row.policy: row for row in rows if row.seed == seed}
        rate = {name: row.requests_per_second for name, row in of.items()}
        prompt = {name: row.prompt_requests_per_second for name, row in of.items()}
        over("over the best of the others", rate["kvtier"], max(rate[name] for name in OTHERS))
        over("the same, TTFT bounded", prompt["kvtier"], max(prompt[name] for name in OTHERS))
        best = max(OTHERS, key=rate.__getitem__)
        clients = of[best].clients
        over("p99 TTFT of that one, at its clients", of[best].ttft_ms_p99, of["kvtier"].p99_by_clients.get(clients, 0))
        over("over best dynamo (goal 1.2)", rate["kvtier"], max(rate["dynamo"], rate["dynamo, shared"]))
        over("of oracle (goal 0.9)", rate["kvtier"], rate["oracle"])
        if bound:
            over("of the bound", rate["kvtier"], bound)
        over("over round robin, no store", rate["kvtier"], rate["round robin, no store"])
        over("over dynamo, no store", rate["kvtier"], rate["dynamo, no store"])
    return summed_up(found)


def summed_up(found: dict[str, list[float]]) -> dict[str, Ratio]:
    return {name: Ratio(statistics.median(every), min(every), max(every)) for name, every in found.items()}


def replays(
    requests: Sequence[Traced], hardware: Hardware, options: argparse.Namespace, workers: int, unequal: str, pace: float
) -> list[Replayed]:
    """Each policy's results for each seed. Of a policy's variants, the one with the lowest mean TTFT."""
    rows = []
    for seed in range(1, 1 + options.seeds):
        for name, (store, makers) in policies(seed, options.stall_price).items():
            outcomes: list[Outcome] = []
            for maker in makers:
                replay = Replay(
                    hardware, workers, requests, maker(), pace=pace, think_seconds=options.think_seconds,
                    store=store, seed=seed, noise=TRACE_NOISE, each=unlike(hardware, unequal),
                )  # fmt: skip
                outcomes.append(replay.run())
            best = min(outcomes, key=lambda one: one.ttft_ms_mean)
            rows.append(
                Replayed(
                    workers, unequal, pace, name, seed, best.requests_per_second, best.ttft_ms_mean,
                    best.ttft_ms_median, best.ttft_ms_p99, best.tpot_ms_mean,
                )
            )  # fmt: skip
    return rows


def sooner(rows: list[Replayed]) -> dict[str, Ratio]:
    """The others' divided by kvtier's, seed by seed: above 1 if kvtier's is lower."""
    found: dict[str, list[float]] = {}
    for seed in {row.seed for row in rows}:
        of = {row.policy: row for row in rows if row.seed == seed}
        for figure in ("ttft_ms_mean", "ttft_ms_median", "ttft_ms_p99", "tpot_ms_mean"):
            least = min(getattr(of[name], figure) for name in OTHERS)
            found.setdefault(f"{figure} of the best of the others", []).append(least / getattr(of["kvtier"], figure))
    return summed_up(found)


def show_checks(checks: list[Check]) -> None:
    print("simulated against measured on one H200: clients, DRAM offload | requests/s | TTFT ms | TPOT ms")
    for one in checks:
        print(
            f"{one.clients:3} {one.dram_offload!s:5} | {one.simulated_requests_per_second:.2f} "
            f"({one.measured_requests_per_second:.2f}, {one.error_percent:+.0f} %) | {one.simulated_ttft_ms:.0f} "
            f"({one.measured_ttft_ms:.0f}) | {one.simulated_tpot_ms:.1f} ({one.measured_tpot_ms:.0f})"
        )


def show(rows: list[Row], bound: float) -> None:
    print(f"\n{case(rows[0].load, rows[0].workers, rows[0].unequal)} (simulated)")
    print("medians over seeds: clients | requests/s, with a bound on TTFT | TTFT ms mean, p99 | TPOT ms")
    columns = (
        "clients", "requests_per_second", "prompt_requests_per_second", "ttft_ms_mean", "ttft_ms_p99", "tpot_ms_mean",
    )  # fmt: skip
    for name, (clients, rate, prompt, mean, p99, tpot) in medians(rows, columns).items():
        print(f"{name:22} {clients:5.0f} | {rate:7.2f} {prompt:7.2f} | {mean:6.0f} {p99:6.0f} | {tpot:.1f}")
    if bound:
        print(f"{'bound':22} {'':5} | {bound:7.2f}")


def show_replays(rows: list[Replayed]) -> None:
    print(f"\n{case(f'trace at {rows[0].pace:g} times its pace', rows[0].workers, rows[0].unequal)} (simulated)")
    print("medians over seeds: requests/s | TTFT ms mean, median, p99 | TPOT ms")
    columns = ("requests_per_second", "ttft_ms_mean", "ttft_ms_median", "ttft_ms_p99", "tpot_ms_mean")
    for name, (rate, mean, median, p99, tpot) in medians(rows, columns).items():
        print(f"{name:22} {rate:7.2f} | {mean:7.0f} {median:7.0f} {p99:8.0f} | {tpot:.1f}")


def case(load: str, workers: int, unequal: str) -> str:
    return f"{load}, {workers} workers" + ("" if unequal == "no" else f", unequal {unequal}")


def medians(rows: Sequence[Row | Replayed], columns: tuple[str, ...]) -> dict[str, list[float]]:
    """By policy."""
    return {
        name: [statistics.median(getattr(row, one) for row in rows if row.policy == name) for one in columns]
        for name in dict.fromkeys(row.policy for row in rows)
    }


def show_ratios(found: dict[str, Ratio]) -> None:
    for name, ratio in found.items():
        print(f"  kvtier {name}: {ratio}", flush=True)


def number(least: float, most: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """A parser of an option's number."""

    def parse(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a number from {least:g} to {most:g}")
        return value

    parse.__name__ = "number"
    return parse


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.policy", description=__doc__.split("\n")[0])
    whole = number(1, 4096, int)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--workers", type=whole, nargs="+", help="default: 1 2 4 8 64; of a trace 16")
    slower = f"every other worker's GPU is {SLOWER:g} times slower, or link {NARROWER:g} times"
    parser.add_argument("--unequal", nargs="+", choices=("no", "gpus", "links"), default=["no"], help=slower)
    parser.add_argument("--trace", type=Path, help="JSON lines to replay, as Mooncake's")
    parser.add_argument("--paces", type=number(0.001, 1000), nargs="+", default=[1.0], help="times the trace's own")
    parser.add_argument("--think-seconds", type=number(0, 3600), default=1.0,
                        help="at least so long between an answer of the trace and the next turn")  # fmt: skip
    parser.add_argument("--requests", type=number(1, 10_000_000, int), help="of the trace, from its start; default all")
    parser.add_argument("--clients", type=number(1, 1024, int), nargs="+", help="a worker, instead of the load's own")
    parser.add_argument("--seconds", type=number(10, 3600), default=120.0, help="simulated, of each number of clients")
    parser.add_argument("--quick", action="store_true", help="shorter, few numbers of clients, and up to 4 workers")
    parser.add_argument("--target-gb", type=number(0.001, 1000), default=5.0,
                        help="GB/s of a target, which two workers share")  # fmt: skip
    parser.add_argument("--stall-price", type=float, default=STALL_PRICE, help="the router's option of that name")
    side_by_side = "of kvtier: so many side by side, told of each other or not, are played, too"
    parser.add_argument("--routers", type=number(1, 64, int), default=1, help=side_by_side)
    parser.add_argument("--seeds", type=whole, default=3, help="how many; with more than 8 workers it is one")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    requests = traced(options) if options.trace else []
    report = Report("simulated", options.target_gb, 0.0, check(options.quick), [], [], {}, {})
    show_checks(report.checks)
    for name, found in replay_all(requests, options, report) if requests else sweep_all(options, report):
        report.ratios[name] = found
        show_ratios(found)
        report.took_seconds = round(time.monotonic() - begun, 1)
        if options.json:
            options.json.write_text(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


def sweep_all(options: argparse.Namespace, report: Report) -> Iterator[tuple[str, dict[str, Ratio]]]:
    counts = [count for count in options.workers or (1, 2, 4, 8, 64) if count <= 4 or not options.quick]
    for load, workers, unequal in itertools.product(options.loads, counts, options.unequal):
        load, short = LOADS[load], options.quick or workers > 8
        hardware = hardware_of(load, options.target_gb)
        clients = load.clients[1::3] if short else sorted(options.clients or load.clients)
        played = msgspec.structs.replace(load, clients=tuple(clients))
        rows = [
            sweep(played, hardware, workers, unequal, name, make, seed, 20.0 if short else options.seconds)
            for seed in range(1, 1 + (1 if workers > 8 else options.seeds))
            for name, make in policies(seed, options.stall_price, options.routers).items()
        ]
        bound = 0.0
        if unequal == "no":  # it is that of workers of one kind
            bound = policy_bound.requests_per_second(load.shape, hardware, workers, POOL, TPOT_MS_MAX / 1000)
        name = case(load.shape.name, workers, unequal)
        report.rows += rows
        report.bounds[name] = round(bound, 2)
        show(rows, bound)
        yield name, over_others(rows, bound)


def replay_all(
    requests: Sequence[Traced], options: argparse.Namespace, report: Report
) -> Iterator[tuple[str, dict[str, Ratio]]]:
    hardware = hardware_of(LOADS["kimi"], options.target_gb)
    for workers, unequal, pace in itertools.product(options.workers or (16,), options.unequal, options.paces):
        rows = replays(requests, hardware, options, workers, unequal, pace)
        report.replayed += rows
        show_replays(rows)
        yield case(f"trace at {pace:g} times its pace", workers, unequal), sooner(rows)


def hardware_of(load: Load, target_gb: float) -> Hardware:
    return Hardware(hbm_tokens=load.hbm_tokens, dram_tokens=load.dram_tokens, target_bytes_per_second=target_gb * 1e9)


def traced(options: argparse.Namespace) -> list[Traced]:
    try:
        requests = trace.read(options.trace, options.requests)
    except OSError as error:
        raise ConfigError("trace", options.trace, f"a file that can be read ({error.strerror})") from None
    most = LOADS["kimi"].hbm_tokens
    longer = sum(one.prompt_tokens + one.answer_tokens > most for one in requests)
    print(f"{len(requests)} requests; {longer} left out, which have more than the {most} tokens of a worker's HBM")
    return requests


def main() -> None:
    run_command("benchmarks.routing.policy", lambda: run(parsed()))


if __name__ == "__main__":
    main()
