"""A router process: `python -m components.router --model-name llama --model-path /models/llama`."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import uvloop
from prometheus_client import CollectorRegistry
from pydantic import Field, model_validator

from components.options import CommonOptions, add_common_arguments
from components.pricing.cost import Policy, Speeds
from components.router.deadlines import Deadlines
from components.router.handover import Disaggregated
from components.router.others import Others
from components.router.router import Handover, Router
from components.router.series import BusCollector, ByRole
from components.router.speeds import LiveSpeeds
from components.router.view.access import VARIABLE, Access, page_access
from components.router.view.feed import Feed, Pool
from components.router.view.page import open_page
from components.router.view.question import Prompts, explain_handler, warm_handler
from components.router.warm import Warmer
from components.router.workers import Workers
from kvstore.bus import messages, residency
from kvstore.bus.connection import Bus
from kvstore.bus.messages import TargetReport, WorkerReport
from kvstore.bus.residency import Mirror
from kvstore.errors import ConfigError, UnavailableError, fail, run_command, validated

logger = logging.getLogger("components.router")

# Delay between deregistration and refusing new requests: frontends see the deregistration within milliseconds.
_UNREGISTERED_SECONDS = 1.0

HELP = """Route each prompt to the worker with the lowest price in TTFT and GPU time.

Registers as the public model, so that a stock dynamo.frontend sends its prompts here. Start workers with
--endpoint-types none (python -m components.worker does), or a frontend bypasses the router. The speeds given here are
initial values (the defaults are those of a 70B model on one H200); workers and targets report theirs as they run.
"""


class Options(CommonOptions):
    """The command line, checked."""

    model_name: str
    model_path: str | None = None
    worker_type: Literal["aggregated", "prefill"] = "aggregated"
    decode_endpoint: str = ""
    handover_gbytes_per_second: float = Field(10, gt=0)
    local_prefill_tokens: int = Field(512, ge=0)
    block_size: int | None = Field(None, ge=1)
    prefill_tokens_per_second: float = Field(9000, gt=0)
    prefill_base_ms: float = Field(40, ge=0)
    prefill_quadratic_ns: float = Field(0, ge=0)
    dram_gbytes_per_second: float = Field(25, gt=0)
    store_gbytes_per_second: float = Field(3, gt=0)
    store_latency_ms: float = Field(2, ge=0)
    stall_price: float = Field(0.2, ge=0)
    session_affinity_seconds: float = Field(0, ge=0)
    page: str = ""
    page_token_file: Path | None = None
    page_hosts: str = ""
    page_open: bool = False
    first_token_floor_seconds: float = Field(10, gt=0, le=3600)
    first_token_multiple: float = Field(5, ge=1, le=1000)
    first_token_max_seconds: float = Field(300, gt=0, le=86_400)
    next_token_seconds: float = Field(60, gt=0, le=3600)

    @model_validator(mode="after")
    def _of_prefill_workers(self) -> Self:
        if self.decode_endpoint and self.worker_type != "prefill":
            raise ValueError("decode-endpoint only with worker-type prefill")
        return self

    def deadlines(self) -> Deadlines:
        return Deadlines(
            self.first_token_floor_seconds,
            self.first_token_multiple,
            self.first_token_max_seconds,
            self.next_token_seconds,
        )

    def speeds(self) -> Speeds:
        return Speeds(
            prefill_base_seconds=self.prefill_base_ms / 1e3,
            prefill_seconds_per_token=1 / self.prefill_tokens_per_second,
            prefill_seconds_per_token_squared=self.prefill_quadratic_ns / 1e9,
            dram_bytes_per_second=self.dram_gbytes_per_second * 1e9,
            store_bytes_per_second=self.store_gbytes_per_second * 1e9,
            store_latency_seconds=self.store_latency_ms / 1e3,
        )

    def access(self) -> Access | None:
        """Access rules of the page; None without a page. Raises ConfigError."""
        if not self.page:
            return None
        return page_access(self.page, self.page_token_file, self.page_hosts, is_open=self.page_open)


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m components.router", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--model-name", required=True, help="name of the model in the OpenAI API")
    parser.add_argument("--model-path", help="its folder or hub name, for the tokenizer; default: the model's name")
    parser.add_argument(
        "--worker-type",
        help="aggregated (default), or prefill: disaggregated serving, with decode workers of the same model",
    )
    parser.add_argument(
        "--decode-endpoint",
        help="Dynamo endpoint of the decode workers. With it, the router also chooses the decode worker, and registers "
        "as the public model; without it, the frontend chooses decode workers round-robin",
    )
    parser.add_argument(
        "--handover-gbytes-per-second", help="speed from a prefill worker's HBM to a decode worker's; default 10"
    )
    parser.add_argument(
        "--local-prefill-tokens",
        help="a decode worker may prefill up to this many missing tokens of a prompt itself; default 512; 0: never",
    )
    parser.add_argument("--block-size", help="KV block size in tokens; default: the workers' own")
    parser.add_argument("--prefill-tokens-per-second", help="prefill speed of a worker; default 9000")
    parser.add_argument("--prefill-base-ms", help="TTFT of a prompt that is fully cached in HBM; default 40")
    parser.add_argument("--prefill-quadratic-ns", help="prefill ns per token and token of context; default 0")
    parser.add_argument("--dram-gbytes-per-second", help="speed from the DRAM tier to HBM; default 25")
    parser.add_argument("--store-gbytes-per-second", help="speed from the store to one worker's DRAM tier; default 3")
    parser.add_argument("--store-latency-ms", help="latency of the first byte from the store; default 2")
    parser.add_argument(
        "--stall-price",
        help="price of delaying one decoding request by a second, in seconds; default 0.2",
    )
    parser.add_argument(
        "--session-affinity-seconds",
        help="session affinity TTL: a session stays on its worker until it has been idle this long; default 0: off",
    )
    parser.add_argument(
        "--page",
        help="host:port for a web page that shows and explains decisions, for example 127.0.0.1:8300; default: none",
    )
    parser.add_argument(
        "--first-token-multiple",
        help="deadline of a first token, as a multiple of its prediction; default 5. A worker that misses it becomes "
        "suspect, and the prompt goes to another worker, if there is one",
    )
    parser.add_argument("--first-token-floor-seconds", help="lower bound of that deadline; default 10")
    parser.add_argument(
        "--first-token-max-seconds",
        help="timeout of a first token, on all workers together; then the client gets 503; default 300",
    )
    parser.add_argument(
        "--next-token-seconds", help="timeout between two tokens; then the client gets an error; default 60"
    )
    parser.add_argument(
        "--page-token-file",
        help=f"file with the page's token; default: the variable {VARIABLE}, if set. A page that is not on loopback "
        "needs one, or --page-open",
    )
    parser.add_argument(
        "--page-hosts",
        help="further allowed values of the Host header for a page without a token, separated by commas; for example a "
        "proxy's name",
    )
    parser.add_argument(
        "--page-open",
        action="store_true",
        help="serve the page without a token to everyone on the network; off loopback, `explain` and `POST /warm` are "
        "then disabled",
    )
    return validated(Options, vars(parser.parse_args(argv)))


async def serve(runtime: Any, options: Options, access: Access | None, registered: list[Any]) -> None:
    """Run the router until the runtime is shut down. Adds the endpoints that are in the registry to `registered`."""
    from dynamo.common.utils.prometheus import register_engine_metrics_callback
    from dynamo.llm import FpmEventSubscriber, ModelInput, ModelType, WorkerType, register_model

    namespace = messages.checked_namespace(options.namespace)
    line = await Bus.connect(options.nats, f"kvtier router {options.model_name}")
    workers = Workers(options.endpoint)
    mirror = Mirror()

    speeds = LiveSpeeds(options.speeds())
    by_endpoint = {options.endpoint: (workers, speeds)}

    async def heard(report: WorkerReport) -> None:
        if report.endpoint in by_endpoint:
            its_workers, its_speeds = by_endpoint[report.endpoint]
            if its_speeds.heard_worker(report):
                its_workers.heard(report, time.monotonic())

    async def heard_target(report: TargetReport) -> None:
        for _, its_speeds in by_endpoint.values():
            if not its_speeds.heard_target(report, time.monotonic()):
                return  # the others would not believe it either

    await line.subscribe(messages.subject(namespace, "speed.worker"), WorkerReport, heard)
    await line.subscribe(messages.subject(namespace, "speed.target"), TargetReport, heard_target)
    worker_endpoint = runtime.endpoint(options.endpoint)
    cards = FpmEventSubscriber(worker_endpoint)
    cards.start_tracking()
    block_tokens = await _first_card(cards, workers, options.endpoint, options.block_size)

    prefill = options.worker_type == "prefill" and not options.decode_endpoint
    component = "kvtier-prefill-router" if prefill else "kvtier-router"
    public = runtime.endpoint(f"{options.endpoint.split('.')[0]}.{component}.generate")
    own_id = public.connection_id()
    others = Others(f"{own_id:x}", options.endpoint, speeds.ignored)
    router = _router(worker_endpoint, workers, mirror, speeds, block_tokens, options, own_id, others)
    tasks = [
        asyncio.create_task(others.share(line, namespace, router.load_report)),
        asyncio.create_task(residency.follow(mirror, line, namespace)),
        asyncio.create_task(_watch_cards(cards, workers, speeds, block_tokens)),
    ]
    handle, every, tracked = router.handle, [workers], [cards]
    pool, registry = Pool(router.decisions, workers, speeds), router.decisions.registry
    prefill_pool: Pool | None = None
    if options.decode_endpoint:
        decode_endpoint = runtime.endpoint(options.decode_endpoint)
        decoders, decode_speeds = Workers(options.decode_endpoint), LiveSpeeds(options.speeds(), speeds.ignored)
        by_endpoint[options.decode_endpoint] = decoders, decode_speeds
        decode_cards = FpmEventSubscriber(decode_endpoint)
        decode_cards.start_tracking()
        await _first_card(decode_cards, decoders, options.decode_endpoint, block_tokens)
        tasks.append(asyncio.create_task(_watch_cards(decode_cards, decoders, decode_speeds, block_tokens)))
        handover = Handover(workers, options.handover_gbytes_per_second * 1e9)
        of_decode = Others(f"{own_id:x}", options.decode_endpoint, speeds.ignored)
        decode = _router(
            decode_endpoint, decoders, mirror, decode_speeds, block_tokens, options, own_id, of_decode, handover
        )
        tasks.append(asyncio.create_task(of_decode.share(line, namespace, decode.load_report)))
        handle = Disaggregated(router, decode, options.local_prefill_tokens).handle
        prefill_pool, pool = pool, Pool(decode.decisions, decoders, decode_speeds)
        registry = CollectorRegistry()
        registry.register(ByRole(prefill=router.decisions.registry, decode=decode.decisions.registry))
        every.append(decoders)
        tracked.append(decode_cards)
    registry.register(BusCollector([known for _, known in by_endpoint.values()], mirror, line.undecoded))
    prompts = Prompts(options.model_path or options.model_name)
    questions = {
        "/explain": explain_handler(router, prompts),
        "/warm": warm_handler(Warmer(router, line, namespace), prompts),
    }
    feed = Feed(*pool, mirror, prefill=prefill_pool, model=options.model_name, connected=lambda: line.connected)
    page = await open_page(access, feed, questions, registry) if access else None
    if page is not None:
        tasks.append(asyncio.create_task(feed.run()))
    # With the labels of Dynamo's own series.
    register_engine_metrics_callback(
        endpoint=public,
        registry=registry,
        namespace_name=options.endpoint.split(".")[0],
        component_name=component.replace("-", "_"),
        endpoint_name="generate",
        model_name=options.model_name,
    )
    registered.append(public)
    await register_model(
        ModelInput.Tokens,
        ModelType.Prefill if prefill else ModelType.Chat | ModelType.Completions,
        public,
        options.model_path or options.model_name,
        options.model_name,
        kv_cache_block_size=block_tokens,
        runtime_config=_runtime_config(every),
        worker_type=WorkerType.Prefill if prefill else WorkerType.Aggregated,
        needs=[[WorkerType.Decode]] if prefill else None,
    )
    gc.freeze()  # else a full collection of all imported objects blocks decisions for 10 to 20 ms
    runtime.set_health_status(True)  # else /health stays at 503, because this process is not an engine
    print(f"components.router: ready for {options.model_name}, blocks of {block_tokens} tokens", flush=True)
    try:
        await public.serve_endpoint(handle, graceful_shutdown=True)
    finally:
        if page is not None:
            await page.cleanup()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for watched in tracked:
            watched.shutdown()
        await line.close()


def _router(
    endpoint: Any,
    workers: Workers,
    mirror: Mirror,
    speeds: LiveSpeeds,
    block_tokens: int,
    options: Options,
    own_id: int,
    others: Others,
    handover: Handover | None = None,
) -> Router:
    from dynamo.llm import KvRouter, KvRouterConfig

    return Router(
        # For decode workers, Dynamo's router follows KV events only with conditional disaggregation.
        KvRouter(endpoint, block_tokens, KvRouterConfig(conditional_disagg_enabled=handover is not None)),
        workers,
        mirror,
        block_tokens=block_tokens,
        speeds=speeds,
        policy=Policy(options.stall_price),
        deadline_ms=(min(100, options.deadline_ms), options.deadline_ms),
        deadlines=options.deadlines(),
        session_idle_seconds=options.session_affinity_seconds,
        own_id=own_id,
        handover=handover,
        others=others,
        has_fallback=bool(options.decode_endpoint) and handover is None,
    )


def _runtime_config(workers: Iterable[Workers]) -> Any:
    """The runtime config by which the frontend refuses prompts over the context length, with the limit in the error. A
    worker that joins later with a shorter context gets only prompts that fit."""
    from dynamo.common.token_budget import TokenBudget, publish_token_budget
    from dynamo.llm import ModelRuntimeConfig

    config = ModelRuntimeConfig()
    if shortest := min(filter(None, (some.context_tokens(least=True) for some in workers)), default=0):
        config.context_length = shortest
        publish_token_budget(config, TokenBudget(shortest, reject_prompt_overflow=True, reject_total_overflow=True))
    return config


def _leave_on_signals(runtime: Any, registered: list[Any]) -> None:
    """On SIGTERM or SIGINT, deregister the router, finish its requests, and exit; before registration, exit at once. A
    handler is needed because the kernel ignores unhandled signals to PID 1, as in a container."""
    from dynamo.common.utils.graceful_shutdown import graceful_shutdown_with_discovery

    serving = asyncio.current_task()
    leaving: list[asyncio.Task[None]] = []

    def leave() -> None:
        if not registered and serving is not None:
            serving.cancel()
        elif not leaving:
            stop = graceful_shutdown_with_discovery(runtime, registered, grace_period_s=_UNREGISTERED_SECONDS)
            leaving.append(asyncio.create_task(stop))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave)


async def _first_card(cards: Any, workers: Workers, endpoint: str, block_size: int | None) -> int:
    """Wait for the first worker; its block size. Raises ConfigError if --block-size differs."""
    logger.info("waiting for a worker at %s", endpoint)
    while not workers.cards:
        await asyncio.sleep(0.2)
        workers.set_cards(cards.get_model_cards())
    card = next(iter(workers.cards.values()))
    if block_size not in (None, card.block_tokens):
        raise ConfigError("block-size", block_size, f"{card.block_tokens}, the block size of the workers at {endpoint}")
    return card.block_tokens


async def _watch_cards(cards: Any, workers: Workers, speeds: LiveSpeeds, block_tokens: int) -> None:
    refused: set[int] = set()
    while True:
        workers.set_cards(cards.get_model_cards())
        workers.forget_silent(time.monotonic())
        speeds.keep_only(set(workers.cards), time.monotonic())
        for worker, card in workers.cards.items():
            if card.block_tokens != block_tokens and worker not in refused:
                refused.add(worker)
                logger.error(
                    "worker %x has blocks of %d tokens, this router %d: the worker gets no prompts; start it with "
                    "--block-size %d",
                    worker,
                    card.block_tokens,
                    block_tokens,
                    block_tokens,
                )
        await asyncio.sleep(1)


def main(argv: list[str] | None = None) -> None:
    from dynamo.runtime import dynamo_worker
    from dynamo.runtime.logging import configure_dynamo_logging

    options = parse(argv)
    model = Path(options.model_path or options.model_name)
    if model.is_absolute() and not (model / "config.json").is_file():
        raise ConfigError("model-path", model, "a folder with a config.json, or a name on the hub (owner/model)")
    access = options.access()
    configure_dynamo_logging()
    logging.getLogger("components").setLevel(logging.INFO)
    asyncio.run(Bus.check(options.nats))
    failure: list[Exception] = []
    started = False

    @dynamo_worker()  # type: ignore[untyped-decorator]
    async def worker(runtime: Any) -> None:
        nonlocal started
        started = True
        registered: list[Any] = []
        _leave_on_signals(runtime, registered)
        try:
            await serve(runtime, options, access, registered)
        except asyncio.CancelledError:
            runtime.shutdown()
        except (ConfigError, UnavailableError) as error:
            failure.append(error)
            runtime.shutdown()

    try:
        uvloop.run(worker())
    except Exception as error:
        if started:
            raise
        raise UnavailableError(f"dynamo: the runtime does not start: {error}") from None
    if failure:
        fail("components.router", failure[0])


if __name__ == "__main__":
    sys.argv[0] = "components.router"
    run_command("components.router", main)
