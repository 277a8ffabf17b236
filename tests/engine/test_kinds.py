"""Kinds of models on the CPU engine: an answer is the same wherever its prompt's KV came from.

One engine a kind. What it computes itself, the cold answer of a prompt that it has not seen, is what the others are
compared with; and wrong KV under right checksums must be noticed, or the comparison proves nothing.
"""

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from benchmarks.chat.__main__ import Options, last_words, until_ready
from benchmarks.chat.identity import NUMBER_BYTES, Answer, Identity, answers, from_tiers, tiny_model
from graphs.tiny_model import ALPHABET
from kvstore.errors import validated

pytestmark = pytest.mark.engine

PROMPTS = (600, 1500)
BLOCK_TOKENS = 128
# A cold prefill and one that goes on from a cache add up in another order: so far apart are their logprobs at most.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.3}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("mla", "float32"),
        ("mixed", "float32"),
        ("sliding", "float32"),
        ("hybrid", "bfloat16"),  # the CPU's kernels of GDN take nothing else
        ("mtp", "float32"),
        ("eagle", "float32"),
    ],
)
def test_answers_do_not_depend_on_where_the_kv_came_from(kind: str, dtype: str, tmp_path: Path) -> None:
    found = asyncio.run(ask_everywhere(kind, dtype, tmp_path))
    for one in found:
        print(one)
    for tokens in PROMPTS:
        cold, hbm, dram, store, forged = (one for one in found if one.prompt_tokens == tokens)
        whole = tokens // BLOCK_TOKENS * BLOCK_TOKENS
        assert (cold.from_hbm, cold.from_tiers) == (0, 0)
        if kind in ("mla", "mtp"):  # for which vLLM's CPU engine has no prefix cache in HBM: these come from DRAM, too
            assert (hbm.from_hbm, hbm.from_tiers) == (0, dram.from_tiers)
        else:
            assert hbm.from_hbm >= whole - BLOCK_TOKENS
        assert min(dram.from_tiers, store.from_tiers, forged.from_tiers) >= whole - BLOCK_TOKENS
        assert hbm.tokens[0] == cold.tokens[0]
        assert hbm.off(cold) <= ROUNDING[dtype]
        if dtype == "float32":
            assert hbm.tokens == cold.tokens
        assert hbm.equals(dram)
        assert dram.equals(store)
        assert not store.equals(forged)


async def ask_everywhere(kind: str, dtype: str, folder: Path) -> list[Answer]:
    """Each prompt cold, from HBM, from DRAM, from the store, and from a store whose chunks are wrong; by prompt."""
    model, more = tiny_model(folder / "model", kind)
    values = {
        "model": str(model),
        "dir": folder,
        "dram": 1 << 30,
        "capacity": 4 << 30,
        "block_tokens": BLOCK_TOKENS,
        "engine": f"--dtype {dtype} --enforce-eager {more}",
    }
    chance = random.Random(1)
    prompts = [chance.choices([ord(letter) for letter in ALPHABET], k=count) for count in PROMPTS]
    own = folder / "store"
    own.mkdir()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        identity = Identity(validated(Options, values), prompts, folder, session)
        with ExitStack() as serving, identity.engine("store", 1, own) as (endpoint, process):
            serving.enter_context(identity.target(own))
            try:
                await until_ready(endpoint, session, process)
            except Exception as error:
                raise AssertionError(last_words(folder / "store-1.log")) from error
            found = await answers(endpoint, session, prompts)
            found += await from_tiers(endpoint, session, prompts)
            serving.close()
            await identity.forge(own, endpoint, 1, NUMBER_BYTES[dtype])
        return found + identity.report.forged
