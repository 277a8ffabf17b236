"""HTTP requests with a prompt.

- POST /explain: the decision that the router would take now. Sends, counts and keeps nothing.
- POST /warm: targets prefetch the chunks of an imminent prompt into memory (warm.py).

The body is JSON of 1 MiB at most. It has one of `prompt` (text, as in /v1/completions), `messages` (as in
/v1/chat/completions) or `token_ids`. It may have `routing`, as Dynamo passes it to the router.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from components.router.failures import NoWorker, Refused
from components.router.router import Request, Router
from components.router.warm import Warmer

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Handler = Callable[[web.Request], Awaitable[web.Response]]

WARMS_MAX = 4


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of Dynamo's `routing` that the router uses."""

    backend_instance_id: int | None = None
    dp_rank: int | None = None
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None
    allowed_worker_ids: list[int] | None = None
    routing_constraints: dict[str, list[str]] | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class Question(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    prompt: str | None = None
    messages: Annotated[list[dict[str, str]], msgspec.Meta(min_length=1)] | None = None
    token_ids: Annotated[list[Token], msgspec.Meta(min_length=1)] | None = None
    routing: Routing = Routing()


class Prompts:
    """Reads prompts from requests. Loads the model's tokenizer with the first text, since most routers never need
    it."""

    def __init__(self, model_path: str):
        self._model_path = model_path
        self._tokenizers: list[Any] = []
        self._turn = asyncio.Lock()  # tokenizes one text at a time

    async def read(self, request: web.Request) -> Request:
        """The prompt as the frontend would send it. Raises HTTPBadRequest."""
        try:
            question = msgspec.json.decode(await request.read(), type=Question)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise web.HTTPBadRequest(text=f"body: {error}\n") from None
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(question, name) is not None]
        if len(given) != 1:
            raise web.HTTPBadRequest(
                text=f"body: {' and '.join(given) or 'none'}: expected one of prompt, messages, token_ids\n"
            )
        tokens = question.token_ids
        if tokens is None:
            async with self._turn:
                tokens = await asyncio.to_thread(self._tokens_of, question)
        if not tokens:
            raise web.HTTPBadRequest(text=f"{given[0]}: no token\n")
        return {"token_ids": tokens, "routing": msgspec.to_builtins(question.routing)}

    def _tokens_of(self, question: Question) -> list[int]:
        from transformers import AutoTokenizer

        if not self._tokenizers:
            self._tokenizers.append(AutoTokenizer.from_pretrained(self._model_path))
        if question.messages is not None:
            tokens = self._tokenizers[0].apply_chat_template(
                question.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:  # like the frontend, which adds no special tokens to a text
            tokens = self._tokenizers[0].encode(question.prompt, add_special_tokens=False)
        return list(tokens)


def explain_handler(router: Router, prompts: Prompts) -> Handler:
    async def explain(request: web.Request) -> web.Response:
        prompt = await prompts.read(request)
        try:
            decision = await router.explain(prompt)
        except Refused as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except NoWorker as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return web.Response(body=msgspec.json.encode(decision), content_type="application/json")

    return explain


def warm_handler(warmer: Warmer, prompts: Prompts) -> Handler:
    warming: list[str | None] = []  # the client addresses of running requests

    async def warm(request: web.Request) -> web.Response:
        if len(warming) >= WARMS_MAX or request.remote in warming:
            raise web.HTTPTooManyRequests(text=f"warm: {WARMS_MAX} at a time, one for each address\n")
        warming.append(request.remote)
        try:
            warmed = await warmer.warm(await prompts.read(request))
        finally:
            warming.remove(request.remote)
        return web.Response(body=msgspec.json.encode(warmed), content_type="application/json")

    return warm
