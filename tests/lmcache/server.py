"""LMCache's own storage manager in this process, on the CPU: L1 memory, store and prefetch threads, the plug-in."""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
from lmcache.v1.distributed.storage_manager import _L1_WRITE_TAG, StorageManager
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.multiprocess.config import add_mp_server_args

from tests.conftest import eventually

SECONDS = 30.0  # for what should take none
LAYOUT = MemoryLayoutDesc([torch.Size([2, 4, 16, 32])], [torch.bfloat16])


def key(number: int, **changes: Any) -> ObjectKey:
    rank = ObjectKey.ComputeKVRank(world_size=2, global_rank=0, local_world_size=2, local_rank=0)
    fields = {"chunk_hash": number.to_bytes(32, "big"), "model_name": "llama", "kv_rank": rank}
    return ObjectKey(**(fields | changes))


def size(layout: MemoryLayoutDesc) -> int:
    """In bytes."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))


def content(one: ObjectKey, layout: MemoryLayoutDesc) -> torch.Tensor:
    """An object's bytes, which can be told from those of every other hash."""
    generator = torch.Generator().manual_seed(int.from_bytes(one.chunk_hash, "big"))
    return torch.randint(0, 256, (size(layout),), dtype=torch.uint8, generator=generator)


class Server:
    """The storage of `lmcache server`, from its command line."""

    def __init__(self, store: str, *, l1_gb: float = 0.05, arguments: Sequence[str] | None = None, **params: object):
        parser = argparse.ArgumentParser()
        add_mp_server_args(parser)
        add_storage_manager_args(parser)
        given = {"store": store, "identity": "a", "deadline_ms": 1000, **params}
        plugin = {"module_path": "components.lmcache.adapter", "class_name": "KvtierL2Adapter", "adapter_params": given}
        spec = json.dumps({"type": "plugin", **plugin})
        made = ["--l1-size-gb", str(l1_gb), "--eviction-policy", "LRU", "--l2-adapter", spec]
        # Otherwise all of a process would have one and the same L1.
        chosen = parser.parse_args([*(arguments or made), "--no-l1-use-lazy", "--shm-name", ""])
        self.manager = StorageManager(parse_args_to_config(chosen))
        ((_, self.adapter),) = self.manager.l2_adapters()

    def counts(self, operation: str) -> dict[str, int]:
        """Objects by outcome."""
        objects = self.adapter.report_status()["objects"]
        return {name.split()[1]: count for name, count in objects.items() if name.startswith(operation + " ")}

    def write(self, *keys: ObjectKey, layout: MemoryLayoutDesc = LAYOUT) -> dict[str, int]:
        """Fill objects, each with the content of its hash. What the store made of them."""
        before = self.counts("store")
        objects = self.manager.reserve_write(list(keys), layout)
        assert len(objects) == len(keys)
        for one, memory in objects.items():
            torch.frombuffer(memory.byte_array, dtype=torch.uint8).copy_(content(one, layout))
        self.manager.finish_write(list(keys))
        eventually(lambda: sum(self.counts("store").values()) == sum(before.values()) + len(keys), SECONDS)
        return dict(Counter(self.counts("store")) - Counter(before))

    def read(self, *keys: ObjectKey, layout: MemoryLayoutDesc = LAYOUT) -> list[bool]:
        """Which objects come into an empty L1. Those that do are what was written, bit by bit."""
        eventually(self._emptied, SECONDS)
        rows = [GroupedObjectKeys(list(keys), keys[0].object_group_id, layout)]
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(rows, fetching_policy="full"))
        assert self.manager.wait_prefetch_status(handle, SECONDS)
        result = self.manager.query_prefetch_status(handle)
        assert result is not None
        assert result.l1_hit_count == 0
        hits = [result.hit_cells[0].test(index) for index in range(len(keys))]
        found = [one for one, hit in zip(keys, hits, strict=True) if hit]
        if found:
            with self.manager.read_prefetched_results(found) as objects:
                for one, memory in zip(found, objects or [], strict=True):
                    assert torch.equal(torch.frombuffer(memory.byte_array, dtype=torch.uint8), content(one, layout))
            self.manager.finish_read_prefetched(found)
        return hits

    @contextlib.contextmanager
    def room(self, one: ObjectKey) -> Iterator[MemoryObj]:
        """Memory of L1 for an object, which is then dropped."""
        yield self.manager.reserve_write([one], LAYOUT)[one]
        self.manager._l1_manager.finish_write_and_delete([one], tag=_L1_WRITE_TAG)

    def close(self) -> None:
        """All memory must have been given back."""
        eventually(self._emptied, SECONDS)
        self.manager.close()

    def _emptied(self) -> bool:
        self.manager.clear()
        return self.manager.get_l1_usage()[0] == 0
