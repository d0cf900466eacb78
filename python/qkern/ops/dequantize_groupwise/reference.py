"""dequantize_groupwise in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.ops._scratch import pieces, rows_within
from qkern.ops.codebooks import codebook
from qkern.ops.pack_bits.reference import unpack_dense
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["dequantize", "row_bytes", "row_chunks"]


def row_bytes(K: int) -> int:
    """Most bytes that decoding a row takes: codes, fp32 weights, spread scales; and a row decoded before."""
    return (12 + 4) * (K + 32)  # codes are unpacked up to 32 at a time


def dequantize(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Weights of the shape of `qw`; arguments are validated by the caller."""
    *experts, N, K = qw.shape
    if not experts and rows_within(row_bytes(K)) >= N:
        return _decode(qw, dtype)
    out = torch.empty(qw.shape, dtype=dtype, device=qw.device)
    if experts:
        for e, expert in enumerate(out):
            expert.copy_(dequantize(_part(qw, e, (N, K)), dtype))
        return out
    for rows, weight in row_chunks(qw, dtype, rows_within(row_bytes(K))):
        out[rows] = weight
    return out


def row_chunks(qw: QuantizedWeight, dtype: torch.dtype, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Decode a matrix `step` rows at a time, so that the whole of it never exists."""
    for rows in pieces(qw.N, 1, step):
        yield rows, _decode(_part(qw, rows, (rows.stop - rows.start, qw.K)), dtype)


def _part(qw: QuantizedWeight, index: int | slice, shape: tuple[int, int]) -> QuantizedWeight:
    """One expert of a stack, or some rows of a matrix."""

    def part(tensor: Tensor) -> Tensor:
        # Per tensor a matrix has one scale, which serves whichever rows are taken.
        return tensor if qw.scheme.per_tensor and isinstance(index, slice) else tensor[index]

    return QuantizedWeight(
        codes=qw.codes[index],
        scales=part(qw.scales),
        shape=shape,
        scheme=qw.scheme,
        zeros=None if qw.zeros is None else part(qw.zeros),
        offsets=None if qw.offsets is None else part(qw.offsets),
        group_index=qw.group_index,
    )


def _decode(qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    K, scheme = qw.K, qw.scheme
    codes = unpack_dense(qw.codes, scheme.bits, K)
    group = qw.group_index
    if group is None:
        group = torch.arange(K, dtype=torch.int32, device=qw.device) // max(scheme.group_length(K), 1)

    def spread(values: Tensor) -> Tensor:
        return values.index_select(-1, group).float()

    if scheme.codebook is not None:
        table = codebook(scheme.codebook, qw.device).values
        weight = table.index_select(0, codes.flatten().int()).view(codes.shape)
    else:
        weight = codes.float()
        if qw.zeros is not None:
            weight -= spread(qw.zeros)
        elif qw.offsets is None:
            weight -= scheme.midpoint
    weight *= spread(qw.scales)
    if qw.offsets is not None:
        weight += spread(qw.offsets)
    return weight.to(dtype)
