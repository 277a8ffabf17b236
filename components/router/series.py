"""The router's Prometheus series: of decisions, and of messages of the bus.

Counters are plain numbers, which a collector exports on each scrape.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from components.router.history import History
from components.router.records import label, parts, tiers
from components.router.speeds import LiveSpeeds
from kvstore.bus.residency import CONFLICTING, Mirror

# Buckets of actual over predicted TTFT.
_RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)
_STAGE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


def _zeros(*names: str) -> Counter[str]:
    """Counts that start at 0: Prometheus sees no increase in a series that starts at 1."""
    return Counter(dict.fromkeys(names, 0))


@dataclass
class Totals:
    """The counters, since the router's start."""

    decisions: Counter[str] = field(default_factory=Counter)  # by worker
    tokens: Counter[str] = field(default_factory=Counter)  # of prompts, by source
    blocks: dict[str, Counter[str]] = field(default_factory=dict)  # of prompts, by worker and tier
    outcomes: Counter[str] = field(default_factory=lambda: _zeros("finished", "failed", "cancelled"))
    fallbacks: Counter[str] = field(default_factory=lambda: _zeros("overlap_query", "worker_report"))  # by input
    missed: Counter[str] = field(default_factory=lambda: _zeros("first_token", "next_token", "request"))  # deadlines
    retries: Counter[str] = field(default_factory=Counter)  # by failed worker
    output_tokens: int = 0
    decision_seconds: float = 0.0  # total time of all decisions
    open: int = 0  # prompts that have not ended

    def add_prefill(self, other: "Totals") -> None:
        """Add what came before, on prefill workers, of the prompts that are counted here or will be."""
        self.tokens.update(other.tokens)
        self.fallbacks.update(other.fallbacks)
        for outcome in ("failed", "cancelled"):
            self.outcomes[outcome] += other.outcomes[outcome]
        self.decision_seconds += other.decision_seconds
        self.open += other.open


class DecisionCollector(Collector):
    """Exports the counters, and the candidates of the newest decision: workers that are gone leave no series of it."""

    def __init__(self, totals: Totals, history: History, block_tokens: int):
        self._totals = totals
        self._history = history
        self._block_tokens = block_tokens
        self._created = time.time()

    def collect(self) -> Iterator[Metric]:
        totals = self._totals
        yield self._counter("decisions", "Prompts sent to this worker", "worker", totals.decisions)
        blocks = CounterMetricFamily(
            "kvtier_router_chosen_blocks",
            "Predicted blocks of the prompts sent to this worker, by tier: hbm, dram, store, missing; with "
            "role=decode also handover (from a prefill worker)",
            labels=["worker", "tier"],
        )
        for worker, counts in totals.blocks.items():
            for tier, count in counts.items():
                blocks.add_metric([worker, tier], count, self._created)
        yield blocks
        yield from self._of_candidates()
        yield self._counter(
            "prompt_tokens",
            "Predicted prompt tokens by source on the chosen worker: hbm, dram, store, computed. A prompt "
            "that a prefill worker hands over counts once, with role=prefill",
            "source",
            totals.tokens,
        )
        yield self._counter(
            "outcomes",
            "Requests by outcome: finished, failed, cancelled (the client disconnected)",
            "outcome",
            totals.outcomes,
        )
        yield self._counter(
            "degraded_decisions",
            "Decisions with degraded inputs: overlap_query (Dynamo's KvRouter failed), worker_report (a candidate "
            "without a tier, or NATS is down)",
            "missing",
            totals.fallbacks,
        )
        yield self._counter(
            "missed_deadlines",
            "Missed deadlines: first_token (the worker becomes suspect), next_token, request (no worker produced a "
            "first token). In the last two cases the client gets an error",
            "deadline",
            totals.missed,
        )
        yield self._counter(
            "retries", "Prompts that went to another worker because this one failed", "worker", totals.retries
        )
        output = CounterMetricFamily("kvtier_router_output_tokens", "Tokens of finished answers")
        output.add_metric([], totals.output_tokens, self._created)
        yield output

    def _counter(self, name: str, text: str, by: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(f"kvtier_router_{name}", text, labels=[by])
        for value, count in counts.items():
            family.add_metric([value], count, self._created)
        return family

    def _of_candidates(self) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "kvtier_router_candidate_blocks",
            "Predicted blocks of the last prompt on this worker, by tier: hbm, dram, store, missing",
            labels=["worker", "tier"],
        )
        seconds = GaugeMetricFamily(
            "kvtier_router_candidate_seconds",
            "Price of the last prompt on this worker, and its parts",
            labels=["worker", "part"],
        )
        for choice in self._history.latest:
            for tier, count in tiers(choice, self._block_tokens).items():
                blocks.add_metric([label(choice), tier], count)
            for part, value in parts(choice).items():
                seconds.add_metric([label(choice), part], value)
        yield blocks
        yield seconds


class Distributions:
    """Histograms of decisions, and the gauge that its owner sets."""

    def __init__(self, registry: CollectorRegistry):
        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"kvtier_router_{name}", text, labels, buckets=buckets, registry=registry)

        self.suspects = Gauge(
            "kvtier_router_suspect_workers",
            "Workers with an open circuit breaker, after a failure or a missed deadline: they get prompts only if all "
            "workers are suspect",
            registry=registry,
        )
        self.ttft_ratio = histogram(
            "ttft_actual_to_predicted_ratio",
            "Actual TTFT divided by predicted TTFT: 1 is a correct prediction",
            _RATIOS,
        )
        self.regret = histogram(
            "regret_seconds",
            "Routing regret: actual TTFT minus the lowest TTFT predicted for another worker, at least 0",
            (0, *_SECONDS),
        )
        self.stages = histogram(
            "decision_seconds",
            "Time of a decision by stage: hash the prompt, ask Dynamo's KvRouter, locate chunks in the store, price",
            _STAGE_SECONDS,
            ["stage"],
        )
        self.predicted_ttft = histogram("predicted_ttft_seconds", "Predicted TTFT", _SECONDS)
        self.tpot = histogram("tpot_seconds", "Time per output token after the first", _TOKEN_SECONDS)
        self.ttft = histogram(
            "ttft_seconds",
            "Actual TTFT, from the decision to the first token. With role=decode, prefill is part of it",
            _SECONDS,
        )


class ByRole(Collector):
    """Series about prefill and about decode workers, with the label `role`."""

    def __init__(self, **registries: CollectorRegistry):
        self._registries = registries

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for role, registry in self._registries.items():
            for family in registry.collect():
                both = Metric(family.name, family.documentation, family.type, family.unit)
                both = families.setdefault(family.name, both)
                both.samples += [one._replace(labels={**one.labels, "role": role}) for one in family.samples]
        yield from families.values()


class BusCollector(Collector):
    """Series about messages of the bus, built on each scrape."""

    def __init__(self, speeds: Sequence[LiveSpeeds], mirror: Mirror, undecoded: Mapping[str, int]):
        """`speeds` of workers apart, which count what they do not believe together."""
        self._speeds = speeds
        self._mirror = mirror
        self._undecoded = undecoded

    def collect(self) -> Iterator[Metric]:
        ignored = CounterMetricFamily(
            "kvtier_router_rejected_heartbeats", "Heartbeats rejected by validation, by reason", labels=["reason"]
        )
        for reason, count in self._speeds[0].ignored.items():
            ignored.add_metric([reason], count)
        yield ignored
        undecoded = CounterMetricFamily(
            "kvtier_router_decode_errors", "NATS messages that failed to decode, by expected type", labels=["kind"]
        )
        for kind, count in self._undecoded.items():
            undecoded.add_metric([kind], count)
        yield undecoded
        fetched = CounterMetricFamily(
            "kvtier_router_fetched_chunks",
            "Chunks that workers requested from targets, by outcome, from their heartbeats. A miss is a false hit",
            labels=["worker", "outcome"],
        )
        for worker, outcomes in itertools.chain.from_iterable(one.fetched_chunks.items() for one in self._speeds):
            for outcome, count in outcomes.items():
                fetched.add_metric([format(worker, "x"), outcome], count)
        yield fetched
        disbelieved = CounterMetricFamily(
            "kvtier_router_rejected_announcements", "Announcements rejected by validation, by reason", labels=["reason"]
        )
        # Created at 0: its alert needs the increase since the last scrape.
        for reason, count in {CONFLICTING: 0, **self._mirror.ignored}.items():
            disbelieved.add_metric([reason], count)
        yield disbelieved
        yield CounterMetricFamily(
            "kvtier_router_mirror_resyncs", "Snapshots of targets applied to the mirror", value=self._mirror.resyncs
        )
        yield CounterMetricFamily(
            "kvtier_router_mirror_replays",
            "Gaps in a target's announcements filled without a snapshot",
            value=self._mirror.replays,
        )
        now = time.monotonic()
        ages = GaugeMetricFamily(
            "kvtier_router_target_heartbeat_age_seconds",
            "Time since a target's last accepted announcement. Over 10 s: its chunks are ignored. Over 60 s: dropped",
            labels=["target"],
        )
        for target, age in self._mirror.ages(now).items():
            ages.add_metric([target], age)
        yield ages
        chunks = GaugeMetricFamily(
            "kvtier_router_mirror_chunks", "Chunks in the mirror, for each live target", labels=["target"]
        )
        for target, known in self._mirror.counts(now).items():
            chunks.add_metric([target], known)
        yield chunks
