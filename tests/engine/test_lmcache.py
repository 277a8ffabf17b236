"""`vllm serve` behind LMCache's server, with the store as its L2, sealed: no Dynamo.

One engine computes, and its server writes. After engine, server and target were started again, another reads what its
answers would have been computed from; then the target is killed.
"""

import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache is not installed")

from benchmarks.chat.__main__ import ROOT, running
from graphs.services import free_port
from graphs.tiny_model import ALPHABET, make_tiny_model
from tests.conftest import eventually, seal_keys
from tests.engine.test_serve import KVTIER, ROUNDING, Served, serving, stored

pytestmark = pytest.mark.engine

PROMPTS = (600, 1200)
CHUNK_TOKENS = 256  # LMCache's
LMCACHE = str(Path(sys.executable).parent / "lmcache")


async def test_an_engine_behind_lmcache_reads_what_another_wrote(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=8)
    chance = random.Random(3)
    prompts = [chance.choices([ord(letter) for letter in ALPHABET], k=count) for count in PROMPTS]
    chunks = [tokens // CHUNK_TOKENS for tokens in PROMPTS]
    address = f"127.0.0.1:{free_port()}"
    settings = {"store": address, "identity": "tiny", "seal_key": str(seal_keys(tmp_path)), "seal": "encrypt"}
    (tmp_path / "store").mkdir()
    target = [*KVTIER, "store", "--dir", str(tmp_path / "store"), "--capacity", "1G", "--listen", address, "--nats", ""]

    with running(target, {}, tmp_path / "target.log"):
        async with behind_lmcache(tmp_path, model, "writes", settings) as writes:
            await writes.ready()
            written = [await writes(prompt) for prompt in prompts]
            cached = [await writes(prompt) for prompt in prompts]
            eventually(lambda: stored(address) == sum(chunks), 30)
    assert {one.from_tiers + one.from_hbm for one in written} == {0}
    assert {one.from_tiers for one in cached} == {0}

    with running(target, {}, tmp_path / "target-2.log") as store:
        async with behind_lmcache(tmp_path, model, "reads", settings) as reads:
            await reads.ready()
            eventually(lambda: stored(address) == sum(chunks), 30)
            read = [await reads(prompt) for prompt in prompts]
            assert [one.from_tiers for one in read] == [count * CHUNK_TOKENS for count in chunks]
            assert {one.from_hbm for one in read} == {0}
            store.kill()
            after = [await reads(prompt) for prompt in [*prompts, prompts[0][::-1]]]
    for one, right in zip(read + after[:-1], cached * 2, strict=True):
        assert one.tokens == right.tokens
        assert one.off(right) <= ROUNDING
    assert after[-1].from_tiers == after[-1].from_hbm == 0


@asynccontextmanager
async def behind_lmcache(folder: Path, model: Path, name: str, settings: dict[str, str]) -> AsyncIterator[Served]:
    """An engine and LMCache's server, which the engine waits for."""
    port = free_port()
    adapter = {"type": "plugin", "module_path": "components.lmcache.adapter", "class_name": "KvtierL2Adapter"}
    command = [LMCACHE, "server", "--port", str(port), "--http-port", str(free_port()), "--disable-metrics"]
    command += ["--l1-size-gb", "0.3", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    command += ["--l2-adapter", json.dumps({**adapter, "adapter_params": {**settings, "deadline_ms": 60_000}})]
    extra = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port}
    flag = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    environment = {"PYTHONPATH": str(ROOT), "LMCACHE_TRACK_USAGE": "false"}
    with running(command, environment, folder / f"lmcache-{name}.log"):
        async with serving(folder, model, name, ["--kv-transfer-config", json.dumps(flag)]) as engine:
            yield engine
