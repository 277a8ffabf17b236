"""Prefill and decode on workers of their own.

The router picks a prefill worker and plans what it fetches from the store; the worker computes and stores the rest. The
router then picks a decode worker, to which NIXL hands the KV, and which stores the answer's. A prompt of which a decode
worker and the store lack little is prefilled there.
"""

from graphs import services

Frontend, Router = services.Frontend.fresh(), services.DisaggregatedRouter.fresh()
PrefillWorker, DecodeWorker = services.PrefillWorker.fresh(), services.DecodeWorker.fresh()
Store, Nats, Etcd = services.Store.fresh(), services.Nats.fresh(), services.Etcd.fresh()

Frontend.link(Router).link(PrefillWorker).link(Store).link(Nats)
Router.link(Nats)
Router.link(DecodeWorker).link(Nats)
DecodeWorker.link(Etcd)
Store.link(Etcd)

__all__ = ["Frontend"]
