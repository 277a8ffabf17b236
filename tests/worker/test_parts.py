"""The tier inside the engine, part by part, with vLLM's own classes around it; its faults are shown before the cure,
and what it has mended by itself is shown to be."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import derive_canonical_mappings
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import OffloadingEventsTracker
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    CanonicalPageMapping,
    CopyRun,
    GPULoadStoreSpec,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingKVEventsConfig,
    OffloadKey,
    ReqContext,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.tiering.base import JobResult
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from components.worker import shm
from components.worker.compat import beside_each_other
from components.worker.events import ChunkEvents
from components.worker.manager import HOLD_SECONDS, HoldingTieringManager
from components.worker.memcpy import MemcpyWorker
from tests.conftest import cases
from tests.worker.stock import Tier, engine_request, group_config, offload_key, offloading, primary, step_output

MANAGERS = pytest.mark.parametrize("kind", [TieringOffloadingManager, HoldingTieringManager], ids=["stock", "ours"])


# ---- moving between engine and DRAM


class Rows:
    """Stands for SharedOffloadRegion, of one rank or of the part that all share: rows of all tensors side by side,
    without a file behind them. `of`: in the same memory as those."""

    def __init__(self, rows: int = 0, row_bytes: int = 0, *, of: "Rows | None" = None):
        self.memory = torch.zeros((rows, row_bytes), dtype=torch.int8) if of is None else of.memory
        self._next = 0

    def create_next_worker_view(self, page_bytes: int) -> torch.Tensor:
        assert self._next + page_bytes <= self.memory.shape[1]
        view = self.memory[:, self._next : self._next + page_bytes]
        self._next += page_bytes
        return view

    create_next_canonical_view = create_next_worker_view

    def cleanup(self) -> None:
        pass


@settings(max_examples=cases(60), deadline=None)
@given(st.integers(1, 4), st.integers(0, 7), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_blocks_come_back_as_they_went(per_chunk: int, first: int, count: int, layers: int, seed: int) -> None:
    """A transfer that begins and ends anywhere inside a row, over several tensors of several sizes."""
    pages = [8 * (layer + 1) for layer in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    engine = [torch.randint(-128, 127, (40, page), dtype=torch.int8, generator=generator) for page in pages]
    caches = CanonicalKVCaches(
        [CanonicalKVCacheTensor(tensor, page) for tensor, page in zip(engine, pages, strict=True)],
        [[CanonicalKVCacheRef(layer, page) for layer, page in enumerate(pages)]],
    )
    rows = Rows(12, sum(pages) * per_chunk)
    worker = MemcpyWorker(caches, per_chunk, rows)
    spanned = (first % per_chunk + count - 1) // per_chunk + 1
    row_ids = torch.randperm(12, generator=generator)[:spanned].tolist()
    source = torch.randperm(40, generator=generator)[:count].tolist()
    target = torch.randperm(40, generator=generator)[:count].tolist()
    before = [tensor[source].clone() for tensor in engine]
    assert worker.submit_store(1, GPULoadStoreSpec(source, [count], [first]), CPULoadStoreSpec(row_ids))
    for tensor in engine:
        tensor.zero_()
    assert worker.submit_load(2, CPULoadStoreSpec(row_ids), GPULoadStoreSpec(target, [count], [first]))
    assert all(torch.equal(tensor[target], old) for tensor, old in zip(engine, before, strict=True))
    results = worker.get_finished()
    assert [(result.job_id, result.success, result.transfer_size) for result in results] == [
        (1, True, count * sum(pages)),
        (2, True, count * sum(pages)),
    ]
    assert worker.get_finished() == []


class Page(NamedTuple):
    """A block of a layer, on all ranks together: K and V in one piece or in a half each, in it heads before tokens or
    tokens before heads."""

    halves: int
    heads: int
    tokens: int
    head_bytes: int
    heads_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        inner = (self.heads, self.tokens) if self.heads_first else (self.tokens, self.heads)
        return (self.halves, *inner, self.head_bytes)

    def heads_of(self, ranks: int, rank: int) -> tuple[int, int]:
        """A rank's first head, and how many it has. With more ranks than heads several have the same."""
        shards = min(ranks, self.heads)
        heads = self.heads // shards
        return rank * shards // ranks * heads, heads

    def part(self, whole: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
        """What a rank has of some blocks."""
        return whole.narrow(2 if self.heads_first else 3, *self.heads_of(ranks, rank)).flatten(1).clone()

    def mapping(self, ranks: int, rank: int) -> CanonicalPageMapping:
        """As vLLM derives it: see below."""
        first, heads = self.heads_of(ranks, rank)
        size, stride = heads * self.head_bytes, self.heads * self.head_bytes  # of a token, on a rank and on all
        runs = []
        for half in range(self.halves):
            ours, whole = half * self.tokens * size, half * self.tokens * stride
            if self.heads_first:
                piece = self.tokens * self.head_bytes
                runs += [
                    CopyRun(ours + n * piece, whole + (first + n) * piece, piece, 1, piece, piece) for n in range(heads)
                ]
            else:
                runs.append(CopyRun(ours, whole + first * self.head_bytes, size, self.tokens, size, stride))
        copies = max(1, ranks // self.heads)
        pages = self.halves * self.tokens * stride, self.halves * self.tokens * size
        return CanonicalPageMapping(*pages, tuple(runs), copies, rank % copies, True)


class Ranks:
    """An engine of so many ranks over rows that others may use, too. Where one is all, blocks lie in rows as they are.
    `beside`: the ranks' parts follow each other, as they do where a block of all layers is one piece."""

    def __init__(
        self,
        pages: list[Page],
        whole: list[torch.Tensor],
        per_chunk: int,
        ranks: int,
        rows: Rows,
        *,
        beside: bool = False,
    ):
        self.parts = []
        self.workers = []
        for rank in range(ranks):
            tensors = [page.part(one, ranks, rank) for page, one in zip(pages, whole, strict=True)]
            caches = CanonicalKVCaches(
                [CanonicalKVCacheTensor(tensor, tensor.shape[1]) for tensor in tensors],
                [
                    [
                        CanonicalKVCacheRef(number, tensors[number].shape[1], page.mapping(ranks, rank))
                        for number, page in enumerate(pages)
                    ]
                ],
            )
            if beside:
                caches = beside_each_other(caches, ranks, rank)
            self.parts.append(tensors)
            self.workers.append(MemcpyWorker(caches, per_chunk, Rows(of=rows), canonical=ranks > 1))

    def store(self, blocks: list[int], first: int, rows: list[int]) -> None:
        for worker in self.workers:
            assert worker.submit_store(1, GPULoadStoreSpec(blocks, [len(blocks)], [first]), CPULoadStoreSpec(rows))

    def load(self, blocks: list[int], first: int, rows: list[int]) -> None:
        for worker in self.workers:
            assert worker.submit_load(2, CPULoadStoreSpec(rows), GPULoadStoreSpec(blocks, [len(blocks)], [first]))


def cross(
    pages: list[Page],
    per_chunk: int,
    first: int,
    count: int,
    ranks: tuple[int, int],
    seed: int,
    *,
    beside: bool = False,
) -> None:
    """What one engine stores, another one of as many or more or fewer ranks loads into blocks of its own."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = partial(torch.randperm, generator=generator)
    whole = [torch.randint(-128, 127, (20, *page.shape), dtype=torch.int8, generator=generator) for page in pages]
    rows = Rows(12, per_chunk * sum(math.prod(page.shape) for page in pages))
    writer, reader = (
        Ranks(pages, tensors, per_chunk, number, rows, beside=beside)
        for number, tensors in zip(ranks, (whole, [torch.zeros_like(one) for one in whole]), strict=True)
    )
    row_ids = shuffled(12)[: (first % per_chunk + count - 1) // per_chunk + 1].tolist()
    source, target = shuffled(20)[:count], shuffled(20)[:count]
    writer.store(source.tolist(), first, row_ids)
    reader.load(target.tolist(), first, row_ids)
    for rank, tensors in enumerate(reader.parts):
        for page, one, tensor in zip(pages, whole, tensors, strict=True):
            expected = torch.zeros_like(tensor)
            expected[target] = page.part(one, ranks[1], rank)[source]
            assert torch.equal(tensor, expected)


NUMBER_OF_RANKS = st.sampled_from([1, 2, 4])


@settings(max_examples=cases(150), deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 7),
    st.integers(1, 9),
    st.tuples(NUMBER_OF_RANKS, NUMBER_OF_RANKS),
    st.integers(0, 2**32 - 1),
)
def test_a_row_does_not_depend_on_how_many_ranks_there_are(
    layers: list[tuple[int, int, int]],
    heads_first: bool,
    per_chunk: int,
    first: int,
    count: int,
    ranks: tuple[int, int],
    seed: int,
) -> None:
    """Over layers of several sizes, of which more ranks than heads have copies."""
    pages = [Page(halves, heads, 3, head_bytes, heads_first) for halves, heads, head_bytes in layers]
    cross(pages, per_chunk, first, count, ranks, seed)


@settings(max_examples=cases(60), deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 7),
    st.integers(1, 9),
    st.tuples(NUMBER_OF_RANKS, NUMBER_OF_RANKS),
    st.integers(0, 2**32 - 1),
)
def test_nor_does_it_where_a_block_of_all_layers_is_one_piece(
    per_chunk: int, first: int, count: int, ranks: tuple[int, int], seed: int
) -> None:
    """Heads outermost: what a rank has is one piece of the whole."""
    cross([Page(1, 4, 5, 7, True)], per_chunk, first, count, ranks, seed, beside=True)


def test_ranks_that_have_the_same_take_turns_to_store_it() -> None:
    pages, rows = [Page(1, 1, 2, 4, True)], Rows(4, 3 * 8)
    engine = Ranks(pages, [torch.full((12, *pages[0].shape), 7, dtype=torch.int8)], 3, 2, rows)
    transfer = GPULoadStoreSpec(list(range(10)), [10], [1]), CPULoadStoreSpec([2, 0, 3, 1])
    written = []
    for worker in engine.workers:
        rows.memory.zero_()
        assert worker.submit_store(1, *transfer)
        written.append({place for place, block in enumerate(rows.memory.view(12, 8)) if block.any()})
    assert all(len(of_rank) == 5 for of_rank in written)
    assert written[0] | written[1] == set(range(12)) - {6, 5}  # the transfer begins and ends within a row


def places(mapping: CanonicalPageMapping) -> dict[int, int]:
    """Where each byte of a rank's page is in the page of all."""
    return {
        run.local_offset + n * run.local_stride + byte: run.canonical_offset + n * run.canonical_stride + byte
        for run in mapping.runs
        for n in range(run.num_fragments)
        for byte in range(run.fragment_size)
    }


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_mappings_above_are_those_that_vllm_derives(ranks: int, halves: int, heads_first: bool) -> None:
    total, tokens, head_size = 4, 3, 5
    page = Page(halves, total, tokens, head_size * 2 // halves, heads_first)
    for rank in range(ranks):
        heads = page.heads_of(ranks, rank)[1]
        spec = FullAttentionSpec(tokens, num_kv_heads=heads, head_size=head_size, dtype=torch.int8)
        if halves == 2:
            cache = torch.zeros((2, 2, heads, tokens, head_size) if heads_first else (2, 2, tokens, heads, head_size))
            cache = cache.to(torch.int8).transpose(2, 3) if heads_first else cache.to(torch.int8)
        else:
            cache = torch.zeros((2, heads, tokens, 2 * head_size) if heads_first else (2, tokens, heads, 2 * head_size))
            cache = cache.to(torch.int8) if heads_first else cache.to(torch.int8).transpose(1, 2)
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(
                tensor_parallel_size=ranks,
                prefill_context_parallel_size=1,
                decode_context_parallel_size=1,
                cp_kv_cache_interleave_size=1,
                world_size=ranks,
                rank=rank,
            ),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
        )
        caches = KVCacheConfig(2, [], [KVCacheGroupSpec(["layer"], spec)])
        derived, ours = derive_canonical_mappings(config, caches, {"layer": cache})["layer"], page.mapping(ranks, rank)
        assert places(derived) == places(ours)
        assert replace(derived, runs=()) == replace(ours, runs=())


@pytest.mark.parametrize("sizes", [(16, 8), (8, 16, 8)])
def test_groups_of_several_sizes_share_a_tensor(sizes: tuple[int, ...]) -> None:
    """The memory of a block is one group's at a time, and a row has room for the largest page."""
    rows = Rows(len(sizes), 2 * max(sizes))
    engine = torch.arange(4 * len(sizes) * max(sizes), dtype=torch.int8).view(-1, max(sizes))
    runs = [CopyRun(0, 0, size, 1, size, size) for size in sizes]
    refs = [
        [CanonicalKVCacheRef(0, run.fragment_size, CanonicalPageMapping(*[run.fragment_size] * 2, (run,), 1, 0, True))]
        for run in runs
    ]
    worker = MemcpyWorker(
        CanonicalKVCaches([CanonicalKVCacheTensor(engine, max(sizes))], refs), 2, rows, canonical=True
    )
    count, row_ids = 2 * len(sizes), CPULoadStoreSpec(list(range(len(sizes))))
    groups = [2] * len(sizes), [0] * len(sizes)
    before = engine.clone()
    assert worker.submit_store(1, GPULoadStoreSpec(list(range(count)), *groups), row_ids)
    engine[count:] = 0
    assert worker.submit_load(2, row_ids, GPULoadStoreSpec(list(range(count, 2 * count)), *groups))
    for number, size in enumerate(sizes):
        mine = slice(2 * number, 2 * number + 2)
        assert torch.equal(engine[count:][mine, :size], before[:count][mine, :size])


# ---- the manager

STEP = SimpleNamespace(new_req_ids=[], preempted_req_ids=[])
KEY = offload_key(77)


def new_request(manager: TieringOffloadingManager, name: str = "r", keys: Sequence[Any] = ()) -> ReqContext:
    """A request whose chunks are `keys`, in order."""
    context = ReqContext(name)
    for number, key in enumerate(keys):
        context.set_offload_key_position(key, 4 * (number + 1))
    manager.on_new_request(context)
    return context


@MANAGERS
def test_chunks_that_arrived_are_kept_when_others_did_not(kind: Any) -> None:
    tier = Tier()
    manager = kind(primary(), [tier])
    context = new_request(manager)
    keys = [offload_key(number) for number in range(4)]
    assert {manager.lookup(key, context) for key in keys} == {LookupResult.HIT_PENDING}
    manager.on_schedule_end(STEP)
    (job,) = tier.jobs
    tier.results.append(JobResult(job.job_id, False, [keys[0], keys[1], keys[3]]))
    manager.on_schedule_end(STEP)
    found = [manager.primary_tier.lookup(key, context) for key in keys]
    assert found == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS, LookupResult.HIT]
    assert manager.primary_tier._get_num_free_chunks() == 13


@pytest.mark.parametrize("successful", [None, []])
@MANAGERS
def test_nothing_is_kept_of_a_fetch_that_failed(kind: Any, successful: Any) -> None:
    tier = Tier()
    manager = kind(primary(), [tier])
    context = new_request(manager)
    manager.lookup(KEY, context)
    manager.on_schedule_end(STEP)
    tier.results.append(JobResult(tier.jobs[0].job_id, False, successful))
    manager.on_schedule_end(STEP)
    assert manager.primary_tier.lookup(KEY, context) is LookupResult.MISS
    assert manager.primary_tier._get_num_free_chunks() == 16


@pytest.mark.parametrize("asking", [0, 1])
def test_what_a_tier_had_no_room_for_is_pinned_again_if_it_is_there(asking: int) -> None:
    """In the name of the tier that asks: it reports the job, and stock vLLM ends if it is another's."""
    tiers = [Tier(), Tier()]
    manager = HoldingTieringManager(primary(), tiers)
    context = new_request(manager)
    output = manager.prepare_store([offload_key(1), offload_key(2)], context)
    manager.complete_store(output.keys_to_store, context)
    for tier in tiers:
        tier.results = [JobResult(job.job_id, True) for job in tier.jobs]
    manager.on_schedule_end(STEP)
    taken: list[Any] = []
    tier: Any = tiers[asking]
    tier.store_leftovers = lambda pin: taken.append(pin([offload_key(1), offload_key(9)], context))
    manager.on_schedule_end(STEP)
    assert list(taken[0].keys) == [offload_key(1)]
    assert manager._jobs[taken[0].job_id].tier_idx == asking
    assert manager.primary_tier._num_evictable_cache_chunks == 1
    tier.store_leftovers = lambda pin: taken.append(pin([offload_key(9)], context))
    tier.results.append(JobResult(taken[0].job_id, True))
    manager.on_schedule_end(STEP)
    assert taken[1] is None
    assert manager.primary_tier._num_evictable_cache_chunks == 2
    assert not manager._jobs


def test_chunks_to_store_reach_a_tier_in_the_order_of_the_prompt() -> None:
    """Stock offloading keeps a job's keys as a set."""
    keys = [offload_key(number) for number in (5, 3, 8, 1, 9, 2)]
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    context = new_request(manager, keys=keys)
    rows = dict(zip(keys, manager.prepare_store(keys, context).store_spec.chunk_ids.tolist(), strict=True))
    manager.complete_store(set(keys), context)
    (job,) = tier.jobs
    assert list(job.keys) == keys
    assert job.chunk_ids.tolist() == [rows[key] for key in keys]


def test_what_has_come_within_a_step_is_taken_in_when_asked() -> None:
    """Stock looks once a step."""
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    context = new_request(manager)
    manager.lookup(KEY, context)
    manager.on_schedule_end(STEP)
    assert manager.lookup(KEY, context) is LookupResult.HIT_PENDING
    tier.results.append(JobResult(tier.jobs[0].job_id, True))
    assert manager.lookup(KEY, context) is LookupResult.HIT_PENDING
    manager.take_in()
    assert manager.lookup(KEY, context) is LookupResult.HIT


# ---- rows that were fetched ahead


def promoted(
    manager: TieringOffloadingManager, tier: Tier, name: str, keys: list[Any], missing: Any = ()
) -> ReqContext:
    """A request that queues, with its chunks fetched into rows, but for those that are missing."""
    context = new_request(manager, name, keys)
    if isinstance(manager, HoldingTieringManager):
        manager.expect(name)
    for key in keys:
        manager.lookup(key, context)
    manager.on_schedule_end(STEP)
    for job in tier.jobs:
        came = [key for key in job.keys if key not in missing]
        tier.results.append(JobResult(job.job_id, not missing, came))
    tier.jobs.clear()
    manager.on_schedule_end(STEP)
    return context


def pushed_out(manager: TieringOffloadingManager, keys: list[Any]) -> list[Any]:
    """Which of the chunks are gone after the engine stored as much as it could."""
    other = new_request(manager, "other")
    for number in range(1000, 1016):
        output = manager.prepare_store([offload_key(number)], other)
        if output is not None:
            manager.primary_tier.complete_store(output.keys_to_store, other)
    return [key for key in keys if manager.primary_tier.lookup(key, other) is LookupResult.MISS]


def test_stock_evicts_what_was_fetched_before_it_is_used() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = TieringOffloadingManager(primary(), [tier])
    promoted(manager, tier, "r", keys)
    assert pushed_out(manager, keys) == keys


def test_fetched_rows_are_held_until_the_request_is_scheduled_or_gone() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    promoted(manager, tier, "r", keys)
    assert pushed_out(manager, keys) == []
    manager.let_go("r")
    assert manager._held_rows == 0
    assert pushed_out(manager, keys) == keys


def test_of_a_fetch_that_came_in_part_what_came_is_held() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    promoted(manager, tier, "r", keys, missing=keys[1:2])
    assert manager._holdings["r"].keys == [keys[0], *keys[2:]]
    assert pushed_out(manager, keys) == keys[1:2]
    manager.let_go("r")
    assert pushed_out(manager, keys) == keys


def test_a_finished_request_holds_nothing() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    context = promoted(manager, tier, "r", keys)
    manager.on_request_finished(context)
    assert (manager._held_rows, manager._holdings, manager._waiting) == (0, {}, set())
    assert manager.primary_tier._num_evictable_cache_chunks == 4


def test_rows_are_not_held_for_ever_nor_beyond_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    for name in range(3):
        promoted(manager, tier, str(name), [offload_key(10 * name + number) for number in range(5)])
    assert manager._held_rows == 6  # of 16
    assert manager.primary_tier._num_evictable_cache_chunks == 9
    later = time.monotonic() + HOLD_SECONDS + 1
    monkeypatch.setattr("components.worker.manager.time", SimpleNamespace(monotonic=lambda: later))
    manager.on_schedule_end(STEP)
    assert manager._held_rows == 0
    assert manager.primary_tier._num_evictable_cache_chunks == 15


def test_a_reset_holds_nothing_and_goes_on() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    promoted(manager, tier, "r", keys)
    manager.reset_cache()
    assert (manager._held_rows, manager._holdings) == (0, {})
    promoted(manager, tier, "r", keys)
    manager.let_go("r")
    assert manager._held_rows == 0


def test_what_comes_in_while_a_reset_drains_is_not_held() -> None:
    tier: Any = Tier()
    manager = HoldingTieringManager(primary(), [tier])
    context = new_request(manager)
    manager.expect("r")
    manager.lookup(KEY, context)
    manager.on_schedule_end(STEP)
    tier.drain_jobs = lambda: tier.results.append(JobResult(tier.jobs[0].job_id, True))
    manager.reset_cache()
    assert (manager._held_rows, manager._holdings, manager._waiting) == (0, {}, {"r"})
    assert manager.primary_tier._get_num_free_chunks() == 16


def test_a_long_promotion_is_several_jobs_in_order() -> None:
    tier: Any = Tier()
    tier.job_chunks = 3
    manager = HoldingTieringManager(primary(), [tier])
    context = new_request(manager)
    keys = [offload_key(number) for number in range(8)]
    for key in keys:
        manager.lookup(key, context)
    manager.on_schedule_end(STEP)
    assert [list(job.keys) for job in tier.jobs] == [keys[:3], keys[3:6], keys[6:]]
    assert len({row for job in tier.jobs for row in job.chunk_ids.tolist()}) == 8
    assert all(job.req_context is context for job in tier.jobs)


@MANAGERS
def test_a_chunk_that_is_under_way_is_waited_for_by_stock_for_ever_and_by_ours_until_its_tier_gives_up(
    kind: Any,
) -> None:
    tier: Any = Tier()
    manager = kind(primary(), [tier])
    context = new_request(manager)
    manager.lookup(KEY, context)
    manager.on_schedule_end(STEP)
    assert manager.lookup(KEY, context) is LookupResult.HIT_PENDING
    tier.gave_up = lambda req_id: req_id == "r"
    ours = kind is HoldingTieringManager
    assert manager.lookup(KEY, context) is (LookupResult.MISS if ours else LookupResult.HIT_PENDING)
    other = new_request(manager, "other")
    assert manager.lookup(KEY, other) is LookupResult.HIT_PENDING
    assert manager.primary_tier._get_num_free_chunks() == 15  # whoever passes over it, the row stays taken
    manager.on_schedule_end(STEP)
    tier.results.append(JobResult(tier.jobs[0].job_id, False, []))
    manager.on_schedule_end(STEP)
    assert manager.primary_tier._get_num_free_chunks() == 16


# ---- what a finished request stores: mended by vLLM, which this notices if it goes


def ended(
    scheduler: Any,
    *,
    tokens: int,
    computed: int,
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED,
    parameters: dict[str, Any] | None = None,
) -> int:
    """A request of so many tokens, of which the first four are its prompt, ends: how many chunks are stored of it."""
    request = engine_request(prompt_tokens=4, answer_tokens=tokens - 4)
    request.kv_transfer_params = parameters
    scheduler.on_new_request(request)
    request.num_computed_tokens = computed
    scheduler._req_status["r"].update_block_id_groups((list(range(1, -(-computed // 4) + 1)),))
    request.status = status
    assert scheduler.request_finished(request) == (False, None)
    meta = scheduler.build_connector_meta(step_output(("r",)))
    return sum(len(job.dst_spec.chunk_ids) for job in meta.store_jobs.values())


@pytest.mark.parametrize(
    ("tokens", "computed", "status", "chunks"),
    [
        (8, 7, RequestStatus.FINISHED_LENGTH_CAPPED, 1),
        (9, 8, RequestStatus.FINISHED_LENGTH_CAPPED, 2),
        (8, 7, RequestStatus.FINISHED_STOPPED, 1),
        (8, 7, RequestStatus.FINISHED_ABORTED, 1),
        (8, 8, RequestStatus.FINISHED_ABORTED, 2),
        (8, 3, RequestStatus.FINISHED_ABORTED, 0),
        (8, 0, RequestStatus.FINISHED_ABORTED, 0),
    ],
)
@MANAGERS
def test_only_what_was_computed_is_stored(
    kind: Any, tokens: int, computed: int, status: RequestStatus, chunks: int
) -> None:
    """The last token of an answer was sampled and not run through the model. And who leaves before it is scheduled has
    no blocks at all."""
    manager = kind(primary(), [Tier()])
    scheduler = offloading(manager)
    assert ended(scheduler, tokens=tokens, computed=computed, status=status) == chunks
    assert bool(scheduler._req_status) == bool(chunks)
    assert bool(manager._req_state) == bool(chunks)


def test_a_cap_that_the_client_asked_for_stays() -> None:
    scheduler = offloading(HoldingTieringManager(primary(), [Tier()]))
    assert ended(scheduler, tokens=13, computed=12, parameters={"max_offload_tokens": 4}) == 1


@MANAGERS
def test_a_finished_request_is_remembered_until_its_last_store_is_done(kind: Any) -> None:
    """It is built after the request ended, and done later."""
    tier = Tier()
    manager = kind(primary(), [tier])
    scheduler = offloading(manager)
    assert ended(scheduler, tokens=13, computed=12) == 3
    assert (tier.jobs, tier.finished) == ([], [])
    done = OffloadingWorkerMetadata()
    for job_id in scheduler._jobs:
        done.mark_completed(job_id)
    scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=done))
    assert sum(len(job.keys) for job in tier.jobs) == 3
    assert tier.finished == ["r"]
    assert not manager._req_state
    assert not scheduler._req_status


# ---- events


def tracker() -> ChunkEvents:
    scheduler = offloading(None)
    events = ChunkEvents.replace(scheduler)
    assert scheduler._events_tracker is events
    return events


def told(events: ChunkEvents, keys: list[OffloadKey], *, removed: bool = False) -> list[Any]:
    return list(events.take_events([OffloadingEvent(keys, Medium.CPU, removed)]))


def image(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=length))


LORA = LoRARequest("adapter", 3, "/models/adapter")
IMAGES = [image("cat", 2, 5), image("dog", 9, 4), image("cow", 13, 1)]
DIFFERENCES: list[dict[str, Any]] = [
    {},
    {"cache_salt": "red"},
    {"lora_request": LORA},
    {"mm_features": IMAGES},
    {"cache_salt": "red", "lora_request": LORA, "mm_features": IMAGES},
]


@pytest.mark.parametrize("differences", DIFFERENCES, ids=["nothing", "salt", "LoRA", "images", "all"])
@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_dram_is_announced_as_hbm_is(blocks_per_chunk: int, differences: dict[str, Any]) -> None:
    """Block by block, with all that went into a block's hash."""
    request = engine_request(prompt_tokens=18, **differences)
    pool = BlockPool(10, enable_caching=True, hash_block_size=4, enable_kv_cache_events=True)
    for block in range(4):  # one event each
        pool.cache_full_blocks(request, pool.blocks[1:6], block, block + 1, 4, 0)
    in_hbm = {event.block_hashes[0]: event for event in pool.take_events()}
    assert len(in_hbm) == 4

    events = tracker()
    config = group_config(tokens_per_chunk=4 * blocks_per_chunk, hashes_per_chunk=blocks_per_chunk)
    keys = [make_offload_key(one, 0) for one in request.block_hashes[blocks_per_chunk - 1 :: blocks_per_chunk]]
    for chunk, key in enumerate(keys):
        (events.record_store if chunk % 2 else events.record_lookup)(request, config, chunk, key)
    blocks: list[Any] = []
    for event in told(events, keys):
        assert event.medium == "CPU"
        assert event.block_size == 4
        first = in_hbm[event.block_hashes[0]]
        assert event.parent_block_hash == first.parent_block_hash
        assert (event.lora_id, event.lora_name) == (first.lora_id, first.lora_name)
        assert (event.extra_keys is None) == (not differences)
        for number, block_hash in enumerate(event.block_hashes):
            tokens = event.token_ids[4 * number : 4 * (number + 1)]
            extra = event.extra_keys[number] if event.extra_keys else None
            blocks.append((block_hash, tokens, extra))
    assert blocks == [(name, one.token_ids, one.extra_keys[0]) for name, one in in_hbm.items()]

    (removed,) = told(events, keys, removed=True)
    assert removed.block_hashes == [block_hash for block_hash, _, _ in blocks]
    assert not events._pending_event_metadata


def test_stock_leaves_out_the_salt() -> None:
    """Or ours would not be needed."""
    events = offloading(None)._events_tracker
    request = engine_request(cache_salt="red")
    key = make_offload_key(request.block_hashes[0], 0)
    events.record_store(request, group_config(), 0, key)
    assert told(events, [key])[0].extra_keys is None


def test_what_was_noted_before_the_tracker_was_replaced_stays() -> None:
    scheduler = offloading(None)
    request = engine_request()
    key = make_offload_key(request.block_hashes[0], 0)
    scheduler._events_tracker.record_store(request, group_config(), 0, key)
    assert told(ChunkEvents.replace(scheduler), [key])[0].token_ids == [0, 1, 2, 3]


def test_without_events_nothing_is_noted() -> None:
    scheduler = offloading(None)
    scheduler._events_tracker = OffloadingEventsTracker(OffloadingKVEventsConfig(False, True))
    events = ChunkEvents.replace(scheduler)
    request = engine_request(cache_salt="red")
    events.record_store(request, group_config(), 0, make_offload_key(request.block_hashes[0], 0))
    assert not events._pending_event_metadata


@pytest.mark.parametrize("changes", DIFFERENCES[:3], ids=["nothing", "salt", "LoRA"])
def test_salt_and_lora_are_in_the_engines_own_block_hashes(changes: dict[str, Any]) -> None:
    """The key is made of the block hash, so nothing crosses that the engine itself would not share."""
    plain, changed = engine_request().block_hashes, engine_request(**changes).block_hashes
    assert len(plain) == len(changed) == 4
    assert (plain == changed) == (not changes)
    if changes:  # not one block, the later ones by their chain of parents
        assert not set(plain) & set(changed)
    if "cache_salt" in changes:
        assert not set(changed) & set(engine_request(cache_salt="blue").block_hashes)


# ---- leftovers


def test_leftovers_of_dead_engines_are_swept_and_living_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "SHM", tmp_path)
    living = shm.hold_region("kvtier-living")
    dead = shm.hold_region("kvtier-dead")
    for name in ("kvtier-living", "kvtier-dead", "stock"):
        (tmp_path / f"vllm_offload_{name}.mmap").write_bytes(b"kv")
    os.close(dead)
    shm.sweep_stale_regions()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["vllm_offload_kvtier-living.lock", "vllm_offload_kvtier-living.mmap", "vllm_offload_stock.mmap"]
    os.close(living)
