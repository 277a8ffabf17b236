"""The router's decisions over HTTP, for people and tools: read-only, on loopback unless told otherwise.

GET /decisions?limit=20&worker=1a    the latest first
GET /decisions/<id>                  one, with every candidate and each term of its price
POST /explain                        what would be decided of a prompt (question.py)
GET /metrics                         Prometheus
"""

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from components.router.decisions import KEPT, Decisions
from components.router.question import Handler
from kvstore.errors import ConfigError, UnavailableError

LIMIT = 100


def make_app(decisions: Decisions, explain: Handler | None = None) -> web.Application:
    async def several(request: web.Request) -> web.Response:
        limit = request.query.get("limit", str(LIMIT))
        if not limit.isdecimal() or not 0 < int(limit) <= KEPT:
            raise web.HTTPBadRequest(text=f"limit: {limit}: expected 1 to {KEPT}\n")
        return _json(decisions.last(int(limit), request.query.get("worker", "")))

    async def one(request: web.Request) -> web.Response:
        found = decisions.find(request.match_info["id"])
        if found is None:
            raise web.HTTPNotFound(text=f"no decision {request.match_info['id']} among the last {KEPT}\n")
        return _json(found)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(decisions.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/decisions", several), web.get("/decisions/{id}", one), web.get("/metrics", metrics)])
    if explain is not None:
        app.add_routes([web.post("/explain", explain)])
    return app


async def open_page(address: str, decisions: Decisions, explain: Handler | None = None) -> web.AppRunner | None:
    """Serve at host:port until the runner's cleanup; None for no address.

    Raises ConfigError for an address that is none and UnavailableError if it is taken.
    """
    if not address:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError("page", address, "host:port, such as 127.0.0.1:8300")
    runner = web.AppRunner(make_app(decisions, explain), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except OSError as error:
        await runner.cleanup()
        raise UnavailableError(f"page: {address}: {error.strerror}: choose another port") from None
    return runner


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")
