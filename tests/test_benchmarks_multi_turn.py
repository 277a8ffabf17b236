"""The multi-turn benchmark's own arithmetic; an engine under it is benchmarks/multi_turn.py's to start."""

import itertools
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import multi_turn
from benchmarks.multi_turn import best, engine_command, parse, transfer_config
from benchmarks.multi_turn_load import _COUNTER, CHAT, FRESH, Conversation, Pool, Shape, _Sample, summary, warm_up
from benchmarks.multi_turn_plot import plot
from kvstore.errors import ConfigError


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


def test_a_point_counts_what_ended_in_its_window() -> None:
    samples = [_Sample(1.0, 2000, 100, 0.1 * number, 0.03, [0.03]) for number in range(1, 11)]
    by = "prompt_tokens_by_source:"
    counted = {
        by + "local_compute": 500.0,
        by + "local_cache_hit": 300.0,
        by + "external_kv_transfer": 200.0,
    }
    point = summary("store", 4, samples, 1, 2.0, {**counted, "kvtier_fetched_bytes": 4e9})
    assert (point.requests_per_second, point.output_tokens_per_second, point.failed) == (5.0, 500.0, 1)
    assert (point.ttft_ms_mean, point.ttft_ms_p50, point.ttft_ms_p99) == (550.0, 600.0, 1000.0)
    assert (point.hbm_hit_share, point.external_hit_share, point.store_bytes_per_second) == (0.3, 0.2, 2_000_000_000)
    assert math.isnan(summary("store", 4, [], 0, 2.0, {}).ttft_ms_mean)
    slower = summary("store", 8, [*samples, *samples], 0, 2.0, {})
    slower.tpot_ms_mean = 50.0
    assert best([point, slower]) == {"store": {"40": 5.0, "60": 10.0}}
    ElementTree.fromstring(plot([point, slower]))


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
        ({"--model": "/nowhere"}, "model: '/nowhere' given, expected a folder with a config.json"),
        ({"--dir": "/nowhere"}, "dir: '/nowhere' given, expected a folder that exists"),
        ({"--clients": "0"}, "clients.0: '0' given"),
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
    for mode in multi_turn.MODES:
        transfer: Any = transfer_config(options, mode, "127.0.0.1:7600", model)
        command = engine_command(options, 8000, transfer)
        assert command[command.index("--num-gpu-blocks-override") + 1] == "63"
        if mode == "plain":
            assert "--kv-transfer-config" not in command
            continue
        extra = transfer["kv_connector_extra_config"]
        assert (extra["cpu_bytes_to_use"], extra["blocks_per_chunk"]) == (3_000_000_000, 2)
