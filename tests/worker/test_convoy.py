"""Who waits for a load from DRAM that is another request's: with stock offloading whoever shares a chunk with it, with
ours who would not have its own sooner. And what is loaded once is copied once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import TransferJobStatus
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from benchmarks.chat.scheduler import Drive, Options
from components.worker.loads import Loads
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from tests.conftest import eventually
from tests.worker.stock import offload_key, offloading
from tests.worker.test_scheduler import configured

OPTIONS = Options(prompt_tokens=101, answer_tokens=4, running=6, requests=6, block_tokens=4)
LONG = list(range(1, 102))  # 25 whole chunks, and a token
FAST, SLOW = 1e12, 10.0  # bytes a second: all loads in one step, and none, on however slow a machine


class Engine:
    """vLLM's scheduler over a DRAM tier that has LONG, and none of it in HBM."""

    def __init__(self, drive: Drive, *, ours: bool):
        self.drive, self.scheduler = drive, drive._scheduler
        self.connector = self.scheduler.connector
        self.offloading = self.connector.connector_scheduler
        self._arrivals = 0
        if ours:
            self.set_speed(FAST)  # so that asking the store takes no time
        self._run(LONG)
        assert self.scheduler.reset_prefix_cache()
        self._run([1])  # after a reset, ranks are asked for the model: from here on it is known when a request arrives

    def _run(self, tokens: Sequence[int]) -> None:
        self.arrive(tokens)
        while self.scheduler.has_requests():
            self.step()

    def set_speed(self, bytes_per_second: float) -> None:
        clock: Any = self.connector._clock
        clock._copies = SimpleNamespace(bytes_per_second=bytes_per_second)

    def arrive(self, tokens: Sequence[int]) -> str:
        self._arrivals += 1
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        hasher = self.drive._hasher
        request = Request(f"r{self._arrivals}", list(tokens), sampling, None, block_hasher=hasher)
        self.scheduler.add_request(request)
        tier = getattr(self.connector, "_tier", None)
        if tier is not None:  # what is not there has answered, however slow the machine
            eventually(lambda: (tier._step(), not tier.undecided(request.request_id))[1])
        return request.request_id

    def step(self) -> tuple[dict[str, int], dict[str, int]]:
        """Who computes how many tokens in a step, and who loads how many chunks in or after it."""
        output = self.scheduler.schedule()
        meta = output.kv_connector_metadata
        self.scheduler.update_from_output(output, self.drive._answer(output))
        loads = {job.req_id: len(job.src_spec.block_ids) for job in meta.load_jobs.values()}
        assert len(loads) == len(meta.load_jobs)
        return dict(output.num_scheduled_tokens), loads

    def steps_until_done(self, limit: int = 30) -> list[tuple[dict[str, int], dict[str, int]]]:
        steps = []
        while self.scheduler.has_unfinished_requests():
            steps.append(self.step())
            assert len(steps) < limit
        return steps


START = Callable[[str], Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[START]:
    running: list[Drive] = []

    def started(mode: str) -> Engine:
        """ "dram" is stock offloading, "store" ours; its store is not there."""
        running.append(Drive(OPTIONS, model, configured(model, mode, tmp_path, f"127.0.0.1:{free_port()}")))
        running[-1].until_ready()
        return Engine(running[-1], ours=mode == "store")

    yield started
    for one in running:
        one.close()


def first(steps: list[tuple[dict[str, int], dict[str, int]]], name: str) -> int:
    """The first step in which the request computes."""
    return next(number for number, (computed, _) in enumerate(steps) if name in computed)


# ---- loads in their step


def test_requests_that_arrive_together_begin_together_on_one_copy(start: START) -> None:
    """Loaded in the step that computes the first one's rest, which is where the others find it."""
    engine = start("store")
    names = [engine.arrive([*LONG[:-1], 1000 + number]) for number in range(4)]
    computed, loads = engine.step()
    assert loads == {names[0]: 25}
    assert computed == dict.fromkeys(names, 1)
    assert not engine.offloading._chunks_being_loaded
    assert all(not any(loads.values()) for _, loads in engine.steps_until_done())


def test_requests_that_share_a_beginning_copy_what_is_theirs(start: START) -> None:
    """The second has less of it, and the third goes on from where the first two part with it."""
    engine = start("store")
    names = [engine.arrive(LONG[:41]), engine.arrive([*LONG[:20], *range(500, 510)]), engine.arrive(LONG)]
    computed, loads = engine.step()
    assert loads == {names[0]: 10, names[2]: 15}
    assert computed == {names[0]: 1, names[1]: 10, names[2]: 1}


def test_stock_offloading_has_them_wait_for_each_other(start: START) -> None:
    """The first for its load, and the others for the first one's, though they do not copy it again."""
    engine = start("dram")
    names = [engine.arrive([*LONG[:-1], 1000 + number]) for number in range(4)]
    computed, loads = engine.step()
    assert loads == {names[0]: 25}
    assert computed == {}
    assert engine.offloading._chunks_being_loaded
    steps = engine.steps_until_done()
    assert all(not any(loads.values()) for _, loads in steps)
    assert min(first(steps, name) for name in names) >= 1


# ---- loads between steps


def test_equal_requests_wait_for_one_copy_and_find_it_in_hbm(start: START) -> None:
    engine = start("store")
    engine.set_speed(SLOW)
    names = [engine.arrive([*LONG[:-1], 1000 + number]) for number in range(4)]
    computed, loads = engine.step()
    assert loads == {names[0]: 25}
    assert computed == {}
    steps = engine.steps_until_done()
    assert all(not any(loads.values()) for _, loads in steps)
    assert all(steps[first(steps, name)][0][name] == 1 for name in names)


def share_a_beginning(engine: Engine, *, later: int) -> tuple[str, str, list[tuple[dict[str, int], dict[str, int]]]]:
    """A long request, and so many steps later a short one that begins like it: their names, and what ran."""
    long = engine.arrive(LONG)
    steps = [engine.step() for _ in range(later)]
    short = engine.arrive([*LONG[:12], *range(500, 510)])
    return long, short, [*steps, *engine.steps_until_done()]


@pytest.mark.parametrize("later", [0, 1])
def test_a_short_request_does_not_wait_for_a_long_ones_load(start: START, later: int) -> None:
    """It copies the three chunks that it shares for itself: that is over sooner."""
    engine = start("store")
    engine.set_speed(SLOW)
    long, short, steps = share_a_beginning(engine, later=later)
    assert steps[0][1] == ({long: 25, short: 3} if later == 0 else {long: 25})
    assert steps[later][1][short] == 3
    assert first(steps, short) <= later + 2
    assert steps[first(steps, short)][0][short] == 10
    assert not engine.offloading._chunks_being_loaded


def test_of_several_short_requests_one_copies_beside_a_long_ones_load(start: START) -> None:
    """The others would not have it sooner by themselves."""
    engine = start("store")
    engine.set_speed(SLOW)
    long = engine.arrive(LONG)
    shorts = [engine.arrive([*LONG[:12], *range(500, 510 + number)]) for number in range(3)]
    assert engine.step() == ({}, {long: 25, shorts[0]: 3})
    steps = engine.steps_until_done()
    assert all(not any(loads.values()) for _, loads in steps)
    assert max(first(steps, name) for name in shorts) <= 2


@pytest.mark.parametrize("later", [0, 1])
def test_with_stock_offloading_it_waits(start: START, later: int) -> None:
    long, short, steps = share_a_beginning(engine := start("dram"), later=later)
    assert steps[0][1] == {long: 25}
    assert not any(short in loads for _, loads in steps)
    assert first(steps, short) >= first(steps, long)
    assert not engine.offloading._chunks_being_loaded


def test_before_it_is_known_how_fast_copies_are_a_load_is_waited_for_as_stock_does(start: START) -> None:
    engine = start("store")
    engine.set_speed(0.0)
    long, short, steps = share_a_beginning(engine, later=1)
    assert steps[0][1] == {long: 25}
    assert not any(short in loads for _, loads in steps)


# ---- who is let wait


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("components.worker.loads.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


KEYS = [offload_key(number) for number in range(12)]
BYTES_PER_SECOND = 1000.0  # a chunk a second


def under_way(chunks: Sequence[int], job_id: int = 1, loads: Loads | None = None) -> Loads:
    """Loads, of which one between steps of these chunks has begun; chunks are of 4 tokens and 1,000 bytes."""
    loads = loads or Loads(offloading(None), 1000)
    scheduler, keys = loads.scheduler, {KEYS[number] for number in chunks}
    name = f"loader {job_id}"
    status: Any = SimpleNamespace(transfer_jobs=set())
    scheduler._req_status[name] = status

    def stock(request: Any, blocks: Any, tokens: int) -> None:
        assert tokens == 4 * len(keys)
        status.transfer_jobs.add(job_id)
        scheduler._jobs[job_id] = TransferJobStatus(name, 1, set(keys), is_store=False)
        if scheduler._chunks_being_loaded is not None:
            scheduler._chunks_being_loaded.update(keys)

    request: Any = SimpleNamespace(request_id=name)
    loads.allocated(request, None, 4 * len(keys), BYTES_PER_SECOND, stock)
    return loads


def waits_for(loads: Loads, chunks: int, bytes_per_second: float = BYTES_PER_SECOND) -> set[Any]:
    """What stock offloading lets a request of so many chunks wait for."""
    with loads.waited_for(4 * chunks, bytes_per_second):
        return set(loads.scheduler._chunks_being_loaded)


def test_a_load_is_waited_for_that_is_over_before_ones_own_would_be(now: Any) -> None:
    loads = under_way(range(8))
    assert waits_for(loads, 7) == set()
    assert waits_for(loads, 8) == set(KEYS[:8])
    now.seconds = 5.0
    assert waits_for(loads, 2) == set()
    assert waits_for(loads, 3) == set(KEYS[:8])
    now.seconds = 60.0  # late: it may end at any time
    assert waits_for(loads, 1) == set(KEYS[:8])


def test_of_several_loads_each_is_waited_for_or_not(now: Any) -> None:
    loads = under_way(range(4, 6), 2, under_way(range(4)))
    assert waits_for(loads, 1) == set()
    assert waits_for(loads, 2) == set(KEYS[4:6])
    assert waits_for(loads, 3) == set(KEYS[4:6])
    assert waits_for(loads, 4) == set(KEYS[:6])


def test_what_a_longer_load_brings_too_is_waited_for_as_the_shorter_ones(now: Any) -> None:
    loads = under_way(range(2), 2, under_way(range(4)))
    assert waits_for(loads, 1) == set()
    assert waits_for(loads, 3) == set(KEYS[:2])


def test_without_a_speed_all_are_waited_for(now: Any) -> None:
    loads = under_way(range(8))
    now.seconds = 60.0
    assert waits_for(loads, 1, bytes_per_second=0.0) == set(KEYS[:8])


def test_a_load_that_was_reported_is_forgotten(now: Any) -> None:
    loads = under_way(range(8))
    loads.scheduler._jobs.clear()
    loads.scheduler._chunks_being_loaded.clear()
    assert waits_for(loads, 1) == set()
    assert not loads._between


def test_others_wait_as_before_once_a_request_was_looked_up(now: Any) -> None:
    loads = under_way(range(8))
    loading = loads.scheduler._chunks_being_loaded
    with pytest.raises(ZeroDivisionError), loads.waited_for(4, BYTES_PER_SECOND):
        raise ZeroDivisionError
    assert loads.scheduler._chunks_being_loaded is loading
    assert loading == set(KEYS[:8])


def test_without_prefix_caching_nobody_waits(now: Any) -> None:
    """There is nothing in HBM for others to find, and stock offloading keeps no account of what is loaded."""
    loads = Loads(offloading(None), 1000)
    loads.scheduler._chunks_being_loaded = None
    under_way(range(8), loads=loads)
    for chunks in (1, 8):
        with loads.waited_for(4 * chunks, BYTES_PER_SECOND):
            assert loads.scheduler._chunks_being_loaded is None
