"""int8_matmul in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.dequant_matmul import plain
from qkern.ops.pack_bits.reference import unpack_dense

if TYPE_CHECKING:
    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

__all__ = ["exact_columns", "matmul", "pack", "why_not", "why_not_scheme"]

# Columns whose sum fp32 holds exactly: 256 * 255 * 255 < 2^24.
_STEP: Final = 256
# Weights that are unpacked at a time.
_CHUNK: Final = 1 << 24


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


def matmul(
    x: Tensor,
    scales: Tensor | None,
    qw: QuantizedWeight,
    bias: Tensor | None,
    zeros: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes ``[M, K]`` by the weight; scales and zeros are ``[M, 1]``, all else is validated."""
    if qw.scales.shape[1] != 1:
        raise InputError(
            f"int8_matmul takes one scale a channel: got {qw.scales.shape[1]} groups; use dequant_matmul"
        )
    (M, K), N = x.shape, qw.N
    exact = exact_columns(weight_zeros=qw.scheme.zero_point, x_zeros=zeros is not None)
    if out_dtype == torch.int32 and (exact < K or qw.offsets is not None):
        raise InputError(_why_no_sums(qw))
    segment = max(K, 1) if exact >= K else exact // 128 * 128
    values = x.float() if zeros is None else x.float() - zeros
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    step = max(_CHUNK // max(K, 1), 1)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        codes = unpack_dense(qw.codes[rows], 8, K).float()
        if qw.zeros is not None:
            codes -= qw.zeros if qw.scheme.per_tensor else qw.zeros[rows]
        elif qw.offsets is None:
            codes -= 128
        sums = [_sums(values, codes, k, min(k + segment, K)) for k in range(0, max(K, 1), segment)]
        if scales is None:
            out[:, rows] = sums[0]
            continue
        total = sums[0].float()
        for later in sums[1:]:
            total += later.float()
        weight_scales = (qw.scales if qw.scheme.per_tensor else qw.scales[rows]).float().T
        part = total * (weight_scales * scales)
        if qw.offsets is not None:
            offsets = (qw.offsets if qw.scheme.per_tensor else qw.offsets[rows]).float().T
            part = part + offsets * scales * values.to(torch.int64).sum(-1, keepdim=True).float()
        if bias is not None:
            part = part + bias[rows]
        out[:, rows] = part.to(out_dtype)
    return out


def _sums(values: Tensor, codes: Tensor, first: int, last: int) -> Tensor:
    """``values @ codes.T`` over columns first..last: integers, exact in int32."""
    sums = torch.zeros(values.shape[0], codes.shape[0], dtype=torch.int32, device=values.device)
    for k in range(first, last, _STEP):
        columns = slice(k, min(k + _STEP, last))
        sums += (values[:, columns] @ codes[:, columns].T).to(torch.int32)
    return sums


def _why_no_sums(qw: QuantizedWeight) -> str:
    if qw.offsets is not None:
        return "a weight with float offsets has no int32 sums: ask for a float out_dtype"
    return f"int32 sums over K={qw.K} columns could overflow: ask for a float out_dtype"
