"""Common code of the plug-ins for other engines (sglang/, lmcache/): their settings, and a client of the store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator

from kvstore import credentials
from kvstore.bus.messages import checked_namespace
from kvstore.client_options import ClientOptions
from kvstore.credentials import Credential
from kvstore.errors import ConfigError, validated
from kvstore.net import tls
from kvstore.net.carrier import borrower
from kvstore.net.client import StoreClient
from kvstore.net.membership import open_membership
from kvstore.net.tls import ClientTls
from kvstore.seal import Seal, announce, open_seal


class Secrets(NamedTuple):
    """The content of the secret files that the settings name."""

    credential: Credential | None
    seal: Seal | None
    tls: ClientTls | None


class PluginOptions(ClientOptions):
    """Settings in the engine's own configuration, checked."""

    store: str = Field("", validate_default=True)
    namespace: str = "default"
    credential_file: Path | None = None
    seal_key: str = ""
    seal: str = ""
    carrier: Literal["", "memory"] = ""

    @field_validator("store")
    @classmethod
    def _not_empty(cls, store: str) -> str:
        if not store.strip(", "):
            raise ValueError("host:port,host:port or etcd://host:port")
        return store

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Self:
        """Raises ConfigError."""
        for name in given:
            if name not in cls.model_fields:
                raise ConfigError.unknown(name, cls.model_fields)
        options = validated(cls, dict(given))
        checked_namespace(options.namespace)
        return options

    def open_secrets(self) -> Secrets:
        """Raises ConfigError."""
        return Secrets(
            credentials.load(self.credential_file),
            open_seal(self.seal_key, self.seal),
            tls.open_client(self.tls_files, self.carrier),
        )

    def open_client(self, name: str, secrets: Secrets) -> StoreClient:
        """A client of the store. Logs a warning about trust if values are not sealed. Raises ConfigError and
        UnavailableError."""
        client = StoreClient(
            open_membership(self.store, self.namespace, isolated=True),
            namespace=self.namespace,
            name=name,
            carrier=borrower(self.carrier) if self.carrier else None,
            credential=secrets.credential,
            seal=secrets.seal,
            tls=secrets.tls,
        )
        announce(secrets.seal, self.store)
        return client
