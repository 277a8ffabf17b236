"""Short measurements of throughput: of a device, of the network stack, or of a running target."""

import errno
import itertools
import os
import random
import secrets
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from crc32c import crc32c

from kvstore.credentials import Credential
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.record import record_bytes
from kvstore.errors import ConfigError, UnavailableError
from kvstore.net import transport, wire
from kvstore.net.client import Item, StoreClient, good_connections
from kvstore.net.membership import open_membership
from kvstore.net.queues import READERS, WRITERS
from kvstore.net.tls import ClientTls
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome
from kvstore.text import in_units

RUNS = 5
# Larger than the cache of most device controllers, small enough for a short run.
_SCRATCH_BYTES = 1 << 30
_SCRATCH_CHUNKS_MIN = 2 * READERS
# As many as a client opens to a target.
_CONNECTIONS = good_connections()
# Concurrent batches of puts and gets. Each is large enough for all of a client's connections; together they need less
# than a target's buffers.
_CALLERS = 2
_BATCH_BYTES = 32 << 20
_DEADLINE_SECONDS = 10.0


class Speed(msgspec.Struct):
    """The runs of one measurement, in bytes per second."""

    name: str
    runs: list[float]
    in_flight: int  # chunks

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


def measure(
    name: str, step: Callable[[int], int], threads: int, seconds: float, run_bytes_max: int | None = None
) -> Speed:
    """Measure RUNS times. In a run, `threads` threads call `step` with their number until `seconds` have passed or
    `run_bytes_max` were moved. A step returns the number of bytes that it moved."""

    def work(number: int, end: float) -> int:
        moved = step(number)
        while time.monotonic() < end and (run_bytes_max is None or moved * threads < run_bytes_max):
            moved += step(number)
        return moved

    runs = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(RUNS):
            begun = time.monotonic()
            moved = sum(pool.map(work, range(threads), [begun + seconds] * threads))
            runs.append(moved / (time.monotonic() - begun))
    return Speed(name, runs, threads)


def of_device(directory: Path, chunk_bytes: int, seconds: float) -> list[Speed]:
    """Write and read chunks as a log does, with checksums, in a file in `directory` that is unlinked before the first
    write."""
    size = record_bytes(chunk_bytes)
    scratch_bytes = max(_SCRATCH_BYTES // size, _SCRATCH_CHUNKS_MIN) * size
    files = Files()
    path = directory / f"kvtier-bench-{secrets.token_hex(4)}"
    try:
        fd = _open_scratch(files, path, scratch_bytes)
    finally:
        path.unlink(missing_ok=True)
    try:
        return _write_and_read(files, fd, chunk_bytes, scratch_bytes // size, seconds)
    except OSError as error:
        raise UnavailableError(f"dir: {directory} cannot be measured ({error.strerror or error})") from None
    finally:
        files.close(fd)


def _open_scratch(files: Files, path: Path, size_bytes: int) -> int:
    try:
        return files.open(path, size_bytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConfigError("dir", path.parent, f"one with {in_units(size_bytes)} free, for a scratch file") from None
        raise ConfigError("dir", path.parent, f"one that this user can write to ({error.strerror})") from None


def _write_and_read(files: Files, fd: int, chunk_bytes: int, places: int, seconds: float) -> list[Speed]:
    size = record_bytes(chunk_bytes)
    buffers = [aligned(chunk_bytes) for _ in range(READERS)]
    for buffer in buffers:
        buffer.payload[:] = os.urandom(chunk_bytes)
    numbers = itertools.count()

    def write(thread: int) -> int:
        crc32c(buffers[thread].payload)
        files.write(fd, [buffers[thread].record], next(numbers) % places * size)
        return chunk_bytes

    def read(thread: int) -> int:
        files.read(fd, [buffers[thread].record], random.randrange(written) * size)
        crc32c(buffers[thread].payload)
        return chunk_bytes

    writing = measure("device write", write, WRITERS, seconds)
    written = min(next(numbers), places)
    files.sync(fd)
    return [writing, measure("device read", read, READERS, seconds)]


def of_network(chunk_bytes: int, seconds: float) -> list[Speed]:
    """Send chunks through the store's own streams, from threads of this process to others."""
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        return [
            _of_streams("TCP on loopback", "127.0.0.1:0", chunk_bytes, seconds),
            _of_streams("UNIX socket", f"{folder}/bench.sock", chunk_bytes, seconds),
        ]


def _of_streams(name: str, address: str, chunk_bytes: int, seconds: float) -> Speed:
    deadline = time.monotonic() + RUNS * seconds + _DEADLINE_SECONDS
    payload = memoryview(os.urandom(chunk_bytes))
    rooms = [memoryview(bytearray(chunk_bytes)) for _ in range(_CONNECTIONS)]
    streams: list[Stream] = []

    def feed(stream: Stream) -> None:
        frame = wire.encode(Header(Op.VALUE, 1, data_bytes=chunk_bytes))
        try:
            while True:
                stream.send([frame, payload], deadline)
        except OSError:
            stream.close()  # the receiver has finished

    def take(number: int) -> int:
        streams[number].receive_header(deadline)
        streams[number].receive(rooms[number], deadline)
        crc32c(rooms[number])
        return chunk_bytes

    with transport.listen(address) as listener:
        where = address if "/" in address else f"127.0.0.1:{listener.getsockname()[1]}"
        feeders = []
        try:
            for _ in range(_CONNECTIONS):
                streams.append(transport.connect(where, deadline))
                feeders.append(threading.Thread(target=feed, args=(Stream(listener.accept()[0]),), daemon=True))
                feeders[-1].start()
            return measure(name, take, _CONNECTIONS, seconds)
        finally:
            for stream in streams:
                stream.abort()
                stream.close()
            for feeder in feeders:
                feeder.join(_DEADLINE_SECONDS)


class StoreSpeeds(msgspec.Struct):
    put: Speed
    get: Speed
    from_memory: float  # hit rate of the targets' hot caches
    failed: dict[str, int]  # keys with another outcome than stored or hit


def of_store(
    store: str,
    namespace: str,
    chunk_bytes: int,
    seconds: float,
    *,
    credential: Credential | None = None,
    tls: ClientTls | None = None,
) -> StoreSpeeds:
    """Put chunks with random keys into running targets, and get them again. They stay until they are evicted, and take
    at most about a fiftieth of the capacity."""
    membership = open_membership(store, namespace)
    client = StoreClient(
        membership,
        namespace=namespace,
        name="kvtier-bench",
        connections_per_target=_CONNECTIONS,
        credential=credential,
        tls=tls,
    )
    try:
        before = client.stat(time.monotonic() + _DEADLINE_SECONDS)
        if not before:
            raise UnavailableError(f"store: no target of namespace {namespace!r} answers at {store}: ask stat why")
        scratch_bytes = min(_SCRATCH_BYTES, sum(status.capacity_bytes for status in before.values()) // 50)
        speeds = _put_and_get(client, chunk_bytes, seconds, scratch_bytes)
        after = client.stat(time.monotonic() + _DEADLINE_SECONDS)
    finally:
        client.close()
    both = before.keys() & after.keys()
    hot, device = (
        sum(getattr(after[name], hits) - getattr(before[name], hits) for name in both)
        for hits in ("hot_hits", "device_hits")
    )
    speeds.from_memory = hot / max(1, hot + device)
    return speeds


def _put_and_get(client: StoreClient, chunk_bytes: int, seconds: float, scratch_bytes: int) -> StoreSpeeds:
    most = min(_BATCH_BYTES // chunk_bytes, wire.KEYS_MAX) or 1
    batch = min(most, scratch_bytes // RUNS // _CALLERS // chunk_bytes) or 1
    payload = memoryview(os.urandom(chunk_bytes))
    rooms = [[memoryview(bytearray(chunk_bytes)) for _ in range(most)] for _ in range(_CALLERS)]
    stored: list[bytes] = []
    outcomes: Counter[str] = Counter()
    counting = threading.Lock()

    def count(operation: str, answers: Sequence[Outcome]) -> None:
        with counting:
            outcomes.update(f"{operation} {answer.name.lower()}" for answer in answers)

    def put(_: int) -> int:
        keys = [secrets.token_bytes(16) for _ in range(batch)]
        answers = client.put([Item(key, payload, 0, 0, 1) for key in keys], time.monotonic() + _DEADLINE_SECONDS)
        count("put", answers)
        stored.extend(key for key, answer in zip(keys, answers, strict=True) if answer is Outcome.STORED)
        return chunk_bytes * answers.count(Outcome.STORED)

    def get(caller: int) -> int:
        keys = random.sample(stored, min(most, len(stored)))
        answers = client.get(keys, rooms[caller][: len(keys)], time.monotonic() + _DEADLINE_SECONDS)
        count("get", answers)
        return chunk_bytes * answers.count(Outcome.HIT)

    putting = measure("store put", put, _CALLERS, seconds, scratch_bytes // RUNS)
    if not stored:
        raise UnavailableError(f"store: no chunk was stored ({_told(outcomes)}): see the log, or try a smaller --size")
    getting = measure("store get", get, _CALLERS, seconds)
    if not outcomes["get hit"]:
        raise UnavailableError(f"store: no chunk could be read back ({_told(outcomes)}): see the log")
    putting.in_flight, getting.in_flight = _CALLERS * batch, _CALLERS * min(most, len(stored))
    failed = {name: keys for name, keys in outcomes.items() if name not in ("put stored", "get hit")}
    return StoreSpeeds(putting, getting, 0.0, failed)


def _told(outcomes: Counter[str]) -> str:
    return ", ".join(f"{keys} {name}" for name, keys in outcomes.items())
