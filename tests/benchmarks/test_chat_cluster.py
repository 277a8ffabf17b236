"""What the cluster benchmark starts for each of its modes. No process is started here."""

import json
from pathlib import Path

import pytest

from benchmarks.chat.cluster import GRAPHS, Options, by_cluster, deployment_of, parse, settings_of
from graphs.service import Process
from kvstore.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def options_of(model: Path, *words: str) -> Options:
    return parse(["--model", str(model), "--dir", str(model), *words])


def processes(options: Options, mode: str) -> dict[str, Process]:
    return {one.name: one for one in deployment_of(options, mode, options.dir).processes()}


def value(process: Process, flag: str) -> str:
    return process.command[process.command.index(flag) + 1]


@pytest.mark.parametrize("mode", GRAPHS)
def test_each_mode_serves_the_same_workers_and_gpus(model: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = options_of(
        model, "--workers", "2", "--gpus-per-worker", "2", "--hbm-tokens", "1600", "--dram", "3G",
        "--engine", "--enforce-eager --compilation-config '{\"mode\": 0}'",
    )  # fmt: skip
    found = processes(options, mode)
    workers = [one for one in found.values() if "Worker" in one.service]
    assert [one.gpus for one in workers] == [[0, 1], [2, 3]]
    for one in workers:
        assert value(one, "--num-gpu-blocks-override") == "100"
        assert value(one, "--tensor-parallel-size") == "2"
        assert value(one, "--compilation-config") == '{"mode": 0}'
        assert "--enforce-eager" in one.command
        assert one.metrics_port
    assert ("Store-0" in found) is ("kvtier" in mode)
    assert ("Router-0" in found) is ("kvtier" in mode and mode != "kvtier-dynamo-router")
    assert ("--router-mode" in found["Frontend-0"].command) is ("Router-0" not in found)
    if mode in ("stock-dram", "stock-files"):
        extra = json.loads(value(workers[0], "--kv-transfer-config"))["kv_connector_extra_config"]
        assert extra["cpu_bytes_to_use"] == 3_000_000_000
    if "kvtier" in mode:
        assert ("--hot" in found["Store-0"].command) is (mode != "kvtier-disk")


def test_memory_and_disk_differ_in_the_target_alone_and_share_a_cluster(model: Path) -> None:
    options = options_of(model, "--workers", "2", "--gpus-per-worker", "0", "--hot", "1G", "--capacity", "2G")
    memory = deployment_of(options, "kvtier-memory", model)
    disk = deployment_of(options, "kvtier-disk", model, beside=memory)
    assert [one.of("VllmWorker").flags for one in (memory, disk)] == [memory.of("VllmWorker").flags] * 2
    assert set(memory.of("Store").flags) - set(disk.of("Store").flags) == {"hot", "durability"}
    assert memory.of("Store").flags["listen"] == disk.of("Store").flags["listen"]
    assert memory.of("Nats").flags == disk.of("Nats").flags
    assert by_cluster(["kvtier-disk", "stock", "kvtier-memory"]) == [["stock"], ["kvtier-memory", "kvtier-disk"]]
    assert by_cluster(["kvtier-disk", "stock"]) == [["kvtier-disk"], ["stock"]]


def test_stock_workers_publish_their_events_each_at_a_port_of_its_own(model: Path) -> None:
    found = processes(options_of(model, "--workers", "2", "--gpus-per-worker", "0"), "stock")
    ports = {json.loads(value(found[f"VllmWorker-{number}"], "--kv-events-config"))["endpoint"] for number in (0, 1)}
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--modes", "stock,magic"], "modes: 'magic' given, expected some of stock,"),
        (["--modes", "1p1d-stock"], "workers: '1' conflicts with --modes 1p1d-stock, expected an even number"),
        (["--kill", "Store-0"], "timeline: missing, required by --kill"),
        (["--gpus-per-worker", "some"], "gpus-per-worker: 'some' given"),
    ],
)
def test_what_is_wrong_is_named(model: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        options_of(model, *words)
    assert says in str(error.value)


def test_arguments_of_engines_are_settings() -> None:
    assert settings_of(["--a", "1", "--b", "--c=2", "--no-d"]) == {"a": "1", "b": True, "c": "2", "no-d": True}
    with pytest.raises(ConfigError):
        settings_of(["--a", "1", "2"])
