"""nf4, fp4 and w8a8 as bitsandbytes 0.50 quantizes them on a CPU, bit for bit, in plain torch on any device.

The other searches round a scale to the dtype it is stored in before they choose codes. Here codes are chosen
by the largest magnitude itself, whose reciprocal multiplies the weights, and the scales are quantized (``d``)
after that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from qkern.errors import InputError
from qkern.ops._scratch import pieces
from qkern.ops.codebooks import codebook
from qkern.ops.pack_bits.reference import pack_dense
from qkern.ops.quantize_groupwise.nested import decode, nest
from qkern.ops.quantize_groupwise.reference import NON_FINITE_MESSAGE, row_bytes, split_groups
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantize"]

_INT8: Final = Scheme(bits=8, act_bits=8)
_TOP: Final = 127
_SMALLEST: Final = 1e-38
"""Least divisor of a group's weights."""


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``; the scales are fp32, and 0 in a group of zeros.

    Raises
    ------
    InputError
        On another scheme than w8a8 or a codebook in groups or per channel, or NaN or Inf in the weight; of
        w8a8 in the weight as fp16, which bitsandbytes makes of it first.
    """
    int8 = scheme == _INT8
    if not int8 and (scheme.codebook is None or scheme.per_tensor):
        raise InputError(
            f"search='absmax' is that of w8a8, nf4 and fp4, not per tensor: got {scheme}; use 'minmax' or "
            "'mse'"
        )
    *experts, N, K = weight.shape
    rows = weight.reshape((experts[0] if experts else 1) * N, K)
    scales = torch.empty(len(rows), scheme.num_groups(K), dtype=torch.float32, device=weight.device)
    codes = torch.empty(len(rows), scheme.code_words(K), dtype=torch.int32, device=weight.device)
    for part in pieces(len(rows), row_bytes(scheme, K)):
        groups = split_groups(rows[part].to(torch.float16) if int8 else rows[part], scheme)
        if not groups.isfinite().all():
            raise InputError(NON_FINITE_MESSAGE)
        largest = groups.abs().amax(-1)
        scales[part] = largest / largest.new_tensor(_TOP if int8 else 1)
        chosen = _round(groups, largest) if int8 else _nearest(groups, largest, str(scheme.codebook))
        codes[part] = pack_dense(chosen.flatten(1)[:, :K], scheme.bits)
    nested = None
    if scheme.double_quant:
        # The mean of torch and not an exact one: that is what is subtracted there.
        nested = nest(scales, float(scales.cpu().mean()) if scales.numel() else 0.0)
        scales = decode(nested, tuple(scales.shape))
    return QuantizedWeight(
        codes=codes.reshape(*experts, N, scheme.code_words(K)),
        scales=scales.reshape(*experts, *scheme.scale_shape(N, K)),
        shape=tuple(weight.shape),
        scheme=scheme,
        nested=nested,
    )


def _nearest(groups: Tensor, largest: Tensor, name: str) -> Tensor:
    """Codes of the entries of a codebook, uint8."""
    book = codebook(name, groups.device, both_zeros=True)
    ratio = (groups * (1.0 / largest.clamp(min=_SMALLEST))[..., None]).clamp(-1, 1)
    return book.codes[book.nearest(ratio)]


def _round(groups: Tensor, largest: Tensor) -> Tensor:
    """Codes of integers from -127 to 127, uint8."""
    steps = groups * (_TOP / torch.where(largest == 0, 1.0, largest))[..., None]
    return (steps.round() + _INT8.midpoint).to(torch.uint8)
