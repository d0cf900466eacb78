"""Mixed precision: what may be chosen, what a choice costs, and the search for the best one."""

from qkern.search.assignment import KEPT, Choice, MixedPrecision, parse_choice, spell_choice
from qkern.search.budget import check_budget, fill, greedy, is_full, lagrangian, random_genome, repair
from qkern.search.cache import CachedLosses, Evaluates
from qkern.search.evaluator import ORIGINAL, Candidates, Evaluator, candidate_key
from qkern.search.genetic import (
    Generation,
    Losses,
    check_population,
    check_pymoo,
    cuts,
    evolve,
    pareto_front,
    random_search,
    undominated,
)
from qkern.search.runtimes import RUNTIMES, Runtime, make_space, runtime_named, stored_bits, tied_linears
from qkern.search.sensitivity import sensitivities, single_changes
from qkern.search.space import EMBEDDING, Gene, Genome, Space

__all__ = [
    "EMBEDDING",
    "KEPT",
    "ORIGINAL",
    "RUNTIMES",
    "CachedLosses",
    "Candidates",
    "Choice",
    "Evaluates",
    "Evaluator",
    "Gene",
    "Generation",
    "Genome",
    "Losses",
    "MixedPrecision",
    "Runtime",
    "Space",
    "candidate_key",
    "check_budget",
    "check_population",
    "check_pymoo",
    "cuts",
    "evolve",
    "fill",
    "greedy",
    "is_full",
    "lagrangian",
    "make_space",
    "pareto_front",
    "parse_choice",
    "random_genome",
    "random_search",
    "repair",
    "runtime_named",
    "sensitivities",
    "single_changes",
    "spell_choice",
    "stored_bits",
    "tied_linears",
    "undominated",
]
