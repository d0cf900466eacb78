"""The genetic search on losses that can be computed by hand."""

import itertools

import numpy as np
import pytest

from qkern.errors import InputError, UnsupportedError
from qkern.search import (
    Gene,
    Space,
    check_pymoo,
    evolve,
    is_full,
    lagrangian,
    pareto_front,
    random_genome,
    random_search,
)


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


def test_without_pymoo_it_does_not_begin(monkeypatch):
    monkeypatch.setattr("qkern.search.genetic.find_spec", {}.get)
    with pytest.raises(UnsupportedError, match="pip install pymoo"):
        check_pymoo()


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


def staged(loss, asked, noise=0.05):
    """Make losses whose first chunk is a noisy idea of the rest."""

    def evaluate(genomes, stop=None):
        asked.append((list(genomes), stop))
        rng = np.random.default_rng(abs(hash(tuple(genomes))) % 2**32)
        factors = 1 + noise * rng.standard_normal(len(genomes)) if stop else np.ones(len(genomes))
        return [loss(genome) * float(f) for genome, f in zip(genomes, factors, strict=True)]

    return evaluate


@pytest.mark.parametrize("search", ["evolve", "random"])
def test_only_the_better_half_goes_on(search):
    space, losses, loss = coupled(1)
    budget, asked, told = int(2.5 * space.weights), [], []
    evaluate = staged(loss, asked)
    if search == "evolve":
        best = evolve(space, budget, losses, evaluate, stages=(1, 2), generations=4, see=told.append)
    else:
        best = random_search(space, budget, evaluate, stages=(1, 2), generations=4)
    numbers = [(len(g), stop) for g, stop in asked]
    assert numbers[3:] == [(20, 1), (10, 2), (5, None)] * 3
    # The first one of all is the optimum of the sensitivities, which always goes on.
    assert numbers[0] == (20, 1)
    assert [stop for _, stop in numbers[1:3]] == [2, None]
    if search == "evolve":
        assert asked[2][0][0] == lagrangian(space, losses, budget)
    for (children, stop), (better, _) in itertools.pairwise(asked):
        assert stop is None or set(better) <= set(children)
    whole = [genome for genomes, stop in asked if stop is None for genome in genomes]
    assert loss(best) == min(map(loss, whole))
    assert all(is_full(space, genome, budget) for genomes, _ in asked for genome in genomes)
    # The mean is that of genomes that went through everything.
    assert all(generation.loss <= generation.mean < 1e3 for generation in told)


def test_random_search_is_given_by_its_seed():
    space, _, loss = coupled(2)
    budget = int(2.5 * space.weights)
    found = [random_search(space, budget, staged(loss, []), seed=seed, stages=(1, 2)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_front_has_every_size():
    space, losses, loss = coupled(3)
    counted, seen = [], []

    def evaluate(genomes, stop=None):
        assert stop is None
        counted.extend(genomes)
        return [loss(genome) for genome in genomes]

    front = pareto_front(space, losses, evaluate, see=lambda *told: seen.append(told))
    again = pareto_front(space, losses, evaluate)
    assert front == again
    assert len(counted) == len(set(counted)) * 2 <= 480
    sizes = [space.bits(genome) for genome, _ in front]
    kls = [kl for _, kl in front]
    assert sizes == sorted(sizes)
    assert kls == sorted(kls, reverse=True)
    assert [sizes[0], sizes[-1]] == [space.bits(end) for end in space.ends()]
    for genome in counted:
        assert any(space.bits(other) <= space.bits(genome) and kl <= loss(genome) for other, kl in front)
    assert [number for number, _ in seen] == list(range(1, 13))
    assert seen[-1][1] == len(front)
    # Random genomes of the same sizes are no match for it.
    rng = np.random.default_rng(0)
    assert all(
        loss(random_genome(space, size, rng)) >= kl
        for size, kl in zip(sizes, kls, strict=True)
        if size < sizes[-1]
    )
