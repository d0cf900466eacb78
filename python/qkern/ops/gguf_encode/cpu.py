"""gguf_encode through the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _native

if TYPE_CHECKING:
    from qkern.ops.gguf_types import GGUFType
    from qkern.ops.registry import Request

__all__ = ["encode", "why_not"]


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot run; None if they can."""
    return _native.why_not_cpu(request.device)


def encode(rows: Tensor, kind: GGUFType, importance: Tensor | None) -> Tensor:
    """Encode contiguous fp32 ``[N, K]``; arguments are validated by the caller."""
    N, K = rows.shape
    out = _native.empty(N, kind.row_bytes(K), dtype=torch.uint8)
    finite = _native.core().gguf_encode(
        type=kind.id,
        x=_native.pointer(rows),
        importance=_native.pointer(importance),
        out=_native.pointer(out),
        rows=N,
        K=K,
        threads=_native.threads(),
    )
    if not finite:
        largest = rows.abs().max().item()
        raise InputError(
            f"{kind.name} cannot hold the values: the largest magnitude is {largest}, allowed are finite "
            "values below 65504 (fp16 scales); repair the tensor or use bf16 or f32"
        )
    return out
