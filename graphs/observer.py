"""What `kvtier top` shows: looks at a cluster again and again, and makes lines and rows of text of what is seen.

Follows the router's page (`--page`) as a browser does, at almost no cost for the router. Also asks the targets
that it knows by the store's own protocol, which tells whether they answer from here. It is in graphs/ because it looks
at router and targets alike.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
from pydantic import BaseModel, ConfigDict, Field

from components.router.view.access import bearer, page_token, unknown
from components.router.view.explain import explained
from components.router.view.state import SOURCES, Latency, State, Summary, Update
from kvstore import credentials
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net.membership import checked_address
from kvstore.net.wire import Status
from kvstore.text import clean, shown
from kvstore.tools import words
from kvstore.tools.stat import Look, column, take_look

EVERY_SECONDS_MIN, EVERY_SECONDS_MAX = 0.5, 60.0
_DECISIONS_KEPT = 200
_PATIENCE_SECONDS = 5.0
_RETRY_SECONDS = 1.0
# The first event brings a quarter of an hour.
_EVENT_BYTES_MAX = 8 << 20
_BAR_CELLS = 28
_SHADES = "█▓▒░"  # by source; to be told apart without colours, too

WORKERS = ("worker", "prompts", "hbm", "dram", "store", "comp", "open", "queue", "mem", "fetches at")
TARGETS = ("target", "heard", "used", "sent", "received", "hits", "misses", "evict age")
DECISIONS = ("decision", "tokens", "worker", "cached", "fetch", "predicted", "actual", "outcome")


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid")

    url: str = "http://127.0.0.1:8300"
    store: str = ""
    namespace: str = "default"
    every: float = Field(1.0, ge=EVERY_SECONDS_MIN, le=EVERY_SECONDS_MAX)
    once: bool = False
    page_token_file: Path | None = None

    def targets(self) -> list[str]:
        return [checked_address("store", address.strip()) for address in self.store.split(",") if address.strip()]


class Frame(NamedTuple):
    """What was seen at once. Without a router's answer `state` is the last one, or None, and `trouble` says why."""

    state: State | None
    decisions: Sequence[Summary]  # the latest first; some of them, where there are many a second
    look: Look
    before: Look | None
    trouble: str = ""


class Observer:
    """Looks at a cluster again and again. For one event loop."""

    def __init__(self, options: Options):
        self._options = options
        self._url = options.url.rstrip("/")
        self._token = page_token(options.page_token_file)
        self._state: State | None = None
        self._decisions: OrderedDict[str, Summary] = OrderedDict()
        self._trouble = ""
        self._heard = asyncio.Event()
        self._look: Look | None = None

    async def __aenter__(self) -> "Observer":
        timeout = aiohttp.ClientTimeout(sock_connect=_PATIENCE_SECONDS, sock_read=_PATIENCE_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=_EVENT_BYTES_MAX)
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._session.close()

    async def look(self) -> Frame:
        """The first time it waits until the router has answered, or does not."""
        await self._heard.wait()
        known = [lane.target for lane in self._state.targets] if self._state else []
        targets = list(dict.fromkeys([*known, *self._options.targets()]))
        before, self._look = self._look, Look(time.monotonic(), {})
        if targets:
            self._look = await asyncio.to_thread(take_look, targets, self._options.namespace, credentials.load(None))
        return Frame(self._state, list(reversed(self._decisions.values())), self._look, before, self._trouble)

    async def explain(self, decision_id: str) -> str:
        """A decision in full, or why there is none."""
        try:
            return await explained(self._url, decision_id, 1, token=self._token)
        except (ConfigError, UnavailableError) as error:
            return str(error)

    async def _follow(self) -> None:
        while True:
            try:
                async with self._session.get(f"{self._url}/events", headers=bearer(self._token)) as reply:
                    if reply.status == 401:
                        raise PermissionError(unknown(self._token))
                    reply.raise_for_status()
                    async for line in reply.content:
                        if line.startswith(b"data: "):
                            self._take(msgspec.convert(clean(msgspec.json.decode(line[6:])), Update))
                raise ConnectionError("it is gone")
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.DecodeError) as error:
                self._trouble = f"no router answers at {self._url} ({shown(error) or type(error).__name__})"
            self._heard.set()
            await asyncio.sleep(_RETRY_SECONDS)

    def _take(self, update: Update) -> None:
        self._state, self._trouble = update.state, ""
        if update.fresh:
            self._decisions.clear()
        for one in update.decisions:
            self._decisions[one.id] = one
        while len(self._decisions) > _DECISIONS_KEPT:
            self._decisions.popitem(last=False)
        self._heard.set()


# ---- what is shown


def headlines(frame: Frame) -> list[str]:
    """The cluster in a few lines."""
    state = frame.state
    lines = [f"! {frame.trouble}"] if frame.trouble else []
    if state is None:
        return lines
    spread = state.prediction
    right = f"{spread.p50:.2f} ({spread.p10:.2f} to {spread.p90:.2f})" if spread else "-"
    rates = "  ".join(f"{source} {state.tokens_per_second.get(source, 0):,.0f}" for source in SOURCES)
    return [
        *lines,
        f"{state.model or 'model'}: {state.decisions_per_second:.1f} prompts/s, {state.open} in flight, "
        f"{state.decisions:,} since {time.strftime('%H:%M:%S', time.localtime(state.started))}",
        f"tokens/s  {rates}",
        _bar(state.tokens),
        f"TTFT  {_latency(state.ttft)}",
        f"TPOT  {_latency(state.tpot)}",
        f"actual/predicted TTFT  {right}",
    ]


def alarm_lines(frame: Frame) -> list[str]:
    alarms = [f"! {alarm.text}" for alarm in frame.state.alarms] if frame.state else []
    silent = [(target, answer) for target, answer in frame.look.answers.items() if isinstance(answer, str)]
    return [*alarms, *(f"! Target {target} does not answer from here: {answer}." for target, answer in silent)]


def worker_rows(frame: Frame) -> list[list[str]]:
    rows = []
    for lane in frame.state.workers if frame.state else []:
        shares = _shares(lane.tokens)
        rows.append(
            [
                lane.worker,
                f"{lane.decisions:,}",
                *(f"{shares[source]:.0%}" if shares else "-" for source in SOURCES),
                str(lane.open),
                "-" if lane.queued_tokens is None else str(lane.queued_tokens),
                "-" if lane.memory_used is None else f"{lane.memory_used:.0%}",
                words.speed(lane.store_bytes_per_second) if lane.store_bytes_per_second else "-",
            ]
        )
    return rows


def target_rows(frame: Frame) -> list[list[str]]:
    heard = {lane.target: f"{lane.heard_seconds:.0f} s" for lane in frame.state.targets} if frame.state else {}
    before = frame.before
    rows = []
    for target, answer in frame.look.answers.items():
        if not isinstance(answer, Status):
            rows.append([target, heard.get(target, "-"), *["-"] * (len(TARGETS) - 2)])
            continue
        seconds = frame.look.seconds - before.seconds if before else 0.0
        shown = column(answer, before.answers.get(target) if before else None, seconds)
        names = ("sent", "received", "get hit", "get miss", "eviction age")
        used = f"{answer.payload_bytes / answer.capacity_bytes:.0%}"
        rows.append([target, heard.get(target, "-"), used, *(shown[name] or "-" for name in names)])
    return rows


def decision_row(one: Summary) -> list[str]:
    shares = _shares(one.tokens)
    return [
        one.id,
        f"{one.prompt_tokens:,}",
        one.worker,
        f"{1 - shares['computed']:.0%}" if shares else "-",
        str(one.fetch_chunks),
        _seconds(one.predicted_ttft_seconds),
        _seconds(one.ttft_seconds),
        one.outcome,
    ]


def _shares(tokens: Mapping[str, int]) -> dict[str, float]:
    """By source; nothing if there are no tokens."""
    total = sum(tokens.values())
    return {source: tokens.get(source, 0) / total for source in SOURCES} if total else {}


def _bar(tokens: Mapping[str, int]) -> str:
    """All tokens so far by source, as a bar and its legend."""
    shares = _shares(tokens)
    if not shares:
        return "no prompt yet: send one to the frontend (kvtier try)"
    ends = [round(_BAR_CELLS * end) for end in accumulate(shares.values())]
    cells = "".join(shade * (end - start) for shade, start, end in zip(_SHADES, [0, *ends], ends, strict=False))
    legend = "  ".join(f"{shade} {source} {shares[source]:.0%}" for shade, source in zip(_SHADES, SOURCES, strict=True))
    return f"{cells}  {legend}"


def _latency(latency: Latency) -> str:
    found = (("store", latency.store), ("no store", latency.other))
    return "   ".join(
        f"{name} {_seconds(one.p50)} (p95 {_seconds(one.p95)})" if one else f"{name} -" for name, one in found
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
