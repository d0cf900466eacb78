"""The genetic search: a genome has an allele a gene, operators move bits between genes within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern.errors import InputError
from qkern.search.budget import check_budget, greedy, lagrangian, random_genome, repair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from qkern.search.space import Genome, Space

__all__ = ["Generation", "evolve"]

# How far the first generation and the mutations stray from what the sensitivities say, in powers of e.
_SPREAD: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How one generation went.

    Parameters
    ----------
    number : int
        From 1.
    best : Genome
        The best genome so far.
    loss : float
        Its loss.
    mean : float
        Mean loss of the survivors.
    """

    number: int
    best: Genome
    loss: float
    mean: float


def evolve(
    space: Space,
    budget: int,
    losses: Sequence[Sequence[float]],
    evaluate: Callable[[Sequence[Genome]], Sequence[float]],
    *,
    population: int = 20,
    generations: int = 12,
    seed: int = 0,
    seeds: Sequence[Genome] = (),
    see: Callable[[Generation], None] | None = None,
) -> Genome:
    """Search the genome of least loss within a budget.

    Parents are drawn by tournament; a child takes each gene from either of them, one gene of it moves, and
    others give or take the bits for that. Of parents and children together the best survive.

    Parameters
    ----------
    space : Space
        Genes and sizes.
    budget : int
        Bits. Every genome that is evaluated fits, and no gene of it could be larger.
    losses : sequence of sequence of float
        Sensitivities by gene and allele. Their Lagrangian optimum is in the first generation; they also say
        which moves are likely.
    evaluate : callable
        Losses of genomes, of a whole generation at once.
    population, generations : int
        Genomes in a generation; generations, the first one included.
    seed : int
        The same seed and losses give the same search.
    seeds : sequence of Genome
        More members of the first generation; repaired where they do not fit.
    see : callable, optional
        Is told how each generation went.

    Returns
    -------
    Genome
        The best one that was evaluated.

    Raises
    ------
    InputError
        On a population or number of generations below 2 or 1, or a budget that no genome fits.
    """
    if population < 2 or generations < 1:
        raise InputError(
            f"a search needs a population of 2 and 1 generation at least: got {population} and {generations}"
        )
    check_budget(space, budget)
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem

    # pymoo draws numbers of its own for the tournament; neither stream disturbs the other.
    seen: set[Genome] = set()
    moves = _moves(space, budget, losses, np.random.default_rng(seed), seen)
    algorithm = GA(
        pop_size=population,
        sampling=np.array(_first(space, budget, losses, population, seeds, np.random.default_rng([seed, 1]))),
        **moves,
    )
    upper = np.array(space.ends()[1])
    problem = Problem(n_var=len(space), n_obj=1, xl=np.zeros_like(upper), xu=upper, vtype=int)
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    best: tuple[float, Genome] | None = None
    while algorithm.has_next():
        asked = algorithm.ask()
        if asked is None or len(asked) == 0:
            break  # every child was there before: the space is exhausted
        genomes = _genomes(asked)
        seen.update(genomes)
        found = [float(loss) for loss in evaluate(genomes)]
        asked.set("F", np.array(found)[:, None])
        algorithm.evaluator.n_eval += len(asked)
        algorithm.tell(infills=asked)
        best = min([*zip(found, genomes, strict=True), *([best] if best else [])])
        if see is not None:
            mean = float(algorithm.pop.get("F").mean())
            see(Generation(number=algorithm.n_iter - 1, best=best[1], loss=best[0], mean=mean))
    assert best is not None
    return best[1]


def _first(
    space: Space,
    budget: int,
    losses: Sequence[Sequence[float]],
    population: int,
    seeds: Sequence[Genome],
    rng: np.random.Generator,
) -> list[Genome]:
    """Optima of the sensitivities, what the caller wants, optima of noisy sensitivities; all different."""
    chosen = [lagrangian(space, losses, budget), greedy(space, losses, budget)]
    chosen += [repair(space, genome, budget, rng, losses) for genome in seeds]
    members = dict.fromkeys(chosen[:population])
    for attempt in range(20 * population):
        if len(members) == population:
            break
        noise = np.exp(_SPREAD * rng.standard_normal(len(space)))
        noisy = [[loss * factor for loss in row] for row, factor in zip(losses, noise, strict=True)]
        # Where noise makes no more difference, any genome that fits does.
        wild = attempt >= 10 * population
        members[random_genome(space, budget, rng) if wild else lagrangian(space, noisy, budget)] = None
    return list(members)


def _genomes(population: Any) -> list[Genome]:
    return [tuple(int(allele) for allele in individual.X) for individual in population]


def _moves(
    space: Space,
    budget: int,
    losses: Sequence[Sequence[float]],
    rng: np.random.Generator,
    seen: set[Genome],
) -> dict[str, Any]:
    """Crossover, mutation, repair, and what counts as new, in pymoo's form."""
    from pymoo.core.crossover import Crossover
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.repair import Repair

    tops = np.array(space.ends()[1])

    class Uniform(Crossover):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            taken = rng.random(X.shape[1:]) < 0.5
            return np.stack([np.where(taken, X[0], X[1]), np.where(taken, X[1], X[0])])

    class Step(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            X = X.copy()
            for row in X:
                for gene in rng.integers(len(row), size=rng.geometric(0.5)):
                    row[gene] = np.clip(row[gene] + rng.choice((-1, 1)), 0, tops[gene])
            return X

    class Fit(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            fitted = [repair(space, row.tolist(), budget, rng, losses, spread=_SPREAD) for row in X]
            return np.array(fitted).reshape(X.shape)

    class Unseen(DuplicateElimination):  # type: ignore[misc]
        """Also what did not survive is not evaluated again."""

        def do(self, pop: Any, *others: Any, **kwargs: Any) -> Any:
            known = seen.union(*(_genomes(other) for other in others))
            first = {genome: index for index, genome in reversed(list(enumerate(_genomes(pop))))}
            return pop[sorted(index for genome, index in first.items() if genome not in known)]

    moves = {"crossover": Uniform(n_parents=2, n_offsprings=2), "mutation": Step(), "repair": Fit()}
    return {**moves, "eliminate_duplicates": Unseen()}
