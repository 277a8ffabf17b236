"""The protocol between the tier in the engine and its mover process, over a pair of packet sockets.

One packet is one msgpack frame, so a frame arrives whole or not at all. Deadlines are time.monotonic() values, which on
Linux are the same clock in every process of a host.
"""

import contextlib
import socket
from collections.abc import Mapping
from typing import Annotated

import msgspec

from kvstore.certificates import Files
from kvstore.errors import ConfigError
from kvstore.net.client import good_connections

# With the kernel's default buffers, a packet socket takes about 200 KiB. Every frame stays well below.
FRAME_BYTES_MAX = 128 << 10
# In a job and in a lookup: at most about 40 KiB of names.
CHUNKS_MAX = 1024
TOKENS_MAX = 16384  # in one frame, 4 bytes each
_SOCKET_BUFFER_BYTES = 1 << 20

Name = tuple[bytes, int]  # a chunk as the engine knows it: block hash, KV-cache group


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tier's entry in vLLM's `secondary_tiers`. Files are named by their paths; tier and mover read them."""

    store: str  # as kvstore.net.membership.open_membership takes it
    namespace: str = "default"
    nats: str = ""  # for the heartbeat to routers; "": none is sent
    endpoint: str = ""  # the worker's Dynamo endpoint
    deadline_ms: Annotated[int, msgspec.Meta(ge=1)] = 2000  # the timeout of a request's fetches
    lookup_ms: Annotated[int, msgspec.Meta(ge=0)] = 200  # the timeout of a lookup in the store
    # Fetches in flight, and connections to each target.
    fetch_threads: Annotated[int, msgspec.Meta(ge=1)] = good_connections()
    carrier: str = ""
    credential_file: str = ""
    seal_key: str = ""
    seal: str = ""  # as kvstore.seal.open_seal takes it
    store_tls_ca: str = ""
    store_tls_cert: str = ""
    store_tls_key: str = ""

    @property
    def tls(self) -> Files:
        return Files(self.store_tls_cert, self.store_tls_key, self.store_tls_ca)


def settings_of(entry: Mapping[str, object]) -> Settings:
    """The entry, checked here: a wrong type would end each mover at its start. Raises ConfigError."""
    fields = Settings.__struct_fields__
    if unknown := next((name for name in entry if name not in fields), None):
        raise ConfigError.unknown(f"secondary_tiers.{unknown}", fields)
    if not entry.get("store"):
        raise ConfigError.missing("secondary_tiers.store", "host:port, or etcd://host:port")
    try:
        return msgspec.convert(entry, Settings)
    except msgspec.ValidationError as error:
        problem, _, field = str(error).rstrip("`").partition(" - at `$.")
        expected = problem.removeprefix("Expected ").partition(", got ")[0]
        raise ConfigError(f"secondary_tiers.{field}", entry.get(field), expected) from None


class Setup(msgspec.Struct, frozen=True):
    """A mover's settings; JSON on its command line."""

    settings: Settings
    region_fd: int
    region_bytes: int
    row_bytes: int
    block_tokens: int
    blocks_per_chunk: int
    worker: str = ""  # Dynamo's instance id; "" outside Dynamo


class Load(msgspec.Struct, tag="load", array_like=True, frozen=True):
    """Fill rows from the store. Answered by one Loaded, after which the mover does not write to the rows any more."""

    job: int
    request: int
    identity: bytes  # what the KV is computed with, 32 bytes
    names: list[Name]
    rows: list[int]
    targets: list[str | None]
    deadline: float
    due: float  # the smaller comes first


class Put(msgspec.Struct, tag="put", array_like=True, frozen=True):
    """Write rows to the store, unless it holds them. Answered by one Stored, after which the mover does not read the
    rows any more."""

    job: int
    request: int
    identity: bytes  # what the KV is computed with, 32 bytes
    names: list[Name]
    rows: list[int]
    chunks: list[int]  # each one's number in its request; -1: not known
    saved_seconds: float


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """Which leading chunks are there? Answered by one Found."""

    request: int
    identity: bytes  # what the KV is computed with, 32 bytes
    names: list[Name]
    deadline: float


class Tokens(msgspec.Struct, tag="tokens", array_like=True, frozen=True):
    """More of a request's tokens, u32 little-endian, from number `first` on: router hashes are made of them."""

    request: int
    first: int
    tokens: bytes
    lora: str | None
    salt: str | None


class Hurry(msgspec.Struct, tag="hurry", array_like=True, frozen=True):
    """Prioritize the request: the engine could begin with it now, so its loads go before those of queued requests."""

    request: int


class Forget(msgspec.Struct, tag="forget", array_like=True, frozen=True):
    """The request is finished."""

    request: int


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Cancel the rest of a load."""

    job: int


class Pace(msgspec.Struct, tag="pace", array_like=True, frozen=True):
    """Engine statistics for the heartbeat: fields of a WorkerReport."""

    prefill_base_seconds: float
    prefill_seconds_per_token: float
    prefill_seconds_per_token_squared: float
    prefill_share: float
    dram_bytes_per_second: float
    bytes_per_token: int
    bytes_in_flight: int
    queue: int
    hbm_blocks: int = 0
    hbm_blocks_max: int = 0
    dram_chunks: int = 0
    dram_chunks_max: int = 0


class Identified(msgspec.Struct, tag="identified", array_like=True, frozen=True):
    """The engine's identity for the heartbeat, as fields of a WorkerReport: its fingerprint, and that of each adapter
    by name."""

    fingerprint: int
    adapters: dict[str, int]


Command = Load | Put | Ask | Tokens | Hurry | Forget | Cancel | Pace | Identified


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The mover takes commands from here on."""


class Loaded(msgspec.Struct, tag="loaded", array_like=True, frozen=True):
    job: int
    outcomes: bytes  # one Outcome a chunk
    store_bytes_per_second: float  # 0: not measured yet
    rejected: dict[str, int] = {}  # values whose seal did not hold, by reason, since the last Loaded


class Stored(msgspec.Struct, tag="stored", array_like=True, frozen=True):
    job: int
    outcomes: list[str]


class Found(msgspec.Struct, tag="found", array_like=True, frozen=True):
    request: int
    targets: list[str | None]  # by chunk, None where it is not in the store: DRAM may have it


Report = Ready | Loaded | Stored | Found

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected packet sockets; the first is non-blocking, for the engine."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    ours.setblocking(False)
    return ours, theirs
