"""quantize_activations on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qkern.ops._native import DTYPE_CODES, core, empty, pointer, threads, why_not_cpu

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request

__all__ = ["quantize", "why_not"]


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    return why_not_cpu(request.device)


def quantize(x: Tensor, group_size: int, scale: Tensor | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int8 ``[M, K]`` and fp32 ``[M, groups]``; the caller has validated everything."""
    M, K = x.shape
    if K > 1 and x.stride(1) != 1:
        x = x.contiguous()
    codes = empty(M, K, dtype=torch.int8)
    scales = empty(M, -(-K // group_size))
    core().quantize_activations(
        x=pointer(x),
        dtype=DTYPE_CODES[x.dtype],
        M=M,
        K=K,
        row_stride=x.stride(0),
        group_size=group_size,
        scale=pointer(scale),
        zero=zero,
        codes=pointer(codes),
        scales=pointer(scales),
        threads=threads(),
    )
    return codes, scales
