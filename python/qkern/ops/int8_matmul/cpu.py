"""int8_matmul on the native CPU kernels, from the packed weight of dequant_matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from qkern.errors import InputError
from qkern.ops._native import DTYPE_CODES, core, empty, pointer, rows_of, threads, why_not_cpu
from qkern.ops.dequant_matmul import cpu as dequant_matmul
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.int8_matmul.reference import why_not_scheme
from qkern.ops.quantize_activations import cpu as quantize_activations

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight

__all__ = ["StaticHandle", "matmul", "pack", "why_not"]


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    reason = None if request.scheme is None else why_not_scheme(request.scheme)
    return reason or why_not_cpu(request.device)


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout that dequant_matmul and int8_matmul share."""
    return dequant_matmul.pack(qw)


def matmul(
    x: Tensor,
    scales: Tensor | None,
    blob: Tensor,
    bias: Tensor | None,
    zeros: Tensor | None,
    N: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes ``[M, K]`` by the weight; scales and zeros are ``[M, 1]``, all else is validated."""
    (M, K), (x, row_stride) = x.shape, rows_of(x)
    int_out = out_dtype == torch.int32
    out = empty(M, N, dtype=out_dtype)
    # Kept by name: a temporary would be gone before the kernel reads it.
    x_scales = None if scales is None else scales.contiguous()
    x_zeros = None if zeros is None else zeros.to(torch.int32).contiguous()
    try:
        core().int8_matmul(
            blob=pointer(blob),
            bytes=blob.numel(),
            N=N,
            K=K,
            codes=pointer(x),
            M=M,
            row_stride=row_stride,
            scales=pointer(x_scales),
            zeros=pointer(x_zeros),
            bias=pointer(bias),
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=pointer(out),
            out_dtype=0 if int_out else DTYPE_CODES[out_dtype],
            int_out=int_out,
            threads=threads(),
        )
    except ValueError as error:
        raise InputError(f"int8_matmul cannot use this packed weight: {error}") from None
    return out


class StaticHandle:
    """A packed CPU weight with an `input_scale`, called without autograd and dispatch as `LinearHandle` is.

    Parameters
    ----------
    packed : PackedWeight
        In the layout of the native CPU kernels; its K is not 0.

    Raises
    ------
    InputError
        If the blob is corrupt or belongs to another layout.
    """

    __slots__ = ("_linear", "_packed")

    device: Final = torch.device("cpu")
    auto: Final = "int8"

    def __init__(self, packed: PackedWeight) -> None:
        self._linear = dequant_matmul.LinearHandle(packed)
        self._packed = packed

    def __call__(self, x: Tensor, bias: Tensor | None = None, compute: str = "int8") -> Tensor:
        """``x [..., K] @ W.T + bias`` in x's dtype; arguments and errors are those of `LinearHandle`."""
        if compute != "int8":
            return self._linear(x, bias, compute)
        packed = self._packed
        check_input(x, packed.K, self.device)
        lead, dtype = x.shape[:-1], x.dtype
        rows = x.detach().reshape(lead.numel(), packed.K)
        codes, scales = quantize_activations.quantize(rows, packed.K, packed.input_scale)
        bias = None if bias is None else bias.detach().contiguous()
        return matmul(codes, scales, packed.blob, bias, None, packed.N, dtype).view(*lead, packed.N)
