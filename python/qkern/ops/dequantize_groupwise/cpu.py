"""dequantize_groupwise on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.ops import _native
from qkern.ops.codebooks import CODEBOOK_CODES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import QuantizedWeight

__all__ = ["dequantize", "dequantize_into", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _native.why_not_cpu(request.device)


def dequantize_into(qw: QuantizedWeight, begin: int, end: int, out: Tensor, out_stride: int) -> None:
    """Write rows [begin, end) (of ``E * N``) to `out`, rows `out_stride` elements apart."""
    K, scheme = qw.K, qw.scheme
    codes, scales = qw.codes.contiguous(), qw.scales.contiguous()
    zeros = None if qw.zeros is None else qw.zeros.contiguous()
    offsets = None if qw.offsets is None else qw.offsets.contiguous()
    group_index = None if qw.group_index is None else qw.group_index.contiguous()
    _native.core().dequantize_groupwise(
        codes=_native.pointer(codes),
        begin=begin,
        end=end,
        K=K,
        group_size=max(scheme.group_length(K), 1),
        groups=scales.shape[-1],
        bits=scheme.bits,
        codebook=CODEBOOK_CODES[scheme.codebook],
        scale_dtype=_native.DTYPE_CODES[scales.dtype],
        scales=_native.pointer(scales),
        zeros=_native.pointer(zeros),
        offsets=_native.pointer(offsets),
        group_index=_native.pointer(group_index),
        rows_per_scale=max(qw.N, 1) if scheme.per_tensor else 1,
        out_dtype=_native.DTYPE_CODES[out.dtype],
        out=_native.pointer(out),
        out_stride=out_stride,
        threads=_native.threads(),
    )


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Weights of the shape of `qw`; arguments are validated by the caller."""
    out = _native.empty(*qw.shape, dtype=dtype)
    dequantize_into(qw, 0, out[..., 0].numel() if qw.K else 0, out, qw.K)
    return out
