"""Sizes of a model under an assignment, before anything is quantized, and targets that bound them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qkern.errors import InputError
from qkern.models import column_weight
from qkern.nn import named_linears
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines.checks import strangers
from qkern.pipelines.export_gguf import export_gguf
from qkern.pipelines.gguf_methods import check_types
from qkern.search import EMBEDDING, KEPT, Gene, Space, make_space, stored_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qkern.models import Structure
    from qkern.pipelines.export_gguf import GGUFReport
    from qkern.pipelines.source import Source
    from qkern.search import MixedPrecision, Runtime

__all__ = ["Sizes", "Target"]


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
            got = " and ".join(f"target_{kind}" for kind in wanted)
            raise InputError(f"a search needs one target of {options}: got {got or 'none'}")
        ((kind, value),) = wanted.items()
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"target_{kind} must be a positive number: got {value}")
        return cls(kind, float(value))

    def __str__(self) -> str:
        """Give the target as it was given, however close to a bound."""
        return self._words(f"{self.value:,.15g}")

    def bound(self, value: float, rounded: Callable[[float], int]) -> str:
        """Put a bound of targets of this kind in words, `rounded` to what is on its good side."""
        if self.kind == "bytes":
            return self._words(f"{rounded(value):,}")
        return self._words(f"{rounded(round(value * 1e4, 6)) / 1e4:.4f}")

    def _words(self, value: str) -> str:
        return (
            f"{value} "
            + {
                "bytes": "bytes",
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
    """

    original: int
    fixed: int
    parameters: int
    shapes: dict[str, tuple[int, int]]
    stored: dict[str, int]
    counted: dict[str, int]

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
        method: str,
        export: Mapping[str, Any],
    ) -> tuple[Self, Space, dict[str, str]]:
        """Weigh a model, and make the space of a search in it; also return what stays as it is, and why.

        Every tensor is read once, so weights that are not finite are refused here. `export` are the arguments
        of the `qkern.export_gguf` that would follow, if the runtime is gguf; a matrix that the search leaves
        alone is a gene then with the type it will have.
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
        left: dict[str, str] = {}
        fixed = None
        parameters = sum(parameter.numel() for parameter in source.model.parameters())
        if runtime.name == "gguf":
            if method == "gptq":
                inside = [gene for gene in space.genes if gene.layer not in (EMBEDDING, structure.count)]
                check_types(method, (gguf_type(s) for gene in inside for s in gene.alleles if s != KEPT))
            report, space, fixed = _as_exported(source, structure, space, export, in_file=in_file)
            parameters = sum(report.weights.values())
            left = {
                name: f"not searched: {gene.alleles[0]} in the file"
                for gene in space.genes
                if len(gene.alleles) == 1
                for name in gene.names
            }
        shapes = {name: _shape(source.model, name) for gene in space.genes for name in gene.names}
        total = sum(bytes_.values())
        sizes = cls(
            original=total,
            fixed=total - sum(stored[name] for name in shapes) if fixed is None else fixed,
            parameters=parameters,
            shapes=shapes,
            stored=stored,
            counted={name: weight.numel() for name, weight in linears.items() if name != structure.head},
        )
        return sizes, space, kept | strangers(source.model) | left

    def bits(self, names: Sequence[str], spelling: str, *, in_file: bool = False) -> int:
        """Bits of a gene's tensors in one allele, see `stored_bits`."""
        kept = 8 * sum(self.stored[name] for name in names)
        return stored_bits(spelling, *(self.shapes[name] for name in names), kept=kept, in_file=in_file)

    def of_assignment(self, space: Space, assignment: MixedPrecision) -> dict[str, Any]:
        """Bytes of all tensors, and bits a weight of them and of the linears."""
        total, linear = 8 * self.fixed, self._unsearched
        for gene in space.genes:
            spelling = assignment.choices[gene.names[0]]
            total += self.bits(gene.names, spelling, in_file=True)
            linear += self.bits(gene.names, spelling) * (gene.names[0] in self.counted)
        return {
            "bytes": -(-total // 8),
            "bpw_file": total / self.parameters,
            "bpw_linear": linear / sum(self.counted.values()),
            "assignment": assignment,
        }

    @property
    def _unsearched(self) -> int:
        """Bits of the linears that are counted and no genes."""
        return 8 * sum(self.stored[name] for name in self.counted if name not in self.shapes)

    def budget(self, target: Target, space: Space) -> int:
        """Bits that the genes of a space may take.

        Raises
        ------
        InputError
            If no genome meets the target, or all do, or it does not count what is searched.
        """
        uncounted = [gene for gene in space.genes if gene.names[0] not in self.counted]
        if target.kind == "bpw_linear" and any(len(gene.alleles) > 1 for gene in uncounted):
            raise InputError(
                "target_bpw_linear counts linears of the layers, neither the embedding nor the head: choose "
                "another target, or leave them out of the search"
            )
        rest = 8 * self.fixed
        if target.kind == "bpw_linear":
            rest = self._unsearched - sum(gene.bits[0] for gene in uncounted)
        unit = {
            "bytes": 8.0,
            "bpw": float(self.parameters),
            "compression": 8.0 * self.original,
            "bpw_linear": float(sum(self.counted.values())),
        }[target.kind]
        low, high = (space.bits(genome) for genome in space.ends())
        budget = math.floor(target.value * unit * (1 + 1e-12)) - rest
        if not low <= budget < high:
            wrong = "no assignment is as small as" if budget < low else "nothing to search: all are within"
            raise InputError(
                f"{wrong} {target}: the smallest of the alleles takes "
                f"{target.bound((low + rest) / unit, math.ceil)}, the largest "
                f"{target.bound((high + rest) / unit, math.floor)}; "
                "choose a target from the smallest to below the largest, or other alleles"
            )
        return budget


def _as_exported(
    source: Source, structure: Structure, space: Space, export: Mapping[str, Any], *, in_file: bool
) -> tuple[GGUFReport, Space, int]:
    """Add the matrices of a GGUF that nobody chooses to a space; also bytes of the rest of the file."""
    if not isinstance(export["model"], (str, Path)):
        raise InputError("runtime gguf exports a folder: save the model first (model.save_pretrained)")
    smallest = space.assignment(space.ends()[0])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sizes.gguf"
        report = export_gguf(**export, output=output, assignment=smallest, dry_run=True)
    model = source.model
    table = model.get_input_embeddings()
    embedding = next(name for name, module in model.named_modules() if module is table)
    ends = {embedding: EMBEDDING, structure.head: structure.count}
    searched = smallest.choices.keys()
    unsearched = [name for name in (embedding, *named_linears(model)) if name not in searched]
    genes = list(space.genes)
    for tensor in report.tensors:
        names = tuple(name for name in unsearched if fnmatchcase(f"{name}.weight", tensor.source))
        if not names or len(tensor.shape) == 1:  # a gate of shared experts is a vector there
            continue
        shapes = [_shape(model, name) for name in names]
        genes.append(
            Gene(
                names=names,
                layer=ends[names[0]] if names[0] in ends else _layer(structure, names[0]),
                weights=sum(N * K for N, K in shapes),
                alleles=(tensor.type,),
                bits=(stored_bits(tensor.type, *shapes, in_file=in_file),),
            )
        )
    genes.sort(key=lambda gene: gene.layer)
    matrices = sum(
        stored_bits(gene.alleles[0], *(_shape(model, name) for name in gene.names), in_file=True)
        for gene in genes
    )
    return report, Space(tuple(genes)), report.file_bytes - matrices // 8


def _layer(structure: Structure, name: str) -> int:
    return int(name.removeprefix(f"{structure.layers}.").partition(".")[0])


def _shape(model: Any, name: str) -> tuple[int, int]:
    N, K = column_weight(model.get_submodule(name)).shape
    return N, K
