"""The findings of a scrub, and their text."""

import msgspec

from kvstore.text import in_units
from kvstore.tools import words


class Flaw(msgspec.Struct):
    """A failed check, and where it is on the device."""

    what: str
    page: int  # in the segment
    file: str
    offset: int  # in the file or on the device
    key: str = ""  # of the chunk, where it is known


class Report(msgspec.Struct):
    """The content of a segment. A sound chunk is live or superseded; each corrupt or cut off chunk is a flaw."""

    dir: str
    segment: int
    generation: int = 0
    state: str = "sealed"  # or: open, empty, scanned (its footer is damaged), lost
    live: int = 0
    superseded: int = 0
    live_bytes: int = 0  # of space, with headers
    dead_bytes: int = 0
    free_bytes: int = 0
    key_versions: dict[int, int] = {}  # version of the key (keys.py) -> live chunks
    corrupt: list[Flaw] = []
    cut_off: list[Flaw] = []


class Total(msgspec.Struct):
    segments: int = 0
    live: int = 0
    superseded: int = 0
    corrupt: int = 0
    cut_off: int = 0
    live_bytes: int = 0
    dead_bytes: int = 0
    free_bytes: int = 0
    key_versions: dict[int, int] = {}

    def add(self, report: Report) -> None:
        self.segments += 1
        self.corrupt += len(report.corrupt)
        self.cut_off += len(report.cut_off)
        for name in ("live", "superseded", "live_bytes", "dead_bytes", "free_bytes"):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        for version, chunks in report.key_versions.items():
            self.key_versions[version] = self.key_versions.get(version, 0) + chunks


_LINE = "{:>8}  {:>10}  {:<8}{:>8}  {:>10}  {:>8}  {:>8}  {:>10}  {:>10}  {:>10}"
TITLES = _LINE.format(
    "segment", "generation", "state", "chunks", "superseded", "corrupt", "cut off", "live", "dead", "free"
)


def as_lines(report: Report) -> str:
    volumes = map(in_units, (report.live_bytes, report.dead_bytes, report.free_bytes))
    counts = (report.live, report.superseded, len(report.corrupt), len(report.cut_off))
    lines = [_LINE.format(report.segment, report.generation, report.state, *counts, *volumes)]
    for kind, flaws in (("corrupt", report.corrupt), ("cut off", report.cut_off)):
        for flaw in flaws:
            chunk = f" of chunk {flaw.key}" if flaw.key else ""
            lines.append(f"          {kind}: {flaw.what}{chunk}, page {flaw.page}, {flaw.file} at byte {flaw.offset}")
    return "\n".join(lines)


def summary(total: Total) -> str:
    found = f"{total.corrupt} corrupt" if total.corrupt else "sound"
    versions = words.key_versions(total.key_versions)
    return (
        f"{found}: {total.segments} segments, {total.live} chunks, {total.superseded} superseded, {total.cut_off} cut "
        f"off; {in_units(total.live_bytes)} live, {in_units(total.dead_bytes)} dead, "
        f"{in_units(total.free_bytes)} free{versions and f'; chunks by key version: {versions}'}"
    )
