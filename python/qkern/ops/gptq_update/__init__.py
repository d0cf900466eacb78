"""One column block of GPTQ: quantize a column, spread its error over those behind it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gptq_update import cpu, cuda, reference, triton
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import BITS, CODEBOOKS

__all__ = ["MAX_COLUMNS", "gptq_update"]

MAX_COLUMNS: Final = 1024
"""Widest block; the native kernels keep sixteen rows of it on the stack."""

register(
    Implementation(
        op="gptq_update", backend=Backend.REFERENCE, call=reference.update, why_not=lambda request: None
    )
)
register(Implementation(op="gptq_update", backend=Backend.CPU, call=cpu.update, why_not=cpu.why_not))
register(Implementation(op="gptq_update", backend=Backend.CUDA, call=cuda.update, why_not=cuda.why_not))
register(Implementation(op="gptq_update", backend=Backend.TRITON, call=triton.update, why_not=triton.why_not))


def gptq_update(
    weight: Tensor,
    hinv: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_index: Tensor,
    *,
    bits: int,
    codebook: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize a block of columns in order, each correcting the columns behind it.

    For column j: ``q = clamp(rint(w_j / s) + z)``, ``e = (w_j - (q - z) * s) / hinv[j, j]``,
    ``w_k -= e * hinv[j, k]`` for k > j; every operation is one fp32 rounding, so every backend gives the
    same bits. What remains for the columns beyond the block is ``errors @ hinv[block, beyond]``.

    Parameters
    ----------
    weight : Tensor
        fp32 ``[N, B]``, any strides, B at most `MAX_COLUMNS`; not modified.
    hinv : Tensor
        fp32 ``[B, B]``, upper Cholesky factor of the inverse Hessian (the block's square of it).
    scales : Tensor
        fp32 ``[N, G]``, the rounded scales.
    zeros : Tensor or None
        uint8 ``[N, G]``; None with a codebook.
    group_index : Tensor
        int32 ``[B]``: the column of `scales` for each column of the block.
    bits : int
        2, 3, 4 or 8.
    codebook : str or None
        ``"nf4"`` or ``"fp4"``: ``table[q]`` takes the place of ``q - z``.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    codes : Tensor
        uint8 ``[N, B]``.
    errors : Tensor
        fp32 ``[N, B]``.

    Raises
    ------
    InputError
        On shapes or dtypes that do not fit together, or a group index out of range. Values are not
        checked: a NaN gives code 0 (of a codebook: its lowest value) and a NaN error.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.shape[1] > MAX_COLUMNS:
        raise InputError(
            f"weight must be fp32 [N, B] with B at most {MAX_COLUMNS}: "
            f"got {weight.dtype} {tuple(weight.shape)}; process a wider matrix in blocks"
        )
    N, B = weight.shape
    if bits not in BITS or (codebook is not None and bits != 4):
        raise InputError(f"bits must be one of {BITS} (4 with a codebook): got {bits}, codebook={codebook}")
    if codebook is not None and codebook not in CODEBOOKS:
        raise InputError(f"unknown codebook {codebook!r}: allowed are {CODEBOOKS}")
    if (zeros is None) != (codebook is not None):
        passed = "neither" if zeros is None else "both"
        raise InputError(f"zeros and codebook exclude each other: got {passed}; pass one")
    if scales.dim() != 2 or scales.shape[0] != N:
        raise InputError(f"scales must be fp32 [{N}, G]: got {scales.dtype} {tuple(scales.shape)}")
    G = scales.shape[1]
    for name, tensor, shape, dtype in (
        ("hinv", hinv, (B, B), torch.float32),
        ("scales", scales, (N, G), torch.float32),
        ("zeros", zeros, (N, G), torch.uint8),
        ("group_index", group_index, (B,), torch.int32),
    ):
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise InputError(f"{name} must be {dtype} {shape}: got {tensor.dtype} {tuple(tensor.shape)}")
    if B and not 0 <= int(group_index.min()) <= int(group_index.max()) < G:
        raise InputError(
            f"group_index must lie in 0..{G - 1}: got {int(group_index.min())}..{int(group_index.max())}"
        )
    implementation = select("gptq_update", backend, Request(device=weight.device))
    result: tuple[Tensor, Tensor] = implementation.call(
        weight, hinv, scales, zeros, group_index, bits, codebook
    )
    return result
