"""A target's metrics over HTTP: what Prometheus gets, and what nobody gets by being slow, large or many."""

import asyncio
import contextlib

import pytest

from graphs.services import free_port
from kvstore import scrape
from kvstore.errors import ConfigError
from kvstore.scrape import CONNECTIONS_OF_PEER_MAX, Scrapes

GET = b"GET /metrics HTTP/1.1\r\nHost: any\r\n\r\n"


async def said(port: int, sent: bytes, address: str = "127.0.0.1") -> bytes:
    """The whole answer to this; nothing if the connection is cut off."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
        with contextlib.closing(writer):
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                return await reader.read()
    return b""


async def test_metrics_are_served_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "SECONDS_MAX", 0.5)
    port = free_port()
    server = await Scrapes().open("127.0.0.1", port)
    async with server:
        head, _, body = (await said(port, GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"process_cpu_seconds_total" in body
        assert (await said(port, b"POST" + GET[3:])).startswith(b"HTTP/1.1 405")
        for slow_or_large in (b"", GET[:-2], b"GET /" + b"x" * 100_000):
            assert await said(port, slow_or_large) == b""
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS_OF_PEER_MAX)]
        await asyncio.sleep(0.1)
        assert await said(port, GET) == b""
        assert await said(port, GET, "127.0.0.2")
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert await said(port, GET)
        with pytest.raises(ConfigError, match="metrics-port"):
            await Scrapes().open("127.0.0.1", port)
