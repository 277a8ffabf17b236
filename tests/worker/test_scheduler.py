"""vLLM's own scheduler over the tiers, stock and ours: what each stores, loads and tells. No model: what stands in for
it is benchmarks/chat/scheduler.py's."""

import random
import select
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_events import BlockRemoved
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_offload.base import get_offload_block_hash
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.chat.__main__ import Options as EngineOptions
from benchmarks.chat.__main__ import transfer_config
from benchmarks.chat.scheduler import Drive, Options
from components.worker import remote_tier
from components.worker.weights import RankDigest
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.bus.plan import FIELD, make_plan
from kvstore.errors import validated
from tests.conftest import SLOW, eventually

# An answer ends with a chunk, whose last token is sampled and never computed.
OPTIONS = Options(prompt_tokens=50, answer_tokens=22, running=4, requests=12, block_tokens=4, events=True)
SOON = 60.0
ROW = 2 * OPTIONS.block_tokens * 64 * 4
START = Callable[..., Drive]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def start(model: Path) -> Iterator[START]:
    running: list[Drive] = []

    def started(transfer: dict[str, object] | None, hbm_blocks: int = 0) -> Drive:
        running.append(Drive(OPTIONS, model, transfer, hbm_blocks=hbm_blocks))
        running[-1].until_ready()
        return running[-1]

    yield started
    for one in running:
        one.close()


def configured(model: Path, mode: str, folder: Path, store: str = "", *, rows: int = 512) -> dict[str, Any]:
    options = validated(EngineOptions, {"model": str(model), "dram": rows * ROW, "dir": folder})
    config: Any = transfer_config(options, mode, store, folder)
    config["kv_connector_extra_config"]["offload_prompt_only"] = False
    if mode == "store":  # a machine that is slow for other reasons is no reason to compute
        config["kv_connector_extra_config"]["secondary_tiers"][0] |= {"deadline_ms": 60_000, "lookup_ms": 60_000}
    return config


def test_an_engine_without_the_tier_is_told_so(model: Path, tmp_path: Path, start: START) -> None:
    config = configured(model, "store", tmp_path, "127.0.0.1:9")
    config["kv_connector_extra_config"]["secondary_tiers"] = []
    with pytest.raises(ValueError, match=r"^kvtier: 0 secondary_tiers of type 'kvtier' given, expected one$"):
        start(config)


def leave_unscheduled(drive: Drive) -> None:
    """A client that goes away while its request waits for a slot."""
    scheduler = drive._scheduler
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    scheduler.add_request(Request("left", [7] * 50, sampling, None, block_hasher=drive._hasher))
    scheduler.finish_requests("left", RequestStatus.FINISHED_ABORTED)
    drive.idle_step()


@pytest.mark.parametrize("mode", ["dram", "files", "store"])
def test_every_whole_chunk_that_was_computed_is_stored_and_no_other(
    model: Path, tmp_path: Path, start: START, mode: str
) -> None:
    """Stock offloading, too: what it forgets too early, stores too much of or never allocated was ours to guard."""
    drive = start(configured(model, mode, tmp_path, f"127.0.0.1:{free_port()}"))
    leave_unscheduled(drive)
    drive.play(1)
    leave_unscheduled(drive)
    scheduler = drive._scheduler.connector.connector_scheduler
    primary = getattr(scheduler.manager, "primary_tier", scheduler.manager)
    assert len(primary._policy.chunks) == 12 * ((50 + 22 - 1) // 4)
    assert not scheduler._req_status


@pytest.mark.parametrize("mode", ["dram", "store"])
def test_a_prompt_that_is_there_to_its_end_is_computed_in_the_first_step(
    model: Path, tmp_path: Path, start: START, mode: str
) -> None:
    """Stock offloading loads its last chunk, too, and waits two more steps for the load, also after a hit in HBM."""
    drive = start(configured(model, mode, tmp_path, f"127.0.0.1:{free_port()}"))
    scheduler, ours = drive._scheduler, mode == "store"

    def steps(name: str) -> int:
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        scheduler.add_request(Request(name, list(range(40)), sampling, None, block_hasher=drive._hasher))
        count = 0
        while scheduler.has_unfinished_requests():
            drive.idle_step()
            count += 1
        for _ in range(3):  # and what it stores is stored
            drive.idle_step()
        return count

    if ours:
        scheduler.connector._clock._copies.add(1e9, 1.0)
    steps("cold")  # which may wait for what the store says
    assert steps("in HBM") == (1 if ours else 3)
    assert scheduler.reset_prefix_cache()
    assert steps("in DRAM") == (1 if ours else 3)


def test_what_the_gpu_does_not_wait_for_is_waited_for(
    model: Path, tmp_path: Path, start: START, start_target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that the store has is computed in the step after that in which its fetch began."""
    target = start_target()
    start(configured(model, "store", tmp_path, target.address)).play(1)
    drive = start(configured(model, "store", tmp_path, target.address))
    connector, scheduler = drive._scheduler.connector, drive._scheduler
    tier = connector._tier
    connector._clock._copies.add(1e9, 1.0)
    chance = random.Random(1)
    prompts = [chance.choices(range(40, 120), k=OPTIONS.prompt_tokens) for _ in range(OPTIONS.requests)]
    monkeypatch.setattr(connector._clock, "spare_seconds", lambda copy_seconds=0.0: SOON)
    for number, prompt in enumerate(prompts):
        tier._store_bytes_per_second = 1e9
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        scheduler.add_request(Request(f"{number}", prompt, sampling, None, block_hasher=drive._hasher))
        drive.idle_step()
        assert tier._loads
        drive.idle_step()
        assert not tier._loads
        assert not scheduler.has_unfinished_requests()


def test_what_comes_for_a_client_that_left_meanwhile_is_taken_in(
    model: Path, tmp_path: Path, start: START, start_target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mover had it when it was called off, and the scheduler has forgotten the request when it hears of it."""
    target = start_target()
    start(configured(model, "store", tmp_path, target.address)).play(1)
    drive = start(configured(model, "store", tmp_path, target.address))
    index, scheduler = Index(drive), drive._scheduler
    tier = scheduler.connector._tier
    prompt = random.Random(1).choices(range(40, 120), k=OPTIONS.prompt_tokens)  # the first that was played
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    scheduler.add_request(Request("left", prompt, sampling, None, block_hasher=drive._hasher))
    eventually(lambda: (drive.idle_step(), tier._loads)[1], SOON)
    with monkeypatch.context() as deaf:
        deaf.setattr(tier.link, "receive", list)
        assert select.select([tier.link._socket], [], [], SOON)[0]
        scheduler.finish_requests("left", RequestStatus.FINISHED_ABORTED)
        drive.idle_step()
    assert not scheduler.connector.connector_scheduler._req_status
    eventually(lambda: (drive.idle_step(), not tier._loads)[1], SOON)
    drive.idle_step()
    assert index.fetched == len(scheduler.connector._manager.primary_tier._policy.chunks) == len(index.held["CPU"]) > 0


class Index:
    """What a router knows by the engine's events."""

    def __init__(self, drive: Drive):
        self.held: dict[str, set[object]] = {"CPU": set(), "GPU": set()}
        self.orphans = 0  # stored in HBM with a parent that is not known; Dynamo's index of DRAM needs no order
        self.fetched = 0
        tier = drive._scheduler.connector._tier
        on_load = tier.on_load

        def note(request: Any, key: Any, end: int) -> None:
            self.fetched += 1
            on_load(request, key, end)

        tier.on_load = note
        drive._scheduler.kv_event_publisher.publish = self._take

    def _take(self, batch: Any) -> None:
        for event in batch.events:
            held = self.held[event.medium]
            if isinstance(event, BlockRemoved):
                assert held.issuperset(event.block_hashes)
                held.difference_update(event.block_hashes)
                continue
            known = event.parent_block_hash is None or any(event.parent_block_hash in of for of in self.held.values())
            self.orphans += event.medium == "GPU" and not known
            assert event.block_size == OPTIONS.block_tokens
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            held.update(event.block_hashes)


@pytest.mark.parametrize(("rows", "piece"), [(512, 64), (512, 1), (60, 64)], ids=["room for all", "pieces", "evicts"])
def test_routers_know_what_dram_and_hbm_hold_also_after_a_fetch(
    model: Path,
    tmp_path: Path,
    start: START,
    start_target: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    piece: int,
) -> None:
    monkeypatch.setattr(remote_tier, "JOB_CHUNKS", piece)
    target = start_target()
    for fetches in (False, True):
        drive = start(configured(model, "store", tmp_path, target.address, rows=rows))
        index = Index(drive)
        drive.play(1)
        connector = drive._scheduler.connector
        in_dram = connector._manager.primary_tier._policy.chunks
        assert index.held["CPU"] == {maybe_convert_block_hash(get_offload_block_hash(key)) for key in in_dram}
        assert index.orphans == 0
        assert (index.fetched > 0) == fetches


class Ahead:
    """The scheduler one step ahead of the GPU, and what each block of HBM holds, by its hash."""

    def __init__(self, drive: Drive, seed: int):
        self.scheduler = drive._scheduler
        self.scheduler.defer_block_free = True  # as vLLM has it where steps overlap, which they do not on a CPU
        self.chance = random.Random(seed)
        self.hasher = drive._hasher
        self.holds: dict[int, object] = {}
        self.under_way: list[tuple[Any, Any]] = []
        self._writes: list[set[int]] = []  # to blocks, by step under way
        self.stored = self.in_step = self.between = self.preempted = self.aborted = 0
        self._between: dict[int, str] = {}  # loads that are reported a step later

    def arrive(self, name: str, prompts: list[list[int]]) -> None:
        prompt = self.chance.choice(prompts)[: self.chance.randint(8, 50)]
        # With a hole in its plan, a request stores its beginning, too.
        plan = msgspec.to_builtins(make_plan([None], fetch=0, deadline_ms=100, chunk_ms=0, decision_id=""))
        sampling = SamplingParams(
            max_tokens=self.chance.randint(1, 22),
            ignore_eos=True,
            extra_args={FIELD: plan} if self.chance.random() < 0.5 else None,
        )
        self.scheduler.add_request(Request(name, prompt, sampling, None, block_hasher=self.hasher))

    def leave(self) -> None:
        self.scheduler.finish_requests(
            self.chance.choice(list(self.scheduler.requests)), RequestStatus.FINISHED_ABORTED
        )
        self.aborted += 1

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        self.under_way.append((output, self._run(output)))
        if len(self.under_way) == 2 or not output.num_scheduled_tokens:
            self.scheduler.update_from_output(*self.under_way.pop(0))
            self._writes.pop(0)

    def _run(self, output: Any) -> ModelRunnerOutput:
        meta, done = output.kv_connector_metadata, OffloadingWorkerMetadata()
        received = set(self._between.values())
        rows = {
            chunk.chunk_id: key for key, chunk in self.scheduler.connector._manager.primary_tier._policy.chunks.items()
        }
        for job in [*self._between, *meta.in_step, *meta.store_jobs]:
            done.mark_completed(job)
        for job in meta.store_jobs.values():
            for row, block in zip(job.dst_spec.block_ids, job.src_spec.block_ids, strict=True):
                assert self.holds[int(block)] == get_offload_block_hash(rows[int(row)])
                self.stored += 1
        for job in meta.load_jobs.values():
            for row, block in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
                self.holds[int(block)] = get_offload_block_hash(rows[int(row)])
        for job in meta.load_jobs.values():
            into = job.dst_spec.block_ids.tolist()
            assert not any(written.intersection(into) for written in self._writes), "a step under way writes there, too"
        self._between = {job: one.req_id for job, one in meta.load_jobs.items() if job not in meta.in_step}
        self.in_step += len(meta.in_step)
        self.between += len(self._between)
        sampled, written = [], set()
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            after = request.num_computed_tokens
            written.update(blocks[(after - tokens) // OPTIONS.block_tokens : -(-after // OPTIONS.block_tokens)])
            for index, block_hash in enumerate(request.block_hashes[: after // OPTIONS.block_tokens]):
                if (index + 1) * OPTIONS.block_tokens <= after - tokens:
                    assert self.holds[blocks[index]] == block_hash, f"{name}: block {index} of {after} tokens"
                self.holds[blocks[index]] = block_hash
            sampled.append([7] if after >= request.num_tokens else [])
        self._writes.append(written)
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            names,
            {name: place for place, name in enumerate(names)},
            sampled,
            kv_connector_output=KVConnectorOutput(finished_recving=received, kv_connector_worker_meta=done),
        )


@pytest.mark.parametrize("seed", range(20 if SLOW else 2))
def test_whatever_a_step_goes_on_from_and_stores_is_in_hbm_when_it_runs(
    model: Path, tmp_path: Path, start: START, seed: int
) -> None:
    """Loads in their step and between steps, prompts that share beginnings, clients that leave, blocks that run out."""
    drive = start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}", rows=240), hbm_blocks=48)
    connector = drive._scheduler.connector
    ahead = Ahead(drive, seed)
    prompts = [[ahead.chance.randrange(200) for _ in range(50)] for _ in range(12)]
    prompts += [[*prompt[:30], *prompts[0][:20]] for prompt in prompts]
    connector._clock._copies.add(1e9, 1.0)
    for number in range(400):
        if number % 100 == 50:  # slower: no load is made in its step
            connector._clock._copies.add(1e3, 100.0)
        if number % 100 == 0:
            connector._clock._copies.add(1e9, 1.0)
        ahead.arrive(f"{number}", prompts)
        for _ in range(ahead.chance.randrange(8)):
            ahead.step()
        if ahead.chance.random() < 0.1 and ahead.scheduler.requests:
            ahead.leave()
    while ahead.scheduler.has_requests():
        ahead.step()
    assert ahead.stored > 100
    assert ahead.in_step > 10
    assert ahead.between > 10
    assert ahead.preempted > 5
    assert ahead.aborted > 20
    assert not connector.connector_scheduler._req_status
    assert not connector._loads._jobs


@pytest.mark.parametrize("steps", [0, 1])
def test_what_was_loaded_for_other_weights_is_computed(model: Path, tmp_path: Path, start: START, steps: int) -> None:
    """A request waits for a load between steps while the weights are replaced, so many steps after the load began."""
    drive = start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}"))
    scheduler = drive._scheduler
    computed: Counter[str] = Counter()

    def add(name: str, first: int) -> Request:
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        request = Request(name, list(range(first, first + 40)), sampling, None, block_hasher=drive._hasher)
        scheduler.add_request(request)
        return request

    def step() -> None:
        output = scheduler.schedule()
        computed.update(output.num_scheduled_tokens)
        scheduler.update_from_output(output, drive._answer(output))

    def until_done(*names: str) -> None:
        eventually(lambda: (step(), scheduler.requests.keys().isdisjoint(names))[1], SOON)

    add("cold", 0)
    until_done("cold")
    for _ in range(5):
        step()
    assert scheduler.reset_prefix_cache()
    add("hit", 0)
    until_done("hit")
    assert computed["hit"] < 40, "the control: with the same weights it is loaded"

    assert scheduler.reset_prefix_cache()
    waiting = add("waiting", 0)
    while waiting.status is not RequestStatus.WAITING_FOR_REMOTE_KVS:
        step()
    for _ in range(steps):  # after one more, ranks have said that the load is over
        output = scheduler.schedule()
        assert "waiting" not in output.num_scheduled_tokens
        scheduler.update_from_output(output, drive._answer(output))
    drive.executor.loaded = RankDigest(b"another model", (1,), 1, 0.0)
    drive.executor.collective_rpc("reload_weights")
    add("other", 100)
    until_done("waiting", "other")
    assert computed["waiting"] >= 40
    assert scheduler.kv_cache_manager.usage == 0
    assert drive.executor.asked == 4  # at the start, after two resets, after the call
