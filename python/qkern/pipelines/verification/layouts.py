"""GPTQ, AWQ, compressed-tensors and bitsandbytes read in plain numpy, from what the formats say.

Nothing of `qkern.ops` or `qkern.checkpoints` is used here: this is the second opinion on what they write and
read. Codes are unsigned; a weight is ``(code - zero) * scale``.

================== ======================= ==============================================================
format             tensor                  content
================== ======================= ==============================================================
GPTQ               qweight [K*b/32, N]     each column a stream of b-bit codes along K, lowest bit first
                   qzeros [G, N*b/32]      each row a stream along N; v1 holds zero - 1
                   scales [G, N]
                   g_idx [K]               group of each row of the stream
AWQ                qweight [K, N/8]        nibbles 0 to 7 of a word are columns 0 2 4 6 1 3 5 7 of its eight
                   qzeros [G, N/8]         likewise
                   scales [G, N]
compressed-tensors weight_packed [N, *]    each row a stream of code + 2^(b-1) along K
                   weight [N, K]           int-quantized, in its place: codes as int8
                   weight_scale [N, G]
                   weight_shape [2]        N, K
                   weight_zero_point       [*, G]: each column a stream of zero + 2^(b-1) along N
                   input_scale [1] or []   of static activations
bitsandbytes, int8 weight [N, K]           codes as int8
                   SCB [N]                 127 times the scale of each row
                   weight_format []        0: rows are as they are
bitsandbytes, 4bit weight [N*K/2, 1]       nibbles, the upper one first, of codes of a table
                   weight.absmax [N*G]     scales; nested: codes of the next two, to which an offset is added
                   .nested_quant_map [256] values of these codes
                   .nested_absmax [*]      scales of as many of them as the layer's JSON says
                   .quant_map [16]         the table
                   .quant_state.* [any]    JSON: the table's name, block, shape, and how scales are nested
================== ======================= ==============================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from qkern.pipelines.verification.safetensors_files import StoredTensor

__all__ = ["CODEBOOKS", "STATE", "LayerLayout", "Part", "UnpackedLayer", "levels_of", "parts_of", "unpack"]

_AWQ_COLUMNS: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES: Final = ("F16", "BF16", "F32")
_INDICES: Final = ("I32", "I64")
STATE: Final = "weight.quant_state.bitsandbytes__"
"""Begin of the name of the JSON of a layer of bitsandbytes with 4 bits; what follows names the codebook."""
_SIXTHS: Final = (0, 1 / 32, 4, 6, 2, 3, 1, 3 / 2)
CODEBOOKS: Final = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(sixths / 6 for sixths in _SIXTHS), *(-sixths / 6 for sixths in _SIXTHS)),
}
"""What the codes 0 to 15 stand for: NF4 of QLoRA's paper, FP4 of bitsandbytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """What a configuration says about one quantized layer.

    Parameters
    ----------
    format : str
        ``gptq``, ``gptq_v2``, ``awq``, ``compressed-tensors`` or ``bitsandbytes``.
    bits : int
        Bits of a code.
    group_size : int or None
        Columns that share a scale; None: one scale a row.
    symmetric : bool
        Whether every zero point is ``2**(bits-1)``.
    act_order : bool
        Whether columns may belong to groups out of order.
    int8 : bool
        compressed-tensors' int-quantized.
    activations : bool
        Activations are int8.
    static : bool
        They have one scale.
    codebook : str or None
        ``nf4`` or ``fp4``; None: codes are numbers.
    nested : tuple of int and float, or None
        How many scales share a scale of theirs, and what is added to them all.
    shape : tuple of int or None
        Rows and columns that the layer's JSON says it has.
    state_bytes : int
        Length of that.
    """

    format: str
    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool = False
    int8: bool = False
    activations: bool = False
    static: bool = False
    codebook: str | None = None
    nested: tuple[int, float] | None = None
    shape: tuple[int, int] | None = None
    state_bytes: int = 0

    @property
    def midpoint(self) -> int:
        """Zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def groups(self, K: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size is None else -(-K // self.group_size)

    def group_of_columns(self, K: int) -> NDArray[np.int64]:
        """Group of each column when they are in order."""
        return np.arange(K) // (self.group_size or max(K, 1))


@dataclass(frozen=True, slots=True)
class Part:
    """The forms, dtype and shape, of which a tensor of a layer has one, and whether it must be there."""

    forms: tuple[tuple[str, tuple[int, ...]], ...]
    is_needed: bool = True

    def __str__(self) -> str:
        return " or ".join(f"{dtype} {list(shape)}" for dtype, shape in dict.fromkeys(self.forms))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedLayer:
    """A layer as its tensors say.

    Parameters
    ----------
    codes : ndarray
        uint8 ``[N, K]``.
    scales : ndarray
        float32 ``[N, G]``.
    zeros : ndarray
        int16 ``[N, G]``.
    groups : ndarray
        int64 ``[K]``, the group of each column; may be out of range in a damaged file.
    levels : ndarray or None
        float32 ``[16]``, what the codes of a codebook stand for, which have no zero points.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int16]
    groups: NDArray[np.int64]
    levels: NDArray[np.float32] | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there is a scale for each column, and a number."""
        groups = (self.groups >= 0) & (self.groups < self.scales.shape[1])
        return bool(groups.all() and np.isfinite(self.scales).all())

    def weights(self) -> NDArray[np.float32]:
        """Return the weights, float32 ``[N, K]``."""
        if self.levels is not None:
            return self.levels[self.codes] * self.scales[:, self.groups]
        steps = self.codes - self.zeros[:, self.groups]
        return steps.astype(np.float32) * self.scales[:, self.groups]


# The tensors ---------------------------------------------------------------------------------------------


def parts_of(layout: LayerLayout, N: int, K: int) -> dict[str, Part]:
    """Say which tensors an ``[N, K]`` layer has, by the end of their names."""
    b, G = layout.bits, layout.groups(K)
    if layout.format == "awq":
        return {
            "qweight": Part((("I32", (K, N // 8)),)),
            "qzeros": Part((("I32", (G, N // 8)),)),
            "scales": _either(_SCALES, (G, N)),
        }
    if layout.format == "bitsandbytes":
        return _parts_of_bitsandbytes(layout, N, K)
    if layout.format != "compressed-tensors":
        return {
            "qweight": Part((("I32", (K * b // 32, N)),)),
            "qzeros": Part((("I32", (G, N * b // 32)),)),
            "scales": _either(_SCALES, (G, N)),
            "g_idx": _either(_INDICES, (K,), is_needed=layout.act_order),
        }
    parts = {"weight_scale": _either(_SCALES, (N, G))}
    if layout.int8:
        parts["weight"] = Part((("I8", (N, K)),))
    else:
        parts["weight_packed"] = Part(tuple(("I32", (N, width)) for width in _widths(K, b)))
        parts["weight_shape"] = _either(_INDICES, (2,))
    if not layout.symmetric:
        packed = tuple(("I32", (width, G)) for width in _widths(N, b))
        parts["weight_zero_point"] = Part((*packed, ("I8", (N, G))))
    # Older versions write one that is not used too.
    parts["weight_g_idx"] = _either(_INDICES, (K,), is_needed=layout.act_order)
    if layout.static:
        parts["input_scale"] = _either(_SCALES, (1,), ())
        parts["input_zero_point"] = _either(("I8", *_INDICES), (1,), (), is_needed=False)
    return parts


def _parts_of_bitsandbytes(layout: LayerLayout, N: int, K: int) -> dict[str, Part]:
    if layout.codebook is None:
        return {
            "weight": Part((("I8", (N, K)),)),
            "SCB": Part((("F32", (N,)),)),
            "weight_format": Part((("U8", ()),), is_needed=False),
        }
    assert layout.group_size is not None
    # Blocks run over the flattened weight, which may end within one.
    scales, size = -(-N * K // layout.group_size), -(-N * K // 2)
    # Bytes may be called numbers of another width.
    widths = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
    parts = {
        "weight": Part(tuple((dtype, (size // width, 1)) for dtype, width in widths.items())),
        "weight.absmax": _either(_SCALES, (scales,)),
        "weight.quant_map": Part((("F32", (16,)),)),
        f"{STATE}{layout.codebook}": Part((("U8", (layout.state_bytes,)),)),
    }
    if layout.nested is not None:
        parts["weight.absmax"] = Part((("U8", (scales,)),))
        parts["weight.nested_absmax"] = Part((("F32", (-(-scales // layout.nested[0]),)),))
        parts["weight.nested_quant_map"] = Part((("F32", (256,)),))
    return parts


def _either(dtypes: tuple[str, ...], *shapes: tuple[int, ...], is_needed: bool = True) -> Part:
    return Part(tuple((dtype, shape) for shape in shapes for dtype in dtypes), is_needed)


def _widths(count: int, bits: int) -> tuple[int, int]:
    """Words of `count` codes as a stream, and as older files have them: none across two words."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def unpack(layout: LayerLayout, tensors: Mapping[str, StoredTensor], N: int, K: int) -> UnpackedLayer:
    """Unpack a layer whose `tensors`, by the ends of their names, are as `parts_of` says."""
    if layout.format == "bitsandbytes":
        return _unpack_bitsandbytes(layout, tensors, N, K)
    arrays = {part: np.asarray(tensor.array()) for part, tensor in tensors.items() if not tensor.is_float}
    scales = tensors["weight_scale" if layout.format == "compressed-tensors" else "scales"].floats()
    if layout.format == "compressed-tensors":
        codes, zeros = _unpack_compressed(layout, arrays, N, K, scales.shape[1])
        index = arrays.get("weight_g_idx")
    else:
        codes, zeros = (_unpack_awq if layout.format == "awq" else _unpack_gptq)(layout, arrays, N, K)
        scales, index = scales.T, arrays.get("g_idx")
    in_order = index is None or bool((index == -1).all())
    groups = layout.group_of_columns(K) if index is None or in_order else index.astype(np.int64)
    return UnpackedLayer(codes=codes, scales=scales, zeros=zeros.astype(np.int16), groups=groups)


def _unpack_gptq(
    layout: LayerLayout, arrays: Mapping[str, NDArray[Any]], N: int, K: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    codes = _stream(arrays["qweight"].T, K, layout.bits)
    stored = _stream(arrays["qzeros"], N, layout.bits)
    # One more in v1, within the field.
    zeros = (
        stored if layout.format == "gptq_v2" else (stored + np.uint8(1)) & np.uint8(2 * layout.midpoint - 1)
    )
    return codes, zeros.T


def _unpack_awq(
    layout: LayerLayout, arrays: Mapping[str, NDArray[Any]], N: int, K: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    unpacked = []
    for name in ("qweight", "qzeros"):
        words = arrays[name].view(np.uint32)
        columns = np.empty((*words.shape, 8), np.uint8)
        for place, column in enumerate(_AWQ_COLUMNS):
            columns[..., column] = (words >> np.uint32(4 * place)) & np.uint32(15)
        unpacked.append(columns.reshape(len(words), N).T)
    return unpacked[0], unpacked[1]


def _unpack_compressed(
    layout: LayerLayout, arrays: Mapping[str, NDArray[Any]], N: int, K: int, G: int
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    if layout.int8:
        codes = (arrays["weight"].astype(np.int16) + layout.midpoint).astype(np.uint8)
    else:
        codes = _words(arrays["weight_packed"], K, layout.bits)
    zeros = np.full((N, G), layout.midpoint)
    stored = arrays.get("weight_zero_point")
    if stored is not None:
        zeros = (
            stored + np.int16(layout.midpoint)
            if stored.dtype == np.int8
            else _words(stored.T, N, layout.bits).T
        )
    return codes, zeros


def levels_of(codebook: str) -> NDArray[np.float32]:
    """Values of a codebook, by code."""
    return np.array(CODEBOOKS[codebook], np.float32)


def _unpack_bitsandbytes(
    layout: LayerLayout, tensors: Mapping[str, StoredTensor], N: int, K: int
) -> UnpackedLayer:
    stored, levels = np.ascontiguousarray(tensors["weight"].array()), None
    if layout.codebook is None:
        codes = (stored.astype(np.int16) + layout.midpoint).astype(np.uint8)
        scales = tensors["SCB"].floats() / np.float32(127)
    else:
        levels, packed = levels_of(layout.codebook), stored.view(np.uint8)
        codes = np.stack((packed >> 4, packed & 15), axis=-1)
        scales = _scales_of_blocks(layout, tensors)
    shape = N, layout.groups(K)
    return UnpackedLayer(
        codes=codes.reshape(N, K),
        scales=scales.reshape(shape),
        zeros=np.full(shape, layout.midpoint, np.int16),
        groups=layout.group_of_columns(K),
        levels=levels,
    )


def _scales_of_blocks(layout: LayerLayout, tensors: Mapping[str, StoredTensor]) -> NDArray[np.float32]:
    if layout.nested is None:
        return tensors["weight.absmax"].floats()
    block, offset = layout.nested
    codes = np.asarray(tensors["weight.absmax"].array())
    # A block may be longer than all of them.
    tops = tensors["weight.nested_absmax"].floats().repeat(min(block, codes.size))[: codes.size]
    scales: NDArray[np.float32] = tensors["weight.nested_quant_map"].floats()[codes] * tops
    return scales + np.float32(offset)


def _words(words: NDArray[Any], count: int, bits: int) -> NDArray[np.uint8]:
    """Codes of rows of words, as a stream or, told by the width, each within one word."""
    stream, within = _widths(count, bits)
    if words.shape[1] == stream:
        return _stream(words, count, bits)
    assert words.shape[1] == within
    places = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    wide = (words.view(np.uint32)[..., None] >> places) & np.uint32((1 << bits) - 1)
    return wide.reshape(len(words), -1)[:, :count].astype(np.uint8)


def _stream(words: NDArray[Any], count: int, bits: int) -> NDArray[np.uint8]:
    """Codes of rows that are streams of bits, lowest first."""
    raw = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    single = np.unpackbits(raw, axis=-1, count=count * bits, bitorder="little")
    codes: NDArray[np.uint8] = np.packbits(
        single.reshape(len(words), count, bits), axis=-1, bitorder="little"
    )
    return codes[..., 0]
