"""The multi-turn benchmark's own arithmetic; an engine under it is benchmarks/chat/'s to start."""

import asyncio
import itertools
import math
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from benchmarks.chat.__main__ import MODES, Bench, by_engine, engine_command, parse, transfer_config
from benchmarks.chat.load import (
    _COUNTER,
    CHAT,
    FRESH,
    Answer,
    Conversation,
    Point,
    Pool,
    Shape,
    _Sample,
    ask_again,
    measure,
    summary,
    warm_up,
)
from benchmarks.chat.plot import plot
from benchmarks.chat.results import best, medians, over
from benchmarks.chat.timeline import Breaking, Moment, Timeline, follow, lowest
from graphs.services import free_port
from kvstore.errors import ConfigError
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from tests.conftest import eventually, item, key, soon


def played(shape: Shape, seed: int) -> list[list[int]]:
    one = Conversation(seed, shape)
    prompts = []
    while not one.ended:
        prompts.append(list(one.prompt))
        one.go_on([7] * one.answer_tokens)
    return prompts


def test_a_conversation_is_decided_by_its_seed_and_each_prompt_goes_on_with_the_last(seed: int) -> None:
    prompts = played(CHAT, seed)
    assert prompts == played(CHAT, seed)
    assert CHAT.turns[0] <= len(prompts) <= CHAT.turns[1]
    for before, after in itertools.pairwise(prompts):
        assert after[: len(before)] == before
        assert CHAT.answer[0] + CHAT.question[0] <= len(after) - len(before) <= CHAT.answer[1] + CHAT.question[1]


@pytest.mark.parametrize("shape", [CHAT, FRESH])
def test_the_mean_prompt_has_about_2200_tokens(shape: Shape) -> None:
    lengths = [len(prompt) for seed in range(400) for prompt in played(shape, seed)]
    assert sum(lengths) / len(lengths) == pytest.approx(2200, rel=0.1)


def test_a_turn_comes_when_all_others_had_one_and_who_ends_begins_anew() -> None:
    pool = Pool(20, 3)
    assert pool.prompt_tokens == pytest.approx(20 * 2200, rel=0.4)
    order = []
    for _ in range(60):
        one = pool.take()
        order.append(one)
        one.go_on([7] * one.answer_tokens)
        pool.put(one)
        assert len(pool) == 20
    for place, one in enumerate(order[20:], 20):
        assert one not in order[place - 19 : place]


async def test_after_the_warm_up_no_turn_repeats_a_prompt() -> None:
    asked: list[list[int]] = []

    class Recorder:
        async def complete(self, prompt: list[int], tokens: int) -> None:
            asked.append(prompt)

    pool = Pool(20, 3)
    await warm_up(Recorder(), pool, 4)  # type: ignore[arg-type]
    assert len(asked) == 20
    for _ in range(20):
        one = pool.take()
        assert one.prompt not in asked
        assert one.turn == 0 or any(one.prompt[: len(prompt)] == prompt for prompt in asked)
        pool.put(one)


async def test_clients_begin_one_by_one_over_the_ramp_and_a_failure_says_why() -> None:
    begun: list[float] = []

    class Recorder:
        async def complete(self, prompt: list[int], tokens: int) -> Answer:
            begun.append(time.monotonic())
            if len(begun) == 1:
                raise ConnectionError("it left")
            await asyncio.sleep(0.6)
            return Answer(begun[-1], begun[-1], begun[-1], [7], 1)

        async def counters(self) -> dict[str, float]:
            return {}

    started = time.monotonic()
    async with asyncio.timeout(60):
        point = await measure(Recorder(), Pool(20, 3), "url", 4, seconds=0.1, ramp_seconds=0.4)  # type: ignore[arg-type]
    assert (point.failed, point.first_failure) == (1, "it left")
    assert begun[3] - started >= 0.9 * 0.4 * 3 / 4


def test_a_point_counts_what_ended_in_its_window() -> None:
    samples = [_Sample(1.0, 2000, 100, 0.1 * number, 0.03, [0.03]) for number in range(1, 11)]
    by = "prompt_tokens_by_source:"
    counted = {
        by + "local_compute": 500.0,
        by + "local_cache_hit": 300.0,
        by + "external_kv_transfer": 200.0,
    }
    point = summary("store", 4, samples, ["it left"], 2.0, {**counted, "kvtier_fetched_bytes": 4e9})
    assert (point.requests_per_second, point.output_tokens_per_second, point.failed) == (5.0, 500.0, 1)
    assert (point.ttft_ms_mean, point.ttft_ms_p50, point.ttft_ms_p99) == (550.0, 600.0, 1000.0)
    assert (point.hbm_hit_share, point.external_hit_share, point.store_bytes_per_second) == (0.3, 0.2, 2_000_000_000)
    assert math.isnan(summary("store", 4, [], [], 2.0, {}).ttft_ms_mean)
    slower = summary("store", 8, [*samples, *samples], [], 2.0, {})
    slower.tpot_ms_mean = 50.0
    # TPOT 30 ms at 5 requests/s and 50 at 10: 40 halfway.
    assert best([point, slower]) == {"store": {"40": 7.5, "60": 10.0}}
    ElementTree.fromstring(plot([point, slower]))


def test_points_of_several_rounds_are_summed_up_and_compared_round_by_round() -> None:
    def of(mode: str, requests: int, ttft_seconds: float, clients: int = 4) -> Point:
        samples = [_Sample(1.0, 2000, 100, ttft_seconds, 0.03, [0.03])] * requests
        return summary(mode, clients, samples, [], 2.0, {"kvtier_fetched_bytes": 5.0})

    points = [of("plain", 10, 0.4), of("store", 20, 0.2), of("store", 24, 0.2), of("plain", 8, 0.6)]
    points += [of("plain, fresh", 10, 0.5), of("store, fresh", 9, 0.5), of("dram", 5, 1.0), of("store", 7, 1.0, 8)]
    store = next(one for one in medians(points) if (one.mode, one.clients) == ("store", 4))
    assert (store.requests_per_second, store.requests, store.tier) == (11.0, 44, {"kvtier_fetched_bytes": 10.0})
    found = {(one.mode, one.clients): one for one in over("plain", points)}
    assert set(found) == {("store", 4), ("store, fresh", 4), ("dram", 4)}
    assert found["store", 4].requests_per_second == (2.5, 2.0, 3.0)
    assert found["store", 4].ttft == (0.417, 0.333, 0.5)
    assert found["store, fresh", 4].requests_per_second == (0.9, 0.9, 0.9)
    (other,) = [one for one in over("dram", points) if one.mode == "plain"]
    assert (other.base, other.requests_per_second) == ("dram", (2.0, 2.0, 2.0))


def test_modes_of_the_store_share_an_engine_and_begin_with_the_hot_cache() -> None:
    assert by_engine(["store", "plain", "store-hot", "dram"]) == [["plain"], ["dram"], ["store-hot", "store"]]
    assert by_engine(["files"]) == [["files"]]
    assert by_engine(["store-hot", "store-mac"]) == [["store-mac"], ["store-hot"]]


async def test_what_is_asked_again_is_what_the_next_turns_go_on_with() -> None:
    asked: list[list[int]] = []

    class Recorder:
        async def complete(self, prompt: list[int], tokens: int) -> None:
            asked.append(list(prompt))

    pool = Pool(20, 3)
    await warm_up(Recorder(), pool, 4)  # type: ignore[arg-type]
    played, asked = asked, []
    await ask_again(Recorder(), pool, 4)  # type: ignore[arg-type]
    assert 0 < len(asked) <= 20
    assert all(one in played for one in asked)


def test_counters_are_read_by_source_and_outcome() -> None:
    found = _COUNTER.match('vllm:prompt_tokens_by_source_total{engine="0",model_name="/m",source="local_compute"} 12.0')
    assert found
    assert (found["name"], found["label"], found["value"]) == ("prompt_tokens_by_source", "local_compute", "12.0")
    plain = _COUNTER.match('vllm:kvtier_fetched_bytes_total{engine="0"} 5e+09')
    assert plain
    assert (plain["name"], plain["label"], plain["value"]) == ("kvtier_fetched_bytes", None, "5e+09")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"--modes": "plain,magic"}, "modes: 'magic' given, expected some of plain,dram"),
        ({"--over": "magic"}, "over: 'magic' given, expected one of plain,dram"),
        ({"--model": "/nowhere"}, "model: '/nowhere' given, expected a folder with a config.json"),
        ({"--dir": "/nowhere"}, "dir: '/nowhere' given, expected a folder that exists"),
        ({"--clients": "0"}, "clients.0: '0' given"),
        ({"--clients": "81"}, "clients: '81' given, expected at most the pool's 80 conversations"),
        ({"--kill": "target"}, "timeline: missing, required by --kill"),
        ({"--dram": "much"}, "dram: 'much' given, expected a size such as 500G"),
    ],
)
def test_what_is_wrong_is_named(model: Path, arguments: dict[str, str], says: str) -> None:
    words = [word for pair in {"--model": str(model), **arguments}.items() for word in pair]
    with pytest.raises(ConfigError) as error:
        parse(words)
    assert says in str(error.value)


def test_every_mode_gets_the_same_hbm_and_dram(model: Path) -> None:
    options = parse(["--model", str(model), "--dram", "3G", "--hbm-tokens", "1000", "--blocks-per-chunk", "2"])
    for mode in MODES:
        transfer: Any = transfer_config(options, mode, "127.0.0.1:7600", model)
        command = engine_command(options, 8000, transfer)
        assert command[command.index("--num-gpu-blocks-override") + 1] == "63"
        if mode == "plain":
            assert "--kv-transfer-config" not in command
            continue
        extra = transfer["kv_connector_extra_config"]
        assert (extra["cpu_bytes_to_use"], extra["blocks_per_chunk"]) == (3_000_000_000, 2)


def test_the_target_is_started_again_over_what_it_holds(model: Path, tmp_path: Path) -> None:
    options = parse(["--model", str(model), "--capacity", "256M", "--hot", "16M"])
    bench, folder, address = Bench(options, tmp_path), tmp_path / "store", f"127.0.0.1:{free_port()}"
    folder.mkdir()
    client = StoreClient(StaticMembership([address]))
    with bench._target("store-hot", folder, address):
        assert client.put([item(1)], soon()) == [Outcome.STORED]
    with bench._target("store", folder, address):
        room = memoryview(bytearray(100_000))
        eventually(lambda: client.get([key(1)], [room], soon()) == [Outcome.HIT])
    client.close()


def moment(second: float, requests_per_second: float) -> Moment:
    return Moment(second, requests_per_second, 100.0, 30.0, 0)


def test_the_lowest_half_minute_is_found() -> None:
    assert lowest([moment(5.0 * number, 3.0) for number in range(1, 6)]) == (None, None)
    rates = [4, 4, 2, 2, 0, 2, 2, 4, 4, 4]
    assert lowest([moment(5.0 * number, rate) for number, rate in enumerate(rates, 1)]) == (2.0, 5.0)


class Restarted:
    """An endpoint whose first request fails, and whose store is hit each time that somebody asks, while it is up."""

    def __init__(self) -> None:
        self.up, self.asked, self.hits = True, 0, 0

    async def complete(self, prompt: list[int], tokens: int) -> Answer:
        self.asked += 1
        if self.asked == 1:
            raise ConnectionError("it left")
        await asyncio.sleep(0.05)
        now = time.monotonic()
        return Answer(now - 0.05, now - 0.02, now, [7, 7], 2, [0.02])

    async def counters(self) -> dict[str, float]:
        self.hits += self.up
        return {"kvtier_fetched_chunks:hit": self.hits}

    async def kill(self) -> None:
        self.up = False

    async def start(self) -> None:
        self.up = True


class Drawing:
    """720 J from one reading to the next; 100 W idle."""

    idle_watts = 100.0

    def __init__(self) -> None:
        self.drawn = 0.0

    def joules(self) -> float:
        self.drawn += 720
        return self.drawn


async def test_a_time_line_has_every_step_and_what_a_fault_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.chat.timeline.STEP_SECONDS", 0.3)
    monkeypatch.setattr("benchmarks.chat.timeline._HITS_POLL_SECONDS", 0.01)
    server, told, found = Restarted(), list[Moment](), Timeline("store", 2)
    breaking = Breaking("target", server.kill, server.start)
    async with asyncio.timeout(60):
        await follow(
            server,  # type: ignore[arg-type]
            Pool(20, 3),
            found,
            seconds=1.2,
            ramp_seconds=0.0,
            tell=told.append,
            meter=Drawing(),  # type: ignore[arg-type]
            breaking=breaking,
        )
    assert found.whole is not None
    assert found.fault is not None
    assert told == found.moments
    assert len(told) == 4
    assert all(one.second < after.second for one, after in itertools.pairwise(told))
    assert sum(one.failed for one in told) == found.whole.failed == 1
    assert 0.4 <= found.fault.killed < found.fault.started  # type: ignore[operator]
    assert found.fault.hits_back_seconds is not None
    point = found.whole
    assert point.watts == pytest.approx(720 / point.seconds, rel=0.01)
    assert point.joules_per_request == pytest.approx(720 / point.requests, rel=0.01)
    over_idle = 720 - 100 * point.seconds
    assert point.joules_per_request_over_idle == pytest.approx(over_idle / point.requests, rel=0.01)
    assert point.joules_per_1000_tokens_over_idle == pytest.approx(1000 * over_idle / (2 * point.requests), rel=0.02)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Timeline) == found
    ElementTree.fromstring(plot([point], [found], {"cpu": "<fast> & good", "cores": 2}))
