"""The router's benchmark measures every stage, on a small mirror."""

from benchmarks.routing import decision


def test_a_small_run_measures_every_stage() -> None:
    result = decision.measure(workers=4, chunks=5000, tokens=512, block_tokens=16, decisions=5)
    assert result.chunks == 5000
    assert result.decision.p99_ms >= result.price.p50_ms > 0
    assert result.bytes_per_entry <= 64
    assert result.ingested_entries_per_second > 0
