"""Reads files with secrets, only if no other user can read them, and detects changes to them."""

import os
import stat
from pathlib import Path

from kvstore.errors import ConfigError

_BYTES_MAX = 64 << 10


def read(field: str, path: Path) -> bytes:
    """The content of a private file. Checks the opened file, not its path, so that no race can swap it. Raises
    ConfigError, which quotes nothing of the content."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({os.strerror(error.errno or 0)})") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _BYTES_MAX:
            raise ConfigError(field, path, f"a regular file of at most {_BYTES_MAX} bytes")
        if facts.st_uid not in (0, os.geteuid()):
            raise ConfigError(field, path, f"a file of this process's user or of root, not of user {facts.st_uid}")
        if not is_private(facts):
            permissions = stat.S_IMODE(facts.st_mode)
            expected = f"a file that only its owner can read, not with mode {permissions:04o} (chmod 600)"
            raise ConfigError(field, path, expected)
        return os.read(descriptor, _BYTES_MAX)
    finally:
        os.close(descriptor)


def is_private(facts: os.stat_result) -> bool:
    """Whether only a file's owner can read it, or, if root owns it, only root and a group of this process. The latter
    is a secret that Kubernetes mounts in a pod with an fsGroup, where the process's user cannot own it."""
    is_lent = facts.st_uid == 0 != os.geteuid() and facts.st_gid in (os.getegid(), *os.getgroups())
    return not facts.st_mode & (0o037 if is_lent else 0o077)


def stamp(path: Path) -> tuple[int, ...]:
    """A value that changes when the file changes; () while it does not exist."""
    try:
        facts = path.stat()
    except OSError:
        return ()
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_size
