"""quantize_groupwise on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.errors import InputError
from qkern.ops import _native
from qkern.ops.codebooks import CODEBOOK_CODES
from qkern.ops.quantize_groupwise import native
from qkern.ops.quantize_groupwise.reference import NON_FINITE_MESSAGE, scale_overflow_message

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import QuantizedWeight, Scheme

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
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``; arguments are validated by the caller."""
    return native.quantize(
        weight,
        scheme,
        importance=importance,
        search=search,
        scale_dtype=scale_dtype,
        scales=scales,
        zeros=zeros,
        run=_run,
        empty=_native.empty,
    )
