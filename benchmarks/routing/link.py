"""Load, load a part, or recompute: the router's choice compared with fixed choices, for links of different speeds.

    python -m benchmarks.routing.link --json FILE [--rates 2000,400,...] [--repeats N]

A real cluster on the CPU engine: one worker, the router, and a target behind a link of limited rate. The link is a
proxy on loopback with one token bucket for each direction. Every prompt is only in the store. Its TTFT is measured with
the router's choice, and with a forced one: load all, half, or nothing. Each is measured with an idle worker, and with a
worker that computes another prompt, which hides a part of the fetch. The router does not know the link's rate; it
learns it from the worker's reports. When the link gets faster, the router recomputes until the old measurement expires.
The benchmark waits for that.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from components.router.records import Decision
from components.router.speeds import FORGET_MS
from graphs.services import free_port, nats_url
from graphs.tiny_model import make_tiny_model
from graphs.trial import BLOCK_TOKENS, Trial
from kvstore.bus.plan import FIELD, make_plan
from kvstore.keys import sequence_hashes

RATES_MB = (2000, 800, 400, 200, 100, 50, 400)
CHUNKS = 24
PROMPT_TOKENS = CHUNKS * BLOCK_TOKENS + 40
LEARNING = 4  # warm-up prompts at each rate
# With this many heads, a token has 32 KiB of KV. One core computes some 100 MB/s, in the middle of the rates.
HEADS = 16
_PIECE_BYTES = 256 << 10
_REPORTS_SECONDS = 8.0  # until the median of the router's reports has this rate
_HELD_SECONDS = 12.0  # a worker reports a measurement for 10 s
_HEARD_SECONDS = 0.5  # until Dynamo's index is up to date
FORCED = {"load": CHUNKS, "half": CHUNKS // 2, "compute": 0}


class Link:
    """A TCP proxy with a rate limit each way, for all connections together. It holds one piece of each connection at a
    time."""

    def __init__(self, target: str):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes_per_second = 1e12
        self._lock = threading.Lock()
        self._free_at = {"in": 0.0, "out": 0.0}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                host, port = self._target.split(":")
                try:
                    far = socket.create_connection((host, int(port)), timeout=10)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for source, sink, way in ((near, far, "in"), (far, near, "out")):
                    threading.Thread(target=self._carry, args=(source, sink, way), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with contextlib.suppress(OSError):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while count := source.recv_into(buffer):
                with self._lock:
                    until = max(time.monotonic(), self._free_at[way]) + count / self.bytes_per_second
                    self._free_at[way] = until
                time.sleep(max(0.0, until - time.monotonic()))
                sink.sendall(buffer[:count])
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Row(msgspec.Struct):
    """Times are medians over the repeats, in ms."""

    mb_per_second: int
    worker: str  # idle or busy
    chose: list[int]  # chunks to fetch, of CHUNKS, for each repeat
    ttft_ms: dict[str, float]  # router, load, half, compute
    fetched_chunks: dict[str, float]
    predicted_ms: float
    over_best: float  # the router's TTFT divided by the lowest of the four


class Result(msgspec.Struct):
    prompt_tokens: int
    chunks: int
    chunk_bytes: int
    rows: list[Row]


class Bench:
    def __init__(self, trial: Trial, link: Link, page: str, seed: int):
        self._trial, self._link, self._page = trial, link, page
        self._chance = random.Random(seed)
        self._worker = trial.workers[0]

    async def connect(self) -> None:
        self._routed = await self._trial.client("dynamo.kvtier-router.generate")
        self._direct = await self._trial.client("dynamo.backend.generate")
        self._worker_id = await self._trial.worker_id(self._worker)

    def prompt(self) -> list[int]:
        return [self._chance.randrange(256) for _ in range(PROMPT_TOKENS)]

    async def stored(self) -> tuple[list[int], list[str | None]]:
        """A new prompt that is only in the store, and the targets of its chunks."""
        tokens = self.prompt()
        await self._first_token(tokens, 0)
        hashes = sequence_hashes(tokens, BLOCK_TOKENS)[:CHUNKS]
        places: list[str | None] = []

        async def announced() -> bool:
            places[:] = self._trial.located(hashes)
            return len(places) == CHUNKS and all(places)

        await self._trial.until(announced, "the store has the prompt", 60)
        return tokens, places

    async def measure(
        self, tokens: list[int], places: list[str | None], forced: str, busy: bool
    ) -> tuple[float, float]:
        """TTFT in seconds, and the number of chunks fetched."""
        await self._trial.clear(self._worker)
        await self._first_token([1] * 8, 0)  # an engine announces evictions with its next step
        await asyncio.sleep(_HEARD_SECONDS)
        before = await self._fetched()
        ahead = asyncio.create_task(self._first_token(self.prompt(), None)) if busy else None
        if ahead is not None:
            await asyncio.sleep(0.05)  # it is being computed
        took = await self._first_token(tokens, None if forced == "router" else FORCED[forced], places)
        if ahead is not None:
            await ahead
        await self._trial.until_idle()
        return took, await self._fetched() - before

    async def last_decision(self) -> Decision:
        async with self._trial.http.get(f"http://{self._page}/decisions?limit=5") as reply:
            return msgspec.json.decode(await reply.read(), type=list[Decision])[0]

    async def _fetched(self) -> float:
        values = await self._trial.metrics(self._worker)
        return values.get(("vllm:kvtier_fetched_chunks_total", "hit"), 0.0)

    async def _first_token(self, tokens: list[int], chunks: int | None, places: Sequence[str | None] = ()) -> float:
        """TTFT with the router's decision or, with `chunks`, with a forced load of so many chunks without deadline."""
        request: dict[str, Any] = {
            "model": "tiny",
            "token_ids": tokens,
            "sampling_options": {"temperature": 0.0},
            "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
            "output_options": {},
        }
        begun = time.perf_counter()
        if chunks is None:
            outputs = await self._routed.random(request)
        else:
            plan = make_plan(places[:chunks], fetch=chunks, deadline_ms=60_000, chunk_ms=0, decision_id="forced")
            request["extra_args"] = {"sampling_options": {"extra_args": {FIELD: msgspec.to_builtins(plan)}}}
            outputs = await self._direct.direct(request, self._worker_id)
        took = 0.0
        async for output in outputs:
            if not took and output.data().get("token_ids"):
                took = time.perf_counter() - begun
        return took


async def row(bench: Bench, rate: int, busy: bool, repeats: int, chance: random.Random) -> Row:
    took: dict[str, list[float]] = {name: [] for name in ("router", *FORCED)}
    fetched: dict[str, list[float]] = {name: [] for name in took}
    chose, predicted = [], []
    for _ in range(repeats):
        tokens, places = await bench.stored()
        for name in chance.sample(list(took), len(took)):
            seconds, chunks = await bench.measure(tokens, places, name, busy)
            took[name].append(1000 * seconds)
            fetched[name].append(chunks)
            if name == "router":
                decision = await bench.last_decision()
                chose.append(decision.fetch_chunks)
                predicted.append(1000 * decision.predicted_ttft_seconds)
    medians = {name: round(statistics.median(values), 1) for name, values in took.items()}
    return Row(
        mb_per_second=rate,
        worker="busy" if busy else "idle",
        chose=chose,
        ttft_ms=medians,
        fetched_chunks={name: statistics.median(values) for name, values in fetched.items()},
        predicted_ms=round(statistics.median(predicted), 1),
        over_best=round(medians["router"] / min(medians.values()), 3),
    )


@contextlib.contextmanager
def target(folder: Path, listen: str, advertise: str, nats: str) -> Iterator[None]:
    command = [sys.executable, "-m", "kvstore", "--dir", str(folder), "--capacity", "8GiB", "--listen", listen]
    command += ["--advertise", advertise, "--unix-socket", "", "--nats", nats, "--hot", "1GiB"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)


async def run(options: argparse.Namespace, overrides: list[str]) -> Result:
    listen, page = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    link = Link(listen)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        make_tiny_model(folder / "model", heads=HEADS, kv_heads=HEADS)
        given = [
            "--VllmWorker.ServiceArgs.workers=1",
            "--VllmWorker.dram=2GiB",
            f"--Store.addresses={link.address}",
            f"--Router.page={page}",
            *overrides,
        ]
        async with Trial(folder, lambda line: print(line, file=sys.stderr), given) as trial:
            (folder / "store").mkdir()
            with target(folder / "store", listen, link.address, nats_url(trial.deployment)):
                bench = Bench(trial, link, page, options.seed)
                await bench.connect()
                rows = []
                for before, rate in zip((options.rates[0], *options.rates), options.rates, strict=False):
                    link.bytes_per_second = rate * 1e6
                    if rate > before:
                        await asyncio.sleep(FORGET_MS / 1000 + _HELD_SECONDS)
                    for _ in range(LEARNING):
                        tokens, places = await bench.stored()
                        await bench.measure(tokens, places, "router", busy=False)
                    await asyncio.sleep(_REPORTS_SECONDS)
                    for busy in (False, True):
                        rows.append(await row(bench, rate, busy, options.repeats, chance))
                        print(line(rows[-1]), flush=True)
    return Result(PROMPT_TOKENS, CHUNKS, 2 * 4 * HEADS * 64 * 4 * BLOCK_TOKENS, rows)


def line(one: Row) -> str:
    times = "".join(f"{one.ttft_ms[name]:>9.0f}" for name in one.ttft_ms)
    chose = ",".join(map(str, one.chose))
    return f"{one.mb_per_second:>6} {one.worker:<5} {chose:>12}{one.predicted_ms:>10.0f} {times}{one.over_best:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.link", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rates", default=RATES_MB, type=lambda text: tuple(map(int, text.split(","))), help="MB/s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="for the model and the store; default: the temporary folder")
    options, overrides = parser.parse_known_args()
    print(f"  MB/s worker fetch of {CHUNKS}  predicted    router     load     half  compute  over best", flush=True)
    report = msgspec.json.format(msgspec.json.encode(asyncio.run(run(options, overrides))), indent=2).decode()
    if options.json:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
