"""dequant_matmul in plain torch, and the int8 activations as every backend quantizes them; any device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.ops.dequantize_groupwise.reference import dequantize
from qkern.ops.quantize_activations.reference import round_to_codes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.schemes import QuantizedWeight

__all__ = ["BLOCK", "activation_blocks", "fake_quantize", "input_gradient", "matmul", "row_chunks"]

BLOCK: Final = 128
"""Columns of one group that share an activation scale in compute int8, unless the whole token does."""
# Weights that are decoded at a time.
_CHUNK: Final = 1 << 24


def activation_blocks(qw: QuantizedWeight) -> Tensor:
    """Activation block of each column, int64 ``[K]``: 128 columns of a group at a time, in group order.

    One block for 8-bit weights with one scale a channel whose scheme says a8: their activations have one
    scale a token.
    """
    K = qw.K
    if qw.scheme.act_bits is not None and qw.scheme.bits == 8 and qw.scales.shape[1] == 1:
        return torch.zeros(K, dtype=torch.int64, device=qw.device)
    if qw.group_index is None:
        length = max(qw.scheme.group_length(K), 1)
        column = torch.arange(K, device=qw.device)
        return column // length * -(-length // BLOCK) + column % length // BLOCK
    groups, order = qw.group_index.long().sort(stable=True)
    starts = torch.searchsorted(groups, groups)
    rank = torch.arange(K, device=qw.device) - starts
    per_group = -(-K // BLOCK) or 1
    blocks = torch.empty_like(order)
    blocks[order] = groups * per_group + rank // BLOCK
    # Numbered without gaps.
    numbered: Tensor = torch.unique(blocks, return_inverse=True)[1]
    return numbered


def fake_quantize(x: Tensor, qw: QuantizedWeight) -> Tensor:
    """Activations ``[M, K]`` as compute int8 sees them: quantized a token and block, and back to fp32."""
    values = x.float()
    if qw.K == 0:
        return values
    blocks = activation_blocks(qw)
    index = blocks.expand_as(values)
    amax = values.new_zeros(values.shape[0], int(blocks.max()) + 1).scatter_reduce_(
        1, index, values.abs(), "amax"
    )
    scales = (amax / amax.new_tensor(127))[:, blocks]  # not a number: see quantize_groupwise.reference
    return round_to_codes(values, scales).float() * scales


def row_chunks(qw: QuantizedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Decode rows of the weight a chunk at a time, so that the whole matrix never exists."""
    step = max(_CHUNK // max(qw.K, 1), 1)
    N, K = qw.shape
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))

        def part(tensor: Tensor | None, rows: slice = rows) -> Tensor | None:
            return tensor if tensor is None or qw.scheme.per_tensor else tensor[rows]

        chunk = replace(
            qw,
            codes=qw.codes[rows],
            shape=(rows.stop - first, K),
            scales=qw.scales if qw.scheme.per_tensor else qw.scales[rows],
            zeros=part(qw.zeros),
            offsets=part(qw.offsets),
            nested=None,
        )
        yield rows, dequantize(chunk, dtype)


def matmul(x: Tensor, qw: QuantizedWeight, bias: Tensor | None, int8: bool) -> Tensor:
    """``x [M, K] @ W.T + bias`` in x's dtype; arguments are validated by the caller."""
    values, dtype = (fake_quantize(x, qw), torch.float32) if int8 else (x, x.dtype)
    out = x.new_empty(x.shape[0], qw.N)
    for rows, weight in row_chunks(qw, dtype):
        part = F.linear(values, weight)
        if bias is not None:
            # A bias of fp32 is added in fp32 and rounded once.
            part = part + bias[rows]
        out[:, rows] = part.to(out.dtype)
    return out


def input_gradient(grad: Tensor, qw: QuantizedWeight) -> Tensor:
    """``grad [M, N] @ W`` in grad's dtype, summed in fp32."""
    total = torch.zeros(grad.shape[0], qw.K, dtype=torch.float32, device=grad.device)
    for rows, weight in row_chunks(qw, torch.float32):
        total += grad[:, rows].float() @ weight
    return total.to(grad.dtype)
