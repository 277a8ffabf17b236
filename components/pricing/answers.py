"""Mean length and duration of answers. It has no clock of its own."""

from collections import deque

_LATEST = 32


class Answers:
    """Means over the latest answers of a worker; 0 before the first."""

    def __init__(self) -> None:
        self._tokens: deque[int] = deque(maxlen=_LATEST)
        self._seconds: deque[float] = deque(maxlen=_LATEST)

    def add(self, tokens: int, seconds: float) -> None:
        """`seconds` from its first token to its last."""
        self._tokens.append(tokens)
        self._seconds.append(seconds)

    @property
    def tokens(self) -> float:
        return sum(self._tokens) / len(self._tokens) if self._tokens else 0.0

    @property
    def seconds(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
