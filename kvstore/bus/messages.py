"""The bus: the messages between targets, workers and routers over NATS Core, and their connection.

Every message is a hint. A lost message costs speed until the next heartbeat or snapshot. Without NATS the store still
serves, and routers work without its residency.
"""

import asyncio
import contextlib
import logging
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_MSGS_LIMIT, Subscription
from nats.errors import Error as NatsError
from nats.errors import SecureConnRequiredError

from kvstore.bus.broker import client_and_options
from kvstore.errors import ConfigError, UnavailableError
from kvstore.text import masked, shown

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
_ANSWERS_MAX = 8  # kept of a conversation; one is expected at a time
HEARTBEAT_SECONDS = 1.0
WARM_HASHES_MAX = 4096
_RECONNECT: dict[str, Any] = {
    "reconnect_time_wait": 0.5,
    "max_reconnect_attempts": -1,
    "pending_size": 1 << 20,  # held while disconnected; more is dropped, which a mirror notices as a gap
}


RouterHash = Annotated[int, msgspec.Meta(ge=0)]


class Residency(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that became readable on a target or were removed since the previous message. Published on
    `residency.<target>`, at least once per heartbeat. A gap in `seq`, or a new `epoch` (a random number of each start),
    means that messages were missed."""

    target: str
    epoch: int
    seq: int
    fingerprint: int
    blocks_per_chunk: int
    stored: list[int]  # router hashes
    removed: list[int]
    ts_ms: int


class SnapshotRequest(msgspec.Struct, array_like=True, frozen=True):
    """Requests a page from `snapshot.<target>`. Token 0 starts a new snapshot; later pages repeat the returned
    token."""

    token: int
    page: int


class SnapshotPage(msgspec.Struct, array_like=True, frozen=True):
    """A page of the chunks resident at (epoch, seq). `pages` is 0 if the token has expired; with token 0 it means that
    the snapshot is still being made, and the request must be repeated soon."""

    target: str
    epoch: int
    seq: int
    token: int
    pages: int
    fingerprint: int
    hashes: bytes  # little-endian u64


class ReplayRequest(msgspec.Struct, array_like=True, frozen=True):
    """Requests the announcements from number `seq` of `epoch` on, from `replay.<target>`."""

    epoch: int
    seq: int


class Replay(msgspec.Struct, array_like=True, frozen=True):
    """Repeated announcements in order, from the requested one on: as many as fit; none if the target no longer keeps
    that one. `seq` is the number of the latest announcement."""

    seq: int
    messages: list[Residency]


class Warm(msgspec.Struct, array_like=True, frozen=True):
    """Requests a prefetch of an imminent prompt's chunks, in their order, from `warm.<target>`."""

    fingerprint: int
    hashes: Annotated[list[RouterHash], msgspec.Meta(min_length=1, max_length=WARM_HASHES_MAX)]


class Warmed(msgspec.Struct, array_like=True, frozen=True):
    """How many of the requested chunks are in memory already, are being read, stay on disk, and are absent."""

    target: str
    memory: int
    reading: int
    refused: int
    absent: int


class WorkerReport(msgspec.Struct, frozen=True):
    """State and speeds of a worker's tier, published on `speed.worker.<id>` once per heartbeat."""

    worker: str  # Dynamo's instance id, as a decimal number; "" outside Dynamo
    endpoint: str  # namespace.component.endpoint under which Dynamo knows the worker
    fingerprint: int
    block_tokens: int
    blocks_per_chunk: int
    chunk_bytes: int
    ts_ms: int
    # Measured by the worker; 0 before the first measurement. Prefill of m tokens after a context of c tokens takes
    # base + per_token * m + per_token_squared * m * (c + m / 2) seconds.
    prefill_base_seconds: float = 0.0
    prefill_seconds_per_token: float = 0.0
    prefill_seconds_per_token_squared: float = 0.0
    dram_bytes_per_second: float = 0.0  # DRAM -> HBM
    store_bytes_per_second: float = 0.0  # store -> DRAM
    bytes_in_flight: int = 0  # from the store
    queue: int = 0  # requests that wait in the engine
    bytes_per_token: int = 0
    fetched_chunks: dict[str, int] = {}  # requested from the store since the start, by outcome
    prefill_share: float = 0.0  # share of the engine's recent time that was prefill
    adapters: dict[str, int] = {}  # LoRA adapter by name -> fingerprint of the chunks of requests with it
    # Cached blocks and chunks, and their capacity; 0: unknown.
    hbm_blocks: int = 0
    hbm_blocks_max: int = 0
    dram_chunks: int = 0
    dram_chunks_max: int = 0


class Load(msgspec.Struct, array_like=True, frozen=True):
    """A router's load on a worker's data-parallel rank."""

    worker: int
    dp_rank: int
    prefill_tokens: int = 0  # to be computed, for prompts without a token
    memory_tokens: int = 0  # of KV, including expected answers
    decoding: int = 0  # requests
    fetching_bytes: int = 0
    fetching_memory_tokens: int = 0  # of memory_tokens, for prompts that still fetch


class RouterReport(msgspec.Struct, frozen=True):
    """A router's running requests, for other routers of the same workers. Published on `load.<router>`."""

    router: str
    endpoint: str  # of the workers
    loads: list[Load]  # without idle ranks
    targets: dict[str, int]  # bytes in flight by target


class TargetReport(msgspec.Struct, frozen=True):
    """A target's load and capacity, published on `speed.target.<target>` once per heartbeat."""

    target: str
    epoch: int
    sent_bytes_per_second: float  # of payload, since the report before
    received_bytes_per_second: float
    device_bytes_per_second: float  # read throughput of all devices while busy; 0: not busy lately
    waiting_read_bytes: int
    waiting_write_bytes: int
    capacity_bytes: int
    payload_bytes: int
    connections: int
    ts_ms: int
    evicted_age_seconds: float = 0.0  # of the segment evicted last; 0: no eviction yet
    corrupt_chunks: int = 0  # found since the start
    failed_writes: int = 0


def subject(namespace: str, kind: str, name: str = "*") -> str:
    """`kvtier.<namespace>.<kind>.<name>`, the name (an address, say) made into one token."""
    token = name if name == "*" else re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return f"kvtier.{namespace}.{kind}.{token}"


def checked_namespace(namespace: str) -> str:
    """The namespace, if it can stand in a subject. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", namespace):
        raise ConfigError("namespace", namespace, "1 to 64 letters, digits, '-' or '_'")
    return namespace


Message = TypeVar("Message", bound=msgspec.Struct)


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
        client, options = client_and_options(url)
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

    @contextlib.asynccontextmanager
    async def conversation(self, to: str) -> AsyncIterator["Conversation"]:
        """Several requests to one peer, in turn. A second answer to one of them is noticed."""
        inbox = self._client.new_inbox()
        answers = await self._client.subscribe(inbox, pending_msgs_limit=_ANSWERS_MAX)
        try:
            yield Conversation(self._client, to, inbox, answers)
        finally:
            with contextlib.suppress(OSError, NatsError):
                await answers.unsubscribe()

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
