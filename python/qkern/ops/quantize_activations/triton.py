"""quantize_activations on Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from qkern.ops import _triton

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request

__all__ = ["quantize", "why_not"]

_ELEMENTS: Final = 2048


def why_not(request: Request) -> str | None:
    """Why the kernel cannot serve `request`."""
    return _triton.why_not_triton(request.device)


def quantize(x: Tensor, group_size: int, scale: Tensor | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int8 ``[M, K]`` and fp32 ``[M, groups]``; the caller has validated everything."""
    M, K = x.shape
    groups = -(-K // group_size)
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scales = torch.empty(M, groups, dtype=torch.float32, device=x.device)
    if codes.numel() == 0:
        return codes, scales
    block = min(1 << (group_size - 1).bit_length(), _ELEMENTS)
    together, steps = _ELEMENTS // block, -(-group_size // block)
    low, high = (-127, 127) if scale is None else (-128 - zero, 127 - zero)
    with _triton.on_device(x.device):
        _triton.kernels("quantize_activations").quantize[(-(-scales.numel() // together),)](
            x,
            x.stride(0),
            x.stride(1),
            # What a kernel does not read still needs an address.
            scales if scale is None else scale,
            codes,
            scales,
            scales.numel(),
            K,
            group_size,
            groups,
            steps,
            float(low),
            float(high),
            float(zero),
            GIVEN=scale is not None,
            STEPS=steps if _triton.interpreted(x.device) else 0,
            BG=together,
            BL=block,
            enable_fp_fusion=False,
        )
    return codes, scales
