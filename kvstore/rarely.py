"""A rate limit for log lines that other processes can trigger."""

import time

# Interval for refused clients.
COMPLAIN_SECONDS = 1.0


class Rarely:
    """True at most once per `seconds`, so that no other process can fill a disk with log lines. For one thread, or
    under its caller's lock."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = 0.0  # time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
