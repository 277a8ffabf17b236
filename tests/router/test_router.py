"""The request path, with Dynamo's router played by a stand-in that does what it was seen to do. The real one is behind
the end-to-end tests; here are the turns that are hard to bring about there: failures, leavers and crowds."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import generate_latest

from components.pricing.cost import Policy, Speeds
from components.router.failures import NoWorker, Refused, WorkerError, WorkerGone
from components.router.hints import Hints
from components.router.router import Router
from components.router.sessions import Sessions, session_of
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.bus.messages import Residency, SnapshotPage, TargetReport, WorkerReport
from kvstore.bus.plan import FIELD, read_plan
from kvstore.bus.residency import Mirror
from kvstore.keys import sequence_hashes

BLOCK = 4
ENDPOINT = "dynamo.backend.generate"
SPEEDS = Speeds(0.01, 0.001, 0.0, 1e9, 1e9, 0.001)
TOKENS = list(range(40))


class Context:
    """Dynamo's request context: whether the client is still there."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def is_stopped(self) -> bool:
        return self.gone.is_set()

    def is_killed(self) -> bool:
        return False

    async def async_killed_or_stopped(self) -> bool:
        return await self.gone.wait()


class KvRouter:
    """Overlaps and loads as set; requests are recorded and answered by `answer`."""

    def __init__(self, workers: list[int]):
        self.rows = {worker: {"device_blocks": 0, "host_pinned_extension_blocks": 0} for worker in workers}
        self.prefill: dict[int, int] = {}
        self.active: dict[int, int] = {}
        self.blocks: dict[int, int] = {}
        self.sent: list[dict[str, Any]] = []
        self.closed: list[int] = []
        self.broken: set[int] = set()
        self.silent: set[int] = set()
        self.answering_errors: dict[int, str] = {}

    async def get_overlap_scores(self, tokens: list[int], **_: object) -> dict[str, Any]:
        return {"workers": [{"worker_id": w, "dp_rank": 0, **row} for w, row in self.rows.items()]}

    async def get_potential_loads(self, tokens: list[int], **_: object) -> list[dict[str, int]]:
        await asyncio.sleep(0)
        return [
            {
                "worker_id": worker,
                "dp_rank": 0,
                "potential_prefill_tokens": self.prefill.get(worker, 0) + len(tokens),
                "potential_decode_blocks": self.blocks.get(worker, 0),
                "active_requests": self.active.get(worker, 0),
            }
            for worker in self.rows
        ]

    async def generate_from_request(self, request: dict[str, Any], response_buffer_size: int) -> AsyncIterator[Any]:
        self.sent.append(request)
        worker = request["routing"]["backend_instance_id"]
        await asyncio.sleep(0)
        if worker in self.broken:
            raise RuntimeError("CannotConnect")
        return self._answer(worker)

    async def _answer(self, worker: int) -> AsyncIterator[Any]:
        try:
            if worker in self.answering_errors:
                raise ValueError(self.answering_errors[worker])  # as Dynamo passes on an error
            if worker in self.silent:
                await asyncio.sleep(60)
            for number in range(5):
                yield {"token_ids": [number], **({} if number else {"routing_data": {"worker_id": worker}})}
                await asyncio.sleep(0)
        finally:
            self.closed.append(worker)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def make(kv_router: KvRouter, mirror: Mirror | None = None, **options: Any) -> Router:
    workers = Workers(ENDPOINT)
    card = json.dumps({"display_name": "m", "kv_cache_block_size": BLOCK, "runtime_config": {"total_kv_blocks": 99}})
    workers.set_cards({str(worker): card for worker in kv_router.rows})
    for worker in kv_router.rows:
        workers.heard(WorkerReport(str(worker), ENDPOINT, 7, BLOCK, 1, 1000, 0), time.monotonic())
    policy = Policy(stall_price=0.2)
    return Router(
        kv_router,
        workers,
        mirror or Mirror(),
        block_tokens=BLOCK,
        speeds=LiveSpeeds(SPEEDS),
        policy=policy,
        **options,
    )


def mirror_with(chunks: int, *, fingerprint: int = 7, adapter: str | None = None) -> Mirror:
    """The store holds the first chunks of the prompt."""
    mirror = Mirror()
    now = time.monotonic()
    mirror.apply(Residency("t:1", 1, 1, 0, 0, [], [], 0), now)
    hashes = sequence_hashes(TOKENS, BLOCK, lora_name=adapter)[:chunks]
    packed = b"".join(one.to_bytes(8, "little") for one in hashes)
    assert mirror.apply_snapshot([SnapshotPage("t:1", 1, 1, 1, 1, fingerprint, packed)])
    return mirror


async def serve(router: Router, request: dict[str, Any] | None = None, context: Context | None = None) -> list[Any]:
    request = request or {"token_ids": TOKENS, "model": "m"}
    return [output async for output in router.generate(request, context or Context())]


def plan_of(sent: dict[str, Any]) -> Any:
    return read_plan(sent["extra_args"]["sampling_options"]["extra_args"])


async def test_the_chosen_worker_is_pinned_and_given_the_plan() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 2
    router = make(kv_router, mirror_with(8))
    request = {
        "token_ids": TOKENS,
        "model": "m",
        "routing": {"priority": 3},
        "extra_args": {
            "nvext": {"a": 1},
            "sampling_options": {"extra_args": {"kv_transfer_params": {"theirs": 1}, FIELD: {"v": 1}}},
        },
    }
    outputs = await serve(router, request)
    assert outputs == [{"token_ids": [number]} for number in range(5)]  # to the frontend, the router is the worker
    (sent,) = kv_router.sent
    assert sent["routing"] == {"priority": 3, "backend_instance_id": 1, "dp_rank": 0}
    assert sent["extra_args"]["nvext"] == {"a": 1}
    assert sent["extra_args"]["sampling_options"]["extra_args"]["kv_transfer_params"] == {"theirs": 1}
    plan = plan_of(sent)
    assert (plan.targets(), plan.fetch) == (["t:1"] * 8, 6)
    assert "backend_instance_id" not in request["routing"]  # the caller's request is left as it was


async def test_without_a_store_the_plan_is_empty() -> None:
    kv_router = KvRouter([1])
    await serve(make(kv_router))
    plan = plan_of(kv_router.sent[0])
    assert (plan.targets(), plan.fetch) == ([], 0)


async def test_a_plan_of_the_clients_is_dropped_also_where_none_is_made() -> None:
    kv_router = KvRouter([1])
    router = make(kv_router, mirror_with(8))
    router._workers.forget_silent(time.monotonic() + 60)  # a worker that does not report has no tier
    forged = {FIELD: {"v": 1, "runs": [["evil:1", 10]], "decision_id": "forged"}}
    await serve(router, {"token_ids": TOKENS, "extra_args": {"sampling_options": {"extra_args": forged}}})
    plan = plan_of(kv_router.sent[0])
    assert (plan.targets(), plan.fetch) == ([], 0)
    assert "forged" not in json.dumps(kv_router.sent[0])


async def test_local_chunks_that_the_store_lost_are_named() -> None:
    kv_router = KvRouter([1])
    kv_router.rows[1]["device_blocks"] = 6
    await serve(make(kv_router, mirror_with(4)))
    assert plan_of(kv_router.sent[0]).targets() == ["t:1"] * 4 + [None] * 2


@pytest.mark.parametrize(
    ("adapters", "chosen", "found"),
    [
        ({1: {"adapter": 8}, 2: {"adapter": 9}}, 1, 8),
        ({1: {"adapter": 9}, 2: {"adapter": 8, "other": 9}}, 2, 8),
        ({1: {"other": 8}, 2: {"adapter": 8}}, 2, 8),
        ({1: {"other": 8}, 2: {}}, None, 0),  # where the adapter is not known yet, no chunk can be used
        ({1: {"adapter": 9}, 2: {"adapter": 7}}, None, 0),
    ],
)
async def test_a_request_with_an_adapter_is_priced_by_what_the_store_holds_of_that(
    adapters: dict[int, dict[str, int]], chosen: int | None, found: int
) -> None:
    """Adapters of one name need not be one adapter: each worker says by a fingerprint which it has."""
    kv_router = KvRouter([1, 2])
    router = make(kv_router, mirror_with(8, fingerprint=8, adapter="adapter"))
    for worker, names in adapters.items():
        report = WorkerReport(str(worker), ENDPOINT, 7, BLOCK, 1, 1000, 0, adapters=names)
        router._workers.heard(report, time.monotonic())
    await serve(router, {"token_ids": TOKENS, "model": "m", "routing": {"lora_name": "adapter"}})
    (sent,) = kv_router.sent
    assert chosen in (None, sent["routing"]["backend_instance_id"])
    assert plan_of(sent).targets() == ["t:1"] * found


async def test_chunks_of_the_model_itself_are_of_no_use_with_an_adapter() -> None:
    """Even if their hashes were those of the request."""
    kv_router = KvRouter([1])
    router = make(kv_router, mirror_with(8, adapter="adapter"))
    await serve(router, {"token_ids": TOKENS, "model": "m", "routing": {"lora_name": "adapter"}})
    await serve(router)
    assert [plan_of(sent).targets() for sent in kv_router.sent] == [[], []]
    router = make(kv_router, mirror_with(8))
    router._workers.heard(WorkerReport("1", ENDPOINT, 7, BLOCK, 1, 1000, 0, adapters={"adapter": 8}), time.monotonic())
    await serve(router)
    assert plan_of(kv_router.sent[-1]).targets() == ["t:1"] * 8


async def test_a_worker_that_fails_before_its_first_token_is_replaced() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    kv_router.broken = {1}
    router = make(kv_router)
    assert len(await serve(router)) == 5
    assert [sent["routing"]["backend_instance_id"] for sent in kv_router.sent] == [1, 2]
    kv_router.broken = set()
    await serve(router)  # it is under suspicion for a while
    assert kv_router.sent[-1]["routing"]["backend_instance_id"] == 2
    assert b'kvtier_router_retries_total{worker="1"} 1.0' in generate_latest(router.decisions.registry)


async def test_an_error_that_a_worker_answers_with_is_tried_elsewhere() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    kv_router.answering_errors = {1: "Internal: RuntimeError: it fails"}
    router = make(kv_router)
    assert len(await serve(router)) == 5
    assert [sent["routing"]["backend_instance_id"] for sent in kv_router.sent] == [1, 2]
    await serve(router)  # the other one could, so that it was not the request's fault
    assert kv_router.sent[-1]["routing"]["backend_instance_id"] == 2


async def test_a_request_that_every_worker_fails_at_puts_none_under_suspicion() -> None:
    kv_router = KvRouter([1, 2, 3])
    kv_router.answering_errors = dict.fromkeys([1, 2, 3], "Internal: RuntimeError: it fails")
    router = make(kv_router)
    with pytest.raises(WorkerError, match="it fails"):
        await serve(router)
    assert len(kv_router.sent) == 3
    assert all(router._suspects.trusts(worker, time.monotonic()) for worker in (1, 2, 3))


@pytest.mark.parametrize("workers", [[1], [1, 2, 3, 4]])
@pytest.mark.parametrize("said", ["too long", '{"message":"too long","code":400}'])
async def test_a_request_that_a_worker_calls_invalid_is_tried_nowhere_else(workers: list[int], said: str) -> None:
    kv_router = KvRouter(workers)
    kv_router.answering_errors = dict.fromkeys(workers, f"InvalidRequest: {said}")
    router = make(kv_router)
    with pytest.raises(Refused, match=r"^too long$"):
        await serve(router)
    assert len(kv_router.sent) == 1
    assert all(router._suspects.trusts(worker, time.monotonic()) for worker in workers)


async def test_a_worker_that_ends_before_its_first_token_is_under_suspicion() -> None:
    kv_router = KvRouter([1])
    kv_router.answering_errors = {1: "Unavailable: Stream ended before generation completed"}
    router = make(kv_router)
    with pytest.raises(WorkerGone, match="Stream ended"):
        await serve(router)
    assert not router._suspects.trusts(1, time.monotonic())


async def test_when_all_fail_the_client_hears_of_it() -> None:
    kv_router = KvRouter([1, 2, 3, 4])
    kv_router.broken = {1, 2, 3, 4}
    with pytest.raises(WorkerGone, match="CannotConnect"):
        await serve(make(kv_router))
    assert len(kv_router.sent) == 3


async def test_without_workers_the_client_hears_of_it() -> None:
    with pytest.raises(NoWorker, match="no worker is live"):
        await serve(make(KvRouter([])))


async def test_a_client_may_name_the_worker() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    router = make(kv_router, own_id=77)
    for name in ("backend_instance_id", "prefill_worker_id"):
        await serve(router, {"token_ids": TOKENS, "routing": {name: 2}})
        assert kv_router.sent[-1]["routing"]["backend_instance_id"] == 2
        with pytest.raises(NoWorker):
            await serve(router, {"token_ids": TOKENS, "routing": {name: 9}})
        await serve(router, {"token_ids": TOKENS, "routing": {name: 77}})  # the frontend's word for this router
        assert kv_router.sent[-1]["routing"]["backend_instance_id"] == 1


@pytest.mark.parametrize(
    ("routing", "workers"),
    [
        ({"allowed_worker_ids": [2, 3]}, {2}),
        ({"allowed_worker_ids": None, "routing_constraints": None, "dp_rank": None}, {1, 2}),
        ({"routing_constraints": {"required_taints": ["gold"]}}, {2}),
        ({"routing_constraints": {"required_taints": ["dynamo.topology/zone=a"]}}, {1}),
        ({"routing_constraints": {"required_taints": ["gold", "dynamo.topology/zone=a"]}}, set()),
        ({"allowed_worker_ids": [1], "backend_instance_id": 2}, set()),
        ({"dp_rank": 0}, {1, 2}),
        ({"dp_rank": 1}, set()),
        ({"prefill_dp_rank": 1, "dp_rank": 0}, set()),
    ],
)
async def test_workers_that_dynamo_would_not_take_are_no_candidates(routing: dict[str, Any], workers: set[int]) -> None:
    router = make(KvRouter([1, 2]))
    taints = {"1": ["dynamo.topology/zone=a"], "2": ["gold"]}
    card = {"display_name": "m", "kv_cache_block_size": BLOCK}
    router._workers.set_cards(
        {id_: json.dumps({**card, "runtime_config": {"taints": of}}) for id_, of in taints.items()}
    )
    request = {"token_ids": TOKENS, "routing": routing}
    if workers:
        explained = await router.explain(request)
        assert {one.worker for one in explained.candidates} == {str(worker) for worker in workers}
    else:
        with pytest.raises(NoWorker):
            await router.explain(request)


async def test_a_session_stays_on_its_worker_while_that_lives_and_it_is_not_idle() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    now = 0.0
    router = make(kv_router, clock=lambda: now, session_idle_seconds=60)
    request = {"token_ids": TOKENS, "agent_context": {"session_id": "s"}}

    async def sent_to(request: dict[str, Any]) -> int:
        await serve(router, request)
        return int(kv_router.sent[-1]["routing"]["backend_instance_id"])

    assert await sent_to(request) == 1
    kv_router.rows[1]["device_blocks"], kv_router.rows[2]["device_blocks"] = 0, 9
    assert await sent_to({"token_ids": TOKENS}) == 2
    assert await sent_to(request) == 1
    now = 61.0
    assert await sent_to(request) == 2
    kv_router.rows[1]["device_blocks"], kv_router.rows[2]["device_blocks"] = 9, 0
    assert await sent_to(request) == 2
    kv_router.broken = {2}
    assert await sent_to(request) == 1
    kv_router.broken = set()
    now = 80.0  # the other one is not under suspicion any more
    kv_router.rows[1]["device_blocks"], kv_router.rows[2]["device_blocks"] = 0, 9
    assert await sent_to(request) == 1


@pytest.mark.parametrize("context", [None, 5, {}, {"session_id": None}, {"session_id": 5}, {"session_id": "s" * 257}])
def test_what_is_no_session_is_none(context: object) -> None:
    assert session_of({"agent_context": context}) == ""


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.router.sessions.SESSIONS_MAX", 2)
    sessions = Sessions(60)
    for session in ("a", "b", "a", "c"):
        sessions.bind(session, (1, 0), 0.0)
    assert [sessions.bound_worker(session, 0.0) for session in ("a", "b", "c", "")] == [(1, 0), None, (1, 0), None]
    off = Sessions()
    off.bind("a", (1, 0), 0.0)
    assert off.bound_worker("a", 0.0) is None


async def test_only_requests_that_decode_are_stalled_by_a_prefill() -> None:
    """Dynamo's books count those in prefill, too."""
    kv_router = KvRouter([1])
    router, context = make(kv_router), Context()
    kv_router.active[1] = 5
    kv_router.silent = {1}
    serving = asyncio.create_task(serve(router, context=context))
    await until(lambda: router._prefilling)
    choice = (await router.decide({"token_ids": TOKENS})).chosen
    assert choice.candidate.running_requests == 4
    context.gone.set()
    await serving
    choice = (await router.decide({"token_ids": TOKENS})).chosen
    assert choice.candidate.running_requests == 5


async def test_a_worker_whose_memory_is_booked_is_waited_for_as_its_answers_take() -> None:
    kv_router = KvRouter([11, 12])
    router = make(kv_router)
    kv_router.blocks = {11: 99, 12: 0}
    kv_router.active = {11: 3}
    for _ in range(4):
        router._speeds.answered(11, 2 * BLOCK, 5.0)
    waits = {one.worker: one.seconds["wait"] for one in (await router.explain({"token_ids": TOKENS})).candidates}
    # Of 99 blocks as many lack as the prompt and four answers take.
    assert waits == {"b": pytest.approx(5.0 * (len(TOKENS) / BLOCK + 4 * 2) / 99, rel=0.01), "c": 0.0}
    await serve(router)
    assert kv_router.sent[-1]["routing"]["backend_instance_id"] == 12
    assert router._speeds.answers(12).tokens == 5


async def test_an_answer_of_known_length_counts_as_long_until_it_ends() -> None:
    kv_router = KvRouter([11, 12])
    router = make(kv_router)
    kv_router.active = {11: 1}
    for worker in (11, 12):
        router._speeds.answered(worker, 5, 1.0)
    hinted = {
        "token_ids": TOKENS,
        "routing": {"expected_output_tokens": 4 * BLOCK, "backend_instance_id": 11},
        "stop_conditions": {"max_tokens": 2 * BLOCK},
    }

    async def memory() -> tuple[float, float]:
        one = (await router.decide({"token_ids": TOKENS, "routing": {"backend_instance_id": 11}})).chosen.candidate
        own = (await router.decide(hinted)).chosen.candidate
        return one.memory_used * 99 * BLOCK, own.memory_needed * 99 * BLOCK

    assert await memory() == pytest.approx((5, len(TOKENS) + 2 * BLOCK))
    kv_router.silent = {11}
    serving = asyncio.create_task(serve(router, hinted))
    await until(lambda: kv_router.sent)
    assert (await memory())[0] == pytest.approx(2 * BLOCK)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    assert (await memory())[0] == pytest.approx(5)


async def test_what_a_client_expects_of_its_answer_is_no_more_than_workers_have_room_for() -> None:
    """Else a few such requests would make every worker look full, for hours."""
    kv_router = KvRouter([11])
    router = make(kv_router)
    request = {"token_ids": TOKENS, "routing": {"expected_output_tokens": 1 << 20}}
    own = (await router.decide(request)).chosen.candidate
    assert own.memory_needed == pytest.approx(1)


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        ({"expected_output_tokens": 0}, "osl: 0 given, expected 1 to 1048576"),
        ({"expected_output_tokens": 1 << 21}, "osl: 2097152 given"),
        ({"priority": -2000, "priority_jump": 0.0}, "priority: -2000 given, expected -1000 to 1000"),
        ({"priority_jump": 1e9}, "latency_sensitivity: 1000000000.0 given"),
    ],
)
async def test_a_hint_that_cannot_be_right_is_refused_by_its_name(routing: dict[str, Any], said: str) -> None:
    kv_router = KvRouter([1])
    with pytest.raises(Refused) as refused:
        await serve(make(kv_router), {"token_ids": TOKENS, "routing": routing})
    assert f"nvext.agent_hints.{said}" in str(refused.value)
    assert not kv_router.sent


async def test_a_prompt_of_higher_priority_counts_more_and_of_lower_less() -> None:
    weights = [Hints.of({"routing": {"priority": one}}).weight for one in (-1000, -1, 0, 1, 3, 1000)]
    assert weights == [0.1, 0.5, 1, 2, 4, 10]
    assert Hints.of({"routing": {"priority_jump": 1.0}}).weight == 2
    assert Hints.of({}) == Hints()


async def test_a_prompt_that_found_a_queue_says_nothing_of_the_speed_of_prefills() -> None:
    kv_router = KvRouter([11])
    router = make(kv_router)
    kv_router.prefill = {11: 5000}
    for _ in range(10):
        await serve(router)
    assert router._speeds.of_worker(11) == SPEEDS
    kv_router.prefill = {}
    for _ in range(10):
        await serve(router)
    assert router._speeds.of_worker(11) != SPEEDS


async def test_a_prompt_can_be_priced_without_being_sent() -> None:
    kv_router = KvRouter([1, 2])
    router = make(kv_router, mirror_with(8))
    explained = await router.explain({"token_ids": TOKENS})
    assert len(explained.candidates) == 2
    assert (explained.fetch_chunks, explained.targets) == (8, [("t:1", 8)])
    assert not kv_router.sent
    assert router.decisions.history.last() == []
    assert b"kvtier_router_predicted_ttft_seconds_count 0.0" in generate_latest(router.decisions.registry)


async def test_a_worker_with_other_blocks_gets_no_prompts() -> None:
    kv_router = KvRouter([1, 2])
    router = make(kv_router)
    other = json.dumps({"display_name": "m", "kv_cache_block_size": BLOCK * 2, "runtime_config": {}})
    mine = json.dumps({"display_name": "m", "kv_cache_block_size": BLOCK, "runtime_config": {}})
    router._workers.set_cards({"1": other, "2": mine})
    for _ in range(5):
        await serve(router)
    assert {sent["routing"]["backend_instance_id"] for sent in kv_router.sent} == {2}


async def test_a_client_that_leaves_while_it_queues_frees_the_worker() -> None:
    kv_router = KvRouter([1])
    kv_router.silent = {1}
    router, context = make(kv_router), Context()
    serving = asyncio.create_task(serve(router, context=context))
    await asyncio.sleep(0.05)
    context.gone.set()
    assert await asyncio.wait_for(serving, 20) == []
    await until(lambda: kv_router.closed == [1])
    assert not any(router.booked().values())


async def test_a_client_that_leaves_while_it_reads_frees_the_worker() -> None:
    kv_router = KvRouter([1])
    router, context = make(kv_router), Context()
    seen = []
    async for output in router.generate({"token_ids": TOKENS}, context):
        seen.append(output)
        context.gone.set()
    assert len(seen) == 1
    await until(lambda: kv_router.closed == [1])


async def test_prompts_that_come_together_do_not_all_go_to_one_worker() -> None:
    """Dynamo's books know of a prompt only once it is sent."""
    kv_router = KvRouter([1, 2])
    router = make(kv_router)
    await asyncio.gather(*(serve(router) for _ in range(10)))
    workers = [sent["routing"]["backend_instance_id"] for sent in kv_router.sent]
    assert workers.count(1) == workers.count(2) == 5


async def test_when_dynamos_router_fails_prompts_are_served_from_what_is_left() -> None:
    kv_router = KvRouter([1, 2])
    router = make(kv_router, mirror_with(8))

    async def broken(tokens: list[int], **_: object) -> dict[str, Any]:
        raise RuntimeError("index is gone")

    kv_router.get_overlap_scores = broken  # type: ignore[method-assign]
    assert len(await serve(router)) == 5
    assert plan_of(kv_router.sent[0]).fetch == 8
    assert (
        'kvtier_router_degraded_decisions_total{missing="overlap_query"} 1.0'
        in generate_latest(router.decisions.registry).decode()
    )


async def test_a_decision_counts_once_however_many_workers_do_not_report() -> None:
    router = make(KvRouter([1, 2, 3]))
    router._workers.forget_silent(time.monotonic() + 60)
    await serve(router)
    assert router.decisions.totals().fallbacks["worker_report"] == 1


async def test_under_churn_nothing_stays_booked() -> None:
    """Whichever way a prompt ends, what was counted for it is given back."""
    kv_router = KvRouter([1, 2, 3])
    kv_router.silent, kv_router.broken = {3}, {2}
    router = make(kv_router, mirror_with(8))
    chance = random.Random(20261124)

    async def one() -> None:
        context = Context()
        serving = asyncio.create_task(serve(router, context=context))
        await asyncio.sleep(chance.random() * 0.02)
        context.gone.set()
        with suppress(WorkerGone):
            await asyncio.wait_for(serving, 20)

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(20)))
        kv_router.broken = {chance.choice([1, 2, 3])}
    await until(lambda: len(kv_router.closed) > 0)
    assert not any(router.booked().values())
    outcomes = {one.outcome for one in router.decisions.history.last()}
    assert outcomes <= {"finished", "failed", "cancelled"}


async def test_a_busy_target_is_priced_by_what_others_fetch_there() -> None:
    kv_router = KvRouter([1])
    router = make(kv_router, mirror_with(10))
    idle = (await router.decide({"token_ids": TOKENS})).chosen
    assert idle.fetch_chunks > 0
    report = TargetReport("t:1", 1, 0, 0, 1e6, 10**6, 0, 10**9, 0, 1, 0)  # a second's work before it
    router._speeds.heard_target(report, time.monotonic())
    busy = (await router.decide({"token_ids": TOKENS})).chosen
    assert busy.candidate.target_fetching_bytes == 10**6
    assert busy.fetch_chunks == 0


async def test_a_decision_is_shown_in_log_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    kv_router = KvRouter([1, 26])
    kv_router.rows[26] = {"device_blocks": 2, "host_pinned_extension_blocks": 3}
    router = make(kv_router, mirror_with(8))
    with caplog.at_level("INFO"):
        await serve(router)
    (line,) = [record.getMessage() for record in caplog.records if "decision" in record.getMessage()]
    assert "40 tokens -> worker 1a" in line
    assert "1: blocks hbm 0 dram 0 store 8 missing 2" in line
    assert "1a: blocks hbm 2 dram 3 store 3 missing 2" in line
    assert all(f" {part} " in line for part in ("ttft", "delay", "pressure", "price"))  # the price is explained
    shown = generate_latest(router.decisions.registry).decode()
    assert 'kvtier_router_candidate_blocks{tier="dram",worker="1a"} 3.0' in shown
    assert 'kvtier_router_chosen_blocks_total{tier="store",worker="1a"} 3.0' in shown
    assert 'kvtier_router_candidate_seconds{part="ttft",worker="1"}' in shown
    assert "kvtier_router_ttft_seconds_count 1.0" in shown
    del kv_router.rows[1]
    await serve(router)
    assert 'worker="1"' not in generate_latest(router.decisions.registry).decode()
