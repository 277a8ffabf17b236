"""Decisions are kept, add up, and can be read over HTTP."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from components.pricing.cost import Candidate, Policy, Speeds, choose
from components.router.decisions import LOGGED, Decisions
from components.router.history import KEPT
from components.router.speeds import LiveSpeeds
from components.router.view import explain
from components.router.view.access import page_access
from components.router.view.feed import ROWS, SAMPLES_PER_SECOND, Feed, Growth, Pool, Viewer
from components.router.view.page import VIEWERS_OF_PEER_MAX, open_page
from components.router.view.state import Update
from components.router.workers import Workers
from graphs.services import free_port
from kvstore.bus.messages import Residency, WorkerReport
from kvstore.bus.residency import Mirror
from kvstore.errors import ConfigError, UnavailableError

SPEEDS = Speeds(0.04, 1e-4, 0.0, 25e9, 10e9, 0.002)
POLICY = Policy(stall_price=0.2)


def decided(
    decisions: Decisions, name: str, *, queued: int = 0, actual: float = 0.1, outcome: str = "finished"
) -> None:
    located = ["t:1"] * 100 + ["t:2"] * 37
    candidates = [
        Candidate(1, SPEEDS, blocks_per_chunk=1, chunk_bytes=5 << 20, located=located, queued_prefill_tokens=queued),
        Candidate(26, SPEEDS, hbm_blocks=20, queued_prefill_tokens=9000, memory_used=0.5),
    ]
    chosen, choices = choose(candidates, 2200, 16, POLICY)
    decisions.first_token(decisions.decided(name, 2200, chosen, choices), actual)
    decisions.ended(name, outcome)


def feed_of(decisions: Decisions) -> Feed:
    return Feed(decisions, Workers("dynamo.backend.generate"), LiveSpeeds(SPEEDS), Mirror())


def test_the_terms_of_a_price_add_up_and_the_plan_is_told() -> None:
    decisions = Decisions(16)
    decided(decisions, "d1")
    found = decisions.history.find("d1")
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
    assert len(decisions.history.last()) == KEPT
    assert decisions.history.last(1)[0].id == str(KEPT + 9)
    assert decisions.history.find("9") is None
    assert decisions.history.last(5, "1a") == []
    decisions.ended("9", "cancelled")  # one that was forgotten meanwhile


async def test_decisions_can_be_read_over_http(capsys: pytest.CaptureFixture[str]) -> None:
    decisions = Decisions(16)
    decided(decisions, "d1")
    decided(decisions, "d2", queued=30_000)
    url = f"http://127.0.0.1:{(port := free_port())}"
    runner = await open_page(page_access(f"127.0.0.1:{port}"), feed_of(decisions))
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
            await open_page(page_access(f"127.0.0.1:{port}"), feed_of(decisions))
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


def test_a_page_needs_an_address() -> None:
    for address in ("8300", "localhost:", "localhost:99999"):
        with pytest.raises(ConfigError, match="page"):
            page_access(address)


def test_of_a_large_cluster_the_cheapest_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions(16)
    crowd = [Candidate(number, SPEEDS, queued_prefill_tokens=100 * number) for number in range(1, 31)]
    with caplog.at_level("INFO"):
        decisions.decided("d1", 2200, *choose(crowd, 2200, 16, POLICY))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.count("blocks hbm") == LOGGED
    assert "-> worker 1 | 1: blocks" in line
    assert line.endswith(f"| {30 - LOGGED} more expensive")


async def test_what_is_sent_is_guarded() -> None:
    """A strict policy on every answer; only this machine's names; nothing but the page's own files."""
    port = free_port()
    runner = await open_page(page_access(f"127.0.0.1:{port}"), feed_of(Decisions(16)))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            for path in ("/", "/page.css", "/main.js", "/vendor/uPlot.iife.min.js", "/state", "/nothing"):
                async with session.get(path) as reply:
                    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
                    assert reply.headers["X-Content-Type-Options"] == "nosniff"
                    assert reply.status == (404 if path == "/nothing" else 200)
            for path in ("/static/../page.py", "/..%2fpage.py", "/vendor/README", "/index.html"):
                async with session.get(path) as reply:
                    assert reply.status == 404
            for host, status in (
                ("localhost", 200),
                (f"localhost:{port}", 200),
                ("[::1]:80", 200),
                ("evil.example", 421),
                (f"evil.example:{port}", 421),
                ("127.0.0.1.evil.example", 421),
                ("10.0.0.1", 421),
            ):
                async with session.get("/state", headers={"Host": host}) as reply:
                    assert reply.status == status, host
            async with session.get("/events?source=disk") as reply:
                assert (reply.status, await reply.text()) == (
                    400,
                    "source: disk: expected one of hbm, dram, store, computed\n",
                )
    finally:
        await runner.cleanup()


async def test_viewers_are_bounded_and_a_slow_one_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    decisions = Decisions(16)
    feed = feed_of(decisions)
    port = free_port()
    runner = await open_page(page_access(f"127.0.0.1:{port}"), feed)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            _, slow = await asyncio.open_connection("127.0.0.1", port)
            slow.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and never reads
            replies = [await session.get("/events") for _ in range(VIEWERS_OF_PEER_MAX - 1)]
            async with asyncio.timeout(20):
                while (full := await session.get("/events")).status == 200:
                    full.close()  # the slow one was not heard yet
            assert full.status == 503
            got = events(replies[0])
            assert (await anext(got)).fresh
            for number in range(100):  # more than its socket and its buffer hold
                for name in range(20):
                    decided(decisions, f"{number}-{name}")
                feed.tick()
                update = await anext(got)
                assert not update.fresh
                assert update.state.decisions == 20 * (number + 1)
                assert len(update.decisions) == ROWS
            slow.close()
            replies[-1].close()
            for _ in range(3):
                feed.tick()
                await asyncio.sleep(0.02)
    finally:
        await runner.cleanup()
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []  # of those that left


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[Update]:
    async for line in reply.content:
        if line.startswith(b"data: "):
            yield msgspec.json.decode(line[6:], type=Update)


def test_what_is_wrong_is_said() -> None:
    decisions = Decisions(16)
    workers, mirror, connected = Workers("dynamo.backend.generate"), Mirror(), [True]
    feed = Feed(decisions, workers, LiveSpeeds(SPEEDS), mirror, connected=lambda: connected[0])

    def said() -> set[str]:
        feed.tick()
        return {alarm.id for alarm in feed.state.alarms}

    def report(**fetched: int) -> None:
        heard = WorkerReport("26", "dynamo.backend.generate", 7, 16, 1, 1, 0, fetched_chunks=fetched)
        workers.heard(heard, time.monotonic())

    assert said() == {"no-worker", "no-target"}
    workers.set_cards({"26": json.dumps({"display_name": "m", "kv_cache_block_size": 16})})
    assert said() == {"no-report", "no-target"}
    report()
    assert said() == {"no-target"}
    now = time.monotonic()
    mirror.apply(Residency("t:1", 1, 1, 0, 0, [], [], 0), now)
    assert said() == set()
    mirror.apply(Residency("t:2", 1, 1, 0, 0, [], [], 0), now - 30)
    assert said() == {"silent-t:2"}
    mirror.apply(Residency("t:2", 1, 2, 0, 0, [], [], 0), now)
    report(hit=99, late=1)
    assert said() == set()  # one of a hundred is no reason to wake anybody
    report(hit=99, late=9, corrupt=1, unreachable=1)
    assert said() == {"late", "corrupt-fetch", "unreachable"}
    for name in range(20):
        decided(decisions, str(name), actual=30.0)
    decided(decisions, "failed", outcome="failed")
    assert said() == {"late", "corrupt-fetch", "unreachable", "prediction", "failed"}
    assert [alarm.level for alarm in feed.state.alarms] == ["bad", "bad", "bad", "warn", "warn"]
    connected[0] = False
    assert "bus" in said()


def test_prefill_and_decode_workers_are_shown_as_what_they_are() -> None:
    card = json.dumps({"display_name": "m", "kv_cache_block_size": 16})
    pools = [
        Pool(Decisions(16), Workers(f"dynamo.{role}.generate"), LiveSpeeds(SPEEDS)) for role in ("prefill", "decode")
    ]
    prefill, decode = pools
    feed = Feed(*decode, Mirror(), prefill=prefill)

    def said() -> set[str]:
        feed.tick()
        return {alarm.id for alarm in feed.state.alarms} - {"no-target"}

    assert said() == {"no-worker"}
    decode.workers.set_cards({"2": card})
    assert said() == {"no-prefill-worker"}  # and no report is missed: decode workers have no tier
    prefill.workers.set_cards({"1": card})
    assert said() == {"no-report"}
    reader, taker = Candidate(1, SPEEDS, hbm_blocks=100), Candidate(2, SPEEDS, dram_blocks=138, is_handed_over=True)
    first = prefill.decisions.decided("p", 2200, *choose([reader], 2200, 16, POLICY))
    prefill.decisions.first_token(first, 0.2)
    prefill.decisions.ended("p", "finished")
    second = decode.decisions.decided("d", 2200, *choose([taker], 2200, 16, POLICY), first.to_decode())
    decode.decisions.first_token(second, 0.05)
    decode.decisions.ended("d", "finished")
    feed.tick()
    state = feed.state
    assert [(lane.worker, lane.role, lane.decisions) for lane in state.workers] == [
        ("1", "prefill", 1),
        ("2", "decode", 1),
    ]
    assert state.workers[1].tokens["handover"] == 138 * 16  # in whole blocks
    assert (state.decisions, state.open, state.outcomes["finished"]) == (1, 0, 1)
    assert state.tokens == {"hbm": 1600, "dram": 0, "store": 0, "computed": 600}
    (row,) = Viewer(feed).update().decisions
    assert (row.id, row.worker, row.prefill_worker, row.tokens["hbm"]) == ("d", "2", "1", 1600)
    assert row.ttft_seconds == pytest.approx(0.25)
    assert [one.id for one in Viewer(feed, worker="1").update().decisions] == ["p"]
    assert feed.find("p") is first
    assert feed.find("d") is second
    prefill.workers.set_cards({})
    decode.workers.set_cards({})
    assert said() == {"no-worker"}


def test_counters_that_begin_anew_count_from_nothing() -> None:
    growth = Growth(2)
    growth.take({"a": {"hit": 100}})
    assert growth.total() == {}
    growth.take({"a": {"hit": 103, "late": 1}, "b": {"hit": 7}})
    assert growth.total() == {"hit": 3, "late": 1}
    growth.take({"a": {"hit": 2}, "b": {"hit": 8}})
    assert growth.total() == {"hit": 6, "late": 1}
    growth.take({"b": {"hit": 8}})
    growth.take({"b": {"hit": 8}})
    assert growth.total() == {}


def test_of_a_crowd_a_sample_is_kept_and_totals_are_whole() -> None:
    decisions = Decisions(16)
    feed = feed_of(decisions)
    viewer = Viewer(feed, worker="1", source="store")
    assert viewer.update().decisions == []
    for name in range(500):
        decided(decisions, str(name), queued=0 if name % 2 else 30_000)
    feed.tick()
    update = viewer.update()
    assert update.state.decisions == 500
    assert len(update.samples) == SAMPLES_PER_SECOND
    assert len(update.decisions) == ROWS
    assert {one.worker for one in update.decisions} == {"1"}
    assert [int(one.id) for one in update.decisions] == sorted(int(one.id) for one in update.decisions)
    for name in range(KEPT + 1):
        decided(decisions, f"later-{name}")
    assert decisions.history.find(update.decisions[0].id) is None
    kept = feed.find(update.decisions[0].id)  # it was shown, and can be asked for
    assert kept is not None
    assert len(kept.candidates) == 2
    decisions.decided("open", 2200, *choose([Candidate(1, SPEEDS)], 2200, 16, POLICY))
    everything = Viewer(feed)
    assert everything.update().decisions[-1].outcome == "open"
    decisions.ended("open", "left")
    assert [(one.id, one.outcome) for one in everything.update().decisions] == [("open", "left")]
