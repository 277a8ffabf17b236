"""The calculator: its arithmetic against published figures, and what it says of bad input."""

import json
import math
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from graphs.metrics_doc import rules
from graphs.service import load_deployment
from graphs.size import (
    CARDS,
    GPUS,
    MODELS,
    WRITES_PER_DAY_MAX,
    Options,
    Shape,
    card_of,
    known_name,
    main,
    shape_of,
    sizes,
)
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


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_is_known_and_what_was_measured_is_near_the_estimate(gpu: str) -> None:
    found = sizes(Options(model="llama-3.1-8b", gpu=gpu))
    assert found.is_measured == (gpu == "h200")
    operations = found.prefill_tokens_per_second * 2 * CARDS["llama-3.1-8b"].parameters
    assert operations / (GPUS[gpu].tflops["bf16"] * 1e12) == pytest.approx(0.65, abs=0.03)
    twice = sizes(Options(model="llama-3.1-8b", gpu=gpu, gpus_per_worker=2))
    assert twice.prefill_tokens_per_second == 2 * found.prefill_tokens_per_second


def test_the_page_has_the_figures_that_it_computes_with() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for name, gpu in GPUS.items():
        assert f"| {name} | {gpu.tflops['bf16']} | {gpu.tflops['fp8']} | {gpu.memory_bytes / 1e9:.0f} | " in page


@pytest.mark.parametrize("name", MODELS)
def test_models_are_known_by_their_names_on_the_hub(name: str) -> None:
    assert shape_of(CARDS[name].hub) == MODELS[name]
    assert known_name(f"{CARDS[name].hub}-FP8") == name


def test_the_parameters_of_a_folder_are_those_of_its_weights(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    card = card_of(str(folder))
    assert card is not None
    assert card.parameters == pytest.approx(count, rel=0.01)


def test_the_small_model_is_readable_to_the_user_of_a_container(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", layers=1)
    assert {file.name: file.stat().st_mode & 0o004 for file in folder.iterdir()} == dict.fromkeys(os.listdir(folder), 4)


def test_wear_is_weighed_against_the_alert_and_what_is_spared_in_money_and_watts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (alert,) = [rule for rule in rules() if rule.get("alert") == "KvtierDiskWear"]
    assert alert["expr"].endswith(f"> {WRITES_PER_DAY_MAX}")
    main(["--model", "llama-3.1-70b", "--gpu-hour-price", "2", "--gpu-watts", "700", "--conversations", "10000"])
    text = capsys.readouterr().out
    # 3 x 400 new tokens a second into room for 10,000 x 2,600; 3 x 1,800 of 8,900 tokens a second.
    assert "the store is written 4.0 times a day; the alert KvtierDiskWear comes above 3; 11.3 TB are enough" in text
    assert "the prefill of 0.61 GPUs: 886 a month, 425 W" in text


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-405b"])
def test_it_ends_in_settings_that_render(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", model, "--gpu", "b200", "--gpus-per-worker", "4", "--workers", "2", "--requests-per-second", "9"])
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out.partition("\n\n")[2])
    deployment = load_deployment("graphs.agg_router:Frontend", tmp_path / "my.yaml", [], tmp_path)
    assert len([one for one in deployment.processes() if one.service == "VllmWorker"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nobody"], "model: 'nobody' given, expected a folder with a config.json, or one of llama-3.1-8b"),
        (["--model", "qwen3-32b", "--gpu", "tpu"], "gpu: 'tpu' given, expected one of h100, h200, a100"),
        (
            ["--model", "llama-3.1-70b", "--gpu", "l40s"],
            "gpus-per-worker: '1' given, expected at least 2: the fp8 weights of llama-3.1-70b do not fit",
        ),
        (["--model", "llama-3.1-8b", "--workers", "0"], "workers: '0' given"),
        (["--model", "llama-3.1-8b", "--kv-dtype", "int3"], "kv-dtype: 'int3' given, expected one of bf16, fp8"),
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
