"""Creates small models with random weights whose KV cache differs from a Llama's.

    python -m graphs.tiny_kinds KIND FOLDER

mla        DeepSeek-V3 without experts: latent KV
sliding    Mistral in which all layers have a window
mixed      Gemma 3: layers with a window, and full ones between them
hybrid     Qwen3.5: Gated DeltaNet layers, and full ones between them
mtp        mla, with a layer that guesses the token after the next (multi-token prediction)
eagle      the small Llama, and in the folder `draft` an EAGLE head for it
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphs.tiny_model import ALPHABET, LOGITS_GAIN, SPECIAL, make_tiny_model, spoken_only, write_json, write_tokenizer

if TYPE_CHECKING:
    import torch

WINDOW = 256
_HIDDEN, _MLP, _LAYERS = 256, 512, 4
# Embeddings scaled by this factor make the next token depend mostly on the last one, so that some drafts are accepted.
_OBVIOUS = 10.0
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_MLA = {
    "model_type": "deepseek_v3",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,  # the only one that the CPU kernel supports
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": _LAYERS + 1,
    "rope_interleave": True,
    # As in DeepSeek. With plain RoPE, vLLM 0.31's CPU engine rotates the first token of a step wrongly.
    "rope_parameters": {
        **_ROPE,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "mla": _MLA,
    "mtp": {**_MLA, "num_nextn_predict_layers": 1},
    "sliding": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "rope_parameters": _ROPE,
    },
    "mixed": {
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "hybrid": {
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"] * (_LAYERS // 2),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
}
KINDS = ("dense", *_CONFIGS, "eagle")


def make_tiny_kind(folder: Path, kind: str, *, seed: int = 7, max_tokens: int = 8192) -> Path:
    """Write a model of the kind into `folder` unless it is there already, and return the folder. Tokens, alphabet and
    spread as in make_tiny_model."""
    if kind in ("dense", "eagle"):
        make_tiny_model(folder, seed=seed, max_tokens=max_tokens)
        if kind == "eagle":
            _make_eagle(folder, folder / "draft", seed)
        return folder
    if not (folder / "model.safetensors").exists():
        vocab = write_tokenizer(folder, max_tokens)
        _make(folder, _CONFIGS[kind], vocab, seed, max_tokens)
    return folder


def speculative(folder: Path, kind: str) -> dict[str, object] | None:
    """The value for --speculative-config; None for a kind without speculative decoding."""
    match kind:
        case "eagle":
            return {"method": "eagle", "model": str(folder / "draft"), "num_speculative_tokens": 2}
        case "mtp":
            return {"method": "mtp", "num_speculative_tokens": 1}
    return None


def _make(folder: Path, given: dict[str, Any], vocab: dict[str, int], seed: int, max_tokens: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **given,
        vocab_size=len(vocab),
        hidden_size=_HIDDEN,
        intermediate_size=_MLP,
        num_hidden_layers=_LAYERS,
        hidden_act="silu",
        max_position_embeddings=max_tokens,
        tie_word_embeddings=False,
        bos_token_id=vocab[SPECIAL[0]],
        eos_token_id=vocab[SPECIAL[3]],
        pad_token_id=vocab[SPECIAL[3]],
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for non-matrix parameters, which keep transformers' random values
        model = AutoModelForCausalLM.from_config(config)
        weights = {name: _drawn(name, weight.detach(), generator) for name, weight in model.state_dict().items()}
        spoken = torch.randn(len(ALPHABET), _HIDDEN, generator=generator) * (LOGITS_GAIN / _HIDDEN**0.5)
        weights["lm_head.weight"] = spoken_only(vocab, spoken)
        if "num_nextn_predict_layers" in given:
            weights["model.embed_tokens.weight"] *= _OBVIOUS
            weights |= _mtp(weights, generator)
    config.architectures = [type(model).__name__]
    write_json(folder / "config.json", config.to_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drawn(name: str, weight: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """A matrix with a spread that makes one wrong block change the text; any other parameter unchanged."""
    import torch

    if weight.dim() < 2:
        return weight.clone()
    drawn: torch.Tensor = torch.randn(weight.shape, generator=generator)
    if "embed_tokens" in name:
        return drawn
    gain = 1.0 if ".mlp." in name else 2.0
    drawn *= gain / weight[0].numel() ** 0.5
    return drawn


def _guessing(weights: dict[str, "torch.Tensor"], like: str, generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """The weights of a layer with the same names as `like`, which adds little to its input."""
    made = {
        name.removeprefix(like): _drawn(name, weight, generator)
        for name, weight in weights.items()
        if name.startswith(like)
    }
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        made[name] *= 0.1
    return made


def _joining() -> "torch.Tensor":
    """A projection that passes the last token through and ignores the last hidden state."""
    import torch

    return torch.cat([torch.eye(_HIDDEN), torch.zeros(_HIDDEN, _HIDDEN)], dim=1)


def _mtp(weights: dict[str, "torch.Tensor"], generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    """One more layer, and the projection that joins the last token and the last hidden state."""
    import torch

    made = _guessing(weights, f"model.layers.{_LAYERS - 1}.", generator) | {
        "enorm.weight": torch.ones(_HIDDEN),
        "hnorm.weight": torch.ones(_HIDDEN),
        "eh_proj.weight": _joining(),
        "shared_head.norm.weight": torch.ones(_HIDDEN),
        "shared_head.head.weight": weights["lm_head.weight"].clone(),
        "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    return {f"model.layers.{_LAYERS}.{name}": weight for name, weight in made.items()}


def _make_eagle(target: Path, folder: Path, seed: int) -> None:
    """One layer, and the projection that joins the last token and the last hidden state. Embedding and output are those
    of the target model."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    if (folder / "model.safetensors").exists():
        return
    config = json.loads((target / "config.json").read_text())
    write_tokenizer(folder, config["max_position_embeddings"])
    write_json(folder / "config.json", {**config, "num_hidden_layers": 1})
    generator = torch.Generator().manual_seed(seed + 1)
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"] *= _OBVIOUS
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    layer = _guessing(weights, "model.layers.0.", generator)
    del layer["input_layernorm.weight"]
    draft = {f"layers.0.{name}": weight for name, weight in layer.items()} | {"fc.weight": _joining()}
    save_file(draft, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m graphs.tiny_kinds {'|'.join(KINDS)} FOLDER")
    print(make_tiny_kind(Path(sys.argv[2]), sys.argv[1]))
