"""How large the tiers should be and how fast the way to them: `kvtier size --model llama-3.1-70b --gpu h200`.

Arithmetic on published shapes and measured speeds; nothing is run. What fetching must beat is recompute: a worker that
prefills p tokens a second makes p x (bytes of a token) of KV a second, and a store that brings less is slower for one
idle request, though it still frees the GPU.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from kvstore.errors import ConfigError, validated


class Shape(NamedTuple):
    """What decides the KV of a token: keys and values of each head, or one latent vector for all (MLA)."""

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
# Prefill tokens a second, measured (docs/operations.md): H200, weights in FP8 (70b) and bf16 (8b).
PREFILL = {("llama-3.1-70b", "h200"): 8900.0, ("llama-3.3-70b", "h200"): 8900.0, ("llama-3.1-8b", "h200"): 41_000.0}
VALUE_BYTES = {"bf16": 2, "fp8": 1}
BLOCK_TOKENS = 16
CHUNK_BYTES = (1 << 20, 8 << 20)  # what a chunk should have

Positive = Annotated[float, Field(gt=0)]


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    gpu: str = "h200"
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    prefill_tokens_per_second: Positive | None = None
    prompt_tokens: Annotated[int, Field(ge=1)] = 2200
    new_tokens: Annotated[int, Field(ge=1)] = 400
    conversations: Annotated[int, Field(ge=1)] = 1000
    requests_per_second: Positive = 3.0
    workers: Annotated[int, Field(ge=1)] = 1
    store_gbytes_per_second: Positive = 3.0
    device_gbytes_per_second: Positive = 3.0


class Sizes(NamedTuple):
    """Bytes, bytes a second, seconds, and numbers of things."""

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
    devices: int  # that read as fast as it takes
    reused_tokens: int  # of a prompt
    compute_seconds: float  # of those
    fetch_seconds: float


def shape_of(model: str) -> Shape:
    """Of a name in MODELS or a folder with a config.json. Raises ConfigError."""
    if model in MODELS:
        return MODELS[model]
    path = Path(model) / "config.json"
    expected = f"a folder with a config.json, or one of {', '.join(MODELS)}"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        config = config.get("text_config") or config
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


def sizes(options: Options) -> Sizes:
    """Raises ConfigError for a model or a GPU of which nothing is known."""
    per_token = shape_of(options.model).bytes_per_token(VALUE_BYTES[options.kv_dtype])
    prefill = options.prefill_tokens_per_second or PREFILL.get((options.model, options.gpu))
    if prefill is None:
        known = ", ".join(f"{model} on {gpu}" for model, gpu in PREFILL)
        raise ConfigError(
            "gpu", options.gpu, f"--prefill-tokens-per-second for {options.model} there; measured are {known}"
        )
    blocks = max(1, -(-CHUNK_BYTES[0] // (BLOCK_TOKENS * per_token)))
    reused = max(0, options.prompt_tokens - options.new_tokens)
    # In DRAM: prompts that arrive while one fetches and what waits to be written, four times over.
    under_way = max(4.0, 4 * options.requests_per_second / options.workers)
    read = options.requests_per_second * reused * per_token
    write = options.requests_per_second * options.new_tokens * per_token
    return Sizes(
        bytes_per_token=per_token,
        blocks_per_chunk=blocks,
        chunk_bytes=blocks * BLOCK_TOKENS * per_token,
        prefill_tokens_per_second=prefill,
        break_even_bytes_per_second=prefill * per_token,
        store_bytes=round(options.conversations * (options.prompt_tokens + options.new_tokens) * per_token),
        dram_bytes_per_worker=round(under_way * options.prompt_tokens * per_token),
        read_bytes_per_second=read,
        write_bytes_per_second=write,
        read_bytes_per_second_per_worker=read / options.workers,
        written_bytes_per_day=write * 86_400,
        devices=math.ceil((read + write) / (options.device_gbytes_per_second * 1e9)),
        reused_tokens=reused,
        compute_seconds=reused / prefill,
        fetch_seconds=reused * per_token / (options.store_gbytes_per_second * 1e9),
    )


def table(options: Options, found: Sizes) -> str:
    gigabytes = 1e9
    network = (found.read_bytes_per_second + found.write_bytes_per_second) * 8 / 1e9
    rows = [
        ("KV of a token", f"{found.bytes_per_token / 1024:.0f} KiB ({options.kv_dtype})"),
        ("chunk", f"--blocks-per-chunk {found.blocks_per_chunk}: {found.chunk_bytes / 2**20:.1f} MiB"),
        (
            "break-even",
            f"{found.break_even_bytes_per_second / gigabytes:.2f} GB/s to a worker: recompute makes that much "
            f"({found.prefill_tokens_per_second:.0f} tokens/s)",
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
            f"{found.write_bytes_per_second / gigabytes:.2f} GB/s, {found.written_bytes_per_day / 1e12:.0f} TB "
            "a day if it goes on like that: compare the devices' endurance",
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
            f"its {found.reused_tokens} tokens that are known: {1000 * found.compute_seconds:.0f} ms to compute, "
            f"{1000 * found.fetch_seconds:.0f} ms to fetch at {options.store_gbytes_per_second:g} GB/s",
        ),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help=f"a folder with a config.json, or {', '.join(MODELS)}")
    add("--gpu", help="default h200, the only one measured; another wants --prefill-tokens-per-second")
    add("--kv-dtype", help="bf16 (default) or fp8")
    add("--prefill-tokens-per-second", help="of one worker")
    add("--prompt-tokens", help="mean; default 2200")
    add("--new-tokens", help="of question and answer, which no tier holds yet; default 400")
    add("--conversations", help="to keep; default 1000")
    add("--requests-per-second", help="of all workers; default 3")
    add("--workers", help="default 1")
    add("--store-gbytes-per-second", help="from the store into one worker; default 3")
    add("--device-gbytes-per-second", help="of one NVMe, reads and writes together; default 3")
    add("--json", action="store_true", help="print JSON")
    values = vars(parser.parse_args(argv))
    as_json = values.pop("json")
    options = validated(Options, values)
    found = sizes(options)
    print(json.dumps(found._asdict(), indent=1) if as_json else table(options, found))
