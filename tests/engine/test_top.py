"""`kvtier top` on a real cluster says what the metrics say, and `kvtier try` shows hits in HBM and in the store."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from components.router.view.state import SOURCES
from graphs.trial import Trial

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

ROOT = Path(__file__).parent.parent.parent


async def test_a_stranger_sees_a_hit(trial: Trial) -> None:
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "graphs.cli", "try", "--frontend", trial.url, "--url", trial.page_url],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    titles, *lines = (line.split("  ") for line in ended.stdout.replace(",", "").splitlines())
    rows = (map(str.strip, filter(None, line)) for line in lines)
    new, again, elsewhere = (dict(zip(filter(None, titles), row, strict=True)) for row in rows)
    assert int(new["hbm"]) < int(new["computed"])
    assert int(again["hbm"]) > int(again["computed"])
    assert int(elsewhere["store"]) > int(elsewhere["computed"])


async def test_top_shows_the_cluster(trial: Trial) -> None:
    turn = await trial.say_next("How many look at this, and what do they see when they do? " * 8)
    await trial.until_stored()
    await trial.until_idle()
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "graphs.cli", "top", "--url", trial.page_url, "--once"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    counted = await trial.metrics("Router-0")
    tokens = {source: counted["kvtier_router_prompt_tokens_total", source] for source in SOURCES}
    for source, count in tokens.items():
        assert f"{source} {count / sum(tokens.values()):.0%}" in ended.stdout
    workers, targets, decisions = ended.stdout.split("\n\n")[1:]
    expected = {format(await trial.worker_id(worker), "x") for worker in trial.workers}
    assert {line.split()[0] for line in workers.splitlines()[1:]} == expected
    assert targets.splitlines()[1].startswith(trial.store_address)
    latest = decisions.splitlines()[1].split()
    assert (latest[2], latest[-1]) == (format(await trial.worker_id(turn.worker), "x"), "finished")
    assert latest[1].replace(",", "") == str(turn.answer.prompt_tokens)
