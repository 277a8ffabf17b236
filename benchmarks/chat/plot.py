"""The multi-turn benchmark's page, as SVG: requests and first tokens over clients and over time, and the machine.

`python -m benchmarks.chat.plot` draws the table of docs/benchmarks.md.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks.chat.machine import Facts
from benchmarks.chat.timeline import Timeline

# Safe for colour-blind readers (Okabe and Ito, 2008).
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
PANEL = (360, 240)
MARGIN = 60
_ROW = PANEL[1] + MARGIN + 40
_TEXT_LINE = 18

Lines = list[tuple[str, list[tuple[float, float]]]]  # by mode
Panels = dict[str, Lines]  # by title

_DOCS = Path(__file__).parents[2] / "docs"


class Drawn(Protocol):
    """The plotted fields of a point."""

    @property
    def mode(self) -> str: ...
    @property
    def clients(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def requests_per_second(self) -> float: ...
    @property
    def ttft_ms_mean(self) -> float: ...


class Row(NamedTuple):
    """A table's row."""

    mode: str
    clients: int
    requests_per_second: float
    ttft_ms_mean: float
    requests: int = 1  # the table has no number of requests


def rows(page: str, heading: str) -> list[Row]:
    """The rows of the first table below a heading."""
    table = page.partition(f"\n### {heading}\n")[2].partition("\n\n| ")[2].partition("\n\n")[0]
    found = re.findall(r"^\| ([^|]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
    return [Row(mode, int(clients), float(rate), float(ttft)) for mode, clients, rate, ttft in found]


def picture() -> str:
    """The plot of the page's table."""
    return plot(rows((_DOCS / "benchmarks.md").read_text(), "Chat that HBM cannot hold"))


def plot(points: Sequence[Drawn], timelines: Sequence[Timeline] = (), facts: Facts | None = None) -> str:
    """Two panels over clients, one over time if there are timelines, and the machine below them."""
    modes = list(dict.fromkeys([*(point.mode for point in points), *(one.mode for one in timelines)]))
    colours = {mode: COLOURS[number % len(COLOURS)] for number, mode in enumerate(modes)}
    by_mode = {
        mode: sorted(
            (point for point in points if point.mode == mode and point.requests), key=lambda point: point.clients
        )
        for mode in modes
    }
    over_clients: Panels = {
        "requests per second": [
            (mode, [(one.clients, one.requests_per_second) for one in line]) for mode, line in by_mode.items()
        ],
        "mean TTFT, ms": [(mode, [(one.clients, one.ttft_ms_mean) for one in line]) for mode, line in by_mode.items()],
    }
    over_time: Panels = {
        "requests per second": [
            (one.mode, [(step.second, step.requests_per_second) for step in one.moments]) for one in timelines
        ],
        "mean TTFT, ms": [
            (one.mode, [(step.second, step.ttft_ms_mean) for step in one.moments if step.ttft_ms_mean is not None])
            for one in timelines
        ],
    }
    grid = [("clients", over_clients), *([("seconds", over_time)] if timelines else [])]
    said = [f"{name.replace('_', ' ')}: {value}" for name, value in (facts or {}).items()]
    width = 2 * (PANEL[0] + MARGIN) + MARGIN
    legend = MARGIN + len(grid) * _ROW
    height = legend + _TEXT_LINE * (len(modes) + len(said) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        f' font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for row, (across, panels) in enumerate(grid):
        for column, (title, lines) in enumerate(panels.items()):
            place = MARGIN + column * (PANEL[0] + MARGIN), MARGIN + row * _ROW
            parts += _panel(place, title, across, lines, colours)
    for number, mode in enumerate(modes):
        top = legend + _TEXT_LINE * number
        parts.append(f'<rect x="{MARGIN}" y="{top}" width="12" height="12" fill="{colours[mode]}"/>')
        parts.append(f'<text x="{MARGIN + 18}" y="{top + 10}">{escape(mode)}</text>')
    for number, text in enumerate(said, len(modes)):
        parts.append(f'<text x="{MARGIN}" y="{legend + _TEXT_LINE * number + 10}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(place: tuple[int, int], title: str, across: str, lines: Lines, colours: dict[str, str]) -> list[str]:
    left, top = place
    corners = [corner for _, line in lines for corner in line]
    widest = max((x for x, _ in corners), default=1.0) or 1.0
    most = 1.1 * max((y for _, y in corners), default=1.0) or 1.0
    bottom = top + PANEL[1]

    def placed(corner: tuple[float, float]) -> tuple[float, float]:
        return left + PANEL[0] * corner[0] / widest, bottom - PANEL[1] * corner[1] / most

    parts = [
        f'<text x="{left}" y="{top - 16}" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top}V{bottom}H{left + PANEL[0]}" fill="none" stroke="#888"/>',
        f'<text x="{left + PANEL[0]}" y="{bottom + 32}" text-anchor="end">{across}</text>',
    ]
    for share in (0.5, 1.0):
        height, value = bottom - PANEL[1] * share, most * share
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        parts.append(f'<text x="{left - 6}" y="{height + 4:.0f}" text-anchor="end">{text}</text>')
    marks = sorted({x for x, _ in corners})
    for mark in marks if len(marks) <= 8 else (0, widest / 2, widest):
        at = left + PANEL[0] * mark / widest
        parts.append(f'<text x="{at:.0f}" y="{bottom + 16}" text-anchor="middle">{mark:.0f}</text>')
    for mode, line in lines:
        drawn = [placed(corner) for corner in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colours[mode]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colours[mode]}"/>' for x, y in drawn]
    return parts


if __name__ == "__main__":
    (_DOCS / "images" / "chat.svg").write_text(picture())
