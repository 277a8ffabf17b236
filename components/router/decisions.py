"""Decisions for the operator: a log line each, Prometheus series, and the last thousand in full.

Worker ids are in hexadecimal, as in Dynamo's own metrics.
"""

import collections
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from components.pricing.cost import Choice, Choices
from components.router.speeds import LiveSpeeds
from kvstore.bus.residency import CONFLICTING, Mirror

logger = logging.getLogger(__name__)

KEPT = 1000  # 30 MB with 64 workers
# Candidates in a log line, the cheapest first: in a large cluster, to log all takes longer than the decision.
LOGGED = 8
# Limit of running prompts that are tracked. Beyond it the oldest are still served, but their outcome is not shown.
_OPEN_MAX = 20_000
# Limit of answered prompts between two ticks of the page.
_ANSWERED_MAX = 4096
# Buckets of actual over predicted TTFT.
_RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4)
_STAGE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Considered(msgspec.Struct):
    """A candidate: the tokens that it had cached, and the cost. `price_seconds` is the sum of the terms of `price`."""

    worker: str
    tokens: dict[str, int]  # by source: hbm, dram, store, computed
    seconds: dict[str, float]  # wait, fetch, copy, prefill, ttft; wait and fetch overlap in the ttft
    price: dict[str, float]
    price_seconds: float
    queued_tokens: int = 0  # tokens to prefill in the queue ahead of it
    memory_used: float = 0.0  # share of the KV memory


class Prefilled(msgspec.Struct):
    """A prompt's way through the prefill worker, for the decision on its decode worker."""

    id: str  # of that decision
    worker: str
    tokens: dict[str, int]  # by source
    fetch_chunks: int
    predicted_ttft_seconds: float
    ttft_seconds: float
    prefill_seconds: float  # predicted
    without_store_ttft_seconds: float
    without_store_prefill_seconds: float


class Decision(msgspec.Struct):
    """A prompt: the chosen worker, the reasons, and the outcome. With a prefill worker before it, times to the first
    token begin with the decision on that one."""

    id: str
    time: float  # seconds since 1970
    prompt_tokens: int
    chosen: str
    candidates: list[Considered]
    fetch_chunks: int
    targets: list[tuple[str, int]]  # of the fetched chunks: runs of target and number of chunks
    predicted_ttft_seconds: float
    ttft_seconds: float | None = None
    outcome: str = "open"  # finished, failed or cancelled
    output_tokens: int = 0
    tpot_seconds: float | None = None  # time per output token after the first
    other_ttft_seconds: float | None = None  # lowest prediction for another worker
    # Predictions for the chosen worker if it recomputed the chunks from the store.
    without_store_ttft_seconds: float = 0.0
    without_store_prefill_seconds: float = 0.0
    prefilled: Prefilled | None = None  # if the chosen worker took the KV from a prefill worker

    def on_chosen(self) -> Considered:
        """The chosen worker's candidate."""
        return next(one for one in self.candidates if one.worker == self.chosen)

    def to_decode(self) -> Prefilled:
        """Of an answered prompt of a prefill worker, what its decode worker's decision keeps."""
        chosen = self.on_chosen()
        return Prefilled(
            self.id,
            self.chosen,
            chosen.tokens,
            self.fetch_chunks,
            self.predicted_ttft_seconds,
            self.ttft_seconds or 0.0,
            chosen.seconds["prefill"],
            self.without_store_ttft_seconds,
            self.without_store_prefill_seconds,
        )


class Totals(msgspec.Struct):
    """The counters, since the router's start."""

    decisions: dict[str, int]  # by worker
    tokens: dict[str, int]  # of prompts, by source
    blocks: dict[str, dict[str, int]]  # of prompts, by worker and tier
    outcomes: dict[str, int]
    fallbacks: dict[str, int]  # by what was missing
    retries: dict[str, int]  # by failed worker
    output_tokens: int
    decision_seconds: float  # total time of all decisions
    open: int  # prompts that have not ended

    def add_prefill(self, other: "Totals") -> None:
        """What came before, on prefill workers, of the prompts that are counted here or will be."""
        for name in ("tokens", "fallbacks"):
            mine, its = getattr(self, name), getattr(other, name)
            setattr(self, name, {key: mine.get(key, 0) + its.get(key, 0) for key in {*mine, *its}})
        for outcome in ("failed", "cancelled"):
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + other.outcomes.get(outcome, 0)
        self.decision_seconds += other.decision_seconds
        self.open += other.open


class Decisions:
    """Counts and shows decisions. For one event loop."""

    def __init__(self, block_tokens: int):
        self.registry = CollectorRegistry()
        self.block_tokens = block_tokens
        self.count = 0
        self.answered_lately: deque[Decision] = deque(maxlen=_ANSWERED_MAX)
        self._chosen = Counter(
            "kvtier_router_decisions", "Prompts sent to this worker", ["worker"], registry=self.registry
        )
        self._chosen_blocks = Counter(
            "kvtier_router_chosen_blocks",
            "Predicted blocks of the prompts sent to this worker, by tier: hbm, dram, store, missing; with "
            "role=decode also handover (from a prefill worker)",
            ["worker", "tier"],
            registry=self.registry,
        )
        self._last: OrderedDict[str, Decision] = OrderedDict()
        # For decisions that were not viewed yet: the input from which candidates and targets are built on the first
        # view.
        self._unseen: dict[str, tuple[Choice, Choices]] = {}
        self._latest: Sequence[Choice] = ()
        self.registry.register(_CandidatesCollector(self))
        self._open: OrderedDict[str, Decision] = OrderedDict()
        self._tokens = Counter(
            "kvtier_router_prompt_tokens",
            "Predicted prompt tokens by source on the chosen worker: hbm, dram, store, computed. A prompt "
            "that a prefill worker hands over counts once, with role=prefill",
            ["source"],
            registry=self.registry,
        )
        self._outcomes = Counter(
            "kvtier_router_outcomes",
            "Requests by outcome: finished, failed, cancelled (the client disconnected)",
            ["outcome"],
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "kvtier_router_degraded_decisions",
            "Decisions with degraded inputs: overlap_query (Dynamo's KvRouter failed), worker_report (a candidate "
            "without a tier, or NATS is down)",
            ["missing"],
            registry=self.registry,
        )
        # Created at 0: Prometheus sees no increase in a series that starts at 1.
        for outcome in ("finished", "failed", "cancelled"):
            self._outcomes.labels(outcome)
        for missing in ("overlap_query", "worker_report"):
            self._fallbacks.labels(missing)
        self._missed = Counter(
            "kvtier_router_missed_deadlines",
            "Missed deadlines: first_token (the worker becomes suspect), next_token, request (no worker produced a "
            "first token). In the last two cases the client gets an error",
            ["deadline"],
            registry=self.registry,
        )
        for deadline in ("first_token", "next_token", "request"):
            self._missed.labels(deadline)
        self.suspects = Gauge(
            "kvtier_router_suspect_workers",
            "Workers with an open circuit breaker, after a failure or a missed deadline: they get prompts only if all "
            "workers are suspect",
            registry=self.registry,
        )
        self._error = Histogram(
            "kvtier_router_ttft_actual_to_predicted_ratio",
            "Actual TTFT divided by predicted TTFT: 1 is a correct prediction",
            buckets=_RATIOS,
            registry=self.registry,
        )
        self._regret = Histogram(
            "kvtier_router_regret_seconds",
            "Routing regret: actual TTFT minus the lowest TTFT predicted for another worker, at least 0",
            buckets=(0, *_SECONDS),
            registry=self.registry,
        )
        self._stages = Histogram(
            "kvtier_router_decision_seconds",
            "Time of a decision by stage: hash the prompt, ask Dynamo's KvRouter, locate chunks in the store, price",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self._retries = Counter(
            "kvtier_router_retries",
            "Prompts that went to another worker because this one failed",
            ["worker"],
            registry=self.registry,
        )
        self._predicted = Histogram(
            "kvtier_router_predicted_ttft_seconds",
            "Predicted TTFT",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "kvtier_router_tpot_seconds",
            "Time per output token after the first",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self._output = Counter("kvtier_router_output_tokens", "Tokens of finished answers", registry=self.registry)
        self._actual = Histogram(
            "kvtier_router_ttft_seconds",
            "Actual TTFT, from the decision to the first token. With role=decode, prefill is part of it",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def decided(
        self,
        decision_id: str,
        prompt_tokens: int,
        chosen: Choice,
        choices: Choices,
        prefilled: Prefilled | None = None,
    ) -> Decision:
        """Count a decision, log it, and keep it with all candidates."""
        worker = label(chosen)
        self._chosen.labels(worker).inc()
        for tier, blocks in self._tiers(chosen).items():
            self._chosen_blocks.labels(worker, tier).inc(blocks)
        if prefilled is None:
            for source, tokens in sources(chosen).items():
                self._tokens.labels(source).inc(tokens)
        decision = self._keep(decision_id, prompt_tokens, chosen, choices, prefilled)
        self._predicted.observe(decision.predicted_ttft_seconds)
        if logger.isEnabledFor(logging.INFO):
            cheapest = [choices[number] for number in choices.price_seconds.argsort()[:LOGGED].tolist()]
            others = [choice for choice in cheapest if choice.candidate is not chosen.candidate]
            lines = [self._line(choice) for choice in [chosen, *others][:LOGGED]]
            if len(choices) > LOGGED:
                lines.append(f"{len(choices) - LOGGED} more expensive")
            logger.info(
                "decision %s: %d tokens -> worker %s | %s", decision_id, prompt_tokens, worker, " | ".join(lines)
            )
        return decision

    def took(self, stages: Mapping[str, float]) -> None:
        """Observe the duration of each stage in seconds."""
        for stage, seconds in stages.items():
            self._stages.labels(stage).observe(seconds)

    def fell_back(self, missing: str) -> None:
        self._fallbacks.labels(missing).inc()

    def first_token(self, decision: Decision, seconds: float) -> None:
        """It came so many seconds after the decision on the worker that answers."""
        if decision.other_ttft_seconds is not None:
            self._regret.observe(max(0.0, seconds - decision.other_ttft_seconds))
        decision.ttft_seconds = seconds + (decision.prefilled.ttft_seconds if decision.prefilled else 0.0)
        self._actual.observe(decision.ttft_seconds)
        if decision.predicted_ttft_seconds > 0:
            self._error.observe(decision.ttft_seconds / decision.predicted_ttft_seconds)

    def answered(self, decision: Decision, first_tokens: int, tokens: int, seconds: float) -> None:
        """Note a finished answer: `tokens` in `seconds` after the first output, which had `first_tokens`."""
        self._output.inc(first_tokens + tokens)
        if tokens:
            self._tpot.observe(seconds / tokens)
        decision.output_tokens = first_tokens + tokens
        decision.tpot_seconds = seconds / tokens if tokens else None

    def ended(self, decision_id: str, outcome: str) -> Decision | None:
        """The decision, if it was made and is known still."""
        self._outcomes.labels(outcome).inc()
        decision = self._open.pop(decision_id, None)
        if decision is not None:
            decision.outcome = outcome
            if decision.ttft_seconds is not None:
                self.answered_lately.append(decision)
        return decision

    def last(self, limit: int = KEPT, worker: str = "") -> list[Decision]:
        """The latest first; with `worker` only those of this worker."""
        chosen = (one for one in reversed(self._last.values()) if worker in ("", one.chosen))
        return [self._seen(decision) for decision in itertools.islice(chosen, limit)]

    def newest(self, limit: int) -> list[Decision]:
        """The latest first, each with only the chosen candidate."""
        return list(itertools.islice(reversed(self._last.values()), limit))

    def totals(self) -> Totals:
        """The same numbers as in Prometheus."""
        blocks: dict[str, dict[str, int]] = {}
        for labels, value in _values(self._chosen_blocks):
            blocks.setdefault(labels["worker"], {})[labels["tier"]] = value
        return Totals(
            decisions={labels["worker"]: value for labels, value in _values(self._chosen)},
            tokens={labels["source"]: value for labels, value in _values(self._tokens)},
            blocks=blocks,
            outcomes={labels["outcome"]: value for labels, value in _values(self._outcomes)},
            fallbacks={labels["missing"]: value for labels, value in _values(self._fallbacks)},
            retries={labels["worker"]: value for labels, value in _values(self._retries)},
            output_tokens=sum(value for _, value in _values(self._output)),
            decision_seconds=sum(
                sample.value
                for family in self._stages.collect()
                for sample in family.samples
                if sample.name.endswith("_sum")
            ),
            open=len(self._open),
        )

    def open_by_worker(self) -> Mapping[str, int]:
        return collections.Counter(decision.chosen for decision in self._open.values())

    def find(self, decision_id: str) -> Decision | None:
        decision = self._last.get(decision_id) or self._open.get(decision_id)
        return None if decision is None else self._seen(decision)

    def candidate_series(self) -> Iterator[Metric]:
        """Series of the latest decision, for Prometheus."""
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
        for choice in self._latest:
            for tier, count in self._tiers(choice).items():
                blocks.add_metric([label(choice), tier], count)
            for part, value in _parts(choice).items():
                seconds.add_metric([label(choice), part], value)
        yield blocks
        yield seconds

    def _keep(
        self, decision_id: str, prompt_tokens: int, chosen: Choice, choices: Choices, prefilled: Prefilled | None
    ) -> Decision:
        decision = _decision(decision_id, prompt_tokens, chosen, [chosen])
        decision.other_ttft_seconds = choices.least_ttft_but(chosen)
        if prefilled is not None:
            decision.prefilled = prefilled
            decision.predicted_ttft_seconds += prefilled.predicted_ttft_seconds
            decision.without_store_ttft_seconds += prefilled.without_store_ttft_seconds
        self._last[decision_id] = self._open[decision_id] = decision
        self._unseen[decision_id] = chosen, choices
        self._latest = choices
        self.count += 1
        if len(self._last) > KEPT:
            forgotten, _ = self._last.popitem(last=False)
            self._unseen.pop(forgotten, None)
        if len(self._open) > _OPEN_MAX:
            self._open.popitem(last=False)
        return decision

    def _seen(self, decision: Decision) -> Decision:
        """The decision with all candidates and targets. Built on the first view: for every prompt, it would take longer
        than the decision itself."""
        if (priced := self._unseen.pop(decision.id, None)) is not None:
            full = explained(decision.id, decision.prompt_tokens, *priced)
            decision.candidates, decision.targets = full.candidates, full.targets
        return decision

    def missed(self, deadline: str) -> None:
        self._missed.labels(deadline).inc()

    def retried(self, failed: Choice) -> None:
        self._retries.labels(label(failed)).inc()

    def _tiers(self, choice: Choice) -> dict[str, int]:
        """Blocks by tier; a partial block counts as missing, or as handed over."""
        hbm = choice.hbm_tokens // self.block_tokens
        local = (choice.hbm_tokens + choice.dram_tokens) // self.block_tokens
        loaded = (choice.hbm_tokens + choice.dram_tokens + choice.store_tokens) // self.block_tokens
        tokens = choice.hbm_tokens + choice.dram_tokens + choice.store_tokens + choice.missing_tokens
        total = -(-tokens // self.block_tokens)
        if choice.candidate.is_handed_over:
            return {"hbm": hbm, "handover": total - hbm}
        return {"hbm": hbm, "dram": local - hbm, "store": loaded - local, "missing": total - loaded}

    def _line(self, choice: Choice) -> str:
        tiers = " ".join(f"{tier} {blocks}" for tier, blocks in self._tiers(choice).items())
        parts = " ".join(f"{part} {seconds:.4f}" for part, seconds in _parts(choice).items())
        return f"{label(choice)}: blocks {tiers}; seconds {parts}"


class _CandidatesCollector(Collector):
    """Builds the series on each scrape, so that workers that are gone leave no series behind."""

    def __init__(self, decisions: Decisions):
        self._decisions = decisions

    def collect(self) -> Iterator[Metric]:
        return self._decisions.candidate_series()


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


def explained(decision_id: str, prompt_tokens: int, chosen: Choice, choices: Choices) -> Decision:
    """A decision with all candidates and targets."""
    decision = _decision(decision_id, prompt_tokens, chosen, choices)
    fetched = chosen.targets[chosen.first_chunk :]
    decision.targets = [(target or "", sum(1 for _ in same)) for target, same in groupby(fetched)]
    return decision


def _decision(decision_id: str, prompt_tokens: int, chosen: Choice, shown: Iterable[Choice]) -> Decision:
    ttft, prefill = chosen.without_store
    return Decision(
        decision_id,
        time.time(),
        prompt_tokens,
        label(chosen),
        [_considered(choice) for choice in shown],
        chosen.fetch_chunks,
        [],
        chosen.ttft_seconds,
        without_store_ttft_seconds=ttft,
        without_store_prefill_seconds=prefill,
    )


def label(choice: Choice) -> str:
    rank = choice.candidate.dp_rank
    return format(choice.candidate.worker, "x") + (f".{rank}" if rank else "")


def _values(counter: Counter) -> Iterator[tuple[dict[str, str], int]]:
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                yield sample.labels, int(sample.value)


def _parts(choice: Choice) -> dict[str, float]:
    return {
        "wait": choice.wait_seconds,
        "fetch": choice.fetch_seconds,
        "copy": choice.copy_seconds,
        "prefill": choice.prefill_seconds,
        "ttft": choice.ttft_seconds,
        "price": choice.price_seconds,
    }


def sources(choice: Choice) -> dict[str, int]:
    """Tokens of the prompt by source."""
    if choice.candidate.is_handed_over:
        return {"hbm": choice.hbm_tokens, "handover": choice.prompt_tokens - choice.hbm_tokens}
    return {
        "hbm": choice.hbm_tokens,
        "dram": choice.dram_tokens,
        "store": choice.store_tokens,
        "computed": choice.missing_tokens,
    }


def _considered(choice: Choice) -> Considered:
    start = max(choice.wait_seconds, choice.fetch_seconds)
    price = {
        "wait": choice.wait_seconds,
        "fetch": start - choice.wait_seconds,  # the part that does not overlap with the wait
        "copy": choice.copy_seconds,
        "prefill": choice.prefill_seconds,
        "delay": choice.delay_seconds,
        "pressure": choice.pressure_seconds,
    }
    seconds = {name: value for name, value in _parts(choice).items() if name != "price"}
    return Considered(
        label(choice),
        sources(choice),
        seconds,
        price,
        choice.price_seconds,
        choice.candidate.queued_prefill_tokens,
        choice.candidate.memory_used,
    )
