"""dequantize_groupwise on the native CUDA kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qkern.ops import _cuda
from qkern.ops._native import DTYPE_CODES
from qkern.ops.codebooks import codebook

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import QuantizedWeight

__all__ = ["dequantize", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _cuda.why_not_cuda(request.device)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Weights of the shape of `qw`; arguments are validated by the caller."""
    K, scheme, device = qw.K, qw.scheme, qw.device
    codes, scales = qw.codes.contiguous(), qw.scales.contiguous()
    zeros = None if qw.zeros is None else qw.zeros.contiguous()
    offsets = None if qw.offsets is None else qw.offsets.contiguous()
    group_index = None if qw.group_index is None else qw.group_index.contiguous()
    table = None if scheme.codebook is None else codebook(scheme.codebook, device).values
    out = torch.empty(qw.shape, dtype=dtype, device=device)
    with _cuda.on_device(device):
        _cuda.module().dequantize_groupwise(
            codes=_cuda.pointer(codes),
            rows=math.prod(qw.shape[:-1]),
            K=K,
            group_size=max(scheme.group_length(K), 1),
            groups=scales.shape[-1],
            bits=scheme.bits,
            table=_cuda.pointer(table),
            scale_dtype=DTYPE_CODES[scales.dtype],
            scales=_cuda.pointer(scales),
            zeros=_cuda.pointer(zeros),
            offsets=_cuda.pointer(offsets),
            group_index=_cuda.pointer(group_index),
            rows_per_scale=max(qw.N, 1) if scheme.per_tensor else 1,
            out=_cuda.pointer(out),
            out_dtype=DTYPE_CODES[dtype],
            out_stride=K,
            stream=_cuda.stream(device),
        )
    return out
