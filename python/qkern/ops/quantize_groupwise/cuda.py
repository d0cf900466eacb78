"""quantize_groupwise on the native CUDA kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _cuda
from qkern.ops._native import DTYPE_CODES, rows_of
from qkern.ops.codebooks import codebook
from qkern.ops.quantize_groupwise import native, reference
from qkern.ops.quantize_groupwise.reference import NON_FINITE_MESSAGE, scale_overflow_message

if TYPE_CHECKING:
    from qkern.ops.registry import Request
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["quantize", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _cuda.why_not_cuda(request.device)


@functools.cache
def _book(name: str | None) -> dict[str, list[float]]:
    if name is None:
        return {"ordered": [], "thresholds": [], "codebook_codes": []}
    book = codebook(name)
    return {
        "ordered": book.ordered.tolist(),
        "thresholds": book.thresholds.tolist(),
        "codebook_codes": book.codes.tolist(),
    }


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
    rows, stride = rows_of(rows)
    R, K = rows.shape
    flags = torch.zeros(2, dtype=torch.int32, device=rows.device)
    with _cuda.on_device(rows.device):
        _cuda.module().quantize_groupwise(
            weight=_cuda.pointer(rows),
            dtype=DTYPE_CODES[rows.dtype],
            N=R,
            K=K,
            row_stride=stride,
            group_size=max(scheme.group_length(K), 1),
            groups=scheme.num_groups(K),
            bits=scheme.bits,
            asymmetric=scheme.zero_point,
            **_book(scheme.codebook),
            search_mse=search == "mse",
            importance=_cuda.pointer(importance),
            importance_stride=0 if importance is None or importance.dim() == 1 else K,
            scale_dtype=DTYPE_CODES[scales.dtype],
            scales=_cuda.pointer(scales),
            zeros=_cuda.pointer(zeros),
            grid_given=rows_per_grid > 0,
            rows_per_grid=max(rows_per_grid, 1),
            codes=_cuda.pointer(codes),
            flags=_cuda.pointer(flags),
            stream=_cuda.stream(rows.device),
        )
    not_finite, overflow = flags.tolist()
    if not_finite:
        raise InputError(NON_FINITE_MESSAGE)
    if overflow:
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
    if scheme.per_tensor and search == "mse":
        # Half a warp searches a group: sixteen lanes would go through the whole matrix a hundred times.
        return reference.quantize(
            weight, scheme, importance=importance, search=search, scale_dtype=scale_dtype
        )
    return native.quantize(
        weight,
        scheme,
        importance=importance,
        search=search,
        scale_dtype=scale_dtype,
        scales=scales,
        zeros=zeros,
        run=_run,
        empty=functools.partial(_empty, weight.device),
    )


def _empty(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
