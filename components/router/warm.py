"""Warm-up: asks targets to prefetch the chunks of an imminent prompt from disk into memory."""

import asyncio

import msgspec

from components.router.router import Request, Router
from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WARM_HASHES_MAX, Warm, Warmed

# Timeout. A target walks its entries for it: one second per ten million.
_ANSWER_SECONDS = 5.0


class TargetWarmed(msgspec.Struct, frozen=True):
    """A target's result for the requested chunks: the first 4,096 of those that it holds."""

    target: str
    chunks: int  # held by the target, according to the router's mirror
    answered: bool = False  # if False, ignore the rest: the target is gone, or of an earlier release
    memory: int = 0  # chunks that were in its memory already
    reading: int = 0  # chunks that it reads now, if there is room
    refused: int = 0  # chunks that stay on disk: it has no hot cache, or the share of prefetches is used up
    absent: int = 0  # chunks that it no longer has


class Warming(msgspec.Struct, frozen=True):
    """The answer to `POST /warm`."""

    prompt_tokens: int
    blocks: int
    targets: list[TargetWarmed]


class Warmer:
    """Asks targets over the bus. For the router's event loop."""

    def __init__(self, router: Router, line: Bus, namespace: str):
        self._router = router
        self._line = line
        self._namespace = namespace

    async def warm(self, request: Request) -> Warming:
        """Warm up for `request`, which has `token_ids` and optionally `routing`. Never fails: a target that does not
        answer is marked in the result."""
        blocks, stored = self._router.stored(request)
        asked = (self._ask(target, fingerprint, chunks) for (target, fingerprint), chunks in stored.items())
        return Warming(len(request["token_ids"]), blocks, await asyncio.gather(*asked))

    async def _ask(self, target: str, fingerprint: int, chunks: list[int]) -> TargetWarmed:
        to = messages.subject(self._namespace, "warm", target)
        async with self._line.conversation(to) as peer:
            said = await peer.ask(Warm(fingerprint, chunks[:WARM_HASHES_MAX]), Warmed, _ANSWER_SECONDS)
        if said is None:
            return TargetWarmed(target, len(chunks))
        return TargetWarmed(target, len(chunks), True, said.memory, said.reading, said.refused, said.absent)
