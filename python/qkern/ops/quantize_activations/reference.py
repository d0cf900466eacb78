"""quantize_activations in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize", "round_to_codes"]


def round_to_codes(x: Tensor, scales: Tensor) -> Tensor:
    """``clamp(rint(x / s), -127, 127)``; 0 where s is 0, and only the signs of Inf where s is not finite."""
    finite = (scales > 0) & torch.isfinite(scales)
    codes = torch.where(finite, x / scales, x.isinf() * 127 * x.sign().nan_to_num(0.0))
    return codes.clamp(-127, 127).round().to(torch.int8)


def quantize(x: Tensor, group_size: int, scale: Tensor | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to int8 ``[M, K]`` and fp32 ``[M, groups]``; the caller has validated everything."""
    values = x.float()
    if scale is not None:
        return _quantize_static(values, scale, zero)
    M, K = values.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scales = torch.zeros(M, -(-K // group_size), dtype=torch.float32, device=x.device)
    for g, chunk in enumerate(torch.split(values, group_size, dim=1) if K else ()):
        # amax of torch keeps a NaN, which is what makes it reach the output.
        # A tensor divides: see quantize_groupwise.reference.
        scale = chunk.abs().amax(-1, keepdim=True) / chunk.new_tensor(127)
        scales[:, g] = scale[:, 0]
        codes[:, g * group_size : g * group_size + chunk.shape[1]] = round_to_codes(chunk, scale)
    return codes, scales


def _quantize_static(values: Tensor, scale: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    ratio = (values / scale).clamp(-128 - zero, 127 - zero).round() + zero
    codes = torch.where(ratio.isnan(), 0.0, ratio).to(torch.int8)
    # The scale of a token that is not finite says so: codes cannot.
    finite = torch.isfinite(values).all(-1, keepdim=True)
    return codes, torch.where(finite, scale.view(1, 1), torch.nan)
