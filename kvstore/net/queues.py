"""What waits for a device: reads, fairly between clients and never past their deadlines; writes, bounded in bytes.

One queue of each kind a log, with a few threads that block in the device's calls. Small chunks that lie side by side
are read and written at once. A chunk is acknowledged when it is written, or, behind the write, when it is in memory.
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

# Small chunks are moved together up to this much: beyond it a device is as fast as it gets (fio, 1 to 4 MiB).
BATCH_BYTES = 4 << 20
# Reads under way on a device: NVMe needs about this many of 2 MiB for its full speed.
READERS = 8
# Few, so that writes leave the device to readers.
WRITERS = 2
# Chunks that may wait to be read from a device; each is some hundred bytes of memory. A client may have as many as it
# leaves to the others.
WAITING_CHUNKS_MAX = 65_536
# What is read for a connection and not taken by its client is at most this, and at most a share of what is available:
# however many clients stall, some memory is left for the others (dynamic thresholds, Choudhury and Hahne, 1998). With
# an eighth, 24 that stall leave a quarter of it; with the default buffers a connection alone still has all its window.
WINDOW_BYTES = 32 << 20
_WINDOW_SHARE = 1 / 8
# Of a connection that holds nothing yet: one that comes late gets something, too.
_FIRST_SHARE = 1 / 2
# A read that finds no memory for so long is refused: it keeps a thread from others.
_BUFFER_SECONDS = 0.1
# Why a chunk that was offered is not stored, or not any more.
DROP_REASONS = ("no_room", "displaced", "orphaned", "failed", "stopped")
# How often those are looked at again who had no room, in case that others made some.
_LOOK_SECONDS = 0.02
# A queue's speed is what it moved in the last busy stretch of this length.
_SPEED_SECONDS = 0.2
# Under overload it is measured all the time. Once that is over, an old figure must not refuse anything.
_SPEED_VALID_SECONDS = 1.0


class Want(NamedTuple):
    """A chunk that a client waits for: number `number` of its request."""

    number: int
    key: bytes
    length: int


class Answer(NamedTuple):
    """What became of a Want. With a HIT comes a buffer, which the receiver has to give back to the pool."""

    want: Want
    outcome: Outcome
    buffer: Buffer | None = None
    crc: int = 0


class _Delay:
    """How long something takes most of the time: TCP's estimate of a round trip (Jacobson, 1988)."""

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


class _Speed:
    """Bytes over seconds, mostly of the last ten transfers."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self._bytes = 0.9 * self._bytes + size
        self._seconds = 0.9 * self._seconds + seconds

    def seconds(self, size: int) -> float:
        """For so many bytes; 0 if nothing is known."""
        return size * self._seconds / self._bytes if self._bytes else 0.0


class Reader:
    """Where reads come from: a connection of `client`. Thread-safe."""

    def __init__(self, client: str, pool: BufferPool):
        self.client = client
        self._pool = pool
        self.gone = False
        self._lock = threading.Lock()
        self._waiting_bytes = 0  # to be read
        self._unsent_bytes = 0  # being read, or read and not sent yet
        self._sending = _Speed()

    def sent(self, size: int, seconds: float) -> None:
        """Sending so much to it took so long."""
        self._sending.add(size, seconds)

    def has_room(self, size: int) -> bool:
        if not self._unsent_bytes:
            return size <= _FIRST_SHARE * self._pool.available_bytes or self._pool.is_idle
        return self._unsent_bytes + size <= min(WINDOW_BYTES, _WINDOW_SHARE * self._pool.available_bytes)

    def begins_to_send(self, read_at: float, now: float) -> float:
        """When something that is asked for now, and read at `read_at`, comes after all that is ahead of it. With
        nothing ahead that is at once, whatever was measured: its client may be quicker by now."""
        behind_waiting = now + self._sending.seconds(self._unsent_bytes + self._waiting_bytes)
        return max(behind_waiting, self.sends_what_is_read(read_at))

    def sends_what_is_read(self, read_at: float, size: int = 0) -> float:
        """The same of something that does not wait any more, and of whose `size` is being held."""
        return read_at + self._sending.seconds(self._unsent_bytes - size)

    def wait_for(self, size: int) -> None:
        """Account for bytes that wait to be read; negative: that do so no more."""
        with self._lock:
            self._waiting_bytes += size

    def hold(self, size: int) -> None:
        """Account for bytes that are read for it; negative: that were sent, or are not to be had."""
        with self._lock:
            self._unsent_bytes += size


@dataclass
class Read:
    """Chunks of one request, to be read at once. `done` is called on a queue's thread, once, and must not block."""

    reader: Reader
    wants: Sequence[Want]
    deadline: float  # time.monotonic()
    done: Callable[[list[Answer]], None]
    expected: float = 0.0  # when it should be read
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = sum(want.length for want in self.wants)

    def all(self, outcome: Outcome) -> list[Answer]:
        return [Answer(want, outcome) for want in self.wants]


@dataclass
class _Client:
    """What waits for a client, by its connections, which take turns, too."""

    reads: OrderedDict[Reader, deque[Read]] = field(default_factory=OrderedDict)
    chunks: int = 0
    size_bytes: int = 0

    def next(self, now: float) -> Reader | None:
        """The connection whose turn it is: its first read has room, or has expired and needs none."""
        for reader, reads in self.reads.items():
            if now > reads[0].deadline or reader.has_room(reads[0].size_bytes):
                return reader
        return None


class ReadQueue:
    """Reads a log's chunks. Clients take turns, whatever each has waiting. What cannot be read before its deadline is
    refused at once, and what has expired is not read."""

    def __init__(self, log: Log, pool: BufferPool, *, threads: int = READERS):
        self._log = log
        self._pool = pool
        self._threads = threads
        self._changed = threading.Condition()
        self._turns: OrderedDict[str, _Client] = OrderedDict()
        self._waiting_chunks = 0
        self._waiting_bytes = 0
        self._under_way = 0
        self._under_way_bytes = 0
        self._speed = 0.0  # bytes per second
        self._speed_until = 0.0  # nothing is known of it later than this
        self._slip = _Delay()  # by how much reads come later than expected
        self._busy_since = 0.0  # all threads; 0: they are not
        self._busy_bytes = 0
        self._stopping = False
        for number in range(threads):
            threading.Thread(target=self._work, name=f"kvtier-read-{number}", daemon=True).start()

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    @property
    def bytes_per_second(self) -> float:
        """What the device read when all threads were busy; 0 if that was not lately."""
        return self._speed if time.monotonic() < self._speed_until else 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a read is under way, or could be."""
        now = time.monotonic()
        with self._changed:
            return self._under_way > 0 or any(client.next(now) for client in self._turns.values())

    def submit(self, reads: Sequence[Read]) -> None:
        """Queue reads of one reader; those that make no sense any more are answered before this returns."""
        refused = []
        now = time.monotonic()
        with self._changed:
            for read in reads:
                if now > read.deadline or self._is_hopeless(read, now):
                    refused.append(read)
                else:
                    self._add(read)
            self._changed.notify(len(reads))
        for read in refused:
            read.done(read.all(Outcome.LATE if now > read.deadline else Outcome.REFUSED))

    def wake(self) -> None:
        """A reader has room again."""
        with self._changed:
            self._changed.notify()

    def drop(self, reader: Reader) -> None:
        """The connection is gone: forget what it waits for."""
        reader.gone = True
        with self._changed:
            client = self._turns.get(reader.client)
            while client and reader in client.reads:
                self._take_off(client, reader)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _is_hopeless(self, read: Read, now: float) -> bool:
        """Whether there is no place for it, or the queue's own speed says that it would be done after its deadline."""
        client = self._turns.get(read.reader.client, _Client())
        if self._waiting_chunks + client.chunks + len(read.wants) > WAITING_CHUNKS_MAX:
            return True
        read_at = now
        if now < self._speed_until:
            read.expected = now + self._bytes_until(client, read) / self._speed
            # One is always tried: the estimate must see when things get better.
            read_at = read.expected + self._slip.seconds if self._under_way else now
        return read.reader.begins_to_send(read_at, now) > read.deadline

    def _will_be_late(self, read: Read, now: float) -> bool:
        """Whether it would be read in time, and sent too late."""
        known = now < self._speed_until and self._under_way > 1
        read_at = now + self._under_way_bytes / self._speed if known else now
        return read.reader.sends_what_is_read(read_at, read.size_bytes) > read.deadline

    def _bytes_until(self, client: _Client, read: Read) -> int:
        """What is read until this one is done: of every other client that can have its turns, as much as of its own."""
        now, own = time.monotonic(), client.size_bytes + read.size_bytes
        others = (one for one in self._turns.values() if one is not client and one.next(now))
        return self._under_way_bytes + own + sum(min(own, one.size_bytes) for one in others)

    def _add(self, read: Read) -> None:
        client = self._turns.setdefault(read.reader.client, _Client())
        client.reads.setdefault(read.reader, deque()).append(read)
        self._count(client, read.reader, len(read.wants), read.size_bytes)

    def _take_off(self, client: _Client, reader: Reader) -> Read:
        """The reader's first read, off the queue."""
        reads = client.reads[reader]
        read = reads.popleft()
        self._count(client, reader, -len(read.wants), -read.size_bytes)
        if not reads:
            del client.reads[reader]
        if not client.reads:
            del self._turns[reader.client]
        return read

    def _count(self, client: _Client, reader: Reader, chunks: int, size_bytes: int) -> None:
        reader.wait_for(size_bytes)
        client.chunks += chunks
        client.size_bytes += size_bytes
        self._waiting_chunks += chunks
        self._waiting_bytes += size_bytes

    def _next(self) -> Read | None:
        """The next read of the client whose turn it is; a connection whose window is full misses its turn."""
        now = time.monotonic()
        for name, client in self._turns.items():
            reader = client.next(now)
            if reader is not None:
                self._turns.move_to_end(name)
                client.reads.move_to_end(reader)
                read = self._take_off(client, reader)
                reader.hold(read.size_bytes)
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
                logger.exception("a read failed in an unforeseen way")
                answers = read.all(Outcome.CORRUPT)
            read_bytes = sum(answer.buffer.length for answer in answers if answer.buffer)
            with self._changed:
                self._end(read, read_bytes)
            read.reader.hold(read_bytes - read.size_bytes)
            read.done(answers)

    def _begin(self, read: Read) -> None:
        self._under_way += 1
        self._under_way_bytes += read.size_bytes
        if self._under_way == self._threads and not self._busy_since:
            self._busy_since, self._busy_bytes = time.monotonic(), 0

    def _end(self, read: Read, read_bytes: int) -> None:
        """Speed is what the device gives while all threads are busy: otherwise it is only what was asked for."""
        if read.expected:
            self._slip.add(time.monotonic() - read.expected)
        self._under_way -= 1
        self._under_way_bytes -= read.size_bytes
        self._busy_bytes += read_bytes
        elapsed = time.monotonic() - self._busy_since
        if self._busy_since and elapsed > _SPEED_SECONDS:
            now = time.monotonic()
            self._speed, self._speed_until = self._busy_bytes / elapsed, now + _SPEED_VALID_SECONDS
            self._busy_since, self._busy_bytes = now, 0

    def _read(self, read: Read) -> list[Answer]:
        if read.reader.gone:
            return read.all(Outcome.MISS)
        now = time.monotonic()
        if now > read.deadline or self._will_be_late(read, now):
            return read.all(Outcome.LATE)
        answers, absent = [], []
        for want in read.wants:
            # Read for somebody else meanwhile?
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
    """Writes chunks behind their senders' backs, in the order of their coming, and drops those of least benefit when
    more come than the device takes (backlog.py).

    `bytes_max` bounds what waits or is taken in. Its buffers come from the pool that readers use, too: it should be a
    part of that. With `behind` a chunk is stored, and served by the pool, from its `offer` on; then `bytes_max` bounds
    what is being written, too. If it is dropped after that, or its write fails, it is withdrawn.
    """

    def __init__(self, log: Log, pool: BufferPool, bytes_max: int, *, threads: int = WRITERS, behind: bool = False):
        self._log = log
        self._pool = pool
        self._bytes_max = bytes_max
        self._behind = behind
        self._changed = threading.Condition()
        self._backlog = Backlog(log.is_used)
        self._pending: dict[bytes, Write] = {}  # waiting or being written
        self._coming_bytes = 0  # set aside for payloads that are being taken in
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
        """Dirty chunks are no more than half of what the log may hold, which may change."""
        return min(self._bytes_max, self._log.capacity_bytes // 2) if self._behind else self._bytes_max

    @property
    def is_busy(self) -> bool:
        return bool(self._backlog) or self._writing_bytes > 0

    def join(self, key: bytes, done: Callable[[Outcome], None]) -> bool:
        """If the chunk is on its way already, and not stored, `done` hears of it, too."""
        with self._changed:
            write = None if self._behind else self._pending.get(key)
            if write is not None:
                write.done.append(done)
            return write is not None

    def expect(self, key: bytes, length: int, standing: Standing, until: float) -> bool:
        """Before a payload is taken in: whether there is room for it. What ranks lower is dropped for it, otherwise
        room is waited for until `until` (time.monotonic()). If so, `offer` or `give_up` must follow."""
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
        """The payload did not come; `standing` is given if what follows the chunk may come."""
        with self._changed:
            self._coming_bytes -= record_bytes(length)
            if standing is not None and self._is_lost(key):
                self._backlog.note_dropped([standing])
            self._changed.notify_all()

    def _is_lost(self, key: bytes) -> bool:
        """Whether a chunk that was not taken in came from nobody else either. With the lock held."""
        return key not in self._pending and key not in self._log

    def offer(self, write: Write) -> None:
        """Queue a chunk that was expected; its buffer is the queue's from now on."""
        with self._changed:
            self._coming_bytes -= write.size_bytes
            outcome = self._take_in(write)
            answered: list[Callable[[Outcome], None]] = []
            if outcome is None and self._behind:
                answered, write.done = write.done, answered
            self._changed.notify_all()  # threads that write wait here, and those that look for room
        if outcome is not None:
            self._finish(write, outcome)
        for done in answered:
            done(Outcome.STORED)

    def _take_in(self, write: Write) -> Outcome | None:
        """Queue it, if nobody else's is queued; otherwise what becomes of it. With the lock held."""
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
            self._pool.keep_dirty(key, write.value.buffer, write.value.crc)  # whoever sees it must find it
            if not self._log.show(write.value):
                self._pool.discard(key)
                return Outcome.STORED
        self._backlog.add(write)
        self._pending[key] = write
        return None

    def stop(self, until: float) -> None:
        """Write what waits, and return; what waits at `until` (time.monotonic()) is dropped."""
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
        """How much has to go for `size` bytes more. One chunk has room, however long it is."""
        held = self._backlog.size_bytes + self._coming_bytes + (self._writing_bytes if self._behind else 0)
        return held + size - self.bytes_max if held else 0

    def _drop(self, writes: Sequence[Write], reason: str) -> None:
        """These, which wait no more, are not stored. With the lock held: until then nobody offers them again."""
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
                logger.exception("a write failed in an unforeseen way")
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
