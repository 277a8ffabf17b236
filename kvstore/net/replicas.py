"""Replication: chunks that clients read get a second copy, so that the loss of a target does not lose the working set.

A key has two targets, the first two by rendezvous hashing. When one of them serves a chunk from its memory, it offers
the chunk to the other with an ordinary PUT. Under overload the other drops replicas first. Replication runs in the
background, in small batches with pauses, so that GETs keep most of the bandwidth. A chunk that is evicted from memory
before its turn is offered when it is read again.
"""

import contextlib
import itertools
import logging
import math
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from crc32c import crc32c

from kvstore.disk.buffers import Buffer, BufferPool
from kvstore.disk.shelf import Shelf
from kvstore.net import wire
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import Membership, other_target
from kvstore.net.wire import Outcome

logger = logging.getLogger(__name__)

# Chunks that wait to be offered. More are offered when they are read again.
_WAITING_MAX = 4096
_BATCH_BYTES = 4 << 20
_BATCH_CHUNKS = 256
_CALL_SECONDS = 5.0
# The pause after a batch, in multiples of the batch's duration: replication takes a fifth of the time at most.
_PAUSE = 4.0
# A chunk is offered again if it is read this long after the last offer: the other target may have evicted it.
_AGAIN_SECONDS = 300.0
# The same after a refusal: the other target may be overloaded or read-only.
_REFUSED_AGAIN_SECONDS = 10.0
_REMEMBERED_MAX = 100_000  # offers, 150 bytes each
# Outcomes of an offer. stored: the other target took the chunk. known: it had the chunk. refused: it refused or did not
# answer. gone: this target's memory no longer had the chunk, or its checksum failed.
OUTCOMES = ("stored", "known", "refused", "gone")


class Replicator:
    """Replicates the chunks of target `name` through `client`, which asks `targets`. Closes `client`, which must have
    no seal keys: the chunks are already sealed."""

    def __init__(self, name: str, shelf: Shelf, pool: BufferPool, client: StoreClient, targets: Membership):
        self._name = name
        self._shelf = shelf
        self._pool = pool
        self._client = client
        self._targets = targets
        self._changed = threading.Condition()
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._offered: OrderedDict[bytes, float] = OrderedDict()  # key -> when, time.monotonic(); the oldest first
        self._live: Sequence[str] = targets.targets()  # when `_offered` was noted
        self._counts: Counter[str] = Counter()
        self._stopping = False
        threading.Thread(target=self._work, name="kvtier-replicas", daemon=True).start()

    @property
    def counts(self) -> dict[str, int]:
        """Chunks since the start, by outcome."""
        return {name: self._counts[name] for name in OUTCOMES}

    def read(self, keys: Iterable[bytes]) -> None:
        """Note that these chunks were sent to a client. Any thread; does not block."""
        again, live = time.monotonic() - _AGAIN_SECONDS, self._targets.targets()
        with self._changed:
            if live is not self._live:
                if live != self._live:
                    self._offered.clear()  # a key's other target may be another one now
                self._live = live
            for key in keys:
                if len(self._waiting) < _WAITING_MAX and self._offered.get(key, -math.inf) < again:
                    self._waiting[key] = None
            if self._waiting:
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._client.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                keys = [self._waiting.popitem(last=False)[0] for _ in range(min(len(self._waiting), _BATCH_CHUNKS))]
            try:
                self._offer(keys)
            except Exception:
                logger.exception("unexpected error: a batch of replicas was not made")

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Run the body, then pause in proportion to the time that it took."""
        begun = time.monotonic()
        yield
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, _PAUSE * (time.monotonic() - begun))

    def _offer(self, keys: list[bytes]) -> None:
        live = self._targets.targets()
        others = {key: other for key in keys if (other := self._other(key, live)) is not None}
        with self._paused():
            there = self._client.exists(list(others), time.monotonic() + _CALL_SECONDS, targets=list(others.values()))
        by_outcome: defaultdict[Outcome, list[bytes]] = defaultdict(list)
        for key, outcome in zip(others, there, strict=True):
            by_outcome[outcome].append(key)
        missing = by_outcome.pop(Outcome.MISS, [])
        self._note("known", by_outcome.pop(Outcome.HIT, []))
        self._note("refused", list(itertools.chain(*by_outcome.values())), _REFUSED_AGAIN_SECONDS)
        while missing and not self._stopping:
            with self._paused():
                missing = self._put(missing, others)

    def _other(self, key: bytes, live: Sequence[str]) -> str | None:
        """The target for the key's replica, if this target is one of the key's two."""
        other = other_target(key, live, self._name)
        return other if other is not None and other_target(key, live, other) == self._name else None

    def _put(self, keys: list[bytes], others: dict[bytes, str]) -> list[bytes]:
        """Put about one batch of the keys; return the rest."""
        items: list[Item] = []
        held: list[Buffer] = []
        left, size = iter(keys), 0
        try:
            for key in left:
                entry = self._shelf.of(key).find(key)
                buffer = self._pool.find(key, entry.length) if entry is not None else None
                if entry is None or buffer is None:
                    self._counts["gone"] += 1
                    continue
                held.append(buffer)
                if crc32c(buffer.payload) != entry.crc:  # a PUT would give the damaged bytes a valid checksum
                    self._counts["gone"] += 1
                    continue
                items.append(
                    Item(
                        key,
                        buffer.payload,
                        entry.router_hash,
                        entry.fingerprint,
                        entry.blocks_per_chunk,
                        position=wire.REPLICA,
                        key_version=entry.key_version,
                    )
                )
                size += entry.length
                if size >= _BATCH_BYTES:
                    break
            targets = [others[item.key] for item in items]
            outcomes = self._client.put(items, time.monotonic() + _CALL_SECONDS, targets=targets)
        finally:
            self._pool.give_back(*held)
        answered = list(zip(items, outcomes, strict=True))
        self._note("stored", [item.key for item, outcome in answered if outcome is Outcome.STORED])
        refused = [item.key for item, outcome in answered if outcome is not Outcome.STORED]
        self._note("refused", refused, _REFUSED_AGAIN_SECONDS)
        return list(left)

    def _note(self, outcome: str, keys: list[bytes], again_seconds: float = _AGAIN_SECONDS) -> None:
        self._counts[outcome] += len(keys)
        with self._changed:
            for key in keys:
                self._offered[key] = time.monotonic() + again_seconds - _AGAIN_SECONDS
                self._offered.move_to_end(key)
            while len(self._offered) > _REMEMBERED_MAX:
                self._offered.popitem(last=False)
