"""The calculator: its arithmetic against published figures, and what it says of bad input."""

import json
from pathlib import Path

import pytest

from graphs.size import MODELS, Options, Shape, main, shape_of, sizes
from graphs.tiny_model import make_tiny_model
from kvstore.errors import ConfigError


def test_a_70b_model_makes_2_9_gb_of_kv_a_second() -> None:
    found = sizes(Options(model="llama-3.1-70b"))
    assert found.bytes_per_token == 320 * 1024
    assert found.break_even_bytes_per_second == pytest.approx(2.9e9, rel=0.01)
    assert (found.blocks_per_chunk, found.chunk_bytes) == (1, 5 << 20)
    half = sizes(Options(model="llama-3.1-70b", kv_dtype="fp8"))
    assert half.bytes_per_token == 160 * 1024
    assert half.read_bytes_per_second == pytest.approx(3 * 1800 * 160 * 1024)


def test_small_models_get_chunks_of_several_blocks(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    assert shape_of(str(folder)) == Shape(4, 2, 64)
    found = sizes(Options(model=str(folder), prefill_tokens_per_second=6000))
    assert found.bytes_per_token == 2048
    assert found.chunk_bytes >= 1 << 20
    assert shape_of("llama-3.1-8b") == MODELS["llama-3.1-8b"]


def test_more_conversations_and_requests_need_more() -> None:
    small = sizes(Options(model="llama-3.1-8b"))
    large = sizes(Options(model="llama-3.1-8b", conversations=2000, requests_per_second=6))
    assert large.store_bytes == 2 * small.store_bytes
    assert large.write_bytes_per_second == 2 * small.write_bytes_per_second


def test_a_latent_is_one_vector_for_all_heads(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) == MODELS["deepseek-v3"]
    found = sizes(Options(model=str(tmp_path), prefill_tokens_per_second=5000))
    assert found.bytes_per_token == 61 * 576 * 2


def test_one_prompt_is_weighed_and_devices_are_counted() -> None:
    found = sizes(Options(model="llama-3.1-70b", requests_per_second=20, workers=5, device_gbytes_per_second=2.5))
    assert found.reused_tokens == 1800
    assert found.compute_seconds == pytest.approx(1800 / 8900)
    assert found.fetch_seconds == pytest.approx(1800 * 320 * 1024 / 3e9)
    assert found.read_bytes_per_second_per_worker == pytest.approx(found.read_bytes_per_second / 5)
    assert found.devices == 6  # 11.8 GB/s of reads and 2.6 of writes
    assert found.written_bytes_per_day == pytest.approx(20 * 400 * 320 * 1024 * 86_400)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nobody"], "model: 'nobody' given, expected a folder with a config.json, or one of llama-3.1-8b"),
        (["--model", "qwen3-32b"], "gpu: 'h200' given, expected --prefill-tokens-per-second for qwen3-32b"),
        (["--model", "llama-3.1-8b", "--workers", "0"], "workers: '0' given"),
        (["--model", "llama-3.1-8b", "--kv-dtype", "int3"], "kv-dtype: 'int3' given, expected 'bf16' or 'fp8'"),
    ],
)
def test_bad_input_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says.split(",", maxsplit=1)[0]) as error:
        main(arguments)
    assert says in str(error.value)


def test_both_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "llama-3.1-70b", "--kv-dtype", "fp8"])
    text = capsys.readouterr().out
    assert "160 KiB" in text
    assert "1.46 GB/s to a worker" in text
    main(["--model", "llama-3.1-70b", "--json"])
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] == 327680
