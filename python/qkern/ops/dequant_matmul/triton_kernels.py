"""The Triton kernels of dequant_matmul, on the layout "triton.planar"; imported on first use.

No atomics: what splits of K sum is added by `add_splits` in their order, so every run gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_splits", "decode", "multiply_few", "multiply_many"]


@triton.jit
def _thirds(thirds, rows, row_stride, word, inside):
    """Third bits of the codes of each word, that of plane p in bit p."""
    packed = tl.load(thirds + rows[:, None] * (row_stride // 2) + (word // 2)[None, :], mask=inside, other=0)
    return packed >> (word % 2 * 16)[None, :]


@triton.jit
def _plane(words, thirds, table, zero, p: tl.constexpr, BITS: tl.constexpr, BOOK: tl.constexpr):
    """Plane p of a tile of words, as what a code stands for before scale and offset."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    q = (words >> (p * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        q |= ((thirds >> p) & 1) << 2
    return tl.load(table + q) if BOOK else (q.to(tl.float32) - zero)


@triton.jit
def _column(word, p: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr):
    """Column of the layout that plane p of a word holds."""
    W: tl.constexpr = BLOCK // P
    return word // W * BLOCK + p * W + word % W


@triton.jit
def _scale(scales, shifts, at, inside, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Scale, zero point and offset; the offset is what the middle code stands for, which cancels less."""
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros_like(scale) + (1 << (BITS - 1))
    offset = tl.zeros_like(scale)
    if SHIFT == 1:
        zero = tl.load(shifts + at, mask=inside, other=0).to(tl.float32)
    if SHIFT == 2:
        offset = tl.load(shifts + at, mask=inside, other=0.0).to(tl.float32) + zero * scale
    return scale, zero, offset


@triton.jit(do_not_specialize=["M", "chunks"])
def multiply_few(
    x,
    x_stride,
    columns,
    codes,
    thirds,
    scales,
    shifts,
    table,
    bias,
    out,
    M,
    N,
    K,
    row_stride,
    used_words,
    scale_stride,
    group_words,
    chunks,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BOOK: tl.constexpr,
    MAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """BM rows of x by BN rows of the weight over one split of K, by sums.

    A word's codes share a group, so their products are added before the one multiplication by its scale.
    The interpreter cannot loop up to a run-time number: there CHUNKS is `chunks`, elsewhere 0.
    """
    P: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN).to(tl.int64)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    row_ok = rows < N
    token_ok = tokens < M
    from_x = x + tokens.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([BM, BN, BW], dtype=tl.float32)
    # The last split may run beyond the words, where nothing is loaded.
    for step in range(0, CHUNKS if CHUNKS else chunks):
        start = (split * (CHUNKS if CHUNKS else chunks) + step) * BW
        word = start + tl.arange(0, BW)
        word_ok = word < used_words
        inside = row_ok[:, None] & word_ok[None, :]
        words = tl.load(codes + rows[:, None] * row_stride + word[None, :], mask=inside, other=0)
        high = words
        if BITS == 3:
            high = _thirds(thirds, rows, row_stride, word, inside)
        at = rows[:, None] * scale_stride + (word // group_words)[None, :]
        scale, zero, offset = _scale(scales, shifts, at, inside, BITS, SHIFT)
        part = tl.zeros([BM, BN, BW], dtype=tl.float32)
        sum_x = tl.zeros([BM, BW], dtype=tl.float32)
        # To the layout of `part` once, and not plane by plane.
        words, high, zero = words[None, :, :], high[None, :, :], zero[None, :, :]
        for p in tl.static_range(P):
            column = _column(word, p, BLOCK, P)
            column_ok = word_ok
            if MAPPED:
                column = tl.load(columns + column, mask=word_ok, other=-1)
                column_ok = column >= 0
            ok = token_ok[:, None] & (column_ok & (column < K))[None, :]
            values = tl.load(from_x + column[None, :], mask=ok, other=0.0).to(tl.float32)
            plane = _plane(words, high, table, zero, p, BITS, BOOK)
            part += plane * values[:, None, :]
            if SHIFT == 2:
                sum_x += values
        total += part * scale[None, :, :]
        if SHIFT == 2:
            total += sum_x[:, None, :] * offset[None, :, :]
    y = tl.sum(total, 2)
    if BIAS:
        y += tl.load(bias + rows, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    to = out + (split.to(tl.int64) * M + tokens.to(tl.int64))[:, None] * N + rows[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=token_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["M", "chunks"])
def multiply_many(
    x,
    x_stride,
    codes,
    thirds,
    scales,
    shifts,
    table,
    bias,
    out,
    M,
    N,
    K,
    row_stride,
    used_words,
    scale_stride,
    group_words,
    chunks,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BOOK: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Transposed product W x^T of a tile: the decoded operand is the left one, which may stay in registers.

    ONE_GROUP: the words of a chunk share a group, whose scale multiplies the chunk's sum; else it
    multiplies every weight. WIDEN: operands go to the product as fp32.
    """
    P: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN).to(tl.int64)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    row_ok = rows < N
    token_ok = tokens < M
    from_x = x + tokens.to(tl.int64)[None, :] * x_stride
    total = tl.zeros([BN, BM], dtype=tl.float32)
    # The last split may run beyond the words, where nothing is loaded.
    for step in range(0, CHUNKS if CHUNKS else chunks):
        start = (split * (CHUNKS if CHUNKS else chunks) + step) * BW
        word = start + tl.arange(0, BW)
        word_ok = word < used_words
        inside = row_ok[:, None] & word_ok[None, :]
        words = tl.load(codes + rows[:, None] * row_stride + word[None, :], mask=inside, other=0)
        high = words
        if BITS == 3:
            high = _thirds(thirds, rows, row_stride, word, inside)
        if ONE_GROUP:
            at = (rows * scale_stride + start // group_words)[:, None]
            # A mask of booleans: in the interpreter `start` is a number, and a tensor & True has integers.
            used = row_ok & (tl.zeros_like(rows) + start < used_words)
            scale, zero, offset = _scale(scales, shifts, at, used[:, None], BITS, SHIFT)
        else:
            at = rows[:, None] * scale_stride + (word // group_words)[None, :]
            scale, zero, offset = _scale(scales, shifts, at, inside, BITS, SHIFT)
        part = tl.zeros([BN, BM], dtype=tl.float32)
        sum_x = tl.zeros([BM], dtype=tl.float32)
        for p in tl.static_range(P):
            column = _column(word, p, BLOCK, P)
            ok = (word_ok & (column < K))[:, None] & token_ok[None, :]
            values = tl.load(from_x + column[:, None], mask=ok, other=0.0)
            plane = _plane(words, high, table, zero, p, BITS, BOOK)
            if not ONE_GROUP:
                plane = plane * scale + offset
            if WIDEN:
                values = values.to(tl.float32)
            else:
                plane = plane.to(x.dtype.element_ty)
            part = tl.dot(plane, values, part, input_precision="ieee")
            if ONE_GROUP and SHIFT == 2:
                sum_x += tl.sum(values.to(tl.float32), 0)
        if ONE_GROUP:
            total += part * scale
            if SHIFT == 2:
                total += sum_x[None, :] * offset
        else:
            total += part
    if BIAS:
        total += tl.load(bias + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    to = out + (split.to(tl.int64) * M + tokens.to(tl.int64))[None, :] * N + rows[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


@triton.jit
def add_splits(partials, bias, out, M, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr):
    """Sum of what the splits of K gave a row of the output, in their order."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < N
    total = tl.zeros([BN], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + (split * M + token) * N + n, mask=ok, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def decode(
    codes,
    thirds,
    scales,
    shifts,
    table,
    out,
    first_row,
    count,
    width,
    row_stride,
    used_words,
    scale_stride,
    group_words,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BOOK: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Write `count` rows as floats, columns as the layout has them; the bits of dequantize_groupwise."""
    P: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    local = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN).to(tl.int64)
    rows = first_row + local
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = (local < count)[:, None] & (word < used_words)[None, :]
    words = tl.load(codes + rows[:, None] * row_stride + word[None, :], mask=inside, other=0)
    high = words
    if BITS == 3:
        high = _thirds(thirds, rows, row_stride, word, inside)
    at = rows[:, None] * scale_stride + (word // group_words)[None, :]
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    zero = tl.zeros_like(scale) + (0 if SHIFT == 2 else 1 << (BITS - 1))
    if SHIFT != 0:
        shift = tl.load(shifts + at, mask=inside, other=0).to(tl.float32)
    if SHIFT == 1:
        zero = shift
    for p in tl.static_range(P):
        weight = _plane(words, high, table, zero, p, BITS, BOOK) * scale
        if SHIFT == 2:
            # Launched without contraction: two roundings.
            weight += shift
        column = _column(word, p, BLOCK, P)
        tl.store(out + local[:, None] * width + column[None, :], weight.to(out.dtype.element_ty), mask=inside)
