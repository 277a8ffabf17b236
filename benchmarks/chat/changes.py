"""Whether answers stay correct while the model changes: weights and adapters are replaced, engines restarted.

    python -m benchmarks.chat.changes --requests 1000 --seed 1 [--dir DIR] [--json FILE]

Two engines with the tier over one store, and one without, each in a process of its own; a small model with random
weights. Between requests a change is drawn from the seed, with or without requests in flight:

- other weights, by the engine's reload or by a function that writes them in place;
- another adapter under a name and path that was used before;
- sleep and wake-up, or empty caches;
- a restart, also between the new files and the reload.

There are more adapters than an engine holds. Requests share few prompts, so that most find KV in HBM, DRAM or the
store. After each change the engine's own cache is reset, as docs/identity.md says. Every answer is compared with that
of the engine without the tier with the same weights and adapter: tokens, and logprobs up to rounding. A control runs
first: answers of all versions must differ by many times the rounding, so that KV of other weights or adapters is
detected.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from itertools import combinations, count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, Field

from benchmarks.chat.__main__ import Options as ChatOptions
from benchmarks.chat.__main__ import say, target_running, transfer_config
from graphs.services import free_port
from graphs.tiny_model import ALPHABET, make_tiny_adapter, make_tiny_model
from kvstore.errors import run_command, validated

BLOCK_TOKENS = 128
PROMPT_TOKENS, ANSWER_TOKENS = 600, 8
# The largest difference between logprobs of one answer, computed with different batch sizes or from cached KV.
ROUNDING = 2e-3
# The number of versions of weights and adapters, and of prompts.
WEIGHTS, ADAPTERS, PROMPTS = 3, 3, 5
NAMES = ("first", "second", "third")  # names of adapters in requests
ADAPTERS_HELD = 2
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CHANGES = ("reload", "write in place", "adapter", "sleep", "crash", "crash in an update", "empty", "call")
_RESET_STEPS = 200
_ANSWER_SECONDS = 300.0  # to start, to answer a prompt


class Options(BaseModel):
    dir: Path = Path(tempfile.gettempdir())
    requests: int = Field(1000, ge=1)
    seed: int = 1
    change_share: float = Field(0.08, ge=0, le=1)


class Answer(msgspec.Struct):
    tokens: list[int]
    logprobs: list[float]

    def off(self, other: "Answer") -> float:
        """The largest difference of a logprob; infinite if a token differs."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))


class Report(msgspec.Struct):
    command: str
    requests: int = 0
    differing: int = 0
    largest_difference: float = 0.0
    smallest_difference_of_versions: float = 0.0
    cached_requests: int = 0
    cached_tokens: int = 0
    stored_chunks: int = 0
    fetched_chunks: int = 0
    changes: dict[str, int] = {}
    in_flight: int = 0  # changes with requests in flight
    hits_came_back: int = 0  # changes after which the engine used a cache before its next change
    checks: dict[str, int] = {}
    seconds: float = 0.0
    faults: list[str] = []


class Engine:
    """An engine whose core runs in this process; one at a time. `adapters` is the folder of its adapters, by name."""

    def __init__(self, folder: Path, transfer: dict[str, object] | None, **options: object):
        self.folder = self.adapters = folder
        self._ids = count()
        self._adapters_asked = False  # by the last request
        self.start(transfer, **options)

    def start(self, transfer: dict[str, object] | None, **options: object) -> None:
        from vllm import LLM

        given: dict[str, Any] = {
            "model": str(self.folder),
            "dtype": "float32",
            "max_model_len": 2048,
            "block_size": BLOCK_TOKENS,
            "enforce_eager": True,
            "prefix_caching_hash_algo": "sha256_cbor",
            "disable_log_stats": False,
            "kv_transfer_config": transfer,
        }
        self.llm = LLM(**{**given, **options})
        self.engine: Any = self.llm.llm_engine
        if transfer is not None:
            tier = self.engine.engine_core.engine_core.scheduler.connector._tier
            until = time.monotonic() + _ANSWER_SECONDS
            while not tier.link.ready and time.monotonic() < until:  # the first prompt would not wait for the mover
                tier.get_finished_jobs()
                time.sleep(0.05)

    def stop(self) -> None:
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self.engine.engine_core.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del self.llm, self.engine

    def counted(self) -> dict[tuple[str, str], float]:
        """The tier's counters since the start, by name and outcome."""
        return {
            (metric.name, metric.labels["outcome"]): metric.value
            for metric in self.llm.get_metrics()
            if metric.name.startswith("vllm:kvtier") and "outcome" in metric.labels
        }

    # ---- requests

    def add(self, prompt: list[int], adapter: str | None, answer_tokens: int = ANSWER_TOKENS) -> str:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        # vLLM's CPU kernels apply a request's adapter also to the requests without one in the same step.
        scheduler = self.engine.engine_core.engine_core.scheduler  # it lists aborted requests, too
        while (adapter is not None) != self._adapters_asked and scheduler.has_unfinished_requests():
            self.step()
        self._adapters_asked = adapter is not None
        lora = None
        if adapter is not None:
            lora = LoRARequest(adapter, 1 + NAMES.index(adapter), str(self.adapters / adapter))
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True, logprobs=0)
        req_id = f"{next(self._ids)}"
        self.engine.add_request(req_id, {"prompt_token_ids": prompt}, sampling, lora_request=lora)
        return req_id

    def step(self) -> dict[str, Any]:
        return {output.request_id: output for output in self.engine.step() if output.finished}

    def ask(self, prompt: list[int], adapter: str | None) -> tuple[Answer, int]:
        """The answer, and how many of the prompt's tokens came from a cache."""
        req_id = self.add(prompt, adapter)
        while True:
            if output := self.step().get(req_id):
                said = output.outputs[0]
                logprobs = [row[token].logprob for row, token in zip(said.logprobs, said.token_ids, strict=True)]
                return Answer(list(said.token_ids), logprobs), output.num_cached_tokens or 0

    def stored(self) -> int:
        """The number of chunks that this engine has stored. Runs one step to learn it."""
        self.engine.step()
        counted = self.counted()
        return int(sum(counted.get(("vllm:kvtier_stored_chunks", outcome), 0) for outcome in ("stored", "known")))

    def begin(self, asked: list[tuple[list[int], str | None, int]], steps: int) -> None:
        """Start requests without waiting for their answers, and run `steps` steps."""
        for prompt, adapter, answer_tokens in asked:
            self.add(prompt, adapter, answer_tokens)
        for _ in range(steps):
            self.step()

    # ---- changes

    def forget(self, *, external: bool = False) -> None:
        """Reset the engine's prefix cache. The engine refuses that while requests hold blocks."""
        for _ in range(_RESET_STEPS):
            if self.engine.reset_prefix_cache(reset_connector=external):
                return
            self.step()
        raise RuntimeError("the engine does not reset its cache")

    def reload(self) -> None:
        self.llm.collective_rpc("reload_weights")

    def write_in_place(self) -> None:
        self.llm.collective_rpc(_load_file, args=(str(self.folder / "model.safetensors"),))

    def sleep(self, level: int) -> None:
        """Sleep and wake up. From level 1 on, requests in flight are aborted. Ranks on a CPU keep their weights; all
        else is as on a GPU."""
        self.llm.sleep(level, mode="abort" if level else "keep")
        self.llm.wake_up()

    def call(self) -> None:
        self.llm.collective_rpc(_nothing)

    def unload(self, adapter: str) -> None:
        self.engine.remove_lora(1 + NAMES.index(adapter))


def _load_file(worker: Any, path: str) -> None:
    from safetensors.torch import load_file
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.get_model()
    initialize_layerwise_reload(model)
    model.load_weights(load_file(path).items())
    finalize_layerwise_reload(model, worker.model_config)


def _nothing(worker: Any) -> None:
    """A custom call, of which the tier cannot know that it changes nothing."""


def _serve(orders: Connection, folder: Path, transfer: dict[str, object] | None, options: dict[str, object]) -> None:
    engine = Engine(folder, transfer, **options)
    orders.send(None)
    while True:
        try:
            name, args, more = orders.recv()
        except EOFError:
            os._exit(0)
        orders.send(getattr(engine, name)(*args, **more))


class Served:
    """An engine in another process. `weights` and `adapters` are the versions that it computes with; their files are in
    its folder."""

    def __init__(self, folder: Path, models: list[Path], transfer: dict[str, object] | None):
        self.folder, self.models, self.transfer = folder, models, transfer
        shutil.copytree(models[0], folder)
        self.weights = 0
        self.adapters: dict[str, int] = {}
        self.changed = False  # since its last use of a cache
        self.counters: Counter[tuple[str, str]] = Counter()
        self.start()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._orders, theirs = spawn.Pipe()
        held = {"max_loras": ADAPTERS_HELD, "max_cpu_loras": ADAPTERS_HELD}
        options = {"enable_lora": True, "max_lora_rank": 8, **held}
        self._process = spawn.Process(target=_serve, args=(theirs, self.folder, self.transfer, options))
        self._process.start()
        theirs.close()
        self._answer("start")

    def call(self, name: str, *args: object, **more: object) -> Any:
        self._orders.send((name, args, more))
        return self._answer(name)

    def _answer(self, name: str) -> Any:
        if not self._orders.poll(_ANSWER_SECONDS):
            self._process.kill()
            raise RuntimeError(f"engine {self.folder.name} does not {name} within {_ANSWER_SECONDS:.0f} s")
        return self._orders.recv()

    def kill(self) -> None:
        self.counters.update({key: int(number) for key, number in self.call("counted").items()})
        self._process.kill()
        self._process.join()

    def replace_weights(self, version: int) -> None:
        shutil.copy(self.models[version] / "model.safetensors", self.folder / "model.safetensors")
        self.weights = version

    def replace_adapter(self, name: str, version: int) -> None:
        make_tiny_adapter(self.folder / name, self.folder, seed=version)
        self.adapters[name] = version


class Soak:
    def __init__(self, options: Options, folder: Path, report: Report, serving: ExitStack):
        self.options, self.folder, self.report = options, folder, report
        self.chance = random.Random(options.seed)
        spoken = [ord(letter) for letter in ALPHABET]
        self.prompts = [self.chance.choices(spoken, k=PROMPT_TOKENS) for _ in range(PROMPTS)]
        self.models = [make_tiny_model(folder / f"weights-{n}", layers=2, seed=10 + n) for n in range(WEIGHTS)]
        self.references: dict[tuple[int, int | None, int], Answer] = {}
        address = f"127.0.0.1:{free_port()}"
        values = {"model": str(self.models[0]), "dir": folder, "dram": 64 << 20, "capacity": 4 << 30}
        chat = validated(ChatOptions, values)
        transfer: Any = transfer_config(chat, "store", address, folder)
        # Long timeouts, so that a slow machine does not cause recompute.
        transfer["kv_connector_extra_config"]["secondary_tiers"][0] |= {"deadline_ms": 60_000, "lookup_ms": 60_000}
        self.transfer = transfer
        (folder / "store").mkdir()
        serving.enter_context(target_running(chat, "store", folder / "store", address, folder / "target.log"))

    def refer(self) -> None:
        """Compute the expected answers with an engine without the tier, and check that versions differ in their
        answers."""
        engine = Served(self.folder / "plain", self.models, None)
        for weights in range(WEIGHTS):
            engine.replace_weights(weights)
            engine.call("reload")
            for adapter in (None, *range(ADAPTERS)):
                if adapter is not None:
                    if engine.adapters:
                        engine.call("unload", NAMES[0])
                    engine.replace_adapter(NAMES[0], adapter)
                engine.call("forget")
                for number, prompt in enumerate(self.prompts):
                    answer, _ = engine.call("ask", prompt, None if adapter is None else NAMES[0])
                    self.references[weights, adapter, number] = answer
        engine.kill()
        self.report.smallest_difference_of_versions = min(
            one.off(other)
            for number in range(PROMPTS)
            for one, other in combinations([at for key, at in self.references.items() if key[2] == number], 2)
        )

    def run(self) -> None:
        self.refer()
        say(f"references: {len(self.references)}")
        engines = [Served(self.folder / name, self.models, self.transfer) for name in ("a", "b")]
        try:
            while self.report.requests < self.options.requests:
                engine = self.chance.choice(engines)
                if self.chance.random() < self.options.change_share:
                    self.change(engine)
                else:
                    self.ask(engine)
        finally:
            for engine in engines:
                engine.kill()
        for engine in engines:
            for (name, outcome), number in engine.counters.items():
                if "identity" in name:
                    self.report.checks[outcome] = self.report.checks.get(outcome, 0) + number
                elif "stored" in name and outcome == "stored":
                    self.report.stored_chunks += number
                elif "fetched" in name and outcome == "hit":
                    self.report.fetched_chunks += number

    def ask(self, engine: Served) -> None:
        adapter = self.adapter(engine)
        number = self.chance.randrange(PROMPTS)
        answer, cached = engine.call("ask", self.prompts[number], adapter)
        version = None if adapter is None else engine.adapters[adapter]
        off = answer.off(self.references[engine.weights, version, number])
        self.report.requests += 1
        self.report.cached_requests += cached > 0
        self.report.cached_tokens += cached
        self.report.hits_came_back += engine.changed and cached > 0
        engine.changed = engine.changed and not cached
        if off > ROUNDING:
            self.report.differing += 1
            self.report.faults.append(
                f"request {self.report.requests}: {engine.folder.name}, weights {engine.weights}, adapter {version}, "
                f"prompt {number}, {cached} tokens from caches: off by {off}"
            )
            say(self.report.faults[-1])
        else:
            self.report.largest_difference = max(self.report.largest_difference, off)
        if self.report.requests % 50 == 0:
            say(f"{self.report.requests} requests, {self.report.differing} differing")

    def adapter(self, engine: Served) -> str | None:
        return self.chance.choice([None, *engine.adapters])

    def change(self, engine: Served) -> None:
        kind = self.chance.choice(CHANGES)
        self.report.changes[kind] = self.report.changes.get(kind, 0) + 1
        say(f"after {self.report.requests} requests, {engine.folder.name}: {kind}")
        engine.changed = True
        if "crash" not in kind and self.chance.random() < 0.5:
            # In flight during a change: their expected answers are undefined.
            self.report.in_flight += 1
            begun = [
                (self.chance.choice(self.prompts), self.adapter(engine), self.chance.randint(1, 200))
                for _ in range(self.chance.randint(1, 3))
            ]
            engine.call("begin", begun, self.chance.randint(0, 6))
        match kind:
            case "reload" | "write in place":
                engine.replace_weights(self.chance.randrange(WEIGHTS))
                engine.call(kind.replace(" ", "_"))
                engine.call("forget")
            case "adapter":
                name = self.chance.choice(NAMES)
                if name in engine.adapters:
                    engine.call("unload", name)
                engine.replace_adapter(name, self.chance.randrange(ADAPTERS))
                engine.call("forget")
            case "sleep":
                level = self.chance.randrange(3)
                say(f"sleep level {level}")
                engine.call("sleep", level)
                if level == 2:  # on a GPU, level 2 discards the weights
                    engine.replace_weights(self.chance.randrange(WEIGHTS))
                    engine.call("reload")
                    engine.call("forget")
            case "crash" | "crash in an update":
                if kind != "crash":
                    engine.replace_weights(self.chance.randrange(WEIGHTS))
                    for name in engine.adapters:
                        engine.replace_adapter(name, self.chance.randrange(ADAPTERS))
                engine.kill()
                engine.start()
            case "empty":
                engine.call("forget", external=self.chance.random() < 0.5)
            case "call":
                engine.call("call")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat.changes", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="for the models and the target")
    parser.add_argument("--requests", help="default 1000")
    parser.add_argument("--seed", help="default 1")
    parser.add_argument("--change-share", help="of what is done, how much is a change and not a request; default 0.08")
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    path = given.pop("json")
    options = validated(Options, {name: value for name, value in given.items() if value is not None})
    os.environ.update(ENVIRONMENT)
    report = Report(" ".join(["python", "-m", "benchmarks.chat.changes", *sys.argv[1:]]))
    begun = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvtier-changes-", dir=options.dir) as folder, ExitStack() as serving:
        Soak(options, Path(folder), report, serving).run()
    report.seconds = time.monotonic() - begun
    if report.smallest_difference_of_versions < 5 * ROUNDING:
        report.faults.append("the versions' answers are too much alike for a comparison to prove anything")
    if path:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(
        f"{report.requests} requests, {report.differing} with other tokens or logprobs; {report.cached_requests} used "
        f"{report.cached_tokens} cached tokens; {report.stored_chunks} chunks stored, {report.fetched_chunks} fetched\n"
        f"largest difference {report.largest_difference:.1e}, smallest between versions "
        f"{report.smallest_difference_of_versions:.1e}\nchanges {report.changes}: {report.in_flight} with requests in "
        f"flight, {report.hits_came_back} of {sum(report.changes.values())} followed by hits\nchecks {report.checks}\n"
        f"{report.seconds:.0f} s"
    )
    print("\n".join(report.faults))
    return 1 if report.faults else 0


if __name__ == "__main__":
    run_command("benchmarks.chat.changes", main)
