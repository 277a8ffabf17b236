"""The identity of the model that SGLang's scheduler process has loaded, and whether it may have changed since.

SGLang gives a storage backend only the model's name. A name does not identify content, so this module reads the loaded
weights in place. The scheduler's process creates the backend after it has loaded the model. With tensor parallelism
each rank reads its shard. Every rank's key covers the shards of all ranks, since a layer's KV depends on the layers
before it.

SGLang does not notify a backend of a change either. `watch` wraps its weight updater and its sleep to detect calls.
After such a call the process has no identity, because it is unknown which KV in HBM and host DRAM belongs to which
weights.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import xxhash
from sglang.srt.distributed.parallel_state import get_world_group
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import attention_backends, get_lora, get_spec
from torch import nn

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

# Bytes per copy from a GPU.
_PIECE_BYTES = 64 << 20
# The public methods of WeightUpdater that do not change weights.
_HARMLESS = ("init_weights_update_group", "destroy_weights_update_group")

_changes: list[str] = []  # the first call that may have changed weights


def watch() -> None:
    """Detect every later call that may change the weights of a model in this process. Raises ConfigError if there was
    one, or may have been one undetected: once a scheduler takes requests."""
    watched = getattr(WeightUpdater, "kvtier_watched", False)
    if _changes or (not watched and _instances(SchedulerWeightUpdaterManager)):
        raise ConfigError(
            "hicache-storage-backend",
            f"attached after {_changes[0]}" if _changes else "attached to an engine that serves",
            "it at the engine's start: its caches may hold KV of other weights",
        )
    if watched:
        return
    for name, method in list(vars(WeightUpdater).items()):
        if callable(method) and not name.startswith("_") and name not in _HARMLESS:
            setattr(WeightUpdater, name, _watched(name, method))
    sleep = SchedulerWeightUpdaterManager.release_memory_occupation
    SchedulerWeightUpdaterManager.release_memory_occupation = _watched("release_memory_occupation", sleep)
    WeightUpdater.kvtier_watched = True


def changed() -> str:
    """The first call that may have changed weights; "" if there was none. Thread-safe."""
    return _changes[0] if _changes else ""


def loaded_model() -> dict[str, object]:
    """The model's part of what determines the KV of a token sequence: weights, configuration, attention backend.
    Collective: either every rank of the engine calls it, or none. Raises ConfigError if it cannot be determined."""
    runner = _runner()
    mine, problem = "", ""
    try:
        mine = weights_digest(runner.model)
    except ConfigError as error:
        problem = str(error)
    answers = [(mine, problem)]
    world = get_world_group()
    if world.world_size > 1:
        answers *= world.world_size
        torch.distributed.all_gather_object(answers, (mine, problem), group=world.cpu_group)
    for rank, (_, wrong) in enumerate(answers):
        if wrong:
            expected = f"a model that can be identified; rank {rank}: {wrong}"
            raise ConfigError("model-path", runner.model_config.model_path, expected)
    config = runner.model_config.hf_config.to_dict()
    config.pop("_name_or_path", None)  # the same checkpoint may be in different folders
    return {
        "weights": [digest for digest, _ in answers],
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "dtype": str(runner.dtype),
        "attention": list(attention_backends()),
    }


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's parameters and buffers (including positional encoding), and of the numeric and boolean
    attributes of its layers. Raises ConfigError if weights cannot be read."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        plain = {field: value for field, value in vars(module).items() if isinstance(value, float | bool)}
        hasher.update(repr((name, type(module).__qualname__, sorted(plain.items()))).encode())
        tensors = {field: one for field, one in {**module._parameters, **module._buffers}.items() if one is not None}
        for field, tensor in sorted(tensors.items()):
            if tensor.is_meta or (field == "weight" and not tensor.numel()):
                raise ConfigError(f"{name}.{field}", tuple(tensor.shape), "weights that are in memory")
            order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)  # as laid out in memory
            hasher.update(repr((field, str(tensor.dtype), tuple(tensor.shape), order)).encode())
            hasher.update(_content(tensor.detach().permute(order)))
    return hasher.hexdigest()


def _content(tensor: torch.Tensor) -> bytes:
    hasher = xxhash.xxh3_128()
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    for first in range(0, len(content), _PIECE_BYTES):
        hasher.update(content[first : first + _PIECE_BYTES].cpu().numpy().data)
    return hasher.digest()


def _runner() -> Any:
    """The engine's model runner. Raises ConfigError if KV depends on more than the model and the tokens."""
    if get_lora().enable_lora:
        # SGLang's hashes identify an adapter of --lora-paths by name and path, not by content.
        expected = "no LoRA: adapters cannot be identified"
        raise ConfigError.conflicting("enable-lora", True, "this backend", expected)
    if get_spec().speculative_algorithm:
        expected = "none: the draft model's KV is in the same pages"
        raise ConfigError.conflicting(
            "speculative-algorithm", get_spec().speculative_algorithm, "this backend", expected
        )
    runners = _instances(ModelRunner)
    if len(runners) != 1:
        raise ConfigError("hicache-storage-backend", f"{len(runners)} models in this process", "one")
    if runners[0].model_config.is_multimodal:
        raise ConfigError.conflicting(
            "model-path", runners[0].model_config.model_path, "this backend", "a text-only model"
        )
    return runners[0]


def _instances(kind: type) -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def _watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if not _changes:
            _changes.append(name)
            logger.warning("kvtier: %s was called: the store is off until this engine restarts", name)
        return method(*args, **options)

    return call
