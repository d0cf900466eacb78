"""int8_matmul on Triton, from the packed weight of dequant_matmul."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from qkern.errors import InputError
from qkern.ops import _triton
from qkern.ops.dequant_matmul import triton as dequant_matmul
from qkern.ops.dequant_matmul import triton_layout
from qkern.ops.dequant_matmul.triton import Config
from qkern.ops.int8_matmul.reference import check_groups, segment_columns, why_not_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight

__all__ = ["config", "matmul", "pack", "why_not"]

# By rows of x, up to the number on the left; a product of bytes takes 32 columns or more.
_CONFIGS: Final = {
    16: Config(tokens=16, rows=32, words=64, stages=3),
    64: Config(tokens=64, rows=64, words=32, stages=3),
    math.inf: Config(tokens=128, rows=64, words=32),
}


def why_not(request: Request) -> str | None:
    """Why the kernel cannot serve `request`."""
    reason = None if request.scheme is None else why_not_scheme(request.scheme)
    return reason or _triton.why_not_triton(request.device)


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout that dequant_matmul and int8_matmul share."""
    return triton_layout.pack(qw)


def config(M: int) -> Config:
    """Look up the table."""
    return next(config for limit, config in _CONFIGS.items() if limit >= M)


def _lacks_int8(device: torch.device) -> bool:
    """Whether Triton has no product of bytes for the device: sm_75."""
    return not _triton.interpreted(device) and _triton.capability(device) < (8, 0)


def matmul(
    x: Tensor,
    scales: Tensor | None,
    blob: Tensor,
    bias: Tensor | None,
    zeros: Tensor | None,
    layout: str,
    N: int,
    spelling: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes ``[M, K]`` by the weight; scales and zeros are ``[M, 1]``, all else is validated."""
    M, K = x.shape
    reason = _triton.why_not_triton(blob.device)
    if reason is not None:
        raise InputError(f"the weight is packed for Triton, which cannot run: {reason}; pack it again")
    weight = dequant_matmul._weight(blob, layout, N, K, spelling)
    check_groups(weight.form.groups)
    segment = segment_columns(
        K,
        weight_zeros=weight.scheme.zero_point,
        x_zeros=zeros is not None,
        offsets=weight.form.shift == "offsets",
        sums_only=out_dtype == torch.int32,
    )
    out = torch.empty(M, N, dtype=_triton.stored_dtype(out_dtype, x.device), device=x.device)
    if out.numel() == 0:
        return out.to(out_dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    codes, _, weight_scales, shifts, _ = weight.tensors
    segments = max(-(-K // segment), 1)
    words = weight.used_words if segments == 1 else (segment // weight.block + 2) * weight.block_words
    # What a kernel does not read still needs an address.
    arguments = (
        x,
        x.stride(0),
        out if scales is None else scales.contiguous(),
        out if zeros is None else zeros.contiguous(),
        codes,
        weight_scales,
        shifts,
        out if bias is None else bias,
        out,
        M,
        N,
        K,
        weight.row_words,
        weight.used_words,
        weight.scale_stride,
        segment,
        segments,
    )

    def launch(tile: Config) -> Tensor:
        chunks = -(-words // tile.words)
        interpreted = _triton.interpreted(x.device)
        _triton.kernels("int8_matmul").multiply[(-(-N // tile.rows), -(-M // tile.tokens))](
            *arguments,
            chunks,
            SHIFT=weight.constants["SHIFT"],
            X_ZERO=zeros is not None,
            BIAS=bias is not None,
            SUMS=out_dtype == torch.int32,
            WIDEN=_lacks_int8(x.device),
            BLOCK=weight.block,
            SEGMENTS=segments if interpreted else 0,
            CHUNKS=chunks if interpreted else 0,
            BM=tile.tokens,
            BN=tile.rows,
            BW=tile.words,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
        return out

    with _triton.on_device(x.device):
        tile = config(M)
        if _triton.autotuned(x.device):
            tile = weight.best(tile, x.dtype, launch)
        return launch(tile).to(out_dtype)
