"""Memory for values in flight between disk and socket, which is also the hot cache (LRU).

A buffer holds a record in its on-disk form (record.py): a page for the header, then the payload. If a buffer holds a
value when it is given back, the value stays findable under its key until the memory is needed. So the hot cache costs
no copy. A dirty value, which is not on disk yet, is findable, too, and is never evicted.

All buffers are allocated from one arena of huge pages; a shared arena only if the system has huge pages for shared
memory. The first touch of a page costs more than filling it (0.3 to 1.5 GB/s against 6), so a thread touches the arena
ahead of use.
"""

import bisect
import fcntl
import math
import mmap
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence

from kvstore.disk.record import PAGE_BYTES, record_bytes

_TOUCH_BYTES = 8 << 20
# Memory is short below this share: as much as two dozen stalled clients leave free (net/queues.py).
_SHORT = 1 / 4
_F_SEAL_FUTURE_WRITE = 0x10  # since Linux 5.1; not in fcntl


class Buffer:
    """Page-aligned memory of `record_bytes(length)`, in use by one or more holders or kept as cache."""

    __slots__ = ("crc", "holders", "is_ahead", "key", "length", "offset", "used_at", "view")

    def __init__(self, view: memoryview, offset: int, length: int):
        self.view = view
        self.offset = offset  # in the arena
        self.length = length
        self.holders = 1
        self.key = b""  # of the value it is kept for
        self.crc = 0
        self.used_at = 0.0  # when the value was kept or last requested
        self.is_ahead = False  # prefetched, and not requested yet

    @property
    def record(self) -> memoryview:
        """Header and payload, padded to whole pages."""
        return self.view

    @property
    def payload(self) -> memoryview:
        return self.view[PAGE_BYTES : PAGE_BYTES + self.length]


def aligned(length: int) -> Buffer:
    """A buffer outside any pool."""
    return Buffer(memoryview(mmap.mmap(-1, record_bytes(length))), 0, length)


class Arena:
    """One piece of memory, cut into extents that are joined again when they come back. Not thread-safe.

    Allocation is first fit, in pages. Chunks of one model have one length, so there is no fragmentation. A shared arena
    is an unnamed file, `descriptor`, sealed so that others can neither write to it nor truncate it.
    """

    def __init__(self, total_bytes: int, *, shared: bool = False):
        self.total_bytes = total_bytes
        self.descriptor: int | None = None
        if shared:
            self.descriptor = os.memfd_create("kvtier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.descriptor, total_bytes)
            self._memory = mmap.mmap(self.descriptor, total_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            weakref.finalize(self, os.close, self.descriptor)
        else:
            self._memory = mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        self._starts: list[int] = []  # of the free extents, sorted
        self._ends: dict[int, int] = {}  # start -> end

    def __getitem__(self, extent: slice) -> memoryview:
        return self._view[extent]

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes, or None if there is no extent that long."""
        for place, start in enumerate(self._starts):
            end = self._ends[start]
            if end - start >= size:
                del self._starts[place], self._ends[start]
                if end - start > size:
                    self._starts.insert(place, start + size)
                    self._ends[start + size] = end
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        end = start + size
        place = bisect.bisect(self._starts, start)
        if end in self._ends:  # joins the one behind it
            end = self._ends.pop(end)
            del self._starts[place]
        if place and self._ends[self._starts[place - 1]] == start:  # and the one before it
            self._ends[self._starts[place - 1]] = end
            return
        self._starts.insert(place, start)
        self._ends[start] = end


class BufferPool:
    """Hands out buffers and finds values in those that came back. Thread-safe."""

    def __init__(self, total_bytes: int, *, keeps_values: bool = False, shared: bool = False):
        self._keeps_values = keeps_values
        self.arena = Arena(-(-total_bytes // PAGE_BYTES) * PAGE_BYTES, shared=shared)
        self._values: OrderedDict[bytes, Buffer] = OrderedDict()  # least recently used first
        self._dirty: dict[bytes, Buffer] = {}
        self._dirty_bytes = 0  # of whole buffers, which are not among those held
        self._kept_bytes = 0
        self._held_bytes = 0  # by those who are filling or sending it
        self.is_growing = True  # not all of the arena is touched yet
        self.ahead_used = 0  # prefetched values that were requested later
        self._returned = threading.Condition()
        threading.Thread(target=self._touch, name="kvtier-touch", daemon=True).start()

    @property
    def available_bytes(self) -> int:
        """Bytes that no one holds: free, or cached and evictable. Dirty values do not count."""
        return self.arena.total_bytes - self._dirty_bytes - self._held_bytes

    @property
    def is_idle(self) -> bool:
        return not self._held_bytes

    @property
    def is_short(self) -> bool:
        return self.available_bytes < _SHORT * (self.arena.total_bytes - self._dirty_bytes)

    @property
    def kept(self) -> tuple[int, int]:
        """The number of findable values, and their bytes."""
        return len(self._values) + len(self._dirty), self._kept_bytes

    def take(self, length: int, deadline: float) -> Buffer | None:
        """A buffer for a payload of `length` bytes, held by the caller; None if there was no memory for it before
        `deadline` (time.monotonic())."""
        with self._returned:
            return self._take(length, deadline)

    def take_all(self, lengths: Sequence[int], deadline: float) -> list[Buffer | None]:
        """The same for several."""
        with self._returned:
            return [self._take(length, deadline) for length in lengths]

    def _take(self, length: int, deadline: float) -> Buffer | None:
        size = record_bytes(length)
        if size > self.arena.total_bytes:
            return None
        while (offset := self.arena.take(size)) is None:
            if not self._drop_oldest() and not self._returned.wait(deadline - time.monotonic()):
                return None
        self._held_bytes += size
        return Buffer(self.arena[offset : offset + size], offset, length)

    def take_unused(self, length: int, since: float) -> Buffer | None:
        """The same, but only from free memory and from values that were not requested after `since`
        (time.monotonic()); None if that is not enough. Dropped values may not be adjacent, so it drops up to twice the
        length."""
        size = record_bytes(length)
        with self._returned:
            least = self._kept_bytes - 2 * size
            while (offset := self.arena.take(size)) is None:
                if self._kept_bytes <= least or not self._drop_oldest(since):
                    return None
            self._held_bytes += size
            return Buffer(self.arena[offset : offset + size], offset, length)

    def touch(self, key: bytes) -> None:
        """Mark a value as recently used, because it will be requested."""
        with self._returned:
            if key in self._values:
                self._use(key, self._values[key])

    def _use(self, key: bytes, buffer: Buffer) -> None:
        self._values.move_to_end(key)
        buffer.used_at = time.monotonic()

    def __contains__(self, key: bytes) -> bool:
        return key in self._dirty or key in self._values  # the way that a chunk moves

    def find(self, key: bytes, length: int) -> Buffer | None:
        """The buffer that holds the value of `key`, held by the caller now; None if there is none of that length."""
        with self._returned:
            buffer = self._dirty.get(key) or self._values.get(key)
            if buffer is None or buffer.length != length:
                return None
            if key in self._values:
                self._use(key, buffer)
            if buffer.is_ahead:
                buffer.is_ahead = False
                self.ahead_used += 1
            if not buffer.holders:
                self._held_bytes += len(buffer.view)
            buffer.holders += 1
            return buffer

    def keep(self, key: bytes, buffer: Buffer, crc: int, *, is_ahead: bool = False) -> None:
        """Make `buffer` findable under `key`. The caller holds it, and no one may write to it after this."""
        if not self._keeps_values:
            return
        with self._returned:
            if key not in self and not buffer.key:
                buffer.key, buffer.crc, buffer.is_ahead = key, crc, is_ahead
                self._values[key] = buffer
                self._use(key, buffer)
                self._kept_bytes += buffer.length

    def keep_dirty(self, key: bytes, buffer: Buffer, crc: int) -> None:
        """The same for a value that is not on disk. It stays until `clean` or `discard`; until then the caller must
        hold `buffer`."""
        with self._returned:
            self._forget(key)
            buffer.key, buffer.crc = key, crc
            self._dirty[key] = buffer
            self._dirty_bytes += len(buffer.view)
            self._held_bytes -= len(buffer.view)
            self._kept_bytes += buffer.length

    def clean(self, key: bytes) -> None:
        """Note that a dirty value is on disk now, and may be evicted."""
        with self._returned:
            self._values[key] = self._no_more_dirty(key)
            self._use(key, self._values[key])

    def discard(self, key: bytes) -> None:
        """Remove a dirty value. Its buffer stays valid for those that are sending it."""
        with self._returned:
            buffer = self._no_more_dirty(key)
            buffer.key = b""
            self._kept_bytes -= buffer.length

    def _no_more_dirty(self, key: bytes) -> Buffer:
        buffer = self._dirty.pop(key)
        self._dirty_bytes -= len(buffer.view)
        self._held_bytes += len(buffer.view)
        return buffer

    def _forget(self, key: bytes) -> None:
        """A value that may be there from before is not to be found any more."""
        buffer = self._values.pop(key, None)
        if buffer is None:
            return
        buffer.key = b""
        self._kept_bytes -= buffer.length
        if not buffer.holders:
            self.arena.give_back(buffer.offset, len(buffer.view))

    def give_back(self, *buffers: Buffer) -> None:
        with self._returned:
            for buffer in buffers:
                buffer.holders -= 1
                if not buffer.holders:
                    self._held_bytes -= len(buffer.view)
                    if not buffer.key:
                        self.arena.give_back(buffer.offset, len(buffer.view))
            self._returned.notify_all()  # who comes first may want more than this, another one less

    def _drop_oldest(self, since: float = math.inf) -> bool:
        """Evict the least recently used value, unless it was used after `since`. Skips values that are held."""
        for key, buffer in self._values.items():
            if buffer.used_at > since:
                return False
            if not buffer.holders:
                self._forget(key)
                return True
        return False

    def _touch(self) -> None:
        """Make the arena's memory available piece by piece, touched. Reading zeros touches it without the interpreter's
        lock."""
        zeros = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        for start in range(0, self.arena.total_bytes, _TOUCH_BYTES):
            piece = self.arena[start : start + _TOUCH_BYTES]
            os.preadv(zeros, [piece], 0)
            with self._returned:
                self.arena.give_back(start, len(piece))
                self._returned.notify_all()
        self.is_growing = False
        os.close(zeros)
