"""Decisions are kept, add up, and can be read over HTTP."""

import json
import tomllib
from pathlib import Path

import aiohttp
import pytest

from components.router import explain
from components.router.cost import Candidate, Policy, Speeds, choose
from components.router.decisions import KEPT, LOGGED, Decisions
from components.router.feed import Feed
from components.router.page import open_page
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from graphs.services import free_port
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


def feed_of(decisions: Decisions) -> Feed:
    return Feed(decisions, Workers("dynamo.backend.generate"), LiveSpeeds(SPEEDS), Mirror())


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
    runner = await open_page(f"127.0.0.1:{port}", feed_of(decisions))
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
            await open_page(f"127.0.0.1:{port}", feed_of(decisions))
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
    assert await open_page("", feed_of(Decisions(16))) is None
    for address in ("8300", "localhost:", "localhost:99999"):
        with pytest.raises(ConfigError, match="page"):
            await open_page(address, feed_of(Decisions(16)))


def test_of_a_large_cluster_the_cheapest_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions(16)
    crowd = [Candidate(number, SPEEDS, queued_prefill_tokens=100 * number) for number in range(1, 31)]
    with caplog.at_level("INFO"):
        decisions.decided("d1", 2200, *choose(crowd, 2200, 16, POLICY))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.count("blocks hbm") == LOGGED
    assert "-> worker 1 | 1: blocks" in line
    assert line.endswith(f"| {30 - LOGGED} dearer ones")


def test_every_file_is_packaged() -> None:
    root = Path(__file__).parent.parent
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "components" / "router"
    packaged = {path for glob in globs["components.router"] for path in folder.glob(glob)}
    assert {path for path in (folder / "static").rglob("*") if path.is_file()} <= packaged
