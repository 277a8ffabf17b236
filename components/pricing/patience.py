"""Which chunks are worth waiting for, and in which order they are fetched.

Plain arithmetic: no I/O, no clock of its own, no engine.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from components.pricing.prefill import Prefill

Number = TypeVar("Number", float, npt.NDArray[np.float64])

# Measured speeds are accurate to about 25%. A fetch is cancelled only if recompute is clearly faster.
_DOUBT = 1.25
# Above this share of prompts, the value of a GPU second does not rise further.
_PREFILL_SHARE_MAX = 0.75


def due_seconds(arrived: float, chunks_before: int, chunk_bytes: int) -> float:
    """The virtual deadline of a piece of a request's fetch. Pieces of all requests are fetched in this order (virtual
    clock).

    It assumes that a request's bytes arrive at a fixed rate from its arrival on. So a request's first chunks come
    before its later ones, and earlier requests before later ones. A short prompt does not wait for the tail of a long
    one. The tail does not starve either, since the order is by time.
    """
    return arrived + chunks_before * chunk_bytes / _OWED_BYTES_PER_SECOND


# Less than one connection delivers, more than each of many requests gets from a shared store. The tail of a prompt of
# several GB gives way to requests that arrive within the next second or so.
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
    prefill_share: float = 0.0,
) -> int:
    """How many of a request's next `chunks`, which are being fetched, to wait for instead of computing them.

    `ahead_bytes` are fetched before them, `context_tokens` are cached, and the engine could begin now. With more
    chunks, the saved prefill grows faster than linearly, and the fetch linearly. So the answer is 0, or as many as
    arrive by the deadline. Without measured speeds, only the deadline counts.
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
    return in_time if fetch_seconds <= patience(prefill_share) * saved_seconds else 0


def patience(prefill_share: Number) -> Number:
    """How many seconds a request waits to save one second of prefill, on a GPU that spends this share of its time on
    prompts. Routers plan with it, too: the worker would cancel a longer fetch.

    Requests that share the GPU with prompts take 1 / (1 - share) times as long. One more second of prefill costs them
    in proportion to the derivative, 1 / (1 - share) ** 2. The same holds in a queue (M/M/1).
    """
    waits: Number = _DOUBT / (1 - np.minimum(prefill_share, _PREFILL_SHARE_MAX)) ** 2
    return waits
