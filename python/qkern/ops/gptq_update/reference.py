"""gptq_update in plain torch, any device; one column at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.ops.codebooks import codebook as find_codebook

__all__ = ["update"]


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
    N, B = weight.shape
    w = weight.clone()
    codes = torch.empty(N, B, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(w)
    for j in range(B):
        group = int(group_index[j])
        column, scale = w[:, j], scales[:, group]
        if codebook is not None:
            book = find_codebook(codebook, weight.device)
            position = book.nearest((column / scale).nan_to_num(-1.0))
            code, level = book.codes[position], book.ordered[position]
        else:
            zero = zeros[:, group].float() if zeros is not None else 0.0
            q = ((column / scale).round() + zero).nan_to_num(0.0).clamp(0, (1 << bits) - 1)
            code, level = q.to(torch.uint8), q - zero
        error = (column - level * scale) / hinv[j, j]
        # Multiply, then subtract: addr_ or addcmul_ could contract the two into one rounding.
        w[:, j + 1 :] -= error[:, None] * hinv[j, j + 1 :]
        codes[:, j], errors[:, j] = code, error
    return codes, errors
