"""The price of a prompt: the cheapest way is found, and what it is made of adds up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from components.pricing import cost
from components.pricing.cost import Candidate, Choice, Policy, Speeds, choose
from components.pricing.patience import patience, worth_waiting_for
from components.pricing.prefill import Prefill
from tests.conftest import cases

SPEEDS = Speeds(
    prefill_base_seconds=0.04,
    prefill_seconds_per_token=1 / 9000,
    prefill_seconds_per_token_squared=1e-9,
    dram_bytes_per_second=25e9,
    store_bytes_per_second=3e9,
    store_latency_seconds=0.002,
)
POLICY = Policy(stall_price=0.2)
BLOCK, CHUNK_BYTES = 16, 16 * 320 * 1024  # Llama-3.1-70B in BF16


def candidate(worker: int = 1, **changes: object) -> Candidate:
    plain = Candidate(worker, SPEEDS, blocks_per_chunk=1, chunk_bytes=CHUNK_BYTES)
    return replace(plain, **changes)


def best(candidates: list[Candidate], tokens: int = 2200) -> Choice:
    return choose(candidates, tokens, BLOCK, POLICY)[0]


speeds = st.builds(
    Speeds,
    prefill_base_seconds=st.floats(0, 0.1),
    prefill_seconds_per_token=st.floats(1e-6, 1e-2),
    prefill_seconds_per_token_squared=st.floats(0, 1e-6),
    dram_bytes_per_second=st.floats(1e8, 1e11),
    store_bytes_per_second=st.floats(1e7, 1e11),
    store_latency_seconds=st.floats(0, 0.1),
)


@settings(max_examples=cases(500))
@given(
    speeds,
    st.integers(1, 3000),
    st.integers(1, 8),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 200),
    st.integers(0, 20_000),
    st.integers(0, 10**9),
    st.integers(0, 20),
    st.floats(0, patience(0.0) - 1),  # beyond, the largest load that a worker waits for is not looked for
    st.integers(0, 10**10),
    st.floats(0.1, 1),
    st.floats(1e7, 1e11),
)
def test_the_kinks_are_as_good_as_all(
    speed: Speeds,
    tokens: int,
    blocks_per_chunk: int,
    hbm: int,
    dram: int,
    chunks: int,
    queued: int,
    fetching: int,
    fetching_requests: int,
    delayed: float,
    owed: int,
    share: float,
    rate: float,
) -> None:
    """The chosen number of chunks is within rounding of the best of every possible number."""
    hbm, dram = min(hbm, tokens // BLOCK), min(dram, tokens // BLOCK)
    chunks = min(chunks, tokens // (BLOCK * blocks_per_chunk))
    one = Candidate(
        1,
        speed,
        hbm_blocks=hbm,
        dram_blocks=max(hbm, dram),
        queued_prefill_tokens=queued,
        fetching_bytes=fetching,
        running_requests=1,
        fetching_requests=fetching_requests,
        blocks_per_chunk=blocks_per_chunk,
        chunk_bytes=CHUNK_BYTES * blocks_per_chunk,
        located=["t"] * chunks,
        target_share=share,
        target_fetching_bytes=owed,
        target_bytes_per_second=rate,
    )
    policy = Policy(stall_price=delayed)
    chosen, _ = choose([one], tokens, BLOCK, policy)
    ((_, available),) = cost.fetchable([one])
    every = np.arange(available + 1, dtype=np.float64)[None, :]
    columns = cost._columns([one])
    prices = cost._price(columns, every, cost._wait_seconds(columns), tokens, BLOCK, policy).price_seconds
    assert chosen.price_seconds <= prices.min() * (1 + 1e-9) + 1e-9
    there = chosen.hbm_tokens + chosen.dram_tokens + chosen.store_tokens
    assert chosen.prefill_seconds == pytest.approx(speed.prefill.seconds(tokens - there, there))


def test_tokens_add_up() -> None:
    choice = best([candidate(hbm_blocks=10, dram_blocks=30, located=["t"] * 100)])
    assert (choice.hbm_tokens, choice.dram_tokens) == (160, 320)
    assert choice.hbm_tokens + choice.dram_tokens + choice.store_tokens + choice.missing_tokens == 2200
    assert choice.targets == ["t"] * (choice.first_chunk + choice.fetch_chunks)


def test_a_fast_store_is_used_and_a_slow_one_is_not() -> None:
    """2,200 tokens of a 70B model are 720 MB: 0.24 s of prefill, 0.24 s at 3 GB/s, 0.072 s at 10."""
    located = ["t"] * 137
    fast = candidate(located=located, speeds=replace(SPEEDS, store_bytes_per_second=10e9))
    slow = candidate(located=located, speeds=replace(SPEEDS, store_bytes_per_second=1e9))
    assert best([fast]).fetch_chunks == 137
    assert best([slow]).fetch_chunks == 0


def test_a_slow_store_is_used_while_the_prompt_queues_anyway() -> None:
    slow = replace(SPEEDS, store_bytes_per_second=1e9)
    queued = candidate(located=["t"] * 137, speeds=slow, queued_prefill_tokens=3000)
    choice = best([queued])
    assert 0 < choice.fetch_chunks < 137  # as much as the wait hides
    assert choice.fetch_seconds == pytest.approx(choice.wait_seconds, abs=0.006)


def test_a_gap_ends_what_can_be_fetched() -> None:
    located = ["t"] * 40 + [None] + ["t"] * 96
    for blocks, found in ((0, (0, 40)), (40, (40, 0)), (41, (41, 96)), (137, (137, 0)), (200, (200, 0))):
        assert cost.fetchable([candidate(located=located, hbm_blocks=blocks)]) == [found]
    assert cost.fetchable([candidate(located=located, blocks_per_chunk=0)]) == [(0, 0)]


def test_hits_win_until_the_queue_outweighs_them() -> None:
    warm = candidate(1, hbm_blocks=130)
    cold = candidate(2)
    assert best([warm, cold]).candidate.worker == 1
    assert best([replace(warm, queued_prefill_tokens=20_000), cold]).candidate.worker == 2


def test_the_store_makes_any_worker_a_warm_one() -> None:
    fast = replace(SPEEDS, store_bytes_per_second=20e9)
    busy = candidate(1, speeds=fast, hbm_blocks=130, queued_prefill_tokens=8000)
    idle = candidate(2, speeds=fast, located=["t"] * 137)
    choice = best([busy, idle])
    assert choice.candidate.worker == 2
    assert choice.store_tokens > 2000


def test_requests_without_a_first_token_make_fetching_worth_more_and_those_that_fetch_make_it_worth_less() -> None:
    """As long as the worker would wait for it."""
    one = candidate(located=["t"] * 137, speeds=replace(SPEEDS, store_bytes_per_second=2.9e9), prefill_share=0.3)
    assert best([one]).fetch_chunks == 0
    assert best([replace(one, waiting_requests=4)]).fetch_chunks == 137
    assert best([replace(one, waiting_requests=4, fetching_requests=9)]).fetch_chunks == 0
    slow = replace(one, speeds=replace(SPEEDS, store_bytes_per_second=1e9), waiting_requests=50)
    assert best([slow]).fetch_chunks == 0


def test_a_prefill_goes_where_it_delays_fewer_requests() -> None:
    """Whether these decode, or have no first token yet."""
    crowd, calm = candidate(1, waiting_requests=3), candidate(2, running_requests=3)
    chosen, choices = choose([crowd, calm], 2200, BLOCK, POLICY)
    assert chosen.candidate.worker == 2
    assert [one.delay_seconds for one in choices] == pytest.approx(
        [count * chosen.prefill_seconds for count in (3, 3 * POLICY.stall_price)]
    )


def test_a_full_memory_is_waited_for_as_long_as_that_much_of_it_takes_to_change_hands() -> None:
    full = candidate(memory_used=1.3, memory_needed=0.2, answer_seconds=4.0)
    assert best([full]).wait_seconds == pytest.approx(2.0)
    assert best([full, candidate(2, queued_prefill_tokens=9000)]).candidate.worker == 2
    assert best([replace(full, memory_used=0.7)]).wait_seconds == 0
    assert best([replace(full, queued_prefill_tokens=90_000)]).wait_seconds > 10  # the longer of the two


def test_to_compute_for_a_sooner_place_in_the_memory_is_predicted_and_not_rewarded() -> None:
    stored = {"located": ["t"] * 137, "memory_needed": 0.1, "answer_seconds": 4.0}
    behind, none_fetch = (candidate(memory_used=1.5, memory_fetching=share, **stored) for share in (1.0, 0.0))
    computed = replace(behind, located=[])
    assert best([computed]).ttft_seconds < best([behind]).ttft_seconds
    assert best([computed]).price_seconds > best([behind]).price_seconds
    assert best([behind]).fetch_chunks == best([none_fetch]).fetch_chunks > 0


def test_ties_go_to_the_least_loaded_and_then_to_chance() -> None:
    free = Policy()
    fuller = candidate(1, memory_used=0.9)
    assert {choose([fuller, candidate(2)], 100, BLOCK, free)[0].candidate.worker for _ in range(20)} == {2}
    assert {choose([candidate(1), candidate(2)], 100, BLOCK, free)[0].candidate.worker for _ in range(50)} == {1, 2}


def test_the_last_token_is_always_computed() -> None:
    choice = best([candidate(hbm_blocks=4)], tokens=64)
    assert choice.missing_tokens == 1


def test_nobody_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        choose([], 10, BLOCK, POLICY)


@given(
    st.integers(1, 200),
    st.integers(0, 10_000),
    st.integers(0, 10**9),
    st.integers(0, 10**10),
    st.floats(0, 1),
    st.floats(1e7, 1e11),
    st.floats(1.0, 10.0),
    st.sampled_from(["prefill_seconds_per_token", "dram_bytes_per_second", "store_bytes_per_second"]),
)
def test_faster_is_never_dearer_and_no_load_is_slower_than_recompute(
    chunks: int, queued: int, fetching: int, owed: int, share: float, rate: float, factor: float, what: str
) -> None:
    one = candidate(
        queued_prefill_tokens=queued,
        fetching_bytes=fetching,
        located=["t"] * chunks,
        target_share=share,
        target_fetching_bytes=owed,
        target_bytes_per_second=rate,
    )
    price = best([one], 3200).price_seconds
    now = getattr(SPEEDS, what)
    faster = replace(SPEEDS, **{what: now / factor if what.startswith("prefill") else now * factor})
    better = replace(one, speeds=faster)
    assert best([better], 3200).price_seconds <= price + 1e-9
    assert best([replace(one, target_bytes_per_second=rate * factor)], 3200).price_seconds <= price + 1e-9
    free = Policy()
    with_store, _ = choose([one], 3200, BLOCK, free)
    without, _ = choose([replace(one, located=())], 3200, BLOCK, free)
    assert with_store.ttft_seconds <= without.ttft_seconds + 1e-9


@given(
    st.integers(1, 200), st.integers(0, 64), st.integers(1, 64), st.floats(0, 2), st.floats(1e8, 1e10), st.floats(0, 1)
)
def test_the_more_decode_there_the_less_is_computed(
    chunks: int, running: int, more: int, stall_price: float, rate: float, share: float
) -> None:
    """A prefill delays every request that decodes on its worker, so that loading pays sooner there."""
    policy = replace(POLICY, stall_price=stall_price)
    speed = replace(SPEEDS, store_bytes_per_second=rate)
    calm = candidate(located=["t"] * chunks, speeds=speed, running_requests=running, prefill_share=share)
    crowded = replace(calm, running_requests=running + more)
    in_calm, in_crowd = (choose([one], 3200, BLOCK, policy)[0] for one in (calm, crowded))
    assert in_crowd.prefill_seconds <= in_calm.prefill_seconds
    assert in_crowd.price_seconds >= in_calm.price_seconds
    assert in_calm.delay_seconds == pytest.approx(stall_price * running * in_calm.prefill_seconds)


@given(speeds, st.integers(1, 200), st.integers(0, 64), st.floats(0, 1), st.integers(0, 64), st.floats(0, 2))
def test_what_is_to_be_fetched_while_a_worker_could_compute_it_would_wait_for(
    speed: Speeds, chunks: int, running: int, share: float, waiting: int, stall_price: float
) -> None:
    """Or a plan says load, and the worker gives it up and computes."""
    one = candidate(located=["t"] * chunks, speeds=speed, running_requests=running, prefill_share=share)
    choice, _ = choose([replace(one, waiting_requests=waiting)], 3200, BLOCK, Policy(stall_price))
    worth = worth_waiting_for(
        choice.fetch_chunks,
        chunk_bytes=CHUNK_BYTES,
        ahead_bytes=0,
        bytes_per_second=speed.store_bytes_per_second,
        prefill=Prefill(
            speed.prefill_base_seconds, speed.prefill_seconds_per_token, speed.prefill_seconds_per_token_squared
        ),
        chunk_tokens=BLOCK,
        context_tokens=0,
        seconds_left=1e9,
        prefill_share=share,
    )
    assert worth == choice.fetch_chunks


@settings(max_examples=cases(300))
@given(st.data())
def test_a_dominated_worker_is_never_preferred(data: st.DataObject) -> None:
    """One that holds less, has more to do and is slower in everything costs no less."""

    def more(value: int, most: int) -> int:
        return data.draw(st.integers(value, most))

    hbm, dram = sorted((more(0, 200), more(0, 200)))
    better = candidate(
        1,
        hbm_blocks=hbm,
        dram_blocks=dram,
        located=["t"] * more(0, 200),
        queued_prefill_tokens=more(0, 20_000),
        fetching_bytes=more(0, 10**9),
        running_requests=more(0, 64),
        prefill_share=data.draw(st.floats(0, 1)),
        memory_used=data.draw(st.floats(0, 2)),
        memory_needed=data.draw(st.floats(0, 1)),
        answer_seconds=data.draw(st.floats(0, 10)),
        # What lies in DRAM is copied, even where computing it would be quicker: here it is not.
        speeds=replace(
            data.draw(speeds),
            prefill_seconds_per_token=data.draw(st.floats(1e-4, 1e-2)),
            dram_bytes_per_second=data.draw(st.floats(1e10, 1e11)),
        ),
    )
    less_hbm = data.draw(st.integers(0, hbm))
    slower = data.draw(st.floats(1, 10))
    worse = replace(
        better,
        worker=2,
        hbm_blocks=less_hbm,
        dram_blocks=data.draw(st.integers(less_hbm, dram)),
        located=better.located[: more(0, 200)],
        queued_prefill_tokens=more(better.queued_prefill_tokens, 40_000),
        fetching_bytes=more(better.fetching_bytes, 2 * 10**9),
        running_requests=more(better.running_requests, 128),
        prefill_share=data.draw(st.floats(better.prefill_share, 1)),
        memory_used=data.draw(st.floats(better.memory_used, 2)),
        memory_needed=data.draw(st.floats(better.memory_needed, 1)),
        answer_seconds=data.draw(st.floats(better.answer_seconds, 10)),
        speeds=Speeds(
            better.speeds.prefill_base_seconds * slower,
            better.speeds.prefill_seconds_per_token * slower,
            better.speeds.prefill_seconds_per_token_squared * slower,
            better.speeds.dram_bytes_per_second / slower,
            better.speeds.store_bytes_per_second / slower,
            better.speeds.store_latency_seconds * slower,
        ),
    )
    # Where a prefill delays more than that, a load that does not save enough is out, whatever its price.
    policy = Policy(data.draw(st.floats(0, 1)) * (patience(0.0) - 1) / max(1, worse.running_requests))
    _, (of_better, of_worse) = choose([better, worse], 3200, BLOCK, policy)
    assert of_better.price_seconds <= of_worse.price_seconds + 1e-9


def test_a_prompt_goes_where_its_answer_delays_others_less() -> None:
    """Even where its first token comes a little later, and the more so, the longer answers take."""
    full = candidate(1, memory_used=0.9, answer_seconds=10.0)
    free = candidate(2, queued_prefill_tokens=2000, answer_seconds=10.0)
    policy = Policy(stall_price=0.2)
    assert choose([full, free], 3200, BLOCK, policy)[0].candidate.worker == 2
    brief = [replace(one, answer_seconds=0.1) for one in (full, free)]
    assert choose(brief, 3200, BLOCK, policy)[0].candidate.worker == 1


def test_a_prompt_that_counts_more_has_its_first_token_sooner_at_others_cost_and_one_that_counts_less_spares_them() -> (
    None
):
    full = candidate(1, memory_used=0.9, answer_seconds=10.0)
    free = candidate(2, queued_prefill_tokens=10_000, answer_seconds=10.0)
    workers = []
    for weight in (0.1, 1.0, 10.0):
        policy = Policy(stall_price=0.1, weight=weight)
        chosen, choices = choose([full, free], 3200, BLOCK, policy)
        assert chosen.price_seconds == choices.price_seconds.min()
        workers.append(chosen.candidate.worker)
    assert workers == [2, 1, 1]
    long = Policy(stall_price=0.1, answer_length=10.0)
    assert choose([full, free], 3200, BLOCK, long)[0].candidate.worker == 2
