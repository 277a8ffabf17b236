"""Checks the store's guarantees when its process is killed and when its device returns wrong data.

    python -m benchmarks.store.crash [--trials N] [--injections M] [--seed S] [--json FILE]

Crash trials: a process writes to a store on a real file system and reports each acknowledgement through a pipe. It is
killed with SIGKILL, at a random time or within a chosen read, write or sync. Often the next process is killed during
its start. Then the store is opened. It must hold everything that was acknowledged and not evicted, byte for byte, and
nothing else. Some trials put through a target and a client, a part of them with durability `memory`. There,
acknowledged values may be lost, but served values must be right. A store lives through many trials.

Injections: a file layer tears, flips, misdirects and loses writes. It flips bits at rest and in reads, and fails opens,
reads, writes and syncs. Meanwhile a random workload runs on the store and on a model. The store is reopened after a
clean end, a crash, and a power cut that loses any part of the unsynced data. An acknowledged value must be there,
unless faults hit its own pages, or its segment's header and footer.

`lost` counts values that are missing without such a fault, `wrong` values served with other bytes, `raised` exceptions.
Any of them makes the exit code 1. Every failure names the life (of a store) or the round (of injections) that
reproduces it.
"""

import argparse
import contextlib
import enum
import errno
import fcntl
import logging
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol
from unittest import mock

import msgspec
from crc32c import crc32c

from kvstore.disk import record
from kvstore.disk.buffers import aligned
from kvstore.disk.files import Files
from kvstore.disk.log import Log, Value, _Segment
from kvstore.disk.record import PAGE_BYTES, Entry
from kvstore.disk.shelf import Shelf
from kvstore.net import transport
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.target import Target
from kvstore.net.wire import Outcome

MIB = 1 << 20
KIB = 1 << 10
TRIALS_A_LIFE = 25
INJECTIONS_A_ROUND = 100
RESERVED_BYTES = MIB  # of a device, before its first segment


class Result(msgspec.Struct):
    seed: int
    trials: int = 0
    acked: int = 0
    lost: int = 0
    wrong: int = 0
    raised: int = 0
    acked_in_memory: int = 0  # by targets with durability `memory`
    survived: int = 0  # of these
    kills: dict[str, int] = {}  # what the process was doing
    evicted: int = 0
    injections: int = 0
    faults: dict[str, int] = {}
    reopenings: int = 0
    rewritten: int = 0  # bytes, beside the injections
    excused: int = 0  # values that the injected faults destroyed
    checked: int = 0  # values compared byte by byte
    seconds: float = 0.0


class Tally:
    """The results so far. `where` says how to reproduce the current trial."""

    def __init__(self, seed: int):
        self.result = Result(seed)
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.where = ""

    @property
    def failed(self) -> bool:
        return bool(self.result.lost or self.result.wrong or self.result.raised)

    def fail(self, what: str, message: str) -> None:
        setattr(self.result, what, getattr(self.result, what) + 1)
        print(f"{what}: {message}; to repeat: --seed {self.result.seed} {self.where}", file=sys.stderr, flush=True)


# ---- values: a number says all of them


def number_of(serial: int, length: int) -> int:
    return serial << 24 | length


def length_of(number: int) -> int:
    return number & 0xFFFFFF


def content(number: int) -> bytes:
    return random.Random(number).randbytes(length_of(number))


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def number_in(key: bytes) -> int:
    return int.from_bytes(key, "big")


def value(number: int) -> Value:
    buffer = aligned(length_of(number))
    buffer.payload[:] = content(number)
    return Value(key_of(number), buffer, crc32c(buffer.payload), number, 7, 2)


def read(log: Log, numbers: Sequence[int]) -> list[bytes | None]:
    """The log's value for each number."""
    buffers = [aligned(length_of(number)) for number in numbers]
    found = log.read([key_of(number) for number in numbers], buffers)
    pairs = zip(found, buffers, strict=True)
    return [bytes(buffer.payload) if one is not None and one.intact else None for one, buffer in pairs]


def random_length(chance: random.Random, most: int) -> int:
    """A random length of any order of magnitude, often near a page boundary."""
    length = int(most ** chance.uniform(0.3, 1))
    if chance.random() < 0.2:
        length = -(-length // PAGE_BYTES) * PAGE_BYTES + chance.choice((-1, 0, 1))
    return max(1, min(most, length))


# ---- the engine, watched


class Stage(enum.IntEnum):
    START = 0
    RUN = 1
    BEGINNING = 2
    SEALING = 3
    EMPTYING = 4
    REWRITING = 5


class Judge(Protocol):
    """Is notified of a log's drops and stages. Called with the log's lock held."""

    def evicted(self, entry: Entry, due: bool) -> None: ...
    def forgot(self, slot: int, entry: Entry) -> None: ...
    def at(self, stage: Stage) -> None: ...


class Watched(Log):
    """A log that notifies `judge`."""

    def __init__(self, *arguments: Any, judge: Judge, **options: Any):
        self.judge = judge
        self._stage = Stage.START
        self._due = True  # whether there was need of the segment that is being emptied, when it was chosen
        super().__init__(*arguments, **options)
        self._enter(Stage.RUN)

    def segment_of(self, key: bytes) -> tuple[_Segment, Entry]:
        """The segment and entry of a visible chunk."""
        entry = self.find(key)
        assert entry is not None
        return self._segments[self._index[key] >> 24], entry

    def still_has(self, segment: _Segment) -> bool:
        """Whether a segment was not emptied."""
        return self._segments.get(segment.slot) is segment and segment.slot not in self._emptied

    def crash(self) -> None:
        """Close the files as if the process had been killed."""
        self._closed.set()
        self._close_files()

    def _enter(self, stage: Stage) -> None:
        self._stage = stage
        self.judge.at(stage)

    @contextlib.contextmanager
    def _in(self, stage: Stage) -> Iterator[None]:
        before = self._stage
        if before is not Stage.START:
            self._enter(stage)
        yield
        self._enter(before)

    def _open_slot(self, *arguments: Any) -> _Segment:
        with self._in(Stage.BEGINNING):
            return super()._open_slot(*arguments)

    def _seal(self, segment: _Segment) -> None:
        with self._in(Stage.SEALING):
            super()._seal(segment)

    def _choose(self) -> tuple[_Segment, list[int]] | None:
        self._due = sum(map(self._is_unread, self._emptied)) < self._ahead
        return super()._choose()

    def _clear(self, *arguments: Any) -> None:
        with self._in(Stage.EMPTYING):
            super()._clear(*arguments)

    def _rewrite(self, segment: _Segment, entries: list[Entry]) -> None:
        with self._in(Stage.REWRITING):
            super()._rewrite(segment, entries)

    def _empty(self, segment: _Segment) -> None:
        for _, entry in self._live(segment):
            self.judge.evicted(entry, self._due)
        super()._empty(segment)

    def _is_unread(self, slot: int) -> bool:
        segment = self._segments.get(slot)
        return segment is None or segment.readers == segment.writers == 0

    def _forget(self, segment: _Segment, entry: Entry) -> None:
        before = self.stats.corrupt_entries
        super()._forget(segment, entry)
        if self.stats.corrupt_entries > before:
            self.judge.forgot(segment.slot, entry)


Engine = Callable[..., Watched]


@dataclass
class Geometry:
    """A store's place and sizes."""

    path: Path
    slots: int
    segment_bytes: int
    length_max: int  # of values
    is_device: bool

    @property
    def capacity_bytes(self) -> int:
        return self.slots * self.segment_bytes + (RESERVED_BYTES if self.is_device else 0)

    @classmethod
    def drawn(cls, folder: Path, chance: random.Random) -> "Geometry":
        """A random geometry: a directory, or a file as a device; with few slots, with enough for rewrites, or with
        many."""
        segment_bytes = chance.choice((256 * KIB, MIB))
        slots = chance.choice((3, 12, 40 if segment_bytes < MIB else 16))
        length_max = chance.choice((PAGE_BYTES, 20_000, segment_bytes // 4, segment_bytes - 4 * PAGE_BYTES))
        store = cls(folder / "store", slots, segment_bytes, length_max, chance.random() < 0.5)
        if store.is_device:
            with store.path.open("wb") as file:
                file.truncate(store.capacity_bytes)
        else:
            store.path.mkdir()
        return store

    def open(self, engine: Engine, judge: Judge, files: Files, sync_seconds: float = 0.0) -> Watched:
        return engine(
            self.path,
            self.capacity_bytes,
            segment_bytes=self.segment_bytes,
            sync_seconds=sync_seconds,
            files=files,
            judge=judge,
        )


# ---- crash trials

_EVENT = struct.Struct("<cQ")
_PIPE_BYTES = 1 << 20  # more than a writer ever reports, so that it never blocks
# The kinds of reports; each is followed by a value's number.
STORED, ACKED, SHOWN, EVICTED, WRONG, DROPPED = b"S", b"A", b"M", b"E", b"W", b"D"
_VALUES_MAX = 500  # a writer that nobody killed by then kills itself


class Reporter:
    """Runs in the process that will be killed: reports all events to its parent, in order. It is the log's judge and
    observer. Opening a `settled` store evicts nothing, since the last start has made room."""

    def __init__(self, pipe: int, stage: mmap.mmap, settled: bool):
        self._pipe = pipe
        self._stage = stage
        self._settled = settled

    def tell(self, event: bytes, number: int) -> None:
        os.write(self._pipe, _EVENT.pack(event, number))

    def evicted(self, entry: Entry, due: bool) -> None:
        due = due and not (self._settled and self._stage[0] == Stage.START)
        self.tell(EVICTED if due else DROPPED, number_in(entry.key))

    def forgot(self, slot: int, entry: Entry) -> None:
        self.tell(DROPPED, number_in(entry.key))

    def at(self, stage: Stage) -> None:
        self._stage[0] = stage

    def stored(self, entry: Entry) -> None:
        if entry.page:  # otherwise it is dirty, and may be lost
            self.tell(STORED, number_in(entry.key))

    def removed(self, entry: Entry) -> None:
        pass


class DoomedFiles(Files):
    """Kills its process within a read, write or sync. The first part of a write is done."""

    def __init__(self, *, direct: bool, chance: random.Random, stage: mmap.mmap):
        super().__init__(direct=direct)
        self._chance = chance
        self._stage = stage
        self._only: Stage | None = None
        self._left = 0
        self._lock = threading.Lock()

    def arm(self, operations: int, only: Stage | None = None) -> None:
        """Kill at the last of so many operations. With `only`, operations of that stage count."""
        self._left = operations
        self._only = only

    def open(self, path: Path, size_bytes: int) -> int:
        if self._is_last():
            die()
        return super().open(path, size_bytes)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        if self._is_last():
            die()
        super().read(fd, into, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        if self._is_last():
            for buffer in buffers:
                part = self._chance.randrange(len(buffer) // PAGE_BYTES + 1) * PAGE_BYTES
                super().write(fd, [buffer[:part]] if part else [], offset)
                offset += len(buffer)
                if part < len(buffer):
                    break
            die()
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        if self._is_last():
            die()
        super().sync(fd)

    def _is_last(self) -> bool:
        if self._only is not None and self._stage[0] != self._only:
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@dataclass
class Kill:
    """The time of death: by the clock, or at a file operation, counted from the start or from the opened store."""

    seconds: float = 0.0
    start_operations: int = 0
    run_operations: int = 0
    stage: Stage | None = None  # of which alone these are

    @classmethod
    def drawn(cls, chance: random.Random) -> "Kill":
        how = chance.random()
        if how < 0.3:
            return cls(seconds=chance.uniform(0.003, 0.04))
        if how < 0.6:
            stages = (Stage.BEGINNING, Stage.SEALING, Stage.EMPTYING, Stage.REWRITING, Stage.REWRITING)
            return cls(run_operations=chance.choice((1, 1, 2, 3)), stage=chance.choice(stages))
        return cls(run_operations=int(10 ** chance.uniform(0, 2)))

    @classmethod
    def drawn_at_start(cls, chance: random.Random) -> "Kill":
        if chance.random() < 0.2:
            return cls(seconds=chance.uniform(0.001, 0.01))
        return cls(start_operations=chance.randint(1, 40), run_operations=1)


class Through(enum.Enum):
    """The path of a writer's puts: the log, or a target with a durability."""

    LOG = ""
    WRITTEN = "target, "
    MEMORY = "target with durability memory, "

    def __bool__(self) -> bool:
        return self is not Through.LOG


class Writer:
    """Runs in the process that will be killed: puts values, and reads some, until then."""

    def __init__(self, life: "Life", log: Watched, report: Reporter, trial: int, through: Through):
        self._life = life
        self._through = through
        self._log = log
        self._report = report
        self._trial = trial
        self._known = sorted(life.must)[-200:]

    def run(self, threads: int) -> None:
        work = self._client_loop if self._through else self._log_loop
        if self._through:
            self._serve()
        for thread in range(1, threads):
            threading.Thread(target=work, args=(thread,), daemon=True).start()
        work(0)

    def _numbers(self, thread: int) -> Iterator[list[int]]:
        """Batches to put: values that are new, a few that are not."""
        chance = random.Random(f"{self._life.seed}/{self._trial}/{thread}")
        made = 0
        while made < _VALUES_MAX:
            batch = []
            for _ in range(chance.choice((1, 1, 2, 5))):
                serial = self._trial << 16 | thread << 12 | made
                made += 1
                new = number_of(serial, random_length(chance, self._life.store.length_max))
                batch.append(chance.choice(self._known) if self._known and chance.random() < 0.1 else new)
            yield list(dict.fromkeys(batch))

    def _log_loop(self, thread: int) -> None:
        for batch in self._numbers(thread):
            for number, stored in zip(batch, self._log.append([value(one) for one in batch]), strict=True):
                self._note(number, stored)
            numbers = self._hot()
            for number, got in zip(numbers, read(self._log, numbers), strict=True):
                if got is not None and got != content(number):
                    self._report.tell(WRONG, number)
        die()

    def _client_loop(self, thread: int) -> None:
        for batch in self._numbers(thread):
            deadline = time.monotonic() + 10
            items = [Item(key_of(number), memoryview(content(number)), number, 7, 2) for number in batch]
            for number, outcome in zip(batch, self._client.put(items, deadline), strict=True):
                self._note(number, outcome is Outcome.STORED)
            numbers = self._hot()
            into = [memoryview(bytearray(length_of(number))) for number in numbers]
            outcomes = self._client.get([key_of(number) for number in numbers], into, deadline)
            for number, got, outcome in zip(numbers, into, outcomes, strict=True):
                if outcome is Outcome.HIT and got != content(number):
                    self._report.tell(WRONG, number)
        die()

    def _note(self, number: int, stored: bool) -> None:
        if stored:
            self._report.tell(SHOWN if self._through is Through.MEMORY else ACKED, number)
            self._known.append(number)

    def _hot(self) -> list[int]:
        """A few values that are read repeatedly."""
        return [number for number in self._known if number >> 24 & 7 == 0][-3:]

    def _serve(self) -> None:
        listener = transport.listen("127.0.0.1:0")
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        hot_bytes, dirty_bytes = (4 * MIB, 2 * MIB) if self._through is Through.MEMORY else (0, 0)
        target = Target(
            Shelf([self._log]),
            name=address,
            epoch=self._log.epoch,
            buffer_bytes=3 * MIB,
            hot_bytes=hot_bytes,
            dirty_bytes=dirty_bytes,
        )
        target.serve(listener)
        self._client = StoreClient(StaticMembership([address]))


class Verdict:
    """Runs in the process that checks after a crash: the values that opening the store dropped."""

    def __init__(self) -> None:
        self.dropped: set[int] = set()
        self.undue: set[int] = set()

    def evicted(self, entry: Entry, due: bool) -> None:
        (self.dropped if due else self.undue).add(number_in(entry.key))

    def forgot(self, slot: int, entry: Entry) -> None:
        self.undue.add(number_in(entry.key))

    def at(self, stage: Stage) -> None:
        pass


class Life:
    """A store that is crashed many times, and the values that it must hold."""

    def __init__(self, folder: Path, seed: str, engine: Engine, tally: Tally):
        self.seed = seed
        self.must: set[int] = set()
        self._shown: set[int] = set()  # acknowledged in memory
        self._chance = random.Random(seed)
        self._engine = engine
        self._tally = tally
        self._direct = self._chance.random() < 0.6
        self._sync_seconds = self._chance.choice((0.0, 0.0, 0.005))
        self._epoch = 0
        self._settled = False
        self._stage = mmap.mmap(-1, PAGE_BYTES)
        self.store = Geometry.drawn(folder, self._chance)

    def trial(self, number: int) -> None:
        chance = self._chance
        if chance.random() < 0.95:
            through = chance.choice((Through.WRITTEN, Through.MEMORY)) if chance.random() < 0.3 else Through.LOG
            self._crash(number, Kill.drawn(chance), chance.choice((1, 1, 2, 3)), through)
        while chance.random() < 0.3:
            self._crash(number, Kill.drawn_at_start(chance), 1, Through.LOG)
        self._look(chance.random() < 0.3)
        self._tally.result.trials += 1

    def _crash(self, trial: int, kill: Kill, threads: int, through: Through) -> None:
        """Fork a writer, wait for its death, and process its reports."""
        self._stage[0] = Stage.START
        pipe, its_pipe = os.pipe()
        fcntl.fcntl(its_pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                report = Reporter(its_pipe, self._stage, self._settled)
                self._write(report, trial, kill, threads, through)
            os._exit(1)
        os.close(its_pipe)
        if kill.seconds:
            time.sleep(kill.seconds)
            os.kill(child, signal.SIGKILL)
        with open(pipe, "rb") as events:
            told = events.read()
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            self._tally.fail("raised", f"the writer of trial {trial} ended by itself")
        self._tally.kills[through.value + Stage(self._stage[0]).name.lower()] += 1
        self._settled = False
        self._take_in(told)

    def _write(self, report: Reporter, trial: int, kill: Kill, threads: int, through: Through) -> None:
        """Run the writer in the child process."""
        try:
            files = DoomedFiles(direct=self._direct, chance=random.Random(trial), stage=self._stage)
            files.arm(kill.start_operations)
            log = self.store.open(self._engine, report, files, self._sync_seconds)
            log.observer = report
            files.arm(kill.run_operations, kill.stage)
            Writer(self, log, report, trial, through).run(threads)
        except BaseException:
            traceback.print_exc()
            raise

    def _take_in(self, told: bytes) -> None:
        """Update `must`: the values that were acknowledged and, by their last report, not evicted."""
        gone: set[int] = set()
        for event, number in _EVENT.iter_unpack(told):
            if event == STORED:
                gone.discard(number)
            elif event == EVICTED:
                gone.add(number)
                self._tally.result.evicted += 1
            elif event == ACKED:
                self.must.add(number)
                self._tally.result.acked += 1
            elif event == SHOWN:
                self._shown.add(number)
                self._tally.result.acked_in_memory += 1
            elif event == WRONG:
                self._tally.fail("wrong", f"{number:x} was served with other bytes")
            else:
                self._tally.fail("lost", f"{number:x} was dropped without need")
        self.must -= gone

    def _look(self, close: bool) -> None:
        """Open the store and compare."""
        verdict = Verdict()
        log = self.store.open(self._engine, verdict, Files(direct=self._direct))
        if log.epoch <= self._epoch:
            self._tally.fail("lost", f"epoch {log.epoch} comes after {self._epoch}")
        self._epoch = log.epoch
        there = self._intact(log)
        for number in (self.must - there - verdict.dropped) | verdict.undue:
            self._tally.fail("lost", f"{number:x} of {length_of(number)} bytes was acknowledged")
        self._tally.result.survived += len(self._shown & there)
        self._shown.clear()
        self.must = there
        self._settled = True
        log.close() if close else log.crash()

    def _intact(self, log: Watched) -> set[int]:
        """Read and compare all values that the log lists."""
        there = set()
        for entry in log.entries():
            number = number_in(entry.key)
            (got,) = read(log, [number])
            self._tally.result.checked += 1
            if got is not None and got != content(number):
                self._tally.fail("wrong", f"{number:x} was served with other bytes")
            elif got is None:
                self._tally.fail("lost", f"{number:x} is listed and not to be read")
            else:
                there.add(number)
        return there


def rewriting_much() -> Any:
    """A context in which eviction rewrites reused values of any size, with large headers."""
    return mock.patch("kvstore.disk.log.WRITE_AMPLIFICATION_MAX", 50.0)


def crash_trials(
    trials: int, tally: Tally, folder: Path, *, engine: Engine = Watched, lives: Sequence[int] | None = None
) -> None:
    for life in lives or range(-(-trials // TRIALS_A_LIFE)):
        tally.where = f"--life {life}"
        store = folder / f"life-{life}"
        store.mkdir()
        one = Life(store, f"{tally.result.seed}/{life}", engine, tally)
        with rewriting_much():
            for number in range(life * TRIALS_A_LIFE, min(trials, (life + 1) * TRIALS_A_LIFE)):
                one.trial(number)
        shutil.rmtree(store)
        tally.result.kills = dict(tally.kills)


# ---- injections

Page = tuple[str, int]  # name of the file, number in it
_DEVICE_FIRST_PAGE = RESERVED_BYTES // PAGE_BYTES


class FaultyFiles(Files):
    """A file layer with seeded faults. It tracks the pages that it damaged."""

    def __init__(self, seed: str, store: Geometry):
        super().__init__(direct=False)
        self.rate = 0.0
        self.step = 0  # of the workload
        self.faults: Counter[str] = Counter()
        self.lied: set[Page] = set()  # hold other data than was written last
        self.failed: set[Page] = set()  # their last write was refused
        self.cut: set[Page] = set()  # lost their last write with the power
        self._flipped: set[Page] = set()  # misread in the current operation
        self._refused: set[Page] = set()  # failed to be read in it
        self.generations: dict[Page, int] = {}  # of the last segment header
        self._unsynced: dict[Page, bytes] = {}  # content at the last sync
        self._seed = seed
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._store = store
        self._names: dict[int, str] = {}
        self._fds: dict[str, int] = {}
        self._superblocks: set[Page] = set()  # written once, at least
        self._starting = False

    @property
    def harmed(self) -> set[Page]:
        return self.lied | self.cut

    @property
    def misread(self) -> set[Page]:
        return self._flipped | self._refused

    def next_step(self) -> None:
        """Another operation begins."""
        self.step += 1
        self._flipped.clear()
        self._refused.clear()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        before, self.rate = self.rate, 0.0
        yield
        self.rate = before

    def open(self, path: Path, size_bytes: int) -> int:
        if not path.exists() and self._draw(self._chance_at(path.name, -1, 0), "open: enospc"):
            raise OSError(errno.ENOSPC, "injected")
        fd = super().open(path, size_bytes)
        self._names[fd] = path.name
        self._fds[path.name] = fd
        return fd

    def close(self, fd: int) -> None:
        del self._fds[self._names.pop(fd)]
        super().close(fd)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        whole = b"".join(buffers)
        name, first = self._names[fd], offset // PAGE_BYTES
        pages = self._pages(name, first, len(whole))
        self._remember(fd, pages)
        header = record.unpack_segment_header(whole)
        if header is not None:
            self.generations[pages[0]] = header.stamp.generation
        match self._draw_write(name, first):
            case "write: eio" | "write: enospc" as fault:
                self._fail(fd, whole, offset, fault)
            case "write: torn":
                keep = self._chance.randrange(len(whole))
                self._put(fd, whole[:keep], offset)
                self._harm(pages[keep // PAGE_BYTES :], pages)
            case "write: flipped":
                place = self._chance.randrange(len(whole))
                self._put(fd, whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :], offset)
                self._harm(pages[place // PAGE_BYTES :][:1], pages)
            case "write: lost":
                self._harm(pages, pages)
            case "write: misdirected":
                self._misdirect(fd, whole, offset)
                self._harm(pages, pages)
            case _:
                self._put(fd, whole, offset)
                self._harm([], pages)

    def read(self, fd: int, into: Sequence[memoryview], offset: int) -> None:
        name, first = self._names[fd], offset // PAGE_BYTES
        size = sum(map(len, into))
        chance = self._chance_at(name, first, size)
        fault = self._draw_read(chance, name, first)
        if fault == "read: eio":
            self._refused.update(self._pages(name, first, size))
            raise OSError(errno.EIO, "injected")
        super().read(fd, into, offset)
        self._refused.difference_update(self._pages(name, first, size))
        if fault == "read: flipped":
            place = chance.randrange(size)
            self._flipped.add((name, first + place // PAGE_BYTES))
            for part in into:
                if place < len(part):
                    part[place] ^= 0x04
                    break
                place -= len(part)

    def sync(self, fd: int) -> None:
        if not self._starting and self._draw(self._chance, "sync: eio"):
            raise OSError(errno.EIO, "injected")
        name = self._names[fd]
        self._unsynced = {page: old for page, old in self._unsynced.items() if page[0] != name}

    def rot(self) -> None:
        """Flip a bit at rest."""
        if not self._fds:
            return
        name = self._chance.choice(sorted(self._fds))
        fd = self._fds[name]
        lowest = RESERVED_BYTES if self._store.is_device else 0
        place = self._chance.randrange(lowest, os.fstat(fd).st_size)
        page = (name, place // PAGE_BYTES)
        os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 1 << self._chance.randrange(8)]), place)
        self.lied.add(page)
        self._unsynced.pop(page, None)
        self.faults["at rest: flipped"] += 1

    def cut_power(self) -> set[Page]:
        """Undo a random part of the unsynced writes. Returns all unsynced pages."""
        unsynced = set(self._unsynced)
        for page, old in self._unsynced.items():
            if self._chance.random() < 0.5:
                path = self._store.path if self._store.is_device else self._store.path / page[0]
                with path.open("r+b") as file:
                    file.seek(page[1] * PAGE_BYTES)
                    file.write(old)
                self.cut.add(page)
        self._unsynced.clear()
        self.faults["power cut"] += 1
        return unsynced

    def _pages(self, name: str, first: int, size: int) -> list[Page]:
        return [(name, first + number) for number in range(record.pages(size))]

    def _remember(self, fd: int, pages: Sequence[Page]) -> None:
        """Remember the pages' content at the last sync."""
        for page in pages:
            if page not in self._unsynced:
                self._unsynced[page] = os.pread(fd, PAGE_BYTES, page[1] * PAGE_BYTES)

    def _harm(self, lied: Sequence[Page], written: Sequence[Page]) -> None:
        """Note that the pages `written` are correct, except those in `lied`."""
        for pages in (self.lied, self.failed, self.cut):
            pages.difference_update(written)
        self.lied.update(lied)

    def _put(self, fd: int, content: bytes, offset: int) -> None:
        os.pwrite(fd, content, offset)

    def _fail(self, fd: int, whole: bytes, offset: int, fault: str) -> NoReturn:
        """Fail openly, with any part written, perhaps all."""
        done = self._chance.choice((0, self._chance.randrange(len(whole)), len(whole)))
        self._put(fd, whole[:done], offset)
        self.failed.update(self._pages(self._names[fd], offset // PAGE_BYTES, len(whole)))
        raise OSError(errno.EIO if fault.endswith("eio") else errno.ENOSPC, "injected")

    def _misdirect(self, fd: int, whole: bytes, offset: int) -> None:
        """Write a few pages off, or at the same place of another segment."""
        name = self._names[fd]
        if self._chance.random() < 0.5:
            offset += PAGE_BYTES * self._chance.choice((-8, -2, -1, 1, 2, 8))
        elif self._store.is_device:
            offset += self._store.segment_bytes * self._chance.choice((-2, -1, 1, 2))
        else:
            name = self._chance.choice(sorted(self._fds))
            fd = self._fds[name]
        lowest = RESERVED_BYTES if self._store.is_device else 0
        if lowest <= offset and offset + len(whole) <= os.fstat(fd).st_size:
            pages = self._pages(name, offset // PAGE_BYTES, len(whole))
            self._remember(fd, pages)
            self._put(fd, whole, offset)
            self.lied.update(pages)

    def _chance_at(self, name: str, page: int, size: int) -> random.Random:
        """A random source that does not depend on the order of recovery's threads."""
        return random.Random(f"{self._seed}/{self.step}/{name}/{page}/{size}")

    def _draw(self, chance: random.Random, *faults: str) -> str:
        if chance.random() >= self.rate:
            return ""
        fault = chance.choice(faults)
        with self._lock:
            self.faults[fault] += 1
        return fault

    def _draw_write(self, name: str, page: int) -> str:
        lies = ("write: lost", "write: flipped", "write: torn")
        self._starting = self._is_superblock(page)
        if self._starting:  # one of the two stays intact
            self._superblocks.add((name, page))
            may_lie = (name, 1 - page) in self._superblocks - self.lied
            return self._draw(self._chance, *lies) if may_lie else ""
        return self._draw(self._chance, "write: eio", "write: enospc", "write: misdirected", *lies)

    def _draw_read(self, chance: random.Random, name: str, page: int) -> str:
        if self._is_superblock(page) and not self._superblocks.isdisjoint(self.lied | self.misread):
            return ""
        return self._draw(chance, "read: eio", "read: flipped")

    def _is_superblock(self, page: int) -> bool:
        return self._store.is_device and page < _DEVICE_FIRST_PAGE


class Round:
    """A workload on a store with a faulty device, and a model of what the store must hold. It is the log's judge."""

    def __init__(self, folder: Path, seed: str, engine: Engine, tally: Tally):
        self._chance = random.Random(seed)
        self._engine = engine
        self._tally = tally
        self._store = Geometry.drawn(folder, self._chance)
        self._files = FaultyFiles(seed, self._store)
        self._must: set[int] = set()  # what must be there
        self._misread: dict[int, tuple[_Segment, Entry]] = {}  # must be there again after a restart
        self._recent: deque[int] = deque(maxlen=500)
        self._gone: set[int] = set()  # in the operation under way
        self._serial = 0
        self._log = self._store.open(engine, self, self._files)
        self._log.observer = self

    def run(self, injections: int) -> int:
        """Run until so many faults were injected. Returns their number."""
        self._files.rate = self._chance.choice((0.03, 0.1, 0.3))
        while self._files.faults.total() < injections:
            self._files.next_step()
            step = self._chance.choices((self._append, self._read, self._rot, self._reopen), (50, 40, 2, 1))[0]
            step()
        self._files.rate = 0.0
        self._reopen()
        self._log.close()
        self._tally.faults += self._files.faults
        return self._files.faults.total()

    # ---- the judge, and the observer

    def at(self, stage: Stage) -> None:
        pass

    def stored(self, entry: Entry) -> None:
        self._gone.discard(number_in(entry.key))

    def removed(self, entry: Entry) -> None:
        self._gone.add(number_in(entry.key))

    def evicted(self, entry: Entry, due: bool) -> None:
        number = number_in(entry.key)
        if number in self._must:
            self._must.remove(number)
            self._tally.result.evicted += 1
            if not due:
                self._tally.fail("lost", f"{number:x} was evicted without need")

    def forgot(self, slot: int, entry: Entry) -> None:
        number = number_in(entry.key)
        if number not in self._must:
            return
        segment, own = self._log._segments[slot], self._own_pages(slot, entry)
        harmed = not own.isdisjoint(self._files.harmed) or self._is_stale(segment)
        if not harmed and not own.isdisjoint(self._files.misread):
            self._misread[number] = segment, entry
        self._drop(number, harmed or number in self._misread, "was found corrupt")

    # ---- the workload

    def _append(self) -> None:
        batch = []
        for _ in range(self._chance.choice((1, 1, 1, 2, 6))):
            if self._recent and self._chance.random() < 0.2:
                batch.append(self._chance.choice(self._recent))
            else:
                self._serial += 1
                batch.append(number_of(self._serial, random_length(self._chance, self._store.length_max)))
        batch = list(dict.fromkeys(batch))
        self._gone.clear()
        for number, stored in zip(batch, self._log.append([value(number) for number in batch]), strict=True):
            self._recent.append(number)
            if stored:
                self._tally.result.acked += 1
                self._must |= {number} - self._gone

    def _read(self) -> None:
        hot = sorted(number for number in self._must if number >> 24 & 7 == 0)
        numbers = hot if self._chance.random() < 0.9 else list(self._recent)
        self._compare(self._chance.sample(numbers, min(len(numbers), self._chance.choice((1, 2, 8)))))

    def _rot(self) -> None:
        if self._chance.random() < 2 * self._files.rate:
            self._files.rot()

    def _compare(self, numbers: Sequence[int]) -> set[int]:
        """Read and compare values. Returns the right ones."""
        must = self._must.intersection(numbers)
        right = set()
        for number, got in zip(numbers, read(self._log, numbers), strict=True):
            self._tally.result.checked += 1
            if got == content(number):
                right.add(number)
            elif got is not None:
                self._tally.fail("wrong", f"{number:x} was served with other bytes")
        for number in must & self._must - right:
            self._drop(number, False, "is not there")
        return right

    # ---- the end and a new start

    def _reopen(self) -> None:
        held = {number: self._log.segment_of(key_of(number)) for number in self._must if key_of(number) in self._log}
        for number in self._must - held.keys():
            self._drop(number, False, "is not in the index")
        held = {number: place for number, place in self._misread.items() if self._log.still_has(place[0])} | held
        self._must.update(held)
        self._tally.result.rewritten += self._log.stats.rewritten_bytes
        end = self._chance.choice((self._log.close, self._log.crash, self._log.crash))
        end()
        unsynced = self._files.cut_power() if end == self._log.crash and self._chance.random() < 0.5 else set()
        before = self._files.harmed | self._files.failed
        stale = {segment.slot for segment, _ in held.values() if self._is_stale(segment)}
        self._log = self._store.open(self._engine, self, self._files)
        self._tally.result.reopenings += 1
        for number, (segment, entry) in held.items():
            if number in self._must and key_of(number) not in self._log:
                excused = segment.slot in stale or self._excused(segment, entry, before | self._files.misread, unsynced)
                self._drop(number, excused, "was not recovered")
        # A slot with a misread header keeps its previous content until it is written again.
        self._files.lied |= {self._page(slot, 0) for slot in range(self._store.slots)} & self._files.misread
        self._files.next_step()
        self._misread.clear()
        self._log.observer = self
        with self._files.quiet():
            self._must &= self._compare([number_in(entry.key) for entry in self._log.entries()])
        assert len(self._log.entries()) == len(self._log) == self._log.stats.entries
        assert sum(entry.length for entry in self._log.entries()) == self._log.stats.payload_bytes

    def _excused(self, segment: _Segment, entry: Entry, harmed: set[Page], unsynced: set[Page]) -> bool:
        """Whether a value may be missing after a start: its own pages were damaged, or both header and footer."""
        if not self._own_pages(segment.slot, entry).isdisjoint(harmed | unsynced):
            return True
        pages = self._store.segment_bytes // PAGE_BYTES
        footer = self._pages(segment.slot, pages - record.footer_bytes(len(segment)) // PAGE_BYTES, pages)
        unsealed = not segment.sealed or not footer.isdisjoint(harmed)
        return unsealed and self._page(segment.slot, 0) in harmed

    def _is_stale(self, segment: _Segment) -> bool:
        """Whether a slot shows its previous content, because the header of its last use was lost or misread. That also
        hides values stored elsewhere since."""
        header = self._page(segment.slot, 0)
        return header in self._files.lied and self._files.generations[header] != segment.stamp.generation

    def _drop(self, number: int, excused: bool, message: str) -> None:
        self._must.discard(number)
        if excused:
            self._tally.result.excused += 1
        else:
            self._tally.fail("lost", f"{number:x} of {length_of(number)} bytes {message}")

    def _own_pages(self, slot: int, entry: Entry) -> set[Page]:
        return self._pages(slot, entry.page, entry.page + record.record_bytes(entry.length) // PAGE_BYTES)

    def _pages(self, slot: int, first: int, end: int) -> set[Page]:
        return {self._page(slot, number) for number in range(first, end)}

    def _page(self, slot: int, number: int) -> Page:
        if self._store.is_device:
            return self._store.path.name, (RESERVED_BYTES + slot * self._store.segment_bytes) // PAGE_BYTES + number
        return f"segment-{slot:06d}.kvt", number


def inject(
    injections: int, tally: Tally, folder: Path, *, engine: Engine = Watched, rounds: Sequence[int] | None = None
) -> None:
    for number in rounds or range(-(-injections // INJECTIONS_A_ROUND)):
        tally.where = f"--round {number}"
        store = folder / f"round-{number}"
        store.mkdir()
        try:
            with rewriting_much():
                Round(store, f"{tally.result.seed}/{number}", engine, tally).run(INJECTIONS_A_ROUND)
        except Exception:
            traceback.print_exc()
            tally.fail("raised", "the store")
        shutil.rmtree(store)
    tally.result.faults = dict(sorted(tally.faults.items()))
    tally.result.injections = tally.faults.total()


# ---- the command


def summary(result: Result) -> str:
    kills = ", ".join(f"{count} in {stage}" for stage, count in sorted(result.kills.items()))
    return (
        f"{result.trials} crash trials ({kills}) and {result.injections} injected faults: {result.acked} values "
        f"acknowledged, {result.checked} compared, {result.lost} lost, {result.wrong} wrong, {result.raised} raised"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store.crash", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=3000, help="processes that are killed while they write")
    parser.add_argument("--injections", type=int, default=10_000, help="faults of the device")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--life", type=int, help="repeat the crash trials of this store alone")
    parser.add_argument("--round", type=int, help="repeat this round of injections alone")
    parser.add_argument("--dir", type=Path, help="file system to work on; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the injected faults would fill the log
    tally = Tally(options.seed)
    begun = time.monotonic()
    alone = options.life is not None or options.round is not None
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if not alone or options.life is not None:
            lives = None if options.life is None else [options.life]
            crash_trials(options.trials, tally, Path(folder), lives=lives)
        if not alone or options.round is not None:
            rounds = None if options.round is None else [options.round]
            inject(options.injections, tally, Path(folder), rounds=rounds)
    tally.result.seconds = round(time.monotonic() - begun, 1)
    report = msgspec.json.format(msgspec.json.encode(tally.result), indent=2).decode()
    print(report)
    print(summary(tally.result))
    if options.json:
        options.json.write_text(report + "\n")
    return int(tally.failed)


if __name__ == "__main__":
    sys.exit(main())
