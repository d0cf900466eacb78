"""Sizes of a model under an assignment, before anything is quantized, and targets that bound them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from qkern.errors import InputError
from qkern.models import column_weight
from qkern.nn import named_linears
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines.checks import strangers
from qkern.pipelines.export_gguf import export_gguf
from qkern.search import KEPT, STACKED, MixedPrecision, make_space, stored_bits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qkern.models import Structure
    from qkern.pipelines.source import Source
    from qkern.search import Runtime, Space

__all__ = ["Sizes", "Target"]

# Matrices of a GGUF that are no linears of the layers, by their names in both.
_OUTSIDE: Final = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}


@dataclass(frozen=True, slots=True)
class Target:
    """A size that a model must not exceed.

    Parameters
    ----------
    kind : {"bpw", "bpw_linear", "compression", "bytes"}
        What is counted: bits of all tensors over all weights, of the linears over theirs, bytes of all
        tensors over the original's, bytes of all tensors.
    value : float
        Its upper bound.
    """

    kind: str
    value: float

    @classmethod
    def one_of(cls, given: Mapping[str, float | None]) -> Self:
        """Return the one target that was given.

        Raises
        ------
        InputError
            If there is none, more than one, or it is no positive number.
        """
        wanted = {kind: value for kind, value in given.items() if value is not None}
        if len(wanted) != 1:
            options = ", ".join(f"target_{kind} (--target-{kind.replace('_', '-')})" for kind in given)
            raise InputError(f"a search needs one target of {options}: got {', '.join(wanted) or 'none'}")
        ((kind, value),) = wanted.items()
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"target_{kind} must be a positive number: got {value}")
        return cls(kind, float(value))

    def __str__(self) -> str:
        return self.spell(self.value)

    def spell(self, value: float) -> str:
        """Put a value of the target's kind in words."""
        if self.kind == "bytes":
            return f"{int(value):,} bytes"
        return (
            f"{value:.4f} "
            + {
                "bpw": "bits a weight, all tensors",
                "bpw_linear": "bits a weight of the linears",
                "compression": "of the original's bytes",
            }[self.kind]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What tensors of a model take.

    Parameters
    ----------
    original : int
        Bytes of all tensors as they are.
    fixed : int
        Bytes of what no assignment of the space changes: tensors, and of a GGUF its head.
    parameters : int
        Weights of the model, tied ones once.
    shapes : dict
        Rows and columns of every matrix that is assigned.
    stored : dict
        Bytes of the weight of every module as it is.
    counted : dict
        Weights of every linear that `bpw_linear` counts.
    outside : dict
        Of a GGUF, types of matrices that are not searched.
    """

    original: int
    fixed: int
    parameters: int
    shapes: dict[str, tuple[int, int]]
    stored: dict[str, int]
    counted: dict[str, int]
    outside: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        structure: Structure,
        runtime: Runtime,
        alleles: Sequence[str] | None,
        *,
        head: bool,
        embedding: bool,
        in_file: bool,
        export: Mapping[str, Any],
    ) -> tuple[Self, Space, dict[str, str]]:
        """Weigh a model, and make the space of a search in it; also return what stays as it is, and why.

        Every tensor is read once, so weights that are not finite are refused here. `export` are the arguments
        of the `qkern.export_gguf` that would follow, if the runtime is gguf.
        """
        linears = {name: column_weight(linear) for name, linear in named_linears(source.model).items()}
        bytes_ = {name: source.weights.get(name).nbytes for name in source.stored_once()}
        stored = {name.removesuffix(".weight"): size for name, size in bytes_.items()}
        stored = {**dict.fromkeys(linears, 0), **stored}
        space, kept = make_space(
            source.model,
            structure,
            runtime,
            alleles,
            stored=stored,
            head=head,
            embedding=embedding,
            in_file=in_file,
        )
        shapes = {}
        for name in (name for gene in space.genes for name in gene.names):
            N, K = column_weight(source.model.get_submodule(name)).shape
            shapes[name] = (N, K)
        fixed = sum(bytes_.values()) - sum(stored[name] for name in shapes)
        outside: dict[str, str] = {}
        if runtime.name == "gguf":
            fixed, outside = _gguf_rest(export, space, shapes)
        sizes = cls(
            original=sum(bytes_.values()),
            fixed=fixed,
            parameters=sum(parameter.numel() for parameter in source.model.parameters()),
            shapes=shapes,
            stored=stored,
            counted={
                name: weight.numel()
                for name, weight in linears.items()
                if name in shapes or not (name == structure.head or kept.get(name) == STACKED)
            },
            outside=outside,
        )
        left = {name: f"not searched: scored as it is, {type} in the file" for name, type in outside.items()}
        return sizes, space, kept | strangers(source.model) | left

    def linear_bits(self, names: Sequence[str], spelling: str) -> int:
        """Bits of linears in one allele: codes, scales and zero points."""
        return sum(self._bits(name, spelling) for name in names)

    def _bits(self, name: str, spelling: str, *, in_file: bool = False) -> int:
        if spelling == KEPT:
            return 8 * self.stored[name]
        return stored_bits(spelling, *self.shapes[name], in_file=in_file)

    def whole(self, assignment: MixedPrecision) -> MixedPrecision:
        """Return an assignment with the types of what was not searched, so that it needs no mixture."""
        return MixedPrecision({**self.outside, **assignment.choices})

    def of_assignment(self, assignment: MixedPrecision) -> dict[str, Any]:
        """Bytes of all tensors, and bits a weight of them and of the linears."""
        spelled = {name: assignment.choices[name] for name in self.shapes}
        total = 8 * self.fixed + sum(self._bits(name, s, in_file=True) for name, s in spelled.items())
        linear = sum(self._bits(name, spelled.get(name, KEPT)) for name in self.counted)
        return {
            "bytes": -(-total // 8),
            "bpw_file": total / self.parameters,
            "bpw_linear": linear / sum(self.counted.values()),
            "assignment": assignment,
        }

    def budget(self, target: Target, space: Space) -> int:
        """Bits that the genes of a space may take.

        Raises
        ------
        InputError
            If no genome meets the target, or all do, or it does not count what is searched.
        """
        if target.kind == "bpw_linear" and not self.shapes.keys() <= self.counted.keys():
            raise InputError(
                "target_bpw_linear counts linears, and the embedding is none: choose another target, or "
                "leave the embedding out of the search"
            )
        rest = 8 * self.fixed
        if target.kind == "bpw_linear":
            rest = sum(8 * self.stored[name] for name in self.counted if name not in self.shapes)
        unit = {
            "bytes": 8.0,
            "bpw": float(self.parameters),
            "compression": 8.0 * self.original,
            "bpw_linear": float(sum(self.counted.values())),
        }[target.kind]
        low, high = (space.bits(genome) for genome in space.ends())
        budget = math.floor(target.value * unit * (1 + 1e-12)) - rest
        if not low <= budget < high:
            raise InputError(
                f"no assignment has {target}: the smallest of the alleles takes "
                f"{target.spell((low + rest) / unit)}, the largest {target.spell((high + rest) / unit)}; "
                "choose a target from the smallest to below the largest, or other alleles"
            )
        return budget


def _gguf_rest(
    export: Mapping[str, Any], space: Space, shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, dict[str, str]]:
    """Bytes of a GGUF beside the searched tensors, and the types of embedding and head."""
    if not isinstance(export["model"], (str, Path)):
        raise InputError("runtime gguf exports a folder: save the model first (model.save_pretrained)")
    smallest = space.assignment(space.ends()[0])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sizes.gguf"
        report = export_gguf(**export, output=output, assignment=smallest, dry_run=True)
    searched = sum(
        stored_bits(smallest.choices[name], *shape, in_file=True) for name, shape in shapes.items()
    )
    outside = {
        _OUTSIDE[tensor.name]: tensor.type
        for tensor in report.tensors
        # A float type may be another than the stored one, which is all that an assignment can name.
        if tensor.name in _OUTSIDE
        and _OUTSIDE[tensor.name] not in shapes
        and gguf_type(tensor.type).block > 1
    }
    return report.file_bytes - searched // 8, outside
