"""Times the engine's steps and its copies from DRAM to HBM. The times feed the prefill model and the heartbeat, and
limit how long the scheduler may wait.

Runs on the scheduler's thread; the prefill model is fitted once a second.
"""

from collections import deque

from components.pricing.prefill import Prefill, PrefillFit
from components.pricing.throughput import Throughput
from components.worker.compat import LaunchedMetadata, OffloadingWorkerMetadata, SchedulerOutput

_TELL_SECONDS = 1.0
# With asynchronous scheduling a step is scheduled while the one before runs; more than a few never overlap.
_STEPS_MAX = 8
# A longer idle time counts as this, so that the share of prompts falls to almost 0 and recovers soon.
_IDLE_SECONDS_MAX = 4.0
# With fewer prompt tokens, a step's duration depends mostly on its decodes.
_PREFILL_TOKENS_MIN = 64
# The number of steps, the latest ones, from which the schedule slack is estimated, and the share that may be used.
_AHEAD_SAMPLES = 16
_AHEAD_SHARE = 0.9
# The upper limit: when a short step follows long ones, the GPU would wait for the scheduler. It equals the time of
# copies that a step may begin with (loads.py).
_SPARE_SECONDS_MAX = 0.02


def prefilled(output: SchedulerOutput) -> tuple[int, float]:
    """The prompt tokens of a step, and the sum of m * (c + m / 2) over requests that compute m tokens after c cached
    ones."""
    tokens, attended = 0, 0.0
    if sum(output.num_scheduled_tokens.values()) == len(output.num_scheduled_tokens):
        return tokens, attended  # a step that only decodes, as most do: return fast
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for req_id, count in output.num_scheduled_tokens.items():
        if count > 1 + len(output.scheduled_spec_decode_tokens.get(req_id, ())):
            tokens += count
            attended += count * (computed.get(req_id, 0) + count / 2)
    return tokens, attended


class StepClock:
    """Times in seconds of time.monotonic()."""

    def __init__(self) -> None:
        self._fit = PrefillFit()
        self._copies = Throughput()
        self._prefills = Throughput()  # seconds spent on prompts per second
        self._steps: deque[tuple[int, float, float, bool]] = deque(maxlen=_STEPS_MAX)
        self._last_end = 0.0
        self._told = 0.0
        self._launched = 0.0
        self._ahead: deque[float] = deque(maxlen=_AHEAD_SAMPLES)
        self.prefill = Prefill()

    def begin(self, tokens: int, attended: float, now: float, copies: bool = False) -> None:
        """A step begins. With `copies` at its start, its duration does not enter the prefill model."""
        self._steps.append((tokens, attended, now, copies))

    def end(self, now: float) -> None:
        """The oldest running step has ended. It ran since its launch, or since the end of the step before."""
        if not self._steps:
            return
        tokens, attended, began, copies = self._steps.popleft()
        known = began <= self._launched <= now and len(self._steps) <= 1  # excludes other hosts' clocks, and pipelines
        self._ahead.append(max(0.0, self._last_end - self._launched) if known else 0.0)
        seconds = now - max(began, self._last_end)
        if tokens >= _PREFILL_TOKENS_MIN and not copies:
            self._fit.add(tokens, attended, seconds)
        idle = min(now - self._last_end - seconds, _IDLE_SECONDS_MAX)
        self._prefills.add(min(seconds, self.prefill.step_seconds(tokens, attended)), seconds + idle)
        self._last_end = now

    def spare_seconds(self, copy_seconds: float = 0.0) -> float:
        """The schedule slack: how long the scheduler may wait, while it schedules the next step, without idling the
        GPU. `copy_seconds` are the copies at that step's start. With asynchronous scheduling, steps are launched while
        the one before runs; the slack is the lower quartile of the latest leads. Otherwise, and without a GPU, it is
        0."""
        if not self._steps or len(self._ahead) < _AHEAD_SAMPLES:
            return 0.0
        ahead = sorted(self._ahead)[_AHEAD_SAMPLES // 4]
        return min(_AHEAD_SHARE * ahead, ahead - copy_seconds, _SPARE_SECONDS_MAX)

    def note_worker(self, meta: object) -> None:
        """Note the ranks' report on the step that is about to end."""
        if isinstance(meta, LaunchedMetadata):
            self._launched = meta.launched
        if isinstance(meta, OffloadingWorkerMetadata) and not meta.transfer_stats.is_empty():
            self._copies.add(meta.transfer_stats.load.bytes, meta.transfer_stats.load.time)

    @property
    def prefill_share(self) -> float:
        """The share of the engine's last seconds that it spent on prompts; 0 until it is known."""
        return self._prefills.bytes_per_second

    @property
    def dram_bytes_per_second(self) -> float:
        return self._copies.bytes_per_second

    def due(self, now: float) -> bool:
        """True once a second; then `prefill` has been fitted again."""
        if now < self._told + _TELL_SECONDS:
            return False
        self._told = now
        self.prefill = self._fit.fit()
        return True
