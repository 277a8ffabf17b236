"""`kvtier try` where there is no second worker, where the router explains no text, and where nobody answers."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from components.router.records import Considered, Decision
from graphs import hit
from kvstore.errors import UnavailableError


class Cluster:
    """What `kvtier try` asks, of a router without the model's files: it explains no text."""

    def __init__(self) -> None:
        self.workers, self.status, self.asked = ["a", "b"], 200, list[dict[str, Any]]()
        app = web.Application()
        app.router.add_get("/state", self._state)
        app.router.add_get("/decisions", self._decisions)
        app.router.add_post("/v1/chat/completions", self._complete)
        self.server = TestServer(app)

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response({"model": "m"})

    async def _decisions(self, request: web.Request) -> web.Response:
        tokens = {"hbm": 0, "dram": 0, "store": 0, "computed": 1000}
        candidates = [Considered(worker, tokens, {}, {}, 0.0) for worker in self.workers]
        one = Decision("d", 1e12, 1000, self.workers[0], candidates, 0, [], 0.1)
        return web.json_response([msgspec.to_builtins(one)])

    async def _complete(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        return web.json_response({}, status=self.status)

    async def tried(self) -> list[str]:
        url = str(self.server.make_url("")).rstrip("/")
        return (await hit.tried(url, url, None)).splitlines()


@pytest_asyncio.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(hit, "_EVENTS_SECONDS", 0.01)
    monkeypatch.setattr(hit, "_STORED_SECONDS_MAX", 0.1)
    cluster = Cluster()
    await cluster.server.start_server()
    yield cluster
    await cluster.server.close()


async def test_the_last_prompt_goes_to_a_worker_that_was_not_chosen(cluster: Cluster) -> None:
    assert [line.split("  ")[0] for line in (await cluster.tried())[1:]] == [
        "new",
        "the same again",
        "the same, another worker",
    ]
    assert [one.get("nvext") for one in cluster.asked] == [None, None, {"prefill_worker_id": 0xB}]
    assert len({str(one["messages"]) for one in cluster.asked}) == 1


async def test_with_one_worker_there_is_no_hit_in_the_store_to_show(cluster: Cluster) -> None:
    cluster.workers = ["a"]
    assert len(await cluster.tried()) == 3
    assert len(cluster.asked) == 2


async def test_a_frontend_that_refuses_is_named(cluster: Cluster) -> None:
    cluster.status = 500
    with pytest.raises(UnavailableError, match=r"frontend: .*/v1/chat/completions: 500"):
        await cluster.tried()
