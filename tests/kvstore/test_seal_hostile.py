"""The adversary of benchmarks/store/hostile.py, with few answers."""

import pytest

from benchmarks.store import hostile, hostile_bus, seal
from benchmarks.store.seal import measure, table
from kvstore.seal import Mode

ANSWERS = 400


@pytest.mark.parametrize("mode", list(Mode))
def test_no_manipulated_answer_is_accepted_with_seals(mode: Mode, seed: int) -> None:
    side = hostile.play(mode, seed, ANSWERS)
    assert side.manipulated >= ANSWERS
    assert (side.accepted, side.uncounted) == (0, 0)
    assert side.honest == side.honest_hits > ANSWERS // 20
    assert sum(side.reasons.values()) == side.manipulated
    assert {"altered", "unsealed", "other_key", "format", "length", "miss"} <= side.reasons.keys()


def test_the_same_answers_are_accepted_without(seed: int) -> None:
    side = hostile.play(None, seed, ANSWERS)
    assert side.honest == side.honest_hits
    assert side.accepted > side.manipulated // 2
    # What a crc and a length tell, and what claims nothing.
    told = {"bits flipped, old crc", "truncated", "extended", "cut off", "a miss for what is there"}
    assert not (told | {"an outcome that does not exist"}) & side.accepted_by_kind.keys()


def test_of_an_adversary_on_the_bus_and_in_etcd_nothing_stays(seed: int) -> None:
    """Not one value of a rogue target is accepted, what a router keeps has a bound, and it soon knows what is so."""
    result = hostile_bus.play(seed, 20)
    assert result.failures == []
    assert result.targets_most <= 64
    assert result.table_bytes_most < 32 << 20
    reasons = {
        "invalid_name",
        "invalid_rate",
        "invalid_worker_id",
        "too_many_changes",
        "duplicate_number",
        "conflicting_snapshots",
    }
    assert reasons <= result.ignored.keys()


def test_what_a_seal_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--capacity", "64MiB", "--segment-size", "4MiB", "--buffers", "32MiB", "--hot", "8MiB")
    monkeypatch.setattr(seal, "_TARGET_OPTIONS", sizes)
    monkeypatch.setattr(seal, "_WINDOW_SECONDS", 0.01)
    report = measure(0.01, 1, sizes=(1000,), lock_bytes=1000, batch_bytes=4000)
    assert {row.mode for row in report.rows} == {"off", "mac", "encrypt"}
    assert {(row.mode, row.operation) for row in report.moved} >= {("off", "get"), ("encrypt", "put"), ("tls", "hit")}
    assert len(table(report).splitlines()) == 26
