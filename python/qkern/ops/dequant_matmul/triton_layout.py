"""The layout of the Triton kernels, "triton.planar", made and read in plain torch on any device.

A row is cut into blocks of C columns (a power of two that divides a group). With P codes to a word, a block
is C / P words, and plane p of them, bits ``p * bits`` and up, holds the C / P adjacent columns from
``p * C / P``: a kernel unpacks whole words by a shift and a mask and multiplies them by a slice of x. Codes
of three bits are a plane of two bits and one of the third, word j of the latter holding bit 2 of the codes
of words 2 j (its low half) and 2 j + 1. Rows are filled to 64 bytes.

The layout id says what is inside, so that nothing has to be read back from the device:
``triton.planar/<scale dtype>/<none|zeros|offsets>/<groups>/<columns of a group>/<plain|map|index>/<extra
bytes>``, with the meaning of `cuda_layout.Form`.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul import cuda_layout
from qkern.ops.dequant_matmul.cuda_layout import Form
from qkern.ops.dequant_matmul.plain import nested_to_bytes
from qkern.ops.pack_bits.reference import pack_dense, unpack_dense
from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

__all__ = ["PREFIX", "block_columns", "codes_per_word", "form_of", "pack", "parts", "row_words", "unpack"]

PREFIX: Final = "triton.planar/"
_LONGEST_BLOCK: Final = 512
# Words of a row are a multiple of this: what lets Triton load them in whole vectors.
_ROW_WORDS: Final = 16
_ALIGN: Final = 256


def codes_per_word(bits: int) -> int:
    """Codes of a word; of three bits the words that hold two of each."""
    return 32 // (2 if bits == 3 else bits)


def block_columns(form: Form) -> int:
    """Columns of a block: the largest power of two that divides a group, 512 at most."""
    return min(form.group_columns & -form.group_columns, _LONGEST_BLOCK)


def row_words(form: Form, bits: int) -> int:
    """Words of a row, filling included."""
    return -(-form.columns // codes_per_word(bits) // _ROW_WORDS) * _ROW_WORDS


def _to_planes(codes: Tensor, block: int, bits: int) -> Tensor:
    """Codes ``[N, columns]`` as words ``[N, columns * bits / 32]``, block after block."""
    per_word = 32 // bits
    planes = codes.view(codes.shape[0], codes.shape[1] // block, per_word, block // per_word)
    words = torch.zeros_like(planes[:, :, 0], dtype=torch.int32)
    for p in range(per_word):
        words |= planes[:, :, p].to(torch.int32) << (p * bits)
    return words.flatten(1)


def _from_planes(words: Tensor, block: int, bits: int) -> Tensor:
    """Undo `_to_planes`: uint8 ``[N, columns]``."""
    per_word = 32 // bits
    blocks = words.view(words.shape[0], words.shape[1] * per_word // block, block // per_word)
    planes = [((blocks >> (p * bits)) & ((1 << bits) - 1)).to(torch.uint8) for p in range(per_word)]
    return torch.stack(planes, dim=2).flatten(1)


def _third_order(block: int, device: torch.device) -> Tensor:
    """Column of a block whose third bit is bit ``i % 32`` of word ``i // 32``."""
    i = torch.arange(block, device=device)
    return i % 16 * (block // 16) + 2 * (i // 32) + i % 32 // 16


def _pack_codes(codes: Tensor, form: Form, bits: int) -> dict[str, Tensor]:
    block, N = block_columns(form), codes.shape[0]
    low = _to_planes(codes & 3 if bits == 3 else codes, block, 2 if bits == 3 else bits)
    words = {"codes": F.pad(low, (0, row_words(form, bits) - low.shape[1]))}
    if bits == 3:
        order = _third_order(block, codes.device)
        third = (codes >> 2).view(N, -1, block)[:, :, order] if codes.numel() else codes
        high = pack_dense(third.flatten(1), 1)
        words["thirds"] = F.pad(high, (0, row_words(form, bits) // 2 - high.shape[1]))
    return words


def _unpack_codes(views: dict[str, Tensor], form: Form, bits: int) -> Tensor:
    block, columns = block_columns(form), form.columns
    used = columns // codes_per_word(bits)
    codes = _from_planes(views["codes"][:, :used], block, 2 if bits == 3 else bits)
    if bits == 3 and codes.numel():
        order = _third_order(block, codes.device)
        third = unpack_dense(views["thirds"][:, : used // 2], 1, columns).view(codes.shape[0], -1, block)
        codes = codes | (third[:, :, order.argsort()].flatten(1) << 2)
    return codes


def sections(
    form: Form, N: int, scheme: Scheme
) -> tuple[dict[str, tuple[int, tuple[int, ...], torch.dtype]], int]:
    """Where each part begins in the blob, its shape and dtype, and where the blob ends."""
    words = row_words(form, scheme.bits)
    grid = (1 if scheme.per_tensor else N, form.groups)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((N, words), torch.int32)}
    if scheme.bits == 3:
        shapes["thirds"] = ((N, words // 2), torch.int32)
    shapes["scales"] = (grid, form.scale_dtype)
    if form.shift != "none":
        shapes["shifts"] = (grid, torch.uint8 if form.shift == "zeros" else form.scale_dtype)
    if scheme.codebook is not None:
        shapes["table"] = ((16,), torch.float32)
    if form.order != "plain":
        shapes["columns"] = ((form.columns,), torch.int32)
    shapes["extra"] = ((form.extra_bytes,), torch.uint8)
    found, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        found[name] = (at, shape, dtype)
        at += math.prod(shape) * dtype.itemsize
        at += -at % _ALIGN
    return found, at


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout of the Triton kernels, on its own device."""
    scheme, (N, K) = qw.scheme, qw.shape
    groups, padded, columns = cuda_layout._columns(qw)
    extra = None if qw.nested is None else nested_to_bytes(qw.nested)
    shifts = qw.zeros if qw.zeros is not None else qw.offsets
    form = Form(
        scale_dtype=qw.scales.dtype,
        shift="none" if shifts is None else "zeros" if qw.zeros is not None else "offsets",
        groups=groups,
        group_columns=padded,
        order="plain" if columns is None else "map" if qw.group_index is None else "index",
        extra_bytes=0 if extra is None else extra.numel(),
    )
    codes = unpack_dense(qw.codes, scheme.bits, K)
    if columns is not None:
        # One more column, of zeros, for those that are no column of x.
        codes = F.pad(codes, (0, 1))[:, torch.where(columns < 0, K, columns).long()]
    codes = F.pad(codes, (0, form.columns - codes.shape[1])).contiguous()
    values: dict[str, Tensor | None] = {
        **_pack_codes(codes, form, scheme.bits),
        "scales": qw.scales,
        "shifts": shifts,
        "table": None if scheme.codebook is None else codebook(scheme.codebook, qw.device).values,
        "columns": columns,
        "extra": extra,
    }
    where, size = sections(form, N, scheme)
    with torch.inference_mode(False):
        blob = torch.zeros(size, dtype=torch.uint8, device=qw.device)
    for name, (at, _, _) in where.items():
        value = values[name]
        if value is not None:
            raw = value.contiguous().reshape(-1).view(torch.uint8)
            blob[at : at + raw.numel()] = raw
    layout = PREFIX + str(form).removeprefix(cuda_layout.PREFIX)
    return PackedWeight(blob=blob, layout=layout, N=N, K=K, scheme=scheme)


@functools.lru_cache(maxsize=4096)
def form_of(layout: str) -> Form:
    """Read a layout id.

    Raises
    ------
    InputError
        If it is none of this layout.
    """
    if layout.startswith(PREFIX):
        try:
            return cuda_layout.form_of(cuda_layout.PREFIX + layout.removeprefix(PREFIX))
        except InputError:
            pass
    raise InputError(f"unknown layout of a packed weight: got {layout!r}; pack the weight again")


def parts(blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> tuple[Form, dict[str, Tensor]]:
    """View the parts of a blob.

    Raises
    ------
    InputError
        If the layout id is not understood or does not go with the blob.
    """
    form = form_of(layout)
    where, size = sections(form, N, scheme)
    return form, cuda_layout.views_of(blob, layout, form, where, size, N, K, scheme)


def unpack(blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> QuantizedWeight:
    """Undo `pack`, bit for bit.

    Raises
    ------
    InputError
        If the blob is not sound.
    """
    form, views = parts(blob, layout, N, K, scheme)
    codes = _unpack_codes(views, form, scheme.bits)
    shifts = None if form.shift == "none" else views["shifts"].clone()
    return cuda_layout.restored(form, views, codes, views["scales"].clone(), shifts, (N, K), scheme)
