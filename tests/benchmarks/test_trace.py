"""Traces of requests: bad lines are refused by line and field, prompts share what their hashes share, and in a replay a
turn follows the one before."""

import json
from pathlib import Path

import pytest

from benchmarks.routing import policy, policy_rules, trace
from benchmarks.routing.engine_model import Hardware
from benchmarks.routing.policy_sim import Replay, Request, Simulation
from kvstore.errors import ConfigError

GOOD = {"timestamp": 10, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}


def written(folder: Path, *lines: dict[str, object] | str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**GOOD, "timestamp": "soon"}, "trace.jsonl:2: timestamp: 'soon' given, expected milliseconds"),
        ({**GOOD, "timestamp": 9}, "trace.jsonl:2: timestamp: '9' given, expected milliseconds, at least 10"),
        ({**GOOD, "input_length": 0}, "trace.jsonl:2: input_length: '0' given, expected a whole number from 1"),
        ({**GOOD, "output_length": None}, "trace.jsonl:2: output_length: missing"),
        ({**GOOD, "output_length": True}, "trace.jsonl:2: output_length: 'True' given"),
        (
            {**GOOD, "hash_ids": [1, 2]},
            "trace.jsonl:2: hash_ids: '2 numbers' given, expected 3, one for each 512",
        ),
        ({**GOOD, "hash_ids": [1, 2, "x"]}, "trace.jsonl:2: hash_ids: 'x' given, expected whole numbers"),
        ({**GOOD, "hash_ids": 7}, "trace.jsonl:2: hash_ids: '7' given, expected a list"),
        ("[1]", "trace.jsonl:2: '[1]' given, expected a JSON object"),
        ('{"timestamp": ', "trace.jsonl:2: '{\"timestamp\":' given, expected a JSON object"),
        (" " * (trace.LINE_BYTES_MAX + 1), "trace.jsonl:2: 'more than 1048576 bytes' given"),
    ],
)
def test_a_bad_line_is_refused_by_line_field_and_value(
    tmp_path: Path, line: dict[str, object] | str, said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        trace.read(written(tmp_path, GOOD, line))
    assert said in str(refused.value)


def test_a_trace_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, *[GOOD] * 5)
    assert len(trace.read(path, 2)) == 2
    monkeypatch.setattr(trace, "BLOCKS_MAX", 12)
    with pytest.raises(ConfigError, match=r"trace\.jsonl:5: hash_ids: '15 up to here' given, expected at most 12"):
        trace.read(path)


def test_the_command_says_what_is_wrong_with_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["policy", "--trace", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit) as ended:
        policy.main()
    assert ended.value.code == 2


def asked(seconds: float, ids: list[int], tokens: int, answer: int = 100) -> dict[str, object]:
    return {"timestamp": 1000 * seconds, "input_length": tokens, "output_length": answer, "hash_ids": ids}


def test_prompts_share_what_their_hashes_share(tmp_path: Path) -> None:
    opening, question, turn, other = trace.read(
        written(
            tmp_path,
            asked(5, [1, 2, 3], 1100),
            asked(6, [1, 2, 4], 1150),  # the same document, another question
            asked(7, [1, 2, 5, 6], 1700),  # goes on after the first
            asked(8, [7, 2], 600),  # a block of the same number behind another one is another block
        )
    )
    assert [sum(tokens for _, tokens in one.segments) for one in (opening, question, turn, other)] == [
        1100, 1150, 1700, 600,
    ]  # fmt: skip
    assert opening.segments[0] == question.segments[0] == turn.segments[0]
    assert opening.segments[0][1] == 1024
    assert len({key for one in (opening, question, turn, other) for key, _ in one.segments}) == 5
    assert [one.follows for one in (opening, question, turn, other)] == [None, None, 1, None]
    assert [one.seconds for one in (opening, other)] == [0, 3]


@pytest.mark.parametrize(("pace", "think"), [(1.0, 0.0), (1.0, 50.0), (100.0, 3.0)])
def test_a_turn_waits_for_the_answer_before_it_and_for_its_reader(tmp_path: Path, pace: float, think: float) -> None:
    requests = trace.read(written(tmp_path, asked(0, [1, 2, 3], 1100), asked(40, [1, 2, 4, 5], 1700)))
    arrivals, hits = [], []
    rule = policy_rules.round_robin()

    def decide(sim: Simulation, request: Request) -> tuple[int, int]:
        arrivals.append(request.arrived)
        hits.append(sim.seen(sim.workers[0], request.conversation).hbm)
        return rule(sim, request)

    sim = Replay(Hardware(), 1, requests, decide, pace=pace, think_seconds=think, store=False)
    sim.run()
    answered = sim._done[0][0]
    assert arrivals == [0.0, pytest.approx(max(40 / pace, answered + think))]
    assert hits == [0, 1024]


def test_a_replay_leaves_out_what_no_worker_could_hold(tmp_path: Path) -> None:
    requests = trace.read(written(tmp_path, asked(0, [1, 2, 3], 1100), asked(1, list(range(10)), 5000)))
    sim = Replay(
        Hardware(hbm_tokens=4000), 1, requests, policy_rules.round_robin(), pace=1, think_seconds=0, store=True
    )
    assert sim.left_out == 1
    assert sim.run().requests_per_second > 0
