"""Codes, scales and zero points back to weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.dequantize_groupwise import cpu, cuda, reference, triton
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight

__all__ = ["dequantize_groupwise", "dequantize_rows"]

register(
    Implementation(
        op="dequantize_groupwise",
        backend=Backend.REFERENCE,
        call=reference.dequantize,
        why_not=lambda request: None,
    )
)
register(
    Implementation(op="dequantize_groupwise", backend=Backend.CPU, call=cpu.dequantize, why_not=cpu.why_not)
)
register(
    Implementation(
        op="dequantize_groupwise", backend=Backend.CUDA, call=cuda.dequantize, why_not=cuda.why_not
    )
)
register(
    Implementation(
        op="dequantize_groupwise", backend=Backend.TRITON, call=triton.dequantize, why_not=triton.why_not
    )
)


def _check_index(qw: QuantizedWeight) -> None:
    index, groups = qw.group_index, qw.scales.shape[-1]
    if index is not None and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise InputError(
            f"group_index must lie in 0..{groups - 1}, the columns of scales: "
            f"got {int(index.min())}..{int(index.max())}"
        )


def dequantize_groupwise(
    qw: QuantizedWeight, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> Tensor:
    """Compute the weights that a `QuantizedWeight` stands for.

    ``(q - z) * s`` (or ``q * s + m``, or ``table[q] * s``) in fp32, each operation rounded once, then
    rounded to `dtype`. NaN and Inf in scales propagate.

    Parameters
    ----------
    qw : QuantizedWeight
        The weight.
    dtype : torch.dtype
        fp32, fp16 or bf16.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    Tensor
        ``[N, K]`` or ``[E, N, K]`` of `dtype`; the same bits from every backend, but that a NaN may be any.

    Raises
    ------
    InputError
        On another dtype, a group index out of range, or what is no `QuantizedWeight`.
    """
    if not isinstance(qw, QuantizedWeight):
        raise InputError(
            f"qw must be a QuantizedWeight, as quantize_groupwise returns: got {type(qw).__name__}"
        )
    if dtype not in FLOAT_DTYPES:
        raise InputError(f"dtype must be fp32, fp16 or bf16: got {dtype}")
    _check_index(qw)
    request = Request(device=qw.device, scheme=qw.scheme, dtype=dtype)
    result: Tensor = select("dequantize_groupwise", backend, request).call(qw, dtype)
    return result


def dequantize_rows(qw: QuantizedWeight, begin: int, end: int, out: Tensor) -> Tensor:
    """Write some rows of the weight into a caller's buffer, with the native CPU kernels.

    Parameters
    ----------
    qw : QuantizedWeight
        The weight, ``[N, K]``, on the CPU; its group index is not checked again.
    begin, end : int
        Rows, ``0 <= begin <= end <= N``.
    out : Tensor
        fp32, fp16 or bf16 ``[end - begin, K]``, columns adjacent, any row stride.

    Returns
    -------
    Tensor
        `out`.

    Raises
    ------
    InputError
        If rows or buffer do not fit.
    """
    if len(qw.shape) != 2 or not 0 <= begin <= end <= qw.N:
        raise InputError(f"rows must lie in a matrix [N, K]: got {begin}..{end} of {qw.shape}")
    shape = (end - begin, qw.K)
    if (
        tuple(out.shape) != shape
        or out.dtype not in FLOAT_DTYPES
        or (out.shape[1] > 1 and out.stride(1) != 1)
    ):
        raise InputError(
            f"out must be fp32, fp16 or bf16 {shape} with adjacent columns: "
            f"got {out.dtype} {tuple(out.shape)}, strides {out.stride()}"
        )
    cpu.dequantize_into(qw, begin, end if qw.K else begin, out, out.stride(0))
    return out
