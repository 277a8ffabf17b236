"""Makes text safe to show: escapes names and messages that other processes sent (on the bus, the wire, in etcd, over
HTTP), and hides secrets in URLs and environment variables."""

import re

TEXT_CHARACTERS_MAX = 200
NAME_CHARACTERS_MAX = 256  # of a target, as on the wire
HIDDEN = "***"
# scheme://user:password@host, and user:password@host.
_USERINFO = re.compile(r"(?<=://)[^/\s]*@|(?<![\w.%+-])[\w.%+-]*:[^\s/,:@]*@(?=[\w\[])")
# Names of tokens, passwords and seeds. Paths of files are not secret, nor are keys of other kinds.
_SECRET_VARIABLE = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|NKEY|API_KEY|ACCESS_KEY)$", re.IGNORECASE)


def shown(text: object, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """`str(text)` for a log, a terminal or an error message. Non-printable characters are escaped as in Python: control
    characters, terminal escapes, line ends, bidirectional marks. A long text is truncated."""
    whole = str(text)
    safe = "".join(one if one.isprintable() else _escaped(one) for one in whole[:characters_max])
    return safe if len(whole) <= characters_max else f"{safe}... ({len(whole)} characters)"


def is_plain(name: str, characters_max: int) -> bool:
    """Whether a name has 1 to `characters_max` characters of printable ASCII, as every valid address and id does."""
    return 0 < len(name) <= characters_max and name.isascii() and name.isprintable()


def clean(value: object) -> object:
    """JSON-like data with `shown` applied to every string in it."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {clean(key): clean(one) for key, one in value.items()}
    return [clean(one) for one in value] if isinstance(value, (list, tuple)) else value


def masked(text: str) -> str:
    """The text with user and password of URLs hidden."""
    return _USERINFO.sub(f"{HIDDEN}@", text)


def is_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(variable) is not None


def masked_variable(name: str, value: str) -> str:
    """The value of an environment variable, hidden if its name is that of a secret."""
    return HIDDEN if value and is_secret(name) else masked(value)


def in_units(count_bytes: float) -> str:
    """Bytes as 896.0 MiB."""
    from pydantic import ByteSize  # the mover starts with each engine, and does without

    return ByteSize(count_bytes).human_readable(separator=" ")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
