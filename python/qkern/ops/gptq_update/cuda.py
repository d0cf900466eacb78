"""gptq_update on the native CUDA kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _cuda
from qkern.ops._native import rows_of
from qkern.ops.codebooks import CODEBOOK_CODES

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["run", "update", "why_not"]


def why_not(request: Request) -> str | None:
    """Why this kernel cannot serve the request; None if it can."""
    return _cuda.why_not_cuda(request.device)


def update(
    weight: Tensor,
    hinv: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_index: Tensor,
    bits: int,
    codebook: str | None,
) -> tuple[Tensor, Tensor]:
    """Codes and errors of one column block; arguments are validated by the caller."""
    for name, tensor in (("hinv", hinv), ("scales", scales), ("zeros", zeros), ("group_index", group_index)):
        if tensor is not None and tensor.device != weight.device:
            raise InputError(
                f"all tensors of a call to a CUDA kernel must be on one device: got weight on "
                f"{weight.device}, {name} on {tensor.device}; move them to one"
            )
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    return codes, run(weight, hinv, scales, zeros, group_index, bits, codebook, codes, None)


def run(
    weight: Tensor,
    hinv: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_index: Tensor,
    bits: int,
    codebook: str | None,
    codes: Tensor,
    losses: Tensor | None,
) -> Tensor:
    """Write the codes, and the squared error of each row if `losses` is given. Returns the errors.

    `codes` is uint8 ``[N, B]`` with adjacent columns, `losses` fp32 ``[N]``; all are on one device.
    """
    N, B = weight.shape
    weight, stride = rows_of(weight)
    # Held by a name while the kernel is enqueued.
    hinv, scales, group_index = hinv.contiguous(), scales.contiguous(), group_index.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    errors = torch.empty(N, B, dtype=torch.float32, device=weight.device)
    if losses is not None and B == 0:
        losses.zero_()
    with _cuda.on_device(weight.device):
        _cuda.module().gptq_update(
            weight=weight.data_ptr(),
            weight_stride=stride,
            N=N,
            B=B,
            hinv=hinv.data_ptr(),
            scales=scales.data_ptr(),
            zeros=0 if zeros is None else zeros.data_ptr(),
            groups=scales.shape[1],
            group_index=group_index.data_ptr(),
            bits=bits,
            codebook=CODEBOOK_CODES[codebook],
            codes=codes.data_ptr(),
            codes_stride=codes.stride(0),
            errors=errors.data_ptr(),
            losses=0 if losses is None else losses.data_ptr(),
            stream=_cuda.stream(weight.device),
        )
    return errors
