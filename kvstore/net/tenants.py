"""The namespaces file: which namespaces a target serves, with the credential, quota and access of each.

namespaces:
  - name: search
    credential-file: /run/secrets/search
    quota: 2TiB
  - name: batch
    credential-env: BATCH_CREDENTIAL
    quota: 500GiB
    access: read
    connections: 64
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from kvstore import credentials
from kvstore.bus import messages
from kvstore.credentials import Credential
from kvstore.errors import ConfigError, validated

FILE_BYTES_MAX = 1 << 20
TENANTS_MAX = 256  # each has its own threads and its own metric series
CONNECTIONS = 512
Access = Literal["read", "write", "read-write"]
_SECRETS = ("credential", "credential-file", "credential-env")


class Tenant(BaseModel):
    """One entry of the namespaces file, without the credential."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str
    quota: Annotated[ByteSize, Field(gt=0)]
    access: Access = "read-write"
    connections: int = Field(CONNECTIONS, ge=1)


class Grants(dict[str, tuple[Tenant, Credential]]):
    """Tenants and their credentials, by name."""

    @property
    def quotas(self) -> dict[str, int]:
        return {name: int(tenant.quota) for name, (tenant, _) in self.items()}


def load(path: Path, environ: Mapping[str, str] | None = None) -> Grants:
    """Read and check a namespaces file. Raises ConfigError, whose text never contains a secret."""
    entries = _entries(path)
    grants = Grants()
    for number, entry in enumerate(entries):
        where = f"namespaces.{number}"
        if not isinstance(entry, dict):
            raise ConfigError(where, type(entry).__name__, "a mapping with name, quota and a credential")
        tenant = _tenant(where, {name: value for name, value in entry.items() if name not in _SECRETS})
        if tenant.name in grants:
            first = f"namespaces.{list(grants).index(tenant.name)}.name"
            raise ConfigError.duplicate(f"{where}.name", tenant.name, first)
        grants[tenant.name] = tenant, _credential(where, entry, path.parent, environ)
    return grants


def references(path: Path) -> list[tuple[str, str]]:
    """The files and variables that a namespaces file refers to: pairs of `credential-file` or `credential-env`, and its
    value. Does not read them. Raises ConfigError."""
    named = _SECRETS[1:]
    entries = [entry for entry in _entries(path) if isinstance(entry, dict)]
    return [(name, str(entry[name])) for entry in entries for name in named if name in entry]


def _entries(path: Path) -> list[Any]:
    import yaml

    expected = "a YAML file with a list of namespaces"
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError("namespaces", path, f"a file that can be read ({error.strerror})") from None
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError("namespaces", path, f"a file of at most {FILE_BYTES_MAX} bytes")
    try:
        parsed = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # only the line: the error's text may quote a secret
        where = f": see line {mark.line + 1}" if mark else ""
        raise ConfigError("namespaces", path, f"{expected}, this is not YAML{where}") from None
    if not isinstance(parsed, dict) or list(parsed) != ["namespaces"] or not isinstance(parsed["namespaces"], list):
        raise ConfigError("namespaces", path, f"{expected}, under `namespaces:` and nothing beside it")
    if not 1 <= len(parsed["namespaces"]) <= TENANTS_MAX:
        raise ConfigError("namespaces", len(parsed["namespaces"]), f"1 to {TENANTS_MAX} namespaces")
    return parsed["namespaces"]


def _tenant(where: str, values: dict[Any, Any]) -> Tenant:
    known = {"name", "quota", "access", "connections"}
    if unknown := sorted(str(name) for name in values if name not in known):
        raise ConfigError.unknown(f"{where}.{unknown[0]}", [*sorted(known), *_SECRETS])
    for name in ("name", "quota"):
        if values.get(name) is None:
            raise ConfigError.missing(f"{where}.{name}", "a value: it has no default")
    try:
        tenant = validated(Tenant, values)
        messages.checked_namespace(tenant.name, "name")
    except ConfigError as error:
        raise error.within(where) from None
    return tenant


def _credential(where: str, entry: Mapping[str, Any], folder: Path, environ: Mapping[str, str] | None) -> Credential:
    given = [name for name in _SECRETS if name in entry]
    one_of = f"one of {', '.join(_SECRETS)}"
    if not given:
        raise ConfigError.missing(where, one_of)
    if len(given) > 1:
        raise ConfigError.conflicting(where, given[1], given[0], one_of)
    (name,) = given
    field, value = f"{where}.{name}", entry[name]
    if not isinstance(value, str):
        raise ConfigError(field, f"(hidden, {type(value).__name__})", "a text, in quotes")
    if name == "credential":
        return credentials.checked(field, "(hidden)", value.strip().encode())
    if name == "credential-file":
        return credentials.from_file(field, folder / value)
    return (
        credentials.from_variable(field, value) if environ is None else credentials.from_variable(field, value, environ)
    )
