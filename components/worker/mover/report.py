"""Tells the routers, once a second over NATS, what this worker's tier looks like.

Runs an event loop on a thread of its own, in the mover's process; a NATS that is away is tried again for ever, quietly.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from kvstore.bus import messages
from kvstore.bus.messages import Bus, WorkerReport
from kvstore.errors import UnavailableError

logger = logging.getLogger(__name__)


class Reporter:
    """Publishes `report()` on `speed.worker.<name>` until `close`. `report` runs on the reporter's thread."""

    def __init__(self, nats: str, namespace: str, name: str, report: Callable[[], WorkerReport]):
        self._nats = nats
        self._subject = messages.subject(namespace, "speed.worker", name)
        self._report = report
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="kvtier-report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(3)

    def _run(self) -> None:
        self._task = self._loop.create_task(self._publish())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _publish(self) -> None:
        line = await self._connect()
        try:
            while True:
                await line.publish(self._subject, self._report())
                await asyncio.sleep(messages.HEARTBEAT_SECONDS)
        finally:
            await line.close()

    async def _connect(self) -> Bus:
        warned = False
        while True:
            try:
                return await Bus.connect(self._nats, "kvtier worker")
            except UnavailableError as error:
                if not warned:
                    logger.warning("routers do not see this worker's store hits yet: %s", error)
                    warned = True
                await asyncio.sleep(5)
