"""The router over Dynamo's own KvRouter and stock_worker.py, under churn:
`python -m tests.router.stock_churn ENDPOINT WORKERS SEED`. In a process of its own: Dynamo reads its planes from the
environment when it is imported.

Prints what is booked as it begins, and after all prompts have ended, as JSON.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from contextlib import suppress
from typing import Any

import uvloop

from components.pricing.cost import Policy, Speeds
from components.router.router import Router
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.bus.residency import Mirror
from tests.router.stock_worker import BLOCK_TOKENS, DIE, SILENT, STUCK, WAYS

PROMPTS, AT_ONCE, TOKENS = 240, 24, 200


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


async def one(router: Router, way: int, victim: int, chance: random.Random, gate: asyncio.Semaphore) -> None:
    """A prompt; half of the clients, and all that would wait for ever, leave before or after the first token."""
    request: dict[str, Any] = {
        "token_ids": [way, *chance.choices(range(1000), k=TOKENS)],
        "model": "stock",
        "stop_conditions": {},
        "sampling_options": {},
        "output_options": {},
    }
    if way == DIE:
        request["routing"] = {"backend_instance_id": victim}  # or it would kill every worker that it is tried on
    context = Context()
    leaves_after = chance.choice([None, chance.random() * 0.05])
    if way in (SILENT, STUCK) and leaves_after is None:
        leaves_after = 0.05
    async with gate:
        if leaves_after is not None:
            asyncio.get_running_loop().call_later(leaves_after, context.gone.set)
        with suppress(Exception):
            async for _ in router.generate(request, context):
                pass


async def booked(router: Router, kv_router: Any) -> dict[str, int]:
    """What the router counts, and what Dynamo's books hold beyond a prompt that is asked about."""
    loads = await kv_router.get_potential_loads([1])
    return {
        **router.booked(),
        "dynamo requests": sum(load["active_requests"] for load in loads),
        "dynamo blocks": sum(load["potential_decode_blocks"] for load in loads),
        "dynamo prefill tokens": sum(load["potential_prefill_tokens"] - 1 for load in loads),
    }


async def main(endpoint_name: str, count: int, seed: int) -> dict[str, Any]:
    from dynamo.llm import FpmEventSubscriber, KvRouter, KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="nats")
    endpoint = runtime.endpoint(endpoint_name)
    cards = FpmEventSubscriber(endpoint)
    cards.start_tracking()
    kv_router = KvRouter(endpoint, BLOCK_TOKENS, KvRouterConfig())
    async with asyncio.timeout(60):
        while len(cards.get_model_cards()) < count or len(await kv_router.get_potential_loads([1])) < count:
            await asyncio.sleep(0.1)
    workers = Workers(endpoint_name)
    workers.set_cards(cards.get_model_cards())
    speeds = LiveSpeeds(Speeds(0.01, 1e-4, 0.0, 1e10, 1e9, 0.001))
    router = Router(kv_router, workers, Mirror(), block_tokens=BLOCK_TOKENS, speeds=speeds, policy=Policy(0.5, 0.2))
    chance = random.Random(seed)
    gate = asyncio.Semaphore(AT_ONCE)
    ways = [chance.choice([way for way in WAYS if way != DIE]) for _ in range(PROMPTS)]
    ways[PROMPTS // 2] = DIE
    victim = min(workers.cards)
    tasks = [asyncio.create_task(one(router, way, victim, chance, gate)) for way in ways]
    during = Counter[str]()
    while not during["dynamo requests"]:
        await asyncio.sleep(0)
        during.update(await booked(router, kv_router))
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    after = await booked(router, kv_router)
    async with asyncio.timeout(30):  # Dynamo frees what a dropped stream had a moment later
        while any(after.values()):
            await asyncio.sleep(0.1)
            after = await booked(router, kv_router)
    outcomes = Counter(decision.outcome for decision in router.decisions.history.last())
    cards.shutdown()
    runtime.shutdown()
    return {"during": during, "after": after, "outcomes": outcomes}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))), flush=True)
