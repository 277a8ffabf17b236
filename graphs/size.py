"""Capacity planning: size and bandwidth of the tiers. `kvtier size --model llama-3.1-70b --gpu h200`.

Arithmetic on published shapes and speeds; runs nothing. Ends with settings for a YAML file. Fetching competes with
recompute: a worker that prefills p tokens per second produces p x (bytes per token) of KV per second. A slower store
increases the TTFT of a single idle request, though it still frees the GPU.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field

from kvstore.errors import ConfigError, validated


class Shape(NamedTuple):
    """The shape of a token's KV: keys and values of each head, or one latent vector for all heads (MLA)."""

    layers: int
    kv_heads: int
    head_size: int
    latent: bool = False

    def bytes_per_token(self, value_bytes: int) -> int:
        return (1 if self.latent else 2) * self.layers * self.kv_heads * self.head_size * value_bytes


# From the models' own config.json.
MODELS = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.1-70b": Shape(80, 8, 128),
    "llama-3.3-70b": Shape(80, 8, 128),
    "llama-3.1-405b": Shape(126, 8, 128),
    "qwen3-8b": Shape(36, 8, 128),
    "qwen3-32b": Shape(64, 8, 128),
    "mistral-7b": Shape(32, 8, 128),
    "deepseek-v3": Shape(61, 1, 512 + 64, latent=True),
}
# Measured prefill tokens per second of one GPU (docs/operations.md), by model, GPU and type of the weights.
PREFILL = {
    ("llama-3.1-70b", "h200", "fp8"): 8900.0,
    ("llama-3.3-70b", "h200", "fp8"): 8900.0,
    ("llama-3.1-8b", "h200", "bf16"): 41_000.0,
}
# These two are 0.64 and 0.67 of the GPU's peak. Without a measurement, this share of the peak is assumed.
EFFICIENCY = 0.63
VALUE_BYTES = {"bf16": 2, "fp8": 1}
WRITES_PER_DAY_MAX = 3  # drive writes per day: the limit of the alert KvtierDiskWear
_HOURS_A_MONTH = 730
_WEIGHTS_OF_MEMORY_MAX = 0.9  # the rest is for KV and activations


class Model(NamedTuple):
    """Hub name and number of parameters: total and active per token. From the model's card."""

    hub: str
    parameters: float
    active: float


CARDS = {
    "llama-3.1-8b": Model("meta-llama/Llama-3.1-8B-Instruct", 8.03e9, 8.03e9),
    "llama-3.1-70b": Model("meta-llama/Llama-3.1-70B-Instruct", 70.6e9, 70.6e9),
    "llama-3.3-70b": Model("meta-llama/Llama-3.3-70B-Instruct", 70.6e9, 70.6e9),
    "llama-3.1-405b": Model("meta-llama/Llama-3.1-405B-Instruct", 406e9, 406e9),
    "qwen3-8b": Model("Qwen/Qwen3-8B", 8.2e9, 8.2e9),
    "qwen3-32b": Model("Qwen/Qwen3-32B", 32.8e9, 32.8e9),
    "mistral-7b": Model("mistralai/Mistral-7B-Instruct-v0.3", 7.25e9, 7.25e9),
    "deepseek-v3": Model("deepseek-ai/DeepSeek-V3", 671e9, 37e9),
}


class Gpu(NamedTuple):
    """Peak of dense matrix products in TFLOPS, by type of the weights, and memory in bytes."""

    tflops: dict[str, float]
    memory_bytes: float


# From the makers' data sheets, without sparsity. An A100 multiplies FP8 weights as bf16.
GPUS = {
    "h100": Gpu({"bf16": 989, "fp8": 1979}, 80e9),  # SXM: H100 Tensor Core GPU data sheet
    "h200": Gpu({"bf16": 989, "fp8": 1979}, 141e9),  # SXM: H200 Tensor Core GPU data sheet
    "a100": Gpu({"bf16": 312, "fp8": 312}, 80e9),  # SXM, 80 GB: A100 Tensor Core GPU data sheet
    "l40s": Gpu({"bf16": 362, "fp8": 733}, 48e9),  # L40S data sheet
    "b200": Gpu({"bf16": 2250, "fp8": 4500}, 180e9),  # in an HGX B200: Blackwell data sheet
    "mi300x": Gpu({"bf16": 1307, "fp8": 2615}, 192e9),  # AMD Instinct MI300X data sheet
}
BLOCK_TOKENS = 16
CHUNK_BYTES = (1 << 20, 8 << 20)  # recommended range of the chunk size

Positive = Annotated[float, Field(gt=0)]


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    gpu: str = "h200"
    gpus_per_worker: Annotated[int, Field(ge=1)] = 1
    weights: Literal["bf16", "fp8"] | None = None
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    prefill_tokens_per_second: Positive | None = None
    prompt_tokens: Annotated[int, Field(ge=1)] = 2200
    new_tokens: Annotated[int, Field(ge=1)] = 400
    conversations: Annotated[int, Field(ge=1)] = 1000
    requests_per_second: Positive = 3.0
    workers: Annotated[int, Field(ge=1)] = 1
    store_gbytes_per_second: Positive = 3.0
    device_gbytes_per_second: Positive = 3.0
    gpu_hour_price: Positive | None = None
    gpu_watts: Positive | None = None


class Sizes(NamedTuple):
    """The result, in bytes, bytes per second, seconds and counts."""

    bytes_per_token: int
    blocks_per_chunk: int
    chunk_bytes: int
    prefill_tokens_per_second: float
    break_even_bytes_per_second: float
    store_bytes: int
    dram_bytes_per_worker: int
    read_bytes_per_second: float
    write_bytes_per_second: float
    read_bytes_per_second_per_worker: float
    written_bytes_per_day: float
    devices: int  # needed for the read throughput
    reused_tokens: int  # per prompt
    compute_seconds: float  # to recompute the reused tokens
    fetch_seconds: float
    weights: str
    is_measured: bool  # whether the prefill speed was measured, not estimated or given
    writes_per_day: float  # drive writes per day
    spared_gpus: float  # GPUs that prefill would need without the store


def known_name(model: str) -> str:
    """The name in MODELS of a hub model such as owner/Llama-3.1-70B-Instruct; an unknown name is returned unchanged."""
    own = model.rpartition("/")[2].lower().removeprefix("meta-")
    found = [name for name in MODELS if re.match(rf"{re.escape(name)}(-|$)", own)]
    return found[0] if found and not Path(model).is_dir() else model


def shape_of(model: str) -> Shape:
    """The shape of a model in MODELS, or of a folder with a config.json. Raises ConfigError."""
    if (name := known_name(model)) in MODELS:
        return MODELS[name]
    expected = f"a folder with a config.json, or one of {', '.join(MODELS)}"
    try:
        config = _config(model)
        if "kv_lora_rank" in config:
            latent = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
            return Shape(int(config["num_hidden_layers"]), 1, latent, latent=True)
        heads = int(config["num_attention_heads"])
        return Shape(
            int(config["num_hidden_layers"]),
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or config["hidden_size"] // heads),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("model", model, expected) from None


def _config(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    return config.get("text_config") or config


def card_of(model: str) -> Model | None:
    """A model's parameters; None for a folder whose config.json is not sufficient."""
    if (name := known_name(model)) in CARDS:
        return CARDS[name]
    shape, config = shape_of(model), _config(model)
    is_told = {"hidden_size", "intermediate_size", "vocab_size"} <= config.keys()
    if shape.latent or not is_told or any("experts" in key for key in config):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = 2 * hidden * shape.head_size * (heads + shape.kv_heads)
    layers = shape.layers * (attention + 3 * hidden * config["intermediate_size"])
    parameters = float(layers + 2 * config["vocab_size"] * hidden)
    return Model(model, parameters, parameters)


def _weights(options: Options, card: Model | None) -> str:
    """The type of the weights: --weights, otherwise bf16 if they fit, else FP8."""
    if options.weights or card is None or options.gpu not in GPUS:
        return options.weights or "bf16"
    room = options.gpus_per_worker * GPUS[options.gpu].memory_bytes * _WEIGHTS_OF_MEMORY_MAX
    return "bf16" if 2 * card.parameters <= room else "fp8"


def _prefill(options: Options, card: Model | None, weights: str) -> tuple[float, bool]:
    """A worker's prefill tokens per second, and whether they were measured. Raises ConfigError."""
    if options.prefill_tokens_per_second:
        return options.prefill_tokens_per_second, False
    if options.gpu not in GPUS:
        raise ConfigError("gpu", options.gpu, f"one of {', '.join(GPUS)}, or --prefill-tokens-per-second")
    if card is None:
        expected = f"a worker's speed, or as --model one of {', '.join(MODELS)}"
        raise ConfigError.missing("prefill-tokens-per-second", expected, required_by=f"--model {options.model}")
    gpu = GPUS[options.gpu]
    needed = math.ceil(VALUE_BYTES[weights] * card.parameters / (gpu.memory_bytes * _WEIGHTS_OF_MEMORY_MAX))
    if options.gpus_per_worker < needed:
        expected = f"at least {needed}: the {weights} weights of {options.model} do not fit"
        raise ConfigError("gpus-per-worker", options.gpus_per_worker, expected)
    measured = PREFILL.get((known_name(options.model), options.gpu, weights))
    estimated = EFFICIENCY * gpu.tflops[weights] * 1e12 / (2 * card.active)  # one multiply and one add per parameter
    return options.gpus_per_worker * (measured or estimated), measured is not None


def sizes(options: Options) -> Sizes:
    """Compute the sizes. Raises ConfigError for an unknown model or GPU."""
    per_token = shape_of(options.model).bytes_per_token(VALUE_BYTES[options.kv_dtype])
    card = card_of(options.model)
    weights = _weights(options, card)
    prefill, is_measured = _prefill(options, card, weights)
    blocks = max(1, -(-CHUNK_BYTES[0] // (BLOCK_TOKENS * per_token)))
    reused = max(0, options.prompt_tokens - options.new_tokens)
    # DRAM for the prompts that arrive while one fetches, and for waiting writes, times four.
    in_flight = max(4.0, 4 * options.requests_per_second / options.workers)
    read = options.requests_per_second * reused * per_token
    write = options.requests_per_second * options.new_tokens * per_token
    store = options.conversations * (options.prompt_tokens + options.new_tokens) * per_token
    return Sizes(
        bytes_per_token=per_token,
        blocks_per_chunk=blocks,
        chunk_bytes=blocks * BLOCK_TOKENS * per_token,
        prefill_tokens_per_second=prefill,
        break_even_bytes_per_second=prefill * per_token,
        store_bytes=store,
        dram_bytes_per_worker=round(in_flight * options.prompt_tokens * per_token),
        read_bytes_per_second=read,
        write_bytes_per_second=write,
        read_bytes_per_second_per_worker=read / options.workers,
        written_bytes_per_day=write * 86_400,
        devices=math.ceil((read + write) / (options.device_gbytes_per_second * 1e9)),
        reused_tokens=reused,
        compute_seconds=reused / prefill,
        fetch_seconds=reused * per_token / (options.store_gbytes_per_second * 1e9),
        weights=weights,
        is_measured=is_measured,
        writes_per_day=write * 86_400 / store,
        spared_gpus=options.requests_per_second * reused / prefill * options.gpus_per_worker,
    )


def table(options: Options, found: Sizes) -> str:
    gigabytes = 1e9
    network = (found.read_bytes_per_second + found.write_bytes_per_second) * 8 / 1e9
    source = "given"
    if options.prefill_tokens_per_second is None:
        source = "measured" if found.is_measured else f"estimated: {EFFICIENCY} of the peak"
        source = f"{source}, {found.weights} weights, {options.gpus_per_worker} x {options.gpu}"
    wears = found.writes_per_day > WRITES_PER_DAY_MAX
    enough = f"; {found.written_bytes_per_day / WRITES_PER_DAY_MAX / 1e12:.1f} TB are enough" if wears else ""
    rows = [
        ("KV of a token", f"{found.bytes_per_token / 1024:.0f} KiB ({options.kv_dtype})"),
        ("chunk", f"--blocks-per-chunk {found.blocks_per_chunk}: {found.chunk_bytes / 2**20:.1f} MiB"),
        (
            "break-even",
            f"{found.break_even_bytes_per_second / gigabytes:.2f} GB/s to a worker: recompute makes that much "
            f"({found.prefill_tokens_per_second:.0f} tokens/s, {source})",
        ),
        (
            "store",
            f"{found.store_bytes / gigabytes:.0f} GB for {options.conversations} conversations of "
            f"{options.prompt_tokens + options.new_tokens} tokens",
        ),
        ("DRAM tier", f"{found.dram_bytes_per_worker / gigabytes:.0f} GB a worker at least; more is a cache"),
        (
            "reads",
            f"{found.read_bytes_per_second / gigabytes:.2f} GB/s for {options.requests_per_second:g} requests/s that "
            f"find all but {options.new_tokens} of {options.prompt_tokens} tokens in the store",
        ),
        (
            "writes",
            f"{found.write_bytes_per_second / gigabytes:.2f} GB/s, {found.written_bytes_per_day / 1e12:.0f} TB a day "
            "at this rate",
        ),
        (
            "wear",
            f"the store is written {found.writes_per_day:.1f} times a day; the alert KvtierDiskWear comes above "
            f"{WRITES_PER_DAY_MAX}{enough}",
        ),
        (
            "devices",
            f"{found.devices} of {options.device_gbytes_per_second:g} GB/s each (kvtier store bench measures one)",
        ),
        (
            "network",
            f"{network:.1f} Gbit/s, {found.read_bytes_per_second_per_worker * 8 / gigabytes:.1f} of them into each of "
            f"{options.workers} worker(s)",
        ),
        (
            "one prompt",
            f"its {found.reused_tokens} cached tokens: {1000 * found.compute_seconds:.0f} ms to compute, "
            f"{1000 * found.fetch_seconds:.0f} ms to fetch at {options.store_gbytes_per_second:g} GB/s",
        ),
        ("saved", f"the prefill of {found.spared_gpus:.2f} GPUs{_worth(options, found)}"),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def _worth(options: Options, found: Sizes) -> str:
    """The saved money and power, if price and watts are given."""
    parts = []
    if options.gpu_hour_price:
        parts.append(f"{found.spared_gpus * options.gpu_hour_price * _HOURS_A_MONTH:,.0f} a month")
    if options.gpu_watts:
        parts.append(f"{found.spared_gpus * options.gpu_watts:,.0f} W")
    return f": {', '.join(parts)}" if parts else ""


def settings(options: Options, found: Sizes) -> str:
    """The same as YAML for `dynamo serve` and `dynamo render`."""
    card = card_of(options.model)
    worker: dict[str, Any] = {
        "model": card.hub if card else options.model,
        "ServiceArgs": {"workers": options.workers, "resources": {"gpu": options.gpus_per_worker}},
        "dram": f"{math.ceil(found.dram_bytes_per_worker / 1e9)}GB",
        "block-size": BLOCK_TOKENS,
        "blocks-per-chunk": found.blocks_per_chunk,
    }
    if options.gpus_per_worker > 1:
        worker["tensor-parallel-size"] = options.gpus_per_worker
    if found.weights == "fp8":
        worker["quantization"] = "fp8"
    if options.kv_dtype == "fp8":
        worker["kv-cache-dtype"] = "fp8"
    content = {
        "Store": {
            "ServiceArgs": {"workers": found.devices},
            "dir": "/nvme",
            "capacity": f"{math.ceil(found.store_bytes / found.devices / 1e9)}GB",
        },
        "VllmWorker": worker,
        "Router": {
            "prefill-tokens-per-second": round(found.prefill_tokens_per_second),
            "store-gbytes-per-second": options.store_gbytes_per_second,
        },
    }
    return yaml.safe_dump(content, sort_keys=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help=f"a folder with a config.json, or a hub or short name of {', '.join(MODELS)}")
    add("--gpu", help=f"{', '.join(GPUS)}; default h200, the only one measured")
    add("--gpus-per-worker", help="default 1; prefill is assumed to scale linearly")
    add("--weights", help="bf16 or fp8; default: bf16 if they fit")
    add("--kv-dtype", help="bf16 (default) or fp8")
    add("--prefill-tokens-per-second", help="of one worker")
    add("--prompt-tokens", help="mean; default 2200")
    add("--new-tokens", help="uncached tokens of question and answer; default 400")
    add("--conversations", help="number of conversations to keep cached; default 1000")
    add("--requests-per-second", help="of all workers together; default 3")
    add("--workers", help="default 1")
    add("--store-gbytes-per-second", help="throughput from the store into one worker; default 3")
    add("--device-gbytes-per-second", help="throughput of one NVMe, reads and writes together; default 3")
    add("--gpu-hour-price", help="price of a GPU hour in any currency: adds the savings per month")
    add("--gpu-watts", help="power of one busy GPU: adds the saved power")
    add("--json", action="store_true", help="print JSON, without the YAML")
    values = vars(parser.parse_args(argv))
    as_json = values.pop("json")
    options = validated(Options, values)
    found = sizes(options)
    if as_json:
        print(json.dumps(found._asdict(), indent=1))
        return
    print(f"{table(options, found)}\n\n{settings(options, found)}", end="")
