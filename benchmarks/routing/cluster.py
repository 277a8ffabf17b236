"""The real router, frontend, bus and targets over SIMULATED engines, compared with the offline simulator.

    python -m benchmarks.routing.cluster --workers 16 --clients 64 --json FILE [--router kvtier dynamo] [--slow N]

Plays multi-turn chat over HTTP through stock dynamo.frontend. What is live: tokenizing, routing, KV events, residency,
plans and their deadlines. What is simulated: GPUs and links (sim_worker.py). With `dynamo` the frontend's own KV router
replaces this project's router over the same workers. The report also has the result of policy_sim.py for the same
policy, hardware and load. On a slow machine, --slow N stretches each second of the simulated hardware to N seconds.
Figures are then per simulated second, except decision times.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chat.load import Endpoint, Pool, measure, warm_up
from benchmarks.routing import policy_rules
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_sim import CHAT, ClosedLoop, Request, Simulation
from benchmarks.routing.sim_worker import MODEL as WORKER_MODEL
from components.router.records import Decision
from graphs import services
from graphs.serve import Supervisor
from graphs.service import Deployment, Process, Service, ServiceArgs, Setting, Settings, as_flags, replicas
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import run_command

MODEL = "simulated"  # the router's
SOURCES = ("hbm", "dram", "store", "computed")
STAGES = ("hash", "ask", "locate", "price")
_READY_SECONDS = 60.0

Counted = dict[tuple[str, frozenset[tuple[str, str]]], float]  # samples of Prometheus by name and labels


class Figures(msgspec.Struct):
    """Rates are per second of the simulated hardware."""

    requests_per_second: float
    ttft_ms_mean: float
    ttft_ms_p99: float
    tpot_ms_mean: float
    tokens: dict[str, float]  # share of prompt tokens by source


class Result(msgspec.Struct):
    engines: str
    router: str
    workers: int
    clients: int
    slow: float
    requests: int
    failed: int
    live: Figures
    offline: Figures
    prediction_error: float | None  # live, median of |predicted / actual - 1| of the time to first token
    decision_ms: dict[str, tuple[float, float]]  # by stage: p50 and p99, within their histogram's buckets
    lag_ms_p99: float  # how far the simulated engines lag behind their clock


class Cluster:
    """NATS, a target, simulated workers, a router (or none: Dynamo's own in the frontend) and a frontend. `folder`
    holds model, state and logs; the workers share `processes` evenly."""

    def __init__(
        self, folder: Path, hardware: Hardware, workers: int, *,
        router: str = "kvtier", slow: float = 1.0, processes: int = 1, say: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        self.folder = folder
        self.model = MODEL if router == "kvtier" else WORKER_MODEL
        self._say = say
        model = make_tiny_model(folder / "model")
        page = f"127.0.0.1:{free_port()}"
        self.page_url = f"http://{page}" if router == "kvtier" else ""
        self.worker_ports = [free_port() for _ in range(processes)]
        slowed = hardware.slowed(slow)
        deadline_ms = round(2000 * slow)
        workers_flags: dict[str, Setting] = {
            "model": str(model),
            "workers": workers // processes,
            "slow": slow,
            "hbm-tokens": hardware.hbm_tokens,
            "dram-tokens": hardware.dram_tokens,
            "deadline-ms": deadline_ms,
        }
        router_flags: dict[str, Setting] = {
            "model-name": MODEL,
            "page": page,
            "deadline-ms": deadline_ms,
            "prefill-tokens-per-second": 1 / slowed.prefill_seconds_per_token,
            "prefill-base-ms": 1000 * (slowed.overhead_seconds + slowed.prefill_base_seconds),
            "dram-gbytes-per-second": slowed.dram_bytes_per_second / 1e9,
            "store-gbytes-per-second": slowed.worker_bytes_per_second / 1e9,
            "store-latency-ms": 1000 * slowed.store_latency_seconds,
        }
        frontend: dict[str, Setting] = {"port": free_port(), **({} if self.page_url else {"router-mode": "kv"})}
        store = {"listen": f"127.0.0.1:{free_port()}", "capacity": "4GiB", "segment-size": "64MiB", "hot": "1GiB"}
        settings = {
            "Nats": Settings(flags={"listen": f"127.0.0.1:{free_port()}"}),
            "Store": Settings(flags=store),
            "VllmWorker": Settings(flags={"model": str(model)}),  # where the router takes its model from
            "SimulatedWorker": Settings(ServiceArgs(workers=processes), flags=workers_flags),
            "Router": Settings(flags=router_flags),
            "Frontend": Settings(flags=frontend),
        }
        nats, target, front = services.Nats.fresh(), services.Store.fresh(), services.Frontend.fresh()
        simulated = Service("SimulatedWorker", self._simulated)
        front.link(simulated).link(target).link(nats)
        graph = [nats, target, simulated, front]
        if self.page_url:
            graph.insert(3, front.link(services.Router.fresh()))
            graph[3].link(simulated)
        self.deployment = Deployment(graph, settings, folder / "state")
        self.url = services.frontend_url(self.deployment)
        self.supervisor = Supervisor(self.deployment, self._show, restart=False)

    async def __aenter__(self) -> "Cluster":
        self.http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
        )
        self.endpoint = Endpoint(self.http, self.url, self.model, asks_ids=False)
        try:
            await self.supervisor.start()
            await self._answers()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        await self.supervisor.stop()

    async def _answers(self) -> None:
        """Wait until the frontend has found the model."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            with suppress(ConnectionError):
                await self.endpoint.complete([50], 1)
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {_READY_SECONDS:.0f} s; see {self.folder / 'state' / 'logs'}")
            await asyncio.sleep(0.2)

    async def counted(self) -> Counted:
        """All counters of the workers and the router."""
        pages = [f"http://127.0.0.1:{port}/metrics" for port in self.worker_ports]
        if self.page_url:
            pages.append(f"{self.page_url}/metrics")
        counted: Counted = {}
        for page in pages:
            async with self.http.get(page) as reply:
                for family in text_string_to_metric_families(await reply.text()):
                    for sample in family.samples:
                        key = sample.name, frozenset(sample.labels.items())
                        counted[key] = counted.get(key, 0.0) + sample.value
        return counted

    async def decisions(self) -> list[Decision]:
        """The last thousand decisions, the latest first."""
        async with self.http.get(f"{self.page_url}/decisions?limit=1000") as reply:
            return msgspec.json.decode(await reply.read(), type=list[Decision])

    def _simulated(self, settings: Settings, deployment: Deployment) -> list[Process]:
        processes = []
        for (replica, _, _), port in zip(replicas("SimulatedWorker", deployment), self.worker_ports, strict=True):
            flags: dict[str, Setting] = {
                **settings.flags,
                "store": services.store_addresses(deployment),
                "nats": services.nats_url(deployment),
                "metrics-port": port,
            }
            processes.append(
                Process(
                    f"SimulatedWorker-{replica}",
                    "SimulatedWorker",
                    [deployment.environment.python, "-m", "benchmarks.routing.sim_worker", *as_flags(flags)],
                    {**services.runtime_env(deployment), "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0"},
                    ready_line="benchmarks.routing.sim_worker: ready",
                )
            )
        return processes

    def _show(self, name: str, line: str) -> None:
        if line.startswith("ready after") or ": error: " in line:
            self._say(f"{name}: {line}")


def quantile(before: Counted, after: Counted, name: str, share: float, **labels: str) -> float:
    """The quantile of a histogram's increase, interpolated within the bucket; NaN without an increase."""
    bounds: dict[float, float] = {}
    for (sample, having), value in after.items():
        told = dict(having)
        if sample == f"{name}_bucket" and labels.items() <= told.items():
            bounds[float(told["le"])] = value - before.get((sample, having), 0.0)
    low, below = 0.0, 0.0
    rank = share * max(bounds.values(), default=0.0)
    for bound, count in sorted(bounds.items()):
        if count >= rank > 0:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return float("nan")


def shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {source: round(tokens.get(source, 0) / total, 3) for source in SOURCES} if total else {}


async def play(options: argparse.Namespace, router: str) -> Result:
    slow = options.slow
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(
            Path(folder), hardware_of(options), options.workers,
            router=router, slow=slow, say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        async with cluster:
            pool = Pool(options.pool * options.workers, options.seed)
            await warm_up(cluster.endpoint, pool, options.clients)
            before, begun = await cluster.counted(), time.time()
            point = await measure(
                cluster.endpoint, pool, router, options.clients,
                seconds=options.seconds * slow, ramp_seconds=options.ramp * slow,
            )  # fmt: skip
            after = await cluster.counted()
            decisions = [
                one
                for one in (await cluster.decisions() if cluster.page_url else [])
                if one.time > begun + options.ramp * slow and one.ttft_seconds
            ]
    grown = {
        source: after.get(key, 0) - before.get(key, 0)
        for source in SOURCES
        for key in [("simulated_prompt_tokens_total", frozenset({("source", source)}))]
    }
    errors = [abs(one.predicted_ttft_seconds / one.ttft_seconds - 1) for one in decisions if one.ttft_seconds]
    live = Figures(
        round(slow * point.requests_per_second, 3),
        round(point.ttft_ms_mean / slow, 1),
        round(point.ttft_ms_p99 / slow, 1),
        round(point.tpot_ms_mean / slow, 2),
        shares(grown),
    )

    def milliseconds(name: str, share: float, **labels: str) -> float:
        return round(1000 * quantile(before, after, name, share, **labels), 2)

    decision_seconds = "kvtier_router_decision_seconds"
    return Result(
        engines="SIMULATED",
        router=router,
        workers=options.workers,
        clients=options.clients,
        slow=slow,
        requests=point.requests,
        failed=point.failed,
        live=live,
        offline=offline(options, router),
        prediction_error=round(statistics.median(errors), 3) if errors else None,
        decision_ms={
            stage: (
                milliseconds(decision_seconds, 0.5, stage=stage),
                milliseconds(decision_seconds, 0.99, stage=stage),
            )
            for stage in (STAGES if cluster.page_url else ())
        },
        lag_ms_p99=milliseconds("simulated_lag_seconds", 0.99),
    )


def offline(options: argparse.Namespace, router: str) -> Figures:
    """The same policy, hardware and load in policy_sim.py."""
    decide = {"kvtier": policy_rules.ours(options.seed), "dynamo": policy_rules.dynamo(0.0)}[router]
    tokens: Counter[str] = Counter()

    def counting(simulation: Simulation, request: Request) -> tuple[int, int]:
        worker, wanted = decide(simulation, request)
        if simulation.now >= options.ramp:
            seen = simulation.seen(simulation.workers[worker], request.conversation)
            fetched = max(0, min(wanted, seen.store) - seen.dram)
            missing = request.conversation.prompt_tokens - seen.dram - fetched
            found = (seen.hbm, seen.dram - seen.hbm, fetched, missing)
            tokens.update(dict(zip(SOURCES, found, strict=True)))
        return worker, wanted

    pool = options.pool * options.workers
    simulation = ClosedLoop(
        hardware_of(options), options.workers, options.clients, pool, CHAT, counting, store=True, seed=options.seed
    )
    got = simulation.run(options.seconds, options.ramp)
    return Figures(got.requests_per_second, got.ttft_ms_mean, got.ttft_ms_p99, got.tpot_ms_mean, shares(tokens))


def hardware_of(options: argparse.Namespace) -> Hardware:
    return Hardware(
        hbm_tokens=options.hbm_tokens,
        dram_tokens=options.dram_tokens,
        target_bytes_per_second=options.target_gb * 1e9,
    )


def show(result: Result) -> None:
    def row(name: str, figure: Callable[[Figures], object]) -> None:
        print(f"{name:32} {figure(result.live)!s:>12} {figure(result.offline)!s:>12}")

    print(
        f"\nSIMULATED engines: {result.workers} workers, {result.clients} clients, router {result.router}, "
        f"{result.requests} requests, {result.failed} failed, slowed {result.slow:g} times"
    )
    print(f"{'':32} {'live':>12} {'offline':>12}")
    row("requests/s", lambda one: one.requests_per_second)
    row("TTFT ms, mean", lambda one: one.ttft_ms_mean)
    row("TTFT ms, p99", lambda one: one.ttft_ms_p99)
    row("TPOT ms, mean", lambda one: one.tpot_ms_mean)
    for source in SOURCES:
        row(f"prompt tokens: {source}", lambda one, source=source: f"{one.tokens.get(source, 0):.1%}")  # type: ignore[misc]
    if result.prediction_error is not None:
        print(f"error of predicted TTFT, median: {result.prediction_error:.1%}")
    for stage, (middle, most) in result.decision_ms.items():
        print(f"decision, {stage}: p50 {middle} ms, p99 {most} ms")
    print(f"simulated engines behind their clock: p99 {result.lag_ms_p99} ms of this machine", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--router", nargs="+", choices=["kvtier", "dynamo"], default=["kvtier"])
    parser.add_argument("--pool", type=int, default=40, help="conversations a worker")
    parser.add_argument("--slow", type=float, default=1.0, help="how many seconds a second of the hardware's lasts")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the hardware's, measured")
    parser.add_argument("--ramp", type=float, default=10.0, help="and before that")
    parser.add_argument("--hbm-tokens", type=int, default=Hardware.hbm_tokens, help="a worker")
    parser.add_argument("--dram-tokens", type=int, default=Hardware.dram_tokens, help="a worker")
    parser.add_argument("--target-gb", type=float, default=5.0, help="GB/s of a target, which two workers share")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    for name in ("workers", "clients", "pool", "slow", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name}: {getattr(options, name)}: expected more than 0")
    if options.clients > options.pool * options.workers:
        parser.error(f"argument --clients: {options.clients}: expected at most the pool's conversations")
    results = []
    for router in options.router:
        results.append(asyncio.run(play(options, router)))
        show(results[-1])
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.routing.cluster", main)
