"""A late token: who is suspect, where the prompt goes, and what the client hears. Hung, stopped, slow and partitioned
workers behind Dynamo's own router are in test_stock.py."""

import asyncio
import time
from typing import Any

import pytest

from components.router.deadlines import SUSPECT_SECONDS, SUSPECT_SECONDS_MAX, Deadlines, Suspects
from components.router.failures import GivenUp, Late, NoWorker, Refused, WorkerGone, frame
from components.router.router import Router
from components.router.workers import Card
from tests.router.test_router import BLOCK, TOKENS, Context, KvRouter, make, serve, until

FLOOR = 0.4
SHORT = Deadlines(first_token_floor=FLOOR, first_token_max=10.0, next_token=0.2)


def sent_to(kv_router: KvRouter) -> list[int]:
    return [sent["routing"]["backend_instance_id"] for sent in kv_router.sent]


async def seconds(serving: Any) -> float:
    begun = time.monotonic()
    await serving
    return time.monotonic() - begun


async def test_a_prompt_leaves_a_hung_worker_and_the_next_ones_do_not_go_there() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    kv_router.silent = {1}
    router = make(kv_router, deadlines=SHORT)
    assert FLOOR <= await seconds(serve(router)) < FLOOR + 5
    await serve(router)  # the suspect is not asked
    assert sent_to(kv_router) == [1, 2, 2]
    assert kv_router.closed[0] == 1
    assert not any(router.booked().values())


@pytest.mark.parametrize("workers", [[1], [1, 2]])
async def test_without_a_trusted_worker_the_prompt_keeps_its_place_up_to_the_bound(workers: list[int]) -> None:
    kv_router = KvRouter(workers)
    kv_router.rows[1]["device_blocks"] = 9
    kv_router.silent = set(workers)
    router = make(kv_router, deadlines=Deadlines(first_token_floor=FLOOR, first_token_max=4 * FLOOR))
    begun = time.monotonic()
    with pytest.raises(GivenUp, match="no worker produced a first token"):
        await serve(router)
    assert 4 * FLOOR <= time.monotonic() - begun < 4 * FLOOR + 15
    assert sent_to(kv_router) == workers
    with pytest.raises(GivenUp):
        await serve(router)  # all are suspect: the least bad is asked
    assert len(kv_router.sent) == len(workers) + 1


@pytest.mark.parametrize("alive", [True, False])
async def test_a_worker_that_has_tokens_for_others_is_waited_for_longer(alive: bool) -> None:
    """A long queue is no hang."""
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    kv_router.silent = {1}
    router = make(kv_router, deadlines=SHORT)
    serving = asyncio.create_task(serve(router))
    begun = time.monotonic()
    while time.monotonic() < begun + 2.5 * FLOOR:
        await asyncio.sleep(FLOOR / 10)
        if alive:
            router._workers.progressed(1, time.monotonic())
    assert serving.done() != alive
    await serving  # and yet not for ever
    assert sent_to(kv_router) == [1, 2]


async def test_a_stalled_answer_ends_with_an_error_and_is_not_begun_again() -> None:
    kv_router = KvRouter([1, 2])
    router = make(kv_router, deadlines=SHORT)

    async def stalls(worker: int) -> Any:
        yield {"token_ids": [7]}
        await asyncio.sleep(60)

    kv_router._answer = stalls  # type: ignore[method-assign]
    answer = router.generate({"token_ids": TOKENS}, Context())
    assert await anext(answer) == {"token_ids": [7]}
    with pytest.raises(Late, match="incomplete"):
        await anext(answer)
    assert len(kv_router.sent) == 1


async def test_a_client_that_reads_slowly_is_no_stalled_worker() -> None:
    router = make(KvRouter([1]), deadlines=SHORT)
    outputs = []
    async for output in router.generate({"token_ids": TOKENS}, Context()):
        outputs.append(output)
        if len(outputs) == 2:
            await asyncio.sleep(3 * SHORT.next_token)
    assert len(outputs) == 5


async def test_a_client_that_leaves_a_hung_worker_is_followed() -> None:
    kv_router = KvRouter([1])
    kv_router.silent = {1}
    router, context = make(kv_router, deadlines=SHORT), Context()
    serving = asyncio.create_task(serve(router, context=context))
    await asyncio.sleep(2 * FLOOR)
    context.gone.set()
    assert await asyncio.wait_for(serving, 5) == []
    await until(lambda: kv_router.closed == [1])


def test_a_suspect_is_probed_by_one_prompt_after_a_growing_bounded_time() -> None:
    suspects = Suspects()
    now, times = 0.0, []
    for _ in range(8):
        suspects.add(1, now)
        suspects.add(1, now)  # prompts that fail together count once
        begun = now
        while not suspects.trusts(1, now):
            now += 1
        times.append(now - begun)
        suspects.sent(1, now)
        assert not suspects.trusts(1, now + 1)  # the probe is on its way
    assert times[:3] == [SUSPECT_SECONDS, 2 * SUSPECT_SECONDS, 4 * SUSPECT_SECONDS]
    assert times[-1] == SUSPECT_SECONDS_MAX
    suspects.clear(1)
    assert suspects.trusts(1, now)
    assert (suspects.failures(1), suspects.count(now)) == (0, 0)


async def test_of_suspects_the_one_that_failed_least_is_taken() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    router = make(kv_router)
    now = time.monotonic()
    for when in (now - 100, now):
        router._suspects.add(1, when)
    router._suspects.add(2, now)
    await serve(router)
    assert sent_to(kv_router) == [2]


async def test_a_prompt_goes_to_workers_whose_context_it_fits() -> None:
    kv_router = KvRouter([1, 2])
    kv_router.rows[1]["device_blocks"] = 9
    router = make(kv_router)

    def contexts(*tokens: int) -> None:
        cards = {worker: Card(BLOCK, 99, "m", context_tokens=of) for worker, of in enumerate(tokens, 1)}
        router._workers._cards = cards

    contexts(len(TOKENS), 100)
    await serve(router)
    assert sent_to(kv_router) == [2]
    contexts(len(TOKENS), 10)
    with pytest.raises(Refused, match="the prompt has 40 tokens, expected less than 40"):
        await serve(router)


@pytest.mark.parametrize(
    ("error", "kind", "shown"),
    [
        (Refused("too long"), "InvalidRequest", "too long"),
        (Refused("no such adapter", "NotFound"), "NotFound", "no such adapter"),
        (NoWorker("no worker is live"), "Unavailable", "no worker is live"),
        (WorkerGone("10.0.0.1:7: refused"), "Unavailable", None),  # addresses are not for clients
    ],
)
async def test_an_error_is_the_last_item_of_the_stream(error: Exception, kind: str, shown: str | None) -> None:
    router = make(KvRouter([]))

    async def fails(*_: object) -> Any:
        raise error
        yield

    router.generate = fails  # type: ignore[method-assign]
    context = Context()
    context.id = lambda: "r"  # type: ignore[attr-defined]
    (item,) = [item async for item in Router.handle(router, {"token_ids": TOKENS}, context)]
    assert item == frame(error)  # type: ignore[arg-type]
    assert (item["error"]["class"], item["error"].get("public", {}).get("message")) == (kind, shown)
