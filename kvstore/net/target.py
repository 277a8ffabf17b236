"""A target's data plane: it listens, and serves a shelf of logs to many clients.

A connection has two threads. One receives requests, answers from memory if it can, and queues the rest for the device;
it never waits for a device. The other sends the responses, in the order in which they are ready. Payloads pass through
one bounded pool of buffers, which is also the hot cache.
"""

import contextlib
import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter

from kvstore.credentials import Credential
from kvstore.disk.buffers import Buffer, BufferPool
from kvstore.disk.log import Log, Value
from kvstore.disk.shelf import Shelf
from kvstore.net import transport, wire
from kvstore.net.accept import Acceptor
from kvstore.net.ahead import ReadAhead
from kvstore.net.backlog import Standing, Write
from kvstore.net.carrier import MEMORY, Lender, lender
from kvstore.net.client import StoreClient
from kvstore.net.membership import Membership
from kvstore.net.queues import BATCH_BYTES, Answer, ConnectionWindow, Read, ReadQueue, Want, WriteQueue
from kvstore.net.replicas import Replicator
from kvstore.net.tls import ServerTls
from kvstore.net.transport import Bytes, Stream
from kvstore.net.wire import Header, Op, Outcome, ProtocolError
from kvstore.rarely import COMPLAIN_SECONDS, Rarely
from kvstore.text import shown

logger = logging.getLogger(__name__)

# Timeout for a peer that stalls in the middle of a frame, where it holds two threads and some buffers. Long enough for
# a slow network. If memory is short, a second without progress is enough.
STALL_SECONDS = 30.0
# Backpressure per connection: the limit of pending responses. At the limit, the next request is not read until the
# client has received some.
PENDING_MAX = 2 * wire.KEYS_MAX
# The same limit in bytes, without payloads: a response to EXISTS has 4 KiB.
PENDING_BYTES_MAX = 1 << 20
# Payload bytes per system call. A response without a payload is sent before the payloads that are still queued.
_SEND_BYTES = 1 << 20
_SHORT_MAX = 256
_PINNED_LOOK_SECONDS = 1.0
# Write backpressure: a PUT blocks up to this long in total for queue space. Then its remaining chunks are REFUSED,
# unless they find room at once.
_PUT_PATIENCE_SECONDS = 1.0
# How long a stopping target writes dirty chunks. By default Kubernetes kills it after 30 s, docker after 10.
FLUSH_SECONDS = 20.0
_ERROR_SECONDS = 1.0
# At the connection limit, the connection that has been idle longest is closed, if it has been idle this long. Its
# client reconnects when it needs to.
IDLE_SECONDS = 10.0
# Chunks from memory are sent in batches of this: the first batch is in flight while the next is looked up.
_HOT_BYTES = 1 << 20
_SCRATCH_BYTES = 256 << 10
# Weight of a ghost hit in admission control: a chunk that was evicted, and that is computed and offered again, has
# proved its reuse. It counts this many times a chunk without a known reuse.
_RETURNED = 4.0
_LATENCIES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Target(Acceptor):
    """Serves `shelf` on listening sockets until `stop`. `name` is the address under which clients know it.

    - `buffer_bytes`: memory for payloads in flight.
    - `hot_bytes`: additional memory for the hot cache of recent payloads.
    - `dirty_bytes`, a part of `hot_bytes`: write-behind. A PUT is acknowledged when it is in memory, and written later.
      At most this much waits to be written, and at most half of each log's capacity.
    - `flush_seconds`: how long a stopping target may write dirty chunks; it drops the rest.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        name: str,
        epoch: int,
        namespace: str = "default",
        buffer_bytes: int = 256 << 20,
        hot_bytes: int = 0,
        dirty_bytes: int = 0,
        flush_seconds: float = FLUSH_SECONDS,
        connections_max: int = 512,
        unix_path: str = "",
        carrier: str = "",
        unix_uids: Collection[int] | None = None,
        tls: ServerTls | None = None,
        readable: bool = True,
        writable: bool = True,
    ):
        super().__init__(unix_uids, tls)
        self.readable = readable
        self.writable = writable
        self.shelf = shelf
        self.name = name
        self.epoch = epoch
        self.registry = CollectorRegistry()
        self.pool = BufferPool(buffer_bytes + hot_bytes, keeps_values=hot_bytes > 0, shared=carrier == MEMORY)
        self._lender = lender(carrier, self.pool.arena) if carrier else None
        self._behind = dirty_bytes > 0
        self._flush_seconds = flush_seconds
        self._namespace = namespace
        self._unix_path = unix_path
        self._passes = Credential.random()
        self._boot_id = transport.boot_id()
        # Where memory is scarce, a read batch is a small part of it, too.
        self._batch_bytes = min(BATCH_BYTES, self.pool.arena.total_bytes // 64)
        self.connections_max = connections_max
        self._reads = {log: ReadQueue(log, self.pool) for log in shelf.logs}
        share = (dirty_bytes or buffer_bytes // 2) // len(shelf.logs)
        self._writes = {log: WriteQueue(log, self.pool, share, behind=self._behind) for log in shelf.logs}
        self._users = [(log.device, self._busy(log)) for log in shelf.logs]
        for device, is_busy in self._users:
            device.users.append(is_busy)
        self._ahead = ReadAhead(shelf, self.pool, self._batch_bytes) if hot_bytes else None
        self._replicator: Replicator | None = None
        self._connections: dict[_Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._complaints = 0  # since the last one that was logged
        self._complains = Rarely(COMPLAIN_SECONDS)
        self._operations: Counter[tuple[str, str]] = Counter()  # (operation, outcome) -> keys
        self._counts: Counter[str] = Counter()
        seconds = Histogram(
            "kvtier_target_get_seconds",
            "Time from a GET's arrival until a chunk of it was read, by medium: memory, device",
            ["medium"],
            buckets=_LATENCIES,
            registry=self.registry,
        )
        self._memory_seconds, self._device_seconds = seconds.labels("memory"), seconds.labels("device")
        self._returned = PrometheusCounter(
            "kvtier_target_ghost_hits",
            "Ghost hits: puts of chunks that were evicted lately. The working set exceeds the capacity",
            registry=self.registry,
        )
        self._refused = PrometheusCounter(
            "kvtier_target_refused_connections",
            "Connections refused at the connection limit, because no other connection was idle for 10 s",
            registry=self.registry,
        )

    def stop(self, drain_seconds: float = 5.0, flush_seconds: float | None = None) -> None:
        """Stop accepting, let running requests finish, write dirty chunks, and close. The caller closes the shelf.
        `flush_seconds` may be less than the target's own."""
        self.stop_accepting()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.drain()
        deadline = time.monotonic() + drain_seconds
        for connection, thread in connections.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            connection.abort()
        flushed_by = time.monotonic() + (self._flush_seconds if flush_seconds is None else flush_seconds)
        if self._ahead:
            self._ahead.stop()
        for writes in self._writes.values():
            writes.stop(flushed_by)
        if self._replicator:
            self._replicator.stop()
        for device, is_busy in self._users:
            if is_busy in device.users:
                device.users.remove(is_busy)
        for reads in self._reads.values():
            reads.stop()

    def replicate(self, client: StoreClient, targets: Membership) -> None:
        """Start replication of chunks that are read (replicas.py), through this client. Replaces an earlier client."""
        if self._replicator:
            self._replicator.stop()
        self._replicator = Replicator(self.name, self.shelf, self.pool, client, targets)

    def _busy(self, log: Log) -> Callable[[], bool]:
        reads, writes = self._reads[log], self._writes[log]
        return lambda: reads.is_busy or writes.is_busy

    # ---- connections

    def _admit(self, stream: Stream) -> None:
        with self._lock:
            has_place = self._has_place()
            if has_place:
                try:
                    self._begin(stream)
                except (OSError, RuntimeError) as error:  # no descriptor or thread is left
                    logger.error("cannot serve a client: %s", error)
                    stream.close()
        if not has_place:
            self._turn_away(stream)

    def _has_place(self) -> bool:
        """Whether there is room for one more connection. At the limit, closes an idle one. With the lock held."""
        if self._stopping:
            return False
        staying = [connection for connection in self._connections if not connection.leaving]
        if len(staying) < self.connections_max:
            return True
        idle_until = time.monotonic() - IDLE_SECONDS
        idle = [connection for connection in staying if connection.idle_since < idle_until]
        idle.sort(key=lambda connection: connection.idle_since)
        leaving = next((connection for connection in idle if connection.make_room()), None)
        if leaving is not None:
            leaving.drain()
        return leaving is not None

    def _turn_away(self, stream: Stream) -> None:
        """Send an ERROR with the reason, and close."""
        if not self._stopping:
            self._refused.inc()
            reason = f"all {self.connections_max} connections of this target are in use: --connections gives it more"
            self._complain(ProtocolError(reason))
            with contextlib.suppress(OSError):
                failure = wire.encode(Header(Op.ERROR), wire.Failure(reason))
                stream.send([failure], time.monotonic() + _ERROR_SECONDS)
        stream.close()

    def _begin(self, stream: Stream) -> None:
        """Start a connection's session; with the lock held."""
        connection = _Connection(stream, self.pool, self._made_room)
        connection.may_list = stream.is_own_user
        thread = threading.Thread(target=self._session, args=(connection,), name="kvtier-session", daemon=True)
        self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:
            del self._connections[connection]
            connection.close()
            raise

    def adopt(self, stream: Stream, header: Header, hello: wire.Hello, sign: Callable[[wire.Welcome], bytes]) -> None:
        """Serve a client that the caller has authenticated, on this thread, until it disconnects. `hello` is its
        greeting; `sign` makes the target's proof for the WELCOME."""
        connection = _Connection(stream, self.pool, self._made_room)
        connection.may_list = True
        with self._lock:
            has_place = self._has_place()
            if has_place:
                self._connections[connection] = threading.current_thread()
        if not has_place:
            self._turn_away(stream)
            connection.close()
            return
        self._session(connection, lambda: self._welcome(connection, header, hello, sign))

    def disconnect(self) -> None:
        """Close all connections, so that their clients must authenticate again."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.abort()

    def _session(self, connection: "_Connection", greet: Callable[[], str] | None = None) -> None:
        stream = connection.incoming
        try:
            connection.window.client = greet() if greet else self._greet(connection)
            while (connection.has_pinned or not (self._stopping or connection.leaving)) and connection.wait_for_frame():
                deadline = time.monotonic() + STALL_SECONDS
                header = stream.receive_header(deadline)
                self._answer(connection, header, stream.receive_control(header, deadline))
            if self._stopping or connection.leaving:
                connection.flush()
        except ProtocolError as error:
            self._complain(error)
            with contextlib.suppress(OSError):
                connection.reserve(1)
                connection.send([_Message([wire.encode(Header(Op.ERROR), wire.Failure(str(error)))])])
            connection.flush(_ERROR_SECONDS)
        except OSError as error:
            logger.debug("connection ended: %r", error)
        except Exception:
            logger.exception("a request failed; closing its connection")
        finally:
            for reads in self._reads.values():
                reads.drop(connection.window)
            connection.close()
            with self._lock:
                del self._connections[connection]

    def _complain(self, error: ProtocolError) -> None:
        """Log it, rate-limited."""
        with self._lock:
            self._complaints += 1
            if not self._complains():
                return
            count, self._complaints = self._complaints, 0
        logger.warning("closing a connection: %s%s", shown(error), f"; and {count - 1} more" if count > 1 else "")

    def _greet(self, connection: "_Connection") -> str:
        stream, deadline = connection.incoming, time.monotonic() + STALL_SECONDS
        header = stream.receive_header(deadline)
        if header.op is not Op.HELLO:
            raise ProtocolError(f"the first frame must be HELLO, not {header.op.name}")
        hello = wire.decode_control(stream.receive_control(header, deadline), wire.Hello)
        if hello.namespace != self._namespace:
            raise ProtocolError(f"namespace {hello.namespace!r} is not served here")
        return self._welcome(connection, header, hello)

    def _welcome(
        self,
        connection: "_Connection",
        header: Header,
        hello: wire.Hello,
        sign: Callable[[wire.Welcome], bytes] | None = None,
    ) -> str:
        near = self._unix_path if hello.boot_id == self._boot_id else ""
        limit = min(wire.VALUE_BYTES_MAX, self.shelf.value_bytes_max)
        if self._lender is not None and self._may_use_carrier(self._lender, connection, hello):
            connection.lender = self._lender
        greeting = connection.lender.greeting() if connection.lender else b""
        welcome = wire.Welcome(self.name, self.epoch, limit, near, greeting, prefetches=self._ahead is not None)
        if sign is not None:
            welcome = msgspec.structs.replace(welcome, proof=sign(welcome))
        elif hello.pass_id:
            proof = self._pass(hello.pass_id).sign(wire.transcript(hello, wire.Challenge(b""), welcome))
            welcome = msgspec.structs.replace(welcome, proof=proof)
        elif near and not connection.incoming.is_unix:
            pass_id = secrets.token_bytes(wire.NONCE_BYTES)
            welcome = msgspec.structs.replace(welcome, pass_id=pass_id, pass_key=self._pass_key(pass_id))
        connection.reserve(1)
        connection.send([_Message([wire.encode(Header(Op.WELCOME, header.request), welcome)])])
        if connection.lender is not None and connection.lender.descriptor is not None:
            connection.flush()
            connection.incoming.send_descriptor(connection.lender.descriptor, time.monotonic() + STALL_SECONDS)
        return hello.client

    def _may_use_carrier(self, lender: Lender, connection: "_Connection", hello: wire.Hello) -> bool:
        """Whether to serve this client by the carrier. A client that maps the memory sees every value in it, so that
        needs the same right as LIST."""
        trusted = connection.incoming.is_unix and connection.may_list and self.readable
        return hello.carrier == lender.name and (lender.descriptor is None or trusted)

    def _pass_key(self, pass_id: bytes) -> bytes:
        """The key of a pass, which one client got over TCP. It is derived, so the target keeps no state for it."""
        return self._passes.sign([b"kvtier 1 pass", pass_id])

    def _pass(self, pass_id: bytes) -> Credential:
        return Credential(self._pass_key(pass_id))

    def _answer(self, connection: "_Connection", header: Header, control: bytearray) -> None:
        match header.op:
            case Op.GET:
                self._get(connection, header.request, wire.decode_control(control, wire.Get))
            case Op.PUT:
                self._put(connection, header, wire.decode_control(control, wire.Put))
            case Op.EXISTS:
                keys = wire.decode_control(control, wire.Exists).keys
                outcomes = [Outcome.HIT if key in self.shelf else Outcome.MISS for key in keys]
                if not self.readable:
                    outcomes = [Outcome.REFUSED] * len(keys)
                self._send_outcomes(connection, Header(Op.FOUND, header.request), outcomes)
            case Op.PREFETCH:
                keys = wire.decode_control(control, wire.Prefetch).keys
                outcomes = self.prefetch(keys, connection.incoming.peer)
                self._send_outcomes(connection, Header(Op.PREFETCHED, header.request), outcomes)
            case Op.STAT:
                connection.reserve(1)
                connection.send([_Message([wire.encode(Header(Op.STATUS, header.request), self.status())])])
            case Op.LIST:
                self._list(connection, header.request, wire.decode_control(control, wire.List))
            case Op.TAKEN:
                connection.taken(header.request, wire.decode_control(control, wire.Taken).number)
            case _:
                raise ProtocolError(f"{header.op.name} is not a request")

    def _send_outcomes(self, connection: "_Connection", header: Header, outcomes: list[Outcome]) -> None:
        connection.reserve(1)
        connection.send([_Message([wire.encode(header, wire.Outcomes(outcomes))])])

    def _list(self, connection: "_Connection", request: int, ask: wire.List) -> None:
        """A client without a credential is refused: it could read every chunk whose key it learned here."""
        if not (connection.may_list and self.readable):
            raise ProtocolError(
                "chunks are listed for clients that prove a credential with the right to read, or run as the target's "
                "user on its host"
            )
        entries, cursor = self.shelf.page(ask.cursor, wire.LISTED_MAX)
        chunks = [
            wire.Listing(
                entry.key,
                entry.length,
                entry.crc,
                entry.router_hash,
                entry.fingerprint,
                entry.blocks_per_chunk,
                entry.key_version,
            )
            for entry in entries
            if ask.fingerprint in (0, entry.fingerprint)
        ]
        connection.reserve(1)
        connection.send([_Message([wire.encode(Header(Op.LISTED, request), wire.Listed(chunks, cursor))])])

    def prefetch(self, keys: Sequence[bytes], peer: str) -> list[Outcome]:
        """Prefetch chunks at the expense of `peer`'s share. Any client may read them later; see `ReadAhead.submit`."""
        if self._ahead is None or not self.readable:
            return [Outcome.REFUSED] * len(keys)
        return self._ahead.submit(keys, peer)

    def _made_room(self) -> None:
        for reads in self._reads.values():
            reads.wake()

    # ---- get

    def _get(self, connection: "_Connection", request: int, get: wire.Get) -> None:
        """Queue device reads, sorted by position in each log so that adjacent chunks are read together. Meanwhile
        answer from memory."""
        arrived = time.monotonic()
        deadline = arrived + get.deadline_ms / 1000
        connection.reserve(len(get.keys))
        if not self.readable:
            wants = [Want(number, *one) for number, one in enumerate(zip(get.keys, get.sizes, strict=True))]
            self._send_values(connection, request, [Answer(want, Outcome.REFUSED) for want in wants])
            return
        missing: list[Answer] = []
        hot: list[Want] = []
        of_log: dict[Log, list[Want]] = {}
        for number, (key, size) in enumerate(zip(get.keys, get.sizes, strict=True)):
            of_log.setdefault(self.shelf.of(key), []).append(Want(number, key, size))

        def done(answers: list[Answer]) -> None:
            self._device_seconds.observe(time.monotonic() - arrived)
            self._send_values(connection, request, answers)

        def read(log: Log, wants: Sequence[Want]) -> None:
            self._reads[log].submit(
                [Read(connection.window, part, deadline, done) for part in _parts(wants, self._batch_bytes)]
            )

        for log, wants in of_log.items():
            places = log.locate([want.key for want in wants], [want.length for want in wants])
            cold: list[tuple[int, Want]] = []
            for want, place in zip(wants, places, strict=True):
                if place is None:
                    missing.append(Answer(want, Outcome.MISS))
                elif want.key in self.pool and connection.lender is None:
                    hot.append(want)
                else:
                    cold.append((place, want))
            read(log, [want for _, want in sorted(cold)])
        self._send_values(connection, request, missing)
        for part in _parts(hot, _HOT_BYTES):
            answers = self._from_memory(connection, part)
            self._memory_seconds.observe(time.monotonic() - arrived)
            self._send_values(connection, request, answers, hot=True)
            for want in part[len(answers) :]:  # evicted in the meantime, or over the connection's window
                read(self.shelf.of(want.key), [want])

    def _from_memory(self, connection: "_Connection", wants: list[Want]) -> list[Answer]:
        """Answers to the leading `wants` that are in the hot cache, up to the first that is not. None if the
        connection's window is full."""
        answers: list[Answer] = []
        if not connection.window.has_room(sum(want.length for want in wants)):
            return answers
        for want in wants:
            buffer = self.pool.find(want.key, want.length)
            if buffer is None:
                break
            self.shelf.of(want.key).used(want.key)
            answers.append(Answer(want, Outcome.HIT, buffer, buffer.crc))
        connection.window.hold(sum(answer.want.length for answer in answers))
        return answers

    def _send_values(
        self, connection: "_Connection", request: int, answers: Sequence[Answer], *, hot: bool = False
    ) -> None:
        if not answers:
            return
        outcomes = Counter(answer.outcome for answer in answers)
        with self._lock:
            for outcome, count in outcomes.items():
                self._operations["get", outcome.name.lower()] += count
            self._counts["sent_bytes"] += sum(answer.want.length for answer in answers if answer.buffer is not None)
            self._counts["hot_hits" if hot else "device_hits"] += outcomes[Outcome.HIT]
        if self._replicator:
            self._replicator.read(answer.want.key for answer in answers if answer.outcome is Outcome.HIT)
        connection.send([self._message(connection, request, answer) for answer in answers])

    def _message(self, connection: "_Connection", request: int, answer: Answer) -> "_Message":
        want, outcome, buffer, crc = answer
        if buffer is None:
            return _Message([wire.encode(Header(Op.VALUE, request, outcome, want.number, crc))])
        if connection.lender is not None:
            place = wire.Placed(connection.lender.remote_buffer(buffer))
            if connection.pin(request, want.number, buffer):
                return _Message([wire.encode(Header(Op.PLACED, request, outcome, want.number, crc), place)])
        header = Header(Op.VALUE, request, outcome, want.number, crc, data_bytes=buffer.length)
        return _Message([wire.encode(header), buffer.payload], buffer)

    # ---- put

    def _put(self, connection: "_Connection", header: Header, request: wire.Put) -> None:
        """Receive the payloads and queue them. The response is sent when the last one has its outcome."""
        if sum(item.length for item in request.items) != header.data_bytes:
            raise ProtocolError("PUT: the data part is not as long as its items together")
        connection.reserve(1)
        batch = _PutBatch(len(request.items), lambda outcomes: self._stored(connection, header.request, outcomes))
        with self._lock:
            self._counts["received_bytes"] += header.data_bytes
        patient_until = time.monotonic() + _PUT_PATIENCE_SECONDS
        for number, item in enumerate(request.items):
            self._store(connection.incoming, item, patient_until, batch.at(number))

    def _stored(self, connection: "_Connection", request: int, outcomes: list[Outcome]) -> None:
        with self._lock:
            for outcome in outcomes:
                self._operations["put", outcome.name.lower()] += 1
        connection.send([_Message([wire.encode(Header(Op.STORED, request), wire.Outcomes(outcomes))])])

    def _store(self, stream: Stream, item: wire.PutItem, patient_until: float, done: Callable[[Outcome], None]) -> None:
        """Receive one payload, or skip it. `done` is called now, or later by the write queue."""
        deadline = time.monotonic() + STALL_SECONDS
        if not self.writable:
            self._skip(stream, item.length, deadline)
            done(Outcome.REFUSED)
            return
        log = self.shelf.of(item.key)
        writes = self._writes[log]
        joined = item.key not in log and writes.join(item.key, done)
        returned = log.was_evicted(item.key)
        benefit = max(item.saved_us, 1) / item.length * (_RETURNED if returned else 1.0)
        in_prompt = 0 if item.position == wire.REPLICA else item.router_hash
        standing = Standing(benefit, item.position, in_prompt, item.parent, item.fingerprint)
        wanted = not joined and item.key not in log and item.length <= log.value_bytes_max
        if wanted and returned:
            self._returned.inc()
        buffer = None
        if wanted and writes.expect(item.key, item.length, standing, patient_until):
            buffer = self.pool.take(item.length, patient_until)
            if buffer is None:
                writes.give_up(item.key, item.length, standing)
        if buffer is None:
            self._skip(stream, item.length, deadline)
            if not joined:
                done(Outcome.STORED if item.key in log else Outcome.REFUSED)
            return
        try:
            intact = stream.receive_checksum(buffer.payload, deadline) == item.crc
        except BaseException:
            self.pool.give_back(buffer)
            writes.give_up(item.key, item.length)
            raise
        if intact:
            value = Value(
                item.key, buffer, item.crc, item.router_hash, item.fingerprint, item.blocks_per_chunk, item.key_version
            )
            writes.offer(Write(value, standing, [done]))
        else:
            self.pool.give_back(buffer)
            writes.give_up(item.key, item.length, standing)
            done(Outcome.CORRUPT)

    def _skip(self, stream: Stream, length: int, deadline: float) -> None:
        """Read and discard a payload, because the rest of the frame follows it."""
        scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        for start in range(0, length, _SCRATCH_BYTES):
            stream.receive(scratch[: min(_SCRATCH_BYTES, length - start)], deadline)

    @property
    def device_bytes_per_second(self) -> float:
        """Read throughput of all devices while they were busy; 0 if they were not busy lately."""
        return sum(reads.bytes_per_second for reads in self._reads.values())

    def status(self) -> wire.Status:
        stats, key_versions = self.shelf.stats(), self.shelf.key_versions()
        hot_entries, hot_bytes = self.pool.kept
        with self._lock:
            operations: dict[str, dict[str, int]] = {}
            for (operation, outcome), keys in self._operations.items():
                operations.setdefault(operation, {})[outcome] = keys
            return wire.Status(
                target=self.name,
                epoch=self.epoch,
                capacity_bytes=self.shelf.capacity_bytes,
                payload_bytes=stats.payload_bytes,
                entries=stats.entries,
                evicted_entries=stats.evicted_entries,
                evicted_segments=stats.evicted_segments,
                evicted_age_seconds=stats.evicted_age_seconds,
                corrupt_entries=stats.corrupt_entries,
                failed_writes=stats.failed_writes,
                accepted_bytes=stats.accepted_bytes,
                device_written_bytes=stats.device_written_bytes,
                rewritten_bytes=stats.rewritten_bytes,
                connections=len(self._connections),
                sent_bytes=self._counts["sent_bytes"],
                received_bytes=self._counts["received_bytes"],
                hot_entries=hot_entries,
                hot_bytes=hot_bytes,
                hot_hits=self._counts["hot_hits"],
                device_hits=self._counts["device_hits"],
                waiting_read_bytes=sum(reads.waiting_bytes for reads in self._reads.values()),
                waiting_write_bytes=sum(writes.waiting_bytes for writes in self._writes.values()),
                dirty_bytes=stats.dirty_bytes,
                dirty_entries=stats.dirty_entries,
                dirty_bytes_max=sum(writes.bytes_max for writes in self._writes.values()) if self._behind else 0,
                read_ahead=self._ahead.counts if self._ahead else {},
                replicas=self._replicator.counts if self._replicator else {},
                dropped=sum((writes.dropped for writes in self._writes.values()), Counter()),
                operations=operations,
                key_versions=key_versions,
            )


class _Message(NamedTuple):
    """One frame to send. `buffer` holds its payload, if it has one, and is returned to the pool once it is sent."""

    parts: Sequence[Bytes]
    buffer: Buffer | None = None


class _Connection:
    """A client's connection. The session's thread receives; a thread of the connection sends."""

    def __init__(self, stream: Stream, pool: BufferPool, made_room: Callable[[], None]):
        self.incoming = stream
        self.window = ConnectionWindow("", pool)
        self.lender: Lender | None = None  # if the client fetches its data by a carrier
        self._pinned: dict[tuple[int, int], Buffer] = {}  # (request, number) -> buffer that the client is fetching
        self._took_at = 0.0  # time of the last TAKEN, or when the first buffer was pinned
        self._outgoing = stream.twin()
        self.idle_since = time.monotonic()  # infinite while a request is being received
        self.leaving = False  # closing: not counted against the connection limit
        self.may_list = False
        self._pool = pool
        self._made_room = made_room
        self._outbox: deque[_Message] = deque()  # with a payload
        self._short: deque[_Message] = deque()  # without a payload: sent first
        self._short_bytes = 0
        self._pending = 0  # pending responses
        self._closed = False
        self._changed = threading.Condition()
        self._sender = threading.Thread(target=self._send_all, name="kvtier-sender", daemon=True)
        self._sender.start()

    def wait_for_frame(self) -> bool:
        """Block until a request begins; False if the client disconnects first."""
        self.idle_since = time.monotonic()
        begun = self.incoming.wait_for_frame()
        self.idle_since = math.inf
        return begun

    @property
    def has_pinned(self) -> bool:
        return bool(self._pinned)

    def reserve(self, responses: int) -> None:
        """Reserve room for this many responses. Blocks while the connection is at its limit of pending ones; raises
        TimeoutError if the client does not receive them."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._closed or not self._pending or self._has_room(responses), STALL_SECONDS
            ):
                raise TimeoutError
            self._pending += responses

    def _has_room(self, responses: int) -> bool:
        return self._pending + responses <= PENDING_MAX and self._short_bytes <= PENDING_BYTES_MAX

    def send(self, messages: Sequence[_Message]) -> None:
        """Queue responses for which `reserve` made room. Any thread."""
        with self._changed:
            if not self._closed:
                for message in messages:
                    if message.buffer is None:
                        self._short.append(message)
                        self._short_bytes += len(message.parts[0])
                    else:
                        self._outbox.append(message)
                self._changed.notify_all()
                return
        self._sent(messages)

    def pin(self, request: int, number: int, buffer: Buffer) -> bool:
        """Keep a buffer until the client sends TAKEN, or disconnects. False if the connection is closing: it would not
        receive the TAKEN."""
        with self._changed:
            if self.leaving:
                return False
            if not self._closed and (request, number) not in self._pinned:
                if not self._pinned:
                    self._took_at = time.monotonic()
                self._pinned[request, number] = buffer
                return True
        self._returned([buffer])
        return True

    def taken(self, request: int, number: int) -> None:
        with self._changed:
            buffer = self._pinned.pop((request, number), None)
            self._took_at = time.monotonic()
        if buffer is not None:
            self._returned([buffer])

    def flush(self, seconds: float = STALL_SECONDS) -> None:
        """Wait until all pending responses are sent, or for `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._pending, seconds)

    def make_room(self) -> bool:
        """From another thread: mark the connection as closing, unless it has pending responses or pinned buffers. After
        True, `drain` must follow."""
        with self._changed:
            if self._pending or self._pinned:
                return False
            self.leaving = True
            return True

    def drain(self) -> None:
        """From another thread: receive no more requests, once the client has taken all pinned buffers."""
        with self._changed:
            self.leaving = True
            if not self._pinned:
                self.incoming.stop_receiving()

    def abort(self) -> None:
        """From another thread: close at once."""
        self.incoming.abort()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            rest = [*self._short, *self._outbox]
            self._short.clear()
            self._outbox.clear()
            self._changed.notify_all()
        self.incoming.abort()  # in case something is being sent
        self._sender.join()
        self._sent(rest)
        self._returned(list(self._pinned.values()))
        self.incoming.close()
        self._outgoing.close()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not (self._short or self._outbox or self._closed):
                    self._changed.wait(_PINNED_LOOK_SECONDS if self._pinned else None)
                    if self._stopped_fetching():
                        self.incoming.abort()
                        return
                if self._closed:
                    return
                messages = list(self._some())
            try:
                parts = [part for message in messages for part in message.parts]
                begin = time.monotonic()
                self._outgoing.send(parts, begin + STALL_SECONDS, lambda: self._pool.is_short)
                if payload_bytes := sum(message.buffer.length for message in messages if message.buffer):
                    self.window.sent(payload_bytes, time.monotonic() - begin)
            except OSError as error:
                logger.debug("connection ended: %r", error)
                self.incoming.abort()
            finally:
                self._sent(messages)

    def _stopped_fetching(self) -> bool:
        """Whether the client stopped fetching pinned buffers. It is treated like one that stopped receiving."""
        patience = _PINNED_LOOK_SECONDS if self._pool.is_short else STALL_SECONDS
        return bool(self._pinned) and time.monotonic() > self._took_at + patience

    def _some(self) -> Iterator[_Message]:
        """The next messages, for one system call."""
        for _ in range(min(len(self._short), _SHORT_MAX)):
            message = self._short.popleft()
            self._short_bytes -= len(message.parts[0])
            yield message
        size = 0
        while self._outbox and size < _SEND_BYTES:
            message = self._outbox.popleft()
            size += len(message.parts[-1])
            yield message

    def _sent(self, messages: Sequence[_Message]) -> None:
        self._returned([message.buffer for message in messages if message.buffer is not None])
        with self._changed:
            self._pending -= len(messages)
            self.idle_since = max(self.idle_since, time.monotonic())
            self._changed.notify_all()

    def _returned(self, buffers: Sequence[Buffer]) -> None:
        """Give buffers back to the pool: the client has them, or is gone."""
        if not buffers:
            return
        self._pool.give_back(*buffers)
        self.window.hold(-sum(buffer.length for buffer in buffers))
        self._made_room()


class _PutBatch:
    """Collects the outcomes of one PUT, in any order, and calls `finished` with all of them."""

    def __init__(self, count: int, finished: Callable[[list[Outcome]], None]):
        self._outcomes: list[Outcome] = [Outcome.REFUSED] * count
        self._left = count
        self._finished = finished
        self._lock = threading.Lock()
        if not count:
            finished([])

    def at(self, number: int) -> Callable[[Outcome], None]:
        def done(outcome: Outcome) -> None:
            with self._lock:
                self._outcomes[number] = outcome
                self._left -= 1
                last = not self._left
            if last:
                self._finished(self._outcomes)

        return done


def _parts(wants: Sequence[Want], part_bytes: int) -> Iterator[list[Want]]:
    """Split into batches of up to `part_bytes`, but at least one chunk each."""
    run: list[Want] = []
    size = 0
    for want in wants:
        if run and size + want.length > part_bytes:
            yield run
            run, size = [], 0
        run.append(want)
        size += want.length
    if run:
        yield run
