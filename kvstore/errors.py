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
    "missing": "a value: it has no default",
    "byte_size": "a size such as 500G or 1.5TiB",
    "byte_size_unit": "a size such as 500G or 1.5TiB",
    "string_type": "a text, in quotes",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
# The words of all other errors about a limit.
_LIMITS = {"greater than or equal to": "at least", "less than or equal to": "at most", "greater than": "more than"}

Model = TypeVar("Model", bound="BaseModel")

_LINE_CHARACTERS_MAX = 10_000
USAGE = 2  # exit code for bad input


def _line(text: str) -> str:
    return shown(masked(text), _LINE_CHARACTERS_MAX)


class ConfigError(Exception):
    """Bad input, in one line: `PLACE: FIELD: PROBLEM, expected WHAT`. The place, a file and line, may be empty; so
    may the field, if the whole line is bad. The constructor is for a bad value. The other kinds have their own.
    """

    def __init__(self, field: str, value: object, expected: str):
        """An empty value counts as missing."""
        super().__init__(field, "", expected)  # for repr and pickle, without the value: it may hold a password
        self.place = ""
        self.field = field
        self.problem = "missing" if value in (None, "") else f"{str(value)!r} given"
        self.expected = expected

    @classmethod
    def missing(cls, field: str, expected: str, required_by: str = "") -> Self:
        """`required_by` names the other option, and its value if that matters."""
        error = cls(field, None, expected)
        if required_by:
            error.problem = f"missing, required by {required_by}"
        return error

    @classmethod
    def unknown(cls, field: str, known: Collection[str], of: str = "one of") -> Self:
        """For a field (its last part) that is not among the `known`. Hides its value, which may be secret."""
        meant = difflib.get_close_matches(field.rpartition(".")[2], known, 1)
        hint = f"; did you mean {meant[0]}?" if meant and len(known) > 1 else ""
        error = cls(field, None, f"{of} {', '.join(known)}{hint}")
        error.problem = "unknown"
        return error

    @classmethod
    def duplicate(cls, field: str, value: str, first: str) -> Self:
        """`first` is where the same was given before."""
        error = cls(field, value, "it once")
        error.problem = f"{value!r} is a duplicate of {first}"
        return error

    @classmethod
    def conflicting(cls, field: str, value: object, other: str, expected: str) -> Self:
        """For a valid value that cannot stand together with that of another option."""
        error = cls(field, value, expected)
        error.problem = f"{str(value)!r} conflicts with {other}"
        return error

    def within(self, parent: str) -> Self:
        """The same error, about a field of `parent`."""
        self.field = f"{parent}.{self.field}"
        return self

    def at(self, place: str) -> Self:
        """The same error, with the file and line of the field, unless it has a place already."""
        self.place = self.place or place
        return self

    def __str__(self) -> str:
        subject = ": ".join(filter(None, (self.place, self.field, self.problem)))
        return _line(f"{subject}, expected {self.expected}")


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
        kind = first["type"]
        name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        if kind == "extra_forbidden":
            raise ConfigError.unknown(name, _settings(model, first["loc"][:-1])) from None
        value = None if kind == "missing" else first["input"]  # otherwise the whole mapping
        raise ConfigError(name, value, _EXPECTED.get(kind) or _expected(kind, first["msg"])) from None


def _expected(kind: str, message: str) -> str:
    """Pydantic's message, in the words of our own errors."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "literal_error":
        values = message.replace("'", "").replace(" or ", ", ").split(", ")
        return f"one of {', '.join(filter(None, values))}"  # "" is the option that is not given
    for words, ours in _LIMITS.items():
        if message.startswith(words):
            return message.replace(words, ours)
    return message


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
