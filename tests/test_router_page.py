"""Decisions are kept, add up, and can be read over HTTP."""

import json
import time

import aiohttp
import pytest
from prometheus_client import generate_latest

from components.router import explain
from components.router.cost import Candidate, Policy, Speeds, choose
from components.router.decisions import KEPT, LOGGED, Decisions
from components.router.page import open_page
from components.router.speeds import LiveSpeeds
from graphs.services import free_port
from kvstore.bus import Residency, WorkerReport
from kvstore.errors import ConfigError, UnavailableError
from kvstore.residency import Mirror

SPEEDS = Speeds(0.04, 1e-4, 0.0, 25e9, 10e9, 0.002)
POLICY = Policy(gpu_price=0.5, pressure_seconds=0.2)


def decided(decisions: Decisions, name: str, *, queued: int = 0) -> None:
    located = ["t:1"] * 100 + ["t:2"] * 37
    candidates = [
        Candidate(1, SPEEDS, blocks_per_chunk=1, chunk_bytes=5 << 20, located=located, queued_prefill_tokens=queued),
        Candidate(26, SPEEDS, hbm_blocks=20, queued_prefill_tokens=9000, memory_used=0.5),
    ]
    chosen, choices = choose(candidates, 2200, 16, POLICY)
    decisions.decided(name, 2200, chosen, choices)
    decisions.first_token(name, chosen, 0.1)
    decisions.ended(name, "finished")


def test_the_terms_of_a_price_add_up_and_the_plan_is_told() -> None:
    decisions = Decisions(16)
    decided(decisions, "d1")
    found = decisions.find("d1")
    assert found is not None
    for considered in found.candidates:
        assert sum(considered.price.values()) == pytest.approx(considered.price_seconds)
        assert sum(considered.tokens.values()) == 2200
    assert found.chosen == "1"
    assert (found.fetch_chunks, found.targets) == (137, [("t:1", 100), ("t:2", 37)])
    assert (found.ttft_seconds, found.outcome) == (0.1, "finished")


def test_the_last_thousand_are_kept() -> None:
    decisions = Decisions(16)
    for number in range(KEPT + 10):
        decided(decisions, str(number))
    assert len(decisions.last()) == KEPT
    assert decisions.last(1)[0].id == str(KEPT + 9)
    assert decisions.find("9") is None
    assert decisions.last(5, "1a") == []
    decisions.ended("9", "left")  # one that was forgotten meanwhile


async def test_decisions_can_be_read_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    decisions = Decisions(16)
    decided(decisions, "d1")
    decided(decisions, "d2", queued=30_000)
    url = f"http://127.0.0.1:{(port := free_port())}"
    runner = await open_page(f"127.0.0.1:{port}", decisions)
    assert runner is not None
    try:
        async with aiohttp.ClientSession() as session:

            async def get(path: str) -> tuple[int, str]:
                async with session.get(url + path) as reply:
                    return reply.status, await reply.text()

            status, text = await get("/decisions")
            assert (status, [one["id"] for one in json.loads(text)]) == (200, ["d2", "d1"])
            assert [one["id"] for one in json.loads((await get("/decisions?worker=1"))[1])] == ["d1"]
            status, text = await get("/decisions/d1")
            assert (status, json.loads(text)["chosen"]) == (200, "1")
            assert (await get("/decisions/no"))[0] == 404
            status, text = await get("/decisions?limit=0")
            assert (status, text) == (400, "limit: 0: expected 1 to 1000\n")
            status, text = await get("/metrics")
            assert status == 200
            assert 'kvtier_router_prompt_tokens_total{source="store"}' in text
            async with session.post(url + "/decisions") as reply:
                assert reply.status == 405
        with pytest.raises(UnavailableError, match="choose another port"):
            await open_page(f"127.0.0.1:{port}", decisions)
        print(await explain.explained(url, "d1", 10))
        shown = capsys.readouterr().out
        assert "-> worker 1" in shown
        assert "t:1 100, t:2 37" in shown
        print(await explain.explained(url, "", 10))
        assert len(capsys.readouterr().out.splitlines()) == 3
        with pytest.raises(ConfigError, match="no decision"):
            await explain.explained(url, "d9", 10)
    finally:
        await runner.cleanup()
    with pytest.raises(UnavailableError, match="no router answers"):
        await explain.explained(url, "", 10)


async def test_a_page_needs_an_address() -> None:
    assert await open_page("", Decisions(16)) is None
    for address in ("8300", "localhost:", "localhost:99999"):
        with pytest.raises(ConfigError, match="page"):
            await open_page(address, Decisions(16))


def test_regret_is_what_another_worker_would_have_saved() -> None:
    decisions = Decisions(16)
    fast, slow = Candidate(1, SPEEDS), Candidate(2, SPEEDS, queued_prefill_tokens=1000)
    chosen, choices = choose([fast, slow], 2200, 16, POLICY)
    other = choices[1].ttft_seconds
    for name, took in (("stands", other / 2), ("regretted", other + 0.3)):
        decisions.decided(name, 2200, chosen, choices)
        decisions.first_token(name, chosen, took)
    decisions.decided("alone", 2200, *choose([fast], 2200, 16, POLICY))
    decisions.first_token("alone", chosen, 9.0)
    shown = generate_latest(decisions.registry).decode()
    assert 'kvtier_router_regret_seconds_bucket{le="0.0"} 1.0' in shown
    assert "kvtier_router_regret_seconds_count 2.0" in shown
    assert float(shown.partition("kvtier_router_regret_seconds_sum ")[2].split()[0]) == pytest.approx(0.3)
    found = decisions.find("stands")
    assert found is not None
    assert found.other_ttft_seconds == pytest.approx(other)


def test_what_came_over_the_bus_is_shown() -> None:
    decisions, live, mirror = Decisions(16), LiveSpeeds(SPEEDS), Mirror()
    decisions.watch(live, mirror, {"Residency": 3})
    live.heard_worker(WorkerReport("26", "d.b.g", 7, 16, 1, 1000, 0, fetched_chunks={"hit": 5, "miss": 2}))
    live.heard_worker(WorkerReport("x", "d.b.g", 7, 16, 1, 1000, 0))
    mirror.apply(Residency("t:1", 5, 1, 0, 0, [], [], 0), time.monotonic())
    mirror.apply(Residency("t:2", -1, 1, 0, 0, [], [], 0), time.monotonic())
    shown = generate_latest(decisions.registry).decode()
    for line in (
        'kvtier_router_messages_undecoded_total{kind="Residency"} 3.0',
        'kvtier_router_fetched_chunks_total{outcome="miss",worker="1a"} 2.0',
        'kvtier_router_reports_ignored_total{reason="worker id"} 1.0',
        'kvtier_router_mirror_ignored_total{reason="number out of range"} 1.0',
        'kvtier_router_mirror_age_seconds{target="t:1"}',
    ):
        assert line in shown


def test_of_a_large_cluster_the_cheapest_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions(16)
    crowd = [Candidate(number, SPEEDS, queued_prefill_tokens=100 * number) for number in range(1, 31)]
    with caplog.at_level("INFO"):
        decisions.decided("d1", 2200, *choose(crowd, 2200, 16, POLICY))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.count("blocks hbm") == LOGGED
    assert "-> worker 1 | 1: blocks" in line
    assert line.endswith(f"| {30 - LOGGED} dearer ones")
