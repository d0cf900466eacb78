"""Genomes within a budget, against every genome there is."""

import itertools
import re

import numpy as np
import pytest

from qkern.errors import InputError
from qkern.search import (
    Gene,
    Space,
    check_budget,
    greedy,
    is_full,
    lagrangian,
    random_genome,
    repair,
)


def make_space(rng, genes=5):
    made = []
    for index in range(genes):
        weights = int(rng.integers(1, 9)) * 256
        alleles = ("w2g64", "w3g128", "w4g128", "w8")[: int(rng.integers(2, 5))]
        bits = tuple(int(weights * b) for b in (2.25, 3.125, 4.125, 8)[: len(alleles)])
        made.append(Gene(names=(f"l{index}",), layer=index, weights=weights, alleles=alleles, bits=bits))
    losses = [np.sort(rng.exponential(size=len(gene.alleles)))[::-1].tolist() for gene in made]
    return Space(tuple(made)), losses


def everything(space):
    return itertools.product(*(range(len(gene.bits)) for gene in space.genes))


def total(losses, genome):
    return sum(row[allele] for row, allele in zip(losses, genome, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_every_search_fits_and_leaves_no_upgrade(seed):
    rng = np.random.default_rng(seed)
    space, losses = make_space(rng)
    low, high = (space.bits(genome) for genome in space.ends())
    for budget in rng.integers(low, high + 1, size=5).tolist():
        found = [
            lagrangian(space, losses, budget),
            greedy(space, losses, budget),
            random_genome(space, budget, rng),
            repair(space, space.ends()[1], budget, rng, losses),
            repair(space, space.ends()[0], budget, rng),
        ]
        for genome in found:
            assert is_full(space, genome, budget)
            larger = [
                g for g in everything(space) if sum(a != b for a, b in zip(g, genome, strict=True)) == 1
            ]
            assert not any(space.bits(genome) < space.bits(g) <= budget for g in larger)


@pytest.mark.parametrize("seed", range(20))
def test_the_lagrangian_is_optimal_but_for_one_gene(seed):
    rng = np.random.default_rng(seed)
    space, losses = make_space(rng)
    low, high = (space.bits(genome) for genome in space.ends())
    all_of_them = [(space.bits(genome), total(losses, genome)) for genome in everything(space)]
    exact = 0
    for budget in np.linspace(low, high, 9).astype(int).tolist():
        genome = lagrangian(space, losses, budget)
        reached = total(losses, genome)
        optimum = min(loss for size, loss in all_of_them if size <= budget)
        assert reached >= optimum - 1e-12
        exact += reached <= optimum + 1e-12
        # Never worse than the step before it on the hull: less than one gene's largest fall away.
        assert reached - optimum <= max(row[0] - row[-1] for row in losses)
    assert exact >= 3


def test_alleles_off_the_hull_are_not_bought():
    genes = tuple(
        Gene(names=(f"l{i}",), layer=i, weights=1, alleles=("w2", "w3", "w4"), bits=(2, 3, 4))
        for i in range(2)
    )
    # Three bits are hardly better than two, four are: one gene at four beats two at three.
    losses = [[1.0, 0.99, 0.0], [1.0, 0.99, 0.1]]
    assert lagrangian(Space(genes), losses, 6) == (2, 0)
    # Larger and worse is taken only to leave no bits, never on the way.
    worse = [[1.0, 2.0, 0.5], [1.0, 0.2, 0.1]]
    assert lagrangian(Space(genes), worse, 5) == (0, 1)


def test_budgets_that_cannot_be_met():
    space, losses = make_space(np.random.default_rng(0))
    low, high = (space.bits(genome) for genome in space.ends())
    with pytest.raises(InputError, match=re.escape(f"at least {low / space.weights:.4f}")):
        check_budget(space, low - 1)
    with pytest.raises(InputError, match=re.escape(f"at most {high / space.weights:.4f}")):
        lagrangian(space, losses, high + 1)
    check_budget(space, low)
    check_budget(space, high)


def test_a_genome_is_an_assignment():
    space, _ = make_space(np.random.default_rng(1))
    rng = np.random.default_rng(2)
    genome = tuple(int(rng.integers(len(gene.bits))) for gene in space.genes)
    assert dict(space.assignment(genome).choices) == {
        name: gene.alleles[allele]
        for gene, allele in zip(space.genes, genome, strict=True)
        for name in gene.names
    }


def test_genes_need_sizes_in_order():
    with pytest.raises(InputError, match=r"ascending order: got w4 4\.000, w2 2\.000"):
        Gene(names=("l",), layer=0, weights=1, alleles=("w4", "w2"), bits=(4, 2))
    with pytest.raises(InputError, match="nothing to search"):
        Space(())
