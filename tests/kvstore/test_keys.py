"""Keys and hashes: equal to Dynamo's where they must be, and different wherever the bytes would mean something else."""

from array import array

import xxhash
from dynamo.llm import compute_block_hash_for_seq
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import SequenceHasher, chunk_key, fingerprint, layout_digest, sequence_hashes
from tests.conftest import cases

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=300)
NAMES = st.none() | st.text(min_size=1, max_size=20)


def dynamo_sequence_hashes(tokens: list[int], block: int, lora: str | None, namespace: str | None) -> list[int]:
    """Dynamo's own local hashes, chained as its router chains them."""
    chained: list[int] = []
    for local in compute_block_hash_for_seq(tokens, block, None, lora, None, namespace):
        if chained:
            pair = chained[-1].to_bytes(8, "little") + local.to_bytes(8, "little")
            local = xxhash.xxh3_64_intdigest(pair, 1337)
        chained.append(local)
    return chained


@settings(max_examples=cases(300))
@given(TOKENS, st.sampled_from([1, 4, 16, 128]), NAMES, NAMES)
def test_sequence_hashes_are_dynamos(tokens: list[int], block: int, lora: str | None, namespace: str | None) -> None:
    ours = sequence_hashes(tokens, block, lora_name=lora, cache_namespace=namespace)
    assert ours == dynamo_sequence_hashes(tokens, block, lora, namespace)


@given(TOKENS, st.integers(0, 300), st.integers(0, 20))
def test_hashing_in_pieces_is_hashing_at_once(tokens: list[int], cut: int, blocks: int) -> None:
    hasher, words = SequenceHasher(16), array("I", tokens)
    hasher.extend(words[:cut])
    hasher.extend(words, blocks)
    assert hasher.extend(words) == sequence_hashes(tokens, 16)


def test_a_layout_names_its_fields_and_not_their_order() -> None:
    layout = {"model": "m", "dtype": "bfloat16", "groups": [["full", 16, 4096]]}
    assert layout_digest(layout) == layout_digest(dict(reversed(layout.items())))
    for changed in ({"model": "n"}, {"dtype": "float16"}, {"groups": [["full", 32, 4096]]}, {"extra": None}):
        other = layout_digest({**layout, **changed})
        assert other != layout_digest(layout)
        assert fingerprint(other) != fingerprint(layout_digest(layout))


def test_a_key_differs_by_layout_block_and_group() -> None:
    one, other = layout_digest({"model": "a"}), layout_digest({"model": "b"})
    block, next_block = b"\x01" * 32, b"\x02" * 32
    keys = [chunk_key(one, block), chunk_key(other, block), chunk_key(one, next_block), chunk_key(one, block, 1)]
    assert len(set(keys)) == 4
    assert all(len(key) == 16 for key in keys)
