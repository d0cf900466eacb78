"""Double quantization (``d``): the scales of a weight as 8-bit codes of a table."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final

import torch

from qkern.schemes import NestedScales

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode", "divisors", "dynamic_table", "nest"]

BLOCK: Final = 256
"""Scales that share an absmax."""
_DECADES: Final = 7


@functools.cache
def dynamic_table() -> Tensor:
    """fp32 ``[256]``, ascending: bitsandbytes' dynamic 8-bit numbers in [-1, 1].

    The decade that ends at ``10**-i`` is cut into ``2**(6 - i)`` equal pieces of its upper nine tenths,
    whose middles are entries, with both signs; 0 and 1 complete the 256.
    """
    middles = []
    for i in range(_DECADES):
        pieces = 2 ** (_DECADES - 1 - i)
        middles += [10.0**-i * (0.1 + 0.9 * (piece + 0.5) / pieces) for piece in range(pieces)]
    return torch.tensor(
        sorted([*middles, *(-x for x in middles), 0.0, 1.0]), dtype=torch.float32, device="cpu"
    )


def nest(scales: Tensor) -> NestedScales:
    """Quantize fp32 scales of any shape, relative to their mean, in blocks of `BLOCK`."""
    flat = scales.reshape(-1).float()
    # Summed exactly: the same mean on every device and for any number of threads.
    mean = math.fsum(flat.tolist()) / max(flat.numel(), 1)
    offset = float(torch.tensor(mean, dtype=torch.float32, device="cpu"))
    centred = flat - offset
    blocks = torch.nn.functional.pad(centred, (0, -flat.numel() % BLOCK)).reshape(
        -(-flat.numel() // BLOCK), BLOCK
    )
    absmax = blocks.abs().amax(-1)
    table = dynamic_table().to(scales.device)
    ratio = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = torch.bucketize(ratio, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return NestedScales(
        codes=codes.reshape(-1)[: flat.numel()].contiguous(),
        table=table,
        absmax=absmax,
        offset=offset,
        block=BLOCK,
    )


def decode(nested: NestedScales, shape: tuple[int, ...]) -> Tensor:
    """fp32 scales of `shape`: ``table[codes] * absmax + offset``, each operation rounded once."""
    absmax = nested.absmax.repeat_interleave(nested.block)[: nested.codes.numel()]
    return (nested.table[nested.codes.long()] * absmax + nested.offset).reshape(shape)


def divisors(scales: Tensor) -> Tensor:
    """Scales to choose codes by: 1 where a scale is 0 and every code means 0."""
    return torch.where(scales == 0, 1.0, scales)
