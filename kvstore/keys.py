"""Names of a chunk: the 128-bit key that the store files it under, and the 64-bit hash that a router asks for.

The key is made from the *layout digest* (everything that decides what the bytes mean) and the engine's own block
hash, which already carries the parent chain, the LoRA adapter and the cache salt. Two workers share a chunk exactly
if both agree.

The router hash is the sequence hash that Dynamo's router computes from token ids alone. It is stored beside the key
so that a target can announce what it holds without asking a worker.
"""

import hashlib
import json
import struct
from array import array
from collections.abc import Mapping

import numpy as np
import xxhash

KEY_BYTES = 16
# Version of the key derivation; stored with each value. 1, before release 0.2: the model's identity is sampled from its
# weight files. 2: it is computed from the content that engines have loaded.
KEY_VERSION = 2
_U64 = (1 << 64) - 1
# Dynamo's constant (lib/tokens, XXH3_SEED); LoRA name and cache namespace are folded into it, not into the tokens.
_DYNAMO_SEED = 1337
_PAIR = struct.Struct("<QQ")  # of u64: the hash before, and a block's own


def layout_digest(layout: Mapping[str, object]) -> bytes:
    """Digest (32 bytes) of the fields that decide what a chunk's bytes mean; any JSON-able mapping, order-free."""
    canonical = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=32, person=b"kvtier-layout").digest()


def adapter_digest(digest: bytes, adapter: str) -> bytes:
    """The layout digest of requests with an adapter, which is named by its content."""
    return hashlib.blake2b(adapter.encode(), digest_size=32, key=digest, person=b"kvtier-adapter").digest()


def fingerprint(digest: bytes) -> int:
    """The layout's short name on the bus and on disk: the first 64 bits of its digest, never zero."""
    return int.from_bytes(digest[:8], "little") or 1


def chunk_key(digest: bytes, block_hash: bytes, group: int = 0) -> bytes:
    """The store key (16 bytes) of the chunk whose last block has `block_hash`, in KV-cache group `group`."""
    hasher = hashlib.blake2b(block_hash, digest_size=KEY_BYTES, key=digest, person=b"kvtier-key")
    hasher.update(group.to_bytes(4, "little"))
    return hasher.digest()


class SequenceHasher:
    """Dynamo's sequence hashes of a growing token sequence, one per full block.

    `local[i] = xxh3_64(u32-LE tokens of block i, seed)`, `seq[0] = local[0]`,
    `seq[i] = xxh3_64(LE u64 seq[i-1] || LE u64 local[i], 1337)`; a LoRA name and a cache namespace are added to the
    seed of the local hashes. Equal to `dynamo.llm.compute_block_hash_for_seq` plus its chaining
    (tests/kvstore/test_keys.py).
    """

    def __init__(self, block_tokens: int, *, lora_name: str | None = None, cache_namespace: str | None = None):
        self._block_tokens = block_tokens
        seed = _DYNAMO_SEED
        if lora_name:
            seed += xxhash.xxh3_64_intdigest(lora_name.encode(), 0)
        if cache_namespace:
            seed += xxhash.xxh3_64_intdigest(cache_namespace.encode(), 1)
        self._seed = seed & _U64
        self.hashes: list[int] = []

    def extend(self, tokens: "array[int]", blocks: int | None = None) -> list[int]:
        """Hash the full blocks of `tokens` (the whole sequence so far, as u32) that are new, up to `blocks` in all."""
        last = len(tokens) // self._block_tokens
        if blocks is not None:
            last = min(last, blocks)
        first = len(self.hashes)
        if last <= first:
            return self.hashes
        # Every prompt passes here: beyond one call for all blocks, two for each hash.
        words = tokens[first * self._block_tokens : last * self._block_tokens]
        contents = np.frombuffer(words, f"V{words.itemsize * self._block_tokens}").tolist()
        hashed, seed = xxhash.xxh3_64_intdigest, self._seed
        locals_ = [hashed(content, seed) for content in contents]
        if not self.hashes:
            self.hashes.append(locals_.pop(0))
        pair, previous = _PAIR.pack, self.hashes[-1]
        self.hashes += [previous := hashed(pair(previous, local), _DYNAMO_SEED) for local in locals_]
        return self.hashes


def sequence_hashes(
    tokens: list[int], block_tokens: int, *, lora_name: str | None = None, cache_namespace: str | None = None
) -> list[int]:
    """Dynamo's sequence hash of every full block of `tokens`; a partial tail is dropped."""
    words = array("I")
    words.fromlist(tokens)  # four times as fast as array("I", tokens)
    return SequenceHasher(block_tokens, lora_name=lora_name, cache_namespace=cache_namespace).extend(words)
