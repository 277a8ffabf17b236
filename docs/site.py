"""The pages of the site in one folder, where its generator looks for them: `python docs/site.py FOLDER`.

Pages outside docs/ lie beside those in it, and links lead there. Files that pages link to come along.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_NAMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "benchmarks/README.md": "benchmark-commands.md",
}
_LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"#\s]+)')


def name(path: Path) -> str:
    """A file's place in the site."""
    inside = path.relative_to(ROOT).as_posix()
    return _NAMES.get(inside, inside.removeprefix("docs/"))


def gather(folder: Path) -> None:
    """Write all pages, and what they link to, into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in [*(ROOT / path for path in _NAMES), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        linked = {(page.parent / link).resolve() for _, link in _LINK.findall(text)}
        for file in linked:
            if file.suffix != ".md":
                (folder / name(file)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / name(file))
        moved = _LINK.sub(lambda found, page=page: found[1] + name((page.parent / found[2]).resolve()), text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name(page)).write_text(moved)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
