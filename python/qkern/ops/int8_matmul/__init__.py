"""int8 activations by an 8-bit weight: exact integer sums, one scale a token, one an output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops.dequant_matmul import packed_for
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.int8_matmul import (  # noqa: F401 - schema registers the torch op
    cpu,
    cuda,
    reference,
    schema,
    triton,
)
from qkern.ops.quantize_activations import quantize_activations
from qkern.ops.registry import Backend, Implementation, register
from qkern.schemes import FLOAT_DTYPES

if TYPE_CHECKING:
    from qkern.schemes import PackedWeight, QuantizedWeight

__all__ = ["int8_linear", "int8_matmul"]

# `call` packs, as for dequant_matmul: both ops read the same packed weight.
register(
    Implementation(
        op="int8_matmul", backend=Backend.REFERENCE, call=reference.pack, why_not=reference.why_not
    )
)
register(Implementation(op="int8_matmul", backend=Backend.CPU, call=cpu.pack, why_not=cpu.why_not))
register(Implementation(op="int8_matmul", backend=Backend.CUDA, call=cuda.pack, why_not=cuda.why_not))
register(Implementation(op="int8_matmul", backend=Backend.TRITON, call=triton.pack, why_not=triton.why_not))


def int8_matmul(
    x_codes: Tensor,
    x_scales: Tensor | float | None,
    weight: PackedWeight | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    x_zero: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply int8 activations by an 8-bit weight: ``y = (x_codes - x_zero) * x_scales @ W.T + bias``.

    The sums of ``(x_codes - x_zero) * (q - z)`` are exact in int32 for every K up to 131,071 (65,793 with
    `x_zero` or with zero points in the weight, 33,025 with both), and are rounded once to fp32. A longer K is
    cut into segments of that length, whose sums are added in fp32.

    Parameters
    ----------
    x_codes : Tensor
        int8 ``[..., K]``, -128 included, any strides.
    x_scales : Tensor, float or None
        fp32 ``[..., 1]``, one a token as `quantize_activations` gives them, or one for all (a number or a
        tensor of one element). None goes with int32 output.
    weight : PackedWeight or QuantizedWeight
        Scheme ``w8``, ``w8a8``, ``w8z``, ``w8t`` ...: 8 bits, a scale per channel or per tensor. A
        `QuantizedWeight` is packed in every call: pack it once with `pack_weight` when it is used again.
    bias : Tensor or None
        ``[N]`` of `out_dtype` or fp32.
    out_dtype : torch.dtype
        fp32, fp16, bf16; or int32 for the sums themselves, without scales and bias.
    x_zero : Tensor, int or None
        Zero point of the activations: int8 ``[..., 1]``, or one for all (a number in -128..127 or a tensor of
        one element).
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    Tensor
        ``[..., N]`` of `out_dtype`. It has no gradient; `dequant_matmul` of a ``w8a8`` weight has.

    Raises
    ------
    InputError
        On shapes, dtypes or devices that do not fit, or a weight of another kind.
    UnsupportedError
        If the named backend cannot run this call.
    """
    N, K = weight.N, weight.K
    if x_codes.dtype != torch.int8 or x_codes.dim() == 0 or x_codes.shape[-1] != K:
        raise InputError(
            f"x_codes must be int8 [..., {K}], K of the weight: got {x_codes.dtype} {tuple(x_codes.shape)}; "
            "quantize_activations makes them"
        )
    reason = reference.why_not_scheme(weight.scheme)
    if reason is not None:
        raise InputError(f"int8_matmul cannot use this weight: {reason}; use dequant_matmul")
    scales = _scales(x_codes, x_scales, out_dtype)
    zeros = _zeros(x_codes, x_zero)
    if bias is not None and (bias.dtype not in (out_dtype, torch.float32) or tuple(bias.shape) != (N,)):
        raise InputError(f"bias must be [{N}] of out_dtype or fp32: got {bias.dtype} {tuple(bias.shape)}")
    if out_dtype == torch.int32 and bias is not None:
        raise InputError("int32 output has no bias: got one; add it to the scaled result")
    _check_no_gradient("int8_matmul", scales, bias)
    packed = packed_for("int8_matmul", weight, x_codes, backend)
    for name, tensor in (("weight", packed.blob), ("bias", bias), ("x_scales", scales), ("x_zero", zeros)):
        if tensor is not None and tensor.device != x_codes.device:
            raise InputError(
                f"x_codes, x_scales, weight and bias must be on one device: got x_codes on {x_codes.device}, "
                f"{name} on {tensor.device}"
            )
    out: Tensor = torch.ops.qkern.int8_matmul(
        x_codes, scales, packed.blob, bias, zeros, packed.layout, N, K, packed.spelling, out_dtype
    )
    return out


def int8_linear(
    x: Tensor,
    weight: PackedWeight | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | float | None = None,
    x_zero: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Quantize activations to int8 and multiply them by an 8-bit weight: ``y = x @ W.T + bias``.

    The result is that of `dequant_matmul` on a ``w8a8`` weight, which does both in one call and has a
    gradient.

    Parameters
    ----------
    x : Tensor
        fp32, fp16 or bf16 ``[..., K]``, any strides.
    weight : PackedWeight or QuantizedWeight
        8 bits, a scale per channel or per tensor; see `int8_matmul`.
    bias : Tensor or None
        ``[N]`` of x's dtype or fp32.
    x_scale : Tensor, float or None
        Static scale of the activations, see `quantize_activations`; default: the weight's `input_scale`, and
        without one each token's own.
    x_zero : int
        Zero point that goes with `x_scale`, -128..127.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    Tensor
        ``[..., N]`` of x's dtype.

    Raises
    ------
    InputError
        On shapes, dtypes or devices that do not fit, or a weight of another kind.
    UnsupportedError
        If a gradient is asked for, or the named backend cannot run this call.
    """
    check_input(x, weight.K)
    _check_no_gradient("int8_linear", x, bias)
    x_scale = weight.input_scale if x_scale is None else x_scale
    codes, scales = quantize_activations(x, scale=x_scale, zero=x_zero, backend=backend)
    return int8_matmul(codes, scales, weight, bias, out_dtype=x.dtype, x_zero=x_zero or None, backend=backend)


def _check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(
            f"{op} has no gradient: call it under torch.no_grad(), or use dequant_matmul with a w8a8 weight"
        )


def _scales(x_codes: Tensor, x_scales: Tensor | float | None, out_dtype: torch.dtype) -> Tensor | None:
    if out_dtype == torch.int32:
        if x_scales is not None:
            raise InputError("int32 output has no scales: got x_scales; pass None, or ask for a float dtype")
        return None
    if out_dtype not in FLOAT_DTYPES:
        raise InputError(f"out_dtype must be fp32, fp16, bf16 or int32: got {out_dtype}")
    if x_scales is None:
        raise InputError("x_scales is None, which goes with out_dtype=torch.int32 only: pass the scales")
    if not isinstance(x_scales, Tensor):
        return torch.full((1,), x_scales, dtype=torch.float32, device=x_codes.device)
    return _one_or_a_token(x_codes, x_scales, "x_scales", torch.float32)


def _zeros(x_codes: Tensor, x_zero: Tensor | int | None) -> Tensor | None:
    if x_zero is None:
        return None
    if isinstance(x_zero, Tensor):
        return _one_or_a_token(x_codes, x_zero, "x_zero", torch.int8)
    if not -128 <= x_zero <= 127:
        raise InputError(f"x_zero must lie in -128..127: got {x_zero}")
    return torch.full((1,), x_zero, dtype=torch.int8, device=x_codes.device)


def _one_or_a_token(x_codes: Tensor, value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    tokens = (*x_codes.shape[:-1], 1)
    if value.dtype != dtype or (value.numel() != 1 and tuple(value.shape) != tokens):
        raise InputError(
            f"{name} must be {dtype} {tokens} or of one element: got {value.dtype} {tuple(value.shape)}"
        )
    return value
