"""Several routers side by side, over a real NATS server: what one has sent counts with the other. Dynamo's routers are
played by stand-ins."""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from components.router import others
from components.router.others import ROUTERS_MAX, SILENT_SECONDS, Others
from components.router.router import Router
from kvstore.bus.connection import Bus
from kvstore.bus.messages import Load, RouterReport
from tests.router.test_router import ENDPOINT, TOKENS, KvRouter, make, mirror_with, serve, until

WORKERS = [1, 2]


class Side:
    """A router, its connection, and what it has been told to do."""

    def __init__(self, bus: Bus, name: str):
        self.bus, self.kv_router = bus, KvRouter(WORKERS)
        self.others = Others(name, ENDPOINT, Counter())
        self.router: Router = make(self.kv_router, mirror_with(8), others=self.others)
        self.sharing = asyncio.create_task(self.others.share(bus, name.split("-")[0], self.router.load_report))

    @classmethod
    async def start(cls, nats_url: str, name: str) -> "Side":
        return cls(await Bus.connect(nats_url, name), name)

    async def load(self, worker: int) -> Any:
        request = {"token_ids": TOKENS, "routing": {"backend_instance_id": worker}}
        return (await self.router.decide(request)).chosen.candidate

    async def stop(self) -> None:
        self.sharing.cancel()
        with suppress(asyncio.CancelledError):
            await self.sharing
        await self.bus.close()


async def test_what_one_router_has_sent_counts_with_another_within_a_second_and_ends_with_it(nats_url: str) -> None:
    one, two = await Side.start(nats_url, "pair-1"), await Side.start(nats_url, "pair-2")
    one.kv_router.silent = {1}
    one.kv_router.prefill, one.kv_router.active = {1: 300}, {1: 3}
    one.kv_router.blocks = {1: 20}
    pinned = {"token_ids": TOKENS, "routing": {"backend_instance_id": 1}}
    serving = asyncio.create_task(serve(one.router, pinned))
    await until(lambda: one.kv_router.sent)
    mine, theirs = await one.load(1), await two.load(1)
    async with asyncio.timeout(20):
        # What was told before the request was counted in full is not it.
        while (theirs.queued_prefill_tokens, theirs.running_requests) != (mine.queued_prefill_tokens, 2):
            await asyncio.sleep(0.01)
            mine, theirs = await one.load(1), await two.load(1)
    assert theirs.memory_used == mine.memory_used == 20 / 99
    assert theirs.fetching_bytes == mine.fetching_bytes > 0
    assert (await two.load(2)).queued_prefill_tokens == 0
    await serve(two.router)
    assert two.kv_router.sent[-1]["routing"]["backend_instance_id"] == 2

    await two.stop()
    again = await Side.start(nats_url, "pair-3")  # as after a restart
    await until(lambda: again.others._heard.get("pair-1"))
    assert (await again.load(1)).queued_prefill_tokens == theirs.queued_prefill_tokens
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    await one.stop()
    await until(lambda: not again.others._loads)
    assert (await again.load(1)).queued_prefill_tokens == 0
    await again.stop()


def test_a_router_that_is_silent_is_gone() -> None:
    one = Others("a", ENDPOINT, Counter())
    assert one.heard(RouterReport("b", ENDPOINT, [Load(1, 0, 5, 4, 3, 2, 1)], {"t": 9}), 0.0)
    assert one.heard(RouterReport("c", ENDPOINT, [Load(1, 0, 5)], {}), SILENT_SECONDS)
    assert one.added_to(Load(1, 0, 1)) == Load(1, 0, 11, 4, 3, 2, 1)
    assert one.fetching_bytes("t") == 9
    one.forget_silent(SILENT_SECONDS + 0.1)
    assert one.added_to(Load(1, 0, 1)) == Load(1, 0, 6)
    assert one.fetching_bytes("t") == 0
    assert one.heard(RouterReport("c", ENDPOINT, [Load(2, 0, 5)], {}), SILENT_SECONDS)
    assert one.added_to(Load(1, 0, 1)) == Load(1, 0, 1)
    assert list(one._loads) == [(2, 0)]  # and nothing is kept of what is over


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (RouterReport("a", ENDPOINT, [Load(1, 0, 5)], {}), None),  # in this router's own name
        (RouterReport("b", "other.backend.generate", [Load(1, 0, 5)], {}), None),
        (RouterReport("b\n", ENDPOINT, [], {}), "invalid_name"),
        (RouterReport("b", ENDPOINT, [Load(1, 0, -5)], {}), "invalid_size"),
        (RouterReport("b", ENDPOINT, [Load(1, 0, 1 << 27)], {}), "invalid_size"),
        (RouterReport("b", ENDPOINT, [Load(1, 0, fetching_bytes=1 << 46)], {}), "invalid_size"),
        (RouterReport("b", ENDPOINT, [], {"t": -1}), "invalid_size"),
        (RouterReport("b", ENDPOINT, [Load(one, 0) for one in range(others._ROWS_MAX + 1)], {}), "invalid_size"),
    ],
)
def test_what_no_router_could_say_is_not_believed(report: RouterReport, reason: str | None) -> None:
    rejected: Counter[str] = Counter()
    one = Others("a", ENDPOINT, rejected)
    assert not one.heard(report, 0.0)
    assert rejected == ({reason: 1} if reason else {})
    assert one.added_to(Load(1, 0)) == Load(1, 0)


def test_what_others_say_together_is_bounded() -> None:
    """Predictions follow it, and deadlines predictions."""
    one, most = Others("a", ENDPOINT, Counter()), Load(1, 0, 1 << 26, 1 << 26, 1 << 16, 1 << 45, 1 << 26)
    assert all(one.heard(RouterReport(name, ENDPOINT, [most], {}), 0.0) for name in "bcd")
    assert one.added_to(Load(1, 0, 5)).prefill_tokens == 5 + (1 << 20)
    assert one.added_to(Load(1, 0, 0, 5)).memory_tokens == 5 + (1 << 22)


def test_routers_are_bounded_and_make_room_when_they_are_gone() -> None:
    rejected: Counter[str] = Counter()
    one = Others("a", ENDPOINT, rejected)
    heard = [one.heard(RouterReport(f"r{number}", ENDPOINT, [], {}), 0.0) for number in range(ROUTERS_MAX + 1)]
    assert heard == [True] * ROUTERS_MAX + [False]
    assert rejected == {"too_many_routers": 1}
    assert one.heard(RouterReport("late", ENDPOINT, [], {}), SILENT_SECONDS + 1)
