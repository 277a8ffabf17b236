"""The router over Dynamo's own KvRouter and stock_worker.py, of which half hang, stop, begin nothing, slow down, or are
cut off: `python -m tests.router.stock_late ENDPOINT DISCOVERY PID...`. In a process of its own: Dynamo reads its planes
from the environment when it is imported.

Prints what became of the prompts, by fault, as JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from components.pricing.cost import Policy, Speeds
from components.router import deadlines
from components.router.deadlines import Deadlines
from components.router.failures import RequestError
from components.router.router import Router
from components.router.speeds import LiveSpeeds
from components.router.workers import Workers
from kvstore.bus.residency import Mirror
from tests.router.stock_churn import Context, booked
from tests.router.stock_worker import BLOCK_TOKENS, FINISH, HALF_DEAD, HUNG, LONG, SLOW

PROMPTS, TOKENS = 24, 200
FLOOR_SECONDS, NEXT_SECONDS = 1.0, 1.5
SPEEDS = Speeds(0.01, 1e-4, 0.0, 1e10, 1e9, 0.001)


class Wire:
    """The network between the router and a worker. Cut, it holds what is sent, and tells neither side."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.up.set()

    async def forward(self, instance: Path) -> None:
        """Stand between a worker, as `instance` tells of it, and whoever reads that later."""
        told = instance.read_text()
        address = json.loads(told)["transport"]["tcp"].split("/")[0]
        host, port = address.rsplit(":", 1)

        async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                there, back = await asyncio.open_connection(host, int(port))
                await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

        server = await asyncio.start_server(joined, "127.0.0.1", 0)
        own = server.sockets[0].getsockname()[1]
        instance.write_text(told.replace(address, f"{host}:{own}"))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self.up.wait()
            writer.write(data)
        writer.close()


async def one(router: Router, way: int, number: int, worker: int | None = None) -> tuple[float | None, list[int], str]:
    """Seconds to the first token, the tokens, and the error."""
    request: dict[str, Any] = {
        "token_ids": [way, *(number * TOKENS + token for token in range(TOKENS))],
        "model": "stock",
        "stop_conditions": {},
        "sampling_options": {},
        "output_options": {},
        "routing": {"backend_instance_id": worker},
    }
    loop = asyncio.get_running_loop()
    begun, first, tokens = loop.time(), None, []
    try:
        async for output in router.generate(request, Context()):
            first = first or loop.time() - begun
            tokens += output["token_ids"]
    except RequestError as error:
        return first, tokens, type(error).__name__
    return first, tokens, ""


def missed(router: Router) -> dict[str, float]:
    family = next(one for one in router.decisions.registry.collect() if one.name == "kvtier_router_missed_deadlines")
    return {sample.labels["deadline"]: sample.value for sample in family.samples if sample.name.endswith("_total")}


async def under(
    router: Router, fault: Callable[[], None], mend: Callable[[], None], begun_before: bool = False
) -> dict[str, Any]:
    """24 prompts while half of the workers have the fault, and whether all workers serve once it is mended. With
    `begun_before` each has begun to answer another prompt before."""
    loop = asyncio.get_running_loop()
    router._speeds = LiveSpeeds(SPEEDS)  # what the last fault taught it would keep prompts away from this one
    before = missed(router)
    running = []
    if begun_before:
        running = [asyncio.create_task(one(router, LONG, n, w)) for n, w in enumerate(router._workers.cards)]
        await asyncio.sleep(0.5)  # all have begun
    fault()
    answers = await asyncio.gather(*(one(router, FINISH, 100 + number) for number in range(PROMPTS)))
    begun = await asyncio.gather(*running)
    after = missed(router)
    mend()
    since, served = loop.time(), set[str]()
    while len(served) < len(router._workers.cards):
        if loop.time() - since > 30:
            raise TimeoutError(f"only {served} serve again")
        await asyncio.gather(*(one(router, FINISH, 1000 + number) for number in range(PROMPTS)))
        last = router.decisions.history.last(PROMPTS)
        served |= {decision.chosen for decision in last if decision.outcome == "finished"}
        await asyncio.sleep(0.1)
    return {
        "first": max(first or 99.0 for first, _, _ in answers),
        "tokens": sorted(Counter(map(str, (tokens for _, tokens, _ in answers))).items()),
        "begun": sorted(error for _, _, error in begun),
        "missed": {name: after[name] - before[name] for name in after},
    }


async def main(endpoint_name: str, discovery: Path, pids: list[int]) -> dict[str, Any]:
    from dynamo.llm import FpmEventSubscriber, KvRouter, KvRouterConfig
    from dynamo.runtime import DistributedRuntime

    async with asyncio.timeout(60):
        while len(instances := list(discovery.glob("v1/instances/*"))) < len(pids):
            await asyncio.sleep(0.1)
    wires = [Wire() for _ in range(len(pids) // 2)]
    for wire, instance in zip(wires, instances, strict=False):
        await wire.forward(instance)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="nats")
    endpoint = runtime.endpoint(endpoint_name)
    cards = FpmEventSubscriber(endpoint)
    cards.start_tracking()
    kv_router = KvRouter(endpoint, BLOCK_TOKENS, KvRouterConfig())
    async with asyncio.timeout(60):
        while len(cards.get_model_cards()) < len(pids) or len(await kv_router.get_potential_loads([1])) < len(pids):
            await asyncio.sleep(0.1)
    workers = Workers(endpoint_name)
    workers.set_cards(cards.get_model_cards())
    deadlines.SUSPECT_SECONDS = 0.5
    router = Router(
        kv_router,
        workers,
        Mirror(),
        block_tokens=BLOCK_TOKENS,
        speeds=LiveSpeeds(SPEEDS),
        policy=Policy(0.5, 0.2),
        deadlines=Deadlines(first_token_floor=FLOOR_SECONDS, next_token=NEXT_SECONDS, first_token_max=20.0),
    )

    def told(signals: signal.Signals) -> Callable[[], None]:
        return lambda: [os.kill(pid, signals) for pid in pids[: len(pids) // 2]] and None

    def cut() -> None:
        for wire in wires:
            wire.up.clear()

    def joined() -> None:
        for wire in wires:
            wire.up.set()

    mend = told(signal.SIGCONT)
    result = {
        "hung": await under(router, told(HUNG), mend),
        "hung while they answer": await under(router, told(HUNG), mend, True),
        "half dead": await under(router, told(HALF_DEAD), mend, True),
        "stopped": await under(router, told(signal.SIGSTOP), mend),
        "slow": await under(router, told(SLOW), mend),
        "partitioned": await under(router, cut, joined),
    }
    after = await booked(router, kv_router)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):  # Dynamo frees what a dropped stream had a moment later
            while any(after.values()):
                await asyncio.sleep(0.1)
                after = await booked(router, kv_router)
    cards.shutdown()
    runtime.shutdown()
    return {**result, "booked": after}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main(sys.argv[1], Path(sys.argv[2]), [int(pid) for pid in sys.argv[3:]]))), flush=True)
