"""Fits the connection limits to the limit of open files: segments, two descriptors per connection, and the rest."""

import logging
import resource

from kvstore.errors import ConfigError
from kvstore.net.lobby import GREETINGS_MAX
from kvstore.net.tls import HANDSHAKES_MAX
from kvstore.scrape import CONNECTIONS_MAX

logger = logging.getLogger(__name__)

_OF_CONNECTION = 2  # one for the receiving thread, one for the sending thread
_OTHERS = GREETINGS_MAX + HANDSHAKES_MAX + CONNECTIONS_MAX + 64  # the last: libraries, listeners, NATS, etcd


def fit(option: str, asked: int, unasked: int, default: int, segments: int) -> int:
    """Raise the soft limit to the hard one, and return a connection limit for each of the `unasked` tenants, which set
    none. It is `default`, or lower if the `asked` connections and the open files of `segments` leave less. Raises
    ConfigError, which names `option`, if the `asked` do not fit, or none is left for the others."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return default
    most = (hard - _OTHERS - segments) // _OF_CONNECTION
    reason = (
        f"each takes {_OF_CONNECTION} open files, segments take {segments}, others up to {_OTHERS}, and this user may "
        f"have {hard} (ulimit -Hn, LimitNOFILE)"
    )
    if asked + unasked > most:
        raise ConfigError(option, asked + unasked, f"at most {max(0, most)}: {reason}")
    left = (most - asked) // unasked if unasked else default
    if left < default:
        logger.warning("%s: %d instead of %d: %s", option, left, default, reason)
    return min(left, default)
