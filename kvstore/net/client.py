"""The client: batched get and put with a deadline, straight into and out of the caller's memory.

Threads are the caller's own plus a small pool that moves large batches over several connections at once. Nothing here
raises for a store that fails: every key has an Outcome. When a call returns, nobody writes to its destinations any
more: a transfer that was not finished has had its connection closed.
"""

import contextlib
import itertools
import logging
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec
from crc32c import crc32c

from kvstore.credentials import Credential
from kvstore.keys import KEY_VERSION
from kvstore.net import transport, wire
from kvstore.net.carrier import Borrower
from kvstore.net.membership import Membership, other_place, place
from kvstore.net.tls import HANDSHAKE_SECONDS, ClientTls
from kvstore.net.transport import Bytes, Cancelled, Stream
from kvstore.net.wire import Control, Header, Op, Outcome, ProtocolError, PutItem
from kvstore.rarely import Rarely
from kvstore.seal import TRAILER_BYTES, Reason, Seal, SealKey
from kvstore.text import shown

logger = logging.getLogger(__name__)

# A batch is split over connections once each gets this much: below it, the second connection costs more than it moves.
SLICE_BYTES = 8 << 20
# A target that did not answer is left alone, first for this long, then for twice as long, up to the second figure.
BACKOFF_SECONDS = (0.5, 15.0)
# One that says nothing at all for so long, over as many requests as that takes, did not answer.
SILENT_SECONDS = 0.5

# A UNIX socket answers at once, or somebody else has its path; then TCP is used for so long.
NEAR_SECONDS = 1.0
FAR_SECONDS = 15.0


def good_connections() -> int:
    """How many connections to a target bring most on this host. Out of a target's memory, over a UNIX socket, 8 bring
    more than 4 or 12 where there are 16 cores; with 2 cores 4 are as good as any."""
    return min(8, max(4, len(os.sched_getaffinity(0)) // 2))


class Item(NamedTuple):
    """A chunk to put: `payload` is read while the call lasts."""

    key: bytes
    payload: memoryview
    router_hash: int
    fingerprint: int
    blocks_per_chunk: int
    saved_seconds: float = 0.0  # of GPU time, each time that it is found
    key_version: int = KEY_VERSION  # how the key was made
    position: int = 0  # of the chunk in its prompt, from 0
    parent: int = 0  # router hash of the chunk before it in its prompt; 0: none, or not known


class StoreClient:
    """Talks to all live targets of a namespace. Thread-safe. Every `deadline` is a time.monotonic() value.

    With a `credential` only targets are believed that prove to know it.
    With a `seal`, put seals each value, and get opens it in place of checking its crc: a value that does not open is
    CORRUPT. To targets a sealed value is a longer one under another key (seal.py).
    With `tls` only targets are spoken to whose certificate is valid for the host of their address.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        namespace: str = "default",
        name: str = "client",
        connections_per_target: int | None = None,
        carrier: Borrower | None = None,
        credential: Credential | None = None,
        seal: Seal | None = None,
        tls: ClientTls | None = None,
    ):
        self._membership = membership
        self._credential, self._seal, self._tls = credential, seal, tls
        self._carrier = carrier
        # The random part tells one client's connections from another's: clients take turns at a target.
        self._hello = wire.Hello(
            namespace, f"{name}-{secrets.token_hex(4)}", transport.boot_id(), carrier.name if carrier else ""
        )
        self._connections_per_target = connections_per_target or good_connections()
        self._targets: dict[str, _TargetLine] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2 * self._connections_per_target, thread_name_prefix="kvtier-store")

    def get(
        self,
        keys: Sequence[bytes],
        destinations: Sequence[memoryview],
        deadline: float,
        *,
        targets: Sequence[str | None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Outcome]:
        """Fill each destination (1-D, bytes, exactly as long as the chunk) whose outcome is HIT; the content of the
        others is undefined. `targets` says where to look, by default where the key is placed; a target that is not a
        live member is not asked. What cannot be reached there is asked of the key's other target, which may have a
        replica. `cancelled` is polled: once true, what is not there yet is LATE.
        """

        def get(names: Sequence[bytes], wanted: Sequence[int], seal_key: SealKey | None) -> list[Outcome]:
            into = [destinations[index] for index in wanted]
            named = self._placed(names) if targets is None else [targets[index] for index in wanted]

            def at(asked: Sequence[str | None]) -> list[Outcome]:
                return self._spread(
                    names,
                    [len(destination) for destination in into],
                    asked,
                    lambda line, part: line.get(
                        [names[index] for index in part], [into[index] for index in part], deadline, cancelled, seal_key
                    ),
                )

            outcomes = at(named)
            for index in self._replicated(names, named, outcomes, at):
                outcomes[index] = Outcome.HIT
            return outcomes

        return self._under_each_name(keys, get)

    def put(
        self, items: Sequence[Item], deadline: float, *, targets: Sequence[str | None] | None = None
    ) -> list[Outcome]:
        """STORED for each chunk that is in the store when the call returns, on `targets`, by default where its key is
        placed. Sealing by encryption takes as much memory again as the items have."""
        seal_key = self._seal.keys[0] if self._seal is not None else None
        if seal_key is not None:
            items = [item._replace(key=seal_key.name(item.key)) for item in items]
        return self._spread(
            [item.key for item in items],
            [len(item.payload) for item in items],
            targets,
            lambda line, part: line.put([items[index] for index in part], deadline, seal_key),
        )

    def exists(
        self, keys: Sequence[bytes], deadline: float, *, targets: Sequence[str | None] | None = None
    ) -> list[Outcome]:
        """HIT or MISS for each key, at `targets`, by default where it is placed or, if that cannot be reached, at its
        other target."""
        return [outcome for outcome, _ in self._look_up(keys, deadline, targets)]

    def prefetch(
        self, keys: Sequence[bytes], deadline: float, *, targets: Sequence[str | None] | None = None
    ) -> list[Outcome]:
        """Have the targets read chunks from disk into memory, with the lowest priority; `keys` are in the order of
        their prompt. HIT for each that is in memory already, STORED for each that will be read if it finds room,
        REFUSED for the others: the target has no hot cache, does not know this, or was asked for too much."""

        def prefetch(names: Sequence[bytes], wanted: Sequence[int], _: SealKey | None) -> list[Outcome]:
            return self._spread(
                names,
                [0] * len(names),
                None if targets is None else [targets[index] for index in wanted],
                lambda line, part: line.prefetch([names[index] for index in part], deadline),
            )

        return self._under_each_name(keys, prefetch)

    def locate(self, keys: Sequence[bytes], deadline: float) -> list[str | None]:
        """The target that has each key, None where none says so."""
        return [target if outcome is Outcome.HIT else None for outcome, target in self._look_up(keys, deadline)]

    def _look_up(
        self, keys: Sequence[bytes], deadline: float, targets: Sequence[str | None] | None = None
    ) -> list[tuple[Outcome, str | None]]:
        """HIT or MISS for each key, and the target that said so."""
        asked: list[str | None] = [None] * len(keys)

        def exists(names: Sequence[bytes], wanted: Sequence[int], _: SealKey | None) -> list[Outcome]:
            def at(where: Sequence[str | None]) -> list[Outcome]:
                return self._spread(
                    names, [0] * len(names), where, lambda line, part: line.exists([names[i] for i in part], deadline)
                )

            named = self._placed(names) if targets is None else [targets[index] for index in wanted]
            outcomes = at(named)
            for index in self._replicated(names, named, outcomes, at) if targets is None else ():
                outcomes[index] = Outcome.HIT
                named[index] = other_place(names[index], self._membership.targets(), named[index])
            for index, target in zip(wanted, named, strict=True):
                asked[index] = target
            return outcomes

        return list(zip(self._under_each_name(keys, exists), asked, strict=True))

    def _placed(self, names: Sequence[bytes]) -> list[str | None]:
        live = self._membership.targets()
        return [place(name, live) for name in names]

    def _replicated(
        self,
        names: Sequence[bytes],
        asked: Sequence[str | None],
        outcomes: Sequence[Outcome],
        at: Callable[[Sequence[str | None]], list[Outcome]],
    ) -> list[int]:
        """Which of `names`, of those that could not be reached where they were asked for, their other targets have.
        `at` asks targets, for None nobody."""
        live = self._membership.targets()
        others = [
            other_place(name, live, target) if target is not None and outcome is Outcome.UNREACHABLE else None
            for name, target, outcome in zip(names, asked, outcomes, strict=True)
        ]
        if not any(others):
            return []
        return [index for index, outcome in enumerate(at(others)) if outcome is Outcome.HIT]

    def _under_each_name(
        self,
        keys: Sequence[bytes],
        ask: Callable[[Sequence[bytes], Sequence[int], SealKey | None], list[Outcome]],
    ) -> list[Outcome]:
        """Ask for all keys; with several seal keys, ask for those that are missing under the name of the next one.
        `ask` gets names, which of `keys` they stand for, and the seal key that they were made with."""
        if self._seal is None:
            return ask(keys, range(len(keys)), None)
        outcomes = [Outcome.MISS] * len(keys)
        for seal_key in self._seal.keys:
            missing = [index for index, outcome in enumerate(outcomes) if outcome is Outcome.MISS]
            if not missing:
                break
            asked = ask([seal_key.name(keys[index]) for index in missing], missing, seal_key)
            for index, outcome in zip(missing, asked, strict=True):
                outcomes[index] = outcome
        return outcomes

    def stat(self, deadline: float) -> dict[str, wire.Status]:
        """What each live target says of itself; one that does not answer is missing."""
        answers: dict[str, wire.Status] = {}
        for target in self._membership.targets():
            with contextlib.suppress(*_FAILURES):
                answers[target] = self._line(target).stat(deadline)
        return answers

    def listed(self, target: str, ask: wire.List, deadline: float) -> wire.Listed | None:
        """A part of the chunks that a target has written, and the cursor of the next one; None if it did not answer.
        Keys are as they are stored: of sealed chunks, names."""
        with contextlib.suppress(*_FAILURES):
            return self._line(target).listed(ask, deadline)
        return None

    def failure(self, target: str) -> str:
        """Why a request to this target failed last; "" if none did."""
        return self._line(target).failure

    @property
    def received_bytes(self) -> int:
        """From all targets since the start, what is coming in now included."""
        with self._lock:
            lines = list(self._targets.values())
        return sum(line.received_bytes for line in lines)

    def close(self) -> None:
        """Close every connection; calls under way end as unreachable."""
        with self._lock:
            lines = list(self._targets.values())
        for line in lines:
            line.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._membership.close()

    def _spread(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        targets: Sequence[str | None] | None,
        call: Callable[["_TargetLine", Sequence[int]], list[Outcome]],
    ) -> list[Outcome]:
        """Group the keys by target, cut the groups into slices, call them side by side; `call` gets indices of keys."""
        live = self._membership.targets()
        by_target: defaultdict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            target = place(key, live) if targets is None else targets[index]
            if target is not None and target in live:
                by_target[target].append(index)
        slices = [
            (self._line(target), part)
            for target, indices in by_target.items()
            for part in _slices(indices, sizes, self._connections_per_target)
        ]
        outcomes = [Outcome.UNREACHABLE] * len(keys)

        def run(line: _TargetLine, part: Sequence[int]) -> None:
            for index, outcome in zip(part, call(line, part), strict=True):
                outcomes[index] = outcome

        others: list[Future[None]] = []
        with contextlib.suppress(RuntimeError):  # the client was closed meanwhile: these are unreachable
            for line, part in slices[1:]:
                others.append(self._pool.submit(run, line, part))
        if slices:
            run(*slices[0])
        for future in others:
            with contextlib.suppress(CancelledError):  # by the close, before it began
                future.result()
        return outcomes

    def _line(self, target: str) -> "_TargetLine":
        with self._lock:
            line = self._targets.get(target)
            if line is None:
                limit = self._connections_per_target
                line = _TargetLine(target, self._hello, limit, self._carrier, self._credential, self._seal, self._tls)
                self._targets[target] = line
            return line


def _slices(indices: Sequence[int], sizes: Sequence[int], slices_max: int) -> Iterator[list[int]]:
    """Cut into runs of about equal bytes, each worth a connection of its own."""
    share = max(SLICE_BYTES, -(-sum(sizes[index] for index in indices) // slices_max))
    run: list[int] = []
    run_bytes = 0
    for index in indices:
        if run and (run_bytes + sizes[index] > share or len(run) == wire.KEYS_MAX):
            yield run
            run, run_bytes = [], 0
        run.append(index)
        run_bytes += sizes[index]
    if run:
        yield run


_FAILURES = (OSError, ProtocolError)  # TimeoutError and ConnectionError are OSErrors


class _StaleError(Exception):
    """The target closed a connection while it waited: to make room for others, or because it started again."""


class _TargetLine:
    """The connections to one target, and whether it is worth trying."""

    def __init__(
        self,
        target: str,
        hello: wire.Hello,
        connections_max: int,
        carrier: Borrower | None,
        credential: Credential | None,
        seal: Seal | None,
        tls: ClientTls | None,
    ):
        self._credential, self._tls = credential, tls
        self._target = target
        self._carrier = carrier
        self._seal = seal
        self._carrier_greeting = b""
        self._carrier_target: Any = None
        self._hello = hello
        self._far_until = 0.0  # no UNIX socket before
        self._near: wire.Welcome | None = None  # over TCP, if the target's UNIX socket is in use
        self._free: list[Stream] = []
        self._busy: dict[Stream, int] = {}  # and how many bytes each had received when it became busy
        self._received_bytes = 0  # on streams while they were busy
        self._proven: set[Stream] = set()  # on which a request was answered
        self._room = threading.BoundedSemaphore(connections_max)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a connection is free, or gone
        self._requests = itertools.count(1)
        self._failures = 0
        self._answered_at = 0.0  # last
        self._silent_seconds = 0.0  # waited for since then
        self._retry_at = 0.0  # nothing is asked before
        self._connect_at = 0.0  # no connection is opened before, while others work
        self._complains = Rarely(BACKOFF_SECONDS[1])
        self.failure = ""  # the last one's reason
        self._closed = False
        self._value_bytes_max = wire.VALUE_BYTES_MAX
        self._prefetches = False  # whether the target does

    def get(
        self,
        keys: Sequence[bytes],
        destinations: Sequence[memoryview],
        deadline: float,
        cancelled: Callable[[], bool] | None,
        seal_key: SealKey | None,
    ) -> list[Outcome]:
        """With a seal key, `keys` are names made with it."""
        room = [_Room(destination, seal_key is not None) for destination in destinations]
        if any(one.size > wire.VALUE_BYTES_MAX for one in room):
            return [Outcome.MISS] * len(keys)  # no target holds a value of that length
        outcomes: list[Outcome | None] = [None] * len(keys)

        def exchange(stream: Stream, request: int) -> None:
            left_ms = max(1, int((deadline - time.monotonic()) * 1000))
            ask = wire.Get(list(keys), [one.size for one in room], left_ms)
            stream.send([wire.encode(Header(Op.GET, request), ask)], deadline)
            for _ in keys:
                header = _expect(stream, (Op.VALUE, Op.PLACED), request, deadline, cancelled)
                number = header.number
                if number >= len(keys) or outcomes[number] is not None:
                    raise ProtocolError(f"VALUE for key {number}, which was not asked for or came before")
                receive = self._receive_value if header.op is Op.VALUE else self._fetch_value
                outcome = receive(stream, header, room[number], deadline, cancelled)
                if outcome is Outcome.HIT and seal_key is not None:
                    outcome = self._open(seal_key, keys[number], room[number])
                outcomes[number] = outcome

        failure = self._exchange(exchange, deadline)
        return [failure if outcome is None else outcome for outcome in outcomes]

    def _open(self, seal_key: SealKey, name: bytes, room: "_Room") -> Outcome:
        assert room.trailer is not None
        reason = seal_key.open(name, room.destination, room.trailer)
        if reason is None:
            return Outcome.HIT
        self._reject(reason)
        return Outcome.CORRUPT

    def _reject(self, reason: Reason) -> None:
        if self._seal is not None:
            self._seal.reject(self._target, reason)

    def _receive_value(
        self,
        stream: Stream,
        header: Header,
        room: "_Room",
        deadline: float,
        cancelled: Callable[[], bool] | None,
    ) -> Outcome:
        """A sealed value has yet to be opened when this says HIT."""
        try:
            outcome = Outcome(header.flags)
        except ValueError:
            raise ProtocolError(f"unknown outcome {header.flags}") from None
        if outcome is not Outcome.HIT:
            return outcome
        if header.data_bytes != room.size:
            self._reject(Reason.LENGTH)
            raise ProtocolError(f"VALUE of {header.data_bytes} bytes, {room.size} were asked for")
        if room.trailer is not None:
            stream.receive(room.destination, deadline, cancelled)
            stream.receive(memoryview(room.trailer), deadline, cancelled)
            return Outcome.HIT
        intact = stream.receive_checksum(room.destination, deadline, cancelled) == header.crc
        return Outcome.HIT if intact else Outcome.CORRUPT

    def _fetch_value(
        self,
        stream: Stream,
        header: Header,
        room: "_Room",
        deadline: float,
        cancelled: Callable[[], bool] | None,
    ) -> Outcome:
        """Take a value that the target has placed; see `_receive_value`."""
        place = wire.decode_control(stream.receive_control(header, deadline), wire.Placed).place
        if self._carrier is None:
            raise ProtocolError("PLACED, and no carrier was agreed on")
        self._carrier.fetch(stream.carrier_target, place, room.parts, deadline, cancelled)
        stream.received_bytes += room.size
        stream.send([wire.encode(Header(Op.TAKEN, header.request), wire.Taken(header.number))], deadline)
        if room.trailer is not None:
            return Outcome.HIT
        return Outcome.HIT if crc32c(room.destination) == header.crc else Outcome.CORRUPT

    def put(self, items: Sequence[Item], deadline: float, seal_key: SealKey | None) -> list[Outcome]:
        added = TRAILER_BYTES if seal_key is not None else 0
        if any(len(item.payload) + added > self._value_bytes_max for item in items):
            return [Outcome.REFUSED] * len(items)
        answer: list[Outcome] = []

        def exchange(stream: Stream, request: int) -> None:
            values = [self._value(item, seal_key) for item in items]
            described = [
                PutItem(
                    item.key,
                    len(item.payload) + added,
                    _crc(value),
                    item.router_hash,
                    item.fingerprint,
                    item.blocks_per_chunk,
                    _microseconds(item.saved_seconds),
                    item.key_version,
                    item.position,
                    item.parent,
                )
                for item, value in zip(items, values, strict=True)
            ]
            total = sum(item.length for item in described)
            frame = wire.encode(Header(Op.PUT, request, data_bytes=total), wire.Put(described))
            stream.send([frame, *itertools.chain.from_iterable(values)], deadline)
            answer.extend(_receive(stream, Op.STORED, request, deadline, wire.Outcomes, len(items)).outcomes)

        failure = self._exchange(exchange, deadline)
        return answer or [failure] * len(items)

    def _value(self, item: Item, seal_key: SealKey | None) -> Sequence[Bytes]:
        """What is stored of an item, in one part or two."""
        if self._seal is None or seal_key is None:
            return [item.payload]
        return seal_key.seal(item.key, item.payload, self._seal.mode)

    def exists(self, keys: Sequence[bytes], deadline: float) -> list[Outcome]:
        return self._outcomes(Op.EXISTS, wire.Exists(list(keys)), Op.FOUND, len(keys), deadline)

    def prefetch(self, keys: Sequence[bytes], deadline: float) -> list[Outcome]:
        return self._outcomes(Op.PREFETCH, wire.Prefetch(list(keys)), Op.PREFETCHED, len(keys), deadline)

    def _outcomes(self, op: Op, ask: msgspec.Struct, answers: Op, count: int, deadline: float) -> list[Outcome]:
        """A question about `count` keys."""
        answer: list[Outcome] = []

        def exchange(stream: Stream, request: int) -> None:
            if op is Op.PREFETCH and not self._prefetches:
                answer.extend([Outcome.REFUSED] * count)
                return
            stream.send([wire.encode(Header(op, request), ask)], deadline)
            answer.extend(_receive(stream, answers, request, deadline, wire.Outcomes, count).outcomes)

        failure = self._exchange(exchange, deadline)
        return answer or [failure] * count

    def stat(self, deadline: float) -> wire.Status:
        return self._ask(Op.STAT, None, Op.STATUS, wire.Status, deadline)

    def listed(self, ask: wire.List, deadline: float) -> wire.Listed:
        return self._ask(Op.LIST, ask, Op.LISTED, wire.Listed, deadline)

    def _ask(self, op: Op, ask: msgspec.Struct | None, answers: Op, kind: type[Control], deadline: float) -> Control:
        """One question without payloads. Raises ConnectionError."""
        answer: list[Control] = []

        def exchange(stream: Stream, request: int) -> None:
            stream.send([wire.encode(Header(op, request), ask)], deadline)
            header = _expect(stream, (answers,), request, deadline)
            answer.append(wire.decode_control(stream.receive_control(header, deadline), kind))

        failure = self._exchange(exchange, deadline)
        if not answer:
            raise ConnectionError(f"{self._target}: {failure.name.lower()}")
        return answer[0]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
            busy = list(self._busy)
        for stream in free:
            stream.close()
        for stream in busy:
            stream.abort()

    @property
    def received_bytes(self) -> int:
        with self._lock:
            return self._received_bytes + sum(stream.received_bytes - before for stream, before in self._busy.items())

    def _exchange(self, exchange: Callable[[Stream, int], None], deadline: float) -> Outcome:
        """Run one request and its answer on a connection; what keys without an outcome of their own get."""
        now = time.monotonic()
        if self._closed or now < self._retry_at:
            return Outcome.UNREACHABLE
        if now >= deadline:
            return Outcome.LATE
        if not self._room.acquire(timeout=max(0.0, deadline - now)):
            return Outcome.LATE
        try:
            return self._attempt(exchange, deadline)
        except _StaleError:  # every request may be repeated: a second PUT finds its chunks stored
            return self._attempt(exchange, deadline, again=True)
        finally:
            self._room.release()

    def _attempt(self, exchange: Callable[[Stream, int], None], deadline: float, *, again: bool = False) -> Outcome:
        """Raises _StaleError if the target had closed a connection that waited, unless this is done `again`."""
        stream, waited, heard_bytes, done, began = None, False, 0, False, time.monotonic()
        try:
            stream, waited = self._take(deadline, fresh=again)
            heard_bytes = stream.received_bytes
            with self._abortable(stream):
                exchange(stream, next(self._requests) & 0xFFFFFFFF)
            done = True
        except Cancelled:
            return Outcome.LATE
        except TimeoutError:
            if stream is None or stream.received_bytes == heard_bytes:
                # A deadline may be a few milliseconds away: that says nothing of a target that is busy.
                self._silent_seconds += time.monotonic() - max(began, self._answered_at)
                if self._silent_seconds >= SILENT_SECONDS:
                    self._leave_alone("not a byte before the deadline")
            return Outcome.LATE
        except _FAILURES as error:
            if stream is not None:
                self._drop([stream])
                if waited and not again and self._is_stale(stream, heard_bytes, error):
                    raise _StaleError from None
            self._failed(str(error) or type(error).__name__)
            return Outcome.UNREACHABLE
        finally:
            if done and stream is not None:
                self._keep(stream)
            elif stream is not None:
                self._drop([stream])
        return Outcome.MISS

    def _is_stale(self, stream: Stream, heard_bytes: int, error: Exception) -> bool:
        """Whether the connection ended without a byte of the answer, by itself."""
        return isinstance(error, ConnectionError) and stream.received_bytes == heard_bytes and not self._closed

    def _take(self, deadline: float, *, fresh: bool) -> tuple[Stream, bool]:
        """A connection, and whether it waited for this: one that still stands, unless a `fresh` one is asked for, or a
        new one. While none can be opened and others work, the first of those that is free."""
        while True:
            stream = None if fresh else self._next_free()
            if stream is not None:
                return stream, True
            fresh = False
            if time.monotonic() >= self._connect_at or not self._works():
                try:
                    return self._connected(deadline), False
                except TimeoutError:
                    raise
                except _FAILURES as error:
                    if not self._works():
                        raise
                    self._connect_at = time.monotonic() + BACKOFF_SECONDS[0]
                    self._failed(str(error) or type(error).__name__)
            with self._changed:
                until = min(deadline, self._connect_at)
                self._changed.wait_for(lambda: self._free or not self._proven, until - time.monotonic())
            if time.monotonic() >= deadline:
                raise Cancelled  # the target did not keep it waiting

    def _next_free(self) -> Stream | None:
        """A connection that waited and still stands."""
        while True:
            with self._lock:
                stream = self._free.pop() if self._free else None
            if stream is None or stream.is_idle():
                return stream
            self._drop([stream])

    def _drop(self, streams: Sequence[Stream]) -> None:
        with self._lock:
            self._proven.difference_update(streams)
            self._changed.notify_all()
        for stream in streams:
            stream.close()

    def _works(self) -> bool:
        """Whether a connection stands on which the target answered."""
        with self._lock:
            ended = [stream for stream in self._free if not stream.is_idle()]
            self._free = [stream for stream in self._free if stream not in ended]
        self._drop(ended)
        return bool(self._proven)

    def _connected(self, deadline: float) -> Stream:
        """A new connection: to the UNIX socket where the target is near."""
        if self._near:
            try:
                return self._connect_near(self._near, deadline)
            except _FAILURES:
                self._near = None  # gone, or another start of the target: greet anew over TCP
        stream = self._connect(deadline)
        try:
            welcome = self._greet(stream, self._hello, deadline)
            near = self._nearer(welcome, deadline)
        except BaseException:
            stream.close()
            raise
        if near is None:
            return stream
        stream.close()
        self._near = welcome
        return near

    def _connect(self, deadline: float) -> Stream:
        """A connection over TCP, with TLS if that was asked for."""
        try:
            if self._tls is None:
                return transport.connect(self._target, deadline)
            stream = self._tls.connect(self._target, deadline)
        except ValueError as error:  # whoever registers in etcd may say anything
            raise ConnectionError(f"no address: {error}") from None
        try:
            with self._abortable(stream):
                stream.shake_hands(min(deadline, time.monotonic() + HANDSHAKE_SECONDS))
        except BaseException:
            stream.close()
            raise
        return stream

    def _nearer(self, welcome: wire.Welcome, deadline: float) -> Stream | None:
        """A connection to the target's UNIX socket, if it has one and nobody else answers there."""
        if not welcome.unix_path or time.monotonic() < self._far_until:
            return None
        try:
            return self._connect_near(welcome, deadline)
        except _FAILURES as error:
            self._far_until = time.monotonic() + FAR_SECONDS
            reason = str(error) or type(error).__name__
            path = shown(welcome.unix_path)
            logger.warning("%s: staying with TCP, %s is not used: %s", shown(self._target), path, shown(reason))
            return None

    def _connect_near(self, welcome: wire.Welcome, deadline: float) -> Stream:
        """A connection to the UNIX socket of the target that gave this welcome over TCP. Whoever is silent there does
        not get all the time there is."""
        deadline = min(deadline, time.monotonic() + NEAR_SECONDS)
        stream = transport.connect(welcome.unix_path, deadline)
        try:
            hello = msgspec.structs.replace(self._hello, pass_id=welcome.pass_id)
            near = self._greet(stream, hello, deadline, welcome)
            if (near.target, near.epoch) != (welcome.target, welcome.epoch):
                raise ProtocolError(f"it greets as {shown(near.target)}, not as {shown(welcome.target)}")
        except BaseException:
            stream.close()
            raise
        return stream

    @contextlib.contextmanager
    def _abortable(self, stream: Stream) -> Iterator[None]:
        """What waits for the stream ends when the client is closed."""
        with self._lock:
            if self._closed:
                raise ConnectionError("closed")
            self._busy[stream] = stream.received_bytes
        try:
            yield
        finally:
            with self._changed:
                self._received_bytes += stream.received_bytes - self._busy.pop(stream)
                self._changed.notify_all()

    def _greet(
        self, stream: Stream, hello: wire.Hello, deadline: float, over_tcp: wire.Welcome | None = None
    ) -> wire.Welcome:
        with self._abortable(stream):
            welcome = _greet(stream, hello, self._credential, over_tcp, deadline)
            if self._carrier is not None and welcome.carrier_greeting:
                stream.carrier_target = self._reach(self._carrier, stream, welcome.carrier_greeting, deadline)
        self._value_bytes_max, self._prefetches = welcome.value_bytes_max, welcome.prefetches
        return welcome

    def _reach(self, carrier: Borrower, stream: Stream, greeting: bytes, deadline: float) -> Any:
        """How the target is reached by the carrier; the same for all connections since its start."""
        descriptor = stream.receive_descriptor(deadline) if carrier.needs_descriptor else None
        try:
            with self._lock:
                if greeting != self._carrier_greeting:
                    self._carrier_target = carrier.connect(greeting, descriptor)
                    self._carrier_greeting = greeting
                return self._carrier_target
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _keep(self, stream: Stream) -> None:
        """A request was answered on it."""
        with self._changed:
            self._failures, self._silent_seconds, self._retry_at = 0, 0.0, 0.0
            self._answered_at = time.monotonic()
            if not self._closed:
                self._proven.add(stream)
                self._free.append(stream)
                self._changed.notify_all()
                return
        stream.close()

    def _failed(self, reason: str) -> None:
        """One connection failed, or could not be opened. If none works, the target is left alone."""
        if not self._works():
            self._leave_alone(reason)
            return
        with self._lock:
            self.failure = reason
            complains = self._complains()
        if complains:
            logger.warning("%s: %s; its other connections go on", shown(self._target), shown(reason))

    def _leave_alone(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
            if time.monotonic() < self._retry_at:  # another request failed for the same reason
                return
            free, self._free = self._free, []
            self._carrier_greeting, self._carrier_target = b"", None  # a target that is gone gets its memory back
            first, longest = BACKOFF_SECONDS
            pause = min(longest, first * 2**self._failures)
            self._failures += 1
            self._retry_at = time.monotonic() + pause
        self._drop(free)
        logger.warning("target %s: %s; retrying in %.1f s", shown(self._target), shown(reason), pause)


def _greet(
    stream: Stream,
    hello: wire.Hello,
    credential: Credential | None,
    over_tcp: wire.Welcome | None,
    deadline: float,
) -> wire.Welcome:
    """Say who this is and learn who the target is; with a credential, both prove it. On a UNIX socket the target proves
    that it is the one that gave the pass `over_tcp`. Raises ProtocolError."""
    hello = msgspec.structs.replace(hello, nonce=secrets.token_bytes(wire.NONCE_BYTES))
    stream.send([wire.encode(Header(Op.HELLO), hello)], deadline)
    header = _expect(stream, (Op.WELCOME, Op.CHALLENGE), 0, deadline)
    if header.op is Op.CHALLENGE:
        return _prove(stream, hello, credential, header, deadline)
    if credential is not None:
        raise ProtocolError("the target does not ask for the credential, and so does not prove that it knows it")
    welcome = wire.decode_control(stream.receive_control(header, deadline), wire.Welcome)
    if over_tcp is not None and over_tcp.pass_key:  # targets before release 0.2 give none
        said = wire.transcript(hello, wire.Challenge(b""), welcome)
        if len(over_tcp.pass_key) != wire.NONCE_BYTES or not Credential(over_tcp.pass_key).signed(welcome.proof, said):
            raise ProtocolError("another one than the target that named this path answers there")
    return welcome


def _prove(
    stream: Stream, hello: wire.Hello, credential: Credential | None, header: Header, deadline: float
) -> wire.Welcome:
    challenge = wire.decode_control(stream.receive_control(header, deadline), wire.Challenge)
    if credential is None:
        raise ProtocolError(f"the target asks for a credential of namespace {hello.namespace!r}, and none was given")
    proof = credential.sign(wire.transcript(hello, challenge))
    stream.send([wire.encode(Header(Op.PROVE), wire.Prove(proof))], deadline)
    header = _expect(stream, (Op.WELCOME,), 0, deadline)
    welcome = wire.decode_control(stream.receive_control(header, deadline), wire.Welcome)
    if not credential.signed(welcome.proof, wire.transcript(hello, challenge, welcome)):
        raise ProtocolError("the target does not know the credential")
    return welcome


class _Room:
    """Where a value goes: the caller's memory, and a trailer's if the value is to be sealed."""

    def __init__(self, destination: memoryview, sealed: bool):
        self.destination = destination
        self.trailer = bytearray(TRAILER_BYTES) if sealed else None

    @property
    def size(self) -> int:
        return len(self.destination) + len(self.trailer or b"")

    @property
    def parts(self) -> list[memoryview]:
        return [self.destination] if self.trailer is None else [self.destination, memoryview(self.trailer)]


def _crc(parts: Sequence[Bytes]) -> int:
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return crc


def _microseconds(seconds: float) -> int:
    return min(int(1e6 * seconds), 0xFFFFFFFF)


def _expect(
    stream: Stream,
    ops: Sequence[Op],
    request: int,
    deadline: float,
    cancelled: Callable[[], bool] | None = None,
) -> Header:
    """The header of the answer to `request`. Raises ProtocolError if it is another one."""
    header = stream.receive_header(deadline, cancelled)
    if header.op is Op.ERROR:
        failure = wire.decode_control(stream.receive_control(header, deadline), wire.Failure)
        raise ProtocolError(f"the target says: {shown(failure.message)}")
    if header.op not in ops or header.request != request:
        raise ProtocolError(f"{header.op.name} {header.request} where {ops[0].name} {request} was expected")
    return header


def _receive(
    stream: Stream, op: Op, request: int, deadline: float, kind: type[wire.Outcomes], count: int
) -> wire.Outcomes:
    header = _expect(stream, (op,), request, deadline)
    answer = wire.decode_control(stream.receive_control(header, deadline), kind)
    if len(answer.outcomes) != count:
        raise ProtocolError(f"{len(answer.outcomes)} outcomes for {count} keys")
    return answer
