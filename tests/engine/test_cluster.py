"""End to end, on the real engine. In this order: the demo first, what needs the bus gone last."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import aiohttp
import pytest

from graphs import demo
from graphs.render import health_check
from graphs.services import runtime_env
from graphs.trial import BLOCK_TOKENS, MODEL, REFERENCE, Trial

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

ROOT = Path(__file__).parent.parent.parent
AIPERF = ROOT / ".venv-aiperf" / "bin" / "aiperf"


async def test_the_demo(trial: Trial) -> None:
    report = await demo.Demo(trial).play()
    assert report.passed, demo.table(report.turns)
    assert [turn.identical for turn in report.turns] == [True] * 10
    assert report.turns[2].hbm_tokens > 0
    assert report.turns[3].dram_tokens > 0
    assert report.turns[4].worker != report.turns[3].worker
    assert sum(vars_of(report.turns[2])) > 1200


def vars_of(turn: demo.TurnReport) -> tuple[int, int, int, int]:
    return turn.hbm_tokens, turn.dram_tokens, turn.store_tokens, turn.computed_tokens


async def test_an_answer_that_ends_a_chunk_is_not_stored_half_computed(trial: Trial) -> None:
    """The last token of an answer is sampled and never computed. When it is the last of a chunk, too, stock vLLM would
    store that chunk with a stale last position; the next turn, on another worker, would read it."""
    first, second = trial.workers
    trial.messages.append({"role": "user", "content": "An answer that ends on the boundary, please. " * 8})
    probe = await trial.ask(trial.messages, max_tokens=1, worker=first)
    fills = -probe.prompt_tokens % BLOCK_TOKENS or BLOCK_TOKENS
    answer = await trial.ask(trial.messages, max_tokens=fills, worker=first)
    total = probe.prompt_tokens + len(answer.logprobs)
    assert total % BLOCK_TOKENS == 0
    trial.messages.append({"role": "assistant", "content": answer.text})
    await trial.until_stored(trial.messages[:1])
    await trial.until_idle()
    before = await trial.sources(second)
    question = {"role": "user", "content": "And what comes after that?"}
    after = await trial.ask([*trial.messages, question], worker=second)
    await trial.until_idle()
    found = await trial.sources(second) - before
    assert found.store == total - BLOCK_TOKENS
    assert after.equals(await trial.ask([*trial.messages, question], model=REFERENCE))


async def test_tenants_do_not_share_chunks(trial: Trial) -> None:
    """The same prompt under another cache salt is another prompt, to the router and to the store."""
    prompt = [{"role": "user", "content": "What is said under one salt is not known under another. " * 6}]
    first, second = trial.workers

    async def under(salt: str, worker: str) -> int:
        """Store hits of the prompt on a worker that has not seen it."""
        before = await trial.sources(worker)
        body = {
            "model": MODEL,
            "messages": prompt,
            "max_tokens": 2,
            "stream": True,
            "nvext": {
                "cache_salt": salt,
                "prefill_worker_id": await trial.worker_id(worker),
                "extra_fields": ["engine_data"],
            },
        }
        parts = [part async for part in trial.stream(body)]
        await trial.until_idle()
        found = await trial.sources(worker) - before
        (told,) = [part["nvext"]["engine_data"]["kvtier"] for part in parts if part.get("nvext")]
        assert told["tokens"] == asdict(found)  # of what the engine counts, the client hears its own part
        return found.store

    status = await trial.store_status()
    assert await under("red", first) == 0
    chunks = len(trial.chunk_hashes(prompt))

    async def stored() -> bool:
        now = await trial.store_status()
        return bool(now and status and now.entries >= status.entries + chunks)

    await trial.until(stored, "the store holds the prompt", 10)
    await asyncio.sleep(2)  # and the router has heard of it
    assert await under("blue", second) == 0
    await trial.clear(second)
    assert await under("red", second) == chunks * BLOCK_TOKENS


async def test_many_conversations_at_once_leave_the_engines_alive(trial: Trial) -> None:
    """Closed-loop multi-turn chat: what ends stock engines within seconds, since a request's last chunk is stored after
    it is forgotten."""

    async def converse(number: int) -> int:
        messages = [{"role": "user", "content": f"Conversation {number}. " + demo.OPENING[: 200 + 60 * number]}]
        for turn in range(3):
            answer = await trial.ask(messages, max_tokens=24)
            assert len(answer.text) > 0
            messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": f"And then, for the {turn}th time, what else is there to say?"})
        return len(messages)

    assert await asyncio.gather(*(converse(number) for number in range(12))) == [7] * 12
    await trial.until_idle()
    assert len(trial.workers) == 2
    await trial.say_next("After the crowd has gone, does everything still work as before? " * 4)
    assert (await trial.say_next("And once more?")).answer.equals(await trial.reference())


def movers() -> list[int]:
    """The mover processes below this one."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"components.worker.mover" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(pid)

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid in found if ours(pid)]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_a_mover_that_ends_or_hangs_costs_no_token(trial: Trial, fault: signal.Signals) -> None:
    await trial.say_next(f"Somebody carries all of this to and fro, until {fault.name}. " * 6)
    await trial.until_stored()
    await trial.until_idle()
    for worker in trial.workers:
        await trial.clear(worker)

    async def complete() -> bool:
        if len(movers()) != len(trial.workers):
            # An engine that is idle does not notice that its mover has ended; its next requests do.
            for worker in trial.workers:
                await trial.ask([{"role": "user", "content": "Are you there?"}], max_tokens=1, worker=worker)
        return len(movers()) == len(trial.workers)

    await trial.until(complete, "every worker has a mover", 60)
    carriers = movers()
    for pid in carriers:
        os.kill(pid, fault)
    for number in range(2):
        played = await trial.say_next(f"Nobody carries anything now, and this is question {number}; is it answered?")
        assert played.answer.equals(await trial.reference())
    for pid in carriers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    await trial.until_idle()
    assert (await trial.say_next("And now that there is somebody again?")).answer.equals(await trial.reference())


async def test_an_unknown_model_is_not_found(trial: Trial) -> None:
    with pytest.raises(RuntimeError, match="HTTP 404"):
        await trial.ask([{"role": "user", "content": "hello"}], model="nobody")


async def test_a_router_with_another_block_size_is_told_so(trial: Trial) -> None:
    arguments = ["--model-name", "other", "--model-path", str(trial.folder / "model"), "--block-size", "16"]
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "components.router", *arguments],
        env={**os.environ, **runtime_env(trial.deployment), "DYN_LOG": "off"},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    expected = "components.router: error: block-size: '16' given, expected 128, the block size of the workers"
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


OUTAGES = {
    # What a request may come to while the service is away and until it is back, beside being answered.
    "Store-0": set[str](),
    "Nats": set[str](),
    "VllmWorker-0": set[str](),
    "Router-0": {"HTTP 503", "HTTP 500"},
    "Frontend-0": {"refused", "HTTP 404"},
}


@pytest.mark.parametrize("name", OUTAGES)
async def test_a_service_that_is_killed_comes_back_and_no_request_hangs(trial: Trial, name: str) -> None:
    killed = trial.child(name)
    outcomes: list[str] = []

    async def ask(number: int) -> None:
        async with asyncio.timeout(30):
            try:
                await trial.ask([{"role": "user", "content": f"Question {number} while {name} is away."}], max_tokens=4)
                outcomes.append("answered")
            except RuntimeError as error:
                outcomes.append(str(error)[:8])
            except aiohttp.ClientError:
                outcomes.append("refused")

    trial.supervisor.watch()
    try:
        os.kill(killed.pid, signal.SIGKILL)
        async with asyncio.timeout(150), asyncio.TaskGroup() as asking:
            while trial.child(name) is killed or not trial.child(name).ready:
                asking.create_task(ask(len(outcomes)))
                await asyncio.sleep(0.3)
    finally:
        trial.supervisor.unwatch()
    assert set(outcomes) <= {"answered"} | OUTAGES[name], outcomes
    assert outcomes.count("HTTP 500") <= 2, outcomes  # until the supervisor has noticed

    async def served_by_all() -> bool:
        await asyncio.gather(*(ask(number) for number in range(4)))
        return outcomes[-4:] == ["answered"] * 4

    await trial.until(served_by_all, "requests are answered as before", 30)
    assert (await trial.say_next("Is it all as it was? " * 20)).answer.equals(await trial.reference())


async def test_the_containers_health_checks_find_the_cluster_well(trial: Trial) -> None:
    for child in trial.supervisor.children.values():
        if child.process.service == "Nats":
            continue  # asked by a program of its image
        check = [sys.executable, *health_check(child.process)[1:]]
        ended = await asyncio.to_thread(subprocess.run, check, timeout=60, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (child.process.name, ended.stderr)


async def test_aiperf_measures_the_cluster(trial: Trial, tmp_path: Path) -> None:
    """Dynamo's own load generator, as the README shows it, without a network."""
    if not AIPERF.exists():
        pytest.skip("AIPerf is not installed: make aiperf")
    arguments = ["--model", MODEL, "--tokenizer", str(trial.folder / "model"), "--url", trial.url]
    arguments += ["--endpoint-type", "chat", "--streaming", "--concurrency", "2"]
    arguments += ["--conversation-num", "4", "--conversation-turn-mean", "3", "--conversation-turn-stddev", "0"]
    arguments += ["--isl", "300", "--osl", "16", "--ui", "none", "--output-artifact-dir", str(tmp_path)]
    ended = await asyncio.to_thread(
        subprocess.run,
        [str(AIPERF), "profile", *arguments],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},  # nobody is there
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    measured = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == 12
    assert measured["time_to_first_token"]["avg"] > 0


async def test_without_nats_everything_serves_on(trial: Trial) -> None:
    await trial.say_next("Before the bus goes away, let us fill a few chunks with words. " * 6)
    await trial.kill("Nats")
    for number in range(2):
        played = await trial.say_next(f"The bus is gone, and this is question {number}; do you answer it?")
        assert played.answer.equals(await trial.reference())
    await trial.restart("Nats")
    await trial.until_idle()
    await trial.say_next("And now that it is back?")
    await trial.until_stored()
