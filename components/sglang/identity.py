"""Which model SGLang's scheduler process has loaded, and that it may have changed since.

SGLang tells a storage backend a model's name. A name is not content, so the loaded weights are read where they lie: the
backend is made in the process of the scheduler, after its model is loaded. What tensor parallelism divides is read in
parts, one on each rank, and every rank's key covers the parts of all: a layer's KV depends on the layers before it.

SGLang tells a backend of no change either. `watch` has its weight updater and its sleep say that they were called. From
then on, the process has no identity: which KV in HBM and host DRAM is of which weights cannot be told from here.
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

# At once, on its way from a GPU.
_PIECE_BYTES = 64 << 20
# Of WeightUpdater's public methods, those that leave weights alone.
_HARMLESS = ("init_weights_update_group", "destroy_weights_update_group")

_changes: list[str] = []  # calls after which weights may be others; no more than one is kept


def watch() -> None:
    """Hear of each call that may change the weights of a model in this process. Raises ConfigError if one was made, or
    may have been made unheard: once a scheduler takes requests."""
    watched = getattr(WeightUpdater, "kvtier_watched", False)
    if _changes or (not watched and _instances(SchedulerWeightUpdaterManager)):
        raise ConfigError(
            "hicache-storage-backend",
            f"attached after {_changes[0]}" if _changes else "attached to an engine that serves",
            "it when the engine starts: KV of other weights may be left in its caches",
        )
    if watched:
        return
    for name, method in list(vars(WeightUpdater).items()):
        if callable(method) and not name.startswith("_") and name not in _HARMLESS:
            setattr(WeightUpdater, name, _heard(name, method))
    sleep = SchedulerWeightUpdaterManager.release_memory_occupation
    SchedulerWeightUpdaterManager.release_memory_occupation = _heard("release_memory_occupation", sleep)
    WeightUpdater.kvtier_watched = True


def changed() -> str:
    """The first call that may have changed weights; "" while there was none. From any thread."""
    return _changes[0] if _changes else ""


def loaded_model() -> dict[str, object]:
    """What decides the KV of a token sequence, as far as it is the model's: weights, configuration, attention backend.
    Collective: every rank of the engine calls it, or none. Raises ConfigError where that cannot be told."""
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
            raise ConfigError("model-path", runner.model_config.model_path, f"another model; rank {rank} says: {wrong}")
    config = runner.model_config.hf_config.to_dict()
    config.pop("_name_or_path", None)  # of one checkpoint in two folders
    return {
        "weights": [digest for digest, _ in answers],
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "dtype": str(runner.dtype),
        "attention": list(attention_backends()),
    }


def weights_digest(model: nn.Module) -> str:
    """Of the parameters and buffers of a model, positional encoding among them, and of the numbers and switches of its
    layers. Raises ConfigError where there are weights that cannot be read."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        plain = {field: value for field, value in vars(module).items() if isinstance(value, float | bool)}
        hasher.update(repr((name, type(module).__qualname__, sorted(plain.items()))).encode())
        tensors = {field: one for field, one in {**module._parameters, **module._buffers}.items() if one is not None}
        for field, tensor in sorted(tensors.items()):
            if tensor.is_meta or (field == "weight" and not tensor.numel()):
                raise ConfigError(f"{name}.{field}", tuple(tensor.shape), "weights that are in memory")
            order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)  # as it lies there
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
    """The engine's own model runner. Raises ConfigError where KV depends on more than it and tokens say."""
    if get_lora().enable_lora:
        # An adapter of --lora-paths is known to SGLang's hashes by its name and path, not by its content.
        raise ConfigError("enable-lora", True, "no LoRA with this backend: adapters cannot be identified")
    if get_spec().speculative_algorithm:
        # Its draft model's KV lies in the same pages.
        raise ConfigError("speculative-algorithm", get_spec().speculative_algorithm, "none with this backend")
    runners = _instances(ModelRunner)
    if len(runners) != 1:
        raise ConfigError("hicache-storage-backend", f"{len(runners)} models in this process", "one")
    if runners[0].model_config.is_multimodal:
        raise ConfigError("model-path", runners[0].model_config.model_path, "a model of text alone with this backend")
    return runners[0]


def _instances(kind: type) -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def _heard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if not _changes:
            _changes.append(name)
            logger.warning("kvtier: %s: the store is neither read nor written until this engine starts again", name)
        return method(*args, **options)

    return call
