"""Kinds of KV: which an engine is refused for at its start, in words, and what of a kind is in the layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from components.worker import layout
from components.worker.loads import Loads

ATTENTION = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
LATENT = {"block_size": 16, "num_kv_heads": 1, "head_size": 576, "dtype": torch.float32}
FULL = FullAttentionSpec(**ATTENTION)
CHUNKED = ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=256)
UNTESTED = [
    (CHUNKED, r"chunked local attention \(ChunkedLocalAttentionSpec\)"),
    (SlidingWindowMLASpec(**LATENT, sliding_window=256), r"MLA with a sliding window \(SlidingWindowMLASpec\)"),
    (KVCacheSpec(block_size=16), r"this kind of layer \(KVCacheSpec\)"),
]


def mamba(mode: str) -> MambaSpec:
    return MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode=mode)


def cache(*specs: KVCacheSpec) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(("spec", "words"), UNTESTED)
def test_a_kind_that_was_never_tested_is_refused_at_the_start(spec: KVCacheSpec, words: str) -> None:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256_cbor"),
        model_config=None,
        parallel_config=None,
        speculative_config=None,
    )
    with pytest.raises(ValueError, match=f"^kvtier: {words} is not supported: .*; run this model without kvtier$"):
        layout.engine_layout(config, cache(FULL, spec), {})


def test_a_kind_is_found_in_a_group_of_layers_that_differ() -> None:
    mixed = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": CHUNKED, "b": CHUNKED})
    with pytest.raises(ValueError, match="chunked local attention"):
        layout.check_kinds(cache(mixed))


def test_a_hybrid_model_without_prefix_caching_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hybrid model \(MambaSpec\) without prefix caching .*enable-prefix-caching"):
        layout.check_kinds(cache(FULL, mamba("none")))


def test_a_hybrid_model_with_speculative_decoding_is_refused() -> None:
    words = r"hybrid model \(MambaSpec\) with speculative decoding .* without --speculative-config, or without kvtier"
    with pytest.raises(ValueError, match=words):
        layout.check_kinds(cache(FULL, mamba("align")), speculative=True)
    layout.check_kinds(cache(FULL), speculative=True)


@pytest.mark.parametrize(
    "specs",
    [
        [FULL],
        [MLAAttentionSpec(**LATENT)],
        [SlidingWindowSpec(**ATTENTION, sliding_window=256)],
        [FULL, SlidingWindowSpec(**ATTENTION, sliding_window=256)],
        [FULL, mamba("align")],
    ],
)
def test_what_was_tested_is_not_refused(specs: list[KVCacheSpec]) -> None:
    layout.check_kinds(cache(*specs))


def test_a_load_is_waited_for_on_an_engine_without_prefix_caching() -> None:
    """vLLM's CPU engine has none for MLA, and then keeps no list of the chunks that are being loaded."""
    groups = (SimpleNamespace(tokens_per_chunk=16),)
    config = SimpleNamespace(kv_group_configs=groups, num_workers=1)
    scheduler: Any = SimpleNamespace(_chunks_being_loaded=None, _jobs={1: SimpleNamespace(keys=set())}, config=config)
    loads = Loads(scheduler, row_bytes=1)
    loads._between = {1: float("inf")}
    with loads.waited_for(16, 0.0):
        assert scheduler._chunks_being_loaded is None
