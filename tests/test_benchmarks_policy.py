"""The simulator of routing policies: deterministic, near what was measured, and better with a store than without."""

import pytest

from benchmarks import policy
from benchmarks.policy_sim import CHAT, Cache, Hardware, Simulation, step_seconds


@pytest.mark.parametrize(("batch", "seconds"), [(1, 0.022), (16, 0.025), (48, 0.032)])
def test_a_decode_step_is_as_measured(batch: int, seconds: float) -> None:
    assert step_seconds(batch) == pytest.approx(seconds)


def test_a_cache_drops_what_was_used_least_recently() -> None:
    cache = Cache(100)
    cache.put(1, 60)
    cache.put(2, 30)
    cache.put(1, 70)
    cache.put(3, 20)
    assert (cache.get(1), cache.get(2), cache.get(3)) == (70, 0, 20)
    assert cache.used_tokens == 90


@pytest.mark.parametrize("name", policy.policies(1))
def test_the_same_seed_gives_the_same_outcome(name: str) -> None:
    outcomes = []
    for _ in range(2):
        store, decide = policy.policies(1)[name]
        sim = Simulation(Hardware(), 2, 16, 160, CHAT, decide, store=store, seed=3)
        outcomes.append(sim.run(20, 10))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].requests_per_second > 1


def test_the_simulator_is_near_what_was_measured() -> None:
    assert all(abs(one.error_percent) < 25 for one in policy.check(quick=True))
