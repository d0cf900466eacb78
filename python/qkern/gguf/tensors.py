"""`GGUFTensor`: the blocks of one tensor as they lie in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gguf_decode import gguf_decode
from qkern.ops.gguf_types import gguf_type

__all__ = ["GGUFTensor"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GGUFTensor:
    """A tensor in a GGUF type; K-quants have two-level scales, which `QuantizedWeight` does not hold.

    Parameters
    ----------
    raw : Tensor
        uint8 ``[bytes]``: the blocks, row by row.
    type : str
        For example ``"q4_k"``.
    shape : tuple of int
        As torch has it: the last dimension is the one that blocks run along.

    Raises
    ------
    InputError
        If the bytes do not fit type and shape.
    """

    raw: Tensor
    type: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        kind = gguf_type(self.type)
        K = self.shape[-1] if self.shape else 0
        expected = math.prod(self.shape[:-1]) * kind.row_bytes(K)
        if K % kind.block or self.raw.dtype != torch.uint8 or tuple(self.raw.shape) != (expected,):
            raise InputError(
                f"a {self.type} tensor {self.shape} has {expected} bytes in blocks of {kind.block} weights: "
                f"got {self.raw.dtype} {tuple(self.raw.shape)}"
            )

    def decode(self) -> Tensor:
        """Return the weights, fp32 of `shape`."""
        rows = math.prod(self.shape[:-1])
        return gguf_decode(self.raw.reshape(rows, -1), self.type).reshape(self.shape)
