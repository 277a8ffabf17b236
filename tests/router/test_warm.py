"""POST /warm: what a real target has of a prompt on disk is in its memory when the prompt comes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from components.router.view.access import page_access
from components.router.view.page import open_page
from components.router.view.question import Prompts, warm_handler
from components.router.warm import Warmer
from graphs.services import free_port
from kvstore.bus.connection import Bus
from kvstore.bus.messages import Residency, SnapshotPage
from kvstore.bus.residency import Mirror
from kvstore.keys import sequence_hashes
from kvstore.net.client import Item
from kvstore.net.wire import Outcome
from kvstore.tenancy import warm
from tests.conftest import MIB, RunningTarget, key, payload, soon
from tests.router.test_page import feed_of
from tests.router.test_router import BLOCK, TOKENS, KvRouter, make, until

HASHES = sequence_hashes(TOKENS, BLOCK)
CHUNKS = 8


@pytest.fixture
def target(start_target: Callable[..., RunningTarget]) -> RunningTarget:
    """Has the prompt's first chunks on disk, beside others."""
    before = start_target(buffer_bytes=16 * MIB)
    client = before.client()
    hashes = [*HASHES[:CHUNKS], *range(1, 21)]
    items = [Item(key(n), memoryview(payload(n)), router_hash, 7, 1) for n, router_hash in enumerate(hashes)]
    assert set(client.put(items, soon())) == {Outcome.STORED}
    client.close()
    before.stop()
    return start_target(buffer_bytes=16 * MIB, hot_bytes=16 * MIB)


@pytest.fixture
async def url(target: RunningTarget, nats_url: str) -> AsyncIterator[str]:
    """Of a router whose mirror knows the target's chunks, one more that it does not have, and a target that is gone."""
    mirror, line = Mirror(), await Bus.connect(nats_url, "test")
    for name, hashes in ((target.address, [*HASHES[:CHUNKS], 99]), ("10.0.0.9:7600", HASHES[CHUNKS : CHUNKS + 1])):
        mirror.apply(Residency(name, 1, 1, 0, 0, [], [], 0), time.monotonic())
        packed = b"".join(one.to_bytes(8, "little") for one in hashes)
        assert mirror.apply_snapshot([SnapshotPage(name, 1, 1, 1, 1, 7, packed)])
    task = asyncio.create_task(warm(target.target, line, "warm"))
    router = make(KvRouter([1, 26]), mirror)
    questions = {"/warm": warm_handler(Warmer(router, line, "warm"), Prompts("no model"))}
    access = page_access(f"127.0.0.1:{free_port()}")
    runner = await open_page(access, feed_of(router.decisions), questions)
    yield f"http://127.0.0.1:{access.port}/warm"
    await runner.cleanup()
    task.cancel()
    await line.close()


async def test_a_prompt_that_is_about_to_come_is_read_into_memory(target: RunningTarget, url: str) -> None:
    async with aiohttp.ClientSession() as session:

        async def post() -> dict[str, object]:
            async with session.post(url, data=json.dumps({"token_ids": TOKENS})) as reply:
                assert reply.status == 200
                return json.loads(await reply.text())

        gone = {"target": "10.0.0.9:7600", "chunks": 1, "answered": False}
        nothing = {"memory": 0, "reading": 0, "refused": 0, "absent": 0}
        here = {"target": target.address, "chunks": CHUNKS, "answered": True}
        found = await post()
        assert (found["prompt_tokens"], found["blocks"]) == (len(TOKENS), len(HASHES))
        assert found["targets"] == [{**here, **nothing, "reading": CHUNKS}, {**gone, **nothing}]
        await until(lambda: target.target.status().read_ahead["read"] == CHUNKS)
        assert (await post())["targets"] == [{**here, **nothing, "memory": CHUNKS}, {**gone, **nothing}]
        async with session.post(url, data=b'{"token_ids": []}') as reply:
            assert reply.status == 400


async def test_an_address_warms_one_prompt_at_a_time(url: str) -> None:
    async with aiohttp.ClientSession() as session:

        async def post() -> int:
            async with session.post(url, data=json.dumps({"token_ids": TOKENS})) as reply:
                return reply.status

        assert 429 in await asyncio.gather(*(post() for _ in range(8)))
        assert await post() == 200
