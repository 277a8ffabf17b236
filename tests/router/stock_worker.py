"""A worker of Dynamo's own API without an engine: `python -m tests.router.stock_worker MODEL ENDPOINT [ROLE] [NAME]`.

What an aggregated one does with a request is the first of its token ids, one of WAYS. A prefill worker hands something
to a decode worker, which answers what it was given. A showing one answers with what could reach the engine beside the
prompt, as JSON in the small model's tokens.

Signals make one fail as a whole: SIGUSR1 hangs it, SIGCONT mends it. With an aggregated one SIGUSR2 lets it end what it
has and begin nothing, and SIGHUP slows it tenfold. What hangs never goes on.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

# It answers; it raises before or after its first token; it never has a token, or never another one; it dies.
WAYS = FINISH, FAIL_AT_ONCE, FAIL_LATER, SILENT, STUCK, DIE = range(6)
LONG, REFUSE = 6, 7  # it answers for seconds; it refuses the request, as vLLM does
CONTEXT_TOKENS = 1000
BLOCK_TOKENS = 16
STEP_SECONDS = 0.005
HERE = "x-bypass-remote-prefill"  # on a request whose prompt a decode worker is to prefill
FAULTS = HUNG, HALF_DEAD, SLOW = signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
FOUND = {"kvtier": {"hbm": 3, "dram": 2, "store": 1}}  # what the connector says of a prompt's tokens
SHOWN = ("extra_args", "sampling_options", "kv_hint", "prefill_result")


fault: signal.Signals | None = None


def fail(as_told: signal.Signals | None) -> None:
    global fault
    fault = as_told


async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    way = request["token_ids"][0]
    if fault in (HUNG, HALF_DEAD):
        way = SILENT
    if way == DIE:
        os._exit(1)
    if way == REFUSE:
        from dynamo.llm.exceptions import HttpError

        raise HttpError(400, "a refused parameter")
    if way == FAIL_AT_ONCE:
        raise RuntimeError("it fails")
    if way == SILENT:
        await context.async_killed_or_stopped()
        return
    for number in range(400 if way == LONG else 4):
        await asyncio.sleep(STEP_SECONDS * (10 if fault == SLOW else 1))
        if fault == HUNG:
            await context.async_killed_or_stopped()
            return
        yield {"token_ids": [number]}
        if way == FAIL_LATER:
            raise RuntimeError("it fails later")
        if way == STUCK:
            await context.async_killed_or_stopped()
            return


async def prefill(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    if fault == HUNG:
        await context.async_killed_or_stopped()
        return
    handed = {"kv_transfer_params": {"computed": len(request["token_ids"]), **FOUND}}
    yield {"token_ids": [0], "finish_reason": "length", "disaggregated_params": handed}


async def decode(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    if fault == HUNG:
        await context.async_killed_or_stopped()
        return
    if HERE in request["annotations"]:
        computed = 0
    else:
        computed = request["prefill_result"]["disaggregated_params"]["kv_transfer_params"]["computed"]
    if request["token_ids"][0] == STUCK:
        yield {"token_ids": [computed]}
        await context.async_killed_or_stopped()
        return
    yield {"token_ids": [computed], "finish_reason": "length", "engine_data": {"kv_transfer_params": FOUND}}


async def show(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    if len(request["token_ids"]) == 1:
        raise ValueError("one token is too few")
    shown = json.dumps({name: request.get(name) for name in SHOWN}, separators=(",", ":"))
    yield {"token_ids": [ord(character) - ord("!") for character in shown], "finish_reason": "length"}


def main() -> None:
    from dynamo.common.token_budget import TokenBudget, publish_token_budget
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
    from dynamo.runtime import dynamo_worker

    @dynamo_worker()  # type: ignore[untyped-decorator]
    async def serve(runtime: Any) -> None:
        for told in FAULTS:
            asyncio.get_running_loop().add_signal_handler(told, fail, told)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, fail, None)
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
        if role == "aggregated":
            budget = TokenBudget(CONTEXT_TOKENS, reject_prompt_overflow=True, reject_total_overflow=True)
            publish_token_budget(config, budget)
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
