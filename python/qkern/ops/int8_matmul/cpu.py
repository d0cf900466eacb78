"""int8_matmul on the native CPU kernels, from the packed weight of dequant_matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qkern.errors import InputError
from qkern.ops._native import DTYPE_CODES, core, empty, pointer, rows_of, threads, why_not_cpu
from qkern.ops.dequant_matmul import cpu as dequant_matmul
from qkern.ops.int8_matmul.reference import why_not_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight

__all__ = ["matmul", "pack", "why_not"]


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    reason = None if request.scheme is None else why_not_scheme(request.scheme)
    return reason or why_not_cpu(request.device)


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout that dequant_matmul and int8_matmul share."""
    return dequant_matmul.pack(qw)


def matmul(
    x: Tensor,
    scales: Tensor | None,
    blob: Tensor,
    bias: Tensor | None,
    zeros: Tensor | None,
    N: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes ``[M, K]`` by the weight; scales and zeros are ``[M, 1]``, all else is validated."""
    (M, K), (x, row_stride) = x.shape, rows_of(x)
    int_out = out_dtype == torch.int32
    out = empty(M, N, dtype=out_dtype)
    # Kept by name: a temporary would be gone before the kernel reads it.
    x_scales = None if scales is None else scales.contiguous()
    x_zeros = None if zeros is None else zeros.to(torch.int32).contiguous()
    try:
        core().int8_matmul(
            blob=pointer(blob),
            bytes=blob.numel(),
            N=N,
            K=K,
            codes=pointer(x),
            M=M,
            row_stride=row_stride,
            scales=pointer(x_scales),
            zeros=pointer(x_zeros),
            bias=pointer(bias),
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=pointer(out),
            out_dtype=0 if int_out else DTYPE_CODES[out_dtype],
            int_out=int_out,
            threads=threads(),
        )
    except ValueError as error:
        raise InputError(f"int8_matmul cannot use this packed weight: {error}") from None
    return out
