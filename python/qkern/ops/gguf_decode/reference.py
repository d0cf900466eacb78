"""gguf_decode in plain torch; reads like the formulas of gguf_blocks.h, runs on any device.

Each decoder takes uint8 blocks ``[B, bytes]`` and returns fp32 ``[B, weights]``. Products are rounded in
the written order, so the bits equal those of every other decoder of the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from qkern.ops.gguf_types import GGUFType

__all__ = ["decode"]


def _half(blocks: Tensor, offset: int) -> Tensor:
    """Read the fp16 at a byte offset, as fp32 ``[B, 1]``."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor, run: int) -> Tensor:
    """Bytes in runs: low nibbles of a run, then its high nibbles."""
    runs = qs.reshape(qs.shape[0], -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), dim=2).reshape(qs.shape[0], -1)


def _bits32(qh: Tensor) -> Tensor:
    """Bits of four bytes, least significant first: ``[B, 32]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=qh.device)
    return (qh.unsqueeze(-1) >> shifts & 1).reshape(qh.shape[0], 32)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:18], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:20], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:22], 16) | _bits32(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:24], 16) | _bits32(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


_IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_values(qs: Tensor) -> Tensor:
    """Look up what the nibbles of runs of sixteen bytes stand for, as fp32."""
    table = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=qs.device)
    return table[_nibbles(qs, 16).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _iq4_values(blocks[:, 2:18])


def _iq4_xs(blocks: Tensor) -> Tensor:
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).reshape(-1, 8)
    high = (blocks[:, 2:4].unsqueeze(-1) >> pairs & 3).reshape(-1, 8)
    step = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return (step.unsqueeze(-1) * _iq4_values(blocks[:, 8:]).reshape(-1, 8, 32)).reshape(-1, 256)


def _quads(qs: Tensor) -> Tensor:
    """Bit pairs of two runs of 32 bytes: the lowest pairs of a run, then its next ones."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=qs.device).reshape(1, 1, 4, 1)
    return (qs.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    step = (_half(blocks, 80) * (scales & 15).float()).unsqueeze(-1)
    offset = (_half(blocks, 82) * (scales >> 4).float()).unsqueeze(-1)
    return (step * _quads(blocks[:, 16:80]).float().reshape(-1, 16, 16) - offset).reshape(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).reshape(1, 4, 1)
    low = torch.cat((blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4), dim=1)
    high = (blocks[:, 104:108].unsqueeze(1) >> pairs & 3).reshape(-1, 16)
    step = _half(blocks, 108) * ((low | high << 4).float() - 32)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).reshape(1, 8, 1)
    third = (blocks[:, :32].unsqueeze(1) >> bits & 1).reshape(-1, 256)
    codes = _quads(blocks[:, 32:96]) | third << 2
    return (step.unsqueeze(-1) * (codes.float().reshape(-1, 16, 16) - 4)).reshape(-1, 256)


def _six_bit(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima ``[B, 8]`` of the twelve bytes of Q4_K and Q5_K."""
    first, second, third = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minimum = torch.cat((second & 63, third >> 4 | (second >> 6) << 4), dim=1)
    return scale.float(), minimum.float()


def _affine_super(blocks: Tensor, codes: Tensor) -> Tensor:
    scale, minimum = _six_bit(blocks[:, 4:16])
    step = (_half(blocks, 0) * scale).unsqueeze(-1)
    offset = (_half(blocks, 2) * minimum).unsqueeze(-1)
    return (step * codes.float().reshape(-1, 8, 32) - offset).reshape(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine_super(blocks, _nibbles(blocks[:, 16:144], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).reshape(1, 8, 1)
    fifth = (blocks[:, 16:48].unsqueeze(1) >> shifts & 1).reshape(-1, 256)
    return _affine_super(blocks, _nibbles(blocks[:, 48:176], 32) | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)
    codes = _nibbles(blocks[:, :128], 64) | high << 4
    step = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (step.unsqueeze(-1) * (codes.float().reshape(-1, 16, 16) - 32)).reshape(-1, 256)


_DECODERS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
    "f16": lambda blocks: blocks.view(torch.float16).float(),
    "bf16": lambda blocks: blocks.view(torch.bfloat16).float(),
}


def decode(rows: Tensor, kind: GGUFType) -> Tensor:
    """Decode contiguous uint8 ``[N, bytes]``; arguments are validated by the caller."""
    N, count = rows.shape[0], rows.shape[1] // kind.bytes
    if N * count == 0:
        return rows.new_empty(N, count * kind.block, dtype=torch.float32)
    return _DECODERS[kind.name](rows.reshape(N * count, kind.bytes)).reshape(N, count * kind.block)
