"""Seals: an authenticator on each value, made with keys that workers share and targets do not have.

A sealed value is the payload (`mac`) or its ciphertext (`encrypt`), then a trailer of TRAILER_BYTES:

    magic "KVTS", u8 version, u8 mode, 2 zero bytes, u32 key id, 24-byte nonce, 16-byte tag

The tag is AES-256-GCM's. Its associated data is the trailer before the tag, the store key, the payload's length as u64
and, in mode `mac`, the payload. So a value opens only under the key, the length and the seal key it was sealed with. A
replay of an older value under the same store key opens, which is harmless: a store key names its content.

**Nonces.** Each value has a data key of its own: BLAKE2b of the trailer before the tag, keyed with the seal key. GCM
runs once under it, with a nonce of zeros. A data key repeats only if 24 random bytes of the operating system do. There
is no counter and no state, so forks, restarts and snapshots of machines cannot repeat one. 10,000 workers that each
seal 10,000 values a second for ten years under one key make 2^55 values: two of them share a nonce with a probability
of 2^-83. A forgery of 64 MiB succeeds with a probability of 2^-105 an attempt.

**Names.** A sealed value is stored under a name that depends on the seal key (`SealKey.name`). So workers without that
key never ask for it, and a worker that retires a key stops asking for values sealed with it. Otherwise a value that no
worker can open would block its chunk until it is evicted.

Knows keys, bytes and files; nothing of sockets.
"""

import contextlib
import enum
import hashlib
import logging
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from kvstore import private
from kvstore.errors import ConfigError
from kvstore.keys import KEY_BYTES
from kvstore.rarely import Rarely
from kvstore.text import shown

logger = logging.getLogger(__name__)

MAGIC = b"KVTS"
VERSION = 1
SECRET_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16
KEYS_MAX = 16  # in a file: every missing chunk is looked up once per key
_HEAD = struct.Struct(f"<4sBB2xI{NONCE_BYTES}s")
_CONTEXT = struct.Struct(f"<{_HEAD.size}s{KEY_BYTES}sQ")
TRAILER_BYTES = _HEAD.size + TAG_BYTES
_GCM_NONCE = bytes(12)
_NAME, _DATA = b"kvtier-seal-name", b"kvtier-seal-data"  # BLAKE2b's personalization
# Decryption goes through a buffer of this size, which stays in the CPU's cache. In place it would reach 10.5 GB/s
# instead of 8.4, but it is not documented that `update_into` may overwrite its input.
_PIECE_BYTES = 256 << 10
_FIELD = "seal-key"
# A changed file is noticed within this time.
RELOAD_SECONDS = 1.0
_COMPLAIN_SECONDS = 10.0


class Mode(enum.IntEnum):
    MAC = 1
    ENCRYPT = 2


class Reason(enum.StrEnum):
    """Why a value was rejected."""

    LENGTH = "length"  # not the length of the payload plus a trailer
    UNSEALED = "unsealed"  # the trailer has no magic
    FORMAT = "format"  # a version or mode that this release does not know
    OTHER_KEY = "other_key"  # sealed with another key than its name
    ALTERED = "altered"  # the tag does not match key, length and content


class SealKey:
    """One key of a file. Its secret never appears in a repr, message or pickle."""

    __slots__ = ("_domain", "_secret", "id")

    def __init__(self, id: int, secret: bytes):
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a seal key of {len(secret)} bytes, expected {SECRET_BYTES}")
        self.id = id
        self._secret = secret
        self._domain = hashlib.blake2b(key=secret, digest_size=32, person=_NAME).digest()

    def __repr__(self) -> str:
        return f"SealKey({self.id})"

    def __reduce__(self) -> str:
        raise TypeError("a seal key is not pickled")

    def name(self, key: bytes) -> bytes:
        """The store key of the value of `key` when it is sealed with this seal key."""
        return hashlib.blake2b(key, key=self._domain, digest_size=KEY_BYTES, person=_NAME).digest()

    def seal(self, name: bytes, payload: memoryview, mode: Mode) -> tuple[memoryview, bytes]:
        """The value to store under `name`: the payload itself or its ciphertext, and the trailer."""
        head = _HEAD.pack(MAGIC, VERSION, mode, self.id, os.urandom(NONCE_BYTES))
        encryptor = Cipher(self._data_key(head), GCM(_GCM_NONCE)).encryptor()
        encryptor.authenticate_additional_data(_CONTEXT.pack(head, name, len(payload)))
        content = payload
        if mode is Mode.MAC:
            encryptor.authenticate_additional_data(payload)
        else:
            content = _room(len(payload))
            encryptor.update_into(payload, content)
        encryptor.finalize()
        return content, head + encryptor.tag

    def open(self, name: bytes, content: memoryview, trailer: bytes | bytearray) -> Reason | None:
        """Check the content of the value `name`, and decrypt it in place. None: it is authentic. Otherwise the content
        is undefined."""
        if len(trailer) != TRAILER_BYTES:
            return Reason.LENGTH
        head, tag = bytes(trailer[: _HEAD.size]), bytes(trailer[_HEAD.size :])
        magic, version, mode, key_id, _ = _HEAD.unpack(head)
        if magic != MAGIC:
            return Reason.UNSEALED
        if version != VERSION or mode not in (Mode.MAC, Mode.ENCRYPT):
            return Reason.FORMAT
        if key_id != self.id:
            return Reason.OTHER_KEY
        decryptor = Cipher(self._data_key(head), GCM(_GCM_NONCE, tag)).decryptor()
        decryptor.authenticate_additional_data(_CONTEXT.pack(head, name, len(content)))
        if mode == Mode.MAC:
            decryptor.authenticate_additional_data(content)
        else:
            piece = _room(min(_PIECE_BYTES, len(content)))
            for start in range(0, len(content), _PIECE_BYTES):
                here = content[start : start + _PIECE_BYTES]
                decryptor.update_into(here, piece)
                here[:] = piece[: len(here)]
        try:
            decryptor.finalize()
        except InvalidTag:
            return Reason.ALTERED
        return None

    def _data_key(self, head: bytes) -> AES:
        return AES(hashlib.blake2b(head, key=self._secret, digest_size=32, person=_DATA).digest())


class Seal:
    """The keys of a group of workers: the first one seals, each of them opens. Thread-safe."""

    def __init__(self, keys: Sequence[SealKey], mode: Mode = Mode.MAC):
        self._keys = tuple(keys)
        self.mode = mode
        self._lock = threading.Lock()
        self._rejected: Counter[str] = Counter()
        self._complains = Rarely(_COMPLAIN_SECONDS)

    def __repr__(self) -> str:
        return f"Seal({self._keys}, {self.mode.name})"

    @property
    def keys(self) -> tuple[SealKey, ...]:
        return self._keys

    @property
    def rejected(self) -> dict[str, int]:
        """Counts of rejected values, by reason."""
        with self._lock:
            return dict(self._rejected)

    def reject(self, target: str, reason: Reason) -> None:
        """Count a rejected value of `target`, and log it, rate-limited."""
        with self._lock:
            self._rejected[reason] += 1
            if not self._complains():
                return
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self._rejected.items()))
        logger.warning(
            "%s: rejected a value, its seal is invalid (%s); rejected since the start: %s",
            shown(target),
            reason,
            counts,
        )


class SealFile(Seal):
    """Keys from a file, reloaded when it changes. If the file becomes unreadable or invalid, that is logged, and the
    old keys stay."""

    def __init__(self, path: Path, mode: Mode = Mode.MAC):
        """Raises ConfigError."""
        self._stamp = private.stamp(path)
        super().__init__(read_keys(path), mode)
        self._path = path
        self._look_at = time.monotonic() + RELOAD_SECONDS

    @property
    def keys(self) -> tuple[SealKey, ...]:
        if time.monotonic() >= self._look_at:
            with self._lock:
                self._reload()
        return self._keys

    def _reload(self) -> None:
        """With the lock held."""
        self._look_at = time.monotonic() + RELOAD_SECONDS
        stamp = private.stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            logger.error("keeping the old seal keys: %s", error)
            return
        logger.info("%s: seals with key %d, opens with %s", self._path, self._keys[0].id, ids(self._keys))


def _room(size: int) -> memoryview:
    """Uninitialized memory. A bytearray would fill it with zeros first, under the interpreter's lock."""
    return np.empty(size, np.uint8).data


def seal_mode(path: str, mode: str) -> str:
    """The mode; by default `mac` with a key, `off` without."""
    return mode or ("mac" if path else "off")


def open_seal(path: str, mode: str) -> SealFile | None:
    """The seal for a worker's `--seal-key` and `--seal`, each "" if not given; None if values are not sealed. Raises
    ConfigError."""
    mode = seal_mode(path, mode)
    if mode == "off":
        return None
    if mode not in (known.name.lower() for known in Mode):
        raise ConfigError("seal", mode, "one of mac, encrypt, off")
    if not path:
        raise ConfigError.missing(_FIELD, "a file of keys, or seal off", required_by=f"seal {mode}")
    return SealFile(Path(path), Mode[mode.upper()])


def announce(seal: Seal | None, store: str) -> None:
    """Log whether values are sealed, and so which processes this one trusts."""
    if seal is None:
        logger.info(
            "values are not sealed: this process trusts the targets of %s, and every process that can answer or "
            "register in their place or store to them. Set --seal-key to change that (docs/security.md)",
            store,
        )
    else:
        keys = seal.keys
        logger.info("values are sealed (%s) with key %d; opens with %s", seal.mode.name.lower(), keys[0].id, ids(keys))


def ids(keys: Sequence[SealKey]) -> str:
    return ", ".join(str(key.id) for key in keys)


def read_keys(path: Path) -> tuple[SealKey, ...]:
    """The keys of a file, YAML or JSON: a list of {id: 1 to 2^32 - 1, key: 64 hexadecimal digits}. Raises ConfigError,
    which quotes no key."""
    import yaml

    try:
        listed = yaml.safe_load(private.read(_FIELD, path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # the error's own text quotes the line
        where = f"; line {mark.line + 1} is neither" if mark is not None else ""
        raise _wrong(path, f"YAML or JSON{where}") from None
    except (ValueError, RecursionError):
        raise _wrong(path, "YAML or JSON") from None
    if not isinstance(listed, list) or not 1 <= len(listed) <= KEYS_MAX:
        raise _wrong(path, f"a list of 1 to {KEYS_MAX} keys, the one that seals first")
    keys = tuple(_key(path, number, entry) for number, entry in enumerate(listed, 1))
    numbers: dict[int, int] = {}
    for number, key in enumerate(keys, 1):
        if (first := numbers.setdefault(key.id, number)) != number:
            raise ConfigError.duplicate(f"{_FIELD}.{number}.id", str(key.id), f"{_FIELD}.{first}.id").at(str(path))
    return keys


def _key(path: Path, number: int, entry: object) -> SealKey:
    if not isinstance(entry, dict) or set(entry) != {"id", "key"}:
        raise _wrong(path, f"only the fields id and key in key number {number}")
    id, text = entry["id"], entry["key"]
    if type(id) is not int or not 0 < id < 1 << 32:
        raise _wrong(path, f"a whole number from 1 to 4294967295 as id of key number {number}")
    secret = b""
    with contextlib.suppress(TypeError, ValueError):
        secret = bytes.fromhex(text)
    if len(secret) != SECRET_BYTES or not any(secret):
        raise _wrong(path, f"64 hexadecimal digits, quoted, as key number {number} (openssl rand -hex 32)")
    return SealKey(id, secret)


def _wrong(path: Path, expected: str) -> ConfigError:
    return ConfigError(_FIELD, path, expected)
