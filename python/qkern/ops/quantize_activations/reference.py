"""quantize_activations in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qkern.ops._scratch import pieces

__all__ = ["VALUE_BYTES", "quantize", "round_to_codes"]

VALUE_BYTES: Final = 28
"""Most bytes of temporaries for a value that is quantized: some of fp32, some of bool."""


def round_to_codes(x: Tensor, scales: Tensor) -> Tensor:
    """``clamp(rint(x / s), -127, 127)``; 0 where s is 0, and only the signs of Inf where s is not finite."""
    finite = (scales > 0) & torch.isfinite(scales)
    codes = torch.where(finite, x / scales, torch.where(x.isinf(), x, 0.0))
    return codes.clamp_(-127, 127).round_().to(torch.int8)


def quantize(x: Tensor, group_size: int, scale: Tensor | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int8 ``[M, K]`` and fp32 ``[M, groups]``; the caller has validated everything."""
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    groups = -(-K // group_size) if scale is None else 1
    scales = torch.zeros(M, groups, dtype=torch.float32, device=x.device)
    for tokens in pieces(M, VALUE_BYTES * K):
        values = x[tokens].float()
        if scale is not None:
            codes[tokens], scales[tokens] = _quantize_static(values, scale, zero)
            continue
        for g, chunk in enumerate(torch.split(values, group_size, dim=1) if K else ()):
            # amax of torch keeps a NaN, which is what makes it reach the output.
            # A tensor divides: see quantize_groupwise.reference.
            own = chunk.abs().amax(-1, keepdim=True) / chunk.new_tensor(127)
            scales[tokens, g] = own[:, 0]
            codes[tokens, g * group_size : g * group_size + chunk.shape[1]] = round_to_codes(chunk, own)
    return codes, scales


def _quantize_static(values: Tensor, scale: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    ratio = (values / scale).clamp(-128 - zero, 127 - zero).round() + zero
    codes = torch.where(ratio.isnan(), 0.0, ratio).to(torch.int8)
    # The scale of a token that is not finite says so: codes cannot.
    finite = torch.isfinite(values).all(-1, keepdim=True)
    return codes, torch.where(finite, scale.view(1, 1), torch.nan)
