"""The router in front of real Dynamo workers, without an engine: whichever way prompts end, nothing stays booked."""

import json
import os
import subprocess
import sys
from pathlib import Path

from graphs.tiny_model import make_tiny_model

ENDPOINT = "dynamo.backend.generate"
WORKERS = 3


def test_under_churn_nothing_stays_booked_here_or_in_dynamos_books(nats_url: str, tmp_path: Path, seed: int) -> None:
    """Prompts that are answered, that fail and that are left, each before and after the first token; a worker dies."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    environment = {
        **os.environ,
        "NATS_SERVER": nats_url,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "nats",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_LOG": "off",
    }
    worker = [sys.executable, "-m", "tests.stock_worker", str(model), ENDPOINT]
    churn = [sys.executable, "-m", "tests.stock_churn", ENDPOINT, str(WORKERS), str(seed)]
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
