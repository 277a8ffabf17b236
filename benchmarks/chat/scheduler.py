"""The tier's cost in the engine's scheduler, in microseconds per uncached prompt: no model, no GPU.

    python -m benchmarks.chat.scheduler [--prompt-tokens 2200] [--running 16] [--requests 64] [--rounds 7] [--json FILE]

vLLM's own scheduler runs at a GPU's block size. A stub replaces the model. It answers every step at once with one token
per request, and reports copies between HBM and DRAM as done one step later. The timed thread is the scheduler's: adding
requests, `schedule` and `update_from_output`. Modes: plain (no connector), dram (vLLM's own offloading), and store
(this project, with its mover and a target). Every mode gets the same requests; the order of modes alternates. Figures
are medians over rounds; ratios are taken within a round.
"""

import argparse
import contextlib
import cProfile
import gc
import os
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.chat.__main__ import Options as EngineOptions
from benchmarks.chat.__main__ import leave_on_sigterm, say, target_running, transfer_config
from graphs.services import free_port
from graphs.tiny_model import make_tiny_model
from kvstore.errors import ConfigError, run_command, validated

MODES = ("plain", "dram", "store")
Positive = Annotated[int, Field(ge=1)]
_READY_SECONDS = 60.0


class Options(BaseModel):
    """The command line, checked."""

    model_config = ConfigDict(extra="forbid")

    modes: list[str] = list(MODES)
    prompt_tokens: Positive = 2200
    answer_tokens: Positive = 165
    running: Positive = 16
    requests: Positive = 64
    rounds: Positive = 7
    block_tokens: Positive = 16
    events: bool = False
    profile: str = ""
    json_file: Path | None = None


class Cost(msgspec.Struct):
    """Medians over rounds, with quartiles of the ratio to the first mode in the same round."""

    mode: str
    request_us: float  # time of the scheduler's thread for a request, from arrival to end
    decode_step_us: float  # a step in which every running request decodes
    decode_step_us_p99: float
    ratio: float
    ratio_quartiles: tuple[float, float]


class Drive:
    """One scheduler of vLLM, with a stub for the rest of the engine."""

    def __init__(self, options: Options, model: Path, transfer: dict[str, object] | None, *, hbm_blocks: int = 0):
        import torch
        from vllm.config import KVEventsConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
        from vllm.v1.structured_output import StructuredOutputManager

        self._options = options
        of_request = -(-(options.prompt_tokens + options.answer_tokens) // options.block_tokens)
        blocks = hbm_blocks or 2 * options.running * of_request
        config = EngineArgs(
            model=str(model),
            max_num_seqs=options.running,
            max_num_batched_tokens=2 * options.prompt_tokens,
            max_model_len=options.prompt_tokens + options.answer_tokens + 1,
            prefix_caching_hash_algo="sha256_cbor",
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null") if options.events else None,
            kv_transfer_config=transfer,
        ).create_engine_config()
        config.cache_config.block_size = options.block_tokens
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(options.block_tokens, num_kv_heads=1, head_size=64, dtype=torch.float32)
        layers, page = ["model.layers.0.self_attn.attn"], spec.page_size_bytes
        tensors = [KVCacheTensor(blocks * page, layers, layer_stride=blocks * page, block_stride=page)]
        cache = KVCacheConfig(blocks, tensors, [KVCacheGroupSpec(layers, spec)], kv_cache_layout="LBHNC")
        config.cache_config.kv_cache_layout = cache.kv_cache_layout
        self.executor = standing_in(config)
        init_none_hash(sha256_cbor)
        self._hasher = get_request_block_hasher(options.block_tokens, sha256_cbor)
        self._scheduler: Any = Scheduler(
            config, cache, StructuredOutputManager(config), options.block_tokens, log_stats=True
        )
        self._copied: list[int] = []
        self._received: dict[int, str] = {}

    def until_ready(self) -> None:
        """Wait until the mover takes commands."""
        deadline = time.monotonic() + _READY_SECONDS
        tier = getattr(self._scheduler.connector, "_tier", None)
        while tier is not None and not tier.link.ready and time.monotonic() < deadline:
            tier._step()
            time.sleep(0.05)

    def play(self, seed: int) -> tuple[float, list[float]]:
        """Seconds of the scheduler's thread for all requests, and for each step in which all decode."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        options, scheduler = self._options, self._scheduler
        chance = random.Random(seed)
        spent, decodes, left = 0.0, [], options.requests
        sampling = SamplingParams(max_tokens=options.answer_tokens, ignore_eos=True)
        while left or scheduler.has_unfinished_requests():
            while left and len(scheduler.running) + len(scheduler.waiting) < options.running:
                tokens = chance.choices(range(40, 120), k=options.prompt_tokens)
                request = Request(f"{seed}-{left}", tokens, sampling, None, block_hasher=self._hasher)
                begun = time.thread_time()
                scheduler.add_request(request)
                spent += time.thread_time() - begun
                left -= 1
            begun = time.thread_time()
            output = scheduler.schedule()
            between = time.thread_time()
            answer = self._answer(output)
            resumed = time.thread_time()
            scheduler.update_from_output(output, answer)
            took = between - begun + time.thread_time() - resumed
            spent += took
            if output.total_num_scheduled_tokens == len(output.num_scheduled_tokens) == options.running:
                decodes.append(took)
        until = time.monotonic() + _READY_SECONDS
        while scheduler.has_requests() and time.monotonic() < until:
            self.idle_step()  # until write-behind cannot overlap the next round
        return spent, decodes

    def idle_step(self) -> None:
        output = self._scheduler.schedule()
        self._scheduler.update_from_output(output, self._answer(output))

    def _answer(self, output: Any) -> Any:
        """A token for every request whose prompt is computed. It reports the copies that the last step began, and those
        that this step waited for."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        done = OffloadingWorkerMetadata()
        for job in self._copied:
            done.mark_completed(job)
        received = {request for job, request in self._received.items() if job in self._copied}
        meta = output.kv_connector_metadata
        first = getattr(meta, "in_step", ())
        for job in first:
            done.mark_completed(job)
        self._copied = [] if meta is None else [job for job in (*meta.load_jobs, *meta.store_jobs) if job not in first]
        self._received = {} if meta is None else {job: one.req_id for job, one in meta.load_jobs.items()}
        names = list(output.num_scheduled_tokens)
        requests = [self._scheduler.requests[name] for name in names]
        return ModelRunnerOutput(
            names,
            {name: place for place, name in enumerate(names)},
            [[7] if request.num_computed_tokens >= request.num_tokens else [] for request in requests],
            kv_connector_output=KVConnectorOutput(finished_recving=received, kv_connector_worker_meta=done),
        )

    def close(self) -> None:
        self._scheduler.shutdown()


def standing_in(config: Any) -> Any:
    """A stub of vLLM's executor whose ranks compute nothing. When asked for their weights, they answer `loaded`, which
    tests may replace. `asked` counts the questions, and `adapters_asked` lists the adapters' numbers. Their room for
    adapters is unlimited."""
    from vllm.v1.executor.abstract import Executor

    from components.worker import weights

    class StandIn(Executor):  # type: ignore[misc]
        def _init_executor(self) -> None:
            self.loaded: object = weights.RankDigest(b"one model", (1,), 1, 0.0)
            self.asked = 0
            self.adapters_asked: list[int] = []

        def collective_rpc(
            self, method: object, timeout: float | None = None, args: tuple[object, ...] = (), **options: object
        ) -> list[object]:
            ranks = self.parallel_config.world_size
            if method is not weights.answer:
                return [None] * ranks
            question, *of = args
            if question == "model_digest":
                self.asked += 1
                return [self.loaded] * ranks
            adapter: Any = of[0]
            self.adapters_asked.append(adapter.lora_int_id)
            return [weights.LoadedAdapter(adapter.lora_path, frozenset(range(1000)))] * ranks

        def check_health(self) -> None:
            pass

    return StandIn(config)


@contextlib.contextmanager
def drives(options: Options, folder: Path) -> Iterator[dict[str, Drive]]:
    model, address = make_tiny_model(folder / "model"), f"127.0.0.1:{free_port()}"
    rows = 4 * options.requests * -(-options.prompt_tokens // options.block_tokens)
    engine = validated(
        EngineOptions,
        {"model": str(model), "dram": 512 * rows * options.block_tokens, "capacity": 4 << 30, "dir": folder},
    )
    with ExitStack() as stack:
        store = folder / "store"
        store.mkdir()
        if "store" in options.modes:
            stack.enter_context(target_running(engine, "store", store, address, folder / "log"))
        found = {}
        for mode in options.modes:
            found[mode] = Drive(options, model, transfer_config(engine, mode, address, folder))
            stack.callback(found[mode].close)
            found[mode].until_ready()
        yield found


def measure(options: Options, found: dict[str, Drive]) -> list[Cost]:
    import vllm.envs

    gc.collect()
    gc.freeze()  # this and the next line: as vLLM's engine does at start
    vllm.envs.enable_envs_cache()
    spent: dict[str, list[float]] = {mode: [] for mode in found}
    decodes: dict[str, list[float]] = {mode: [] for mode in found}
    for number in range(-1, options.rounds):  # the first one warms up
        modes = list(found) if number % 2 else list(reversed(found))
        for mode in modes:
            profile = cProfile.Profile() if mode == options.profile and number >= 0 else None
            with profile or contextlib.nullcontext():
                seconds, steps = found[mode].play(number + 1)
            if profile:
                pstats.Stats(profile).sort_stats("cumtime").print_stats("components|offload|events", 60)
            if number >= 0:
                spent[mode].append(seconds / options.requests)
                decodes[mode] += steps
        say(f"round {number}: " + ", ".join(f"{mode} {1e6 * spent[mode][-1]:.0f} us" for mode in found if spent[mode]))
    first = spent[next(iter(found))]
    costs = []
    for mode in found:
        ratios = [one / base for one, base in zip(spent[mode], first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        steps = sorted(decodes[mode])
        costs.append(
            Cost(
                mode,
                round(1e6 * statistics.median(spent[mode]), 1),
                round(1e6 * statistics.median(steps), 1),
                round(1e6 * steps[int(0.99 * len(steps))], 1),
                round(middle, 3),
                (round(low, 3), round(high, 3)),
            )
        )
    return costs


def parse() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat.scheduler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--modes", help=f"default {','.join(MODES)}")
    add("--prompt-tokens", help="default 2200")
    add("--answer-tokens", help="default 165")
    add("--running", help="requests at once; default 16")
    add("--requests", help="a round; default 64")
    add("--rounds", help="default 7")
    add("--block-tokens", help="default 16, as on GPUs")
    add("--events", action="store_true", default=None, help="with KV events, as under Dynamo")
    add("--profile", help="print a profile of this mode")
    add("--json", dest="json_file", help="where to write the result")
    values = vars(parser.parse_args())
    if values["modes"] is not None:
        values["modes"] = values["modes"].split(",")
    options = validated(Options, values)
    for mode in options.modes:
        if mode not in MODES:
            raise ConfigError("modes", mode, f"some of {','.join(MODES)}")
    return options


def main() -> None:
    leave_on_sigterm()
    options = parse()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory(prefix="kvtier-scheduler-") as folder, drives(options, Path(folder)) as found:
        costs = measure(options, found)
    print(f"{'mode':<8}{'us a request':>14}{'us a decode step':>18}{'p99':>8}{'ratio':>8}  quartiles")
    for one in costs:
        print(
            f"{one.mode:<8}{one.request_us:>14.0f}{one.decode_step_us:>18.0f}{one.decode_step_us_p99:>8.0f}"
            f"{one.ratio:>8.2f}  {one.ratio_quartiles[0]:.2f} to {one.ratio_quartiles[1]:.2f}"
        )
    if options.json_file:
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.chat.scheduler", main)
