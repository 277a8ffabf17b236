"""A request straight to a worker: `python -m tests.engine.stock_client ENDPOINT INSTANCE`, JSON on stdin.

A process of its own, as Dynamo's runtime reads its environment once.
"""

import asyncio
import json
import os
import sys


async def main() -> None:
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="nats")
    client = await runtime.endpoint(sys.argv[1]).client()
    await client.wait_for_instances()
    async for _ in await client.direct(json.load(sys.stdin), int(sys.argv[2])):
        pass
    os._exit(0)  # the runtime's threads crash in an interpreter that ends


if __name__ == "__main__":
    asyncio.run(main())
