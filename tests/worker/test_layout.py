"""Who shares chunks with whom: what must make the layout another one, and what must not."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from vllm.config import CacheConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from components.worker import connector, identity, layout, weights
from components.worker.connector import KvtierConnector
from tests.worker.stock import Ranks, has

HEADS, BLOCKS = 8, 10
FULL = FullAttentionSpec(16, num_kv_heads=HEADS, head_size=4, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(16, num_kv_heads=HEADS, head_size=4, dtype=torch.bfloat16, sliding_window=32)
LATENT = MLAAttentionSpec(16, num_kv_heads=1, head_size=36, dtype=torch.bfloat16)
HEADS_OUTERMOST, LAYERS_OUTERMOST, LAYERS_FIRST = "BHLNC", "LBHNC", "BLHNC"


class Engine(NamedTuple):
    """What vLLM makes the connector of, as far as it is looked at."""

    config: Any
    kv_cache: Any
    extra: dict[str, object]

    @property
    def layout(self) -> dict[str, object]:
        return self.with_weights("model")

    def with_weights(self, *models: str) -> dict[str, object]:
        """All that goes into the digest when ranks say that they have these."""
        written: list[dict[str, object]] = []
        ranks = Ranks(self.config, *(has(model) for model in models))
        with (
            patch.object(identity, "_find_executor", lambda config: ranks),
            patch.object(identity, "layout_digest", lambda layout: (written.append(layout), bytes(32))[1]),
        ):
            connector._identity(self.config, self.kv_cache)
        (found,) = written
        return found

    @property
    def needs_canonical(self) -> bool:
        return layout.needs_canonical(*self)


def engine(
    folder: Path,
    ranks: int = 1,
    kv_layout: str = HEADS_OUTERMOST,
    specs: tuple[Any, ...] = (FULL,),
    *,
    layers: int = 2,
    **extra: object,
) -> Engine:
    """With a group of layers of each spec, which says what all ranks together have; heads are split among ranks."""
    latent = all(type(spec) is MLAAttentionSpec for spec in specs)
    split = [spec if type(spec) is MLAAttentionSpec else sharded(spec, ranks) for spec in specs]
    groups = [KVCacheGroupSpec([f"{n}.{layer}" for layer in range(layers)], spec) for n, spec in enumerate(split)]
    block_bytes = layers * max(spec.page_size_bytes for spec in split)  # groups lie over each other
    places = [KVCacheTensor(BLOCKS * block_bytes, group.layer_names, 1, 1) for group in groups]
    kv_cache = KVCacheConfig(BLOCKS, places, groups, kv_tp_replicas=ranks if latent else 1)
    model = SimpleNamespace(
        model=str(folder),
        revision=None,
        quantization=None,
        seed=0,
        dtype="bfloat16",
        use_mla=latent,
        multimodal_config=None,
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": layers}),
        get_total_num_kv_heads=lambda: HEADS,
    )
    cache = SimpleNamespace(
        prefix_caching_hash_algo="sha256_cbor",
        cache_dtype="auto",
        block_size=specs[0].block_size,
        enable_prefix_caching=True,
        prefix_match_unit=None,
        kv_cache_layout=kv_layout,
        get_resolved_kv_cache_layout=lambda: KVCacheLayout[config.cache_config.kv_cache_layout],
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=ranks,
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        world_size=ranks,
        rank=0,
        distributed_executor_backend="mp" if ranks > 1 else "uni",
        nnodes_within_dp=1,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
    )
    config = SimpleNamespace(
        model_config=model,
        cache_config=cache,
        parallel_config=parallel,
        load_config=SimpleNamespace(load_format="auto"),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra, engine_id="engine"),
        kv_events_config=None,
        use_v2_model_runner=True,
    )
    return Engine(config, kv_cache, extra)


def sharded(spec: Any, ranks: int) -> Any:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return replace(spec, kv_cache_specs={name: sharded(one, ranks) for name, one in spec.kv_cache_specs.items()})
    padded = None if spec.page_size_padded is None else spec.page_size_padded // ranks
    return replace(spec, num_kv_heads=max(1, spec.num_kv_heads // ranks), page_size_padded=padded)


def changed(one: Engine, **changes: object) -> Engine:
    """The engine with something of its configuration set otherwise, such as `parallel_config__world_size`."""
    for name, value in changes.items():
        *path, last = name.split("__")
        part = one.config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    return one


# ---- what is in it


def test_a_layout_follows_the_weights_and_not_the_path(tmp_path: Path) -> None:
    one, elsewhere = engine(tmp_path), engine(tmp_path / "other place")
    assert one.layout == elsewhere.layout
    assert one.layout != elsewhere.with_weights("fine-tuned")
    assert one.layout == elsewhere.with_weights("model", "model")
    assert one.layout != elsewhere.with_weights("model", "fine-tuned")


def test_ranks_that_should_be_alike_and_are_not_share_with_their_like_alone(tmp_path: Path) -> None:
    two = engine(tmp_path, 2)
    assert two.with_weights("model", "model")["parallel"] == "any"
    assert two.with_weights("model", "other")["parallel"] == [2, 1, 1, 1]


def test_an_engine_whose_model_is_not_known_does_not_start(tmp_path: Path) -> None:
    ranks = Ranks(None, has("model"), weights.Unknown("kvtier: the weights layer.weight cannot be read"))
    with (
        patch.object(identity, "_find_executor", lambda config: ranks),
        pytest.raises(ValueError, match=r"^kvtier: the weights layer\.weight cannot be read$"),
    ):
        connector._identity(*engine(tmp_path)[:2])


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"kv_transfer_config__engine_id": "other"}, True),
        ({"parallel_config__data_parallel_size": 4, "parallel_config__data_parallel_index": 3}, True),
        ({"use_v2_model_runner": False}, True),
        ({"model_config__dtype": "float16"}, False),
        ({"model_config__quantization": "fp8"}, False),
        ({"model_config__hf_config": SimpleNamespace(to_dict=lambda: {"layers": 3})}, False),
        ({"model_config__hf_config": SimpleNamespace(to_dict=lambda: {"layers": 2, "_name_or_path": "other"})}, True),
        (
            {"model_config__hf_config": SimpleNamespace(to_dict=lambda: {"layers": 2, "transformers_version": "9"})},
            True,
        ),
        ({"model_config__hf_config": SimpleNamespace(to_dict=lambda: {"layers": 2, "rope_theta": 1e6})}, False),
        ({"model_config__revision": "other"}, True),
        ({"model_config__seed": 1}, True),
        ({"load_config__load_format": "dummy"}, True),
        ({"model_config__multimodal_config": None}, True),
        ({"model_config__multimodal_config": SimpleNamespace()}, False),
        ({"cache_config__cache_dtype": "fp8"}, False),
        ({"cache_config__prefix_caching_hash_algo": "sha256"}, False),
        ({"cache_config__kv_cache_layout": LAYERS_OUTERMOST}, False),
        ({"cache_config__kv_cache_layout": LAYERS_FIRST}, False),
        ({"attention_config": SimpleNamespace(backend="FLASHINFER")}, False),
        ({"parallel_config__pipeline_parallel_size": 2, "parallel_config__world_size": 2}, False),
        ({"parallel_config__prefill_context_parallel_size": 2, "parallel_config__world_size": 2}, False),
        ({"parallel_config__decode_context_parallel_size": 2}, False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),  # the same in every process
)
def test_whatever_changes_the_bytes_changes_the_layout(tmp_path: Path, changes: dict[str, Any], same: bool) -> None:
    assert (engine(tmp_path).layout == changed(engine(tmp_path), **changes).layout) == same


def test_every_engine_hashes_as_dynamos_workers_do_and_a_seed_of_its_own_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    plain = changed(engine(tmp_path), cache_config__prefix_caching_hash_algo="sha256")
    layout.choose_block_hash(plain.config)
    assert plain.layout == engine(tmp_path).layout
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert plain.layout == {**engine(tmp_path).layout, "hash_seed": "0"}


def with_images(folder: Path, files: dict[str, object], **settings: object) -> Engine:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return changed(engine(folder), model_config__multimodal_config=SimpleNamespace(**settings))


def test_how_images_are_prepared_is_in_the_layout(tmp_path: Path) -> None:
    """Their embeddings are made by the model's own settings and by the engine's."""
    pixels, cropped = {"preprocessor_config.json": {"size": 1}}, {"preprocessor_config.json": {"size": 2}}
    one = with_images(tmp_path / "one", pixels).layout
    assert one == with_images(tmp_path / "again", {**pixels, "config.json": {}}).layout
    others = [
        with_images(tmp_path / "cropped", cropped),
        with_images(tmp_path / "video", {**pixels, "video_preprocessor_config.json": {}}),
        with_images(tmp_path / "settings", pixels, mm_processor_kwargs={"num_crops": 4}),
        with_images(tmp_path / "backend", pixels, mm_encoder_attn_backend="other"),
        with_images(tmp_path / "pruned", pixels, video_pruning_rate=0.5),
    ]
    assert len({repr(one), *(repr(other.layout) for other in others)}) == 6
    assert one == with_images(tmp_path / "cache", pixels, mm_processor_cache_gb=4).layout


def test_of_a_model_with_images_that_lies_elsewhere_name_and_revision_are_in_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_local_folder", lambda model, revision: None)
    engines = [with_images(tmp_path / name, {}) for name in "abc"]
    for one in engines:
        one.config.model_config.model = "owner/model"
    engines[2].config.model_config.revision = "other"
    first, again, other = (one.layout for one in engines)
    assert first == again != other


def drafting(folder: Path, method: str = "eagle", *, uses_kv: bool = True, layers: int = 1) -> Engine:
    draft = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"layers": layers}), quantization=None)
    speculative = SimpleNamespace(method=method, uses_draft_kv_cache=lambda: uses_kv, draft_model_config=draft)
    return changed(engine(folder), speculative_config=speculative)


def test_a_draft_model_whose_kv_is_in_the_chunks_is_in_the_layout(tmp_path: Path) -> None:
    without = engine(tmp_path).layout
    assert drafting(tmp_path, "ngram", uses_kv=False).layout == without
    several = [drafting(tmp_path), drafting(tmp_path, "mtp"), drafting(tmp_path, layers=2)]
    assert len({repr(without), *(repr(one.layout) for one in several)}) == 4
    assert drafting(tmp_path).layout == several[0].layout


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({}, True),
        ({"blocks_per_chunk": 1}, True),
        ({"blocks_per_chunk": 2}, False),
        ({"block_size": 16}, True),  # a chunk's, and in tokens
        ({"block_size": 32}, False),
        ({"specs": (replace(FULL, head_size=8),)}, False),
        ({"specs": (replace(FULL, block_size=32),)}, False),
        ({"specs": (WINDOW,)}, False),
        ({"specs": (FULL, WINDOW)}, False),
        ({"layers": 3}, False),
        ({"unknown": 1}, True),
    ],
    ids=str,
)
def test_whatever_changes_the_rows_changes_the_layout(tmp_path: Path, other: dict[str, Any], same: bool) -> None:
    assert (engine(tmp_path).layout == engine(tmp_path, **other).layout) == same


def test_a_chunk_is_the_same_however_its_length_is_said(tmp_path: Path) -> None:
    assert engine(tmp_path, blocks_per_chunk=2).layout == engine(tmp_path, block_size=32).layout


def test_an_engine_that_cannot_share_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected sha256_cbor"):
        _ = changed(engine(tmp_path), cache_config__prefix_caching_hash_algo="xxhash").layout


def test_no_engine_makes_scales_of_its_first_prompt() -> None:
    """calculate_kv_scales did, until vLLM 0.31: chunks of such an engine could not be shared."""
    assert not hasattr(CacheConfig, "calculate_kv_scales")


# ---- tensor parallelism

KINDS: dict[str, Any] = {
    "full": FULL,
    "window": WINDOW,
    "latent": LATENT,
    "wide": replace(WINDOW, head_size=8),
    "mixed": UniformTypeKVCacheSpecs(16, {"0.0": FULL, "0.1": replace(FULL, head_size=8)}),
    "quantized": replace(FULL, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),
    "scaled": replace(FULL, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD),
}


@pytest.mark.parametrize(
    ("kv_layout", "kinds", "alike"),
    [
        (HEADS_OUTERMOST, "full", True),
        (HEADS_OUTERMOST, "window", True),
        (HEADS_OUTERMOST, "full window", True),
        (HEADS_OUTERMOST, "quantized", True),
        (HEADS_OUTERMOST, "latent", True),
        (HEADS_OUTERMOST, "scaled", False),
        (HEADS_OUTERMOST, "full wide", False),  # the smaller leaves room at a rank's end
        (HEADS_OUTERMOST, "mixed", False),
        (HEADS_OUTERMOST, "full latent", False),
        (LAYERS_FIRST, "full", False),
        (LAYERS_FIRST, "full window", False),
        (LAYERS_FIRST, "latent", True),
        ("BLNHC", "full", False),
        (LAYERS_OUTERMOST, "full", True),
        (LAYERS_OUTERMOST, "full window", True),
        (LAYERS_OUTERMOST, "mixed", True),
        (LAYERS_OUTERMOST, "latent", True),
        (LAYERS_OUTERMOST, "scaled", False),
        ("LBNHC", "full", True),
    ],
)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 4), (1, 8)], ids=str)
def test_engines_share_across_tensor_parallelism_where_their_chunks_are_alike(
    tmp_path: Path, kv_layout: str, kinds: str, alike: bool, ranks: tuple[int, int]
) -> None:
    specs = tuple(KINDS[kind] for kind in kinds.split())
    one, other = (engine(tmp_path, number, kv_layout, specs) for number in ranks)
    assert (one.layout == other.layout) == alike
    for number, of in zip(ranks, (one, other), strict=True):
        assert (of.layout["parallel"] == "any") == alike or number == 1
        assert of.needs_canonical == (alike and number > 1 and kinds != "latent")
    assert engine(tmp_path, ranks[0], kv_layout, specs).layout == one.layout


@pytest.mark.parametrize("kv_layout", [HEADS_OUTERMOST, LAYERS_OUTERMOST])
@pytest.mark.parametrize("specs", [(FULL,), (LATENT,)], ids=["heads", "latent"])
def test_engines_that_keep_to_themselves_share_with_their_like_alone(
    tmp_path: Path, kv_layout: str, specs: tuple[Any, ...]
) -> None:
    one, other, again = (engine(tmp_path, number, kv_layout, specs, tp_private=True) for number in (1, 2, 2))
    assert one.layout != other.layout == again.layout
    assert other.layout != engine(tmp_path, 2, kv_layout, specs).layout
    assert not one.needs_canonical
    assert not other.needs_canonical


def test_of_heads_that_several_ranks_have_nothing_is_shared(tmp_path: Path) -> None:
    """Sixteen ranks, eight heads: each head twice."""
    one, other = engine(tmp_path, 8), engine(tmp_path, 16)
    assert one.layout != other.layout
    assert one.needs_canonical
    assert not other.needs_canonical


@pytest.mark.parametrize(
    "change",
    [
        {"parallel_config__pipeline_parallel_size": 2, "parallel_config__world_size": 4},
        {"parallel_config__prefill_context_parallel_size": 2, "parallel_config__world_size": 4},
        {"parallel_config__decode_context_parallel_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("specs", [(FULL,), (LATENT,)], ids=["heads", "latent"])
@pytest.mark.parametrize("kv_layout", [HEADS_OUTERMOST, LAYERS_OUTERMOST])
def test_with_other_parallelism_beside_it_nothing_is_shared(
    tmp_path: Path, kv_layout: str, specs: tuple[Any, ...], change: dict[str, Any]
) -> None:
    whole, parallel = engine(tmp_path, 1, kv_layout, specs), changed(engine(tmp_path, 2, kv_layout, specs), **change)
    assert whole.layout != parallel.layout
    assert not parallel.needs_canonical


@pytest.mark.parametrize(
    "change",
    [
        {"parallel_config__distributed_executor_backend": "ray"},
        {"parallel_config__nnodes_within_dp": 2},
    ],
    ids=str,
)
def test_a_latent_that_each_rank_stores_for_itself_is_not_shared(tmp_path: Path, change: dict[str, Any]) -> None:
    """A row has it twice then."""
    whole, alone = engine(tmp_path, 1, specs=(LATENT,)), engine(tmp_path, 2, specs=(LATENT,))
    twice = changed(engine(tmp_path, 2, specs=(LATENT,)), **change)
    assert whole.layout == alone.layout != twice.layout
    assert twice.layout["parallel"] == [2, 1, 1, 1]
    assert twice.layout["chunk_bytes"] == 2 * int(str(alone.layout["chunk_bytes"]))
    assert not twice.needs_canonical


def test_pages_with_padding_are_not_shared(tmp_path: Path) -> None:
    """A rank that is all keeps it in its rows, and ranks that place their heads leave it out. (Heads outermost there is
    none.)"""
    padded = replace(FULL, page_size_padded=2 * FULL.page_size_bytes)
    one, other = (engine(tmp_path, ranks, LAYERS_OUTERMOST, (padded,)) for ranks in (1, 2))
    assert one.layout != other.layout


def test_engines_with_seals_share_with_their_like_alone(tmp_path: Path) -> None:
    def tier(**seals: str) -> list[dict[str, str]]:
        return [{"type": "kvtier", "store": "a:1", **seals}]

    plain = [tier(), tier(seal_key="", seal=""), tier(seal_key="k", seal="off")]
    sealed = [tier(seal_key="k"), tier(seal_key="k", seal="encrypt"), tier(seal_key="elsewhere", seal="mac")]
    layouts = [[engine(tmp_path, secondary_tiers=tiers).layout for tiers in group] for group in (plain, sealed)]
    assert all(layout == group[0] for group in layouts for layout in group)
    assert layouts[0][0] == engine(tmp_path).layout != layouts[1][0]


# ---- which layout is asked for


@pytest.mark.parametrize(
    ("hybrid", "extra", "wanted"),
    [
        (False, {}, HEADS_OUTERMOST),
        (True, {}, LAYERS_FIRST),
        (False, {"kv_cache_layout": LAYERS_OUTERMOST}, LAYERS_OUTERMOST),
        (True, {"kv_cache_layout": LAYERS_OUTERMOST}, LAYERS_OUTERMOST),
        (False, {"kv_cache_layout": None}, None),
    ],
)
def test_the_engine_is_asked_for_a_layout_whose_chunks_can_be_shared(
    tmp_path: Path, hybrid: bool, extra: dict[str, Any], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the CPU engine, whose kernels know one layout."""
    config = changed(engine(tmp_path, **extra), model_config__is_hybrid=hybrid).config
    assert KvtierConnector.get_required_kvcache_layout(config) is None
    monkeypatch.setattr(connector, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert KvtierConnector.get_required_kvcache_layout(config) == wanted
