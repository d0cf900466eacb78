"""Activations to symmetric int8, a scale a token or a token and group."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.quantize_activations import cpu, reference, schema
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


def quantize_activations(
    x: Tensor, *, group_size: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8: ``q = clamp(rint(x / s), -127, 127)`` with ``s = max|x| / 127``.

    Parameters
    ----------
    x : Tensor
        fp32, fp16 or bf16 ``[..., K]``, any strides.
    group_size : int or None
        Columns that share a scale (the last group may be shorter); None: one scale a token.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    codes : Tensor
        int8 ``[..., K]``.
    scales : Tensor
        fp32 ``[..., groups]``; 0 for a group of zeros. A group with a NaN or Inf has the scale NaN or Inf, so
        that products with its codes are not finite either.

    Raises
    ------
    InputError
        On a wrong dtype, no dimension, or a group size below 1.
    """
    if x.dtype not in FLOAT_DTYPES or x.dim() == 0:
        raise InputError(f"x must be fp32, fp16 or bf16 [..., K]: got {x.dtype} {tuple(x.shape)}; convert it")
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size must be at least 1: got {group_size}; None gives one scale a token")
    if backend == "auto":
        result: tuple[Tensor, Tensor] = torch.ops.qkern.quantize_activations(x, group_size)
        return result
    return schema.run(x, group_size, backend)
