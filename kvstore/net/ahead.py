"""Read-ahead: chunks that come from disk into the hot cache before they are asked for, by PREFETCH or over the bus.

It has the lowest priority. A batch is begun only while the device has nothing to read or write for anybody, of any
namespace. It takes memory that is free, or of values that nobody asked for lately; what finds none is dropped, with all
that follows it in its prompt.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.disk.buffers import Buffer, BufferPool
from kvstore.disk.device import BUSY_SECONDS
from kvstore.disk.log import Log
from kvstore.disk.record import record_bytes
from kvstore.disk.shelf import Shelf
from kvstore.net.wire import Outcome

logger = logging.getLogger(__name__)

# What is granted within AHEAD_SECONDS is at most a share of the pool. A peer may have as much as it leaves to the
# others: alone, half of it, an eighth of the pool.
_SHARE = 1 / 4
# What was not read after so long is dropped: its prompt has come, or was not so near.
AHEAD_SECONDS = 30.0
# A value that was asked for, or written, in this time is more useful than one that may be asked for. Where the hot
# cache changes hands faster, a chunk that is read ahead would be gone when its prompt comes.
UNUSED_SECONDS = 10.0
# Chunks that may wait; each is some hundred bytes of memory.
_CHUNKS_MAX = 65_536
# How long a thread is waited for when the target stops; a device that does not answer is the shelf's to report.
_STOP_SECONDS = 1.0
# What became of a chunk: at once, or once it had been accepted; `used` of those that were read.
OUTCOMES = ("memory", "absent", "refused", "read", "expired", "no_room", "failed", "used")


class _Want(NamedTuple):
    key: bytes
    length: int


@dataclass
class _Share:
    """What a peer was granted."""

    until: float  # time.monotonic(); then it counts no more
    size_bytes: int = 0


@dataclass
class _Chain:
    """What one request wants of one log, in the order of its prompt."""

    wants: deque[_Want]
    until: float  # time.monotonic()


class ReadAhead:
    """Of the logs of a shelf, into a pool that keeps values. Thread-safe. One batch of up to `batch_bytes` is read at a
    time from each log; peers take turns."""

    def __init__(self, shelf: Shelf, pool: BufferPool, batch_bytes: int):
        self._shelf = shelf
        self._pool = pool
        self._batch_bytes = batch_bytes
        self._changed = threading.Condition()
        self._chains: dict[Log, OrderedDict[str, deque[_Chain]]] = {log: OrderedDict() for log in shelf.logs}
        self._waiting_chunks = 0
        self._shares: dict[str, _Share] = {}  # by peer
        self._counts: Counter[str] = Counter()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(log,), name=f"kvtier-ahead-{number}", daemon=True)
            for number, log in enumerate(shelf.logs)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Chunks since the start, by outcome."""
        return {name: self._counts[name] for name in OUTCOMES} | {"used": self._pool.ahead_used}

    def submit(self, keys: Sequence[bytes], peer: str) -> list[Outcome]:
        """HIT for each chunk that is in memory, STORED for each on disk that will be read, MISS for those that are not
        there. From the first on that is more than the peer's share, those on disk are REFUSED. `keys` are in the order
        of their prompt."""
        now, is_full, outcomes = time.monotonic(), False, []
        wanted: dict[Log, deque[_Want]] = {}
        with self._changed:
            share, room = self._share(peer, now)
            waiting = self._waiting_chunks
            for key in keys:
                log = self._shelf.of(key)
                entry = log.find(key)
                if entry is None:
                    outcomes.append(Outcome.MISS)
                    continue
                length = record_bytes(entry.length)
                is_full = is_full or waiting >= _CHUNKS_MAX or length > room
                if not is_full:
                    room -= length
                    share.size_bytes += length
                if key in self._pool:
                    outcomes.append(Outcome.HIT)
                    if not is_full:
                        self._pool.touch(key)
                elif is_full:
                    outcomes.append(Outcome.REFUSED)
                else:
                    outcomes.append(Outcome.STORED)
                    wanted.setdefault(log, deque()).append(_Want(key, entry.length))
                    waiting += 1
            for log, wants in wanted.items():
                self._chains[log].setdefault(peer, deque()).append(_Chain(wants, now + AHEAD_SECONDS))
            self._waiting_chunks = waiting
            found = Counter(outcomes)
            self._counts.update(memory=found[Outcome.HIT], absent=found[Outcome.MISS], refused=found[Outcome.REFUSED])
            self._changed.notify_all()
        return outcomes

    def stop(self) -> None:
        """Nothing is read for it any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)

    def _share(self, peer: str, now: float) -> tuple[_Share, int]:
        """The peer's share, and for how many bytes more it may ask. With the lock held."""
        self._shares = {name: share for name, share in self._shares.items() if now < share.until}
        own = self._shares.setdefault(peer, _Share(now + AHEAD_SECONDS))
        granted = own.size_bytes + sum(share.size_bytes for share in self._shares.values())
        return own, int(_SHARE * self._pool.arena.total_bytes - granted) // 2

    def _work(self, log: Log) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chains[log] or self._stopping)
                if self._stopping:
                    return
                chain = self._first(log)
                if chain is None:
                    continue
                if log.device.is_busy or self._pool.is_short:
                    self._changed.wait(BUSY_SECONDS)
                    continue
                batch = list(self._batch(chain))
            try:
                self._read(log, chain, batch)
            except Exception:
                logger.exception("a read ahead failed in an unforeseen way")

    def _first(self, log: Log) -> _Chain | None:
        """The next chain of the peer whose turn it is; what has expired is dropped. With the lock held."""
        peers, now = self._chains[log], time.monotonic()
        for peer in list(peers):
            chains = peers[peer]
            while chains and (not chains[0].wants or now > chains[0].until):
                self._drop(chains.popleft(), "expired")
            if chains:
                peers.move_to_end(peer)
                return chains[0]
            del peers[peer]
        return None

    def _batch(self, chain: _Chain) -> Iterator[_Want]:
        """The next chunks that are not in memory, at least one if there is any. With the lock held."""
        size = 0
        while chain.wants and (not size or size + chain.wants[0].length <= self._batch_bytes):
            want = chain.wants.popleft()
            self._waiting_chunks -= 1
            if want.key in self._pool:  # somebody asked for it meanwhile
                self._counts["memory"] += 1
                continue
            size += want.length
            yield want

    def _drop(self, chain: _Chain, reason: str) -> None:
        """With the lock held."""
        self._counts[reason] += len(chain.wants)
        self._waiting_chunks -= len(chain.wants)
        chain.wants.clear()

    def _read(self, log: Log, chain: _Chain, batch: Sequence[_Want]) -> None:
        """Read into memory that there is to be had."""
        unused_since = time.monotonic() - UNUSED_SECONDS
        buffers: list[Buffer] = []
        for want in batch:
            buffer = self._pool.take_unused(want.length, unused_since)
            if buffer is None:
                break
            buffers.append(buffer)
        try:
            wants = batch[: len(buffers)]
            found = log.read([want.key for want in wants], buffers, are_used=False)
            intact = 0
            for want, buffer, one in zip(wants, buffers, found, strict=True):
                if one is not None and one.intact:
                    self._pool.keep(want.key, buffer, one.entry.crc, is_ahead=True)
                    intact += 1
        finally:
            self._pool.give_back(*buffers)
        with self._changed:
            self._counts["read"] += intact
            self._counts["failed"] += len(wants) - intact
            if len(wants) < len(batch):
                chain.wants.extendleft(reversed(batch[len(wants) :]))
                self._waiting_chunks += len(batch) - len(wants)
                if self._pool.is_growing:
                    self._changed.wait(BUSY_SECONDS)
                else:
                    self._drop(chain, "no_room")
