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
# Each running request adds to the price of a GPU's second, in which it would not decode: eight and more make it one and
# a half. With the doubt, that is to wait for twice as long as computing takes, and no longer: by then most is gained of
# what the others can gain, and beyond it the one that waits pays more than they do (benchmarks.chat.waiting).
_RUNNING_SHARE = 16
_RUNNING_MAX = 8


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
    running: int = 0,
) -> int:
    """How many of a request's next `chunks`, which are being fetched, to wait for rather than compute.

    `ahead_bytes` come first, `context_tokens` are there, and the engine could begin now. What is saved grows faster
    than in proportion to the number and what the fetch takes in proportion, so the answer is 0 or as many as come by
    the deadline. To compute delays every one of the `running` requests, to wait this one alone: the more run, the more
    a wait may take. What was not measured yet decides nothing: then only the deadline counts.
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
    return in_time if fetch_seconds <= patience(running) * saved_seconds else 0


def patience(running: Number) -> Number:
    """How many seconds a request waits for what saves a second of prefill, where so many others run. Routers plan by
    it, too: a fetch that takes longer would be given up here."""
    waits: Number = _DOUBT * (1 + np.minimum(running, _RUNNING_MAX) / _RUNNING_SHARE)
    return waits
