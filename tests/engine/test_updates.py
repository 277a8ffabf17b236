"""Dynamo's own routes that change what a worker computes with, called on stock workers over one store.

The reference worker has no tier, and is changed by the same routes. Routes are POST /engine/NAME of a worker's system
port, as Dynamo serves them.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from graphs import demo
from graphs.tiny_model import make_tiny_adapter, make_tiny_model
from graphs.trial import BLOCK_TOKENS, LOGPROB_TOLERANCE, MODEL, REFERENCE, Sources, Trial
from kvstore.bus.plan import FIELD, make_plan

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

CHUNKS, REST = 4, 40
STORED = CHUNKS * BLOCK_TOKENS
REFERENCE_WORKER = "ReferenceWorker-0"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trial(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trial]:
    """With adapters, which the cluster of the other tests does without."""
    folder = tmp_path_factory.mktemp("updates")
    overrides = ["enable-lora=true", "max-lora-rank=8", "deadline-ms=60000"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DYN_LORA_ENABLED", "true")
        environment.setenv("DYN_LORA_PATH", str(folder / "downloads"))
        async with Trial(folder, print, [*demo.OVERRIDES, *(f"--VllmWorker.{one}" for one in overrides)]) as one:
            for worker in one.workers:
                await one._until_reporting(worker)
            yield one


@dataclass
class Said:
    tokens: list[int]
    logprobs: list[float]
    sources: Sources  # of the prompt

    def equals(self, other: "Said") -> bool:
        return self.tokens == other.tokens and all(
            abs(one - two) <= LOGPROB_TOLERANCE for one, two in zip(self.logprobs, other.logprobs, strict=True)
        )


async def route(trial: Trial, worker: str, name: str, **body: Any) -> None:
    port = trial.child(worker).process.env["DYN_SYSTEM_PORT"]
    async with trial.http.post(f"http://127.0.0.1:{port}/engine/{name}", json=body) as reply:
        answer = json.loads(await reply.text())
    assert answer["status"] in ("ok", "success"), (worker, name, answer)


async def ask(trial: Trial, worker: str, prompt: list[int], model: str = "") -> Said:
    """Ask a worker itself, with a plan of a router that takes the store to have the prompt, whatever it is computed
    with. Returns when the worker has counted the prompt, and the store has its chunks."""
    plan = make_plan([trial.store_address] * CHUNKS, fetch=CHUNKS, deadline_ms=60_000, chunk_ms=0, decision_id="test")
    reference = worker == REFERENCE_WORKER
    request = {
        "model": model or (REFERENCE if reference else MODEL),
        "token_ids": prompt,
        "sampling_options": {"temperature": 0.0},
        "stop_conditions": {"max_tokens": 8, "ignore_eos": True},
        "output_options": {"logprobs": 0},
        "extra_args": {} if reference else {"sampling_options": {"extra_args": {FIELD: msgspec.to_builtins(plan)}}},
    }
    before, instance = await trial.metrics(worker), await trial.worker_id(worker)
    earlier = await trial.sources(worker)
    client = await trial.client(f"dynamo.{'reference' if reference else 'backend'}.generate")
    said = Said([], [], Sources())
    async for part in await client.direct(request, instance):
        output = part.data()
        said.tokens += output.get("token_ids") or []
        said.logprobs += output.get("log_probs") or []
    assert len(said.tokens) == len(said.logprobs) == 8

    async def counted() -> bool:
        said.sources = await trial.sources(worker) - earlier
        return said.sources.total == len(prompt)

    async def stored() -> bool:
        now, name = await trial.metrics(worker), "vllm:kvtier_stored_chunks_total"
        offered = sum(now.get((name, one), 0) - before.get((name, one), 0) for one in ("stored", "known"))
        return reference or offered >= (STORED - said.sources.store - said.sources.hbm) // BLOCK_TOKENS

    await trial.until(counted, f"{worker} has counted the prompt", 20)
    await trial.until(stored, f"{worker} has stored the prompt", 20)
    return said


async def right(trial: Trial, prompt: list[int], model: str = "") -> Said:
    """What the worker without the tier computes."""
    await trial.clear(REFERENCE_WORKER)
    return await ask(trial, REFERENCE_WORKER, prompt, model)


async def update(trial: Trial, worker: str, model: Path) -> None:
    await route(trial, worker, "pause_generation", mode="wait")
    await route(trial, worker, "update_weights_from_disk", model_path=str(model))
    await route(trial, worker, "flush_cache")
    await route(trial, worker, "resume_generation")


async def checks(trial: Trial, worker: str) -> dict[str, float]:
    counted = await trial.metrics(worker)
    return {one: counted["vllm:kvtier_identity_checks_total", one] for one in ("same", "changed", "adapter_changed")}


def prompt(number: int) -> list[int]:
    return [(number + place * place) % 90 + 5 for place in range(STORED + REST)]


async def test_weights_that_a_route_replaces(trial: Trial) -> None:
    first, second = trial.workers
    old, new = trial.folder / "model", make_tiny_model(trial.folder / "new", seed=8)
    asked = prompt(1)
    with_old = await right(trial, asked)
    computed = await ask(trial, first, asked)
    assert computed.equals(with_old)
    assert computed.sources.computed == len(asked)
    shared = await ask(trial, second, asked)  # without a change it does hit
    assert (shared.equals(with_old), shared.sources.store) == (True, STORED)

    await update(trial, REFERENCE_WORKER, new)
    with_new = await right(trial, asked)
    assert with_new.tokens != with_old.tokens
    await update(trial, first, new)
    updated = await ask(trial, first, asked)
    assert (updated.equals(with_new), updated.sources.computed) == (True, len(asked))
    assert (await checks(trial, first))["changed"] == 1
    await trial.clear(second)
    untouched = await ask(trial, second, asked)
    assert (untouched.equals(with_old), untouched.sources.store) == (True, STORED)
    assert (await checks(trial, second))["changed"] == 0
    await trial.clear(first)
    again = await ask(trial, first, asked)
    assert (again.equals(with_new), again.sources.store) == (True, STORED)
    await update(trial, second, new)
    follows = await ask(trial, second, asked)
    assert (follows.equals(with_new), follows.sources.store) == (True, STORED)

    for worker in (REFERENCE_WORKER, first, second):
        await update(trial, worker, old)
    back = await ask(trial, first, asked)
    assert (back.equals(with_old), back.sources.store) == (True, STORED)


@pytest.mark.parametrize("level", [1, 2])
async def test_a_worker_that_has_slept(trial: Trial, level: int) -> None:
    """On a CPU its ranks take no notice: vLLM's CPU worker has no memory pool to give back. What is told to the engine,
    its caches and the tier is what is told on a GPU."""
    first, _ = trial.workers
    asked = prompt(2 + level)
    expected = await right(trial, asked)
    assert (await ask(trial, first, asked)).equals(expected)
    before = await checks(trial, first)
    await route(trial, first, "control/sleep", level=level)
    await route(trial, first, "control/wake_up")
    client, instance = await trial.client("dynamo.backend.generate"), await trial.worker_id(first)

    async def registered() -> bool:
        return instance in client.instance_ids()

    await trial.until(registered, f"{first} is back", 20)
    woken = await ask(trial, first, asked)
    assert (woken.equals(expected), woken.sources.store) == (True, STORED)
    assert {name: count - before[name] for name, count in (await checks(trial, first)).items()} == {
        "same": 1,
        "changed": 0,
        "adapter_changed": 0,
    }


async def test_an_adapter_that_routes_replace(trial: Trial) -> None:
    """Under its name, at its path. Another worker goes on with what it has loaded."""
    first, second = trial.workers
    folder, asked = trial.folder / "adapter", prompt(9)

    async def load(*workers: str) -> None:
        for worker in workers:
            await route(trial, worker, "load_lora", lora_name="named", source={"uri": f"file://{folder}"})

    make_tiny_adapter(folder, trial.folder / "model", seed=1)
    await load(first, second, REFERENCE_WORKER)
    with_old = await right(trial, asked, "named")
    assert (await ask(trial, first, asked, "named")).equals(with_old)
    shared = await ask(trial, second, asked, "named")
    assert (shared.equals(with_old), shared.sources.store) == (True, STORED)

    make_tiny_adapter(folder, trial.folder / "model", seed=2)
    for worker in (first, REFERENCE_WORKER):
        await route(trial, worker, "unload_lora", lora_name="named")
        await load(worker)
        await route(trial, worker, "flush_cache")
    with_new = await right(trial, asked, "named")
    assert with_new.tokens != with_old.tokens
    replaced = await ask(trial, first, asked, "named")
    assert (replaced.equals(with_new), replaced.sources.computed) == (True, len(asked))
    assert (await checks(trial, first))["adapter_changed"] == 1
    await trial.clear(second)
    untouched = await ask(trial, second, asked, "named")
    assert (untouched.equals(with_old), untouched.sources.store) == (True, STORED)
    await trial.clear(first)
    again = await ask(trial, first, asked, "named")
    assert (again.equals(with_new), again.sources.store) == (True, STORED)
