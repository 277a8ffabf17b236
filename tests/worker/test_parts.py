"""The tier inside the engine, part by part, with vLLM's own classes around it; its faults are shown before the cure."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
    SchedulerOffloadConfig,
)
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.tiering.base import JobMetadata
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from components.worker import layout, shm
from components.worker.connector import _cap_stores
from components.worker.events import ChunkEvents
from components.worker.manager import HOLD_SECONDS, GuardedTieringManager, PartialResult
from components.worker.memcpy import MemcpyWorker

ROW = 4096
DIGEST = b"\x07" * 32


def offload_key(number: int, group: int = 0) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), group)


# ---- moving between engine and DRAM


class Rows:
    """Stands for SharedOffloadRegion: rows of all tensors side by side, without a file behind them."""

    def __init__(self, rows: int, row_bytes: int):
        self.memory = torch.zeros((rows, row_bytes), dtype=torch.int8)
        self._next = 0

    def create_next_view(self, page_bytes: int) -> torch.Tensor:
        view = self.memory[:, self._next : self._next + page_bytes]
        self._next += page_bytes
        return view

    def cleanup(self) -> None:
        pass


@settings(max_examples=60, deadline=None)
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


# ---- the manager's two faults


class Primary(CPUOffloadingManager):
    """The DRAM tier's bookkeeping, without its memory."""

    def __init__(self, rows: int = 16):
        super().__init__(rows)
        self.prepare_read = self.prepare_load
        self.complete_read = self.complete_load
        self.prepare_write = self.prepare_store
        self.complete_write = self.complete_store


class Tier:
    """A secondary tier that remembers its jobs."""

    tier_type = "test"

    def __init__(self) -> None:
        self.jobs: list[JobMetadata] = []
        self.results: list[Any] = []
        self.finished: list[str] = []

    def on_new_request(self, context: ReqContext) -> Any:
        return SimpleNamespace(policy=OffloadPolicy.BLOCK_LEVEL)

    def on_request_finished(self, context: ReqContext) -> None:
        self.finished.append(context.req_id)

    def lookup(self, key: Any, context: ReqContext) -> LookupResult:
        return LookupResult.HIT

    def submit_load(self, job: JobMetadata) -> None:
        self.jobs.append(job)

    submit_store = submit_load

    def get_finished_jobs(self) -> list[Any]:
        results, self.results = self.results, []
        return results

    def serve_external_requests(self, parent: object) -> None:
        pass

    def on_schedule_end(self, context: object) -> None:
        pass


STEP = SimpleNamespace(new_req_ids=[], preempted_req_ids=[])


def finish_then_store(manager: TieringOffloadingManager) -> None:
    """What the engine does with a request's last chunk: the request finishes first, its store is built after."""
    context = ReqContext("r")
    manager.on_new_request(context)
    manager.on_request_finished(context)
    output = manager.prepare_store([offload_key(1)], context)
    assert output is not None
    manager.complete_store(output.keys_to_store, context)


def test_stock_forgets_a_request_before_its_last_store() -> None:
    with pytest.raises(KeyError):
        finish_then_store(TieringOffloadingManager(Primary(), [Tier()]))


def test_the_guarded_manager_remembers_it_until_released() -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    finish_then_store(manager)
    assert [list(job.keys) for job in tier.jobs] == [[offload_key(1)]]
    assert tier.finished == []
    manager.release(["r", "unknown"])
    assert tier.finished == ["r"]
    assert not manager._req_state
    assert not manager._held


def test_a_release_before_the_last_store_is_done_waits_for_it() -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    context = ReqContext("r")
    manager.on_new_request(context)
    manager.on_request_finished(context)
    output = manager.prepare_store([offload_key(1)], context)
    manager.release(["r"])
    assert tier.finished == []
    manager.complete_store(output.keys_to_store, context)
    assert tier.finished == ["r"]


def test_chunks_that_arrived_are_kept_when_others_did_not() -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    context = ReqContext("r")
    manager.on_new_request(context)
    keys = [offload_key(number) for number in range(4)]
    assert {manager.lookup(key, context) for key in keys} == {LookupResult.RETRY}
    manager.on_schedule_end(STEP)
    (job,) = tier.jobs
    tier.results.append(PartialResult(job.job_id, True, frozenset([keys[2]])))
    manager.on_schedule_end(STEP)
    found = [manager.primary_tier.lookup(key, context) for key in keys]
    assert found == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS, LookupResult.HIT]
    assert manager.primary_tier._get_num_free_blocks() == 13


def test_what_a_tier_had_no_room_for_is_pinned_again_if_it_is_there() -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    context = ReqContext("r")
    manager.on_new_request(context)
    output = manager.prepare_store([offload_key(1), offload_key(2)], context)
    manager.complete_store(output.keys_to_store, context)
    manager.on_schedule_end(STEP)
    taken: list[Any] = []
    tier.store_leftovers = lambda pin: taken.append(pin([offload_key(1), offload_key(9)], context))  # type: ignore[attr-defined]
    manager.on_schedule_end(STEP)
    assert list(taken[0].keys) == [offload_key(1)]
    assert taken[0].job_id in manager._transfer_jobs
    tier.store_leftovers = lambda pin: taken.append(pin([offload_key(9)], context))  # type: ignore[attr-defined]
    manager.on_schedule_end(STEP)
    assert taken[1] is None


# ---- rows that were fetched ahead


def promoted(manager: GuardedTieringManager, tier: Tier, name: str, keys: list[Any]) -> ReqContext:
    """A request that queues, with its chunks fetched into rows."""
    context = ReqContext(name)
    manager.on_new_request(context)
    manager.expect(name)
    for key in keys:
        manager.lookup(key, context)
    manager.on_schedule_end(STEP)
    tier.results += [PartialResult(job.job_id, True) for job in tier.jobs if job.is_promotion]
    tier.jobs.clear()
    manager.on_schedule_end(STEP)
    return context


def pushed_out(manager: GuardedTieringManager, keys: list[Any]) -> list[Any]:
    """Which of the chunks are gone after the engine stored as much as it could."""
    other = ReqContext("other")
    manager.on_new_request(other)
    for number in range(1000, 1016):
        output = manager.prepare_store([offload_key(number)], other)
        if output is not None:
            manager.primary_tier.complete_store(output.keys_to_store, other)
    return [key for key in keys if manager.primary_tier.lookup(key, other) is LookupResult.MISS]


def test_stock_evicts_what_was_fetched_before_it_is_used() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    manager._held_rows_max = 0  # as stock
    promoted(manager, tier, "r", keys)
    assert pushed_out(manager, keys) == keys


def test_fetched_rows_are_held_until_the_request_is_scheduled_or_gone() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    promoted(manager, tier, "r", keys)
    assert pushed_out(manager, keys) == []
    manager.let_go("r")
    assert manager._held_rows == 0
    assert pushed_out(manager, keys) == keys


def test_a_finished_request_holds_nothing() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    context = promoted(manager, tier, "r", keys)
    manager.on_request_finished(context)
    assert (manager._held_rows, manager._holdings, manager._waiting) == (0, {}, set())
    assert manager.primary_tier._num_evictable_cache_blocks == 4


def test_rows_are_not_held_for_ever_nor_beyond_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    for name in range(3):
        promoted(manager, tier, str(name), [offload_key(10 * name + number) for number in range(5)])
    assert manager._held_rows == 6  # of 16
    assert manager.primary_tier._num_evictable_cache_blocks == 9
    later = time.monotonic() + HOLD_SECONDS + 1
    monkeypatch.setattr("components.worker.manager.time", SimpleNamespace(monotonic=lambda: later))
    manager.on_schedule_end(STEP)
    assert manager._held_rows == 0
    assert manager.primary_tier._num_evictable_cache_blocks == 15


def test_a_reset_holds_nothing_and_goes_on() -> None:
    keys = [offload_key(number) for number in range(4)]
    tier = Tier()
    tier.drain_jobs = lambda: None  # type: ignore[attr-defined]
    manager = GuardedTieringManager(Primary(), [tier])
    promoted(manager, tier, "r", keys)
    manager.reset_cache()
    assert (manager._held_rows, manager._holdings) == (0, {})
    promoted(manager, tier, "r", keys)
    manager.let_go("r")
    assert manager._held_rows == 0


def test_a_long_promotion_is_several_jobs_in_order() -> None:
    tier = Tier()
    tier.job_chunks = 3  # type: ignore[attr-defined]
    manager = GuardedTieringManager(Primary(), [tier])
    context = ReqContext("r")
    manager.on_new_request(context)
    keys = [offload_key(number) for number in range(8)]
    for key in keys:
        manager.lookup(key, context)
    manager.on_schedule_end(STEP)
    assert [list(job.keys) for job in tier.jobs] == [keys[:3], keys[3:6], keys[6:]]
    assert len({row for job in tier.jobs for row in job.block_ids}) == 8
    assert all(job.req_context is context for job in tier.jobs)


def test_a_request_passes_over_what_it_gave_up_and_the_row_stays_taken() -> None:
    tier = Tier()
    manager = GuardedTieringManager(Primary(), [tier])
    context = ReqContext("r")
    manager.on_new_request(context)
    manager.lookup(KEY, context)
    manager.on_schedule_end(STEP)
    assert manager.lookup(KEY, context) is LookupResult.HIT_PENDING
    tier.gave_up = lambda req_id: True  # type: ignore[attr-defined]
    assert manager.lookup(KEY, context) is LookupResult.MISS
    assert manager.primary_tier._get_num_free_blocks() == 15
    manager.on_schedule_end(STEP)
    tier.results.append(PartialResult(tier.jobs[0].job_id, True, frozenset([KEY])))
    manager.on_schedule_end(STEP)
    assert manager.primary_tier._get_num_free_blocks() == 16


KEY = offload_key(77)


# ---- what a finished request may store


def group(tokens: int = 4) -> GroupOffloadConfig:
    return GroupOffloadConfig(0, tokens, tokens, 1, None, None)


def request_state(*, tokens: int, computed: int, blocks: int, in_flight: int = 0) -> tuple[Any, RequestOffloadState]:
    request = SimpleNamespace(
        request_id="r",
        num_tokens=tokens,
        num_prompt_tokens=4,
        num_computed_tokens=computed,
        num_in_flight_tokens=in_flight,
        kv_transfer_params=None,
        is_finished=lambda: True,
        block_hashes=[bytes([number]) * 32 for number in range(tokens // 4)],
    )
    config = SchedulerOffloadConfig((group(),), 1, 1, False)
    status = RequestOffloadState(config, request, ReqContext("r"), SimpleNamespace(policy=OffloadPolicy.BLOCK_LEVEL))
    status.update_offload_keys()
    status.group_states[0].block_ids.extend(range(1, blocks + 1))
    return request, status


def stored_chunks(status: RequestOffloadState) -> int:
    """How many chunks stock vLLM asks to store for the finished request."""
    asked: list[Any] = []
    scheduler = object.__new__(OffloadingConnectorScheduler)
    scheduler.config = status.config
    scheduler._req_status = {"r": status}
    scheduler.manager = SimpleNamespace(prepare_store=lambda keys, context: asked.extend(keys))
    scheduler._connector_stats = SimpleNamespace(increase_counter=lambda name: None)
    scheduler._build_store_jobs(SimpleNamespace(num_scheduled_tokens={}, finished_req_ids=["r"]))
    return len(asked)


def test_stock_stores_a_chunk_whose_last_token_was_never_computed() -> None:
    """Eight tokens, of which the last was sampled and not run through the model: the second chunk is not whole."""
    request, status = request_state(tokens=8, computed=7, blocks=2)
    assert stored_chunks(status) == 2
    request, status = request_state(tokens=8, computed=7, blocks=2)
    _cap_stores(request, status, (group(),))
    assert stored_chunks(status) == 1


def test_what_is_still_in_flight_does_not_count_as_computed() -> None:
    request, status = request_state(tokens=8, computed=8, blocks=2, in_flight=1)
    _cap_stores(request, status, (group(),))
    assert stored_chunks(status) == 1
    request, status = request_state(tokens=8, computed=8, blocks=2)
    _cap_stores(request, status, (group(),))
    assert stored_chunks(status) == 2


def test_stock_dies_of_a_request_that_left_before_it_was_scheduled() -> None:
    _, status = request_state(tokens=8, computed=0, blocks=0)
    with pytest.raises(AssertionError):
        stored_chunks(status)
    request, status = request_state(tokens=8, computed=0, blocks=0)
    _cap_stores(request, status, (group(),))
    assert stored_chunks(status) == 0


def test_a_cap_that_the_client_asked_for_stays() -> None:
    request, status = request_state(tokens=12, computed=12, blocks=3)
    status.max_offload_tokens = 4
    _cap_stores(request, status, (group(),))
    assert stored_chunks(status) == 1


# ---- events, layout, leftovers


def engine_request(tokens: int = 64, **changes: Any) -> Any:
    return SimpleNamespace(
        request_id="r",
        all_token_ids=list(range(tokens)),
        mm_features=[],
        prompt_embeds=None,
        cache_salt=None,
        lora_request=None,
        **changes,
    )


def event_request() -> Any:
    return SimpleNamespace(
        **{**vars(engine_request(16)), "block_hashes": [bytes([number]) * 32 for number in range(4)]}
    )


KIND: Any = SimpleNamespace(kv_cache_spec_kind="full", kv_cache_spec_sliding_window=None)
ONE_BLOCK = GroupOffloadConfig(0, 4, 4, 1, KIND, None)  # a chunk
ARRIVING: set[OffloadKey] = set()


def chunk_events(chunks_max: int = 100, **changes: Any) -> ChunkEvents:
    ARRIVING.clear()
    ways: dict[str, Any] = {"describe": lambda *_: None, "is_arriving": ARRIVING.__contains__}
    return ChunkEvents(enabled=True, chunks_max=chunks_max, **(ways | changes))


def told(events: ChunkEvents, keys: list[OffloadKey], *, removed: bool = False) -> list[Any]:
    return list(events.take_events([OffloadingEvent(keys, "CPU", removed)]))


def prompt_of(prompt: int) -> tuple[Any, list[OffloadKey]]:
    """A request of four chunks, and their keys."""
    request = event_request()
    request.block_hashes = [bytes([prompt, number]) * 16 for number in range(4)]
    return request, [make_offload_key(one, 0) for one in request.block_hashes]


def test_events_say_what_a_router_needs() -> None:
    described: list[int] = []
    events = chunk_events(describe=lambda request, group, chunk, key: described.append(chunk))
    config = GroupOffloadConfig(0, 4, 8, 2, KIND, None)
    key = make_offload_key(bytes([3]) * 32, 0)
    events.record_store(event_request(), config, 1, key)
    assert described == [1]
    (stored_event,) = told(events, [key])
    assert stored_event.token_ids == list(range(8, 16))
    assert stored_event.block_size == 4
    assert len(stored_event.block_hashes) == 2
    assert stored_event.parent_block_hash is not None
    assert stored_event.extra_keys == [None, None]
    assert not told(events, [make_offload_key(bytes([9]) * 32, 0)])
    (removed,) = told(events, [key], removed=True)
    assert removed.block_hashes == stored_event.block_hashes


def test_chunks_of_a_prompt_are_announced_together_and_parents_first() -> None:
    events = chunk_events()
    keys = []
    for prompt in range(2):
        request, of_prompt = prompt_of(prompt)
        for chunk, key in enumerate(of_prompt):
            events.record_store(request, ONE_BLOCK, chunk, key)
        keys += of_prompt
    shuffled = [keys[place] for place in (5, 2, 7, 0, 1, 4, 3)]  # all but the second prompt's third chunk
    found = told(events, shuffled)
    assert sorted(len(one.block_hashes) for one in found) == [2, 4]
    assert all(len(one.token_ids) == 4 * len(one.block_hashes) for one in found)
    whole = next(one for one in found if len(one.block_hashes) == 4)
    assert whole.parent_block_hash is None
    assert whole.token_ids == list(range(16))
    (rest,) = told(events, [keys[6]])
    assert len(rest.block_hashes) == 2


def test_pieces_that_come_in_any_order_are_announced_from_the_first_on() -> None:
    events, (request, keys) = chunk_events(), prompt_of(0)
    ARRIVING.update(keys)
    for chunk in (3, 1, 2, 0):
        ARRIVING.remove(keys[chunk])
        events.record(request, ONE_BLOCK, chunk, keys[chunk])
        found = told(events, [keys[chunk]])
        assert [len(one.block_hashes) for one in found] == ([4] if chunk == 0 else [])


def test_pieces_that_came_in_one_step_are_announced_from_the_first_on() -> None:
    events, (request, keys) = chunk_events(), prompt_of(0)
    for chunk in (3, 2, 1, 0):
        events.record(request, ONE_BLOCK, chunk, keys[chunk])
    pieces = [OffloadingEvent(keys[2:], "CPU", False), OffloadingEvent(keys[:2], "CPU", False)]
    assert [len(one.block_hashes) for one in events.take_events(pieces)] == [4]


@pytest.mark.parametrize("first", [0, 1])
def test_a_parent_that_another_request_brought_is_announced_first(first: int) -> None:
    events, requests = chunk_events(), [prompt_of(0), prompt_of(0)]
    (one, keys), (other, _) = requests[first], requests[1 - first]
    other.request_id = "other"  # or they would be equal, which requests are not
    events.record(one, ONE_BLOCK, 0, keys[0])
    for chunk in (1, 2):
        events.record(other, ONE_BLOCK, chunk, keys[chunk])
    assert [len(run.block_hashes) for run in told(events, keys)] == [1, 2]


def test_a_chunk_does_not_wait_for_a_parent_that_never_comes() -> None:
    events, (request, keys) = chunk_events(), prompt_of(0)
    events.record(request, ONE_BLOCK, 3, keys[3])
    assert len(told(events, [keys[3]])) == 1  # whoever takes events may know the parent from elsewhere
    ARRIVING.add(keys[0])
    events.record(request, ONE_BLOCK, 1, keys[1])
    assert told(events, [keys[1]]) == []
    ARRIVING.clear()  # its fetch has failed
    other, other_keys = prompt_of(1)
    events.record(other, ONE_BLOCK, 0, other_keys[0])
    assert len(told(events, [other_keys[0]])) == 2


def test_a_chunk_that_goes_before_it_was_announced_leaves_no_trace() -> None:
    events, (request, keys) = chunk_events(), prompt_of(0)
    ARRIVING.add(keys[0])
    events.record(request, ONE_BLOCK, 1, keys[1])
    assert told(events, [keys[1]]) == told(events, [keys[1]], removed=True) == []
    ARRIVING.clear()
    events.record(request, ONE_BLOCK, 0, keys[0])
    assert [len(one.block_hashes) for one in told(events, [keys[0]])] == [1]


def test_what_is_noted_for_events_is_bounded() -> None:
    events = chunk_events(chunks_max=3)
    for number in range(50):
        events.record_store(event_request(), ONE_BLOCK, 0, offload_key(number))
        assert len(events._places) <= 3
        assert len(told(events, [offload_key(number)])) == 1
        assert len(events._pending_event_metadata) <= 3


def vllm_config(folder: Path, **changes: Any) -> Any:
    model = SimpleNamespace(
        model=str(folder),
        revision=None,
        quantization=None,
        seed=0,
        dtype="float32",
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 2}),
    )
    cache = SimpleNamespace(prefix_caching_hash_algo="sha256_cbor", cache_dtype="auto", **changes)
    parallel = SimpleNamespace(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
    )
    load = SimpleNamespace(load_format="auto")
    return SimpleNamespace(
        model_config=model, cache_config=cache, parallel_config=parallel, load_config=load, attention_config=None
    )


def test_a_layout_follows_the_weights_and_not_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    kv_cache = SimpleNamespace(kv_cache_groups=[])
    digests = []
    for name, byte in (("one", 1), ("other place", 1), ("fine-tuned", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([byte]) * 5_000_000)
        digests.append(layout.engine_layout(vllm_config(folder), kv_cache, {})["model"])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.model_config, "dtype", "bfloat16"),
        lambda config: setattr(config.cache_config, "cache_dtype", "fp8"),
        lambda config: setattr(config.parallel_config, "tensor_parallel_size", 2),
        lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2),
        lambda config: setattr(config.model_config, "quantization", "fp8"),
        lambda config: setattr(config.model_config, "hf_config", SimpleNamespace(to_dict=lambda: {"layers": 3})),
        lambda config: setattr(config.cache_config, "prefix_caching_hash_algo", "sha256"),
        lambda config: setattr(config, "attention_config", SimpleNamespace(backend="FLASHINFER")),
        lambda config: None,
    ],
    ids=["dtype", "KV dtype", "TP", "PP", "quantization", "model", "hash", "attention backend", "nothing"],
)
def test_whatever_changes_the_bytes_changes_the_layout(
    change: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    kv_cache = SimpleNamespace(kv_cache_groups=[])
    one, other = vllm_config(tmp_path), vllm_config(tmp_path)
    change(other)
    same = layout.engine_layout(one, kv_cache, {}) == layout.engine_layout(other, kv_cache, {})
    assert same == (request.node.callspec.id == "nothing")


@pytest.mark.parametrize(("runner_v2", "indexed", "together"), [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_the_layout_says_whether_a_blocks_layers_lie_together_and_the_engine_is_checked(
    runner_v2: bool, indexed: bool, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    config = vllm_config(tmp_path)
    config.use_v2_model_runner = runner_v2
    spec = SimpleNamespace(block_size=16, page_size_bytes=1, indexes_kv_by_block_stride=indexed)
    kv_cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=["0"])])
    assert layout.engine_layout(config, kv_cache, {})["layers"] == ("apart", "together")[together]
    layout.check_layers(bool(together), bool(together))
    with pytest.raises(ValueError, match=f"VLLM_USE_V2_MODEL_RUNNER={together}"):
        layout.check_layers(bool(together), not together)


@pytest.mark.parametrize("field", ["blocks_per_chunk", "page_size_bytes", "block_size", "layer_names", None])
def test_whatever_changes_the_rows_changes_the_layout(
    field: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")

    def described(changed: str | None) -> dict[str, object]:
        spec = SimpleNamespace(block_size=16, page_size_bytes=4096)
        if changed in ("block_size", "page_size_bytes"):
            setattr(spec, changed, 8192)
        layers = ["0", "1", "2"] if changed == "layer_names" else ["0", "1"]
        groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=layers)])
        return layout.engine_layout(
            vllm_config(tmp_path), groups, {"blocks_per_chunk": 2 if changed == "blocks_per_chunk" else 1}
        )

    assert (described(field) == described(None)) == (field is None)


def test_a_revision_of_a_model_on_the_hub_is_in_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(layout, "_local_folder", lambda model, revision: None)
    configs = [vllm_config(tmp_path) for _ in range(3)]
    configs[2].model_config.revision = "other"
    first, again, other = (layout.model_digest(config) for config in configs)
    assert first == again != other


@pytest.mark.parametrize(
    "changes",
    [{"cache_salt": "red"}, {"cache_salt": "blue"}, {"lora_request": "adapter"}, {}],
    ids=["salt", "other salt", "LoRA", "nothing"],
)
def test_salt_and_lora_are_in_the_engines_own_block_hashes(changes: dict[str, Any]) -> None:
    """The key is made of the block hash, so nothing crosses that the engine itself would not share."""

    def hashed(**differences: Any) -> Any:
        lora = SimpleNamespace(lora_name=differences.pop("lora_request")) if "lora_request" in differences else None
        request = SimpleNamespace(
            all_token_ids=list(range(16)),
            num_tokens=16,
            block_hashes=[],
            mm_features=[],
            prompt_embeds=None,
            cache_salt=None,
            lora_request=lora,
            skip_reading_prefix_cache=False,
        )
        vars(request).update(differences)
        return get_request_block_hasher(4, sha256_cbor)(request)

    init_none_hash(sha256_cbor)
    plain, changed = hashed(), hashed(**changes)
    assert len(plain) == len(changed) == 4
    assert (plain == changed) == (not changes)
    if changes:  # not one block, the later ones by their chain of parents
        assert not set(plain) & set(changed)


def test_an_engine_that_cannot_share_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache = SimpleNamespace(kv_cache_groups=[])
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="PYTHONHASHSEED is not set: set it to 0"):
        layout.engine_layout(vllm_config(tmp_path), kv_cache, {})
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    config = vllm_config(tmp_path)
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    with pytest.raises(ValueError, match="expected sha256_cbor"):
        layout.engine_layout(config, kv_cache, {})
    with pytest.raises(ValueError, match="calculate-kv-scales"):
        layout.engine_layout(vllm_config(tmp_path, calculate_kv_scales=True), kv_cache, {})


def test_a_tier_that_does_not_fit_into_shared_memory_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "SHM", tmp_path)
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    shm.check_room("kvtier-x", 4096)
    with pytest.raises(ValueError, match="lower --dram"):
        shm.check_room("kvtier-x", 2 * free)
    (tmp_path / "vllm_offload_kvtier-x.mmap").write_bytes(b"made by another process of this engine")
    shm.check_room("kvtier-x", 2 * free)


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
