"""Timeouts for tokens, and a circuit breaker for workers that failed a prompt or missed a deadline.

For one event loop; no clock of its own.
"""

from dataclasses import dataclass

# Exponential backoff: a worker that failed gets no prompts for this long, doubled for each further failure, up to the
# bound.
SUSPECT_SECONDS, SUSPECT_SECONDS_MAX = 10.0, 300.0
# A suspect is forgotten this long after its backoff: workers come and go.
_FORGET_SECONDS = 3600.0
# A worker that produces tokens for other requests may take this many times as long for a prompt's first token.
ALIVE_FACTOR = 4.0


@dataclass(frozen=True)
class Deadlines:
    """Timeouts in seconds.

    A worker becomes suspect when its first token takes longer than `first_token_multiple` times the prediction and than
    `first_token_floor`. The prompt then goes to another worker, if there is one. `first_token_max` bounds the wait on
    all workers together, unless the prediction for one of them allows more. `next_token` bounds the wait between two
    tokens.
    """

    first_token_floor: float = 10.0  # an engine that compiles kernels for its first prompts takes several seconds
    first_token_multiple: float = 5.0  # predictions were up to 4 times too low while HBM was full
    first_token_max: float = 300.0
    next_token: float = 60.0  # a request that is preempted because HBM is full waits for others to end

    def first_token(self, predicted_seconds: float) -> float:
        return max(self.first_token_floor, self.first_token_multiple * predicted_seconds)


@dataclass
class _Suspicion:
    failures: int
    until: float
    probed: bool = False

    @property
    def seconds(self) -> float:
        return float(min(SUSPECT_SECONDS_MAX, SUSPECT_SECONDS * 2 ** min(10, self.failures - 1)))


class Suspects:
    """A circuit breaker per worker: a suspect gets no prompt while another worker could take it. After its backoff one
    prompt probes it. A first token makes it trusted again; another failure doubles the backoff."""

    def __init__(self) -> None:
        self._suspicions: dict[int, _Suspicion] = {}

    def add(self, worker: int, now: float) -> None:
        """Note a failure of the worker. Prompts that fail together count once."""
        known = self._suspicions.get(worker)
        if known is not None and now < known.until and not known.probed:
            return
        self._suspicions = {
            one: suspicion
            for one, suspicion in self._suspicions.items()
            if now - suspicion.until < _FORGET_SECONDS or one == worker
        }
        suspicion = _Suspicion(1 + (known.failures if known else 0), now)
        suspicion.until += suspicion.seconds
        self._suspicions[worker] = suspicion

    def trusts(self, worker: int, now: float) -> bool:
        known = self._suspicions.get(worker)
        return known is None or now >= known.until

    def sent(self, worker: int, now: float) -> None:
        """Note that a prompt goes to the worker. If that is a suspect whose backoff is over, the prompt is its
        probe."""
        known = self._suspicions.get(worker)
        if known is not None and now >= known.until:
            known.probed = True
            known.until = now + known.seconds

    def clear(self, worker: int) -> None:
        """Trust the worker again: it produced a first token."""
        self._suspicions.pop(worker, None)

    def failures(self, worker: int) -> int:
        """The number of consecutive failures."""
        known = self._suspicions.get(worker)
        return known.failures if known else 0

    def count(self, now: float) -> int:
        """The number of workers that are suspect now."""
        return sum(now < suspicion.until for suspicion in self._suspicions.values())
