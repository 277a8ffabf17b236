"""The heartbeat: tells routers once a second over NATS the state of this worker's tier.

Runs an event loop on a thread of its own in the mover's process. If NATS is away, it reconnects without end and without
log lines.
"""

import asyncio
import logging
import threading
from collections.abc import Callable

from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.errors import UnavailableError

logger = logging.getLogger(__name__)


def start_reporting(nats: str, namespace: str, name: str, report: Callable[[], WorkerReport]) -> None:
    """Publish `report()` on `speed.worker.<name>` for as long as the process lives. `report` runs on a thread of this
    module's own."""
    subject = messages.subject(namespace, "speed.worker", name)
    publishing = _publish(nats, subject, report)
    threading.Thread(target=asyncio.run, args=(publishing,), name="kvtier-report", daemon=True).start()


async def _publish(nats: str, subject: str, report: Callable[[], WorkerReport]) -> None:
    line = await _connect(nats)
    while True:
        await line.publish(subject, report())
        await asyncio.sleep(messages.HEARTBEAT_SECONDS)


async def _connect(nats: str) -> Bus:
    warned = False
    while True:
        try:
            return await Bus.connect(nats, "kvtier worker")
        except UnavailableError as error:
            if not warned:
                logger.warning("routers do not see this worker's store hits yet: %s", error)
                warned = True
            await asyncio.sleep(5)
