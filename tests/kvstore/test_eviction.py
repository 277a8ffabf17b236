"""The order of eviction: what may be chosen, what is kept, and that everything is bounded."""

from collections.abc import Callable, Sequence
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.store.eviction import (
    Fifo,
    Kvtier,
    Policy,
    S3Fifo,
    SegmentStore,
    Turn,
    chat,
    hits_lru,
    hits_optimum,
    hits_segments,
    hits_unbounded,
)
from kvstore.disk import eviction
from kvstore.disk.eviction import SLOTS_MIN, Eviction
from tests.conftest import cases

SLOTS = 16
VALUES = 8


def filled(slots: int, values: int = VALUES) -> Eviction:
    """Every slot sealed, in order."""
    policy = Eviction(slots)
    for slot in range(slots):
        policy.opened(slot)
        policy.sealed(slot, values)
    return policy


def hit(policy: Eviction, slot: int, numbers: Sequence[int], times: int = 1) -> None:
    for number in numbers:
        for _ in range(times):
            policy.hit(slot, number)


def live(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(enumerate(lengths))


def test_nothing_to_choose() -> None:
    policy = Eviction(SLOTS)
    assert policy.choose() is None
    policy.opened(0)
    assert policy.choose() is None


def test_unused_segments_go_oldest_first() -> None:
    policy = filled(SLOTS)
    assert [policy.choose() for _ in range(SLOTS + 1)] == [*range(SLOTS), None]


def test_a_used_segment_gets_another_turn_and_only_one() -> None:
    policy = filled(SLOTS)
    hit(policy, 0, range(VALUES), times=3)
    assert [policy.choose() for _ in range(SLOTS)] == [*range(1, SLOTS), 0]
    assert policy.emptied(0, live([1] * VALUES), 100) == [], "its hits are from the turn before"


def test_the_last_one_in_the_line_is_chosen_with_its_hits() -> None:
    policy = filled(SLOTS)
    for slot in range(SLOTS):
        hit(policy, slot, range(VALUES))
    assert policy.choose() == SLOTS - 1
    assert policy.emptied(SLOTS - 1, live([1] * VALUES), 100) == list(range(VALUES))


def test_hits_in_an_open_segment_count() -> None:
    policy = Eviction(SLOTS)
    for slot in (0, 1):
        policy.opened(slot)
        if slot == 0:
            hit(policy, slot, [5, 2, 0, 7])
        policy.sealed(slot, VALUES)
    assert policy.choose() == 1


def test_sealing_says_how_many_values_the_hits_are_a_share_of() -> None:
    policy = filled(SLOTS, values=100)
    hit(policy, 0, [0])
    assert policy.choose() == 0


def test_the_hottest_are_written_again_within_the_budget() -> None:
    policy = filled(SLOTS)
    hit(policy, 0, [4], times=1000)
    hit(policy, 0, [6], times=2)
    hit(policy, 0, [1, 3])
    assert policy.emptied(0, live([10] * VALUES), 35) == [4, 6, 1]
    assert policy.emptied(0, live([10, 10, 10, 10, 40, 10, 10, 10]), 35) == [6, 1, 3], (
        "what fits, if the hottest do not"
    )
    assert policy.emptied(0, live([10] * VALUES), 0) == []


def test_a_value_that_is_no_longer_live_is_not_written_again() -> None:
    policy = filled(SLOTS)
    hit(policy, 0, [1, 2])
    assert policy.emptied(0, [(2, 10), (3, 10)], 100) == [2]


def test_what_the_budget_cannot_save_stays_in_its_segment() -> None:
    def next_choice(spare_bytes: int) -> int | None:
        policy = filled(SLOTS)
        policy.emptied(SLOTS - 1, live([100] * VALUES), spare_bytes)
        hit(policy, 0, range(2))
        return policy.choose()

    assert next_choice(spare_bytes=0) == 1
    assert next_choice(spare_bytes=400) == 0


def test_a_reopened_slot_begins_anew() -> None:
    policy = filled(SLOTS)
    hit(policy, 0, range(VALUES))
    policy.opened(0)
    policy.sealed(0, VALUES)
    assert policy.emptied(0, live([1] * VALUES), 100) == []


def test_few_slots_are_plain_fifo() -> None:
    policy = filled(SLOTS_MIN - 1)
    for slot in range(SLOTS_MIN - 1):
        hit(policy, slot, range(VALUES), times=3)
    for slot in range(SLOTS_MIN - 1):
        assert policy.choose() == slot
        assert policy.emptied(slot, live([1] * VALUES), 100) == []


@pytest.mark.parametrize("slots", [SLOTS, 1000])
def test_choose_looks_at_a_bounded_number_of_segments(slots: int) -> None:
    policy = filled(slots)
    for slot in range(slots):
        hit(policy, slot, range(VALUES))
    assert policy.choose() == min(slots - 1, eviction._SECOND_CHANCES_MAX)


@given(hits=st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, VALUES - 1)), max_size=300))
def test_every_sealed_slot_is_chosen_once(hits: list[tuple[int, int]]) -> None:
    policy = filled(SLOTS)
    for slot, number in hits:
        policy.hit(slot, number)
    assert sorted(policy.choose() for _ in range(SLOTS)) == list(range(SLOTS))  # type: ignore[type-var]
    assert policy.choose() is None


@settings(max_examples=cases(200))
@given(data=st.data(), slots=st.sampled_from([2, SLOTS_MIN - 1, SLOTS_MIN, 20]))
def test_as_a_log_would_use_it(data: st.DataObject, slots: int) -> None:
    policy = Eviction(slots)
    free, open_, sealed = list(range(slots)), dict[int, int](), dict[int, int]()
    counts: dict[tuple[int, int], int] = {}
    for _ in range(data.draw(st.integers(0, 60))):
        match data.draw(st.sampled_from(["open", "store", "hit", "hit", "seal", "choose"])):
            case "open" if free:
                slot = free.pop(0)
                policy.opened(slot)
                open_[slot] = 0
            case "store" if open_:
                open_[data.draw(st.sampled_from(sorted(open_)))] += 1
            case "hit":
                places = [(slot, number) for slot, size in (open_ | sealed).items() for number in range(size)]
                if places:
                    place = data.draw(st.sampled_from(places))
                    policy.hit(*place)
                    counts[place] = counts.get(place, 0) + 1
            case "seal" if open_:
                slot = data.draw(st.sampled_from(sorted(open_)))
                sealed[slot] = open_.pop(slot)
                policy.sealed(slot, sealed[slot])
            case "choose":
                chosen = policy.choose()
                assert (chosen in sealed) if sealed else chosen is None
                if chosen is not None:
                    _check_emptied(policy, data, chosen, sealed.pop(chosen), counts)
                    counts = {place: count for place, count in counts.items() if place[0] != chosen}
                    free.append(chosen)


def _check_emptied(
    policy: Eviction, data: st.DataObject, slot: int, size: int, counts: dict[tuple[int, int], int]
) -> None:
    numbers = [number for number in range(size) if data.draw(st.booleans())]
    values = [(number, data.draw(st.integers(1, 50))) for number in numbers]
    budget = data.draw(st.integers(0, 100))
    again = policy.emptied(slot, values, budget)
    lengths = dict(values)
    assert len(set(again)) == len(again)
    assert sum(lengths[number] for number in again) <= budget
    assert all(counts.get((slot, number)) for number in again), "only what was asked for is written again"


# ---- in a store


def store(policy: Callable[[int], Policy], slots: int = 40) -> SegmentStore:
    return SegmentStore(slots, VALUES, policy(slots))


def read(stored: SegmentStore, chunks: Sequence[int]) -> int:
    hits = 0
    for chunk in chunks:
        if chunk in stored.where:
            stored.hit(*stored.where[chunk])
            hits += 1
    return hits


@pytest.mark.parametrize(("policy", "kept"), [(Kvtier, 160), (Fifo, 0)])
def test_a_scan_does_not_flush_what_is_in_use(policy: Callable[[int], Policy], kept: int) -> None:
    """FIFO is the control: there it does."""
    stored = store(policy)
    used = range(160)  # half of the store
    for chunk in used:
        stored.put(chunk)
    for burst in range(1000, 3000, 40):
        for chunk in range(burst, burst + 40):
            stored.put(chunk)
        read(stored, used)
    assert read(stored, used) == kept
    assert stored.written_bytes <= 1.1 * stored.accepted_bytes


def test_what_is_in_use_among_what_is_not_outlives_the_scan() -> None:
    """One value of each segment: too few for another turn, so they are written again, and then lie together."""
    stored = store(Kvtier)
    used = range(0, 64, 32)
    for chunk in range(64):
        stored.put(chunk)
    for burst in range(1000, 3000, 40):
        read(stored, used)
        for chunk in range(burst, burst + 40):
            stored.put(chunk)
    assert read(stored, used) == len(used)
    assert read(stored, range(64)) == len(used)


TURNS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 2)), max_size=60)


@given(turns=TURNS, capacity=st.integers(1, 40), policy=st.sampled_from([Kvtier, Fifo, S3Fifo]))
def test_nothing_beats_the_optimum(
    turns: list[tuple[int, int, int]], capacity: int, policy: Callable[[int], Policy]
) -> None:
    trace = [
        Turn(128 * prompt, chunks[:prompt], chunks)
        for conversation, prompt, answer in turns
        for chunks in [list(range(100 * conversation, 100 * conversation + prompt + answer))]
    ]
    assert hits_lru(trace, capacity) <= hits_optimum(trace, capacity) <= hits_unbounded(trace)
    assert hits_segments(trace, 12 * 2, 2, policy)[0] <= hits_optimum(trace, 12 * 2)
    assert hits_optimum(trace, 1000) == hits_unbounded(trace)


@pytest.mark.parametrize(("policy", "slots"), [(Kvtier, 20), (Fifo, 20), (S3Fifo, 150)])
def test_a_simulated_store_holds_no_more_than_its_capacity(policy: Callable[[int], Policy], slots: int) -> None:
    """The seed is one with which rewriting fills the segment that it just began."""
    stored = SegmentStore(slots, 2, policy(slots))
    for turn in chat(seed=2, conversations=100):
        read(stored, list(takewhile(stored.where.__contains__, turn.prompt)))
        for chunk in turn.chunks:
            if chunk not in stored.where:
                stored.put(chunk)
                assert stored.where[chunk][1] < 2
        assert len(stored.where) <= 2 * slots


def test_more_hits_than_fifo_within_the_bound_on_writes() -> None:
    trace = chat(seed=7, conversations=200)
    capacity = len({chunk for turn in trace for chunk in turn.chunks}) // 5
    hits, write_amplification = hits_segments(trace, capacity, VALUES, Kvtier)
    assert hits > 1.05 * hits_segments(trace, capacity, VALUES, Fifo)[0]
    assert write_amplification <= 1.1
