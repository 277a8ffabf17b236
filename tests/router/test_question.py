"""A prompt can be priced over HTTP and on the command line, and nothing comes of it but the answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from components.router.router import Router
from components.router.view import explain
from components.router.view.access import page_access
from components.router.view.page import open_page
from components.router.view.question import Prompts, explain_handler
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import ConfigError, UnavailableError
from tests.router.test_page import feed_of
from tests.router.test_router import TOKENS, KvRouter, make, mirror_with


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[tuple[Router, str]]:
    """A router that can be asked, and where."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    router = make(KvRouter([1, 26]), mirror_with(8))  # now: its workers' reports age
    address = f"127.0.0.1:{free_port()}"
    questions = {"/explain": explain_handler(router, Prompts(str(model)))}
    runner = await open_page(page_access(address), feed_of(router.decisions), questions)
    yield router, f"http://{address}"
    await runner.cleanup()


async def test_tokens_and_texts_are_priced(asked: tuple[Router, str]) -> None:
    router, url = asked
    async with aiohttp.ClientSession() as session:

        async def post(body: object) -> tuple[int, str]:
            async with session.post(
                url + "/explain", data=body if isinstance(body, bytes) else json.dumps(body)
            ) as reply:
                return reply.status, await reply.text()

        status, text = await post({"token_ids": TOKENS})
        found = json.loads(text)
        assert (status, found["prompt_tokens"], found["fetch_chunks"]) == (200, 40, 8)
        assert {one["worker"] for one in found["candidates"]} == {"1", "1a"}
        status, text = await post({"token_ids": TOKENS, "routing": {"allowed_worker_ids": [26]}})
        assert [one["worker"] for one in json.loads(text)["candidates"]] == ["1a"]
        assert (await post({"token_ids": TOKENS, "routing": {"allowed_worker_ids": []}}))[0] == 503
        assert json.loads((await post({"prompt": "twelve bytes"}))[1])["prompt_tokens"] == 12
        chat = json.loads((await post({"messages": [{"role": "user", "content": "twelve bytes"}]}))[1])
        assert chat["prompt_tokens"] > 12
        for body in (b"{", {"token_ids": []}, {"token_ids": [-1]}, {"token_ids": [1 << 32]}, {}, {"prompt": ""}, []):
            assert (await post(body))[0] == 400
        for body in ({"prompt": "a", "token_ids": [1]}, {"promt": "a"}, {"prompt": 5}, {"messages": [{"role": 1}]}):
            assert (await post(body))[0] == 400
        for routing in (5, {"allowed_worker_ids": 5}, {"routing_constraints": {"required_taints": 5}}, {"worker": 1}):
            assert (await post({"token_ids": TOKENS, "routing": routing}))[0] == 400
        assert (await post({"prompt": "a" * (1 << 20)}))[0] == 413
    assert router.decisions.history.last() == []


async def test_the_command_line_prices_a_prompt(
    asked: tuple[Router, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = asked
    (tmp_path / "prompt.txt").write_text("twelve bytes")
    (tmp_path / "noise").write_bytes(b"\xff\xfe\xff")

    async def shown(*argv: str) -> str:
        await asyncio.to_thread(explain.main, [*argv, "--url", url])
        return capsys.readouterr().out

    text = await shown("--tokens", ",".join(map(str, TOKENS)))
    assert text.startswith("not sent: 40 tokens would go to worker 1")
    assert "fetches 8 chunks: t:1 8" in text
    assert (await shown("--prompt", "twelve bytes")).startswith("not sent: 12 tokens")
    assert (await shown("--file", str(tmp_path / "prompt.txt"))).startswith("not sent: 12 tokens")
    assert not (await shown("--prompt", "twelve bytes", "--chat")).startswith("not sent: 12 tokens")
    for wrong in (["--tokens", "1,x"], ["--tokens", ""], ["--file", "/no/such"], ["--file", str(tmp_path / "noise")]):
        with pytest.raises(ConfigError):
            await shown(*wrong)
    with pytest.raises(ConfigError, match="no token"):
        await shown("--prompt", "")


async def test_a_router_that_cannot_be_asked_says_so(asked: tuple[Router, str]) -> None:
    router, _ = asked
    address = f"127.0.0.1:{free_port()}"
    runner = await open_page(page_access(address), feed_of(router.decisions))
    with pytest.raises(UnavailableError):
        await asyncio.to_thread(explain.main, ["--tokens", "1", "--url", f"http://{address}"])
    await runner.cleanup()
