"""pack_bits and unpack_bits on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _native
from qkern.ops.pack_bits.reference import code_range_message

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["LAYOUT_CODES", "pack", "packed_shape", "unpack", "why_not"]

# Order of qk::BitLayout in csrc/include/qkern/kernels.h.
LAYOUT_CODES: Final = {"dense": 0, "gptq": 1, "awq": 2, "words": 3}


def packed_shape(N: int, K: int, bits: int, layout: str) -> tuple[int, int]:
    """Shape of the packed words of ``[N, K]`` codes."""
    dense = -(-K * bits // 32)
    shapes = {
        "dense": (N, dense),
        "gptq": (dense, N),
        "awq": (K, N // 8),
        "words": (N, -(-K // (32 // bits))),
    }
    return shapes[layout]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _native.why_not_cpu(request.device)


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """Pack uint8 ``[N, K]``; arguments are validated by the caller."""
    N, K = codes.shape
    codes, stride = _native.rows_of(codes)
    packed = _native.empty(*packed_shape(N, K, bits, layout), dtype=torch.int32)
    status = _native.core().pack_bits(
        codes=_native.pointer(codes),
        codes_stride=stride,
        N=N,
        K=K,
        bits=bits,
        layout=LAYOUT_CODES[layout],
        packed=_native.pointer(packed),
        threads=_native.threads(),
    )
    if status == _native.CODE_RANGE:
        raise InputError(code_range_message(bits))
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, int], layout: str) -> Tensor:
    """Unpack to uint8 ``[N, K]``; arguments are validated by the caller."""
    N, K = shape
    packed = packed.contiguous()
    codes = _native.empty(*shape, dtype=torch.uint8)
    _native.core().unpack_bits(
        codes=_native.pointer(codes),
        codes_stride=K,
        N=N,
        K=K,
        bits=bits,
        layout=LAYOUT_CODES[layout],
        packed=_native.pointer(packed),
        threads=_native.threads(),
    )
    return codes
