"""The router's web page, and the same data as JSON for tools.

GET /                                the page for operators (static/)
GET /events?worker=1a&source=store   its live data: one Update per second as server-sent events
GET /state                           totals, the last minute, workers, targets, alarms
GET /decisions?limit=20&worker=1a    the latest decisions first
GET /decisions/<id>                  one decision, with every candidate and each term of its price
POST /explain                        the decision for a prompt now (question.py)
POST /warm                           targets prefetch the chunks of an imminent prompt
GET /metrics                         Prometheus

With a token (access.py), only /metrics and the page's own files are public.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from components.router.history import KEPT
from components.router.view.access import Access, Door, is_of_another_site
from components.router.view.feed import Feed, Viewer
from components.router.view.state import SOURCES
from kvstore.errors import UnavailableError
from kvstore.net.transport import join_address
from kvstore.text import shown

LIMIT = 100
# Each viewer costs the router about 0.3 ms per second.
VIEWERS_MAX = 16
VIEWERS_OF_PEER_MAX = 8
# A viewer that does not receive an update for this long is disconnected; it may reconnect.
_SLOW_SECONDS = 20.0
# Timeouts: of a request's header, since the connection or the previous response; of its body; and of the whole request
# until its response is received. The first text to explain loads a tokenizer.
_HEAD_SECONDS, _BODY_SECONDS, _ANSWER_SECONDS = 15.0, 10.0, 60.0
_BODY_BYTES_MAX = 1 << 20
NO_QUESTIONS: Mapping[str, Handler] = {}
_STATIC = Path(__file__).parent / "static"
_LOGIN = _STATIC / "login.html"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def make_app(
    feed: Feed, access: Access, questions: Mapping[str, Handler], registry: CollectorRegistry
) -> web.Application:
    """The page's application. `questions` are handlers by path that reveal whether a prompt is cached; /metrics exports
    `registry`."""
    viewers: dict[asyncio.Task[object], str | None] = {}  # -> client address

    async def state(_: web.Request) -> web.Response:
        return _json(feed.state)

    async def several(request: web.Request) -> web.Response:
        limit = request.query.get("limit", str(LIMIT))
        if not limit.isdecimal() or not 0 < int(limit) <= KEPT:
            raise web.HTTPBadRequest(text=f"limit: {shown(limit)}: expected 1 to {KEPT}\n")
        worker = request.query.get("worker", "")
        newest = feed.history_of(worker).newest(KEPT)
        wanted = [one.id for one in newest if worker in ("", one.chosen)][: int(limit)]
        found = []
        for name in wanted:
            if (decision := feed.find(name)) is not None:
                found.append(msgspec.json.encode(decision))
            await asyncio.sleep(0)  # yield: for a large cluster, encoding all of them would block prompts
        return web.Response(body=b"[" + b",".join(found) + b"]", content_type="application/json")

    async def one(request: web.Request) -> web.Response:
        found = feed.find(request.match_info["id"])
        if found is None:
            raise web.HTTPNotFound(text=f"no decision {shown(request.match_info['id'])} among the last {KEPT}\n")
        return _json(found)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def events(request: web.Request) -> web.StreamResponse:
        source = request.query.get("source", "")
        if source not in ("", *SOURCES):
            raise web.HTTPBadRequest(text=f"source: {shown(source)}: expected one of {', '.join(SOURCES)}\n")
        if len(viewers) >= VIEWERS_MAX or list(viewers.values()).count(request.remote) >= VIEWERS_OF_PEER_MAX:
            raise web.HTTPServiceUnavailable(
                text=f"viewer limit reached: {VIEWERS_MAX} in all, {VIEWERS_OF_PEER_MAX} from one address\n"
            )
        task = asyncio.current_task()
        assert task is not None
        viewers[task] = request.remote
        try:
            return await _stream(request, Viewer(feed, request.query.get("worker", ""), source))
        finally:
            del viewers[task]

    async def _stream(request: web.Request, viewer: Viewer) -> web.StreamResponse:
        """Send updates. There is no queue: a viewer whose connection is full gets the newest data when it has room."""
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

    async def unanswered(request: web.Request) -> web.Response:
        what = request.path.removeprefix("/")
        raise web.HTTPForbidden(text=f"{what}: off without a token: start the router with --page-token-file\n")

    async def log_in(request: web.Request) -> web.Response:
        given = (await request.post()).get("token", "")
        if not isinstance(given, str) or not access.is_token(given):
            return _login_form(login)
        response = web.Response(status=303, headers={"Location": "./"})
        access.give_cookie(response)
        return response

    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if access.token is None and not access.is_own(request.host):
            raise web.HTTPMisdirectedRequest(text=f"Host: {shown(request.host)}: expected {access.host}\n")
        if request.method == "POST":
            if is_of_another_site(request):
                raise web.HTTPForbidden(text="cross-site request refused\n")
            async with asyncio.timeout(_BODY_SECONDS):
                await request.read()
        if request.path in closed or request.path.startswith("/decisions"):
            if not access.is_known(request):
                text = "expected the page's token: Authorization: Bearer TOKEN\n"
                raise web.HTTPUnauthorized(text=text, headers={"WWW-Authenticate": "Bearer"})
        elif request.path == "/" and not access.is_known(request):
            return _login_form(login)
        return await handler(request)

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Apply the timeout of a whole request, including that the client receives the response. An event stream has a
        timeout per event instead."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS) as bound:
                if request.path == "/events":
                    bound.reschedule(None)
                response = await guarded(request, handler)
                with contextlib.suppress(ConnectionError):  # the client disconnected; aiohttp handles it silently
                    await response.prepare(request)
                    await response.write_eof()
                return response
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPRequestTimeout from None

    async def secured(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-cache")

    async def leave(_: web.Application) -> None:
        for task in viewers:
            task.cancel()

    closed = {"/state", "/events", *questions}
    login = _LOGIN.read_bytes()
    app = web.Application(middlewares=[bounded], client_max_size=_BODY_BYTES_MAX)
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
    if access.token is not None:
        app.add_routes([web.post("/login", log_in)])
    app.add_routes([web.post(path, handler if access.explains else unanswered) for path, handler in questions.items()])
    return app


async def open_page(
    access: Access,
    feed: Feed,
    questions: Mapping[str, Handler] = NO_QUESTIONS,
    registry: CollectorRegistry | None = None,
) -> web.AppRunner:
    """Serve until the runner's cleanup; /metrics shows `registry`, by default the decisions' own. Raises
    UnavailableError if the address is taken."""
    app = make_app(feed, access, questions, registry or feed.decisions.registry)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=_HEAD_SECONDS, lingering_time=1.0)
    await runner.setup()
    try:
        await _Site(runner, access.host, access.port).start()
    except OSError as error:
        await runner.cleanup()
        address = join_address(access.host, access.port)
        raise UnavailableError(f"page: {address}: {error.strerror}: choose another port") from None
    return runner


class _Site(web.TCPSite):
    """A site whose connections pass the limits of `Door`."""

    async def start(self) -> None:
        server = self._runner.server
        assert server is not None
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Door(server), self._host, self._port)


def _files() -> dict[str, Path]:
    """The page's files by path; no other file is served."""
    found = {f"/{file.relative_to(_STATIC)}": file for file in _STATIC.rglob("*") if file.suffix in _TYPES}
    del found[f"/{_LOGIN.name}"]
    return {"/": found.pop("/index.html"), **found}


def _sending(file: Path) -> Handler:
    body, kind = file.read_bytes(), _TYPES[file.suffix]

    async def send(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8")

    return send


def _login_form(body: bytes) -> web.Response:
    headers = {"Cache-Control": "no-store", "WWW-Authenticate": "Bearer"}
    return web.Response(status=401, body=body, content_type="text/html", headers=headers)


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")
