"""The bus: what targets, workers and routers tell each other over NATS Core (connection.py).

Everything here is a hint. A message lost costs speed until the next heartbeat or snapshot; without NATS the store goes
on serving and routers fall back to what they know by themselves.
"""

import re
from typing import Annotated

import msgspec

from kvstore.errors import ConfigError

HEARTBEAT_SECONDS = 1.0
WARM_HASHES_MAX = 4096


RouterHash = Annotated[int, msgspec.Meta(ge=0)]


class Residency(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that became visible on a target or went, since the message before. Published on `residency.<target>`,
    at least once a heartbeat; a gap in `seq` or a new `epoch`, a random number of each start, means that something was
    missed."""

    target: str
    epoch: int
    seq: int
    fingerprint: int
    blocks_per_chunk: int
    stored: list[int]  # router hashes
    removed: list[int]
    ts_ms: int


class SnapshotRequest(msgspec.Struct, array_like=True, frozen=True):
    """Asks `snapshot.<target>` for a page; token 0 begins a new snapshot, later pages repeat the token given."""

    token: int
    page: int


class SnapshotPage(msgspec.Struct, array_like=True, frozen=True):
    """A part of everything that was resident at (epoch, seq). `pages` is 0 if the token is no longer known, and with
    token 0 if the snapshot is being made: ask again soon."""

    target: str
    epoch: int
    seq: int
    token: int
    pages: int
    fingerprint: int
    hashes: bytes  # little-endian u64


class ReplayRequest(msgspec.Struct, array_like=True, frozen=True):
    """Asks `replay.<target>` for the announcements from number `seq` of `epoch` on."""

    epoch: int
    seq: int


class Replay(msgspec.Struct, array_like=True, frozen=True):
    """Announcements once more, in order, from the one asked for on: as many as fit, none if it is not kept any more.
    `seq` is the number of the last one there is."""

    seq: int
    messages: list[Residency]


class Warm(msgspec.Struct, array_like=True, frozen=True):
    """Asks `warm.<target>` to read a prompt's chunks, in their order, into memory: the prompt is about to come."""

    fingerprint: int
    hashes: Annotated[list[RouterHash], msgspec.Meta(min_length=1, max_length=WARM_HASHES_MAX)]


class Warmed(msgspec.Struct, array_like=True, frozen=True):
    """Of the chunks asked for, how many are in memory already, are being read, stay on disk, and are not there."""

    target: str
    memory: int
    reading: int
    refused: int
    absent: int


class WorkerReport(msgspec.Struct, frozen=True):
    """What a router must know of a worker's tier, published on `speed.worker.<id>` once a heartbeat."""

    worker: str  # Dynamo's instance id, as a decimal number; "" outside Dynamo
    endpoint: str  # namespace.component.endpoint under which Dynamo knows the worker
    fingerprint: int
    block_tokens: int
    blocks_per_chunk: int
    chunk_bytes: int
    ts_ms: int
    # Measured here; 0 where nothing was yet. Computing m tokens that follow c takes
    # base + per_token * m + per_token_squared * m * (c + m / 2) seconds.
    prefill_base_seconds: float = 0.0
    prefill_seconds_per_token: float = 0.0
    prefill_seconds_per_token_squared: float = 0.0
    dram_bytes_per_second: float = 0.0  # DRAM -> HBM
    store_bytes_per_second: float = 0.0  # store -> DRAM
    bytes_in_flight: int = 0  # from the store
    queue: int = 0  # requests that the engine has not begun with
    bytes_per_token: int = 0
    fetched_chunks: dict[str, int] = {}  # asked of the store since the start, by outcome
    prefill_share: float = 0.0  # of the engine's time of late, in which it computed prompts
    adapters: dict[str, int] = {}  # LoRA adapter by name -> fingerprint of the chunks of requests with it
    # What a prompt can hit there, and the room for it; 0 where that is not known.
    hbm_blocks: int = 0
    hbm_blocks_max: int = 0
    dram_chunks: int = 0
    dram_chunks_max: int = 0


class Load(msgspec.Struct, array_like=True, frozen=True):
    """What a router has under way on a worker's data-parallel rank."""

    worker: int
    dp_rank: int
    prefill_tokens: int = 0  # to be computed, for prompts without a token
    memory_tokens: int = 0  # of KV, expected answers with them
    decoding: int = 0  # requests
    fetching_bytes: int = 0
    fetching_memory_tokens: int = 0  # of memory_tokens, for prompts that still fetch


class RouterReport(msgspec.Struct, frozen=True):
    """What a router has sent and has not ended, for other routers of the same workers. Published on `load.<router>`."""

    router: str
    endpoint: str  # of the workers
    loads: list[Load]  # but for ranks that have nothing
    targets: dict[str, int]  # bytes that are being fetched from each


class TargetReport(msgspec.Struct, frozen=True):
    """How busy a target is, published on `speed.target.<target>` once a heartbeat."""

    target: str
    epoch: int
    sent_bytes_per_second: float  # of payload, since the report before
    received_bytes_per_second: float
    device_bytes_per_second: float  # what its devices read together when kept busy; 0: not lately
    waiting_read_bytes: int
    waiting_write_bytes: int
    capacity_bytes: int
    payload_bytes: int
    connections: int
    ts_ms: int
    evicted_age_seconds: float = 0.0  # of the segment evicted last; 0: none was
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
