"""vLLM's own scheduler over the tiers, stock and ours: what ends an engine there and not here. No model: what stands in
for it is benchmarks/scheduler.py's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_events import BlockRemoved
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_offload.base import get_offload_block_hash
from vllm.v1.request import RequestStatus

from benchmarks.multi_turn import Options as EngineOptions
from benchmarks.multi_turn import transfer_config
from benchmarks.scheduler import Drive, Options
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import validated

# An answer ends with a chunk, whose last token is sampled and never computed.
OPTIONS = Options(prompt_tokens=50, answer_tokens=22, running=4, requests=12, block_tokens=4, events=True)
ROW = 2 * OPTIONS.block_tokens * 64 * 4
START = Callable[[dict[str, object] | None], Drive]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def start(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[START]:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    running: list[Drive] = []

    def started(transfer: dict[str, object] | None) -> Drive:
        running.append(Drive(OPTIONS, model, transfer))
        running[-1].until_ready()
        return running[-1]

    yield started
    for one in running:
        one.close()


def configured(model: Path, mode: str, folder: Path, store: str = "", *, rows: int = 512) -> dict[str, Any]:
    options = validated(EngineOptions, {"model": str(model), "dram": rows * ROW, "dir": folder})
    config: Any = transfer_config(options, mode, store, folder)
    return {
        **config,
        "kv_connector_extra_config": {**config["kv_connector_extra_config"], "offload_prompt_only": False},
    }


def leave_unscheduled(drive: Drive) -> None:
    """A client that goes away while its request waits for a slot."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    scheduler = drive._scheduler
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    scheduler.add_request(Request("left", [7] * 50, sampling, None, block_hasher=drive._hasher))
    scheduler.finish_requests("left", RequestStatus.FINISHED_ABORTED)
    drive.idle_step()


def test_stock_tiers_end_with_a_finished_requests_last_chunks(model: Path, tmp_path: Path, start: START) -> None:
    with pytest.raises(KeyError):
        start(configured(model, "files", tmp_path)).play(1)


def test_stock_offloading_ends_with_a_request_that_left_before_it_was_scheduled(
    model: Path, tmp_path: Path, start: START
) -> None:
    with pytest.raises(AssertionError):
        leave_unscheduled(start(configured(model, "dram", tmp_path)))


def test_ours_lives_on_and_stores_every_whole_chunk_that_was_computed(
    model: Path, tmp_path: Path, start: START
) -> None:
    drive = start(configured(model, "store", tmp_path, f"127.0.0.1:{free_port()}"))
    leave_unscheduled(drive)
    drive.play(1)
    leave_unscheduled(drive)
    manager = drive._scheduler.connector._manager
    assert len(manager.primary_tier._policy.blocks) == 12 * ((50 + 22 - 1) // 4)
    assert not drive._scheduler.connector.connector_scheduler._req_status


class Index:
    """What a router knows by the engine's events."""

    def __init__(self, drive: Drive):
        self.held: dict[str, set[object]] = {"CPU": set(), "GPU": set()}
        self.orphans: dict[str, int] = {"CPU": 0, "GPU": 0}  # stored with a parent that is not known
        self.fetched = 0
        for tier in drive._scheduler.connector._tiers:
            on_load = tier.on_load

            def note(request: Any, key: Any, chunk: int, on_load: Any = on_load) -> None:
                self.fetched += 1
                on_load(request, key, chunk)

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
            self.orphans[event.medium] += not known
            assert event.block_size == OPTIONS.block_tokens
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            held.update(event.block_hashes)


@pytest.mark.parametrize("rows", [512, 60], ids=["room for all", "evicts"])
def test_routers_know_what_dram_and_hbm_hold_also_after_a_fetch(
    model: Path, tmp_path: Path, start: START, start_target: Any, rows: int
) -> None:
    target = start_target()
    for fetches in (False, True):
        drive = start(configured(model, "store", tmp_path, target.address, rows=rows))
        index = Index(drive)
        drive.play(1)
        connector = drive._scheduler.connector
        in_dram = connector._manager.primary_tier._policy.blocks
        assert index.held["CPU"] == {maybe_convert_block_hash(get_offload_block_hash(key)) for key in in_dram}
        assert index.orphans["GPU"] == 0
        assert index.orphans["CPU"] == 0 or rows == 60
        assert (index.fetched > 0) == fetches
