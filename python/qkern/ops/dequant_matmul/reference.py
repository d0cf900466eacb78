"""dequant_matmul in plain torch, and the int8 activations as every backend quantizes them; any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.ops._scratch import LIMIT, pieces, rows_within
from qkern.ops.dequantize_groupwise.reference import row_bytes, row_chunks
from qkern.ops.quantize_activations.reference import VALUE_BYTES, round_to_codes

if TYPE_CHECKING:
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["BLOCK", "activation_blocks", "activations_by_token", "fake_quantize", "input_gradient", "matmul"]

BLOCK: Final = 128
"""Columns of one group that share an activation scale in compute int8, unless the whole token does."""
# What is kept of tokens while rows of the weight pass by, and these rows with their products, have half each.
_HALF: Final = LIMIT // 2
# An output of a chunk: the product, the one with the bias, and the product before.
_OUT_BYTES: Final = 12


def activations_by_token(scheme: Scheme, groups: int) -> bool:
    """Whether compute int8 gives the activations one scale a token, and int8_matmul takes them."""
    return scheme.act_bits is not None and scheme.bits == 8 and groups == 1


def activation_blocks(qw: QuantizedWeight) -> Tensor:
    """Activation block of each column, int64 ``[K]``: 128 columns of a group at a time, in group order.

    One block for 8-bit weights with one scale a channel whose scheme says a8: their activations have one
    scale a token.
    """
    K = qw.K
    if activations_by_token(qw.scheme, qw.scales.shape[1]):
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
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if qw.K == 0:
        return out
    blocks = activation_blocks(qw)
    count = int(blocks.max()) + 1
    for tokens in pieces(len(x), VALUE_BYTES * qw.K, _HALF):
        values = x[tokens].float()
        amax = values.new_zeros(len(values), count).scatter_reduce_(
            1, blocks.expand_as(values), values.abs(), "amax"
        )
        # Not a number: see quantize_groupwise.reference.
        scales = (amax / amax.new_tensor(127)).index_select(1, blocks)
        torch.mul(round_to_codes(values, scales), scales, out=out[tokens])
    return out


def matmul(x: Tensor, qw: QuantizedWeight, bias: Tensor | None, int8: bool) -> Tensor:
    """``x [M, K] @ W.T + bias`` in x's dtype; arguments are validated by the caller."""
    out = x.new_empty(x.shape[0], qw.N)
    for tokens in pieces(len(x), 4 * (qw.K if int8 else _OUT_BYTES), _HALF):
        _product(fake_quantize(x[tokens], qw) if int8 else x[tokens], qw, bias, out[tokens])
    return out


def _product(x: Tensor, qw: QuantizedWeight, bias: Tensor | None, out: Tensor) -> None:
    for rows, weight in row_chunks(qw, x.dtype, _rows_at_once(qw, len(x))):
        part = F.linear(x, weight)
        if bias is not None:
            # A bias of fp32 is added in fp32 and rounded once.
            part = part + bias[rows]
        out[:, rows] = part


def _rows_at_once(qw: QuantizedWeight, tokens: int) -> int:
    return rows_within(row_bytes(qw.K) + _OUT_BYTES * tokens, _HALF)


def input_gradient(grad: Tensor, qw: QuantizedWeight) -> Tensor:
    """``grad [M, N] @ W`` in grad's dtype, summed in fp32."""
    out = grad.new_empty(grad.shape[0], qw.K)
    for tokens in pieces(len(grad), 4 * max(qw.K, _OUT_BYTES), _HALF):
        out[tokens] = _gradient(grad[tokens], qw)
    return out


def _gradient(grad: Tensor, qw: QuantizedWeight) -> Tensor:
    total = torch.zeros(grad.shape[0], qw.K, dtype=torch.float32, device=grad.device)
    for rows, weight in row_chunks(qw, torch.float32, _rows_at_once(qw, len(grad))):
        total.addmm_(grad[:, rows].float(), weight)
    return total
