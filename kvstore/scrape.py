"""A target's metrics over HTTP, without authentication: header size, duration and connections have bounds.

One response per connection, whatever the path. A thread collects the series, so the event loop is not blocked.
"""

import asyncio
from collections import Counter

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from kvstore.errors import ConfigError
from kvstore.net import transport

CONNECTIONS_MAX = 32
CONNECTIONS_OF_PEER_MAX = 8
SECONDS_MAX = 10.0  # timeout of a request's header, and of sending the response
_HEAD_BYTES_MAX = 16 << 10


class Scrapes:
    """A server of the process's metrics. For one event loop; `open` raises ConfigError if the port is taken."""

    def __init__(self) -> None:
        self._peers: Counter[str] = Counter()

    async def open(self, host: str, port: int) -> asyncio.Server:
        try:
            listener = transport.listen(transport.join_address(host, port))
            return await asyncio.start_server(self._serve, sock=listener, limit=_HEAD_BYTES_MAX)
        except OSError as error:
            raise ConfigError("metrics-port", port, f"a free port ({error})") from None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str((writer.get_extra_info("peername") or ("",))[0])
        if self._peers.total() >= CONNECTIONS_MAX or self._peers[peer] >= CONNECTIONS_OF_PEER_MAX:
            writer.transport.abort()
            return
        self._peers[peer] += 1
        try:
            async with asyncio.timeout(SECONDS_MAX):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(await _answer(head))
            writer.close()
            async with asyncio.timeout(SECONDS_MAX):
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):  # TimeoutError is an OSError
            writer.transport.abort()
        finally:
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]


async def _answer(head: bytes) -> bytes:
    method = head.partition(b" ")[0]
    if method not in (b"GET", b"HEAD"):
        return b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    body = await asyncio.to_thread(generate_latest, REGISTRY)
    fields = (
        f"Content-Type: {CONTENT_TYPE_LATEST}",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    )
    return "\r\n".join(["HTTP/1.1 200 OK", *fields, "", ""]).encode() + (body if method == b"GET" else b"")
