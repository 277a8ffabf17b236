"""Disaggregated serving: chooses a prefill worker and a decode worker, and whether a prompt needs both.

If a decode worker lacks few tokens of a prompt, it prefills them itself where that is cheaper. Any other prompt goes
through the router of the prefill workers, and then, with the result, through the router of the decode workers. While no
prefill worker answers, or all are suspect, decode workers prefill.
"""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from components.router.failures import GivenUp, Refused, RequestError
from components.router.records import Decision
from components.router.router import HANDED_OVER, Request, Router, framed
from kvstore.bus.plan import FIELD
from kvstore.text import shown

logger = logging.getLogger(__name__)

# With this annotation a stock decode worker prefills the prompt itself.
_PREFILL_HERE = "x-bypass-remote-prefill"


class Disaggregated:
    """Serves `generate` for one model. For one event loop.

    `prefill` is made with `has_fallback`, `decode` with a Handover. `local_prefill_tokens` limits what a decode worker
    prefills itself while a prefill worker answers; with 0, prefill workers do all prefill.
    """

    def __init__(self, prefill: Router, decode: Router, local_prefill_tokens: int):
        self._prefill, self._decode = prefill, decode
        self._local_prefill_tokens = local_prefill_tokens

    def handle(self, request: Request, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Dynamo's handler: like `generate`, but an error of the request is the last item of the stream."""
        return framed(self.generate(request, context), context)

    async def generate(self, request: Request, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """A preprocessed request in, the decode worker's outputs out. Raises RequestError."""
        to_decode, to_prefill = _to_decode(request), _to_prefill(request)
        prefilled: dict[str, Any] | None = None
        made: list[Decision] = []  # on the prefill worker
        if not await self._is_local(to_prefill, to_decode):
            try:
                prefilled = await self._prefilled(to_prefill, context, made.append)
            except (Refused, GivenUp):
                raise
            except RequestError as error:
                logger.warning("no prefill worker answers, a decode worker prefills: %s", shown(error))
            else:
                if prefilled is None:
                    return
                to_decode = _handed_over(to_decode, prefilled)
        known = made[0].to_decode() if made else None
        async with aclosing(self._decode.generate(to_decode, context, prefilled=known)) as outputs:
            async for output in outputs:
                yield _told_of_both(output, prefilled) if prefilled else output

    async def _is_local(self, to_prefill: Request, to_decode: Request) -> bool:
        if not self._local_prefill_tokens:
            return False
        try:
            here = await self._decode.price(to_decode)
            if here.missing_tokens > self._local_prefill_tokens:
                return False
            there = await self._prefill.price(to_prefill)
        except RequestError:
            return False  # the router that the prompt goes to raises it again
        handover = self._decode.handover_seconds(here.prompt_tokens - here.hbm_tokens)
        # The answer decodes on a decode worker in any case, and the prefill worker's price does not include that.
        return here.price_seconds - here.pressure_seconds <= there.price_seconds - there.pressure_seconds + handover

    async def _prefilled(
        self, request: Request, context: Any, finished: Callable[[Decision], None]
    ) -> dict[str, Any] | None:
        """The prefill worker's last output; None if the client disconnected."""
        prefilled = None
        async with aclosing(self._prefill.generate(request, context, finished=finished)) as outputs:
            async for output in outputs:
                prefilled = output
        return prefilled


def _to_prefill(request: Request) -> Request:
    """The request for a prefill worker, which generates one token."""
    return {**request, "stop_conditions": {**(request.get("stop_conditions") or {}), "max_tokens": 1}}


def _to_decode(request: Request) -> Request:
    """The request for a decode worker that prefills it. A client's choice of a prefill worker is removed."""
    routing = dict(request.get("routing") or {})
    for name in ("prefill_worker_id", "prefill_dp_rank", "backend_instance_id", "dp_rank"):
        routing.pop(name, None)
    for name, of_decode in (("backend_instance_id", "decode_worker_id"), ("dp_rank", "decode_dp_rank")):
        if routing.get(of_decode) is not None:
            routing[name] = routing[of_decode]
    return {**request, "routing": routing, "annotations": [*(request.get("annotations") or ()), _PREFILL_HERE]}


def _handed_over(to_decode: Request, prefilled: dict[str, Any]) -> Request:
    """The request with the prefill worker's result, in Dynamo's form. Dynamo's load accounting counts no prefill for
    it."""
    usage = prefilled.get("completion_usage") or {}
    return {
        **to_decode,
        "annotations": [one for one in to_decode["annotations"] if one != _PREFILL_HERE],
        HANDED_OVER: {
            "disaggregated_params": prefilled.get("disaggregated_params"),
            "prompt_tokens_details": usage.get("prompt_tokens_details"),
        },
        "router_config_override": {"track_prefill_tokens": False},
    }


def _told_of_both(output: dict[str, Any], prefilled: dict[str, Any]) -> dict[str, Any]:
    """A decode worker's output. If it carries the decision for the client, that shows where the prefill worker found
    the tokens, and the sum of both times."""
    of_prefill, of_decode = ((one.get("engine_data") or {}).get(FIELD) for one in (prefilled, output))
    if not of_prefill or not of_decode:
        return output
    times = {name: of_prefill[name] + of_decode[name] for name in ("predicted_ttft_seconds", "ttft_seconds")}
    return {**output, "engine_data": {**output["engine_data"], FIELD: {**of_prefill, **times}}}
