"""The store's benchmark: its arithmetic, and a tiny run of all of it. No figure is judged here."""

import json
from pathlib import Path

import msgspec
import pytest

import benchmarks.store.__main__ as store
from benchmarks.store import rack, servers
from benchmarks.store.results import MIB, Cell, Sample, Spread, paired, size_name, spread, table
from benchmarks.store.rounds import Plan
from kvstore.errors import ConfigError


def test_a_spread_is_median_and_quartiles() -> None:
    assert spread([4, 1, 3, 2, 5]) == Spread(3, (2, 4))
    assert spread([2]) == Spread(2, (2, 2))


def test_ratios_are_those_of_pairs() -> None:
    # The medians are equal; the pairs are not.
    assert paired([1, 2, 4], [2, 4, 2]) == Spread(0.5, (0.5, 1.25))
    with pytest.raises(ValueError, match="zip"):
        paired([1], [1, 2])


def a_cell() -> Cell:
    cell = Cell("tcp", 2 * MIB)
    for number in range(3):
        cell.add("read", "fio", 0, Sample(4.0 - number))
        for operation in ("get", "put"):
            cell.add(operation, "socket-1", 1, Sample(2.5))
            cell.add(operation, "socket-4", 1, Sample(3.0))
        cell.add("write", "fio", 0, Sample(5.0))
        cell.add("get", "cold", 1, Sample(1.5, 10**9, 0.5, 0.25))
        cell.add("get", "hot", 1, Sample(3.0, 10**9, 0.1, 0.1))
        cell.add("put", "put", 1, Sample(1.0, 10**9, 1.0, 0.5, 2.0))
        cell.add("get", "redis", 1, Sample(1.5, 10**9, 0.3, 0.3))
    cell.connections["get", "redis", 1] = 4
    return cell


def test_the_limit_is_the_slower_of_disk_and_network_and_the_better_of_ways() -> None:
    cell = a_cell()
    assert cell.limits("get", "cold", 1) == [3.0, 3.0, 2.0]
    assert cell.limits("get", "hot", 1) == [3.0, 3.0, 3.0]
    assert cell.limits("put", "disk", 1) == [3.0, 3.0, 3.0]


def test_a_result_has_its_limit_and_its_peers() -> None:
    cell = a_cell()
    cold, hot, put = (cell.result(side, 1) for side in ("cold", "hot", "put"))
    assert cold.get_ratio_to_limit == Spread(0.5, (0.5, 0.625))
    assert cold.put_ratio_to_limit is None
    assert (cold.target_cpu_seconds_per_gbyte, cold.client_cpu_seconds_per_gbyte) == (0.5, 0.25)
    assert cold.peers == {}
    assert hot.get_ratio_to_limit == Spread(1, (1, 1))
    assert hot.peers["redis"].ratio_to_peer == Spread(2, (2, 2))
    assert hot.peers["redis"].ratio_to_limit == Spread(0.5, (0.5, 0.5))
    assert hot.peers["redis"].connections == 4
    assert put.put_ratio_to_limit == Spread(0.333, (0.333, 0.333))
    assert put.returned_gbytes_per_second == Spread(2, (2, 2))


def test_the_table_has_a_column_for_each_peer_that_was_measured() -> None:
    cell = a_cell()
    head, line, *rows = table([cell.result(side, 1) for side in ("cold", "hot", "put")]).splitlines()
    assert set(line) == {"-"}
    assert "ours/redis" in head
    assert "mooncake" not in head
    assert [row.split()[:5] for row in rows] == [
        ["get", "cold", "tcp", "1", "2"],
        ["get", "hot", "tcp", "1", "2"],
        ["put", "disk", "tcp", "1", "2"],
    ]
    assert "0.50 [0.50 0.62]" in rows[0]
    assert size_name(256 * 1024) == "256 KiB"


def test_without_fio_there_is_no_limit_of_the_disk() -> None:
    cell = Cell("tcp", MIB)
    cell.add("get", "cold", 1, Sample(1.0, 10**9))
    cell.add("get", "socket-1", 1, Sample(2.0))
    result = cell.result("cold", 1)
    assert result.limit_gbytes_per_second is None
    assert result.get_ratio_to_limit is None


def tiny(peers: list[str]) -> Plan:
    return Plan(
        sizes=[256 * 1024],
        clients=[1, 2],
        transports=["tcp", "unix"],
        repeats=1,
        peers=peers,
        peer_python="/nowhere/python",
        batch_bytes=MIB,
        calls=2,
        cold_batches=2,
        hot_batches=2,
        ring_bytes=24 * MIB,
        segment_bytes=8 * MIB,
        hot_cache_bytes=16 * MIB,
    )


def test_a_tiny_run_measures_everything_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with nothing else installed: what is absent is said, and nothing of it is measured."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(store, "plan", lambda options: tiny(list(servers.PEERS)))
    folder = tmp_path / "data"
    folder.mkdir()
    report = store.run(store.parse([]), folder)
    assert not list(folder.iterdir())
    assert {(r.operation, r.medium, r.transport, r.clients) for r in report.results} == {
        (operation, medium, transport, clients)
        for operation, medium in (("get", "cold"), ("get", "hot"), ("put", "disk"))
        for transport in ("tcp", "unix")
        for clients in (1, 2)
    }
    assert all(("ABSENT" in text) and ("install" in text) for text in report.peers.values())
    assert all(result.gbytes_per_second.median > 0 for result in report.results)
    hot = [result for result in report.results if result.medium == "hot"]
    assert all(result.get_ratio_to_limit for result in hot)
    assert "NO DISK LIMIT" in store.show(report)
    assert json.loads(msgspec.json.encode(report))["results"][0]["gbytes_per_second"]["quartiles"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sizes", "lots"], "sizes: 'lots' given"),
        (["--sizes", "3MiB"], "expected a divisor of"),
        (["--clients", "1,none"], "clients: 'none' given"),
        (["--peers", "memcached"], "expected some of redis,"),
        (["--transports", "rdma"], "expected some of tcp,unix"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        store.plan(store.parse(arguments))


def test_a_folder_must_be_on_a_device_and_have_room(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder that exists"):
        store.choose_folder(Path("/proc/nowhere"))
    with pytest.raises(ConfigError, match="GiB free"):
        store.check_space(tmp_path, 1 << 60)


def test_a_plan_stays_within_its_disk() -> None:
    assert store.plan(store.parse([])).disk_bytes < 12 << 30
    quick = store.plan(store.parse(["--quick"]))
    assert quick.disk_bytes < 4 << 30
    assert quick.calls % max(quick.clients) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--targets", "17"], "targets: '17' given"),
        (["--value", "lots"], "value: 'lots' given"),
        (["--bad-loss", "100"], "bad-loss: '100' given"),
    ],
)
def test_a_rack_that_cannot_be_is_told_in_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rack.parse(arguments)


def test_a_rack_on_loopback_shows_what_needs_no_links_and_leaves_nothing(tmp_path: Path) -> None:
    small = ["--workers=2", "--targets=1", "--processes=1", "--value=64KiB", "--hot=1MiB", "--capacity=512MiB"]
    short = ["--pause=10", "--seconds=0.4", "--rounds=1"]
    report = rack.measure(rack.parse([*small, *short, "--loopback"]), tmp_path)
    assert not list(tmp_path.iterdir())
    assert set(report.conditions) == {"clean", "stopped"}
    for of in report.conditions.values():
        assert of.got["hit"] > 0
        assert of.wrong == 0
    assert "network: loopback: --loopback" in rack.show(report)
