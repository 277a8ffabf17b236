"""Workers with a SIMULATED engine and everything else real, to test a router with more workers than there are GPUs.

    python -m benchmarks.routing.sim_worker --workers 16 --model DIR --store 127.0.0.1:7600 --metrics-port 9100

Each is a Dynamo worker with an instance id, KV events through Dynamo's relay, and heartbeats on the bus. All share this
process. The engine is that of engine_model.py with the wall clock. Chunks go to real targets, as values of eight bytes.
So residency is real, and the transfer time of full-size KV is simulated. As in policy_sim, a prompt's KV is in the
tiers and the store once its answer has ended. All tokens of an answer are the same.
"""

import argparse
import asyncio
import os
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvloop
import zmq
from dynamo.common.backend import LLMEngine, WorkerConfig
from dynamo.common.backend.engine import EngineConfig, LlmRegistration
from dynamo.common.backend.publisher import KvEventSource, ZmqSource
from dynamo.common.backend.worker import Worker
from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client import Counter as PrometheusCounter
from pydantic import Field, field_validator

from benchmarks.routing.engine_model import Engines, Hardware, Job
from components.options import CommonOptions, add_common_arguments
from components.pricing.throughput import Throughput
from kvstore.bus import messages
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport
from kvstore.bus.plan import Plan, read_plan
from kvstore.errors import ConfigError, run_command, validated
from kvstore.keys import chunk_key, fingerprint, layout_digest, sequence_hashes
from kvstore.net.client import Item, StoreClient
from kvstore.net.membership import StaticMembership, checked_address
from kvstore.net.wire import Outcome

BLOCK_TOKENS = 16
BLOCKS_PER_CHUNK = 16
CHUNK_TOKENS = BLOCK_TOKENS * BLOCKS_PER_CHUNK
MODEL = "simulated-engine"  # the workers' model name, for a frontend without a router
CONTEXT_TOKENS = 8192
ANSWER_TOKEN = 40
# Answers are streamed in pieces, as with vLLM's --stream-interval. One message per token would measure this machine.
STREAM_SECONDS = 0.25
_DIGEST = layout_digest({"engine": "simulated", "chunk_tokens": CHUNK_TOKENS})
FINGERPRINT = fingerprint(_DIGEST)
_VALUE_BYTES = 8
# The queue of events for Dynamo's relay; beyond it, events are lost.
_EVENTS_MAX = 100_000
# The queue of answers to store; beyond it, the next turn stores their chunks.
_PUTS_MAX = 1000
_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Options(CommonOptions):
    """The command line, checked."""

    model: Path
    store: str
    workers: int = Field(1, ge=1, le=256)
    slow: float = Field(1.0, gt=0, le=1000)
    hbm_tokens: int = Field(Hardware.hbm_tokens, ge=CONTEXT_TOKENS)
    dram_tokens: int = Field(Hardware.dram_tokens, ge=0)
    metrics_port: int = Field(0, ge=0, le=65535)

    @field_validator("store")
    @classmethod
    def _addresses(cls, store: str) -> str:
        for address in store.split(","):
            checked_address("store", address)
        return store

    def hardware(self) -> Hardware:
        return Hardware(hbm_tokens=self.hbm_tokens, dram_tokens=self.dram_tokens).slowed(self.slow)


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.sim_worker", description=__doc__.split("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--model", required=True, help="a folder with config and tokenizer; its weights are not read")
    parser.add_argument("--store", required=True, help="host:port of targets, separated by commas")
    parser.add_argument("--workers", help="how many; default 1")
    parser.add_argument("--slow", help="how many seconds a second of the GPU's takes; default 1")
    parser.add_argument("--hbm-tokens", help=f"KV that a worker's HBM holds; default {Hardware.hbm_tokens}")
    parser.add_argument("--dram-tokens", help=f"KV that its DRAM tier holds; default {Hardware.dram_tokens}")
    parser.add_argument("--metrics-port", help="port for Prometheus; default: none")
    return validated(Options, vars(parser.parse_args(argv)))


# ---- what a tier holds, in vLLM's KV events


class BlockStored(msgspec.Struct, tag=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[int]
    medium: str


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved]
    data_parallel_rank: int | None = None  # Dynamo's relay drops a batch without it


class Blocks:
    """A tier: an LRU cache of blocks by Dynamo's sequence hash. A prefix is evicted from its tail, so that no block
    outlives the one before it. `tell` is called with added and evicted blocks."""

    def __init__(self, medium: str, tokens: int, tell: Callable[[BlockStored | BlockRemoved], None]):
        self._medium = medium
        self._blocks = tokens // BLOCK_TOKENS
        self._tell = tell
        self._held: OrderedDict[int, None] = OrderedDict()

    def prefix(self, hashes: Sequence[int]) -> int:
        """How many leading blocks are cached."""
        return next((number for number, one in enumerate(hashes) if one not in self._held), len(hashes))

    def put(self, hashes: Sequence[int], tokens: Sequence[int]) -> None:
        hashes = hashes[: self._blocks]
        first = self.prefix(hashes)
        for one in reversed(hashes):
            self._held[one] = None
            self._held.move_to_end(one)
        if first < len(hashes):
            ids = list(tokens[first * BLOCK_TOKENS : len(hashes) * BLOCK_TOKENS])
            parent = hashes[first - 1] if first else None
            self._tell(BlockStored(list(hashes[first:]), parent, ids, BLOCK_TOKENS, None, self._medium, None))
        self.resize(self._blocks * BLOCK_TOKENS)

    def resize(self, tokens: int) -> None:
        self._blocks = tokens // BLOCK_TOKENS
        gone = [self._held.popitem(last=False)[0] for _ in range(max(0, len(self._held) - self._blocks))]
        if gone:
            self._tell(BlockRemoved(gone, self._medium))


class Tiers:
    """HBM and DRAM of one worker, and the socket for their events to Dynamo's relay."""

    def __init__(self, number: int, hardware: Hardware, context: "zmq.Context[zmq.Socket[bytes]]"):
        self.endpoint = f"ipc:///tmp/kvtier-simulated-{os.getpid()}-{number}.sock"
        self._socket = context.socket(zmq.PUB)
        self._socket.set(zmq.SNDHWM, _EVENTS_MAX)
        self._socket.bind(self.endpoint)
        self._count = 0
        self.hbm = Blocks("GPU", hardware.hbm_tokens, self._tell)
        self.dram = Blocks("CPU", hardware.dram_tokens, self._tell)

    def close(self) -> None:
        self._socket.close(0)
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _tell(self, event: BlockStored | BlockRemoved) -> None:
        batch = msgspec.msgpack.encode(EventBatch(time.time(), [event]))
        self._socket.send_multipart([b"", self._count.to_bytes(8, "big"), batch])
        self._count += 1


# ---- the engines against the wall clock


@dataclass(eq=False, kw_only=True)
class Prompt(Job):
    token_ids: list[int]
    hashes: list[int]  # of its full blocks
    first_token: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class LiveEngines(Engines[Prompt]):
    """All workers of this process. If this machine is too slow, events are late; the lag metric shows it."""

    def __init__(self, options: Options, client: StoreClient):
        hardware, workers = options.hardware(), options.workers
        super().__init__(hardware, workers)
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._deadline_seconds = options.deadline_ms / 1000  # without a plan
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.tiers = [Tiers(number, hardware, context) for number in range(workers)]
        self.loads = [Throughput() for _ in range(workers)]
        self.outcomes = [Counter[str]() for _ in range(workers)]
        self._puts: set[asyncio.Task[None]] = set()
        self.registry = CollectorRegistry()
        self._tokens = PrometheusCounter(
            "simulated_prompt_tokens", "Tokens of prompts by where they were found", ["source"], registry=self.registry
        )
        self._lag = Histogram(
            "simulated_lag_seconds", "Events behind their time", buckets=_LAG_SECONDS, registry=self.registry
        )

    @property
    def now(self) -> float:
        return self._loop.time()

    async def admit(self, number: int, token_ids: list[int], answer_tokens: int, plan: Plan | None) -> Prompt:
        """Admit the prompt on its worker. Without a plan, all of it is looked up in the store."""
        prompt = Prompt(
            len(token_ids), answer_tokens, self.now, number,
            token_ids=token_ids, hashes=sequence_hashes(token_ids, BLOCK_TOKENS),
        )  # fmt: skip
        hbm, local = self._local(prompt)
        found = await self._found(prompt, local // BLOCKS_PER_CHUNK, plan)
        hbm, local = self._local(prompt)  # again, since the store's answer took time
        first = local // BLOCKS_PER_CHUNK
        chunks = asked = max(0, found - first)
        while chunks and self.fetch_ends(self.workers[number], chunks * CHUNK_TOKENS) - prompt.arrived > (
            plan.wait_seconds(chunks) if plan is not None else self._deadline_seconds
        ):
            chunks -= 1
        self.outcomes[number].update({"hit": chunks, "late": asked - chunks})
        prompt.fetch_tokens = chunks * CHUNK_TOKENS
        most = len(token_ids) - 1  # the last token is always computed
        hbm_tokens = min(most, hbm * BLOCK_TOKENS)
        local_tokens = min(most, local * BLOCK_TOKENS)
        prompt.loaded_tokens = min(most, (first + chunks) * CHUNK_TOKENS) if chunks else local_tokens
        if chunks:
            begins = max(self.now, self.workers[number].link_free)
            size = prompt.fetch_tokens * self.hardware.kv_bytes_per_token
            self.loads[number].add(size, self.fetch_ends(self.workers[number], prompt.fetch_tokens) - begins)
        self._admit(prompt, hbm_tokens)
        sources = (hbm_tokens, local_tokens - hbm_tokens, prompt.loaded_tokens - local_tokens, prompt.prefill_tokens)
        for source, tokens in zip(("hbm", "dram", "store", "computed"), sources, strict=True):
            self._tokens.labels(source).inc(tokens)
        return prompt

    def _local(self, prompt: Prompt) -> tuple[int, int]:
        """Leading blocks in HBM, and in HBM or DRAM."""
        tiers = self.tiers[prompt.worker]
        hbm = tiers.hbm.prefix(prompt.hashes)
        return hbm, max(hbm, tiers.dram.prefix(prompt.hashes))

    async def _found(self, prompt: Prompt, first: int, plan: Plan | None) -> int:
        """The end of the chunks, from `first` on, that the store returned without a gap."""
        lasts = prompt.hashes[BLOCKS_PER_CHUNK - 1 :: BLOCKS_PER_CHUNK]
        targets = None if plan is None else plan.targets()[: len(lasts)]
        wanted = lasts[first:] if targets is None else lasts[first : len(targets)]
        if not wanted:
            return first
        values = [bytearray(_VALUE_BYTES) for _ in wanted]
        outcomes = await asyncio.to_thread(
            self._client.get,
            [_key(one) for one in wanted],
            [memoryview(value) for value in values],
            time.monotonic() + 2,
            targets=None if targets is None else targets[first:],
        )
        hits = next((number for number, one in enumerate(outcomes) if one is not Outcome.HIT), len(wanted))
        if plan is not None and hits < len(wanted):
            self.outcomes[prompt.worker][outcomes[hits].name.lower()] += len(wanted) - hits
        return first + hits

    def _at(self, when: float, event: Callable[[], None]) -> None:
        def run() -> None:
            self._lag.observe(self.now - when)
            event()

        self._loop.call_at(when, run)

    def _room(self, number: int, tokens: int) -> None:
        self.tiers[number].hbm.resize(tokens)

    def _began(self, prompt: Prompt) -> None:
        prompt.first_token.set()

    def _ended(self, prompt: Prompt) -> None:
        tokens = prompt.token_ids + [ANSWER_TOKEN] * prompt.answer_tokens
        hashes = sequence_hashes(tokens, BLOCK_TOKENS)
        tiers = self.tiers[prompt.worker]
        tiers.hbm.put(hashes, tokens)
        tiers.dram.put(hashes[: len(hashes) // BLOCKS_PER_CHUNK * BLOCKS_PER_CHUNK], tokens)
        if len(self._puts) < _PUTS_MAX:
            lasts = hashes[BLOCKS_PER_CHUNK - 1 :: BLOCKS_PER_CHUNK]
            task = asyncio.create_task(asyncio.to_thread(self._store, lasts))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)
        prompt.done.set()

    def _store(self, lasts: list[int]) -> None:
        """Put the chunks that the store does not hold."""
        deadline = time.monotonic() + 5
        there = self._client.exists([_key(one) for one in lasts], deadline)
        missing = [one for one, outcome in zip(lasts, there, strict=True) if outcome is Outcome.MISS]
        items = [
            Item(_key(one), memoryview(one.to_bytes(_VALUE_BYTES, "little")), one, FINGERPRINT, BLOCKS_PER_CHUNK)
            for one in missing
        ]
        if items:
            self._client.put(items, deadline)

    def report(self, number: int, worker_id: int, endpoint: str) -> WorkerReport:
        hardware, worker = self.hardware, self.workers[number]
        return WorkerReport(
            str(worker_id),
            endpoint,
            FINGERPRINT,
            BLOCK_TOKENS,
            BLOCKS_PER_CHUNK,
            CHUNK_TOKENS * hardware.kv_bytes_per_token,
            time.time_ns() // 1_000_000,
            hardware.prefill_base_seconds,
            hardware.prefill_seconds_per_token,
            hardware.prefill_seconds_per_token_squared,
            hardware.dram_bytes_per_second,
            self.loads[number].bytes_per_second,
            worker.fetching_tokens * hardware.kv_bytes_per_token,
            len(worker.ready),
            hardware.kv_bytes_per_token,
            dict(self.outcomes[number]),
            prefill_share=worker.prefill_share(self.now),
        )

    def close(self) -> None:
        for tiers in self.tiers:
            tiers.close()


def _key(router_hash: int) -> bytes:
    return chunk_key(_DIGEST, router_hash.to_bytes(8, "little"))


# ---- as Dynamo sees it


class SimulatedEngine(LLMEngine):  # type: ignore[misc]
    """One worker, as Dynamo's backend expects it."""

    def __init__(self, number: int, engines: LiveEngines, options: Options):
        self._number = number
        self._engines = engines
        self._options = options
        self.worker_id: int | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        """Dynamo constructs a process's only engine with this. Here `main` constructs several in one process."""
        raise TypeError(f"{cls.__name__} is made by main, not from {argv!r}")

    async def start(self, worker_id: int) -> EngineConfig:
        self.worker_id = worker_id
        blocks = self._options.hbm_tokens // BLOCK_TOKENS
        registration = LlmRegistration(
            context_length=CONTEXT_TOKENS, kv_cache_block_size=BLOCK_TOKENS, total_kv_blocks=blocks
        )
        return EngineConfig(str(self._options.model), MODEL, llm=registration)

    async def kv_event_sources(self) -> list[KvEventSource]:
        return [ZmqSource(self._engines.tiers[self._number].endpoint)]

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        answer_tokens = request["stop_conditions"].get("max_tokens") or 1
        prompt = await self._engines.admit(self._number, request["token_ids"], answer_tokens, _plan(request))
        sent = 0
        try:
            while sent < answer_tokens and not context.is_stopped():
                awaited = prompt.done if prompt.first_token.is_set() else prompt.first_token
                with suppress(TimeoutError):
                    await asyncio.wait_for(awaited.wait(), STREAM_SECONDS)
                new = (answer_tokens if prompt.done.is_set() else self._engines.produced(prompt)) - sent
                if new:
                    sent += new
                    chunk = {"token_ids": [ANSWER_TOKEN] * new, "index": 0}
                    yield {**chunk, "finish_reason": "length"} if sent == answer_tokens else chunk
        finally:
            if not prompt.done.is_set():
                self._engines.leave(prompt)

    async def cleanup(self) -> None:
        pass


def _plan(request: Any) -> Plan | None:
    """The plan, from the field where the router puts it for a stock worker."""
    return read_plan(((request.get("extra_args") or {}).get("sampling_options") or {}).get("extra_args"))


async def serve(options: Options) -> None:
    line = await Bus.connect(options.nats, "kvtier simulated workers")
    client = StoreClient(StaticMembership(options.store.split(",")), namespace=options.namespace, name="simulated")
    live = LiveEngines(options, client)
    engines = [SimulatedEngine(number, live, options) for number in range(options.workers)]
    namespace, component, endpoint = options.endpoint.split(".")
    config = WorkerConfig(
        namespace=namespace,
        component=component,
        endpoint=endpoint,
        model_name=str(options.model),
        served_model_name=MODEL,
        discovery_backend=os.environ.get("DYN_DISCOVERY_BACKEND", "file"),
        request_plane=os.environ.get("DYN_REQUEST_PLANE", "tcp"),
        event_plane=os.environ.get("DYN_EVENT_PLANE", "nats"),
    )

    async def report() -> None:
        told = False
        while True:
            for number, engine in enumerate(engines):
                if engine.worker_id is not None:
                    said = live.report(number, engine.worker_id, options.endpoint)
                    await line.publish(messages.subject(options.namespace, "speed.worker", said.worker), said)
            if not told and all(engine.worker_id is not None for engine in engines):
                print(f"benchmarks.routing.sim_worker: ready, {len(engines)} SIMULATED workers", flush=True)
                told = True
            await asyncio.sleep(messages.HEARTBEAT_SECONDS)

    reporting = asyncio.create_task(report())
    if options.metrics_port:
        start_http_server(options.metrics_port, "127.0.0.1", live.registry)
    try:
        await asyncio.gather(*(Worker(engine, config).run() for engine in engines))
    finally:
        reporting.cancel()
        live.close()
        client.close()
        await line.close()


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    messages.checked_namespace(options.namespace)
    if not (options.model / "config.json").is_file():
        raise ConfigError("model", options.model, "a folder with a config.json")
    uvloop.run(serve(options))


if __name__ == "__main__":
    sys.argv[0] = "benchmarks.routing.sim_worker"
    run_command("benchmarks.routing.sim_worker", main)
