"""The pages: links lead somewhere, pages that code names exist, and so do the benchmarks and options that they show."""

import contextlib
import io
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.chat import plot
from graphs import cli
from kvstore import tools

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir() and (path.name == ".github" or path.name[0] != "."))
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])
SOURCES = [
    path for folder in FOLDERS for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".yml", ".service")
]


def load(path: str) -> ModuleType:
    specification = spec_from_file_location(Path(path).stem, ROOT / path)
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """A page without its code, where brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w -]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (one := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(one)
    return found


def links(page: Path) -> Iterator[str]:
    text = prose(page)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'(?:src|href)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_pages_that_code_names_exist() -> None:
    named = {one for path in SOURCES for one in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())}
    assert named
    assert [one for one in sorted(named) if not (ROOT / one).is_file()] == []


def test_benchmarks_of_the_pages_exist_with_their_options() -> None:
    wrong = []
    commands = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        commands += re.findall(r"python -m (benchmarks[\w.]*)([^`#|\n]*)", text)
    assert len(commands) > 20
    for module, arguments in commands:
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            wrong.append(module)
            continue
        source = "".join(other.read_text() for other in file.parent.glob("*.py"))
        outside_quotes = re.sub(r"([\"']).*?\1", "", arguments)
        wrong += [f"{module} {one}" for one in re.findall(r"--[\w-]+", outside_quotes) if f'"{one}"' not in source]
    assert wrong == []


@pytest.fixture(scope="module")
def options_of() -> Callable[[str], str]:
    """What a command's --help says."""
    parsers = {f"kvtier {name}": import_module(module).main for name, module in cli._MODULES.items()}
    parsers["python -m kvstore"] = parsers["kvtier store"]
    for name in ("worker", "router"):
        parsers[f"python -m components.{name}"] = import_module(f"components.{name}.__main__").parse

    @cache
    def told(command: str) -> str:
        program = next(one for one in parsers if f"{command} ".startswith(f"{one} "))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            parsers[program]([*command.removeprefix(program).split(), "--help"])
        return out.getvalue()

    return told


def test_commands_of_the_pages_have_the_options_that_they_show(options_of: Callable[[str], str]) -> None:
    """Most are run by other tests; what needs another machine has at least the options that it shows."""
    tools_of_store = f"(?: (?:{'|'.join(tools.COMMANDS)}))?"
    program = rf"kvtier store{tools_of_store}|python -m kvstore{tools_of_store}|python -m components\.(?:worker|router)"
    others = f"kvtier (?:{'|'.join(cli._MODULES)})"
    commands = set()
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for command, arguments in re.findall(rf"({program}|{others})\b([^`#|\n)]*)", text):
            ours = re.sub(r"([\"']).*?\1", "", arguments).partition(" -- ")[0]
            commands |= {(command, option) for option in re.findall(r" (--[\w-]+)", ours)}
    assert len(commands) > 30
    assert [one for one in sorted(commands) if not re.search(rf"{one[1]}\b(?!-)", options_of(one[0]))] == []


def test_the_picture_of_the_chat_benchmark_shows_its_table() -> None:
    drawn = plot.picture()
    assert "<circle" in drawn
    assert drawn == (ROOT / "docs/images/chat.svg").read_text(), "python -m benchmarks.chat.plot"


def test_the_site_has_every_page_in_its_navigation_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    site = load("docs/site.py")
    site.gather(tmp_path)
    pages = {page.name: page for page in tmp_path.glob("*.md")}
    sections = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(re.findall(r"[\w-]+\.md", str(sections))) == sorted(pages)
    for page in pages.values():
        for name, _, anchor in (link.partition("#") for link in links(page) if "://" not in link):
            assert (tmp_path / name).is_file() or not name, (page, name)
            assert not anchor or anchor in anchors(pages[name] if name else page), (page, anchor)


def test_tests_behind_the_table_of_compatibility_exist() -> None:
    """A cell that says so has the number of a note, and the note a test."""
    page = (ROOT / "docs/compatibility.md").read_text()
    notes = dict(re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\n\n)", page, re.MULTILINE | re.DOTALL))
    named = {number: re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", note) for number, note in notes.items()}
    cells = [cell.strip() for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE) for cell in row.split(" | ")]
    claims = [cell for cell in cells if re.match(r"(tested|part|refused)\b.*\(", cell)]
    assert len(claims) > 20
    assert [cell for cell in claims if not named.get(cell[cell.index("(") + 1 : -1])] == []
    for path, name in (test for tests in named.values() for test in tests):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)
