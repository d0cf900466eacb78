"""The layout of the reference backend: the tensors of form 2 one after the other in a blob, on any device.

The layout id says what is inside, so that the tensors are views of the blob and nothing has to be read back
from the device: ``plain.<scale dtype>[.zeros|.offsets][.index<groups>][.nested]``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.quantize_groupwise.nested import BLOCK
from qkern.schemes import NestedScales, PackedWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PREFIX", "nested_from_bytes", "nested_size", "nested_to_bytes", "pack", "unpack"]

PREFIX: Final = "plain."
_ALIGN: Final = 64
_DTYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NESTED_HEAD: Final = np.dtype([("block", "<i8"), ("offset", "<f8"), ("absmax", "<i8")])
_TABLE: Final = 256


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def nested_to_bytes(nested: NestedScales) -> Tensor:
    """Second-level scales as bytes: block, offset, counts, then table, absmax, codes."""
    head = np.array([(nested.block, nested.offset, nested.absmax.numel())], dtype=_NESTED_HEAD)
    first = torch.from_numpy(head.view(np.uint8).copy()).to(nested.codes.device)
    return torch.cat([first, _bytes(nested.table), _bytes(nested.absmax), _bytes(nested.codes)])


def nested_size(scales: int) -> int:
    """Bytes of `nested_to_bytes` for so many scales, in blocks as `quantize_groupwise` makes them."""
    return _NESTED_HEAD.itemsize + 4 * (_TABLE + -(-scales // BLOCK)) + scales


def _nested_head(raw: Tensor) -> tuple[int, float, int]:
    """Block, offset and number of absmax of the bytes that `nested_to_bytes` made."""
    size = _NESTED_HEAD.itemsize
    block = offset = absmax = 0
    if raw.numel() >= size:
        block, offset, absmax = raw[:size].cpu().numpy().view(_NESTED_HEAD)[0].tolist()
    if block < 1 or absmax < 0 or size + 4 * (_TABLE + absmax) > raw.numel():
        raise InputError(
            f"packed weight is not sound: its second-level scales exceed their {raw.numel()} bytes; "
            "pack it again from the quantized weight"
        )
    return block, offset, absmax


def nested_from_bytes(raw: Tensor) -> NestedScales:
    """Undo `nested_to_bytes`; the tensors are copies.

    Raises
    ------
    InputError
        If the bytes do not hold what their head says.
    """
    block, offset, absmax = _nested_head(raw)
    size = _NESTED_HEAD.itemsize
    table_end = size + 4 * _TABLE
    absmax_end = table_end + 4 * absmax
    return NestedScales(
        codes=raw[absmax_end:].clone(),
        table=raw[size:table_end].clone().view(torch.float32),
        absmax=raw[table_end:absmax_end].clone().view(torch.float32),
        offset=offset,
        block=block,
    )


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Concatenate the tensors of a 2-D weight."""
    name = next(name for name, dtype in _DTYPES.items() if dtype == qw.scales.dtype)
    layout = PREFIX + name
    tensors = [qw.codes, qw.scales]
    if qw.zeros is not None:
        layout += ".zeros"
        tensors.append(qw.zeros)
    if qw.offsets is not None:
        layout += ".offsets"
        tensors.append(qw.offsets)
    if qw.group_index is not None:
        layout += f".index{qw.scales.shape[1]}"
        tensors.append(qw.group_index)
    if qw.nested is not None:
        layout += ".nested"
        tensors.append(nested_to_bytes(qw.nested))
    blob = torch.cat([_padded(_bytes(tensor)) for tensor in tensors])
    return PackedWeight(blob=blob, layout=layout, N=qw.N, K=qw.K, scheme=qw.scheme)


def _padded(raw: Tensor) -> Tensor:
    return torch.nn.functional.pad(raw, (0, -raw.numel() % _ALIGN))


def unpack(blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> QuantizedWeight:
    """View the tensors inside a blob.

    Raises
    ------
    InputError
        If the layout id is not understood or the blob is too short for it.
    """
    name, *parts = layout.removeprefix(PREFIX).split(".")
    groups = next((int(part.removeprefix("index")) for part in parts if part.startswith("index")), None)
    if not layout.startswith(PREFIX) or name not in _DTYPES:
        raise InputError(f"unknown layout of a packed weight: got {layout!r}; pack the weight again")
    dtype = _DTYPES[name]
    scale_shape = scheme.scale_shape(N, K) if groups is None else (N, groups)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((N, scheme.code_words(K)), torch.int32),
        "scales": (scale_shape, dtype),
    }
    if "zeros" in parts:
        shapes["zeros"] = (scale_shape, torch.uint8)
    if "offsets" in parts:
        shapes["offsets"] = (scale_shape, dtype)
    if groups is not None:
        shapes["group_index"] = ((K,), torch.int32)
    views, end = _views(blob, shapes.items())
    nested = None
    if "nested" in parts:
        raw = blob[end:]
        used = _NESTED_HEAD.itemsize + 4 * (_TABLE + _nested_head(raw)[2]) + math.prod(scale_shape)
        nested = nested_from_bytes(raw[:used])
    return QuantizedWeight(
        codes=views["codes"],
        scales=views["scales"],
        shape=(N, K),
        scheme=scheme,
        zeros=views.get("zeros"),
        offsets=views.get("offsets"),
        group_index=views.get("group_index"),
        nested=nested,
    )


def _views(
    blob: Tensor, shapes: Iterable[tuple[str, tuple[tuple[int, ...], torch.dtype]]]
) -> tuple[dict[str, Tensor], int]:
    views, at = {}, 0
    for name, (shape, dtype) in shapes:
        size = math.prod(shape) * dtype.itemsize
        if at + size > blob.numel():
            raise InputError(
                f"packed weight is too short for its {name}: got {blob.numel()} bytes; pack it again"
            )
        views[name] = blob[at : at + size].view(dtype).view(shape)
        at += size + -size % _ALIGN
    return views, at
