"""Aggregated serving without the router: frontend -> workers -> store.

The frontend spreads the prompts, and workers ask the store by themselves. One worker needs no more than that.
"""

from graphs import services

Frontend, VllmWorker = services.Frontend.fresh(), services.PublicWorker.fresh()
Store, Nats, Etcd = services.Store.fresh(), services.Nats.fresh(), services.Etcd.fresh()

Frontend.link(VllmWorker).link(Store).link(Nats)
Store.link(Etcd)

__all__ = ["Frontend"]
