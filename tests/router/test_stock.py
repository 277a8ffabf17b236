"""The router in front of real Dynamo workers, without an engine: whichever way prompts end, nothing stays booked."""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from graphs.services import free_port
from graphs.tiny_model import make_tiny_model

ENDPOINT = "dynamo.backend.generate"
WORKERS = 3


def planes(nats_url: str, folder: Path) -> dict[str, str]:
    """Dynamo's, on this machine, without anything but NATS."""
    return {
        **os.environ,
        "NATS_SERVER": nats_url,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "nats",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_LOG": "off",
    }


def test_under_churn_nothing_stays_booked_here_or_in_dynamos_books(nats_url: str, tmp_path: Path, seed: int) -> None:
    """Prompts that are answered, that fail and that are left, each before and after the first token; a worker dies."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    environment = planes(nats_url, tmp_path)
    worker = [sys.executable, "-m", "tests.router.stock_worker", str(model), ENDPOINT]
    churn = [sys.executable, "-m", "tests.router.stock_churn", ENDPOINT, str(WORKERS), str(seed)]
    workers = [subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL) for _ in range(WORKERS)]
    try:
        ran = subprocess.run(churn, env=environment, capture_output=True, text=True, timeout=200)
    finally:
        for one in workers:
            one.kill()
            one.wait()
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["during"]["dynamo requests"] > 0
    assert told["during"]["dynamo blocks"] > 0
    assert not any(told["after"].values()), told["after"]
    assert set(told["outcomes"]) == {"finished", "failed", "left"}


async def test_a_router_of_prefill_workers_stands_between_the_stock_frontend_and_them(
    nats_url: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    port, page = free_port(), free_port()
    stock = ["-m", "tests.router.stock_worker", str(model)]
    options = [
        "--model-name=tiny",
        f"--model-path={model}",
        f"--nats={nats_url}",
        "--endpoint=prefills.prefill.generate",
        "--worker-type=prefill",
        f"--page=127.0.0.1:{page}",
    ]
    commands = [
        [*stock, "prefills.prefill.generate", "prefill", "hidden"],
        [*stock, "prefills.backend.generate", "decode", "tiny"],
        ["-m", "components.router", *options],
        ["-m", "dynamo.frontend", "--http-port", str(port)],
    ]
    started = [
        subprocess.Popen([sys.executable, *command], env=planes(nats_url, tmp_path), stderr=subprocess.DEVNULL)
        for command in commands
    ]
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"model": "tiny", "prompt": list(range(40, 75)), "max_tokens": 4}
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(90):
            answer: dict[str, Any] = {}
            while not answer:  # until all of them know each other
                await asyncio.sleep(0.2)
                with suppress(aiohttp.ClientError):
                    async with session.post(url, json=body) as reply:
                        if reply.status == 200:
                            answer = await reply.json()
            # The decode worker answers with how many tokens the prefill worker said it had computed: token 35 is a D.
            assert answer["choices"][0]["text"].endswith("D")
            async with session.get(f"http://127.0.0.1:{page}/decisions") as reply:
                decisions = await reply.json()
            assert (decisions[0]["prompt_tokens"], decisions[0]["outcome"]) == (35, "finished")
    finally:
        for one in started:
            one.kill()
            one.wait()
