"""Current speeds of workers and targets: validated reports, with the command line's values as the prior.

Plain state with one writer, the router's event loop; no I/O, no clock of its own. A speed is used from its third report
on. It is the median of the last few, so that a single bad sample has no effect. An implausible report is rejected and
counted, because the bus is shared and its messages are not authenticated.
"""

import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from components.pricing.answers import Answers
from components.pricing.cost import Speeds
from components.pricing.prefill import Prefill
from kvstore.bus.messages import TargetReport, WorkerReport
from kvstore.net.wire import Outcome
from kvstore.text import NAME_CHARACTERS_MAX, is_plain

SAMPLES_MIN = 3
_SAMPLES = 7
# TTL of a rate without a new measurement, after the 10 s for which a worker reports it. Otherwise a store that was slow
# once, as in the first fetch of all, would never be tried again: prompts that are recomputed measure nothing.
FORGET_MS = 10_000
# A report is plausible within this factor of the command line's value.
_FACTOR_MAX = 1000.0
# Correction factor: observed over predicted prefill. A larger deviation has a cause outside the model.
_PACE_SAMPLES, _PACE_SAMPLES_MIN, _PACE_MAX = 32, 8, 3.0
# A target's report is too old after this time (five heartbeats).
TARGET_SECONDS = 5.0
TARGETS_MAX = 4096
WORKERS_MAX = 16_384
# After this many consecutive reports with an older timestamp, the earlier, newer timestamp counts as the wrong one.
OLDER_MAX = 5
_CHUNK_BYTES_MAX = 1 << 30
_BLOCKS_PER_CHUNK_MAX = 1 << 16
_BYTES_MAX = 1 << 59  # of a target
_OUTCOMES_MAX = 16  # kinds of outcomes of a fetch
_ADAPTERS_MAX = 4096

_OUTCOMES = tuple(outcome.name.lower() for outcome in Outcome if outcome is not Outcome.STORED)
_PREFILL = ("prefill_base_seconds", "prefill_seconds_per_token", "prefill_seconds_per_token_squared")
# A target whose reads all came from memory of late may read some from its devices next.
_DEVICE_SHARE_MIN = 0.01
_TARGET_RATES = ("device_bytes_per_second", "sent_bytes_per_second", "received_bytes_per_second")
_TARGET_SIZES = ("waiting_read_bytes", "waiting_write_bytes", "capacity_bytes", "payload_bytes", "connections")
_RESIDENT = ("hbm_blocks", "dram_chunks")
_RATES = ("dram_bytes_per_second", "store_bytes_per_second")


class _Observed(NamedTuple):
    tokens: int  # computed
    context: int  # tokens before them
    seconds: float


@dataclass
class _Worker:
    last_ms: int = -1
    older: int = 0  # consecutive reports with an older timestamp
    prefill: deque[Prefill] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    rates: dict[str, deque[float]] = field(default_factory=lambda: {name: deque(maxlen=_SAMPLES) for name in _RATES})
    rated_ms: dict[str, int] = field(default_factory=dict)  # when each rate was last reported
    observed: deque[_Observed] = field(default_factory=lambda: deque(maxlen=_PACE_SAMPLES))
    answers: Answers = field(default_factory=Answers)
    fetched_chunks: dict[str, int] = field(default_factory=dict)
    speeds: Speeds | None = None  # derived from these, cached for decisions

    def pace(self, model: Prefill) -> float:
        """By what to multiply this model's seconds. A pace belongs to a model: when a worker reports another one, what
        was observed before is compared with that."""
        if len(self.observed) < _PACE_SAMPLES_MIN:
            return 1.0
        median = statistics.median(one.seconds / model.seconds(one.tokens, one.context) for one in self.observed)
        return min(_PACE_MAX, max(1 / _PACE_MAX, median))


_NO_ANSWERS = Answers()


@dataclass(frozen=True)
class TargetSpeed:
    """Throughput of a target, if its devices are the bottleneck, and bytes before the next read: both count what comes
    from its memory, too."""

    bytes_per_second: float
    waiting_bytes: int


class LiveSpeeds:
    """Speeds by worker and target; `prior` until there are measurements. `ignored` counts rejected reports."""

    def __init__(self, prior: Speeds, ignored: Counter[str] | None = None):
        self._prior = prior
        self._workers: dict[int, _Worker] = {}
        self._targets: dict[str, tuple[TargetReport, float, int]] = {}  # with arrival time, older reports since
        self.ignored = Counter() if ignored is None else ignored

    def heard_worker(self, report: WorkerReport) -> bool:
        """Apply a worker's report; False if it is rejected, as a whole."""
        if not (report.worker.isascii() and report.worker.isdigit() and len(report.worker) <= 20):
            return self._ignore("invalid_worker_id")
        prefill = Prefill(*(getattr(report, name) for name in _PREFILL))
        numbers = [*prefill, report.prefill_share, *(getattr(report, name) for name in _RATES)]
        if not all(math.isfinite(one) and one >= 0 for one in numbers):
            return self._ignore("invalid_rate")
        if report.bytes_in_flight < 0 or report.queue < 0:
            return self._ignore("invalid_size")
        if any(not 0 <= getattr(report, name) <= getattr(report, f"{name}_max") <= _BYTES_MAX for name in _RESIDENT):
            return self._ignore("invalid_size")
        if not (0 < report.blocks_per_chunk <= _BLOCKS_PER_CHUNK_MAX and 0 < report.chunk_bytes <= _CHUNK_BYTES_MAX):
            return self._ignore("invalid_size")
        if len(report.adapters) > _ADAPTERS_MAX:
            return self._ignore("too_many_adapters")
        if len(report.fetched_chunks) > _OUTCOMES_MAX or any(count < 0 for count in report.fetched_chunks.values()):
            return self._ignore("invalid_count")
        # Compare the time for 1,000 tokens: single coefficients of equal models may differ.
        if any(prefill) and not self._plausible(_thousand(prefill), _thousand(self._prior.prefill)):
            return self._ignore("implausible_prefill")
        rates = {name: getattr(report, name) for name in _RATES}
        if any(rate and not self._plausible(rate, getattr(self._prior, name)) for name, rate in rates.items()):
            return self._ignore("implausible_rate")
        if int(report.worker) not in self._workers and len(self._workers) >= WORKERS_MAX:
            return self._ignore("too_many_workers")
        known = self._workers.setdefault(int(report.worker), _Worker())
        if report.ts_ms < known.last_ms and known.older < OLDER_MAX:
            known.older += 1
            return self._ignore("stale_timestamp")
        known.last_ms, known.older = report.ts_ms, 0
        known.fetched_chunks = {name: report.fetched_chunks.get(name, 0) for name in _OUTCOMES}
        if prefill.known:
            known.prefill.append(prefill)
        for name, rate in rates.items():
            if rate > 0:
                known.rates[name].append(rate)
                known.rated_ms[name] = report.ts_ms
            elif report.ts_ms - known.rated_ms.get(name, 0) > FORGET_MS:
                known.rates[name].clear()
        known.speeds = self._derived(known)
        return True

    def heard_target(self, report: TargetReport, now: float) -> bool:
        if not is_plain(report.target, NAME_CHARACTERS_MAX):
            return self._ignore("invalid_name")
        if not all(0 <= getattr(report, name) < math.inf for name in _TARGET_RATES):
            return self._ignore("invalid_rate")
        rate = report.device_bytes_per_second
        if rate and not self._plausible(rate, self._prior.store_bytes_per_second):
            return self._ignore("implausible_rate")
        if not all(0 <= getattr(report, name) <= _BYTES_MAX for name in _TARGET_SIZES):
            return self._ignore("invalid_size")
        if not 0 <= report.evicted_age_seconds < math.inf:
            return self._ignore("invalid_age")
        if not 0 <= report.memory_share <= 1:
            return self._ignore("invalid_share")
        last, _, older = self._targets.get(report.target, (None, 0.0, 0))
        if last is None and len(self._targets) >= TARGETS_MAX:
            return self._ignore("too_many_targets")
        if last is not None and report.epoch == last.epoch and report.ts_ms < last.ts_ms and older < OLDER_MAX:
            self._targets[report.target] = last, self._targets[report.target][1], older + 1
            return self._ignore("stale_timestamp")
        self._targets[report.target] = report, now, 0
        return True

    def of_worker(self, worker: int) -> Speeds:
        """The speeds for pricing a prompt on this worker."""
        known = self._workers.get(worker)
        return known.speeds or self._prior if known else self._prior

    def _derived(self, known: _Worker) -> Speeds:
        speeds = self._prior
        if len(known.prefill) >= SAMPLES_MIN:
            # The model with the median time for 1,000 tokens.
            model = sorted(known.prefill, key=_thousand)[len(known.prefill) // 2]
            speeds = replace(speeds, **dict(zip(_PREFILL, model, strict=True)))
        for name, rates in known.rates.items():
            if len(rates) >= SAMPLES_MIN:
                speeds = replace(speeds, **{name: statistics.median(rates)})
        pace = known.pace(speeds.prefill)
        return replace(speeds, **{name: pace * getattr(speeds, name) for name in _PREFILL})

    def of_target(self, target: str, now: float) -> TargetSpeed | None:
        """The target's current speed; None if it is unknown or too old."""
        report, heard, _ = self._targets.get(target, (None, 0.0, 0))
        if report is None or now - heard > TARGET_SECONDS or report.device_bytes_per_second <= 0:
            return None
        # Only what is not in its memory goes through its devices.
        share = max(1 - report.memory_share, _DEVICE_SHARE_MIN)
        return TargetSpeed(report.device_bytes_per_second / share, round(report.waiting_read_bytes / share))

    def targets(self, now: float) -> dict[str, tuple[TargetReport, float]]:
        """The last report of each target, and its age in seconds."""
        return {name: (report, now - heard) for name, (report, heard, _) in self._targets.items()}

    @property
    def fetched_chunks(self) -> dict[int, dict[str, int]]:
        """Chunks that each worker requested from targets since its start, by outcome."""
        return {worker: known.fetched_chunks for worker, known in self._workers.items()}

    def observed(self, worker: int, tokens: int, context: int, seconds: float) -> None:
        """Note how long a prompt took to compute that neither fetched nor queued, so that it measures the GPU alone: so
        many `tokens` after so many others."""
        if tokens <= 0 or seconds <= 0:
            return
        known = self._workers.setdefault(worker, _Worker())
        known.observed.append(_Observed(tokens, context, seconds))
        known.speeds = self._derived(known)

    def answered(self, worker: int, tokens: int, seconds: float) -> None:
        """Note a finished answer; `seconds` count from its first token."""
        self._workers.setdefault(worker, _Worker()).answers.add(tokens, seconds)

    def answers(self, worker: int) -> Answers:
        known = self._workers.get(worker)
        return known.answers if known else _NO_ANSWERS

    def keep_only(self, workers: set[int], now: float) -> None:
        """Forget workers that are gone and targets that are silent."""
        self._workers = {worker: known for worker, known in self._workers.items() if worker in workers}
        self._targets = {name: one for name, one in self._targets.items() if now - one[1] <= 12 * TARGET_SECONDS}

    def _plausible(self, value: float, prior: float) -> bool:
        return prior / _FACTOR_MAX <= value <= prior * _FACTOR_MAX

    def _ignore(self, reason: str) -> bool:
        self.ignored[reason] += 1
        return False


def prefill_tokens_per_second(speeds: Speeds) -> float:
    """Prefill speed for a prompt of 1,000 tokens."""
    return 1000 / _thousand(speeds.prefill)


def _thousand(prefill: Prefill) -> float:
    """Seconds to compute 1,000 tokens."""
    return prefill.seconds(1000, 0)
