"""Prefill and decode on workers of their own, with Dynamo's routers played by stand-ins. test_stock.py has the real
ones."""

import time
from typing import Any

import pytest

from components.router.deadlines import Deadlines
from components.router.handover import Disaggregated
from components.router.router import Handover
from components.router.workers import Workers
from kvstore.bus.messages import WorkerReport
from tests.router.test_router import BLOCK, ENDPOINT, TOKENS, Context, KvRouter, make

PREFILL, DECODE = [1, 2], [11, 12]


class Cluster:
    """The KV of a block takes 10 ms to come over."""

    def __init__(self, local_prefill_tokens: int = 0, **prefill: Any) -> None:
        self.prefill, self.decode = KvRouter(PREFILL), KvRouter(DECODE)
        readers = Workers(ENDPOINT)
        readers.heard(WorkerReport("1", ENDPOINT, 7, BLOCK, 2, 2_000_000, 0), time.monotonic())
        self.decode_router = make(self.decode, handover=Handover(readers, bytes_per_second=1e8))
        self.prefill_router = make(self.prefill, **prefill)
        self.served = Disaggregated(self.prefill_router, self.decode_router, local_prefill_tokens)

    async def workers(self, **routing: int) -> tuple[list[int], int]:
        """Those that a prompt was prefilled on for others, and the one that answered."""
        request = {"token_ids": TOKENS, "model": "m", "routing": routing}
        outputs = [output async for output in self.served.handle(request, Context())]
        assert [token for output in outputs for token in output["token_ids"]] == [0, 1, 2, 3, 4]
        sent = self.decode.sent[-1]
        assert ("prefill_result" in sent) == (not sent["annotations"]) == bool(self.prefill.sent)
        pinned = [one["routing"]["backend_instance_id"] for one in (*self.prefill.sent, sent)]
        return pinned[:-1], pinned[-1]


async def test_both_workers_are_chosen_by_what_they_hold_and_have_left() -> None:
    cluster = Cluster()
    cluster.prefill.rows[2]["device_blocks"] = 5
    cluster.decode.blocks = {11: 99}  # all that it has
    assert await cluster.workers() == ([2], 12)
    cluster.decode.blocks = {}
    cluster.decode.rows[11]["device_blocks"] = 5
    assert (await cluster.workers())[1] == 11


async def test_a_prompt_is_shown_once_with_what_its_prefill_worker_did() -> None:
    cluster = Cluster()
    await cluster.workers()
    (on_decode,) = cluster.decode_router.decisions.history.last()
    (on_prefill,) = cluster.prefill_router.decisions.history.last()
    known = on_decode.prefilled
    assert known is not None
    assert (known.id, known.worker, known.ttft_seconds) == (on_prefill.id, on_prefill.chosen, on_prefill.ttft_seconds)
    assert on_decode.ttft_seconds is not None
    assert on_decode.ttft_seconds > known.ttft_seconds
    cluster.prefill.broken = set(PREFILL)
    cluster.prefill.sent.clear()
    _ = [output async for output in cluster.served.handle({"token_ids": TOKENS, "model": "m"}, Context())]
    assert cluster.decode_router.decisions.history.last(1)[0].prefilled is None


async def test_a_client_may_name_either_worker() -> None:
    cluster = Cluster()
    assert await cluster.workers(prefill_worker_id=2, decode_worker_id=12) == ([2], 12)


@pytest.mark.parametrize(("held_blocks", "queued_tokens", "is_local"), [(9, 0, True), (8, 0, False), (9, 9000, False)])
async def test_what_a_decode_worker_lacks_little_of_is_prefilled_there(
    held_blocks: int, queued_tokens: int, is_local: bool
) -> None:
    """Unless its queue makes that the dearer way."""
    cluster = Cluster(local_prefill_tokens=BLOCK)
    cluster.decode.rows[12]["device_blocks"] = held_blocks
    cluster.decode.prefill = dict.fromkeys(DECODE, queued_tokens)
    prefilled, _ = await cluster.workers()
    assert (not prefilled) == is_local


async def test_without_a_prefill_worker_that_answers_decode_workers_prefill() -> None:
    cluster = Cluster()
    cluster.prefill.broken = set(PREFILL)
    request = {"token_ids": TOKENS, "model": "m"}
    outputs = [output async for output in cluster.served.handle(request, Context())]
    assert len(outputs) == 5
    assert cluster.decode.sent[-1]["annotations"] == ["x-bypass-remote-prefill"]


async def test_prefill_workers_that_hang_delay_one_prompt_each_and_then_none() -> None:
    """Not for as long as a prompt waits where there is no other way."""
    cluster = Cluster(has_fallback=True, deadlines=Deadlines(first_token_floor=0.1, first_token_max=60.0))
    cluster.prefill.silent = set(PREFILL)
    request = {"token_ids": TOKENS, "model": "m"}

    async def answered() -> float:
        begun = time.monotonic()
        assert len([output async for output in cluster.served.handle(request, Context())]) == 5
        assert cluster.decode.sent[-1]["annotations"] == ["x-bypass-remote-prefill"]
        return time.monotonic() - begun

    assert await answered() < 10
    assert len(cluster.prefill.sent) == len(PREFILL)
    await answered()
    assert len(cluster.prefill.sent) == len(PREFILL)  # all are suspect
