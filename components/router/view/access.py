"""Who may ask the router's page, and for how much of it: a token, the names that it goes by, bounds for each peer.

Without a token the page is for those who reach it: this machine's users on loopback, or, with `--page-open`, a closed
network. A site whose name was made to point here must not read it from somebody's browser, so the Host header is
checked then. With a token, programs send it as a bearer token; a browser gives it once, in a form, for a cookie.
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
TOKEN_HELP = f"file with the token that the router's page asks for; default: the variable {VARIABLE}, if set"
# A working day; after that the form asks again. A new token ends all cookies.
COOKIE_SECONDS = 12 * 3600
CONNECTIONS_MAX = 128
# A browser opens six and an event stream for each tab.
CONNECTIONS_OF_PEER_MAX = 32


@dataclass(frozen=True)
class Access:
    """What a page was told of who may ask it."""

    host: str = "127.0.0.1"
    port: int = 0
    token: Credential | None = None
    names: frozenset[str] = frozenset()  # hosts beside its own, in lower case

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    @property
    def explains(self) -> bool:
        """Whether it says what is cached of a prompt: only on loopback, and to those who know the token."""
        return self.is_local or self.token is not None

    @property
    def cookie(self) -> str:
        """Cookies are shared by all ports of a host."""
        return f"kvtier-page-{self.port}"

    def is_own(self, host: str) -> bool:
        """Whether `host`, of a Host header, is a name of this page, and not one that somebody else has in DNS."""
        name = _name_of(host)
        if name in self.names or is_loopback(name):
            return True
        return not self.is_local and (_is_address(name) or "." not in name)

    def is_known(self, request: web.Request) -> bool:
        """Whether the request brings the token, or a cookie that was given for it."""
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
        """In the same time whatever it is, but for its length."""
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


def page_access(
    page: str,
    token_file: Path | None = None,
    names: str = "",
    *,
    is_open: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Access:
    """Who may ask a page at host:port. Raises ConfigError for an address that is none, a token that is none, and where
    strangers could reach the page and nothing was said of them."""
    try:
        host, port = split_address(page)
    except ValueError:
        raise ConfigError("page", page, "host:port, such as 127.0.0.1:8300") from None
    token = page_token(token_file, environ)
    if token is None and not is_open and not is_loopback(host):
        raise ConfigError(
            "page",
            page,
            f"a token beside it (--page-token-file FILE, or the variable {VARIABLE}), an address of loopback, or "
            "--page-open where everybody on the network may see it",
        )
    own = frozenset(part.strip().lower() for part in names.split(",") if part.strip())
    return Access(host, port, Credential(token.encode()) if token else None, own)


def page_token(path: Path | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The page's token: the content of a file that nobody else can read, otherwise the environment's KVTIER_PAGE_TOKEN;
    None if there is neither. Raises ConfigError, which does not show it."""
    if path is None:
        field, source, text = VARIABLE, VARIABLE, environ.get(VARIABLE, "")
    else:
        field, source = "page-token-file", str(path)
        text = private.read(field, path).decode(errors="replace")
    token = text.strip()
    if path is None and not token:
        return None
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError(field, source, "a token of printable ASCII without spaces: it goes into a header")
    credentials.checked(field, source, token.encode())
    return token


def bearer(token: str | None) -> dict[str, str]:
    """The header with which a program asks."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def unknown(token: str | None) -> str:
    """What a program says that was not let in."""
    return f"{'another' if token else 'a'} token is wanted: --page-token-file FILE, or the variable {VARIABLE}"


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine's own."""
    return transport.is_loopback(_name_of(host))


def is_of_another_site(request: web.Request) -> bool:
    """Whether a browser sends this from a page of somebody else's."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.host.lower()


class Door(asyncio.Protocol):
    """Lets a connection in, unless there are too many already, of all or of its peer."""

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
    """Of `host`, `host:port`, `[address]` or `[address]:port`, in lower case."""
    found = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d+)?", host)
    return (found[1] if found else host).strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
