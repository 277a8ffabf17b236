"""What the worker measures, and what it decides by it: plain arithmetic, checked against its own definition."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

from components.pricing.patience import due_seconds, worth_waiting_for
from components.pricing.prefill import Prefill, PrefillFit
from components.pricing.throughput import Throughput
from components.worker.compat import LaunchedMetadata
from components.worker.step_clock import StepClock, prefilled

CHUNK = 2 << 20


def fitted(truth: Prefill, seed: int, *, noise: float, outliers: float, steps: int = 200) -> Prefill:
    chance = random.Random(seed)
    fit = PrefillFit()
    for _ in range(steps):
        tokens, context = chance.randint(64, 8000), chance.randint(0, 30_000)
        seconds = truth.seconds(tokens, context) * chance.uniform(1 - noise, 1 + noise)
        if chance.random() < outliers:
            seconds *= chance.uniform(3, 20)  # the machine did something else
        fit.add(tokens, tokens * (context + tokens / 2), seconds)
    return fit.fit()


def test_the_prefill_model_is_found_among_noise_and_outliers(seed: int) -> None:
    truth = Prefill(0.02, 1.1e-4, 2e-9)
    found = fitted(truth, seed, noise=0.05, outliers=0.15)
    for tokens, context in ((200, 0), (2200, 0), (8000, 0), (2200, 20_000)):
        assert found.seconds(tokens, context) == pytest.approx(truth.seconds(tokens, context), rel=0.15)


def test_steps_that_seem_to_take_no_time_do_not_make_computing_free(seed: int) -> None:
    """The step after one whose end was noticed late."""
    truth, chance, fit = Prefill(0.03, 1.4e-4, 1e-9), random.Random(seed), PrefillFit()
    for _ in range(200):
        tokens = chance.randint(64, 3000)
        seconds = truth.seconds(tokens, 0) if chance.random() > 0.1 else chance.uniform(1e-5, 5e-3)
        fit.add(tokens, tokens * tokens / 2, seconds)
    found = fit.fit()
    for tokens in (200, 1000, 2200):
        assert found.seconds(tokens, 0) == pytest.approx(truth.seconds(tokens, 0), rel=0.15)


def test_no_coefficient_is_negative_and_little_data_says_nothing(seed: int) -> None:
    found = fitted(Prefill(0.0, 1e-4, 0.0), seed, noise=0.3, outliers=0.2)
    assert min(found) >= 0
    assert not fitted(Prefill(0.02, 1e-4, 0.0), seed, noise=0.0, outliers=0.0, steps=5).known


def test_prompts_of_one_length_still_give_a_model(seed: int) -> None:
    """Three coefficients cannot be told apart then; that length must come out right all the same."""
    fit = PrefillFit()
    for _ in range(50):
        fit.add(2000, 2000 * 1000.0, 0.25)
    assert fit.fit().seconds(2000, 0) == pytest.approx(0.25, rel=0.01)


def test_a_throughput_follows_the_recent_past() -> None:
    speed = Throughput()
    assert speed.bytes_per_second == 0
    for _ in range(100):
        speed.add(1e9, 1.0)
    assert speed.bytes_per_second == pytest.approx(1e9)
    for _ in range(30):
        speed.add(1e8, 1.0)
    assert speed.bytes_per_second == pytest.approx(1e8, rel=0.2)
    speed.add(1e8, 0.0)
    assert speed.bytes_per_second == pytest.approx(1e8, rel=0.2)


speeds = st.floats(1e6, 1e10)
prefills = st.builds(Prefill, st.floats(0, 1), st.floats(0, 1e-2), st.floats(0, 1e-6))


@given(st.integers(1, 5000), st.integers(0, 1 << 34), speeds, prefills, st.integers(0, 100_000), st.floats(-5, 60))
def test_never_past_the_deadline_and_never_clearly_slower_than_computing(
    chunks: int, ahead: int, speed: float, prefill: Prefill, context: int, left: float
) -> None:
    worth = worth_waiting_for(
        chunks,
        chunk_bytes=CHUNK,
        ahead_bytes=ahead,
        bytes_per_second=speed,
        prefill=prefill,
        chunk_tokens=64,
        context_tokens=context,
        seconds_left=left,
    )
    assert 0 <= worth <= chunks
    if worth:
        fetch = (ahead + worth * CHUNK) / speed
        assert fetch <= left * (1 + 1e-9)
        if prefill.known:
            assert fetch <= 1.25 * prefill.saved_seconds(worth * 64, context) * (1 + 1e-9)


@given(st.integers(1, 500), speeds, prefills, st.integers(0, 100_000), st.floats(0.01, 60))
def test_no_other_number_would_save_more(
    chunks: int, speed: float, prefill: Prefill, context: int, left: float
) -> None:
    """With nothing ahead: among all numbers that come in time the answer saves most, or the gain is within doubt."""
    worth = worth_waiting_for(
        chunks,
        chunk_bytes=CHUNK,
        ahead_bytes=0,
        bytes_per_second=speed,
        prefill=prefill,
        chunk_tokens=64,
        context_tokens=context,
        seconds_left=left,
    )

    def gain(number: int) -> float:
        return prefill.saved_seconds(number * 64, context) - number * CHUNK / speed

    in_time = [number for number in range(chunks + 1) if number * CHUNK / speed <= left]
    best = max(map(gain, in_time))
    if prefill.known and worth == 0:
        assert best <= 1e-9
    if prefill.known and worth and best > 0 and gain(worth) > 0:
        assert gain(worth) == pytest.approx(best)


@given(st.integers(1, 500), speeds, prefills, st.floats(0, 1), st.floats(0, 1))
def test_the_more_of_its_time_a_gpu_spends_on_prompts_the_more_is_waited_for(
    chunks: int, speed: float, prefill: Prefill, share: float, other: float
) -> None:
    def worth(prefill_share: float) -> int:
        return worth_waiting_for(
            chunks,
            chunk_bytes=CHUNK,
            ahead_bytes=0,
            bytes_per_second=speed,
            prefill=prefill,
            chunk_tokens=64,
            context_tokens=0,
            seconds_left=2.0,
            prefill_share=prefill_share,
        )

    assert worth(0) <= worth(min(share, other)) <= worth(max(share, other))
    if worth(share) and prefill.known:
        assert worth(share) * CHUNK / speed <= 20 * prefill.saved_seconds(worth(share) * 64, 0) * (1 + 1e-9)


@given(st.integers(1, 500), st.integers(0, 1 << 34), prefills)
def test_what_was_not_measured_decides_nothing(chunks: int, ahead: int, prefill: Prefill) -> None:
    known = {"chunk_bytes": CHUNK, "chunk_tokens": 64, "context_tokens": 0}
    for left, expected in ((1.0, chunks), (0.0, 0), (-1.0, 0)):
        worth = worth_waiting_for(
            chunks, ahead_bytes=ahead, bytes_per_second=0.0, prefill=prefill, seconds_left=left, **known
        )
        assert worth == expected


def test_a_short_prompt_goes_before_the_tail_of_a_long_one_and_a_tail_does_not_wait_for_ever() -> None:
    long = [due_seconds(0.0, chunk, 100 << 20) for chunk in range(0, 100, 10)]
    assert long == sorted(long)
    assert long[0] < due_seconds(0.5, 0, 100 << 20) < long[-1]
    assert due_seconds(60.0, 0, 100 << 20) > long[-1]


# ---- the engine's steps


def step(new: dict[str, int], cached: dict[str, int], scheduled: dict[str, int], spec: dict[str, list[int]]) -> object:
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=done) for name, done in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
        num_scheduled_tokens=scheduled,
        scheduled_spec_decode_tokens=spec,
    )


def test_decodes_are_not_taken_for_prefill() -> None:
    scheduled = {"new": 100, "resumed": 50, "decodes": 1, "speculates": 4}
    output = step({"new": 20}, {"resumed": 200, "decodes": 7, "speculates": 9}, scheduled, {"speculates": [1, 2, 3]})
    assert prefilled(output) == (150, 100 * (20 + 50) + 50 * (200 + 25))
    assert prefilled(step({}, {"decodes": 7}, {"decodes": 1}, {})) == (0, 0.0)


def test_steps_that_overlap_are_timed_from_the_end_of_the_one_before() -> None:
    clock = StepClock()
    for number in range(20):
        clock.begin(1000, 1000 * 500.0, number * 1.0)
        if number:
            clock.end(number * 1.0 + 0.5)  # each takes a second, and the next is scheduled half a second before its end
    assert clock.due(100.0)
    assert not clock.due(100.5)
    assert clock.prefill.seconds(1000, 0) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("copies", [False, True])
def test_the_share_of_prompts_is_of_all_time_whatever_else_the_engine_did(copies: bool) -> None:
    """Prompts take a second each 10,000 tokens, and what decodes between them three times as long."""
    clock, now = StepClock(), 0.0
    for number in range(40):
        size = 500 * (1 + number % 4)
        for tokens in (size, 0):
            clock.begin(tokens, 0.0, now, copies and number >= 20)
            now += size / 10_000 * (1 if tokens else 3)
            clock.end(now)
        clock.due(now)
    assert clock.prefill_share == pytest.approx(0.25, abs=0.1)
    clock.begin(1, 0.0, now + 3600)
    clock.end(now + 3600.01)
    assert clock.prefill_share < 0.05
    for number in range(10):
        clock.begin(5000, 0.0, now + 3601 + number / 2)
        clock.end(now + 3601.5 + number / 2)
    assert clock.prefill_share > 0.75


def launched(clock: StepClock, steps: int, ahead: float, *, under_way: int = 1, offset: float = 0.0) -> None:
    """So many steps of a second, each launched so long before the one before it ends."""
    for number in range(steps + under_way):
        clock.begin(0, 0.0, number - ahead - 0.1)
        if number >= under_way:
            done = number - under_way
            clock.note_worker(LaunchedMetadata(launched=done - ahead + offset))
            clock.end(done + 1.0)


def test_the_scheduler_may_wait_for_as_long_as_steps_are_launched_ahead() -> None:
    clock = StepClock()
    launched(clock, 15, 0.02)
    assert clock.spare_seconds() == 0.0  # not known yet
    clock = StepClock()
    launched(clock, 40, 0.02)
    assert clock.spare_seconds() == pytest.approx(0.018)
    assert clock.spare_seconds(0.015) == pytest.approx(0.005)  # what the copies do not take
    assert clock.spare_seconds(0.03) < 0
    clock.end(41.0)
    assert clock.spare_seconds() == 0.0  # no step is under way


def test_after_long_steps_it_does_not_wait_for_long_in_a_short_one() -> None:
    clock = StepClock()
    launched(clock, 40, 0.5)
    assert clock.spare_seconds() == clock.spare_seconds(0.3) == 0.02
    assert clock.spare_seconds(0.49) == pytest.approx(0.01)


@pytest.mark.parametrize("how", [{"ahead": -0.2}, {"under_way": 2}, {"offset": -1e6}, {"offset": 1e6}], ids=str)
def test_it_does_not_where_steps_are_not_launched_ahead_or_that_cannot_be_told(how: dict[str, Any]) -> None:
    """One after the other, as on a CPU; in a pipeline; by a rank of another host, whose clock is another."""
    clock = StepClock()
    launched(clock, 40, **{"ahead": 0.5} | how)
    assert clock.spare_seconds() == 0.0


def test_a_step_is_launched_when_its_last_rank_has() -> None:
    first = LaunchedMetadata({1: 1}, launched=3.0)
    first.transfer_stats.load.bytes, first.transfer_stats.load.sizes = 5, [5]
    both = first.aggregate(LaunchedMetadata({1: 1, 2: 1}, launched=4.0))
    assert (both.launched, both.completed_jobs, both.transfer_stats.load.bytes) == (4.0, {1: 2, 2: 1}, 5)


def test_copies_to_the_device_are_measured() -> None:
    meta = OffloadingWorkerMetadata()
    meta.transfer_stats.load.bytes, meta.transfer_stats.load.time = 3_000_000, 0.001
    meta.transfer_stats.load.sizes = [3_000_000]
    clock = StepClock()
    clock.note_worker(meta)
    clock.note_worker(None)
    assert clock.dram_bytes_per_second == pytest.approx(3e9)
