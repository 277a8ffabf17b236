"""Errors for the operator: the field, the value given, the value expected; and the exit code of a command.

In their text, strings from other processes are escaped and passwords in URLs are hidden.
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

# Replaces pydantic's text where that describes its parsing instead of the expected input.
_EXPECTED = {
    "byte_size": "a size such as 500G or 1.5TiB",
    "byte_size_unit": "a size such as 500G or 1.5TiB",
    "string_type": "a text, in quotes",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
}

Model = TypeVar("Model", bound="BaseModel")

_LINE_CHARACTERS_MAX = 10_000
USAGE = 2  # exit code for bad input


def _line(text: str) -> str:
    return shown(masked(text), _LINE_CHARACTERS_MAX)


class ConfigError(Exception):
    """Bad input, in one line: the field, the value given, the value expected. None or "" is a missing value."""

    def __init__(self, name: str, value: object, expected: str):
        problem = "missing" if value in (None, "") else f"{str(value)!r} given"
        super().__init__(_line(f"{name}: {problem}, expected {expected}"))

    @classmethod
    def saying(cls, name: str, problem: str, expected: str) -> Self:
        """For a field whose value is not the problem: the field is unknown, duplicate or in conflict."""
        error = cls(name, None, expected)
        error.args = (_line(f"{name}: {problem}, expected {expected}"),)
        return error

    @classmethod
    def unknown(cls, name: str, known: Collection[str], of: str = "one of") -> Self:
        """For a field (the last part of `name`) that is not among the `known`. Hides its value, which may be secret."""
        meant = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
        hint = f"; did you mean {meant[0]}?" if meant and len(known) > 1 else ""
        return cls.saying(name, "unknown", f"{of} {', '.join(known)}{hint}")

    def within(self, where: str) -> "ConfigError":
        """The same error, with the field's name prefixed by `where`."""
        self.args = (f"{where}.{self.args[0]}",)
        return self


class UnavailableError(Exception):
    """A service that must answer at start does not. One line: which, where, and what to do."""

    exit_code = USAGE

    def __init__(self, text: str):
        super().__init__(_line(text))


class FailedError(UnavailableError):
    """A valid command failed while it ran, for example because a process that it started did not come up. The text may
    have several lines, such as the end of a log."""

    exit_code = 1

    def __init__(self, text: str):
        Exception.__init__(self, "\n".join(map(_line, text.splitlines())))


def readable(field: str, path: str) -> str:
    """The path of a file that another library will open. Raises ConfigError if it cannot be opened."""
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigError(field, path, f"a file that can be read ({error.strerror})") from None
    return path


def without_userinfo(field: str, url: str, instead: str) -> str:
    """The URL or URLs. Raises ConfigError, with the advice `instead`, if one contains a user or a password: every user
    of the machine can read a process's arguments."""
    if "@" in url:
        raise ConfigError(field, url, f"a URL without user and password: {instead}")
    return url


def validated(model: type[Model], values: dict[str, object]) -> Model:
    """Build `model` from `values`. The first problem is raised as a ConfigError, which names the field as on the
    command line."""
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
    """The names of the settings in the part of a model at `path`, as on the command line."""
    kind: Any = model
    for name in path:
        inside = get_args(kind)  # of a list or a mapping
        kind = inside[-1] if inside else kind.model_fields[name].annotation
    return [name.replace("_", "-") for name in kind.model_fields]


def fail(program: str, error: Exception) -> NoReturn:
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(getattr(error, "exit_code", USAGE))


def run_command(program: str, main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function. ConfigError and UnavailableError end it with one line and exit code 2, FailedError
    with 1. If the reader of its output closes the pipe, as `head` does, it ends silently."""
    try:
        code = main() or 0
        print(end="", flush=True)
        sys.exit(code)
    except (ConfigError, UnavailableError) as error:
        fail(program, error)
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's flush at exit
        sys.exit(141)  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        sys.exit(130)


def _has_lost_its_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return bool(poll.poll(0))
