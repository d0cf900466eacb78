"""quantize_groupwise on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _native
from qkern.ops.codebooks import CODEBOOK_CODES
from qkern.ops.quantize_groupwise.nested import decode, divisors, nest
from qkern.ops.quantize_groupwise.reference import NON_FINITE_MESSAGE, scale_overflow_message
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["quantize", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _native.why_not_cpu(request.device)


def _run(
    rows: Tensor,
    scheme: Scheme,
    scales: Tensor,
    zeros: Tensor | None,
    codes: Tensor | None,
    *,
    importance: Tensor | None = None,
    search: str = "minmax",
    rows_per_grid: int = 0,
) -> None:
    """Call the kernel on ``[R, K]``; rows_per_grid 0: choose the grid, else read it."""
    rows, stride = _native.rows_of(rows)
    R, K = rows.shape
    status = _native.core().quantize_groupwise(
        weight=_native.pointer(rows),
        dtype=_native.DTYPE_CODES[rows.dtype],
        N=R,
        K=K,
        row_stride=stride,
        group_size=max(scheme.group_length(K), 1),
        groups=scheme.num_groups(K),
        bits=scheme.bits,
        asymmetric=scheme.zero_point,
        codebook=CODEBOOK_CODES[scheme.codebook],
        search_mse=search == "mse",
        importance=_native.pointer(importance),
        importance_stride=0 if importance is None or importance.dim() == 1 else K,
        scale_dtype=_native.DTYPE_CODES[scales.dtype],
        scales=_native.pointer(scales),
        zeros=_native.pointer(zeros),
        grid_given=rows_per_grid > 0,
        rows_per_grid=max(rows_per_grid, 1),
        codes=_native.pointer(codes),
        threads=_native.threads(),
    )
    if status == _native.NON_FINITE:
        raise InputError(NON_FINITE_MESSAGE)
    if status == _native.SCALE_OVERFLOW:
        raise InputError(scale_overflow_message(scales.dtype))


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None,
    search: str,
    scale_dtype: torch.dtype,
) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``; arguments are validated by the caller."""
    *experts, N, K = weight.shape
    E = experts[0] if experts else 1
    shape = (*experts, *scheme.scale_shape(N, K))
    codes = _native.empty(*experts, N, scheme.code_words(K), dtype=torch.int32)
    scales = _native.empty(*shape, dtype=torch.float32 if scheme.double_quant else scale_dtype)
    zeros = _native.empty(*shape, dtype=torch.uint8) if scheme.zero_point else None
    if importance is not None:
        importance = (
            importance.contiguous() if importance.dim() == 1 else importance.expand(weight.shape).contiguous()
        )
    whole = (
        weight.reshape(E, N * K)
        if scheme.per_tensor
        else weight
        if weight.dim() == 2
        else weight.flatten(0, 1)
    )
    if importance is not None and scheme.per_tensor:
        importance = importance.expand(weight.shape).reshape(whole.shape).contiguous()
    nested = None
    if scheme.per_tensor or scheme.double_quant:
        # The grid first (per tensor: of the matrix as a single row), then the codes on what became of it.
        _run(whole, scheme, scales, zeros, None, importance=importance, search=search)
        grid_scales = scales
        if scheme.double_quant:
            nested = nest(scales)
            scales = decode(nested, shape)
            grid_scales = divisors(scales)
        rows = weight.reshape(E * N, K)
        _run(rows, scheme, grid_scales, zeros, codes, rows_per_grid=max(N, 1) if scheme.per_tensor else 1)
    else:
        _run(whole, scheme, scales, zeros, codes, importance=importance, search=search)
    return QuantizedWeight(
        codes=codes, scales=scales, zeros=zeros, shape=tuple(weight.shape), scheme=scheme, nested=nested
    )
