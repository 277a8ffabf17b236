"""The client: batched get and put with a deadline, directly into and out of the caller's memory.

Calls run on the caller's thread, and on a small pool that moves large batches over several connections. A failing store
raises no exception: every key has an Outcome. Invariant: when a call returns, no thread writes to its destinations.
The connection of an unfinished transfer has been closed.
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
from kvstore.net.membership import Membership, other_target, target_for
from kvstore.net.tls import HANDSHAKE_SECONDS, ClientTls
from kvstore.net.transport import Bytes, Cancelled, Stream
from kvstore.net.wire import Control, Header, Op, Outcome, ProtocolError, PutItem
from kvstore.rarely import Rarely
from kvstore.seal import TRAILER_BYTES, Reason, Seal, SealKey
from kvstore.text import shown

logger = logging.getLogger(__name__)

# The smallest slice of a batch that gets a connection of its own: below it, a second connection costs more than it
# gains.
SLICE_BYTES = 8 << 20
# Circuit breaker: a target that fails is not asked during an exponential backoff, from the first figure to the second.
BACKOFF_SECONDS = (0.5, 15.0)
# A target counts as failed after this long without a byte, summed over consecutive requests.
SILENT_SECONDS = 0.5

# Timeout for a UNIX socket, which answers at once unless another process has its path. After a failure, TCP is used for
# FAR_SECONDS.
NEAR_SECONDS = 1.0
FAR_SECONDS = 15.0


def good_connections() -> int:
    """The number of connections to a target with the highest throughput on this host. Measured from a target's memory
    over a UNIX socket: with 16 cores, 8 beat 4 and 12; with 2 cores, 4 are as good as any number."""
    return min(8, max(4, len(os.sched_getaffinity(0)) // 2))


class Item(NamedTuple):
    """A chunk to put: `payload` is read while the call lasts."""

    key: bytes
    payload: memoryview
    router_hash: int
    fingerprint: int
    blocks_per_chunk: int
    saved_seconds: float = 0.0  # GPU time that one hit saves
    key_version: int = KEY_VERSION  # version of the key derivation (keys.py)
    position: int = 0  # of the chunk in its prompt, from 0
    parent: int = 0  # router hash of the chunk before it in its prompt; 0: none, or not known


class StoreClient:
    """A client of all live targets of a namespace. Thread-safe. Every `deadline` is a time.monotonic() value.

    - `credential`: trust only targets that prove that they know it.
    - `seal`: put seals each value; get opens it instead of checking its crc. A value that does not open is CORRUPT. To
      targets a sealed value is a longer one under another key (seal.py).
    - `tls`: connect only to targets whose certificate is valid for the host of their address.
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
        # The random part identifies this client's connections: a target schedules clients round-robin.
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
        others is undefined. `targets` says where to look, by default at the target for the key; a target that is not a
        live member is not asked. If a target is unreachable, the key's other target is asked for a replica.
        `cancelled` is polled: once it returns True, chunks that have not arrived are LATE.
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
        """STORED for each chunk that is in the store when the call returns. `targets` says where, by default at the
        target for the key. Sealing by encryption needs additional memory of the size of the items."""
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
        """HIT or MISS for each key at `targets`; by default at the target for the key, or, if that is unreachable, at
        the key's other target."""
        return [outcome for outcome, _ in self._look_up(keys, deadline, targets)]

    def prefetch(
        self, keys: Sequence[bytes], deadline: float, *, targets: Sequence[str | None] | None = None
    ) -> list[Outcome]:
        """Ask the targets to read chunks from disk into memory, with the lowest priority. `keys` must be in the order
        of their prompt. HIT: in memory already. STORED: will be read if there is room. MISS: not in the store.
        REFUSED: the target has no hot cache, does not support this, or the peer's share is used up."""

        def prefetch(names: Sequence[bytes], wanted: Sequence[int], _: SealKey | None) -> list[Outcome]:
            return self._spread(
                names,
                [0] * len(names),
                None if targets is None else [targets[index] for index in wanted],
                lambda line, part: line.prefetch([names[index] for index in part], deadline),
            )

        return self._under_each_name(keys, prefetch)

    def locate(self, keys: Sequence[bytes], deadline: float) -> list[str | None]:
        """For each key, the target that has it; None if no target does."""
        return [target if outcome is Outcome.HIT else None for outcome, target in self._look_up(keys, deadline)]

    def _look_up(
        self, keys: Sequence[bytes], deadline: float, targets: Sequence[str | None] | None = None
    ) -> list[tuple[Outcome, str | None]]:
        """HIT or MISS for each key, and the target that answered."""
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
                named[index] = other_target(names[index], self._membership.targets(), named[index])
            for index, target in zip(wanted, named, strict=True):
                asked[index] = target
            return outcomes

        return list(zip(self._under_each_name(keys, exists), asked, strict=True))

    def _placed(self, names: Sequence[bytes]) -> list[str | None]:
        live = self._membership.targets()
        return [target_for(name, live) for name in names]

    def _replicated(
        self,
        names: Sequence[bytes],
        asked: Sequence[str | None],
        outcomes: Sequence[Outcome],
        at: Callable[[Sequence[str | None]], list[Outcome]],
    ) -> list[int]:
        """Indices of those `names` whose asked target was unreachable and whose other target has them. `at` asks one
        target for each name; None stands for no target."""
        live = self._membership.targets()
        others = [
            other_target(name, live, target) if target is not None and outcome is Outcome.UNREACHABLE else None
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
        """Ask for all keys. With several seal keys, ask for the missing ones again under their names of the next seal
        key. `ask` gets the names, their indices in `keys`, and the seal key that made the names."""
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
        """The status of each live target; a target that does not answer is left out."""
        answers: dict[str, wire.Status] = {}
        for target in self._membership.targets():
            with contextlib.suppress(*_FAILURES):
                answers[target] = self._line(target).stat(deadline)
        return answers

    def listed(self, target: str, ask: wire.List, deadline: float) -> wire.Listed | None:
        """One page of the chunks that a target has written, and the cursor of the next page; None if it did not answer.
        Keys are as stored: for sealed chunks, their names."""
        with contextlib.suppress(*_FAILURES):
            return self._line(target).listed(ask, deadline)
        return None

    def failure(self, target: str) -> str:
        """The reason of the last failed request to this target; "" if none failed."""
        return self._line(target).failure

    @property
    def received_bytes(self) -> int:
        """From all targets since the start, including transfers in flight."""
        with self._lock:
            lines = list(self._targets.values())
        return sum(line.received_bytes for line in lines)

    def close(self) -> None:
        """Close every connection. Running calls return UNREACHABLE."""
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
        """Group the keys by target, cut the groups into slices, and run `call` on the slices in parallel. `call` gets
        indices of keys."""
        live = self._membership.targets()
        by_target: defaultdict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            target = target_for(key, live) if targets is None else targets[index]
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
        with contextlib.suppress(RuntimeError):  # the client was closed in the meantime: the rest stays UNREACHABLE
            for line, part in slices[1:]:
                others.append(self._pool.submit(run, line, part))
        if slices:
            run(*slices[0])
        for future in others:
            with contextlib.suppress(CancelledError):  # `close` cancelled it before it started
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
    """Split into slices of about equal bytes, each large enough for a connection of its own."""
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
    """The target closed an idle connection: to make room for others, or because it restarted."""


class _TargetLine:
    """The connections to one target, with a circuit breaker."""

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
        self._far_until = 0.0  # the UNIX socket is not tried before this time
        self._near: wire.Welcome | None = None  # the WELCOME over TCP, while the target's UNIX socket is in use
        self._free: list[Stream] = []
        self._busy: dict[Stream, int] = {}  # -> the stream's received_bytes when it became busy
        self._received_bytes = 0  # on streams while they were busy
        self._proven: set[Stream] = set()  # streams on which the target answered a request
        self._room = threading.BoundedSemaphore(connections_max)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a connection became free, or was closed
        self._requests = itertools.count(1)
        self._failures = 0
        self._answered_at = 0.0  # time of the last answer
        self._silent_seconds = 0.0  # spent waiting since then
        self._retry_at = 0.0  # end of the backoff
        self._connect_at = 0.0  # while other connections work, none is opened before this time
        self._complains = Rarely(BACKOFF_SECONDS[1])
        self.failure = ""  # reason of the last failure
        self._closed = False
        self._value_bytes_max = wire.VALUE_BYTES_MAX
        self._prefetches = False  # whether the target supports PREFETCH

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
                    raise ProtocolError(f"VALUE for key {number}, which was not requested or was already answered")
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
        """Receive a value. HIT for a sealed value means received: the caller must still open it."""
        try:
            outcome = Outcome(header.flags)
        except ValueError:
            raise ProtocolError(f"unknown outcome {header.flags}") from None
        if outcome is not Outcome.HIT:
            return outcome
        if header.data_bytes != room.size:
            self._reject(Reason.LENGTH)
            raise ProtocolError(f"VALUE of {header.data_bytes} bytes, requested {room.size}")
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
        """Fetch a PLACED value by the carrier; see `_receive_value`."""
        remote_buffer = wire.decode_control(stream.receive_control(header, deadline), wire.Placed).place
        if self._carrier is None:
            raise ProtocolError("got PLACED without an agreed carrier")
        self._carrier.fetch(stream.carrier_target, remote_buffer, room.parts, deadline, cancelled)
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
        """The stored bytes of an item, in one or two parts."""
        if self._seal is None or seal_key is None:
            return [item.payload]
        return seal_key.seal(item.key, item.payload, self._seal.mode)

    def exists(self, keys: Sequence[bytes], deadline: float) -> list[Outcome]:
        return self._outcomes(Op.EXISTS, wire.Exists(list(keys)), Op.FOUND, len(keys), deadline)

    def prefetch(self, keys: Sequence[bytes], deadline: float) -> list[Outcome]:
        return self._outcomes(Op.PREFETCH, wire.Prefetch(list(keys)), Op.PREFETCHED, len(keys), deadline)

    def _outcomes(self, op: Op, ask: msgspec.Struct, answers: Op, count: int, deadline: float) -> list[Outcome]:
        """One request about `count` keys, answered by `Outcomes`."""
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
        """One request without payloads. Raises ConnectionError."""
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
        """Run one request and its response on a connection. Returns the outcome of keys that got none of their own."""
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
        """Raises _StaleError if the target had closed an idle connection, unless this is the retry (`again`)."""
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
                # A deadline may be a few milliseconds away: missing it once does not prove that the target is dead.
                self._silent_seconds += time.monotonic() - max(began, self._answered_at)
                if self._silent_seconds >= SILENT_SECONDS:
                    self._back_off("timed out without a byte")
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
        """Whether the target closed the connection before the first byte of the response."""
        return isinstance(error, ConnectionError) and stream.received_bytes == heard_bytes and not self._closed

    def _take(self, deadline: float, *, fresh: bool) -> tuple[Stream, bool]:
        """A connection, and whether it comes from the idle pool. `fresh` asks for a new one. If no connection can be
        opened while others work, waits for one of those."""
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
                raise Cancelled  # the wait was for a connection, so it does not count as silence of the target

    def _next_free(self) -> Stream | None:
        """An idle connection that the target has not closed; None if there is none."""
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
        """Whether any open connection has had an answer from the target."""
        with self._lock:
            ended = [stream for stream in self._free if not stream.is_idle()]
            self._free = [stream for stream in self._free if stream not in ended]
        self._drop(ended)
        return bool(self._proven)

    def _connected(self, deadline: float) -> Stream:
        """A new connection: to the UNIX socket if the target is on this host."""
        if self._near:
            try:
                return self._connect_near(self._near, deadline)
            except _FAILURES:
                self._near = None  # the target stopped or restarted: greet it again over TCP
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
        """A connection over TCP, with TLS if it is configured."""
        try:
            if self._tls is None:
                return transport.connect(self._target, deadline)
            stream = self._tls.connect(self._target, deadline)
        except ValueError as error:  # a registration in etcd may contain anything
            raise ConnectionError(f"invalid address: {error}") from None
        try:
            with self._abortable(stream):
                stream.shake_hands(min(deadline, time.monotonic() + HANDSHAKE_SECONDS))
        except BaseException:
            stream.close()
            raise
        return stream

    def _nearer(self, welcome: wire.Welcome, deadline: float) -> Stream | None:
        """A connection to the target's UNIX socket; None if it has none, or if another process answers there."""
        if not welcome.unix_path or time.monotonic() < self._far_until:
            return None
        try:
            return self._connect_near(welcome, deadline)
        except _FAILURES as error:
            self._far_until = time.monotonic() + FAR_SECONDS
            reason = str(error) or type(error).__name__
            path = shown(welcome.unix_path)
            logger.warning("%s: using TCP, UNIX socket %s failed: %s", shown(self._target), path, shown(reason))
            return None

    def _connect_near(self, welcome: wire.Welcome, deadline: float) -> Stream:
        """A connection to the UNIX socket of the target that sent `welcome` over TCP. Has its own short timeout, so
        that a silent process there does not use up the deadline."""
        deadline = min(deadline, time.monotonic() + NEAR_SECONDS)
        stream = transport.connect(welcome.unix_path, deadline)
        try:
            hello = msgspec.structs.replace(self._hello, pass_id=welcome.pass_id)
            near = self._greet(stream, hello, deadline, welcome)
            if (near.target, near.epoch) != (welcome.target, welcome.epoch):
                raise ProtocolError(f"target {shown(near.target)} answers there, expected {shown(welcome.target)}")
        except BaseException:
            stream.close()
            raise
        return stream

    @contextlib.contextmanager
    def _abortable(self, stream: Stream) -> Iterator[None]:
        """While the body runs, `close` aborts the stream."""
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
        """The carrier's connection to the target. All connections to one start of the target share it."""
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
        """Return a stream to the pool after an answered request. Closes the circuit breaker."""
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
        """Note a failed connection. If no other connection works, back off from the target."""
        if not self._works():
            self._back_off(reason)
            return
        with self._lock:
            self.failure = reason
            complains = self._complains()
        if complains:
            logger.warning("%s: a connection failed, others still work: %s", shown(self._target), shown(reason))

    def _back_off(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
            if time.monotonic() < self._retry_at:  # another request failed for the same reason
                return
            free, self._free = self._free, []
            self._carrier_greeting, self._carrier_target = b"", None  # unmaps the memory of a target that is gone
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
    """Exchange HELLO and WELCOME; with a credential, authenticate mutually. On a UNIX socket the target proves that it
    issued the pass in `over_tcp`. Raises ProtocolError."""
    hello = msgspec.structs.replace(hello, nonce=secrets.token_bytes(wire.NONCE_BYTES))
    stream.send([wire.encode(Header(Op.HELLO), hello)], deadline)
    header = _expect(stream, (Op.WELCOME, Op.CHALLENGE), 0, deadline)
    if header.op is Op.CHALLENGE:
        return _prove(stream, hello, credential, header, deadline)
    if credential is not None:
        raise ProtocolError("the target does not ask for a credential, so it cannot prove that it knows ours")
    welcome = wire.decode_control(stream.receive_control(header, deadline), wire.Welcome)
    if over_tcp is not None and over_tcp.pass_key:  # targets before release 0.2 give none
        said = wire.transcript(hello, wire.Challenge(b""), welcome)
        if len(over_tcp.pass_key) != wire.NONCE_BYTES or not Credential(over_tcp.pass_key).signed(welcome.proof, said):
            raise ProtocolError("another process than the target answers there")
    return welcome


def _prove(
    stream: Stream, hello: wire.Hello, credential: Credential | None, header: Header, deadline: float
) -> wire.Welcome:
    challenge = wire.decode_control(stream.receive_control(header, deadline), wire.Challenge)
    if credential is None:
        raise ProtocolError(f"the target requires a credential for namespace {hello.namespace!r}, none is configured")
    proof = credential.sign(wire.transcript(hello, challenge))
    stream.send([wire.encode(Header(Op.PROVE), wire.Prove(proof))], deadline)
    header = _expect(stream, (Op.WELCOME,), 0, deadline)
    welcome = wire.decode_control(stream.receive_control(header, deadline), wire.Welcome)
    if not credential.signed(welcome.proof, wire.transcript(hello, challenge, welcome)):
        raise ProtocolError("the target does not know the credential")
    return welcome


class _Room:
    """Memory for one value: the caller's, and a trailer if the value is sealed."""

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
    """The header of the response to `request`. Raises ProtocolError for any other frame."""
    header = stream.receive_header(deadline, cancelled)
    if header.op is Op.ERROR:
        failure = wire.decode_control(stream.receive_control(header, deadline), wire.Failure)
        raise ProtocolError(f"the target says: {shown(failure.message)}")
    if header.op not in ops or header.request != request:
        raise ProtocolError(f"got {header.op.name} {header.request}, expected {ops[0].name} {request}")
    return header


def _receive(
    stream: Stream, op: Op, request: int, deadline: float, kind: type[wire.Outcomes], count: int
) -> wire.Outcomes:
    header = _expect(stream, (op,), request, deadline)
    answer = wire.decode_control(stream.receive_control(header, deadline), kind)
    if len(answer.outcomes) != count:
        raise ProtocolError(f"{len(answer.outcomes)} outcomes for {count} keys")
    return answer
