"""Activations to symmetric int8, a scale a token or a token and group."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.quantize_activations import cpu, cuda, reference, schema, triton
from qkern.ops.registry import Backend, Implementation, register
from qkern.schemes import FLOAT_DTYPES

__all__ = ["quantize_activations"]

register(
    Implementation(
        op="quantize_activations",
        backend=Backend.REFERENCE,
        call=reference.quantize,
        why_not=lambda request: None,
    )
)
register(
    Implementation(op="quantize_activations", backend=Backend.CPU, call=cpu.quantize, why_not=cpu.why_not)
)
register(
    Implementation(op="quantize_activations", backend=Backend.CUDA, call=cuda.quantize, why_not=cuda.why_not)
)
register(
    Implementation(
        op="quantize_activations", backend=Backend.TRITON, call=triton.quantize, why_not=triton.why_not
    )
)


def quantize_activations(
    x: Tensor,
    *,
    group_size: int | None = None,
    scale: float | Tensor | None = None,
    zero: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8.

    A scale a token (and group): ``q = clamp(rint(x / s), -127, 127)`` with ``s = max|x| / 127``. With a scale
    that calibration found: ``q = clamp(rint(x / scale) + zero, -128, 127)``.

    Parameters
    ----------
    x : Tensor
        fp32, fp16 or bf16 ``[..., K]``, any strides.
    group_size : int or None
        Columns that share a scale (the last group may be shorter); None: one scale a token.
    scale : float, Tensor or None
        The one scale of every token, above 0: a number, or an fp32 tensor of one element; excludes
        `group_size`.
    zero : int
        Zero point that goes with `scale`, -128..127.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    codes : Tensor
        int8 ``[..., K]``.
    scales : Tensor
        fp32 ``[..., groups]``; 0 for a group of zeros. A group with a NaN or Inf has the scale NaN or Inf (a
        token with one, NaN, when `scale` is given), so that products with its codes are not finite either.

    Raises
    ------
    InputError
        On a wrong dtype, no dimension, a group size below 1, or a scale or zero point that does not fit.
    """
    if x.dtype not in FLOAT_DTYPES or x.dim() == 0:
        raise InputError(f"x must be fp32, fp16 or bf16 [..., K]: got {x.dtype} {tuple(x.shape)}; convert it")
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size must be at least 1: got {group_size}; None gives one scale a token")
    given = _given_scale(x, scale, zero, group_size)
    if backend == "auto":
        result: tuple[Tensor, Tensor] = torch.ops.qkern.quantize_activations(x, group_size, given, zero)
        return result
    return schema.run(x, group_size, given, zero, backend)


def _given_scale(x: Tensor, scale: float | Tensor | None, zero: int, group_size: int | None) -> Tensor | None:
    """Check a static scale and make it an fp32 tensor of one element."""
    if scale is None:
        if zero != 0:
            raise InputError(f"a zero point goes with a scale: got zero={zero} alone; pass scale too")
        return None
    if group_size is not None:
        raise InputError(f"scale is one for all, which excludes group_size: got group_size={group_size}")
    if not -128 <= zero <= 127:
        raise InputError(f"zero must lie in -128..127: got {zero}")
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x.device:
            raise InputError(
                f"scale must be fp32 of one element on {x.device}: "
                f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
            )
        return scale.detach()
    if not 0.0 < scale < float("inf"):
        raise InputError(f"scale must be above 0 and finite: got {scale}")
    return torch.full((1,), scale, dtype=torch.float32, device=x.device)
