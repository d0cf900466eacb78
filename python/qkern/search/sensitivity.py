"""Sensitivity: what each allele of each gene costs while everything else is left as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.search.assignment import KEPT
from qkern.search.evaluator import ORIGINAL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qkern.search.space import Genome, Space

__all__ = ["sensitivities", "single_changes"]


def single_changes(space: Space) -> dict[tuple[int, int], Genome]:
    """Genomes that change one gene of the original, by gene and allele; keeping it 16-bit is no change."""
    return {
        (index, allele): tuple(allele if other == index else ORIGINAL for other in range(len(space)))
        for index, gene in enumerate(space.genes)
        for allele, spelling in enumerate(gene.alleles)
        if spelling != KEPT
    }


def sensitivities(space: Space, evaluate: Callable[[Sequence[Genome]], Sequence[float]]) -> list[list[float]]:
    """Losses by gene and allele, each with all other genes left as they are.

    Parameters
    ----------
    space : Space
        The genes.
    evaluate : callable
        Losses of genomes, see `Evaluator.kl`.
    """
    changes = single_changes(space)
    found = dict(zip(changes, evaluate(list(changes.values())), strict=True))
    return [
        [found.get((index, allele), 0.0) for allele in range(len(gene.alleles))]
        for index, gene in enumerate(space.genes)
    ]
