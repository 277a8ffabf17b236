"""Chunks go from one store to another in a file: those that were chosen, whole, and of one fingerprint."""

import asyncio
import json
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store.tenants import Site
from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.credentials import Credential
from kvstore.disk.log import Log
from kvstore.disk.shelf import Shelf
from kvstore.keys import sequence_hashes
from kvstore.net import wire
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership
from kvstore.net.wire import Outcome
from kvstore.seal import Mode, Seal, SealKey
from kvstore.tools import import_
from tests.commands import Ended
from tests.conftest import MIB, RunningTarget, append, item, key, payload, soon
from tests.kvstore.test_tools import run

__all__ = ["run"]  # a fixture

LENGTH = 100_000
BLOCK, BLOCKS, CHUNKS = 16, 2, 10  # tokens a block, blocks a chunk, chunks of the prompt
TOKENS = list(range(CHUNKS * BLOCK * BLOCKS + 5))
FINGERPRINT, OTHER = f"{7:016x}", f"{8:016x}"  # of `item`, and another
CREDENTIAL = "a secret that is long enough"


def prompt_items() -> list[Item]:
    hashes = sequence_hashes(TOKENS, BLOCK)[BLOCKS - 1 :: BLOCKS]
    return [item(number)._replace(router_hash=router_hash) for number, router_hash in enumerate(hashes)]


def joined(*targets: RunningTarget) -> str:
    return ",".join(target.address for target in targets)


def client_of(*targets: RunningTarget, seal: Seal | None = None) -> StoreClient:
    return StoreClient(StaticMembership([target.address for target in targets]), seal=seal)


def put(client: StoreClient, items: list[Item]) -> None:
    assert set(client.put(items, soon())) == {Outcome.STORED}


def had(client: StoreClient, numbers: range) -> list[int]:
    """Which of the chunks are there; each of them is what was put."""
    values = [memoryview(bytearray(LENGTH)) for _ in numbers]
    outcomes = client.get([key(number) for number in numbers], values, soon())
    found = [number for number, outcome in zip(numbers, outcomes, strict=True) if outcome is Outcome.HIT]
    assert all(values[number - numbers.start] == payload(number) for number in found)
    assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}
    return found


@pytest.fixture
def source(start_target: Callable[..., RunningTarget], tmp_path: Path) -> RunningTarget:
    """A target with a prompt's chunks 0 to 9, 10 to 19 of others, and 20 to 24 of another fingerprint."""
    target = start_target("source", unix=True)
    client = client_of(target)
    put(client, prompt_items())
    put(client, [item(number) for number in range(CHUNKS, 2 * CHUNKS)])
    put(client, [item(number)._replace(fingerprint=8) for number in range(20, 25)])
    client.close()
    (tmp_path / "prompt.json").write_text(json.dumps({"count": len(TOKENS), "tokens": TOKENS}))
    return target


@pytest.fixture
def exported(source: RunningTarget, run: Callable[..., Ended], tmp_path: Path) -> Path:
    """The prompt's chunks."""
    file = tmp_path / "prompt.kvtier"
    arguments = ["--fingerprint", FINGERPRINT, "--tokens", tmp_path / "prompt.json", "--block-size", BLOCK]
    ended = run("export", source.address, file, *arguments)
    assert (ended.code, ended.complained) == (0, "")
    assert f"{tmp_path}/prompt.json: the first 10 of 10 chunks are in it" in ended.said
    return file


def imported(ended: Ended) -> tuple[int, int, int, int]:
    one: Any = ended.lines[0]
    return ended.code, one["stored"], one["known"], one["refused"]


def test_a_prompt_goes_to_another_cluster(
    exported: Path, start_target: Callable[..., RunningTarget], run: Callable[..., Ended]
) -> None:
    targets = [start_target(name) for name in ("b", "c")]
    ended = run("import", joined(*targets), exported, "--fingerprint", FINGERPRINT, "--json")
    assert imported(ended) == (0, CHUNKS, 0, 0)
    client = client_of(*targets)
    assert had(client, range(25)) == list(range(CHUNKS))
    entries = [entry for target in targets for entry in target.log.entries()]
    assert {(entry.key, entry.router_hash, entry.blocks_per_chunk, entry.fingerprint) for entry in entries} == {
        (one.key, one.router_hash, BLOCKS, 7) for one in prompt_items()
    }
    assert imported(run("import", joined(*targets), exported, "--json")) == (0, 0, CHUNKS, 0)
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    client.close()


@pytest.mark.parametrize("mode", Mode)
def test_seals_stay(
    start_target: Callable[..., RunningTarget], run: Callable[..., Ended], tmp_path: Path, mode: Mode
) -> None:
    source, other, file = start_target("a", unix=True), start_target("b"), tmp_path / "sealed"
    seals = [Seal([SealKey(number, bytes([number]) * 32)], mode) for number in (1, 2)]
    putting = client_of(source, seal=seals[0])
    put(putting, prompt_items())
    assert run("export", source.address, file, "--json").lines[0]["sealed"] == CHUNKS
    assert (payload(3) in file.read_bytes()) == (mode is Mode.MAC)
    assert imported(run("import", other.address, file, "--json")) == (0, CHUNKS, 0, 0)
    clients = [client_of(other, seal=seal) for seal in seals]
    assert had(clients[0], range(CHUNKS)) == list(range(CHUNKS))
    assert had(clients[1], range(CHUNKS)) == []
    for client in (putting, *clients):
        client.close()


def test_a_store_is_exported_by_fingerprint(
    source: RunningTarget,
    start_target: Callable[..., RunningTarget],
    run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "LISTED_MAX", 3)  # so that it takes several questions
    second, file = start_target("second", unix=True), tmp_path / "all"
    store = joined(source, second)
    held = run("export", store, "--json").lines[0]
    assert held == {FINGERPRINT: {"chunks": 20, "bytes": 20 * LENGTH}, OTHER: {"chunks": 5, "bytes": 5 * LENGTH}}
    assert f"expected one of {FINGERPRINT}, {OTHER}" in run("export", store, file).complained
    assert run("export", store, file, "--fingerprint", "7", "--json").lines[0]["chunks"] == 20
    some = run("export", store, tmp_path / "some", "--fingerprint", "7", "--max", 3 * LENGTH, "--json").lines[0]
    assert (some["chunks"], some["cut"]) == (3, True)


def test_a_gap_in_a_prompt_is_told(
    start_target: Callable[..., RunningTarget], run: Callable[..., Ended], tmp_path: Path
) -> None:
    source = start_target(unix=True)
    client = source.client()
    put(client, [one for number, one in enumerate(prompt_items()) if number != 4])
    put(client, [item(30)._replace(router_hash=0)])
    client.close()
    (tmp_path / "tokens").write_text(json.dumps(TOKENS))
    ended = run("export", source.address, tmp_path / "file", "--tokens", tmp_path / "tokens", "--block-size", BLOCK)
    assert "the first 4 of 10 chunks are in it" in ended.said
    assert "1 chunks belong to no known prompt and were left out" in ended.said


def test_another_fingerprint_is_refused(
    exported: Path, start_target: Callable[..., RunningTarget], run: Callable[..., Ended], nats_url: str
) -> None:
    other = start_target("other")
    says = f"expected a file of fingerprint {OTHER}, not {FINGERPRINT}: these workers"
    ended = run("import", other.address, exported, "--fingerprint", OTHER)
    assert (ended.code, says in ended.complained) == (2, True), ended.complained
    assert (
        "no worker of namespace 'default' reported"
        in run("import", other.address, exported, "--nats", nats_url).complained
    )

    def with_workers(fingerprint: int, adapters: dict[str, int]) -> Ended:
        async def report() -> Ended:
            bus = await Bus.connect(nats_url, "test")
            importing = asyncio.create_task(
                asyncio.to_thread(run, "import", other.address, exported, "--nats", nats_url, "--json")
            )
            while not importing.done():
                await bus.publish(
                    messages.subject("default", "speed.worker", "1"),
                    WorkerReport("1", "a.b.c", fingerprint, BLOCK, BLOCKS, LENGTH, 0, adapters=adapters),
                )
                await asyncio.sleep(0.2)
            await bus.close()
            return await importing

        return asyncio.run(report())

    ended = with_workers(8, {})
    assert (ended.code, says in ended.complained) == (2, True), ended.complained
    assert not other.log.entries()
    assert imported(with_workers(8, {"an adapter": 7})) == (0, CHUNKS, 0, 0)


def test_a_damaged_file_is_told_and_nothing_wrong_is_stored(
    exported: Path, start_target: Callable[..., RunningTarget], run: Callable[..., Ended], seed: int
) -> None:
    whole, other, chance = exported.read_bytes(), start_target("other"), random.Random(seed)
    size = len(whole)
    places = [0, 5, 8, 20, 40, 60, size // 2, size - 24, size - 1, *(chance.randrange(size) for _ in range(10))]
    for place in places:
        exported.write_bytes(whole[:place])
        ended = run("import", other.address, exported)
        assert ended.code == 2, place
        assert f"before byte {place} there is the end of a truncated file" in ended.complained
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        exported.write_bytes(flipped)
        ended = run("import", other.address, exported)
        assert (ended.code, "expected an undamaged export; before byte" in ended.complained) == (2, True), place
    exported.write_bytes(b"something else" * 10)
    assert (
        "before byte 28 there is a header whose checksum is wrong" in run("import", other.address, exported).complained
    )
    client = other.client()
    had(client, range(CHUNKS))
    client.close()


def test_an_import_that_nobody_takes_ends(
    exported: Path,
    start_target: Callable[..., RunningTarget],
    run: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_, "_PAUSES_SECONDS", (0.1,))
    other = start_target("other", writable=False)
    ended = run("import", other.address, exported, "--json")
    assert imported(ended) == (1, 0, 0, CHUNKS)
    assert "none of 10 chunks was stored (refused)" in ended.complained


def test_keys_are_listed_for_those_who_may_read_all(
    start_target: Callable[..., RunningTarget],
    run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    says = "chunks are listed for clients that prove a credential with the right to read"
    assert says in run("export", start_target("tcp").address).complained
    (folder := tmp_path / "site").mkdir()
    site = Site(folder, dict.fromkeys("ab", 8 * MIB), {name: Credential(CREDENTIAL.encode()) for name in "ab"})
    try:
        put(site.clients["a"], [item(number) for number in range(3)])
        (address,) = site.clients["a"]._membership.targets()
        monkeypatch.setenv("KVTIER_CREDENTIAL", CREDENTIAL)
        held = run("export", address, "--namespace", "a", "--json").lines[0]
        assert held == {FINGERPRINT: {"chunks": 3, "bytes": 3 * LENGTH}}
        assert run("export", address, "--namespace", "b", "--json").lines == [{}]
        site.lobby.members["a"].target.readable = False
        assert says in run("export", address, "--namespace", "a").complained
        monkeypatch.setenv("KVTIER_CREDENTIAL", f"not {CREDENTIAL}")
        assert "does not list its chunks" in run("export", address, "--namespace", "a").complained
    finally:
        site.close()


def test_a_list_that_does_not_end_is_left(
    source: RunningTarget, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shelf, "page", lambda *_: ([], (0, 0, 1)))
    ended = run("export", source.address)
    assert (ended.code, "does not list its chunks" in ended.complained) == (2, True)


def test_pages_hold_what_a_log_holds(tmp_path: Path, seed: int) -> None:
    """Also where segments were evicted, and chunks written again."""
    chance = random.Random(seed)
    log = Log(tmp_path, 8 * MIB, segment_bytes=MIB)
    for number in range(150):
        assert append(log, number)
        log.used(key(chance.randrange(number + 1)))
    found, place = [], (0, 0, 0)
    while place is not None:
        entries, place = Shelf([log]).page(place, chance.randrange(1, 6))
        found += entries
    assert sorted(found) == sorted(log.entries())
    log.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "nonsense"], "address: 'nonsense' given, expected host:port"),
        (["export", "127.0.0.1:9"], "store: 127.0.0.1:9 does not list its chunks: "),
        (["export", "127.0.0.1:9", __file__], "expected a file that does not exist yet"),
        (["export", "127.0.0.1:9", "--fingerprint", "xyz"], "fingerprint: 'xyz' given, expected up to 16 hexadecimal"),
        (["export", "127.0.0.1:9", "--tokens", "/nowhere"], "block-size: missing, required by --tokens"),
        (["export", "127.0.0.1:9", "--tokens", __file__, "--block-size", "16"], "expected a file with token ids"),
        (["export", "127.0.0.1:9", "--max", "0"], "max: '0' given, expected more than 0"),
        (["import", "127.0.0.1:9", "/nowhere"], "file: '/nowhere' given, expected a file that can be read"),
        (["import", "127.0.0.1:9", __file__], "expected an undamaged export"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(run: Callable[..., Ended], arguments: list[str], says: str) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.said, ended.complained.count("\n")) == (2, "", 1), ended.complained
    assert says in ended.complained
