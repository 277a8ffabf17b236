"""Which worker a session stays on, where the operator asks for it: off by default, as in Dynamo.

For one event loop; no clock of its own.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

# Of 200 bytes or so; beyond, the one that was idle longest is free to go elsewhere.
SESSIONS_MAX = 100_000
_CHARACTERS_MAX = 256


class Sessions:
    """A session is bound to the (worker, rank) of its first prompt until it was idle for `idle_seconds`."""

    def __init__(self, idle_seconds: float = 0.0):
        self._idle_seconds = idle_seconds
        self._bound: OrderedDict[str, tuple[tuple[int, int], float]] = OrderedDict()  # the one heard last comes last

    def place(self, session: str, now: float) -> tuple[int, int] | None:
        place, heard = self._bound.get(session, (None, 0.0))
        return place if now - heard <= self._idle_seconds else None

    def bind(self, session: str, place: tuple[int, int], now: float) -> None:
        if not session or not self._idle_seconds:
            return
        self._bound[session] = place, now
        self._bound.move_to_end(session)
        while len(self._bound) > SESSIONS_MAX:
            self._bound.popitem(last=False)


def session_of(request: Mapping[str, Any]) -> str:
    """The session's id as Dynamo passes it (x-dynamo-session-id and its kin), or "" without one that is usable."""
    context = request.get("agent_context")
    session = context.get("session_id") if isinstance(context, Mapping) else None
    return session if isinstance(session, str) and len(session) <= _CHARACTERS_MAX else ""
