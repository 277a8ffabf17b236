"""Files with secrets: read only where nobody else can read them, and looked at again when they change."""

import os
import stat
from pathlib import Path

from kvstore.errors import ConfigError

_BYTES_MAX = 64 << 10


def read(field: str, path: Path) -> bytes:
    """The content of a file that nobody else may read. Checks the file that is open, not what its name points to a
    moment before. Raises ConfigError, which quotes nothing of the content."""
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
    """Whether nobody but a file's owner can read it, or nobody but this process's group and root, who owns it. The
    latter is a secret that Kubernetes mounts in a pod with an fsGroup: it cannot be given to the process's user."""
    is_lent = facts.st_uid == 0 != os.geteuid() and facts.st_gid in (os.getegid(), *os.getgroups())
    return not facts.st_mode & (0o037 if is_lent else 0o077)


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does; () while there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ()
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_size
