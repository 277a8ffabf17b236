"""The command-line options that the worker and the router share."""

import argparse

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kvstore.bus.broker import DEFAULT_URLS, NatsUrls
from kvstore.text import masked

DEFAULT_ENDPOINT = "dynamo.backend.generate"  # of the workers, as in stock Dynamo


class CommonOptions(BaseModel):
    """The shared options, checked."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    endpoint: str = DEFAULT_ENDPOINT
    namespace: str = "default"
    nats: NatsUrls = Field(DEFAULT_URLS, validate_default=True)
    deadline_ms: int = Field(2000, ge=1, le=600_000)

    @field_validator("endpoint")
    @classmethod
    def _three_parts(cls, endpoint: str) -> str:
        if len(endpoint.split(".")) != 3 or not all(endpoint.split(".")):
            raise ValueError("namespace.component.endpoint")
        return endpoint


def add_common_arguments(parser: argparse.ArgumentParser, nats: str = DEFAULT_URLS) -> None:
    """Add the shared options. `nats` is the default that the help shows; "" for none."""
    parser.add_argument("--endpoint", help=f"the workers' Dynamo endpoint; default {DEFAULT_ENDPOINT}")
    parser.add_argument("--namespace", help="the store's namespace; default 'default'")
    parser.add_argument("--nats", help=f"NATS servers of store, workers and routers; default {masked(nats) or 'none'}")
    parser.add_argument("--deadline-ms", help="upper bound of a request's deadline for the store; default 2000")
