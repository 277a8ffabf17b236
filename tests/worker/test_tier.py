"""The tier in the engine, with its mover in a process of its own, against real targets."""

import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadPolicy,
    ReqContext,
    TierFilter,
    TierMatcher,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import TransferJob

from benchmarks.store.authority import Authority
from benchmarks.store.tenants import Site
from components.pricing.prefill import Prefill
from components.worker import remote_tier
from components.worker.manager import HoldingTieringManager
from components.worker.mover.__main__ import PUT_PATIENCE_SECONDS
from components.worker.remote_tier import FETCHES_PER_CHUNK, RemoteTier
from kvstore.bus.plan import FIELD, make_plan
from kvstore.credentials import Credential
from kvstore.errors import ConfigError
from kvstore.keys import chunk_key, sequence_hashes
from kvstore.net.client import Item
from kvstore.net.tls import ServerTls
from kvstore.net.wire import Outcome
from kvstore.seal import TRAILER_BYTES, SealKey
from tests.conftest import FullDisk, RunningTarget, eventually
from tests.worker.stock import offload_key, primary

ROW = 4096
DIGEST = b"\x07" * 32
# What a test waits for has no reason to be late; what a loaded machine may need longer for has this much.
SOON = 60.0


KEYS = [offload_key(number) for number in range(8)]


def engine_request(tokens: int = 64, name: str = "r") -> Any:
    return SimpleNamespace(
        request_id=name,
        all_token_ids=list(range(tokens)),
        mm_features=[],
        prompt_embeds=None,
        cache_salt=None,
        lora_request=None,
    )


class Ended(NamedTuple):
    """What became of a job."""

    success: bool
    failed: frozenset[Any]


class Engine:
    """A DRAM tier of some rows with the remote tier under it. Chunks are of two blocks of 4 tokens."""

    def __init__(
        self,
        store: str,
        rows: int = 16,
        row_bytes: int = ROW,
        digest: bytes = DIGEST,
        groups: int = 1,
        **options: Any,
    ):
        options.setdefault("deadline_ms", int(1000 * SOON))
        self._fd = os.memfd_create("kvtier-test")
        os.ftruncate(self._fd, rows * row_bytes)
        self.memory = np.memmap(f"/proc/self/fd/{self._fd}", dtype=np.int8, mode="r+", shape=(rows, row_bytes))
        spec = SimpleNamespace(
            config=SimpleNamespace(groups=[None] * groups),
            tokens_per_block=(4,) * groups,
            blocks_per_chunk=2,
            tokens_per_hash=4,
            _scheduler_mmap=SimpleNamespace(fd=self._fd),
        )
        self.tier = RemoteTier(spec, memoryview(self.memory), "kvtier", store=store, **options)
        self.digest = digest
        self.job_ids = iter(range(100000))
        self.jobs: dict[int, TransferJob] = {}
        self.results: dict[int, Ended] = {}
        self._keys: dict[str, list[Any]] = {}

    def until_ready(self) -> None:
        eventually(lambda: (self.step(), self.tier.link.ready)[1], SOON)

    def step(self) -> None:
        """What the manager does in each of the engine's steps."""
        for result in self.tier.get_finished_jobs():
            job = self.jobs.pop(result.job_id)
            came = result.successful_keys
            failed = frozenset(job.keys).difference(came if came is not None else job.keys if result.success else ())
            assert result.success == (not failed)
            assert frozenset(came or ()) <= frozenset(job.keys)
            self.results[result.job_id] = Ended(result.success, failed)
        self.tier.on_schedule_end(None)

    def arrive(self, request: Any, keys: list[Any], plan: Any = None, *, identified: bool = True) -> ReqContext:
        """Its chunks are `keys`, in order; of several groups, the first chunk of each, then the second."""
        params = None if plan is None else {FIELD: msgspec.to_builtins(plan)}
        context = ReqContext(request.request_id, params)
        seen: Counter[int] = Counter()
        for key in keys:
            seen[get_offload_group_idx(key)] += 1
            context.set_offload_key_position(key, 8 * seen[get_offload_group_idx(key)])
        self.policy = self.tier.on_new_request(context).policy
        self.tier.arrived(request)
        if identified:
            assert self.tier.identify(request.request_id, self.digest)
        self._keys[request.request_id] = keys
        return context

    def ask(self, name: str = "r") -> None:
        self.tier.ask(name, self._keys[name])

    def job(self, context: ReqContext, keys: list[Any], rows: list[int], *, is_promotion: bool = False) -> TransferJob:
        job = TransferJob(next(self.job_ids), keys, np.array(rows), is_promotion, context)
        self.jobs[job.job_id] = job
        return job

    def begin_store(self, context: ReqContext, keys: list[Any], rows: list[int]) -> int:
        job = self.job(context, keys, rows)
        self.tier.submit_store(job)
        return job.job_id

    def begin_load(self, context: ReqContext, keys: list[Any], rows: list[int]) -> int:
        job = self.job(context, keys, rows, is_promotion=True)
        self.tier.submit_load(job)
        return job.job_id

    def result(self, job: int, seconds: float = SOON) -> Ended:
        eventually(lambda: (self.step(), job in self.results)[1], seconds)
        return self.results.pop(job)

    def store(self, context: ReqContext, keys: list[Any], rows: list[int]) -> None:
        assert self.result(self.begin_store(context, keys, rows)).success

    def load(self, context: ReqContext, keys: list[Any], rows: list[int]) -> Ended:
        """The result of a promotion."""
        return self.result(self.begin_load(context, keys, rows))

    def fill(self, row: int, number: int) -> bytes:
        content = np.random.default_rng(number).bytes(self.memory.shape[1])
        self.memory[row] = np.frombuffer(content, dtype=np.int8)
        return content

    def counted(self) -> dict[str, float]:
        stats = self.tier.get_stats()
        return dict(stats.reduce()) if stats is not None else {}

    def close(self) -> None:
        self.tier.shutdown()
        os.close(self._fd)


@pytest.fixture
def engines() -> Iterator[Any]:
    made: list[Engine] = []

    def make(store: str, *, wait: bool = True, **options: Any) -> Engine:
        made.append(Engine(store, **options))
        if wait:
            made[-1].until_ready()
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def stored(engine: Engine, target: RunningTarget, count: int = 4) -> list[bytes]:
    """Chunks 0 .. count-1 of a request, written by one engine."""
    contents = [engine.fill(row, row + 1) for row in range(count)]
    context = engine.arrive(engine_request(), KEYS)
    engine.store(context, KEYS[:count], list(range(count)))
    eventually(lambda: len(target.log) == count)
    return contents


@pytest.mark.parametrize(
    ("name", "value"), [("deadline_ms", "2000"), ("deadline_ms", 1500.5), ("fetch_threads", 0), ("dedline_ms", 1)]
)
def test_a_setting_that_the_mover_would_not_take_is_refused_by_its_name(engines: Any, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        engines("127.0.0.1:1", wait=False, **{name: value})


def test_leading_chunks_are_put_first(start_target: Any, engines: Any) -> None:
    """There is room for two of six. A job has them in the order of the prompt (manager.py)."""
    target = start_target()
    engine = engines(target.address)
    engine.tier.puts._rows_max = 2
    contents = [engine.fill(row, row + 1) for row in range(6)]
    context = engine.arrive(engine_request(), KEYS)
    engine.store(context, KEYS[:6], list(range(6)))
    eventually(lambda: len(target.log) == 2)
    (leftover,) = engine.tier.puts._leftovers
    assert leftover.keys == KEYS[2:6]
    reader = engines(target.address)
    context = reader.arrive(engine_request(), KEYS, plan(target, 2))
    assert not reader.load(context, KEYS[:2], [0, 1]).failed
    assert [reader.memory[row].tobytes() for row in (0, 1)] == contents[:2]


def plan(target: RunningTarget, chunks: int, *, deadline_ms: float = 60_000) -> Any:
    return make_plan([target.address] * chunks, fetch=chunks, deadline_ms=deadline_ms, chunk_ms=1, decision_id="d")


def test_what_one_engine_stored_another_fetches(start_target: Any, engines: Any) -> None:
    target = start_target()
    writer, reader = engines(target.address), engines(target.address)
    contents = stored(writer, target)
    hashes = sequence_hashes(list(range(64)), 4)[1::2]
    assert {entry.router_hash for entry in target.log.entries()} == set(hashes[:4])
    assert {entry.blocks_per_chunk for entry in target.log.entries()} == {2}

    context = reader.arrive(engine_request(), KEYS, plan(target, 4))
    found = [reader.tier.lookup(key, context) for key in KEYS]
    assert found == [LookupResult.HIT] * 4 + [LookupResult.MISS] * 4
    result = reader.load(context, KEYS[:4], [5, 6, 7, 8])
    assert (result.success, result.failed) == (True, frozenset())
    assert [reader.memory[row].tobytes() for row in (5, 6, 7, 8)] == contents
    assert [reader.tier.fetched_tokens("r", first, 64) for first in (0, 8, 28, 32)] == [32, 24, 4, 0]
    assert reader.tier.fetched_tokens("r", 0, 31) == 31


def test_a_chunk_that_is_gone_fails_alone_and_is_not_tried_again(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS, plan(target, 6))
    result = engine.load(context, KEYS[:6], [0, 1, 2, 3, 4, 5])
    assert result.failed == frozenset(KEYS[4:6])
    assert engine.tier.lookup(KEYS[4], context) is LookupResult.MISS
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.HIT  # pushed out of DRAM meanwhile: once more
    for _ in range(FETCHES_PER_CHUNK - 1):
        engine.load(context, KEYS[:1], [0])
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS  # and no more


def test_a_corrupt_chunk_is_not_used(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    segment = next(Path(target.log.path).glob("segment-*"))
    entry = target.log.find(chunk_key(DIGEST, (1).to_bytes(32, "big")))
    with segment.open("r+b") as file:
        file.seek(entry.payload_offset)
        file.write(b"nonsense")
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS, plan(target, 4))
    assert engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[1:2])
    counted = engine.tier.get_stats().reduce()
    assert counted["vllm:kvtier_fetched_chunks:('hit',)"] == 3
    assert counted["vllm:kvtier_fetched_chunks:('corrupt',)"] == 1


def test_what_a_full_disk_refuses_is_a_miss_and_is_stored_later(start_target: Any, engines: Any) -> None:
    disk = FullDisk()
    target = start_target(files=disk)
    engine = engines(target.address)
    contents = [engine.fill(row, row + 1) for row in range(2)]
    context = engine.arrive(engine_request(), KEYS)
    disk.full = True
    engine.store(context, KEYS[:2], [0, 1])
    assert engine.counted()["vllm:kvtier_stored_chunks:('refused',)"] == 2
    asked = engine.arrive(engine_request(name="full"), KEYS, plan(target, 2))
    assert engine.load(asked, KEYS[:2], [2, 3]).failed == frozenset(KEYS[:2])
    disk.full = False
    engine.store(context, KEYS[:2], [0, 1])
    asked = engine.arrive(engine_request(name="again"), KEYS, plan(target, 2))
    assert not engine.load(asked, KEYS[:2], [2, 3]).failed
    assert [engine.memory[row].tobytes() for row in (2, 3)] == contents


@pytest.mark.parametrize("mode", ["", "encrypt"])  # mac, where a key is given
def test_sealed_chunks_are_for_those_with_the_key(
    start_target: Any, engines: Any, tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    target, secret = start_target(), "5a" * 32
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{id: 7, key: '{secret}'}}")
    path.chmod(0o600)
    seals = {"seal_key": str(path), "seal": mode}
    contents = stored(engines(target.address, **seals), target)
    name = SealKey(7, bytes.fromhex(secret)).name(chunk_key(DIGEST, (4).to_bytes(32, "big")))
    planter = target.client()
    planted = memoryview(bytes(ROW + TRAILER_BYTES))
    assert planter.put([Item(name, planted, 0, 7, 1)], time.monotonic() + SOON) == [Outcome.STORED]
    planter.close()
    reader, stranger = engines(target.address, **seals), engines(target.address)
    context = reader.arrive(engine_request(), KEYS, plan(target, 5))
    failed = reader.load(context, KEYS[:5], [0, 1, 2, 3, 4]).failed
    assert failed == frozenset([KEYS[4]])
    assert [reader.memory[row].tobytes() for row in range(4)] == contents
    counted = reader.counted()
    assert counted["vllm:kvtier_fetched_chunks:('corrupt',)"] == 1
    assert counted["vllm:kvtier_rejected_values:('unsealed',)"] == 1
    context = stranger.arrive(engine_request(), KEYS, plan(target, 4))
    assert stranger.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(KEYS[:4])
    assert stranger.tier.get_stats().reduce()["vllm:kvtier_fetched_chunks:('miss',)"] == 4
    said = capfd.readouterr().err
    assert f"values are sealed ({mode or 'mac'}) with key 7; opens with 7" in said
    assert f"values are not sealed: this process trusts the targets of {target.address}" in said
    assert secret not in said
    assert str(path) in str(reader.tier.link._process.args)
    assert secret not in str(reader.tier.link._process.args)


def test_chunks_of_a_namespace_are_for_those_with_its_credential(engines: Any, tmp_path: Path) -> None:
    secret = "a secret of tenants, long enough"
    path = tmp_path / "credential"
    path.write_text(secret)
    folder = tmp_path / "site"
    folder.mkdir()
    site = Site(folder, {"a": 8 << 20}, {"a": Credential(secret.encode())})
    try:
        (target,) = site.clients["a"]._membership.targets()
        member, stranger = engines(target, namespace="a", credential_file=str(path)), engines(target, namespace="a")
        for engine, stored_chunks in ((stranger, 0), (member, 1)):
            context = engine.arrive(engine_request(), KEYS[:1], None)
            engine.memory[0] = 7
            job = engine.begin_store(context, KEYS[:1], [0])
            assert engine.result(job).success
            counted = engine.counted()
            assert counted.get("vllm:kvtier_stored_chunks:('stored',)", 0) == stored_chunks
        assert secret not in str(member.tier.link._process.args)
    finally:
        site.close()


def test_a_worker_reaches_targets_with_tls_by_its_certificate(start_target: Any, engines: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    target = start_target(tls=ServerTls(authority.issue("target")))
    cert, key, ca = authority.issue("worker")
    given = {"store_tls_ca": ca, "store_tls_cert": cert, "store_tls_key": key}
    contents = stored(engines(target.address, **given), target)
    for engine, failed in (
        (engines(target.address, **given), []),
        (engines(target.address, store_tls_ca=ca), KEYS[:4]),
    ):
        context = engine.arrive(engine_request(), KEYS, plan(target, 4))
        assert engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed == frozenset(failed)
        assert failed or [engine.memory[row].tobytes() for row in range(4)] == contents
    for wrong in ({**given, "store_tls_key": ""}, {**given, "carrier": "nixl"}):
        with pytest.raises(ConfigError, match="store-tls"):
            engines(target.address, **wrong)


def test_without_a_seal_key_that_can_be_read_an_engine_does_not_start(engines: Any, tmp_path: Path) -> None:
    for seals in ({"seal_key": str(tmp_path / "absent")}, {"seal": "mac"}, {"seal": "other"}):
        with pytest.raises(ConfigError, match="seal"):
            engines("127.0.0.1:9", **seals)


def test_what_the_store_holds_is_not_sent_again(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    received = target.target.status().received_bytes
    again = engines(target.address)
    context = again.arrive(engine_request(), KEYS)
    again.store(context, KEYS[:4], [0, 1, 2, 3])
    assert target.target.status().received_bytes == received


def test_holes_in_the_plan_make_the_worker_offer_everything(start_target: Any, engines: Any) -> None:
    target = start_target()
    engine = engines(target.address)
    whole = make_plan([target.address] * 3, fetch=0, deadline_ms=1, chunk_ms=1, decision_id="d")
    holes = make_plan([target.address, None, None], fetch=0, deadline_ms=1, chunk_ms=1, decision_id="d")
    engine.arrive(engine_request(), KEYS, whole)
    assert engine.policy is OffloadPolicy.CHUNK_LEVEL
    engine.arrive(engine_request(), KEYS, holes)
    assert engine.policy is OffloadPolicy.REQUEST_LEVEL


def test_without_a_plan_the_store_is_asked(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    context = engine.arrive(engine_request(), KEYS)
    engine.ask()
    assert engine.tier.undecided("r")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.RETRY
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    found = [engine.tier.lookup(key, context) for key in KEYS]
    assert found == [LookupResult.HIT] * 4 + [LookupResult.MISS] * 4
    assert not engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed


def test_with_several_groups_the_store_is_asked_whatever_the_plan(start_target: Any, engines: Any) -> None:
    """A plan counts the chunks of one group."""
    target = start_target()
    keys = [offload_key(number, group) for number in range(3) for group in range(2)]
    writer = engines(target.address, groups=2)
    contents = [writer.fill(row, row + 1) for row in range(4)]
    writer.store(writer.arrive(engine_request(), keys), keys[:4], [0, 1, 2, 3])
    hashes = sequence_hashes(list(range(64)), 4)[1::2]
    assert sorted(entry.router_hash for entry in target.log.entries()) == sorted([0, 0, *hashes[:2]])

    reader = engines(target.address, groups=2, lookup_ms=60_000)
    nowhere = make_plan([None] * 3, fetch=3, deadline_ms=1, chunk_ms=1, decision_id="d")
    context = reader.arrive(engine_request(), keys, nowhere)
    assert reader.policy is OffloadPolicy.CHUNK_LEVEL
    reader.ask()
    assert reader.tier.lookup(keys[0], context) is LookupResult.RETRY
    eventually(lambda: (reader.step(), not reader.tier.undecided("r"))[1], SOON)
    assert [reader.tier.lookup(key, context) for key in keys] == [LookupResult.HIT] * 4 + [LookupResult.MISS] * 2
    assert not reader.load(context, keys[:4], [8, 7, 6, 5]).failed
    assert [reader.memory[row].tobytes() for row in (8, 7, 6, 5)] == contents


def test_what_was_not_asked_for_is_a_miss(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(remote_tier.frames, "CHUNKS_MAX", 2)
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    context = engine.arrive(engine_request(), KEYS)
    engine.ask()
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    assert [engine.tier.lookup(key, context) for key in KEYS[:3]] == [LookupResult.HIT] * 2 + [LookupResult.MISS]


def test_an_answer_that_never_comes_is_a_miss(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, lookup_ms=60_000)
    context = engine.arrive(engine_request(), KEYS)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    engine.ask()
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.RETRY
    os.kill(engine.tier.link.pid, signal.SIGKILL)
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    engine.until_ready()
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS


def test_a_plan_has_whole_chunks_alone(start_target: Any, engines: Any) -> None:
    """What ends within a chunk, or where nobody knows, is none of them."""
    target = start_target()
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS[:2], plan(target, 4))
    partial, unknown = offload_key(100), offload_key(101)
    context.set_offload_key_position(partial, 12)
    found = [engine.tier.lookup(key, context) for key in (*KEYS[:2], partial, unknown)]
    assert found == [LookupResult.HIT] * 2 + [LookupResult.MISS] * 2
    engine.store(context, [partial, unknown], [0, 1])  # which says no more than that they are there
    assert [entry.router_hash for entry in target.log.entries()] == [0, 0]


def test_a_request_may_keep_to_what_is_near(start_target: Any, engines: Any) -> None:
    target = start_target()
    engine = engines(target.address)
    manager = HoldingTieringManager(primary(), [engine.tier])
    for name, near in (("near", Locality.LOCAL), ("far", Locality.REMOTE)):
        params = {FIELD: msgspec.to_builtins(plan(target, 1))}
        context = ReqContext(name, params, load_tier_filter=TierFilter((TierMatcher(Medium.STORAGE, near),)))
        context.set_offload_key_position(KEYS[0], 8)
        manager.on_new_request(context)
        engine.tier.identify(name, DIGEST)
        found = LookupResult.MISS if near is Locality.LOCAL else LookupResult.HIT_PENDING
        assert manager.lookup(KEYS[0], context) is found


def test_an_answer_that_comes_at_once_is_waited_for_and_another_is_not(
    start_target: Any, engines: Any, monkeypatch: Any
) -> None:
    target = start_target()
    engine = engines(target.address)
    request = engine_request()
    engine.fill(0, 1)
    engine.store(engine.arrive(request, KEYS[:2]), KEYS[:1], [0])
    monkeypatch.setattr(remote_tier, "_ANSWER_SECONDS", SOON)
    engine.step()  # which begins a new budget
    context = engine.arrive(engine_request(name="there"), KEYS[:2])
    engine.ask("there")
    engine.tier.await_answer("there", 0.0)
    assert not engine.tier.undecided("there")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.HIT
    monkeypatch.setattr(remote_tier, "_ANSWER_SECONDS", 0.001)
    engine.step()
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    for name in ("late", "later"):
        engine.arrive(engine_request(name=name), KEYS[:2])
        engine.ask(name)
        engine.tier.await_answer(name, 0.0)
        assert engine.tier._waited_seconds >= 0.001  # a step waits once, however many requests come in it
    os.kill(engine.tier.link.pid, signal.SIGCONT)
    eventually(lambda: (engine.step(), not engine.tier.undecided("later"))[1], SOON)


def test_chunks_that_are_about_to_come_are_waited_for(start_target: Any, engines: Any) -> None:
    target = start_target()
    writer, engine = engines(target.address), engines(target.address)
    stored(writer, target)

    def arrives(name: str, *, stops: bool = False) -> None:
        context = engine.arrive(engine_request(name=name), KEYS[:4])
        engine.ask(name)
        engine.tier.await_answer(name, SOON)
        if stops:
            os.kill(engine.tier.link.pid, signal.SIGSTOP)
        engine.begin_load(context, KEYS[:4], [0, 1, 2, 3])

    def waits(name: str, spare_seconds: float) -> bool:
        """Whether this step does."""
        engine.step()
        assert not engine.tier.await_chunks(name, spare_seconds)
        return bool(engine.tier._waited_seconds)

    assert not engine.tier.await_chunks("nobody", SOON)
    arrives("late", stops=True)
    assert not waits("late", SOON)  # before it is known how fast they come
    engine.tier._store_bytes_per_second = 1e9
    assert not waits("late", 0.0)
    assert waits("late", 0.05)
    waited = engine.tier._waited_seconds
    assert not engine.tier.await_chunks("late", 0.05)
    assert engine.tier._waited_seconds == waited >= 0.05  # a step waits so long in all
    os.kill(engine.tier.link.pid, signal.SIGCONT)
    assert engine.tier.await_chunks("late", SOON)
    assert engine.tier.await_chunks("another", SOON)  # whose chunks may be among them
    engine.step()
    assert [result.failed for result in engine.results.values()] == [frozenset()]
    assert not engine.tier.await_chunks("late", SOON)


def test_however_many_requests_wait_a_step_listens_once(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    engine = engines(start_target().address)
    names = [f"r{number}" for number in range(4)]
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    for number, name in enumerate(names):
        context = engine.arrive(engine_request(name=name), KEYS[number : number + 1])
        engine.ask(name)
        engine.tier._requests[name].answer(["somewhere"], SOON)
        engine.begin_load(context, KEYS[number : number + 1], [number])
    engine.step()
    listened = []
    monkeypatch.setattr(engine.tier.link, "receive", lambda: listened.append(1) or [])
    for _ in range(2):
        for name in names:
            assert not engine.tier.await_chunks(name, SOON)
    assert len(listened) == 1
    os.kill(engine.tier.link.pid, signal.SIGCONT)


def test_a_store_that_is_not_there_is_a_miss(engines: Any) -> None:
    engine = engines("127.0.0.1:9")
    context = engine.arrive(engine_request(), KEYS)
    engine.ask()
    eventually(lambda: (engine.step(), not engine.tier.undecided("r"))[1], SOON)
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    engine.store(context, KEYS[:4], [0, 1, 2, 3])  # and nothing waits for it
    assert engine.counted()["vllm:kvtier_stored_chunks:('unreachable',)"] == 4


def test_before_the_mover_is_up_everything_is_a_miss_and_nothing_waits(start_target: Any, engines: Any) -> None:
    target = start_target()
    engine = engines(target.address, wait=False)
    assert not engine.tier.link.ready
    context = engine.arrive(engine_request(name="early"), KEYS)
    engine.ask("early")
    assert not engine.tier.undecided("early")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    late = engine.arrive(engine_request(name="late"), KEYS, plan(target, 4, deadline_ms=1))
    job = engine.begin_load(late, KEYS[:4], [0, 1, 2, 3])
    assert engine.result(job).failed == frozenset(KEYS[:4])
    engine.until_ready()


def test_a_deadline_ends_a_fetch_and_all_waiting(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    stuck = threading.Event()
    monkeypatch.setattr(target.target, "_get", lambda *_: stuck.wait(SOON))
    engine = engines(target.address)
    monkeypatch.setattr(remote_tier, "HUNG_SECONDS", SOON)  # a machine under load lets the mover wait, too
    context = engine.arrive(engine_request(), KEYS, plan(target, 4, deadline_ms=1000))
    started = time.monotonic()
    job = engine.begin_load(context, KEYS[:4], [0, 1, 2, 3])
    assert not engine.tier.gave_up("r")
    assert engine.result(job).failed == frozenset(KEYS[:4])
    assert time.monotonic() - started > 0.9
    assert not stuck.is_set()
    assert engine.tier.gave_up("r")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    assert engine.tier.link.starts == 1  # it was the target that stalled, not the mover
    assert engine.counted()["vllm:kvtier_fetch_timeout_chunks"] == 4
    stuck.set()


def test_a_request_that_leaves_stops_its_fetch(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    stuck = threading.Event()
    get = target.target._get
    monkeypatch.setattr(target.target, "_get", lambda *all_of_it: stuck.wait(SOON) and get(*all_of_it))
    engine = engines(target.address, fetch_threads=1)
    first = engine.arrive(engine_request(), KEYS, plan(target, 4))
    one = engine.begin_load(first, KEYS[:4], [0, 1, 2, 3])
    second = engine.arrive(engine_request(name="s"), KEYS, plan(target, 4))
    other = engine.begin_load(second, KEYS[:4], [4, 5, 6, 7])
    engine.tier.cancel("s")
    assert engine.result(other).failed == frozenset(KEYS[:4])
    assert engine.tier.lookup(KEYS[0], second) is LookupResult.MISS
    assert one not in engine.results
    stuck.set()
    assert not engine.result(one).failed
    assert not engine.tier.has_pending_work()
    assert engine.counted()["vllm:kvtier_fetch_timeout_chunks"] == 0  # its client left, no deadline was missed


def test_puts_beyond_the_bound_pin_nothing_and_wait_for_their_turn(start_target: Any, engines: Any) -> None:
    target = start_target()
    engine = engines(target.address)  # 4 of 16 rows
    context = engine.arrive(engine_request(), KEYS)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    kept = engine.begin_store(context, KEYS[:4], [0, 1, 2, 3])
    left_over = engine.begin_store(context, KEYS[4:], [4, 5, 6, 7])
    assert engine.result(left_over).success
    assert kept not in engine.results
    engine.tier.on_request_finished(context)  # its tokens are still known when the rest is stored
    asked: list[list[Any]] = []

    def pin(keys: list[Any], of: ReqContext) -> TransferJob:
        """As the manager does; the last one is no longer in DRAM."""
        asked.append(keys)
        job: TransferJob = engine.job(of, keys[:-1], [4, 5, 6][: len(keys) - 1])
        return job

    engine.tier.store_leftovers(pin)
    assert not asked  # no room yet
    os.kill(engine.tier.link.pid, signal.SIGCONT)
    engine.result(kept)
    engine.tier.store_leftovers(pin)
    assert asked == [KEYS[4:]]
    eventually(lambda: (engine.step(), len(target.log) == 7)[1], SOON)
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert engine.tier.puts._rows == 0
    assert engine.counted()["vllm:kvtier_stored_chunks:('dropped',)"] == 1
    hashes = sequence_hashes(list(range(64)), 4)[1::2]
    assert {entry.router_hash for entry in target.log.entries()} == set(hashes[:7])


def test_what_waits_for_a_put_is_gone_after_a_drain(start_target: Any, engines: Any) -> None:
    """DRAM is about to be emptied: its rows belong to others then."""
    target = start_target()
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS)
    jobs = [engine.begin_store(context, KEYS[start : start + 4], list(range(start, start + 4))) for start in (0, 4)]
    assert [leftover.keys for leftover in engine.tier.puts._leftovers] == [KEYS[4:]]
    engine.tier.drain_jobs()
    engine.step()
    assert set(jobs) <= set(engine.results)
    engine.tier.store_leftovers(lambda keys, of: pytest.fail("pinned"))
    assert engine.tier.puts._leftover_chunks == 0
    assert not engine.tier.has_pending_work()
    assert len(target.log) == 4


def test_what_waits_for_a_put_is_bounded(start_target: Any, engines: Any) -> None:
    target = start_target()
    engine = engines(target.address, rows=16)
    keys = [offload_key(number) for number in range(40)]
    context = engine.arrive(engine_request(), keys)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    for start in range(0, 40, 8):
        engine.begin_store(context, keys[start : start + 8], list(range(8)))
    assert engine.tier.puts._leftover_chunks == 16
    assert [leftover.keys for leftover in engine.tier.puts._leftovers] == [keys[24:32], keys[32:]]
    assert engine.counted()["vllm:kvtier_stored_chunks:('dropped',)"] == 20
    os.kill(engine.tier.link.pid, signal.SIGCONT)


def test_rows_being_filled_are_bounded(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("components.worker.puts.ROWS_SHARE", 0.5)
    target = start_target()
    stored(engines(target.address), target, 8)
    engine = engines(target.address)  # 4 of 16 rows
    context = engine.arrive(engine_request(), KEYS, plan(target, 8))
    found = [engine.tier.lookup(key, context) for key in KEYS]
    assert found == [LookupResult.HIT] * 4 + [LookupResult.RETRY] * 4
    job = engine.begin_load(context, KEYS[:4], [0, 1, 2, 3])
    engine.tier.on_schedule_end(None)
    assert engine.tier.lookup(KEYS[4], context) is LookupResult.RETRY
    could_begin = engine.arrive(engine_request(name="next"), KEYS, plan(target, 8))
    assert engine.tier.lookup(KEYS[0], could_begin) is LookupResult.RETRY
    engine.tier.hurry("next")
    assert engine.tier.lookup(KEYS[0], could_begin) is LookupResult.MISS
    engine.result(job)
    assert engine.tier.lookup(KEYS[4], context) is LookupResult.HIT


def test_a_fetch_that_costs_more_than_computing_is_cut(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    stuck = threading.Event()
    get = target.target._get
    monkeypatch.setattr(target.target, "_get", lambda *all_of_it: stuck.wait(SOON) and get(*all_of_it))
    engine = engines(target.address, fetch_threads=1)
    context = engine.arrive(engine_request(), KEYS, plan(target, 4))
    jobs = [engine.begin_load(context, [KEYS[chunk]], [chunk]) for chunk in range(4)]
    engine.tier.prefill = Prefill(0.0, 1e-3, 0.0)
    engine.tier._store_bytes_per_second = 1000.0  # four seconds a chunk, against 8 ms
    engine.step()
    assert not engine.tier.gave_up("r")  # it queues: the fetch costs nobody anything
    engine.tier.hurry("r")
    engine.step()
    assert engine.tier.gave_up("r")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    assert all(engine.result(job).failed for job in jobs[1:])
    assert engine.counted()["vllm:kvtier_fetch_abandoned_chunks"] == 4
    stuck.set()
    engine.result(jobs[0])


def test_router_hashes_of_salted_adapted_and_illustrated_requests(start_target: Any, engines: Any) -> None:
    """What the target announces is what the router computes from the tokens; 0 for what it cannot compute."""
    target = start_target()
    engine = engines(target.address)
    tokens = list(range(64))
    salted, adapted, illustrated = (engine_request(name=name) for name in ("salted", "adapted", "illustrated"))
    salted.cache_salt = "dynamo-cache-salt:tenant"
    adapted.lora_request = SimpleNamespace(name="adapter")
    illustrated.mm_features = ["an image"]
    expected = {
        "r": sequence_hashes(tokens, 4)[3],
        "salted": sequence_hashes(tokens, 4, cache_namespace="tenant")[3],
        "adapted": sequence_hashes(tokens, 4, lora_name="adapter")[3],
        "illustrated": 0,
    }
    for number, request in enumerate((engine_request(), salted, adapted, illustrated)):
        keys = [offload_key(100 + 10 * number + chunk) for chunk in range(2)]
        context = engine.arrive(request, keys)
        engine.store(context, keys[1:], [0])
        entry = target.log.find(chunk_key(DIGEST, (101 + 10 * number).to_bytes(32, "big")))
        assert entry is not None
        assert entry.router_hash == expected[request.request_id]


@pytest.mark.parametrize("same", [True, False])
def test_only_the_same_layout_group_and_block_hash_hit(start_target: Any, engines: Any, same: bool) -> None:
    """A block hash carries LoRA and salt (see the engine's own tests); the layout and the group are in the key."""
    target = start_target()
    contents = stored(engines(target.address), target)
    for digest, wanted in [(b"\x08" * 32, KEYS), (DIGEST, [offload_key(n, 1) for n in range(4)]), (DIGEST, KEYS[4:])]:
        other = engines(target.address, digest=DIGEST if same else digest)
        keys = KEYS[:4] if same else wanted[:4]
        context = other.arrive(engine_request(), keys, plan(target, 4))
        result = other.load(context, keys, [0, 1, 2, 3])
        assert result.failed == (frozenset() if same else frozenset(keys))
        if same:
            assert [other.memory[row].tobytes() for row in range(4)] == contents


def test_an_engine_that_was_idle_uses_the_store_for_its_first_request(start_target: Any, engines: Any) -> None:
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, wait=False, lookup_ms=60_000)
    eventually(lambda: select.select([engine.tier.link._socket], [], [], 0)[0], SOON)  # ready, and nobody has listened
    engine.arrive(engine_request(), KEYS)
    engine.ask()
    assert engine.tier.undecided("r")


def test_a_job_of_many_chunks_to_store_is_one_job(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("components.worker.puts.PIECE_CHUNKS", 3)
    monkeypatch.setattr("components.worker.puts.ROWS_SHARE", 1.0)
    target = start_target()
    engine = engines(target.address)
    stored(engine, target, 8)
    assert not engine.tier.has_pending_work()
    assert engine.counted()["vllm:kvtier_stored_chunks:('stored',)"] == 8


def test_puts_that_are_never_answered_end_with_the_mover(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("components.worker.puts.HUNG_SECONDS", 3.0)
    target = start_target()
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    assert engine.result(engine.begin_store(context, KEYS[:2], [0, 1])).success
    assert engine.tier.puts._rows == 0
    engine.until_ready()
    assert engine.tier.link.starts == 2


def test_puts_give_way_to_loads(start_target: Any, engines: Any, monkeypatch: Any) -> None:
    """While a load is under way a put waits, but not for ever."""
    target = start_target()
    stored(engines(target.address), target)
    stuck = threading.Event()
    get = target.target._get
    monkeypatch.setattr(target.target, "_get", lambda *all_of_it: stuck.wait(SOON) and get(*all_of_it))
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS, plan(target, 4))
    load = engine.begin_load(context, KEYS[:4], [0, 1, 2, 3])
    began = time.monotonic()
    engine.store(context, KEYS[4:5], [4])
    assert time.monotonic() - began >= PUT_PATIENCE_SECONDS
    assert load not in engine.results
    stuck.set()
    assert not engine.result(load).failed
