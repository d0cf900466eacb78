"""The Triton kernel of dequantize_groupwise; imported on first use."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dequantize"]


@triton.jit
def dequantize(
    codes,
    scales,
    shifts,
    table,
    group_index,
    out,
    R,
    K,
    words,
    group_length,
    groups,
    rows_per_scale,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BOOK: tl.constexpr,
    INDEXED: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Decode a tile of rows and columns; SHIFT 0: symmetric, 1: zero points, 2: offsets."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (row < R)[:, None] & (k < K)[None, :]
    # 32 columns are BITS words, so nothing here outgrows 32 bits.
    bit = (k % 32) * BITS
    word = k // 32 * BITS + bit // 32
    at = bit % 32
    line = codes + row[:, None] * words
    low = tl.load(line + word[None, :], mask=inside, other=0)
    q = (low >> at[None, :]) & ((1 << BITS) - 1)
    if BITS == 3:
        # Two codes of 32 straddle words; the arithmetic shift's sign bits are masked.
        rest = (32 - at)[None, :]
        straddles = rest < 3
        high = tl.load(line + (word + 1)[None, :], mask=inside & straddles, other=0)
        kept = tl.where(straddles, rest, 0)
        q = tl.where(straddles, (q & ((1 << kept) - 1)) | ((high << kept) & 7), q)
    group = k // group_length
    if INDEXED:
        group = tl.load(group_index + k, mask=k < K, other=0)
    at_scale = (row // rows_per_scale)[:, None] * groups + group[None, :]
    scale = tl.load(scales + at_scale, mask=inside, other=0.0).to(tl.float32)
    if BOOK:
        w = tl.load(table + q) * scale
    elif SHIFT == 2:
        # Launched without contraction: two roundings.
        w = q.to(tl.float32) * scale + tl.load(shifts + at_scale, mask=inside, other=0.0).to(tl.float32)
    elif SHIFT == 1:
        w = (q.to(tl.float32) - tl.load(shifts + at_scale, mask=inside, other=0).to(tl.float32)) * scale
    else:
        w = (q - (1 << (BITS - 1))).to(tl.float32) * scale
    tl.store(out + row[:, None] * K + k[None, :], w.to(out.dtype.element_ty), mask=inside)
