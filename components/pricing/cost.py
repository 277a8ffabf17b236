"""What it costs, in seconds, to serve a prompt on a worker. Pure functions of plain data: no I/O, no clock.

For worker w and a plan that loads r chunks from the store:

    start  = max(wait(w, r), fetch(w, r))       # the fetch runs while the request queues
    ttft   = start + copy DRAM -> HBM + prefill(what is still missing | what is there)
    price  = ttft + (delay of others + decode pressure of w + the place taken from those that still fetch) / weight
    delay  = (requests without a first token on w + stall_price * requests that decode on w) * prefill
             + requests that fetch to w * own time on w's link
    decode pressure = stall_price * share of w's KV memory that is in use * seconds of the answer on an average worker

So the price is in seconds of everybody: the prompt's own wait, and what it adds to that of others. A load is planned
only if the worker would wait for it: the fetch outlasts the wait by at most patience * prefill saved (patience.py).
The largest such load is not looked for: it may be the best only where a prefill delays others for longer than that.

r is chosen with w: "load all", "load some" and "recompute" are one decision. Over r the price is a sum of a concave
function (less prefill) and linear ones, with kinks where the fetch outlasts the wait and where its narrow place moves
from the worker's link to the target's devices, so that its minimum lies at no chunk, at every chunk or at a kink: a
handful of candidates, however long the prompt. So all workers are priced at once, in arrays with a row a worker and a
column a number of chunks; what the caller sees are rows, made when they are looked at.
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
    """How fast a worker and its way to the store are. Rates are per second; the prefill model is that of prefill.py."""

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
    """What a second of others is worth. `stall_price` is what a second costs by which a prompt delays a request that
    decodes on its worker: by its prefill and, as its answer takes a share of each step, by decoding. For one prompt,
    `weight` is what a second of its own waiting counts against a second of others', and `answer_length` its answer's
    against the usual one."""

    stall_price: float = 0.0
    weight: float = 1.0
    answer_length: float = 1.0


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One worker (one data-parallel rank) as a prompt finds it. Blocks are leading blocks of the prompt."""

    worker: int
    speeds: Speeds
    dp_rank: int = 0
    hbm_blocks: int = 0
    dram_blocks: int = 0  # leading blocks found in HBM or, beyond that, in DRAM
    is_handed_over: bool = False  # those blocks are not in its DRAM, a prefill worker hands them over
    queued_prefill_tokens: int = 0  # of other requests, not counting what they fetch
    fetching_bytes: int = 0  # on their way from the store for other requests
    running_requests: int = 0  # that decode there
    waiting_requests: int = 0  # without a first token, those that fetch with them
    fetching_requests: int = 0
    prefill_share: float = 0.0  # of its time of late, in which it computed prompts
    # Shares of its KV memory, expected answers with them. Above 1 some requests wait for it.
    memory_used: float = 0.0  # booked for other requests
    memory_fetching: float = 0.0  # of that, for those that still fetch
    memory_needed: float = 0.0  # by this request
    answer_seconds: float = 0.0  # for which a request holds its share: from its first token to its last, on average
    # The worker's tier, or 0 where it has none: chunks cannot be fetched.
    blocks_per_chunk: int = 0
    chunk_bytes: int = 0
    located: Sequence[str | None] = ()  # for each chunk of the prompt the target that holds it
    # The target that holds most of them: its share of what is fetched, what others fetch there, what it reads.
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
    pressure_seconds: float  # for those that decode beside it, and those that memory is taken from
    price_seconds: float

    @property
    def prompt_tokens(self) -> int:
        return self.hbm_tokens + self.dram_tokens + self.store_tokens + self.missing_tokens

    @property
    def without_store(self) -> tuple[float, float]:
        """Seconds to the first token and of prefill, had the same worker computed what it loads from the store."""
        local = self.hbm_tokens + self.dram_tokens
        loaded = self.dram_tokens + self.store_tokens
        copy = self.copy_seconds * self.dram_tokens / loaded if loaded else 0.0
        prefill = self.candidate.speeds.prefill.seconds(self.store_tokens + self.missing_tokens, local)
        return self.wait_seconds + copy + prefill, prefill

    @property
    def targets(self) -> list[str | None]:
        """Where the store holds each chunk, from chunk 0 to the last one to be local or loaded."""
        return list(self.candidate.located[: self.first_chunk + self.fetch_chunks])


class _Columns(NamedTuple):
    """Candidates side by side: an array a number, of one column, to be met by rows of numbers of chunks."""

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
    first_chunk: Array  # that is not wholly local
    available_chunks: Array  # from there on, that the store holds without a gap

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
    """The numbers of a Choice, of the same names."""

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


# Added to what may be 0 and is divided by: the number of chunks that follows is then beyond any.
_NO_TIME = 1e-30
_WHOLE = 6  # of the terms are numbers of chunks and tokens


class Choices(Sequence[Choice]):
    """The cheapest choice of each candidate, in their order."""

    def __init__(self, candidates: Sequence[Candidate], terms: Array):
        self._candidates = candidates
        self._terms = terms  # a row a candidate, columns as in _Terms

    @property
    def price_seconds(self) -> Array:
        return self._terms[:, _Terms._fields.index("price_seconds")]

    def least_ttft_but(self, chosen: Choice) -> float | None:
        """Of the other candidates; None if there is no other."""
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
    # A microsecond is far below what the model can tell apart.
    price = choices.price_seconds.round(6)
    chance = np.array([random.random() for _ in candidates])
    rank = np.lexsort((chance, columns.memory_used[:, 0], columns.queued_prefill_tokens[:, 0], price))
    return choices[int(rank[0])], choices


def fetchable(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """For each the first chunk that is not wholly local, and how many chunks from there on the store holds without a
    gap. Candidates may share what was located."""
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
    """For each candidate the numbers of chunks worth a look: none, all, and those around each number, not rounded, at
    which the fetch begins to outlast the wait, on either way, or at which the slower way of the two becomes the other
    one."""
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
    """Seconds until the worker has computed what is queued before this prompt, and has KV memory for it: all of that
    changes hands once in the time that an answer takes. `overtaken` is the share booked for those it comes before."""
    queued = c.queued_prefill_tokens
    prefills = np.where(queued > 0, c.prefill_seconds(queued, np.zeros_like(queued)), 0.0)
    lacking = np.maximum(c.memory_used - overtaken + c.memory_needed - 1, 0)
    wait: Array = np.maximum(prefills, c.answer_seconds * lacking)
    return wait


def _fetch_seconds(c: _Columns, chunks: Array) -> Array:
    """Seconds until `chunks` have come from the store into the worker's DRAM."""
    own = chunks * c.chunk_bytes
    link = (c.fetching_bytes + own) / c.store_bytes_per_second
    devices = (c.target_fetching_bytes + c.target_share * own) / c.target_bytes_per_second
    return np.where(chunks > 0, c.store_latency_seconds + np.maximum(link, devices), 0.0)


def _price(c: _Columns, chunks: Array, in_turn: Array, prompt_tokens: int, block_tokens: int, policy: Policy) -> _Terms:
    """Loading so many chunks, for each candidate (row). `in_turn` is the wait behind all that came before."""
    # The last token of a prompt is always computed: its logits are what is asked for.
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
    # Who fetches nothing gets its memory before those that still fetch. It is sooner by what they are later: that may
    # be predicted, but it is no reason to compute.
    wait = _wait_seconds(c, np.where(chunks > 0, 0.0, c.memory_fetching))
    ttft = np.maximum(wait, fetch) + copy + prefill
    own_link = chunks * c.chunk_bytes / c.store_bytes_per_second
    delayed = (c.waiting_requests + policy.stall_price * c.running_requests) * prefill + c.fetching_requests * own_link
    delay = delayed / policy.weight
    # By its own answers, which take longer there anyway, a slow worker would be left to idle.
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
