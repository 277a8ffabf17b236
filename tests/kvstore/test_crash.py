"""Kills and injected faults, in short; and engines that are broken on purpose, which the same harness has to catch."""

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.store.crash import Result, Stage, Tally, Watched, inject
from kvstore.disk.buffers import Buffer
from kvstore.disk.log import Found, _page_aligned
from kvstore.disk.record import Entry
from tests.conftest import MIB, append, key

# In a process of its own: it forks, and this one has threads.
CRASH = """
import sys
from pathlib import Path
import msgspec
from benchmarks.store.crash import Tally, crash_trials
from tests.kvstore import test_crash
tally = Tally(int(sys.argv[1]))
crash_trials(int(sys.argv[2]), tally, Path(sys.argv[3]), engine=getattr(test_crash, sys.argv[4]))
sys.stdout.write(msgspec.json.encode(tally.result).decode())
"""


class Hasty(Watched):
    """Acknowledges a write, and does it with the next one."""

    def __init__(self, *arguments: Any, **options: Any):
        self._put_off: list[tuple[Any, list[bytes], int]] = []
        super().__init__(*arguments, **options)

    def _write(self, segment: Any, parts: Sequence[memoryview], offset: int) -> bool:
        for before, its_parts, its_offset in self._put_off:
            super()._write(before, [_page_aligned(part) for part in its_parts], its_offset)
        self._put_off = [(segment, [bytes(part) for part in parts], offset)]
        return True


class Forgetful(Watched):
    """Recovers nothing but what was sealed."""

    def _load_slot(self, *arguments: Any) -> Any:
        segment = super()._load_slot(*arguments)
        if segment is not None and not segment.sealed:
            segment.table, segment.next_page = bytearray(), 1
        return segment


class Trusting(Watched):
    """Serves what the device gives it."""

    def _read_run(self, run: Any, buffers: Sequence[Buffer], found: list[Found | None]) -> None:
        super()._read_run(run, buffers, found)
        for number, _, entry in run:
            found[number] = Found(entry, True)


class Wasteful(Watched):
    """Empties a segment more than it needs to."""

    def _roll(self, *arguments: Any) -> bool:
        rolled = super()._roll(*arguments)
        self._make_room(self._ahead + 1)
        return rolled


class Careless(Watched):
    """Looks whether a segment has to be emptied, and chooses it later."""

    def _unread_slot(self, *, wait: bool) -> int | None:
        with self._changed:
            needed = wait and not any(map(self._is_unread, self._emptied))
        with self._changed:
            victim = self._choose() if needed else None
        if victim is not None:
            self._clear(*victim)
        return super()._unread_slot(wait=wait)


class Moment(threading.Condition):
    """A log's lock: when it has been let go of so often, a segment's reader is done."""

    def __init__(self, read: Any, left: int):
        super().__init__()
        self.left = left
        self._read = read

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        self.left -= 1
        if self.left == 0:
            self._read.readers = 0


class Undue:
    """A judge of early evictions alone."""

    count = 0

    def evicted(self, entry: Entry, due: bool) -> None:
        self.count += not due

    def forgot(self, slot: int, entry: Entry) -> None: ...
    def at(self, stage: Stage) -> None: ...


def crash(seed: int, folder: Path, engine: type[Watched], trials: int) -> Result:
    command = [sys.executable, "-c", CRASH, str(seed), str(trials), str(folder), engine.__name__]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True, timeout=120)
    print(done.stderr.decode())
    return msgspec.json.decode(done.stdout, type=Result)


def inject_faults(seed: int, folder: Path, engine: type[Watched], faults: int) -> Result:
    tally = Tally(seed)
    logging.disable(logging.CRITICAL)
    try:
        inject(faults, tally, folder, engine=engine)
    finally:
        logging.disable(logging.NOTSET)
    return tally.result


def test_a_killed_process_loses_nothing_acknowledged(tmp_path: Path, seed: int) -> None:
    result = crash(seed, tmp_path, Watched, 40)
    assert result.trials == 40
    assert sum(result.kills.values()) >= 40
    assert result.acked > 100
    assert result.acked_in_memory > result.survived > 0
    assert (result.lost, result.wrong, result.raised) == (0, 0, 0)


@pytest.mark.parametrize(("engine", "finds"), [(Watched, False), (Careless, True)])
def test_nothing_is_evicted_without_need_whenever_a_reader_ends(
    tmp_path: Path, engine: type[Watched], finds: bool
) -> None:
    """The slot that a roll wants is read, and the read ends at each moment of the roll."""
    undue, ended, moment = 0, True, 0
    while ended:
        moment += 1
        judge, folder = Undue(), tmp_path / str(moment)
        folder.mkdir()
        log = engine(folder, 4 * MIB, segment_bytes=MIB, judge=judge)
        append(log, 0)
        read, _ = log.segment_of(key(0))
        read.readers = 1
        number = 0
        while log.still_has(read):
            append(log, number := number + 1)
        log._changed = lock = Moment(read, moment)
        queue, head = next(iter(log._heads.items()))
        assert log._roll(queue, head)
        undue, ended = undue + judge.count, lock.left <= 0
        log.crash()
    assert moment > 3
    assert bool(undue) is finds


def test_a_lying_device_costs_no_more_than_it_lied_about(tmp_path: Path, seed: int) -> None:
    result = inject_faults(seed, tmp_path, Watched, 500)
    assert result.injections >= 500
    assert result.acked > 500
    assert (result.lost, result.wrong, result.raised) == (0, 0, 0)


@pytest.mark.parametrize("engine", [Hasty, Forgetful])
def test_an_engine_that_loses_values_in_a_crash_is_caught(tmp_path: Path, seed: int, engine: type[Watched]) -> None:
    assert crash(seed, tmp_path, engine, 25).lost


@pytest.mark.parametrize("engine", [Forgetful, Wasteful])
def test_an_engine_that_loses_values_to_faults_is_caught(tmp_path: Path, seed: int, engine: type[Watched]) -> None:
    assert inject_faults(seed, tmp_path, engine, 300).lost


def test_an_engine_that_serves_what_it_did_not_check_is_caught(tmp_path: Path, seed: int) -> None:
    assert inject_faults(seed, tmp_path, Trusting, 300).wrong
