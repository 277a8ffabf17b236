"""The fetch plan that a router attaches to a request, and that a worker treats as a hint.

It names the targets of the prompt's leading chunks, run-length coded from chunk 0: first the chunks that the worker
should hold already, then those that the router decided to load. If the worker has lost some of the former, it fetches
them, too. It computes the chunks that are not in the plan. An absent, stale or invalid plan costs only speed.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated

import msgspec

VERSION = 1
# Key in a request's sampling_params.extra_args. A stock prefill worker overwrites kv_transfer_params there, and keeps
# the other keys.
FIELD = "kvtier"
# A kv_hint action of this type carries a plan as its payload, from a router outside this project.
HINT_TYPE = "kvtier.plan"


class Run(msgspec.Struct, array_like=True, frozen=True):
    """`chunks` consecutive chunks on one target. None: the worker should have them, and no target does, so the worker
    may offer them to the store."""

    target: str | None
    chunks: Annotated[int, msgspec.Meta(gt=0, le=1 << 20)]


class Plan(msgspec.Struct, frozen=True):
    v: int
    runs: Annotated[list[Run], msgspec.Meta(max_length=1 << 16)]
    fetch: Annotated[int, msgspec.Meta(ge=0)]  # how many of the chunks the router expects to be fetched
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)]  # for `fetch` chunks, from the request's arrival
    chunk_ms: Annotated[float, msgspec.Meta(ge=0, le=600_000)]  # added per further chunk: the time to compute it
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
    """The plan under FIELD; None if there is none, or none that this version understands."""
    if not fields or FIELD not in fields:
        return None
    try:
        plan = msgspec.convert(fields[FIELD], Plan)
    except msgspec.ValidationError:
        return None
    return plan if plan.v == VERSION and sum(run.chunks for run in plan.runs) <= 1 << 20 else None
