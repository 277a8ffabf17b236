"""Connection options for NATS: URLs from the command line, secrets and certificates from the environment.

The variables are Dynamo's, so one environment serves both:

    NATS_SERVER                              default for the command line
    NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD   or NATS_AUTH_TOKEN, or NATS_AUTH_NKEY (a seed),
    or NATS_AUTH_CREDENTIALS_FILE            a .creds file; the last two need the package nkeys
    NATS_TLS_CA_CERT_PATH                    CA of the server's certificate; default: the system's CAs
    NATS_TLS_CLIENT_CERT_PATH, NATS_TLS_CLIENT_KEY_PATH

With a `tls://` URL or one of the NATS_TLS_ variables, a server without TLS is refused before anything is sent to it.
"""

import os
import ssl
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from kvstore.errors import ConfigError, readable, without_userinfo

DEFAULT_URLS = os.environ.get("NATS_SERVER", "nats://127.0.0.1:4222")
_USER, _PASSWORD = "NATS_AUTH_USERNAME", "NATS_AUTH_PASSWORD"
_CA, _CERTIFICATE, _KEY = "NATS_TLS_CA_CERT_PATH", "NATS_TLS_CLIENT_CERT_PATH", "NATS_TLS_CLIENT_KEY_PATH"
_EXPECTED = "nats://host:port or tls://host:port, several with commas between them"
_INSTEAD = f"give {_USER} and {_PASSWORD} in the environment"


def checked_urls(field: str, urls: str) -> str:
    """The URLs, checked; "" for none. Raises ConfigError."""
    without_userinfo(field, urls, _INSTEAD)
    for url in split(urls):
        try:
            parts = urlsplit(url if "://" in url else f"nats://{url}")
            right = parts.scheme in ("nats", "tls") and parts.hostname and not parts.path.strip("/") and parts.port != 0
        except ValueError:  # of the port
            right = False
        if not right:
            raise ConfigError(field, url, _EXPECTED)
    return urls


# Of an option called `nats`; "" for no bus.
NatsUrls = Annotated[str, AfterValidator(lambda urls: checked_urls("nats", urls))]


def split(urls: str) -> list[str]:
    return [url.strip() for url in urls.split(",") if url.strip()]


def connect_options(urls: str) -> dict[str, Any]:
    """What the `connect` of nats-py takes, with `tls` if there is to be TLS. Raises ConfigError, also for no URL at
    all: nats-py would look for a server for ever, and let nothing else run."""
    environ, servers = os.environ, split(checked_urls("nats", urls))
    if not servers:
        raise ConfigError("nats", urls, _EXPECTED)
    options: dict[str, Any] = {"servers": servers, **_secrets(environ)}
    if any(url.startswith("tls://") for url in servers) or any(map(environ.get, (_CA, _CERTIFICATE, _KEY))):
        options["tls"] = _context(environ)
    return options


def _secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The first secret that is set, in Dynamo's order."""
    user, password = environ.get(_USER), environ.get(_PASSWORD)
    if user or password:
        if not (user and password):
            missing, given = (_PASSWORD, _USER) if user else (_USER, _PASSWORD)
            raise ConfigError.missing(missing, "a value", required_by=given)
        return {"user": user, "password": password}
    if token := environ.get("NATS_AUTH_TOKEN"):
        return {"token": token}
    if seed := environ.get("NATS_AUTH_NKEY"):
        _need_nkeys("NATS_AUTH_NKEY")
        return {"nkeys_seed_str": seed}
    if path := environ.get("NATS_AUTH_CREDENTIALS_FILE"):
        _need_nkeys("NATS_AUTH_CREDENTIALS_FILE")
        return {"user_credentials": readable("NATS_AUTH_CREDENTIALS_FILE", path)}
    return {}


def _need_nkeys(field: str) -> None:
    if find_spec("nkeys") is None:
        raise ConfigError.missing("nkeys", "a Python package: pip install nkeys", required_by=field)


def _context(environ: Mapping[str, str]) -> ssl.SSLContext:
    authority, certificate, key = (environ.get(name) for name in (_CA, _CERTIFICATE, _KEY))
    if bool(certificate) is not bool(key):
        missing, given = (_KEY, _CERTIFICATE) if certificate else (_CERTIFICATE, _KEY)
        raise ConfigError.missing(missing, "a file", required_by=given)
    try:
        context = ssl.create_default_context(cafile=readable(_CA, authority) if authority else None)
    except ssl.SSLError:
        raise ConfigError(_CA, authority, "certificates in PEM") from None
    if certificate and key:
        try:
            context.load_cert_chain(readable(_CERTIFICATE, certificate), readable(_KEY, key), password="")
        except ssl.SSLError:
            raise ConfigError(_CERTIFICATE, certificate, f"a certificate in PEM, and its key in {_KEY}") from None
    return context
