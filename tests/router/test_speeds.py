"""Live speeds: what is reported is used once it is sure, and what is absurd is not."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.pricing.cost import Speeds
from components.pricing.prefill import Prefill
from components.router.speeds import (
    _PREFILL,
    FORGET_MS,
    OLDER_MAX,
    SAMPLES_MIN,
    TARGET_SECONDS,
    TARGETS_MAX,
    LiveSpeeds,
)
from kvstore.bus.messages import TargetReport, WorkerReport

PRIOR = Speeds(0.04, 1e-4, 0.0, 25e9, 3e9, 0.002)


def report(ts_ms: int = 0, **changes: object) -> WorkerReport:
    plain = WorkerReport(
        "5",
        "d.b.g",
        fingerprint=7,
        block_tokens=16,
        blocks_per_chunk=2,
        chunk_bytes=1000,
        ts_ms=ts_ms,
        prefill_base_seconds=0.02,
        prefill_seconds_per_token=5e-5,
        dram_bytes_per_second=50e9,
        store_bytes_per_second=1e9,
    )
    return msgspec.structs.replace(plain, **changes)


def target(ts_ms: int = 0, epoch: int = 1, **changes: object) -> TargetReport:
    plain = TargetReport("t:1", epoch, 0, 0, 2e9, 500, 0, 10, 5, 1, ts_ms)
    return msgspec.structs.replace(plain, **changes)


def test_a_speed_counts_from_the_third_report_on() -> None:
    live = LiveSpeeds(PRIOR)
    assert live.of_worker(5) == PRIOR
    for number in range(SAMPLES_MIN):
        assert live.of_worker(5) == PRIOR
        assert live.heard_worker(report(number))
    speeds = live.of_worker(5)
    assert (speeds.prefill_base_seconds, speeds.prefill_seconds_per_token) == (0.02, 5e-5)
    assert (speeds.dram_bytes_per_second, speeds.store_bytes_per_second) == (50e9, 1e9)
    assert speeds.store_latency_seconds == PRIOR.store_latency_seconds
    assert live.of_worker(6) == PRIOR


def test_one_outlier_decides_nothing() -> None:
    live = LiveSpeeds(PRIOR)
    for number in range(6):
        live.heard_worker(report(number))
    live.heard_worker(report(6, prefill_seconds_per_token=1e-2, store_bytes_per_second=1e8))
    assert live.of_worker(5).prefill_seconds_per_token == 5e-5
    assert live.of_worker(5).store_bytes_per_second == 1e9


def test_a_store_that_was_slow_once_is_tried_again() -> None:
    """Prompts that are computed instead measure nothing: without forgetting, the router would compute for ever."""
    live = LiveSpeeds(PRIOR)
    for number in range(SAMPLES_MIN):
        live.heard_worker(report(number, store_bytes_per_second=5e6))
    live.heard_worker(report(FORGET_MS, store_bytes_per_second=0.0))
    assert live.of_worker(5).store_bytes_per_second == 5e6
    live.heard_worker(report(2 * FORGET_MS, store_bytes_per_second=0.0))
    assert live.of_worker(5).store_bytes_per_second == PRIOR.store_bytes_per_second


def test_what_was_not_measured_leaves_the_prior() -> None:
    live = LiveSpeeds(PRIOR)
    for number in range(5):
        live.heard_worker(report(number, prefill_seconds_per_token=0.0, prefill_base_seconds=0.0))
        live.heard_worker(report(number, store_bytes_per_second=0.0, dram_bytes_per_second=0.0))
    assert live.of_worker(5).prefill_seconds_per_token in (PRIOR.prefill_seconds_per_token, 5e-5)
    assert not live.ignored


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"worker": "x"}, "invalid_worker_id"),
        ({"worker": "9" * 30}, "invalid_worker_id"),
        ({"prefill_seconds_per_token": math.nan}, "invalid_rate"),
        ({"store_bytes_per_second": math.inf}, "invalid_rate"),
        ({"dram_bytes_per_second": -1.0}, "invalid_rate"),
        ({"chunk_bytes": 0}, "invalid_size"),
        ({"queue": -5}, "invalid_size"),
        ({"chunk_bytes": 1 << 40}, "invalid_size"),
        ({"blocks_per_chunk": 1 << 40}, "invalid_size"),
        ({"fetched_chunks": {"miss": -1}}, "invalid_count"),
        ({"prefill_seconds_per_token": 1e3}, "implausible_prefill"),
        ({"store_bytes_per_second": 1e30}, "implausible_rate"),
        ({"ts_ms": -10}, "stale_timestamp"),
    ],
)
def test_absurd_reports_are_counted_and_change_nothing(changes: dict[str, object], reason: str) -> None:
    live = LiveSpeeds(PRIOR)
    for number in range(SAMPLES_MIN):
        live.heard_worker(report(number))
    before = live.of_worker(5)
    assert not live.heard_worker(report(9, **changes) if "ts_ms" not in changes else report(**changes))  # type: ignore[arg-type]
    assert live.ignored == {reason: 1}
    assert live.of_worker(5) == before


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats(), st.floats(), st.integers()), max_size=20))
def test_whatever_is_said_speeds_stay_within_bounds(said: list[tuple[float, float, float, float, int]]) -> None:
    live = LiveSpeeds(PRIOR)
    for number, (per_token, squared, dram, store, queue) in enumerate(said):
        live.heard_worker(
            report(
                number,
                prefill_seconds_per_token=per_token,
                prefill_seconds_per_token_squared=squared,
                dram_bytes_per_second=dram,
                store_bytes_per_second=store,
                queue=queue,
            )
        )
    speeds = live.of_worker(5)
    for rate, prior in (
        (speeds.dram_bytes_per_second, PRIOR.dram_bytes_per_second),
        (speeds.store_bytes_per_second, PRIOR.store_bytes_per_second),
    ):
        assert prior / 1000 <= rate <= prior * 1000
    assert math.isfinite(speeds.prefill_seconds_per_token)
    assert speeds.prefill_seconds_per_token >= 0


def test_first_tokens_correct_the_model_within_bounds() -> None:
    live = LiveSpeeds(PRIOR)
    expected = PRIOR.prefill.seconds(1000, 500)
    for _ in range(7):
        live.observed(5, 1000, 500, 2 * expected)
    assert live.of_worker(5) == PRIOR  # not enough to go by
    live.observed(5, 1000, 500, 2 * expected)
    assert live.of_worker(5).prefill_seconds_per_token == pytest.approx(2 * PRIOR.prefill_seconds_per_token)
    for _ in range(40):
        live.observed(5, 1000, 500, 100 * expected)
    assert live.of_worker(5).prefill_seconds_per_token == pytest.approx(3 * PRIOR.prefill_seconds_per_token)
    assert live.of_worker(5).store_bytes_per_second == PRIOR.store_bytes_per_second


def test_a_model_that_a_worker_has_corrected_is_not_corrected_again() -> None:
    """Otherwise it would be wrong the other way, until enough prompts were computed with the new one."""
    live = LiveSpeeds(PRIOR)
    right = Prefill(*(2 * one for one in PRIOR.prefill))
    for _ in range(40):
        live.observed(5, 1000, 0, right.seconds(1000, 0))
    for number in range(SAMPLES_MIN):
        assert live.heard_worker(report(number, **dict(zip(_PREFILL, right, strict=True))))
    assert live.of_worker(5).prefill.seconds(2000, 0) == pytest.approx(right.seconds(2000, 0))


def test_what_a_target_has_in_memory_does_not_wait_for_its_devices() -> None:
    live = LiveSpeeds(PRIOR)
    for share, rate, waiting in ((0.0, 2e9, 500), (0.9, 2e10, 5000), (1.0, 2e11, 50_000)):
        assert live.heard_target(target(5, memory_share=share), 100.0)
        known = live.of_target("t:1", 101.0)
        assert known is not None
        assert (known.bytes_per_second, known.waiting_bytes) == (pytest.approx(rate), pytest.approx(waiting, rel=0.01))
    for share in (-0.1, 1.1, math.nan):
        assert not live.heard_target(target(6, memory_share=share), 102.0)
    assert live.ignored == {"invalid_share": 3}


def test_a_target_is_believed_while_it_speaks() -> None:
    live = LiveSpeeds(PRIOR)
    assert live.of_target("t:1", 0.0) is None
    assert live.heard_target(target(5), 100.0)
    known = live.of_target("t:1", 101.0)
    assert known is not None
    assert (known.bytes_per_second, known.waiting_bytes) == (2e9, 500)
    assert live.of_target("t:1", 100.1 + TARGET_SECONDS) is None
    assert not live.heard_target(target(4), 101.0)  # replayed
    assert live.heard_target(target(1, epoch=2), 101.0)
    assert not live.heard_target(target(0, epoch=2), 102.0)
    assert not live.heard_target(target(9, epoch=2, device_bytes_per_second=math.nan), 102.0)
    assert not live.heard_target(target(9, epoch=2, waiting_read_bytes=-1), 102.0)
    assert live.ignored == {"stale_timestamp": 2, "invalid_rate": 1, "invalid_size": 1}
    assert not live.heard_target(target(9, epoch=2, waiting_read_bytes=1 << 60), 102.0)
    assert not live.heard_target(target(9, epoch=2, device_bytes_per_second=1e30), 102.0)
    assert (live.ignored["invalid_size"], live.ignored["implausible_rate"]) == (2, 1)
    live.heard_target(target(10, epoch=2, device_bytes_per_second=0.0), 103.0)
    assert live.of_target("t:1", 103.0) is None  # it was idle: nothing is known


def test_a_report_from_the_future_does_not_silence_a_worker_for_ever() -> None:
    live = LiveSpeeds(PRIOR)
    live.heard_worker(report(1 << 60))
    heard = [live.heard_worker(report(number)) for number in range(OLDER_MAX + 2)]
    assert heard == [False] * OLDER_MAX + [True] * 2
    assert live.ignored == {"stale_timestamp": OLDER_MAX}


def test_what_workers_fetched_is_kept_by_known_outcomes() -> None:
    live = LiveSpeeds(PRIOR)
    live.heard_worker(report(fetched_chunks={"hit": 5, "miss": 2, "nonsense": 9}))
    assert live.fetched_chunks[5] == {"hit": 5, "miss": 2, "late": 0, "corrupt": 0, "refused": 0, "unreachable": 0}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.router.speeds.WORKERS_MAX", 3)
    live = LiveSpeeds(PRIOR)
    for number in range(5):
        live.heard_worker(report(worker=str(number)))
    assert live.ignored == {"too_many_workers": 2}
    live = LiveSpeeds(PRIOR)
    for number in range(TARGETS_MAX + 5):
        live.heard_target(target(target=f"t:{number}"), 0.0)
    assert live.ignored == {"too_many_targets": 5}
    live.heard_worker(report())
    live.keep_only(set(), 1000.0)
    assert not live._targets
    assert not live._workers
