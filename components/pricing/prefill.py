"""The prefill model: the time to compute a prompt, fitted to the steps of an engine.

Plain arithmetic: no I/O, no clock of its own, no engine.
"""

from collections import deque
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

# The number of steps to fit. With one prefill in each step, that is about the last minute.
_SAMPLES_MAX = 256
_SAMPLES_MIN = 12
_REWEIGHTINGS = 4


Number = TypeVar("Number", float, npt.NDArray[np.float64])


def prefill_seconds(
    base: Number, per_token: Number, per_token_squared: Number, tokens: Number, context_tokens: Number
) -> Number:
    """Seconds to compute `tokens` tokens after `context_tokens` cached ones."""
    return base + per_token * tokens + per_token_squared * (tokens * (context_tokens + tokens / 2))


class Prefill(NamedTuple):
    """`prefill_seconds` of one engine."""

    base_seconds: float = 0.0
    seconds_per_token: float = 0.0
    seconds_per_token_squared: float = 0.0

    def seconds(self, tokens: int, context_tokens: int) -> float:
        return prefill_seconds(*self, tokens, context_tokens)

    def saved_seconds(self, tokens: int, context_tokens: int) -> float:
        """The time saved if the tokens are cached, without the base: the last token is always computed."""
        return prefill_seconds(0.0, *self[1:], tokens, context_tokens)

    def step_seconds(self, tokens: int, attended: float) -> float:
        """The time that a step's prompt tokens take; `attended` is the sum of m * (c + m / 2) over its requests."""
        return self.seconds_per_token * tokens + self.seconds_per_token_squared * attended

    @property
    def known(self) -> bool:
        return self.seconds_per_token > 0 or self.seconds_per_token_squared > 0


class PrefillFit:
    """Fits the model to engine steps. A step that took longer for another reason counts little, and so does one that
    seems short: when the scheduler's thread is held up, one step ends late and the next at once. Least absolute
    deviation, by reweighted least squares, with no coefficient below zero."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=_SAMPLES_MAX)

    def add(self, tokens: int, attended: float, seconds: float) -> None:
        """A step that computed `tokens` prompt tokens; `attended` is the sum of m * (c + m / 2) over its requests."""
        if tokens > 0 and seconds > 0:
            self._samples.append((float(tokens), attended, seconds))

    def fit(self) -> Prefill:
        """The model; all zeros until there are enough steps."""
        if len(self._samples) < _SAMPLES_MIN:
            return Prefill()
        data = np.array(self._samples)
        columns = np.column_stack([np.ones(len(data)), data[:, 0], data[:, 1]])
        seconds = data[:, 2]
        # Errors count in relation to the step, or long prompts alone would decide; and to what it should have taken, or
        # a single step that seems to take no time would.
        scale = np.maximum(seconds, data[:, 0] * np.median(seconds / data[:, 0]))
        weights = 1 / scale
        for _ in range(_REWEIGHTINGS):
            coefficients = _non_negative(columns, seconds, weights)
            predicted = columns @ coefficients
            scale = np.maximum(seconds, predicted)
            weights = 1 / scale / np.sqrt(np.maximum(np.abs(predicted - seconds) / scale, 0.02))
        return Prefill(*(float(one) for one in coefficients))


def _non_negative(columns: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares with non-negative coefficients: the best result over all subsets of columns that has none
    below 0. Three columns make seven subsets."""
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
