"""Queues before a device: reads with fair queueing and admission control, writes with a bound in bytes.

Each log has one queue of each kind, with a few threads that block in the device's system calls. Adjacent small chunks
are read and written together. A write is acknowledged when it is on the device or, with write-behind, in memory.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.disk.buffers import Buffer, BufferPool
from kvstore.disk.log import Log
from kvstore.disk.record import record_bytes
from kvstore.net.backlog import Backlog, Standing, Write
from kvstore.net.wire import Outcome

logger = logging.getLogger(__name__)

# Batch size for small chunks: a device reaches its full throughput at or below this size (fio, 1 to 4 MiB).
BATCH_BYTES = 4 << 20
# Concurrent reads per device: NVMe needs about this many of 2 MiB for its full throughput.
READERS = 8
# Few, so that reads get most of the device.
WRITERS = 2
# Limit of chunks that wait to be read from a device; each takes about a hundred bytes of memory. A client may have at
# most half of the part that other clients leave free.
WAITING_CHUNKS_MAX = 65_536
# Flow-control window of a connection: bytes that were read for it and not sent yet. Also bounded by a share of the free
# memory: however many clients stall, some memory stays free for the others (dynamic thresholds, Choudhury and Hahne,
# 1998). With an eighth, 24 stalled clients leave a quarter of the memory. With the default buffers, a single connection
# still gets its whole window.
WINDOW_BYTES = 32 << 20
_WINDOW_SHARE = 1 / 8
# The share for a connection that holds nothing yet, so that late connections get memory, too.
_FIRST_SHARE = 1 / 2
# A read that waits this long for memory is refused, because it blocks a thread that other reads need.
_BUFFER_SECONDS = 0.1
# Why an offered chunk was not stored, or was dropped after it was acknowledged.
DROP_REASONS = ("no_room", "displaced", "orphaned", "failed", "stopped")
# Polling interval for connections whose window was full: memory that others free may have widened it.
_LOOK_SECONDS = 0.02
# Throughput is measured over busy periods of this length.
_SPEED_SECONDS = 0.2
# A measurement is valid this long. Under overload there are new ones all the time; after it, an old one must not refuse
# reads.
_SPEED_VALID_SECONDS = 1.0


class Want(NamedTuple):
    """A chunk that a client requested; `number` is its index in the request."""

    number: int
    key: bytes
    length: int


class Answer(NamedTuple):
    """The result for a Want. A HIT carries a buffer, which the receiver must give back to the pool."""

    want: Want
    outcome: Outcome
    buffer: Buffer | None = None
    crc: int = 0


class _Delay:
    """An upper estimate of a delay: mean plus four deviations, as in TCP's retransmission timer (Jacobson, 1988)."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._deviation = 0.0

    @property
    def seconds(self) -> float:
        return max(0.0, self._mean + 4 * self._deviation)

    def add(self, seconds: float) -> None:
        error = seconds - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4


class _SendRate:
    """Send rate of one connection, over about its last ten sends, so that a client that slows down shows within a few.
    It never expires: it is used only while bytes are unsent."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self._bytes = 0.9 * self._bytes + size
        self._seconds = 0.9 * self._seconds + seconds

    def seconds(self, size: int) -> float:
        """Expected duration of a transfer of `size` bytes; 0 without a measurement."""
        return size * self._seconds / self._bytes if self._bytes else 0.0


class ConnectionWindow:
    """Flow control of one connection of `client`: bytes queued, bytes read but unsent, send rate. Thread-safe."""

    def __init__(self, client: str, pool: BufferPool):
        self.client = client
        self._pool = pool
        self.gone = False
        self._lock = threading.Lock()
        self._waiting_bytes = 0  # to be read
        self._unsent_bytes = 0  # being read, or read and not yet sent
        self._sending = _SendRate()

    def sent(self, size: int, seconds: float) -> None:
        """Note that sending `size` bytes took `seconds`."""
        self._sending.add(size, seconds)

    def has_room(self, size: int) -> bool:
        if not self._unsent_bytes:
            return size <= _FIRST_SHARE * self._pool.available_bytes or self._pool.is_idle
        return self._unsent_bytes + size <= min(WINDOW_BYTES, _WINDOW_SHARE * self._pool.available_bytes)

    def begins_to_send(self, read_at: float, now: float) -> float:
        """When a chunk that is requested now, and read at `read_at`, starts to be sent: after all bytes ahead of it.
        With none ahead that is `read_at`, whatever the measured rate: the client may be faster by now."""
        behind_waiting = now + self._sending.seconds(self._unsent_bytes + self._waiting_bytes)
        return max(behind_waiting, self.sends_what_is_read(read_at))

    def sends_what_is_read(self, read_at: float, size: int = 0) -> float:
        """The same for a chunk that has left the queue; its `size` is already counted as unsent."""
        return read_at + self._sending.seconds(self._unsent_bytes - size)

    def wait_for(self, size: int) -> None:
        """Add to the bytes that wait to be read; negative removes."""
        with self._lock:
            self._waiting_bytes += size

    def hold(self, size: int) -> None:
        """Add to the bytes that are read but unsent; negative removes those that were sent or could not be read."""
        with self._lock:
            self._unsent_bytes += size


@dataclass
class Read:
    """Chunks of one request, to be read together. `done` is called once, on a thread of the queue, or on the caller's
    within `submit`. It must not block."""

    window: ConnectionWindow
    wants: Sequence[Want]
    deadline: float  # time.monotonic()
    done: Callable[[list[Answer]], None]
    expected: float = 0.0  # predicted time of completion; 0: none
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = sum(want.length for want in self.wants)

    def all(self, outcome: Outcome) -> list[Answer]:
        return [Answer(want, outcome) for want in self.wants]


@dataclass
class _Client:
    """A client's queued reads, round-robin over its connections."""

    reads: OrderedDict[ConnectionWindow, deque[Read]] = field(default_factory=OrderedDict)
    chunks: int = 0
    size_bytes: int = 0

    def next(self, now: float) -> ConnectionWindow | None:
        """The next connection whose window has room for its first read, or whose first read has expired."""
        for window, reads in self.reads.items():
            if now > reads[0].deadline or window.has_room(reads[0].size_bytes):
                return window
        return None


class ReadQueue:
    """Reads a log's chunks. Round-robin fair queueing over clients, then over their connections. Admission control: a
    read that is predicted to miss its deadline is refused on `submit`. Expired reads are not executed."""

    def __init__(self, log: Log, pool: BufferPool, *, threads: int = READERS):
        self._log = log
        self._pool = pool
        self._threads = threads
        self._changed = threading.Condition()
        self._turns: OrderedDict[str, _Client] = OrderedDict()
        self._waiting_chunks = 0
        self._waiting_bytes = 0
        self._active = 0
        self._active_bytes = 0
        self._speed = 0.0  # bytes per second
        self._speed_until = 0.0  # the measurement expires at this time
        self._lateness = _Delay()  # of reads, against their prediction
        self._busy_since = 0.0  # since when all threads are busy; 0: they are not
        self._busy_bytes = 0
        self._stopping = False
        for number in range(threads):
            threading.Thread(target=self._work, name=f"kvtier-read-{number}", daemon=True).start()

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    @property
    def bytes_per_second(self) -> float:
        """The device's limit: read throughput while all threads were busy, in the last such period alone, so that
        admission control follows a device that slows down; 0 if there was none within the last second."""
        return self._speed if time.monotonic() < self._speed_until else 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a read is running, or could start."""
        now = time.monotonic()
        with self._changed:
            return self._active > 0 or any(client.next(now) for client in self._turns.values())

    def submit(self, reads: Sequence[Read]) -> None:
        """Queue reads of one connection. Reads that are refused or late are answered before this returns."""
        refused = []
        now = time.monotonic()
        with self._changed:
            for read in reads:
                if now > read.deadline or self._must_refuse(read, now):
                    refused.append(read)
                else:
                    self._add(read)
            self._changed.notify(len(reads))
        for read in refused:
            read.done(read.all(Outcome.LATE if now > read.deadline else Outcome.REFUSED))

    def wake(self) -> None:
        """Note that a connection's window has room again."""
        with self._changed:
            self._changed.notify()

    def drop(self, window: ConnectionWindow) -> None:
        """Discard the reads of a connection that is gone."""
        window.gone = True
        with self._changed:
            client = self._turns.get(window.client)
            while client and window in client.reads:
                self._remove(client, window)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _must_refuse(self, read: Read, now: float) -> bool:
        """Whether the queue is full for this client, or the read is predicted to miss its deadline."""
        client = self._turns.get(read.window.client, _Client())
        if self._waiting_chunks + client.chunks + len(read.wants) > WAITING_CHUNKS_MAX:
            return True
        read_at = now
        if now < self._speed_until:
            read.expected = now + self._bytes_until(client, read) / self._speed
            # With no read active, admit one in any case: the estimate must notice when the device recovers.
            read_at = read.expected + self._lateness.seconds if self._active else now
        return read.window.begins_to_send(read_at, now) > read.deadline

    def _will_be_late(self, read: Read, now: float) -> bool:
        """Whether a read that starts now is predicted to be sent after its deadline."""
        known = now < self._speed_until and self._active > 1
        read_at = now + self._active_bytes / self._speed if known else now
        return read.window.sends_what_is_read(read_at, read.size_bytes) > read.deadline

    def _bytes_until(self, client: _Client, read: Read) -> int:
        """Bytes that the device reads until this one is done. By round-robin, every other client that is not blocked by
        its windows gets as many bytes as this one."""
        now, own = time.monotonic(), client.size_bytes + read.size_bytes
        others = (one for one in self._turns.values() if one is not client and one.next(now))
        return self._active_bytes + own + sum(min(own, one.size_bytes) for one in others)

    def _add(self, read: Read) -> None:
        client = self._turns.setdefault(read.window.client, _Client())
        client.reads.setdefault(read.window, deque()).append(read)
        self._count(client, read.window, len(read.wants), read.size_bytes)

    def _remove(self, client: _Client, window: ConnectionWindow) -> Read:
        """Remove and return the connection's first read."""
        reads = client.reads[window]
        read = reads.popleft()
        self._count(client, window, -len(read.wants), -read.size_bytes)
        if not reads:
            del client.reads[window]
        if not client.reads:
            del self._turns[window.client]
        return read

    def _count(self, client: _Client, window: ConnectionWindow, chunks: int, size_bytes: int) -> None:
        window.wait_for(size_bytes)
        client.chunks += chunks
        client.size_bytes += size_bytes
        self._waiting_chunks += chunks
        self._waiting_bytes += size_bytes

    def _next(self) -> Read | None:
        """The next read, round-robin. A connection whose window is full is skipped."""
        now = time.monotonic()
        for name, client in self._turns.items():
            window = client.next(now)
            if window is not None:
                self._turns.move_to_end(name)
                client.reads.move_to_end(window)
                read = self._remove(client, window)
                window.hold(read.size_bytes)
                return read
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (read := self._next()) is None:
                    if self._stopping:
                        return
                    self._busy_since = 0.0
                    self._changed.wait(_LOOK_SECONDS if self._turns else None)
                self._begin(read)
            try:
                answers = self._read(read)
            except Exception:
                logger.exception("unexpected error: a read failed")
                answers = read.all(Outcome.CORRUPT)
            read_bytes = sum(answer.buffer.length for answer in answers if answer.buffer)
            with self._changed:
                self._end(read, read_bytes)
            read.window.hold(read_bytes - read.size_bytes)
            read.done(answers)

    def _begin(self, read: Read) -> None:
        self._active += 1
        self._active_bytes += read.size_bytes
        if self._active == self._threads and not self._busy_since:
            self._busy_since, self._busy_bytes = time.monotonic(), 0

    def _end(self, read: Read, read_bytes: int) -> None:
        """Measure throughput only while all threads are busy: otherwise the demand limits it, not the device."""
        if read.expected:
            self._lateness.add(time.monotonic() - read.expected)
        self._active -= 1
        self._active_bytes -= read.size_bytes
        self._busy_bytes += read_bytes
        elapsed = time.monotonic() - self._busy_since
        if self._busy_since and elapsed > _SPEED_SECONDS:
            now = time.monotonic()
            self._speed, self._speed_until = self._busy_bytes / elapsed, now + _SPEED_VALID_SECONDS
            self._busy_since, self._busy_bytes = now, 0

    def _read(self, read: Read) -> list[Answer]:
        if read.window.gone:
            return read.all(Outcome.MISS)
        now = time.monotonic()
        if now > read.deadline or self._will_be_late(read, now):
            return read.all(Outcome.LATE)
        answers, absent = [], []
        for want in read.wants:
            # Another request may have read it in the meantime.
            hot = self._pool.find(want.key, want.length) if want.key in self._pool else None
            if hot is None:
                absent.append(want)
            else:
                self._log.used(want.key)
                answers.append(Answer(want, Outcome.HIT, hot, hot.crc))
        taken = self._pool.take_all([want.length for want in absent], min(read.deadline, now + _BUFFER_SECONDS))
        answers += [Answer(want, Outcome.REFUSED) for want, buffer in zip(absent, taken, strict=True) if buffer is None]
        wants = [want for want, buffer in zip(absent, taken, strict=True) if buffer is not None]
        buffers = [buffer for buffer in taken if buffer is not None]
        found = self._log.read([want.key for want in wants], buffers)
        for want, buffer, one in zip(wants, buffers, found, strict=True):
            if one is not None and one.intact:
                self._pool.keep(want.key, buffer, one.entry.crc)
                answers.append(Answer(want, Outcome.HIT, buffer, one.entry.crc))
            else:
                self._pool.give_back(buffer)
                answers.append(Answer(want, Outcome.MISS if one is None else Outcome.CORRUPT))
        return answers


class WriteQueue:
    """Writes chunks in order of arrival. Under overload it drops those of least benefit (backlog.py).

    `bytes_max` bounds the chunks that wait or are being received. Reads use the same pool of buffers, so it should be a
    part of the pool's size. With `behind` (write-behind) a chunk counts as stored, and the pool serves it, from its
    `offer` on. Then `bytes_max` includes chunks that are being written. A chunk that is dropped after that, or whose
    write fails, is unpublished.
    """

    def __init__(self, log: Log, pool: BufferPool, bytes_max: int, *, threads: int = WRITERS, behind: bool = False):
        self._log = log
        self._pool = pool
        self._bytes_max = bytes_max
        self._behind = behind
        self._changed = threading.Condition()
        self._backlog = Backlog(log.is_used)
        self._pending: dict[bytes, Write] = {}  # waiting or being written
        self._coming_bytes = 0  # reserved for payloads that are being received
        self._writing_bytes = 0
        self._stopping = False
        self.dropped = Counter(dict.fromkeys(DROP_REASONS, 0))  # chunks
        for number in range(threads):
            threading.Thread(target=self._work, name=f"kvtier-write-{number}", daemon=True).start()

    @property
    def waiting_bytes(self) -> int:
        return self._backlog.size_bytes

    @property
    def bytes_max(self) -> int:
        """With write-behind at most half of the log's capacity, which may change."""
        return min(self._bytes_max, self._log.capacity_bytes // 2) if self._behind else self._bytes_max

    @property
    def is_busy(self) -> bool:
        return bool(self._backlog) or self._writing_bytes > 0

    def join(self, key: bytes, done: Callable[[Outcome], None]) -> bool:
        """If the chunk waits already and is not acknowledged, add `done` to its callbacks; return whether it was."""
        with self._changed:
            write = None if self._behind else self._pending.get(key)
            if write is not None:
                write.done.append(done)
            return write is not None

    def expect(self, key: bytes, length: int, standing: Standing, until: float) -> bool:
        """Reserve room for a payload before it is received; False if there is none. Drops chunks of lower rank, or
        blocks for room until `until` (time.monotonic()). After True, `offer` or `give_up` must follow."""
        size = record_bytes(length)
        with self._changed:
            orphan = self._backlog.is_orphan(standing)
            displaced = None if orphan else self._backlog.drop_below(standing, self._excess_bytes(size))
            while displaced is None:
                if orphan or self._stopping or not self._changed.wait(until - time.monotonic()):
                    if self._is_lost(key):
                        self._backlog.note_dropped([standing])
                        self.dropped["orphaned" if orphan else "no_room"] += 1
                    return False
                displaced = self._backlog.drop_below(standing, self._excess_bytes(size))
            self._coming_bytes += size
            self._drop(displaced, "displaced")
        for write in displaced:
            self._finish(write, Outcome.REFUSED)
        return True

    def give_up(self, key: bytes, length: int, standing: Standing | None = None) -> None:
        """Release the reservation of a payload that did not arrive intact. `standing` is given if successors of the
        chunk may still arrive: they are refused then."""
        with self._changed:
            self._coming_bytes -= record_bytes(length)
            if standing is not None and self._is_lost(key):
                self._backlog.note_dropped([standing])
            self._changed.notify_all()

    def _is_lost(self, key: bytes) -> bool:
        """Whether no other client's copy of the chunk is pending or stored. With the lock held."""
        return key not in self._pending and key not in self._log

    def offer(self, write: Write) -> None:
        """Queue a chunk after `expect`. The queue owns its buffer from now on."""
        with self._changed:
            self._coming_bytes -= write.size_bytes
            outcome = self._queue(write)
            answered: list[Callable[[Outcome], None]] = []
            if outcome is None and self._behind:
                answered, write.done = write.done, answered
            self._changed.notify_all()  # wakes writers and calls of `expect`
        if outcome is not None:
            self._finish(write, outcome)
        for done in answered:
            done(Outcome.STORED)

    def _queue(self, write: Write) -> Outcome | None:
        """Queue a chunk and return None; if it is known or refused, return its outcome. With the lock held."""
        key = write.value.key
        known = self._pending.get(key)
        if known is not None:
            if not self._behind:
                known.done.extend(write.done)
                write.done.clear()
            return Outcome.STORED
        if self._stopping or self._backlog.is_orphan(write.standing):
            self._backlog.note_dropped([write.standing])
            self.dropped["stopped" if self._stopping else "orphaned"] += 1
            return Outcome.REFUSED
        if self._behind:
            self._pool.keep_dirty(key, write.value.buffer, write.value.crc)  # readable before it is published
            if not self._log.show(write.value):
                self._pool.discard(key)
                return Outcome.STORED
        self._backlog.add(write)
        self._pending[key] = write
        return None

    def stop(self, until: float) -> None:
        """Write the waiting chunks, and return. Chunks that still wait at `until` (time.monotonic()) are dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending, until - time.monotonic())
            left = self._backlog.clear()
            self._drop(left, "stopped")
        if left:
            logger.warning("%s: %d chunks were not written before the target stopped", self._log.path, len(left))
        for write in left:
            self._finish(write, Outcome.REFUSED)

    def _excess_bytes(self, size: int) -> int:
        """Bytes to drop before `size` more fit. An empty queue accepts one chunk of any size."""
        held = self._backlog.size_bytes + self._coming_bytes + (self._writing_bytes if self._behind else 0)
        return held + size - self.bytes_max if held else 0

    def _drop(self, writes: Sequence[Write], reason: str) -> None:
        """Forget chunks that left the queue without being stored. With the lock held, so that no client offers them
        again before that."""
        self.dropped[reason] += len(writes)
        if self._behind:
            self._log.withdraw(write.value.key for write in writes)  # unpublished before the memory is used again
        for write in writes:
            if self._behind:
                self._pool.discard(write.value.key)
            del self._pending[write.value.key]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._stopping)
                if not self._backlog:
                    return
                batch = self._backlog.take(BATCH_BYTES)
                size = sum(write.size_bytes for write in batch)
                self._writing_bytes += size
                self._changed.notify_all()
            try:
                stored = self._log.append([write.value for write in batch])
            except Exception:
                logger.exception("unexpected error: a write failed")
                stored = [False] * len(batch)
            written = [write for write, good in zip(batch, stored, strict=True) if good]
            failed = [write for write, good in zip(batch, stored, strict=True) if not good]
            with self._changed:
                for write in written:
                    self._keep(write)
                    del self._pending[write.value.key]
                self._drop(failed, "failed")
                self._backlog.note_dropped(write.standing for write in failed)
                self._writing_bytes -= size
                self._changed.notify_all()
            for write, good in zip(batch, stored, strict=True):
                self._finish(write, Outcome.STORED if good else Outcome.REFUSED)

    def _keep(self, write: Write) -> None:
        if self._behind:
            self._pool.clean(write.value.key)
        else:
            self._pool.keep(write.value.key, write.value.buffer, write.value.crc)

    def _finish(self, write: Write, outcome: Outcome) -> None:
        self._pool.give_back(write.value.buffer)
        for done in write.done:
            done(outcome)
