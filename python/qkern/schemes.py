"""`Scheme`, the one spelling of how a weight is quantized, and the neutral containers of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from qkern.errors import InputError

__all__ = ["FLOAT_DTYPES", "NestedScales", "PackedWeight", "QuantizedWeight", "Scheme", "as_scheme"]

BITS: Final = (2, 3, 4, 8)
CODEBOOKS: Final = ("nf4", "fp4")
FLOAT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)

_SPELLING = re.compile(
    r"(?:w(?P<bits>\d+)|(?P<codebook>nf4|fp4))(?:g(?P<group>\d+)|(?P<tensor>t))?"
    r"(?P<zero>z)?(?P<double>d)?(?P<act>a8)?"
)
_GRAMMAR = "(w<bits>|nf4|fp4)[g<n>|t][z][d][a8] with bits 2, 3, 4 or 8, for example w4g128 or w4g128z"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight matrix is quantized; `Scheme.parse(str(s)) == s`.

    Parameters
    ----------
    bits : int
        Bits of a code: 2, 3, 4 or 8.
    group_size : int or None
        Consecutive input features that share a scale; None: one scale per output channel.
    per_tensor : bool
        One scale for the whole matrix; excludes `group_size`.
    zero_point : bool
        Asymmetric grid, ``w = (q - z) * s`` with a stored z; else ``z = 2**(bits-1)``.
    double_quant : bool
        The scales are themselves quantized.
    codebook : str or None
        ``"nf4"`` or ``"fp4"``: ``w = table[q] * s``; needs ``bits=4``.
    act_bits : int or None
        8: activations are quantized to int8, per token unless the weight has an `input_scale`.

    Raises
    ------
    InputError
        On a combination outside the grammar.
    """

    bits: int = 4
    group_size: int | None = None
    per_tensor: bool = False
    zero_point: bool = False
    double_quant: bool = False
    codebook: str | None = None
    act_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"unsupported bits: got {self.bits}, allowed are {BITS}; choose one of these")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(
                f"group_size must be at least 1: got {self.group_size}; "
                "use None (no g in the spelling) for one scale per output channel"
            )
        if self.per_tensor and self.group_size is not None:
            raise InputError(f"per_tensor excludes group_size: got group_size={self.group_size}; drop one")
        if self.codebook is not None:
            if self.codebook not in CODEBOOKS:
                raise InputError(f"unknown codebook {self.codebook!r}: allowed are {CODEBOOKS}")
            if self.bits != 4 or self.zero_point:
                raise InputError(
                    f"codebook {self.codebook} has 4 bits and no zero point: got bits={self.bits}, "
                    f"zero_point={self.zero_point}"
                )
        if self.act_bits not in (None, 8):
            raise InputError(f"unsupported act_bits: got {self.act_bits}, allowed are None and 8")

    @classmethod
    def parse(cls, spelling: str) -> Scheme:
        """Read a spelling such as ``w4g128z``.

        Raises
        ------
        InputError
            If the spelling is outside the grammar.
        """
        match = _SPELLING.fullmatch(spelling)
        if match is None:
            # Case and separators are slips; what stands before a number may be its sign.
            close = re.sub(r"[^a-z0-9-]|-(?!\d)", "", spelling.lower())
            hint = f"; did you mean {close!r}?" if _SPELLING.fullmatch(close) else ""
            if re.match(r"i?q\d", close):
                hint = "; types of GGUF are written by export_gguf (qkern export-gguf --type)"
            raise InputError(f"not a scheme: got {spelling!r}, allowed is {_GRAMMAR}{hint}")
        group = match["group"]
        return cls(
            bits=int(match["bits"] or 4),
            group_size=None if group is None else int(group),
            per_tensor=match["tensor"] is not None,
            zero_point=match["zero"] is not None,
            double_quant=match["double"] is not None,
            codebook=match["codebook"],
            act_bits=8 if match["act"] else None,
        )

    def __str__(self) -> str:
        group = "t" if self.per_tensor else "" if self.group_size is None else f"g{self.group_size}"
        flags = ("z" if self.zero_point else "") + ("d" if self.double_quant else "")
        return f"{self.codebook or f'w{self.bits}'}{group}{flags}{'a8' if self.act_bits else ''}"

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """Zero point of the symmetric grid, ``2**(bits-1)``."""
        return 1 << (self.bits - 1)

    def group_length(self, K: int) -> int:
        """Columns that share a scale in a matrix with K columns (the last group may be shorter)."""
        return K if self.group_size is None else min(self.group_size, max(K, 1))

    def num_groups(self, K: int) -> int:
        """Count the groups along K; 1 for per-channel and per-tensor schemes."""
        return 1 if self.group_size is None else -(-K // self.group_size)

    def code_words(self, K: int) -> int:
        """int32 words of one row of codes: ``ceil(K * bits / 32)``."""
        return -(-K * self.bits // 32)

    def scale_shape(self, N: int, K: int) -> tuple[int, int]:
        """Shape of scales, zeros and offsets for an ``[N, K]`` matrix."""
        return (1, 1) if self.per_tensor else (N, self.num_groups(K))

    def scale_bytes(self, count: int) -> int:
        """Bytes of so many scales: fp16, of a codebook fp32; quantized, their codes and fp32 absmax."""
        if self.double_quant:
            return count + 4 * -(-count // 256)
        return (2 if self.codebook is None else 4) * count

    @property
    def has_plain_sums(self) -> bool:
        """Whether weights and activations are 8-bit integers with one scale a channel and a token: w8a8.

        Only then may one static scale take the place of the tokens' own.
        """
        return self.bits == 8 and self.group_size is None and self.act_bits is not None

    def weight_only(self) -> Scheme:
        """Return the same scheme without activation quantization."""
        return replace(self, act_bits=None)


def as_scheme(scheme: Scheme | str) -> Scheme:
    """Return `scheme` itself or its parsed spelling.

    Raises
    ------
    InputError
        If it is neither a `Scheme` nor a string, or outside the grammar.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise InputError(
            f"not a scheme: got {type(scheme).__name__} {scheme!r}, allowed are a Scheme and a spelling "
            f"{_GRAMMAR}"
        )
    return Scheme.parse(scheme)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NestedScales:
    """Scales that were quantized a second time (``d``): ``scale = table[codes] * absmax + offset``.

    Parameters
    ----------
    codes : Tensor
        uint8, one per scale in row-major order.
    table : Tensor
        fp32 ``[256]``.
    absmax : Tensor
        fp32 ``[ceil(numel / block)]``.
    offset : float
        Mean that was subtracted before quantization.
    block : int
        Scales that share an absmax.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    offset: float
    block: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A quantized weight in the neutral form that algorithms return and formats read and write.

    ``w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]`` (or ``q * s + offsets``, or
    ``table[q] * s``), with ``g = k // group_size`` or ``group_index[k]``.

    Parameters
    ----------
    codes : Tensor
        int32 ``[(E,) N, ceil(K*bits/32)]``: unsigned codes in original column order, a dense
        little-endian bit stream along K, each row padded with zero bits to 32 bits.
    scales : Tensor
        fp16, bf16 or fp32 ``[(E,) N, groups]`` (``[1, 1]`` per tensor), signed.
    shape : tuple of int
        ``(N, K)`` or ``(E, N, K)``.
    scheme : Scheme
        Its `zero_point` says whether `zeros` or `offsets` must be there.
    zeros : Tensor or None
        uint8, shape of the scales.
    offsets : Tensor or None
        dtype and shape of the scales; excludes `zeros`.
    group_index : Tensor or None
        int32 ``[K]``: the group of each column (act-order); groups may be uneven.
    nested : NestedScales or None
        The stored form of the scales when ``scheme.double_quant``; `scales` are then decoded ones.
    input_scale : Tensor or None
        Static scale of the activations, fp32 ``[1]``, above 0; None: each token has its own.

    Raises
    ------
    InputError
        When shapes, dtypes or devices do not fit together.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    scheme: Scheme
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    group_index: Tensor | None = None
    nested: NestedScales | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        *experts, N, K = self.shape
        expected = (*experts, N, self.scheme.code_words(K))
        if self.codes.dtype != torch.int32 or tuple(self.codes.shape) != expected:
            raise InputError(
                f"codes of a {self.scheme} weight {self.shape} must be int32 {expected}: "
                f"got {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        self._check_scales((*experts, *self.scheme.scale_shape(N, K)))
        if self.zeros is not None and self.offsets is not None:
            raise InputError("zeros and offsets exclude each other: got both; pass one")
        if self.scheme.zero_point != (self.zeros is not None or self.offsets is not None):
            raise InputError(
                f"scheme {self.scheme} {'needs' if self.scheme.zero_point else 'excludes'} zeros or offsets"
            )
        index = self.group_index
        if index is not None and (index.dtype != torch.int32 or tuple(index.shape) != (K,)):
            raise InputError(f"group_index must be int32 [{K}]: got {index.dtype} {tuple(index.shape)}")
        scale = self.input_scale
        if scale is not None and not self.scheme.has_plain_sums:
            raise InputError(f"a static input_scale goes with w8a8, one scale a channel: got {self.scheme}")
        if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (1,)):
            raise InputError(f"input_scale must be fp32 (1,): got {scale.dtype} {tuple(scale.shape)}")

    def _check_scales(self, plain: tuple[int, ...]) -> None:
        shape = tuple(self.scales.shape)
        # Act-order files may number more groups than K / group_size, so only the rows are fixed there.
        fits = shape == plain or (self.group_index is not None and shape[:-1] == plain[:-1])
        if self.scales.dtype not in FLOAT_DTYPES or not fits:
            raise InputError(
                f"scales of a {self.scheme} weight {self.shape} must be fp16, bf16 or fp32 {plain}: "
                f"got {self.scales.dtype} {shape}"
            )
        for name, tensor, dtype in (
            ("zeros", self.zeros, torch.uint8),
            ("offsets", self.offsets, self.scales.dtype),
        ):
            if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
                raise InputError(f"{name} must be {dtype} {shape}: got {tensor.dtype} {tuple(tensor.shape)}")
        if self.nested is not None:
            self._check_nested(self.nested)

    def _check_nested(self, nested: NestedScales) -> None:
        if not self.scheme.double_quant:
            raise InputError(
                f"nested scales go with double quantization (d): got {self.scheme}; leave them out"
            )
        if self.scales.dtype != torch.float32 or nested.block < 1:
            raise InputError(
                f"nested scales are those of fp32 scales, in blocks of 1 or more: got {self.scales.dtype}, "
                f"blocks of {nested.block}"
            )
        count = self.scales.numel()
        for name, tensor, dtype, size in (
            ("codes", nested.codes, torch.uint8, count),
            ("table", nested.table, torch.float32, 256),
            ("absmax", nested.absmax, torch.float32, -(-count // nested.block)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != (size,):
                raise InputError(
                    f"{name} of nested scales must be {dtype} ({size},): got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )

    @property
    def N(self) -> int:
        """Output features."""
        return self.shape[-2]

    @property
    def K(self) -> int:
        """Input features."""
        return self.shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight with every tensor on `device`; dtypes never change."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        nested = self.nested
        if nested is not None:
            nested = replace(
                nested,
                codes=nested.codes.to(device),
                table=nested.table.to(device),
                absmax=nested.absmax.to(device),
            )
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=move(self.zeros),
            offsets=move(self.offsets),
            group_index=move(self.group_index),
            nested=nested,
            input_scale=move(self.input_scale),
        )

    @property
    def stored_bits(self) -> int:
        """Bits that the weight needs in a file: codes, scales, zero points, group index, input scale.

        Row padding of the codes and the byte that holds a zero point in memory do not count.
        """
        count = 1
        for size in self.shape:
            count *= size
        bits = count * self.scheme.bits
        if self.nested is not None:
            bits += 8 * self.nested.codes.numel() + 32 * self.nested.absmax.numel()
        else:
            bits += 8 * self.scales.nbytes
        if self.zeros is not None:
            bits += self.scheme.bits * self.zeros.numel()
        if self.offsets is not None:
            bits += 8 * self.offsets.nbytes
        for tensor in (self.group_index, self.input_scale):
            if tensor is not None:
                bits += 8 * tensor.nbytes
        return bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight in one backend's kernel layout; made from a `QuantizedWeight`, never written to a file.

    Parameters
    ----------
    blob : Tensor
        uint8, one dimension; the layout's own header comes first.
    layout : str
        Layout id, for example ``cpu.k4x16``; names backend and tier family.
    N, K : int
        Output and input features.
    scheme : Scheme
        Scheme of the weight inside.
    input_scale : Tensor or None
        As in `QuantizedWeight`; no part of the blob.

    Attributes
    ----------
    spelling : str
        ``str(scheme)``, made here because a compiler that traces a call cannot build the string.
    """

    blob: Tensor
    layout: str
    N: int
    K: int
    scheme: Scheme
    input_scale: Tensor | None = None
    spelling: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spelling", str(self.scheme))
