"""Prefill and decode on workers of their own.

The frontend's KV router picks a prefill worker, which fetches what the store has and computes the rest; NIXL hands the
KV to a decode worker, which goes on. Only prefill workers have the tier, for only they read prompts. The router of this
project (`--worker-type prefill`) is no part of this graph: prefill workers ask the store without a plan.
"""

from graphs import services

Frontend = services.Frontend.fresh()
PrefillWorker, DecodeWorker = services.PrefillWorker.fresh(), services.DecodeWorker.fresh()
Store, Nats, Etcd = services.Store.fresh(), services.Nats.fresh(), services.Etcd.fresh()

Frontend.link(PrefillWorker).link(Store).link(Nats)
Frontend.link(DecodeWorker).link(Nats)
DecodeWorker.link(Etcd)
Store.link(Etcd)

__all__ = ["Frontend"]
