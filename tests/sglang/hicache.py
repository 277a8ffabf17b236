"""SGLang's HiCache of one rank with the backend, and what its radix tree does with them."""

from array import array
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from benchmarks.store.hicache import HiCache, kvtier
from kvstore.errors import ConfigError

PAGE_TOKENS, LAYERS = 16, 3
SECONDS = 30.0  # for what should take none
KINDS: dict[str, tuple[Any, dict[str, int]]] = {
    "MHA": (MHATokenToKVPool, {"head_num": 2, "head_dim": 32}),
    "MHA with other values": (MHATokenToKVPool, {"head_num": 2, "head_dim": 32, "v_head_dim": 16}),
    "MLA": (MLATokenToKVPool, {"kv_lora_rank": 48, "qk_rope_head_dim": 16}),
}


class Cache(HiCache):
    """HiCache of one rank, with the backend. `read` and `write` are what its radix tree does with them."""

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
        self.settings = {**kvtier(store), "deadline_ms": 1000, **settings}
        super().__init__(*KINDS[kind], layers=LAYERS, page_tokens=page_tokens, pages=pages, layout=layout, dtype=dtype)

    def attach(self) -> "Cache":
        self.backend = self.attach_backend("dynamic", dict(self.settings))
        return self

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


def compile_hash() -> None:
    """SGLang does so when it first needs it, which takes longer than the deadlines here."""
    get_storage_hash_str(RadixKey(array("q", range(PAGE_TOKENS))), None, page_size=PAGE_TOKENS)


def refusal(store: str, **changes: Any) -> str:
    """Why a backend is not made."""
    with pytest.raises(ConfigError) as caught:
        Cache(store, **changes).attach()
    return str(caught.value)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, expected, strict=True)
    )
