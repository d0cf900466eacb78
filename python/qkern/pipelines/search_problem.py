"""What a search does: candidates, losses of single changes, then of whole assignments, and a choice."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern import _progress
from qkern.calibration import LayerStream, calibration_hash
from qkern.pipelines.candidates import CandidateStore, make_candidates
from qkern.pipelines.search_report import Assigned, Finalist, SearchReport, Sensitivity, SensitivityReport
from qkern.search import (
    ORIGINAL,
    CachedLosses,
    Evaluator,
    Generation,
    cuts,
    evolve,
    greedy,
    lagrangian,
    pareto_front,
    random_genome,
    random_search,
    sensitivities,
    single_changes,
    undominated,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qkern.models import Structure
    from qkern.pipelines.partial import Partial
    from qkern.pipelines.search_texts import Texts
    from qkern.pipelines.sizes import Sizes, Target
    from qkern.pipelines.source import Source
    from qkern.search import Genome, MixedPrecision, Space

__all__ = ["Plan", "Problem"]

logger = logging.getLogger(__name__)

# Part of the text that single changes are scored on: there are many, and they need not be told apart.
_SINGLE: Final = 1 / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A model and what may be done to it; no weight was computed with yet."""

    source: Source
    structure: Structure
    space: Space
    kept: dict[str, str]
    sizes: Sizes
    runtime: str
    method: str
    device: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Genomes by what found them, the result first, with losses and perplexities; the original's last."""

    genomes: dict[str, Genome]
    losses: list[float]
    perplexities: list[float]
    evaluations: int
    history: tuple[Generation, ...] = ()
    finalists: tuple[Finalist, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is known of a model's alleles, and what finds out more."""

    plan: Plan
    texts: Texts
    partial: Partial
    stream: LayerStream
    top_k: int | None
    simulate: bool

    def opened(
        self, base: MixedPrecision | None = None, space: Space | None = None
    ) -> tuple[CandidateStore, CachedLosses]:
        """Candidates of a space (default: the plan's), made now or before, and what evaluates them."""
        plan, scored = self.plan, self.texts.scored
        # A single genome does not come back.
        kept = {} if space is None else {"kept": 0}
        space = plan.space if space is None else space
        candidates = make_candidates(
            self.stream,
            plan.structure,
            space,
            self.texts.calibration,
            plan.method,
            self.partial,
            base=base,
        )
        evaluator = Evaluator(
            self.stream, space, candidates, scored, top_k=self.top_k, simulate=self.simulate, **kept
        )
        facts = [
            [(gene.names, gene.alleles) for gene in space.genes],
            None if base is None else dict(base.choices),
            calibration_hash(scored),
            self.top_k,
            self.simulate,
            str(plan.device.type),
        ]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return candidates, CachedLosses(evaluator, space, self.partial.folder / f"losses-{name}.jsonl")

    def single(self, evaluate: CachedLosses) -> list[list[float]]:
        """Losses by gene and allele."""
        space = self.plan.space
        with _progress.task("sensitivity", total=len(single_changes(space)), unit="change") as progress:
            stop = self.single_chunks(evaluate)
            return sensitivities(space, lambda genomes: evaluate(genomes, stop, see=progress.advance))

    def single_chunks(self, evaluate: CachedLosses) -> int:
        """Chunks of the text that single changes go through."""
        return math.ceil(_SINGLE * evaluate.chunks)

    def sensitivity_report(self, started: float) -> SensitivityReport:
        """Measure every single change."""
        plan = self.plan
        candidates, evaluate = self.opened()
        losses, errors = self.single(evaluate), candidates.errors()
        inside = f"{plan.structure.layers}."
        genes = []
        for gene, row in zip(plan.space.genes, losses, strict=True):
            kinds = [
                name.removeprefix(inside).partition(".")[2] if name.startswith(inside) else name
                for name in gene.names
            ]
            quantized = [spelling for spelling in gene.alleles if (gene.names[0], spelling) in errors]
            genes.append(
                Sensitivity(
                    names=gene.names,
                    layer=gene.layer,
                    kind=_joined(kinds),
                    weights=gene.weights,
                    bits={s: plan.sizes.bits(gene.names, s) / gene.weights for s in gene.alleles},
                    kl=dict(zip(gene.alleles, row, strict=True)),
                    error={
                        s: math.fsum(errors[name, s] for name in gene.names) / len(gene.names)
                        for s in quantized
                    },
                )
            )
        return SensitivityReport(
            runtime=plan.runtime,
            method=plan.method,
            tokens=sum(evaluate.tokens[: self.single_chunks(evaluate)]),
            genes=tuple(genes),
            kept=plan.kept,
            seconds=time.monotonic() - started,
        )

    def search(self, budget: int, finalists: int, options: dict[str, Any]) -> Found:
        """Genetic search, and beside it what simpler ones find.

        Sensitivities are of single changes of the original. Whole assignments are scored with candidates that
        were made behind their Lagrangian optimum: all of them are near it, none is near the original. Codes
        still change with what is before them in the model, by as much as the best assignments differ: so the
        best few are quantized each behind itself, and chosen from by that.
        """
        space = self.plan.space
        _, evaluate = self.opened()
        losses = self.single(evaluate)
        optimum = lagrangian(space, losses, budget)
        if self.plan.method != "rtn":  # whose codes do not depend on what is before them in the model
            del evaluate  # its states go before the next ones come
            _, evaluate = self.opened(space.assignment(optimum))
        before = evaluate.evaluated
        stages = cuts(evaluate.chunks)
        history: list[Generation] = []
        found: dict[str, Genome] = {}
        with _progress.task("genetic search", total=options["generations"], unit="generation") as progress:

            def see(generation: Generation) -> None:
                history.append(generation)
                note = f"best {generation.loss:.5f}, mean {generation.mean:.5f}"
                logger.info("generation %d of %d: %s", generation.number, options["generations"], note)
                progress.advance(note=note)

            best = evolve(space, budget, losses, evaluate, stages=stages, see=see, **options)
        chosen = [genome for genome in evaluate.best(finalists + 1) if genome != optimum][:finalists]
        own: CachedLosses | None = None
        tried: list[Finalist] = []
        if finalists:
            best, own, tried = self._final(chosen, optimum, evaluate)
        found["genetic"] = best
        found["lagrangian"] = optimum
        found["greedy"] = greedy(space, losses, budget)
        with _progress.task("random search", total=options["generations"], unit="generation") as progress:

            def counted(genomes: Sequence[Genome], stop: int | None = None) -> list[float]:
                result = evaluate(genomes, stop)
                if stop is None:
                    progress.advance()
                return result

            found["random"] = random_search(space, budget, counted, stages=stages, **options)
        for spelling in dict.fromkeys(a for gene in space.genes for a in gene.alleles):
            uniform = space.uniform(spelling)
            if uniform is not None and space.bits(uniform) <= budget:
                found[f"uniform {spelling}"] = uniform
        result = replace(self._found(found, evaluate, before - len(chosen), history), finalists=tuple(tried))
        if own is None:
            return result
        alone = (0,) * len(space)
        return replace(
            result,
            losses=[*own([alone]), *result.losses[1:]],
            perplexities=[*own.perplexity([alone]), *result.perplexities[1:]],
        )

    def _final(
        self, genomes: Sequence[Genome], optimum: Genome, evaluate: CachedLosses
    ) -> tuple[Genome, CachedLosses | None, list[Finalist]]:
        """Quantize genomes each behind itself, as the optimum is; return the best of all, and what scores it.

        That evaluates a single genome, whose alleles are the only ones; None for the optimum. All that were
        tried come last, the optimum first.
        """
        (loss,) = evaluate([optimum])
        best: tuple[float, Genome, CachedLosses | None] = (loss, optimum, None)
        name = self.plan.space.assignment
        tried = [Finalist(found_by="lagrangian", kl=loss, by_candidates=loss, assignment=name(optimum))]
        with _progress.task("finalists", total=len(genomes), unit="assignment") as progress:
            for genome, by_candidates in zip(genomes, evaluate(genomes), strict=True):
                space = self.plan.space.only(genome)
                alone = (0,) * len(space)
                own = None  # its states go before the next ones come
                _, own = self.opened(space.assignment(alone), space)
                (loss,) = own([alone])
                progress.advance(note=f"{loss:.5f}, by candidates {by_candidates:.5f}")
                tried.append(
                    Finalist(
                        found_by="genetic", kl=loss, by_candidates=by_candidates, assignment=name(genome)
                    )
                )
                if loss < best[0]:
                    best = (loss, genome, own)
        return *best[1:], tried

    def front(self, options: dict[str, Any]) -> Found:
        """All sizes at once, and beside them what simpler searches find at the same sizes."""
        space = self.plan.space
        _, evaluate = self.opened()
        losses = self.single(evaluate)
        before = evaluate.evaluated
        with _progress.task("front", total=options["generations"], unit="generation") as progress:

            def see(number: int, length: int) -> None:
                note = f"{length} on the front"
                logger.info("generation %d of %d: %s", number, options["generations"], note)
                progress.advance(note=note)

            front = pareto_front(space, losses, evaluate, see=see, **options)
        sizes = [space.bits(genome) for genome, _ in front]
        rng = np.random.default_rng([options["seed"], 2])
        budgets = np.linspace(sizes[0], sizes[-1], options["population"] * options["generations"])
        simpler = {
            "lagrangian": [lagrangian(space, losses, size) for size in sizes],
            "greedy": [greedy(space, losses, size) for size in sizes],
            "random": [random_genome(space, int(budget), rng) for budget in budgets],
        }
        known = dict(front)
        fronts = {}
        for name, genomes in simpler.items():
            once = list(dict.fromkeys(genomes))
            scored = dict(zip(once, evaluate(once), strict=True))
            fronts[name] = undominated(space, scored)
            known |= scored
        # What a simpler search finds is on the front too, where it is better.
        return self._found(
            {
                f"{name} {index}": genome
                for name, points in {"pareto": undominated(space, known), **fronts}.items()
                for index, (genome, _) in enumerate(points)
            },
            evaluate,
            before,
        )

    def _found(
        self,
        genomes: dict[str, Genome],
        evaluate: CachedLosses,
        before: int,
        history: Sequence[Generation] = (),
    ) -> Found:
        original = (ORIGINAL,) * len(self.plan.space)
        return Found(
            genomes=genomes,
            losses=evaluate(list(genomes.values())),
            perplexities=evaluate.perplexity([*genomes.values(), original]),
            evaluations=evaluate.evaluated - before,
            history=tuple(history),
        )

    def search_report(
        self, found: Found, target: Target | None, seed: int, started: float, output: Path | None
    ) -> SearchReport:
        """Put sizes to what was found."""
        plan = self.plan
        assigned = []
        *perplexities, original = found.perplexities
        for (name, genome), kl, one in zip(found.genomes.items(), found.losses, perplexities, strict=True):
            assignment = plan.space.assignment(genome)
            by = name.partition(" ")[0] if target is None else name
            facts = plan.sizes.of_assignment(plan.space, assignment)
            assigned.append(Assigned(found_by=by, kl=kl, perplexity=one, **facts))
        return SearchReport(
            best=None if target is None else assigned[0],
            others=tuple(assigned if target is None else assigned[1:]),
            perplexity=original,
            target="every size" if target is None else str(target),
            runtime=plan.runtime,
            method=plan.method,
            samples=len(self.texts.calibration),
            tokens=self.texts.scored.numel(),
            evaluations=found.evaluations,
            seed=seed,
            history=found.history,
            finalists=found.finalists,
            kept=plan.kept,
            seconds=time.monotonic() - started,
            output=output,
        )


def _joined(kinds: Sequence[str]) -> str:
    """Names that differ at the end alone as one, such as ``self_attn.q_proj+k_proj``."""
    first, _, _ = kinds[0].rpartition(".")
    same = [kind.removeprefix(f"{first}.") for kind in kinds[1:]]
    return "+".join([kinds[0], *same])
