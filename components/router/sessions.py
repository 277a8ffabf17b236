"""Session affinity: keeps a session on its worker. Off by default, as in Dynamo.

For one event loop; no clock of its own.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

# About 200 bytes each. Beyond this, the session that was idle longest loses its affinity.
SESSIONS_MAX = 100_000
_CHARACTERS_MAX = 256


class Sessions:
    """A session is bound to the (worker, rank) of its first prompt until it has been idle for `idle_seconds`."""

    def __init__(self, idle_seconds: float = 0.0):
        self._idle_seconds = idle_seconds
        self._bound: OrderedDict[str, tuple[tuple[int, int], float]] = OrderedDict()  # least recently used first

    def bound_worker(self, session: str, now: float) -> tuple[int, int] | None:
        worker, used = self._bound.get(session, (None, 0.0))
        return worker if now - used <= self._idle_seconds else None

    def bind(self, session: str, worker: tuple[int, int], now: float) -> None:
        if not session or not self._idle_seconds:
            return
        self._bound[session] = worker, now
        self._bound.move_to_end(session)
        while len(self._bound) > SESSIONS_MAX:
            self._bound.popitem(last=False)


def session_of(request: Mapping[str, Any]) -> str:
    """The session's id as Dynamo passes it (from x-dynamo-session-id and similar headers); "" without a usable one."""
    context = request.get("agent_context")
    session = context.get("session_id") if isinstance(context, Mapping) else None
    return session if isinstance(session, str) and len(session) <= _CHARACTERS_MAX else ""
