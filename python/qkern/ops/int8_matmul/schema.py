"""The torch op ``qkern::int8_matmul``."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.dequant_matmul import unpack_weight
from qkern.ops.dequant_matmul.cpu import LAYOUT as CPU_LAYOUT
from qkern.ops.dequant_matmul.cuda_layout import PREFIX as CUDA_PREFIX
from qkern.ops.dequant_matmul.triton_layout import PREFIX as TRITON_PREFIX
from qkern.ops.int8_matmul import cpu, cuda, reference, triton
from qkern.schemes import PackedWeight, Scheme

__all__: list[str] = []

_LIBRARY: Final[Any] = torch.library.Library("qkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "int8_matmul(Tensor x_codes, Tensor? x_scales, Tensor blob, Tensor? bias, Tensor? x_zero, str layout, "
    "int N, int K, str scheme, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(
    x_codes: Tensor,
    x_scales: Tensor | None,
    blob: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    layout: str,
    N: int,
    K: int,
    scheme: str,
    out_dtype: torch.dtype,
) -> Tensor:
    scaled = out_dtype == torch.int32 or (x_scales is not None and x_scales.dtype == torch.float32)
    if x_codes.dtype != torch.int8 or not scaled or (bias is not None and tuple(bias.shape) != (N,)):
        # The kernels would follow a wrong address or read beyond a tensor.
        raise InputError(
            "the arguments of torch.ops.qkern.int8_matmul do not fit together; call qkern.ops.int8_matmul, "
            "which says what is wrong"
        )
    lead = x_codes.shape[:-1]
    M = lead.numel()

    def a_token(value: Tensor | None) -> Tensor | None:
        """``[M, 1]`` of what is one a token or one for all."""
        return None if value is None else value.detach().reshape(-1, 1).expand(M, 1)

    rows, scales, zeros = x_codes.reshape(M, K), a_token(x_scales), a_token(x_zero)
    bias = None if bias is None else bias.detach().contiguous()
    if layout == CPU_LAYOUT:
        out = cpu.matmul(rows, scales, blob, bias, zeros, N, out_dtype)
    elif layout.startswith(CUDA_PREFIX):
        out = cuda.matmul(rows, scales, blob, bias, zeros, layout, N, scheme, out_dtype)
    elif layout.startswith(TRITON_PREFIX):
        out = triton.matmul(rows, scales, blob, bias, zeros, layout, N, scheme, out_dtype)
    else:
        packed = PackedWeight(blob=blob, layout=layout, N=N, K=K, scheme=Scheme.parse(scheme))
        qw = unpack_weight(packed)
        out = reference.matmul(rows, scales, qw, bias, zeros, out_dtype)
    return out.view(*lead, N)


def _fake(
    x_codes: Tensor,
    x_scales: Tensor | None,
    blob: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    layout: str,
    N: int,
    K: int,
    scheme: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_codes.new_empty((*x_codes.shape[:-1], N), dtype=out_dtype)


_LIBRARY.impl("int8_matmul", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkern::int8_matmul", _fake, lib=_LIBRARY)
