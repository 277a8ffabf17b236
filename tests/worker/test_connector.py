"""The connector's own steps, with a scheduler and a tier that only write down what they are asked."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
    SchedulerOffloadConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_offload.base import LookupResult, OffloadPolicy, ReqContext, make_offload_key
from vllm.v1.request import Request

from components.worker.connector import ANSWER_PIECE_TOKENS, KvtierConnector
from components.worker.in_step import IN_STEP_SECONDS, InStepLoads
from components.worker.step_clock import StepClock
from kvstore.bus.plan import FIELD


class Tier:
    """A tier with room for so many rows."""

    def __init__(self, rows: int):
        self.rows = rows
        self.unknown: set[str] = set()
        self.waits = 0
        self.hurried: list[str] = []
        self.paces: list[tuple[float, int]] = []

    @property
    def has_room(self) -> bool:
        return self.rows > 0

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

    def tell_pace(self, dram_bytes_per_second: float, queue: int) -> None:
        self.paces.append((dram_bytes_per_second, queue))


class Manager:
    def __init__(self, tier: Tier):
        self.tier = tier
        self.promoted: list[tuple[str, int]] = []
        self.let_go_of: list[str] = []

    def lookup(self, key: bytes, context: ReqContext) -> LookupResult:
        wanted = (context.req_id, int.from_bytes(key[:32], "big"))
        if wanted not in self.promoted:
            self.promoted.append(wanted)
            self.tier.rows -= 1
        return LookupResult.HIT_PENDING

    def let_go(self, req_id: str) -> None:
        self.let_go_of.append(req_id)

    def release(self, req_ids: object) -> None:
        pass


def connector(rows: int, requests: dict[str, int]) -> tuple[Any, Tier, Manager]:
    """A connector at which requests of so many chunks have arrived."""
    tier = Tier(rows)
    manager = Manager(tier)
    one: Any = object.__new__(KvtierConnector)
    one._tiers, one._manager, one._block_pool = [tier], manager, None
    one._groups = (GroupOffloadConfig(0, 4, 4, 1, None, None),)
    one._clock = StepClock()
    one.connector_scheduler = SimpleNamespace(
        build_connector_meta=lambda output: OffloadingConnectorMetadata({}, {}),
        get_num_new_matched_tokens=lambda request, computed: (0, False),
        update_state_after_alloc=lambda request, blocks, tokens: None,
        update_connector_output=lambda output: None,
        get_stats=lambda: None,
        _jobs={},
    )
    one._in_step = InStepLoads(one.connector_scheduler, 1)
    one._arriving = {
        name: SimpleNamespace(
            req=SimpleNamespace(request_id=name, block_hashes=[]),
            req_context=ReqContext(name),
            group_states=[
                SimpleNamespace(offload_keys=[make_offload_key(n.to_bytes(32, "big"), 0) for n in range(chunks)])
            ],
        )
        for name, chunks in requests.items()
    }
    return one, tier, manager


def output(tokens: int = 0) -> Any:
    return SimpleNamespace(
        total_num_scheduled_tokens=tokens,
        finished_req_ids=set(),
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={},
        scheduled_spec_decode_tokens={},
    )


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
    one.build_connector_meta(output(tokens=5))
    assert tier.waits == 0
    one.build_connector_meta(output())
    assert tier.waits == 1


def test_what_the_scheduler_looks_at_is_hurried_and_what_it_runs_is_let_go() -> None:
    one, tier, manager = connector(1, {"r": 1})
    request = SimpleNamespace(request_id="r", num_tokens=7)
    one.get_num_new_matched_tokens(request, 4)
    assert tier.hurried == ["r"]  # what is left is less than a chunk
    one.get_num_new_matched_tokens(request, 0)
    assert tier.hurried == ["r", "r", "r answered"]
    assert not one._arriving
    one.update_state_after_alloc(request, None, 0)
    assert manager.let_go_of == ["r"]


def loads(groups: int = 1, **group: Any) -> InStepLoads:
    """Of chunks of 4 tokens and 1,000 bytes."""
    config = GroupOffloadConfig(**{**GroupOffloadConfig(0, 4, 4, 1, None, None)._asdict(), **group})
    scheduler = SimpleNamespace(
        config=SchedulerOffloadConfig((config,) * groups, 1, 2, False), _jobs={}, _req_status={}
    )
    return InStepLoads(scheduler, 1000)


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
    one.scheduler._jobs[1] = SimpleNamespace(is_store=True)
    assert one.admit(request, 4, 1e9)
    one.scheduler._jobs[2] = SimpleNamespace(is_store=False)
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
    status = SimpleNamespace(req=request, num_locally_computed_tokens=4, transfer_jobs=set())
    one.scheduler._req_status["r"] = status
    asked: list[Any] = []

    def allocated(request: Any, blocks: Any, tokens: int) -> None:
        asked.append([(block.block_id, block.block_hash) for block in blocks.blocks[0]])
        status.transfer_jobs.add(7)
        one.scheduler._jobs[7] = "load"

    one.admit(request, 4, 1e9)
    blocks = SimpleNamespace(
        blocks=([SimpleNamespace(block_id=n, is_null=False, block_hash="hash") for n in (5, 6, 9)],)
    )
    one.allocated(request, blocks, 4, allocated)
    assert asked == [[(5, "hash"), (6, None), (9, None)]]

    def scheduled(output: Any) -> Any:
        asked.append((set(status.transfer_jobs), one.stores("r")))
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
    for _ in range(5):
        one.build_connector_meta(output(tokens=5))
        one.get_kv_connector_stats()
    assert tier.paces == [(0.0, 1)]


def test_steps_are_timed_though_some_have_no_output_for_the_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs nothing and copies nothing, as while a fetch is waited for, says nothing to the connector: the steps
    that follow must not be taken for it."""
    one, _, _ = connector(0, {})
    now = 0.0
    monkeypatch.setattr("components.worker.connector.time", SimpleNamespace(monotonic=lambda: now))
    for tokens in (0, 100, 0, 0, 200, 1):
        step = output(tokens)
        step.num_scheduled_tokens = {"r": tokens} if tokens else {}
        one.build_connector_meta(step)
        now += 0.1 + tokens / 1000
        if tokens:
            one.update_connector_output(SimpleNamespace(kv_connector_worker_meta=None))
        one.get_kv_connector_stats()
    samples = [(tokens, round(seconds, 6)) for tokens, _, seconds in one._clock._fit._samples]
    assert samples == [(100, 0.2), (200, 0.3)]


ROUTERS, CLIENTS = {"decision_id": "router"}, {"decision_id": "client"}


@pytest.mark.parametrize(
    ("extra_args", "transfer", "seen"),
    [
        ({FIELD: ROUTERS}, None, {FIELD: ROUTERS}),
        ({FIELD: ROUTERS}, {"do_remote_decode": True}, {"do_remote_decode": True, FIELD: ROUTERS}),
        ({FIELD: ROUTERS}, {FIELD: CLIENTS}, {FIELD: ROUTERS}),
        ({}, {FIELD: CLIENTS, "theirs": 1}, {"theirs": 1}),
        (None, None, None),
    ],
)
def test_the_tier_sees_the_routers_plan_beside_what_others_write(extra_args: Any, transfer: Any, seen: Any) -> None:
    """As vLLM makes a tier's context; what a stock prefill worker writes is NIXL's, and stays."""
    one, _, _ = connector(0, {})
    contexts: list[ReqContext] = []

    def new_request(context: ReqContext) -> Any:
        contexts.append(context)
        return SimpleNamespace(policy=OffloadPolicy.BLOCK_LEVEL)

    scheduler: Any = object.__new__(OffloadingConnectorScheduler)
    scheduler.config = SchedulerOffloadConfig((), 1, 1, False)
    scheduler._req_status, scheduler.manager = {}, SimpleNamespace(on_new_request=new_request)
    one.connector_scheduler = scheduler
    parameters = SamplingParams(extra_args=extra_args)
    request = Request("r", [1, 2, 3], parameters, None)
    request.kv_transfer_params = transfer
    request.skip_reading_prefix_cache = True
    one.on_new_request(request)
    assert contexts == [ReqContext("r", seen)]


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("prompt_tokens", [8, 9, 4 * ANSWER_PIECE_TOKENS])
def test_a_prompt_is_stored_as_it_is_computed_and_an_answer_by_the_piece_and_at_its_end(
    prompt_tokens: int, tokens_per_step: int
) -> None:
    """Every whole chunk once, in order, whatever the steps; several tokens a step are those of speculative decoding."""
    total = prompt_tokens + 2 * ANSWER_PIECE_TOKENS + 30
    stored: list[tuple[int, int]] = []  # tokens computed by then, chunk
    request: Any = SimpleNamespace(
        request_id="r",
        num_tokens=total,
        num_prompt_tokens=prompt_tokens,
        num_computed_tokens=0,
        kv_transfer_params=None,
        is_finished=lambda: False,
        block_hashes=[number.to_bytes(32, "big") for number in range(total // 4)],
    )
    groups = (GroupOffloadConfig(0, 4, 4, 1, None, None),)
    status = RequestOffloadState(
        SchedulerOffloadConfig(groups, 1, 1, False),
        request,
        ReqContext("r"),
        SimpleNamespace(policy=OffloadPolicy.BLOCK_LEVEL),
    )
    status.update_offload_keys()
    status.group_states[0].block_ids.extend(range(1, total // 4 + 1))

    def prepare_store(keys: list[bytes], context: ReqContext) -> Any:
        stored.extend((request.num_computed_tokens, int.from_bytes(key[:32], "big")) for key in keys)
        return SimpleNamespace(keys_to_store=[])

    scheduler: Any = object.__new__(OffloadingConnectorScheduler)
    scheduler.config, scheduler._req_status = status.config, {"r": status}
    scheduler.manager = SimpleNamespace(prepare_store=prepare_store)
    one: Any = object.__new__(KvtierConnector)
    one.connector_scheduler = scheduler
    one._in_step = InStepLoads(scheduler, 1)
    while request.num_computed_tokens < total:
        answering = request.num_computed_tokens >= prompt_tokens
        count = min(tokens_per_step if answering else 6, total - request.num_computed_tokens)
        one._build_store_jobs(SimpleNamespace(num_scheduled_tokens={"r": count}, finished_req_ids=set()))
        request.num_computed_tokens += count
    in_answer = {step for step, chunk in stored if step >= prompt_tokens}
    assert len(in_answer) == 2
    request.is_finished = lambda: True
    one._build_store_jobs(SimpleNamespace(num_scheduled_tokens={}, finished_req_ids={"r"}))
    assert [chunk for _, chunk in stored] == list(range(total // 4))
