"""The Triton kernel of gptq_update; imported on first use."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["update"]


@triton.jit
def update(
    weight,
    row_stride,
    column_stride,
    hinv,
    scales,
    zeros,
    group_index,
    thresholds,
    ordered,
    book_codes,
    codes,
    codes_stride,
    errors,
    losses,
    R,
    B,
    groups,
    count,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LOSSES: tl.constexpr,
    COUNT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Quantize `count` columns from FIRST of a tile of rows, whose errors before FIRST are known.

    THRESHOLDS of a codebook, else 0. The loop over the columns stays a loop: unrolled it compiles for
    minutes. The interpreter cannot loop up to a run-time number: there COUNT is `count`, elsewhere 0.
    Launched without contraction: one rounding an operation.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR).to(tl.int64)
    at = tl.arange(0, BC)
    row_ok = row < R
    inside = row_ok[:, None] & (at < count)[None, :]
    k = (FIRST + at).to(tl.int64)[None, :]
    w = tl.load(weight + row[:, None] * row_stride + k * column_stride, mask=inside, other=0.0)
    for j in range(0, FIRST):
        error = tl.load(errors + row * B + j, mask=row_ok, other=0.0)
        factor = tl.load(hinv + j * B + FIRST + at, mask=at < count, other=0.0)
        w -= error[:, None] * factor[None, :]
    found = tl.zeros([BR, BC], dtype=tl.int32)
    loss = tl.zeros([BR], dtype=tl.float32)
    if LOSSES and FIRST > 0:
        loss = tl.load(losses + row, mask=row_ok, other=0.0)
    for j in range(0, COUNT if COUNT else count):
        # One column by the bits: a sum of floats would lose the sign of a zero.
        here = at == j
        bits = tl.where(here[None, :], w.to(tl.int32, bitcast=True), 0)
        column = tl.sum(bits, 1).to(tl.float32, bitcast=True)
        at_scale = row * groups + tl.load(group_index + FIRST + j)
        scale = tl.load(scales + at_scale, mask=row_ok, other=1.0)
        ratio = tl.div_rn(column, scale)
        if THRESHOLDS:
            # A NaN is above none of them.
            position = tl.zeros([BR], dtype=tl.int32)
            for t in tl.static_range(THRESHOLDS):
                position += tl.where(ratio > tl.load(thresholds + t), 1, 0)
            code = tl.load(book_codes + position).to(tl.int32)
            level = tl.load(ordered + position)
        else:
            zero = tl.load(zeros + at_scale, mask=row_ok, other=0).to(tl.float32)
            # Beyond these every code is an end of the grid; within them adding 1.5 * 2**23 rounds to even.
            rounded = (tl.minimum(tl.maximum(ratio, -1024.0), 1024.0) + 12582912.0) - 12582912.0
            q = tl.minimum(tl.maximum(rounded + zero, 0.0), (1 << BITS) - 1.0)
            q = tl.where(ratio == ratio, q, 0.0)
            code = q.to(tl.int32)
            level = q - zero
        line = hinv + (FIRST + j) * B + FIRST
        error = tl.div_rn(column - level * scale, tl.load(line + j))
        if LOSSES:
            loss += error * error
        factor = tl.load(line + at, mask=at < count, other=0.0)
        # Columns that are done hold their errors.
        spread = tl.where((at > j)[None, :], w - error[:, None] * factor[None, :], w)
        w = tl.where(here[None, :], error[:, None], spread)
        found = tl.where(here[None, :], code[:, None], found)
    tl.store(errors + row[:, None] * B + k, w, mask=inside)
    tl.store(codes + row[:, None] * codes_stride + k, found.to(tl.uint8), mask=inside)
    if LOSSES:
        tl.store(losses + row, loss, mask=row_ok)
