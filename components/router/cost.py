"""What it costs, in seconds, to serve a prompt on a worker. Pure functions of plain data: no I/O, no clock.

For worker w and a plan that loads r chunks from the store:

    start  = max(wait(w), fetch(w, r))          # the fetch runs while the request queues
    ttft   = start + copy DRAM -> HBM + prefill(what is still missing | what is there)
    price  = ttft + gpu_price * prefill + decode pressure of w

r is chosen with w: "load all", "load some" and "recompute" are one decision. Over r the price is a sum of a concave
function (less prefill) and linear ones, with kinks where the fetch outlasts the wait and where its narrow place moves
from the worker's link to the target's devices, so that its minimum lies at no chunk, at every chunk or at a kink: a
handful of candidates, however long the prompt.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speeds:
    """How fast a worker and its way to the store are. Rates are per second; the prefill model is
    `base + per_token * m + per_token_squared * m * (c + m / 2)` seconds for m tokens on top of c."""

    prefill_base_seconds: float
    prefill_seconds_per_token: float
    prefill_seconds_per_token_squared: float
    dram_bytes_per_second: float
    store_bytes_per_second: float
    store_latency_seconds: float


@dataclass(frozen=True)
class Policy:
    """What a second is worth. `gpu_price` is what a GPU second costs when every worker is busy; a worker whose KV
    memory is full is charged `pressure_seconds`. `stall_price` is what a second costs by which a prefill delays one
    request that decodes on the same worker."""

    gpu_price: float
    pressure_seconds: float
    stall_price: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One worker (one data-parallel rank) as a prompt finds it. Blocks are leading blocks of the prompt."""

    worker: int
    speeds: Speeds
    dp_rank: int = 0
    hbm_blocks: int = 0
    dram_blocks: int = 0  # leading blocks found in HBM or, beyond that, in DRAM
    queued_prefill_tokens: int = 0  # of other requests, not counting what they fetch
    fetching_bytes: int = 0  # on their way from the store for other requests
    running_requests: int = 0  # that decode there
    memory_used: float = 0.0  # share of KV memory held by running requests
    # The worker's tier, or None where it has none: chunks cannot be fetched.
    blocks_per_chunk: int = 0
    chunk_bytes: int = 0
    located: Sequence[str | None] = ()  # for each chunk of the prompt the target that holds it
    # The target that holds most of them: its share of what is fetched, what others fetch there, what it reads.
    target_share: float = 0.0
    target_fetching_bytes: int = 0
    target_bytes_per_second: float = math.inf


@dataclass(frozen=True)
class Choice:
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
    gpu_seconds: float  # what the prefill is charged beyond its own time, for delaying others
    pressure_seconds: float  # for memory that runs short
    price_seconds: float

    @property
    def targets(self) -> list[str | None]:
        """Where the store holds each chunk, from chunk 0 to the last one to be local or loaded."""
        return list(self.candidate.located[: self.first_chunk + self.fetch_chunks])


def prefill_seconds(speeds: Speeds, missing_tokens: int, context_tokens: int) -> float:
    """Seconds to compute `missing_tokens` that follow `context_tokens`."""
    attended = missing_tokens * (context_tokens + missing_tokens / 2)
    return (
        speeds.prefill_base_seconds
        + speeds.prefill_seconds_per_token * missing_tokens
        + speeds.prefill_seconds_per_token_squared * attended
    )


def wait_seconds(candidate: Candidate) -> float:
    """Seconds until the worker has computed what is queued before this prompt."""
    if candidate.queued_prefill_tokens <= 0:
        return 0.0
    return prefill_seconds(candidate.speeds, candidate.queued_prefill_tokens, 0)


def fetch_seconds(candidate: Candidate, chunks: int) -> float:
    """Seconds until `chunks` have come from the store into the worker's DRAM."""
    if chunks == 0:
        return 0.0
    own = chunks * candidate.chunk_bytes
    link = (candidate.fetching_bytes + own) / candidate.speeds.store_bytes_per_second
    devices = (candidate.target_fetching_bytes + candidate.target_share * own) / candidate.target_bytes_per_second
    return candidate.speeds.store_latency_seconds + max(link, devices)


def _kinks(candidate: Candidate, wait: float) -> list[float]:
    """Numbers of chunks, not rounded, at which the fetch begins to outlast the wait, on either way, or at which the
    slower way of the two becomes the other one."""
    link_seconds = candidate.chunk_bytes / candidate.speeds.store_bytes_per_second
    link_before = candidate.fetching_bytes / candidate.speeds.store_bytes_per_second
    devices_seconds = candidate.target_share * candidate.chunk_bytes / candidate.target_bytes_per_second
    devices_before = candidate.target_fetching_bytes / candidate.target_bytes_per_second
    spare = wait - candidate.speeds.store_latency_seconds
    kinks = [(spare - link_before) / link_seconds]
    if devices_seconds:
        kinks.append((spare - devices_before) / devices_seconds)
    if devices_seconds != link_seconds:
        kinks.append((link_before - devices_before) / (devices_seconds - link_seconds))
    return kinks


def choose(
    candidates: Iterable[Candidate], prompt_tokens: int, block_tokens: int, policy: Policy
) -> tuple[Choice, list[Choice]]:
    """The cheapest choice, and the cheapest of each candidate. Ties go to the least loaded worker, then to chance.

    Raises ValueError without candidates.
    """
    candidates = list(candidates)
    busy = sum(candidate.queued_prefill_tokens > 0 for candidate in candidates)
    gpu_price = policy.gpu_price * busy / max(1, len(candidates))
    choices = [_cheapest(candidate, prompt_tokens, block_tokens, policy, gpu_price) for candidate in candidates]
    if not choices:
        raise ValueError("no candidates")

    def rank(choice: Choice) -> tuple[float, int, float, float]:
        candidate = choice.candidate
        # A microsecond is far below what the model can tell apart.
        return round(choice.price_seconds, 6), candidate.queued_prefill_tokens, candidate.memory_used, random.random()

    return min(choices, key=rank), choices


def _cheapest(candidate: Candidate, prompt_tokens: int, block_tokens: int, policy: Policy, gpu_price: float) -> Choice:
    first, available = fetchable(candidate)
    wait = wait_seconds(candidate)
    counts = {0, available}
    if available and candidate.chunk_bytes:
        for kink in _kinks(candidate, wait):
            below = math.floor(min(max(kink, 0), available))
            counts |= {below, min(below + 1, available)}
    return min(
        (_price(candidate, first, count, prompt_tokens, block_tokens, policy, gpu_price) for count in sorted(counts)),
        key=lambda choice: choice.price_seconds,
    )


def fetchable(candidate: Candidate) -> tuple[int, int]:
    """The first chunk that is not wholly local, and how many chunks from there on the store holds without a gap."""
    if not candidate.blocks_per_chunk:
        return 0, 0
    local_blocks = max(candidate.hbm_blocks, candidate.dram_blocks)
    first = local_blocks // candidate.blocks_per_chunk
    count = 0
    for target in candidate.located[first:]:
        if target is None:
            break
        count += 1
    return first, count


def _price(
    candidate: Candidate,
    first_chunk: int,
    chunks: int,
    prompt_tokens: int,
    block_tokens: int,
    policy: Policy,
    gpu_price: float,
) -> Choice:
    # The last token of a prompt is always computed: its logits are what is asked for.
    most = prompt_tokens - 1
    hbm = min(candidate.hbm_blocks * block_tokens, most)
    local = min(max(candidate.hbm_blocks, candidate.dram_blocks) * block_tokens, most)
    loaded = local
    if chunks:
        loaded = max(local, min((first_chunk + chunks) * candidate.blocks_per_chunk * block_tokens, most))
    copied_bytes = 0.0
    if candidate.blocks_per_chunk:
        copied_bytes = (loaded - hbm) * candidate.chunk_bytes / (candidate.blocks_per_chunk * block_tokens)
    wait = wait_seconds(candidate)
    fetch = fetch_seconds(candidate, chunks)
    copy = copied_bytes / candidate.speeds.dram_bytes_per_second
    prefill = prefill_seconds(candidate.speeds, prompt_tokens - loaded, loaded)
    gpu = (gpu_price + policy.stall_price * candidate.running_requests) * prefill
    ttft = max(wait, fetch) + copy + prefill
    return Choice(
        candidate=candidate,
        first_chunk=first_chunk,
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
        gpu_seconds=gpu,
        pressure_seconds=policy.pressure_seconds * candidate.memory_used,
        price_seconds=ttft + gpu + policy.pressure_seconds * candidate.memory_used,
    )
