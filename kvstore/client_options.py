"""The TLS options of clients of the store, from a command line or a file."""

import argparse
from pathlib import Path

from pydantic import BaseModel

from kvstore.certificates import Files


class ClientOptions(BaseModel):
    store_tls_ca: Path | None = None
    store_tls_cert: Path | None = None
    store_tls_key: Path | None = None

    @property
    def tls_files(self) -> Files:
        given = (self.store_tls_cert, self.store_tls_key, self.store_tls_ca)
        return Files(*(str(path.absolute()) if path else "" for path in given))


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-tls-ca",
        help="file with the CAs of the targets' certificates: connections over TCP use TLS (docs/security.md); "
        "default: no TLS",
    )
    parser.add_argument("--store-tls-cert", help="certificate for targets that ask for one (--tls-client-ca)")
    parser.add_argument("--store-tls-key", help="the private key of --store-tls-cert")
