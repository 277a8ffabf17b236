"""Aggregated serving behind the KV-aware router: frontend -> router -> workers -> store, and the bus between them."""

from graphs.services import Frontend, Nats, Router, Store, VllmWorker

Frontend.link(Router).link(VllmWorker).link(Store).link(Nats)
Router.link(Nats)

__all__ = ["Frontend"]
