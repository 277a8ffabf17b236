"""A client of etcd. Servers come from the command line, secrets and certificates from the environment.

The variables are Dynamo's, so one environment serves both: ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, ETCD_AUTH_CA,
ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY. With ETCD_AUTH_CA (the CA of the servers' certificates) every connection
uses TLS.
"""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvstore.errors import ConfigError, UnavailableError, readable, without_userinfo
from kvstore.net.transport import split_address
from kvstore.text import shown

Answer = TypeVar("Answer")

_CALL_SECONDS = 3
_USER, _PASSWORD = "ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD"
_CA, _CERTIFICATE, _KEY = "ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"


def checked_servers(field: str, servers: str) -> tuple[tuple[str, int], ...]:
    """Host and port of each of `host:port,host:port`. Raises ConfigError."""
    without_userinfo(field, servers, f"give {_USER} and {_PASSWORD} in the environment")
    listed = [part.strip() for part in servers.split(",") if part.strip()]
    try:
        found = tuple(map(split_address, listed))
    except ValueError:
        found = ()
    if not found:
        raise ConfigError(field, servers, "host:port, several with commas between them")
    return found


class Etcd:
    """A client that fails over to the next server. Each failover authenticates again, because a token ends when its
    server restarts or when it expires. Thread-safe; one call at a time."""

    def __init__(self, servers: str):
        """Raises ConfigError. Does not connect yet."""
        self._servers = servers
        self._addresses = list(checked_servers("etcd", servers))
        self._options = _options(os.environ)
        self._client: Any = None
        self._lock = threading.Lock()

    def call(self, work: Callable[[Any], Answer]) -> Answer:
        """The result of `work`, called with a client of etcd3. If a server fails, `work` is called again with a client
        of the next. Raises UnavailableError if no server answers; each has a few seconds."""
        with self._lock:
            for _ in range(max(2, len(self._addresses))):  # retry a single server, too: its token may have expired
                try:
                    if self._client is None:
                        self._client = _connect(*self._addresses[0], self._options)
                    return work(self._client)
                except Exception as error:  # grpc's and etcd3's errors have no common base class
                    reason = _reason(error)
                self._disconnect()
                self._addresses.append(self._addresses.pop(0))
            raise UnavailableError(_unreachable(self._servers, reason))

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


def _options(environ: Mapping[str, str]) -> dict[str, str]:
    user, password = environ.get(_USER), environ.get(_PASSWORD)
    if bool(user) is not bool(password):
        missing, other = (_PASSWORD, _USER) if user else (_USER, _PASSWORD)
        raise ConfigError.missing(missing, "a value", required_by=other)
    authority, certificate, key = (environ.get(name) for name in (_CA, _CERTIFICATE, _KEY))
    if bool(certificate) is not bool(key) or (certificate and not authority):
        missing = _CA if not authority else _KEY if certificate else _CERTIFICATE
        raise ConfigError.missing(missing, "a file", required_by=_CERTIFICATE if certificate else _KEY)
    for name, path in ((_CA, authority), (_CERTIFICATE, certificate), (_KEY, key)):
        if path:
            readable(name, path)
    given = {"user": user, "password": password, "ca_cert": authority, "cert_cert": certificate, "cert_key": key}
    return {name: value for name, value in given.items() if value}


def _connect(host: str, port: int, options: Mapping[str, str]) -> Any:
    """A client of etcd3 0.12. Its generated code predates protobuf 4 and needs protobuf's Python implementation. A
    process chooses the implementation once, so an engine's process must not call this."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    import etcd3

    client = etcd3.client(host=host, port=port, timeout=_CALL_SECONDS, **options)
    client.call_credentials = None  # they need TLS; etcd3 sends the token in `metadata`, too
    return client


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)  # the text of a grpc error has many lines, its details one
    return shown(details() if callable(details) else error) or type(error).__name__


def _unreachable(servers: str, reason: str) -> str:
    if any(word in reason for word in ("auth", "permission", "user name")):
        return f"etcd: the server at {servers} rejects the credentials ({reason}): see {_USER} and {_PASSWORD}"
    return f"etcd: no server answers at {servers} ({reason}): start one there, or name another"
