"""Services, the links between them, and their YAML: the interface of `dynamo serve`.

A graph file links services (`Frontend.link(Router).link(VllmWorker)`); a YAML file gives each its settings:

    Common:                  # values shared by several services
      model: /models/llama
    VllmWorker:
      common-configs: [model]
      ServiceArgs: {workers: 2, resources: {gpu: 1}}
      max-model-len: 8192    # everything else is the program's own flag
      env: {VLLM_LOGGING_LEVEL: INFO}
    Containers:              # only for `dynamo render`
      registry: registry.example/team
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from kvstore.errors import ConfigError, validated
from kvstore.net.transport import split_address
from kvstore.text import masked_variable

Setting = str | int | float | bool
CONTAINERS = "Containers"
# Patterns for image names.
_REGISTRY = r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?"
_TAG = r"\w[\w.-]{0,127}"
_PROJECT = r"[a-z0-9][a-z0-9_-]*"


class Resources(BaseModel):
    """Resources of one replica: number of GPUs, CPU cores (as affinity), and memory (only in containers)."""

    model_config = ConfigDict(extra="forbid")

    gpu: int = Field(0, ge=0)
    cpu: int = Field(0, ge=0)
    memory: ByteSize = ByteSize(0)  # 0: no limit, or what the settings of a target come to


class ServiceArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workers: int = Field(1, ge=0)
    resources: Resources = Resources()


class Toleration(BaseModel):
    """Toleration of a node's taint, with Kubernetes' field names."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class Containers(BaseModel):
    """The YAML's section Containers: images, volumes, placement of pods, monitoring. `project` and the ports are only
    for Compose, the fields after them only for Kubernetes."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    registry: str = ""  # prefix of this project's image names
    tag: str = ""  # of these images; default: this project's version
    project: str = ""  # prefix of containers, volumes and networks; default: from the name of the YAML
    prometheus_port: int = Field(9091, ge=1, le=65535)  # on the machine's loopback
    grafana_port: int = Field(3000, ge=1, le=65535)
    pull_secrets: list[str] = []
    model_cache: str = ""  # claim that workers, router and frontend share for models from the hub
    storage_class: str = ""  # of targets' claims; default: the cluster's
    nodes: dict[str, dict[str, str]] = {}  # by service: labels of the nodes on which it runs
    tolerations: dict[str, list[Toleration]] = {}  # by service
    # Labels by which Prometheus's operator finds monitors and rules. None: render no such objects.
    monitoring: dict[str, str] | None = None

    @field_validator("registry")
    @classmethod
    def _is_registry(cls, registry: str) -> str:
        return _matching(_REGISTRY, registry, "host, host:port or either with a path in lower case after a /")

    @field_validator("tag")
    @classmethod
    def _is_tag(cls, tag: str) -> str:
        return _matching(_TAG, tag, "at most 128 letters, digits, '_', '.' and '-', the first no '.' or '-'")

    @field_validator("project")
    @classmethod
    def _is_project(cls, project: str) -> str:
        return _matching(_PROJECT, project, "lower-case letters, digits, '_' and '-', beginning with a letter or digit")


def _matching(pattern: str, text: str, expected: str) -> str:
    if text and not re.fullmatch(pattern, text, re.ASCII):
        raise ValueError(expected)
    return text


@dataclass(frozen=True)
class Settings:
    """One service's section of the YAML, with common values filled in."""

    args: ServiceArgs = field(default_factory=ServiceArgs)
    env: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """Where processes run, which decides their addresses: all on this machine or, with `hosts`, each in a container of
    its own."""

    python: str = sys.executable
    hosts: Mapping[str, str] = field(default_factory=dict)  # a service's name in the network, with {replica}
    pins_cores: bool = True
    is_private: bool = False  # their network has no other members
    files: str = ""  # the folder in which a container finds the files that its settings name

    @property
    def apart(self) -> bool:
        return bool(self.hosts)


@dataclass(frozen=True)
class Source:
    """The file and lines of settings, for error messages."""

    file: Path | None = None
    lines: dict[str, int] = field(default_factory=dict)  # by Service.key

    def find(self, dotted: str) -> str:
        """`file:line` of a setting, or of the nearest enclosing key; "" if it is not from a file."""
        service, _, key = dotted.partition(".")
        for name in (dotted, f"Common.{key}", dotted.rpartition(".")[0], service):
            if name in self.lines:
                return f"{self.file}:{self.lines[name]}"
        return ""


@dataclass(frozen=True)
class Process:
    """A process to run: command, environment, ports, files, and its readiness check."""

    name: str
    service: str
    command: Sequence[str]
    env: Mapping[str, str]
    port: int = 0  # of its service
    metrics_port: int = 0  # for Prometheus
    gpus: Sequence[int] = ()
    ready_line: str = ""  # text that appears in its output
    ready_url: str = ""  # URL that answers 200, with `ready_text` in its body
    ready_text: str = ""
    folders: Sequence[Path] = ()  # created before it starts
    files: Mapping[str, Path] = field(default_factory=dict)  # what it reads in Environment.files, by its name there
    passed: Sequence[str] = ()  # variables that it inherits from the caller's environment: secrets
    listens: Sequence[str] = ()  # host:port that must be free before it starts


@dataclass
class Service:
    """A kind of process. `compose` builds the processes of its replicas from its settings and the deployment."""

    name: str
    compose: Callable[[Settings, "Deployment"], list[Process]]
    links: list["Service"] = field(default_factory=list)
    replicas: int = 1  # unless the settings say otherwise

    def link(self, other: "Service") -> "Service":
        """This service needs the other; returns the other, so that links chain."""
        if other not in self.links:
            self.links.append(other)
        return other

    def fresh(self) -> "Service":
        """The same service without links, for another graph."""
        return Service(self.name, self.compose, replicas=self.replicas)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Deployment:
    """A graph with its settings, ready to be turned into processes. Services come in starting order."""

    services: Sequence[Service]
    settings: Mapping[str, Settings]
    state_dir: Path
    environment: Environment = Environment()
    source: Source = Source()
    containers: Containers = field(default_factory=Containers)

    def processes(self) -> list[Process]:
        """All processes, in starting order. Raises ConfigError with the file and line of the setting."""
        processes = []
        for service in self.services:
            try:
                processes += service.compose(self.of(service.name), self)
            except ConfigError as error:
                if error.field.partition(".")[0] not in self.settings:  # the setting may be another service's
                    error = error.within(service.name)
                raise error.at(self.source.find(error.field)) from None
        for together in [[process] for process in processes] if self.environment.apart else [processes]:
            self._check_ports(together)
        return processes

    def _check_ports(self, processes: Sequence[Process]) -> None:
        """Raises ConfigError if two listeners on one machine have the same port."""
        taken: dict[int, str] = {}
        for process in processes:
            listened = [split_address(address)[1] for address in process.listens]
            metrics = [] if process.metrics_port in listened[:1] else [process.metrics_port]
            for port in filter(None, listened + metrics):
                if port in taken:
                    error = ConfigError.conflicting(f"{process.name}.port", port, taken[port], "another port")
                    raise error.at(self.source.find(process.service))
                taken[port] = process.name

    def of(self, name: str) -> Settings:
        return self.settings.get(name, Settings())

    def runs(self, name: str) -> bool:
        """Whether the graph has the service, and at least one replica of it."""
        return any(service.name == name for service in self.services) and self.of(name).args.workers > 0

    def taken_before(self, name: str) -> tuple[int, int]:
        """The number of GPUs and cores that earlier services take."""
        gpus = cores = 0
        for service in self.services:
            if service.name == name:
                break
            args = self.of(service.name).args
            gpus += args.workers * args.resources.gpu
            cores += args.workers * args.resources.cpu
        return gpus, cores


def load_root(reference: str) -> Service:
    """The service that `package.module:Service` names. Raises ConfigError."""
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
    return root


def load_graph(reference: str) -> list[Service]:
    """The services that `package.module:Service` reaches, dependencies first. Raises ConfigError."""
    root = load_root(reference)
    ordered: list[Service] = []

    def visit(service: Service, path: tuple[str, ...]) -> None:
        if service.name in path:
            raise ConfigError("graph", reference, f"links without a cycle ({' -> '.join((*path, service.name))})")
        for needed in service.links:
            visit(needed, (*path, service.name))
        if service not in ordered:
            ordered.append(service)

    visit(root, ())
    return ordered


def load_deployment(
    reference: str,
    config: Path | None,
    overrides: Sequence[str],
    state_dir: Path,
    environment: Environment | None = None,
) -> Deployment:
    """A deployment from graph, YAML and `--Service.key=value` overrides. Raises ConfigError."""
    services = load_graph(reference)
    content, source = _read_yaml(config) if config is not None else ({}, Source())
    for override in overrides:
        _override(content, override, source)
    names = [service.name for service in services]
    try:
        for name in content:
            if name not in ("Common", CONTAINERS, *names):
                raise ConfigError.unknown(str(name), ["Common", CONTAINERS, *sorted(names)])
        common = _section(content, "Common")
        containers = _containers(_section(content, CONTAINERS))
        for setting, placed in (("nodes", containers.nodes), ("tolerations", containers.tolerations)):
            for name in placed:
                if name not in names:
                    expected = f"a service of the graph: {', '.join(sorted(names))}"
                    raise ConfigError(f"{CONTAINERS}.{setting}", name, expected)
        settings = {
            service.name: _settings(service.name, _section(content, service.name), common, service.replicas)
            for service in services
        }
    except ConfigError as error:
        raise error.at(source.find(error.field)) from None
    return Deployment(services, settings, state_dir, environment or Environment(), source, containers)


def as_flags(flags: Mapping[str, Setting], *, negates: bool = False) -> list[str]:
    """Command-line arguments of settings: `key: value` is `--key value`, `key: true` is `--key`, and `key: false` is
    `--no-key` for a program that `negates`. Options of this project's own programs are off unless they are given."""
    arguments: list[str] = []
    for key, value in flags.items():
        if value is True:
            arguments.append(f"--{key}")
        elif value is not False:
            arguments += [f"--{key}", str(value)]
        elif negates:
            arguments.append(f"--no-{key}")
    return arguments


def numbered_cores(first: int, count: int, environment: Environment) -> str:
    """`count` cores from the `first` on, comma-separated; beyond the last core it wraps around. For another machine,
    counted from 0; without pinning, the engine chooses them."""
    if not environment.pins_cores:
        return "auto"
    if environment.apart:
        return ",".join(str(first + number) for number in range(count))
    usable = sorted(os.sched_getaffinity(0))
    return ",".join(str(usable[(first + number) % len(usable)]) for number in range(count))


def _read_yaml(path: Path) -> tuple[dict[str, Any], Source]:
    try:
        text = path.read_text()
        node = yaml.compose(text, yaml.SafeLoader)
        _keep_spelling(node)
        content = yaml.SafeLoader("").construct_document(node) if node else None
    except OSError as error:
        raise ConfigError("config", path, f"a YAML file that can be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line, text.count("\n")) if mark else 0
        written = text.splitlines()[line : line + 1] or text.splitlines()[-1:]
        problem = getattr(error, "problem", error)
        raise ConfigError("", "".join(written).strip(), f"YAML ({problem})").at(f"{path}:{line + 1}") from None
    if not isinstance(content, dict):
        raise ConfigError("config", path, "a mapping of services to their settings")
    source = Source(path)
    _find_lines(node, "", source)
    return content, source


def _keep_spelling(root: yaml.Node | None) -> None:
    """Environment variables are strings: `1e3`, `007` and `yes` stay as written."""
    services = root.value if isinstance(root, yaml.MappingNode) else []
    sections = [section for _, section in services if isinstance(section, yaml.MappingNode)]
    for key, variables in (pair for section in sections for pair in section.value):
        if key.value == "env" and isinstance(variables, yaml.MappingNode):
            variables.value = [tuple(map(_as_text, pair)) for pair in variables.value]


def _as_text(node: yaml.Node) -> yaml.Node:
    """The node as text; a copy, because an alias may refer to the original."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:merge":
        return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)


def _dashed(name: str, depth: int) -> str:
    """A setting's name with dashes, as in its program's options; it may be written with underscores. Names of services
    (above) and environment variables (below) stay unchanged."""
    return name.replace("_", "-") if depth == 1 else name


def _find_lines(node: yaml.Node | None, name: str, source: Source) -> None:
    """Collect the line of every key, by its dotted path. Raises ConfigError for a duplicate key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            own = _dashed(str(key.value), name.count(".") + 1 if name else 0)
            below = f"{name}.{own}" if name else own
            line = key.start_mark.line + 1
            if below in source.lines:
                error = ConfigError.duplicate(below, own, f"line {source.lines[below]}")
                raise error.at(f"{source.file}:{line}")
            source.lines[below] = line
            _find_lines(value, below, source)


def _override(content: dict[str, Any], text: str, source: Source) -> None:
    """`--VllmWorker.ServiceArgs.workers=2`: a value is read as YAML would read it."""
    path, equals, value = text.removeprefix("--").partition("=")
    names = [_dashed(name, depth) for depth, name in enumerate(path.split("."))]
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError("override", text, "--Service.key=value")
    section = content
    for name in names[:-1]:
        if not isinstance(section.setdefault(name, {}), dict):
            raise ConfigError("override", text, f"a setting of a mapping, which {name} is not")
        section = section[name]
    is_variable = names[1] == "env" and len(names) == 3
    try:
        section[names[-1]] = value if is_variable else yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError("override", text, "a value that YAML can read") from None
    source.lines.pop(".".join(names), None)


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(name, section, "a mapping of settings")
    return {_dashed(str(key), 1): value for key, value in section.items()}


def _containers(section: Mapping[str, Any]) -> Containers:
    try:
        return validated(Containers, {key.replace("-", "_"): value for key, value in section.items()})
    except ConfigError as error:
        raise error.within(CONTAINERS) from None


def _settings(name: str, section: dict[str, Any], common: Mapping[str, Any], workers: int) -> Settings:
    args = section.pop("ServiceArgs", None) or {}
    env = section.pop("env", None) or {}
    shared = section.pop("common-configs", None) or []
    for key, value, kind in (("ServiceArgs", args, dict), ("env", env, dict), ("common-configs", shared, list)):
        if not isinstance(value, kind):
            raise ConfigError(f"{name}.{key}", value, "a list" if kind is list else "a mapping")
    shared = [_dashed(str(key), 1) for key in shared]
    for key in shared:
        if key not in common:
            raise ConfigError(
                f"{name}.common-configs", key, f"a key of Common: {', '.join(common) or '(Common has none)'}"
            )
    for key, value in env.items():
        if not isinstance(value, str):
            raise ConfigError(f"{name}.env.{key}", masked_variable(key, str(value)), "a text, in quotes")
    flags = {**{key: common[key] for key in shared}, **section}
    for key, value in flags.items():
        if not isinstance(value, Setting):
            raise ConfigError(f"{name}.{key}", value, "a text, a number, true or false")
    try:
        checked = validated(ServiceArgs, {"workers": workers, **args})
    except ConfigError as error:
        raise error.within(f"{name}.ServiceArgs") from None
    return Settings(checked, env, flags)


def replicas(name: str, deployment: Deployment) -> Iterator[tuple[int, dict[str, str], list[int]]]:
    """Each replica's number, its environment, with `{replica}` and `{cores}` filled in, and its GPUs. Raises
    ConfigError."""
    settings, environment = deployment.of(name), deployment.environment
    resources = settings.args.resources
    before, cores_before = deployment.taken_before(name)
    usable = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    wanted = before + settings.args.workers * resources.gpu
    if not environment.apart and resources.gpu and usable and wanted > len(usable):
        raise ConfigError(
            "ServiceArgs.resources.gpu", resources.gpu, f"at most the GPUs of CUDA_VISIBLE_DEVICES={','.join(usable)}"
        )
    for replica in range(settings.args.workers):
        first_core = cores_before + replica * resources.cpu
        cores = numbered_cores(first_core, resources.cpu, environment) if resources.cpu else ""
        env = {
            key: value.replace("{replica}", str(replica)).replace("{cores}", cores)
            for key, value in settings.env.items()
        }
        first = before + replica * resources.gpu
        gpus = list(range(first, first + resources.gpu))
        if gpus and not environment.apart:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(usable[gpu] if usable else str(gpu) for gpu in gpus)
        if cores and not environment.apart:
            env["KVTIER_CORES"] = cores  # child.py pins the process to these cores
        yield replica, env, gpus
