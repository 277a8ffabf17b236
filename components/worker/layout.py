"""What decides the meaning of a chunk's bytes, written down as the layout that goes into every key.

Two workers with the same layout may use each other's chunks; anything that could make their bytes differ must be in it.
Names and paths are not: the same checkpoint may lie in different places, and a name may be given to different weights.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from components.worker.compat import VLLM_VERSION, KVCacheConfig, VllmConfig, current_platform

# Of each weight file its size and this many evenly spread samples go into the digest. A fine-tuned checkpoint differs
# in nearly every tensor; reading all of a 70B model would take minutes.
_SAMPLES = 32
_SAMPLE_BYTES = 16 << 10
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def engine_layout(config: VllmConfig, kv_cache: KVCacheConfig, extra: Mapping[str, object]) -> dict[str, object]:
    """The layout of this engine's chunks. Raises ValueError, with what to do, if they cannot be shared."""
    if "PYTHONHASHSEED" not in os.environ:
        raise ValueError("kvtier: PYTHONHASHSEED is not set: set it to 0 on every worker, or they share no blocks")
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    if not str(cache.prefix_caching_hash_algo).startswith("sha256"):
        raise ValueError(
            f"kvtier: prefix-caching-hash-algo {cache.prefix_caching_hash_algo!r} given, expected sha256_cbor: "
            "a weaker hash could serve one prompt the KV of another"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise ValueError("kvtier: calculate-kv-scales makes every engine's KV its own; give static scales instead")
    capability = current_platform.get_device_capability()
    return {
        "engine": f"vllm {VLLM_VERSION}",
        "device": [current_platform.device_type, capability.as_version_str() if capability else ""],
        "attention": str(getattr(config.attention_config, "backend", None)),
        "model": model_digest(config),
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "hash": [str(cache.prefix_caching_hash_algo), os.environ["PYTHONHASHSEED"]],
        "chunk": [extra.get("blocks_per_chunk"), extra.get("block_size")],
        "parallel": [
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.prefill_context_parallel_size,
            parallel.decode_context_parallel_size,
        ],
        "layers": "together" if layers_together(config, kv_cache) else "apart",
        "groups": [
            [type(spec).__name__, spec.block_size, spec.page_size_bytes, sorted(group.layer_names)]
            for group in kv_cache.kv_cache_groups
            for spec in [group.kv_cache_spec]
        ],
    }


def layers_together(config: VllmConfig, kv_cache: KVCacheConfig) -> bool:
    """Whether a block's KV of all layers is one piece of HBM, which is what vLLM's V1 model runner makes of it for a
    connector that asks, and its V2 runner does not yet. A chunk's bytes are in another order then."""
    specs = [group.kv_cache_spec for group in kv_cache.kv_cache_groups]
    indexed = len(specs) == 1 and getattr(specs[0], "indexes_kv_by_block_stride", False)
    return bool(indexed and not config.use_v2_model_runner)


def check_layers(expected: bool, found: bool) -> None:
    """Raises ValueError, with what to do, if HBM is laid out otherwise than the keys say."""
    if expected is not found:
        runner, words = (1, "apart") if expected else (0, "together")
        raise ValueError(
            f"kvtier: this engine keeps the KV of its layers {words}, which it was not expected to: set "
            f"VLLM_USE_V2_MODEL_RUNNER={runner} (beside another connector V1 does not keep it together)"
        )


def model_digest(config: VllmConfig) -> str:
    """Digest of the model's configuration and of its weights, as far as they lie on this host."""
    model, load = config.model_config, config.load_config
    digest = hashlib.blake2b(digest_size=16)
    described = {name: value for name, value in model.hf_config.to_dict().items() if name not in ("_name_or_path",)}
    digest.update(repr(sorted(described.items(), key=lambda item: item[0])).encode())
    digest.update(f"{load.load_format} {model.quantization} {model.seed}".encode())
    folder = _local_folder(str(model.model), model.revision)
    if str(load.load_format) == "dummy":
        return digest.hexdigest()  # drawn from the seed
    if folder is None:
        digest.update(f"{model.model} {model.revision}".encode())
        return digest.hexdigest()
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        digest.update(_samples(path))
    return digest.hexdigest()


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


def _samples(path: Path) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(size * number // _SAMPLES)
            hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.digest()
