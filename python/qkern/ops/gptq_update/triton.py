"""gptq_update on Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.ops import _triton
from qkern.ops.codebooks import codebook as find_codebook

if TYPE_CHECKING:
    from qkern.ops.registry import Request

__all__ = ["run", "update", "why_not"]

_ROWS: Final = 16
# Columns that a program holds; those of a wider block go launch by launch.
_PANEL: Final = 128


def why_not(request: Request) -> str | None:
    """Why the kernel cannot serve the request; None if it can."""
    return _triton.why_not_triton(request.device)


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
    errors = torch.empty(N, B, dtype=torch.float32, device=weight.device)
    if losses is not None and B == 0:
        losses.zero_()
    if errors.numel() == 0:
        return errors
    hinv, scales, group_index = hinv.contiguous(), scales.contiguous(), group_index.contiguous()
    book = None if codebook is None else find_codebook(codebook, weight.device)
    # What a kernel does not read still needs an address.
    tables = (scales,) * 3 if book is None else (book.thresholds, book.ordered, book.codes)
    block = min(1 << (B - 1).bit_length(), _PANEL)
    with _triton.on_device(weight.device):
        for first in range(0, B, block):
            count = min(block, B - first)
            _triton.kernels("gptq_update").update[(-(-N // _ROWS),)](
                weight,
                weight.stride(0),
                weight.stride(1),
                hinv,
                scales,
                scales if zeros is None else zeros.contiguous(),
                group_index,
                *tables,
                codes,
                codes.stride(0),
                errors,
                errors if losses is None else losses,
                N,
                B,
                scales.shape[1],
                count,
                FIRST=first,
                BITS=bits,
                THRESHOLDS=0 if book is None else book.thresholds.numel(),
                LOSSES=losses is not None,
                COUNT=count if _triton.interpreted(weight.device) else 0,
                BR=_ROWS,
                BC=block,
                enable_fp_fusion=False,
            )
    return errors
