"""Quantize a weight that was quantized before and has changed a little since."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops import pack_bits, quantize_groupwise
from qkern.ops.quantize_groupwise.nested import divisors
from qkern.ops.quantize_groupwise.reference import encode
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight

__all__ = ["requantize"]


def requantize(weight: Tensor, before: QuantizedWeight) -> QuantizedWeight:
    """Round a weight to nearest in the form that it had before.

    Each group stays on the grid that it was on unless the one that a search for the least squared error
    finds is better. So a weight that did not change comes back with the same values, which a fresh choice of
    scales does not give, and rounding never costs more than on either grid.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]``, fp32, fp16 or bf16.
    before : QuantizedWeight
        One matrix of that shape: its scheme, dtype of scales, groups (act-order too) and static input scale
        are those of the result; offsets stay offsets.

    Returns
    -------
    QuantizedWeight
        On the device of `weight`, as `before` must be.

    Raises
    ------
    InputError
        If shape or dtype do not fit, on NaN or Inf in the weight, or if a scale overflows its dtype.
    UnsupportedError
        For double-quantized scales and stacks of experts.
    """
    if before.scheme.double_quant or len(before.shape) != 2:
        raise UnsupportedError(
            f"requantize takes one matrix with plain scales: got {before.scheme} {before.shape}; quantize "
            "each matrix with quantize_rtn"
        )
    if tuple(weight.shape) != before.shape or weight.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"weight must be fp32, fp16 or bf16 {before.shape} as before: got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    weight = weight.detach().to(torch.float32)
    groups = _groups_of_columns(before)
    after = _searched(weight, before, groups)
    kept, kept_error = _rounded(weight, before, groups)
    fresh, fresh_error = _rounded(weight, after, groups)
    better = fresh_error < kept_error
    codes = torch.where(better[:, groups], fresh, kept)
    return replace(
        before,
        codes=pack_bits(codes, before.scheme.bits),
        scales=torch.where(better, after.scales, before.scales),
        zeros=_picked(better, after.zeros, before.zeros),
        offsets=_picked(better, after.offsets, before.offsets),
    )


def _picked(better: Tensor, after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if after is None or before is None else torch.where(better, after, before)


def _groups_of_columns(weight: QuantizedWeight) -> Tensor:
    """Index into the scales of each column, int64 ``[K]``."""
    if weight.group_index is not None:
        return weight.group_index.long()
    return torch.arange(weight.K, device=weight.device) // max(weight.scheme.group_length(weight.K), 1)


def _searched(weight: Tensor, before: QuantizedWeight, groups: Tensor) -> QuantizedWeight:
    """Return `before` with the grid that a search finds for the weight; its codes mean nothing."""
    scheme, matrices = before.scheme, [weight]
    if before.group_index is not None:
        # Groups of act-order may be uneven, so each is a matrix of its own.
        scheme = replace(scheme, group_size=None)
        matrices = [weight[:, groups == group] for group in range(before.scales.shape[-1])]
    dtype = before.scales.dtype
    found = [quantize_groupwise(matrix, scheme, search="mse", scale_dtype=dtype) for matrix in matrices]
    scales = torch.cat([one.scales for one in found], -1)
    if not scheme.zero_point:
        return replace(before, scales=scales)
    zeros = torch.cat([one.zeros for one in found if one.zeros is not None], -1)
    if before.offsets is None:
        return replace(before, scales=scales, zeros=zeros)
    return replace(before, scales=scales, offsets=(-zeros.float() * scales.float()).to(dtype))


def _rounded(weight: Tensor, grid: QuantizedWeight, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, uint8 ``[N, K]``, and the squared error of each group, of the shape of the scales."""
    scheme = grid.scheme
    zeros = weight.new_zeros(1, 1)
    if grid.zeros is not None:
        zeros = grid.zeros.float()
    elif not scheme.zero_point and scheme.codebook is None:
        zeros = zeros + scheme.midpoint
    offsets = torch.zeros_like(grid.scales) if grid.offsets is None else grid.offsets
    scales, offset = grid.scales.float()[:, groups], offsets.float()[:, groups]
    codes, level = encode(weight - offset, divisors(scales), zeros.expand_as(grid.scales)[:, groups], scheme)
    squared = (level * scales + offset - weight).square()
    errors = torch.zeros(len(weight), grid.scales.shape[-1], device=weight.device)
    errors.index_add_(1, groups, squared)
    return codes, errors.sum(0, keepdim=True) if scheme.per_tensor else errors
