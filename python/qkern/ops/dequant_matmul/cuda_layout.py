"""The layout of the CUDA kernels, "cuda.m64", made and read in plain torch on any device.

csrc/kernels/dequant_matmul/cuda_layout.h says where every code lies; `_place` is that table. The layout id
says what is inside, so that nothing has to be read back from the device:
``cuda.m64/<scale dtype>/<none|zeros|offsets>/<groups>/<columns of a group>/<plain|map|index>/<extra bytes>``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul.plain import nested_from_bytes, nested_to_bytes
from qkern.ops.pack_bits.reference import pack_dense, unpack_dense
from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["PREFIX", "Form", "form_of", "pack", "restored", "sections", "unpack", "views_of"]

PREFIX: Final = "cuda.m64/"
ROWS: Final = 64
TILE: Final = 64
# What one mma step takes: groups are padded to pairs of them.
_COLUMNS: Final = 32
_ALIGN: Final = 256
_DTYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SHIFTS: Final = ("none", "zeros", "offsets")
_ORDERS: Final = ("plain", "map", "index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the layout id says of a packed weight ``[N, K]``.

    Parameters
    ----------
    scale_dtype : torch.dtype
        Dtype of scales and offsets.
    shift : {"none", "zeros", "offsets"}
        What is stored beside the scales.
    groups : int
        Columns of scales.
    group_columns : int
        Columns of one group in the layout, a multiple of 32.
    order : {"plain", "map", "index"}
        ``"map"``: the columns of x are taken in another order, with zeros between; ``"index"``: and that
        order stands for a `group_index`.
    extra_bytes : int
        Bytes of the second-level scales.
    """

    scale_dtype: torch.dtype
    shift: str
    groups: int
    group_columns: int
    order: str
    extra_bytes: int

    @property
    def columns(self) -> int:
        """Columns of the layout that belong to groups."""
        return self.groups * self.group_columns

    @property
    def tiles(self) -> int:
        """Tiles of a panel."""
        return -(-self.columns // TILE)

    def __str__(self) -> str:
        dtype = next(name for name, dtype in _DTYPES.items() if dtype == self.scale_dtype)
        parts = (dtype, self.shift, self.groups, self.group_columns, self.order, self.extra_bytes)
        return PREFIX + "/".join(map(str, parts))


def _place(bits: int, book: bool, i: int, s: int, j: int, high: int) -> tuple[int, int, int]:
    """Line, word and first bit of a code; of three bits the low two."""
    if bits == 8:
        return 2 * i + s // 2, 2 * (s % 2) + j // 2, 8 * (2 * (j % 2) + high)
    if bits == 4:
        return i, s, 4 * (2 * j + high if book else j + 4 * high)
    return i // 2, 2 * (i % 2) + s // 2, 2 * (4 * (s % 2) + j) + 16 * high


def _third_place(i: int, s: int, j: int, high: int) -> tuple[int, int, int]:
    r = 4 * s + j
    return 2, i, (2 + 2 * (r % 4) + r // 4 % 2 + 8 * (r // 8)) % 16 + 16 * high


def _positions() -> Iterator[tuple[int, int, int, int]]:
    return product(range(4), range(4), range(4), range(2))


def _registers(codes: Tensor) -> Tensor:
    """View ``[panels * 64, tiles * 64]`` as ``[i, s, j, high, panel, tile, g, t]``."""
    panels, tiles = codes.shape[0] // ROWS, codes.shape[1] // TILE
    view = codes.view(panels, 4, 2, 8, tiles, 2, 4, 2, 2, 2)
    # panel, i, lower, g, tile, half, t, odd, second, high; s = 2 half + odd, j = 2 second + lower.
    ordered = view.permute(1, 5, 7, 8, 2, 9, 0, 4, 3, 6)
    return ordered.reshape(4, 4, 4, 2, panels, tiles, 8, 4)


def _scatter(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes ``[panels * 64, tiles * 64]`` as lines, int32 ``[panels, tiles, bits, 32, 4]``."""
    registers = _registers(codes)
    panels, tiles = registers.shape[4:6]
    bits, book = scheme.bits, scheme.codebook is not None
    lines = torch.zeros(panels, tiles, bits, 8, 4, 4, dtype=torch.int32, device=codes.device)
    for i, s, j, high in _positions():
        code = registers[i, s, j, high].to(torch.int32)
        line, word, bit = _place(bits, book, i, s, j, high)
        lines[:, :, line, ..., word] |= (code & 3 if bits == 3 else code) << bit
        if bits == 3:
            line, word, bit = _third_place(i, s, j, high)
            lines[:, :, line, ..., word] |= (code >> 2) << bit
    return lines


def _gather(lines: Tensor, scheme: Scheme) -> Tensor:
    """Undo `_scatter`: uint8 ``[panels * 64, tiles * 64]``."""
    panels, tiles = lines.shape[:2]
    bits, book = scheme.bits, scheme.codebook is not None
    registers = torch.empty(4, 4, 4, 2, panels, tiles, 8, 4, dtype=torch.uint8, device=lines.device)
    mask = (1 << (2 if bits == 3 else bits)) - 1
    for i, s, j, high in _positions():
        line, word, bit = _place(bits, book, i, s, j, high)
        code = (lines[:, :, line, ..., word] >> bit) & mask
        if bits == 3:
            line, word, bit = _third_place(i, s, j, high)
            code |= ((lines[:, :, line, ..., word] >> bit) & 1) << 2
        registers[i, s, j, high] = code.to(torch.uint8)
    view = registers.view(4, 2, 2, 2, 2, 2, panels, tiles, 8, 4)
    # i, half, odd, second, lower, high, panel, tile, g, t
    back = view.permute(6, 0, 4, 8, 7, 1, 9, 2, 3, 5)
    return back.reshape(panels * ROWS, tiles * TILE)


def _rows_to_lanes(values: Tensor, panels: int) -> Tensor:
    """``[N, G]`` as ``[panels, G, g, 2 i + lower]``, rows beyond N zero."""
    padded = F.pad(values, (0, 0, 0, panels * ROWS - values.shape[0]))
    return padded.view(panels, 4, 2, 8, -1).permute(0, 4, 3, 1, 2).contiguous()


def _lanes_to_rows(values: Tensor, N: int) -> Tensor:
    panels, groups = values.shape[:2]
    rows = values.view(panels, groups, 8, 4, 2).permute(0, 3, 4, 2, 1).reshape(panels * ROWS, groups)
    return rows[:N].contiguous()


def _columns(qw: QuantizedWeight) -> tuple[int, int, Tensor | None]:
    """Return groups, columns of each in the layout, and None or the column of x for each (-1: none)."""
    K, groups, device = qw.K, qw.scales.shape[1], qw.device
    length = max(qw.scheme.group_length(K), 1)
    if qw.group_index is None:
        padded = -(-length // _COLUMNS) * _COLUMNS
        if groups == 1 or padded == length:
            return groups, padded, None
        index = torch.arange(K, device=device) // length
    else:
        index = qw.group_index.long()
        if K and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise InputError(
                f"group_index must lie in 0..{groups - 1}, the columns of scales: "
                f"got {int(index.min())}..{int(index.max())}"
            )
    counts = torch.bincount(index, minlength=groups)
    padded = max(-(-int(counts.max()) // _COLUMNS) * _COLUMNS if K else 0, _COLUMNS)
    order = index.argsort(stable=True)
    sorted_index = index[order]
    rank = torch.arange(K, device=device) - (counts.cumsum(0) - counts)[sorted_index]
    columns = torch.full((groups * padded,), -1, dtype=torch.int32, device=device)
    columns[sorted_index * padded + rank] = order.to(torch.int32)
    return groups, padded, columns


def _panels(N: int) -> int:
    # A scale of the whole tensor has to live somewhere even when there are no rows.
    return max(-(-N // ROWS), 1)


def sections(form: Form, N: int, scheme: Scheme) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Where each part begins in the blob, its shape and dtype; ``"end"`` is where the blob ends."""
    panels = _panels(N)
    lanes = (panels, form.groups, 8, 8)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((panels, form.tiles, scheme.bits, 8, 4, 4), torch.int32),
        "scales": (lanes, form.scale_dtype),
    }
    if form.shift != "none":
        shapes["shifts"] = (lanes, torch.uint8 if form.shift == "zeros" else form.scale_dtype)
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
    found["end"] = (at, (), torch.uint8)
    return found


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout of the CUDA kernels, on its own device."""
    scheme, (N, K) = qw.scheme, qw.shape
    panels = _panels(N)
    groups, padded, columns = _columns(qw)
    extra = None if qw.nested is None else nested_to_bytes(qw.nested)
    shift = "none" if not scheme.zero_point else "zeros" if qw.zeros is not None else "offsets"
    order = "plain" if columns is None else "map" if qw.group_index is None else "index"
    form = Form(
        scale_dtype=qw.scales.dtype,
        shift=shift,
        groups=groups,
        group_columns=padded,
        order=order,
        extra_bytes=0 if extra is None else extra.numel(),
    )
    codes = unpack_dense(qw.codes, scheme.bits, K)
    if columns is not None:
        # One more column, of zeros, for those that are no column of x.
        codes = F.pad(codes, (0, 1))[:, torch.where(columns < 0, K, columns).long()]
    codes = F.pad(codes, (0, form.tiles * TILE - codes.shape[1], 0, panels * ROWS - N)).contiguous()
    values: dict[str, Tensor | None] = {
        "codes": _scatter(codes, scheme),
        "scales": _rows_to_lanes(_each_row(qw.scales, max(N, 1)), panels),
        "shifts": None,
        "table": None if scheme.codebook is None else codebook(scheme.codebook, qw.device).values,
        "columns": columns,
        "extra": extra,
    }
    stored = qw.zeros if shift == "zeros" else qw.offsets
    if stored is not None:
        values["shifts"] = _rows_to_lanes(_each_row(stored, max(N, 1)), panels)
    where = sections(form, N, scheme)
    with torch.inference_mode(False):
        blob = torch.zeros(where["end"][0], dtype=torch.uint8, device=qw.device)
    for name, value in values.items():
        if value is not None:
            raw = value.contiguous().reshape(-1).view(torch.uint8)
            blob[where[name][0] : where[name][0] + raw.numel()] = raw
    return PackedWeight(blob=blob, layout=str(form), N=N, K=K, scheme=scheme)


def _each_row(values: Tensor, N: int) -> Tensor:
    return values.expand(N, -1) if values.shape[0] == 1 else values


@functools.lru_cache(maxsize=4096)
def form_of(layout: str) -> Form:
    """Read a layout id.

    Raises
    ------
    InputError
        If it is none of this layout.
    """
    parts = layout.removeprefix(PREFIX).split("/")
    if layout.startswith(PREFIX) and len(parts) == 6:
        dtype, shift, groups, length, order, extra = parts
        numbers = [int(part) if part.isdecimal() else -1 for part in (groups, length, extra)]
        known = dtype in _DTYPES and shift in _SHIFTS and order in _ORDERS
        if known and numbers[0] >= 0 and numbers[1] > 0 and numbers[1] % _COLUMNS == 0 and numbers[2] >= 0:
            return Form(
                scale_dtype=_DTYPES[dtype],
                shift=shift,
                groups=numbers[0],
                group_columns=numbers[1],
                order=order,
                extra_bytes=numbers[2],
            )
    raise InputError(f"unknown layout of a packed weight: got {layout!r}; pack the weight again")


def parts(blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> tuple[Form, dict[str, Tensor]]:
    """View the parts of a blob.

    Raises
    ------
    InputError
        If the layout id is not understood or does not go with the blob.
    """
    form = form_of(layout)
    where = sections(form, N, scheme)
    size = where.pop("end")[0]
    return form, views_of(blob, layout, form, where, size, N, K, scheme)


def views_of(
    blob: Tensor,
    layout: str,
    form: Form,
    where: Mapping[str, tuple[int, tuple[int, ...], torch.dtype]],
    size: int,
    N: int,
    K: int,
    scheme: Scheme,
) -> dict[str, Tensor]:
    """View the parts of a blob of `size` bytes that lie at `where`.

    Raises
    ------
    InputError
        If the layout does not go with the blob.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() != size or not blob.is_contiguous():
        raise InputError(
            f"packed weight is not sound: the blob of a {scheme} weight [{N}, {K}] in the layout {layout} "
            f"must be contiguous uint8 [{size}]: got {blob.dtype} {list(blob.shape)}; pack it again from the "
            "quantized weight"
        )
    if (form.order == "plain" and form.columns < K) or (form.shift == "none") == scheme.zero_point:
        raise InputError(
            f"packed weight is not sound: the layout {layout} is not that of a {scheme} weight [{N}, {K}]; "
            "pack it again from the quantized weight"
        )
    return {
        name: blob[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for name, (at, shape, dtype) in where.items()
    }


def unpack(blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> QuantizedWeight:
    """Undo `pack`, bit for bit.

    Raises
    ------
    InputError
        If the blob is not sound.
    """
    form, views = parts(blob, layout, N, K, scheme)
    codes = _gather(views["codes"], scheme)[:N]
    rows = 1 if scheme.per_tensor else N
    scales = _lanes_to_rows(views["scales"], rows)
    shifts = None if form.shift == "none" else _lanes_to_rows(views["shifts"], rows)
    return restored(form, views, codes, scales, shifts, (N, K), scheme)


def restored(
    form: Form,
    views: Mapping[str, Tensor],
    codes: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    shape: tuple[int, int],
    scheme: Scheme,
) -> QuantizedWeight:
    """Return form 2 of codes uint8 ``[N, columns]`` that are in the layout's order.

    Raises
    ------
    InputError
        If the columns that the layout names are not those of the weight.
    """
    K = shape[1]
    group_index = None
    if form.order == "plain":
        codes = codes[:, :K]
    else:
        columns = views["columns"]
        used = (columns >= 0).nonzero().flatten()
        if used.numel() != K or (K and not 0 <= int(columns.max()) < K):
            raise InputError("packed weight is not sound: its columns are out of range; pack it again")
        back = torch.empty(K, dtype=torch.int64, device=codes.device)
        back[columns[used].long()] = used
        codes = codes[:, back]
        if form.order == "index":
            group_index = (back // form.group_columns).to(torch.int32)
    return QuantizedWeight(
        codes=pack_dense(codes.contiguous(), scheme.bits),
        scales=scales,
        shape=shape,
        scheme=scheme,
        zeros=shifts if form.shift == "zeros" else None,
        offsets=shifts if form.shift == "offsets" else None,
        group_index=group_index,
        nested=nested_from_bytes(views["extra"]) if form.extra_bytes else None,
    )
