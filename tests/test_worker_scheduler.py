"""vLLM's own scheduler over the tiers, stock and ours: what ends an engine there and not here. No model: what stands in
for it is benchmarks/scheduler.py's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from benchmarks.multi_turn import Options as EngineOptions
from benchmarks.multi_turn import transfer_config
from benchmarks.scheduler import Drive, Options
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import validated

# An answer ends with a chunk, whose last token is sampled and never computed.
OPTIONS = Options(prompt_tokens=50, answer_tokens=22, running=4, requests=12, block_tokens=4)
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
        return running[-1]

    yield started
    for one in running:
        one.close()


def configured(model: Path, mode: str, folder: Path, store: str = "") -> dict[str, Any]:
    options = validated(EngineOptions, {"model": str(model), "dram": 1 << 20, "dir": folder})
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
    output = scheduler.schedule()
    scheduler.update_from_output(output, drive._answer(output))


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
    drive.until_ready()
    leave_unscheduled(drive)
    drive.play(1)
    leave_unscheduled(drive)
    manager = drive._scheduler.connector._manager
    assert len(manager.primary_tier._policy.blocks) == 12 * ((50 + 22 - 1) // 4)
    assert not drive._scheduler.connector.connector_scheduler._req_status
