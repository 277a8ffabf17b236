"""How long a token is waited for, and which workers are left out for having kept a prompt waiting or failed it.

For one event loop; no clock of its own.
"""

from dataclasses import dataclass

# A worker that failed is left out for this long, and twice as long each further time, up to the bound.
SUSPECT_SECONDS, SUSPECT_SECONDS_MAX = 10.0, 300.0
# A suspect of whom nothing was heard for so long is forgotten: workers come and go.
_FORGET_SECONDS = 3600.0
# A worker that has tokens for others may take this many times as long for a prompt's first one.
ALIVE_FACTOR = 4.0


@dataclass(frozen=True)
class Deadlines:
    """In seconds. A worker whose first token takes longer than `first_token_multiple` times its prediction, and than
    `first_token_floor`, is suspect, and the prompt goes elsewhere if there is another worker. `first_token_max` bounds
    the wait on all of them together, unless the prediction allows one of them more; `next_token` the wait between two
    tokens."""

    first_token_floor: float = 10.0  # an engine that compiles kernels for its first prompts takes several seconds
    first_token_multiple: float = 5.0  # predictions were seen to be 4 times too low where HBM is full
    first_token_max: float = 300.0
    next_token: float = 60.0  # a request that is preempted for want of HBM waits for others to end

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
    """A circuit breaker for each worker: a suspect gets no prompt while another worker could take it. When its time is
    over, one prompt probes it: a first token makes it trusted again, another failure suspect for longer."""

    def __init__(self) -> None:
        self._suspicions: dict[int, _Suspicion] = {}

    def add(self, worker: int, now: float) -> None:
        """The worker failed. Prompts that fail together count once."""
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
        """A prompt goes to the worker: if it is a suspect whose time is over, as the probe."""
        known = self._suspicions.get(worker)
        if known is not None and now >= known.until:
            known.probed = True
            known.until = now + known.seconds

    def clear(self, worker: int) -> None:
        """The worker had a first token for a prompt."""
        self._suspicions.pop(worker, None)

    def failures(self, worker: int) -> int:
        """In a row."""
        known = self._suspicions.get(worker)
        return known.failures if known else 0

    def count(self, now: float) -> int:
        return sum(now < suspicion.until for suspicion in self._suspicions.values())
