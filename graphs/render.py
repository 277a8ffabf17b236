"""Renders deployments for containers: a compose file, and manifests for Dynamo's Kubernetes operator.

Both are made from the processes that `dynamo serve` would start, with other addresses, so a setting means the same
everywhere.
"""

import ipaddress
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import ByteSize, TypeAdapter

from graphs.service import (
    Containers,
    Deployment,
    Environment,
    Process,
    Service,
    load_deployment,
    load_graph,
    numbered_cores,
)
from graphs.services import HUB_TOKEN, is_folder, page_address, place_model
from kvstore.errors import ConfigError
from kvstore.net.target import FLUSH_SECONDS
from kvstore.net.transport import join_address, split_address
from kvstore.text import is_secret, masked_variable, shown

NATS_IMAGE = "nats:2.11-alpine"
ETCD_IMAGE = "quay.io/coreos/etcd:v3.5.21"
PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:12.3.0"
IMAGES = {name: f"{name}.Dockerfile" for name in ("store", "router", "worker", "worker-cpu")}

_COMPOSE = Environment(
    "python",
    {"Nats": "nats", "Etcd": "etcd", "Store": "store-{replica}"},
    is_private=True,
    files="/run/secrets",
)
PLACES = {
    "compose": _COMPOSE,
    "prometheus": _COMPOSE,
    "k8s": Environment(
        "python",
        {"Nats": "kvtier-nats", "Etcd": "kvtier-etcd", "Store": "kvtier-store-{replica}.kvtier-store"},
        pins_cores=False,
        files="/etc/kvtier",
    ),
}
_BROKERS = {"Nats": NATS_IMAGE, "Etcd": ETCD_IMAGE}
_OTHERS = {"Nats", "Etcd", "Store"}  # not Dynamo's
_START_SECONDS = 900  # a 70B model loads in minutes
_STOP_SECONDS = 60  # a stock worker needs 10 s, a target FLUSH_SECONDS plus the time of its requests
_LINE_CHARACTERS_MAX = 10_000  # of a comment
_POD_NAME = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
_USER = 1000  # of the images
# Required by the Pod Security Standard `restricted`.
_UNPRIVILEGED_POD = {
    "runAsNonRoot": True,
    "runAsUser": _USER,
    "fsGroup": _USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_READ_ONLY = {**_UNPRIVILEGED, "readOnlyRootFilesystem": True}
_FRONTEND_PORT, _SYSTEM_PORT = 8000, 9090  # of the operator
_SECRETS = "kvtier-secrets"
_JOB = "kvtier/job"  # label of pods: their job in Prometheus, as docker/prometheus/rules.yml knows it
_DASHBOARD = {"grafana_dashboard": "1"}  # label by which the sidecar of Grafana's chart finds dashboards
_HERE = Path(__file__).parent
_ROOT = _HERE.parent
# An installed package contains the files that containers mount, but no Dockerfiles, and no sources for them to copy.
_IS_CHECKOUT = (_ROOT / "docker" / IMAGES["store"]).is_file()
_DOCKER = (_ROOT if _IS_CHECKOUT else _HERE) / "docker"
_PROVISIONED = ("provisioning/datasources", "provisioning/dashboards", "dashboards")  # below docker/grafana


def render(target: str, reference: str, config: Path | None, overrides: Sequence[str], folder: Path) -> str:
    """Render a graph as a compose file for `folder`, as the configuration of that file's Prometheus, or as Kubernetes
    manifests. Raises ConfigError."""
    if target not in PLACES:
        raise ConfigError("render", target, f"one of {', '.join(PLACES)}")
    names = {service.name for service in load_graph(reference)}
    forced = []
    if target != "k8s" and {"Frontend", "Etcd"} <= names:
        forced = ["--Etcd.ServiceArgs.workers=1"]  # discovery through a folder works on only one machine
    deployment = load_deployment(reference, config, [*overrides, *forced], Path("/data"), PLACES[target])
    source = ["-f", config.name] if config else []
    command = ["dynamo", "render", target, reference, *source, *map(_without_secret, overrides)]
    head = _comment(shlex.join(command)) + _comment("Change the settings there and render it again.")
    if target != "prometheus" and not _IS_CHECKOUT:
        head += _comment(f"Build the images in a checkout of kvtier {version('kvtier')}: docker/*.Dockerfile say how.")
    if target == "k8s":
        return head + _wanted_secrets(deployment) + _ways_in(deployment) + _k8s(deployment)
    if target == "compose":
        return head + _wanted_folders(deployment) + _compose(deployment, folder)
    return head + _prometheus(deployment.processes())


def _comment(text: str) -> str:
    """A comment line of YAML. Non-printable characters are escaped: a line end would end the comment."""
    return f"# {shown(text, _LINE_CHARACTERS_MAX)}\n"


def _without_secret(override: str) -> str:
    path, equals, value = override.partition("=")
    return f"{path}{equals}{masked_variable(path.rpartition('.')[2], value)}"


def _wanted_secrets(deployment: Deployment) -> str:
    """A comment with the command that creates the manifests' Secret, if they need one."""
    wanted: dict[str, str] = {}
    for process in deployment.processes():
        for name, path in process.files.items():
            key = _secret(process, name)
            wanted[key] = shlex.quote(f"--from-file={key}={path}")
        wanted |= {key: f"--from-literal={key}=..." for key in process.env if is_secret(key) and key != HUB_TOKEN}
    if not wanted:
        return ""
    return _comment(f"They need: kubectl create secret generic {_SECRETS} {' '.join(wanted.values())}")


def _wanted_folders(deployment: Deployment) -> str:
    """A comment with the command that creates the data folders of a compose file's targets."""
    replicas = range(deployment.of("Store").args.workers if deployment.runs("Store") else 0)
    wanted = [str(folder) for replica in replicas if (folder := _target_folder(deployment, replica))]
    return _comment(f"It needs: install -d -o {_USER} -g {_USER} {shlex.join(wanted)}") if wanted else ""


def _ways_in(deployment: Deployment) -> str:
    """A comment with the commands that forward ports into the cluster."""
    ways = ["svc/kvtier-frontend 8000"] if deployment.runs("Frontend") else []
    if page := page_address(deployment):
        pod = f"$(kubectl get pods -o name -l {_JOB}=router | head -n 1)"
        ways.append(f"{pod} {split_address(page)[1]}")
    return "".join(_comment(f"From outside: kubectl port-forward {way}") for way in ways)


def image_of(process: Process) -> str:
    """The project image that a process runs in."""
    if "dynamo.vllm" in process.command or "components.worker" in process.command:
        return "worker" if process.gpus else "worker-cpu"
    return "store" if process.service == "Store" else "router"


def _tag(deployment: Deployment, image: str) -> str:
    containers = deployment.containers
    registry = f"{containers.registry.rstrip('/')}/" if containers.registry else ""
    return f"{registry}kvtier/{image}:{containers.tag or version('kvtier')}"


def _dynamo_version() -> str:
    """The Dynamo version in the images, which may differ from an installed one."""
    pins = [line.partition(";")[0].partition("==") for line in requires("kvtier") or []]
    return next(pinned.strip() for name, _, pinned in pins if name == "ai-dynamo")


def health_check(process: Process) -> list[str]:
    """The command that checks the process's health inside the container."""
    if process.service == "Nats":
        return ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8222/healthz"]
    if process.service == "Etcd":
        return ["etcdctl", "endpoint", "health"]
    check = ["python", "-m", "kvstore.healthy", f"127.0.0.1:{process.port}"]
    return [*check, urlsplit(process.ready_url).path, process.ready_text] if process.ready_url else check


class _Dumper(yaml.SafeDumper):
    """Repeats equal values instead of writing anchors, which are hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(content: Any) -> str:
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000, default_flow_style=False)
    return text


def _size(text: Any) -> int:
    return TypeAdapter(ByteSize).validate_python(text)


def _stop_seconds(deployment: Deployment, name: str) -> int:
    """Timeout for a service to stop; extended for a target by as much as its --flush exceeds the default."""
    flush = float(deployment.of(name).flags.get("flush", FLUSH_SECONDS)) if name == "Store" else FLUSH_SECONDS
    return _STOP_SECONDS + max(0, math.ceil(flush - FLUSH_SECONDS))


def _shm_bytes(deployment: Deployment, process: Process) -> int:
    """A worker's size of /dev/shm: its DRAM tier, and room for the engine's own processes."""
    has_tier = "components.worker" in process.command
    return (_size(deployment.of(process.service).flags.get("dram", "8GiB")) if has_tier else 0) + (1 << 30)


def _model(deployment: Deployment, service: str) -> Path | None:
    """The folder of a service's model; None if it comes from a hub."""
    names = [service] if service in deployment.settings else []
    for name in [*names, "VllmWorker", "DecodeWorker"]:
        model = str(deployment.of(name).flags.get("model", ""))
        if model:
            return Path(model) if is_folder(model) else None
    return None


# --- compose ---


def _compose(deployment: Deployment, folder: Path) -> str:
    processes = deployment.processes()
    services: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    for process in processes:
        services[process.name.lower()] = _compose_service(deployment, processes, process, folder)
        for name, path in process.files.items():
            secrets[_secret(process, name)] = {"file": _escaped(_beside(path, folder))}
    services |= _watching(deployment.containers, folder)
    _check_published(services)
    volumes: dict[str, None] = {}
    for service in services.values():
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                volumes[volume.partition(":")[0]] = None
    content = {
        "name": _project(deployment),
        "services": services,
        "volumes": volumes,
        "configs": {"prometheus": {"content": _escaped(_prometheus(processes))}},
    }
    if secrets:
        content["secrets"] = secrets
    return _dump(content)


def _compose_service(
    deployment: Deployment, processes: Sequence[Process], process: Process, folder: Path
) -> dict[str, Any]:
    name = process.service
    settings = deployment.of(name)
    content: dict[str, Any]
    if name in _BROKERS:
        content = {"image": _BROKERS[name]}
    else:
        image = image_of(process)
        content = {"image": _tag(deployment, image)}
        if _IS_CHECKOUT:
            root = _escaped(os.path.relpath(_ROOT, folder.resolve()))
            content["build"] = {"context": root, "dockerfile": f"docker/{IMAGES[image]}"}
        # init forwards SIGTERM; then workers finish their requests and targets seal their segments.
        content |= {"init": True, "stop_grace_period": f"{_stop_seconds(deployment, name)}s"}
    content["command"] = [_escaped(word) for word in process.command]
    # A variable without a value takes it from compose's environment, or from .env next to the file.
    environment: dict[str, str | None] = dict.fromkeys(process.passed)
    environment |= {key: None if is_secret(key) else _escaped(value) for key, value in process.env.items()}
    if environment:
        content["environment"] = environment
    if process.files:
        content["secrets"] = [{"source": _secret(process, name), "target": name} for name in process.files]
    needed = _needs(deployment, name)
    waits = [other.name.lower() for other in processes if other.service in needed]
    if waits:
        content["depends_on"] = {other: {"condition": "service_healthy"} for other in waits}
    content["healthcheck"] = {
        "test": ["CMD", *(_escaped(word) for word in health_check(process))],
        "interval": "5s",
        "timeout": "5s",
        "retries": 3,
        "start_period": f"{_START_SECONDS}s" if name not in _OTHERS else "60s",
    }
    replica = int(process.name.rpartition("-")[2]) if "-" in process.name else 0
    if name == "Frontend":
        host = str(settings.flags.get("host", "127.0.0.1"))
        content["ports"] = [_published("Frontend.host", host, process.port, replica)]
    if name == "Router" and (page := str(settings.flags.get("page", ""))):
        content["ports"] = [_published("Router.page", *split_address(page), replica)]
    volumes: list[Any] = []
    if name == "Store":
        kept = _target_folder(deployment, replica)
        volumes.append(_mounted(_beside(kept, folder), "/data", "rw") if kept else f"{process.name.lower()}:/data")
    elif name not in _BROKERS:
        volumes.append("models:/cache")
        model = _model(deployment, name)
        if model is not None:
            volumes.append(_mounted(_beside(model, folder), place_model(deployment, str(model))))
    if volumes:
        content["volumes"] = volumes
    if image_of(process).startswith("worker"):
        content["shm_size"] = _shm_bytes(deployment, process)
        if process.gpus:
            content["ulimits"] = {"memlock": -1}
    else:
        # Except engines, which store compiled kernels in their home, processes write only to their volume and to /tmp.
        content["read_only"] = True
        content["tmpfs"] = ["/tmp", "/data"] if name == "Etcd" else ["/tmp"]
    if memory := settings.args.resources.memory:
        content["mem_limit"] = int(memory)
    # On a CPU engine vLLM's NIXL connector moves to the machine's last core, so its affinity must include that.
    moves = not process.gpus and any('"NixlConnector"' in word for word in process.command)
    if settings.args.resources.cpu and name not in _BROKERS and not moves:
        cpu = settings.args.resources.cpu
        first = deployment.taken_before(name)[1] + replica * cpu
        content["cpuset"] = numbered_cores(first, cpu, deployment.environment)
    if process.gpus:
        device = {"driver": "nvidia", "device_ids": [str(gpu) for gpu in process.gpus], "capabilities": ["gpu"]}
        content["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    content |= {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "restart": "unless-stopped"}
    return content


def _secret(process: Process, name: str) -> str:
    """A mounted file's name, unique over all services."""
    return f"{process.service.lower()}-{name}"


def _published(setting: str, host: str, port: int, replica: int) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError(setting, host, "an IP address: Compose publishes ports only on these") from None
    return f"{join_address(str(address), port + replica)}:{port}"


def _check_published(services: Mapping[str, Any]) -> None:
    """Raises ConfigError if two services publish the same port of the machine."""
    taken: dict[str, str] = {}
    for name, service in services.items():
        for published in service.get("ports", []):
            port = published.split(":")[-2]
            if port in taken:
                raise ConfigError.conflicting(f"{name}.port", port, taken[port], "another port")
            taken[port] = name


def _target_folder(deployment: Deployment, replica: int) -> Path | None:
    """The host's folder for a target, as for `dynamo serve`; None, for a volume, if the settings name none."""
    settings = deployment.of("Store")
    if "dir" not in settings.flags:
        return None
    folder = Path(str(settings.flags["dir"]))
    if folder.is_relative_to("/dev") and not folder.is_relative_to("/dev/shm"):
        raise ConfigError("Store.dir", folder, "a folder: containers get no devices")
    return folder / str(replica) if settings.args.workers > 1 else folder


def _mounted(source: str, target: str, mode: str = "ro") -> dict[str, Any]:
    """A mount of a file or folder of the host. It must exist, else Docker would create a folder owned by root."""
    return {
        "type": "bind",
        "source": _escaped(source),
        "target": _escaped(target),
        **({"read_only": True} if mode == "ro" else {}),
        "bind": {"create_host_path": False},
    }


def _needs(deployment: Deployment, name: str) -> set[str]:
    """The services that a service waits for."""
    return {needed.name for service in deployment.services if service.name == name for needed in service.links}


def _escaped(text: str) -> str:
    return text.replace("$", "$$")


def _beside(path: Path, folder: Path) -> str:
    """A path relative to `folder`, with ./, because compose reads a path without it as a volume's name."""
    if path.is_absolute():
        return str(path)
    relative = os.path.relpath(path.absolute(), folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _project(deployment: Deployment) -> str:
    """The prefix of this cluster's containers, volumes and networks, unique on the machine."""
    file = deployment.source.file
    ours = f"kvtier-{re.sub('[^a-z0-9_-]+', '-', file.stem.lower())}" if file else "kvtier"
    return deployment.containers.project or ours


def _watching(containers: Containers, folder: Path) -> dict[str, Any]:
    """Prometheus, which scrapes every process, and Grafana with the dashboards of docker/."""
    # In a checkout the paths are relative, so that both can move together; an installed package does not move.
    docker = _beside(Path(os.path.relpath(_DOCKER)) if _IS_CHECKOUT else _DOCKER, folder)
    common = {
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }
    return {
        "prometheus": {
            "image": PROMETHEUS_IMAGE,
            "command": [
                "--config.file=/etc/prometheus/prometheus.yml",
                "--storage.tsdb.path=/prometheus",
                "--storage.tsdb.retention.time=7d",
            ],
            "configs": [{"source": "prometheus", "target": "/etc/prometheus/prometheus.yml"}],
            # Compose cannot write a config into a read-only container.
            "volumes": [
                "prometheus:/prometheus",
                _mounted(f"{docker}/prometheus/rules.yml", "/etc/prometheus/rules.yml"),
            ],
            "ports": [f"127.0.0.1:{containers.prometheus_port}:9090"],
            "healthcheck": {
                "test": ["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9090/-/ready"],
                "interval": "10s",
                "timeout": "5s",
                "retries": 3,
            },
            **common,
        },
        "grafana": {
            "image": GRAFANA_IMAGE,
            "environment": {
                "GF_AUTH_ANONYMOUS_ENABLED": "true",
                "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                "GF_ANALYTICS_REPORTING_ENABLED": "false",
                "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
                "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/etc/grafana/dashboards/cluster.json",
            },
            "volumes": [
                "grafana:/var/lib/grafana",
                *(_mounted(f"{docker}/grafana/{name}", f"/etc/grafana/{name}") for name in _PROVISIONED),
            ],
            "read_only": True,
            "tmpfs": ["/tmp"],
            "ports": [f"127.0.0.1:{containers.grafana_port}:3000"],
            "depends_on": {"prometheus": {"condition": "service_healthy"}},
            "healthcheck": {
                "test": ["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:3000/api/health"],
                "interval": "10s",
                "timeout": "5s",
                "retries": 3,
            },
            **common,
        },
    }


def _prometheus(processes: Sequence[Process]) -> str:
    return _dump(scrape_config((process, process.name.lower()) for process in processes))


def scrape_config(hosts: Iterable[tuple[Process, str]]) -> dict[str, Any]:
    """Prometheus's configuration: one job per service, with all its processes."""
    jobs: dict[str, list[str]] = {}
    for process, host in hosts:
        if process.metrics_port:
            jobs.setdefault(process.service.lower(), []).append(f"{host}:{process.metrics_port}")
    return {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
        ],
    }


# --- Kubernetes ---


def _k8s(deployment: Deployment) -> str:
    processes = deployment.processes()
    documents: list[dict[str, Any]] = []
    graph: list[dict[str, Any]] = []
    for service in deployment.services:
        replicas = [process for process in processes if process.service == service.name]
        if not replicas:
            continue
        if service.name in _BROKERS:
            documents += _broker(deployment, replicas[0])
        elif service.name == "Store":
            documents += _targets(deployment, replicas)
        else:
            graph.append(_component(deployment, service, replicas))
    if graph:
        documents.append(
            {
                "apiVersion": "nvidia.com/v1beta1",
                "kind": "DynamoGraphDeployment",
                "metadata": {"name": "kvtier", **_unwatched_by_the_operator(deployment)},
                "spec": {"backendFramework": "vllm", "components": graph},
            }
        )
    if deployment.containers.monitoring is not None:
        documents += _monitoring(deployment.containers.monitoring)
    return "---\n".join(_dump(document) for document in documents)


def _unwatched_by_the_operator(deployment: Deployment) -> dict[str, Any]:
    """With this project's PodMonitor, disable those of Dynamo's operator, which would scrape the same series twice."""
    is_watched = deployment.containers.monitoring is not None
    return {"annotations": {"nvidia.com/enable-metrics": "false"}} if is_watched else {}


def _monitoring(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Objects for Prometheus's operator and for the sidecar of Grafana's chart."""
    group = "monitoring.coreos.com/v1"
    metadata = {"name": "kvtier", **({"labels": dict(labels)} if labels else {})}
    # Port names of targets (ours), of Dynamo's processes and of frontends (the operator's).
    endpoints = [{"port": port, "interval": "5s"} for port in ("metrics", "system", "http")]
    selector = {"matchExpressions": [{"key": _JOB, "operator": "Exists"}]}
    monitor = {"jobLabel": _JOB, "selector": selector, "podMetricsEndpoints": endpoints}
    boards = sorted((_DOCKER / "grafana" / "dashboards").glob("*.json"))
    return [
        {"apiVersion": group, "kind": "PodMonitor", "metadata": metadata, "spec": monitor},
        {
            "apiVersion": group,
            "kind": "PrometheusRule",
            "metadata": metadata,
            "spec": yaml.safe_load((_DOCKER / "prometheus" / "rules.yml").read_text()),
        },
        *(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": f"kvtier-dashboard-{board.stem}", "labels": _DASHBOARD},
                "data": {f"kvtier-{board.name}": board.read_text()},
            }
            for board in boards
        ),
    ]


def _pod(deployment: Deployment, name: str, containers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pod spec of a service with this project's images."""
    secrets = [{"name": name} for name in deployment.containers.pull_secrets]
    return {
        **({"imagePullSecrets": secrets} if secrets else {}),
        **_placed(deployment, name),
        "securityContext": _UNPRIVILEGED_POD,
        "terminationGracePeriodSeconds": _stop_seconds(deployment, name),
        "containers": list(containers),
    }


def _placed(deployment: Deployment, name: str) -> dict[str, Any]:
    """Node selection and tolerations of a service's pods."""
    nodes = deployment.containers.nodes.get(name)
    tolerated = [one.model_dump(exclude_none=True) for one in deployment.containers.tolerations.get(name, [])]
    return {**({"nodeSelector": nodes} if nodes else {}), **({"tolerations": tolerated} if tolerated else {})}


def _resources(deployment: Deployment, name: str, request: int = 0, limit: int = 0) -> dict[str, Any]:
    """A container's resources. `request` and `limit` are its memory, unless the settings give it."""
    wanted = deployment.of(name).args.resources
    requests, limits = {}, {}
    if wanted.cpu:
        requests["cpu"] = str(wanted.cpu)
    if memory := wanted.memory or request:
        requests["memory"], limits["memory"] = _mebi(memory), _mebi(wanted.memory or limit)
    if wanted.gpu:
        limits["nvidia.com/gpu"] = str(wanted.gpu)
    found = {"requests": requests, "limits": limits}
    return {"resources": {kind: amounts for kind, amounts in found.items() if amounts}} if requests or limits else {}


def _environment(process: Process, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """A container's variables. Secrets come from Secrets: required if the settings use them, otherwise optional."""
    secrets = {**dict.fromkeys(process.passed, True), **{key: False for key in env if is_secret(key)}}
    return [
        *({"name": key, "valueFrom": {"secretKeyRef": _reference(key, may_miss)}} for key, may_miss in secrets.items()),
        *({"name": key, "value": _literal(value)} for key, value in env.items() if key not in secrets),
    ]


def _literal(text: str) -> str:
    """Escape a text: in a manifest, $(NAME) is a variable of the container, and $$ is a $."""
    return text.replace("$", "$$")


def _reference(variable: str, may_miss: bool) -> dict[str, Any]:
    # The first name is that of Dynamo's own recipes.
    name = "hf-token-secret" if variable == HUB_TOKEN else _SECRETS
    return {"name": name, "key": variable, **({"optional": True} if may_miss else {})}


def _mount_files(process: Process, pod: dict[str, Any], container: dict[str, Any]) -> None:
    """Mount the files that a container's settings name from the Secret kvtier-secrets."""
    if not process.files:
        return
    items = [{"key": _secret(process, name), "path": name} for name in process.files]
    # Owned by root and readable by the pod's group, which kvstore/private.py accepts as private.
    volume = {"name": "files", "secret": {"secretName": _SECRETS, "items": items, "defaultMode": 0o440}}
    mount = {"name": "files", "mountPath": PLACES["k8s"].files, "readOnly": True}
    pod.setdefault("volumes", []).append(volume)
    container.setdefault("volumeMounts", []).append(mount)


def _guard(name: str, port: int, metrics_port: int = 0, replicas: int = 1) -> list[dict[str, Any]]:
    """A NetworkPolicy that allows only the workload's own namespace, except for metrics; with several replicas also a
    PodDisruptionBudget."""
    labels = {"matchLabels": {"app.kubernetes.io/name": name}}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": labels,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {}}], "ports": [{"port": port}]},
                *([{"ports": [{"port": metrics_port}]}] if metrics_port else []),
            ],
        },
    }
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {"maxUnavailable": 1, "selector": labels},
    }
    return [policy, budget] if replicas > 1 else [policy]


def _broker(deployment: Deployment, process: Process) -> list[dict[str, Any]]:
    name = PLACES["k8s"].hosts[process.service]
    labels = {"app.kubernetes.io/name": name}
    container = {
        "name": process.service.lower(),
        "image": _BROKERS[process.service],
        "command": list(process.command),
        "env": _environment(process, process.env),
        "ports": [{"name": "client", "containerPort": process.port}],
        "readinessProbe": {"tcpSocket": {"port": "client"}, "periodSeconds": 5},
        "securityContext": _READ_ONLY,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {
        **_placed(deployment, process.service),
        "securityContext": _UNPRIVILEGED_POD,
        "containers": [container],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"name": "client", "port": process.port}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        *_guard(name, process.port),
    ]


def _targets(deployment: Deployment, replicas: Sequence[Process]) -> list[dict[str, Any]]:
    """Targets as a StatefulSet, outside Dynamo's graph, because they keep their names and disks when they move."""
    name = "kvtier-store"
    labels = {"app.kubernetes.io/name": name}
    first = replicas[0]
    alike = [_same(process, f"{name}-{number}.") for number, process in enumerate(replicas)]
    _must_be_alike("Store", alike)
    command, env = alike[0]
    ports = [{"name": "store", "containerPort": first.port}]
    if first.metrics_port:
        ports.append({"name": "metrics", "containerPort": first.metrics_port})
    settings = deployment.of("Store").flags
    memory = _size(settings.get("buffers", "256MiB")) + _size(settings.get("hot", 0)) + (1 << 30)
    container = {
        "name": "store",
        "image": _tag(deployment, "store"),
        "command": command,
        "env": [_POD_NAME, *_environment(first, env)],
        "ports": ports,
        "startupProbe": {"tcpSocket": {"port": "store"}, "periodSeconds": 2, "failureThreshold": 300},
        "readinessProbe": {"tcpSocket": {"port": "store"}, "periodSeconds": 5},
        "livenessProbe": {"tcpSocket": {"port": "store"}, "periodSeconds": 10, "failureThreshold": 3},
        **_resources(deployment, "Store", memory, 2 * memory),
        "securityContext": _READ_ONLY,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    containers = deployment.containers
    pod = {
        **_pod(deployment, "Store", [container]),
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [_apart(labels)]}},
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    _mount_files(first, pod, container)
    # The capacity does not include the file system's overhead and root's reserve.
    disk = math.ceil(_size(settings.get("capacity", "4GiB")) * 1.1 / (1 << 30))
    claim = {
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            **({"storageClassName": containers.storage_class} if containers.storage_class else {}),
            "resources": {"requests": {"storage": f"{disk}Gi"}},
        },
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"clusterIP": "None", "selector": labels, "ports": [{"name": "store", "port": first.port}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name},
            "spec": {
                "serviceName": name,
                "replicas": len(replicas),
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": {**labels, _JOB: "store"}}, "spec": pod},
                "volumeClaimTemplates": [claim],
            },
        },
        *_guard(name, first.port, first.metrics_port, len(replicas)),
    ]


def _apart(labels: Mapping[str, str]) -> dict[str, Any]:
    """Anti-affinity: on different nodes, if there are enough."""
    term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": "kubernetes.io/hostname"}
    return {"weight": 100, "podAffinityTerm": term}


def _component(deployment: Deployment, service: Service, replicas: Sequence[Process]) -> dict[str, Any]:
    """A service of the DynamoGraphDeployment. The operator sets ports and probes of frontends and workers."""
    first = replicas[0]
    alike = [_same(process, "") for process in replicas]
    _must_be_alike(service.name, alike)
    command, env = alike[0]
    env.pop("DYN_SYSTEM_PORT", None)
    if service.name == "Frontend" and first.port != _FRONTEND_PORT:
        expected = f"{_FRONTEND_PORT}, where the operator's Service and probes expect it"
        raise ConfigError("Frontend.port", first.port, expected)
    is_router = service.name == "Router"
    if is_router:
        env["DYN_SYSTEM_PORT"] = str(_SYSTEM_PORT)
    image = image_of(first)
    main: dict[str, Any] = {
        "name": "main",
        "image": _tag(deployment, image),
        "command": command[:1],
        "args": command[1:],
        "env": _environment(first, env),
        **_resources(deployment, service.name),
        "securityContext": _UNPRIVILEGED,
    }
    if is_router:
        main["ports"] = [{"name": "system", "containerPort": _SYSTEM_PORT}]
        main["readinessProbe"] = {"httpGet": {"path": "/health", "port": "system"}, "periodSeconds": 5}
        main["livenessProbe"] = {"tcpSocket": {"port": "system"}, "initialDelaySeconds": 60, "periodSeconds": 10}
    pod = _pod(deployment, service.name, [main])
    if _model(deployment, service.name) is not None:
        main["volumeMounts"] = [{"name": "models", "mountPath": "/models", "readOnly": True}]
        claim = {"claimName": "kvtier-models", "readOnly": True}
        pod["volumes"] = [{"name": "models", "persistentVolumeClaim": claim}]
    elif cache := deployment.containers.model_cache:
        main["volumeMounts"] = [{"name": "cache", "mountPath": "/cache"}]
        pod["volumes"] = [{"name": "cache", "persistentVolumeClaim": {"claimName": cache}}]
    _mount_files(first, pod, main)
    parts = [part for part in ("prefill", "decode") if part in command]
    # A router has no type: as a worker it would be part of the workers' hash, and a changed flag would restart them
    # all.
    kind = {"Frontend": "frontend", "Router": ""}.get(service.name, parts[0] if parts else "worker")
    content: dict[str, Any] = {
        "name": service.name,
        **({"type": kind} if kind else {}),
        "runtimeVersionOverride": _dynamo_version(),  # the images' tags are versions of this project
        "globalDynamoNamespace": True,  # the router is found at dynamo.kvtier-router, its workers at dynamo.backend
        "replicas": len(replicas),
    }
    if image.startswith("worker"):
        content["sharedMemorySize"] = _mebi(_shm_bytes(deployment, first))
    return {**content, "podTemplate": {"metadata": {"labels": {_JOB: service.name.lower()}}, "spec": pod}}


def _same(process: Process, own_name: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment, with the pod's name instead of this replica's."""
    words = list(map(_literal, process.command))
    if own_name:
        words = [word.replace(own_name, "$(POD_NAME).") for word in words]
    return words, dict(process.env)


def _must_be_alike(name: str, replicas: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    expected = "no {replica}: all pods of a service are identical"
    command, first = replicas[0]
    for other, env in replicas[1:]:
        for key in {**first, **env}:
            if first.get(key) != env.get(key):
                raise ConfigError(f"{name}.env.{key}", masked_variable(key, env.get(key, "")), expected)
        if other != command:
            raise ConfigError(name, " ".join(other), expected)


def _mebi(size: int) -> str:
    return f"{math.ceil(size / (1 << 20))}Mi"
