"""The mover under faults, as a real process between a tier and real targets: whatever ends, hangs, is slow or lies, the
rows of a load are given back only when nobody can write to them any more, and the next load is served."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.v1.kv_offload.base import LookupResult

from components.worker.mover import frames
from components.worker.mover.__main__ import PUT_BYTES, SAMPLE_SECONDS
from components.worker.mover.frames import Loaded
from components.worker.mover.link import MoverLink
from components.worker.remote_tier import RemoteTier
from graphs.services import free_port
from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.net import wire
from kvstore.net.membership import Registration
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome
from tests.conftest import eventually, soon, start_server, stop_server
from tests.kvstore.test_client import Impostor, value
from tests.worker.stock import offload_key
from tests.worker.test_tier import (
    KEYS,
    ROW,
    SOON,
    Engine,
    engine_request,
    engines,  # noqa: F401  a fixture
    plan,
    stored,
)

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended; one that waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Trickle:
    """A target that sends each value byte by byte, as far as it is let."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.impostor = Impostor(self._answer)
        self.address = self.impostor.address

    def _answer(self, stream: Stream, header: Header, control: bytes) -> None:
        if header.op is not Op.GET:
            raise ConnectionError  # whoever asks for anything else finds that it hangs up
        for number in range(len(wire.decode_control(control, wire.Get).keys)):
            first, rest = value(header, b"\xff" * ROW, number=number)
            stream.send([first, rest[:100]], soon(SOON))
            self.begun.set()
            self.go_on.wait(SOON)
            stream.send([rest[100:]], soon(SOON))


# ---- the process


def test_importing_it_brings_in_neither_torch_nor_the_engine() -> None:
    heavy = ("torch", "vllm", "dynamo", "etcd3")
    check = f"import components.worker.mover.__main__, sys; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_it_ends_with_the_engine(stopped: bool) -> None:
    """Even with an engine that is killed, and even if it was stopped itself."""
    program = """
import os, sys, time
from components.worker.mover.link import MoverLink
from components.worker.mover.frames import Settings, Setup
fd = os.memfd_create("rows")
os.ftruncate(fd, 4096)
link = MoverLink(Setup(Settings(store="127.0.0.1:9"), fd, 4096, 4096, 4, 2))
while not link.ready:
    list(link.receive())
    time.sleep(0.01)
print(link.pid, flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    engine = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    mover = int(engine.stdout.readline())
    if stopped:
        os.kill(mover, signal.SIGSTOP)
    assert alive(mover)
    engine.kill()
    engine.wait()
    engine.stdout.close()
    eventually(lambda: not alive(mover), SOON)


def test_one_that_cannot_start_is_tried_again_ever_more_seldom(monkeypatch: Any, engines: Any) -> None:  # noqa: F811
    monkeypatch.setattr("components.worker.mover.link.RESTART_SECONDS", (0.01, 0.05))
    engine = engines("127.0.0.1:9", wait=False)
    settings = frames.Settings(store="etcd://127.0.0.1:9")
    engine.tier.link._setup = msgspec.structs.replace(engine.tier.link._setup, settings=settings)
    os.kill(engine.tier.link.pid, signal.SIGKILL)
    eventually(lambda: (engine.step(), engine.tier.link.starts >= 3)[1], SOON)
    context = engine.arrive(engine_request(), KEYS)
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS


# ---- its death


def test_when_it_is_killed_its_jobs_are_misses_and_the_next_one_serves(start_target: Any, engines: Any) -> None:  # noqa: F811
    target, trickle = start_target(), Trickle()
    engine = engines(f"{target.address},{trickle.address}")
    store = engines(target.address)
    contents = stored(store, target)
    context = engine.arrive(engine_request(), KEYS, plan(trickle, 4))
    load = engine.begin_load(context, KEYS[:4], [0, 1, 2, 3])
    put = engine.begin_store(context, KEYS[4:6], [4, 5])
    assert trickle.begun.wait(SOON)
    os.kill(engine.tier.link.pid, signal.SIGKILL)
    assert engine.result(load).failed == frozenset(KEYS[:4])
    assert engine.result(put).success
    assert not engine.tier.has_pending_work()
    assert engine.tier._load_rows == engine.tier.puts._rows == 0
    trickle.go_on.set()
    engine.until_ready()
    assert engine.tier.link.starts == 2
    again = engine.arrive(engine_request(name="again"), KEYS, plan(target, 4))
    assert not engine.load(again, KEYS[:4], [0, 1, 2, 3]).failed
    assert [engine.memory[row].tobytes() for row in range(4)] == contents
    assert engine.counted()["vllm:kvtier_mover_restarts"] == 1


def test_router_hashes_survive_it(start_target: Any, engines: Any) -> None:  # noqa: F811
    """The new one has not heard the tokens that the old one had."""
    target = start_target()
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS)
    engine.store(context, KEYS[:1], [0])
    os.kill(engine.tier.link.pid, signal.SIGKILL)
    eventually(lambda: (engine.step(), engine.tier.link.dead or not engine.tier.link.ready)[1], SOON)
    engine.until_ready()
    engine.store(context, KEYS[3:4], [3])
    assert len(target.log) == 2
    assert all(entry.router_hash for entry in target.log.entries())


def test_a_put_says_where_its_chunks_stand_and_ends_at_a_refusal(engines: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr("components.worker.puts.ROWS_SHARE", 1.0)
    row_bytes = PUT_BYTES // 2 + 4096  # one chunk a put
    items: list[wire.PutItem] = []

    def answer(stream: Stream, header: Header, control: bytes) -> None:
        if header.op is Op.EXISTS:
            missing = [Outcome.MISS] * len(wire.decode_control(control, wire.Exists).keys)
            stream.send([wire.encode(Header(Op.FOUND, header.request), wire.Outcomes(missing))], soon())
            return
        (item,) = wire.decode_control(control, wire.Put).items
        stream.receive(memoryview(bytearray(item.length)), soon())
        items.append(item)
        outcome = Outcome.REFUSED if len(items) == 3 else Outcome.STORED
        stream.send([wire.encode(Header(Op.STORED, header.request), wire.Outcomes([outcome]))], soon())

    engine = engines(Impostor(answer).address, row_bytes=row_bytes)
    engine.store(engine.arrive(engine_request(), KEYS), KEYS[:5], list(range(5)))
    hashes = [item.router_hash for item in items]
    assert len(hashes) == 3
    assert all(hashes)
    assert [item.position for item in items] == [0, 1, 2]
    assert [item.parent for item in items] == [0, *hashes[:2]]


def test_one_that_hangs_is_killed_and_reaped_before_its_loads_are_given_back(engines: Any) -> None:  # noqa: F811
    """Stopped in the middle of a value. Were its load reported before it is gone, it could go on writing to rows that
    belong to others by then; the rest of the value is let loose to show that it does not."""
    trickle = Trickle()
    engine = engines(trickle.address)
    context = engine.arrive(engine_request(), KEYS, plan(trickle, 2, deadline_ms=3000))
    load = engine.begin_load(context, KEYS[:2], [0, 1])
    assert trickle.begun.wait(SOON)
    mover = engine.tier.link.pid
    os.kill(mover, signal.SIGSTOP)
    eventually(lambda: engine.tier.gave_up("r"), SOON)  # the request waits no longer than its deadline
    engine.step()
    assert load not in engine.results or engine.tier.link.dead
    assert engine.result(load).failed == frozenset(KEYS[:2])
    assert not alive(mover)
    before = engine.memory[:2].copy()
    engine.memory[:2] = 7
    trickle.go_on.set()
    engine.until_ready()
    assert (engine.memory[:2] == 7).all()
    assert not (before == 7).all()


def test_a_mover_that_was_let_live_would_have_written(engines: Any) -> None:  # noqa: F811
    """The control of the test above: continued rather than killed, it does write."""
    trickle = Trickle()
    engine = engines(trickle.address)
    context = engine.arrive(engine_request(), KEYS, plan(trickle, 1))
    load = engine.begin_load(context, KEYS[:1], [0])
    assert trickle.begun.wait(SOON)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    engine.memory[0, 100:] = 7  # the rest may be there already
    trickle.go_on.set()
    os.kill(engine.tier.link.pid, signal.SIGCONT)
    assert not engine.result(load).failed
    assert (engine.memory[0, 100:] == -1).all()


def test_one_that_says_nonsense_is_ended(start_target: Any, engines: Any) -> None:  # noqa: F811
    target = start_target()
    engine = engines(target.address)
    first = engine.tier.link.pid
    engine.tier._loaded(Loaded(12345, b"\x00", 0.0))
    assert not engine.tier.link.ready
    engine.until_ready()
    assert not alive(first)
    assert engine.tier.link.starts == 2


def test_draining_ends_with_every_job_answered_even_if_it_hangs(monkeypatch: Any, engines: Any) -> None:  # noqa: F811
    monkeypatch.setattr("components.worker.remote_tier._DRAIN_SECONDS", 0.5)
    trickle = Trickle()
    engine = engines(trickle.address)
    context = engine.arrive(engine_request(), KEYS, plan(trickle, 2))
    load = engine.begin_load(context, KEYS[:2], [0, 1])
    put = engine.begin_store(context, KEYS[2:4], [2, 3])
    assert trickle.begun.wait(SOON)
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    engine.tier.drain_jobs()
    engine.step()
    assert {load, put} <= set(engine.results)
    trickle.go_on.set()


def test_commands_that_nobody_takes_are_bounded(engines: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr("components.worker.mover.link.COMMANDS_MAX", 20)
    monkeypatch.setattr("components.worker.remote_tier.LOAD_SHARE", 1.0)
    engine = engines("127.0.0.1:9")
    os.kill(engine.tier.link.pid, signal.SIGSTOP)
    target = type("Nowhere", (), {"address": "127.0.0.1:9"})
    for number in range(20_000):
        context = engine.arrive(engine_request(name=str(number)), KEYS, plan(target, 8, deadline_ms=500))
        engine.begin_load(context, KEYS, list(range(8)))
        if len(engine.tier.link._waiting) >= 20 and engine.tier._finished:
            break
    assert len(engine.tier.link._waiting) <= 20
    eventually(lambda: (engine.step(), not engine.tier.has_pending_work())[1], SOON)
    assert engine.tier._load_rows == 0
    assert all(not result.success or result.failed == frozenset(KEYS) for result in engine.results.values())


# ---- targets at fault


def wrong_key(stream: Stream, header: Header, control: bytes) -> None:
    stream.send(value(header, b"\x01" * ROW, number=5), soon(SOON))


def wrong_length(stream: Stream, header: Header, control: bytes) -> None:
    stream.send(value(header, b"\x01" * (ROW - 1)), soon(SOON))


def wrong_checksum(stream: Stream, header: Header, control: bytes) -> None:
    for number in range(len(wire.decode_control(control, wire.Get).keys)):
        stream.send(value(header, b"\x01" * ROW, number=number, crc=1), soon(SOON))


def other_protocol(stream: Stream, header: Header, control: bytes) -> None:
    stream.send([b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99)], soon(SOON))


@pytest.mark.parametrize("lie", [wrong_key, wrong_length, wrong_checksum, other_protocol])
def test_a_target_that_lies_is_not_believed(lie: Callable[..., None], engines: Any) -> None:  # noqa: F811
    liar = Impostor(lie)
    engine = engines(liar.address)
    context = engine.arrive(engine_request(), KEYS, plan(liar, 2))
    assert engine.load(context, KEYS[:2], [0, 1]).failed == frozenset(KEYS[:2])
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    assert engine.tier.link.starts == 1


def test_a_target_that_is_slow_gives_what_it_can_by_the_deadline(engines: Any) -> None:  # noqa: F811
    released = threading.Event()

    def slow(stream: Stream, header: Header, control: bytes) -> None:
        stream.send(value(header, b"\x01" * ROW, number=0), soon(SOON))
        released.wait(SOON)

    target = Impostor(slow)
    engine = engines(target.address)
    context = engine.arrive(engine_request(), KEYS, plan(target, 3, deadline_ms=4000))
    assert engine.load(context, KEYS[:3], [0, 1, 2]).failed == frozenset(KEYS[1:3])
    assert (engine.memory[0] == 1).all()
    assert engine.tier.link.starts == 1
    released.set()


def test_loads_that_were_called_off_do_not_count_as_slow(engines: Any) -> None:  # noqa: F811
    """Or the store would look slower for each, until nothing is fetched any more."""
    row_bytes, stall, stalled, released = 1 << 20, threading.Event(), threading.Event(), threading.Event()

    def answer(stream: Stream, header: Header, control: bytes) -> None:
        if header.op is not Op.GET:
            raise ConnectionResetError
        for number in range(len(wire.decode_control(control, wire.Get).keys)):
            if stall.is_set():
                stalled.set()
                released.wait(SOON)
            stream.send(value(header, b"\x01" * row_bytes, number=number), soon(SOON))

    target = Impostor(answer)
    engine = engines(target.address, row_bytes=row_bytes)
    context = engine.arrive(engine_request(), KEYS, plan(target, 8))
    assert not engine.load(context, KEYS, list(range(8))).failed
    speed = engine.tier._store_bytes_per_second
    assert speed > 0
    stall.set()
    left = engine.arrive(engine_request(name="left"), KEYS, plan(target, 8))
    job = engine.begin_load(left, KEYS, list(range(8)))
    assert stalled.wait(SOON)
    time.sleep(SAMPLE_SECONDS + 0.1)  # long enough for a sample
    engine.tier.cancel("left")
    engine.arrive(engine_request(name="asks"), KEYS)
    engine.ask("asks")
    eventually(lambda: (engine.step(), not engine.tier.undecided("asks"))[1], SOON)
    # The mover takes commands in order: it knows now that the load is called off.
    released.set()
    assert engine.result(job).failed
    now = engine.tier._store_bytes_per_second
    assert now == 0 or now > speed / 4  # 0: that was long ago


@pytest.fixture
def store_process(tmp_path: Path, nats_url: str) -> Any:
    """A target in a process of its own, and its address."""
    address = f"127.0.0.1:{free_port()}"
    sizes = ["--capacity", "64MiB", "--segment-size", "4MiB", "--buffers", "32MiB", "--nats", nats_url]
    command = [sys.executable, "-m", "kvstore", "--dir", str(tmp_path), "--listen", address, *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.address = address
    assert process.stdout is not None
    assert "ready at" in process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["stalled", "dead"])
def test_a_target_that_stalls_or_dies_costs_the_deadline_at_most(
    store_process: Any,
    engines: Any,  # noqa: F811
    fault: signal.Signals,
) -> None:
    engine = engines(store_process.address)
    content = engine.fill(0, 1)
    context = engine.arrive(engine_request(), KEYS)
    engine.store(context, KEYS[:1], [0])
    fine = engine.arrive(engine_request(name="fine"), KEYS, plan(store_process, 1))
    assert not engine.load(fine, KEYS[:1], [1]).failed
    assert engine.memory[1].tobytes() == content
    store_process.send_signal(fault)
    eventually(lambda: state_of(store_process.pid) in "TZ", SOON)  # until then it may still answer
    lost = engine.arrive(engine_request(name="lost"), KEYS, plan(store_process, 1, deadline_ms=500))
    assert engine.load(lost, KEYS[:1], [2]).failed == frozenset(KEYS[:1])
    assert engine.tier.link.starts == 1
    if fault == signal.SIGSTOP:
        store_process.send_signal(signal.SIGCONT)

        def served() -> bool:
            name = f"again {random.random()}"
            back = engine.arrive(engine_request(name=name), KEYS, plan(store_process, 1))
            return not engine.load(back, KEYS[:1], [3]).failed

        eventually(served, SOON)
        assert engine.memory[3].tobytes() == content


# ---- the bus and etcd


async def test_what_it_measures_is_on_the_bus_each_second(nats_url: str, start_target: Any) -> None:
    target = start_target()
    line = await Bus.connect(nats_url, "test")
    heard: list[WorkerReport] = []

    async def hear(report: WorkerReport) -> None:
        heard.append(report)

    await line.subscribe(messages.subject("default", "speed.worker"), WorkerReport, hear)
    engine = Engine(target.address, nats=nats_url, endpoint="a.b.c")
    try:
        await asyncio.to_thread(engine.until_ready)
        engine.tier.prefill = engine.tier.prefill._replace(base_seconds=0.5, seconds_per_token=0.25)
        engine.tier.tell_pace(2e9, 3, (5, 8, 1, 2))
        until = time.monotonic() + SOON
        while not any(report.queue == 3 for report in heard) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        report = heard[-1]
        assert (report.endpoint, report.chunk_bytes, report.queue) == ("a.b.c", ROW, 3)
        assert (report.prefill_base_seconds, report.prefill_seconds_per_token) == (0.5, 0.25)
        assert (report.dram_bytes_per_second, report.bytes_per_token) == (2e9, ROW // 8)
        assert (report.hbm_blocks, report.hbm_blocks_max, report.dram_chunks, report.dram_chunks_max) == (5, 8, 1, 2)
    finally:
        engine.close()
        await line.close()


def test_without_nats_it_serves(start_target: Any, engines: Any) -> None:  # noqa: F811
    target = start_target()
    stored(engines(target.address), target)
    engine = engines(target.address, nats="nats://127.0.0.1:9")
    context = engine.arrive(engine_request(), KEYS, plan(target, 4))
    assert not engine.load(context, KEYS[:4], [0, 1, 2, 3]).failed


def test_etcd_may_come_late_and_go(start_target: Any, engines: Any, monkeypatch: Any, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setattr("components.worker.mover.link.RESTART_SECONDS", (0.2, 0.5))
    target = start_target()
    stored(engines(target.address), target)
    port, peers = free_port(), free_port()
    engine = engines(f"etcd://127.0.0.1:{port}", wait=False)
    eventually(lambda: (engine.step(), engine.tier.link.starts > 1)[1], SOON)
    context = engine.arrive(engine_request(name="early"), KEYS)
    engine.ask("early")
    assert engine.tier.lookup(KEYS[0], context) is LookupResult.MISS
    arguments = [
        f"--data-dir={tmp_path / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-cluster=default=http://127.0.0.1:{peers}",
    ]
    server = start_server("etcd", arguments, port)
    registration = Registration(f"127.0.0.1:{port}", "default", target.address)
    try:

        def served() -> bool:
            back = engine.arrive(engine_request(name=f"r{random.random()}"), KEYS, plan(target, 4))
            return not getattr(engine.load(back, KEYS[:4], [0, 1, 2, 3]), "failed", True)

        eventually(served, SOON)
        stop_server(server)
        assert served()
    finally:
        registration._closed.set()
        stop_server(server)


# ---- order


def test_first_chunks_and_requests_that_could_begin_come_first(engines: Any) -> None:  # noqa: F811
    """One load at a time. A long request came first, then a short one, then one that the engine has a slot for."""
    target = Trickle()
    engine = engines(target.address, fetch_threads=1, rows=64, row_bytes=ROW)
    engine.tier.row_bytes = 1 << 30  # so that a piece is owed a second
    names = [offload_key(number) for number in range(32)]
    loads = []
    for name, chunks in (("long", 8), ("short", 1), ("next", 2)):
        context = engine.arrive(engine_request(name=name), names, plan(target, 32))
        for chunk in range(chunks):
            job = engine.begin_load(context, [names[chunk]], [len(loads)])
            loads.append((job, f"{name} {chunk}"))
        if name == "long":
            assert target.begun.wait(SOON)
    engine.tier.hurry("next")
    extra = engine.arrive(engine_request(name="extra"), names, plan(target, 32))
    last = engine.begin_load(extra, names[:1], [63])
    engine.tier.cancel("extra")
    engine.result(last)  # so the mover has heard of all
    target.go_on.set()
    eventually(lambda: (engine.step(), len(engine.results) == len(loads))[1], SOON)
    order = [dict(loads)[job] for job in engine.results]
    assert order[:5] == ["long 0", "next 0", "next 1", "short 0", "long 1"]
    assert order[5:] == [f"long {chunk}" for chunk in range(2, 8)]


def test_a_tier_has_no_threads_in_the_engine(start_target: Any, engines: Any) -> None:  # noqa: F811
    before = set(threading.enumerate())  # others' may end meanwhile
    engine = engines("127.0.0.1:9")
    assert isinstance(engine.tier, RemoteTier)
    assert isinstance(engine.tier.link, MoverLink)
    assert set(threading.enumerate()) <= before
