"""int8_matmul on the native CUDA kernels, from the packed weight of dequant_matmul."""

from __future__ import annotations

from itertools import pairwise, starmap
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from qkern.errors import InputError
from qkern.ops import _cuda
from qkern.ops._native import DTYPE_CODES
from qkern.ops.dequant_matmul import cuda as dequant_matmul
from qkern.ops.dequant_matmul import cuda_layout
from qkern.ops.int8_matmul.reference import check_groups, segment_columns, why_not_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight, QuantizedWeight

__all__ = ["matmul", "pack", "why_not"]

# Above, the weight is decoded to int8 for torch's product: tensor cores want larger tiles.
_MOST_ROWS: Final = 64
# Bytes of one decoded slab; see dequant_matmul.
_SLAB_BYTES: Final = 24 << 20
# Bytes of the int32 sums beside it.
_SUMS_BYTES: Final = 256 << 20
_ALIGNED: Final = 8
# Of a block: warps that share K; blocks of a multiprocessor.
_WARPS, _RESIDENT = 4, 2


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    reason = None if request.scheme is None else why_not_scheme(request.scheme)
    return reason or _cuda.why_not_cuda(request.device)


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout that dequant_matmul and int8_matmul share."""
    return cuda_layout.pack(qw)


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
    (M, K), device = x.shape, blob.device
    for name, tensor in (("x_codes", x), ("x_scales", scales), ("bias", bias), ("x_zero", zeros)):
        if tensor is not None and tensor.device != device:
            raise InputError(
                f"{name} is on the wrong device: got {tensor.device}, allowed is {device}, where the "
                "weight is"
            )
    weight = dequant_matmul._weight(blob, layout, N, K, spelling)
    check_groups(weight.form.groups)
    offsets = weight.form.shift == "offsets"
    segment = segment_columns(
        K,
        weight_zeros=weight.form.shift != "none",
        x_zeros=zeros is not None,
        offsets=offsets,
        sums_only=out_dtype == torch.int32,
    )
    out = torch.empty(M, N, dtype=out_dtype, device=device)
    if out.numel() == 0:
        return out
    # Kept by name: a temporary would be gone before the kernel is enqueued.
    scales = None if scales is None else scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    sums = None
    if offsets:
        sums = x.sum(-1, dtype=torch.int64)
        sums = (sums if zeros is None else sums - zeros.flatten().to(torch.int64) * K).to(torch.float32)
    output = {
        "x_scales": _cuda.pointer(scales),
        "x_sums": _cuda.pointer(sums),
        "bias": _cuda.pointer(bias),
        "bias_dtype": 0 if bias is None else DTYPE_CODES[bias.dtype],
        "out": out.data_ptr(),
        "dtype": DTYPE_CODES.get(out_dtype, 0),
        "stream": _cuda.stream(device),
    }
    with _cuda.on_device(device):
        if M <= _MOST_ROWS:
            _in_one_pass(weight, x, zeros, segment, output)
        else:
            _by_slabs(weight, x, zeros, segment, output)
    return out


def _in_one_pass(
    weight: dequant_matmul._Weight, x: Tensor, zeros: Tensor | None, segment: int, output: dict[str, int]
) -> None:
    M, K = x.shape
    if (K > 1 and x.stride(1) != 1) or x.stride(0) % _ALIGNED or x.data_ptr() % _ALIGNED:
        x = F.pad(x, (0, -K % _ALIGNED)).contiguous()
    segments = max(-(-K // segment), 1)
    splits = weight.splits(-(-weight.N // cuda_layout.ROWS) * segments, _WARPS, _RESIDENT)
    partials = None
    if segments > 1 or (splits > 1 and _cuda.capability(weight.device) < (9, 0)):
        partials = torch.empty(segments * splits, M, weight.N, dtype=torch.int32, device=weight.device)
    _cuda.module().int8_matmul(
        weight=weight.native,
        x=x.data_ptr(),
        M=M,
        K=K,
        x_stride=x.stride(0),
        x_zeros=_cuda.pointer(zeros),
        partials=_cuda.pointer(partials),
        segment_tiles=weight.form.tiles if segments == 1 else segment // cuda_layout.TILE,
        segments=segments,
        splits=splits,
        **output,
    )


def _by_slabs(
    weight: dequant_matmul._Weight, x: Tensor, zeros: Tensor | None, segment: int, output: dict[str, int]
) -> None:
    """Through torch's product of int8 matrices, a slab of the weight at a time."""
    (M, K), N, width = x.shape, weight.N, weight.form.tiles * cuda_layout.TILE
    x = (x if width == K else F.pad(x, (0, width - K))).contiguous()
    ranges = list(starmap(slice, pairwise([*range(0, max(K, 1), segment), width])))
    activations = codes = None
    if weight.form.shift != "none":
        activations = torch.stack([x[:, k].sum(-1, dtype=torch.int32) for k in ranges])
        if zeros is not None:
            for part, k in zip(activations, ranges, strict=True):
                part -= zeros.flatten().to(torch.int32) * (min(k.stop, K) - k.start)
    step = min(_SLAB_BYTES // width, _SUMS_BYTES // (4 * M * len(ranges)))
    step = max(step // cuda_layout.ROWS, 1) * cuda_layout.ROWS
    for first in range(0, N, step):
        rows = min(step, N - first)
        whole = -(-rows // cuda_layout.ROWS) * cuda_layout.ROWS
        slab = torch.empty(whole, width, dtype=torch.int8, device=weight.device)
        _cuda.module().decode_codes(
            weight=weight.native,
            first_row=first,
            rows=whole,
            out=slab.data_ptr(),
            stream=output["stream"],
        )
        sums = torch.empty(len(ranges), M, whole, dtype=torch.int32, device=weight.device)
        for part, k in zip(sums, ranges, strict=True):
            torch._int_mm(x[:, k], slab[:, k].T, out=part)
        if zeros is not None:
            present = slab[:, :K]
            codes = torch.stack([present[:, k].sum(-1, dtype=torch.int32) for k in ranges])
        _cuda.module().scale_sums(
            weight=weight.native,
            sums=sums.data_ptr(),
            sums_stride=whole,
            segments=len(ranges),
            M=M,
            first_row=first,
            rows=rows,
            x_zeros=_cuda.pointer(zeros),
            activations=_cuda.pointer(activations),
            codes=_cuda.pointer(codes),
            **output,
        )
