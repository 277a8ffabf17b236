"""The mover: the process that moves chunks between the DRAM tier's rows and the targets, one for each engine.

It maps the engine's shared memory and takes commands from the tier in the engine (remote_tier.py) over a socket. So the
scheduler never shares its interpreter with a transfer. It imports neither vLLM nor torch, starts in a fraction of a
second, and ends with the engine, even if that is killed.

    python -m components.worker.mover SOCKET_FD ENGINE_PID SETUP_JSON    # started by link.py, not by hand
"""

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from components.pricing.throughput import Throughput
from components.worker.mover import frames
from kvstore import credentials
from kvstore.errors import ConfigError, UnavailableError
from kvstore.keys import SequenceHasher, chunk_key, fingerprint
from kvstore.net import tls
from kvstore.net.carrier import borrower
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import open_membership
from kvstore.net.wire import Outcome
from kvstore.seal import announce, open_seal

if TYPE_CHECKING:  # importing NATS doubles the CPU time of the start
    from kvstore.bus.messages import WorkerReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One put holds several chunks, to save round trips. Between puts, loads may go first.
PUT_BYTES = 8 << 20
PUT_SECONDS = 10.0
PUT_THREADS = 2
# Before each put, a store job gives way to loads for at most this long. Under steady load there is always a load, and a
# chunk that is put too late misses the next turn. Two threads still put some 300 MB/s, twice what a busy engine
# produces.
PUT_PATIENCE_SECONDS = 0.05
# With fewer bytes, the measured speed would be a latency. An older speed is no evidence, since the store may have
# recovered.
SAMPLE_BYTES = 8 << 20
SAMPLE_SECONDS = 0.5
SAMPLE_VALID_SECONDS = 10.0
# Pages of rows are mapped ahead of use, in steps that hold the interpreter for a few milliseconds.
_MAP_BYTES = 16 << 20
_MADV_POPULATE_WRITE = 23
_PR_SET_PDEATHSIG = 1
EXIT_UNAVAILABLE = 3


@dataclass
class _Prompt:
    """A request's tokens, as far as the engine has sent them, and their hashes."""

    hasher: SequenceHasher
    tokens: "array[int]" = field(default_factory=lambda: array("I"))


class Mover:
    """Takes commands on the caller's thread (`run`); transfers run on threads of their own, each under a deadline."""

    def __init__(self, link: socket.socket, setup: frames.Setup):
        self._link = link
        self._setup, settings = setup, setup.settings
        self._seal = open_seal(settings.seal_key, settings.seal)
        credential = credentials.load(Path(settings.credential_file) if settings.credential_file else None)
        client_tls = tls.open_client(settings.tls, settings.carrier)
        announce(self._seal, settings.store)
        self._region = mmap.mmap(setup.region_fd, setup.region_bytes, flags=mmap.MAP_SHARED)
        self._memory = memoryview(self._region)
        self._membership = open_membership(settings.store, settings.namespace)
        client = partial(
            StoreClient,
            self._membership,
            namespace=settings.namespace,
            credential=credential,
            seal=self._seal,
            tls=client_tls,
        )
        # Loads, puts and lookups have separate connections and threads. So a stalled put never delays a load, and loads
        # do not delay lookups.
        self._client = client(
            name="worker",
            connections_per_target=settings.fetch_threads,
            carrier=borrower(settings.carrier) if settings.carrier else None,
        )
        self._put_client = client(name="writer", connections_per_target=PUT_THREADS)
        self._ask_client = client(name="asker", connections_per_target=1)
        self._lock = threading.Condition()
        self._send_lock = threading.Lock()
        # The tier bounds all of them: loads by rows, puts by a share of rows, lookups and prompts by requests.
        self._loads: list[frames.Load] = []
        self._puts: deque[tuple[frames.Put, list[tuple[int, int]]]] = deque()
        self._questions: deque[frames.Ask] = deque()
        self._prompts: dict[int, _Prompt] = {}
        self._hurried: set[int] = set()
        self._loading: set[int] = set()
        self._cancelled: set[int] = set()
        self._throughput = Throughput()
        self._measured_until = 0.0
        self._received_bytes = 0
        self._moved_bytes = 0
        self._moving_seconds = 0.0
        self._sampled = -SAMPLE_VALID_SECONDS
        self._pace = frames.Pace(0, 0, 0, 0, 0, 0, 0, 0)
        self._identified = frames.Identified(0, {})
        self._rejected: Counter[str] = Counter()  # values by reason, as reported to the engine
        self._fetched: Counter[str] = Counter()  # chunks by outcome, without cancelled loads

    def run(self) -> None:
        """Take commands until the engine closes the socket."""
        settings = self._setup.settings
        loops = [(self._load_next, settings.fetch_threads), (self._put_next, PUT_THREADS), (self._answer_next, 1)]
        for step, count in loops:
            for _ in range(count):
                threading.Thread(target=self._repeat, args=(step,), name=step.__name__, daemon=True).start()
        threading.Thread(target=self._map_rows, name="map", daemon=True).start()
        if settings.nats:
            from components.worker.mover.report import start_reporting

            start_reporting(settings.nats, settings.namespace, f"{os.getppid()}-{os.getpid()}", self._report)
        self._send(frames.Ready())
        with contextlib.suppress(ConnectionError):  # the engine ended with reports unread
            while packet := self._link.recv(frames.FRAME_BYTES_MAX):
                self._take(frames.decode_command(packet))

    def _take(self, command: frames.Command) -> None:
        match command:
            case frames.Load():
                self._queue(self._loads, command)
            case frames.Put():
                self._queue(self._puts, (command, self._router_hashes(command)))
            case frames.Ask():
                self._queue(self._questions, command)
            case frames.Tokens():
                self._add_tokens(command)
            case frames.Hurry(request):
                with self._lock:
                    self._hurried.add(request)
            case frames.Forget(request):
                self._prompts.pop(request, None)
                with self._lock:
                    self._hurried.discard(request)
            case frames.Cancel(job):
                self._cancel(job)
            case frames.Pace():
                self._pace = command
            case frames.Identified():
                self._identified = command

    def _queue(self, waiting: "list[T] | deque[T]", one: T) -> None:
        with self._lock:
            waiting.append(one)
            self._lock.notify_all()

    def _cancel(self, job: int) -> None:
        with self._lock:
            queued = next((load for load in self._loads if load.job == job), None)
            if queued is not None:
                self._loads.remove(queued)
            elif job in self._loading:
                self._cancelled.add(job)
        if queued is not None:
            self._loaded(queued, [Outcome.LATE] * len(queued.names))

    def _repeat(self, step: Callable[[], None]) -> None:
        while True:
            try:
                step()
            except Exception:
                logger.exception("kvtier mover: a transfer failed in an unforeseen way")

    def _send(self, report: frames.Report) -> None:
        """Blocks this thread while the engine does not read; raises when the engine has ended."""
        with self._send_lock:
            try:
                self._link.send(frames.encode(report))
            except OSError:
                os._exit(0)

    # ---- loads

    def _load_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._loads)
            load = min(self._loads, key=lambda one: (one.request not in self._hurried, one.due))
            self._loads.remove(load)
            self._measure()
            self._loading.add(load.job)
        outcomes = [Outcome.UNREACHABLE] * len(load.names)
        try:
            outcomes = self._client.get(
                [chunk_key(load.identity, *name) for name in load.names],
                [self._row(row) for row in load.rows],
                load.deadline,
                targets=load.targets,
                cancelled=lambda: load.job in self._cancelled,
            )
        finally:
            with self._lock:
                self._measure(called_off=load.job in self._cancelled and time.monotonic() < load.deadline)
                self._loading.remove(load.job)
                if load.job not in self._cancelled:
                    self._fetched.update(outcome.name.lower() for outcome in outcomes)
                self._cancelled.discard(load.job)
                self._lock.notify_all()
            self._loaded(load, outcomes)

    def _measure(self, *, called_off: bool = False) -> None:
        """Add the time since the last call, if there was a load, and the bytes that arrived in it. Bytes of running and
        of cancelled loads count, too. Called with the lock held.

        If bytes were counted only at the end of loads, several parallel loads would look as slow as one. They would be
        cancelled, and look as slow again. If a load was cancelled before its first chunk, its speed is unknown.
        """
        now, received_bytes = time.monotonic(), self._client.received_bytes
        moved_bytes = received_bytes - self._received_bytes
        if self._loading and not (called_off and moved_bytes < self._setup.row_bytes):
            self._moved_bytes += moved_bytes
            self._moving_seconds += now - self._measured_until
        self._measured_until, self._received_bytes = now, received_bytes
        if self._moved_bytes >= SAMPLE_BYTES or self._moving_seconds >= SAMPLE_SECONDS:
            if now >= self._sampled + SAMPLE_VALID_SECONDS:
                self._throughput = Throughput()  # a measurement too old to report is too old to use
            self._throughput.add(self._moved_bytes, self._moving_seconds)
            self._moved_bytes, self._moving_seconds, self._sampled = 0, 0.0, now

    def _bytes_per_second(self) -> float:
        """The speed from the store into DRAM; 0 without a recent measurement."""
        return self._throughput.bytes_per_second if time.monotonic() < self._sampled + SAMPLE_VALID_SECONDS else 0.0

    def _loaded(self, load: frames.Load, outcomes: list[Outcome]) -> None:
        with self._lock:
            news = Counter(self._seal.rejected if self._seal is not None else {}) - self._rejected
            self._rejected += news
        self._send(frames.Loaded(load.job, bytes(outcomes), self._bytes_per_second(), news))

    # ---- puts

    def _put_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._puts)
            put, hashes = self._puts.popleft()
        outcomes = [Outcome.UNREACHABLE.name.lower()] * len(put.names)
        try:
            self._store(put, hashes, outcomes)
        finally:
            self._send(frames.Stored(put.job, outcomes))

    def _store(self, put: frames.Put, hashes: list[tuple[int, int]], outcomes: list[str]) -> None:
        """Put the chunks that the store does not hold yet. After a refused chunk, the later ones are useless and not
        offered."""
        self._give_way()
        deadline = time.monotonic() + PUT_SECONDS
        keys = [chunk_key(put.identity, *name) for name in put.names]
        missing: list[int] = []
        for index, outcome in enumerate(self._put_client.exists(keys, deadline)):
            outcomes[index] = "known" if outcome is Outcome.HIT else outcome.name.lower()
            if outcome is Outcome.MISS:
                missing.append(index)
        per_put = max(1, PUT_BYTES // self._setup.row_bytes)
        for start in range(0, len(missing), per_put):
            part = missing[start : start + per_put]
            items = [
                Item(
                    keys[index],
                    self._row(put.rows[index]),
                    hashes[index][0],
                    fingerprint(put.identity),
                    self._setup.blocks_per_chunk,
                    put.saved_seconds,
                    position=max(0, put.chunks[index]),
                    parent=hashes[index][1],
                )
                for index in part
            ]
            self._give_way()
            answers = self._put_client.put(items, deadline)
            for index, outcome in zip(part, answers, strict=True):
                outcomes[index] = outcome.name.lower()
            if Outcome.REFUSED in answers:
                for index in missing[start + per_put :]:
                    outcomes[index] = Outcome.REFUSED.name.lower()
                return

    def _give_way(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: not self._loads and not self._loading, PUT_PATIENCE_SECONDS)

    def _router_hashes(self, put: frames.Put) -> list[tuple[int, int]]:
        """The router hashes of each chunk and of the chunk before it. 0 (not announced) for all KV groups but the
        first: one announcement is enough for the chunks of all groups."""
        prompt = self._prompts.get(put.request)
        known = prompt.hasher.hashes if prompt else []
        blocks = self._setup.blocks_per_chunk

        def router_hash(chunk: int) -> int:
            return known[(chunk + 1) * blocks - 1] if chunk >= 0 and (chunk + 1) * blocks <= len(known) else 0

        return [
            (router_hash(chunk), router_hash(chunk - 1)) if group == 0 else (0, 0)
            for (_, group), chunk in zip(put.names, put.chunks, strict=True)
        ]

    def _add_tokens(self, more: frames.Tokens) -> None:
        prompt = self._prompts.get(more.request)
        if prompt is None:
            hasher = SequenceHasher(self._setup.block_tokens, lora_name=more.lora, cache_namespace=more.salt)
            prompt = self._prompts[more.request] = _Prompt(hasher)
        if more.first == len(prompt.tokens):
            prompt.tokens.frombytes(more.tokens)
            prompt.hasher.extend(prompt.tokens)

    # ---- questions

    def _answer_next(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._questions)
            ask = self._questions.popleft()
        found: list[str | None] = []
        try:
            keys = [chunk_key(ask.identity, *name) for name in ask.names]
            found += self._ask_client.locate(keys, ask.deadline)
        finally:
            self._send(frames.Found(ask.request, found))

    # ---- the rest

    def _row(self, row: int) -> memoryview:
        return self._memory[row * self._setup.row_bytes : (row + 1) * self._setup.row_bytes]

    def _map_rows(self) -> None:
        """Map the rows' pages, which are in memory already. Mapped during a transfer, they would cost a third of its
        speed."""
        for start in range(0, self._setup.region_bytes, _MAP_BYTES):
            with contextlib.suppress(OSError):  # before Linux 5.14
                length = min(_MAP_BYTES, self._setup.region_bytes - start)
                self._region.madvise(_MADV_POPULATE_WRITE, start, length)
            time.sleep(0.001)

    def _report(self) -> "WorkerReport":
        from kvstore.bus.messages import WorkerReport

        setup = self._setup
        with self._lock:
            fetched = dict(self._fetched)
        return WorkerReport(
            worker=setup.worker,
            endpoint=setup.settings.endpoint,
            block_tokens=setup.block_tokens,
            blocks_per_chunk=setup.blocks_per_chunk,
            chunk_bytes=setup.row_bytes,
            ts_ms=time.time_ns() // 1_000_000,
            store_bytes_per_second=self._bytes_per_second(),
            fetched_chunks=fetched,
            **msgspec.structs.asdict(self._identified),
            **msgspec.structs.asdict(self._pace),
        )


def end_with_the_engine(engine: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even while it is stopped or stuck. Exit
    if that thread has already ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != engine:
        os._exit(0)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    fd, engine, setup = int(sys.argv[1]), int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=frames.Setup)
    end_with_the_engine(engine)
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # they are meant for the engine, which then closes the socket
        signal.signal(interrupt, signal.SIG_IGN)
    try:
        Mover(socket.socket(fileno=fd), setup).run()
    except (ConfigError, UnavailableError) as error:
        logger.error("kvtier mover: %s", error)
        os._exit(EXIT_UNAVAILABLE)
    except Exception:
        logger.exception("kvtier mover: ended")
        os._exit(1)
    os._exit(0)  # no clean exit: threads may be in a transfer, and nothing waits for it


if __name__ == "__main__":
    main()
