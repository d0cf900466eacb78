"""Genomes that fit a budget: the bounds, repair, and the two searches that see sensitivities alone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qkern.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qkern.search.space import Genome, Space

__all__ = ["check_budget", "fill", "greedy", "is_full", "lagrangian", "random_genome", "repair"]


def check_budget(space: Space, budget: int) -> None:
    """Refuse a budget that no genome fits, or that every genome leaves unused.

    Raises
    ------
    InputError
        With the sizes on both sides of what is possible.
    """
    low, high = (space.bits(genome) for genome in space.ends())
    if budget < low:
        raise InputError(
            f"the target is below what the runtime's alleles allow: {_size(space, budget)} wanted, at least "
            f"{_size(space, low)} possible; allow smaller alleles, or raise the target"
        )
    if budget > high:
        raise InputError(
            f"the target is above everything that could be chosen: {_size(space, budget)} wanted, at most "
            f"{_size(space, high)} possible; lower the target, or allow larger alleles"
        )


def _size(space: Space, bits: int) -> str:
    return f"{bits / space.weights:.4f} bits a weight ({-(-bits // 8):,} bytes)"


def is_full(space: Space, genome: Sequence[int], budget: int) -> bool:
    """Whether a genome fits and no single gene could take its next larger allele."""
    slack = budget - space.bits(genome)
    return slack >= 0 and all(
        allele + 1 == len(gene.bits) or gene.bits[allele + 1] - gene.bits[allele] > slack
        for gene, allele in zip(space.genes, genome, strict=True)
    )


def repair(
    space: Space,
    genome: Sequence[int],
    budget: int,
    rng: np.random.Generator,
    losses: Sequence[Sequence[float]] | None = None,
    *,
    spread: float = 1.0,
) -> Genome:
    """Bring a genome to the budget: genes go down until it fits, then up while one more fits.

    Parameters
    ----------
    space, genome, budget
        As in `greedy`.
    rng : Generator
        Decides which gene moves.
    losses : sequence of sequence of float, optional
        By gene and allele. Given, the gene moves that costs least or gains most for its bits, after each
        was multiplied by ``exp(spread * normal)``; else any.
    spread : float
        See `losses`.
    """
    chosen = list(genome)
    slack = budget - space.bits(chosen)
    while slack < 0:
        able = [index for index, allele in enumerate(chosen) if allele > 0]
        index = _drawn(space, able, [allele - 1 for allele in chosen], rng, losses, spread, up=False)
        bits = space.genes[index].bits
        slack += bits[chosen[index]] - bits[chosen[index] - 1]
        chosen[index] -= 1
    while able := _upgrades(space, chosen, slack):
        index = _drawn(space, able, chosen, rng, losses, spread, up=True)
        bits = space.genes[index].bits
        slack -= bits[chosen[index] + 1] - bits[chosen[index]]
        chosen[index] += 1
    return tuple(chosen)


def _drawn(
    space: Space,
    able: Sequence[int],
    lower: Sequence[int],
    rng: np.random.Generator,
    losses: Sequence[Sequence[float]] | None,
    spread: float,
    *,
    up: bool,
) -> int:
    """Draw the gene that moves between allele `lower` and the next."""
    if losses is None:
        return int(rng.choice(able))
    factors = np.exp(spread * rng.standard_normal(len(able)))
    gains = [_gain(space, losses, lower, index) for index in able]
    weighed = [gain * factor for gain, factor in zip(gains, factors, strict=True)]
    return able[int(np.argmax(weighed) if up else np.argmin(weighed))]


def random_genome(space: Space, budget: int, rng: np.random.Generator) -> Genome:
    """Draw every allele evenly and repair."""
    return repair(space, [int(rng.integers(len(gene.bits))) for gene in space.genes], budget, rng)


def fill(space: Space, genome: Sequence[int], budget: int, losses: Sequence[Sequence[float]]) -> Genome:
    """Spend what is left of the budget where a bit lowers the loss most; any upgrade counts at last."""
    chosen = list(genome)
    slack = budget - space.bits(chosen)
    while able := _upgrades(space, chosen, slack):
        index = max(able, key=lambda index: _gain(space, losses, chosen, index))
        bits = space.genes[index].bits
        slack -= bits[chosen[index] + 1] - bits[chosen[index]]
        chosen[index] += 1
    return tuple(chosen)


def greedy(space: Space, losses: Sequence[Sequence[float]], budget: int) -> Genome:
    """From the smallest genome upwards, always the step that lowers the loss most for its bits.

    Parameters
    ----------
    space : Space
        Genes and sizes.
    losses : sequence of sequence of float
        By gene and allele, for example the KL of the model with this gene alone quantized so.
    budget : int
        Bits.
    """
    check_budget(space, budget)
    return fill(space, space.ends()[0], budget, losses)


def lagrangian(space: Space, losses: Sequence[Sequence[float]], budget: int) -> Genome:
    """Minimize the sum of losses under the budget by its Lagrangian, then fill what is left.

    Every gene takes the allele with the least ``loss + price * bits``; the price is the lowest at which
    all of it fits. Only alleles on the lower convex hull of a gene can be chosen, so prices that matter
    are the slopes of the hulls.

    Parameters
    ----------
    space, losses, budget
        As in `greedy`.
    """
    check_budget(space, budget)
    prices = sorted(
        {price for gene, row in zip(space.genes, losses, strict=True) for price in _slopes(gene.bits, row)}
    )
    low, high = 0, len(prices)
    # At a price above every slope each gene takes its smallest allele, which fits.
    while low < high:
        middle = (low + high) // 2
        if space.bits(_at_price(space, losses, prices[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    chosen = space.ends()[0] if low == len(prices) else _at_price(space, losses, prices[low])
    return fill(space, chosen, budget, losses)


def _at_price(space: Space, losses: Sequence[Sequence[float]], price: float) -> Genome:
    """Cheapest allele of each gene; of two alike, the smaller one."""
    return tuple(
        min(range(len(gene.bits)), key=lambda a: (row[a] + price * gene.bits[a], gene.bits[a]))
        for gene, row in zip(space.genes, losses, strict=True)
    )


def _slopes(bits: Sequence[int], losses: Sequence[float]) -> list[float]:
    """Falls of the loss a bit along the lower convex hull."""
    hull: list[int] = []
    for allele in range(len(bits)):
        if hull and losses[allele] >= losses[hull[-1]]:
            continue  # larger for nothing
        while len(hull) > 1 and _slope(bits, losses, hull[-2], hull[-1]) <= _slope(
            bits, losses, hull[-1], allele
        ):
            hull.pop()
        hull.append(allele)
    return [_slope(bits, losses, one, other) for one, other in pairwise(hull)]


def _slope(bits: Sequence[int], losses: Sequence[float], one: int, other: int) -> float:
    return (losses[one] - losses[other]) / (bits[other] - bits[one])


def _upgrades(space: Space, genome: Sequence[int], slack: int) -> list[int]:
    """Genes whose next larger allele still fits."""
    return [
        index
        for index, (gene, allele) in enumerate(zip(space.genes, genome, strict=True))
        if allele + 1 < len(gene.bits) and gene.bits[allele + 1] - gene.bits[allele] <= slack
    ]


def _gain(space: Space, losses: Sequence[Sequence[float]], genome: Sequence[int], index: int) -> float:
    return _slope(space.genes[index].bits, losses[index], genome[index], genome[index] + 1)
