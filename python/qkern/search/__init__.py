"""Mixed precision: what may be chosen, what a choice costs, and the search for the best one."""

from qkern.search.assignment import KEPT, Choice, MixedPrecision, parse_choice
from qkern.search.budget import check_budget, fill, greedy, is_full, lagrangian, random_genome, repair
from qkern.search.evaluator import ORIGINAL, Candidates, Evaluator, candidate_key
from qkern.search.genetic import Generation, evolve
from qkern.search.runtimes import RUNTIMES, Runtime, make_space, runtime_named, stored_bits
from qkern.search.space import Gene, Genome, Space

__all__ = [
    "KEPT",
    "ORIGINAL",
    "RUNTIMES",
    "Candidates",
    "Choice",
    "Evaluator",
    "Gene",
    "Generation",
    "Genome",
    "MixedPrecision",
    "Runtime",
    "Space",
    "candidate_key",
    "check_budget",
    "evolve",
    "fill",
    "greedy",
    "is_full",
    "lagrangian",
    "make_space",
    "parse_choice",
    "random_genome",
    "repair",
    "runtime_named",
    "stored_bits",
]
