"""dequantize_groupwise on Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.ops import _triton
from qkern.ops.codebooks import codebook

if TYPE_CHECKING:
    from qkern.ops.registry import Request
    from qkern.schemes import QuantizedWeight

__all__ = ["dequantize", "why_not"]

_ROWS, _COLUMNS = 8, 256


def why_not(request: Request) -> str | None:
    """Why the kernel cannot serve the request; None if it can."""
    return _triton.why_not_triton(request.device)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Weights of the shape of `qw`; arguments are validated by the caller."""
    out = torch.empty(qw.shape, dtype=_triton.stored_dtype(dtype, qw.device), device=qw.device)
    if out.numel() == 0:
        return out.to(dtype)
    K, scheme = qw.K, qw.scheme
    R = out.numel() // K
    codes, scales = qw.codes.contiguous(), qw.scales.contiguous()
    shifts = qw.zeros if qw.zeros is not None else qw.offsets
    shift = 0 if shifts is None else 1 if qw.zeros is not None else 2
    index = qw.group_index
    table = None if scheme.codebook is None else codebook(scheme.codebook, qw.device).values
    with _triton.on_device(qw.device):
        _triton.kernels("dequantize_groupwise").dequantize[(-(-R // _ROWS), -(-K // _COLUMNS))](
            codes,
            scales,
            # What a kernel does not read still needs an address.
            scales if shifts is None else shifts.contiguous(),
            scales if table is None else table,
            codes if index is None else index.contiguous(),
            out,
            R,
            K,
            codes.shape[-1],
            scheme.group_length(K),
            scales.shape[-1],
            qw.N if scheme.per_tensor else 1,
            BITS=scheme.bits,
            SHIFT=shift,
            BOOK=table is not None,
            INDEXED=index is not None,
            BR=_ROWS,
            BK=_COLUMNS,
            enable_fp_fusion=False,
        )
    return out.to(dtype)
