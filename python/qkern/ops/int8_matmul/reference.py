"""int8_matmul in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops._scratch import LIMIT, pieces
from qkern.ops.dequant_matmul import plain
from qkern.ops.pack_bits.reference import unpack_dense

if TYPE_CHECKING:
    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

__all__ = [
    "check_groups",
    "exact_columns",
    "matmul",
    "pack",
    "segment_columns",
    "why_not",
    "why_not_scheme",
]

# Columns whose sum fp32 holds exactly: 256 * 255 * 255 < 2^24.
_STEP: Final = 256
# Bytes of a weight (codes, as fp32, and those before) and of an output (sums, products, scales) of a chunk.
_WEIGHT_BYTES: Final = 12
_OUT_BYTES: Final = 24
# Tokens as fp32, and the rows of the weight that pass by, have half each.
_HALF: Final = LIMIT // 2


def why_not_scheme(scheme: Scheme) -> str | None:
    """Why a weight of this scheme has no single sum a channel; None if it has."""
    if scheme.bits != 8:
        return f"it takes 8-bit weights, not {scheme}"
    if scheme.group_size is not None:
        return f"it takes one scale a channel or tensor, not the groups of {scheme}"
    return None


def why_not(request: Request) -> str | None:
    """Why the reference cannot serve `request`."""
    return None if request.scheme is None else why_not_scheme(request.scheme)


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Pack a weight as dequant_matmul's reference reads it."""
    return plain.pack(qw)


def exact_columns(*, weight_zeros: bool, x_zeros: bool) -> int:
    """Columns whose int32 sum cannot overflow: each factor is at most 128, or 255 with its zero points."""
    return (2**31 - 1) // ((255 if weight_zeros else 128) * (255 if x_zeros else 128))


def check_groups(groups: int) -> None:
    """Refuse a weight that has more than one scale a channel, whatever its scheme says."""
    if groups != 1:
        raise InputError(f"int8_matmul takes one scale a channel: got {groups} groups; use dequant_matmul")


def segment_columns(K: int, *, weight_zeros: bool, x_zeros: bool, offsets: bool, sums_only: bool) -> int:
    """Columns whose sums are added in int32 before fp32 takes over; a multiple of 128, or all.

    No sum may leave int32 within them: some tensor cores would saturate it.

    Raises
    ------
    InputError
        If the int32 sums themselves are wanted and there are none.
    """
    exact = exact_columns(weight_zeros=weight_zeros, x_zeros=x_zeros)
    if sums_only and offsets:
        raise InputError("a weight with float offsets has no int32 sums: ask for a float out_dtype")
    if sums_only and exact < K:
        raise InputError(f"int32 sums over K={K} columns could overflow: ask for a float out_dtype")
    return max(K, 1) if exact >= K else exact // 128 * 128


def matmul(
    x: Tensor,
    scales: Tensor | None,
    qw: QuantizedWeight,
    bias: Tensor | None,
    zeros: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes ``[M, K]`` by the weight; scales and zeros are ``[M, 1]``, all else is validated."""
    (M, K), N = x.shape, qw.N
    check_groups(qw.scales.shape[1])
    segment = segment_columns(
        K,
        weight_zeros=qw.scheme.zero_point,
        x_zeros=zeros is not None,
        offsets=qw.offsets is not None,
        sums_only=out_dtype == torch.int32,
    )
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    for tokens in pieces(M, 4 * max(K, _OUT_BYTES), _HALF):
        own = [None if value is None else value[tokens] for value in (scales, zeros)]
        _product(x[tokens], own[0], qw, bias, own[1], segment, out[tokens])
    return out


def _product(
    x: Tensor,
    scales: Tensor | None,
    qw: QuantizedWeight,
    bias: Tensor | None,
    zeros: Tensor | None,
    segment: int,
    out: Tensor,
) -> None:
    K = qw.K
    values = x.float() if zeros is None else x.float().sub_(zeros)
    token_sums = None if qw.offsets is None else _token_sums(values)

    def of_rows(values: Tensor, rows: slice) -> Tensor:
        return values if qw.scheme.per_tensor else values[rows]

    for rows in pieces(qw.N, _WEIGHT_BYTES * K + _OUT_BYTES * len(x), _HALF):
        codes = unpack_dense(qw.codes[rows], 8, K).float()
        if qw.zeros is not None:
            codes -= of_rows(qw.zeros, rows)
        elif qw.offsets is None:
            codes -= 128
        sums = _sums(values, codes, 0, min(segment, K))
        if scales is None:
            out[:, rows] = sums
            continue
        total = sums.float()
        for k in range(segment, K, segment):
            total += _sums(values, codes, k, min(k + segment, K)).float()
        total *= of_rows(qw.scales, rows).float().T * scales
        if qw.offsets is not None and token_sums is not None:
            total += of_rows(qw.offsets, rows).float().T * scales * token_sums
        if bias is not None:
            total += bias[rows]
        out[:, rows] = total


def _token_sums(values: Tensor) -> Tensor:
    """Sum of each token's codes, exact before it is rounded to fp32."""
    # Asked for an integer sum, torch would first cast all of them.
    total = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    for columns in torch.split(values, _STEP, dim=1):
        total += columns.sum(-1, keepdim=True).long()
    return total.float()


def _sums(values: Tensor, codes: Tensor, first: int, last: int) -> Tensor:
    """``values @ codes.T`` over columns first..last: integers, exact in int32."""
    sums = torch.zeros(values.shape[0], codes.shape[0], dtype=torch.int32, device=values.device)
    for k in range(first, last, _STEP):
        columns = slice(k, min(k + _STEP, last))
        sums += (values[:, columns] @ codes[:, columns].T).to(torch.int32)
    return sums
