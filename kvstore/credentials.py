"""What proves that somebody belongs to a namespace: a secret that is shared by the namespace's clients and its targets.

It comes from a file or from the environment, never from a command line, and is shown nowhere: not in errors, not by
`repr`. It does not travel either: each side signs what both have said (net/wire.py, `transcript`).
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvstore.errors import ConfigError

VARIABLE = "KVTIER_CREDENTIAL"
# Whoever hears a greeting may try secrets on it for as long as he likes: it must not be one that can be guessed.
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
        """One that nobody knows."""
        return cls(secrets.token_bytes(32))

    def sign(self, fields: Sequence[bytes]) -> bytes:
        """HMAC-SHA256 over the fields, each behind its length: no two lists of fields are signed alike."""
        signature = hmac.new(self._secret, digestmod=hashlib.sha256)
        for field in fields:
            signature.update(len(field).to_bytes(4, "little") + field)
        return signature.digest()

    def signed(self, proof: bytes, fields: Sequence[bytes]) -> bool:
        """Whether `proof` is this credential's, in the same time whatever it is."""
        return hmac.compare_digest(self.sign(fields), proof)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credential) and hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Credential(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a credential is not written anywhere")


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Credential | None:
    """The credential that a client was given: a file's content, otherwise the environment's KVTIER_CREDENTIAL; None if
    there is neither. Raises ConfigError."""
    if path is not None:
        return from_file("credential-file", path)
    return from_variable(VARIABLE, VARIABLE, environ) if environ.get(VARIABLE) else None


def from_file(field: str, path: Path) -> Credential:
    """White space at the end of the file does not count."""
    try:
        with path.open("rb") as file:
            secret = file.read(BYTES_MAX + 64)
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({error.strerror})") from None
    return checked(field, path, secret.strip())


def from_variable(field: str, name: str, environ: Mapping[str, str] = os.environ) -> Credential:
    return checked(field, name, environ.get(name, "").strip().encode())


def checked(field: str, source: object, secret: bytes) -> Credential:
    """The credential; an error names where it came from, not what it is."""
    try:
        return Credential(secret)
    except ValueError:
        raise ConfigError(field, source, f"{EXPECTED}; there are {len(secret)}") from None
