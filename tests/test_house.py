"""The walls of the house: which wing may import which, read from the imports of every file, wherever they stand."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kvstore", "components", "graphs", "benchmarks")  # from the ground up


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for wing in (*FLOORS, "tests") for path in sorted((ROOT / wing).rglob("*.py"))}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the project that module `name`, of such a text, imports at its head or in a function."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # What is taken from a package is one of its modules, or else stands in its __init__.py.
            whole = [f"{source}.{alias.name}" for alias in node.names]
            named = [one if one in FILES else source for one in whole]
        else:
            continue
        yield from (one for one in named if one in FILES)


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports. Not made when tests are collected, which every process does."""
    return {name: set(imported(name, ast.parse(path.read_text()))) for name, path in FILES.items()}


def within(name: str, wing: str) -> bool:
    return name == wing or name.startswith(f"{wing}.")


def crossings(importers: str, *walls: str) -> list[str]:
    """Imports of what is behind one of the walls."""
    return [
        f"{name} imports {one}"
        for name, found in imports().items()
        if within(name, importers)
        for one in sorted(found)
        if any(within(one, wall) for wall in walls)
    ]


def test_every_wing_has_files_and_imports() -> None:
    """Or the other tests would find nothing wrong in an empty house."""
    assert "kvstore.disk.log" in imports()["kvstore.net.target"]
    assert "graphs.top_app" in imports()["graphs.top"]  # in a function
    assert "components.worker.mover.frames" in imports()["components.worker.remote_tier"]  # a module of a package


@pytest.mark.parametrize("floor", range(len(FLOORS) - 1), ids=FLOORS[:-1])
def test_no_floor_imports_one_above(floor: int) -> None:
    assert crossings(FLOORS[floor], *FLOORS[floor + 1 :], "tests") == []


def test_nothing_imports_the_tests() -> None:
    assert crossings("benchmarks", "tests") == []


@pytest.mark.parametrize(
    ("importers", "walls"),
    [
        ("kvstore.disk", ("kvstore.net", "kvstore.bus")),
        ("components.router", ("components.worker",)),
        ("components.worker", ("components.router",)),
        ("components.pricing", ("components.router", "components.worker")),
    ],
)
def test_walls_between_wings(importers: str, walls: tuple[str, ...]) -> None:
    assert any(within(name, importers) for name in FILES)
    assert all(any(within(name, wall) for name in FILES) for wall in walls)
    assert crossings(importers, *walls) == []


def beyond(start: str) -> set[str]:
    """What a module imports, in however many steps."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = imports()[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_no_imports_run_in_a_circle() -> None:
    reached = {name: beyond(name) for name in FILES}
    circles = {frozenset(one for one in reached[name] if name in reached[one]) for name in FILES} - {frozenset()}
    assert sorted(map(sorted, circles)) == []
