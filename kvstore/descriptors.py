"""How many files this process may have open: segments, two of each connection, and the rest."""

import resource

from kvstore.errors import ConfigError
from kvstore.net.lobby import GREETINGS_MAX
from kvstore.net.tls import HANDSHAKES_MAX
from kvstore.scrape import CONNECTIONS_MAX

_OF_CONNECTION = 2  # one thread receives, another one sends
_OTHERS = GREETINGS_MAX + HANDSHAKES_MAX + CONNECTIONS_MAX + 64  # the last: libraries, listeners, NATS, etcd


def check(option: str, connections: int, segments: int) -> None:
    """Raise the soft limit to the hard one. Raises ConfigError if so many `connections`, which `option` asks for, do
    not fit beside the open files of `segments`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = (hard - _OTHERS - segments) // _OF_CONNECTION
    if hard != resource.RLIM_INFINITY and connections > most:
        expected = (
            f"at most {max(0, most)}: each takes {_OF_CONNECTION} open files, segments take {segments}, others up to "
            f"{_OTHERS}, and this user may have {hard} (ulimit -Hn, LimitNOFILE)"
        )
        raise ConfigError(option, connections, expected)
