"""gguf_decode through the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.ops import _native

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.gguf_types import GGUFType
    from qkern.ops.registry import Request

__all__ = ["decode", "why_not"]


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot run; None if they can."""
    return _native.why_not_cpu(request.device)


def decode(rows: Tensor, kind: GGUFType) -> Tensor:
    """Decode contiguous uint8 ``[N, bytes]``; arguments are validated by the caller."""
    N = rows.shape[0]
    K = rows.shape[1] // kind.bytes * kind.block
    out = _native.empty(N, K)
    _native.core().gguf_decode(
        type=kind.id,
        raw=_native.pointer(rows),
        out=_native.pointer(out),
        rows=N,
        K=K,
        threads=_native.threads(),
    )
    return out
