"""Aggregated serving behind the KV-aware router: frontend -> router -> workers -> store, and the bus between them.

etcd is part of the graph and not started unless asked for: `Etcd: {ServiceArgs: {workers: 1}}`.
"""

from graphs.services import Etcd, Frontend, Nats, Router, Store, VllmWorker

Frontend.link(Router).link(VllmWorker).link(Store).link(Nats)
Router.link(Nats)
Store.link(Etcd)

__all__ = ["Frontend"]
