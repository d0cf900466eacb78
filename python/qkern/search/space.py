"""The search space: what has to be stored alike, how each of it may be stored, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qkern.errors import InputError
from qkern.search.assignment import MixedPrecision

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EMBEDDING", "Gene", "Genome", "Space"]

EMBEDDING: Final = -1
"""Layer of the gene that is the input embedding, and a head that is tied to it."""

Genome = tuple[int, ...]
"""Index of the chosen allele, gene by gene."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gene:
    """Tensors that share a choice.

    Parameters
    ----------
    names : tuple of str
        Names in the model.
    layer : int
        Their decoder layer; what comes after the last one (the head) has the number of layers, the input
        embedding `EMBEDDING`.
    weights : int
        Weights of all of them.
    alleles : tuple of str
        Spellings, see `qkern.search.parse_choice`, fewest bits first.
    bits : tuple of int
        Bits that all of them take, by allele; ascending.
    """

    names: tuple[str, ...]
    layer: int
    weights: int
    alleles: tuple[str, ...]
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.alleles or len(self.alleles) != len(self.bits):
            raise InputError(f"{self.names[0]} needs one size for each of its alleles: got {self.bits}")
        if any(one >= other for one, other in zip(self.bits, self.bits[1:], strict=False)):
            raise InputError(
                f"{self.names[0]}: alleles must differ in size and come in ascending order: got "
                + ", ".join(
                    f"{a} {b / self.weights:.3f}" for a, b in zip(self.alleles, self.bits, strict=True)
                )
                + " bits a weight"
            )


@dataclass(frozen=True, slots=True)
class Space:
    """All genes of a model for one runtime.

    Parameters
    ----------
    genes : tuple of Gene
        In the order of the layers.
    """

    genes: tuple[Gene, ...]

    def __post_init__(self) -> None:
        if not self.genes:
            raise InputError("there is nothing to search: the model has no linear that may be quantized")

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def weights(self) -> int:
        """Weights of all genes."""
        return sum(gene.weights for gene in self.genes)

    def bits(self, genome: Sequence[int]) -> int:
        """Bits of a genome."""
        return sum(gene.bits[allele] for gene, allele in zip(self.genes, genome, strict=True))

    def ends(self) -> tuple[Genome, Genome]:
        """Return the smallest and the largest genome."""
        return (0,) * len(self.genes), tuple(len(gene.bits) - 1 for gene in self.genes)

    def uniform(self, spelling: str) -> Genome | None:
        """Genome in which all that has a choice has the same; None if some gene does not have it."""
        if any(spelling not in gene.alleles for gene in self.genes if len(gene.alleles) > 1):
            return None
        return tuple(gene.alleles.index(spelling) if len(gene.alleles) > 1 else 0 for gene in self.genes)

    def only(self, genome: Sequence[int]) -> Space:
        """Space in which genes have the alleles of a genome alone."""
        return Space(
            tuple(
                replace(gene, alleles=(gene.alleles[allele],), bits=(gene.bits[allele],))
                for gene, allele in zip(self.genes, genome, strict=True)
            )
        )

    def assignment(self, genome: Sequence[int]) -> MixedPrecision:
        """Return a genome as what the other verbs take, kept tensors by name too."""
        return MixedPrecision(
            {
                name: gene.alleles[allele]
                for gene, allele in zip(self.genes, genome, strict=True)
                for name in gene.names
            }
        )
