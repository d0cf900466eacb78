"""bitsandbytes checkpoints as transformers writes them: nf4 and fp4, and LLM.int8().

========================================== ================== ==========================================
tensor                                     shape              content
========================================== ================== ==========================================
weight                                     uint8 [N*K/2, 1]   codes of nf4 or fp4, the first of two high
weight.absmax                              fp32 [N*K/B]       scales of blocks of B columns
weight.quant_map                           fp32 [16]          the codebook
weight.quant_state.bitsandbytes__<type>    uint8 [any]        JSON: type, block size, shape
weight                                     int8 [N, K]        LLM.int8(): codes
SCB                                        fp32 [N]           127 times the scale of each row
weight_format                              uint8 []           0: codes lie row by row
========================================== ================== ==========================================

Double-quantized scales: ``weight.absmax`` is uint8, codes of ``weight.nested_quant_map`` (fp32 [256]) times
``weight.nested_absmax`` (fp32, one for 256 scales), plus the JSON's ``nested_offset``.

Blocks run over the flattened weight, so only where B divides K are they groups of a row. Layers of 4 bits say
in their JSON what they are; ``quantization_config`` names the type of most.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints.base import Entry, config_field, refuse_unheld, take
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.ops import pack_bits, unpack_bits
from qkern.ops.codebooks import codebook
from qkern.ops.quantize_groupwise.nested import decode, dynamic_table
from qkern.schemes import CODEBOOKS, FLOAT_DTYPES, NestedScales, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = ["BITSANDBYTES", "LLM_INT8", "BitsandbytesFormat", "bitsandbytes_details"]

BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT8: Final = Scheme(bits=8, act_bits=8)
THRESHOLD: Final = "llm_int8_threshold"
_TOP: Final = 127
# bitsandbytes has sizes in 32 bits.
_MOST: Final = (1 << 31) - 1
_LARGEST: Final = torch.finfo(torch.float32).max
_STATE: Final = "weight.quant_state.bitsandbytes__"
# Longer than any: every layer takes as many bytes, and a plan knows them.
_STATE_BYTES: Final = 256


def bitsandbytes_details(dtype: str | None, threshold: float | None = None) -> dict[str, Any]:
    """Fields of ``quantization_config`` that the layers do not tell.

    Parameters
    ----------
    dtype : str or None
        In which bitsandbytes computes with 4-bit weights, as config.json names the model's; None: float32.
    threshold : float or None
        Magnitude from which LLM.int8() leaves columns of activations as they are; None: there is none.
    """
    return {"bnb_4bit_compute_dtype": dtype or "float32", THRESHOLD: threshold or 0.0}


@dataclass(frozen=True, slots=True)
class BitsandbytesFormat:
    """bitsandbytes, its checkpoints of 4 or of 8 bits; both write either.

    Parameters
    ----------
    marker : str
        See `Format.marker`.
    parts : frozenset of str
        See `Format.parts`.
    """

    marker: str
    parts: frozenset[str]
    name: str = "bitsandbytes"

    def holds(self, scheme: Scheme, N: int, K: int, *, act_order: bool = False) -> str | None:
        """See `Format.holds`."""
        if act_order:
            return "bitsandbytes has no group index: quantize with method='rtn', or act_order='none'"
        if scheme == INT8:
            return None
        if scheme.codebook is None or scheme.act_bits is not None:
            return f"bitsandbytes holds nf4, fp4 and w8a8, its LLM.int8(): got {scheme}; choose one of these"
        if scheme.group_size not in BLOCKS:
            return (
                f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}: got {scheme}; use "
                f"{scheme.codebook}g64"
            )
        if K % scheme.group_size:
            return (
                "bitsandbytes' blocks run over the flattened weight, and are groups of its rows where they "
                f"divide the input features alone: got K={K}, blocks of {scheme.group_size}; choose a "
                "smaller block or keep the layer 16-bit"
            )
        return None

    def stored_bytes(self, scheme: Scheme, N: int, K: int) -> int:
        """See `Format.stored_bytes`; its scales are fp32 or, double-quantized, codes."""
        if scheme == INT8:
            return N * K + 4 * N + 1
        rows, groups = scheme.scale_shape(N, K)
        tables = 4 * (scheme.levels + 256 * scheme.double_quant)
        return N * K // 2 + scheme.scale_bytes(rows * groups) + tables + _STATE_BYTES

    def holds_together(self, schemes: Mapping[str, Scheme], skipped: Sequence[str] = ()) -> str | None:
        """See `Format.holds_together`; each layer of 4 bits says what it is, but none may have 8."""
        if len({scheme.bits for scheme in schemes.values()}) > 1:
            return "bitsandbytes loads a model in 4 bits or in 8, not in both: choose one for all layers"
        return None

    def encode(self, name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format.encode`."""
        refuse_unheld(self, name, qw)
        if qw.input_scale is not None:
            raise UnsupportedError(
                f"{name}: bitsandbytes quantizes activations by token: got a static input_scale; use "
                "activations='dynamic', or compressed-tensors"
            )
        tensors = _encode_int8(name, qw) if qw.scheme == INT8 else _encode_codebook(name, qw)
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def decode(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
        """See `Format.decode`; of 4 bits the layer's own JSON decides."""
        return (_decode_int8 if entry.scheme == INT8 else _decode_codebook)(name, tensors)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        *,
        act_order: bool = False,
        static: Collection[str] = (),
        skipped: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """See `Format.config`; `details` are `bitsandbytes_details`."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        int8 = common == INT8
        return {
            **bitsandbytes_details(None),
            **(details or {}),
            "quant_method": "bitsandbytes",
            "load_in_4bit": not int8,
            "load_in_8bit": int8,
            "_load_in_4bit": not int8,
            "_load_in_8bit": int8,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": common.codebook or "fp4",
            "bnb_4bit_use_double_quant": common.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(skipped),
        }

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Format.sidecars`."""
        return {}

    def entry_of(self, config: Mapping[str, Any]) -> Callable[[str], Entry]:
        """See `Format.entry_of`."""
        entry = self._entry(config)
        return lambda name: entry

    def _entry(self, config: Mapping[str, Any]) -> Entry:
        if self is LLM_INT8:
            threshold = config.get(THRESHOLD, 6.0)
            if not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
                raise FormatError(
                    f"quantization_config: {THRESHOLD} must be a number of 0 or more: got {threshold!r}"
                )
            return Entry(scheme=INT8, in_place=True, threshold=float(threshold) or None)
        kind = config_field(config, "bnb_4bit_quant_type", str, "fp4")
        nested = config_field(config, "bnb_4bit_use_double_quant", bool, False)
        return Entry(scheme=_scheme(kind, 64, nested), in_place=True)


def _scheme(kind: Any, block: Any, nested: bool) -> Scheme:
    if kind not in CODEBOOKS or block not in BLOCKS:
        raise FormatError(
            f"4-bit type {kind!r} in blocks of {block!r} is not read: allowed are {' and '.join(CODEBOOKS)} "
            f"in blocks of {', '.join(map(str, BLOCKS))}"
        )
    return Scheme(codebook=kind, group_size=block, double_quant=nested)


def _swapped(packed: Tensor) -> Tensor:
    """Exchange the two codes of each byte: the first is high in the file, low in the neutral form."""
    return packed >> 4 | packed << 4


def _encode_codebook(name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
    kind = str(qw.scheme.codebook)
    # Read by bitsandbytes where it decodes a weight without an input; 16-bit ones would round it.
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": qw.scheme.group_size,
        "dtype": "float32",
        "shape": list(qw.shape),
    }
    tensors = {
        "weight": _swapped(qw.codes.contiguous().view(torch.uint8)).reshape(-1, 1),
        "weight.absmax": qw.scales.float().reshape(-1),
        "weight.quant_map": _table(kind),
    }
    if qw.scheme.double_quant:
        nested = qw.nested
        if nested is None:
            raise InputError(f"{name}: a {qw.scheme} weight without its nested scales: quantize it again")
        if not torch.equal(decode(nested, tuple(qw.scales.shape)), qw.scales):
            raise InputError(
                f"{name}: its nested scales, which are what is stored, are not those that it computes with: "
                "quantize the weight again"
            )
        tensors["weight.absmax"] = nested.codes
        tensors["weight.nested_absmax"] = nested.absmax
        tensors["weight.nested_quant_map"] = nested.table.clone()
        state["nested_blocksize"] = nested.block
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nested.offset
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    tensors[_STATE + kind] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def _table(kind: str) -> Tensor:
    """Values of a codebook as bitsandbytes stores them, where no zero has a sign."""
    return codebook(kind).values + 0.0


def _decode_codebook(name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    kind, state = _read_state(name, tensors)
    shape, block = state.get("shape"), state.get("blocksize")
    nested = f"{name}.weight.nested_absmax" in tensors
    scheme = _scheme(kind, block, nested)
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise FormatError(f"{name}: the shape of its quant_state must be two sizes: got {shape!r}")
    N, K = shape
    refused = BITSANDBYTES.holds(scheme, N, K)
    if refused is not None:
        raise FormatError(f"{name}: {refused}")
    stored = take(tensors, f"{name}.weight", (torch.uint8, *FLOAT_DTYPES), (None, 1)).contiguous()
    packed = stored.view(torch.uint8).reshape(-1)
    if packed.numel() != N * K // 2:
        raise FormatError(f"tensor {name}.weight holds {packed.numel()} bytes, not the codes of {[N, K]}")
    table = take(tensors, f"{name}.weight.quant_map", (torch.float32,), (scheme.levels,))
    # bitsandbytes computes with its own numbers whatever is stored, which another device may have rounded.
    if not torch.allclose(table, _table(kind), rtol=0, atol=1e-6):
        raise FormatError(
            f"tensor {name}.weight.quant_map is not the codebook {kind}: other ones are not read"
        )
    groups = scheme.scale_shape(N, K)
    scales, nested_scales = _read_scales(name, tensors, state, groups, nested)
    return QuantizedWeight(
        codes=_swapped(packed).reshape(N, K // 2).view(torch.int32),
        scales=scales,
        shape=(N, K),
        scheme=scheme,
        nested=nested_scales,
    )


def _read_state(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Type and JSON of a layer of 4 bits."""
    kind = next((kind for kind in CODEBOOKS if f"{name}.{_STATE}{kind}" in tensors), CODEBOOKS[0])
    raw = take(tensors, f"{name}.{_STATE}{kind}", (torch.uint8,), (None,))
    try:
        state = json.loads(bytes(raw.tolist()))
    except ValueError as error:
        raise FormatError(f"tensor {name}.{_STATE}{kind} is no JSON ({error}); the file is damaged") from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise FormatError(f"tensor {name}.{_STATE}{kind} must say quant_type {kind!r}: got {state!r}")
    return kind, state


def _read_scales(
    name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], shape: tuple[int, int], nested: bool
) -> tuple[Tensor, NestedScales | None]:
    """fp32 scales of `shape`, and what they were decoded from."""
    count = shape[0] * shape[1]
    absmax = f"{name}.weight.absmax"
    if not nested:
        return take(tensors, absmax, FLOAT_DTYPES, (count,)).float().reshape(shape), None
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if (
        type(block) is not int
        or not 1 <= block <= _MOST
        or not isinstance(offset, float)
        or not abs(offset) <= _LARGEST
    ):
        raise FormatError(
            f"{name}: its quant_state must have a nested_blocksize of 1 to {_MOST} and a "
            f"nested_offset that fp32 holds: got {block!r} and {offset!r}"
        )
    blocks = -(-count // block)
    found = NestedScales(
        codes=take(tensors, absmax, (torch.uint8,), (count,)),
        table=take(tensors, f"{name}.weight.nested_quant_map", (torch.float32,), dynamic_table().shape),
        absmax=take(tensors, f"{name}.weight.nested_absmax", (torch.float32,), (blocks,)),
        offset=offset,
        block=block,
    )
    return decode(found, shape), found


def _encode_int8(name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
    scales = qw.scales.float().reshape(-1)
    tops = scales * _TOP
    # bitsandbytes looks for the largest of fp16 weights: of two neighbours with one quotient that is it.
    halves = tops.to(torch.float16).float()
    tops = torch.where(halves / _TOP == scales, halves, tops)
    # Of fp16 and bf16 scales it always is, and of those that were read or made in this form.
    if not torch.equal(tops / _TOP, scales):
        raise UnsupportedError(
            f"{name}: bitsandbytes stores 127 times the scales in fp32, which is not exact for all of these "
            f"(from {float(scales.abs().min())} to {float(scales.abs().max())}); use compressed-tensors"
        )
    codes = unpack_bits(qw.codes, 8, (qw.N, qw.K), layout="dense")
    return {
        "weight": (codes ^ qw.scheme.midpoint).view(torch.int8),
        "SCB": tops,
        "weight_format": torch.zeros((), dtype=torch.uint8, device="cpu"),
    }


def _decode_int8(name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    values = take(tensors, f"{name}.weight", (torch.int8,), (None, None))
    N, K = values.shape
    layout = tensors.get(f"{name}.weight_format")
    if layout is not None and bool(layout.any()):
        raise FormatError(
            f"tensor {name}.weight_format is {layout.tolist()}: only 0 is read, rows as they are; save the "
            "model again with a newer bitsandbytes"
        )
    tops = take(tensors, f"{name}.SCB", (torch.float32,), (N,))
    return QuantizedWeight(
        codes=pack_bits(values.contiguous().view(torch.uint8) ^ INT8.midpoint, 8, layout="dense"),
        scales=(tops / _TOP)[:, None],
        shape=(N, K),
        scheme=INT8,
    )


BITSANDBYTES: Final = BitsandbytesFormat(
    "weight.quant_map",
    frozenset(
        (
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            *(_STATE + kind for kind in CODEBOOKS),
        )
    ),
)
LLM_INT8: Final = BitsandbytesFormat("SCB", frozenset(("SCB", "weight_format")))
