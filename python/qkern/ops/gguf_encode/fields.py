"""The numbers inside GGUF blocks: codes, scales and minima, apart and back together without loss.

A weight of every type here is ``(d * scale) * (code - zero) - dmin * minimum``, each product and difference
rounded once, which is how the format decodes it. In blocks of 256 weights scales and minima are small
integers, and ``d`` and ``dmin`` their fp16 units. In blocks of 32 the fp16 numbers themselves are scale and
minimum; the units are 1 and, because the offset is added there, -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "BlockFields", "BlockLayout", "read_fields", "write_fields"]


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of some of a block's numbers.

    The bytes lie in runs. Of byte i of run r the field s, the bits from ``shifts[s]`` on, belongs to number
    ``first + (r * len(shifts) + s) * run + i``, there moved up by `up`.

    Parameters
    ----------
    offset, bytes : int
        Where they lie in the block.
    shifts : tuple of int
        Where the fields begin in a byte.
    width : int
        Bits of a field.
    run : int
        Bytes of a run.
    first : int
        The first number.
    up : int
        Where the bits belong in the number.
    flip : int
        What the bytes are xored with: 128 where they are signed.
    """

    offset: int
    bytes: int
    shifts: tuple[int, ...]
    width: int
    run: int
    first: int = 0
    up: int = 0
    flip: int = 0

    def _numbers(self) -> slice:
        return slice(self.first, self.first + self.bytes * len(self.shifts))

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.tensor(self.shifts, dtype=torch.uint8, device=device)[:, None]

    def read(self, blocks: Tensor, numbers: Tensor) -> None:
        """Add these bits to uint8 `numbers` ``[B, count]``, which hold none yet."""
        runs = blocks[:, self.offset : self.offset + self.bytes] ^ self.flip
        runs = runs.reshape(len(blocks), self.bytes // self.run, 1, self.run)
        fields = runs >> self._shifts(blocks.device) & (1 << self.width) - 1
        numbers[:, self._numbers()] |= fields.flatten(1) << self.up

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        """Add these bits of `numbers` to uint8 `blocks` ``[B, bytes]``, which hold none yet."""
        fields = numbers[:, self._numbers()] >> self.up & (1 << self.width) - 1
        fields = fields.reshape(len(blocks), self.bytes // self.run, len(self.shifts), self.run)
        runs = (fields << self._shifts(blocks.device)).sum(2, dtype=torch.uint8)
        blocks[:, self.offset : self.offset + self.bytes] |= runs.flatten(1) ^ self.flip


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """The grid of a type, and where its blocks keep their numbers.

    Parameters
    ----------
    block, bytes : int
        Weights and bytes of a block.
    group : int
        Weights that share a scale.
    bits, zero : int
        Bits of a code, and the code that stands for 0 before the minimum is taken away.
    codes : tuple of Plane
        The codes.
    d : int
        Byte of the fp16 ``d``.
    dmin : int or None
        Byte of the fp16 ``dmin``; None where there are no minima.
    scales : tuple of Plane
        Integer scales, and minima if there are any; empty: ``d`` and ``dmin`` are what they would be.
    scale_run : int
        Scales, then as many minima, then the next scales.
    lowest, highest : int
        Range of the integer scales. That of the minima begins at 0.
    """

    block: int
    bytes: int
    group: int
    bits: int
    zero: int
    codes: tuple[Plane, ...]
    d: int = 0
    dmin: int | None = None
    scales: tuple[Plane, ...] = ()
    scale_run: int = 0
    lowest: int = 0
    highest: int = 0

    @property
    def codebook(self) -> None:
        """None: codes are evenly spaced."""
        return

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockFields:
    """The numbers of B blocks with G groups each.

    Parameters
    ----------
    codes : Tensor
        uint8 ``[B, block]``.
    scales : Tensor
        fp32 ``[B, G]``, integers where the type has a unit for them.
    minima : Tensor or None
        fp32 ``[B, G]`` like the scales; None where there are none.
    d, dmin : Tensor
        fp32 ``[B, 1]``, the units.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    d: Tensor
    dmin: Tensor

    def values(self, layout: BlockLayout) -> Tensor:
        """Return fp32 ``[B, block]``: what the codes stand for, bit for bit what `gguf_decode` gives."""
        levels = self.codes.reshape(*self.scales.shape, layout.group).to(torch.float32) - layout.zero
        values = (self.d * self.scales)[..., None] * levels
        if self.minima is not None:
            values = values - (self.dmin * self.minima)[..., None]
        return values.reshape(self.codes.shape)


_QUARTERS: Final = (0, 2, 4, 6)
_SINGLE: Final = tuple(range(8))
# Twelve bytes, read as scale[0..3], min[0..3], scale[4..7], min[4..7]: the first eight hold six bits of the
# first half and the top two of the second, whose other bits are nibbles of the last four.
_SIX_BIT: Final = (
    Plane(4, 8, (0,), 4, 8),
    Plane(12, 4, (0, 4), 4, 4, first=8),
    Plane(4, 8, (4, 6), 2, 8, up=4),
)

LAYOUTS: Final[dict[str, BlockLayout]] = {
    "q4_0": BlockLayout(block=32, bytes=18, group=32, bits=4, zero=8, codes=(Plane(2, 16, (0, 4), 4, 16),)),
    "q4_1": BlockLayout(
        block=32, bytes=20, group=32, bits=4, zero=0, codes=(Plane(4, 16, (0, 4), 4, 16),), dmin=2
    ),
    "q5_0": BlockLayout(
        block=32,
        bytes=22,
        group=32,
        bits=5,
        zero=16,
        codes=(Plane(6, 16, (0, 4), 4, 16), Plane(2, 4, _SINGLE, 1, 1, up=4)),
    ),
    "q5_1": BlockLayout(
        block=32,
        bytes=24,
        group=32,
        bits=5,
        zero=0,
        codes=(Plane(8, 16, (0, 4), 4, 16), Plane(4, 4, _SINGLE, 1, 1, up=4)),
        dmin=2,
    ),
    "q8_0": BlockLayout(
        block=32, bytes=34, group=32, bits=8, zero=128, codes=(Plane(2, 32, (0,), 8, 32, flip=128),)
    ),
    "q2_k": BlockLayout(
        block=256,
        bytes=84,
        group=16,
        bits=2,
        zero=0,
        codes=(Plane(16, 64, _QUARTERS, 2, 32),),
        d=80,
        dmin=82,
        scales=(Plane(0, 16, (0, 4), 4, 16),),
        scale_run=16,
        highest=15,
    ),
    "q3_k": BlockLayout(
        block=256,
        bytes=110,
        group=16,
        bits=3,
        zero=4,
        codes=(Plane(32, 64, _QUARTERS, 2, 32), Plane(0, 32, _SINGLE, 1, 32, up=2)),
        d=108,
        scales=(Plane(96, 8, (0, 4), 4, 8), Plane(104, 4, _QUARTERS, 2, 4, up=4)),
        scale_run=16,
        lowest=-32,
        highest=31,
    ),
    "q4_k": BlockLayout(
        block=256,
        bytes=144,
        group=32,
        bits=4,
        zero=0,
        codes=(Plane(16, 128, (0, 4), 4, 32),),
        dmin=2,
        scales=_SIX_BIT,
        scale_run=4,
        highest=63,
    ),
    "q5_k": BlockLayout(
        block=256,
        bytes=176,
        group=32,
        bits=5,
        zero=0,
        codes=(Plane(48, 128, (0, 4), 4, 32), Plane(16, 32, _SINGLE, 1, 32, up=4)),
        dmin=2,
        scales=_SIX_BIT,
        scale_run=4,
        highest=63,
    ),
    "q6_k": BlockLayout(
        block=256,
        bytes=210,
        group=16,
        bits=6,
        zero=32,
        codes=(Plane(0, 128, (0, 4), 4, 64), Plane(128, 64, _QUARTERS, 2, 32, up=4)),
        d=208,
        scales=(Plane(192, 16, (0,), 8, 16, flip=128),),
        scale_run=16,
        lowest=-128,
        highest=127,
    ),
}
"""The types whose codes can be chosen one by one: each group has evenly spaced values."""


def read_fields(blocks: Tensor, layout: BlockLayout) -> BlockFields:
    """Take blocks apart.

    Parameters
    ----------
    blocks : Tensor
        uint8 ``[B, bytes]``.
    layout : BlockLayout
        Of their type.
    """
    B, G = len(blocks), layout.groups
    codes = blocks.new_zeros(B, layout.block)
    for plane in layout.codes:
        plane.read(blocks, codes)
    d = _read_half(blocks, layout.d)
    dmin = torch.zeros_like(d) if layout.dmin is None else _read_half(blocks, layout.dmin)
    if not layout.scales:
        one = torch.ones_like(d)
        minima = None if layout.dmin is None else dmin
        return BlockFields(codes=codes, scales=d, minima=minima, d=one, dmin=-one)
    kinds = 1 if layout.dmin is None else 2
    packed = blocks.new_zeros(B, kinds * G)
    for plane in layout.scales:
        plane.read(blocks, packed)
    numbers = packed.reshape(B, G // layout.scale_run, kinds, layout.scale_run).transpose(1, 2)
    numbers = numbers.flatten(2).to(torch.float32)
    minima = None if layout.dmin is None else numbers[:, 1]
    return BlockFields(codes=codes, scales=numbers[:, 0] + layout.lowest, minima=minima, d=d, dmin=dmin)


def write_fields(fields: BlockFields, layout: BlockLayout) -> Tensor:
    """Put blocks together, uint8 ``[B, bytes]``; the numbers must be ones that the type holds."""
    B = len(fields.codes)
    blocks = fields.codes.new_zeros(B, layout.bytes)
    for plane in layout.codes:
        plane.write(blocks, fields.codes)
    if not layout.scales:
        _write_half(blocks, layout.d, fields.scales)
        if layout.dmin is not None and fields.minima is not None:
            _write_half(blocks, layout.dmin, fields.minima)
        return blocks
    numbers = [fields.scales - layout.lowest]
    _write_half(blocks, layout.d, fields.d)
    if layout.dmin is not None and fields.minima is not None:
        _write_half(blocks, layout.dmin, fields.dmin)
        numbers.append(fields.minima)
    packed = torch.stack(numbers, 1).to(torch.uint8)
    packed = packed.reshape(B, len(numbers), layout.groups // layout.scale_run, layout.scale_run)
    packed = packed.transpose(1, 2).flatten(1)
    for plane in layout.scales:
        plane.write(blocks, packed)
    return blocks


def _read_half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _write_half(blocks: Tensor, at: int, numbers: Tensor) -> None:
    blocks[:, at : at + 2] = numbers.to(torch.float16).contiguous().view(torch.uint8)
