"""The genetic search: a genome has an allele a gene, operators move bits between genes within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from qkern.errors import InputError, UnsupportedError
from qkern.search.budget import check_budget, greedy, lagrangian, random_genome, repair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from qkern.search.space import Genome, Space

__all__ = [
    "Generation",
    "Losses",
    "check_population",
    "check_pymoo",
    "cuts",
    "evolve",
    "pareto_front",
    "random_search",
    "undominated",
]

# How far the first generation and the mutations stray from what the sensitivities say, in powers of e.
_SPREAD: Final = 0.5
# Added to the loss of what the first chunks rule out; far above any divergence in nats.
_DROPPED: Final = 1e6
# Parts of the text after which the worse half of a generation is dropped.
_STAGES: Final = (1 / 12, 1 / 4, 1 / 2)


class Losses(Protocol):
    """Losses of genomes over the first `stop` chunks of the text, or over all of it."""

    def __call__(self, genomes: Sequence[Genome], stop: int | None = None, /) -> Sequence[float]:
        """Return them in the order of the genomes."""
        ...


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
        Mean loss of the survivors that went through all of the text.
    """

    number: int
    best: Genome
    loss: float
    mean: float


def evolve(
    space: Space,
    budget: int,
    losses: Sequence[Sequence[float]],
    evaluate: Losses,
    *,
    population: int = 20,
    generations: int = 12,
    seed: int = 0,
    stages: Sequence[int] = (),
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
    stages : sequence of int
        Numbers of chunks of the text, ascending. A generation is evaluated on so many; the better half of it
        (and the optimum of the sensitivities) goes on to the next stage, and at last through all of the
        text. Default: all of it goes through all of the text.
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
    check_population(population, generations, seed)
    check_pymoo()
    check_budget(space, budget)
    from pymoo.algorithms.soo.nonconvex.ga import GA

    # pymoo draws numbers of its own for the tournament; neither stream disturbs the other.
    seen: set[Genome] = set()
    moves = _moves(space, losses, np.random.default_rng(seed), seen, budget)
    members = _first(space, budget, losses, population, np.random.default_rng([seed, 1]))
    algorithm = GA(pop_size=population, sampling=np.array(members), **moves)
    best: tuple[float, Genome] | None = None
    for number, genomes, tell in _generations(space, algorithm, generations, seed, objectives=1):
        seen.update(genomes)
        found = _staged(evaluate, genomes, stages, always=members[0])
        tell([[loss] for loss in found])
        best = min([*zip(found, genomes, strict=True), *([best] if best else [])])
        if see is not None:
            survivors = algorithm.pop.get("F")
            mean = float(survivors[survivors < _DROPPED].mean())
            see(Generation(number=number, best=best[1], loss=best[0], mean=mean))
    assert best is not None
    return best[1]


def cuts(chunks: int) -> list[int]:
    """Stages of a search over a text of so many chunks."""
    return [stop for part in _STAGES if (stop := round(part * chunks)) > 0]


def random_search(
    space: Space,
    budget: int,
    evaluate: Losses,
    *,
    population: int = 20,
    generations: int = 12,
    seed: int = 0,
    stages: Sequence[int] = (),
) -> Genome:
    """Return the best of as many random genomes as `evolve` evaluates, in the same stages."""
    check_population(population, generations, seed)
    check_budget(space, budget)
    rng = np.random.default_rng([seed, 2])
    best: tuple[float, Genome] | None = None
    for _ in range(generations):
        genomes = [random_genome(space, budget, rng) for _ in range(population)]
        found = _staged(evaluate, genomes, stages)
        best = min([*zip(found, genomes, strict=True), *([best] if best else [])])
    assert best is not None
    return best[1]


def pareto_front(
    space: Space,
    losses: Sequence[Sequence[float]],
    evaluate: Losses,
    *,
    population: int = 20,
    generations: int = 12,
    seed: int = 0,
    see: Callable[[int, int], None] | None = None,
) -> list[tuple[Genome, float]]:
    """Search the genomes that no other beats in both size and loss (NSGA-II).

    Parameters
    ----------
    space, losses, evaluate, population, generations, seed
        As in `evolve`; the first generation are Lagrangian optima of budgets that lie evenly between the
        smallest and the largest genome.
    see : callable, optional
        Is told the number of each generation and the length of the front.

    Returns
    -------
    list of tuple
        Genome and loss, smallest genome first.
    """
    check_population(population, generations, seed)
    check_pymoo()
    from pymoo.algorithms.moo.nsga2 import NSGA2

    seen: set[Genome] = set()
    low, high = (space.bits(genome) for genome in space.ends())
    budgets = np.linspace(low, high, population).astype(np.int64)
    members = list(dict.fromkeys(lagrangian(space, losses, int(budget)) for budget in budgets))
    moves = _moves(space, losses, np.random.default_rng(seed), seen)
    algorithm = NSGA2(pop_size=population, sampling=np.array(members), **moves)
    known: dict[Genome, float] = {}
    for number, genomes, tell in _generations(space, algorithm, generations, seed, objectives=2):
        seen.update(genomes)
        found = list(evaluate(genomes))
        known.update(zip(genomes, found, strict=True))
        tell([[space.bits(genome), loss] for genome, loss in zip(genomes, found, strict=True)])
        if see is not None:
            see(number, len(undominated(space, known)))
    return undominated(space, known)


def undominated(space: Space, known: Mapping[Genome, float]) -> list[tuple[Genome, float]]:
    """Return those of genomes with known losses that no other beats in size and loss, smallest first."""
    front: list[tuple[Genome, float]] = []
    for genome in sorted(known, key=lambda genome: (space.bits(genome), known[genome])):
        if not front or known[genome] < front[-1][1]:
            front.append((genome, known[genome]))
    return front


def check_pymoo() -> None:
    """Refuse to begin what needs pymoo where it is missing.

    Raises
    ------
    UnsupportedError
        If so.
    """
    if find_spec("pymoo") is None:
        raise UnsupportedError("a search needs pymoo, which is not installed: pip install pymoo")


def check_population(population: int, generations: int, seed: int = 0) -> None:
    """Refuse a search of no size, or a seed that is none.

    Raises
    ------
    InputError
        If so.
    """
    if population < 2 or generations < 1:
        raise InputError(
            f"a search needs a population of 2 and 1 generation at least: got {population} and {generations}"
        )
    if seed < 0:
        raise InputError(f"seed must be 0 or more: got {seed}")


def _generations(
    space: Space, algorithm: Any, generations: int, seed: int, *, objectives: int
) -> Iterator[tuple[int, list[Genome], Callable[[Sequence[Sequence[float]]], None]]]:
    """Yield the number of each generation, its new genomes, and what takes their objectives."""
    from pymoo.core.problem import Problem

    upper = np.array(space.ends()[1])
    problem = Problem(n_var=len(space), n_obj=objectives, xl=np.zeros_like(upper), xu=upper, vtype=int)
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    number = 0
    while algorithm.has_next():
        asked = algorithm.ask()
        if asked is None or len(asked) == 0:
            return  # every child was there before: the space is exhausted

        def tell(found: Sequence[Sequence[float]], asked: Any = asked) -> None:
            asked.set("F", np.array(found, dtype=np.float64))
            algorithm.evaluator.n_eval += len(asked)
            algorithm.tell(infills=asked)

        number += 1
        yield number, _genomes(asked), tell


def _staged(
    evaluate: Losses, genomes: Sequence[Genome], stages: Sequence[int], always: Genome | None = None
) -> list[float]:
    """Losses of genomes; each stage that one lacks puts it behind all that have it."""
    found = [0.0] * len(genomes)
    running = list(range(len(genomes)))
    for left, stop in zip(range(len(stages), -1, -1), (*stages, None), strict=True):
        some = [genomes[index] for index in running]
        losses = evaluate(some) if stop is None else evaluate(some, stop)
        for index, loss in zip(running, losses, strict=True):
            found[index] = left * _DROPPED + float(loss)
        better = sorted(running, key=lambda index: (found[index], index))[: -(-len(running) // 2)]
        running = [index for index in running if index in better or genomes[index] == always]
    return found


def _first(
    space: Space,
    budget: int,
    losses: Sequence[Sequence[float]],
    population: int,
    rng: np.random.Generator,
) -> list[Genome]:
    """Optima of the sensitivities, and of noisy sensitivities; all different."""
    chosen = [lagrangian(space, losses, budget), greedy(space, losses, budget)]
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
    losses: Sequence[Sequence[float]],
    rng: np.random.Generator,
    seen: set[Genome],
    budget: int | None = None,
) -> dict[str, Any]:
    """Crossover, mutation, repair to a budget, and what counts as new, in pymoo's form."""
    from pymoo.core.crossover import Crossover
    from pymoo.core.duplicate import DuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.repair import Repair

    tops = np.array(space.ends()[1])
    movable = np.flatnonzero(tops)

    class Uniform(Crossover):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            taken = rng.random(X.shape[1:]) < 0.5
            return np.stack([np.where(taken, X[0], X[1]), np.where(taken, X[1], X[0])])

    class Step(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            X = X.copy()
            for row in X if len(movable) else ():
                for gene in movable[rng.integers(len(movable), size=rng.geometric(0.5))]:
                    row[gene] = np.clip(row[gene] + rng.choice((-1, 1)), 0, tops[gene])
            return X

    class Fit(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
            assert budget is not None
            fitted = [repair(space, row.tolist(), budget, rng, losses, spread=_SPREAD) for row in X]
            return np.array(fitted).reshape(X.shape)

    class Unseen(DuplicateElimination):  # type: ignore[misc]
        """Also what did not survive is not evaluated again."""

        def do(self, pop: Any, *others: Any, **kwargs: Any) -> Any:
            known = seen.union(*(_genomes(other) for other in others))
            first = {genome: index for index, genome in reversed(list(enumerate(_genomes(pop))))}
            return pop[sorted(index for genome, index in first.items() if genome not in known)]

    moves: dict[str, Any] = {"crossover": Uniform(n_parents=2, n_offsprings=2), "mutation": Step()}
    if budget is not None:
        moves["repair"] = Fit()
    return {**moves, "eliminate_duplicates": Unseen()}
