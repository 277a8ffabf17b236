"""The file layer under the log: whole reads and writes at an offset. Tests replace it with a fault-injecting one.

Everything is page-aligned: offsets, lengths and the memory itself (buffers.py), as O_DIRECT requires. The page cache
would duplicate the hot cache, and costs half of a fast device's speed.
"""

import errno
import logging
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kvstore.disk.record import PAGE_BYTES

logger = logging.getLogger(__name__)

_PARTS_MAX = 512  # below IOV_MAX


class Files:
    """Blocking positional I/O; every method may run on any thread and raises OSError when it could not do all of it.
    `direct` asks for O_DIRECT; where the file system refuses it, the page cache is used and the reason is logged."""

    def __init__(self, *, direct: bool = True):
        self._direct = direct
        self._tried = False

    def open(self, path: Path, size_bytes: int) -> int:
        """Open or create `path` with its space preallocated, so that a full disk shows here and not in a write."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(path, flags, 0o640)
        try:
            if not stat.S_ISBLK(os.fstat(fd).st_mode):
                os.posix_fallocate(fd, 0, size_bytes)
            return self._direct_fd(path, fd) if self._direct else fd
        except BaseException:
            os.close(fd)
            raise

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        """Fill all of `into`, one after the other, from `offset` on."""
        parts = list(into)
        while parts:
            count = os.preadv(fd, parts[:_PARTS_MAX], offset)
            if count == 0:
                raise OSError(f"end of file at {offset}")
            offset += count
            _advance(parts, count)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        parts = list(buffers)
        while parts:
            count = os.pwritev(fd, parts[:_PARTS_MAX], offset)
            offset += count
            _advance(parts, count)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def _direct_fd(self, path: Path, buffered: int) -> int:
        """A descriptor with O_DIRECT in place of `buffered`, if a page can be read through it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            try:
                if not self._tried:
                    os.preadv(fd, [mmap.mmap(-1, PAGE_BYTES)], 0)
                self._tried = True
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: no direct I/O here (%s): going through the page cache", path.parent, error.strerror)
            self._direct = False
            return buffered
        os.close(buffered)
        return fd


def _advance(parts: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of `parts`."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if parts and count:
        parts[0] = parts[0][count:]
