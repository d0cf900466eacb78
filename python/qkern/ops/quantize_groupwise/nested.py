"""Double quantization (``d``): the scales of a weight as 8-bit codes of a table."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qkern.schemes import NestedScales

__all__ = ["decode", "divisors", "dynamic_table", "nest", "renest"]

BLOCK: Final = 256
"""Scales that share an absmax."""
_DECADES: Final = 7
# Ratios of a scale to its absmax are rounded to this many steps of [-1, 1] before a code is chosen.
_STEPS: Final = 65535


@functools.cache
def dynamic_table() -> Tensor:
    """fp32 ``[256]``, ascending: bitsandbytes' dynamic 8-bit numbers in [-1, 1].

    The decade that ends at ``10**-i`` is cut into ``2**(6 - i)`` equal pieces of its upper nine tenths,
    whose middles are entries, with both signs; 0 and 1 complete the 256.
    """
    middles = []
    for i in range(_DECADES):
        # Ends and middles are rounded to fp32 one by one, which is what fixes the last bit of each entry.
        ends = torch.linspace(0.1, 1, 2 ** (_DECADES - 1 - i) + 1, dtype=torch.float32, device="cpu")
        middles.append(10.0**-i * ((ends[1:] + ends[:-1]) / 2))
    positive = torch.cat(middles)
    return torch.cat([positive, -positive, positive.new_tensor([0.0, 1.0])]).sort().values


def nest(scales: Tensor, offset: float | None = None, block: int = BLOCK) -> NestedScales:
    """Quantize fp32 scales of any shape in blocks, to the codes of bitsandbytes' CPU kernel.

    Parameters
    ----------
    scales : Tensor
        fp32, on any device.
    offset : float or None
        What is subtracted from the scales first; None: their mean.
    block : int
        Scales that share an absmax.
    """
    # On the CPU whatever the device: there are few scales, and the roundings below are those of its kernel.
    flat = scales.detach().reshape(-1).float().cpu()
    if offset is None:
        # Summed exactly: the same mean on every device and for any number of threads.
        mean = math.fsum(flat.tolist()) / max(flat.numel(), 1)
        offset = float(torch.tensor(mean, dtype=torch.float32, device="cpu"))
    blocks = _in_blocks(flat - offset, block)
    absmax = blocks.abs().amax(-1)
    codes = _codes(blocks * (1.0 / torch.where(absmax == 0, 1.0, absmax))[:, None])
    codes[absmax == 0] = 0
    return NestedScales(
        codes=codes.reshape(-1)[: flat.numel()].contiguous().to(scales.device),
        table=dynamic_table().to(scales.device),
        absmax=absmax.to(scales.device),
        offset=offset,
        block=block,
    )


def renest(scales: Tensor, before: NestedScales) -> NestedScales:
    """Quantize scales that were quantized before, by the same blocks, as `nest`.

    Blocks in which no scale changed keep their codes, which `nest` of the decoded scales need not find again;
    the offset, which is one for all blocks, then stays too.

    Parameters
    ----------
    scales : Tensor
        fp32, as many as before, on the device of `before`.
    before : NestedScales
        What they were decoded from, or others since.
    """
    changed = _in_blocks(scales != decode(before, tuple(scales.shape)), before.block).any(-1)
    if not changed.any():
        return before
    if not torch.equal(before.table, dynamic_table().to(before.table.device)):
        changed = torch.ones_like(changed)  # no code of another table can stay
    fresh = nest(scales, None if changed.all() else before.offset, before.block)
    return replace(
        fresh,
        codes=torch.where(_of_scales(changed, before), fresh.codes, before.codes),
        absmax=torch.where(changed, fresh.absmax, before.absmax),
    )


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """``[blocks, block]`` of values of any shape, the last block filled up with zeros."""
    flat = values.reshape(-1)
    block = min(block, max(flat.numel(), 1))
    return pad(flat, (0, -flat.numel() % block)).reshape(-(-flat.numel() // block), block)


def _of_scales(of_blocks: Tensor, nested: NestedScales) -> Tensor:
    """Give each scale what its block has; a file may say that a block is longer than all of them."""
    count = nested.codes.numel()
    return of_blocks.repeat_interleave(min(nested.block, count))[:count]


def _codes(ratio: Tensor) -> Tensor:
    """uint8 codes of fp32 ratios on the CPU: of the entry nearest to the step that a ratio is rounded to."""
    table = dynamic_table()
    shifted = ((ratio.clamp(-1, 1) + 1) * 0.5).numpy()
    # In double, where the product is exact, so that it is rounded once with the sum.
    step = np.floor((shifted.astype(np.float64) * _STEPS + 0.5).astype(np.float32))
    codes = np.searchsorted(((table[1:] + table[:-1]) / 2).numpy(), step / _STEPS * 2 - 1)
    return torch.from_numpy(codes.astype(np.uint8))


def decode(nested: NestedScales, shape: tuple[int, ...]) -> Tensor:
    """fp32 scales of `shape`: ``table[codes] * absmax + offset``, each operation rounded once."""
    absmax = _of_scales(nested.absmax, nested)
    return (nested.table[nested.codes.long()] * absmax + nested.offset).reshape(shape)


def divisors(scales: Tensor) -> Tensor:
    """Scales to choose codes by: 1 where a scale is 0 and every code means 0."""
    return torch.where(scales == 0, 1.0, scales)
