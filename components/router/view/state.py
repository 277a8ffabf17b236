"""The page's data as plain structs. GET /state returns a State as JSON; an event of GET /events is an Update.

Rates are per second, `tokens` are by source (hbm, dram, store, computed), None is unknown.
"""

import math
from collections.abc import Sequence

import msgspec

SOURCES = ("hbm", "dram", "store", "computed")


class Percentiles(msgspec.Struct):
    count: int
    p50: float
    p95: float
    p99: float


class Latency(msgspec.Struct):
    """Latency of prompts with a fetch from the store, and of the others."""

    store: Percentiles | None
    other: Percentiles | None


class Spread(msgspec.Struct):
    """Distribution of actual over predicted TTFT."""

    count: int
    p10: float
    p50: float
    p90: float


class Saving(msgspec.Struct):
    """Predicted savings of loads from the store, at the time of the decision. Without the store, the same workers would
    have recomputed these chunks, behind the same queues. Of one prompt, or means over several."""

    ttft_seconds: float
    without_store_ttft_seconds: float
    prefill_seconds: float
    without_store_prefill_seconds: float


class Sample(msgspec.Struct):
    """An answered prompt in the sample."""

    time: float
    worker: str
    tokens: dict[str, int]
    predicted_ttft_seconds: float
    ttft_seconds: float
    tpot_seconds: float | None
    saving: Saving | None = None


class Minute(msgspec.Struct):
    """The minute before the last prompt; `time` is when a prompt was last decided or answered."""

    time: float
    tokens: dict[str, int]
    decisions_per_second: float  # mean of the minute
    decision_seconds: float | None  # mean of the last second with a decision
    ttft: Latency
    tpot: Latency
    prediction: Spread | None
    saving: Saving | None


class Point(msgspec.Struct):
    """One second; latencies are of the window that ends with it."""

    time: float
    decisions: float
    tokens: dict[str, float]
    ttft: Latency
    tpot: Latency


class Summary(msgspec.Struct):
    """A decision without its candidates: a row of the table."""

    id: str
    time: float
    prompt_tokens: int
    worker: str
    tokens: dict[str, int]
    fetch_chunks: int
    price_seconds: float
    predicted_ttft_seconds: float
    ttft_seconds: float | None
    tpot_seconds: float | None
    output_tokens: int
    outcome: str
    prefill_worker: str = ""  # which handed the KV over; the tokens are then as it found them


class WorkerLane(msgspec.Struct):
    """A worker, or one data-parallel rank of it."""

    worker: str
    decisions: int  # since the router's start
    tokens: dict[str, int]  # of these decisions, in whole blocks
    open: int  # running prompts
    queued_tokens: int | None  # to prefill, at the time of the last decision
    memory_used: float | None  # share of the KV memory, at the same time
    prefill_tokens_per_second: float  # for a prompt of 1,000 tokens, as in the router's prices
    role: str = ""  # prefill or decode, in a disaggregated graph
    # From its tier's last report, if there is one.
    heard_seconds: float | None = None  # age of the report
    queue: int = 0  # requests that wait in the engine
    dram_bytes_per_second: float = 0.0  # DRAM -> HBM, when busy
    store_bytes_per_second: float = 0.0  # store -> DRAM, when busy
    bytes_in_flight: int = 0
    fetched_chunks: dict[str, int] = {}  # since the worker's start, by outcome
    hbm_bytes: int = 0  # cached KV, and its capacity; 0: unknown
    hbm_capacity_bytes: int = 0
    dram_bytes: int = 0
    dram_capacity_bytes: int = 0


class TargetLane(msgspec.Struct):
    target: str
    heard_seconds: float  # since its last announcement
    chunks: int  # in the mirror
    # From its last report, if there is one.
    capacity_bytes: int = 0
    payload_bytes: int = 0
    device_bytes_per_second: float = 0.0  # read throughput while busy; 0: not busy lately
    sent_bytes_per_second: float = 0.0
    received_bytes_per_second: float = 0.0
    waiting_read_bytes: int = 0
    waiting_write_bytes: int = 0
    connections: int = 0
    evicted_age_seconds: float = 0.0  # 0: no eviction yet
    corrupt_chunks: int = 0
    failed_writes: int = 0


class Alarm(msgspec.Struct):
    id: str
    level: str  # "bad": something failed; "warn": something is slow or unknown
    text: str  # the problem, and what to check


class State(msgspec.Struct):
    """All data except single prompts."""

    time: float  # seconds since 1970
    started: float
    model: str
    block_tokens: int
    # Since the start, as in Prometheus.
    decisions: int
    tokens: dict[str, int]
    outcomes: dict[str, int]
    fallbacks: dict[str, int]
    output_tokens: int
    open: int
    # Of the last second.
    decisions_per_second: float
    tokens_per_second: dict[str, float]
    decision_seconds: float | None  # mean time of a decision, without sending
    # Of the last window_seconds, from at most samples_per_second prompts answered in each second.
    window_seconds: int
    samples_per_second: int
    ttft: Latency
    tpot: Latency
    prediction: Spread | None
    fetched_chunks: dict[str, int]  # by workers, by outcome
    recent_outcomes: dict[str, int]
    recent_faults: dict[str, int]  # of targets, in fault_window_seconds
    fault_window_seconds: int
    connected: bool  # with NATS
    workers: list[WorkerLane]
    targets: list[TargetLane]
    alarms: list[Alarm]
    minute: Minute | None = None  # None before the first prompt


class Update(msgspec.Struct):
    """New data since the previous event; the first event has everything that is kept."""

    fresh: bool
    state: State
    points: list[Point]
    samples: list[Sample]
    decisions: list[Summary]  # new ones, and updates of those shown before


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank of sorted values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.95), quantile(ordered, 0.99))


def spread(samples: Sequence[Sample]) -> Spread | None:
    ratios = sorted(one.ttft_seconds / one.predicted_ttft_seconds for one in samples if one.predicted_ttft_seconds > 0)
    if not ratios:
        return None
    return Spread(len(ratios), quantile(ratios, 0.1), quantile(ratios, 0.5), quantile(ratios, 0.9))


def saving(samples: Sequence[Sample]) -> Saving | None:
    each = [msgspec.structs.astuple(one.saving) for one in samples if one.saving is not None]
    return Saving(*(sum(column) / len(each) for column in zip(*each, strict=True))) if each else None


def ttft(samples: Sequence[Sample]) -> Latency:
    return _by_store([(one, one.ttft_seconds) for one in samples])


def tpot(samples: Sequence[Sample]) -> Latency:
    return _by_store([(one, one.tpot_seconds) for one in samples if one.tpot_seconds is not None])


def _by_store(measured: Sequence[tuple[Sample, float]]) -> Latency:
    return Latency(
        percentiles([value for one, value in measured if one.tokens["store"] > 0]),
        percentiles([value for one, value in measured if one.tokens["store"] == 0]),
    )
