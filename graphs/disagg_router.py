"""Prefill and decode on workers of their own.

The frontend sends a prompt to the router, which picks a prefill worker and plans what it fetches from the store; it
computes the rest, and NIXL hands the KV to a decode worker, which goes on. Only prefill workers have the tier and are
routed, for only they read prompts: the frontend takes decode workers in turn.
"""

from graphs import services

Frontend, Router = services.Frontend.fresh(), services.PrefillRouter.fresh()
PrefillWorker, DecodeWorker = services.PrefillWorker.fresh(), services.DecodeWorker.fresh()
Store, Nats, Etcd = services.Store.fresh(), services.Nats.fresh(), services.Etcd.fresh()

Frontend.link(Router).link(PrefillWorker).link(Store).link(Nats)
Router.link(Nats)
Frontend.link(DecodeWorker).link(Nats)
DecodeWorker.link(Etcd)
Store.link(Etcd)

__all__ = ["Frontend"]
