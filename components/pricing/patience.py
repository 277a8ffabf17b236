"""Whether a chunk is worth waiting for, and which one comes first.

Plain arithmetic: no I/O, no clock of its own, no engine.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from components.pricing.prefill import Prefill

Number = TypeVar("Number", float, npt.NDArray[np.float64])

# A measured speed is good to about a quarter: a fetch is given up when it is clearly the slower way, not at a tie.
_DOUBT = 1.25
# Of a GPU that prompts keep busy beyond this share, a second is not worth more still.
_PREFILL_SHARE_MAX = 0.75


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
    prefill_share: float = 0.0,
) -> int:
    """How many of a request's next `chunks`, which are being fetched, to wait for rather than compute.

    `ahead_bytes` come first, `context_tokens` are there, and the engine could begin now. What is saved grows faster
    than in proportion to the number and what the fetch takes in proportion, so the answer is 0 or as many as come by
    the deadline. What was not measured yet decides nothing: then only the deadline counts.
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
    """How many seconds a request waits for what saves a second of prefill, on a GPU that spends this share of its time
    on prompts. Routers plan by it, too: a fetch that takes longer would be given up here.

    Whoever shares the GPU with prompts takes 1 / (1 - share) times as long, so that one more second of computing costs
    them in proportion to the slope of that, 1 / (1 - share) ** 2. It is the same in a queue (M/M/1).
    """
    waits: Number = _DOUBT / (1 - np.minimum(prefill_share, _PREFILL_SHARE_MAX)) ** 2
    return waits
