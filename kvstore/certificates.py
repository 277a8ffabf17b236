"""TLS contexts from PEM files: a certificate chain with its private key, and the CAs for the peer's certificate.

TLS 1.3 only. A private key must be readable only by its owner (private.py).
"""

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvstore import private
from kvstore.errors import ConfigError

if TYPE_CHECKING:  # a tenth of a target's start, and most have no TLS
    from cryptography.x509 import Certificate

_BYTES_MAX = 1 << 20  # of certificates


class Files(NamedTuple):
    """Paths, each "" if not given. `ca` signs the peer's certificates."""

    cert: str = ""
    key: str = ""
    ca: str = ""


class Names(NamedTuple):
    """The names of the options for the files, for errors."""

    cert: str
    key: str
    ca: str


SERVER = Names("tls-cert", "tls-key", "tls-client-ca")
CLIENT = Names("store-tls-cert", "store-tls-key", "store-tls-ca")


class Loaded(NamedTuple):
    context: ssl.SSLContext
    valid_until: datetime | None  # the certificate; None without one


def checked(files: Files, names: Names) -> bool:
    """Whether TLS is configured. A server needs a certificate, a client needs CAs, and a certificate needs its key.
    Raises ConfigError if one is missing."""
    missing = {
        names.cert: not files.cert and (names is SERVER or bool(files.key)),
        names.key: not files.key and bool(files.cert),
        names.ca: not files.ca and names is CLIENT,
    }
    for name in (name for name, is_missing in missing.items() if is_missing and any(files)):
        given = ", ".join(f"--{given}" for given, path in zip(names, files, strict=True) if path)
        raise ConfigError.missing(name, "a file", required_by=given)
    return any(files)


def load(files: Files, names: Names) -> Loaded:
    """A context for a server if `names` are SERVER, otherwise for a client. `files` are checked. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if names is SERVER else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if names is SERVER:
        context.num_tickets = 0  # no resumption: a resumed session would outlive the removal of its CA
    if files.ca:
        context.load_verify_locations(cadata=_authorities(names.ca, Path(files.ca)))
        context.verify_mode = ssl.CERT_REQUIRED
    if not files.cert:
        return Loaded(context, None)
    return Loaded(context, _load_chain(context, Path(files.cert), Path(files.key), names))


def _authorities(field: str, path: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return b"".join(one.public_bytes(Encoding.DER) for one in _certificates(field, path))


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path, names: Names) -> datetime:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )

    chain, secret = _certificates(names.cert, cert), private.read(names.key, key)
    begins, ends, now = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc, datetime.now(UTC)
    if not begins <= now <= ends:
        raise ConfigError(names.cert, cert, f"a certificate that is valid now, not from {begins} to {ends}")
    try:
        private_key = load_pem_private_key(secret, None)
        pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(names.key, key, "a private key in PEM, without a passphrase") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if private_key.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise ConfigError(names.key, key, f"the private key of the first certificate in {cert}")
    # `ssl` accepts only file names. This file holds the checked content, even if the originals change.
    with os.fdopen(os.memfd_create("kvtier-tls"), "wb") as file:
        file.write(b"".join([*(one.public_bytes(Encoding.PEM) for one in chain), pem]))
        file.flush()
        try:
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        except ssl.SSLError as error:
            raise ConfigError(names.cert, cert, f"a certificate that OpenSSL accepts ({error.reason})") from None
    return ends


def _certificates(field: str, path: Path) -> "list[Certificate]":
    from cryptography.x509 import load_pem_x509_certificates

    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({error.strerror})") from None
    if len(content) > _BYTES_MAX:
        raise ConfigError(field, path, f"a file of at most {_BYTES_MAX} bytes")
    try:
        return load_pem_x509_certificates(content)
    except ValueError:
        raise ConfigError(field, path, "certificates in PEM") from None
