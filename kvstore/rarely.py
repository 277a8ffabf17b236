"""How often something is logged that others can cause as often as they like."""

import time

# Of clients that a target turns away.
COMPLAIN_SECONDS = 1.0


class Rarely:
    """True, and then False for so many seconds: whoever makes us log a line does not fill a disk with it. For one
    thread, or under its caller's lock."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = 0.0  # time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
