"""``y = x @ dequant(W).T + b``, fused, and the packing of weights for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qkern.errors import InputError
from qkern.ops.dequant_matmul import (  # noqa: F401 - schema registers the torch op
    cpu,
    cuda,
    cuda_layout,
    plain,
    reference,
    schema,
    triton,
    triton_layout,
)
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.dequant_matmul.cpu import LinearGroup, LinearHandle
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LinearGroup", "LinearHandle", "dequant_matmul", "pack_weight", "resolve_compute", "unpack_weight"]

# `call` packs; the product itself is the torch op, which knows the layouts.
register(
    Implementation(
        op="dequant_matmul", backend=Backend.REFERENCE, call=plain.pack, why_not=lambda request: None
    )
)
register(Implementation(op="dequant_matmul", backend=Backend.CPU, call=cpu.pack, why_not=cpu.why_not))
register(
    Implementation(op="dequant_matmul", backend=Backend.CUDA, call=cuda_layout.pack, why_not=cuda.why_not)
)
register(
    Implementation(
        op="dequant_matmul", backend=Backend.TRITON, call=triton_layout.pack, why_not=triton.why_not
    )
)


def pack_weight(qw: QuantizedWeight, *, backend: str = "auto") -> PackedWeight:
    """Rewrite a quantized weight in the layout of the kernels that will run it.

    Parameters
    ----------
    qw : QuantizedWeight
        ``[N, K]``; experts are packed one by one.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    PackedWeight
        On the device of `qw`; `unpack_weight` is the exact inverse.

    Raises
    ------
    InputError
        If `qw` has an expert dimension or its group index leaves the scales' groups.
    UnsupportedError
        If the named backend cannot run this weight.
    """
    if len(qw.shape) != 2:
        raise InputError(
            f"pack_weight takes one matrix [N, K]: got {tuple(qw.shape)}; pack each expert by itself"
        )
    request = Request(device=qw.device, scheme=qw.scheme)
    packed: PackedWeight = select("dequant_matmul", backend, request).call(qw)
    return replace(packed, input_scale=qw.input_scale)


def unpack_weight(packed: PackedWeight) -> QuantizedWeight:
    """Undo `pack_weight`, bit for bit.

    Parameters
    ----------
    packed : PackedWeight
        From any backend.

    Raises
    ------
    InputError
        If the blob is corrupt or does not hold what `packed` says.
    """
    return replace(_unpack(packed), input_scale=packed.input_scale)


def _unpack(packed: PackedWeight) -> QuantizedWeight:
    if packed.layout == cpu.LAYOUT:
        return cpu.unpack(packed)
    if packed.layout.startswith(cuda.PREFIX):
        return cuda_layout.unpack(packed.blob, packed.layout, packed.N, packed.K, packed.scheme)
    if packed.layout.startswith(triton.PREFIX):
        return triton_layout.unpack(packed.blob, packed.layout, packed.N, packed.K, packed.scheme)
    return plain.unpack(packed.blob, packed.layout, packed.N, packed.K, packed.scheme)


def resolve_compute(compute: str, x: Tensor, scheme: Scheme, *, needs_grad: bool) -> str:
    """Decide between ``"float"`` and ``"int8"``: int8 for inference on a CPU and for schemes that say a8.

    Parameters
    ----------
    compute : str
        ``"auto"``, ``"float"`` or ``"int8"``.
    x : Tensor
        The activations.
    scheme : Scheme
        Scheme of the weight: ``a8`` asks for int8.
    needs_grad : bool
        Whether a gradient will be taken.

    Raises
    ------
    InputError
        If `compute` is none of the three.
    """
    if compute in ("float", "int8"):
        return compute
    if compute != "auto":
        raise InputError(f"unknown compute: got {compute!r}, allowed are 'auto', 'float' and 'int8'")
    if scheme.act_bits is not None:
        return "int8"
    return "int8" if x.device.type == "cpu" and not needs_grad else "float"


def dequant_matmul(
    x: Tensor,
    weight: PackedWeight | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    compute: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Multiply activations by a quantized weight: ``y = x @ W.T + bias``.

    Parameters
    ----------
    x : Tensor
        fp32, fp16 or bf16 ``[..., K]``, any strides; gradients flow to it.
    weight : PackedWeight or QuantizedWeight
        A `QuantizedWeight` is packed in every call: pack it once with `pack_weight` when it is used again.
    bias : Tensor or None
        ``[N]`` of x's dtype or fp32; gradients flow to it.
    compute : str
        ``"float"`` keeps the activations (fp32 sums; bf16 products for bf16 input where the CPU has them);
        ``"int8"`` quantizes them per token and group of at most 128 columns (for ``w8a8`` per token, or with
        the weight's `input_scale`, as `int8_linear` does) and sums the products exactly; ``"auto"`` is int8
        on a CPU when no gradient is taken or when the scheme says a8.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    Tensor
        ``[..., N]`` of x's dtype.

    Raises
    ------
    InputError
        On types, shapes, dtypes or devices that do not fit.
    UnsupportedError
        If the named backend cannot run this call.
    """
    if not isinstance(weight, (PackedWeight, QuantizedWeight)):
        raise InputError(
            f"weight must be quantized: got {type(weight).__name__}, allowed are PackedWeight and "
            "QuantizedWeight; make one with quantize_groupwise and pack it with pack_weight"
        )
    K, N = weight.K, weight.N
    check_input(x, K, weight.device if isinstance(weight, QuantizedWeight) else weight.blob.device)
    if bias is not None and (bias.dtype not in (x.dtype, torch.float32) or tuple(bias.shape) != (N,)):
        raise InputError(f"bias must be [{N}] of x's dtype or fp32: got {bias.dtype} {tuple(bias.shape)}")
    packed = packed_for("dequant_matmul", weight, x, backend)
    if bias is not None and bias.device != x.device:
        raise InputError(f"bias is on the wrong device: got {bias.device}, allowed is that of x, {x.device}")
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    compute = resolve_compute(compute, x, weight.scheme, needs_grad=needs_grad)
    out: Tensor = torch.ops.qkern.dequant_matmul(
        x, packed.blob, bias, packed.layout, N, K, packed.spelling, compute, packed.input_scale
    )
    return out


def packed_for(op: str, weight: PackedWeight | QuantizedWeight, x: Tensor, backend: str) -> PackedWeight:
    """Pack `weight` as `backend` reads it for `op`, unless it already is; int8_matmul reads the same."""
    if isinstance(weight, QuantizedWeight):
        return pack_weight(weight, backend=backend)
    if backend == "auto":
        return weight
    chosen = select(op, backend, Request(device=x.device, scheme=weight.scheme, dtype=x.dtype))
    if chosen.backend == _backend_of(weight.layout):
        return weight
    repacked: PackedWeight = chosen.call(unpack_weight(weight))
    return replace(repacked, input_scale=weight.input_scale)


def _backend_of(layout: str) -> Backend:
    if layout == cpu.LAYOUT:
        return Backend.CPU
    if layout.startswith(triton.PREFIX):
        return Backend.TRITON
    return Backend.CUDA if layout.startswith(cuda.PREFIX) else Backend.REFERENCE
