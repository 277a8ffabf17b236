"""Creates a small Llama with random weights: the model of the demo and of the end-to-end tests.

Engines load it like any model (config.json, safetensors, tokenizer, chat template). The weights are drawn from a fixed
seed, with a spread that is wide enough for different prompts to give different text. So a wrong KV block shows in the
tokens, not only in the last digits.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The only tokens that the model ever samples. Their text tokenizes back to the same tokens, so a conversation's next
# turn repeats the previous one token by token.
ALPHABET = "abcdefghijklmnopqrstuvwxyz "
SPECIAL = ("<|begin_of_text|>", "<|start|>", "<|end|>", "<|eot|>")
# Spreads the logits over several nats: greedy choices are clear, not ties.
LOGITS_GAIN = 6.0
_MARK = "kvtier_random_weights"  # in config.json
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def make_tiny_model(
    folder: Path, *, seed: int = 7, layers: int = 4, heads: int = 4, kv_heads: int = 2, max_tokens: int = 8192
) -> Path:
    """Write the model into `folder` unless it is there already, and return the folder.

    Shape: `layers` layers of width 256, `heads` heads of 64, `kv_heads` KV heads, float32. As it is: 4 KiB of KV per
    token, 512 KiB per block of 128 tokens. One token is one byte of ASCII text.
    """
    import torch

    if (folder / "model.safetensors").exists():
        return folder
    vocab = write_tokenizer(folder, max_tokens)
    hidden, head_dim, mlp = 256, 64, 512
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        _MARK: True,
        "vocab_size": len(vocab),
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_tokens,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": vocab[SPECIAL[0]],
        "eos_token_id": vocab[SPECIAL[3]],
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, gain: float) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)
        return drawn

    lm_head = spoken_only(vocab, random(len(ALPHABET), hidden, LOGITS_GAIN))
    weights = {
        "model.embed_tokens.weight": torch.randn(len(vocab), hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": lm_head,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            # Sharp queries and keys make attention pick single positions: one wrong block changes the text.
            prefix + "self_attn.q_proj.weight": random(heads * head_dim, hidden, 2.0),
            prefix + "self_attn.k_proj.weight": random(kv_heads * head_dim, hidden, 2.0),
            prefix + "self_attn.v_proj.weight": random(kv_heads * head_dim, hidden, 2.0),
            prefix + "self_attn.o_proj.weight": random(hidden, heads * head_dim, 2.0),
            prefix + "mlp.gate_proj.weight": random(mlp, hidden, 1.0),
            prefix + "mlp.up_proj.weight": random(mlp, hidden, 1.0),
            prefix + "mlp.down_proj.weight": random(hidden, mlp, 1.0),
        }
    write_weights(folder / "model.safetensors", weights)
    return folder


def has_random_weights(model: str) -> bool:
    """Whether a folder is one that this module made."""
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((Path(model) / "config.json").read_text()).get(_MARK))
    return False


def make_tiny_adapter(folder: Path, model: Path, *, seed: int, rank: int = 4) -> Path:
    """Write a LoRA adapter for the tiny model into `folder`, and replace an existing one. It is drawn from the seed,
    and strong enough to change the text. Returns the folder."""
    import torch

    config = json.loads((model / "config.json").read_text())
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj."
            down = torch.randn(rank, hidden, generator=generator) / hidden**0.5
            weights[prefix + "lora_A.weight"] = down
            weights[prefix + "lora_B.weight"] = torch.randn(rows * config["head_dim"], rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "adapter_model.safetensors", weights)
    targets = ["q_proj", "k_proj", "v_proj"]
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets},
    )
    return folder


def write_tokenizer(folder: Path, max_tokens: int) -> dict[str, int]:
    """Write the files of a model's folder except its configuration and weights. Returns the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": vocab[SPECIAL[0]], "eos_token_id": vocab[SPECIAL[3]]},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[3],
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_tokens,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return vocab


def spoken_only(vocab: dict[str, int], rows: "torch.Tensor") -> "torch.Tensor":
    """The weights of an output layer that samples only the alphabet, whose rows are given."""
    import torch
    from tokenizers import pre_tokenizers

    spoken = [vocab[pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0]] for c in ALPHABET]
    lm_head = torch.zeros(len(vocab), rows.shape[1])
    lm_head[spoken] = rows
    return lm_head


def write_weights(path: Path, weights: "dict[str, torch.Tensor]") -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes mode 0600, which a container's user could not read


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m graphs.tiny_model FOLDER")
    print(make_tiny_model(Path(sys.argv[1])))
