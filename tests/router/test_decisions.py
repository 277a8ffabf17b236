"""What is counted, logged and kept of decisions, and shown of the bus."""

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from components.pricing.cost import Candidate, Policy, Speeds, choose
from components.router.decisions import Decisions
from components.router.series import BusCollector, ByRole
from components.router.speeds import LiveSpeeds
from kvstore.bus.messages import Residency, WorkerReport
from kvstore.bus.residency import Mirror

SPEEDS = Speeds(0.04, 1e-4, 0.0, 25e9, 10e9, 0.002)
POLICY = Policy(stall_price=0.2)


def test_regret_is_what_another_worker_would_have_saved() -> None:
    decisions = Decisions(16)
    fast, slow = Candidate(1, SPEEDS), Candidate(2, SPEEDS, queued_prefill_tokens=1000)
    chosen, choices = choose([fast, slow], 2200, 16, POLICY)
    other = choices[1].ttft_seconds
    for name, took in (("stands", other / 2), ("regretted", other + 0.3)):
        decisions.first_token(decisions.decided(name, 2200, chosen, choices), took)
    decisions.first_token(decisions.decided("alone", 2200, *choose([fast], 2200, 16, POLICY)), 9.0)
    shown = generate_latest(decisions.registry).decode()
    assert 'kvtier_router_regret_seconds_bucket{le="0.0"} 1.0' in shown
    assert "kvtier_router_regret_seconds_count 2.0" in shown
    assert float(shown.partition("kvtier_router_regret_seconds_sum ")[2].split()[0]) == pytest.approx(0.3)
    found = decisions.history.find("stands")
    assert found is not None
    assert found.other_ttft_seconds == pytest.approx(other)


COUNTERS = {
    "decisions": {"worker"},
    "chosen_blocks": {"worker", "tier"},
    "prompt_tokens": {"source"},
    "outcomes": {"outcome"},
    "degraded_decisions": {"missing"},
    "missed_deadlines": {"deadline"},
    "retries": {"worker"},
    "output_tokens": set[str](),
}
GAUGES = {
    "candidate_blocks": {"worker", "tier"},
    "candidate_seconds": {"worker", "part"},
    "suspect_workers": set[str](),
}
HISTOGRAMS = {
    "ttft_actual_to_predicted_ratio": set[str](),
    "regret_seconds": set[str](),
    "decision_seconds": {"stage"},
    "predicted_ttft_seconds": set[str](),
    "tpot_seconds": set[str](),
    "ttft_seconds": set[str](),
}


def test_the_series_of_decisions_are_these_and_the_totals_are_their_numbers() -> None:
    decisions = Decisions(16)
    known, other = Candidate(1, SPEEDS, hbm_blocks=10), Candidate(2, SPEEDS, dp_rank=1)
    chosen, choices = choose([known, other], 2200, 16, POLICY)
    decision = decisions.decided("a", 2200, chosen, choices)
    decisions.took({"hash": 0.1, "price": 0.2})
    decisions.fell_back("overlap_query")
    decisions.first_token(decision, 0.3)
    decisions.answered(decision, 1, 10, 0.3)
    decisions.ended("a", "finished")
    decisions.decided("b", 2200, chosen, choices)
    decisions.missed("request")
    decisions.retried(chosen)

    expected = {(name, frozenset(labels)) for name, labels in GAUGES.items()}
    for name, labels in COUNTERS.items():
        expected |= {(f"{name}_{end}", frozenset(labels)) for end in ("total", "created")}
    for name, labels in HISTOGRAMS.items():
        expected |= {(f"{name}_{end}", frozenset(labels)) for end in ("count", "sum", "created")}
        expected.add((f"{name}_bucket", frozenset({*labels, "le"})))
    samples = [one for family in decisions.registry.collect() for one in family.samples]
    assert {(one.name.removeprefix("kvtier_router_"), frozenset(one.labels)) for one in samples} == expected

    totals = decisions.totals()

    def counted(name: str, **labels: str) -> float | None:
        return decisions.registry.get_sample_value(f"kvtier_router_{name}", labels)

    assert totals.decisions == {"1": 2}
    assert totals.decisions["1"] == counted("decisions_total", worker="1")
    for name, counts, by in (
        ("prompt_tokens", totals.tokens, "source"),
        ("outcomes", totals.outcomes, "outcome"),
        ("degraded_decisions", totals.fallbacks, "missing"),
        ("missed_deadlines", totals.missed, "deadline"),
        ("retries", totals.retries, "worker"),
    ):
        assert {value: counted(f"{name}_total", **{by: value}) for value in counts} == counts
    assert {tier: counted("chosen_blocks_total", worker="1", tier=tier) for tier in totals.blocks["1"]} == (
        totals.blocks["1"]
    )
    assert (totals.output_tokens, totals.open) == (counted("output_tokens_total"), 1) == (11, 1)
    assert totals.decision_seconds == pytest.approx(0.3)
    totals.outcomes["finished"] += 1
    assert decisions.totals().outcomes["finished"] == 1  # a copy


def test_of_a_prompt_that_two_workers_served_tokens_count_once_and_times_add_up() -> None:
    prefill, decode = Decisions(16), Decisions(16)
    reader = Candidate(1, SPEEDS, hbm_blocks=100)
    first = prefill.decided("p", 2200, *choose([reader], 2200, 16, POLICY))
    prefill.first_token(first, 0.2)
    prefill.ended("p", "finished")
    taker = Candidate(2, SPEEDS, hbm_blocks=10, dram_blocks=138, is_handed_over=True)
    second = decode.decided("d", 2200, *choose([taker], 2200, 16, POLICY), first.to_decode())
    own = second.predicted_ttft_seconds - first.predicted_ttft_seconds
    assert own > 0
    decode.first_token(second, 0.05)
    decode.answered(second, 1, 10, 0.2)
    decode.ended("d", "finished")
    assert second.ttft_seconds == pytest.approx(0.25)
    assert second.candidates[0].tokens == {"hbm": 160, "handover": 2040}
    assert second.prefilled is not None
    assert (second.prefilled.id, second.prefilled.tokens["hbm"]) == ("p", 1600)

    totals = decode.totals()
    totals.add_prefill(prefill.totals())
    assert totals.tokens == {"hbm": 1600, "dram": 0, "store": 0, "computed": 600}
    assert (totals.outcomes["finished"], totals.decisions) == (1, {"2": 1})

    registry = CollectorRegistry()
    registry.register(ByRole(prefill=prefill.registry, decode=decode.registry))
    shown = generate_latest(registry).decode()
    assert shown.count("# TYPE kvtier_router_ttft_seconds histogram") == 1
    for line in (
        'kvtier_router_ttft_seconds_sum{role="decode"} 0.25',
        'kvtier_router_ttft_seconds_sum{role="prefill"} 0.2',
        'kvtier_router_prompt_tokens_total{role="prefill",source="hbm"} 1600.0',
        'kvtier_router_chosen_blocks_total{role="decode",tier="handover",worker="2"} 128.0',
    ):
        assert line in shown
    assert 'kvtier_router_prompt_tokens_total{role="decode"' not in shown


def test_what_came_over_the_bus_is_shown() -> None:
    decisions, live, mirror = Decisions(16), LiveSpeeds(SPEEDS), Mirror()
    decisions.registry.register(BusCollector([live], mirror, {"Residency": 3}))
    live.heard_worker(WorkerReport("26", "d.b.g", 7, 16, 1, 1000, 0, fetched_chunks={"hit": 5, "miss": 2}))
    live.heard_worker(WorkerReport("x", "d.b.g", 7, 16, 1, 1000, 0))
    mirror.apply(Residency("t:1", 5, 1, 0, 0, [], [], 0), time.monotonic())
    mirror.apply(Residency("t:2", -1, 1, 0, 0, [], [], 0), time.monotonic())
    shown = generate_latest(decisions.registry).decode()
    for line in (
        'kvtier_router_decode_errors_total{kind="Residency"} 3.0',
        'kvtier_router_fetched_chunks_total{outcome="miss",worker="1a"} 2.0',
        'kvtier_router_rejected_heartbeats_total{reason="invalid_worker_id"} 1.0',
        'kvtier_router_rejected_announcements_total{reason="number_out_of_range"} 1.0',
        'kvtier_router_target_heartbeat_age_seconds{target="t:1"}',
    ):
        assert line in shown
