"""The store at fault under a real engine: tokens and logprobs are those of the same prompt computed from nothing.

One engine in this process, which seals what it stores. Between it and its target is a gate, which lets bytes through or
answers in the target's place. That wrong KV changes an answer where nothing is sealed is shown in test_kinds.py.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from benchmarks.chat.__main__ import ENGINE_ENVIRONMENT
from components.worker.transfer import Options, transfer_config
from graphs.services import free_port
from graphs.tiny_model import ALPHABET, make_tiny_model
from graphs.trial import BLOCK_TOKENS
from kvstore.bus.plan import FIELD, make_plan
from kvstore.disk.log import Log
from kvstore.disk.shelf import Shelf
from kvstore.errors import validated
from kvstore.net import transport, wire
from kvstore.net.target import Target
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op
from kvstore.seal import TRAILER_BYTES
from tests.conftest import MIB, FullDisk, eventually, seal_keys, soon
from tests.kvstore.test_client import Impostor, value

pytestmark = pytest.mark.engine

CHUNKS = 3
CHUNK_BYTES = 512 << 10
VALUE_BYTES = CHUNK_BYTES + TRAILER_BYTES
# Of a fetch; what no target answers costs a request as much.
DEADLINE_MS = 3000.0
ADAPTER = "adapter"


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


class Engine:
    """vLLM with the tier, stepped by the caller."""

    def __init__(self, folder: Path, store: str):
        from vllm import LLM

        self._store = store
        model = make_tiny_model(folder / "model")
        self.lora = make_adapter(folder / ADAPTER)
        self._llm = LLM(
            str(model),
            dtype="float32",  # or a chunk has half of CHUNK_BYTES
            kv_transfer_config=transfer_config(
                validated(Options, {"store": store, "dram": 64 * MIB, "seal_key": seal_keys(folder)})
            ),
            prefix_caching_hash_algo="sha256_cbor",
            max_model_len=2048,
            enforce_eager=True,
            enable_lora=True,
            max_lora_rank=8,
        )
        self._scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self.tier = self._scheduler.connector._tier
        self.counted: dict[str, float] = {}
        get_stats = self.tier.get_stats

        def noted() -> Any:
            found = get_stats()
            for name, number in (found.reduce() if found is not None else {}).items():
                self.counted[name] = self.counted.get(name, 0.0) + number
            return found

        self.tier.get_stats = noted
        assert self.tier.row_bytes == CHUNK_BYTES
        eventually(lambda: (self.tier._step(), self.tier.link.ready)[1], 60)

    def answer(
        self,
        prompt: list[int],
        target: str | None = None,
        *,
        computed: bool = False,
        salt: str = "",
        lora: bool = False,
    ) -> Answer:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        targets = [self._store] * (len(prompt) // BLOCK_TOKENS)
        plan = make_plan(targets, fetch=len(targets), deadline_ms=DEADLINE_MS, chunk_ms=0, decision_id="test")
        sampling = SamplingParams(
            max_tokens=12,
            temperature=0,
            ignore_eos=True,
            logprobs=0,
            skip_reading_prefix_cache=computed,
            extra_args={FIELD: msgspec.to_builtins(plan)},
        )
        asked: dict[str, Any] = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
        adapter = LoRARequest(ADAPTER, 1, str(self.lora)) if lora else None
        (output,) = self._llm.generate([asked], sampling, use_tqdm=False, lora_request=adapter)
        said = output.outputs[0]
        return Answer(list(said.token_ids), [next(iter(one.values())).logprob for one in said.logprobs])

    def until_idle(self) -> None:
        """And everything is stored."""
        eventually(lambda: (self._llm.llm_engine.step(), not self._scheduler.has_requests())[1], 60)

    def forget(self) -> None:
        """HBM and DRAM are empty."""
        self.until_idle()
        assert self._llm.reset_prefix_cache(reset_connector=True)
        self.counted.clear()

    def fetched(self, outcome: str = "hit") -> float:
        self.until_idle()
        return self.counted.get(f"vllm:kvtier_fetched_chunks:('{outcome}',)", 0.0)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def make_adapter(folder: Path) -> Path:
    """A LoRA adapter of the tiny model that changes what it says."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(4):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
        weights[f"{prefix}A.weight"] = torch.randn(8, 256, generator=generator) / 16
        weights[f"{prefix}B.weight"] = torch.randn(128, 8, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


class Gate(Impostor):
    """The address of a target that is at fault from time to time."""

    def __init__(self) -> None:
        self.target = ""
        self.disk = FullDisk()
        self.fault: Callable[[Stream, Header, bytes], None] | None = None
        self.fetches = 0  # that met the fault
        self._open: list[socket.socket] = []
        super().__init__(self._fail)

    def _fail(self, stream: Stream, header: Header, control: bytes) -> None:
        if header.op is not Op.GET or self.fault is None:
            raise ConnectionResetError
        self.fetches += 1
        self.fault(stream, header, control)

    def set(self, fault: Callable[[Stream, Header, bytes], None] | None) -> None:
        """From now on; who was connected has to come again."""
        self.fault, self.fetches = fault, 0
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self._open.append(sock)
            if self.fault is not None:
                threading.Thread(target=self._serve, args=(Stream(sock),), daemon=True).start()
                continue
            host, _, port = self.target.rpartition(":")
            through = socket.create_connection((host, int(port)))
            self._open.append(through)
            for ends in ((sock, through), (through, sock)):
                threading.Thread(target=pump, args=ends, daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError), source, sink:
        while some := source.recv(1 << 18):
            sink.sendall(some)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    one = Gate()
    log = Log(tmp_path_factory.mktemp("store"), 256 * MIB, segment_bytes=16 * MIB, files=one.disk)
    one.target = f"127.0.0.1:{free_port()}"
    target = Target(Shelf([log]), name=one.address, epoch=log.epoch)
    target.serve(transport.listen(one.target))
    yield one
    one.set(None)
    target.stop(drain_seconds=2)
    log.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, content in {**ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, content)
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(min(os.sched_getaffinity(0))))
        one = Engine(tmp_path_factory.mktemp("engine"), gate.address)
        yield one
        one.close()


@pytest.fixture(autouse=True)
def at_fault_no_longer(gate: Gate) -> Iterator[None]:
    yield
    gate.set(None)
    gate.disk.full = False


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> list[int]:
    """One that no other test has: three whole chunks and a bit."""
    text = f"{request.node.name} " + ALPHABET * 20
    return [ord(letter) for letter in text[: CHUNKS * BLOCK_TOKENS + 40]]


def stored(engine: Engine, prompt: list[int], **how: Any) -> Answer:
    """The prompt is in the store, and nowhere else; and what is to be answered, computed from nothing."""
    answer = engine.answer(prompt, computed=True, **how)
    engine.forget()
    until_loaded(engine, prompt, answer, **how)
    return answer


def until_loaded(engine: Engine, prompt: list[int], expected: Answer, **how: Any) -> None:
    """It comes from the store: at once, or when a target that was away is tried again."""

    def loaded() -> bool:
        engine.forget()
        assert engine.answer(prompt, **how) == expected
        return engine.fetched() == CHUNKS

    eventually(loaded, 60)
    engine.forget()


def wrong_key(stream: Stream, header: Header, control: bytes) -> None:
    stream.send(value(header, b"\x01" * VALUE_BYTES, number=77), soon())


def wrong_length(stream: Stream, header: Header, control: bytes) -> None:
    stream.send(value(header, b"\x01" * (VALUE_BYTES - 1)), soon())


def wrong_checksum(stream: Stream, header: Header, control: bytes) -> None:
    for number in range(len(wire.decode_control(control, wire.Get).keys)):
        stream.send(value(header, b"\x01" * VALUE_BYTES, number=number, crc=1), soon())


def other_protocol(stream: Stream, header: Header, control: bytes) -> None:
    stream.send([b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99)], soon())


def stalled(stream: Stream, header: Header, control: bytes) -> None:
    threading.Event().wait(2 * DEADLINE_MS / 1000)


def half_a_value(stream: Stream, header: Header, control: bytes) -> None:
    first, rest = value(header, b"\x01" * VALUE_BYTES)
    stream.send([first, rest[: VALUE_BYTES // 2]], soon())
    threading.Event().wait(2 * DEADLINE_MS / 1000)


def hangs_up(stream: Stream, header: Header, control: bytes) -> None:
    raise ConnectionResetError


def forged(stream: Stream, header: Header, control: bytes) -> None:
    """Other KV under a right checksum."""
    for number in range(len(wire.decode_control(control, wire.Get).keys)):
        stream.send(value(header, b"\x3f" * VALUE_BYTES, number=number), soon())


FAULTS = [wrong_key, wrong_length, wrong_checksum, forged, other_protocol, stalled, half_a_value, hangs_up]


def met(engine: Engine, gate: Gate, prompt: list[int], fault: Callable[..., None]) -> Answer:
    """The answer to the prompt when its fetch meets the fault."""
    gate.set(fault)

    def asked() -> bool:
        nonlocal answer
        engine.forget()
        answer = engine.answer(prompt)
        return gate.fetches > 0

    answer: Answer | None = None
    eventually(asked, 60)
    assert answer is not None
    return answer


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_target_at_fault_costs_no_token(
    engine: Engine, gate: Gate, prompt: list[int], fault: Callable[..., None]
) -> None:
    expected = stored(engine, prompt)
    assert met(engine, gate, prompt, fault) == expected
    assert engine.fetched() == 0
    assert (engine.fetched("corrupt") == CHUNKS) == (fault in (forged, wrong_checksum))
    gate.set(None)
    until_loaded(engine, prompt, expected)


def test_a_full_disk_costs_no_token(engine: Engine, gate: Gate, prompt: list[int]) -> None:
    gate.disk.full = True
    expected = engine.answer(prompt, computed=True)
    for _ in range(2):
        engine.forget()
        assert engine.answer(prompt) == expected
        assert engine.fetched() == 0
    gate.disk.full = False
    until_loaded(engine, prompt, expected)


@pytest.mark.parametrize("how", [{"salt": "red"}, {"lora": True}], ids=["salt", "LoRA"])
def test_salt_and_adapter_do_not_cross(engine: Engine, gate: Gate, prompt: list[int], how: dict[str, Any]) -> None:
    """What is stored under one serves the same again (`stored` says so), and neither none nor another."""
    plain = stored(engine, prompt)
    changed = engine.answer(prompt, **how)
    assert engine.fetched() == 0
    assert stored(engine, prompt, **how) == changed
    assert (changed == plain) == ("lora" not in how)
    assert engine.answer(prompt, salt="blue") == plain
    assert engine.fetched() == 0
    until_loaded(engine, prompt, plain)
