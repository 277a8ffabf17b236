"""A test cluster without a GPU: the quickstart, a reference worker without the tier, and fault injection.

The demo and the end-to-end tests use it. Everything is real: stock frontend and workers, vLLM's CPU engine, NATS, a
target on a directory. Only the model's weights are random.
"""

import asyncio
import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from graphs.forgery import Record, forge, records
from graphs.serve import Child, Supervisor
from graphs.service import load_deployment
from graphs.services import free_port, frontend_url, page_url, runtime_env, vllm_workers
from graphs.tiny_model import make_tiny_model
from kvstore.bus import residency
from kvstore.bus.connection import Bus
from kvstore.bus.messages import WorkerReport, subject
from kvstore.bus.residency import Mirror
from kvstore.keys import sequence_hashes
from kvstore.net import wire
from kvstore.net.client import StoreClient
from kvstore.net.membership import StaticMembership

MODEL, REFERENCE = "tiny", "tiny-reference"
BLOCK_TOKENS = 128  # of vLLM's CPU engine
CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
# The small model runs in float32: a right answer repeats to the last digit, a wrong block changes logprobs by 0.01 or
# more. The tolerance allows for a different order of additions.
LOGPROB_TOLERANCE = 1e-3

ReferenceWorker = vllm_workers("ReferenceWorker")

Message = dict[str, str]


@dataclass
class Answer:
    """The response to one prompt."""

    text: str
    logprobs: list[float]
    prompt_tokens: int
    ttft_seconds: float

    def equals(self, other: "Answer") -> bool:
        """Whether text and logprobs are the same, token by token."""
        return (
            self.text == other.text
            and len(self.logprobs) == len(other.logprobs) > 0
            and all(abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(self.logprobs, other.logprobs, strict=True))
        )


@dataclass(frozen=True)
class Sources:
    """Where a worker found the tokens of its prompts, since it started."""

    hbm: int = 0
    dram: int = 0
    store: int = 0
    computed: int = 0

    def __sub__(self, other: "Sources") -> "Sources":
        return Sources(
            self.hbm - other.hbm, self.dram - other.dram, self.store - other.store, self.computed - other.computed
        )

    @property
    def total(self) -> int:
        return self.hbm + self.dram + self.store + self.computed


@dataclass
class Turn:
    """One answered prompt: which worker served it and where it found the tokens."""

    worker: str
    sources: Sources
    answer: Answer


# Dynamo logs the spans of requests whatever its level is.
SILENCE = {"DYN_LOG": "off,request_span=off", "DYN_LOGGING_SPAN_EVENTS": "0"}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for this process and restore them afterwards: its later clusters would inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def import_dynamo_in_silence() -> None:
    """Import Dynamo with its logging off. It reads the variables on the first import; services have their own logs."""
    with environment(SILENCE):
        importlib.import_module("dynamo.runtime")


@dataclass
class Trial:
    """The cluster. `say` gets progress messages; `folder` holds its model, state and logs."""

    folder: Path
    say: Callable[[str], None] = lambda line: None
    overrides: Sequence[str] = ()
    config: Path = CONFIG
    graph: str = "graphs.agg_router:Frontend"
    tiered: str = "VllmWorker"  # the service whose workers have the tier
    messages: list[Message] = field(default_factory=list)

    async def __aenter__(self) -> "Trial":
        import_dynamo_in_silence()
        model = make_tiny_model(self.folder / "model")
        self._store_port = free_port()
        nats = f"127.0.0.1:{free_port()}"
        overrides = [
            f"--Common.model={model}",
            f"--Nats.listen={nats}",
            f"--Store.listen=127.0.0.1:{self._store_port}",
            f"--Frontend.port={free_port()}",
            f"--Router.page=127.0.0.1:{free_port()}",
            *self.overrides,
        ]
        self.deployment = load_deployment(self.graph, self.config, overrides, self.folder / "state")
        tiered = self.deployment.of(self.tiered)
        reference = {
            **tiered.flags,
            "served-model-name": REFERENCE,
            "endpoint": "dynamo.reference.generate",
            "prefix-caching-hash-algo": "sha256_cbor",
            "tier": False,
        }
        args = tiered.args.model_copy(update={"workers": 1})
        settings = {**self.deployment.settings, "ReferenceWorker": type(tiered)(args, tiered.env, reference)}
        services = [ReferenceWorker, *self.deployment.services]
        self.deployment = type(self.deployment)(services, settings, self.deployment.state_dir)
        self.url = frontend_url(self.deployment)
        self.page_url = page_url(self.deployment)
        self.supervisor = Supervisor(self.deployment, self._log, restart=False)
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300))
        try:
            await self.supervisor.start()
            self.bus = await Bus.connect(f"nats://{nats}", "kvtier trial")
            self.mirror = Mirror()
            self._follower = asyncio.create_task(residency.follow(self.mirror, self.bus, "default"))
            self._store = StoreClient(StaticMembership([self.store_address]))
            self._ids: dict[str, int] = {}
            self._runtime: Any = None
            self._clients: dict[str, Any] = {}
            await self.until(self._answers, "both models answer", 120)
        except BaseException:
            await self.http.close()
            await self.supervisor.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._follower.cancel()
        self._store.close()
        await self.bus.close()
        if self._runtime is not None:
            self._runtime.shutdown()
        await self.http.close()
        await self.supervisor.stop()

    # ---- talking

    async def ask(
        self, messages: Sequence[Message], *, model: str = MODEL, max_tokens: int = 32, worker: str = ""
    ) -> Answer:
        """One streaming chat completion, greedy, with logprobs; pinned to `worker` if one is named."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if worker:
            body["nvext"] = {"prefill_worker_id": await self.worker_id(worker)}
        answer = Answer("", [], 0, 0.0)
        started = time.perf_counter()
        async with aclosing(self.stream(body)) as parts:
            async for part in parts:
                if part.get("usage"):
                    answer.prompt_tokens = part["usage"]["prompt_tokens"]
                for choice in part["choices"]:
                    if choice["delta"].get("content"):
                        answer.ttft_seconds = answer.ttft_seconds or time.perf_counter() - started
                        answer.text += choice["delta"]["content"]
                    for token in (choice.get("logprobs") or {}).get("content") or []:
                        answer.logprobs.append(token["logprob"])
        return answer

    async def stream(self, body: Mapping[str, Any]) -> Any:
        """The server-sent events of a completion; closing the generator disconnects."""
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    part = json.loads(line[6:])
                    if "choices" not in part:
                        raise RuntimeError(f"in the stream: {part}")
                    yield part

    async def client(self, endpoint: str) -> Any:
        """Dynamo's client of an endpoint of the cluster, for calls that HTTP does not offer."""
        if self._runtime is None:
            from dynamo.runtime import DistributedRuntime

            with environment(runtime_env(self.deployment)):
                self._runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="nats")
        if endpoint not in self._clients:  # each watches the discovery folder for as long as the runtime lives
            self._clients[endpoint] = await self._runtime.endpoint(endpoint).client()
        await self._clients[endpoint].wait_for_instances()
        return self._clients[endpoint]

    async def say_next(self, text: str, *, max_tokens: int = 32) -> Turn:
        """The next turn of the conversation: `text`, the answer, and where the worker found the prompt."""
        self.messages.append({"role": "user", "content": text})
        before = {name: await self.sources(name) for name in self.workers}
        answer = await self.ask(self.messages, max_tokens=max_tokens)
        turn: list[Turn] = []

        async def counted() -> bool:
            for name, earlier in before.items():
                found = await self.sources(name) - earlier
                if found.total == answer.prompt_tokens:
                    turn[:] = [Turn(name, found, answer)]
            return bool(turn)

        await self.until(counted, "a worker has counted the prompt", 10)
        self.messages.append({"role": "assistant", "content": answer.text})
        return turn[0]

    async def reference(self, *, max_tokens: int = 32, cold: bool = False) -> Answer:
        """The answer of the worker without a tier to the last prompt; with `cold`, computed without a prefix cache."""
        if cold:
            await self.clear("ReferenceWorker-0")
        return await self.ask(self.messages[:-1], model=REFERENCE, max_tokens=max_tokens)

    # ---- looking

    @property
    def workers(self) -> list[str]:
        """Names of the live workers that have the tier."""
        return [
            name for name, child in self.supervisor.children.items() if name.startswith(self.tiered) and child.alive
        ]

    @property
    def store_address(self) -> str:
        return f"127.0.0.1:{self._store_port}"

    @property
    def store_dir(self) -> Path:
        return self.deployment.state_dir / "store"

    def child(self, name: str) -> Child:
        return self.supervisor.children[name]

    async def metrics(self, worker: str) -> dict[tuple[str, str], float]:
        """A worker's counters and gauges: (name, the label that tells its series apart) -> value."""
        port = self.child(worker).process.env["DYN_SYSTEM_PORT"]
        async with self.http.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
        values: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                apart = sample.labels.get("source") or sample.labels.get("outcome") or ""
                key = sample.name, apart
                values[key] = values.get(key, 0.0) + sample.value
                if "worker_id" in sample.labels:
                    self._ids[worker] = int(sample.labels["worker_id"], 16)
        return values

    async def worker_id(self, worker: str) -> int:
        await self.metrics(worker)
        return self._ids[worker]

    async def sources(self, worker: str) -> Sources:
        values = await self.metrics(worker)

        def source(name: str) -> int:
            return int(values.get(("vllm:prompt_tokens_by_source_total", name), 0))

        fetched = int(values.get(("vllm:kvtier_fetched_chunks_total", "hit"), 0)) * BLOCK_TOKENS
        external = source("external_kv_transfer")
        store = min(fetched, external)
        return Sources(source("local_cache_hit"), external - store, store, source("local_compute"))

    async def store_status(self) -> wire.Status | None:
        status = await asyncio.to_thread(self._store.stat, time.monotonic() + 2)
        return status.get(self.store_address)

    def tokens(self, messages: Sequence[Message], *, answered: bool = False) -> list[int]:
        """The prompt's tokens, as the frontend makes them."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=not answered, tokenize=True, return_dict=False
            )
        )

    def chunk_hashes(self, messages: Sequence[Message], *, answered: bool = False) -> list[int]:
        """Router hashes of the prompt's chunks, computed from the tokens as a router does."""
        return sequence_hashes(self.tokens(messages, answered=answered), BLOCK_TOKENS)

    def located(self, hashes: list[int]) -> list[str | None]:
        """The target of each chunk, from the announcements. The cluster has a single layout."""
        known = {key for view in self.mirror._views.values() for key in view.resident}
        return self.mirror.locate(next(iter(known - {0}), 0), hashes, time.monotonic())

    async def until_stored(self, messages: Sequence[Message] | None = None) -> None:
        """Wait until the target has announced every full chunk of the conversation so far."""
        hashes = self.chunk_hashes(self.messages[:-1] if messages is None else messages)

        async def all_there() -> bool:
            return all(self.located(hashes))

        await self.until(all_there, "the store has announced the conversation", 20)

    async def until_idle(self) -> None:
        """Wait until no worker has a request, and the router counts none."""
        last: list[Sources] = []

        async def idle() -> bool:
            nonlocal last
            counted, requests = [], 0.0
            for worker in self.workers:
                values = await self.metrics(worker)
                requests += values["vllm:num_requests_running", ""] + values["vllm:num_requests_waiting", ""]
                counted.append(await self.sources(worker))
            still = counted == last
            last = counted
            await asyncio.sleep(0.3)
            return still and not requests

        await self.until(idle, "every slot is free", 30)

    async def until(self, condition: Callable[[], Any], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(aiohttp.ClientError, RuntimeError, KeyError):
                if await condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s: not yet that {what}")
            await asyncio.sleep(0.1)

    # ---- breaking

    async def kill(self, name: str) -> None:
        """kill -9 of the process and everything that it started."""
        await self.supervisor.end(self.child(name), signal.SIGKILL)

    async def restart(self, name: str) -> None:
        """Start a killed process of the deployment again, and wait until it is ready."""
        process = next(process for process in self.deployment.processes() if process.name == name)
        await self.supervisor.launch(process)
        if process.service == self.tiered:
            await self._until_reporting(name)

    async def _until_reporting(self, worker: str) -> None:
        """Wait until the worker's tier reports, which is later than its engine. Until then, the store's chunks miss."""
        heard: set[str] = set()

        async def hear(report: WorkerReport) -> None:
            heard.add(report.worker)

        async def reporting() -> bool:
            return str(await self.worker_id(worker)) in heard

        reports = await self.bus.subscribe(subject("default", "speed.worker"), WorkerReport, hear)
        await self.until(reporting, f"{worker} reports", 60)
        await self.bus.unsubscribe(reports)

    async def clear(self, worker: str) -> None:
        """Empty the worker's HBM and DRAM tiers, through the stock worker's own endpoint."""
        component = "reference" if worker.startswith("Reference") else "backend"
        client = await self.client(f"dynamo.{component}.clear_kv_blocks")
        async for answer in await client.direct({}, await self.worker_id(worker)):
            if answer.data()["status"] != "success":
                raise RuntimeError(f"{worker}: {answer.data()}")

    def flip_byte(self, router_hash: int) -> None:
        """Flip one byte in the middle of a chunk on disk, as bad flash would."""
        path, entry, *_ = self._find(router_hash)
        with path.open("r+b") as file:
            place = entry.payload_offset + entry.length // 2
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x40]))

    def forge(self, router_hash: int) -> None:
        """Corrupt a chunk and fix its checksums. No target may be running."""
        forge(self._find(router_hash), 4)

    def _find(self, router_hash: int) -> Record:
        """The record that holds a chunk, found in the segments' files."""
        for one in records(self.store_dir):
            if one.entry.router_hash == router_hash:
                return one
        raise LookupError(f"no chunk with router hash {router_hash:x} in {self.store_dir}")

    async def _answers(self) -> bool:
        hello = [{"role": "user", "content": "hello"}]
        for model in (MODEL, REFERENCE):
            await self.ask(hello, model=model, max_tokens=2)
        return True

    def _log(self, name: str, line: str) -> None:
        if line.startswith("ready after") or ": error: " in line:
            self.say(f"{name}: {line}")
