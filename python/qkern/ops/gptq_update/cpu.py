"""gptq_update on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.ops import _native
from qkern.ops.codebooks import CODEBOOK_CODES

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["update", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _native.why_not_cpu(request.device)


def update(
    weight: Tensor,
    hinv: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_index: Tensor,
    bits: int,
    codebook: str | None,
) -> tuple[Tensor, Tensor]:
    """Codes and errors of one column block; arguments are validated by the caller."""
    N, B = weight.shape
    weight, stride = _native.rows_of(weight)
    hinv, scales, group_index = hinv.contiguous(), scales.contiguous(), group_index.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    codes = _native.empty(N, B, dtype=torch.uint8)
    errors = _native.empty(N, B)
    _native.core().gptq_update(
        weight=_native.pointer(weight),
        weight_stride=stride,
        N=N,
        B=B,
        hinv=_native.pointer(hinv),
        scales=_native.pointer(scales),
        zeros=_native.pointer(zeros),
        groups=scales.shape[1],
        group_index=_native.pointer(group_index),
        bits=bits,
        codebook=CODEBOOK_CODES[codebook],
        codes=_native.pointer(codes),
        codes_stride=B,
        errors=_native.pointer(errors),
        threads=_native.threads(),
    )
    return codes, errors
