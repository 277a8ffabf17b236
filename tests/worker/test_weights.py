"""What a rank says of its weights: every change of them is seen, and how they are shared out to ranks is not."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import (
    Llama3RotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
    phi3_long_rope_scaled_rope,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from components.worker import weights
from components.worker.weights import RankDigest, Unknown, combined, place_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bits at all, NaN included."""
    count = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.frombuffer(bytearray(random.Random(seed).randbytes(count)), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As weights are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def whole(matrix: torch.Tensor) -> int:
    return int(place_sum(matrix, *weights._whole(matrix)))


def add_up(sums: list[torch.Tensor]) -> int:
    return int(torch.stack(sums).sum())


# ---- a sum over places


@by_dtype
@given(data=st.data())
def test_parts_in_any_order_add_up_to_the_whole(dtype: torch.dtype, data: st.DataObject) -> None:
    """Rows however they are dealt out, and columns where words end."""
    in_word = 8 // dtype.itemsize
    rows, words = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    columns = words * in_word
    matrix = drawn(data.draw(st.integers(0, 1000)), rows, columns, dtype=dtype)
    row_owners = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    word_owners = data.draw(st.lists(st.integers(0, 2), min_size=words, max_size=words))
    column_owners = torch.tensor(word_owners).repeat_interleave(in_word)
    sums = []
    for row_owner in data.draw(st.permutations(range(4))):
        for column_owner in sorted(set(word_owners)):
            mine = (row_owners == row_owner).nonzero().flatten(), (column_owners == column_owner).nonzero().flatten()
            shuffled = mine[0][torch.tensor(data.draw(st.permutations(range(len(mine[0])))), dtype=torch.int64)]
            part = matrix[shuffled][:, mine[1]]
            sums.append(place_sum(part, shuffled, mine[1], columns))
    assert add_up(sums) == whole(matrix)


@by_dtype
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 8, 9, 13, 17])
def test_rows_of_any_width_add_up_to_the_whole(dtype: torch.dtype, columns: int) -> None:
    matrix = drawn(columns, 10, columns, dtype=dtype)
    every = torch.arange(columns)
    parts = [torch.tensor([8, 1, 3]), torch.tensor([0, 9]), torch.tensor([7, 2, 6, 4, 5])]
    assert add_up([place_sum(matrix[rows], rows, every, columns) for rows in parts]) == whole(matrix)


@by_dtype
def test_a_sum_does_not_depend_on_the_pieces_that_it_is_taken_in(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (3, 8, 40, 201):
        matrix = drawn(columns, 37, columns, dtype=dtype)
        at_once = whole(matrix)
        for piece_bytes in (8, 64, 1000):
            monkeypatch.setattr(weights, "_PIECE_BYTES", piece_bytes)
            assert whole(matrix) == at_once
        monkeypatch.undo()


@by_dtype
@pytest.mark.parametrize("columns", [1, 3, 8, 9])
def test_every_single_bit_counts(dtype: torch.dtype, columns: int) -> None:
    matrix = drawn(5, 4, columns, dtype=dtype)
    sums = {whole(matrix)}
    raw = matrix.view(torch.uint8)
    for row in range(raw.shape[0]):
        for byte in range(raw.shape[1]):
            for bit in range(8):
                raw[row, byte] ^= 1 << bit
                sums.add(whole(matrix))
                raw[row, byte] ^= 1 << bit
    assert len(sums) == 1 + 8 * raw.numel()


def negated(matrix: torch.Tensor) -> torch.Tensor:
    """With the first bit of each element turned over, which is a number's sign."""
    raw = matrix.contiguous().view(torch.uint8).reshape(*matrix.shape, matrix.element_size()).clone()
    raw[..., -1] ^= 0x80
    return raw.reshape(matrix.shape[0], -1).view(matrix.dtype)


def inverted(matrix: torch.Tensor) -> torch.Tensor:
    return (~matrix.contiguous().view(torch.uint8)).view(matrix.dtype)


def with_columns(matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], step: int) -> torch.Tensor:
    one = matrix.clone()
    one[:, ::step] = change(matrix[:, ::step].contiguous())
    return one


def exchanged(matrix: torch.Tensor, one: tuple[int, int], other: tuple[int, int]) -> torch.Tensor:
    changed = matrix.clone()
    changed[one], changed[other] = matrix[other], matrix[one]
    return changed


def rolled(matrix: torch.Tensor, bytes_further: int) -> torch.Tensor:
    return matrix.view(torch.uint8).roll(bytes_further, 1).view(matrix.dtype)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negated": negated,
    "inverted": inverted,
    "columns negated": lambda matrix: with_columns(matrix, negated, 2),
    "rows negated": lambda matrix: torch.cat([negated(matrix[:2]), matrix[2:]]),
    "elements exchanged": lambda matrix: exchanged(matrix, (0, 0), (3, 4)),
    "one below the other exchanged": lambda matrix: exchanged(matrix, (1, 1), (2, 1)),
    "rows exchanged": lambda matrix: matrix[[1, 0, *range(2, len(matrix))]],
    "columns a word further": lambda matrix: rolled(matrix, 8 if matrix.shape[1] * matrix.element_size() > 8 else 1),
    "the first row twice": lambda matrix: torch.cat([matrix[:1], matrix[:1], matrix[2:]]),
}


@by_dtype
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("columns", [5, 8, 16, 33])
def test_many_changes_at_once_do_not_make_up_for_each_other(dtype: torch.dtype, change: str, columns: int) -> None:
    for seed in range(4):
        matrix = drawn(seed, 6, columns, dtype=dtype)
        changed = CHANGES[change](matrix)
        assert changed.shape == matrix.shape
        assert bits(changed) != bits(matrix)
        assert whole(changed) != whole(matrix)


@by_dtype
@given(data=st.data())
def test_matrices_have_one_sum_only_if_they_are_equal(dtype: torch.dtype, data: st.DataObject) -> None:
    """Of few values, so that many are equal to each other."""
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    values = st.lists(st.integers(0, 2), min_size=rows * columns, max_size=rows * columns)
    one, other = (torch.tensor(data.draw(values), dtype=torch.uint8).reshape(rows, columns).to(dtype) for _ in range(2))
    assert (whole(one) == whole(other)) == (bits(one) == bits(other))


@by_dtype
def test_what_is_constant_is_told_apart_too(dtype: torch.dtype) -> None:
    sums = [whole(torch.full((4, 16), value).to(dtype)) for value in (0, 1, 2, 3, 64)]
    assert len(set(sums)) == len(sums)


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).contiguous()


@by_dtype
def test_a_view_gives_what_a_copy_in_memory_order_gives(dtype: torch.dtype) -> None:
    matrix, cube = drawn(1, 12, 40, dtype=dtype), drawn(2, 6, 8, 10, dtype=dtype)
    views = [matrix.t(), matrix[:, 3:21], matrix[::2], matrix.t()[5:9]]
    views += [cube.permute(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
    views += [cube[:, 2:5], cube.transpose(0, 2)[3:7]]
    for view in views:
        taken, order = weights._matrix(view)
        copied, same = weights._matrix(in_memory_order(view))
        assert sorted(order) == same == list(range(view.ndim))
        assert bits(taken) == bits(copied)
        assert whole(taken) == whole(copied)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (5,),
        (0,),
        (0, 3),
        (2, 0, 4),
        (1, 1, 7),
        (3, 0),
        (2, 4, 0),
    ],
    ids=str,
)
def test_any_shape_can_be_summed(shape: tuple[int, ...]) -> None:
    tensor = normal(1, *shape)
    matrix, _ = weights._matrix(tensor)
    assert matrix.ndim == 2
    assert matrix.numel() == tensor.numel()
    assert (whole(matrix) == 0) == (not tensor.numel())


# ---- a model


class Layer(nn.Module):
    """With weights wherever a layer may keep them."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(normal(seed, 6, 16), requires_grad=False)
        self.bias = nn.Parameter(normal(seed + 1, 6), requires_grad=False)
        self.register_buffer("buffer", normal(seed + 2, 3))
        self.register_buffer("unsaved", normal(seed + 3, 3), persistent=False)
        self.plain = normal(seed + 4, 4, 4)
        self.several = [normal(seed + 5, 2), None, normal(seed + 6, 2)]
        self.pair = (normal(seed + 7, 2), "word")
        self.named = {"k": normal(seed + 8, 2), "v": normal(seed + 9, 2), "size": 3}
        self.quant_method = SimpleNamespace(table=normal(seed + 10, 5), config="other")
        self.eps = 1e-6
        self.impl = SimpleNamespace()
        self.kv_cache = normal(seed + 11, 7)


class Other(Layer):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.embed.weight = nn.Parameter(normal(100, 8, 16), requires_grad=False)
        self.layers = nn.ModuleList([Layer(10), Layer(20)])


def worker(model: nn.Module | None, **runner: Any) -> Any:
    """A rank, as far as it is asked."""
    return SimpleNamespace(get_model=lambda: model, model_runner=SimpleNamespace(**runner))


def digest(model: nn.Module, **runner: Any) -> tuple[bytes, tuple[int, ...]]:
    one = weights.model_digest(worker(model, **runner))
    return one.common, one.sums


def changed_element(tensor: torch.Tensor) -> None:
    tensor.flatten()[-1] += 1


def set_attribute(target: Any, name: str, value: object) -> None:
    setattr(target, name, value)


MODEL_CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter": lambda layer: changed_element(layer.weight),
    "another parameter": lambda layer: changed_element(layer.bias),
    "a buffer": lambda layer: changed_element(layer.buffer),
    "a buffer that is not saved": lambda layer: changed_element(layer.unsaved),
    "a plain tensor": lambda layer: changed_element(layer.plain),
    "a tensor in a list": lambda layer: changed_element(layer.several[2]),
    "tensors in a list exchanged": lambda layer: layer.several.reverse(),
    "a tensor in a tuple": lambda layer: changed_element(layer.pair[0]),
    "a tensor in a dict": lambda layer: changed_element(layer.named["v"]),
    "a tensor of the quantization": lambda layer: changed_element(layer.quant_method.table),
    "a number": lambda layer: set_attribute(layer, "eps", 1e-5),
    "a new number": lambda layer: set_attribute(layer, "scale", 2.0),
    "a new tensor": lambda layer: set_attribute(layer, "extra", torch.zeros(1)),
    "a parameter that is gone": lambda layer: layer.register_parameter("bias", None),
    "a class": lambda layer: set_attribute(layer, "__class__", Other),
    "an implementation": lambda layer: set_attribute(layer, "impl", nn.Identity()),
    "a dtype": lambda layer: set_attribute(layer, "plain", layer.plain.view(torch.int32)),
    "a shape": lambda layer: set_attribute(layer, "plain", layer.plain.view(2, 8)),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
@pytest.mark.parametrize("number", [0, 1])
def test_a_change_anywhere_makes_another_model(change: str, number: int) -> None:
    model = Model()
    before = digest(model)
    assert digest(copy.deepcopy(model)) == before
    MODEL_CHANGES[change](model.layers[number])
    assert digest(model) != before


def test_layers_are_told_apart_by_their_place() -> None:
    model = Model()
    before = digest(model)
    model.layers = nn.ModuleList(reversed(model.layers))
    assert digest(model) != before


def test_kv_and_where_weights_lie_are_not_in_it() -> None:
    model = Model()
    before = digest(model)
    for layer in model.layers:
        changed_element(layer.kv_cache)
        layer.kv_cache = [torch.zeros(9)]
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=True)
    model.eval()
    assert digest(model) == before


@pytest.mark.parametrize("helper", ["drafter", "speculator"])
def test_a_draft_model_is_in_it(helper: str) -> None:
    model, draft = Model(), Layer(50)
    alone = digest(model)
    both = digest(model, **{helper: SimpleNamespace(model=draft)})
    assert both != alone
    changed_element(draft.bias)
    assert digest(model, **{helper: SimpleNamespace(model=draft)}) != both
    assert digest(model, **{helper: SimpleNamespace(model="of n-grams")}) == alone
    assert digest(model, **{helper: None}) == alone


def test_what_a_layer_of_the_engine_computes_with_is_in_it(engine_config: None) -> None:
    same, again, other = (RMSNorm(16, eps) for eps in (1e-6, 1e-6, 1e-5))
    assert digest(same) == digest(again) != digest(other)


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (torch.empty(0), "layers.1.weight"),
        (torch.empty(6, 0), "layers.1.weight"),
        (torch.empty(6, 16, device="meta"), "layers.1.weight"),
    ],
    ids=["empty", "without columns", "meta"],
)
def test_weights_that_are_not_there_are_refused_by_name(weight: torch.Tensor, name: str) -> None:
    model = Model()
    model.layers[1].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=f"^kvtier: .*{re.escape(name)} cannot be read"):
        weights.model_digest(worker(model))


def test_other_tensors_that_are_not_there_are_refused_by_name() -> None:
    """A buffer may be empty; but of one that is elsewhere nobody knows what is in it."""
    model: Any = Model()
    model.layers[0].buffer = torch.empty(0)
    weights.model_digest(worker(model))
    model.layers[0].several[0] = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"layers\.0\.several\.0 cannot be read"):
        weights.model_digest(worker(model))


def test_what_a_kernel_has_no_use_for_may_be_empty() -> None:
    """Zero points of symmetric quantization, with vLLM's Marlin kernels: the weights themselves are there."""
    model: Any = Model()
    before = digest(model)
    empty = torch.empty(0, dtype=torch.int32)
    model.layers[1].weight_zero_point = nn.Parameter(empty, requires_grad=False)
    assert digest(model) != before


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no weights found"):
        weights.model_digest(worker(nn.Module()))


def test_a_rank_answers_in_words_whatever_happens() -> None:
    assert isinstance(weights.answer(worker(Model()), "model_digest"), RankDigest)
    empty = weights.answer(worker(nn.Module()), "model_digest")
    assert isinstance(empty, Unknown)
    assert "no weights found" in empty
    for broken in (weights.answer(worker(None), "model_digest"), weights.answer(worker(Model()), "anything")):
        assert isinstance(broken, Unknown)
        assert "cannot be told" in broken


# ---- positions


@pytest.fixture
def engine_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def rotary(positions: int = 256, base: float = 10000.0, **options: Any) -> RotaryEmbedding:
    return RotaryEmbedding(16, 16, positions, base, options.pop("neox", True), torch.float32)


def test_a_plain_rotary_embedding_is_the_same_for_every_length(engine_config: None) -> None:
    assert digest(rotary(256)) == digest(rotary(4096)) == digest(rotary(64))
    others = [rotary(base=10001.0), rotary(base=500000.0), rotary(neox=False)]
    assert len({digest(one) for one in (rotary(), *others)}) == 4
    scaled: Any = rotary()
    changed_element(scaled.cos_sin_cache[:3])
    assert digest(scaled) != digest(rotary())


def yarn(positions: int = 256, factor: float = 2.0, **options: Any) -> YaRNScalingRotaryEmbedding:
    return YaRNScalingRotaryEmbedding(16, 16, positions, 10000.0, True, factor, torch.float32, **options)


def llama3(positions: int = 256, factor: float = 2.0, original: int = 128) -> Llama3RotaryEmbedding:
    return Llama3RotaryEmbedding(16, 16, positions, 10000.0, True, torch.float32, factor, 1.0, 4.0, original)


def test_a_scaled_rotary_embedding_is_told_by_its_scale_and_length(engine_config: None) -> None:
    several = [
        rotary(),
        yarn(),
        yarn(factor=4.0),
        yarn(positions=512),
        yarn(beta_fast=16),
        llama3(),
        llama3(factor=4.0),
        llama3(original=64),
        llama3(positions=512),
    ]
    assert len({digest(one) for one in several}) == len(several)
    assert digest(yarn()) == digest(yarn())
    assert digest(llama3()) == digest(llama3())


def test_long_rope_is_told_by_which_of_its_two_scales_is_used(
    engine_config: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes by how long the engine lets prompts be; its tables are the same."""
    found = []
    for length in (64, 100, 200, 300):
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
        monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda config=config: config)
        rope = Phi3LongRoPEScaledRotaryEmbedding(16, 16, 512, 128, 1e4, True, torch.float32, [1.0] * 8, [4.0] * 8)
        assert rope.use_long_rope == (length > 128)
        found.append(digest(rope))
    assert found[0] == found[1] != found[2] == found[3]


# ---- adapters' layers


class Wrapped(weights.BaseLayerWithLoRA):
    """As vLLM wraps a layer that adapters may change."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.lora_a_stacked = (normal(1, 2, 4, 16),)
        self.scale = 3.0


def test_a_model_that_may_have_adapters_is_the_one_without() -> None:
    plain, wrapped = Model(), Model()
    wrapped.layers = nn.ModuleList([Wrapped(layer) for layer in wrapped.layers])
    assert digest(wrapped) == digest(plain)
    changed_element(wrapped.layers[0].lora_a_stacked[0])
    assert digest(wrapped) == digest(plain)
    changed_element(wrapped.layers[0].base_layer.weight)
    assert digest(wrapped) != digest(plain)


# ---- weights that the CPU engine has packed


class Packed(nn.Module):
    """As vLLM's CPU engine leaves a layer whose weights it has packed."""

    def __init__(self, weight: torch.Tensor, **sizes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        self.cpu_linear = lambda x, of_layer, bias: nn.functional.linear(x, weight, bias)
        for name, size in sizes.items():
            setattr(self, name, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (9, 1100)], ids=str)
def test_packed_weights_are_read_back_as_they_were(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = normal(1, *shape, dtype=dtype)
    for sizes in ({"input_size_per_partition": shape[1]}, {"input_size": shape[1]}, {"embedding_dim": shape[1]}):
        assert bits(weights._unpacked("layer", Packed(weight, **sizes), dtype)) == bits(weight)
    by_vllm: Any = nn.Module()
    by_vllm.weight, by_vllm.input_size = nn.Parameter(weight.clone(), requires_grad=False), shape[1]
    dispatch_cpu_unquantized_gemm(by_vllm, remove_weight=True)
    if not by_vllm.weight.numel():  # on some CPUs it packs nothing
        assert bits(weights._unpacked("layer", by_vllm, dtype)) == bits(weight)


def test_packed_weights_are_in_the_digest() -> None:
    weight = normal(1, 6, 16)
    first = digest(Packed(weight, input_size=16))
    assert digest(Packed(weight.clone(), input_size=16)) == first
    other = weight.clone()
    other[3, 5] *= -1
    assert digest(Packed(other, input_size=16)) != first


def test_packed_weights_of_a_size_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^kvtier: .*weights of layers\.0 cannot be read"):
        weights.model_digest(worker(nn.ModuleDict({"layers": nn.ModuleList([Packed(normal(1, 6, 16))])})))


# ---- ranks


def stand_in(kind: type, tensors: dict[str, torch.Tensor], **facts: Any) -> nn.Module:
    """A layer of the engine's, of which there is no more than what is looked at: it needs no process group."""
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    for name, fact in facts.items():
        setattr(layer, name, fact)
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer


def dealt(tensor: torch.Tensor, sizes: list[int], ranks: int, rank: int, dimension: int = 0) -> torch.Tensor:
    """A rank's share of each of several parts."""
    parts = tensor.split(sizes, dimension)
    return torch.cat([part.chunk(ranks, dimension)[rank] for part in parts], dimension)


def column(ranks: int, rank: int, weight: torch.Tensor, bias: torch.Tensor, *, turned: bool = False) -> nn.Module:
    """Queries, keys and values in one; `turned` as some kinds of quantization keep it."""
    sizes = [16, 8, 8]
    mine = dealt(weight, sizes, ranks, rank)
    return stand_in(
        ColumnParallelLinear,
        {"weight": mine.t().contiguous().t() if turned else mine, "bias": dealt(bias, sizes, ranks, rank)},
        tp_size=ranks,
        tp_rank=rank,
        output_partition_sizes=[size // ranks for size in sizes],
        output_size_per_partition=sum(sizes) // ranks,
    )


def row(ranks: int, rank: int, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    inner = weight.shape[1] // ranks
    return stand_in(
        RowParallelLinear,
        {"weight": weight[:, rank * inner : (rank + 1) * inner].contiguous(), "bias": bias},
        tp_size=ranks,
        tp_rank=rank,
        input_size_per_partition=inner,
        output_size=weight.shape[0],
    )


def vocabulary(ranks: int, rank: int, weight: torch.Tensor, padding: int, added: int = 0) -> nn.Module:
    """Of 30 words, in rows for 32, of which those without a word have whatever was there, if none was added."""
    of_rank = 32 // ranks
    first, last = min(30, rank * of_rank), min(30, (rank + 1) * of_rank)
    filler = normal(padding, of_rank - (last - first), weight.shape[1], dtype=weight.dtype)
    return stand_in(
        VocabParallelEmbedding,
        {"weight": torch.cat([weight[first:last], filler])},
        num_embeddings_per_partition=of_rank,
        org_vocab_size=30,
        shard_indices=SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last, num_added_elements=added),
    )


def experts(ranks: int, rank: int, gates_and_ups: torch.Tensor, downs: torch.Tensor, expert_ranks: int) -> nn.Module:
    count, outer, inner = downs.shape
    mine = inner // ranks
    return stand_in(
        RoutedExperts,
        {
            "w13_weight": dealt(gates_and_ups, [inner, inner], ranks, rank, 1),
            "w2_weight": downs[:, :, rank * mine : (rank + 1) * mine].contiguous(),
        },
        local_num_experts=count,
        hidden_size=outer,
        intermediate_size_per_partition=mine,
        moe_config=SimpleNamespace(
            moe_parallel_config=SimpleNamespace(ep_size=expert_ranks, tp_size=ranks, tp_rank=rank)
        ),
    )


def latent(ranks: int, rank: int, keys: torch.Tensor, values: torch.Tensor) -> nn.Module:
    """Of MLA: a matrix for each head, in the two orders in which vLLM keeps them."""
    heads = len(keys) // ranks
    mine = slice(rank * heads, (rank + 1) * heads)
    one: Any = stand_in(MLAAttention, {}, num_heads=heads)
    one.W_UK_T = keys[mine].clone()
    one.W_UV = values[mine].permute(1, 0, 2).contiguous().permute(1, 0, 2)
    return one


@pytest.mark.parametrize(("added", "same"), [(0, True), (2, False)])
def test_rows_without_a_word_do_not_count_and_words_that_were_added_do(added: int, same: bool) -> None:
    weight = normal(1, 30, 8)
    found = []
    for seed in (2, 3):
        digest = weights._Digest()
        digest.add("", vocabulary(1, 0, weight, seed, added))
        found.append(digest.result())
    assert (found[0] == found[1]) == same


class Whole:
    """A model's weights before they are dealt out."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
        def one(*shape: int) -> torch.Tensor:
            return normal(seed + sum(shape), *shape, dtype=dtype)

        self.seed = seed
        self.qkv, self.qkv_bias = one(32, 64), one(32)
        self.out, self.out_bias = one(24, 64), one(24)
        self.words = one(30, 24)
        self.gates_and_ups, self.downs = one(3, 2 * 32, 24), one(3, 24, 32)
        self.keys, self.values = one(8, 6, 10), one(8, 12, 16)
        self.norm = one(24)

    def rank(self, ranks: int, rank: int, *, padding: int = 0, expert_ranks: int = 1, turned: bool = False) -> Any:
        """What one of so many has."""
        norm = nn.Module()
        norm.weight = nn.Parameter(self.norm, requires_grad=False)
        return nn.ModuleDict(
            {
                "words": vocabulary(ranks, rank, self.words, padding),
                "qkv": column(ranks, rank, self.qkv, self.qkv_bias, turned=turned),
                "out": row(ranks, rank, self.out, self.out_bias),
                "experts": experts(ranks, rank, self.gates_and_ups, self.downs, expert_ranks),
                "latent": latent(ranks, rank, self.keys, self.values),
                "norm": norm,
            }
        )

    def said(
        self,
        ranks: int,
        patch: pytest.MonkeyPatch,
        change: Callable[[Any, int], object] = lambda model, rank: None,
        **options: Any,
    ) -> list[RankDigest]:
        """What ranks say when they have been changed."""
        digests = []
        for rank in range(ranks):
            group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
            patch.setattr(weights, "get_tp_group", lambda group=group: group)
            model = copy.deepcopy(self.rank(ranks, rank, padding=rank + ranks, **options))
            change(model, rank)
            digests.append(weights.model_digest(worker(model)))
        return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_is_the_same_however_many_ranks_hold_it(
    dtype: torch.dtype, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Whole(dtype=dtype)
    alone, alike = combined(model.said(1, monkeypatch), alike=True)
    assert alike
    assert combined(model.said(ranks, monkeypatch), alike=True) == (alone, True)
    assert combined(model.said(ranks, monkeypatch)[::-1], alike=True) == (alone, True)
    assert combined(Whole(1, dtype).said(ranks, monkeypatch), alike=True)[0] != alone


def test_a_matrix_that_is_kept_turned_is_not_the_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies otherwise in memory is read by other code."""
    model = Whole()
    turned = [combined(model.said(ranks, monkeypatch, turned=True), alike=True)[0] for ranks in (1, 1)]
    assert turned[0] == turned[1] != combined(model.said(1, monkeypatch), alike=True)[0]


PARTS = [
    "words.weight",
    "qkv.weight",
    "qkv.bias",
    "out.weight",
    "out.bias",
    "experts.w13_weight",
    "experts.w2_weight",
    "latent.W_UK_T",
    "latent.W_UV",
    "norm.weight",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("changed_rank", [0, 1])
def test_a_change_on_one_rank_is_seen(part: str, changed_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, name = part.split(".")

    def change(model: Any, rank: int) -> None:
        if rank == changed_rank:
            tensor = getattr(model[layer], name)
            tensor[(0,) * tensor.ndim] *= -2

    model = Whole()
    before, _ = combined(model.said(2, monkeypatch), alike=True)
    after, alike = combined(model.said(2, monkeypatch, change), alike=True)
    assert after != before
    assert alike == (part not in ("out.bias", "norm.weight"))  # of which each rank has all


@pytest.mark.parametrize(
    "part", ["qkv.weight", "out.weight", "experts.w13_weight", "experts.w2_weight", "words.weight"]
)
def test_ranks_that_have_each_others_part_are_another_model(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, name = part.split(".")
    model = Whole()
    parts = [getattr(model.rank(2, rank)[layer], name) for rank in range(2)]

    def change(one: Any, rank: int) -> None:
        setattr(one[layer], name, parts[1 - rank])

    before, _ = combined(model.said(2, monkeypatch), alike=True)
    assert combined(model.said(2, monkeypatch, change), alike=True)[0] != before


def test_ranks_that_have_experts_of_their_own_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Whole()
    _, alike = combined(model.said(2, monkeypatch, expert_ranks=2), alike=True)
    assert not alike


def rank(common: bytes = b"c", *sums: int) -> RankDigest:
    return RankDigest(common, sums, 1, 0.0)


def test_sums_of_ranks_that_are_alike_are_added() -> None:
    one = combined([rank(b"c", 7, 2**64 - 1)], alike=True)
    assert one[1]
    assert combined([rank(b"c", 3, 2**64 - 5), rank(b"c", 4, 4)], alike=True) == one
    assert combined([rank(b"c", 4, 4), rank(b"c", 3, 2**64 - 5)], alike=True) == one
    assert combined([rank(b"c", 2**63, 2**63), rank(b"c", 2**63 + 7, 2**63 - 1)], alike=True) == one
    others = [[rank(b"c", 8, 2**64 - 1)], [rank(b"d", 7, 2**64 - 1)], [rank(b"c", 2**64 - 1, 7)]]
    assert len({one[0], *(combined(other, alike=True)[0] for other in others)}) == 4


def test_ranks_that_differ_are_not_alike_and_their_order_matters() -> None:
    several = [
        [rank(b"a", 1), rank(b"b", 1)],
        [rank(b"b", 1), rank(b"a", 1)],
        [rank(b"a", 1), rank(b"a", 1, 1)],
        [rank(b"a", 1), rank(b"a")],
    ]
    found = [combined(ranks, alike=True) for ranks in several]
    assert not any(alike for _, alike in found)
    assert len({name for name, _ in found}) == len(several)


def test_ranks_that_should_not_be_alike_are_not() -> None:
    """Engines of pipeline stages, say: what each has is its own."""
    forth, back = (combined([rank(b"a", one), rank(b"a", 3 - one)], alike=False) for one in (1, 2))
    assert (forth[1], back[1]) == (False, False)
    assert forth[0] != back[0]


# ---- adapters


class Manager:
    """A rank's adapters, of which it has room for two. What was used last comes last."""

    def __init__(self, **on_disk: LoRAModel):
        self.on_disk = on_disk
        self.loaded: dict[int, LoRAModel] = {}
        self.loads = 0
        self._adapter_manager = SimpleNamespace(get_adapter=self.use)

    def use(self, number: int) -> LoRAModel | None:
        if number in self.loaded:
            self.loaded[number] = self.loaded.pop(number)
        return self.loaded.get(number)

    def list_adapters(self) -> set[int]:
        return set(self.loaded)

    def add_lora(self, request: LoRARequest) -> bool:
        self.loads += 1
        model = self.on_disk[request.lora_path]
        if len(self.loaded) == 2:
            del self.loaded[next(iter(self.loaded))]
        self.loaded[request.lora_int_id] = model
        return True

    @property
    def rank(self) -> Any:
        return SimpleNamespace(model_runner=SimpleNamespace(lora_manager=self), add_lora=self.add_lora)


def lora_layer(seed: int, alpha: int = 4, name: str = "q") -> LoRALayerWeights:
    return LoRALayerWeights(name, 4, alpha, normal(seed, 4, 16), normal(seed + 1, 8, 4))


def packed_layer(seed: int) -> PackedLoRALayerWeights:
    """Of which the second part is not changed by the adapter."""
    parts = [normal(seed, 4, 16), None, normal(seed + 1, 4, 16)], [normal(seed + 2, 8, 4), None, normal(seed + 3, 8, 4)]
    return PackedLoRALayerWeights("qkv", 4, [4, None, 4], *parts, scaling=[1.0, 1.0, 1.0])


def adapter(seed: int = 1, number: int = 1) -> LoRAModel:
    return LoRAModel(number, 4, {"layers.0.q": lora_layer(seed), "layers.1.qkv": packed_layer(seed + 10)})


def adapter_digest(one: LoRAModel, number: int = 1) -> str:
    return weights.loaded_adapter(Manager(path=one).rank, LoRARequest("name", number, "path"), []).digest


def test_an_adapter_is_told_by_its_content() -> None:
    one, again = adapter(), adapter(number=7)
    assert adapter_digest(one) == adapter_digest(again, 7) == adapter_digest(copy.deepcopy(one))
    assert adapter_digest(adapter(2)) != adapter_digest(one)


def _more_modules(one: LoRAModel) -> None:
    one.loras["layers.2.q"] = lora_layer(99)


def _renamed(one: LoRAModel) -> None:
    one.loras["layers.3.q"] = one.loras.pop("layers.0.q")


def _exchanged(one: LoRAModel) -> None:
    packed: Any = one.loras["layers.1.qkv"]
    packed.lora_a.reverse()


ADAPTER_CHANGES: dict[str, Callable[[Any], object]] = {
    "down": lambda one: changed_element(one.loras["layers.0.q"].lora_a),
    "up": lambda one: changed_element(one.loras["layers.0.q"].lora_b),
    "a part": lambda one: changed_element(one.loras["layers.1.qkv"].lora_b[2]),
    "a part that is there now": lambda one: one.loras["layers.1.qkv"].lora_a.__setitem__(1, torch.zeros(4, 16)),
    "parts exchanged": _exchanged,
    "scaling": lambda one: set_attribute(one.loras["layers.0.q"], "scaling", 0.5),
    "scaling of a part": lambda one: set_attribute(one.loras["layers.1.qkv"], "scaling", [1.0, 1.0, 2.0]),
    "another module": _more_modules,
    "a module's name": _renamed,
    "dtype": lambda one: set_attribute(
        one.loras["layers.0.q"], "lora_a", one.loras["layers.0.q"].lora_a.view(torch.int32)
    ),
    "a module that is saved whole": lambda one: one.modules_to_save.__setitem__("head", lora_layer(5)),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_a_change_anywhere_makes_another_adapter(change: str) -> None:
    one = adapter()
    before = adapter_digest(copy.deepcopy(one))
    ADAPTER_CHANGES[change](one)
    assert adapter_digest(one) != before


def test_an_adapter_is_loaded_if_it_is_not_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    in_bytes = weights._bytes
    monkeypatch.setattr(weights, "_bytes", lambda tensor: read.append(tensor) or in_bytes(tensor))
    manager = Manager(path=adapter(), other=adapter(2))

    def ask() -> str:
        return str(weights.answer(manager.rank, "loaded_adapter", LoRARequest("name", 1, "path"), []).digest)

    first = ask()
    once = len(read)
    assert (manager.loads, once) == (1, 6)
    assert ask() == first
    assert (manager.loads, len(read)) == (1, once)
    manager.loaded[1] = adapter(2)  # under the same number
    assert ask() != first
    assert (manager.loads, len(read)) == (1, 2 * once)
    manager.loaded.clear()
    assert ask() == first
    assert (manager.loads, len(read)) == (2, 2 * once)


@pytest.mark.parametrize(("in_use", "stays"), [([1], 1), ([2], 2), ([1, 2], 1), ([2, 1], 2), ([4, 2], 2)])
def test_an_adapter_in_use_makes_room_last(in_use: list[int], stays: int) -> None:
    """And the rank says which ones it has."""
    manager = Manager(a=adapter(), b=adapter(2), c=adapter(3))
    for number, path in ((1, "a"), (2, "b")):
        manager.add_lora(LoRARequest(path, number, path))
    answer = weights.answer(manager.rank, "loaded_adapter", LoRARequest("c", 3, "c"), in_use)
    assert answer.held == {3, stays}


def test_an_adapter_that_cannot_be_loaded_is_not_known() -> None:
    rank = Manager().rank
    assert isinstance(weights.answer(rank, "loaded_adapter", LoRARequest("name", 1, "gone"), []), Unknown)
    rank.add_lora = lambda request: False
    refused = weights.answer(rank, "loaded_adapter", LoRARequest("name", 1, "gone"), [])
    assert isinstance(refused, Unknown)
    assert "adapter 'name' is not loaded" in refused
