"""What GPTQ does with a block beyond `gptq_update`: in place, on the native kernels or in torch.

These serve GPTQ's runs in `qkern.quantizers` alone: arguments are not validated. Both ways and all CPU tiers
give the same bits, except `product`, where each has its own order of summation (the same for any number of
threads). On a GPU a run over the columns has the same bits; sums of losses and scales are in torch's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qkern.ops import _cuda, _native, _triton
from qkern.ops.codebooks import CODEBOOK_CODES
from qkern.ops.codebooks import codebook as find_codebook
from qkern.ops.gptq_update import cuda, reference, triton

__all__ = ["Block", "Codes", "empty", "gather", "improve", "product", "quantize", "search"]


class Codes(Protocol):
    """What codes are: a `Scheme`, or the layout of a GGUF type."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def codebook(self) -> str | None:
        """``"nf4"``, ``"fp4"``, or None where codes are evenly spaced."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """B adjacent columns of a weight and what is known of them.

    Parameters
    ----------
    scheme : Codes
        Bits and codebook.
    origin : Tensor
        fp32 ``[N, B]``: the weight as it was given.
    codes : Tensor
        uint8 ``[N, B]``; written.
    change : Tensor
        fp32 ``[N, B]``: `origin` less what the codes stand for; written.
    scales : Tensor
        fp32 ``[N, G]``, contiguous; `search` and `improve` write the one group of the block.
    zeros : Tensor
        uint8 ``[N, G]``, contiguous.
    group_index : Tensor
        int32 ``[B]``: the column of `scales` for each column of the block.
    """

    scheme: Codes
    origin: Tensor
    codes: Tensor
    change: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor


def product(a: Tensor, b: Tensor, base: Tensor | None = None, *, fixed: bool = False) -> Tensor:
    """Return ``base + a @ b`` in fp32; where a kernel has FMA, by it: b is narrow, and torch slow at that.

    With `fixed` a tier that is faster at it multiplies in 16-bit fixed point, to 1e-4 of what is added up.
    """
    if _on_cpu(a):
        a, a_stride = _native.rows_of(a)
        base, base_stride = (None, 0) if base is None else _native.rows_of(base)
        out = _native.empty(a.shape[0], b.shape[1])
        if _native.core().gptq_product(
            a=_native.pointer(a),
            a_stride=a_stride,
            N=a.shape[0],
            K=a.shape[1],
            b=_native.pointer(b),
            b_row_stride=b.stride(0),
            b_column_stride=b.stride(1),
            columns=b.shape[1],
            base=_native.pointer(base),
            base_stride=base_stride,
            out=_native.pointer(out),
            out_stride=out.stride(0),
            fixed=fixed,
            threads=_native.threads(),
        ):
            return out
    return a @ b if base is None else torch.addmm(base, a, b)


def empty(N: int, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for the columns of all blocks."""
    if device.type == "cpu":
        return _native.empty(N, K, dtype=dtype)
    return torch.empty(N, K, dtype=dtype, device=device)


def gather(matrix: Tensor, columns: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return ``matrix[rows][:, columns]``, of an fp32 or uint8 matrix in one pass."""
    if not _on_cpu(matrix) or matrix.itemsize not in (1, 4):
        return (matrix if rows is None else matrix[rows]).index_select(1, columns)
    matrix, stride = _native.rows_of(matrix)
    N = matrix.shape[0] if rows is None else rows.numel()
    out = _native.empty(N, columns.numel(), dtype=matrix.dtype)
    _native.core().gptq_gather(
        matrix=_native.pointer(matrix),
        row_bytes=stride * matrix.itemsize,
        item_bytes=matrix.itemsize,
        rows=_native.pointer(rows),
        N=N,
        columns=_native.pointer(columns),
        K=columns.numel(),
        out=_native.pointer(out),
        threads=_native.threads(),
    )
    return out


def quantize(block: Block, target: Tensor, hinv: Tensor) -> Tensor:
    """Codes for columns that should be `target`, at the scales there are. Returns the loss of each row."""
    if _on_cpu(target):
        return _native_block(block, target, hinv)
    codes, losses = _columns(block, target, hinv, block.scales, block.zeros, block.group_index)
    block.codes.copy_(codes)
    block.change.copy_(block.origin - _values(block, codes, block.scales, block.zeros, block.group_index))
    return losses


def search(block: Block, target: Tensor, hinv: Tensor, candidates: Tensor) -> Tensor:
    """Scales and codes of a block that is one group: in each row the first candidate that loses least.

    `candidates` is fp32 ``[C, N]``. Returns the loss of each row.
    """
    if _on_cpu(target):
        return _native_block(block, target, hinv, candidates=candidates.contiguous())
    group, index = int(block.group_index[0]), torch.zeros_like(block.group_index)
    zeros = block.zeros[:, group : group + 1]
    best = torch.full_like(target[:, :1], torch.inf)
    chosen = candidates[0][:, None]
    for scales in candidates[:, :, None]:
        losses = _columns(block, target, hinv, scales, zeros, index)[1][:, None]
        chosen = torch.where(losses < best, scales, chosen)
        best = torch.where(losses < best, losses, best)
    block.scales[:, group : group + 1] = chosen
    return quantize(block, target, hinv)


def improve(
    block: Block, target: Tensor, hinv: Tensor, local: Tensor, fits: int, scale_dtype: torch.dtype
) -> Tensor:
    """Better codes for columns that should be `target` while all other columns stay, row by row.

    The loss of the block is ``|(target - value) @ local|^2`` plus what the other columns cost; `hinv` is
    the inverse of `local`, both upper triangular. The codes of one more run are kept in the rows where they
    lose less; then, `fits` times (the block is one group), the best scale for the codes and the codes of a
    run with that scale. Returns by how much the loss of each row fell.
    """
    if _on_cpu(target):
        return _native_block(block, target, hinv, local=local, fits=fits, scale_dtype=scale_dtype)
    group = int(block.group_index[0])
    index, scales, zeros = block.group_index, block.scales, block.zeros
    if fits:
        index, scales, zeros = torch.zeros_like(index), scales[:, group, None], zeros[:, group, None]
    before = _row_sums(_through(target - (block.origin - block.change), local).square(), backwards=True)[
        :, None
    ]
    best = [before, scales, block.codes]

    def consider(losses: Tensor, scales: Tensor, codes: Tensor) -> None:
        wins = losses[:, None] < best[0]
        trial = (losses[:, None], scales, codes)
        best[:] = [torch.where(wins, *pair) for pair in zip(trial, best, strict=True)]

    codes, losses = _columns(block, target, hinv, scales, zeros, index)
    consider(losses, scales, codes)
    aim = _through(target, local) if fits else target
    for _ in range(fits):
        # For fixed codes the loss is a parabola in the scale.
        unit = _through(_levels(block, best[2], zeros, index), local)
        lengths = _row_sums(unit.square(), backwards=True)
        fitted = (_row_sums(aim * unit, backwards=True) / lengths)[:, None]
        fitted = fitted.to(scale_dtype).to(torch.float32)
        fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, best[1])
        consider(_row_sums((aim - unit * fitted).square()), fitted, best[2])
        codes, losses = _columns(block, target, hinv, fitted, zeros, index)
        consider(losses, fitted, codes)
    after, scales, codes = best
    changed = after < before
    change = block.origin - _values(block, codes, scales, zeros, index)
    block.codes.copy_(torch.where(changed, codes, block.codes))
    block.change.copy_(torch.where(changed, change, block.change))
    if fits:
        block.scales[:, group : group + 1] = scales
    return (before - after)[:, 0]


def _on_cpu(tensor: Tensor) -> bool:
    return _native.why_not_cpu(tensor.device) is None


def _native_block(
    block: Block,
    target: Tensor,
    hinv: Tensor,
    *,
    candidates: Tensor | None = None,
    local: Tensor | None = None,
    fits: int = 0,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    target, stride = _native.rows_of(target)
    # Held by a name while the kernel reads them.
    hinv, index = hinv.contiguous(), block.group_index.contiguous()
    local = None if local is None else local.contiguous()
    N, B = target.shape
    losses = _native.empty(N)
    _native.core().gptq_update(
        weight=_native.pointer(target),
        weight_stride=stride,
        N=N,
        B=B,
        hinv=_native.pointer(hinv),
        scales=_native.pointer(block.scales),
        zeros=0 if block.scheme.codebook else _native.pointer(block.zeros),
        groups=block.scales.shape[1],
        group_index=_native.pointer(index),
        bits=block.scheme.bits,
        codebook=CODEBOOK_CODES[block.scheme.codebook],
        codes=_native.pointer(block.codes),
        codes_stride=block.codes.stride(0),
        errors=0,
        origin=_native.pointer(block.origin),
        origin_stride=block.origin.stride(0),
        change=_native.pointer(block.change),
        change_stride=block.change.stride(0),
        losses=_native.pointer(losses),
        candidate_scales=_native.pointer(candidates),
        candidates=0 if candidates is None else candidates.shape[0],
        local=_native.pointer(local),
        fits=fits,
        scale_dtype=_native.DTYPE_CODES[scale_dtype],
        threads=_native.threads(),
    )
    return losses


def _columns(
    block: Block, target: Tensor, hinv: Tensor, scales: Tensor, zeros: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    scheme = block.scheme
    problem = (target, hinv, scales, None if scheme.codebook else zeros, index, scheme.bits, scheme.codebook)
    kernels = cuda if _cuda.why_not_cuda(target.device) is None else triton
    if kernels is triton and _triton.why_not_triton(target.device) is not None:
        codes, errors = reference.update(*problem)
        return codes, _row_sums(errors.square())
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    losses = torch.empty(target.shape[0], dtype=torch.float32, device=target.device)
    kernels.run(*problem, codes, losses)
    return codes, losses


def _levels(block: Block, codes: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    """Return what codes stand for before the scale."""
    if block.scheme.codebook is not None:
        return find_codebook(block.scheme.codebook, codes.device).values[codes.long()]
    return codes.to(torch.float32) - zeros[:, index.long()].to(torch.float32)


def _values(block: Block, codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return _levels(block, codes, zeros, index) * scales[:, index.long()]


def _through(x: Tensor, upper: Tensor) -> Tensor:
    """``x @ upper``; on a CPU every sum in ascending order and rounded at each step."""
    if x.device.type != "cpu":
        return x @ upper
    out = torch.zeros_like(x)
    for k in range(x.shape[1]):
        out = out + x[:, k : k + 1] * upper[k]
    return out


def _row_sums(x: Tensor, *, backwards: bool = False) -> Tensor:
    """Sum of each row; on a CPU in order, rounded at each step."""
    if x.device.type != "cpu":
        return x.sum(1)
    first, *others = reversed(x.unbind(1)) if backwards else x.unbind(1)
    total = torch.zeros_like(first) + first
    for column in others:
        total = total + column
    return total
