"""What the router takes from model cards and tier reports, and what it does not."""

import json

import msgspec

from components.router.workers import REPORT_SECONDS, Workers, parse_card
from kvstore.bus.messages import WorkerReport

ENDPOINT = "dynamo.backend.generate"


def card(block: int = 16, **changes: object) -> str:
    content = {"display_name": "m", "kv_cache_block_size": block, "runtime_config": {"total_kv_blocks": 100}}
    return json.dumps({**content, **changes})


def report(**changes: object) -> WorkerReport:
    plain = WorkerReport("5", ENDPOINT, fingerprint=7, block_tokens=16, blocks_per_chunk=2, chunk_bytes=1000, ts_ms=0)
    return msgspec.structs.replace(plain, **changes)


def test_cards_are_read_and_others_passed_over() -> None:
    workers = Workers(ENDPOINT)
    workers.set_cards({"5": card(), "6": card(128), "7": "{}", "8": "nonsense", "9": "[]"})
    assert {worker: one.block_tokens for worker, one in workers.cards.items()} == {5: 16, 6: 128}
    assert workers.cards[5].total_blocks == 100
    workers.set_cards({"6": card(128)})
    assert list(workers.cards) == [6]
    assert parse_card(card(runtime_config=None)) is not None


def test_the_context_length_is_what_the_engine_refuses_more_than() -> None:
    def of(limit: int, refuses: bool) -> str:
        budget = {"combined_limit": limit, "reject_prompt_overflow": refuses, "reject_total_overflow": refuses}
        return card(runtime_config={"runtime_data": {"token_budget": budget}})

    workers = Workers(ENDPOINT)
    workers.set_cards({"5": card(), "6": of(500, False)})
    assert workers.context_tokens() == 0
    workers.set_cards({"5": card(), "6": of(500, False), "7": of(2000, True), "8": of(1000, True)})
    assert (workers.context_tokens(least=True), workers.context_tokens()) == (1000, 2000)


def test_a_report_is_progress_if_the_engine_says_something_new() -> None:
    workers = Workers(ENDPOINT)
    workers.set_cards({"5": card()})
    workers.heard(report(queue=3), 1.0)
    workers.heard(report(queue=3, ts_ms=1000, store_bytes_per_second=5.0), 2.0)
    assert workers.last_progress(5) < 1.0
    workers.heard(report(queue=2, ts_ms=2000), 3.0)
    assert workers.last_progress(5) == 3.0


def test_a_report_counts_for_its_worker_while_it_is_fresh() -> None:
    workers = Workers(ENDPOINT)
    workers.heard(report(), 100.0)
    assert workers.report(5, 16, 101.0) == report()
    assert workers.report(6, 16, 101.0) is None
    assert workers.report(5, 16, 101.0 + REPORT_SECONDS) is None
    workers.forget_silent(200.0)
    assert workers.report(5, 16, 101.0) is None


def test_a_report_that_is_for_others_or_does_not_fit_is_left_out() -> None:
    workers = Workers(ENDPOINT)
    workers.heard(report(endpoint="other.backend.generate"), 100.0)
    workers.heard(report(worker=""), 100.0)
    assert workers.report(5, 16, 100.0) is None
    workers.heard(report(block_tokens=128), 100.0)
    assert workers.report(5, 16, 100.0) is None
