"""The command-line arguments that name running targets, and a client for them."""

import argparse
from pathlib import Path

from pydantic import ConfigDict

from kvstore import credentials
from kvstore.bus import messages
from kvstore.client_options import ClientOptions, add_client_arguments
from kvstore.errors import ConfigError
from kvstore.net import membership, tls
from kvstore.net.client import StoreClient
from kvstore.net.membership import Membership, StaticMembership


class TargetOptions(ClientOptions):
    model_config = ConfigDict(extra="forbid")

    address: str
    namespace: str = "default"
    credential_file: Path | None = None


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address", help="host:port of the targets, separated by commas, or etcd://host:port for all registered there"
    )
    add_namespace_arguments(parser)


def add_namespace_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for access: namespace, credential, TLS."""
    parser.add_argument("--namespace", help="the targets' --namespace; default 'default'")
    parser.add_argument(
        "--credential-file", help=f"the namespace's credential; default: the variable {credentials.VARIABLE}, if set"
    )
    add_client_arguments(parser)


def open_targets(options: TargetOptions) -> Membership:
    """Raises ConfigError and UnavailableError."""
    messages.checked_namespace(options.namespace)
    if not options.address.startswith("etcd://"):
        addresses = [part.strip() for part in options.address.split(",")]
        return StaticMembership([membership.checked_address("address", address) for address in addresses])
    return membership.open_membership(options.address, options.namespace)


def open_client(options: TargetOptions, targets: Membership, name: str) -> StoreClient:
    """A client without seal keys, which gets and puts values as they are stored. Closing it closes `targets`. Raises
    ConfigError, also if there is no target."""
    if not targets.targets():
        raise ConfigError("address", options.address, "one where targets are registered")
    return StoreClient(
        targets,
        namespace=options.namespace,
        name=name,
        credential=credentials.load(options.credential_file),
        tls=tls.open_client(options.tls_files),
    )
