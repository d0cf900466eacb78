"""The genetic search on losses that can be computed by hand."""

import numpy as np
import pytest

from qkern.errors import InputError
from qkern.search import Gene, Space, evolve, is_full, lagrangian, random_genome


def coupled(seed, genes=24):
    """Make a space whose loss is more than the sum of its parts, as that of a model is."""
    rng = np.random.default_rng(seed)
    space = Space(
        tuple(
            Gene(names=(f"l{i}",), layer=i, weights=256, alleles=("w2", "w3", "w4"), bits=(512, 768, 1024))
            for i in range(genes)
        )
    )
    scale = rng.exponential(size=genes)
    losses = [[float(s * f) for f in (1.0, 0.22, 0.05)] for s in scale]
    together = rng.exponential(size=(genes, genes)) * (rng.random((genes, genes)) < 0.2)

    def loss(genome):
        parts = np.array([row[allele] for row, allele in zip(losses, genome, strict=True)])
        return float(parts.sum() + parts @ together @ parts)

    return space, losses, loss


def test_it_beats_the_optimum_of_the_sensitivities_and_random_search():
    below = 0
    for seed in range(5):
        space, losses, loss = coupled(seed)
        budget = int(2.75 * space.weights)
        seen = []

        def evaluate(genomes, seen=seen, loss=loss):
            seen.extend(genomes)
            return [loss(genome) for genome in genomes]

        best = evolve(space, budget, losses, evaluate, seed=seed)
        assert len(seen) == len(set(seen)) == 240
        assert all(is_full(space, genome, budget) for genome in seen)
        assert loss(best) == min(map(loss, seen))
        rng = np.random.default_rng(seed)
        assert loss(best) < min(loss(random_genome(space, budget, rng)) for _ in range(240))
        assert loss(best) <= loss(lagrangian(space, losses, budget))
        below += loss(best) < loss(lagrangian(space, losses, budget))
    assert below >= 4


def test_a_seed_gives_one_search():
    space, losses, loss = coupled(0)
    budget = int(2.5 * space.weights)

    def run(seed):
        told = []
        evolve(
            space,
            budget,
            losses,
            lambda some: [loss(g) for g in some],
            seed=seed,
            see=told.append,
            generations=5,
        )
        return told

    first, again, other = run(1), run(1), run(2)
    assert first == again != other
    assert [generation.number for generation in first] == [1, 2, 3, 4, 5]
    falling = [generation.loss for generation in first]
    assert falling == sorted(falling, reverse=True)
    assert all(generation.mean >= generation.loss for generation in first)


def test_a_space_that_is_exhausted_ends():
    space, losses, loss = coupled(0, genes=2)
    best = evolve(space, 1280, losses, lambda some: [loss(g) for g in some], population=20, generations=12)
    assert is_full(space, best, 1280)


def test_bad_arguments():
    space, losses, _ = coupled(0)
    with pytest.raises(InputError, match="got 1 and 12"):
        evolve(space, int(2.5 * space.weights), losses, lambda some: [], population=1)
    with pytest.raises(InputError, match="at least 2"):
        evolve(space, 1, losses, lambda some: [])
