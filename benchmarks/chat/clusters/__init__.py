"""What the cluster benchmark serves: a YAML for each mode, and the graphs of stock Dynamo."""

import json
from dataclasses import replace

from graphs import services
from graphs.service import Deployment, Process, Service, Settings
from graphs.services import free_port

FOLDER = "benchmarks/chat/clusters"


def _stock(name: str, settings: Settings, deployment: Deployment, mode: str = "") -> list[Process]:
    """Stock workers that publish their KV events, for the frontend's KV router, each on a port of its own."""
    made = []
    for process in services.vllm_workers(name, "public").compose(settings, deployment):
        events = {"publisher": "zmq", "endpoint": f"tcp://*:{free_port()}", "enable_kv_cache_events": True}
        command = [*process.command, "--kv-events-config", json.dumps(events)]
        env = dict(process.env)
        if mode:
            command += services._disaggregated(mode, None, on_gpu=bool(process.gpus))
            env |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        made.append(replace(process, command=command, env=env))
    return made


Nats, Frontend = services.Nats.fresh(), services.Frontend.fresh()
Worker = Service("VllmWorker", lambda settings, deployment: _stock("VllmWorker", settings, deployment))
Frontend.link(Worker).link(Nats)

# The frontend's own routers send a prompt to a prefill worker, and on to a decode worker.
DisaggregatedFrontend = services.Frontend.fresh()
PrefillWorker, DecodeWorker = (
    Service(name, lambda settings, deployment, name=name, mode=mode: _stock(name, settings, deployment, mode))  # type: ignore[misc]
    for name, mode in (("PrefillWorker", "prefill"), ("DecodeWorker", "decode"))
)
DisaggregatedFrontend.link(PrefillWorker).link(Nats)
DisaggregatedFrontend.link(DecodeWorker).link(Nats)
