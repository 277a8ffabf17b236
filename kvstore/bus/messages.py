"""The bus: the messages between targets, workers and routers over NATS Core (connection.py).

Every message is a hint. A lost message costs speed until the next heartbeat or snapshot. Without NATS the store still
serves, and routers work without its residency.
"""

import re
from typing import Annotated

import msgspec

from kvstore.errors import ConfigError

HEARTBEAT_SECONDS = 1.0
WARM_HASHES_MAX = 4096


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
    waiting: int = 0  # requests without a token; routers before release 0.2 do not say
    fetching: int = 0  # of these, those that still fetch


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
    memory_share: float = 0.0  # of the chunks that were read of late: found in the target's memory, not on its devices


def subject(namespace: str, kind: str, name: str = "*") -> str:
    """`kvtier.<namespace>.<kind>.<name>`, the name (an address, say) made into one token."""
    token = name if name == "*" else re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return f"kvtier.{namespace}.{kind}.{token}"


def checked_namespace(namespace: str, field: str = "namespace") -> str:
    """The namespace, if it can stand in a subject. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", namespace):
        raise ConfigError(field, namespace, "1 to 64 letters, digits, '-' or '_'")
    return namespace
