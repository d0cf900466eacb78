"""compressed-tensors checkpoints, formats pack-quantized and int-quantized.

================= ================================ ===================================================
tensor            shape                            content
================= ================================ ===================================================
weight_packed     int32 [N, ceil(K*bits/32)]       codes (value + 2**(bits-1)), a bit stream along K
weight            int8 [N, K]                      int-quantized: in its place, and without offset
weight_scale      [N, G], fp16, bf16 or fp32
weight_shape      int64 [2]                        N, K; not in int-quantized
weight_zero_point int32 [ceil(N*bits/32), G]       zero points (value + 2**(bits-1)), along N
weight_g_idx      int32 [K]                        read only: group of each column
input_scale       [1], fp32 (read: any float)      of static activations
================= ================================ ===================================================

Weights with int8 activations say so in ``input_activations``: a scale a token, or a static one. Those with 8
bits and one scale a channel, w8a8, are int-quantized, which is what runtimes have int8 kernels for.

``weight_packed`` is the neutral form's codes. Older versions packed 3-bit codes ten to a word; such a
tensor is wider than a dense one (``ceil(K/10)`` words against ``ceil(3K/32)``) for every K that is a
multiple of 32, and is recognized by that; where both widths agree it is read as dense. Older versions
also stored zero points unpacked, as int8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints.base import (
    Entry,
    config_field,
    make_scheme,
    plain_reason,
    refuse_unheld,
    take,
    trivial_index,
)
from qkern.errors import FormatError
from qkern.nn import FirstMatch
from qkern.ops import pack_bits, unpack_bits
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = ["COMPRESSED_TENSORS", "CompressedTensorsFormat"]

REGEX: Final = "re:"
PACKED: Final = "pack-quantized"
INT: Final = "int-quantized"
STORED: Final = (PACKED, INT)
# What the package takes where `input_activations` says nothing.
_DEFAULTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
MIXED: Final = "mixed-precision"


def _stored(scheme: Scheme) -> str:
    """Which of the formats holds a scheme."""
    return INT if scheme.has_plain_sums and not scheme.zero_point else PACKED


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _words_of_old(count: int, bits: int) -> int:
    per_word = 32 // bits
    return -(-count // per_word)


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    """compressed-tensors, pack-quantized and int-quantized."""

    name: str = "compressed-tensors"
    marker: str = "weight_scale"
    parts: frozenset[str] = frozenset(
        (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
            "input_scale",
            "input_zero_point",
        )
    )

    def holds(self, scheme: Scheme, N: int, K: int, *, act_order: bool = False) -> str | None:
        """See `Format.holds`."""
        if act_order:
            return (
                "compressed-tensors no longer reads a group index: quantize with act_order='group-aware' or "
                "'none', or use gptq_v2"
            )
        if scheme.group_size is not None and K % scheme.group_size:
            return (
                f"compressed-tensors needs groups that divide the input features: got K={K}, "
                f"group size {scheme.group_size}"
            )
        return plain_reason(scheme.weight_only(), "compressed-tensors")

    def stored_bytes(self, scheme: Scheme, N: int, K: int) -> int:
        """See `Format.stored_bytes`."""
        rows, groups = scheme.scale_shape(N, K)
        if _stored(scheme) == INT:
            return N * K + 2 * rows * groups
        zeros = 4 * _words(rows, scheme.bits) * groups * scheme.zero_point
        return 4 * N * _words(K, scheme.bits) + 2 * rows * groups + zeros + 16

    def holds_together(self, schemes: Mapping[str, Scheme], skipped: Sequence[str] = ()) -> str | None:
        """See `Format.holds_together`; a config group a scheme holds any mixture."""
        return None

    def encode(self, name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format.encode`; the scales keep their dtype."""
        refuse_unheld(self, name, qw)
        tensors = {f"{name}.weight_scale": qw.scales.contiguous()}
        if _stored(qw.scheme) == INT:
            codes = unpack_bits(qw.codes, qw.scheme.bits, (qw.N, qw.K), layout="dense")
            tensors[f"{name}.weight"] = (codes ^ qw.scheme.midpoint).view(torch.int8)
        else:
            tensors[f"{name}.weight_packed"] = qw.codes.contiguous()
            tensors[f"{name}.weight_shape"] = torch.tensor(qw.shape, dtype=torch.int64, device="cpu")
        if qw.input_scale is not None:
            tensors[f"{name}.input_scale"] = qw.input_scale
        if qw.zeros is not None:
            packed = pack_bits(qw.zeros.t().contiguous(), qw.scheme.bits, layout="gptq")
            tensors[f"{name}.weight_zero_point"] = packed.contiguous()
        return tensors

    def decode(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
        """See `Format.decode`."""
        scheme = entry.scheme
        read = self._read_int8 if entry.in_place else self._read_packed
        codes, (N, K) = read(name, tensors, scheme)
        groups = scheme.num_groups(K)
        scales = take(tensors, f"{name}.weight_scale", FLOAT_DTYPES, (N, groups))
        return QuantizedWeight(
            codes=codes,
            scales=scales.contiguous(),
            shape=(N, K),
            scheme=scheme,
            zeros=self._read_zeros(name, tensors, scheme, N, groups) if scheme.zero_point else None,
            group_index=self._read_index(name, tensors, entry, K, groups),
            input_scale=self._read_input_scale(name, tensors, entry),
        )

    @staticmethod
    def _read_int8(
        name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[Tensor, tuple[int, int]]:
        values = take(tensors, f"{name}.weight", (torch.int8,), (None, None))
        N, K = values.shape
        wide = values.to(torch.int16) + scheme.midpoint
        if values.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < scheme.levels:
            raise FormatError(f"tensor {name}.weight has values outside {scheme.bits} bits")
        return pack_bits(wide.to(torch.uint8), scheme.bits, layout="dense"), (N, K)

    def _read_packed(
        self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme
    ) -> tuple[Tensor, tuple[int, int]]:
        packed = take(tensors, f"{name}.weight_packed", (torch.int32,), (None, None))
        shape = take(tensors, f"{name}.weight_shape", (torch.int64, torch.int32), (2,))
        N, K = (int(size) for size in shape)
        widths = (_words(K, scheme.bits), _words_of_old(K, scheme.bits))
        if packed.shape[0] != N or packed.shape[1] not in widths:
            raise FormatError(
                f"tensor {name}.weight_packed {list(packed.shape)} is not a {scheme.bits}-bit matrix "
                f"{[N, K]}, which weight_shape says it is"
            )
        return self._read_codes(packed.contiguous(), scheme.bits, N, K), (N, K)

    @staticmethod
    def _read_input_scale(name: str, tensors: Mapping[str, Tensor], entry: Entry) -> Tensor | None:
        zero = tensors.get(f"{name}.input_zero_point")
        if zero is not None and bool(zero.any()):
            raise FormatError(f"tensor {name}.input_zero_point is not 0, as symmetric activations have it")
        stored = f"{name}.input_scale"
        if not entry.static:
            if stored in tensors:
                raise FormatError(f"tensor {stored} is there, but input_activations are not static")
            return None
        shape = (1,) if stored in tensors and tensors[stored].dim() else ()
        scale = take(tensors, stored, FLOAT_DTYPES, shape).reshape(1).to(torch.float32)
        if not 0 < float(scale) < float("inf"):
            raise FormatError(f"tensor {stored} must be above 0 and finite: got {float(scale)}")
        return scale

    @staticmethod
    def _read_codes(packed: Tensor, bits: int, N: int, K: int) -> Tensor:
        if packed.shape[1] != _words(K, bits):
            return pack_bits(unpack_bits(packed, bits, (N, K), layout="words"), bits, layout="dense")
        used = K * bits % 32
        if used:  # the neutral form promises zero bits after the last code
            packed = packed.clone()
            packed[:, -1] &= (1 << used) - 1
        return packed

    @staticmethod
    def _read_zeros(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, N: int, groups: int) -> Tensor:
        stored = take(tensors, f"{name}.weight_zero_point", (torch.int32, torch.int8), (None, groups))
        if stored.dtype == torch.int8 and stored.shape[0] == N:
            wide = stored.to(torch.int16) + scheme.midpoint
            if bool((wide < 0).any()) or bool((wide >= scheme.levels).any()):
                raise FormatError(f"tensor {name}.weight_zero_point has values outside {scheme.bits} bits")
            return wide.to(torch.uint8)
        if stored.dtype == torch.int32 and stored.shape[0] == _words(N, scheme.bits):
            return unpack_bits(stored.contiguous(), scheme.bits, (groups, N), layout="gptq").t().contiguous()
        if stored.dtype == torch.int32 and stored.shape[0] == _words_of_old(N, scheme.bits):
            rows = stored.t().contiguous()
            return unpack_bits(rows, scheme.bits, (groups, N), layout="words").t().contiguous()
        raise FormatError(
            f"tensor {name}.weight_zero_point {stored.dtype} {list(stored.shape)} does not hold "
            f"{scheme.bits}-bit zero points of {N} rows"
        )

    @staticmethod
    def _read_index(
        name: str, tensors: Mapping[str, Tensor], entry: Entry, K: int, groups: int
    ) -> Tensor | None:
        if f"{name}.weight_g_idx" not in tensors:
            if entry.act_order:
                raise FormatError(f"tensor {name}.weight_g_idx is missing: actorder 'group' needs it")
            return None
        index = take(tensors, f"{name}.weight_g_idx", (torch.int32, torch.int64), (K,)).to(torch.int32)
        # -1 throughout is how older versions mark an unused index.
        if bool((index == -1).all()) or torch.equal(index, trivial_index(entry.scheme, K)):
            return None
        if bool((index < 0).any()) or bool((index >= groups).any()):
            raise FormatError(
                f"tensor {name}.weight_g_idx must number groups 0 to {groups - 1}; the file is damaged"
            )
        return index

    def config(
        self,
        schemes: Mapping[str, Scheme],
        *,
        act_order: bool = False,
        static: Collection[str] = (),
        skipped: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """See `Format.config`; one scheme targets every Linear, several name their layers."""
        layers: dict[tuple[Scheme, bool], list[str]] = {}
        for name, scheme in schemes.items():
            layers.setdefault((scheme, name in static), []).append(name)
        formats = {_stored(scheme) for scheme in schemes.values()}
        mixed = len(formats) > 1
        groups = {}
        for number, ((scheme, is_static), names) in enumerate(layers.items()):
            grouped = scheme.group_size is not None
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(layers) == 1 else names,
                **({"format": _stored(scheme)} if mixed else {}),
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": not scheme.zero_point,
                    "strategy": "group" if grouped else "channel",
                    "group_size": scheme.group_size,
                    "dynamic": False,
                },
                "input_activations": None if scheme.act_bits is None else _activations(is_static),
                "output_activations": None,
            }
        return {
            **(details or {}),
            "quant_method": "compressed-tensors",
            "format": MIXED if mixed else next(iter(formats), PACKED),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(skipped),
        }

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Format.sidecars`."""
        return {}

    def entry_of(self, config: Mapping[str, Any]) -> Callable[[str], Entry]:
        """See `Format.entry_of`; an exact name beats a regular expression, which beats a class."""
        groups = config_field(config, "config_groups", dict)
        targets: list[tuple[str, str]] = []
        for label, group in groups.items():
            if not isinstance(group, dict):
                raise FormatError(
                    f"quantization_config: config_groups[{label!r}] must be a dict: got {group!r}"
                )
            targets += [(str(target), label) for target in config_field(group, "targets", list)]
        by_name = dict(reversed(targets))
        by_regex = FirstMatch(
            (target.removeprefix(REGEX), label) for target, label in targets if target.startswith(REGEX)
        )
        # Classes are not known here; the packed tensor itself says that the layer was targeted. Names of
        # modules that have no dot, as lm_head, begin small.
        classes = [entry for entry in targets if "." not in entry[0] and entry[0][:1].isupper()]
        classes.sort(key=lambda entry: entry[0] != "Linear")
        by_class = classes[0][1] if classes else None

        def entry(name: str) -> Entry:
            fitting = (by_name.get(name), by_regex(name), by_class)
            label = next((label for label in fitting if label is not None), None)
            if label is None:
                raise FormatError(
                    f"{name}: no group of quantization_config targets the layer, but the file holds it packed"
                )
            return self._entry(label, groups[label], config.get("format", PACKED))

        return entry

    @staticmethod
    def _entry(label: str, group: Mapping[str, Any], whole: str) -> Entry:
        weights = config_field(group, "weights", dict)
        if group.get("output_activations") is not None:
            raise FormatError(f"{label}: quantized outputs are not read")
        stored = group.get("format") or (PACKED if whole == MIXED else whole)
        if stored not in STORED:
            raise FormatError(f"{label}: format {stored!r} is not read: {' and '.join(STORED)} are")
        if config_field(weights, "type", str, "int") != "int":
            raise FormatError(f"{label}: weights of type {weights['type']!r} are not read: 'int' is")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise FormatError(f"{label}: strategy {strategy!r} is not read: 'group' and 'channel' are")
        scheme = make_scheme(
            config_field(weights, "num_bits", int),
            config_field(weights, "group_size", int) if strategy == "group" else None,
            not config_field(weights, "symmetric", bool, True),
        )
        static = _read_activations(label, group.get("input_activations"))
        if static is not None:
            scheme = replace(scheme, act_bits=8)
        if static and not scheme.has_plain_sums:
            raise FormatError(f"{label}: static activations are read with w8a8 alone: got {scheme}")
        return Entry(
            scheme=scheme,
            act_order=weights.get("actorder") == "group",
            in_place=stored == INT,
            static=bool(static),
        )


def _activations(static: bool) -> dict[str, Any]:
    """``input_activations`` of int8: one scale, or one a token."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor" if static else "token",
        "dynamic": not static,
    }


def _read_activations(label: str, found: Any) -> bool | None:
    """Whether ``input_activations`` are static; None if they are not quantized."""
    if found is None:
        return None
    for static in (False, True):
        wanted = _activations(static)
        if isinstance(found, dict) and {**_DEFAULTS, **found}.items() >= wanted.items():
            return static
    raise FormatError(
        f"{label}: input_activations {found!r} are not read: symmetric int8 are, dynamic with one scale a "
        "token or static with one for all"
    )


COMPRESSED_TENSORS: Final = CompressedTensorsFormat()
