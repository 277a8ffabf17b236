"""Plans: what a router attaches a worker reads, and nonsense is no plan."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvstore.bus.plan import FIELD, make_plan, read_plan

TARGETS = st.lists(st.none() | st.sampled_from(["a:1", "b:2"]), max_size=50)


@given(TARGETS, st.integers(0, 50))
def test_a_plan_reads_back(targets: list[str | None], fetch: int) -> None:
    plan = make_plan(targets, fetch=fetch, deadline_ms=100, chunk_ms=2.5, decision_id="d")
    assert plan.targets() == targets
    assert read_plan({FIELD: msgspec.to_builtins(plan), "other": 1}) == plan


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
def test_nonsense_is_no_plan(nonsense: object) -> None:
    assert read_plan({FIELD: nonsense}) is None


def test_what_is_out_of_bounds_is_no_plan() -> None:
    good = msgspec.to_builtins(make_plan(["a:1"], fetch=1, deadline_ms=1, chunk_ms=1, decision_id="d"))
    assert read_plan({FIELD: good}) is not None
    for changed in (
        {"v": 2},
        {"deadline_ms": -1},
        {"deadline_ms": 1e9},
        {"runs": [["a:1", 0]]},
        {"runs": [["a:1", 1 << 20], ["b:1", 1 << 20]]},
        {"runs": [[1, 1]]},
        {"fetch": -1},
    ):
        assert read_plan({FIELD: {**good, **changed}}) is None
    assert read_plan({}) is None
    assert read_plan(None) is None


def test_waiting_grows_with_what_the_plan_did_not_foresee() -> None:
    plan = make_plan(["a:1"] * 10, fetch=4, deadline_ms=100, chunk_ms=20, decision_id="d")
    assert [plan.wait_seconds(chunks) for chunks in (1, 4, 6)] == [0.1, 0.1, 0.14]
