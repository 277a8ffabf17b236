"""Replicas: what was read is held by two targets, and is served when either of them is gone."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.store.authority import Authority
from graphs.services import free_port
from kvstore.__main__ import parse
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.net import replicas
from kvstore.net.backlog import Standing
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership, open_membership, other_target, target_for
from kvstore.net.queues import WriteQueue
from kvstore.net.tls import ClientTls
from kvstore.net.wire import Outcome
from kvstore.tenancy import replicate
from tests.conftest import MIB, RunningTarget, eventually, item, key, payload, soon
from tests.kvstore.test_target_process import Process
from tests.kvstore.test_tenancy import SECRETS, names_file

LENGTH = 100_000
Start = Callable[..., RunningTarget]


def three(start_target: Start, *, replicas: bool) -> tuple[list[RunningTarget], StoreClient]:
    targets = [start_target(f"store{number}", buffer_bytes=16 * MIB, hot_bytes=16 * MIB) for number in range(3)]
    addresses = [one.address for one in targets]
    if replicas:
        for one in targets:
            replicate(one.target, ",".join(addresses), "default", None)
    return targets, StoreClient(StaticMembership(addresses))


def get(client: StoreClient, numbers: range, targets: list[str | None] | None = None) -> list[Outcome]:
    rooms = [memoryview(bytearray(LENGTH)) for _ in numbers]
    outcomes = client.get([key(number) for number in numbers], rooms, soon(), targets=targets)
    for number, room, outcome in zip(numbers, rooms, outcomes, strict=True):
        assert outcome is not Outcome.HIT or room == payload(number, LENGTH)
    return outcomes


def replicated(targets: list[RunningTarget], *, outcome: str = "stored") -> int:
    return sum(one.target.status().replicas[outcome] for one in targets)


@pytest.mark.parametrize("replicas", [True, False])
def test_a_lost_target_costs_only_what_nobody_had_read(start_target: Start, replicas: bool) -> None:
    targets, client = three(start_target, replicas=replicas)
    addresses = [one.address for one in targets]
    numbers, hot = range(60), range(40)
    assert set(client.put([item(number) for number in numbers], soon())) == {Outcome.STORED}
    assert set(get(client, hot)) == {Outcome.HIT}
    if replicas:
        eventually(lambda: replicated(targets) == len(hot))
    planned = [target_for(key(number), addresses) for number in numbers]
    lost = [number for number in numbers if planned[number] == addresses[0]]
    targets[0].stop()
    expected = [
        Outcome.HIT if number not in lost or (replicas and number in hot) else Outcome.UNREACHABLE for number in numbers
    ]
    assert get(client, numbers) == expected
    assert get(client, numbers, planned) == expected
    keys = [key(number) for number in numbers]
    assert client.exists(keys, soon()) == expected
    found = client.locate(keys, soon())
    for number in numbers:
        own = planned[number] if number not in lost else other_target(keys[number], addresses, addresses[0])
        assert found[number] == (own if expected[number] is Outcome.HIT else None)
    client.close()


def test_a_chunk_is_offered_once_and_comes_back_to_a_target_that_lost_it(
    start_target: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, client = three(start_target, replicas=True)
    addresses = [one.address for one in targets]
    client.put([item(1)], soon())
    for _ in range(3):
        assert get(client, range(1, 2)) == [Outcome.HIT]
        eventually(lambda: replicated(targets) == 1)
    assert sum(len(one.log) for one in targets) == 2
    first, second = target_for(key(1), addresses), other_target(key(1), addresses, target_for(key(1), addresses))
    has_lost = next(one for one in targets if one.address == first)
    entry = has_lost.log.find(key(1))
    has_lost.log._forget(has_lost.log._segments[has_lost.log._index[key(1)] >> 24], entry)
    assert get(client, range(1, 2)) == [Outcome.MISS]
    assert get(client, range(1, 2), [second]) == [Outcome.HIT]
    eventually(lambda: replicated(targets) == 2)
    assert get(client, range(1, 2)) == [Outcome.HIT]
    client.close()


def test_a_target_that_is_full_refuses_replicas_and_gets_go_on(
    start_target: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_REFUSED_AGAIN_SECONDS", 0.0)
    targets, client = three(start_target, replicas=True)
    client.put([item(number) for number in range(20)], soon())
    for one in targets:
        one.target.writable = False
    assert set(get(client, range(20))) == {Outcome.HIT}
    eventually(lambda: replicated(targets, outcome="refused") == 20)
    for one in targets:
        one.target.writable = True
    assert set(get(client, range(20))) == {Outcome.HIT}
    eventually(lambda: replicated(targets) == 20)
    client.close()


def test_a_copy_neither_ranks_nor_orphans_what_follows_it_in_its_prompt(
    start_target: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dropped first, and is still where it was read."""
    targets, client = three(start_target, replicas=True)
    standings: dict[bytes, list[int]] = {}
    expect = WriteQueue.expect

    def noted(self: WriteQueue, one: bytes, length: int, standing: Standing, until: float) -> bool:
        standings.setdefault(one, []).append(standing.router_hash)
        return expect(self, one, length, standing, until)

    monkeypatch.setattr(WriteQueue, "expect", noted)
    client.put([item(1)], soon())
    assert get(client, range(1, 2)) == [Outcome.HIT]
    eventually(lambda: replicated(targets) == 1)
    assert standings == {key(1): [item(1).router_hash, 0]}
    client.close()


def test_memory_that_was_damaged_is_not_copied(start_target: Start) -> None:
    """It would get a checksum that holds."""
    targets, client = three(start_target, replicas=False)
    addresses = [one.address for one in targets]
    client.put([item(1)], soon())
    holder = next(one for one in targets if one.address == target_for(key(1), addresses))
    buffer = holder.target.pool.find(key(1), LENGTH)
    assert buffer is not None
    buffer.payload[0] ^= 1
    replicate(holder.target, ",".join(addresses), "default", None)
    get(client, range(1, 2))
    eventually(lambda: replicated([holder], outcome="gone") == 1)
    assert sum(len(one.log) for one in targets) == 1
    client.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--peers", "a:1,b:2"], "hot"),
        (["--peers", "a:1,b:2", "--hot", "1G", "--tls-cert", "c", "--tls-key", "k"], "store-tls-ca"),
        (["--store-tls-ca", "c"], "peers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: missing, required by --"):
        parse(["--dir", "/d", "--capacity", "1G", *options])


def test_targets_of_several_namespaces_replicate_with_their_credentials(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    processes = []
    for number, address in enumerate(addresses):
        (folder := tmp_path / str(number)).mkdir()
        path = names_file(tmp_path, {"a": "32MiB"})
        line = ["--dir", str(folder), "--capacity", "64MiB", "--segment-size", "4MiB", "--listen", address]
        line += ["--nats", "", "--buffers", "32MiB", "--hot", "32MiB", "--namespaces", str(path)]
        if not number:
            said = Process(*line, "--peers", "10.0.0.7:7600,10.0.0.8:7600").refused()
            assert f"a list with {address}" in said
            assert list(folder.iterdir()) == []
        processes.append(Process(*line, "--peers", ",".join(addresses)).ready())
    store = StoreClient(StaticMembership(addresses), namespace="a", credential=Credential(SECRETS["a"].encode()))
    assert set(store.put([item(number) for number in range(10)], soon())) == {Outcome.STORED}
    assert set(get(store, range(10))) == {Outcome.HIT}
    eventually(lambda: sum(status.entries for status in store.stat(soon()).values()) == 20)
    processes[0].end(signal.SIGKILL)
    assert set(get(store, range(10))) == {Outcome.HIT}
    processes[1].end(signal.SIGTERM)
    store.close()


@pytest.mark.parametrize("certified", [True, False])
def test_over_mutual_tls_with_credentials_and_etcd_a_loss_is_made_good(
    tmp_path: Path, etcd_address: str, certified: bool
) -> None:
    """A target is killed: its chunks are served at once, and have two targets again when they are read once its lease
    has run out. Without a certificate of their own, targets are served nothing by each other."""
    authority = Authority(tmp_path)
    server, own, worker = (authority.issue(name) for name in ("target", "peer", "worker"))
    path = names_file(tmp_path, {"a": "32MiB"})
    with ExitStack() as stack:
        processes = []
        for number in range(3):
            (folder := tmp_path / str(number)).mkdir()
            line = ["--dir", str(folder), "--capacity", "64MiB", "--segment-size", "4MiB", "--nats", ""]
            line += ["--listen", f"127.0.0.1:{free_port()}", "--hot", "32MiB", "--namespaces", str(path)]
            line += ["--tls-cert", server.cert, "--tls-key", server.key, "--tls-client-ca", server.ca]
            line += ["--etcd", etcd_address, "--peers", f"etcd://{etcd_address}", "--store-tls-ca", own.ca]
            line += ["--store-tls-cert", own.cert, "--store-tls-key", own.key] if certified else []
            processes.append(Process(*line))
            stack.callback(processes[-1].process.kill)
            processes[-1].ready()
        membership = open_membership(f"etcd://{etcd_address}", "a")
        credential = Credential(SECRETS["a"].encode())
        store = StoreClient(membership, namespace="a", credential=credential, tls=ClientTls(worker))
        stack.callback(store.close)
        eventually(lambda: len(membership.targets()) == 3)
        numbers = range(30)
        assert set(store.put([item(number) for number in numbers], soon())) == {Outcome.STORED}

        def held_by_both() -> bool:
            """A target may offer a chunk to a wrong one first, as long as it does not know all targets."""
            assert set(get(store, numbers)) == {Outcome.HIT}
            live, keys = membership.targets(), [key(number) for number in numbers]
            first = [target_for(one, live) for one in keys]
            second = [other_target(one, live, target) for one, target in zip(keys, first, strict=True)]
            return all(set(store.exists(keys, soon(), targets=at)) == {Outcome.HIT} for at in (first, second))

        if certified:
            eventually(held_by_both, 30)
            processes[0].end(signal.SIGKILL)
            assert set(get(store, numbers)) == {Outcome.HIT}
            eventually(lambda: len(membership.targets()) == 2, 30)
            eventually(held_by_both, 30)
        else:

            def refused() -> int:
                """A target that did not know the others yet offers a chunk when it is read again."""
                assert set(get(store, numbers)) == {Outcome.HIT}
                return sum(status.replicas["refused"] for status in store.stat(soon()).values())

            eventually(lambda: refused() >= len(numbers), 30)
            assert sum(status.entries for status in store.stat(soon()).values()) == len(numbers)
        for process in processes[certified:]:
            process.end(signal.SIGTERM)
