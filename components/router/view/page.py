"""The router's page, and the same as JSON for tools: read-only, on loopback unless told otherwise.

GET /                                what an operator looks at (static/)
GET /events?worker=1a&source=store   its live data, an Update a second as server-sent events
GET /state                           totals, the last minute, workers, targets, alarms
GET /decisions?limit=20&worker=1a    the latest first
GET /decisions/<id>                  one, with every candidate and each term of its price
POST /explain                        what would be decided of a prompt (question.py)
GET /metrics                         Prometheus
"""

import asyncio
import ipaddress
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from components.router.decisions import KEPT
from components.router.view.feed import Feed, Viewer
from components.router.view.state import SOURCES
from kvstore.errors import ConfigError, UnavailableError

LIMIT = 100
# More would cost the router more than looking is worth: an update takes it some 0.3 ms a viewer and second.
VIEWERS_MAX = 16
# One who does not take an update for so long is let go, and may come back.
_SLOW_SECONDS = 20.0
_STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(feed: Feed, host: str = "127.0.0.1", explain: Handler | None = None) -> web.Application:
    """Without a check of the Host header where `host` is not loopback: whoever binds it elsewhere shows it to all."""
    viewers: set[asyncio.Task[object]] = set()

    async def state(_: web.Request) -> web.Response:
        return _json(feed.state)

    async def several(request: web.Request) -> web.Response:
        limit = request.query.get("limit", str(LIMIT))
        if not limit.isdecimal() or not 0 < int(limit) <= KEPT:
            raise web.HTTPBadRequest(text=f"limit: {limit}: expected 1 to {KEPT}\n")
        worker = request.query.get("worker", "")
        wanted = [one.id for one in feed.decisions.newest(KEPT) if worker in ("", one.chosen)][: int(limit)]
        found = []
        for name in wanted:
            if (decision := feed.find(name)) is not None:
                found.append(msgspec.json.encode(decision))
            await asyncio.sleep(0)  # all at once, those of a large cluster would hold up prompts
        return web.Response(body=b"[" + b",".join(found) + b"]", content_type="application/json")

    async def one(request: web.Request) -> web.Response:
        found = feed.find(request.match_info["id"])
        if found is None:
            raise web.HTTPNotFound(text=f"no decision {request.match_info['id']} among the last {KEPT}\n")
        return _json(found)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(feed.decisions.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def events(request: web.Request) -> web.StreamResponse:
        source = request.query.get("source", "")
        if source not in ("", *SOURCES):
            raise web.HTTPBadRequest(text=f"source: {source}: expected one of {', '.join(SOURCES)}\n")
        if len(viewers) >= VIEWERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{VIEWERS_MAX} look already; close one\n")
        task = asyncio.current_task()
        assert task is not None
        viewers.add(task)
        try:
            return await _stream(request, Viewer(feed, request.query.get("worker", ""), source))
        finally:
            viewers.discard(task)

    async def _stream(request: web.Request, viewer: Viewer) -> web.StreamResponse:
        """Nothing is queued: a viewer whose connection is full gets what is new when it has room again."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        try:
            await response.write(b"retry: 1000\n\n")
            while True:
                async with asyncio.timeout(_SLOW_SECONDS):
                    await response.write(b"data: " + msgspec.json.encode(viewer.update()) + b"\n\n")
                await feed.next_tick()
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        return response

    @web.middleware
    async def checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        # A site whose name was made to point here must not read it from somebody's browser.
        if _is_loopback(host) and not _is_loopback(request.host):
            raise web.HTTPMisdirectedRequest(text=f"Host: {request.host}: expected {host}\n")
        return await handler(request)

    async def secured(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-cache")

    async def leave(_: web.Application) -> None:
        for task in viewers:
            task.cancel()

    app = web.Application(middlewares=[checked])
    app.on_response_prepare.append(secured)
    app.on_shutdown.append(leave)
    app.add_routes(
        [
            web.get("/state", state),
            web.get("/events", events),
            web.get("/decisions", several),
            web.get("/decisions/{id}", one),
            web.get("/metrics", metrics),
            *(web.get(path, _sending(file)) for path, file in _files().items()),
        ]
    )
    if explain is not None:
        app.add_routes([web.post("/explain", explain)])
    return app


async def open_page(address: str, feed: Feed, explain: Handler | None = None) -> web.AppRunner | None:
    """Serve at host:port until the runner's cleanup; None for no address.

    Raises ConfigError for an address that is none and UnavailableError if it is taken.
    """
    if not address:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError("page", address, "host:port, such as 127.0.0.1:8300")
    runner = web.AppRunner(make_app(feed, host, explain), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except OSError as error:
        await runner.cleanup()
        raise UnavailableError(f"page: {address}: {error.strerror}: choose another port") from None
    return runner


def _files() -> dict[str, Path]:
    """The page's files by path; nothing else can be asked for."""
    found = {f"/{file.relative_to(_STATIC)}": file for file in _STATIC.rglob("*") if file.suffix in _TYPES}
    return {"/": found.pop("/index.html"), **found}


def _sending(file: Path) -> Handler:
    body, kind = file.read_bytes(), _TYPES[file.suffix]

    async def send(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8")

    return send


def _is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine's own."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.strip("[]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")
