"""pack_bits and unpack_bits on the native CUDA kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qkern.errors import InputError
from qkern.ops import _cuda, _native
from qkern.ops.pack_bits.cpu import LAYOUT_CODES, packed_shape
from qkern.ops.pack_bits.reference import code_range_message

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request

__all__ = ["pack", "unpack", "why_not"]


def why_not(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None if they can."""
    return _cuda.why_not_cuda(request.device)


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """Pack uint8 ``[N, K]``; arguments are validated by the caller."""
    N, K = codes.shape
    device = codes.device
    codes, stride = _native.rows_of(codes)
    packed = torch.empty(packed_shape(N, K, bits, layout), dtype=torch.int32, device=device)
    # Every byte is a code of eight bits: nothing to wait for.
    flag = torch.zeros(1, dtype=torch.int32, device=device) if bits < 8 else None
    with _cuda.on_device(device):
        _cuda.module().pack_bits(
            codes=codes.data_ptr(),
            codes_stride=stride,
            N=N,
            K=K,
            bits=bits,
            layout=LAYOUT_CODES[layout],
            packed=packed.data_ptr(),
            flag=0 if flag is None else flag.data_ptr(),
            stream=_cuda.stream(device),
        )
    if flag is not None and flag.item():
        raise InputError(code_range_message(bits))
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, int], layout: str) -> Tensor:
    """Unpack to uint8 ``[N, K]``; arguments are validated by the caller."""
    N, K = shape
    device = packed.device
    packed = packed.contiguous()
    codes = torch.empty(shape, dtype=torch.uint8, device=device)
    with _cuda.on_device(device):
        _cuda.module().unpack_bits(
            codes=codes.data_ptr(),
            codes_stride=K,
            N=N,
            K=K,
            bits=bits,
            layout=LAYOUT_CODES[layout],
            packed=packed.data_ptr(),
            stream=_cuda.stream(device),
        )
    return codes
