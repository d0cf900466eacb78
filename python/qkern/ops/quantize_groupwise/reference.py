"""quantize_groupwise in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError
from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["choose_grid", "quantize"]


def choose_grid(groups: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (rounded to `scale_dtype`, returned as fp32) and zero point (fp32) of each group.

    `groups` is fp32 ``[..., group]``; the results have a last dimension of 1.
    """
    if scheme.zero_point:
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (scheme.levels - 1)).to(scale_dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, (-low / scale).round().clamp(0, scheme.levels - 1)
    absmax = groups.abs().amax(-1, keepdim=True)
    scale = (absmax / (scheme.midpoint - 0.5)).to(scale_dtype).float()
    return torch.where(scale == 0, 1.0, scale), torch.full_like(scale, scheme.midpoint)


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Quantize ``[N, K]``; arguments are validated by the caller."""
    if not torch.isfinite(weight).all():
        raise InputError("weight has NaN or Inf values: qkern quantizes finite weights only; repair the tensor")
