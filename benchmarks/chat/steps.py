"""The effect of heavy transfers on the engine's steps: a decoding batch, with and without loads from the store.

    python -m benchmarks.chat.steps --model DIR --hbm-tokens N --dram SIZE --dir DIR [--json FILE]

One engine with the tier, in this process. A batch decodes all the time. Other requests arrive at a fixed rate, each
with a cached prompt and one token to generate. In quiet windows they share one prompt, in HBM. In heavy windows their
prompts are from a pool beyond HBM and DRAM, and come from the store. Windows alternate. For each step this reports its
time, and the scheduler's part of it (`schedule` and `update_from_output`, including the tier). Steps that compute more
than decodes and the end of a prompt are left out: recomputing a chunk is not a cost of transfers.
"""

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ByteSize, Field

from benchmarks.chat.__main__ import (
    ENGINE_ENVIRONMENT,
    EngineError,
    Positive,
    add_engine_arguments,
    check_folders,
    engine_arguments,
    leave_on_sigterm,
    say,
    target_running,
    transfer_config,
)
from benchmarks.chat.__main__ import Options as EngineOptions
from benchmarks.chat.load import TOKEN_IDS, quantile
from graphs.services import free_port
from kvstore.errors import run_command, validated

FIGURES = ("step_ms_p50", "step_ms_p99", "scheduler_ms_p50", "scheduler_ms_p99")
_READY_SECONDS = 60.0
_SETTLE_SECONDS = 60.0
_DECODER_TOKENS = 64  # their prompts are short, so that they mostly decode


class Options(EngineOptions):
    """The command line, checked; the engine's part is that of benchmarks.chat."""

    running: Positive = 8
    prompt_tokens: Positive = 2200
    per_second: float = Field(4.0, gt=0)
    hot: ByteSize = ByteSize(0)
    ramp: float = Field(5.0, ge=0)


class Window(msgspec.Struct):
    heavy: bool
    steps: int
    step_ms_p50: float
    step_ms_p99: float
    scheduler_ms_p50: float
    scheduler_ms_p99: float
    visits: int
    left_out: int  # steps that computed more than that
    tier: dict[str, float]  # the tier's counters


class Report(msgspec.Struct):
    """Ratios are heavy / quiet: median, lowest and highest over pairs of windows."""

    windows: list[Window]
    step_ms_p50_ratio: tuple[float, float, float]
    step_ms_p99_ratio: tuple[float, float, float]
    scheduler_ms_p50_ratio: tuple[float, float, float]
    scheduler_ms_p99_ratio: tuple[float, float, float]


class Drive:
    """The engine, stepped by hand."""

    def __init__(self, options: Options, transfer: dict[str, object] | None):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(engine_arguments(options, transfer))
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parsed))
        self._options = options
        self._chance = random.Random(options.seed)
        self._numbers = itertools.count()
        scheduler = self._engine.engine_core.engine_core.scheduler
        self._tier: Any = scheduler.connector._tier
        self._scheduled = 0.0
        self._step_tokens = 0
        for name in ("schedule", "update_from_output"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))
        self.counted: Counter[str] = Counter()
        self._tier.get_stats = self._noted(self._tier.get_stats)

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = call(*args, **options)
            self._scheduled += time.perf_counter() - begun
            self._step_tokens = getattr(found, "total_num_scheduled_tokens", self._step_tokens)
            return found

        return timed

    def _noted(self, get_stats: Any) -> Any:
        def noted() -> Any:
            found = get_stats()
            if found is not None:
                self.counted.update(found.reduce())
            return found

        return noted

    def prompt(self, tokens: int) -> list[int]:
        return self._chance.choices(range(*TOKEN_IDS), k=tokens)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def ask(self, name: str, prompt: list[int], tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> set[str]:
        """Run a step; returns the requests that ended in it."""
        return {output.request_id for output in self._engine.step() if output.finished}

    def until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._tier.link.ready:
            if time.monotonic() > deadline:
                raise EngineError(f"the mover takes no commands after {_READY_SECONDS:.0f} s")
            self._tier.get_finished_jobs()
            time.sleep(0.05)

    def until_idle(self) -> None:
        """Run until all requests are answered, and written to the store."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        core = self._engine.engine_core.engine_core
        while self._engine.has_unfinished_requests() or (core.scheduler.has_requests() and time.monotonic() < deadline):
            self.step()

    def window(self, heavy: bool, visitors: Iterator[list[int]]) -> Window:
        options = self._options
        steps: list[float] = []
        scheduler: list[float] = []
        decoding: set[str] = set()
        due = time.monotonic()
        begin = due + options.ramp
        visits, left_out, before = 0, 0, self.counted.copy()
        while (now := time.monotonic()) < begin + options.seconds:
            while len(decoding) < options.running:
                name = f"decode-{next(self._numbers)}"
                decoding.add(name)
                self.ask(name, self.prompt(_DECODER_TOKENS), options.max_model_len - _DECODER_TOKENS - 1)
            if now >= due:
                due += 1 / options.per_second
                self.ask(f"visit-{next(self._numbers)}", next(visitors), 1)
                visits += now >= begin
            if now < begin:
                before = self.counted.copy()
            self._scheduled = 0.0
            started = time.perf_counter()
            decoding -= self.step()
            if now >= begin and self._step_tokens <= options.running + 2 * options.block_tokens:
                steps.append(1000 * (time.perf_counter() - started))
                scheduler.append(1000 * self._scheduled)
            else:
                left_out += now >= begin
        counted = {name: float(value - before[name]) for name, value in self.counted.items()}
        self._engine.abort_request(sorted(decoding))
        self.until_idle()
        return Window(
            heavy=heavy,
            steps=len(steps),
            step_ms_p50=round(quantile(steps, 0.5), 3),
            step_ms_p99=round(quantile(steps, 0.99), 3),
            scheduler_ms_p50=round(quantile(scheduler, 0.5), 3),
            scheduler_ms_p99=round(quantile(scheduler, 0.99), 3),
            visits=visits,
            left_out=left_out,
            tier=counted,
        )


def measure(options: Options, drive: Drive) -> Report:
    drive.until_ready()
    pool = [drive.prompt(options.prompt_tokens) for _ in range(options.pool)]
    for number, prompt in enumerate(pool):  # a few at a time, so that the store keeps up
        drive.ask(f"warm-{number}", prompt, 1)
        if number % 4 == 3:
            drive.until_idle()
    drive.until_idle()
    say(f"the store holds {len(pool)} prompts")
    visitors = {True: itertools.cycle(pool), False: itertools.repeat(drive.prompt(options.prompt_tokens))}
    drive.window(False, visitors[False])  # trigger compilation and allocation at first use
    windows = []
    for number in range(options.repeats):
        for heavy in (True, False) if number % 2 else (False, True):
            windows.append(drive.window(heavy, visitors[heavy]))
            say(line(windows[-1]))
    return Report(windows, **{f"{name}_ratio": ratios(windows, name) for name in FIGURES})


def ratios(windows: list[Window], name: str) -> tuple[float, float, float]:
    """Heavy / quiet: median, lowest and highest over pairs of windows."""
    heavy, quiet = ([getattr(one, name) for one in windows if one.heavy is kind] for kind in (True, False))
    found = sorted(one / other for one, other in zip(heavy, quiet, strict=True))
    return round(statistics.median(found), 3), round(found[0], 3), round(found[-1], 3)


def line(window: Window) -> str:
    name = "heavy" if window.heavy else "quiet"
    moved = {name.removeprefix("vllm:kvtier_"): value for name, value in window.tier.items() if value}
    return (
        f"{name}: {window.steps} steps of {window.step_ms_p50:.1f} ms (p99 {window.step_ms_p99:.1f}),"
        f" scheduler {window.scheduler_ms_p50:.2f} ms (p99 {window.scheduler_ms_p99:.2f});"
        f" {window.left_out} left out; {window.visits} visits; {moved}"
    )


def parse() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--running", help="requests that decode; default 8")
    add("--prompt-tokens", help="of visitors; default 2200")
    add("--per-second", help="visitors; default 4")
    add("--pool", help="prompts of visitors in heavy windows; default 80")
    add("--seconds", help="of a window; default 30")
    add("--ramp", help="seconds before each; default 5")
    add("--repeats", help="pairs of windows; default 5")
    add_engine_arguments(parser)
    add("--hot", help="cache in the target's memory, for more than the disk brings; default 0")
    add("--json", dest="json_file", help="where to write the result")
    options = validated(Options, vars(parser.parse_args()))
    check_folders(options)
    return options


def main() -> None:
    leave_on_sigterm()
    options = parse()
    # The engine runs in this process, where its scheduler can be timed.
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **ENGINE_ENVIRONMENT})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-steps-", dir=options.dir)))
        store, address = folder / "store", f"127.0.0.1:{free_port()}"
        store.mkdir()
        mode = "store-hot" if options.hot else "store"
        stack.enter_context(target_running(options, mode, store, address, folder / "log"))
        drive = Drive(options, transfer_config(options, mode, address, store))
        report = measure(options, drive)
        drive.close()
    for name in FIGURES:
        middle, low, high = ratios(report.windows, name)
        print(f"{name}: heavy over quiet {middle:.2f} ({low:.2f} to {high:.2f})")
    if options.json_file:
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    run_command("benchmarks.chat.steps", main)
