"""The protocol between a client and a target: frames, their contents, and their bounds. No I/O.

A frame is a header of 32 bytes, a control part in msgpack, and a data part of raw bytes; docs/wire.md describes every
byte. Lengths in a header are checked against a bound before memory is allocated for them.
"""

import enum
import struct
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from kvstore.keys import KEY_BYTES
from kvstore.text import shown

VERSION = 1
MAGIC = b"KVTR"
_TLS_HANDSHAKE = b"\x16\x03"  # the first bytes of a TLS client
HEADER = struct.Struct("<4sBBHIIIIQ")
HEADER_BYTES = HEADER.size

# A prompt of a million tokens is 4,000 chunks of 256 tokens, and fits into one frame.
KEYS_MAX = 4096
# A key with its metadata packs into less than 80 bytes.
CONTROL_BYTES_MAX = 512 << 10
# Chunks per page of a LIST: about a millisecond of the target's time, whatever it stores.
LISTED_MAX = 1024
# The largest chunk that a target accepts, even if its segments allow more: a buffer holds it while it is in flight.
VALUE_BYTES_MAX = 64 << 20


class Op(enum.IntEnum):
    """The type of a frame. An even number is the response to the odd number before it."""

    HELLO = 1
    WELCOME = 2
    GET = 3
    VALUE = 4  # one for each key of a GET, in any order; the only answer that carries data
    PUT = 5
    STORED = 6
    EXISTS = 7
    FOUND = 8
    STAT = 9
    STATUS = 10
    TAKEN = 11  # after PLACED: the target may use that memory again; not answered
    ERROR = 12  # the sender closes the connection after it
    CHALLENGE = 16  # instead of WELCOME: the client must first PROVE that it belongs to the namespace
    PROVE = 17  # answered by WELCOME
    LIST = 19
    LISTED = 20
    PREFETCH = 21
    PREFETCHED = 22
    PLACED = 14  # instead of VALUE: the client fetches the data from the target's memory (carrier.py)


class Outcome(enum.IntEnum):
    """The result for one key. A value, never an exception: a failing store costs speed and nothing else."""

    HIT = 0
    MISS = 1
    LATE = 2  # the deadline passed first
    CORRUPT = 3  # the bytes are not those that were stored; they must not be used
    REFUSED = 4  # by the target: full, overloaded, chunk too large, or no permission
    UNREACHABLE = 5
    STORED = 6  # of a put: the chunk is in the store now


class ProtocolError(Exception):
    """The peer sent a frame that this version does not understand or that exceeds a bound."""


class Header(NamedTuple):
    op: Op
    request: int = 0  # chosen by the client, repeated in every answer
    flags: int = 0  # of VALUE: the outcome
    number: int = 0  # of VALUE: which key of the GET
    crc: int = 0  # of VALUE: crc32c of the data
    control_bytes: int = 0
    data_bytes: int = 0


Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys = Annotated[list[Key], msgspec.Meta(max_length=KEYS_MAX)]
ValueBytes = Annotated[int, msgspec.Meta(gt=0, le=VALUE_BYTES_MAX)]
KeyVersion = Annotated[int, msgspec.Meta(ge=1, lt=1 << 8)]
Name = Annotated[str, msgspec.Meta(max_length=256)]  # bounded: kept with the connection, and repeated in errors
U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack has no wider integers


Nonce = Annotated[bytes, msgspec.Meta(max_length=32)]
Proof = Annotated[bytes, msgspec.Meta(max_length=32)]
NONCE_BYTES = 32


class Hello(msgspec.Struct, array_like=True, frozen=True):
    namespace: Name
    client: Name
    boot_id: Name  # of the client's kernel: the same as the target's means the same host
    carrier: Name = ""  # the carrier that the client prefers; "": none
    nonce: Nonce = b""  # 32 random bytes; clients before release 0.2 have none
    pass_id: Nonce = b""  # on a UNIX socket: the ID of the pass that the WELCOME over TCP gave


class Challenge(msgspec.Struct, array_like=True, frozen=True):
    nonce: Nonce


class Prove(msgspec.Struct, array_like=True, frozen=True):
    proof: Proof


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    target: str
    epoch: int
    value_bytes_max: int
    unix_path: str  # "" if the target is not on the client's host
    carrier_greeting: bytes = b""  # if the target supports the carrier: from now on hits are PLACED
    proof: Proof = b""  # after a CHALLENGE: the target knows the credential; on a UNIX socket: it knows the pass
    # The pass, over TCP together with `unix_path`: on the UNIX socket, the target proves with it that it is the same.
    pass_id: Nonce = b""
    pass_key: Proof = b""
    prefetches: bool = False  # whether the target supports PREFETCH; targets before release 0.2 do not


class Get(msgspec.Struct, array_like=True, frozen=True):
    keys: Keys
    sizes: Annotated[list[ValueBytes], msgspec.Meta(max_length=KEYS_MAX)]  # expected; a chunk of another length misses
    deadline_ms: U32  # from the arrival of the frame; the target does not read expired keys


class Placed(msgspec.Struct, array_like=True, frozen=True):
    place: bytes  # the carrier's descriptor of the remote buffer


class Taken(msgspec.Struct, array_like=True, frozen=True):
    number: U16


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """The common first fields of `PutItem` and `Listing`."""

    key: Key
    length: ValueBytes
    crc: U32
    router_hash: U64
    fingerprint: U64
    blocks_per_chunk: U16


# A position that marks a replica: another target has the chunk, so no other chunk of the prompt depends on this copy.
REPLICA = (1 << 32) - 1


class PutItem(Chunk, array_like=True, frozen=True):
    saved_us: U32 = 0  # GPU time that a hit saves; under overload, chunks with the least are dropped first
    key_version: KeyVersion = 1  # of the key derivation (keys.py); clients before release 0.2 do not send it
    # The end of a prompt is dropped first. Clients before release 0.2 send neither of these.
    position: U32 = 0  # of the chunk in its prompt, from 0; or REPLICA
    parent: U64 = 0  # router hash of the chunk before it in its prompt; 0: none, or not known


class Put(msgspec.Struct, array_like=True, frozen=True):
    # The data part holds their payloads, in this order, without gaps.
    items: Annotated[list[PutItem], msgspec.Meta(max_length=KEYS_MAX)]


class Exists(msgspec.Struct, array_like=True, frozen=True):
    keys: Keys


class Prefetch(msgspec.Struct, array_like=True, frozen=True):
    keys: Keys  # in the order of their prompt: the end is dropped first


Cursor = tuple[U16, U64, U32]  # opaque to clients: where the next page begins


class List(msgspec.Struct, array_like=True, frozen=True):
    fingerprint: U64  # 0: chunks of every fingerprint
    cursor: Cursor = (0, 0, 0)


class Listing(Chunk, array_like=True, frozen=True):
    """A stored chunk, with the values of its `PutItem`."""

    key_version: KeyVersion


class Listed(msgspec.Struct, array_like=True, frozen=True):
    chunks: Annotated[list[Listing], msgspec.Meta(max_length=LISTED_MAX)]
    cursor: Cursor | None  # None: there are no more


class Outcomes(msgspec.Struct, array_like=True, frozen=True):
    outcomes: list[Outcome]  # one for each key or item asked for


class Status(msgspec.Struct, frozen=True):
    """A target's status; counts since its start."""

    target: str
    epoch: int
    capacity_bytes: int
    payload_bytes: int
    entries: int
    evicted_entries: int
    evicted_segments: int
    evicted_age_seconds: float  # of the segment evicted last
    corrupt_entries: int
    failed_writes: int
    accepted_bytes: int
    device_written_bytes: int
    rewritten_bytes: int
    connections: int
    sent_bytes: int
    received_bytes: int
    hot_entries: int
    hot_bytes: int
    hot_hits: int
    device_hits: int
    waiting_read_bytes: int
    waiting_write_bytes: int
    operations: dict[str, dict[str, int]]  # operation -> outcome -> keys
    key_versions: dict[int, int] = {}  # version of the key (keys.py) -> chunks; not sent before release 0.2
    dirty_bytes: int = 0  # payload that is readable and not written yet; not sent before release 0.2
    dirty_entries: int = 0
    dirty_bytes_max: int = 0  # 0: write-behind is off
    dropped: dict[str, int] = {}  # chunks by reason (queues.DROP_REASONS)
    read_ahead: dict[str, int] = {}  # chunks of PREFETCH by outcome (ahead.OUTCOMES)
    replicas: dict[str, int] = {}  # chunks offered to other targets by outcome (replicas.OUTCOMES)


class Failure(msgspec.Struct, array_like=True, frozen=True):
    message: str


def transcript(hello: Hello, challenge: Challenge, welcome: Welcome | None = None) -> list[bytes]:
    """The fields that a proof signs. The client signs HELLO and CHALLENGE; the target also signs its `welcome`."""
    role = "client" if welcome is None else "target"
    texts = ("kvtier 1", role, hello.namespace, hello.client, hello.boot_id, hello.carrier)
    fields = [text.encode() for text in texts] + [hello.nonce, challenge.nonce]
    if welcome is not None:
        fields += [welcome.target.encode(), welcome.unix_path.encode(), welcome.carrier_greeting]
        fields += [number.to_bytes(8, "little") for number in (welcome.epoch, welcome.value_bytes_max)]
    return fields


Control = TypeVar("Control", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def encode(header: Header, control: msgspec.Struct | None = None) -> bytes:
    """Header and control part as bytes. The caller sends the data part, of `header.data_bytes`, after them."""
    body = b"" if control is None else _encoder.encode(control)
    op, request, flags, number, crc, _, data_bytes = header
    return HEADER.pack(MAGIC, VERSION, op, flags, request, number, crc, len(body), data_bytes) + body


def decode_header(raw: bytes | bytearray | memoryview) -> Header:
    """Check and unpack a header. Raises ProtocolError."""
    if len(raw) != HEADER_BYTES:
        raise ProtocolError(f"a header of {len(raw)} bytes, expected {HEADER_BYTES}")
    magic, version, op, flags, request, number, crc, control_bytes, data_bytes = HEADER.unpack(raw)
    if magic.startswith(_TLS_HANDSHAKE):
        raise ProtocolError(
            "the client uses TLS, this target does not: give the target --tls-cert and --tls-key, or remove the "
            "client's --store-tls-ca"
        )
    if magic != MAGIC:
        raise ProtocolError(f"not a kvtier frame: it begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(f"protocol version {version}, expected {VERSION}")
    try:
        op = Op(op)
    except ValueError:
        raise ProtocolError(f"unknown operation {op}") from None
    if control_bytes > CONTROL_BYTES_MAX:
        raise ProtocolError(f"control part of {control_bytes} bytes, at most {CONTROL_BYTES_MAX}")
    bound = {Op.PUT: KEYS_MAX * VALUE_BYTES_MAX, Op.VALUE: VALUE_BYTES_MAX}.get(op, 0)
    if data_bytes > bound:
        raise ProtocolError(f"data part of {data_bytes} bytes in {op.name}, at most {bound}")
    return Header(op, request, flags, number, crc, control_bytes, data_bytes)


def decode_control(raw: bytes | bytearray | memoryview, kind: type[Control]) -> Control:
    """Unpack and check a control part. Raises ProtocolError."""
    try:
        control = msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: nested too deep
        raise ProtocolError(f"{kind.__name__}: {shown(error)}") from None
    if isinstance(control, Get) and len(control.keys) != len(control.sizes):
        raise ProtocolError(f"Get: {len(control.keys)} keys with {len(control.sizes)} sizes")
    return control
