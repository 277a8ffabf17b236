"""The fetch plan that a router attaches to a request, and that a worker treats as a hint.

It says where the prompt's leading chunks lie in the store, run-length coded from chunk 0: those that the worker should
hold already, and those that the router decided to load. A worker that has lost some of the former fetches them, too;
what is not in the plan it computes. An absent, stale or nonsensical plan changes speed only.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated

import msgspec

VERSION = 1
# Of a request's sampling_params.extra_args. A stock prefill worker writes its own kv_transfer_params, and leaves the
# other keys.
FIELD = "kvtier"
# A kv_hint action of this type carries a plan as its payload: how a router that is not this project's plans.
HINT_TYPE = "kvtier.plan"


class Run(msgspec.Struct, array_like=True, frozen=True):
    """`chunks` consecutive chunks on one target; None: the worker should have them, and no target does, so that it may
    offer them to the store."""

    target: str | None
    chunks: Annotated[int, msgspec.Meta(gt=0, le=1 << 20)]


class Plan(msgspec.Struct, frozen=True):
    v: int
    runs: Annotated[list[Run], msgspec.Meta(max_length=1 << 16)]
    fetch: Annotated[int, msgspec.Meta(ge=0)]  # how many of the chunks the router expects to be fetched
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)]  # for fetching so many, from the request's arrival
    chunk_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)]  # more for each chunk beyond: what computing it takes
    decision_id: str

    def wait_seconds(self, chunks: int) -> float:
        """How long, from the request's arrival, to wait for a fetch of `chunks`."""
        return (self.deadline_ms + max(0, chunks - self.fetch) * self.chunk_ms) / 1000

    def targets(self) -> list[str | None]:
        """The target of each chunk, from chunk 0 on."""
        return [run.target for run in self.runs for _ in range(run.chunks)]


def make_plan(
    targets: Sequence[str | None], *, fetch: int, deadline_ms: float, chunk_ms: float, decision_id: str
) -> Plan:
    """The plan for chunks 0 .. len(targets)-1, of which the worker should have to fetch `fetch`."""
    runs = [Run(target, sum(1 for _ in same)) for target, same in groupby(targets)]
    return Plan(VERSION, runs, fetch, deadline_ms, chunk_ms, decision_id)


def read_plan(fields: Mapping[str, object] | None) -> Plan | None:
    """The plan in what has one under FIELD, or None if there is none that this version understands."""
    if not fields or FIELD not in fields:
        return None
    try:
        plan = msgspec.convert(fields[FIELD], Plan)
    except msgspec.ValidationError:
        return None
    return plan if plan.v == VERSION and sum(run.chunks for run in plan.runs) <= 1 << 20 else None
