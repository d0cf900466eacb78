"""AWQ checkpoints in the GEMM layout.

======= ================== ===========================================================================
tensor  shape              content
======= ================== ===========================================================================
qweight int32 [K, N/8]     codes of 8 output columns a word, nibbles in the order 0 2 4 6 1 3 5 7
qzeros  int32 [K/g, N/8]   zero points, the same order, stored as they are
scales  fp16 [K/g, N]
======= ================== ===========================================================================

Always 4 bits. A symmetric weight is written with zero points of 8 and read back as symmetric.
"""

from __future__ import annotations

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
    write_zeros,
)
from qkern.errors import FormatError, UnsupportedError
from qkern.nn import FirstPart
from qkern.ops import pack_bits, unpack_bits
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = ["AWQ", "AwqFormat"]

BITS: Final = 4
PER_WORD: Final = 8


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """AWQ GEMM."""

    name: str = "awq"
    marker: str = "qweight"
    parts: frozenset[str] = frozenset(("qweight", "qzeros", "scales"))

    def holds(self, scheme: Scheme, N: int, K: int, *, act_order: bool = False) -> str | None:
        """See `Format.holds`."""
        if scheme.bits != BITS:
            return f"AWQ has 4 bits only: got {scheme}; use gptq, gptq_v2 or compressed-tensors"
        if act_order:
            return "AWQ has no group index: quantize with act_order='group-aware' or 'none', or use gptq_v2"
        if N % PER_WORD:
            return f"AWQ packs {PER_WORD} output features a word: got N={N}; keep the layer 16-bit"
        if scheme.group_size is not None and K % scheme.group_size:
            return (
                f"AWQ needs groups that divide the input features: got K={K}, group size {scheme.group_size}"
            )
        return plain_reason(scheme, "AWQ")

    def stored_bytes(self, scheme: Scheme, N: int, K: int) -> int:
        """See `Format.stored_bytes`."""
        rows, groups = scheme.scale_shape(N, K)
        return 4 * (K * (N // PER_WORD) + groups * (rows // PER_WORD)) + 2 * groups * rows

    def holds_together(self, schemes: Mapping[str, Scheme], skipped: Sequence[str] = ()) -> str | None:
        """See `Format.holds_together`; one group size, and no skipped name inside a quantized one."""
        sizes = {scheme.group_size for scheme in schemes.values()}
        if len(sizes) > 1:
            return (
                f"AWQ has one group size for all layers: got {sorted(str(size) for size in sizes)}; "
                "use compressed-tensors for mixtures"
            )
        # Readers skip every layer whose name contains an entry of modules_to_not_convert.
        part_of = FirstPart(skipped)
        for layer in schemes:
            name = part_of(layer)
            if name is not None:
                return (
                    f"AWQ lists 16-bit layers by a part of their name, and {name!r} is part of the quantized "
                    f"{layer!r}; use compressed-tensors, or treat both alike"
                )
        return None

    def encode(self, name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
        """See `Format.encode`."""
        refuse_unheld(self, name, qw)
        codes = unpack_bits(qw.codes, BITS, (qw.N, qw.K), layout="dense")
        return {
            f"{name}.qweight": pack_bits(codes, BITS, layout="awq"),
            f"{name}.qzeros": pack_bits(write_zeros(qw), BITS, layout="awq"),
            f"{name}.scales": exact_fp16(f"{name}.scales", qw.scales).t().contiguous(),
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
        """See `Format.decode`."""
        scheme = entry.scheme
        qweight = take(tensors, f"{name}.qweight", (torch.int32,), (None, None))
        K, N = qweight.shape[0], qweight.shape[1] * PER_WORD
        groups = scheme.num_groups(K)
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        scales = take(tensors, f"{name}.scales", dtypes, (groups, N))
        qzeros = take(tensors, f"{name}.qzeros", (torch.int32,), (groups, N // PER_WORD))
        zeros = unpack_bits(qzeros.contiguous(), BITS, (N, groups), layout="awq")
        scheme = replace(scheme, zero_point=not bool((zeros == scheme.midpoint).all()))
        codes = unpack_bits(qweight.contiguous(), BITS, (N, K), layout="awq")
        return QuantizedWeight(
            codes=pack_bits(codes, BITS, layout="dense"),
            scales=scales.t().contiguous(),
            shape=(N, K),
            scheme=scheme,
            zeros=zeros if scheme.zero_point else None,
        )

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
        reason = self.holds_together(schemes, skipped)
        if reason is not None:
            raise UnsupportedError(reason)
        group_size = next(iter(schemes.values())).group_size
        return {
            **(details or {}),
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": -1 if group_size is None else group_size,
            # qzeros are always there, and runtimes that see False do not read them.
            "zero_point": True,
            "modules_to_not_convert": list(skipped),
        }

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """See `Format.sidecars`."""
        return {}

    def entry_of(self, config: Mapping[str, Any]) -> Callable[[str], Entry]:
        """See `Format.entry_of`; the older keys ``w_bit`` and ``q_group_size`` are read too."""
        bits = config_field(config, "bits" if "bits" in config else "w_bit", int)
        if bits != BITS:
            raise FormatError(f"quantization_config: AWQ has 4 bits: got {bits}")
        group_size = config_field(config, "group_size" if "group_size" in config else "q_group_size", int)
        entry = Entry(scheme=make_scheme(bits, group_size, True))
        return lambda name: entry


AWQ: Final = AwqFormat()
