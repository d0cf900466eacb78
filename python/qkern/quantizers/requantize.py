"""Quantize a weight that was quantized before and has changed a little since."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops import pack_bits, quantize_groupwise
from qkern.ops.quantize_groupwise.nested import decode, divisors, renest
from qkern.ops.quantize_groupwise.reference import encode
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

__all__ = ["requantize"]


def requantize(weight: Tensor, before: QuantizedWeight) -> QuantizedWeight:
    """Round a weight to nearest in the form that it had before.

    Each group stays on the grid that it was on unless the one that a search for the least squared error
    finds is better. So a weight that did not change comes back with the same values, which a fresh choice of
    scales does not give, and rounding never costs more than on either grid. Double-quantized scales are then
    quantized again in the blocks where one changed, and codes chosen by the result.

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
        For stacks of experts, and double-quantized scales without their stored form.
    """
    if len(before.shape) != 2:
        raise UnsupportedError(
            f"requantize takes one matrix: got {before.scheme} {before.shape}; quantize each matrix with "
            "quantize_rtn"
        )
    if tuple(weight.shape) != before.shape or weight.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"weight must be fp32, fp16 or bf16 {before.shape} as before: got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    if not weight.numel():
        return before
    groups = _groups_of_columns(before)
    order = groups.argsort(stable=True)
    lengths = groups.bincount(minlength=before.scales.shape[-1]).tolist()
    matrices = torch.split_with_sizes(weight.detach().to(torch.float32)[:, order], lengths, -1)
    scheme = replace(before.scheme, group_size=None, double_quant=False)
    grids = [
        _better(matrix, _Grid.of_group(before, group), scheme, before.offsets is not None)
        for group, matrix in enumerate(matrices)
    ]
    scales, nested = torch.cat([grid.scales for grid in grids], -1), before.nested
    if nested is not None:
        nested = renest(scales, nested)
        scales = decode(nested, tuple(scales.shape))
        grids = [grid._replace(scales=scales[:, [group]]) for group, grid in enumerate(grids)]
    codes = [_rounded(matrix, grid, scheme)[0] for matrix, grid in zip(matrices, grids, strict=True)]
    return replace(
        before,
        codes=pack_bits(torch.cat(codes, -1)[:, order.argsort()], scheme.bits),
        scales=scales,
        nested=nested,
        zeros=None if before.zeros is None else torch.cat([grid.zeros for grid in grids], -1),
        offsets=None if before.offsets is None else torch.cat([grid.offsets for grid in grids], -1),
    )


class _Grid(NamedTuple):
    """Scales of one group, ``[N, 1]`` (per tensor ``[1, 1]``), its zero points and offsets, 0 if unused."""

    scales: Tensor
    zeros: Tensor
    offsets: Tensor

    @classmethod
    def of_group(cls, weight: QuantizedWeight, group: int) -> _Grid:
        scheme, scales = weight.scheme, weight.scales[:, group : group + 1]
        implied = 0 if scheme.zero_point or scheme.codebook else scheme.midpoint
        zeros = torch.full_like(scales, implied, dtype=torch.uint8)
        offsets = torch.zeros_like(scales)
        if weight.zeros is not None:
            zeros = weight.zeros[:, group : group + 1]
        if weight.offsets is not None:
            offsets = weight.offsets[:, group : group + 1]
        return cls(scales, zeros, offsets)


def _groups_of_columns(weight: QuantizedWeight) -> Tensor:
    """Index into the scales of each column, int64 ``[K]``."""
    if weight.group_index is not None:
        return weight.group_index.long()
    return torch.arange(weight.K, device=weight.device) // max(weight.scheme.group_length(weight.K), 1)


def _better(matrix: Tensor, kept: _Grid, scheme: Scheme, has_offsets: bool) -> _Grid:
    """By rows the better of the grid of a group and a searched one."""
    fresh = _searched(matrix, kept, scheme, has_offsets)
    better = _rounded(matrix, fresh, scheme)[1] < _rounded(matrix, kept, scheme)[1]
    return _Grid(*(torch.where(better, new, old) for new, old in zip(fresh, kept, strict=True)))


def _searched(matrix: Tensor, kept: _Grid, scheme: Scheme, has_offsets: bool) -> _Grid:
    dtype = kept.scales.dtype
    found = quantize_groupwise(matrix, scheme, search="mse", scale_dtype=dtype)
    if found.zeros is None:
        return kept._replace(scales=found.scales)
    if has_offsets:
        offsets = (-found.zeros.float() * found.scales.float()).to(dtype)
        return kept._replace(scales=found.scales, offsets=offsets)
    return kept._replace(scales=found.scales, zeros=found.zeros)


def _rounded(matrix: Tensor, grid: _Grid, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Nearest codes, uint8 ``[N, n]``, and the squared error of each row (per tensor of all)."""
    scales, offsets = grid.scales.float(), grid.offsets.float()
    codes, level = encode(matrix - offsets, divisors(scales), grid.zeros.float(), scheme)
    errors = (level * scales + offsets - matrix).square().sum(-1, keepdim=True)
    return codes, errors.sum(0, keepdim=True) if scheme.per_tensor else errors
