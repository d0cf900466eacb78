"""quantize_groupwise on Triton: the min-max grid; the MSE search is the reference's."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _triton
from qkern.ops.codebooks import codebook
from qkern.ops.quantize_groupwise import reference
from qkern.ops.quantize_groupwise.nested import decode, divisors, nest
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["quantize", "why_not"]

logger = logging.getLogger(__name__)

_ROWS = 8
_ELEMENTS = 2048


def why_not(request: Request) -> str | None:
    """Why the kernels cannot serve the request; None if they can."""
    return _triton.why_not_triton(request.device)


@functools.cache
def _say_once(message: str) -> None:
    logger.info("%s", message)


def _ranges(rows: Tensor, length: int, groups: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, fp32 ``[R, groups]``, 0 included."""
    R, K = rows.shape
    low = torch.empty(R, groups, dtype=torch.float32, device=rows.device)
    high = torch.empty_like(low)
    if low.numel() == 0 or K == 0:
        return low.zero_(), high.zero_()
    block = min(1 << (length - 1).bit_length(), 1024)
    together, steps = _ELEMENTS // block, -(-length // block)
    with _triton.on_device(rows.device):
        _triton.kernels("quantize_groupwise").ranges[(-(-low.numel() // together),)](
            rows,
            rows.stride(0),
            rows.stride(1),
            low,
            high,
            low.numel(),
            K,
            length,
            groups,
            steps,
            STEPS=steps if _triton.interpreted(rows.device) else 0,
            BG=together,
            BL=block,
        )
    return low, high


def _grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (fp32, rounded to `scale_dtype`) and zero point of each group, as the reference has them."""
    if not torch.isfinite(low).all():
        raise InputError(reference.NON_FINITE_MESSAGE)
    # Divided by a tensor: on a GPU torch multiplies by the reciprocal of a number.
    if scheme.zero_point:
        span = (high - low) / torch.full_like(low, scheme.levels - 1)
    else:
        span = torch.maximum(high, -low) / torch.full_like(
            low, 1.0 if scheme.codebook else scheme.midpoint - 0.5
        )
    scale = span.to(scale_dtype).float()
    if torch.isinf(scale).any():
        raise InputError(reference.scale_overflow_message(scale_dtype))
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).round().clamp(0, scheme.levels - 1) if scheme.zero_point else torch.zeros_like(low)
    return scale, zero.to(torch.uint8)


def _encode(rows: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, rows_per_scale: int) -> Tensor:
    """Codes of ``[R, K]`` on a grid ``[ceil(R / rows_per_scale), groups]``."""
    R, K = rows.shape
    codes = torch.empty(R, scheme.code_words(K), dtype=torch.int32, device=rows.device)
    if codes.numel() == 0:
        return codes
    width = 64
    book = None if scheme.codebook is None else codebook(scheme.codebook, rows.device)
    with _triton.on_device(rows.device):
        _triton.kernels("quantize_groupwise").encode[(-(-R // _ROWS), -(-codes.shape[1] // width))](
            rows,
            rows.stride(0),
            rows.stride(1),
            scales,
            zeros,
            # What a kernel does not read still needs an address.
            scales if book is None else book.thresholds,
            scales if book is None else book.codes,
            codes,
            R,
            K,
            codes.shape[1],
            scheme.group_length(K),
            scales.shape[1],
            rows_per_scale,
            BITS=scheme.bits,
            MODE=2 if book is not None else 1 if scheme.zero_point else 0,
            THRESHOLDS=0 if book is None else book.thresholds.numel(),
            BR=_ROWS,
            BW=width,
            enable_fp_fusion=False,
        )
    return codes


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None,
    search: str,
    scale_dtype: torch.dtype,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``; arguments are validated by the caller."""
    if search != "minmax":
        _say_once(f"quantize_groupwise has no Triton kernel for search={search!r}: the reference runs it")
        return reference.quantize(
            weight, scheme, importance=importance, search=search, scale_dtype=scale_dtype
        )
    *experts, N, K = weight.shape
    E = experts[0] if experts else 1
    rows = weight.reshape(E * N, K)
    shape = (*experts, *scheme.scale_shape(N, K))
    if scales is None:
        scale_dtype = torch.float32 if scheme.double_quant else scale_dtype
        low, high = _ranges(rows, max(scheme.group_length(K), 1), scheme.num_groups(K))
        if scheme.per_tensor:
            # 0 is in every range, so a matrix without rows has one too. NaN stays NaN.
            low = torch.cat([low.view(E, N), low.new_zeros(E, 1)], 1).amin(1, keepdim=True)
            high = torch.cat([high.view(E, N), high.new_zeros(E, 1)], 1).amax(1, keepdim=True)
        scale, zero = _grid(low, high, scheme, scale_dtype)
    else:
        # The kernel reads no zero points where the scheme has none.
        scale_dtype, scale = scales.dtype, scales.flatten(0, -2).float()
        zero = scale if zeros is None else zeros.flatten(0, -2).contiguous()
    nested = None
    if scheme.double_quant:
        nested = nest(scale)
        scale = decode(nested, tuple(scale.shape))
    codes = _encode(rows, divisors(scale).contiguous(), zero, scheme, max(N, 1) if scheme.per_tensor else 1)
    return QuantizedWeight(
        codes=codes.view(*experts, N, scheme.code_words(K)),
        scales=scale.to(scale_dtype).reshape(shape),
        zeros=zero.reshape(shape) if scheme.zero_point else None,
        shape=tuple(weight.shape),
        scheme=scheme,
        nested=nested,
    )
