"""quantize_activations on the native CUDA kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qkern.errors import InputError
from qkern.ops import _cuda
from qkern.ops._native import DTYPE_CODES, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request

__all__ = ["quantize", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _cuda.why_not_cuda(request.device)


def quantize(x: Tensor, group_size: int, scale: Tensor | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int8 ``[M, K]`` and fp32 ``[M, groups]``; the caller has validated everything."""
    if scale is not None and scale.device != x.device:
        raise InputError(
            f"scale is on the wrong device: got {scale.device}, allowed is that of x, {x.device}; move it"
        )
    (M, K), device, (x, stride) = x.shape, x.device, rows_of(x)
    groups = -(-K // group_size)
    codes = torch.empty(M, K, dtype=torch.int8, device=device)
    scales = torch.empty(M, groups, dtype=torch.float32, device=device)
    with _cuda.on_device(device):
        _cuda.module().quantize_activations(
            x=x.data_ptr(),
            dtype=DTYPE_CODES[x.dtype],
            M=M,
            K=K,
            x_stride=stride,
            group_size=group_size,
            groups=groups,
            scale=0 if scale is None else scale.data_ptr(),
            zero=zero,
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            stream=_cuda.stream(device),
        )
    return codes, scales
