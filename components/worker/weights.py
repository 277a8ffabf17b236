"""Digests of a rank's loaded model and LoRA adapters, computed where the tensors are.

Runs in the rank's process. It reads tensors on their device instead of files, after vLLM has packed, quantized, merged
and sharded them. These tensors are what KV is computed with, whatever their source.

A tensor is a sequence of 64-bit words. Each word is mixed with its place (the finalizer of splitmix64: Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", 2014), and the results are summed modulo 2^64. A sum does not
depend on the order. So if each rank holds a part of a tensor and knows its place, their sums add up to that of a single
rank. This detects changes made by mistake or on purpose. It does not resist an attacker who chooses weights to make two
models with the same digest.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn

from components.worker.compat import (
    BaseLayerWithLoRA,
    ColumnParallelLinear,
    LinearBase,
    LoRARequest,
    MLAAttention,
    RotaryEmbedding,
    RotaryEmbeddingBase,
    RoutedExperts,
    RowParallelLinear,
    VocabParallelEmbedding,
    get_tp_group,
)

logger = logging.getLogger(f"vllm.{__name__}")  # which vLLM shows, INFO included

# Bytes hashed at once: they fit a core's cache together with the intermediate results.
_PIECE_BYTES = 1 << 20
# A tensor whose rows are not contiguous is copied in pieces of this size.
_GPU_PIECE_BYTES = 256 << 20
# So many rows identify a positional encoding that is one function of the position for every length.
_ROTARY_ROWS = 64
_IDENTITY_ROWS = 512
# Attributes of a module that are not weights: the KV cache, and those that every module has.
_NOT_WEIGHTS = {"kv_cache", *vars(nn.Module())}

_GOLDEN, _MIX_1, _MIX_2 = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class RankDigest:
    """`common` covers tensors that every rank should have equal. `sums` has a number for each tensor that tensor
    parallelism divides."""

    common: bytes
    sums: tuple[int, ...]
    hashed_bytes: int
    seconds: float


class Unknown(str):
    """Why a rank cannot compute its digest."""


def answer(worker: Any, question: str, *args: Any) -> Any:
    """The function that the scheduler's process calls on the ranks. It raises nothing, since the engine takes a raising
    rank for failed."""
    try:
        return (model_digest if question == "model_digest" else loaded_adapter)(worker, *args)
    except ValueError as error:
        return Unknown(error)
    except Exception as error:
        logger.exception("kvtier: what this rank has loaded cannot be told")
        return Unknown(f"kvtier: what a rank has loaded cannot be told: {error!r}")


def model_digest(worker: Any) -> RankDigest:
    """The digest of the rank's model and draft model. Raises ValueError for weights that it cannot read."""
    begun = time.monotonic()
    digest = _Digest()
    runner = worker.model_runner
    digest.add("", worker.get_model())
    for helper in (getattr(runner, "drafter", None), getattr(runner, "speculator", None)):
        if isinstance(model := getattr(helper, "model", None), nn.Module):
            digest.add("draft.", model)
    if not digest.hashed_bytes:
        raise ValueError("kvtier: no weights found in the model: it cannot be told from another")
    common, sums = digest.result()
    return RankDigest(common, sums, digest.hashed_bytes, time.monotonic() - begun)


def combined(ranks: list[RankDigest], *, alike: bool) -> tuple[str, bool]:
    """The digest of a model on all its ranks, and whether it is independent of their number. `alike`: whether it should
    be."""
    first = ranks[0]
    alike = alike and all(rank.common == first.common and len(rank.sums) == len(first.sums) for rank in ranks)
    hasher = hashlib.blake2b(digest_size=16)
    if alike:
        hasher.update(first.common)
        for parts in zip(*(rank.sums for rank in ranks), strict=True):
            hasher.update((sum(parts) % (1 << 64)).to_bytes(8, "little"))
    else:
        for rank in ranks:
            hasher.update(rank.common)
            for one in rank.sums:
                hasher.update(one.to_bytes(8, "little"))
    return hasher.hexdigest(), alike


_adapters: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()


@dataclass(frozen=True)
class LoadedAdapter:
    digest: str
    held: frozenset[int]  # vLLM's numbers of all adapters that the rank has loaded now


def loaded_adapter(worker: Any, request: LoRARequest, in_use: list[int]) -> LoadedAdapter:
    """The adapter that this rank computes the request's tokens with. It is loaded if it is not, and read once after
    each load. To make room, adapters that are not `in_use` (vLLM's numbers) are unloaded first, then those in use, from
    the last one on."""
    manager = worker.model_runner.lora_manager
    for number in reversed(in_use):
        manager._adapter_manager.get_adapter(number)  # counts as a use in vLLM's LRU cache
    if request.lora_int_id not in manager.list_adapters():
        worker.add_lora(request)
    adapter = manager._adapter_manager.get_adapter(request.lora_int_id)
    if adapter is None:
        raise ValueError(f"kvtier: adapter {request.lora_name!r} is not loaded")
    if adapter not in _adapters:
        hasher = xxhash.xxh3_128()
        parts = {**adapter.loras, **{f"{name} saved": one for name, one in adapter.modules_to_save.items()}}
        for name in sorted(parts):
            for field, tensor in sorted(_tensors_in(vars(parts[name])), key=lambda item: item[0]):
                hasher.update(f"{name} {field} {tensor.dtype} {tuple(tensor.shape)}".encode())
                hasher.update(_bytes(tensor))
            hasher.update(repr(sorted(_scalars(vars(parts[name])).items())).encode())
        _adapters[adapter] = hasher.hexdigest()
    return LoadedAdapter(_adapters[adapter], frozenset(manager.list_adapters()))


class _Digest:
    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=16)
        self._common: list[torch.Tensor] = []
        self._shared: list[torch.Tensor] = []
        self.hashed_bytes = 0

    @torch.inference_mode()
    def add(self, prefix: str, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, BaseLayerWithLoRA):
                continue  # a wrapper, whose own tensors are slots for adapters; the wrapped module comes separately
            name = prefix + name.replace(".base_layer", "")
            self._note(name, type(module).__qualname__, type(getattr(module, "impl", None)).__qualname__)
            self._note(sorted(_floats(vars(module)).items()))
            if type(module).__module__.startswith(RotaryEmbeddingBase.__module__.rpartition(".")[0]):
                self._note_rotary(module)
            matrices = 0
            for field, tensor in _weights(name, module):
                self._add(f"{name}.{field}", module, tensor)
                matrices += tensor.ndim > 1 and tensor.numel() > 0
            if not matrices and isinstance(module, LinearBase | RoutedExperts | VocabParallelEmbedding):
                raise _unreadable(name)

    def result(self) -> tuple[bytes, tuple[int, ...]]:
        for one in _numbers(self._common):
            self._hasher.update(one.to_bytes(8, "little"))
        return self._hasher.digest(), tuple(_numbers(self._shared))

    def _note(self, *facts: object) -> None:
        self._hasher.update(repr(facts).encode())

    def _note_rotary(self, module: nn.Module) -> None:
        scalars = _scalars(vars(module))
        if type(module) is RotaryEmbedding:
            del scalars["max_position_embeddings"]
        self._note(sorted(scalars.items()))

    def _add(self, name: str, module: nn.Module, tensor: torch.Tensor) -> None:
        if type(module) is RotaryEmbedding and tensor.ndim == 2:
            tensor = tensor[:_ROTARY_ROWS]
        self.hashed_bytes += tensor.numel() * tensor.element_size()
        matrix, order = _matrix(tensor)
        with tensor.device:  # the places are created there, too
            place = _place(module, matrix) or _place_of_heads(module, tensor, order)
            if place is None:
                self._note(name, str(tensor.dtype), tuple(tensor.shape))
                self._common.append(place_sum(matrix, *_whole(matrix)))
            else:
                rows, row_count, columns, column_count = place
                self._note(name, str(tensor.dtype), row_count, column_count)
                self._shared.append(place_sum(matrix[: len(rows)], rows, columns, column_count))


# ---- what there is to hash


def _weights(name: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own tensors: parameters, buffers, and those in attributes of the module or of its quantization
    method."""
    own: dict[str, object] = {**module._parameters, **module._buffers}
    own |= {field: value for field, value in vars(module).items() if field not in _NOT_WEIGHTS}
    method = getattr(module, "quant_method", None)
    own |= {f"quant_method.{field}": value for field, value in getattr(method, "__dict__", {}).items()}
    for field, tensor in sorted(_tensors_in(own), key=lambda item: item[0]):
        if field == "weight" and not tensor.numel() and hasattr(module, "cpu_linear"):
            yield field, _unpacked(name, module, tensor.dtype)
        elif tensor.is_meta or (field == "weight" and not tensor.numel()):
            raise _unreadable(f"{name}.{field}")
        else:
            yield field, tensor


def _unreadable(name: str) -> ValueError:
    return ValueError(f"kvtier: the weights of {name} cannot be read, so that this model cannot be told from another")


def _unpacked(name: str, module: Any, dtype: torch.dtype) -> torch.Tensor:
    """Weights that the CPU engine has packed, read as products with rows of the identity matrix, which are exact."""
    size = next((getattr(module, field) for field in _INPUT_SIZES if hasattr(module, field)), None)
    if size is None:
        raise _unreadable(name)
    rows = []
    for first in range(0, size, _IDENTITY_ROWS):
        identity = torch.zeros(min(_IDENTITY_ROWS, size - first), size, dtype=dtype)
        identity[:, first:].fill_diagonal_(1)
        rows.append(module.cpu_linear(identity, module.weight, None))
    return torch.cat(rows).t().contiguous()


_INPUT_SIZES = ("input_size_per_partition", "input_size", "embedding_dim")


def _tensors_in(fields: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for field, value in fields.items():
        if isinstance(value, torch.Tensor):
            yield field, value
        elif isinstance(value, list | tuple):
            yield from ((f"{field}.{number}", one) for number, one in enumerate(value) if isinstance(one, torch.Tensor))
        elif isinstance(value, dict):
            yield from ((f"{field}.{key}", one) for key, one in value.items() if isinstance(one, torch.Tensor))


def _scalars(fields: dict[str, Any]) -> dict[str, str]:
    """The fields that are numbers, words, or lists of them."""

    def plain(value: object) -> bool:
        if isinstance(value, list | tuple):
            return all(plain(one) for one in value)
        return value is None or isinstance(value, bool | int | float | str)

    return {name: repr(value) for name, value in fields.items() if name not in _NOT_WEIGHTS and plain(value)}


def _floats(fields: dict[str, Any]) -> dict[str, str]:
    """A layer's numeric constants: scales, epsilons, caps."""
    return {name: repr(value) for name, value in fields.items() if isinstance(value, float)}


# ---- where its parts lie in the whole


_Place = tuple[torch.Tensor, int, torch.Tensor, int]


def _place(module: Any, matrix: torch.Tensor) -> _Place | None:
    """For a tensor that tensor parallelism divides, with outputs in its rows: each row's place in the whole, and the
    whole's number of rows. The same follows for columns. Further rows of the rank are padding. None: every rank should
    have all of it. If ranks hold parts of a tensor that this does not know, engines of other tensor parallelism do not
    share chunks."""
    rows, columns = matrix.shape
    if isinstance(module, RoutedExperts):
        return _place_of_experts(module, matrix)
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        if rows != module.num_embeddings_per_partition or shard.num_added_elements:
            return None  # added words come after the padding
        place = torch.arange(shard.org_vocab_start_index, shard.org_vocab_end_index)
        return place, module.org_vocab_size, torch.arange(columns), columns
    if isinstance(module, ColumnParallelLinear) and rows == module.output_size_per_partition:
        whole = rows * module.tp_size
        return _dealt(module.output_partition_sizes, module), whole, torch.arange(columns), columns
    if isinstance(module, RowParallelLinear):
        inner = module.input_size_per_partition
        if (rows, columns) == (module.output_size, inner) and inner * matrix.element_size() % 8 == 0:
            return torch.arange(rows), rows, _dealt([inner], module), inner * module.tp_size
    return None


def _place_of_experts(module: Any, matrix: torch.Tensor) -> _Place | None:
    """For a layer of experts, of each of which every rank has a part. w13 has gates and ups in its rows; w2 is divided
    by columns."""
    parallel, inner = module.moe_config.moe_parallel_config, module.intermediate_size_per_partition
    experts, outer = module.local_num_experts, module.hidden_size
    rows, columns = matrix.shape
    if parallel.ep_size > 1:
        return None
    if (rows, columns) == (experts * 2 * inner, outer):
        one = _dealt([inner, inner], parallel)
        whole = 2 * inner * parallel.tp_size
        place = (torch.arange(experts)[:, None] * whole + one).flatten()
        return place, experts * whole, torch.arange(columns), columns
    if (rows, columns) == (experts * outer, inner):
        return torch.arange(rows), rows, _dealt([inner], parallel), inner * parallel.tp_size
    return None


def _place_of_heads(module: Any, tensor: torch.Tensor, order: list[int]) -> _Place | None:
    """For MLA's projections, which vLLM keeps by head, in any memory order."""
    if not isinstance(module, MLAAttention) or tensor.ndim != 3 or tensor.shape[0] != module.num_heads:
        return None
    group = get_tp_group()
    heads, whole = module.num_heads, module.num_heads * group.world_size
    mine = torch.arange(heads) + heads * group.rank_in_group
    places = [mine if dimension == 0 else torch.arange(tensor.shape[dimension]) for dimension in order]
    counts = [whole if dimension == 0 else tensor.shape[dimension] for dimension in order]
    rows = (places[0][:, None] * counts[1] + places[1]).flatten()
    return rows, counts[0] * counts[1], places[2], counts[2]


def _dealt(parts: list[int], ranks: Any) -> torch.Tensor:
    """The places of a rank's rows if each part is divided evenly among the ranks."""
    places, begin = [], 0
    for part in parts:
        first = begin * ranks.tp_size + part * ranks.tp_rank
        places.append(torch.arange(first, first + part))
        begin += part
    return torch.cat(places)


def _whole(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, columns = matrix.shape
    return torch.arange(rows), torch.arange(columns), columns


# ---- hashing


def _matrix(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The tensor in two dimensions, in memory order, and that order of its dimensions."""
    if tensor.ndim < 2:
        return tensor.reshape(-1, 1) if tensor.numel() <= 1 << 20 else tensor.reshape(1, -1), [0]
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).flatten(0, -2), order


def place_sum(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, column_count: int) -> torch.Tensor:
    """The sum, on the matrix's device, of its words mixed with their places. `rows` and `columns` are the places of its
    rows and columns in the whole, which has `column_count` columns. Parts may come in any order."""
    size, device = matrix.element_size(), matrix.device
    if not matrix.numel():
        return torch.zeros((), dtype=torch.int64, device=device)
    words_per_row = -(-column_count * size // 8)
    # A word's place is that of its first column.
    per_word = 8 // size if 8 % size == 0 and len(columns) % (8 // size) == 0 else 0
    words = columns[::per_word] * size // 8 if per_word else torch.arange(-(-len(columns) * size // 8))
    word_terms = (words * _GOLDEN).to(device)
    row_terms = (rows * words_per_row * _GOLDEN).to(device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    piece = _PIECE_BYTES if device.type == "cpu" else _GPU_PIECE_BYTES
    down = max(1, piece // 8 // max(1, len(words)))
    for top in range(0, len(rows), down):
        taken = _as_words(matrix[top : top + down])
        _add(taken, row_terms[top : top + down], word_terms, total)
    return total


def _add(words: torch.Tensor, row_terms: torch.Tensor, word_terms: torch.Tensor, total: torch.Tensor) -> None:
    if words.is_cuda:
        from components.worker import weights_kernel

        weights_kernel.launch(words, row_terms, word_terms, total)
        return
    across = _PIECE_BYTES // 8
    for left in range(0, len(word_terms), across):
        mixed = words[:, left : left + across] + row_terms[:, None]
        mixed += word_terms[left : left + across]
        mixed ^= (mixed >> 30) & ((1 << 34) - 1)
        mixed *= _MIX_1
        mixed ^= (mixed >> 27) & ((1 << 37) - 1)
        mixed *= _MIX_2
        mixed ^= (mixed >> 31) & ((1 << 33) - 1)
        total += mixed.sum()


def _as_words(matrix: torch.Tensor) -> torch.Tensor:
    raw = matrix.contiguous().view(torch.uint8)
    if raw.shape[1] % 8:
        raw = nn.functional.pad(raw, (0, 8 - raw.shape[1] % 8))
    return raw.view(torch.int64)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _numbers(sums: list[torch.Tensor]) -> list[int]:
    """The sums as numbers, with a single copy from the device."""
    if not sums:
        return []
    device = sums[0].device
    return [number % (1 << 64) for number in torch.stack([one.to(device) for one in sums]).tolist()]
