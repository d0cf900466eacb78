"""The Triton kernels of quantize_groupwise; imported on first use."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["encode", "ranges"]


@triton.jit
def ranges(
    weight,
    row_stride,
    column_stride,
    low_out,
    high_out,
    count,
    K,
    group_length,
    groups,
    steps,
    STEPS: tl.constexpr,
    BG: tl.constexpr,
    BL: tl.constexpr,
):
    """Smallest and largest value of each group, 0 included; NaN where a value is not finite."""
    index = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG).to(tl.int64)
    row = index // groups
    first = (index % groups) * group_length
    last = tl.minimum(first + group_length, K)
    low = tl.zeros([BG], dtype=tl.float32)
    high = tl.zeros([BG], dtype=tl.float32)
    bad = tl.zeros([BG], dtype=tl.int32)
    # The interpreter cannot loop up to a run-time number: there STEPS is it, elsewhere 0.
    for step in range(0, STEPS if STEPS else steps):
        k = first[:, None] + step * BL + tl.arange(0, BL)[None, :]
        inside = (index < count)[:, None] & (k < last[:, None])
        w = tl.load(weight + row[:, None] * row_stride + k * column_stride, mask=inside, other=0.0)
        w = w.to(tl.float32)
        finite = tl.abs(w) < float("inf")
        bad = tl.maximum(bad, tl.max(tl.where(finite, 0, 1), 1))
        w = tl.where(finite, w, 0.0)
        low = tl.minimum(low, tl.min(w, 1))
        high = tl.maximum(high, tl.max(w, 1))
    low = tl.where(bad != 0, float("nan"), low)
    tl.store(low_out + index, low, mask=index < count)
    tl.store(high_out + index, high, mask=index < count)


@triton.jit
def encode(
    weight,
    row_stride,
    column_stride,
    scales,
    zeros,
    thresholds,
    book_codes,
    codes,
    R,
    K,
    words,
    group_length,
    groups,
    rows_per_scale,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    """Codes of a tile as words of the dense stream; MODE 0: symmetric, 1: zero points, 2: codebook."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR).to(tl.int64)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    # BITS words hold 32 codes; the first code that reaches into a word may begin before it.
    block = word // BITS * 32
    bit = word % BITS * 32
    start = bit // BITS
    packed = tl.zeros([BR, BW], dtype=tl.int32)
    for i in tl.static_range(12 if BITS == 3 else 32 // BITS):
        k = block + start + i
        at = (start + i) * BITS - bit
        inside = (row < R)[:, None] & ((k < K) & (word < words))[None, :]
        w = tl.load(
            weight + row[:, None] * row_stride + k.to(tl.int64)[None, :] * column_stride,
            mask=inside,
            other=0.0,
        )
        at_scale = (row // rows_per_scale)[:, None] * groups + (k // group_length)[None, :]
        scale = tl.load(scales + at_scale, mask=inside, other=1.0).to(tl.float32)
        ratio = tl.div_rn(w.to(tl.float32), scale)
        if MODE == 2:
            position = tl.zeros([BR, BW], dtype=tl.int32)
            for t in tl.static_range(THRESHOLDS):
                position += tl.where(ratio > tl.load(thresholds + t), 1, 0)
            q = tl.load(book_codes + position).to(tl.int32)
        else:
            # Beyond these every code is an end of the grid; within them adding 1.5 * 2**23 rounds to even.
            ratio = tl.minimum(tl.maximum(ratio, -1024.0), 1024.0)
            rounded = (ratio + 12582912.0) - 12582912.0
            if MODE == 1:
                zero = tl.load(zeros + at_scale, mask=inside, other=0).to(tl.int32)
            else:
                zero = 1 << (BITS - 1)
            q = tl.minimum(tl.maximum(rounded.to(tl.int32) + zero, 0), (1 << BITS) - 1)
        q = tl.where(inside, q, 0)
        if BITS == 3:
            left = tl.minimum(tl.maximum(at, 0), 31)[None, :]
            right = tl.maximum(-at, 0)[None, :]
            packed |= tl.where((at < 32)[None, :], (q >> right) << left, 0)
        else:
            packed |= q << (i * BITS)
    tl.store(
        codes + row[:, None] * words + word[None, :],
        packed,
        mask=(row < R)[:, None] & (word < words)[None, :],
    )
