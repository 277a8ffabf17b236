"""POST /explain: what the router would do with a prompt now. Nothing is sent, counted or kept.

The body, of 1 MiB at most, is JSON with one of `prompt` (text, as /v1/completions takes it), `messages` (as
/v1/chat/completions does) and `token_ids`, and optionally `routing`, as Dynamo passes it to the router.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from components.router.failures import NoWorker, Refused
from components.router.router import Router

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What counts here of Dynamo's `routing`."""

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


def explain_handler(router: Router, model_path: str) -> Handler:
    """The model's tokenizer is loaded with the first text: most routers are never asked."""
    tokenizers: list[Any] = []
    turn = asyncio.Lock()  # a long text at a time

    def tokens_of(question: Question) -> list[int]:
        from transformers import AutoTokenizer

        if not tokenizers:
            tokenizers.append(AutoTokenizer.from_pretrained(model_path))
        if question.messages is not None:
            tokens = tokenizers[0].apply_chat_template(
                question.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:  # like the frontend, which adds no special tokens to a text
            tokens = tokenizers[0].encode(question.prompt, add_special_tokens=False)
        return list(tokens)

    async def explain(request: web.Request) -> web.Response:
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
            async with turn:
                tokens = await asyncio.to_thread(tokens_of, question)
        if not tokens:
            raise web.HTTPBadRequest(text=f"{given[0]}: no token\n")
        try:
            decision = await router.explain({"token_ids": tokens, "routing": msgspec.to_builtins(question.routing)})
        except Refused as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except NoWorker as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return web.Response(body=msgspec.json.encode(decision), content_type="application/json")

    return explain
