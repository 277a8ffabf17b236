"""A worker of Dynamo's own API without an engine: `python -m tests.router.stock_worker MODEL ENDPOINT [ROLE] [NAME]`.

What an aggregated one does with a request is the first of its token ids, one of WAYS. A prefill worker hands something
to a decode worker, which answers what it was given. A showing one answers with what could reach the engine beside the
prompt, as JSON in the small model's tokens.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

# It answers; it raises before or after its first token; it never has a token, or never another one; it dies.
WAYS = FINISH, FAIL_AT_ONCE, FAIL_LATER, SILENT, STUCK, DIE = range(6)
BLOCK_TOKENS = 16
SHOWN = ("extra_args", "sampling_options", "kv_hint", "prefill_result")


async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    way = request["token_ids"][0]
    if way == DIE:
        os._exit(1)
    if way == FAIL_AT_ONCE:
        raise RuntimeError("it fails")
    if way == SILENT:
        await context.async_killed_or_stopped()
        return
    for number in range(4):
        yield {"token_ids": [number]}
        if way == FAIL_LATER:
            raise RuntimeError("it fails later")
        if way == STUCK:
            await context.async_killed_or_stopped()
            return
        await asyncio.sleep(0.005)


async def prefill(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    handed = {"kv_transfer_params": {"computed": len(request["token_ids"])}}
    yield {"token_ids": [0], "finish_reason": "length", "disaggregated_params": handed}


async def decode(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    computed = request["prefill_result"]["disaggregated_params"]["kv_transfer_params"]["computed"]
    yield {"token_ids": [computed], "finish_reason": "length"}


async def show(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    if len(request["token_ids"]) == 1:
        raise ValueError("one token is too few")
    shown = json.dumps({name: request.get(name) for name in SHOWN}, separators=(",", ":"))
    yield {"token_ids": [ord(character) - ord("!") for character in shown], "finish_reason": "length"}


def main() -> None:
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
    from dynamo.runtime import dynamo_worker

    @dynamo_worker()  # type: ignore[untyped-decorator]
    async def serve(runtime: Any) -> None:
        endpoint = runtime.endpoint(sys.argv[2])
        role, name = [*sys.argv[3:], *("aggregated", "stock")[len(sys.argv) - 3 :]]
        surface, worker_type, needs, handler = {
            "aggregated": (ModelType.Chat, WorkerType.Aggregated, None, generate),
            "showing": (ModelType.Chat, WorkerType.Aggregated, None, show),
            "prefill": (ModelType.Prefill, WorkerType.Prefill, [[WorkerType.Decode]], prefill),
            "decode": (ModelType.Completions, WorkerType.Decode, [[WorkerType.Prefill]], decode),
        }[role]
        config = ModelRuntimeConfig()
        config.total_kv_blocks = 1000
        await register_model(
            ModelInput.Tokens,
            surface,
            endpoint,
            sys.argv[1],
            name,
            kv_cache_block_size=BLOCK_TOKENS,
            runtime_config=config,
            worker_type=worker_type,
            needs=needs,
        )
        await endpoint.serve_endpoint(handler)

    uvloop.run(serve())


if __name__ == "__main__":
    main()
