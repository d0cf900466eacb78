"""GPTQ, AWQ and compressed-tensors read in plain numpy, from what the formats say.

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
================== ======================= ==============================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from qkern.pipelines.verification.safetensors_files import StoredTensor

__all__ = [
    "LayerLayout",
    "Part",
    "UnpackedLayer",
    "format_of",
    "is_excluded",
    "layout_of",
    "parts_of",
    "unpack",
]

MARKERS: Final = {
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "awq": "qweight",
    "compressed-tensors": "weight_scale",
}
"""By format the end of the name of the tensor that every quantized layer has, and no other."""
_COMPRESSED: Final = ("pack-quantized", "int-quantized", "mixed-precision")
_NUMBERS: Final = ("weights", "input_activations", "output_activations")
_AWQ_COLUMNS: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES: Final = ("F16", "BF16", "F32")
_INDICES: Final = ("I32", "I64")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """What a configuration says about one quantized layer.

    Parameters
    ----------
    format : str
        ``gptq``, ``gptq_v2``, ``awq`` or ``compressed-tensors``.
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
    """

    format: str
    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool = False
    int8: bool = False
    activations: bool = False
    static: bool = False

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
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int16]
    groups: NDArray[np.int64]

    def weights(self) -> NDArray[np.float32]:
        """Return the weights, float32 ``[N, K]``."""
        steps = self.codes - self.zeros[:, self.groups]
        return steps.astype(np.float32) * self.scales[:, self.groups]


# The configuration ---------------------------------------------------------------------------------------


def format_of(config: Mapping[str, Any]) -> str:
    """Name of the format that a ``quantization_config`` describes.

    Raises
    ------
    FormatError
        If it names none.
    UnsupportedError
        If it is another than these.
    """
    method = config.get("quant_method")
    if not isinstance(method, str):
        raise FormatError(f"quantization_config must name its quant_method: got {method!r:.60}")
    version = config.get("checkpoint_format") or config.get("format")
    if method == "gptq" and version in (None, "gptq", "gptq_v2"):
        return version or "gptq"
    if method == "awq" and str(config.get("version", "gemm")).lower() == "gemm":
        return "awq"
    others = _other_forms(config)
    if method == "compressed-tensors" and not others:
        return "compressed-tensors"
    named = ", ".join(others) if method == "compressed-tensors" else version or config.get("version")
    raise UnsupportedError(
        f"verify does not read quant_method {method!r}, format {named!r}: it reads gptq, gptq_v2, awq (gemm) "
        "and compressed-tensors with integers (pack-quantized and int-quantized); nothing was checked"
    )


def _other_forms(config: Mapping[str, Any]) -> list[str]:
    """Name what a configuration of compressed-tensors has of formats and numbers that are not read here."""
    groups = config.get("config_groups")
    parts = (
        [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    )
    formats = [part.get("format") for part in (config, *parts)]
    numbers = [part[key].get("type") for part in parts for key in _NUMBERS if isinstance(part.get(key), dict)]
    every = dict.fromkeys(map(str, (*formats, *numbers)))
    return [found for found in every if found not in ("None", "int", *_COMPRESSED)]


def layout_of(config: Mapping[str, Any], format: str, name: str) -> LayerLayout:
    """Read what a ``quantization_config`` says about the quantized layer `name`.

    Raises
    ------
    FormatError
        If it says nothing that can be.
    """
    if format == "awq":
        fields = {
            "bits": config.get("bits", config.get("w_bit")),
            "group_size": config.get("group_size", config.get("q_group_size")),
            # Files have zero points in either case; where they are all the midpoint, the layer is symmetric.
            "symmetric": not config.get("zero_point", True),
        }
    elif format == "compressed-tensors":
        fields = _group_fields(config, name)
    else:
        merged = {**config, **_first_match(config.get("dynamic"), name)}
        fields = {
            "bits": merged.get("bits"),
            "group_size": merged.get("group_size", -1),
            "symmetric": merged.get("sym", True),
            "act_order": merged.get("desc_act", False),
        }
    size = fields["group_size"]
    fields["group_size"] = size = None if size == -1 else size
    if type(fields["bits"]) is not int or fields["bits"] not in ((4,) if format == "awq" else (2, 3, 4, 8)):
        raise FormatError(f"{name}: bits {fields['bits']!r} cannot be in {format}")
    if size is not None and (type(size) is not int or size < 1):
        raise FormatError(f"{name}: group_size must be -1 or positive: got {size!r}")
    for key in ("symmetric", "act_order"):
        if not isinstance(fields.get(key, False), bool):
            raise FormatError(f"{name}: {key} must be true or false: got {fields[key]!r}")
    return LayerLayout(format=format, **fields)


def _first_match(dynamic: Any, name: str) -> dict[str, Any]:
    """Fields of the first pattern of GPTQ's ``dynamic`` that matches; its sign says what it is for."""
    for pattern, fields in (dynamic or {}).items():
        if _matches(re.sub(r"^[+-]:", "", pattern), name):
            return dict(fields or {})
    return {}


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise FormatError(f"quantization_config: {pattern!r} is no regular expression: {error}") from None


def _targets(entry: str, name: str) -> bool:
    """Whether a target or ignored entry of compressed-tensors is this layer, its class left out."""
    return entry == name or (entry.startswith("re:") and _matches(entry[3:], name))


def _group_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError("quantization_config has no config_groups")
    if not all(isinstance(group, dict) for group in groups.values()):
        raise FormatError("quantization_config has config_groups that are no objects")
    targets = [(str(target), group) for group in groups.values() for target in group.get("targets") or ()]
    # A name comes before a pattern, and both before a class.
    fitting = (
        [group for target, group in targets if target == name],
        [group for target, group in targets if _targets(target, name)],
        [group for target, group in targets if "." not in target and not target.startswith("re:")],
    )
    group = next((found[0] for found in fitting if found), None)
    if group is None:
        raise FormatError(f"{name} is quantized, but no config group targets it")
    weights = group.get("weights") or {}
    inputs = group.get("input_activations")
    whole = config.get("format")
    grouped = (weights.get("strategy") or ("group" if weights.get("group_size") else "channel")) == "group"
    return {
        "bits": weights.get("num_bits"),
        "group_size": weights.get("group_size") if grouped else None,
        "symmetric": weights.get("symmetric", True),
        "act_order": weights.get("actorder") == "group",
        "int8": (group.get("format") or whole) == "int-quantized",
        "activations": inputs is not None,
        "static": inputs is not None and not inputs.get("dynamic", False),
    }


def is_excluded(config: Mapping[str, Any], format: str, name: str) -> bool | None:
    """Whether readers are told to take the linear `name` for 16-bit; None where nothing is told either way.

    Raises
    ------
    FormatError
        If a pattern is no regular expression.
    """
    if format == "compressed-tensors":
        listed = [str(entry) for entry in config.get("ignore") or ()]
        if any(_targets(entry, name) for entry in listed):
            return True
        groups = (config.get("config_groups") or {}).values()
        targets = [str(target) for group in groups for target in group.get("targets") or ()]
        return not any(target == "Linear" or _targets(target, name) for target in targets)
    if format == "awq":
        skipped = config.get("modules_to_not_convert")
        if skipped is None:
            return None
        # Readers leave the head out whether it is listed or not.
        return any(str(entry) in name for entry in skipped) or (None if name == "lm_head" else False)
    for pattern in config.get("dynamic") or {}:
        if _matches(re.sub(r"^[+-]:", "", pattern), name):
            return bool(pattern.startswith("-:"))
    return not config.get("lm_head", False) if name == "lm_head" else None


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


def _either(dtypes: tuple[str, ...], *shapes: tuple[int, ...], is_needed: bool = True) -> Part:
    return Part(tuple((dtype, shape) for shape in shapes for dtype in dtypes), is_needed)


def _widths(count: int, bits: int) -> tuple[int, int]:
    """Words of `count` codes as a stream, and as older files have them: none across two words."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def unpack(layout: LayerLayout, tensors: Mapping[str, StoredTensor], N: int, K: int) -> UnpackedLayer:
    """Unpack a layer whose `tensors`, by the ends of their names, are as `parts_of` says."""
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
