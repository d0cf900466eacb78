"""GPTQ checkpoints, v1 and v2.

======= ======================== =====================================================================
tensor  shape                    content
======= ======================== =====================================================================
qweight int32 [K*bits/32, N]     codes, a little-endian bit stream along K in each column
qzeros  int32 [G, N*bits/32]     zero points, a bit stream along N; v1 stores z - 1 in each field
scales  fp16 [G, N]              signed
g_idx   int32 [K]                group of each input column
======= ======================== =====================================================================

The stream along K is the neutral form's, so `qweight` is the transpose of its codes. Fields of three
bits cross words; 32 codes fill three. In v1 the subtraction is per field, modulo ``2**bits``: a zero
point of 0 wraps to the largest code, which half of the readers take for ``2**bits``, so qkern does not
write it and reads it as 0 (no writer chooses ``2**bits``).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints.base import (
    Entry,
    config_field,
    exact_fp16,
    make_scheme,
    plain_reason,
    refuse_unheld,
    take,
    trivial_index,
    write_zeros,
)
from qkern.errors import FormatError, UnsupportedError
from qkern.nn import FirstMatch
from qkern.ops import pack_bits, unpack_bits
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = ["GPTQ", "GPTQ_V2", "GptqFormat"]

logger = logging.getLogger(__name__)

MULTIPLE: Final = 32
# What GPTQModel, and transformers through it, load; vLLM takes 32, 64 and 128. Any other is read here only.
GROUP_SIZES: Final = (16, 32, 64, 128, 256, 512, 1024)
HEAD: Final = "lm_head"


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """GPTQ in one of its versions.

    Parameters
    ----------
    name : str
        ``gptq`` or ``gptq_v2``.
    zero_shift : int
        What is subtracted from a zero point before it is stored: 1 in v1, 0 in v2.
    """

    name: str
    zero_shift: int
    marker: str = "qweight"
    parts: frozenset[str] = frozenset(("qweight", "qzeros", "scales", "g_idx"))

    def holds(self, scheme: Scheme, N: int, K: int, *, act_order: bool = False) -> str | None:
        """See `Format.holds`; a short last group of these sizes is held, and act-order."""
        reason = plain_reason(scheme, "GPTQ")
        if reason is None and scheme.group_size not in (None, *GROUP_SIZES):
            return (
                f"GPTQ's readers refuse groups of {scheme.group_size}: allowed are "
                f"{', '.join(map(str, GROUP_SIZES))}, or none: one scale a channel; choose one of these"
            )
        if reason is None and (K % MULTIPLE or N % MULTIPLE):
            reason = (
                f"GPTQ packs whole words and needs input and output features that are multiples of "
                f"{MULTIPLE}: got N={N}, K={K}; keep the layer 16-bit or use compressed-tensors"
            )
        return reason

    def stored_bytes(self, scheme: Scheme, N: int, K: int) -> int:
        """See `Format.stored_bytes`."""
        rows, groups = scheme.scale_shape(N, K)
        return 4 * (N * scheme.code_words(K) + groups * scheme.code_words(rows) + K) + 2 * groups * rows

    def holds_together(self, schemes: Mapping[str, Scheme], skipped: Sequence[str] = ()) -> str | None:
        """See `Format.holds_together`; ``dynamic`` holds any mixture."""
        return None

    def encode(self, name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format.encode`."""
        refuse_unheld(self, name, qw)
        groups = qw.scales.shape[1]
        if groups != qw.scheme.num_groups(qw.K):
            raise UnsupportedError(
                f"{name}: GPTQ holds ceil(K / group_size) = {qw.scheme.num_groups(qw.K)} groups: got {groups}"
            )
        zeros = write_zeros(qw)
        if self.zero_shift and bool((zeros == 0).any()):
            raise UnsupportedError(
                f"{name}: a zero point of 0 does not fit GPTQ v1, which stores z - 1; use format='gptq_v2'"
            )
        stored = zeros.t().contiguous() - self.zero_shift
        index = trivial_index(qw.scheme, qw.K) if qw.group_index is None else qw.group_index
        return {
            f"{name}.qweight": qw.codes.t().contiguous(),
            f"{name}.qzeros": pack_bits(stored, qw.scheme.bits, layout="dense"),
            f"{name}.scales": exact_fp16(f"{name}.scales", qw.scales).t().contiguous(),
            f"{name}.g_idx": index.contiguous(),
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
        """See `Format.decode`."""
        scheme = entry.scheme
        qweight = take(tensors, f"{name}.qweight", (torch.int32,), (None, None))
        words, N = qweight.shape
        K = words * 32 // scheme.bits
        if K * scheme.bits != words * 32 or (N * scheme.bits) % 32:
            raise FormatError(
                f"tensor {name}.qweight {list(qweight.shape)} does not hold whole {scheme.bits}-bit rows"
            )
        groups = scheme.num_groups(K)
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        scales = take(tensors, f"{name}.scales", dtypes, (groups, N))
        qzeros = take(tensors, f"{name}.qzeros", (torch.int32,), (groups, N * scheme.bits // 32))
        zeros = self._read_zeros(name, qzeros.contiguous(), scheme, (groups, N))
        if not scheme.zero_point and not bool((zeros == scheme.midpoint).all()):
            # Some symmetric files were written with other zero points; the tensors decide.
            scheme = replace(scheme, zero_point=True)
        return QuantizedWeight(
            codes=qweight.t().contiguous(),
            scales=scales.t().contiguous(),
            shape=(N, K),
            scheme=scheme,
            zeros=zeros.t().contiguous() if scheme.zero_point else None,
            group_index=self._read_index(name, tensors, entry, K, groups),
        )

    def _read_zeros(self, name: str, qzeros: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        stored = unpack_bits(qzeros, scheme.bits, shape, layout="dense")
        if self.zero_shift and bool((stored == scheme.levels - 1).any()):
            logger.warning("%s: a GPTQ v1 zero point wrapped below 0; read as 0", name)
        return (stored + self.zero_shift) & (scheme.levels - 1)

    def _read_index(
        self, name: str, tensors: Mapping[str, Tensor], entry: Entry, K: int, groups: int
    ) -> Tensor | None:
        if f"{name}.g_idx" not in tensors and not entry.act_order:
            return None
        index = take(tensors, f"{name}.g_idx", (torch.int32, torch.int64), (K,)).to(torch.int32)
        if torch.equal(index, trivial_index(entry.scheme, K)):
            return None
        if bool((index < 0).any()) or bool((index >= groups).any()):
            raise FormatError(
                f"tensor {name}.g_idx must number groups 0 to {groups - 1}: got {int(index.min())} to "
                f"{int(index.max())}; the file is damaged"
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
        """See `Format.config`."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        # A reader takes the first pattern that matches, so each is anchored at both ends.
        dynamic: dict[str, dict[str, Any]] = {
            f"-:^{re.escape(name)}$": {} for name in skipped if name != HEAD
        }
        for name, scheme in schemes.items():
            if scheme != common:
                dynamic[f"+:^{re.escape(name)}$"] = self._fields(scheme)
        config = {
            "damp_percent": 0.05,
            "true_sequential": True,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["qkern"]},
            **(details or {}),
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "format": self.name,
            **self._fields(common),
            "desc_act": act_order,
            "lm_head": HEAD in schemes,
        }
        return {**config, "dynamic": dynamic} if dynamic else config

    @staticmethod
    def _fields(scheme: Scheme) -> dict[str, Any]:
        group_size = -1 if scheme.group_size is None else scheme.group_size
        return {"bits": scheme.bits, "group_size": group_size, "sym": not scheme.zero_point}

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Format.sidecars`."""
        return {"quantize_config.json": dict(config)}

    def entry_of(self, config: Mapping[str, Any]) -> Callable[[str], Entry]:
        """See `Format.entry_of`; the first pattern of ``dynamic`` that matches decides."""
        if config_field(config, "pack_dtype", str, "int32") != "int32":
            raise FormatError(
                f"quantization_config: pack_dtype {config['pack_dtype']!r} is not read, only 'int32'"
            )
        fields = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act") if key in config}
        dynamic = config_field(config, "dynamic", dict, None) or {}
        first = FirstMatch((key.removeprefix("+:").removeprefix("-:"), key) for key in dynamic)

        def entry(name: str) -> Entry:
            key = first(name)
            if key is None:
                return self._entry(fields)
            if key.startswith("-:"):
                raise FormatError(f"{name}: it is packed, but quantization_config excludes it by {key!r}")
            if not isinstance(dynamic[key], dict):
                raise FormatError(
                    f"quantization_config: dynamic[{key!r}] must be a dict: got {dynamic[key]!r}"
                )
            return self._entry({**fields, **dynamic[key]})

        return entry

    @staticmethod
    def _entry(fields: Mapping[str, Any]) -> Entry:
        scheme = make_scheme(
            config_field(fields, "bits", int),
            config_field(fields, "group_size", int, -1),
            not config_field(fields, "sym", bool, True),
        )
        return Entry(scheme=scheme, act_order=config_field(fields, "desc_act", bool, False))


GPTQ: Final = GptqFormat("gptq", 1)
GPTQ_V2: Final = GptqFormat("gptq_v2", 0)
