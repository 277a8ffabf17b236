"""Who may ask the router's page: with a token and without, on loopback and elsewhere, how long and how often."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from components.router.decisions import Decisions
from components.router.view import access as accesses
from components.router.view import explain, page
from components.router.view.access import Access, page_access
from components.router.view.page import VIEWERS_MAX, VIEWERS_OF_PEER_MAX, open_page
from graphs.services import free_port
from kvstore.errors import ConfigError, UnavailableError
from tests.router.test_page import decided, feed_of

TOKEN = "0123456789abcdef0123456789abcdef"
CLOSED = ("/state", "/events", "/decisions", "/decisions/d1")
ASKED = ("/explain", "/warm")
OPEN = ("/metrics", "/page.css", "/main.js")


async def asked(request: web.Request) -> web.Response:
    """In place of the router's answer to a prompt."""
    return web.Response(body=await request.read())


@contextlib.asynccontextmanager
async def serving(access: Access) -> AsyncIterator[str]:
    decisions = Decisions(16)
    decided(decisions, "d1")
    runner = await open_page(access, feed_of(decisions), dict.fromkeys(ASKED, asked))
    try:
        yield f"http://127.0.0.1:{access.port}"
    finally:
        await runner.cleanup()


def with_token(host: str = "127.0.0.1") -> Access:
    return page_access(f"{host}:{free_port()}", environ={accesses.VARIABLE: TOKEN})


def without_token(host: str = "127.0.0.1", names: str = "", *, is_open: bool = False) -> Access:
    return page_access(f"{host}:{free_port()}", names=names, is_open=is_open, environ={})


async def test_a_page_with_a_token_shows_data_to_those_who_bring_it() -> None:
    async with serving(with_token("0.0.0.0")) as url, aiohttp.ClientSession(url) as session:
        for headers, status in (
            ({}, 401),
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
            ({"Authorization": f"Bearer {TOKEN[:-1]}0"}, 401),
            ({"Authorization": f"Basic {TOKEN}"}, 401),
            ({"Authorization": "Bearer"}, 401),
            ({"Cookie": "kvtier-page=1"}, 401),
        ):
            for path in CLOSED:
                async with session.get(path, headers=headers) as reply:
                    assert reply.status == status, (path, headers)
            for path in ASKED:
                async with session.post(path, headers=headers, data=b"x") as reply:
                    assert reply.status == status
        for path in OPEN:
            async with session.get(path, headers={"Host": "any.example"}) as reply:
                assert reply.status == 200


async def test_a_browser_gives_the_token_once_for_a_cookie(monkeypatch: pytest.MonkeyPatch) -> None:
    access = with_token()
    jar = aiohttp.CookieJar(unsafe=True)  # which keeps those of addresses, too
    async with serving(access) as url, aiohttp.ClientSession(url, cookie_jar=jar) as session:
        async with session.get("/") as reply:
            assert (reply.status, 'action="login"' in await reply.text()) == (401, True)
        async with session.post("/login", data={"token": "not the token, but long enough"}) as reply:
            assert (reply.status, reply.cookies) == (401, {})
        async with session.post("/login", data={"token": TOKEN}, headers={"Origin": "http://evil.example"}) as reply:
            assert reply.status == 403
        async with session.post("/login", data={"token": TOKEN}, allow_redirects=False) as reply:
            cookie = reply.headers["Set-Cookie"]
            assert reply.status == 303
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        for path in ("/", *CLOSED):
            async with session.get(path) as reply:
                assert reply.status == 200, path
        (given,) = [one.value for one in jar]
        later = accesses.time.time() + accesses.COOKIE_SECONDS + 1
        issued, _, proof = given.partition(".")
        for wrong in (f"{int(issued) + 1}.{proof}", f"{issued}.{proof[:-1]}", issued, "", f"{issued}.é"):
            async with aiohttp.request("GET", f"{url}/state", headers={"Cookie": f"{access.cookie}={wrong}"}) as reply:
                assert reply.status == 401, wrong
        with monkeypatch.context() as patch:
            patch.setattr(accesses.time, "time", lambda: later)
            async with session.get("/state") as reply:
                assert reply.status == 401


async def test_off_loopback_a_page_without_a_token_is_refused_or_said_to_be_open() -> None:
    for address in ("0.0.0.0:8300", "[::]:8300", "10.0.0.1:8300", "router.example:8300"):
        with pytest.raises(ConfigError, match=r"--page-token-file FILE.*--page-open"):
            page_access(address, environ={})
    async with serving(without_token("0.0.0.0", is_open=True)) as url, aiohttp.ClientSession(url) as session:
        for host, status in (("10.0.0.1:8300", 200), ("router-0:8300", 200), ("[fd00::1]", 200), ("evil.example", 421)):
            async with session.get("/state", headers={"Host": host}) as reply:
                assert reply.status == status, host
        async with session.post("/explain", data=b"x") as reply:
            assert (reply.status, "page-token-file" in await reply.text()) == (403, True)


async def test_on_loopback_other_sites_get_nothing() -> None:
    async with serving(without_token(names="proxy.example")) as url, aiohttp.ClientSession(url) as session:
        for host, status in (("localhost", 200), ("proxy.example", 200), ("router-0", 421), ("evil.example", 421)):
            async with session.get("/state", headers={"Host": host}) as reply:
                assert reply.status == status, host
        own = url.removeprefix("http://")
        for headers, status in (
            ({}, 200),
            ({"Origin": f"http://{own}"}, 200),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 200),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
        ):
            async with session.post("/explain", headers=headers, data=b"x") as reply:
                assert reply.status == status, headers


@pytest.mark.parametrize("content", ["", "too short", f"{TOKEN} {TOKEN}", f"{TOKEN}\n{TOKEN}", "é" * 40, "a" * 5000])
def test_a_token_that_cannot_be_one_is_refused_and_not_shown(content: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="page-token-file") as caught:
        accesses.page_token(file)
    assert not content or content not in str(caught.value)
    with pytest.raises(ConfigError, match="can be read"):
        accesses.page_token(tmp_path / "none")
    file.write_text(f"{TOKEN}\n")
    assert accesses.page_token(file) == TOKEN
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="only its owner can read"):
        accesses.page_token(file)


def test_the_router_ends_with_a_sentence() -> None:
    command = [sys.executable, "-m", "components.router", "--model-name", "m", "--page", "0.0.0.0:8300"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "'0.0.0.0:8300' given, expected an address of loopback, or a token" in ended.stderr


async def test_programs_say_what_is_wanted() -> None:
    async with serving(with_token()) as url:
        assert "d1" in await explain.explained(url, token=TOKEN)
        for token, text in ((None, "the page requires a token"), (TOKEN[::-1], "the page rejects the token")):
            with pytest.raises(UnavailableError, match=text):
                await explain.explained(url, token=token)


async def until_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(15):
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass


async def test_whoever_is_slow_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not come, a body that does not, and an answer that nobody takes."""
    monkeypatch.setattr(page, "_HEAD_SECONDS", 0.5)
    monkeypatch.setattr(page, "_BODY_SECONDS", 0.5)
    monkeypatch.setattr(page, "_ANSWER_SECONDS", 1.0)
    access = without_token()
    async with serving(access):
        for sent in (
            b"",
            b"GET /state HT",
            b"POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc",
            b"GET /state HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", access.port)
            writer.write(sent)
            await until_closed(reader)
            writer.close()


async def test_an_answer_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(page, "generate_latest", lambda registry: bytes(64 << 20))
    access = without_token()
    runner = await open_page(access, feed_of(Decisions(16)))
    assert runner.server is not None
    try:
        with socket.create_connection(("127.0.0.1", access.port)) as slow:
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for wanted in (1, 0):
                async with asyncio.timeout(10):
                    while len(runner.server.connections) != wanted:
                        await asyncio.sleep(0.02)
    finally:
        await runner.cleanup()


async def test_a_peer_gets_its_share_and_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    access = without_token()
    async with serving(access) as url, contextlib.AsyncExitStack() as stack:

        async def peer(address: str) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
            return await stack.enter_async_context(aiohttp.ClientSession(url, connector=connector))

        greedy, other = await peer("127.0.0.2"), await peer("127.0.0.3")
        statuses = [(await greedy.get("/events")).status for _ in range(VIEWERS_OF_PEER_MAX + 1)]
        assert statuses == [200] * VIEWERS_OF_PEER_MAX + [503]
        assert (await other.get("/events")).status == 200
        assert VIEWERS_OF_PEER_MAX < VIEWERS_MAX

        held = [await asyncio.open_connection("127.0.0.1", access.port, local_addr=("127.0.0.4", 0)) for _ in range(40)]
        await asyncio.sleep(0.3)
        cut = [reader for reader, _ in held if reader.at_eof() or reader.exception()]
        assert len(cut) == len(held) - accesses.CONNECTIONS_OF_PEER_MAX
        async with other.get("/state") as reply:
            assert reply.status == 200
        for _, writer in held:
            writer.close()
