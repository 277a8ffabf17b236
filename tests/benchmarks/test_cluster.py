"""The real router, frontend, bus and target over simulated engines; and what simulates them, by itself."""

import asyncio
import itertools
import math
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.routing.cluster import MODEL, Cluster, Counted, quantile
from benchmarks.routing.engine_model import Engines, Hardware, Job
from benchmarks.routing.sim_worker import BLOCK_TOKENS, BlockRemoved, Blocks, BlockStored
from components.router.records import Decision
from kvstore.keys import sequence_hashes

HARDWARE = Hardware(hbm_tokens=8192)
# A prefill of 7,500 tokens takes 2.5 s: time enough to end its worker before it answers.
SLOW = 2.5


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 40.0) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not {condition.__name__} after {seconds} s")


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(41, 120), k=tokens)


class Asker:
    """Asks, and looks at what is decided."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster

    async def ask(self, tokens: list[int], answer: int = 2, worker: str = "") -> int:
        """The answer's tokens; pinned to `worker`, if one is named."""
        body: dict[str, Any] = {"model": MODEL, "prompt": tokens, "max_tokens": answer, "ignore_eos": True}
        if worker:
            body["nvext"] = {"prefill_worker_id": int(worker, 16)}
        async with self.cluster.http.post(f"{self.cluster.url}/v1/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            return int((await reply.json())["usage"]["completion_tokens"])

    async def explain(self, tokens: list[int]) -> Decision:
        """What would be decided now."""
        async with self.cluster.http.post(f"{self.cluster.page_url}/explain", json={"token_ids": tokens}) as reply:
            assert reply.status == 200, await reply.text()
            return msgspec.json.decode(await reply.read(), type=Decision)

    async def found(self, tokens: list[int]) -> dict[str, dict[str, int]]:
        """By worker, where it would find the prompt's tokens."""
        return {one.worker: one.tokens for one in (await self.explain(tokens)).candidates}


def total(counted: Counted, name: str, **labels: str) -> float:
    return sum(value for (sample, having), value in counted.items() if sample == name and labels.items() <= set(having))


async def test_a_router_over_three_simulated_workers(tmp_path: Path) -> None:
    async with Cluster(tmp_path, HARDWARE, 3, slow=SLOW, processes=3) as cluster:
        asker = Asker(cluster)

        async def three_workers() -> bool:
            return len(await asker.found([50] * 20)) == 3

        await until(three_workers)

        # Prompts that come together are spread.
        prompts = [prompt(seed, 3000 + seed) for seed in range(9)]
        await asyncio.gather(*(asker.ask(tokens) for tokens in prompts))
        went = {one.prompt_tokens: one.chosen for one in await cluster.decisions()}
        where = [went[len(tokens)] for tokens in prompts]
        assert len(set(where)) == 3

        # The router sees every prompt where it was computed, in HBM or, where that was too small, in DRAM, and for the
        # others in the store.
        async def seen() -> bool:
            found = [await asker.found(tokens) for tokens in prompts]
            own = [tokens[worker] for tokens, worker in zip(found, where, strict=True)]
            elsewhere = [
                tokens["store"]
                for at, worker in zip(found, where, strict=True)
                for other, tokens in at.items()
                if other != worker
            ]
            resident = all(tokens["hbm"] + tokens["dram"] >= 2816 for tokens in own)
            return resident and min(elsewhere) >= 2816 and any(tokens["dram"] for tokens in own)

        await until(seen)

        # A second turn goes where the first one's KV is; another worker would load it from the store, and does.
        assert (await asker.explain([*prompts[8], 40, 40, *prompt(99, 30)])).chosen == where[8]
        await asker.ask(prompts[8], worker=next(worker for worker in where if worker != where[8]))
        assert total(await cluster.counted(), "simulated_prompt_tokens_total", source="store") >= 2816

        # Prompts of a worker that is killed are decided again. More of them than workers: one that was slow for a
        # while, and is thought to be so still, gets one, too.
        asked = [asyncio.create_task(asker.ask(prompt(seed, 7500), 5)) for seed in range(100, 105)]

        async def all_busy() -> bool:
            return len({one.chosen for one in await cluster.decisions() if one.prompt_tokens == 7500}) == 3

        await until(all_busy)
        await cluster.supervisor.end(cluster.supervisor.children["SimulatedWorker-0"], signal.SIGKILL)
        del cluster.worker_ports[0]
        assert await asyncio.gather(*asked) == [5] * 5
        assert total(await cluster.counted(), "kvtier_router_retries_total") >= 1

        # Whatever became of them, nothing is booked any more.
        async def nothing_booked() -> bool:
            candidates = (await asker.explain([50] * 20)).candidates
            return not any(one.queued_tokens or one.memory_used > 0.01 for one in candidates)

        await until(nothing_booked)
        assert "open" not in {one.outcome for one in await cluster.decisions()}


class Clockwork(Engines[Job]):
    """Engines whose time is made to pass."""

    def __init__(self) -> None:
        super().__init__(Hardware(), 1)
        self.time = 0.0
        self.events: list[tuple[float, Callable[[], None]]] = []
        self.ended: list[Job] = []

    @property
    def now(self) -> float:
        return self.time

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self.events.append((when, event))

    def _room(self, number: int, tokens: int) -> None:
        assert 0 <= tokens <= self.hardware.hbm_tokens

    def _began(self, job: Job) -> None:
        pass

    def _ended(self, job: Job) -> None:
        self.ended.append(job)

    def run(self, until: float) -> None:
        while due := min((one for one in self.events if one[0] <= until), key=lambda one: one[0], default=None):
            self.events.remove(due)
            self.time = due[0]
            due[1]()
        self.time = until


# In the overhead before it is queued, in the queue behind another, in its prefill, while it decodes.
@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.4, 0.8])
def test_a_job_that_is_left_leaves_nothing_behind(seconds: float) -> None:
    engines = Clockwork()
    jobs = [Job(2200, 100, 0.0), Job(2200, 100, 0.0)]
    for job in jobs:
        engines._admit(job, 0)
    engines.run(seconds)
    engines.leave(jobs[1])
    engines.run(60)
    assert engines.ended == [jobs[0]]
    worker = engines.workers[0]
    assert (worker.queued_tokens, worker.running_tokens, worker.fetching_tokens) == (0, 0, 0)
    assert (worker.requests, worker.requests_tokens) == (0, 0)
    assert (list(worker.ready), worker.running, worker.prefilling) == ([], [], None)


def test_an_answer_comes_token_by_token() -> None:
    engines = Clockwork()
    job = Job(2200, 100, 0.0)
    engines._admit(job, 0)
    seen = []
    for tick in range(300):
        engines.run(tick * 0.01)
        seen.append(engines.produced(job))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 100)
    assert all(after - before <= 1 for before, after in itertools.pairwise(seen))


def test_a_tier_tells_a_parent_before_its_child_and_drops_the_tail_first() -> None:
    told: list[BlockStored | BlockRemoved] = []
    tier = Blocks("GPU", 10 * BLOCK_TOKENS, told.append)
    first, second = prompt(1, 6 * BLOCK_TOKENS), prompt(2, 6 * BLOCK_TOKENS)
    longer = [*first, *prompt(3, 2 * BLOCK_TOKENS)]
    hashes = sequence_hashes(longer, BLOCK_TOKENS)
    tier.put(hashes[:6], first)
    tier.put(hashes, longer)
    tier.put(sequence_hashes(second, BLOCK_TOKENS), second)
    assert tier.prefix(hashes) == 4
    stored, more, other, removed = told
    assert isinstance(stored, BlockStored)
    assert isinstance(more, BlockStored)
    assert (stored.parent_block_hash, stored.token_ids) == (None, first)
    assert (more.parent_block_hash, more.token_ids) == (hashes[5], longer[6 * BLOCK_TOKENS :])
    assert isinstance(other, BlockStored)
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == hashes[:3:-1]


def test_a_quantile_lies_within_its_bucket() -> None:
    def counted(*values: float) -> Counted:
        return {
            ("s_bucket", frozenset({("le", le)})): value for le, value in zip(("1", "2", "+Inf"), values, strict=True)
        }

    assert quantile(counted(0, 0, 0), counted(10, 30, 40), "s", 0.5) == 1.5
    assert quantile(counted(10, 10, 10), counted(10, 30, 40), "s", 0.99) == 2
    assert math.isnan(quantile(counted(0, 0, 0), counted(0, 0, 0), "s", 0.5))


def test_slowed_hardware_takes_longer_for_everything() -> None:
    slowed = Hardware().slowed(3)
    assert slowed.prefill_seconds(2000, 100) == pytest.approx(3 * Hardware().prefill_seconds(2000, 100))
    assert slowed.step_seconds(20) == pytest.approx(3 * Hardware().step_seconds(20))
    assert slowed.worker_bytes_per_second == pytest.approx(Hardware().worker_bytes_per_second / 3)
