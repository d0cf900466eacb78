"""Blocks to and from `QuantizedWeight` where the two have the same grid: nothing is rounded a second time.

===== ==================== =================
type  a weight             codes
===== ==================== =================
Q4_0  ``d * (q - 8)``      ``q`` of 4 bits
Q5_0  ``d * (q - 16)``     ``q`` of 5 bits
Q8_0  ``d * (q - 128)``    ``q`` of 8 bits
Q4_1  ``d * q + m``        ``q`` of 4 bits
Q5_1  ``d * q + m``        ``q`` of 5 bits
===== ==================== =================

A block is 32 weights in a row; d and m are fp16. Groups that blocks divide only repeat their scale, and a
zero point moves the codes: symmetric weights of up to 4 bits are Q4_0, those with zero points Q5_0, 8 bits
are Q8_0.
In Q4_1 and Q5_1 a zero point becomes ``m = -z * s``, which fp16 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qkern.ops import pack_bits, unpack_bits
from qkern.ops.gguf_types import GGUFType, gguf_type
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from qkern.gguf.tensors import GGUFTensor

__all__ = ["blocks_of", "exact_type", "map_rows", "quantized_of", "same_grid", "stacked"]

_BLOCK: Final = 32
# fp16 rounds a normal number by at most this much of itself; it loses more only beyond its range.
_HALF_STEP: Final = 2.0**-11


@dataclass(frozen=True, slots=True)
class _Grid:
    """Codes of a type: how many bits, and the code of zero; None where blocks have an offset instead."""

    bits: int
    zero: int | None = None


_GRIDS: Final = {
    "q4_0": _Grid(4, zero=8),
    "q5_0": _Grid(5, zero=16),
    "q8_0": _Grid(8, zero=128),
    "q4_1": _Grid(4),
    "q5_1": _Grid(5),
}
# Types that are form 2 as they stand; 5 bits are none of its widths.
_HELD: Final = ("q4_0", "q4_1", "q8_0")


def same_grid(kind: GGUFType, scheme: Scheme) -> bool:
    """Whether the type holds the codes of every weight of the scheme, its scales being fp16 numbers.

    Of Q4_1 and Q5_1, which round ``m = -z * s``, this is said too.
    """
    grid = _GRIDS.get(kind.name)
    if grid is None or scheme.codebook is not None or (scheme.group_size or _BLOCK) % _BLOCK:
        return False
    if grid.zero is None:
        return scheme.bits <= grid.bits
    # From -z to 2^bits - 1 - z, where z is the midpoint or any code.
    return (scheme.levels - 1 if scheme.zero_point else scheme.midpoint) <= grid.zero


def exact_type(schemes: Iterable[Scheme]) -> GGUFType | None:
    """Smallest type that holds every weight of the schemes as it is; None if there is none."""
    listed = list(schemes)
    for kind in map(gguf_type, ("q4_0", "q5_0", "q8_0")):
        if listed and all(same_grid(kind, scheme) for scheme in listed):
            return kind
    return None


def map_rows(
    qw: QuantizedWeight, change: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None
) -> QuantizedWeight:
    """Reorder the rows of a weight by a function that reorders those of a tensor, or reshape them."""
    parts = ("codes",) if qw.scheme.per_tensor else ("codes", "scales", "zeros", "offsets")
    changed: dict[str, Any] = {}
    for name in parts:
        tensor = getattr(qw, name)
        changed[name] = None if tensor is None else change(tensor).contiguous()
    return replace(qw, shape=shape or qw.shape, **changed)


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Make matrices a stack, and one matrix itself; None if they differ in form."""
    first = weights[0]
    if len(weights) == 1:
        return first
    forms = {(qw.shape, qw.scheme, qw.scales.shape, qw.scales.dtype, qw.offsets is None) for qw in weights}
    if len(forms) > 1 or any(qw.group_index is not None for qw in weights):
        return None

    def stack(name: str) -> Any:
        parts = [getattr(qw, name) for qw in weights]
        return None if parts[0] is None else torch.stack(parts)

    return replace(
        first,
        shape=(len(weights), *first.shape),
        codes=stack("codes"),
        scales=stack("scales"),
        zeros=stack("zeros"),
        offsets=stack("offsets"),
    )


def blocks_of(qw: QuantizedWeight, kind: GGUFType) -> Tensor | None:
    """Blocks with the weight's own codes.

    Scales that are no fp16 numbers are rounded to the nearest: it changes a weight by at most 2^-11 of
    itself, where choosing codes anew could change it by half a step.

    Parameters
    ----------
    qw : QuantizedWeight
        The weight.
    kind : GGUFType
        Type of the blocks.

    Returns
    -------
    Tensor or None
        uint8 ``[rows, bytes of a row]``, of a stack those of each matrix in turn; None where the type does
        not hold the codes, a block has columns of several groups, or scales lie outside fp16's range.
    """
    if len(qw.shape) == 3 and not qw.scheme.per_tensor:
        qw = map_rows(qw, lambda rows: rows.flatten(0, 1), shape=(qw.shape[0] * qw.N, qw.K))
    grid = _GRIDS.get(kind.name)
    if grid is None or len(qw.shape) != 2 or qw.scheme.codebook is not None or qw.K % _BLOCK:
        return None
    groups = _groups_of_blocks(qw)
    if groups is None:
        return None

    def spread(values: Tensor) -> Tensor:
        return values.index_select(1, groups).expand(qw.N, -1).unsqueeze(-1)

    scales = spread(qw.scales).float()
    d = scales.half()
    if not bool(((d.float() - scales).abs() <= _HALF_STEP * scales.abs()).all()):
        return None
    codes = unpack_bits(qw.codes, qw.scheme.bits, qw.shape).view(qw.N, -1, _BLOCK)
    if grid.zero is None:
        m = _offsets(qw, scales, spread)
        if bool(codes.amax() >= 1 << grid.bits) or not bool(m.isfinite().all()):
            return None
        return _assembled(codes, grid.bits, d, m)
    if qw.offsets is not None:
        return None
    zeros = qw.scheme.midpoint if qw.zeros is None else spread(qw.zeros).short()
    moved = codes.short() - zeros + grid.zero
    low, high = moved.aminmax()
    if low < 0 or high >= 1 << grid.bits:
        return None
    return _assembled(moved.byte(), grid.bits, d)


def _groups_of_blocks(qw: QuantizedWeight) -> Tensor | None:
    """Group of each block, int64 ``[K / 32]``; None if a block has columns of several."""
    if qw.scheme.per_tensor:
        return torch.zeros(qw.K // _BLOCK, dtype=torch.int64, device=qw.device)
    index = qw.group_index
    if index is None:
        index = torch.arange(qw.K, device=qw.device) // qw.scheme.group_length(qw.K)
    columns = index.long().view(-1, _BLOCK)
    return columns[:, 0] if bool((columns == columns[:, :1]).all()) else None


def _offsets(qw: QuantizedWeight, scales: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a code of zero stands for, in fp16."""
    if qw.offsets is not None:
        return spread(qw.offsets).half()
    midpoint = torch.tensor(float(qw.scheme.midpoint), device=qw.device)
    zeros = midpoint if qw.zeros is None else spread(qw.zeros).float()
    return (-zeros * scales).half()


def _assembled(codes: Tensor, bits: int, *numbers: Tensor) -> Tensor:
    """Rows of blocks: fp16 numbers ``[N, blocks, 1]``, then codes ``[N, blocks, 32]``."""
    parts = [number.contiguous().view(torch.uint8) for number in numbers]
    if bits == 8:
        parts.append(codes ^ 128)  # two's complement of q - 128
    else:
        if bits == 5:
            fifth = (codes >> 4).view(*codes.shape[:-1], 4, 8)
            places = torch.arange(8, dtype=torch.uint8, device=codes.device)
            parts.append((fifth << places).sum(-1, dtype=torch.uint8))
        half = _BLOCK // 2
        parts.append((codes[..., :half] & 15) | (codes[..., half:] << 4))
    return torch.cat(parts, dim=-1).flatten(1)


def quantized_of(tensor: GGUFTensor) -> QuantizedWeight | None:
    """Return the same weights in the neutral form, bit for bit; None for a type that it does not hold."""
    if tensor.type not in _HELD or len(tensor.shape) != 2:
        return None
    N, K = tensor.shape
    grid = _GRIDS[tensor.type]
    blocks = tensor.raw.view(N, K // _BLOCK, -1)
    if grid.bits == 8:
        codes = blocks[..., 2:] ^ 128
    else:
        nibbles = blocks[..., -_BLOCK // 2 :]
        codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return QuantizedWeight(
        codes=pack_bits(codes.reshape(N, K), grid.bits),
        scales=_number(blocks, 0),
        shape=(N, K),
        scheme=Scheme(bits=grid.bits, group_size=_BLOCK, zero_point=grid.zero is None),
        offsets=_number(blocks, 1) if grid.zero is None else None,
    )


def _number(blocks: Tensor, place: int) -> Tensor:
    """Take the fp16 number at a place of every block, ``[N, blocks]``."""
    return blocks[..., 2 * place : 2 * place + 2].contiguous().view(torch.float16).squeeze(-1)
