"""What other routers of the same workers have sent them, which counts in this one's prices.

Each says so whenever it has changed, as sums by worker and target; once a second while it hears of no other. For one
event loop.
"""

import asyncio
import logging
import operator
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from kvstore.bus.connection import Bus
from kvstore.bus.messages import HEARTBEAT_SECONDS, Load, RouterReport, subject
from kvstore.text import is_plain

logger = logging.getLogger(__name__)

# Between two reports: shorter than a prefill. In simulation, four routers that told each other each quarter of a second
# all sent to the worker that had been idle, and had later first tokens than four that knew nothing of each other.
REPORT_SECONDS = 0.05
# A router that is silent for so long is gone, and its requests with it.
SILENT_SECONDS = 3.0
ROUTERS_MAX = 64
# More than that of all others together is not counted: deadlines follow predictions, and nobody signs these reports.
# In the order of Load: a million tokens to prefill are two minutes for a 70B model.
_AMOUNTS_MAX = 1 << 20, 1 << 22, 1 << 12, 1 << 40, 1 << 22
# And of a target: some seconds of a fast device.
_TARGET_BYTES_MAX = 1 << 36
# Absurd beyond.
TOKENS_MAX, _REQUESTS_MAX, _BYTES_MAX = 1 << 26, 1 << 16, 1 << 45
_ROWS_MAX = 1 << 15
_NAME_CHARACTERS_MAX = 64


class Others:
    """`own_name` is this router's, `endpoint` the workers'. Reports that are left out are counted in `rejected`."""

    def __init__(self, own_name: str, endpoint: str, rejected: Counter[str]):
        self.own_name, self.endpoint = own_name, endpoint
        self._rejected = rejected
        self._heard: dict[str, tuple[float, RouterReport]] = {}
        # Of all reports, kept up as they come: a decision asks for each worker, many times between two reports.
        self._loads: dict[tuple[int, int], list[int]] = {}
        self._targets: Counter[str] = Counter()

    def heard(self, report: RouterReport, now: float) -> bool:
        """Take in what a router says; False if it is not used."""
        if report.endpoint != self.endpoint or report.router == self.own_name:
            return False
        self.forget_silent(now)
        if not is_plain(report.router, _NAME_CHARACTERS_MAX):
            return self._reject("invalid_name")
        if report.router not in self._heard and len(self._heard) >= ROUTERS_MAX:
            return self._reject("too_many_routers")
        if len(report.loads) + len(report.targets) > _ROWS_MAX or not all(map(_is_plausible, report.loads)):
            return self._reject("invalid_size")
        if not all(0 <= size <= _BYTES_MAX for size in report.targets.values()):
            return self._reject("invalid_size")
        self._forget(report.router)
        self._heard[report.router] = now, report
        self._count(report, 1)
        return True

    def forget_silent(self, now: float) -> None:
        for name in [name for name, (heard, _) in self._heard.items() if now - heard > SILENT_SECONDS]:
            self._forget(name)

    async def share(self, bus: Bus, namespace: str, under_way: Callable[[], Awaitable[RouterReport]]) -> None:
        """Hear the others and tell them what this router has `under_way`; when cancelled, that it has nothing."""

        async def hear(report: RouterReport) -> None:
            self.heard(report, time.monotonic())

        await bus.subscribe(subject(namespace, "load"), RouterReport, hear)
        to = subject(namespace, "load", self.own_name)
        last, told = None, 0.0
        try:
            while True:
                self.forget_silent(time.monotonic())
                try:
                    report = await under_way()
                    if report != last or time.monotonic() - told > HEARTBEAT_SECONDS:
                        last, told = report, time.monotonic()
                        await bus.publish(to, report)
                except Exception as error:
                    logger.warning("other routers are not told what this one has sent: %r", error)
                    await asyncio.sleep(HEARTBEAT_SECONDS)
                await asyncio.sleep(REPORT_SECONDS if self._heard else HEARTBEAT_SECONDS)
        finally:
            await bus.publish(to, RouterReport(self.own_name, self.endpoint, [], {}))

    def added_to(self, own: Load) -> Load:
        """What this router has there, with what all others have."""
        if (theirs := self._loads.get((own.worker, own.dp_rank))) is None:
            return own
        bounded = map(min, theirs, _AMOUNTS_MAX)
        return Load(own.worker, own.dp_rank, *map(operator.add, _amounts(own), bounded))

    def fetching_bytes(self, target: str) -> int:
        return min(self._targets.get(target, 0), _TARGET_BYTES_MAX)

    def _forget(self, router: str) -> None:
        if (known := self._heard.pop(router, None)) is not None:
            self._count(known[1], -1)

    def _count(self, report: RouterReport, sign: int) -> None:
        for load in report.loads:
            place = load.worker, load.dp_rank
            sums = self._loads.setdefault(place, [0] * len(_AMOUNTS_MAX))
            sums[:] = [known + sign * one for known, one in zip(sums, _amounts(load), strict=True)]
            if not any(sums):
                del self._loads[place]
        for target, size in report.targets.items():
            self._targets[target] += sign * size
            if not self._targets[target]:
                del self._targets[target]

    def _reject(self, reason: str) -> bool:
        self._rejected[reason] += 1
        return False


def _amounts(load: Load) -> tuple[int, int, int, int, int]:
    return load.prefill_tokens, load.memory_tokens, load.decoding, load.fetching_bytes, load.fetching_memory_tokens


def _is_plausible(load: Load) -> bool:
    tokens = load.prefill_tokens, load.memory_tokens, load.fetching_memory_tokens
    return (
        all(0 <= one <= TOKENS_MAX for one in tokens)
        and 0 <= load.decoding <= _REQUESTS_MAX
        and 0 <= load.fetching_bytes <= _BYTES_MAX
    )
