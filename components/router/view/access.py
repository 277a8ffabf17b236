"""Access control of the router's page: a token, allowed host names, connection limits.

Without a token, everyone who can reach the page may read it: this machine's users on loopback or, with `--page-open`, a
closed network. The Host header is checked then, against DNS rebinding. With a token, programs send it as a bearer
token; a browser sends it once in a form and gets a cookie.
"""

import asyncio
import hmac
import ipaddress
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from aiohttp import web

from kvstore import credentials, private
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.net import transport
from kvstore.net.transport import split_address

VARIABLE = "KVTIER_PAGE_TOKEN"
TOKEN_HELP = f"file with the token of the router's page; default: the variable {VARIABLE}, if set"
# TTL of a cookie: a working day. A new token invalidates all cookies.
COOKIE_SECONDS = 12 * 3600
CONNECTIONS_MAX = 128
# A browser opens six connections, and an event stream per tab.
CONNECTIONS_OF_PEER_MAX = 32


@dataclass(frozen=True)
class Access:
    """The access rules of a page."""

    host: str = "127.0.0.1"
    port: int = 0
    token: Credential | None = None
    names: frozenset[str] = frozenset()  # further allowed host names, in lower case

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    @property
    def explains(self) -> bool:
        """Whether the page reveals which prompts are cached: only on loopback or with a token."""
        return self.is_local or self.token is not None

    @property
    def cookie(self) -> str:
        """The cookie's name. It contains the port, because all ports of a host share their cookies."""
        return f"kvtier-page-{self.port}"

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this page, and not a foreign DNS name that points here."""
        name = _name_of(host)
        if name in self.names or is_loopback(name):
            return True
        return not self.is_local and (_is_address(name) or "." not in name)

    def is_known(self, request: web.Request) -> bool:
        """Whether the request has the token, or a valid cookie for it."""
        if self.token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_token(given)
        issued, _, proof = request.cookies.get(self.cookie, "").partition(".")
        if not (issued.isascii() and issued.isdigit() and len(issued) <= 12):
            return False
        return (
            hmac.compare_digest(self._proof(issued), proof.encode())
            and 0 <= time.time() - int(issued) <= COOKIE_SECONDS
        )

    def is_token(self, given: str) -> bool:
        """Whether this is the token; in constant time for its length."""
        try:
            return self.token == Credential(given.strip().encode())
        except ValueError:
            return False

    def give_cookie(self, response: web.StreamResponse) -> None:
        issued = str(int(time.time()))
        response.set_cookie(
            self.cookie,
            f"{issued}.{self._proof(issued).decode()}",
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="Strict",
        )

    def _proof(self, issued: str) -> bytes:
        assert self.token is not None
        return self.token.sign([b"kvtier page", issued.encode()]).hex().encode()


def checked_url(field: str, url: str) -> str:
    """The URL of a page or a frontend. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        valid = False
    if not valid:
        raise ConfigError(field, url, "a URL such as http://127.0.0.1:8300")
    return url.rstrip("/")


def page_access(
    page: str,
    token_file: Path | None = None,
    names: str = "",
    *,
    is_open: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Access:
    """The access rules for a page at host:port. Raises ConfigError for an invalid address or token, and for a page off
    loopback without a token or `is_open`."""
    try:
        host, port = split_address(page)
    except ValueError:
        raise ConfigError("page", page, "host:port, such as 127.0.0.1:8300") from None
    token = page_token(token_file, environ)
    if token is None and not is_open and not is_loopback(host):
        raise ConfigError(
            "page",
            page,
            f"an address of loopback, or a token (--page-token-file FILE, or the variable {VARIABLE}), or --page-open "
            "if everyone on the network may see it",
        )
    own = frozenset(part.strip().lower() for part in names.split(",") if part.strip())
    return Access(host, port, Credential(token.encode()) if token else None, own)


def page_token(path: Path | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The page's token: the content of a private file, otherwise the variable KVTIER_PAGE_TOKEN; None if neither is
    given. Raises ConfigError, which never shows the token."""
    if path is None:
        field, source, text = VARIABLE, VARIABLE, environ.get(VARIABLE, "")
    else:
        field, source = "page-token-file", str(path)
        text = private.read(field, path).decode(errors="replace")
    token = text.strip()
    if path is None and not token:
        return None
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError(field, source, "a token of printable ASCII without spaces, since it is sent in a header")
    credentials.checked(field, source, token.encode())
    return token


def bearer(token: str | None) -> dict[str, str]:
    """The header of a program's request."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def unknown(token: str | None) -> str:
    """The message for a program whose request was refused."""
    problem = "the page rejects the token" if token else "the page requires a token"
    return f"{problem}: give --page-token-file FILE, or the variable {VARIABLE}"


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is a loopback address."""
    return transport.is_loopback(_name_of(host))


def is_of_another_site(request: web.Request) -> bool:
    """Whether a browser sends this from another site's page (CSRF)."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.host.lower()


class Door(asyncio.Protocol):
    """Accepts a connection, unless the limit in all or that of its peer is reached."""

    def __init__(self, server: web.Server):
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast(asyncio.Transport, transport)
        there = self._server.connections
        peer = _peer(connection.get_extra_info("peername"))
        if (
            len(there) >= CONNECTIONS_MAX
            or [_peer(one.peername) for one in there].count(peer) >= CONNECTIONS_OF_PEER_MAX
        ):
            connection.abort()
            return
        handler = self._server()
        connection.set_protocol(handler)
        handler.connection_made(connection)


def _peer(name: object) -> object:
    return name[0] if isinstance(name, tuple) and name else name


def _name_of(host: str) -> str:
    """The host of `host`, `host:port`, `[address]` or `[address]:port`, in lower case."""
    found = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d+)?", host)
    return (found[1] if found else host).strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
