"""Services, the links between them, and their YAML: the surface of `dynamo serve` as its users know it.

A graph file links services (`Frontend.link(Router).link(VllmWorker)`); a YAML file gives each its settings:

    Common:                  # values that several services share
      model: /models/llama
    VllmWorker:
      common-configs: [model]
      ServiceArgs: {workers: 2, resources: {gpu: 1}}
      max-model-len: 8192    # everything else is the program's own flag
      env: {VLLM_LOGGING_LEVEL: INFO}
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from kvstore.errors import ConfigError, validated

Setting = str | int | float | bool


class Resources(BaseModel):
    """What one replica gets: GPUs by number, CPU cores as an affinity."""

    model_config = ConfigDict(extra="forbid")

    gpu: int = Field(0, ge=0)
    cpu: int = Field(0, ge=0)


class ServiceArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workers: int = Field(1, ge=0)
    resources: Resources = Resources()


@dataclass(frozen=True)
class Settings:
    """One service's part of the YAML, common values filled in."""

    args: ServiceArgs = field(default_factory=ServiceArgs)
    env: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Process:
    """A process to run: what, with what around it, and how one sees that it is ready."""

    name: str
    service: str
    command: Sequence[str]
    env: Mapping[str, str]
    ready_line: str = ""  # text that appears in its output
    ready_url: str = ""  # URL that answers 200, with `ready_text` in its body
    ready_text: str = ""
    folders: Sequence[Path] = ()  # made before it starts
    listens: Sequence[str] = ()  # host:port that must be free before it starts


@dataclass
class Service:
    """A kind of process. `compose` makes the processes of its replicas from its settings and the whole deployment."""

    name: str
    compose: Callable[[Settings, "Deployment"], list[Process]]
    links: list["Service"] = field(default_factory=list)

    def link(self, other: "Service") -> "Service":
        """This service needs the other; returns the other, so that links chain."""
        if other not in self.links:
            self.links.append(other)
        return other

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Deployment:
    """A graph with its settings, ready to be turned into processes. Services come in starting order."""

    services: Sequence[Service]
    settings: Mapping[str, Settings]
    state_dir: Path

    def processes(self) -> list[Process]:
        return [process for service in self.services for process in service.compose(self.of(service.name), self)]

    def of(self, name: str) -> Settings:
        return self.settings.get(name, Settings())


def load_graph(reference: str) -> list[Service]:
    """The services that `package.module:Service` reaches, those first that others need. Raises ConfigError."""
    module_name, colon, attribute = reference.partition(":")
    expected = "module:Service, such as graphs.agg_router:Frontend"
    if not colon:
        raise ConfigError("graph", reference, expected)
    try:
        root = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError("graph", reference, f"{expected} ({error})") from None
    if not isinstance(root, Service):
        raise ConfigError("graph", reference, f"{expected} ({attribute} is a {type(root).__name__})")
    ordered: list[Service] = []

    def visit(service: Service, path: tuple[str, ...]) -> None:
        if service.name in path:
            raise ConfigError("graph", reference, f"links without a circle ({' -> '.join((*path, service.name))})")
        for needed in service.links:
            visit(needed, (*path, service.name))
        if service not in ordered:
            ordered.append(service)

    visit(root, ())
    return ordered


def load_deployment(reference: str, config: Path | None, overrides: Sequence[str], state_dir: Path) -> Deployment:
    """Graph, YAML and `--Service.key=value` overrides put together. Raises ConfigError."""
    services = load_graph(reference)
    content = _read_yaml(config) if config is not None else {}
    for override in overrides:
        _override(content, override)
    names = {service.name for service in services}
    for name in content:
        if name != "Common" and name not in names:
            raise ConfigError("config", name, f"Common or a service of the graph: {', '.join(sorted(names))}")
    common = _section(content, "Common")
    settings = {name: _settings(name, _section(content, name), common) for name in names}
    return Deployment(services, settings, state_dir)


def as_flags(flags: Mapping[str, Setting]) -> list[str]:
    """Command-line arguments of settings: `key: value` is `--key value`, `key: true` is `--key`."""
    arguments: list[str] = []
    for key, value in flags.items():
        if value is True:
            arguments.append(f"--{key}")
        elif value is not False:
            arguments += [f"--{key}", str(value)]
    return arguments


def cores_of(replica: int, count: int) -> str:
    """The cores, comma-separated, of a replica that gets `count`; they are shared out in turn."""
    usable = sorted(os.sched_getaffinity(0))
    return ",".join(str(usable[(replica * count + number) % len(usable)]) for number in range(count))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError("config", path, f"a YAML file that can be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        raise ConfigError("config", path, f"YAML ({line}{getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise ConfigError("config", path, "a mapping of services to their settings")
    return content


def _override(content: dict[str, Any], text: str) -> None:
    """`--VllmWorker.ServiceArgs.workers=2`: a value is read as YAML would read it."""
    path, equals, value = text.removeprefix("--").partition("=")
    names = path.split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError("override", text, "--Service.key=value")
    place = content
    for name in names[:-1]:
        if not isinstance(place.setdefault(name, {}), dict):
            raise ConfigError("override", text, f"{name} to be a mapping")
        place = place[name]
    place[names[-1]] = yaml.safe_load(value)


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(name, section, "a mapping of settings")
    return dict(section)


def _settings(name: str, section: dict[str, Any], common: Mapping[str, Any]) -> Settings:
    args = section.pop("ServiceArgs", None) or {}
    env = section.pop("env", None) or {}
    shared = section.pop("common-configs", None) or []
    if not isinstance(args, dict) or not isinstance(env, dict) or not isinstance(shared, list):
        raise ConfigError(name, section, "ServiceArgs and env to be mappings, common-configs a list")
    for key in shared:
        if key not in common:
            raise ConfigError(
                f"{name}.common-configs", key, f"a key of Common: {', '.join(common) or 'there are none'}"
            )
    flags = {**{key: common[key] for key in shared}, **section}
    for key, value in flags.items():
        if not isinstance(value, Setting):
            raise ConfigError(f"{name}.{key}", value, "a text, a number, true or false")
    try:
        checked = validated(ServiceArgs, args)
    except ConfigError as error:
        raise ConfigError(f"{name}.ServiceArgs", args, str(error)) from None
    return Settings(checked, {key: str(value) for key, value in env.items()}, flags)


def replicas(settings: Settings) -> Iterator[tuple[int, dict[str, str]]]:
    """Each replica's number and environment, with its GPUs, and with `{replica}` and `{cores}` filled in."""
    resources = settings.args.resources
    for replica in range(settings.args.workers):
        cores = cores_of(replica, resources.cpu) if resources.cpu else ""
        env = {
            key: value.replace("{replica}", str(replica)).replace("{cores}", cores)
            for key, value in settings.env.items()
        }
        if resources.gpu:
            first = replica * resources.gpu
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + number) for number in range(resources.gpu))
        if cores:
            env["KVTIER_CORES"] = cores  # child.py pins the process to them
        yield replica, env
