"""SGLang's own scheduler parts in this process, on the CPU: a model runner with a small Llama, host pools, controllers.

They need no kernels. What does, copies between device and host pool, is not run: tests fill host pools themselves.
"""

import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_pool_entry
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.services import free_port
from kvstore.errors import ConfigError

PAGE_TOKENS, LAYERS = 16, 3
SECONDS = 30.0  # for what should take none
KINDS: dict[str, tuple[Any, dict[str, int]]] = {
    "MHA": (MHATokenToKVPool, {"head_num": 2, "head_dim": 32}),
    "MHA with other values": (MHATokenToKVPool, {"head_num": 2, "head_dim": 32, "v_head_dim": 16}),
    "MLA": (MLATokenToKVPool, {"kv_lora_rank": 48, "qk_rope_head_dim": 16}),
}


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


def load(folder: Path) -> ModelRunner:
    """The model of this process, as a scheduler loads it. Once."""
    arguments = ServerArgs(
        model_path=checkpoint(folder, 1),
        device="cpu",
        attention_backend="torch_native",
        page_size=PAGE_TOKENS,
        skip_tokenizer_init=True,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    port = free_port()
    bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    config = ModelConfig.from_server_args(arguments)
    bootstrap.init_layer_runtime(model_config=config)
    return ModelRunner(model_config=config, mem_fraction_static=0.5, gpu_id=0, nccl_port=port, server_args=arguments)


class Cache:
    """HiCache of one rank: SGLang's pools and its controller, which loads the backend from its extra config. `read` and
    `write` are what its radix tree does with them."""

    def __init__(
        self,
        store: str,
        *,
        layout: str = "page_first",
        kind: str = "MHA",
        dtype: torch.dtype = torch.bfloat16,
        page_tokens: int = PAGE_TOKENS,
        pages: int = 64,
        **settings: object,
    ):
        self.page_tokens = page_tokens
        self.settings = {
            "backend_name": "kvtier",
            "module_path": "components.sglang.storage",
            "class_name": "KvtierStorage",
            "interface_v1": 1,
            "store": store,
            "deadline_ms": 1000,
            **settings,
        }
        tokens = pages * page_tokens
        pool_type, shape = KINDS[kind]
        device_pool = pool_type(
            size=tokens,
            page_size=page_tokens,
            dtype=dtype,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
            **shape,
        )
        self.pool = _host_pool(device_pool, page_tokens, layout)
        layers = {layer: layer for layer in range(LAYERS)}
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=PoolName.KV,
                    host_pool=self.pool,
                    device_pool=device_pool,
                    layer_mapping=layers,
                    transfer_layer_id_max=LAYERS,
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

    def attach(self) -> "Cache":
        self.controller.attach_storage_backend(
            "dynamic",
            prefetch_threshold=self.page_tokens,
            model_name="a name",
            storage_backend_extra_config=dict(self.settings),
            host_pools=self.controller.mem_pool_host.entries,
        )
        self.backend = self.controller.storage_backend
        return self

    def detach(self) -> None:
        self.controller.detach_storage_backend()

    def key(self, pages: int, seed: int = 1, *, extra_key: str | None = None, cache_salt: str | None = None) -> Any:
        tokens = torch.randint(0, 256, (pages * self.page_tokens,), generator=torch.Generator().manual_seed(seed))
        return RadixKey(array("q", tokens.tolist()), extra_key=extra_key, cache_salt=cache_salt)

    def write(self, key: Any, content: list[torch.Tensor]) -> int:
        """Fill pages of the host pool and back them up. How many tokens are stored."""
        indices = self.pool.alloc(len(content) * self.page_tokens)
        for first, page in zip(indices[:: self.page_tokens].tolist(), content, strict=True):
            self.pool.set_from_flat_data_page(first, page)
        hashes = get_storage_hash_str(key, None, page_size=self.page_tokens)
        self.controller.write_storage(indices, key, hash_value=hashes)
        operation = self.controller.ack_backup_queue.get(timeout=SECONDS)
        self.pool.free(indices)
        return operation.completed_tokens

    def read(self, key: Any) -> list[torch.Tensor]:
        """Prefetch a prompt's pages into the host pool. Those before the first that did not come."""
        self.controller.prefetch(CacheRequestHandle("request", 0), key)
        operation = self.controller.prefetch_hit_queue.get(timeout=SECONDS)
        if not operation.storage_hit_count:
            return []
        indices = self.controller.alloc_prefetch_host_buffers(operation, operation.storage_hit_count)
        operation.host_indices = indices
        self.controller.prefetch_buffer.put(operation)
        completed = 0
        while not (ack := self.controller.ack_prefetch_queue.get(timeout=SECONDS)).completed_req:
            completed = ack.completed_tokens if ack.completed_tokens is not None else completed
        found = indices[:completed][:: self.page_tokens].tolist()
        pages = [self.pool.get_data_page(first).clone() for first in found]
        self.pool.free(indices)
        return pages

    def content(self, pages: int, seed: int = 1) -> list[torch.Tensor]:
        """Pages that can be told from all others, bit by bit."""
        dummy = self.pool.get_dummy_flat_data_page()
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 256, (pages, dummy.nbytes), dtype=torch.uint8, generator=generator)
        return [page.view(dummy.dtype) for page in raw]


def _host_pool(device_pool: Any, page_tokens: int, layout: str) -> Any:
    """As SGLang's assembler makes it, but for memory that a GPU is told of."""
    info = device_pool.get_device_pool_infos()[0].buffer_info
    options = {
        "host_to_device_ratio": 1.0,
        "host_size": 0,
        "page_size": page_tokens,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": device_pool.size,
        "start_layer": 0,
        "end_layer": LAYERS - 1,
    }
    with host_memory_budget_scope(1 << 30):
        if isinstance(device_pool, MLATokenToKVPool):
            return MLATokenToKVPoolHost(info, target_layer_num=LAYERS, **options)
        return get_mha_host_pool_cls(info)(info, **options)


def refusal(store: str, **changes: Any) -> str:
    """Why a backend is not made."""
    with pytest.raises(ConfigError) as caught:
        Cache(store, **changes).attach()
    return str(caught.value)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, expected, strict=True)
    )
