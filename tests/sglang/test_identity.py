"""Which model a scheduler has loaded, and calls that may change it: in SGLang's own model runner."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed")

from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_context

from benchmarks.store.hicache import checkpoint
from components.sglang import identity
from kvstore.errors import ConfigError
from tests.conftest import RunningTarget
from tests.sglang.hicache import Cache, refusal

Make = Callable[..., Cache]
Start = Callable[..., RunningTarget]


def test_weights_that_are_updated_end_it_and_others_have_another_digest(
    cache: Make, start_target: Start, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = start_target().address
    made = cache(store)
    monkeypatch.setattr(identity, "_changes", [])
    key, content = made.key(4), made.content(4)
    made.write(key, content)
    before = identity.loaded_model()
    path = runner.model_config.model_path
    assert runner.weight_updater.update_weights_from_disk(checkpoint(tmp_path / "other", 2), "auto")[0]
    assert identity.changed() == "update_weights_from_disk"
    assert identity.loaded_model()["weights"] != before["weights"]
    assert made.read(key) == []
    assert made.write(made.key(4, seed=2), content) == 0
    assert made.backend.batch_get_v1(["a"], made.pool.alloc(made.page_tokens)) == [False]
    assert "attached after update_weights_from_disk" in refusal(store)
    assert runner.weight_updater.update_weights_from_disk(path, "auto")[0]
    assert identity.loaded_model() == before


def test_an_engine_that_serves_takes_no_backend(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.watch()
    manager = SchedulerWeightUpdaterManager(
        tp_worker=SimpleNamespace(model_runner=runner),
        draft_worker=None,
        memory_saver_adapter=None,
        flush_cache=lambda **_: True,
        is_fully_idle=lambda **_: True,
    )
    identity.watch()  # it was heard from the start
    monkeypatch.delattr(WeightUpdater, "kvtier_watched")
    with pytest.raises(ConfigError, match="attached to an engine that serves"):
        identity.watch()
    del manager


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_lora": True}, "enable-lora: 'True'"),
        ({"speculative_algorithm": "EAGLE"}, "speculative-algorithm: 'EAGLE'"),
    ],
)
def test_what_tokens_do_not_tell_is_refused(runner: Any, settings: dict[str, Any], said: str) -> None:
    before = {name: getattr(runner.server_args, name) for name in settings}
    get_context().override("test", **settings)
    try:
        assert said in refusal("127.0.0.1:1")
    finally:
        get_context().override("test", **before)


def test_images_are_refused(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.model_config, "is_multimodal", True)
    assert "expected a text-only model" in refusal("127.0.0.1:1")
