"""The 4-bit codebooks, the one place in Python; csrc/include/qkern/codebooks.h holds the same numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

__all__ = ["CODEBOOK_CODES", "Codebook", "codebook"]

# Order is shared with qk::QuantizeArgs::codebook.
CODEBOOK_CODES: Final = {None: 0, "nf4": 1, "fp4": 2}

# QLoRA's NF4: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
_NF4: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4 of bitsandbytes, scaled to [-1, 1]: the low three bits choose a magnitude, bit 3 is the sign.
_FP4_MAGNITUDES: Final = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_FP4: Final = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))
_MINUS_ZERO: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codebook:
    """A table of 16 values and the rule that finds the nearest.

    Parameters
    ----------
    values : Tensor
        fp32 ``[16]``, by code.
    ordered : Tensor
        fp32, the values that can be chosen, ascending.
    thresholds : Tensor
        fp32, one fewer than `ordered`: the position of x is the number of thresholds that x is above.
    codes : Tensor
        uint8, the code of each position.
    """

    values: Tensor
    ordered: Tensor
    thresholds: Tensor
    codes: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """Position of the nearest of the ordered values, int64; NaN gives the last position."""
        return torch.bucketize(x.contiguous(), self.thresholds)


@functools.cache
def codebook(name: str, device: torch.device | None = None, *, both_zeros: bool = False) -> Codebook:
    """Return ``nf4`` or ``fp4``, on `device`.

    Parameters
    ----------
    name : str
        ``"nf4"`` or ``"fp4"``.
    device : torch.device or None
        None: the CPU.
    both_zeros : bool
        fp4 as bitsandbytes' CPU quantization has it: what lies above 0 and is nearest to it gets the code of
        minus zero, and a tie goes down, below zero too.
    """
    values = np.asarray(_NF4 if name == "nf4" else _FP4, dtype=np.float32)
    chosen = [code for code in range(16) if name == "nf4" or both_zeros or code != _MINUS_ZERO]
    codes = np.asarray(sorted(chosen, key=lambda code: float(values[code])), dtype=np.uint8)
    ordered = values[codes]
    thresholds = ((ordered[:-1].astype(np.float64) + ordered[1:]) / 2).astype(np.float32)
    if name == "fp4" and not both_zeros:
        # A tie goes to the smaller magnitude, as in bitsandbytes' CUDA kernel: below zero the midpoint counts
        # as above.
        below = np.nextafter(thresholds, np.float32(-np.inf))
        thresholds = np.where(thresholds < 0, below, thresholds)
    return Codebook(
        values=torch.from_numpy(values).to(device),
        ordered=torch.from_numpy(ordered).to(device),
        thresholds=torch.from_numpy(thresholds).to(device),
        codes=torch.from_numpy(codes).to(device),
    )
