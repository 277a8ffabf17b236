"""An upper bound on requests/s for any policy in policy_sim.py, from its flows, without queues or noise.

Three resources are limited. A worker's time goes to prefills and decode steps. A request holds HBM from the start of
its prefill to its last token. The store has a throughput. The bound assumes that HBM and DRAM hold as much of the pool
as they could if idle, at no cost. So no routing and no eviction policy can do better.
"""

from typing import NamedTuple

from benchmarks.routing.engine_model import PREFILL_TOKENS, Hardware
from benchmarks.routing.policy_sim import Conversation, Shape

BATCH_MAX = 128


class Means(NamedTuple):
    """Means over a load's requests, in tokens."""

    prompt: float
    seen_before: float  # prompt tokens from earlier turns or shared prefixes
    decoded: float  # by decode steps: all tokens of the answer but the first
    tokens: float  # of prompt and answer
    held_while_decoding: float  # `tokens` times the number of decode steps, over the answer


def means(shape: Shape, conversations: int = 4000) -> Means:
    sums, requests = [0.0] * 5, 0
    for key in range(1, conversations + 1):
        one, before = Conversation(key, shape, 0), 0
        while one.turn < one.turns:
            total = one.prompt_tokens + one.answer_tokens
            seen, steps = max(before, shape.shared_tokens), one.answer_tokens - 1
            for number, value in enumerate((one.prompt_tokens, seen, steps, total, total * steps)):
                sums[number] += value
            requests += 1
            before = total
            one.go_on()
    return Means(*(value / requests for value in sums))


def requests_per_second(
    shape: Shape, hardware: Hardware, workers: int, pool: int, tpot_seconds_max: float, *, store: bool = True
) -> float:
    """For all workers, with `pool` conversations each. It takes the best recomputed share and the best batch size."""
    load = means(shape)
    pool_rate = hardware.target_bytes_per_second * max(1, workers // hardware.workers_a_target) / workers
    link_rate = min(hardware.worker_bytes_per_second, pool_rate) if store else 0.0
    local = min(1.0, (hardware.hbm_tokens + hardware.dram_tokens) / (pool * load.prompt))
    best = 0.0
    for percent in range(0, 101, 2):
        again = percent / 100
        fetched_bytes = (1 - local) * (1 - again) * load.seen_before * hardware.kv_bytes_per_token
        if fetched_bytes and not link_rate:
            continue
        missing = load.prompt - load.seen_before * (1 - again)
        by_link = link_rate / fetched_bytes if fetched_bytes else float("inf")
        by_gpu = max(_by_gpu(load, hardware, missing, batch, tpot_seconds_max) for batch in range(1, BATCH_MAX + 1))
        best = max(best, min(by_link, by_gpu))
    return workers * best


def _by_gpu(load: Means, hardware: Hardware, missing: float, batch: int, tpot_seconds_max: float) -> float:
    """For one worker that decodes `batch` requests in each step and computes `missing` tokens of each prompt. Each
    limit is crossed once as the rate rises, so bisection finds it."""
    # An underestimate: it omits the quadratic term.
    prefill = hardware.prefill_base_seconds + hardware.prefill_seconds_per_token * missing
    step = hardware.step_seconds(batch)
    low, high = 0.0, 1 / prefill
    for _ in range(30):
        rate = (low + high) / 2
        steps = (1 - rate * prefill) / step + rate * (1 + missing / PREFILL_TOKENS)  # a second
        held = load.held_while_decoding / steps + load.tokens * prefill  # token seconds a request
        # Little's law: tokens in HBM = rate * tokens of a request * time that it holds them.
        fits = rate * load.decoded <= batch * steps and rate * held <= hardware.hbm_tokens
        low, high = (rate, high) if fits and steps * tpot_seconds_max >= 1 else (low, rate)
    return low
