"""A connection to NATS, which carries the messages of messages.py.

Import it only where there is a bus: nats-py brings aiohttp, and takes as long to import as the rest of a target.
"""

import asyncio
import contextlib
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_MSGS_LIMIT, Subscription
from nats.errors import Error as NatsError
from nats.errors import SecureConnRequiredError

from kvstore.bus.broker import connect_options
from kvstore.errors import UnavailableError
from kvstore.text import masked, shown

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
_ANSWERS_MAX = 8  # kept of a conversation; one is expected at a time
_RECONNECT: dict[str, Any] = {
    "reconnect_time_wait": 0.5,
    "max_reconnect_attempts": -1,
    "pending_size": 1 << 20,  # held while disconnected; more is dropped, which a mirror notices as a gap
}

Message = TypeVar("Message", bound=msgspec.Struct)


class SecureClient(Client):
    """nats-py sends its secrets to a server that does not offer TLS, also where `tls://` was asked for. This one
    does not."""

    secure = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self.secure and initial_connection and not info.get("tls_required"):
            raise SecureConnRequiredError
        await super()._process_info(info, initial_connection)


class Bus:
    """A NATS connection that stays: it reconnects by itself, and drops messages rather than keep them meanwhile.

    For one event loop. Messages that do not decode are dropped: the bus is shared, and may carry other versions.
    """

    def __init__(self, client: Client):
        self._client = client
        self.undecoded: Counter[str] = Counter()  # messages heard, by what they should have been

    @classmethod
    async def connect(cls, url: str, name: str) -> "Bus":
        """`url`: one or several, with commas between them. Raises UnavailableError if no NATS server answers within a
        few seconds or lets us in, and ConfigError for a URL, a secret or a certificate that can never be right."""
        client, options = SecureClient(), connect_options(url)
        client.secure = "tls" in options
        errors: list[Exception] = []
        greeting = True

        async def log_error(error: Exception) -> None:
            logger.debug("nats: %s", shown(masked(repr(error))))
            if greeting:
                errors.append(error)
                if len(errors) >= len(options["servers"]) and all(map(_is_final, errors)):
                    raise error  # out of `connect`, which would try again

        try:
            await asyncio.wait_for(
                client.connect(**options, **_RECONNECT, name=name, connect_timeout=2, error_cb=log_error),
                CONNECT_SECONDS,
            )
        except (TimeoutError, OSError, NatsError, ValueError) as error:
            await _leave(client)
            # A server may close a connection before it was heard why.
            telling = next(filter(_is_final, errors), errors[-1] if errors else error)
            raise UnavailableError(_unreachable(url, telling)) from None
        greeting = False
        return cls(client)

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    async def publish(self, to: str, message: msgspec.Struct) -> bool:
        """Send and forget; False if it could not even be queued."""
        try:
            await self._client.publish(to, msgspec.msgpack.encode(message))
        except (OSError, NatsError):
            return False
        return True

    async def subscribe(
        self,
        to: str,
        kind: type[Message],
        handler: Callable[[Message], Awaitable[msgspec.Struct | None]],
        *,
        waiting_max: int = DEFAULT_SUB_PENDING_MSGS_LIMIT,
    ) -> Subscription:
        """Call `handler` for every message, one after the other; what it returns is sent back to a requester. Of those
        that come meanwhile `waiting_max` wait, the others are dropped."""

        async def receive(raw: Msg) -> None:
            try:
                message = msgspec.msgpack.decode(raw.data, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                self.undecoded[kind.__name__] += 1
                logger.debug("%s: not a %s: %s", shown(raw.subject), kind.__name__, shown(error))
                return
            answer = await handler(message)
            if answer is not None and raw.reply:
                await self.publish(raw.reply, answer)

        return await self._client.subscribe(to, cb=receive, pending_msgs_limit=waiting_max)

    async def unsubscribe(self, subscription: Subscription) -> None:
        with contextlib.suppress(OSError, NatsError):
            await subscription.unsubscribe()

    @contextlib.asynccontextmanager
    async def conversation(self, to: str) -> AsyncIterator["Conversation"]:
        """Several requests to one peer, in turn. A second answer to one of them is noticed."""
        inbox = self._client.new_inbox()
        answers = await self._client.subscribe(inbox, pending_msgs_limit=_ANSWERS_MAX)
        try:
            yield Conversation(self._client, to, inbox, answers)
        finally:
            await self.unsubscribe(answers)

    @classmethod
    async def check(cls, url: str) -> None:
        """Raises UnavailableError if no NATS server answers, before anything slow is begun."""
        await (await cls.connect(url, "kvtier check")).close()

    async def close(self) -> None:
        await _leave(self._client)


async def _leave(client: Client) -> None:
    try:
        await asyncio.wait_for(client.close(), 2)
    except (TimeoutError, OSError, NatsError):
        logger.debug("nats: closing took too long")


def _is_final(error: Exception) -> bool:
    """Whether the server will say the same again."""
    return isinstance(error, SecureConnRequiredError | ssl.SSLCertVerificationError) or _wants_credentials(error)


def _wants_credentials(error: Exception) -> bool:
    return isinstance(error, NatsError) and "authorization" in str(error).lower()


def _unreachable(url: str, error: Exception) -> str:
    where = f"at {url}" if "," not in url else f"at any of {url}"
    reason = shown(masked(str(error))) or type(error).__name__
    if isinstance(error, SecureConnRequiredError):
        return f"nats: the server {where} has no TLS: give it certificates, or write nats:// for tls://"
    if isinstance(error, ssl.SSLError):
        return (
            f"nats: no TLS with the server {where} ({reason}): NATS_TLS_CA_CERT_PATH names who signed its certificate"
        )
    if _wants_credentials(error):
        return f"nats: the server {where} lets nobody in without other credentials ({reason}): see NATS_AUTH_USERNAME"
    return f"nats: no server answers {where} ({reason}): start one there (nats-server), or name another"


class Conversation:
    """Requests to one peer and their answers, which come to an inbox of their own."""

    def __init__(self, client: Client, to: str, inbox: str, answers: Subscription):
        self._client = client
        self._to = to
        self._inbox = inbox
        self._answers = answers

    async def ask(self, message: msgspec.Struct, answer: type[Message], seconds: float) -> Message | None:
        """The answer, or None if none came in time or it does not decode."""
        try:
            await self._client.publish(self._to, msgspec.msgpack.encode(message), reply=self._inbox)
            raw = await self._answers.next_msg(seconds)
            return msgspec.msgpack.decode(raw.data, type=answer)
        except (TimeoutError, OSError, NatsError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    async def hears_more(self, seconds: float) -> bool:
        """Whether an answer comes that nothing was asked for: then somebody answers in another one's place."""
        try:
            await self._answers.next_msg(seconds)
        except (TimeoutError, OSError, NatsError):
            return False
        return True
