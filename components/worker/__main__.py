"""Compose the arguments of a stock `python -m dynamo.vllm` worker with this tier, and become it.

A convenience: this process is replaced by the worker. With `--print` it shows the command and the environment instead,
to be pasted into a manifest.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from pathlib import Path

from components.options import add_common_arguments
from components.worker.transfer import TierOptions, add_tier_arguments, check_files, transfer_config
from kvstore.errors import ConfigError, run_command, validated

HELP = """Start a stock dynamo.vllm worker with the kvtier offload tier: HBM -> host DRAM -> remote NVMe store.

  python -m components.worker --model /models/llama --store 10.0.0.7:7600,10.0.0.8:7600 --dram 200G -- \\
      --tensor-parallel-size 4

What follows -- goes to dynamo.vllm as it is. Workers that are to share chunks must agree on model, parallelism, block
size and --blocks-per-chunk.
"""


class Options(TierOptions):
    """The command line, checked."""

    model: str


def parse(argv: list[str]) -> tuple[Options, bool, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m components.worker", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model, or its name on the hub")
    add_common_arguments(parser)
    add_tier_arguments(parser)
    parser.add_argument("--print", action="store_true", help="show the command and environment, and do not run it")
    ours, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    values = vars(parser.parse_args(ours))
    show = bool(values.pop("print"))
    return validated(Options, values), show, rest


def compose(options: Options, rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command, and the environment variables to add for it."""
    events = {
        "publisher": "zmq",
        "topic": "kv-events",
        # Each worker process has a socket of its own, next to vLLM's. With data parallelism, give dynamo.vllm a
        # tcp://*:PORT instead.
        "endpoint": f"ipc://{os.environ.get('VLLM_RPC_BASE_PATH', '/tmp')}/kvtier-events-{os.getpid()}.sock",
        "enable_kv_cache_events": True,
    }
    command = [
        *(sys.executable, "-m", "dynamo.vllm"),
        *("--model", options.model),
        *("--endpoint", f"dyn://{options.endpoint}"),
        *("--endpoint-types", "none"),  # frontends must see only the router's model, not the workers'
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        *("--kv-transfer-config", json.dumps(transfer_config(options))),
    ]
    if "--kv-events-config" not in rest:
        command += ["--kv-events-config", json.dumps(events)]
    environment = {"NATS_SERVER": options.nats, "DYN_EVENT_PLANE": "nats"}
    return command + rest, environment


def check(options: Options) -> None:
    """Check what can be checked before the model loads, which takes minutes. Raises ConfigError and
    UnavailableError."""
    folder = Path(options.model)
    if not (folder / "config.json").is_file() and (folder.is_absolute() or "/" not in options.model or folder.exists()):
        raise ConfigError("model", options.model, "a folder with a config.json, or a name on the hub (owner/model)")
    check_files(options)

    from kvstore.bus.connection import Bus

    asyncio.run(Bus.check(options.nats))


def main(argv: list[str] | None = None) -> None:
    options, show, rest = parse(sys.argv[1:] if argv is None else argv)
    command, environment = compose(options, rest)
    if show:
        print("\n".join(f"export {name}={value}" for name, value in environment.items()))
        print(shlex.join(["python", *command[1:]]))
        return
    check(options)
    os.execve(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    run_command("components.worker", main)
