"""What it costs, in seconds, to serve a prompt on a worker. Pure functions of plain data: no I/O, no clock.

For worker w and a plan that loads r chunks from the store:

    start  = max(wait(w, r), fetch(w, r))       # the fetch runs while the request queues
    ttft   = start + copy DRAM -> HBM + prefill(what is still missing | what is there)
    price  = ttft + (delay of others + decode pressure of w + the place taken from those that still fetch) / weight
    delay  = (requests without a first token on w + stall_price * requests that decode on w) * prefill
             + requests that fetch to w * own time on w's link
    decode pressure = stall_price * share of w's KV memory that is in use * seconds of the answer on an average worker

So the price sums the time of all requests: the prompt's own wait, and the delay that it adds to others. A load is
planned only if the worker would wait for it: the fetch outlasts the wait by at most patience * prefill saved
(patience.py). The largest such load is not searched for. It could be the best only if a prefill delays others for
longer than that.

r is chosen together with w: "load all", "load some" and "recompute" are one decision. As a function of r, the price is
a concave function (the saved prefill) plus linear ones with kinks. There is a kink where the fetch outlasts the wait,
and one where the bottleneck moves from the worker's link to the target's devices. So the minimum is at no chunk, at all
chunks or at a kink: a handful of candidates for a prompt of any length. All workers are priced at once, in arrays with
a row for each worker and a column for each number of chunks. Choice objects are built only when the caller reads them.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple, TypeAlias, overload

import msgspec
import numpy as np
import numpy.typing as npt

from components.pricing.patience import patience
from components.pricing.prefill import Prefill, prefill_seconds

Array: TypeAlias = npt.NDArray[np.float64]


class Speeds(msgspec.Struct, frozen=True, gc=False):
    """The speeds of a worker and of its link to the store. Rates are per second; the prefill model is that of
    prefill.py."""

    prefill_base_seconds: float
    prefill_seconds_per_token: float
    prefill_seconds_per_token_squared: float
    dram_bytes_per_second: float
    store_bytes_per_second: float
    store_latency_seconds: float

    @property
    def prefill(self) -> Prefill:
        return Prefill(
            self.prefill_base_seconds, self.prefill_seconds_per_token, self.prefill_seconds_per_token_squared
        )


class Policy(msgspec.Struct, frozen=True):
    """The value of other requests' time. `stall_price` is the cost of delaying one decoding request by a second. A
    prompt delays it by its prefill, and by its answer's share of each step. For one prompt, `weight` is the value of a
    second of its own wait, relative to others' seconds. `answer_length` is its answer's length, relative to the usual
    one."""

    stall_price: float = 0.0
    weight: float = 1.0
    answer_length: float = 1.0


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """The state of one worker (one data-parallel rank) for a prompt. Blocks are leading blocks of the prompt."""

    worker: int
    speeds: Speeds
    dp_rank: int = 0
    hbm_blocks: int = 0
    dram_blocks: int = 0  # leading blocks found in HBM or, beyond that, in DRAM
    is_handed_over: bool = False  # a prefill worker hands those blocks over; they are not in this worker's DRAM
    queued_prefill_tokens: int = 0  # of other requests, without what they fetch
    fetching_bytes: int = 0  # in flight from the store, for other requests
    running_requests: int = 0  # decoding requests
    waiting_requests: int = 0  # requests without a first token, fetching ones included
    fetching_requests: int = 0
    prefill_share: float = 0.0  # recent share of its time spent on prompts
    # Shares of its KV memory, expected answers included. Above 1, some requests wait for memory.
    memory_used: float = 0.0  # booked for other requests
    memory_fetching: float = 0.0  # part of memory_used, for requests that still fetch
    memory_needed: float = 0.0  # by this request
    answer_seconds: float = 0.0  # average time from first to last token, during which a request holds its share
    # Of the worker's tier; 0: it has none and fetches nothing.
    blocks_per_chunk: int = 0
    chunk_bytes: int = 0
    located: Sequence[str | None] = ()  # the target of each chunk of the prompt
    # The target with most of the chunks: its share of the fetched chunks, other requests' bytes, its read speed.
    target_share: float = 0.0
    target_fetching_bytes: int = 0
    target_bytes_per_second: float = math.inf


class Choice(msgspec.Struct, frozen=True, gc=False):
    """A priced way to serve the prompt."""

    candidate: Candidate
    first_chunk: int
    fetch_chunks: int
    hbm_tokens: int
    dram_tokens: int
    store_tokens: int
    missing_tokens: int
    wait_seconds: float
    fetch_seconds: float
    copy_seconds: float
    prefill_seconds: float
    ttft_seconds: float
    delay_seconds: float  # of others, by this prompt's prefill and its fetch
    pressure_seconds: float  # for decoding requests, and for those whose memory it takes
    price_seconds: float

    @property
    def prompt_tokens(self) -> int:
        return self.hbm_tokens + self.dram_tokens + self.store_tokens + self.missing_tokens

    @property
    def without_store(self) -> tuple[float, float]:
        """TTFT and prefill seconds if the same worker recomputed the chunks from the store."""
        local = self.hbm_tokens + self.dram_tokens
        loaded = self.dram_tokens + self.store_tokens
        copy = self.copy_seconds * self.dram_tokens / loaded if loaded else 0.0
        prefill = self.candidate.speeds.prefill.seconds(self.store_tokens + self.missing_tokens, local)
        return self.wait_seconds + copy + prefill, prefill

    @property
    def targets(self) -> list[str | None]:
        """The target of each chunk, from chunk 0 to the last one that is local or loaded."""
        return list(self.candidate.located[: self.first_chunk + self.fetch_chunks])


class _Columns(NamedTuple):
    """The candidates as arrays, one for each field. Each has one column, to broadcast with rows of numbers of
    chunks."""

    prefill_base_seconds: Array
    prefill_seconds_per_token: Array
    prefill_seconds_per_token_squared: Array
    dram_bytes_per_second: Array
    store_bytes_per_second: Array
    store_latency_seconds: Array
    hbm_blocks: Array
    dram_blocks: Array
    queued_prefill_tokens: Array
    fetching_bytes: Array
    running_requests: Array
    waiting_requests: Array
    fetching_requests: Array
    prefill_share: Array
    memory_used: Array
    memory_fetching: Array
    memory_needed: Array
    answer_seconds: Array
    blocks_per_chunk: Array
    chunk_bytes: Array
    target_share: Array
    target_fetching_bytes: Array
    target_bytes_per_second: Array
    first_chunk: Array  # the first one that is not wholly local
    available_chunks: Array  # how many from there on the store holds without a gap

    def prefill_seconds(self, missing_tokens: Array, context_tokens: Array) -> Array:
        return prefill_seconds(
            self.prefill_base_seconds,
            self.prefill_seconds_per_token,
            self.prefill_seconds_per_token_squared,
            missing_tokens,
            context_tokens,
        )


_of_candidate = attrgetter(
    *(f"speeds.{name}" for name in Speeds.__struct_fields__),
    *(name for name in _Columns._fields if name in Candidate.__struct_fields__),
)


class _Terms(NamedTuple):
    """The numbers of a Choice, with the same names."""

    first_chunk: Array
    fetch_chunks: Array
    hbm_tokens: Array
    dram_tokens: Array
    store_tokens: Array
    missing_tokens: Array
    wait_seconds: Array
    fetch_seconds: Array
    copy_seconds: Array
    prefill_seconds: Array
    ttft_seconds: Array
    delay_seconds: Array
    pressure_seconds: Array
    price_seconds: Array


# Added to divisors that may be 0: the resulting number of chunks is then larger than any.
_NO_TIME = 1e-30
_WHOLE = 6  # the first terms, which are numbers of chunks and tokens


class Choices(Sequence[Choice]):
    """The cheapest choice of each candidate, in their order."""

    def __init__(self, candidates: Sequence[Candidate], terms: Array):
        self._candidates = candidates
        self._terms = terms  # a row for each candidate, columns as in _Terms

    @property
    def price_seconds(self) -> Array:
        return self._terms[:, _Terms._fields.index("price_seconds")]

    def least_ttft_but(self, chosen: Choice) -> float | None:
        """The lowest TTFT of the other candidates; None if there is no other."""
        others = [number for number, one in enumerate(self._candidates) if one is not chosen.candidate]
        return float(self._terms[others, _Terms._fields.index("ttft_seconds")].min()) if others else None

    def __len__(self) -> int:
        return len(self._candidates)

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Choice]: ...
    def __getitem__(self, index: int | slice) -> Choice | Sequence[Choice]:
        if isinstance(index, slice):
            return Choices(self._candidates[index], self._terms[index])
        terms = self._terms[index].tolist()
        return Choice(self._candidates[index], *map(int, terms[:_WHOLE]), *terms[_WHOLE:])

    def __iter__(self) -> Iterator[Choice]:
        return map(self.__getitem__, range(len(self)))


def choose(
    candidates: Iterable[Candidate], prompt_tokens: int, block_tokens: int, policy: Policy
) -> tuple[Choice, Choices]:
    """The cheapest choice, and the cheapest of each candidate. Ties go to the least loaded worker, then to chance.

    Raises ValueError without candidates.
    """
    candidates = list(candidates)
    if not candidates:
        raise ValueError("no candidates")
    columns = _columns(candidates)
    in_turn = _wait_seconds(columns)
    terms = _price(columns, _counts(columns, in_turn), in_turn, prompt_tokens, block_tokens, policy)
    cheapest = terms.price_seconds.argmin(axis=1)
    every = np.empty((len(terms), *terms.price_seconds.shape))
    for number, term in enumerate(terms):
        every[number] = term
    choices = Choices(candidates, every[:, np.arange(len(candidates)), cheapest].T)
    # A microsecond is far below the model's accuracy.
    price = choices.price_seconds.round(6)
    chance = np.array([random.random() for _ in candidates])
    rank = np.lexsort((chance, columns.memory_used[:, 0], columns.queued_prefill_tokens[:, 0], price))
    return choices[int(rank[0])], choices


def fetchable(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """For each candidate: the first chunk that is not wholly local, and how many chunks the store holds from there on
    without a gap. Candidates may share `located`."""
    gaps: dict[int, list[int]] = {}
    found = []
    for one in candidates:
        if not one.blocks_per_chunk:
            found.append((0, 0))
            continue
        first = max(one.hbm_blocks, one.dram_blocks) // one.blocks_per_chunk
        if (ends := gaps.get(id(one.located))) is None:
            ends = [chunk for chunk, target in enumerate(one.located) if target is None]
            gaps[id(one.located)] = ends = [*ends, len(one.located)]
        found.append((first, ends[bisect_left(ends, first)] - first if first < ends[-1] else 0))
    return found


def _columns(candidates: Sequence[Candidate]) -> _Columns:
    numbers = [_of_candidate(one) + chunks for one, chunks in zip(candidates, fetchable(candidates), strict=True)]
    return _Columns(*np.array(numbers, np.float64).T[:, :, None])


def _counts(c: _Columns, wait: Array) -> Array:
    """For each candidate, the numbers of chunks to price: none, all, and the integers around each kink. At a kink the
    fetch begins to outlast the wait, on the link or on the devices, or the bottleneck changes between the two."""
    link_seconds = c.chunk_bytes / c.store_bytes_per_second
    link_before = c.fetching_bytes / c.store_bytes_per_second
    devices_seconds = c.target_share * c.chunk_bytes / c.target_bytes_per_second
    devices_before = c.target_fetching_bytes / c.target_bytes_per_second
    spare = wait - c.store_latency_seconds
    faster = devices_seconds - link_seconds
    kinks = np.concatenate(
        [
            (spare - link_before) / (link_seconds + _NO_TIME),
            (spare - devices_before) / (devices_seconds + _NO_TIME),
            (link_before - devices_before) / (faster + _NO_TIME * (faster == 0)),
        ],
        axis=1,
    )
    below = np.floor(np.minimum(np.maximum(kinks, 0), c.available_chunks))
    above = np.minimum(below + 1, c.available_chunks)
    return np.concatenate([np.zeros_like(wait), below, above, c.available_chunks], axis=1)


def _wait_seconds(c: _Columns, overtaken: Array | float = 0.0) -> Array:
    """Seconds until the worker has computed the queue before this prompt and has KV memory for it. All memory is freed
    once in the duration of an answer. `overtaken` is the share booked for requests that this one overtakes."""
    queued = c.queued_prefill_tokens
    prefills = np.where(queued > 0, c.prefill_seconds(queued, np.zeros_like(queued)), 0.0)
    lacking = np.maximum(c.memory_used - overtaken + c.memory_needed - 1, 0)
    wait: Array = np.maximum(prefills, c.answer_seconds * lacking)
    return wait


def _fetch_seconds(c: _Columns, chunks: Array) -> Array:
    """Seconds to fetch `chunks` from the store into the worker's DRAM."""
    own = chunks * c.chunk_bytes
    link = (c.fetching_bytes + own) / c.store_bytes_per_second
    devices = (c.target_fetching_bytes + c.target_share * own) / c.target_bytes_per_second
    return np.where(chunks > 0, c.store_latency_seconds + np.maximum(link, devices), 0.0)


def _price(c: _Columns, chunks: Array, in_turn: Array, prompt_tokens: int, block_tokens: int, policy: Policy) -> _Terms:
    """The price of loading `chunks`, for each candidate (row). `in_turn` is the wait without overtaking."""
    # The last token of a prompt is always computed, since the engine needs its logits.
    most = prompt_tokens - 1
    hbm = np.minimum(c.hbm_blocks * block_tokens, most)
    local = np.minimum(np.maximum(c.hbm_blocks, c.dram_blocks) * block_tokens, most)
    chunk_tokens = c.blocks_per_chunk * block_tokens
    reached = np.where(chunks > 0, (c.first_chunk + chunks) * chunk_tokens, 0.0)
    loaded = np.maximum(local, np.minimum(reached, most))
    copied_bytes = (loaded - hbm) * c.chunk_bytes / np.maximum(1, chunk_tokens)
    fetch = _fetch_seconds(c, chunks)
    copy = copied_bytes / c.dram_bytes_per_second
    prefill = c.prefill_seconds(prompt_tokens - loaded, loaded)
    # A request that fetches nothing gets memory before those that still fetch, and delays them by as much. So this
    # shortens the predicted TTFT, but it does not favour recompute.
    wait = _wait_seconds(c, np.where(chunks > 0, 0.0, c.memory_fetching))
    ttft = np.maximum(wait, fetch) + copy + prefill
    own_link = chunks * c.chunk_bytes / c.store_bytes_per_second
    delayed = (c.waiting_requests + policy.stall_price * c.running_requests) * prefill + c.fetching_requests * own_link
    delay = delayed / policy.weight
    # The mean over all workers: with its own, longer answers, a slow worker would be left idle.
    decoding = policy.stall_price * c.memory_used * policy.answer_length * c.answer_seconds.mean()
    pressure = (decoding + np.maximum(in_turn, fetch) - np.maximum(wait, fetch)) / policy.weight
    saved = c.prefill_seconds(prompt_tokens - local, local) - prefill
    is_given_up = (chunks > 0) & (np.maximum(fetch - in_turn, 0) > patience(c.prefill_share) * saved)
    return _Terms(
        first_chunk=c.first_chunk,
        fetch_chunks=chunks,
        hbm_tokens=hbm,
        dram_tokens=local - hbm,
        store_tokens=loaded - local,
        missing_tokens=prompt_tokens - loaded,
        wait_seconds=wait,
        fetch_seconds=fetch,
        copy_seconds=copy,
        prefill_seconds=prefill,
        ttft_seconds=ttft,
        delay_seconds=delay,
        pressure_seconds=pressure,
        price_seconds=np.where(is_given_up, np.inf, ttft + delay + pressure),
    )
