"""SGLang's own scheduler parts in this process, on the CPU: a model runner with a small Llama, host pools, controllers.

They need no kernels. Copies between device and host pool would, so they do not run: callers fill host pools themselves.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_pool_entry
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.services import free_port

_POOL_BYTES_MAX = 8 << 30


def checkpoint(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def load(folder: Path, page_tokens: int) -> ModelRunner:
    """Load the model of this process, as a scheduler does. To be called once."""
    arguments = ServerArgs(
        model_path=checkpoint(folder, 1),
        device="cpu",
        attention_backend="torch_native",
        page_size=page_tokens,
        skip_tokenizer_init=True,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    port = free_port()
    bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    config = ModelConfig.from_server_args(arguments)
    bootstrap.init_layer_runtime(model_config=config)
    return ModelRunner(model_config=config, mem_fraction_static=0.5, gpu_id=0, nccl_port=port, server_args=arguments)


class HiCache:
    """One rank's pools of SGLang (`pool_type` with `shape`), and its controller."""

    def __init__(
        self,
        pool_type: Any,
        shape: dict[str, int],
        *,
        layers: int,
        page_tokens: int,
        pages: int,
        layout: str = "page_first",
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.page_tokens = page_tokens
        tokens = pages * page_tokens
        device_pool = pool_type(
            size=tokens,
            page_size=page_tokens,
            dtype=dtype,
            layer_num=layers,
            device="cpu",
            enable_memory_saver=False,
            **shape,
        )
        self.pool = _host_pool(device_pool, page_tokens, layout, layers)
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=PoolName.KV,
                    host_pool=self.pool,
                    device_pool=device_pool,
                    layer_mapping={layer: layer for layer in range(layers)},
                    transfer_layer_id_max=layers,
                    is_anchor=True,
                )
            ]
        )
        self.controller = HybridCacheController(
            PagedTokenToKVPoolAllocator(tokens, page_tokens, dtype, "cpu", device_pool, False),
            group,
            page_tokens,
            get_tp_group().cpu_group,
            threading.Event(),
            io_backend="direct",
        )

    def attach_backend(self, name: str, extra_config: dict[str, object]) -> Any:
        """A storage backend, as `--hicache-storage-backend` names it."""
        self.controller.attach_storage_backend(
            name,
            prefetch_threshold=self.page_tokens,
            model_name="a name",
            storage_backend_extra_config=extra_config,
            host_pools=self.controller.mem_pool_host.entries,
        )
        return self.controller.storage_backend

    def detach(self) -> None:
        self.controller.detach_storage_backend()


def kvtier(store: str, **settings: object) -> dict[str, object]:
    """The extra config of `dynamic`."""
    return {
        "backend_name": "kvtier",
        "module_path": "components.sglang.storage",
        "class_name": "KvtierStorage",
        "interface_v1": 1,
        "store": store,
        **settings,
    }


def _host_pool(device_pool: Any, page_tokens: int, layout: str, layers: int) -> Any:
    """As SGLang's assembler makes it, but without memory registered with a GPU."""
    info = device_pool.get_device_pool_infos()[0].buffer_info
    options = {
        "host_to_device_ratio": 1.0,
        "host_size": 0,
        "page_size": page_tokens,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": device_pool.size,
        "start_layer": 0,
        "end_layer": layers - 1,
    }
    with host_memory_budget_scope(_POOL_BYTES_MAX):
        if isinstance(device_pool, MLATokenToKVPool):
            return MLATokenToKVPoolHost(info, target_layer_num=layers, **options)
        return get_mha_host_pool_cls(info)(info, **options)
