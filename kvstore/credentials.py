"""The credential of a namespace: a secret that its clients and its targets share.

It comes from a file or from the environment, never from a command line. Errors and `repr` never show it. It is never
sent: each side signs the handshake with it (`transcript` in net/wire.py).
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvstore.errors import ConfigError

VARIABLE = "KVTIER_CREDENTIAL"
# An eavesdropper on a handshake can test guesses offline, so the secret must be too long to guess.
BYTES_MIN = 16
BYTES_MAX = 4096
EXPECTED = f"a secret of {BYTES_MIN} to {BYTES_MAX} bytes, such as `openssl rand -hex 32` makes"


class Credential:
    """A namespace's secret."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes):
        if not BYTES_MIN <= len(secret) <= BYTES_MAX:
            raise ValueError(EXPECTED)
        self._secret = secret

    @classmethod
    def random(cls) -> "Credential":
        """A random credential."""
        return cls(secrets.token_bytes(32))

    def sign(self, fields: Sequence[bytes]) -> bytes:
        """HMAC-SHA256 over the fields, each preceded by its length, so that different lists give different input."""
        signature = hmac.new(self._secret, digestmod=hashlib.sha256)
        for field in fields:
            signature.update(len(field).to_bytes(4, "little") + field)
        return signature.digest()

    def signed(self, proof: bytes, fields: Sequence[bytes]) -> bool:
        """Whether `proof` is this credential's signature; in constant time."""
        return hmac.compare_digest(self.sign(fields), proof)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credential) and hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Credential(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a credential is not written anywhere")


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Credential | None:
    """A client's credential: the file's content, otherwise the variable KVTIER_CREDENTIAL; None if neither is given.
    Raises ConfigError."""
    if path is not None:
        return from_file("credential-file", path)
    return from_variable(VARIABLE, VARIABLE, environ) if environ.get(VARIABLE) else None


def from_file(field: str, path: Path) -> Credential:
    """The credential in a file; surrounding white space is ignored. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            secret = file.read(BYTES_MAX + 64)
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({error.strerror})") from None
    return checked(field, path, secret.strip())


def from_variable(field: str, name: str, environ: Mapping[str, str] = os.environ) -> Credential:
    return checked(field, name, environ.get(name, "").strip().encode())


def checked(field: str, source: object, secret: bytes) -> Credential:
    """The credential. Raises ConfigError, which names the source, never the secret."""
    try:
        return Credential(secret)
    except ValueError:
        raise ConfigError(field, source, f"{EXPECTED}, not {len(secret)}") from None
