"""Rows of floats to GGUF blocks."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gguf_encode import cpu
from qkern.ops.gguf_types import gguf_type
from qkern.ops.registry import Backend, Implementation, Request, register, select

__all__ = ["gguf_encode"]

# Importance relative to the mean below which a column counts as one without any.
_LIGHTEST: Final = 1e-12

register(Implementation(op="gguf_encode", backend=Backend.CPU, call=cpu.encode, why_not=cpu.why_not))


def gguf_encode(x: Tensor, type: str, *, importance: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Encode the rows of a tensor as GGUF blocks, with the scales that leave the least squared error.

    Parameters
    ----------
    x : Tensor
        fp32, fp16 or bf16 ``[..., K]``, any strides; K is a multiple of the type's block.
    type : str
        ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``iq4_nl``, ``q2_k``,
        ``q3_k``, ``q4_k``, ``q5_k``, ``q6_k`` or ``iq4_xs``.
    importance : Tensor or None
        ``[K]``, at least 0: weight of each column's squared error; None: all alike.
    backend : str
        ``"auto"`` or ``"cpu"``.

    Returns
    -------
    Tensor
        uint8 ``[..., K / block * bytes]``, the bytes of the file; the same in every CPU tier.

    Raises
    ------
    UnsupportedError
        On a type of llama.cpp's that is not encoded, such as ``iq2_xs``.
    InputError
        On an unknown type, a K that the block does not divide, a bad importance, or values that are
        NaN, Inf or beyond the range of the type's fp16 scales.
    """
    kind = gguf_type(type)
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"x must be a floating-point tensor [..., K]: got {x.dtype} {tuple(x.shape)}")
    K = x.shape[-1]
    if K % kind.block:
        raise InputError(
            f"{kind.name} stores blocks of {kind.block} weights: got rows of {K}; "
            f"choose a type whose block divides {K}"
        )
    implementation = select("gguf_encode", backend, Request(device=x.device, dtype=x.dtype))
    rows = x.detach().to(torch.float32).reshape(math.prod(x.shape[:-1]), K).contiguous()
    weights = None if importance is None else _check_importance(importance, K)
    if kind.name == "f32":
        return rows.clone().view(torch.uint8).reshape(*x.shape[:-1], 4 * K)
    encoded: Tensor = implementation.call(rows, kind, weights)
    return encoded.reshape(*x.shape[:-1], kind.row_bytes(K))


def _check_importance(importance: Tensor, K: int) -> Tensor:
    if tuple(importance.shape) != (K,):
        raise InputError(
            f"importance must have shape [{K}], one weight a column: got {tuple(importance.shape)}"
        )
    values = importance.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(values).all() or bool((values < 0).any()):
        raise InputError("importance must be finite and at least 0: got NaN, Inf or a negative value")
    # Only ratios matter; a mean of 1 keeps the products of the search in range, and no column that counts is
    # so light that their reciprocals leave it.
    mean = values.double().mean()
    if mean == 0:
        return torch.ones(K, dtype=torch.float32, device="cpu")
    values = values.double() / mean
    return torch.where(values < _LIGHTEST, 0.0, values).float().contiguous()
