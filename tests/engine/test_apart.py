"""Prefill and decode on workers of their own, on the real engine: KV from the store, and handed over by NIXL.

A cluster of its own, and so the first file by name: it is gone when the one that all others share is started.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from graphs.demo import OPENING
from graphs.services import runtime_env
from graphs.trial import BLOCK_TOKENS, CONFIG, MODEL, Trial
from kvstore.bus.plan import FIELD, make_plan

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PREFILL, DECODE = "PrefillWorker-0", "DecodeWorker-0"
TOKEN_BYTES = 4096  # of KV, in the small model
ANSWER_TOKENS = BLOCK_TOKENS + 16  # more than a chunk
# A prompt whose decode worker hangs is given up in this time.
DEADLINES = ["--Router.first-token-floor-seconds=15", "--Router.first-token-max-seconds=30"]


async def test_prefill_takes_from_the_store_and_decode_goes_on(tmp_path: Path) -> None:
    """The answers are those of one worker that does everything and has no tier."""
    cluster = Trial(
        tmp_path,
        print,
        # Until it has learnt better, a fetch has time on a busy machine.
        ["--Router.prefill-tokens-per-second=500", "--Router.local-prefill-tokens=0", *DEADLINES],
        config=CONFIG.with_name("disagg_quickstart.yaml"),
        graph="graphs.disagg_router:Frontend",
        tiered="PrefillWorker",
    )
    async with cluster as trial:
        probed = await trial.sources(DECODE)  # for as long as the prefill worker was not there
        first = await trial.say_next(OPENING, max_tokens=ANSWER_TOKENS)
        assert first.sources.computed == first.answer.prompt_tokens
        assert first.answer.equals(await trial.reference(max_tokens=ANSWER_TOKENS))
        assert await handed_over(trial) >= first.answer.prompt_tokens * TOKEN_BYTES
        assert (await trial.sources(DECODE)).computed == probed.computed
        await shown_once(trial)

        # The decode worker has stored what it computed, and nothing else.
        conversation = trial.chunk_hashes(trial.messages, answered=True)
        await trial.until(lambda: located(trial, conversation), "the store has announced the answer, too", 20)
        answered = len(conversation) - first.answer.prompt_tokens // BLOCK_TOKENS
        assert answered > 0
        assert (await trial.metrics(DECODE))["vllm:kvtier_stored_chunks_total", "stored"] == answered
        await trial.kill(PREFILL)
        decoded = await trial.sources(DECODE)
        await trial.until(lambda: trial.ask(trial.messages), "a decode worker prefills", 30)
        assert (await trial.sources(DECODE)).computed > decoded.computed
        await trial.restart(PREFILL)
        whole = first.answer.prompt_tokens // BLOCK_TOKENS

        # Without a plan the tier would take both chunks: it asks what the store has only where no plan says it.
        await trial.until(lambda: would_fetch(trial, whole), "the router knows the new worker's tier", 30)
        assert await prefill_by_plan(trial, prompt_chunks=2, planned_chunks=1) == BLOCK_TOKENS

        await trial.until(lambda: would_fetch(trial, whole - 2), "the router knows what was computed", 30)
        await trial.until(lambda: trial.ask(trial.messages[:1], max_tokens=1), "the prompt is answered again", 30)
        async with trial.http.get(f"{trial.page_url}decisions?limit=1") as reply:
            (decision,) = await reply.json()
        assert decision["prompt_tokens"] == first.answer.prompt_tokens
        assert decision["prefilled"]["fetch_chunks"] == whole - 2
        assert (await trial.sources(PREFILL)).store == (whole - 1) * BLOCK_TOKENS

        before = await handed_over(trial)
        second = await trial.say_next("And what else? " * 20)
        assert second.sources.store + second.sources.hbm >= len(conversation) * BLOCK_TOKENS  # with the first answer
        assert second.answer.equals(await trial.reference())
        assert await handed_over(trial) > before  # what the decode worker did not hold still

        trial.child(DECODE).signal(signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"in the stream|HTTP 503"):
            await trial.ask(trial.messages)
        trial.child(DECODE).signal(signal.SIGCONT)
        await trial.until(lambda: trial.ask(trial.messages), "the decode worker answers again", 30)
        third = await trial.say_next("And then?")
        assert third.answer.equals(await trial.reference())


async def located(trial: Trial, hashes: list[int]) -> bool:
    return all(trial.located(hashes))


async def shown_once(trial: Trial) -> None:
    """The last prompt, which two workers served, on the page and in the metrics."""
    prefill, decode = [format(await trial.worker_id(name), "x") for name in (PREFILL, DECODE)]
    async with trial.http.get(f"{trial.page_url}state") as reply:
        state = await reply.json()
    assert {(lane["worker"], lane["role"]) for lane in state["workers"]} == {(prefill, "prefill"), (decode, "decode")}
    async with trial.http.get(f"{trial.page_url}decisions?limit=1") as reply:
        (decision,) = await reply.json()
    assert (decision["chosen"], decision["prefilled"]["worker"]) == (decode, prefill)
    assert decision["ttft_seconds"] > decision["prefilled"]["ttft_seconds"] > 0
    async with trial.http.get(f"{trial.page_url}metrics") as reply:
        metrics = await reply.text()
    assert f'kvtier_router_decisions_total{{role="decode",worker="{decode}"}} {state["decisions"]}.0' in metrics
    assert f'kvtier_router_decisions_total{{role="prefill",worker="{prefill}"}}' in metrics


async def would_fetch(trial: Trial, chunks: int) -> bool:
    """Whether the router would fetch so many chunks of the conversation's first prompt."""
    async with trial.http.post(f"{trial.page_url}explain", json={"messages": trial.messages[:1]}) as reply:
        return bool((await reply.json())["fetch_chunks"] == chunks)


async def prefill_by_plan(trial: Trial, *, prompt_chunks: int, planned_chunks: int) -> int:
    """Send the beginning of the conversation to the prefill worker, as a router does. Returns the tokens that came from
    the store."""
    targets = [trial.store_address] * planned_chunks
    plan = make_plan(targets, fetch=planned_chunks, deadline_ms=60_000, chunk_ms=0, decision_id="test")
    length = prompt_chunks * BLOCK_TOKENS + 1
    request = {
        "model": MODEL,
        "token_ids": trial.tokens(trial.messages[:1])[:length],
        "sampling_options": {"temperature": 0.0},
        "stop_conditions": {"max_tokens": 1},
        "output_options": {},
        "extra_args": {"sampling_options": {"extra_args": {FIELD: msgspec.to_builtins(plan)}}},
    }
    worker = str(await trial.worker_id(PREFILL))
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.engine.stock_client", "dynamo.prefill.generate", worker),
        stdin=asyncio.subprocess.PIPE,
        env={**os.environ, **runtime_env(trial.deployment), "DYN_LOG": "off"},
    )
    await asyncio.wait_for(client.communicate(json.dumps(request).encode()), 60)
    assert client.returncode == 0

    async def counted() -> bool:
        return (await trial.sources(PREFILL)).total == length

    await trial.until(counted, "the worker has counted the prompt", 10)
    return (await trial.sources(PREFILL)).store


async def handed_over(trial: Trial) -> float:
    """Bytes of KV that the decode worker has taken from the prefill worker."""
    return (await trial.metrics(DECODE)).get(("vllm:nixl_bytes_transferred_sum", ""), 0.0)
