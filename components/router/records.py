"""A decision as data, for the page, `kvtier explain` and the history.

Worker ids are in hexadecimal, as in Dynamo's own metrics.
"""

import time
from collections.abc import Iterable
from itertools import groupby

import msgspec

from components.pricing.cost import Choice, Choices


class Considered(msgspec.Struct):
    """A candidate: the tokens that it had cached, and the cost. `price_seconds` is the sum of the terms of `price`."""

    worker: str
    tokens: dict[str, int]  # by source: hbm, dram, store, computed
    seconds: dict[str, float]  # wait, fetch, copy, prefill, ttft; wait and fetch overlap in the ttft
    price: dict[str, float]
    price_seconds: float
    queued_tokens: int = 0  # tokens to prefill in the queue ahead of it
    memory_used: float = 0.0  # share of the KV memory


class Prefilled(msgspec.Struct):
    """A prompt's way through the prefill worker, for the decision on its decode worker."""

    id: str  # of that decision
    worker: str
    tokens: dict[str, int]  # by source
    fetch_chunks: int
    predicted_ttft_seconds: float
    ttft_seconds: float
    prefill_seconds: float  # predicted
    without_store_ttft_seconds: float
    without_store_prefill_seconds: float


class Decision(msgspec.Struct):
    """A prompt: the chosen worker, the reasons, and the outcome. With a prefill worker before it, times to the first
    token begin with the decision on that one."""

    id: str
    time: float  # seconds since 1970
    prompt_tokens: int
    chosen: str
    candidates: list[Considered]
    fetch_chunks: int
    targets: list[tuple[str, int]]  # of the fetched chunks: runs of target and number of chunks
    predicted_ttft_seconds: float
    ttft_seconds: float | None = None
    outcome: str = "open"  # finished, failed or cancelled
    output_tokens: int = 0
    tpot_seconds: float | None = None  # time per output token after the first
    other_ttft_seconds: float | None = None  # lowest prediction for another worker
    # Predictions for the chosen worker if it recomputed the chunks from the store.
    without_store_ttft_seconds: float = 0.0
    without_store_prefill_seconds: float = 0.0
    prefilled: Prefilled | None = None  # if the chosen worker took the KV from a prefill worker

    def on_chosen(self) -> Considered:
        """The chosen worker's candidate."""
        return next(one for one in self.candidates if one.worker == self.chosen)

    def to_decode(self) -> Prefilled:
        """Of an answered prompt of a prefill worker, what its decode worker's decision keeps."""
        chosen = self.on_chosen()
        return Prefilled(
            self.id,
            self.chosen,
            chosen.tokens,
            self.fetch_chunks,
            self.predicted_ttft_seconds,
            self.ttft_seconds or 0.0,
            chosen.seconds["prefill"],
            self.without_store_ttft_seconds,
            self.without_store_prefill_seconds,
        )


def explained(decision_id: str, prompt_tokens: int, chosen: Choice, choices: Choices) -> Decision:
    """A decision with all candidates and targets."""
    decision = record(decision_id, prompt_tokens, chosen, choices)
    fetched = chosen.targets[chosen.first_chunk :]
    decision.targets = [(target or "", sum(1 for _ in same)) for target, same in groupby(fetched)]
    return decision


def record(decision_id: str, prompt_tokens: int, chosen: Choice, shown: Iterable[Choice]) -> Decision:
    """A decision with the candidates `shown`, and without targets."""
    ttft, prefill = chosen.without_store
    return Decision(
        decision_id,
        time.time(),
        prompt_tokens,
        label(chosen),
        [_considered(choice) for choice in shown],
        chosen.fetch_chunks,
        [],
        chosen.ttft_seconds,
        without_store_ttft_seconds=ttft,
        without_store_prefill_seconds=prefill,
    )


def label(choice: Choice) -> str:
    rank = choice.candidate.dp_rank
    return format(choice.candidate.worker, "x") + (f".{rank}" if rank else "")


def sources(choice: Choice) -> dict[str, int]:
    """Tokens of the prompt by source."""
    if choice.candidate.is_handed_over:
        return {"hbm": choice.hbm_tokens, "handover": choice.prompt_tokens - choice.hbm_tokens}
    return {
        "hbm": choice.hbm_tokens,
        "dram": choice.dram_tokens,
        "store": choice.store_tokens,
        "computed": choice.missing_tokens,
    }


def tiers(choice: Choice, block_tokens: int) -> dict[str, int]:
    """Blocks by tier; a partial block counts as missing, or as handed over."""
    hbm = choice.hbm_tokens // block_tokens
    local = (choice.hbm_tokens + choice.dram_tokens) // block_tokens
    loaded = (choice.hbm_tokens + choice.dram_tokens + choice.store_tokens) // block_tokens
    tokens = choice.hbm_tokens + choice.dram_tokens + choice.store_tokens + choice.missing_tokens
    total = -(-tokens // block_tokens)
    if choice.candidate.is_handed_over:
        return {"hbm": hbm, "handover": total - hbm}
    return {"hbm": hbm, "dram": local - hbm, "store": loaded - local, "missing": total - loaded}


def parts(choice: Choice) -> dict[str, float]:
    """The price and its parts, in seconds."""
    return {
        **ttft_parts(choice),
        "delay": choice.delay_seconds,
        "pressure": choice.pressure_seconds,
        "price": choice.price_seconds,
    }


def ttft_parts(choice: Choice) -> dict[str, float]:
    """The predicted TTFT and its parts, of which wait and fetch overlap."""
    return {
        "wait": choice.wait_seconds,
        "fetch": choice.fetch_seconds,
        "copy": choice.copy_seconds,
        "prefill": choice.prefill_seconds,
        "ttft": choice.ttft_seconds,
    }


def _considered(choice: Choice) -> Considered:
    start = max(choice.wait_seconds, choice.fetch_seconds)
    price = {
        "wait": choice.wait_seconds,
        "fetch": start - choice.wait_seconds,  # the part that does not overlap with the wait
        "copy": choice.copy_seconds,
        "prefill": choice.prefill_seconds,
        "delay": choice.delay_seconds,
        "pressure": choice.pressure_seconds,
    }
    return Considered(
        label(choice),
        sources(choice),
        ttft_parts(choice),
        price,
        choice.price_seconds,
        choice.candidate.queued_prefill_tokens,
        choice.candidate.memory_used,
    )
