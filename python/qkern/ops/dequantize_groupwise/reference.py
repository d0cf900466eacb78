"""dequantize_groupwise in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.ops.codebooks import codebook
from qkern.ops.pack_bits.reference import unpack_dense

if TYPE_CHECKING:
    from qkern.schemes import QuantizedWeight

__all__ = ["dequantize"]


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Weights of the shape of `qw`; arguments are validated by the caller."""
    K, scheme = qw.K, qw.scheme
    codes = unpack_dense(qw.codes, scheme.bits, K)
    group = qw.group_index
    if group is None:
        group = torch.arange(K, device=qw.device) // max(scheme.group_length(K), 1)

    def spread(values: Tensor) -> Tensor:
        return values.float()[..., group.long()]

    if scheme.codebook is not None:
        return (codebook(scheme.codebook, qw.device).values[codes.long()] * spread(qw.scales)).to(dtype)
    if qw.offsets is not None:
        return (codes.float() * spread(qw.scales) + spread(qw.offsets)).to(dtype)
    zero = scheme.midpoint if qw.zeros is None else spread(qw.zeros)
    return ((codes.float() - zero) * spread(qw.scales)).to(dtype)
