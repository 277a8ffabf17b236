"""Request traces in Mooncake's JSON lines, checked, with the prefixes that their prompts share.

A line is an object with `timestamp` (ms), `input_length` and `output_length` (tokens) and `hash_ids`, a number for each
block of 512 prompt tokens. Prompts whose first n numbers are equal share their first n blocks. Other fields are ignored
(https://github.com/kvcache-ai/Mooncake, FAST25-release).
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kvstore.errors import ConfigError

BLOCK_TOKENS = 512
LINE_BYTES_MAX = 1 << 20
TOKENS_MAX = 1 << 24  # of a prompt or an answer
BLOCKS_MAX = 4_000_000  # of all prompts; they take about 1 GB of memory
MILLISECONDS_MAX = 1 << 42


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, eq=False)
class Traced:
    """A request of a trace. `segments` are the parts of its prompt in order, each with a key and its tokens. Prompts
    have equal keys if they share the part and all parts before it. `follows` is the preceding turn."""

    key: int  # its index in the trace
    seconds: float  # since the first request of the trace
    prompt_tokens: int
    answer_tokens: int
    segments: tuple[tuple[int, int], ...]
    follows: int | None

    def path(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Without the answer: a trace has no hashes of answers."""
        return self.segments


def read(path: Path, requests_max: int | None = None) -> list[Traced]:
    """The trace, or its first `requests_max` requests. Raises OSError; ConfigError with line, field and value."""
    lines: list[_Line] = []
    blocks = 0
    with path.open("rb") as file:
        for number in itertools.count(1):
            if requests_max is not None and len(lines) >= requests_max:
                break
            try:
                text = _text(file)
                if text is None:
                    break
                if not text.strip():
                    continue
                line = _checked(text, lines[-1].timestamp if lines else 0.0)
                blocks += len(line.hash_ids)
                if blocks > BLOCKS_MAX:
                    raise ConfigError("hash_ids", f"{blocks} up to here", f"at most {BLOCKS_MAX} in a trace")
            except ConfigError as error:
                raise error.at(f"{path}:{number}") from None
            lines.append(line)
    if not lines:
        raise ConfigError("trace", path, "a file of JSON lines, one a request")
    return _shared(lines)


def _text(file: BinaryIO) -> bytes | None:
    """The next line; None at the end."""
    text = file.readline(LINE_BYTES_MAX + 1)
    if len(text) > LINE_BYTES_MAX:
        raise ConfigError("", f"more than {LINE_BYTES_MAX} bytes", "a line of a trace")
    return text or None


def _checked(text: bytes, before: float) -> _Line:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError("", text[:80].strip().decode(errors="replace"), f"a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError("", str(found)[:80], "a JSON object")

    def whole(field: str, least: int, most: float) -> int:
        value = found.get(field)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(field, value, f"a whole number from {least} to {most:.0f}")
        return value

    timestamp: Any = found.get("timestamp")
    if type(timestamp) not in (int, float) or not before <= timestamp <= MILLISECONDS_MAX:
        raise ConfigError("timestamp", timestamp, f"milliseconds, at least {before:.0f} as on the line before")
    prompt, answer = whole("input_length", 1, TOKENS_MAX), whole("output_length", 1, TOKENS_MAX)
    ids = found.get("hash_ids")
    if not isinstance(ids, list):
        raise ConfigError("hash_ids", str(ids)[:80], "a list of whole numbers")
    if len(ids) != math.ceil(prompt / BLOCK_TOKENS):
        expected = f"{math.ceil(prompt / BLOCK_TOKENS)}, one for each {BLOCK_TOKENS} of {prompt} tokens"
        raise ConfigError("hash_ids", f"{len(ids)} numbers", expected)
    if (odd := next((one for one in ids if type(one) is not int), None)) is not None:
        raise ConfigError("hash_ids", odd, "whole numbers")
    return _Line(float(timestamp), prompt, answer, ids)


def _shared(lines: list[_Line]) -> list[Traced]:
    """Cut prompts where they diverge or end, so that each part is cached as a whole or not at all."""
    nodes: dict[tuple[int, int], int] = {}  # (node before, hash) -> node; 0 is the root
    walks = []
    for line in lines:
        walk, node = [], 0
        for one in line.hash_ids:
            node = nodes.setdefault((node, one), len(nodes) + 1)
            walk.append(node)
        walks.append(walk)
    children = Counter(before for before, _ in nodes)
    cuts = {walk[-1] for walk in walks} | {node for node, count in children.items() if count > 1}
    last: dict[int, int] = {}  # node of a prompt's last full block -> the latest such prompt
    traced = []
    for key, (line, walk) in enumerate(zip(lines, walks, strict=True)):
        ends = [place + 1 for place, node in enumerate(walk) if node in cuts]
        segments = tuple(
            (walk[end - 1], min(end * BLOCK_TOKENS, line.input_length) - begin * BLOCK_TOKENS)
            for begin, end in itertools.pairwise([0, *ends])
        )
        before = (last[node] for node in reversed(walk) if node in last)
        # The next turn's prompt contains question and answer. Shorter prompts only share the beginning.
        follows = next((one for one in before if line.input_length >= _tokens(lines[one])), None)
        seconds = (line.timestamp - lines[0].timestamp) / 1000
        traced.append(Traced(key, seconds, line.input_length, line.output_length, segments, follows))
        if full := line.input_length // BLOCK_TOKENS:
            last[walk[full - 1]] = key
    return traced


def _tokens(line: _Line) -> int:
    return line.input_length + line.output_length
