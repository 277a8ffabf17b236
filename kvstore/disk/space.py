"""The location of segments: files of a directory, or adjacent extents of a block device or of one preallocated file.

A space also keeps the superblock, with the properties that must not change while it holds a store, and a lock.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import resource
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.record import PAGE_BYTES
from kvstore.errors import ConfigError
from kvstore.text import in_units

logger = logging.getLogger(__name__)

# At the start of a device, before the first segment: two superblocks, of which the newest valid one counts.
_RESERVED_BYTES = 1 << 20
# Of a superblock that names several namespaces. Releases before 0.2 would mix up their values: they must refuse.
SHARED_VERSION = 2
_SEGMENT_NAME = re.compile(r"segment-(\d{6,})\.kvt")
# In a store's directory, besides its segments.
_OTHER_NAMES = {"store.json", "store.new", "LOCK", "target.sock", "lost+found"}
_NAMED_MAX = 5  # files of others
# Open files of a process besides its segments, at least.
_OTHER_FILES = 64


class Superblock(msgspec.Struct):
    version: int
    store: int  # random id, of which the stamps on headers are made (device.py)
    segment_bytes: int
    epoch: int  # how often the store was opened
    namespace: str = (
        ""  # whose headers are stamped with the store's id; "" in a store of release 0.1 and in a shared one
    )
    namespaces: list[str] = []  # others that may have values here


class Extent(NamedTuple):
    """The extent of a segment: its file, and its offset there."""

    fd: int
    offset: int


class Space(ABC):
    """`slots` segments of `segment_bytes`. Any thread may call `extent`; the rest is for start and end."""

    def __init__(self, path: Path, slots: int, segment_bytes: int, files: Files):
        self.path = path
        self.slots = slots
        self.segment_bytes = segment_bytes
        self.files = files

    @abstractmethod
    def extent(self, slot: int) -> Extent:
        """The slot's extent, its space allocated. Raises OSError."""

    @abstractmethod
    def used_slots(self) -> list[int]:
        """Slots that may hold a segment, also those beyond the capacity."""

    @property
    @abstractmethod
    def open_files(self) -> int:
        """How many there may be."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _read_superblock(self) -> Superblock | None: ...

    @abstractmethod
    def _write_superblock(self, block: Superblock) -> None:
        """Durable when it returns; a crash leaves the old one or the new one."""

    @contextlib.contextmanager
    def reading(self, slot: int) -> Iterator[Extent]:
        """The slot's extent, open for reading alone. Raises OSError."""
        yield self.extent(slot)

    def delete(self, slot: int) -> None:  # noqa: B027
        """Give the space of a slot beyond the capacity back."""

    def new_superblock(self, namespace: str) -> Superblock:
        return Superblock(record.VERSION, secrets.randbits(63), self.segment_bytes, 0, namespace)

    def superblock(self) -> Superblock | None:
        """The superblock as it is, None in a new store. Raises ConfigError if it is of another store or unreadable."""
        with _oserror_in_words(self.path):
            block = self._read_superblock()
        if block is None:
            return None
        _check_version(self.path, block)
        if block.segment_bytes != self.segment_bytes:
            expected = f"{block.segment_bytes}, with which this store was made: leave it out, or empty the store"
            raise ConfigError("segment-size", self.segment_bytes, expected)
        return block

    def check_superblock(self, block: Superblock) -> None:  # noqa: B027
        """Raises ConfigError if there is no room for it."""

    def write(self, block: Superblock) -> None:
        """Raises ConfigError if that cannot be done."""
        block.version = SHARED_VERSION if block.namespaces else record.VERSION
        self.check_superblock(block)
        with _oserror_in_words(self.path):
            self._write_superblock(block)


def stored_segment_bytes(path: Path) -> int | None:
    """The segment size of the store that is there; None if there is none, or none that can be read: opening it says
    why."""
    try:
        if path.is_dir():
            block = _directory_superblock(path)
        else:
            fd = _open_read_only(path)
            try:
                block = _latest_superblock(_superblock_pages(fd, Files()))
            finally:
                os.close(fd)
    except (OSError, ConfigError):
        return None
    return block.segment_bytes if block else None


def open_space(path: Path, capacity_bytes: int, segment_bytes: int, files: Files) -> Space:
    """A directory's space or a device's, locked. Raises ConfigError if it cannot hold this store."""
    with _oserror_in_words(path):
        if path.is_dir():
            return _DirectorySpace(path, capacity_bytes, segment_bytes, files)
        if path.is_block_device() or path.is_file():
            return _DeviceSpace(path, capacity_bytes, segment_bytes, files)
    raise ConfigError("dir", path, "a directory that exists or a block device: create it, or mount the device there")


class _DirectorySpace(Space):
    def __init__(self, path: Path, capacity_bytes: int, segment_bytes: int, files: Files):
        super().__init__(path, capacity_bytes // segment_bytes, segment_bytes, files)
        self._fds: dict[int, int] = {}
        self._guard = _locked(path, path / "LOCK")
        _say_foreign(path)
        try:
            self._check_room(capacity_bytes)
            _allow_open_files(self.slots, segment_bytes)
        except BaseException:
            os.close(self._guard)
            raise

    def extent(self, slot: int) -> Extent:
        if slot not in self._fds:
            self._fds[slot] = self.files.open(segment_file(self.path, slot), self.segment_bytes)
        return Extent(self._fds[slot], 0)

    @contextlib.contextmanager
    def reading(self, slot: int) -> Iterator[Extent]:
        fd = _open_read_only(segment_file(self.path, slot))
        try:
            yield Extent(fd, 0)
        finally:
            os.close(fd)

    def delete(self, slot: int) -> None:
        logger.info("%s is beyond the capacity now: deleted", segment_file(self.path, slot))
        segment_file(self.path, slot).unlink()

    def used_slots(self) -> list[int]:
        return _slots(self.path)

    @property
    def open_files(self) -> int:
        return self.slots

    def close(self) -> None:
        for fd in self._fds.values():
            self.files.close(fd)
        self._fds.clear()
        os.close(self._guard)

    def _read_superblock(self) -> Superblock | None:
        return _directory_superblock(self.path)

    def _write_superblock(self, block: Superblock) -> None:
        temporary = self.path / "store.new"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(block))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "store.json")
        directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _check_room(self, capacity_bytes: int) -> None:
        """A capacity that the file system does not have is refused now, not when the disk is full."""
        held = sum(os.stat(segment_file(self.path, slot)).st_blocks * 512 for slot in _slots(self.path))
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        if self.slots * self.segment_bytes > held + free:
            expected = f"at most the {in_units(held + free)} that are free in {self.path}"
            raise ConfigError("capacity", in_units(capacity_bytes), expected)


class _DeviceSpace(Space):
    def __init__(self, path: Path, capacity_bytes: int, segment_bytes: int, files: Files):
        super().__init__(path, (capacity_bytes - _RESERVED_BYTES) // segment_bytes, segment_bytes, files)
        self._guard = _locked(path, path)
        try:
            size = os.lseek(self._guard, 0, os.SEEK_END)
            if capacity_bytes > size:
                raise ConfigError("capacity", in_units(capacity_bytes), f"at most the {in_units(size)} of {path}")
            self._fd = files.open(path, size)
        except BaseException:
            os.close(self._guard)
            raise

    def extent(self, slot: int) -> Extent:
        return Extent(self._fd, _RESERVED_BYTES + slot * self.segment_bytes)

    def used_slots(self) -> list[int]:
        return list(range(self.slots))

    @property
    def open_files(self) -> int:
        return 1

    def close(self) -> None:
        self.files.close(self._fd)
        os.close(self._guard)

    def _read_superblock(self) -> Superblock | None:
        block = _latest_superblock(_superblock_pages(self._fd, self.files))
        if block is None and not self._is_blank():
            raise ConfigError("dir", self.path, "a kvtier store or a device that begins with 1 MiB of zeros: wipe it")
        return block

    def _is_blank(self) -> bool:
        """Whether the device is unused: its first MiB is zeros. Most file systems and partition tables leave only the
        very first bytes free."""
        content = aligned(_RESERVED_BYTES - PAGE_BYTES).view
        self.files.read(self._fd, [content], 0)
        return not any(content)

    def check_superblock(self, block: Superblock) -> None:
        if len(msgspec.json.encode(block)) > PAGE_BYTES - 64:  # with room for a longer epoch
            count = len(block.namespaces) + bool(block.namespace)
            raise ConfigError(
                "namespaces", count, "fewer, or shorter names: a device's superblock has one page for all"
            )

    def _write_superblock(self, block: Superblock) -> None:
        content = msgspec.json.encode(block)
        page = aligned(PAGE_BYTES).payload
        head = _MAGIC + len(content).to_bytes(4, "little") + crc32c(content).to_bytes(4, "little")
        page[: len(head) + len(content)] = head + content
        for copy in (0, 1) if block.epoch == 1 else (block.epoch % 2,):  # a new store has both
            self.files.write(self._fd, [page], copy * PAGE_BYTES)
        self.files.sync(self._fd)


class StoppedStore:
    """A store that no target uses, opened for reading: nothing here writes, and no target starts on it before `close`.

    Raises ConfigError if there is none, or if it is in use.
    """

    def __init__(self, path: Path, files: Files):
        self.path = path
        self._in_directory = path.is_dir()
        if not (self._in_directory or path.is_block_device() or path.is_file()):
            raise ConfigError("dir", path, "a directory or a device that holds a store")
        self._guard = _kept_from_targets(path, path / "LOCK" if self._in_directory else path)
        try:
            self.superblock = self._read_superblock(files)
        except BaseException:
            self.close()
            raise

    def slots(self) -> list[int]:
        """Slots that may hold a segment."""
        if self._in_directory:
            return _slots(self.path)
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
        return list(range((size - _RESERVED_BYTES) // self.superblock.segment_bytes))

    def file(self, slot: int) -> Path:
        return segment_file(self.path, slot) if self._in_directory else self.path

    def offset(self, slot: int) -> int:
        """Where in that file the segment begins."""
        return 0 if self._in_directory else _RESERVED_BYTES + slot * self.superblock.segment_bytes

    @contextlib.contextmanager
    def extent(self, slot: int) -> Iterator[Extent]:
        """The slot's extent, open for reading. Raises OSError."""
        fd = _open_read_only(self.file(slot))
        try:
            yield Extent(fd, self.offset(slot))
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._guard is not None:
            os.close(self._guard)

    def _read_superblock(self, files: Files) -> Superblock:
        block = _directory_superblock(self.path) if self._in_directory else self._read_device_superblock(files)
        if block is None:
            raise ConfigError("dir", self.path, "a directory or a device that holds a store")
        _check_version(self.path, block)
        if block.segment_bytes < PAGE_BYTES or block.segment_bytes % PAGE_BYTES:
            raise ConfigError("dir", self.path, f"a store of whole pages, not segments of {block.segment_bytes} bytes")
        return block

    def _read_device_superblock(self, files: Files) -> Superblock | None:
        try:
            fd = _open_read_only(self.path)
            try:
                return _latest_superblock(_superblock_pages(fd, files))
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError("dir", self.path, f"a device that holds a store and can be read ({error})") from None


_MAGIC = b"KVTIERSB"


def _directory_superblock(path: Path) -> Superblock | None:
    try:
        return msgspec.json.decode((path / "store.json").read_bytes(), type=Superblock)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError("dir", path, f"a store whose store.json is readable ({error})") from None


def _superblock_pages(fd: int, files: Files) -> list[memoryview]:
    """The copies on a device, without one that cannot be read. Raises OSError if that is both."""
    pages = []
    for copy in range(2):
        page = aligned(PAGE_BYTES).payload
        try:
            files.read(fd, [page], copy * PAGE_BYTES)
            pages.append(page)
        except OSError as error:
            logger.error("superblock %d cannot be read: %s", copy, error)
            if copy and not pages:
                raise
    return pages


def _latest_superblock(pages: list[memoryview]) -> Superblock | None:
    blocks = []
    for page in pages:
        length, crc = int.from_bytes(page[8:12], "little"), int.from_bytes(page[12:16], "little")
        if bytes(page[:8]) == _MAGIC and length <= PAGE_BYTES - 16 and crc32c(page[16 : 16 + length]) == crc:
            with contextlib.suppress(msgspec.DecodeError):
                blocks.append(msgspec.json.decode(page[16 : 16 + length], type=Superblock))
    return max(blocks, key=lambda block: block.epoch, default=None)


@contextlib.contextmanager
def _oserror_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError("dir", path, f"a place that can be read and written ({error.strerror})") from error


def _check_version(path: Path, block: Superblock) -> None:
    if block.version not in (record.VERSION, SHARED_VERSION):
        raise ConfigError("dir", path, f"a store of format {record.VERSION}, this one has {block.version}: empty it")


def segment_file(directory: Path, slot: int) -> Path:
    return directory / f"segment-{slot:06d}.kvt"


def _allow_open_files(segments: int, segment_bytes: int) -> None:
    """Every segment is an open file. Without this, those beyond the usual limit of 1,024 could not be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and segments + _OTHER_FILES > hard:
        expected = f"a larger one: {segments} segments are as many open files, and this user may have {hard}"
        raise ConfigError("segment-size", segment_bytes, expected)


def _slots(directory: Path) -> list[int]:
    """The slots whose files are there."""
    found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(directory))
    slots = sorted({int(match.group(1)) for match in found if match})
    return [slot for slot in slots if segment_file(directory, slot).is_file()]


def say_foreign(directory: Path, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        logger.warning("%s has files of others, left alone: %s%s", directory, ", ".join(names[:_NAMED_MAX]), more)


def _say_foreign(directory: Path) -> None:
    """Name the files that are not a store's: nothing here reads, counts or deletes them."""
    ours = {segment_file(directory, slot).name for slot in _slots(directory)} | _OTHER_NAMES
    say_foreign(directory, sorted(set(os.listdir(directory)) - ours))


def _locked(space: Path, path: Path) -> int:
    """A descriptor of `path` with an exclusive lock that ends with this process."""
    try:
        create = 0 if stat.S_ISBLK(os.stat(space).st_mode) else os.O_CREAT
        guard = os.open(path, os.O_RDWR | create | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError("dir", space, f"one that this user can write to ({error})") from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(guard)
        raise ConfigError("dir", space, "one that no other target is using: give each target its own") from None
    return guard


def _kept_from_targets(space: Path, path: Path) -> int | None:
    """A descriptor of `path` with a shared lock, which excludes targets; None if there is nothing to lock."""
    try:
        guard = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError("dir", space, f"one that this user can read ({error})") from None
    try:
        fcntl.flock(guard, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(guard)
        raise ConfigError("dir", space, "a stopped store: a target is using this one, stop it first") from None
    return guard


def _open_read_only(path: Path) -> int:
    """For direct I/O, where the file system has it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
