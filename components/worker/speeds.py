"""How fast things go, measured as they go, and what follows from it: whether a chunk is worth waiting for.

Plain arithmetic: no I/O, no clock of its own, no engine.
"""

from collections import deque
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", float, npt.NDArray[np.float64])

# Steps that the prefill model is fitted to. At one prefill a step that is the last minute or so.
_SAMPLES_MAX = 256
_SAMPLES_MIN = 12
_REWEIGHTINGS = 4
# A speed is forgotten with this half-life, in seconds of work.
_HALF_LIFE_SECONDS = 2.0
# A measured speed is good to about a quarter: a fetch is given up when it is clearly the slower way, not at a tie.
_DOUBT = 1.25
# Each running request adds to the price of a GPU's second, in which it would not decode: eight and more make it one and
# a half. With the doubt, that is to wait for twice as long as computing takes, and no longer: by then most is gained of
# what the others can gain, and beyond it the one that waits pays more than they do (benchmarks.waiting).
_RUNNING_SHARE = 16
_RUNNING_MAX = 8


class Prefill(NamedTuple):
    """`base + per_token * m + per_token_squared * m * (c + m / 2)` seconds to compute m tokens that follow c."""

    base_seconds: float = 0.0
    seconds_per_token: float = 0.0
    seconds_per_token_squared: float = 0.0

    def seconds(self, tokens: int, context_tokens: int) -> float:
        return self.base_seconds + self.saved_seconds(tokens, context_tokens)

    def saved_seconds(self, tokens: int, context_tokens: int) -> float:
        """What it saves to have them: a prefill's base is paid anyway, since the last token is always computed."""
        attended = tokens * (context_tokens + tokens / 2)
        return self.seconds_per_token * tokens + self.seconds_per_token_squared * attended

    @property
    def known(self) -> bool:
        return self.seconds_per_token > 0 or self.seconds_per_token_squared > 0


class PrefillFit:
    """Fits the model to engine steps. A step that was slow for another reason counts little: least absolute deviation,
    by reweighted least squares, with no coefficient below zero."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=_SAMPLES_MAX)

    def add(self, tokens: int, attended: float, seconds: float) -> None:
        """A step that computed `tokens` prompt tokens; `attended` is the sum of m * (c + m / 2) over its requests."""
        if tokens > 0 and seconds > 0:
            self._samples.append((float(tokens), attended, seconds))

    def fit(self) -> Prefill:
        """The model; all zeros until enough was seen."""
        if len(self._samples) < _SAMPLES_MIN:
            return Prefill()
        data = np.array(self._samples)
        columns = np.column_stack([np.ones(len(data)), data[:, 0], data[:, 1]])
        seconds = data[:, 2]
        # Errors count in relation to the step, or long prompts alone would decide.
        weights = 1 / seconds
        for _ in range(_REWEIGHTINGS):
            coefficients = _non_negative(columns, seconds, weights)
            misses = np.abs(columns @ coefficients - seconds) / seconds
            weights = 1 / seconds / np.sqrt(np.maximum(misses, 0.02))
        return Prefill(*(float(one) for one in coefficients))


def _non_negative(columns: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares, the best over all choices of columns whose coefficients come out non-negative. Three
    columns make seven choices."""
    count = columns.shape[1]
    best, best_error = np.zeros(count), np.inf
    scales = np.maximum(np.abs(columns).max(axis=0), 1e-30)
    rows, right = columns / scales * weights[:, None], values * weights
    for choice in range(1, 1 << count):
        chosen = [column for column in range(count) if choice >> column & 1]
        found, *_ = np.linalg.lstsq(rows[:, chosen], right, rcond=None)
        if (found < 0).any():
            continue
        error = float(((rows[:, chosen] @ found - right) ** 2).sum())
        if error < best_error * (1 - 1e-9):
            best, best_error = np.zeros(count), error
            best[chosen] = found / scales[chosen]
    return best


class Throughput:
    """Bytes per second while something moves, the recent past counting more."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def add(self, moved_bytes: float, seconds: float) -> None:
        if seconds <= 0:
            return
        kept = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._bytes = self._bytes * kept + moved_bytes
        self._seconds = self._seconds * kept + seconds

    @property
    def bytes_per_second(self) -> float:
        """0 until something moved."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0


def due_seconds(arrived: float, chunks_before: int, chunk_bytes: int) -> float:
    """When a piece of a request's fetch should come: the order in which pieces of several requests are fetched.

    A request is owed its bytes at a fixed rate from its arrival on. So its first chunks come before its later ones, an
    earlier request's before a later one's, and a short prompt does not wait for the tail of a long one; and since the
    order is one of times, a tail does not wait for ever either.
    """
    return arrived + chunks_before * chunk_bytes / _OWED_BYTES_PER_SECOND


# Below what one connection brings, above what a store shared by many brings each: the tail of a prompt of several GB
# gives way to those that arrive within the next second or so.
_OWED_BYTES_PER_SECOND = 1e9


def worth_waiting_for(
    chunks: int,
    *,
    chunk_bytes: int,
    ahead_bytes: int,
    bytes_per_second: float,
    prefill: Prefill,
    chunk_tokens: int,
    context_tokens: int,
    seconds_left: float,
    running: int = 0,
) -> int:
    """How many of a request's next `chunks`, which are being fetched, to wait for rather than compute.

    `ahead_bytes` come first, `context_tokens` are there, and the engine could begin now. What is saved grows faster
    than in proportion to the number and what the fetch takes in proportion, so the answer is 0 or as many as come by
    the deadline. To compute delays every one of the `running` requests, to wait this one alone: the more run, the more
    a wait may take. What was not measured yet decides nothing: then only the deadline counts.
    """
    if seconds_left <= 0:
        return 0
    if bytes_per_second <= 0:
        return chunks
    in_time = min(chunks, int((seconds_left * bytes_per_second - ahead_bytes) // chunk_bytes))
    if in_time <= 0:
        return 0
    if not prefill.known:
        return in_time
    fetch_seconds = (ahead_bytes + in_time * chunk_bytes) / bytes_per_second
    saved_seconds = prefill.saved_seconds(in_time * chunk_tokens, context_tokens)
    return in_time if fetch_seconds <= patience(running) * saved_seconds else 0


def patience(running: Number) -> Number:
    """How many seconds a request waits for what saves a second of prefill, where so many others run. Routers plan by
    it, too: a fetch that takes longer would be given up here."""
    return _DOUBT * (1 + np.minimum(running, _RUNNING_MAX) / _RUNNING_SHARE)
