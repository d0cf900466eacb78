"""The Triton kernel of int8_matmul, on the layout "triton.planar"; imported on first use."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["multiply"]


@triton.jit
def multiply(
    x,
    x_stride,
    x_scales,
    x_zeros,
    codes,
    scales,
    shifts,
    bias,
    out,
    M,
    N,
    K,
    row_stride,
    used_words,
    scale_stride,
    segment,
    segments,
    chunks,
    SHIFT: tl.constexpr,
    X_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Transposed product W x^T of a tile, in int32 over one segment of K at a time, the segments in fp32.

    Both operands are signed, so codes go in 128 less; zero points are made up for by the sums of x and of
    the codes, modulo 2^32. SHIFT 0: none, 1: zero points, 2: offsets; SUMS: the int32 sums are the output;
    WIDEN: operands go to the product as fp16, whose BW * 2^14 at most fp32 holds exactly.
    The interpreter cannot loop up to a run-time number: there SEGMENTS and CHUNKS are `segments` and
    `chunks`, elsewhere 0. Launched without contraction: one rounding an operation.
    """
    P: tl.constexpr = 4
    W: tl.constexpr = BLOCK // P
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN).to(tl.int64)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    row_ok = rows < N
    token_ok = tokens < M
    from_x = x + tokens.to(tl.int64)[None, :] * x_stride
    x_zero = tl.zeros([BM], dtype=tl.int32)
    if X_ZERO:
        x_zero = tl.load(x_zeros + tokens, mask=token_ok, other=0).to(tl.int32)
    gap = tl.zeros([BN], dtype=tl.int32) + 128
    if SHIFT == 1:
        gap -= tl.load(shifts + rows * scale_stride, mask=row_ok, other=0).to(tl.int32)
    sums = tl.zeros([BN, BM], dtype=tl.int32)
    total = tl.zeros([BN, BM], dtype=tl.float32)
    total_x = tl.zeros([BM], dtype=tl.int64)
    for s in range(0, SEGMENTS if SEGMENTS else segments):
        first = s * segment
        last = tl.minimum(first + segment, K)
        sums = tl.zeros([BN, BM], dtype=tl.int32)
        sum_x = tl.zeros([BM], dtype=tl.int32)
        sum_w = tl.zeros([BN], dtype=tl.int32)
        for step in range(0, CHUNKS if CHUNKS else chunks):
            # A segment may begin and end within a block.
            word = first // BLOCK * W + step * BW + tl.arange(0, BW)
            inside = row_ok[:, None] & (word < used_words)[None, :]
            words = tl.load(codes + rows[:, None] * row_stride + word[None, :], mask=inside, other=0)
            for p in tl.static_range(P):
                column = word // W * BLOCK + p * W + word % W
                ok = (column >= first) & (column < last)
                values = tl.load(from_x + column[:, None], mask=ok[:, None] & token_ok[None, :], other=0)
                # The low byte: what is above it falls off.
                w = ((words >> (8 * p)) - 128).to(tl.int8)
                if WIDEN:
                    sums += tl.dot(w.to(tl.float16), values.to(tl.float16)).to(tl.int32)
                else:
                    sums = tl.dot(w, values, sums, out_dtype=tl.int32)
                if SHIFT != 0:
                    sum_x += tl.sum(values.to(tl.int32), 0)
                if X_ZERO:
                    sum_w += tl.sum(tl.where(ok[None, :], w, 0).to(tl.int32), 1)
        if X_ZERO:
            sums -= sum_w[:, None] * x_zero[None, :]
            sum_x -= x_zero * (last - first)
        if SHIFT != 0:
            sums += gap[:, None] * sum_x[None, :]
            total_x += sum_x.to(tl.int64)
        total += sums.to(tl.float32)
    to = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    stored = row_ok[:, None] & token_ok[None, :]
    if SUMS:
        tl.store(to, sums, mask=stored)
    else:
        scale = tl.load(scales + rows * scale_stride, mask=row_ok, other=0.0).to(tl.float32)
        x_scale = tl.load(x_scales + tokens, mask=token_ok, other=0.0)
        y = total * (scale[:, None] * x_scale[None, :])
        if SHIFT == 2:
            offset = tl.load(shifts + rows * scale_stride, mask=row_ok, other=0.0).to(tl.float32)
            y += offset[:, None] * x_scale[None, :] * total_x.to(tl.float32)[None, :]
        if BIAS:
            y += tl.load(bias + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=stored)
