"""Weights to codes, scales and zero points on a grid a group."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.quantize_groupwise import cpu, reference
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme, as_scheme

__all__ = ["quantize_groupwise"]

register(
    Implementation(
        op="quantize_groupwise", backend=Backend.REFERENCE, call=reference.quantize, why_not=lambda request: None
    )
)
register(
    Implementation(op="quantize_groupwise", backend=Backend.CPU, call=cpu.quantize, why_not=cpu.why_not)
)


def quantize_groupwise(
    weight: Tensor,
    scheme: Scheme | str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    backend: str = "auto",
) -> QuantizedWeight:
    """Quantize a weight matrix on the grid of its scheme.

    Parameters
    ----------
    weight : Tensor
        fp32, fp16 or bf16 ``[N, K]``, any strides.
    scheme : Scheme or str
        For example ``"w4g128"``.
    scale_dtype : torch.dtype
        Dtype in which the scales are stored; codes are chosen against the rounded scale.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    QuantizedWeight
        The same bits from every backend.

    Raises
    ------
    InputError
        On a wrong shape or dtype, or on NaN or Inf in the weight.
    """
    scheme = as_scheme(scheme)
    if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"weight must be a fp32, fp16 or bf16 matrix [N, K]: got {weight.dtype} {tuple(weight.shape)}"
        )
    if scale_dtype not in FLOAT_DTYPES:
        raise InputError(f"scale_dtype must be fp32, fp16 or bf16: got {scale_dtype}")
    request = Request(device=weight.device, scheme=scheme, dtype=weight.dtype)
    implementation = select("quantize_groupwise", backend, request)
    result: QuantizedWeight = implementation.call(weight, scheme, scale_dtype)
    return result
