"""The layout: everything that decides the meaning of a chunk's bytes. It goes into every key.

Workers with the same layout may use each other's chunks, so it must contain everything that could make their bytes
differ. Names and paths are left out: a checkpoint may have several places, and a name several checkpoints. The ranks
report what the engine's configuration does not contain (weights.py). docs/identity.md lists all inputs.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from components.worker.compat import (
    VLLM_VERSION,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    ModelConfig,
    SlidingWindowSpec,
    VllmConfig,
    build_offloading_config,
    current_platform,
    iter_layer_specs,
)
from kvstore.seal import seal_mode

# Block outermost, then heads. So a block of all layers is contiguous. The parts of tensor-parallel ranks, side by side,
# are the block of an engine with one rank.
WANTED_LAYOUT = "BHLNC"

# If it is set, vLLM seeds its block hashes with it.
_HASH_SEED = "PYTHONHASHSEED"

# Fields of a model's configuration that do not affect what it computes.
_NAMES = ("_name_or_path", "transformers_version")
_MULTIMODAL = (
    "media_io_kwargs",
    "mm_processor_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "video_pruning_rate",
    "video_pruning_method",
)

# Kinds of layers that were tested: answers with loaded KV equal those with computed KV (docs/models.md).
_TESTED = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, MambaSpec)
_UNTESTED = {
    "ChunkedLocalAttentionSpec": "chunked local attention",
    "CrossAttentionSpec": "cross-attention to an encoder",
    "EncoderOnlyAttentionSpec": "attention of an encoder",
    "HiSparseHotSpec": "sparse attention with KV in host memory",
    "HiSparseResidentSpec": "sparse attention with KV in host memory",
    "SinkFullAttentionSpec": "attention with sinks in KV blocks of their own",
    "SlidingWindowMLASpec": "MLA with a sliding window",
}


def choose_block_hash(config: VllmConfig) -> None:
    """Replace vLLM's default block hash, SHA-256 over a pickle, with SHA-256 over CBOR, which Dynamo's workers use. To
    be called before the engine creates its hash function. Without a seed, either is the same in every process."""
    if config.cache_config.prefix_caching_hash_algo == "sha256":
        config.cache_config.prefix_caching_hash_algo = "sha256_cbor"


def engine_layout(config: VllmConfig, kv_cache: KVCacheConfig, extra: Mapping[str, object]) -> dict[str, object]:
    """The layout of this engine's chunks, without the part that ranks report (identity.py). Raises ValueError, with
    what to do, if the chunks cannot be shared."""
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    if not str(cache.prefix_caching_hash_algo).startswith("sha256"):
        raise ValueError(
            f"kvtier: prefix-caching-hash-algo {cache.prefix_caching_hash_algo!r} given, expected sha256_cbor: "
            "a weaker hash could serve one prompt the KV of another"
        )
    check_kinds(kv_cache, speculative=config.speculative_config is not None)
    capability = current_platform.get_device_capability()
    offloading = build_offloading_config(config, kv_cache)
    copies = 1 if offloading.replicated_layout else parallel.world_size
    return {
        "engine": f"vllm {VLLM_VERSION}",
        "device": [current_platform.device_type, capability.as_version_str() if capability else ""],
        "attention": str(config.attention_config.backend),
        "model": described(model),
        "images": _multimodal(model),
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "hash": str(cache.prefix_caching_hash_algo),
        "chunk": [offloading.cache.blocks_per_chunk, offloading.cache.tokens_per_hash],
        "chunk_bytes": offloading.worker_kv_bytes_per_block * copies * offloading.cache.blocks_per_chunk,
        "layout": str(offloading.kv_cache_layout),
        "groups": [
            [type(spec).__name__, spec.block_size, sorted(group.layer_names)]
            for group in kv_cache.kv_cache_groups
            for spec in [group.kv_cache_spec]
        ],
        "states": sorted(
            {
                f"{spec.mamba_cache_mode} {spec.mamba_type} {spec.shapes} {spec.dtypes}"
                for spec in _layer_specs(kv_cache)
                if isinstance(spec, MambaSpec)
            }
        ),
        "draft": described_draft(config),
        # Otherwise a router would plan fetches of sealed chunks for workers without seals, and vice versa.
        **({"sealed": True} if _sealed(extra) else {}),
        # Another seed changes all block hashes.
        **({"hash_seed": os.environ[_HASH_SEED]} if _HASH_SEED in os.environ else {}),
    }


def _sealed(extra: Mapping[str, object]) -> bool:
    tiers = cast(list[dict[str, str]], extra.get("secondary_tiers", []))
    return any(seal_mode(tier.get("seal_key", ""), tier.get("seal", "")) != "off" for tier in tiers)


def check_kinds(kv_cache: KVCacheConfig, *, speculative: bool = False) -> None:
    """Raises ValueError for a model with kinds of layers that were not tested."""
    for spec in _layer_specs(kv_cache):
        name = type(spec).__name__
        if isinstance(spec, KVCacheSpec) and type(spec) not in _TESTED:
            raise ValueError(
                f"kvtier: {_UNTESTED.get(name, 'this kind of layer')} ({name}) is not supported: that its KV comes "
                "back right was never tested; run this model without kvtier"
            )
        if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "none":
            raise ValueError(
                f"kvtier: a hybrid model ({name}) without prefix caching is not supported: vLLM keeps no state to go "
                "on from; give --enable-prefix-caching, or run this model without kvtier"
            )
        if isinstance(spec, MambaSpec) and speculative:
            raise ValueError(
                f"kvtier: a hybrid model ({name}) with speculative decoding is not supported: that its KV comes back "
                "right was never tested; run this model without --speculative-config, or without kvtier"
            )


def _layer_specs(kv_cache: KVCacheConfig) -> list[KVCacheSpec]:
    return [spec for group in kv_cache.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)]


def tp_agnostic(config: VllmConfig, kv_cache: KVCacheConfig, extra: Mapping[str, object]) -> bool:
    """Whether a chunk has the same bytes, except for rounding, for any number of tensor-parallel ranks."""
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size
    if extra.get("tp_private") or parallel.world_size != ranks or parallel.decode_context_parallel_size != 1:
        return False
    specs = _layer_specs(kv_cache)
    if is_latent(kv_cache):
        return ranks == 1 or bool(build_offloading_config(config, kv_cache).replicated_layout)
    heads = config.model_config.get_total_num_kv_heads()
    if not all(
        type(spec) in (FullAttentionSpec, SlidingWindowSpec)
        and spec.num_kv_heads * ranks == heads
        and not spec.kv_quant_mode.is_per_token_head
        for spec in specs
    ):
        return False
    layout = config.cache_config.get_resolved_kv_cache_layout()
    if not layout.is_block_outermost:
        # vLLM places each layer's heads separately (canonical_layout) and omits padding, which a single rank has.
        return all(spec.page_size_padded is None for spec in specs)
    # Ranks' heads are adjacent only if a block holds nothing but heads.
    block_bytes = build_offloading_config(config, kv_cache).worker_kv_bytes_per_block
    return layout.name == WANTED_LAYOUT and all(
        len(set(iter_layer_specs(group.kv_cache_spec))) == 1
        and next(iter(iter_layer_specs(group.kv_cache_spec))).page_size_bytes * len(group.layer_names) == block_bytes
        for group in kv_cache.kv_cache_groups
    )


def is_latent(kv_cache: KVCacheConfig) -> bool:
    """Whether all KV is MLA's. Then every rank has all of it, and one rank stores it."""
    return all(type(spec) is MLAAttentionSpec for spec in _layer_specs(kv_cache))


def needs_canonical(config: VllmConfig, kv_cache: KVCacheConfig, extra: Mapping[str, object]) -> bool:
    """Whether ranks have to place their parts of a block side by side for the chunk to be TP-agnostic. With one rank,
    or if each rank has all KV, it is TP-agnostic anyway."""
    ranks = config.parallel_config.tensor_parallel_size
    return ranks > 1 and not is_latent(kv_cache) and tp_agnostic(config, kv_cache, extra)


def described_draft(config: VllmConfig) -> list[object]:
    """The draft model, whose KV is in the same chunks; empty if there is none."""
    speculative = config.speculative_config
    if speculative is None or not speculative.uses_draft_kv_cache() or speculative.draft_model_config is None:
        return []
    return [str(speculative.method), described(speculative.draft_model_config)]


def described(model: ModelConfig) -> list[str]:
    """A model's architecture: how its code uses the weights."""
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _NAMES}
    return [repr(sorted(config.items())), str(model.quantization)]


def _multimodal(model: ModelConfig) -> list[str]:
    """How images and other media become embeddings, apart from the weights. vLLM's hash of a medium covers its bytes
    and the request's settings."""
    settings = model.multimodal_config
    if settings is None:
        return []
    folder = _local_folder(str(model.model), model.revision)
    files = sorted(path for path in folder.glob("*processor*.json")) if folder is not None else []
    return [
        *(f"{name} {getattr(settings, name, None)!r}" for name in _MULTIMODAL),
        *(f"{path.name} {hashlib.blake2b(path.read_bytes()).hexdigest()}" for path in files),
        f"{model.model} {model.revision}" if folder is None else "",
    ]


def _local_folder(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
