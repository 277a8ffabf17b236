"""The file format of `kvtier store export`: chunks of one fingerprint, each with its value as a target stored it.
docs/wire.md describes every byte. Knows nothing of targets."""

import struct
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from crc32c import crc32c

from kvstore.errors import ConfigError
from kvstore.keys import KEY_BYTES
from kvstore.net.wire import VALUE_BYTES_MAX, Listing

VERSION = 1
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<8sH6xQ")  # magic, version, fingerprint
_HEADER_MAGIC = b"KVTIEREX"
_CHUNK = struct.Struct(f"<4s{KEY_BYTES}sQIIHBx")  # magic, key, router hash, length, crc, blocks a chunk, key version
_CHUNK_MAGIC = b"KVTC"
_END = struct.Struct("<4sQQ")  # magic, chunks, payload bytes
_END_MAGIC = b"KVTE"
_NOTHING = memoryview(b"")


class Writer:
    """Writes an archive to `file`. Without a final `end`, a reader reports it as cut off."""

    def __init__(self, file: BufferedIOBase, fingerprint: int):
        self._file = file
        self.chunks = 0
        self.payload_bytes = 0
        self._write(_HEADER.pack(_HEADER_MAGIC, VERSION, fingerprint))

    def add(self, chunk: Listing, value: memoryview) -> None:
        self._write(
            _CHUNK.pack(
                _CHUNK_MAGIC,
                chunk.key,
                chunk.router_hash,
                chunk.length,
                chunk.crc,
                chunk.blocks_per_chunk,
                chunk.key_version,
            )
        )
        self._file.write(value)
        self.chunks += 1
        self.payload_bytes += len(value)

    def end(self) -> None:
        self._write(_END.pack(_END_MAGIC, self.chunks, self.payload_bytes))

    def _write(self, fields: bytes) -> None:
        self._file.write(fields + _CRC.pack(crc32c(fields)))


class Reader:
    """Reads an archive and checks every byte of it. `name` is the file's name, for errors. Raises ConfigError with the
    offset of the damage."""

    def __init__(self, file: BufferedIOBase, name: str):
        self._file = file
        self._name = name
        self._offset = 0
        magic, version, self.fingerprint = self._fields(_HEADER)
        if magic != _HEADER_MAGIC:
            raise ConfigError("file", name, "one that `kvtier store export` wrote")
        if version != VERSION:
            raise ConfigError("file", name, f"an export of format {VERSION}, not {version}")

    def chunks(self) -> Iterator[tuple[Listing, memoryview]]:
        """Each chunk and its value, in memory of its own."""
        count = payload_bytes = 0
        while (magic := self._take(len(_CHUNK_MAGIC))) == _CHUNK_MAGIC:
            _, key, router_hash, length, crc, blocks, version = self._fields(_CHUNK, magic)
            if not (0 < length <= VALUE_BYTES_MAX and version):
                raise self._damaged(f"a chunk of {length} bytes, of key version {version}")
            value = self._take(length)
            if crc32c(value) != crc:
                raise self._damaged("a value whose checksum is wrong")
            yield Listing(key, length, crc, router_hash, self.fingerprint, blocks, version), value
            count, payload_bytes = count + 1, payload_bytes + length
        if magic != _END_MAGIC:
            raise self._damaged("neither a chunk nor the end record")
        if self._fields(_END, magic)[1:] != (count, payload_bytes):
            raise self._damaged(f"an end record that does not match the {count} chunks before it")

    def _fields(self, layout: struct.Struct, begun: memoryview = _NOTHING) -> tuple[Any, ...]:
        """Read and unpack fields; `begun` is their start, which was read already."""
        raw = bytes(begun) + bytes(self._take(layout.size + _CRC.size - len(begun)))
        if _CRC.unpack(raw[layout.size :])[0] != crc32c(raw[: layout.size]):
            raise self._damaged("a header whose checksum is wrong")
        return layout.unpack(raw[: layout.size])

    def _take(self, size: int) -> memoryview:
        taken = memoryview(bytearray(size))
        got = self._file.readinto(taken)
        self._offset += got
        if got < size:
            raise self._damaged("the end of a truncated file")
        return taken

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError("file", self._name, f"an undamaged export; before byte {self._offset} there is {what}")
