"""Human-readable numbers and tables."""

from collections.abc import Mapping, Sequence

from pydantic import ByteSize

from kvstore.keys import KEY_VERSION


def speed(bytes_per_second: float) -> str:
    return ByteSize(bytes_per_second).human_readable(decimal=True, separator=" ") + "/s"


def age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def key_versions(chunks: Mapping[int, int]) -> str:
    """Chunks by the version of their key; "" if all have today's."""
    if set(chunks) <= {KEY_VERSION}:
        return ""
    return ", ".join(f"v{version} {count:,}" for version, count in sorted(chunks.items()))


def table(rows: Sequence[Sequence[str]]) -> str:
    """A text table: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
