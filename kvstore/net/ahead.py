"""Prefetch: reads chunks from disk into the hot cache ahead of their GET. Requested by PREFETCH or over the bus.

It has the lowest priority. A batch starts only while the device has no other reads or writes, of any namespace. It
takes free memory, or that of values that no client asked for lately. A chunk that finds no memory is dropped, together
with the rest of its prompt.
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

# All grants within AHEAD_SECONDS together are at most this share of the pool. A peer may have half of what the others
# leave of it: alone, an eighth of the pool.
_SHARE = 1 / 4
# TTL of a request: after it, the prompt has either arrived or was not imminent.
AHEAD_SECONDS = 30.0
# Values that were read or written within this time are not evicted for a prefetch: they are more useful. Where the hot
# cache turns over faster than this, a prefetched chunk would be evicted before its prompt arrives.
UNUSED_SECONDS = 10.0
# Queue limit; a waiting chunk takes about a hundred bytes of memory.
_CHUNKS_MAX = 65_536
# Timeout for joining a thread when the target stops. A device that does not answer is reported by the shelf.
_STOP_SECONDS = 1.0
# Outcomes of a chunk. On submit: memory, absent, refused. Once accepted: read, expired, no_room, failed, or memory. Of
# those that were read, `used` counts the ones that a client then asked for.
OUTCOMES = ("memory", "absent", "refused", "read", "expired", "no_room", "failed", "used")


class _Want(NamedTuple):
    key: bytes
    length: int


@dataclass
class _Share:
    """Bytes granted to a peer."""

    until: float  # time.monotonic(); the grant expires then
    size_bytes: int = 0


@dataclass
class _Chain:
    """The chunks that one request wants from one log, in the order of its prompt."""

    wants: deque[_Want]
    until: float  # time.monotonic()


class ReadAhead:
    """Prefetches from the logs of a shelf into a pool that keeps values. Thread-safe. Each log reads one batch of up to
    `batch_bytes` at a time, round-robin over peers."""

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
        """HIT for each chunk in memory, STORED for each chunk on disk that will be read, MISS for the others. Once the
        peer's share is used up, chunks on disk are REFUSED. `keys` must be in the order of their prompt."""
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
        """End the threads. Waiting chunks are not read."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)

    def _share(self, peer: str, now: float) -> tuple[_Share, int]:
        """The peer's share, and how many more bytes it may request. With the lock held."""
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
                logger.exception("unexpected error: a prefetch failed")

    def _first(self, log: Log) -> _Chain | None:
        """The next chain, round-robin over peers. Drops expired chains. With the lock held."""
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
        """The next chunks that are not in memory; at least one, if any is left. With the lock held."""
        size = 0
        while chain.wants and (not size or size + chain.wants[0].length <= self._batch_bytes):
            want = chain.wants.popleft()
            self._waiting_chunks -= 1
            if want.key in self._pool:  # a client asked for it in the meantime
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
        """Read the chunks of a batch for which the pool has memory. Put the others back if the pool is still growing;
        otherwise drop the chain."""
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
