"""The simulator of routing policies: deterministic, near what was measured, never above the bound of its flows; the
router's predictions in it."""

from collections import Counter

import pytest

from benchmarks.chat import waiting
from benchmarks.routing import policy, policy_bound, policy_rules, prediction_sim
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_sim import CHAT, KIMI, Cache, ClosedLoop, Policy, Request, Simulation
from benchmarks.routing.trace import Traced


@pytest.mark.parametrize(("batch", "seconds"), [(1, 0.022), (16, 0.025), (48, 0.032)])
def test_a_decode_step_is_as_measured(batch: int, seconds: float) -> None:
    assert Hardware().step_seconds(batch) == pytest.approx(seconds)


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
        store, (make, *_) = policy.policies(1)[name]
        sim = ClosedLoop(Hardware(), 2, 16, 160, CHAT, make(), store=store, seed=3)
        outcomes.append(sim.run(20, 10))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].requests_per_second > 1


def test_the_simulator_is_near_what_was_measured() -> None:
    assert all(abs(one.error_percent) < 25 for one in policy.check(quick=True))


def test_workers_that_hold_a_prompt_are_found_as_if_all_were_asked() -> None:
    rule = policy_rules.dynamo(0.0)

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        one = request.conversation
        assert sim.seen_by_all(one) == [sim.seen(worker, one) for worker in sim.workers]
        return rule(sim, request)

    ClosedLoop(Hardware(), 4, 32, 160, policy.AGENTS, decide, store=True).run(20, 0)


@pytest.mark.parametrize("load", policy.LOADS)
def test_no_policy_passes_the_bound(load: str) -> None:
    one = policy.LOADS[load]
    hardware = Hardware(hbm_tokens=one.hbm_tokens, dram_tokens=one.dram_tokens)
    bound = policy_bound.requests_per_second(one.shape, hardware, 2, policy.POOL, policy.TPOT_MS_MAX / 1000)
    for name in ("round robin", "dynamo", "lmetric", "kvtier"):
        store, (make, *_) = policy.policies(1)[name]
        for clients in one.clients[::3]:
            sim = ClosedLoop(hardware, 2, 2 * clients, 2 * policy.POOL, one.shape, make(), store=store)
            found = sim.run(120, 30)
            assert found.tpot_ms_mean > policy.TPOT_MS_MAX or found.requests_per_second < bound


def test_the_load_after_mooncakes_trace_has_its_published_means() -> None:
    means = policy_bound.means(KIMI)
    assert means.prompt == pytest.approx(7590, rel=0.05)
    assert means.decoded + 1 == pytest.approx(182, rel=0.05)
    assert means.seen_before / means.prompt == pytest.approx(0.5, abs=0.03)


def test_with_many_workers_looking_at_some_chooses_as_looking_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    for many in (policy_rules.MANY_WORKERS, 1000):
        monkeypatch.setattr(policy_rules, "MANY_WORKERS", many)
        rule: Policy = policy_rules.ours(1)
        sim = ClosedLoop(Hardware(), 40, 40 * 12, 40 * 80, CHAT, rule, store=True)
        rates.append(sim.run(10, 5).requests_per_second)
    assert rates[0] == pytest.approx(rates[1], rel=0.03)


def test_routers_that_are_told_at_once_decide_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_rules, "REPORT_SECONDS", 0.0)
    rules: list[Policy] = [policy_rules.ours(1), policy_rules.side_by_side(3, 1, told=True)]
    one, three = (ClosedLoop(Hardware(), 4, 40, 80, CHAT, rule, store=True).run(20, 5) for rule in rules)
    assert one == three
    apart = ClosedLoop(Hardware(), 4, 40, 80, CHAT, policy_rules.side_by_side(3, 1, told=False), store=True).run(20, 5)
    assert apart != one


@pytest.mark.parametrize(("clients", "median", "p90"), [(8, 0.15, 0.5), (24, 0.35, 0.9)])  # with 24 HBM is full
def test_predictions_are_near_once_speeds_are_learnt(clients: int, median: float, p90: float) -> None:
    found = prediction_sim.predict(clients=clients, noise=0.2, seconds=120, seed=1)
    assert found.error_median <= median
    assert found.error_p90 <= p90


def test_a_worker_waits_as_long_as_most_is_gained_and_no_longer() -> None:
    """At a store that brings about as many tokens a second as the GPU computes, and at one that brings half: there a
    GPU with time to spare computes them, and a busy one has part of them brought."""
    none, ours, six, always = (
        waiting.simulate(Hardware(kv_bytes_per_token=160 << 10), 1.05e9, 16, 2, patience)
        for patience in ("none", "ours", "6", "always")
    )
    assert ours.requests_per_second > 1.3 * none.requests_per_second
    assert ours.requests_per_second > 0.9 * six.requests_per_second
    assert ours.ttft_ms < 0.7 * six.ttft_ms < 0.7 * always.ttft_ms
    slow = Hardware(kv_bytes_per_token=320 << 10)
    assert waiting.simulate(slow, 1.05e9, 4, 2, "ours").fetched_share < 0.05
    busy = waiting.simulate(slow, 1.05e9, 24, 2, "ours")
    assert busy.requests_per_second > 1.2 * waiting.simulate(slow, 1.05e9, 24, 2, "none").requests_per_second
    assert busy.ttft_ms < 0.8 * waiting.simulate(slow, 1.05e9, 24, 2, "6").ttft_ms


@pytest.mark.parametrize(
    ("rule", "queued_tokens", "worker"),
    [
        # Worker 0 holds nine tenths of the prompt; the others hold nothing, and worker 2 has no queue.
        (policy_rules.llmd(18.0), 20_000, 0),
        (policy_rules.llmd(1.0), 20_000, 2),
        (policy_rules.lmetric(), 200, 0),  # 3 x 400 against 1 x 2,000
        (policy_rules.lmetric(), 600, 2),  # 3 x 800
        (policy_rules.least_loaded(), 0, 2),
        (policy_rules.dynamo(0.0), 1000, 0),
        (policy_rules.dynamo(0.0), 3000, 2),
    ],
)
def test_each_published_policy_leaves_the_warm_worker_where_it_says(
    rule: Policy, queued_tokens: int, worker: int
) -> None:
    sim = ClosedLoop(Hardware(), 3, 1, 1, CHAT, rule, store=True)
    one = Traced(1, 0.0, 2000, 100, ((1, 1800), (2, 200)), None)
    sim._hbm[0].put(1, 1800)
    for number, (requests, tokens) in enumerate([(2, queued_tokens), (3, 5000), (0, 0)]):
        sim.workers[number].requests = requests
        sim.workers[number].queued_tokens = tokens
    assert rule(sim, Request(2000, 100, 0.0, conversation=one))[0] == worker


@pytest.mark.parametrize("unequal", ["gpus", "links"])
def test_where_workers_are_unlike_the_slow_ones_get_less(unequal: str) -> None:
    rule, sent = policy_rules.ours(1), Counter[int]()

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        worker, wanted = rule(sim, request)
        sent[worker] += wanted if unequal == "links" else 1
        return worker, wanted

    each = policy.unlike(Hardware(), unequal)
    ClosedLoop(Hardware(), 2, 24, 160, CHAT, decide, store=True, each=each).run(60, 20)
    assert sent[0] > 1.2 * sent[1]
