"""The value of `--kv-transfer-config`, which tells vLLM to load the tier, and the options that it is composed of.

`kvtier connector` prints it, for `vllm serve`; `python -m components.worker` hands it to a dynamo.vllm. Neither imports
vLLM.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, field_validator

from components.options import CommonOptions, add_common_arguments
from kvstore import credentials
from kvstore.bus import messages
from kvstore.bus.broker import NatsUrls
from kvstore.client_options import ClientOptions, add_client_arguments
from kvstore.errors import run_command, validated
from kvstore.net import tls
from kvstore.net.etcd import checked_servers
from kvstore.net.membership import checked_address
from kvstore.seal import open_seal

HELP = """Print the value of vLLM's --kv-transfer-config that puts the kvtier offload tier under an engine.

  vllm serve MODEL --kv-transfer-config "$(kvtier connector --store 10.0.0.7:7600,10.0.0.8:7600 --dram 32G)"

Run it on the engine's machine: it checks files, and names them by their absolute paths. The engine needs no NATS, no
etcd and no Dynamo. Engines that are to share chunks must agree on model, block size and --blocks-per-chunk.
--nats and --endpoint are for a dynamo.vllm that is started without components.worker. docs/vllm.md has more.
"""


class TierOptions(CommonOptions, ClientOptions):
    """The tier's options, for all commands that start an engine; checked."""

    store: str
    dram: ByteSize = ByteSize(8 << 30)
    blocks_per_chunk: int = Field(1, ge=1)
    carrier: Literal["", "memory", "nixl"] = ""
    tp_private: bool = False
    share_images: bool = False
    credential_file: Path | None = None
    seal_key: Path | None = None
    seal: Literal["", "mac", "encrypt", "off"] = ""

    @field_validator("store")
    @classmethod
    def _addresses(cls, store: str) -> str:
        if store.startswith("etcd://"):
            checked_servers("store", store.removeprefix("etcd://").rstrip("/"))
        else:
            for address in store.split(","):
                checked_address("store", address.strip())
        return store


class Options(TierOptions):
    """The same for an engine without a router, which is the default."""

    nats: NatsUrls = ""


def add_tier_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, help="targets: host:port,host:port or etcd://host:port")
    parser.add_argument("--dram", help="host memory of the DRAM tier; default 8GiB")
    parser.add_argument("--blocks-per-chunk", help="KV blocks in one stored chunk; aim at 1 to 8 MiB; default 1")
    parser.add_argument(
        "--carrier",
        help="'memory': copy values from the memory of targets on this host; 'nixl': fetch them by RDMA. Targets must "
        "offer it; default none",
    )
    parser.add_argument(
        "--credential-file",
        help="file with the secret of the namespace, if targets need one; default: the variable KVTIER_CREDENTIAL, if "
        "it is set",
    )
    parser.add_argument(
        "--seal-key",
        help="file with keys that workers share and targets do not have. Values are sealed, and a value whose seal "
        "fails is not used (docs/security.md); default none",
    )
    parser.add_argument(
        "--seal",
        help="'mac': values are authenticated (default with --seal-key); 'encrypt': they are encrypted, too; 'off': as "
        "without --seal-key",
    )
    add_client_arguments(parser)
    parser.add_argument(
        "--tp-private",
        action="store_true",
        help="share chunks only with workers of the same tensor parallelism; default: with all, although their KV "
        "differs by rounding",
    )
    parser.add_argument(
        "--share-images",
        action="store_true",
        help="share KV of prompts with images, audio or video, too. Only if clients are trusted to name them truly "
        "(docs/identity.md)",
    )


def transfer_config(options: TierOptions) -> dict[str, Any]:
    """The value of --kv-transfer-config. It contains no secrets, only paths of their files."""
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
    return {
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


def check_files(options: TierOptions) -> None:
    """Check files before the model loads, which takes minutes. Raises ConfigError."""
    credentials.load(options.credential_file)
    open_seal(str(options.seal_key or ""), options.seal)
    tls.open_client(options.tls_files, options.carrier)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvtier connector", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_tier_arguments(parser)
    add_common_arguments(parser, nats="")
    options = validated(Options, vars(parser.parse_args(argv)))
    check_files(options)
    print(json.dumps(transfer_config(options)))


if __name__ == "__main__":
    run_command("kvtier connector", main)
