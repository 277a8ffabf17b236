"""What must not be shown: user and password in a URL, and values of environment variables that hold secrets.

A secret comes from a file or from the environment. A URL with one in it would stand in a process's arguments, which
every user of the machine can read, so `without_userinfo` refuses it.
"""

import re

from kvstore.errors import ConfigError, masked

HIDDEN = "***"
# Paths of files are not secret, nor are keys of other kinds; these names are those of tokens, passwords and seeds.
_SECRET_NAME = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|CREDENTIALS|NKEY|API_KEY|ACCESS_KEY)$", re.IGNORECASE
)


def shown(name: str, value: str) -> str:
    """The value of an environment variable, as far as a log or a terminal may show it."""
    return HIDDEN if value and _SECRET_NAME.search(name) else masked(value)


def without_userinfo(field: str, url: str, instead: str) -> str:
    """The URL or URLs. Raises ConfigError, which says what to do `instead`, if there is a user or a password in one."""
    if "@" in url:
        raise ConfigError(field, url, f"no user and no password in it: {instead}")
    return url
