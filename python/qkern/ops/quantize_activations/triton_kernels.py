"""The Triton kernel of quantize_activations; imported on first use."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quantize"]


@triton.jit
def quantize(
    x,
    row_stride,
    column_stride,
    given,
    codes,
    scales,
    count,
    K,
    group_length,
    groups,
    steps,
    low,
    high,
    zero,
    GIVEN: tl.constexpr,
    STEPS: tl.constexpr,
    BG: tl.constexpr,
    BL: tl.constexpr,
):
    """Scale and codes of BG groups, each read twice; GIVEN: the scale is `given`, one for all."""
    index = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG).to(tl.int64)
    row = index // groups
    first = (index % groups) * group_length
    last = tl.minimum(first + group_length, K)
    from_x = x + row[:, None] * row_stride
    # The bits of a magnitude order NaN above Inf above the rest; a maximum of floats would lose NaN.
    largest = tl.zeros([BG], dtype=tl.int32)
    # The interpreter cannot loop up to a run-time number: there STEPS is it, elsewhere 0.
    for step in range(0, STEPS if STEPS else steps):
        k = first[:, None] + step * BL + tl.arange(0, BL)[None, :]
        inside = (index < count)[:, None] & (k < last[:, None])
        values = tl.load(from_x + k * column_stride, mask=inside, other=0.0).to(tl.float32)
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, 1))
    magnitude = largest.to(tl.float32, bitcast=True)
    finite = magnitude < float("inf")
    if GIVEN:
        divisor = tl.zeros([BG], dtype=tl.float32) + tl.load(given)
        scale = tl.where(finite, divisor, float("nan"))
    else:
        scale = tl.div_rn(magnitude, tl.zeros([BG], dtype=tl.float32) + 127.0)
        usable = finite & (scale > 0.0)
        divisor = tl.where(usable, scale, 1.0)
    tl.store(scales + index, scale, mask=index < count)
    for step in range(0, STEPS if STEPS else steps):
        k = first[:, None] + step * BL + tl.arange(0, BL)[None, :]
        inside = (index < count)[:, None] & (k < last[:, None])
        values = tl.load(from_x + k * column_stride, mask=inside, other=0.0).to(tl.float32)
        if not GIVEN:
            # Without a scale only the signs of Inf make codes.
            values = tl.where(usable[:, None] | (tl.abs(values) == float("inf")), values, 0.0)
        ratio = tl.div_rn(values, tl.zeros([BG, BL], dtype=tl.float32) + divisor[:, None])
        rounded = (tl.minimum(tl.maximum(ratio, low), high) + 12582912.0) - 12582912.0
        # A NaN has the code 0.
        code = tl.where(ratio == ratio, rounded + zero, 0.0).to(tl.int32)
        tl.store(codes + row[:, None] * K + k, code.to(tl.int8), mask=inside)
