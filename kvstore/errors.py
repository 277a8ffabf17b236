"""Errors that a person reads: what was given, what was wanted; and how a command ends with one.

What is in their text of others' is escaped, and passwords of URLs are hidden.
"""

import difflib
import os
import select
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, get_args

from kvstore.text import masked, shown

if TYPE_CHECKING:  # the mover starts with each engine, and does without
    from pydantic import BaseModel

# In place of pydantic's words, where those say how it parses and not what to write.
_EXPECTED = {
    "byte_size": "a size such as 500G or 1.5TiB",
    "byte_size_unit": "a size such as 500G or 1.5TiB",
    "string_type": "a text, in quotes",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
}

Model = TypeVar("Model", bound="BaseModel")

_LINE_CHARACTERS_MAX = 10_000
USAGE = 2  # exit code of a command that was asked for something it cannot do


def _line(text: str) -> str:
    return shown(masked(text), _LINE_CHARACTERS_MAX)


class ConfigError(Exception):
    """Bad input, in one line: the field, the value given, and what was expected. None or no text is a missing value."""

    def __init__(self, name: str, value: object, expected: str):
        problem = "missing" if value in (None, "") else f"{str(value)!r} given"
        super().__init__(_line(f"{name}: {problem}, expected {expected}"))

    @classmethod
    def saying(cls, name: str, problem: str, expected: str) -> Self:
        """Of a field whose value is not at fault: it is unknown, duplicate or in conflict."""
        error = cls(name, None, expected)
        error.args = (_line(f"{name}: {problem}, expected {expected}"),)
        return error

    @classmethod
    def unknown(cls, name: str, known: Collection[str], of: str = "one of") -> Self:
        """Of a field, the last part of `name`, that is none of the `known`. Its value is hidden: it may be a secret."""
        meant = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
        hint = f"; did you mean {meant[0]}?" if meant and len(known) > 1 else ""
        return cls.saying(name, "unknown", f"{of} {', '.join(known)}{hint}")

    def within(self, where: str) -> "ConfigError":
        """The same of a field that is a part of `where`."""
        self.args = (f"{where}.{self.args[0]}",)
        return self


class UnavailableError(Exception):
    """Something that must answer at start does not, in one line: what, where, and what to do."""

    exit_code = USAGE

    def __init__(self, text: str):
        super().__init__(_line(text))


class FailedError(UnavailableError):
    """A process that was started did not come up: nothing is wrong with the command itself. Its last words may have
    several lines."""

    exit_code = 1

    def __init__(self, text: str):
        Exception.__init__(self, "\n".join(map(_line, text.splitlines())))


def readable(field: str, path: str) -> str:
    """The path of a file that somebody else opens. Raises ConfigError if it cannot be opened."""
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({error.strerror})") from None
    return path


def without_userinfo(field: str, url: str, instead: str) -> str:
    """The URL or URLs. Raises ConfigError, which says what to do `instead`, if there is a user or a password in one: it
    would stand in a process's arguments, which every user of the machine can read."""
    if "@" in url:
        raise ConfigError(field, url, f"no user and no password in it: {instead}")
    return url


def validated(model: type[Model], values: dict[str, object]) -> Model:
    """Build `model` from `values`; the first thing wrong becomes a ConfigError that names it as on the command line."""
    from pydantic import ValidationError

    try:
        return model.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if first["type"] == "extra_forbidden":
            raise ConfigError.unknown(name, _settings(model, first["loc"][:-1])) from None
        raise ConfigError(name, first.get("input"), _EXPECTED.get(first["type"], message)) from None


def _settings(model: "type[BaseModel]", path: tuple[int | str, ...]) -> list[str]:
    """What can be set in the part of a model at `path`, as on the command line."""
    kind: Any = model
    for name in path:
        inside = get_args(kind)  # of a list or a mapping
        kind = inside[-1] if inside else kind.model_fields[name].annotation
    return [name.replace("_", "-") for name in kind.model_fields]


def fail(program: str, error: Exception) -> NoReturn:
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(getattr(error, "exit_code", USAGE))


def run_command(program: str, main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function; ConfigError and UnavailableError end it with one line and exit code 2,
    FailedError with 1. A reader of its output that leaves early, as `head` does, ends it without a word."""
    try:
        code = main() or 0
        print(end="", flush=True)
        sys.exit(code)
    except (ConfigError, UnavailableError) as error:
        fail(program, error)
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(141)  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        sys.exit(130)


def _has_lost_its_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return bool(poll.poll(0))
