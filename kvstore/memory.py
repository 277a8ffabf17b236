"""The memory limit of this process: the machine's memory, or the limit of a control group."""

import re
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.text import in_units

_V1_FILE, _V2_FILE = "memory.limit_in_bytes", "memory.max"


def limit_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The lowest of the machine's memory and the limits of the process's control groups (versions 1 and 2)."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    limits = [int(found.group(1)) << 10] if found else []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # number:controllers:path; version 2 names no controllers
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (groups / "memory", _V1_FILE) if controllers else (groups, _V2_FILE)
        inner = Path(path.lstrip("/"))
        # The limits of all parent groups apply, too. In a container, its own group may be the root.
        limits += [_limit(root / group / name) for group in (inner, *inner.parents)]
    return min(limit for limit in limits if limit)


def check(wanted: dict[str, int]) -> None:
    """Raises ConfigError, which names the largest, if these options together exceed the memory limit."""
    limit, total = limit_bytes(), sum(wanted.values())
    if total > limit:
        name = max(wanted, key=lambda option: wanted[option])
        together = f" with {' and '.join(f'--{other}' for other in wanted if other != name)}" if len(wanted) > 1 else ""
        expected = f"at most the {in_units(limit)} of memory that this process may have{together}"
        raise ConfigError(name, in_units(wanted[name]), expected)


def _limit(path: Path) -> int:
    """The limit in a file; 0: none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0
