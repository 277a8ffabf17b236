"""Load sharing between routers of the same workers: each counts the others' requests in its prices.

A router publishes its load as sums per worker and target when it changes; once a second while it knows of no other
router. For one event loop.
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

# Interval of the reports: shorter than a prefill. In simulation, four routers that reported every 0.25 s all chose the
# same idle worker, and had a higher TTFT than four routers without reports.
REPORT_SECONDS = 0.05
# After this long without a report, a router and its load are forgotten.
SILENT_SECONDS = 3.0
ROUTERS_MAX = 64
# Limits for the sum of all other routers, in the order of Load: reports are not authenticated, and deadlines depend on
# predictions. A million tokens to prefill are two minutes for a 70B model.
_AMOUNTS_MAX = 1 << 20, 1 << 22, 1 << 12, 1 << 40, 1 << 22, 1 << 8, 1 << 8
# The same for a target: some seconds of a fast device.
_TARGET_BYTES_MAX = 1 << 36
# Reports with larger values are rejected.
TOKENS_MAX, _REQUESTS_MAX, _BYTES_MAX = 1 << 26, 1 << 16, 1 << 45
_ROWS_MAX = 1 << 15
_NAME_CHARACTERS_MAX = 64


class Others:
    """Loads of the other routers. `own_name` is this router's name, `endpoint` the workers'. Counts invalid reports in
    `rejected`."""

    def __init__(self, own_name: str, endpoint: str, rejected: Counter[str]):
        self.own_name, self.endpoint = own_name, endpoint
        self._rejected = rejected
        self._heard: dict[str, tuple[float, RouterReport]] = {}
        # Sums over all reports, updated with each report, since decisions read them far more often.
        self._loads: dict[tuple[int, int], list[int]] = {}
        self._targets: Counter[str] = Counter()

    def heard(self, report: RouterReport, now: float) -> bool:
        """Apply another router's report; False if it is ignored or rejected."""
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

    async def share(self, bus: Bus, namespace: str, own_load: Callable[[], Awaitable[RouterReport]]) -> None:
        """Receive the others' reports and publish this router's `own_load`. When cancelled, publish a load of zero."""

        async def hear(report: RouterReport) -> None:
            self.heard(report, time.monotonic())

        await bus.subscribe(subject(namespace, "load"), RouterReport, hear)
        to = subject(namespace, "load", self.own_name)
        last, told = None, 0.0
        try:
            while True:
                self.forget_silent(time.monotonic())
                try:
                    report = await own_load()
                    if report != last or time.monotonic() - told > HEARTBEAT_SECONDS:
                        last, told = report, time.monotonic()
                        await bus.publish(to, report)
                except Exception as error:
                    logger.warning("cannot publish this router's load to the other routers: %r", error)
                    await asyncio.sleep(HEARTBEAT_SECONDS)
                await asyncio.sleep(REPORT_SECONDS if self._heard else HEARTBEAT_SECONDS)
        finally:
            await bus.publish(to, RouterReport(self.own_name, self.endpoint, [], {}))

    def added_to(self, own: Load) -> Load:
        """This router's load of a worker plus that of all other routers."""
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


def _amounts(load: Load) -> tuple[int, ...]:
    return (
        load.prefill_tokens,
        load.memory_tokens,
        load.decoding,
        load.fetching_bytes,
        load.fetching_memory_tokens,
        load.waiting,
        load.fetching,
    )


def _is_plausible(load: Load) -> bool:
    tokens = load.prefill_tokens, load.memory_tokens, load.fetching_memory_tokens
    return (
        all(0 <= one <= TOKENS_MAX for one in tokens)
        and all(0 <= one <= _REQUESTS_MAX for one in (load.decoding, load.waiting, load.fetching))
        and 0 <= load.fetching_bytes <= _BYTES_MAX
    )
