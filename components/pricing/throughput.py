"""A moving estimate of throughput. It has no clock of its own."""

# The half-life of samples, in seconds of work.
_HALF_LIFE_SECONDS = 2.0


class Throughput:
    """Bytes per second of transfer time, with a bias to recent samples. The caller decides what counts as transfer
    time, and when a rate is too old."""

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
        """0 before the first transfer."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0
