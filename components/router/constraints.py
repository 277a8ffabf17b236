"""The constraints of a request, from Dynamo's `routing`: which workers it may go to."""

from collections.abc import Mapping
from typing import Any, Self

import msgspec


class Constraints(msgspec.Struct, frozen=True):
    """None: not constrained. Dynamo may still refuse a pinned request, for example for an overloaded worker. That
    counts as a failure of the worker, and the router decides again without it."""

    worker: int | None  # chosen by the client
    dp_rank: int | None
    allowed_workers: frozenset[int] | None
    required_taints: frozenset[str]

    @classmethod
    def of(cls, routing: Mapping[str, Any], own_id: int | None = None) -> Self:
        """For a frontend this router is a worker with the id `own_id`. It may set backend_instance_id to that, and
        refuses a client's backend_instance_id that it does not know. It does pass prefill_worker_id on, so clients use
        that to name a worker."""
        allowed = routing.get("allowed_worker_ids")
        constraints = routing.get("routing_constraints") or {}
        return cls(
            _first(routing, ("prefill_worker_id", "backend_instance_id"), own_id),
            _first(routing, ("prefill_dp_rank", "dp_rank")),
            None if allowed is None else frozenset(allowed),
            frozenset(constraints.get("required_taints") or ()),
        )

    def allow(self, worker: int, dp_rank: int, taints: frozenset[str]) -> bool:
        return (
            self.worker in (None, worker)
            and self.dp_rank in (None, dp_rank)
            and (self.allowed_workers is None or worker in self.allowed_workers)
            and self.required_taints <= taints
        )


def _first(routing: Mapping[str, Any], names: tuple[str, ...], but: int | None = None) -> int | None:
    return next((routing[name] for name in names if routing.get(name) not in (None, but)), None)
