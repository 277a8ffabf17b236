"""weights.place_sum in one pass over a GPU's memory, so that it is bound by memory bandwidth."""

import torch
import triton
import triton.language as tl

_BLOCK_WORDS = 1024


def launch(words: torch.Tensor, row_terms: torch.Tensor, word_terms: torch.Tensor, total: torch.Tensor) -> None:
    """Add the mixed words of a matrix (int64, rows contiguous) to `total` (int64, one number). The terms of rows and
    columns give the words' places. All tensors are on one GPU."""
    rows, columns = words.shape
    _add[rows, triton.cdiv(columns, _BLOCK_WORDS)](
        words, words.stride(0), columns, row_terms, word_terms, total, BLOCK=_BLOCK_WORDS
    )


@triton.jit  # type: ignore[untyped-decorator]
def _add(words, stride, columns, row_terms, word_terms, total, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    mixed = tl.load(words + row * stride + column, mask=there, other=0)
    mixed += tl.load(row_terms + row) + tl.load(word_terms + column, mask=there, other=0)
    mixed = mixed.to(tl.uint64, bitcast=True)
    mixed ^= mixed >> 30
    mixed *= 0xBF58476D1CE4E5B9
    mixed ^= mixed >> 27
    mixed *= 0x94D049BB133111EB
    mixed ^= mixed >> 31
    mixed = tl.where(there, mixed.to(tl.int64, bitcast=True), 0)
    tl.atomic_add(total, tl.sum(mixed, axis=0))
