"""Prefill and decode on workers of their own, on the real engine: KV from the store, and handed over by NIXL.

A cluster of its own, and so the first file by name: it is gone when the one that all others share is started.
"""

import asyncio
from pathlib import Path

import pytest

from graphs.demo import OPENING
from graphs.trial import BLOCK_TOKENS, CONFIG, Trial

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PREFILL, DECODE = "PrefillWorker-0", "DecodeWorker-0"
TOKEN_BYTES = 4096  # of KV, in the small model


async def test_prefill_takes_from_the_store_and_decode_goes_on(tmp_path: Path) -> None:
    """The answers are those of one worker that does everything and has no tier."""
    cluster = Trial(
        tmp_path,
        print,
        config=CONFIG.with_name("disagg_quickstart.yaml"),
        graph="graphs.disagg_router:Frontend",
        tiered="PrefillWorker",
    )
    async with cluster as trial:
        first = await trial.say_next(OPENING)
        assert first.sources.computed == first.answer.prompt_tokens
        assert first.answer.equals(await trial.reference())
        assert await handed_over(trial) >= first.answer.prompt_tokens * TOKEN_BYTES
        assert (await trial.sources(DECODE)).computed == 0

        await trial.until_stored()
        await trial.kill(PREFILL)
        async with asyncio.timeout(20):
            with pytest.raises(RuntimeError, match="HTTP 50"):
                await trial.ask(trial.messages)
        await trial.restart(PREFILL)
        await trial.until(lambda: trial.ask(trial.messages[:1], max_tokens=1), "the prompt is answered again", 30)

        before = await handed_over(trial)
        second = await trial.say_next("And what else? " * 20)
        assert second.sources.store + second.sources.hbm >= first.answer.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        assert (await trial.sources(PREFILL)).store > 0
        assert second.answer.equals(await trial.reference())
        assert await handed_over(trial) > before  # what the decode worker did not hold still


async def handed_over(trial: Trial) -> float:
    """Bytes of KV that the decode worker has taken from the prefill worker."""
    return (await trial.metrics(DECODE)).get(("vllm:nixl_bytes_transferred_sum", ""), 0.0)
