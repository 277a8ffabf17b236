"""The connector's own steps, with a scheduler and a tier that only write down what they are asked."""

import contextlib
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import to_builtins
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import TransferJobStatus
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    ReqContext,
    RequestOffloadingContext,
    make_offload_key,
)
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from components.worker import connector as connector_module
from components.worker.connector import ANSWER_PIECE_TOKENS, KvtierConnector
from components.worker.events import ChunkEvents
from components.worker.loads import IN_STEP_SECONDS, InStepMetadata, Loads
from components.worker.manager import HoldingTieringManager
from components.worker.step_clock import StepClock
from kvstore.bus.plan import FIELD, HINT_TYPE, make_plan, read_plan
from tests.worker.stock import SPEC, engine_request, group_config, offload_key, offloading, primary
from tests.worker.stock import Tier as StockTier
from tests.worker.stock import step_output as output

KEYS = [offload_key(number) for number in range(8)]
IDENTITY = b"\x07" * 32


class Tier:
    """A tier with room for so many rows."""

    def __init__(self, rows: int):
        self.rows = rows
        self.unknown: set[str] = set()
        self.waits = 0
        self.hurried: list[str] = []
        self.asked: list[tuple[str, list[Any]]] = []
        self.identities: dict[str, bytes] = {}
        self.forgotten: list[set[str]] = []
        self.outcomes: list[str] = []
        self.announced: list[tuple[bytes | None, dict[str, bytes]]] = []
        self.paces: list[tuple[float, int]] = []
        self.busy = False
        self.fetched = 0

    def drained(self) -> bool:
        return not self.busy

    @property
    def has_room(self) -> bool:
        return self.rows > 0

    def arrived(self, request: Any) -> None:
        pass

    def identify(self, req_id: str, identity: bytes) -> bool:
        before = self.identities.get(req_id)
        self.identities[req_id] = identity
        return before != identity

    def forget(self, req_ids: Collection[str]) -> None:
        self.forgotten.append(set(req_ids))

    def note_identity(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def announce(self, base: bytes | None, adapters: dict[str, bytes]) -> None:
        self.announced.append((base, adapters))

    def fetched_tokens(self, req_id: str, first: int, end: int) -> int:
        return min(self.fetched, end - first)

    def cancel(self, req_id: str) -> None:
        pass

    def ask(self, req_id: str, keys: list[Any]) -> None:
        self.asked.append((req_id, keys))

    def undecided(self, req_id: str) -> bool:
        return req_id in self.unknown

    def hurry(self, req_id: str) -> None:
        self.hurried.append(req_id)

    def await_answer(self, req_id: str, spare_seconds: float) -> None:
        self.hurried.append(f"{req_id} answered")

    def await_chunks(self, req_id: str, spare_seconds: float) -> bool:
        return False

    def wait(self) -> None:
        self.waits += 1

    def tell_pace(self, dram_bytes_per_second: float, queue: int, resident: tuple[int, ...]) -> None:
        self.paces.append((dram_bytes_per_second, queue, resident))


class Known:
    """What requests are computed with: one and the same, but for those of which nothing is known."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self.may_not_store: set[str] = set()
        self.admitted: list[str] = []
        self.running: list[str] = []
        self.gone: list[str] = []
        self.steps = self.resets = 0

    def arrived(self, request: Any, cache: object) -> None:
        pass

    look = arrived

    def admit(self, request: Any, *, handed_over: str | None = None) -> bool:
        self.admitted.append(request.request_id)
        self.handed_over = handed_over
        return True

    def computed_with(self, request: Any) -> bytes | None:
        return self.identity(request.request_id)

    def identity(self, req_id: str) -> bytes | None:
        return None if req_id in self.unknown else IDENTITY

    def may_store(self, req_id: str) -> bool:
        return req_id not in self.unknown | self.may_not_store

    def runs(self, request: Any) -> None:
        self.running.append(request.request_id)

    def left(self, req_id: str) -> None:
        self.gone.append(req_id)

    def step_ends(self, scheduled: Any) -> None:
        self.steps += 1

    def reset(self) -> None:
        self.resets += 1

    def adapters(self) -> dict[str, bytes]:
        return {"adapter": IDENTITY}


class Manager:
    def __init__(self, tier: Tier):
        self.tier = tier
        self.promoted: list[tuple[str, int]] = []
        self.expected: list[str] = []
        self.let_go_of: list[str] = []

    def expect(self, req_id: str) -> None:
        self.expected.append(req_id)

    def lookup(self, key: bytes, context: ReqContext) -> LookupResult:
        wanted = (context.req_id, int.from_bytes(key[:32], "big"))
        if wanted not in self.promoted:
            self.promoted.append(wanted)
            self.tier.rows -= 1
        return LookupResult.HIT_PENDING

    def let_go(self, req_id: str) -> None:
        self.let_go_of.append(req_id)

    def dram_chunks(self) -> tuple[int, int]:
        return 3, 4


def connector(rows: int, requests: dict[str, int]) -> tuple[Any, Tier, Manager]:
    """A connector at which requests of so many chunks have arrived. What they are computed with is known."""
    tier = Tier(rows)
    tier.identities = dict.fromkeys(requests, IDENTITY)
    manager = Manager(tier)
    one: Any = object.__new__(KvtierConnector)
    one._tier, one._manager, one._block_pool = tier, manager, None
    one._groups, one._kv_cache_config = (group_config(),), KVCacheConfig(1, [], [KVCacheGroupSpec(["layer"], SPEC)])
    one._clock = StepClock()
    one.connector_scheduler = SimpleNamespace(
        build_connector_meta=lambda output: OffloadingConnectorMetadata({}, {}),
        get_num_new_matched_tokens=lambda request, computed, max_num_new_tokens: (0, False),
        update_state_after_alloc=lambda request, blocks, tokens: None,
        update_connector_output=lambda output: None,
        get_stats=lambda: None,
        config=offloading(None).config,
        _jobs={},
        _req_status={},
        _chunks_being_loaded=set(),
    )
    one._loads = Loads(one.connector_scheduler, 1)
    one._known, one._identity, one._drop = Known(), SimpleNamespace(base=IDENTITY, stale=False), False
    one._loading, one._drop, one._sources, one._handed_over = {}, False, {}, set()
    one._arriving = {
        name: SimpleNamespace(
            req=SimpleNamespace(request_id=name, block_hashes=[]),
            req_context=ReqContext(name),
            group_states=[SimpleNamespace(offload_keys=[offload_key(number) for number in range(chunks)])],
        )
        for name, chunks in requests.items()
    }
    one.connector_scheduler._req_status.update(one._arriving)
    return one, tier, manager


def test_fetches_begin_in_order_of_arrival_as_far_as_there_is_room() -> None:
    one, tier, manager = connector(3, {"first": 2, "second": 3, "third": 1})
    one.build_connector_meta(output())
    assert manager.promoted == [("first", 0), ("first", 1), ("second", 0)]
    assert list(one._arriving) == ["second", "third"]
    tier.rows = 10
    one.build_connector_meta(output())
    assert manager.promoted[3:] == [("second", 1), ("second", 2), ("third", 0)]
    assert not one._arriving


def test_a_request_of_which_nothing_is_known_yet_does_not_hold_up_others() -> None:
    one, tier, manager = connector(10, {"first": 1, "second": 1})
    tier.unknown.add("first")
    one.build_connector_meta(output())
    assert manager.promoted == [("second", 0)]
    tier.unknown.clear()
    one.build_connector_meta(output())
    assert manager.promoted == [("second", 0), ("first", 0)]


def test_a_step_that_runs_nothing_waits_for_the_mover_and_others_do_not() -> None:
    one, tier, _ = connector(1, {})
    one.build_connector_meta(output(r=5))
    assert tier.waits == 0
    one.build_connector_meta(output())
    assert tier.waits == 1


def test_what_the_scheduler_looks_at_is_hurried_and_what_it_runs_is_let_go() -> None:
    one, tier, manager = connector(1, {"r": 1})
    request = SimpleNamespace(
        request_id="r", num_tokens=7, skip_reading_prefix_cache=False, prefill_stats=None, num_preemptions=0
    )
    one.get_num_new_matched_tokens(request, 4)
    assert tier.hurried == ["r"]  # what is left is less than a chunk
    one.get_num_new_matched_tokens(request, 0)
    assert tier.hurried == ["r", "r", "r answered"]
    assert not one._arriving
    one.update_state_after_alloc(request, None, 0)
    assert manager.let_go_of == ["r"]


def loads(groups: int = 1, **group: Any) -> Loads:
    """Of chunks of 4 tokens and 1,000 bytes, on two ranks."""
    scheduler = offloading(None, groups=groups)
    configs = tuple(one._replace(**group) for one in scheduler.config.kv_group_configs)
    scheduler.config = scheduler.config._replace(kv_group_configs=configs, num_workers=2)
    return Loads(scheduler, 1000)


def test_as_much_is_loaded_in_a_step_as_its_time_allows() -> None:
    """Each of two ranks copies its half of a chunk."""
    one, speed = loads(), 50_000 / IN_STEP_SECONDS  # 100 chunks a step
    requests = [SimpleNamespace(request_id=name, num_tokens=1000) for name in "abc"]
    assert one.admit(requests[0], 60 * 4, speed)
    assert not one.admit(requests[1], 41 * 4, speed)
    assert one.admit(requests[1], 40 * 4, speed)
    assert not one.admit(requests[2], 4, speed)
    assert one.admit(requests[0], 60 * 4, speed)  # asked again: it counts once
    one.scheduled(output(), lambda output: OffloadingConnectorMetadata({}, {}))
    assert one.admit(requests[2], 100 * 4, speed)


def test_nothing_is_loaded_in_a_step_behind_a_load_that_no_step_waits_for() -> None:
    one, request = loads(), SimpleNamespace(request_id="r", num_tokens=12)
    one.scheduler._jobs[1] = TransferJobStatus("s", 2, set(), is_store=True)
    assert one.admit(request, 4, 1e9)
    one.scheduler._jobs[2] = TransferJobStatus("l", 2, set(), is_store=False)
    assert not one.admit(request, 4, 1e9)
    del one.scheduler._jobs[2]
    assert one.admit(request, 4, 1e9)


def test_what_has_no_speed_or_other_groups_is_loaded_between_steps() -> None:
    request = SimpleNamespace(request_id="r", num_tokens=12)
    assert loads().admit(request, 4, 1e9)
    assert not loads().admit(request, 4, 0.0)
    assert not loads(groups=2).admit(request, 4, 1e9)
    assert not loads(sliding_window_size_in_chunks=2).admit(request, 4, 1e9)
    assert not loads(is_eagle_group=True).admit(request, 4, 1e9)


def test_of_a_prompt_that_is_there_to_its_end_the_last_chunk_is_computed() -> None:
    request = SimpleNamespace(request_id="r", num_tokens=12)
    assert loads().worth_loading(request, 4, 8) == 4
    assert loads().worth_loading(request, 8, 4) == 0
    assert loads().worth_loading(request, 4, 4) == 4
    assert loads(groups=2).worth_loading(request, 4, 8) == 8
    assert loads(is_eagle_group=True).worth_loading(request, 4, 8) == 8


@pytest.mark.parametrize("finished", [False, True])
def test_a_load_under_way_hinders_a_running_requests_stores_not_and_a_finished_ones_until_it_is_reported(
    finished: bool,
) -> None:
    """Stock offloading forgets a finished request that has no transfer left, and ends if it has a load and stores."""
    one = loads()
    request = SimpleNamespace(request_id="r", num_tokens=12, is_finished=lambda: finished)
    status: Any = SimpleNamespace(req=request, num_locally_computed_tokens=4, transfer_jobs=set())
    one.scheduler._req_status["r"] = status
    asked: list[Any] = []

    def allocated(request: Any, blocks: Any, tokens: int) -> None:
        """As stock does it."""
        asked.append([(block.block_id, block.block_hash) for block in blocks.blocks[0]])
        status.transfer_jobs.add(7)
        one.scheduler._jobs[7] = TransferJobStatus("r", 2, {KEYS[1]}, is_store=False)
        one.scheduler._chunks_being_loaded.add(KEYS[1])

    one.admit(request, 4, 1e9)
    blocks: Any = SimpleNamespace(
        blocks=([SimpleNamespace(block_id=n, is_null=False, block_hash="hash") for n in (5, 6, 9)],)
    )
    one.scheduler._chunks_being_loaded.add(KEYS[0])
    one.allocated(request, blocks, 4, 1e9, allocated)
    assert asked == [[(5, "hash"), (6, None), (9, None)]]
    assert one.scheduler._chunks_being_loaded == {KEYS[0]}  # its blocks are found in HBM: nobody waits for the rest

    def scheduled(output: Any) -> Any:
        asked.append((set(status.transfer_jobs), not one.in_step("r")))
        return OffloadingConnectorMetadata({}, {})

    assert one.scheduled(output(), scheduled).in_step == {7}
    assert one.scheduled(output(), scheduled).in_step == set()
    assert asked[1:] == [({7}, False) if finished else (set(), False)] * 2
    assert status.transfer_jobs == {7}
    one.scheduler._jobs.clear()
    one.scheduled(output(), scheduled)
    assert asked[-1] == ({7}, True)


def test_the_pace_is_told_about_once_a_second() -> None:
    one, tier, _ = connector(0, {"r": 1})
    one.bind_gpu_block_pool(SimpleNamespace(num_gpu_blocks=9, cached_block_hash_to_block={"hash": "block"}))
    for _ in range(5):
        one.build_connector_meta(output(r=5))
        one.get_kv_connector_stats()
    assert tier.paces == [(0.0, 1, (1, 9, 3, 4))]


def test_steps_are_timed_though_some_have_no_output_for_the_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs nothing and copies nothing, as while a fetch is waited for, says nothing to the connector: the steps
    that follow must not be taken for it."""
    one, _, _ = connector(0, {})
    now = 0.0
    monkeypatch.setattr("components.worker.connector.time", SimpleNamespace(monotonic=lambda: now))
    for tokens in (0, 100, 0, 0, 200, 1):
        step = output(r=tokens) if tokens else output()
        one.build_connector_meta(step)
        now += 0.1 + tokens / 1000
        if tokens:
            one.update_connector_output(KVConnectorOutput())
        one.get_kv_connector_stats()
    samples = [(tokens, round(seconds, 6)) for tokens, _, seconds in one._clock._fit._samples]
    assert samples == [(100, 0.2), (200, 0.3)]


ROUTERS, CLIENTS, OTHERS = {"decision_id": "router"}, {"decision_id": "client"}, {"decision_id": "another router"}


def hints(**payloads: Any) -> KvHintsEnvelope:
    """Of a router that is not this project's: actions by their type, underscores for dots."""
    actions = [KvHintAction(name, name.replace("_", "."), "1", payload) for name, payload in payloads.items()]
    return KvHintsEnvelope("1", "message", actions)


PLAN = hints(kvtier_plan=OTHERS)
assert PLAN.actions[0].action_type == HINT_TYPE


def handed_over(extra_args: Any, transfer: Any, hinted: Any) -> ReqContext:
    """What a tier sees of the request, as vLLM makes its context."""
    one, _, _ = connector(0, {})
    contexts: list[ReqContext] = []

    def new_request(context: ReqContext) -> Any:
        contexts.append(context)
        return RequestOffloadingContext()

    one.connector_scheduler = offloading(SimpleNamespace(on_new_request=new_request))
    request = Request("r", [1, 2, 3], SamplingParams(extra_args=extra_args), None, kv_hints=hinted)
    request.kv_transfer_params = transfer
    request.skip_reading_prefix_cache = True
    one.on_new_request(request)
    (context,) = contexts
    return context


@pytest.mark.parametrize(
    ("extra_args", "transfer", "hinted", "seen"),
    [
        ({FIELD: ROUTERS}, None, None, {FIELD: ROUTERS}),
        ({FIELD: ROUTERS}, {"do_remote_decode": True}, None, {"do_remote_decode": True, FIELD: ROUTERS}),
        ({FIELD: ROUTERS}, {FIELD: CLIENTS}, None, {FIELD: ROUTERS}),
        ({}, {FIELD: CLIENTS, "theirs": 1}, None, {"theirs": 1}),
        (None, None, None, None),
        (None, {FIELD: CLIENTS}, None, None),
        (None, None, PLAN, {FIELD: OTHERS}),
        ({"else": 1}, {"theirs": 1}, PLAN, {"theirs": 1, FIELD: OTHERS}),
        (None, {FIELD: CLIENTS}, PLAN, {FIELD: OTHERS}),
        ({FIELD: ROUTERS}, {FIELD: CLIENTS}, PLAN, {FIELD: ROUTERS}),
        (None, None, hints(kv_fetch=CLIENTS), None),
        (None, {FIELD: CLIENTS}, hints(kv_fetch=CLIENTS, kvtier=CLIENTS), None),
        (None, None, hints(kv_fetch=CLIENTS, kvtier_plan=OTHERS, kv_evict=CLIENTS), {FIELD: OTHERS}),
        (None, None, hints(), None),
    ],
)
def test_the_tier_sees_the_routers_plan_beside_what_others_write(
    extra_args: Any, transfer: Any, hinted: Any, seen: Any
) -> None:
    """What a stock prefill worker writes is NIXL's, and stays."""
    assert handed_over(extra_args, transfer, hinted).kv_transfer_params == seen


def test_a_plan_is_understood_however_it_comes() -> None:
    plan = make_plan(["a", None], fetch=1, deadline_ms=100, chunk_ms=5, decision_id="d")
    for extra_args, hinted in (({FIELD: to_builtins(plan)}, None), (None, hints(kvtier_plan=to_builtins(plan)))):
        assert read_plan(handed_over(extra_args, None, hinted).kv_transfer_params) == plan


def test_the_store_is_asked_for_a_requests_chunks_in_the_order_of_its_prompt() -> None:
    """Of all groups together, as far as they are whole."""
    one, tier, _ = connector(0, {})
    manager = HoldingTieringManager(primary(), [StockTier()])
    one.connector_scheduler, one._manager = offloading(manager, groups=2), manager
    request = engine_request(prompt_tokens=11)
    one.on_new_request(request)
    keys = [make_offload_key(block_hash, group) for block_hash in request.block_hashes for group in range(2)]
    assert tier.asked == [("r", keys)]
    assert len(keys) == 4
    assert manager.dram_chunks() == (0, manager.primary_tier._num_chunks)


def test_who_may_not_read_the_cache_is_not_asked_for() -> None:
    one, tier, _ = connector(0, {})
    one.connector_scheduler = offloading(HoldingTieringManager(primary(), [StockTier()]))
    request = engine_request()
    request.skip_reading_prefix_cache = True
    one.on_new_request(request)
    assert not tier.asked
    assert not one._arriving


def test_an_answer_says_where_its_prompts_tokens_were_found() -> None:
    """As they were when it ran first: a load between steps makes vLLM allocate twice, a preempted prompt is in HBM."""
    one, tier, _ = connector(1, {"r": 1})
    one._loads.allocated = lambda *_: None
    one.connector_scheduler.request_finished = lambda request: (False, None)
    request = engine_request()
    tier.fetched = 4
    request.prefill_stats.set(16, num_local_cached_tokens=4, num_external_cached_tokens=8)
    one.update_state_after_alloc(request, None, 8)
    one.update_state_after_alloc(request, None, 0)
    request.take_prefill_stats()
    one.update_state_after_alloc(request, None, 0)
    assert one.request_finished(request, []) == (False, {FIELD: {"hbm": 4, "dram": 4, "store": 4}})
    assert not one._sources
    aborted = engine_request("queued")
    assert one.request_finished(aborted, []) == (False, None)


def test_a_prefill_worker_says_what_it_computes_with() -> None:
    one, _, _ = connector(1, {})
    one.connector_scheduler.request_finished = lambda request: (False, None)
    request = engine_request()
    request.kv_transfer_params = {"do_remote_decode": True}
    prefilled_with = {f"{FIELD}.prefilled_with": IDENTITY.hex()}
    assert one.request_finished(request, []) == (False, prefilled_with)
    one._known.unknown.add("r")
    assert one.request_finished(request, []) == (False, None)


def test_of_a_prompt_that_is_handed_over_nothing_is_loaded_and_the_answer_is_stored() -> None:
    one, tier, _ = connector(1, {})
    one.connector_scheduler = offloading(HoldingTieringManager(primary(), [StockTier()]))
    one._loads.allocated = lambda *_: None
    request = engine_request(prompt_tokens=15)
    request.kv_transfer_params = {"do_remote_prefill": True, f"{FIELD}.prefilled_with": IDENTITY.hex()}
    one.on_new_request(request)
    assert tier.identities == {"r": IDENTITY}  # of what it will store
    assert not tier.asked
    assert not one._arriving
    assert one.get_num_new_matched_tokens(request, 0) == (0, False)
    assert one._known.handed_over == IDENTITY.hex()
    request.kv_transfer_params["do_remote_prefill"] = False  # by NIXL, whose turn comes first
    one.update_state_after_alloc(request, None, 0)
    (state,) = one.connector_scheduler._req_status["r"].group_states
    assert state.next_stored_chunk_idx == 15 // one._groups[0].tokens_per_chunk > 0
    one.connector_scheduler.request_finished = lambda request: (False, None)
    one.request_finished(request, [])
    assert not one._handed_over


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
def test_what_was_fetched_is_announced_though_nobody_has_looked_it_up(group: int, gone: bool) -> None:
    """Also if its request has left meanwhile: what a load brings by then is in DRAM all the same."""
    one, _, _ = connector(0, {})
    manager = HoldingTieringManager(primary(), [StockTier()])
    one.connector_scheduler = scheduler = offloading(manager, groups=2, blocks_per_chunk=2)
    one._groups, one._events = scheduler.config.kv_group_configs, ChunkEvents.replace(scheduler)
    one._manager = manager
    one._known.unknown.add("r")
    request = engine_request()
    one.on_new_request(request)
    if gone:
        request.status = RequestStatus.FINISHED_ABORTED
        one.request_finished(request, [])
        scheduler.build_connector_meta(output(("r",)))
        assert not scheduler._req_status
    key = make_offload_key(request.block_hashes[3], group)
    one._note_load(request, key, 16)
    (event,) = one._events.take_events([OffloadingEvent([key], Medium.CPU, False)])
    assert event.token_ids == list(range(8, 16))
    assert event.group_idx == group


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("prompt_tokens", [8, 9, 4 * ANSWER_PIECE_TOKENS])
def test_a_prompt_is_stored_as_it_is_computed_and_an_answer_by_the_piece_and_at_its_end(
    prompt_tokens: int, tokens_per_step: int, groups: int
) -> None:
    """Every whole chunk once, in order, whatever the steps; several tokens a step are those of speculative decoding.
    With one group it is looked for in the step after, and otherwise, as stock does, in the step that computes it."""
    total = prompt_tokens + 2 * ANSWER_PIECE_TOKENS + 60
    stored: list[tuple[int, int]] = []  # tokens computed by then, chunk
    request = engine_request(prompt_tokens=prompt_tokens, answer_tokens=total - prompt_tokens)
    chunk_of = {make_offload_key(block_hash, 0): number for number, block_hash in enumerate(request.block_hashes)}
    computed = 0

    def prepare_store(keys: list[bytes], context: ReqContext) -> Any:
        stored.extend((computed, chunk_of[key]) for key in keys if key in chunk_of)
        return SimpleNamespace(keys_to_store=[])

    new_request = RequestOffloadingContext
    manager = SimpleNamespace(prepare_store=prepare_store, on_new_request=lambda context: new_request())
    one: Any = object.__new__(KvtierConnector)
    one.connector_scheduler = scheduler = offloading(manager, groups=groups)
    one._loads, one._computed, one._known, one._drop = Loads(scheduler, 1), [], Known(), False
    scheduler.on_new_request(request)
    scheduler._req_status["r"].update_offload_keys()
    scheduler._req_status["r"].update_block_id_groups((list(range(1, total // 4 + 1)),) * groups)
    while request.num_computed_tokens < total - 1:
        of_prompt = min(6, prompt_tokens - request.num_computed_tokens)
        count = of_prompt if of_prompt > 0 else min(tokens_per_step, total - 1 - request.num_computed_tokens)
        computed = request.num_computed_tokens + (0 if groups == 1 else count)
        one._build_store_jobs(output(r=count))
        request.num_computed_tokens += count
    assert all(4 * (chunk + 1) <= by_then < 4 * (chunk + 1) + 6 for by_then, chunk in stored if by_then < prompt_tokens)
    assert len({by_then for by_then, chunk in stored if 4 * (chunk + 1) > prompt_tokens}) == 2
    computed = total - 1
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    one._build_store_jobs(output(("r",)))
    assert [chunk for _, chunk in stored] == list(range((total - 1) // 4))
    assert all(4 * (chunk + 1) <= by_then for by_then, chunk in stored)


@pytest.mark.parametrize("zeroes", [False, True], ids=["kept", "zeroed"])
@pytest.mark.parametrize("computed", [False, True], ids=["of this step", "of the one before"])
def test_a_rank_begins_its_copies_as_a_step_begins(
    computed: bool, zeroes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stores, unless the step is to compute them first, as with stock. And then its loads, beside the step before
    unless that zeroes blocks."""
    called: list[object] = []
    job: Any = None
    meta = InStepMetadata({1: job}, {2: job}, set(), computed=computed)

    @contextlib.contextmanager
    def beside_computing() -> Iterator[None]:
        called.append("beside")
        yield
        called.append("after")

    monkeypatch.setattr(connector_module, "beside_computing", beside_computing)
    one: Any = object.__new__(KvtierConnector)
    one._zeroes, one._connector_metadata = zeroes, meta
    one.connector_worker = SimpleNamespace(
        prepare_store_kv=lambda meta: called.append(("stores", list(meta.store_jobs))),
        start_kv_transfers=lambda meta: called.append(("transfers", list(meta.load_jobs))),
    )
    one.start_load_kv(None)
    one.wait_for_save()
    stores, loads = ("stores", [2]), ("transfers", [1])
    assert called == [
        *([stores] if computed else []),
        ("transfers", []),
        *([loads] if zeroes else ["beside", loads, "after"]),
        ("stores", [] if computed else [2]),
    ]
    assert list(meta.load_jobs) == [1]
