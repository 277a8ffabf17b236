"""Compose the arguments of a stock `python -m dynamo.vllm` worker with this tier, and become it.

A convenience: nothing of it is left once the worker runs. `--print` shows the command and the environment instead, for
those who put them into a manifest of their own.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, field_validator

from components.options import CommonOptions, add_common_arguments
from kvstore import credentials
from kvstore.bus import messages
from kvstore.bus.messages import Bus
from kvstore.certificates import ClientOptions, add_client_arguments
from kvstore.errors import ConfigError, run_command, validated
from kvstore.net import tls
from kvstore.net.membership import checked_address
from kvstore.seal import open_seal

HELP = """Start a stock dynamo.vllm worker with the kvtier offload tier: HBM -> host DRAM -> remote NVMe store.

  python -m components.worker --model /models/llama --store 10.0.0.7:7600,10.0.0.8:7600 --dram 200G -- \\
      --tensor-parallel-size 4

What follows -- goes to dynamo.vllm as it is. Workers that are to share chunks must agree on model, parallelism, block
size and --blocks-per-chunk.
"""


class Options(CommonOptions, ClientOptions):
    """The command line, checked."""

    model: str
    store: str
    dram: ByteSize = ByteSize(8 << 30)
    blocks_per_chunk: int = Field(1, ge=1)
    carrier: Literal["", "nixl"] = ""
    tp_private: bool = False
    share_images: bool = False
    credential_file: Path | None = None
    seal_key: Path | None = None
    seal: Literal["", "mac", "encrypt", "off"] = ""

    @field_validator("store")
    @classmethod
    def _addresses(cls, store: str) -> str:
        for address in store.removeprefix("etcd://").split(","):
            checked_address("store", address.strip())
        return store


def parse(argv: list[str]) -> tuple[Options, bool, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m components.worker", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model, or its name on the hub")
    parser.add_argument("--store", required=True, help="targets: host:port,host:port or etcd://host:port")
    add_common_arguments(parser)
    parser.add_argument("--dram", help="host memory of the DRAM tier; default 8GiB")
    parser.add_argument("--blocks-per-chunk", help="KV blocks in one stored chunk; aim at 1 to 8 MiB; default 1")
    parser.add_argument("--carrier", help="'nixl' to fetch by RDMA from targets that have it; default none")
    parser.add_argument(
        "--credential-file",
        help="file with the secret of the namespace, where targets ask for one; default: the environment's "
        "KVTIER_CREDENTIAL, if it is set",
    )
    parser.add_argument(
        "--seal-key",
        help="file with keys that workers share and targets do not have: values are sealed, and what a target returns "
        "is believed only if its seal holds (docs/security.md); default none",
    )
    parser.add_argument(
        "--seal",
        help="'mac': values are authenticated (default with --seal-key); 'encrypt': targets cannot read them either; "
        "'off': as without --seal-key",
    )
    add_client_arguments(parser)
    parser.add_argument(
        "--tp-private",
        action="store_true",
        help="share chunks only with workers of the same tensor parallelism; default: with all, whose KV differs by "
        "rounding alone",
    )
    parser.add_argument(
        "--share-images",
        action="store_true",
        help="share KV of prompts with images, audio or video, too: where clients are trusted to name them truly "
        "(docs/identity.md)",
    )
    parser.add_argument("--print", action="store_true", help="show the command and environment, and do not run it")
    ours, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    values = vars(parser.parse_args(ours))
    show = bool(values.pop("print"))
    return validated(Options, values), show, rest


def compose(options: Options, rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command and what it needs in the environment beyond what is there."""
    files = options.tls_files
    tier = {
        "type": "kvtier",
        "store": options.store,
        "namespace": messages.checked_namespace(options.namespace),
        "deadline_ms": options.deadline_ms,
        "nats": options.nats,
        "endpoint": options.endpoint,
        "carrier": options.carrier,
        "credential_file": str(options.credential_file.absolute()) if options.credential_file else "",
        "seal_key": str(options.seal_key.absolute()) if options.seal_key else "",
        "seal": options.seal,
        "store_tls_ca": files.ca,
        "store_tls_cert": files.cert,
        "store_tls_key": files.key,
    }
    transfer = {
        "kv_connector": "KvtierConnector",
        "kv_connector_module_path": "components.worker.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "KvtierSpec",
            "spec_module_path": "components.worker.spec",
            "cpu_bytes_to_use": int(options.dram),
            "blocks_per_chunk": options.blocks_per_chunk,
            "offload_prompt_only": False,  # the next turn of a conversation repeats this one's answer
            "tp_private": options.tp_private,
            "share_images": options.share_images,
            "secondary_tiers": [tier],
        },
    }
    events = {
        "publisher": "zmq",
        "topic": "kv-events",
        # A socket of its own for each worker process; with data parallelism give dynamo.vllm a tcp://*:PORT instead.
        "endpoint": f"ipc:///tmp/kvtier-events-{os.getpid()}.sock",
        "enable_kv_cache_events": True,
    }
    command = [
        *(sys.executable, "-m", "dynamo.vllm"),
        *("--model", options.model),
        *("--endpoint", f"dyn://{options.endpoint}"),
        *("--endpoint-types", "none"),  # the router is the public model; a frontend must not go round it
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    if "--kv-events-config" not in rest:
        command += ["--kv-events-config", json.dumps(events)]
    environment = {"NATS_SERVER": options.nats, "DYN_EVENT_PLANE": "nats"}
    return command + rest, environment


def check(options: Options) -> None:
    """What can be found wrong before a minute of loading. Raises ConfigError and UnavailableError."""
    folder = Path(options.model)
    if not (folder / "config.json").is_file() and (folder.is_absolute() or "/" not in options.model or folder.exists()):
        raise ConfigError("model", options.model, "a folder with a config.json, or a name on the hub (owner/model)")
    credentials.load(options.credential_file)
    open_seal(str(options.seal_key or ""), options.seal)
    tls.open_client(options.tls_files, options.carrier)
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
