"""How fast bytes move, measured as they do: no clock of its own."""

# A speed is forgotten with this half-life, in seconds of work.
_HALF_LIFE_SECONDS = 2.0


class Throughput:
    """Bytes per second while something moves, the last seconds of work counting most, however many transfers they were.
    The caller decides what counts as work, and when a rate is too old."""

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
