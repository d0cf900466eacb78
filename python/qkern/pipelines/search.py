"""The verbs `sensitivity` and `search_assignment`: candidates first, then losses of whole assignments."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern import _progress
from qkern.calibration import LayerStream, calibration_hash
from qkern.errors import InputError
from qkern.gguf.writer import write_whole
from qkern.models import describe
from qkern.pipelines.candidates import METHODS, CandidateStore, make_candidates
from qkern.pipelines.load import usable_device
from qkern.pipelines.partial import Partial, partial_folder
from qkern.pipelines.quantize import run_key
from qkern.pipelines.search_report import (
    Assigned,
    SearchReport,
    Sensitivity,
    SensitivityReport,
    new_file,
    new_folder,
)
from qkern.pipelines.search_texts import Texts
from qkern.pipelines.sizes import Sizes, Target
from qkern.pipelines.source import Source, open_source
from qkern.search import (
    ORIGINAL,
    CachedLosses,
    Evaluator,
    Generation,
    MixedPrecision,
    Space,
    check_population,
    check_pymoo,
    cuts,
    evolve,
    greedy,
    lagrangian,
    pareto_front,
    random_genome,
    random_search,
    runtime_named,
    sensitivities,
    single_changes,
    undominated,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qkern.models import Structure
    from qkern.search import Genome

__all__ = ["search_assignment", "sensitivity"]

logger = logging.getLogger(__name__)

# Part of the text that single changes are scored on: there are many, and they need not be told apart.
_SINGLE: Final = 1 / 2


def sensitivity(
    model: Any,
    *,
    calibration: Any,
    text: Any = None,
    runtime: str = "torch",
    alleles: Sequence[str] | None = None,
    head: bool | None = None,
    embedding: bool | None = None,
    method: str = "gptq",
    samples: int = 128,
    length: int = 2048,
    tokens: int = 12288,
    top_k: int | None = None,
    simulate: bool = False,
    tokenizer: Any = None,
    device: str = "auto",
    store: str | Path | None = None,
    resume: bool = True,
    output: str | Path | None = None,
) -> SensitivityReport:
    """Measure what each allele of each linear costs while all others stay as they are.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        16-bit folder, hub id, or a model in memory, which is not modified.
    calibration
        Source of texts as in `qkern.calibration.load_texts`, or token ids int64 ``[S, T]``.
    text : optional
        Texts that KL is measured on; default: sequences of the calibration that are set aside.
    runtime : {"torch", "vllm", "gguf"}
        What will load the result: which alleles are legal, and what must share one.
    alleles : sequence of str, optional
        Schemes such as ``"w3g128"`` (``"w3g128a8"``: with int8 activations), GGUF types such as ``"q4_k"``
        or ``"16"``; default: the runtime's.
    head, embedding : bool, optional
        The output head too; the input embedding, which GGUF alone holds quantized, and a head tied to it.
        Default: both for runtime gguf, unless a target counts linears alone; none for the others.
    method : {"gptq", "rtn"}
        How codes are chosen.
    samples, length : int
        Calibration sequences, tokens in each (at most what the model takes).
    tokens : int
        Tokens that whole assignments are scored on; a linear by itself is scored on the first half of them.
    top_k : int, optional
        KL over the original's likeliest tokens, all others as one; default: over the vocabulary.
    simulate : bool
        Dequantized weights in the model's own linears, instead of codes on qkern's kernels.
    tokenizer : optional
        For texts, when `model` is in memory.
    device : str
        Where layers are computed: ``"auto"`` (CUDA if there is one, else CPU) or a torch device.
    store : str or Path, optional
        Folder that keeps candidates and losses for later runs of the same model and calibration. Without one
        they are in ``<output>.partial`` until the run is done.
    resume : bool
        Use what is in that folder; False removes it first.
    output : str or Path, optional
        JSON file to write, which must not exist.

    Raises
    ------
    InputError
        On arguments, texts or weights that cannot be used, or a store of another model.
    UnsupportedError
        If the runtime cannot load an allele, or the model computes in a way that is not followed.
    OutputError
        If the disk is full; what is done is kept.
    """
    started = time.monotonic()
    path = new_file(output)
    drawn: dict[str, Any] = {"calibration": calibration, "samples": samples, "length": length}
    export = {"model": model, "method": method, **drawn}
    searched: dict[str, Any] = {"head": head, "embedding": embedding}
    plan = _plan(model, runtime, alleles, method, device=device, export=export, **searched)
    texts = Texts.draw(plan.source, calibration, text, tokenizer, samples, length, tokens)
    with _opened(plan, texts, path, store, resume=resume, top_k=top_k, simulate=simulate) as problem:
        report = problem.sensitivity_report(started)
        if path is not None:
            write_whole(path, (json.dumps(report.as_dict(), indent=2) + "\n").encode())
    return report


def search_assignment(
    model: Any,
    *,
    calibration: Any,
    target_bpw: float | None = None,
    target_bpw_linear: float | None = None,
    target_compression: float | None = None,
    target_bytes: int | None = None,
    pareto: bool = False,
    population: int = 20,
    generations: int = 12,
    seed: int = 0,
    text: Any = None,
    runtime: str = "torch",
    alleles: Sequence[str] | None = None,
    head: bool | None = None,
    embedding: bool | None = None,
    type: str = "q4_k_m",
    method: str = "gptq",
    samples: int = 128,
    length: int = 2048,
    tokens: int = 12288,
    top_k: int | None = None,
    simulate: bool = False,
    tokenizer: Any = None,
    device: str = "auto",
    store: str | Path | None = None,
    resume: bool = True,
    output: str | Path | None = None,
) -> SearchReport:
    """Search the assignment of least KL within a size, by a genetic algorithm on real quantized weights.

    Parameters
    ----------
    model, calibration, text, runtime, alleles, head, embedding, method, samples, length, tokens
        As in `sensitivity`.
    target_bpw : float, optional
        Bits of all tensors (of a GGUF: of the whole file) over all weights, at most. One target is given.
    target_bpw_linear : float, optional
        Bits of the linears of the layers over their weights; neither embedding nor head is searched then.
    target_compression : float, optional
        Bytes of all tensors over those of the original.
    target_bytes : int, optional
        Bytes of all tensors; of a GGUF: of the file.
    pareto : bool
        No target: search all sizes at once (NSGA-II).
    population, generations, seed : int
        Of the genetic algorithm; the texts are drawn alike for all seeds.
    type : str
        Mixture for what is not searched in a GGUF, as in `qkern.export_gguf`.
    top_k, simulate, tokenizer, device, store, resume
        As in `sensitivity`.
    output : str or Path, optional
        The assignment's JSON file, which must not exist; with `pareto` a folder of them.

    Raises
    ------
    InputError
        As `sensitivity`, and if no assignment meets the target; then nothing was done.
    UnsupportedError, OutputError
        As `sensitivity`.

    Notes
    -----
    What Lagrangian, greedy and random search (of as many evaluations) find is reported too, and every uniform
    assignment that fits. A killed run goes on where it stopped: known losses are read, not computed again.
    """
    started = time.monotonic()
    check_population(population, generations, seed)
    check_pymoo()
    target = None
    given = {
        "bpw": target_bpw,
        "bpw_linear": target_bpw_linear,
        "compression": target_compression,
        "bytes": target_bytes,
    }
    if pareto:
        if any(value is not None for value in given.values()):
            raise InputError("a front has every size: leave the target out, or pareto (--pareto)")
    else:
        target = Target.one_of(given)
    path = new_folder(output) if pareto else new_file(output)
    drawn: dict[str, Any] = {"calibration": calibration, "samples": samples, "length": length}
    export = {"model": model, "type": type, "method": method, **drawn}
    searched: dict[str, Any] = {"head": head, "embedding": embedding}
    plan = _plan(model, runtime, alleles, method, device=device, export=export, target=target, **searched)
    budget = None if target is None else plan.sizes.budget(target, plan.space)
    texts = Texts.draw(plan.source, calibration, text, tokenizer, samples, length, tokens)
    with _opened(plan, texts, path, store, resume=resume, top_k=top_k, simulate=simulate) as problem:
        options: dict[str, Any] = {"population": population, "generations": generations, "seed": seed}
        found = problem.front(options) if budget is None else problem.search(budget, options)
        report = problem.search_report(found, target, seed, started, path)
        if path is not None:
            report.write(path)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A model and what may be done to it; no weight was computed with yet."""

    source: Source
    structure: Structure
    space: Space
    kept: dict[str, str]
    sizes: Sizes
    runtime: str
    method: str
    device: Any


def _plan(
    model: Any,
    runtime: str,
    alleles: Sequence[str] | None,
    method: str,
    *,
    head: bool | None,
    embedding: bool | None = None,
    device: str,
    export: Mapping[str, Any],
    target: Target | None = None,
) -> _Plan:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: candidates are made by {' or '.join(METHODS)}")
    target_device = usable_device(device)
    source = open_source(model)
    structure = describe(source.model)
    in_file = target is None or target.kind != "bpw_linear"
    whole = runtime == "gguf" and in_file
    head = whole and not structure.tied if head is None else head
    embedding = whole if embedding is None else embedding
    sizes, space, kept = Sizes.of(
        source,
        structure,
        runtime_named(runtime),
        alleles,
        head=head,
        embedding=embedding,
        in_file=in_file,
        method=method,
        export=export,
    )
    return _Plan(
        source=source,
        structure=structure,
        space=space,
        kept=kept,
        sizes=sizes,
        runtime=runtime,
        method=method,
        device=target_device,
    )


@contextmanager
def _opened(
    plan: _Plan,
    texts: Texts,
    output: Path | None,
    store: str | Path | None,
    *,
    resume: bool,
    top_k: int | None,
    simulate: bool,
) -> Iterator[_Problem]:
    """Make candidates, or find them, and open what evaluates them; clean up at the end."""
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1: got {top_k}; leave it out for all tokens")
    key = run_key(
        plan.source,
        {
            "arguments": {"method": plan.method},
            "calibration": {
                "shape": list(texts.calibration.shape),
                "sha256": calibration_hash(texts.calibration),
            },
        },
    )
    with ExitStack() as stack:
        if store is not None:
            folder = Path(store)
        elif output is not None:
            folder = partial_folder(output)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "candidates"
        was_there = folder.is_dir()
        partial = stack.enter_context(Partial(folder, key, resume=resume, contents="files of candidates"))
        try:
            stream = LayerStream(
                plan.source.model,
                plan.structure.layers,
                plan.source.weights,
                head=plan.structure.head,
                device=plan.device,
            )
            yield _Problem(
                plan=plan, texts=texts, partial=partial, stream=stream, top_k=top_k, simulate=simulate
            )
        except BaseException as error:
            if partial.count == 0:
                partial.remove()
                if was_there:
                    folder.mkdir()
            elif isinstance(error, KeyboardInterrupt) and (store is not None or output is not None):
                logger.warning("interrupted%s", partial.kept())
            raise
        if store is None:
            partial.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Genomes by what found them, the result first, with losses and perplexities; the original's last."""

    genomes: dict[str, Genome]
    losses: list[float]
    perplexities: list[float]
    evaluations: int
    history: tuple[Generation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What is known of a model's alleles, and what finds out more."""

    plan: _Plan
    texts: Texts
    partial: Partial
    stream: LayerStream
    top_k: int | None
    simulate: bool

    def opened(self, base: MixedPrecision | None = None) -> tuple[CandidateStore, CachedLosses]:
        """Candidates, made now or before, and what evaluates them."""
        plan, scored = self.plan, self.texts.scored
        candidates = make_candidates(
            self.stream,
            plan.structure,
            plan.space,
            self.texts.calibration,
            plan.method,
            self.partial,
            base=base,
        )
        evaluator = Evaluator(
            self.stream, plan.space, candidates, scored, top_k=self.top_k, simulate=self.simulate
        )
        facts = [
            [(gene.names, gene.alleles) for gene in plan.space.genes],
            None if base is None else dict(base.choices),
            calibration_hash(scored),
            self.top_k,
            self.simulate,
            str(plan.device.type),
        ]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return candidates, CachedLosses(evaluator, plan.space, self.partial.folder / f"losses-{name}.jsonl")

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

    def search(self, budget: int, options: dict[str, Any]) -> _Found:
        """Genetic search, and beside it what simpler ones find.

        Sensitivities are of single changes of the original. Whole assignments are scored with candidates that
        were made behind their Lagrangian optimum: all of them are near it, none is near the original.
        """
        space = self.plan.space
        _, evaluate = self.opened()
        losses = self.single(evaluate)
        optimum = lagrangian(space, losses, budget)
        if self.plan.method != "rtn":  # whose codes do not depend on what is before them in the model
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

            found["genetic"] = evolve(space, budget, losses, evaluate, stages=stages, see=see, **options)
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
        return self._found(found, evaluate, before, history)

    def front(self, options: dict[str, Any]) -> _Found:
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
    ) -> _Found:
        original = (ORIGINAL,) * len(self.plan.space)
        return _Found(
            genomes=genomes,
            losses=evaluate(list(genomes.values())),
            perplexities=evaluate.perplexity([*genomes.values(), original]),
            evaluations=evaluate.evaluated - before,
            history=tuple(history),
        )

    def search_report(
        self, found: _Found, target: Target | None, seed: int, started: float, output: Path | None
    ) -> SearchReport:
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
            tokens=self.texts.scored.numel(),
            evaluations=found.evaluations,
            seed=seed,
            history=found.history,
            kept=plan.kept,
            seconds=time.monotonic() - started,
            output=output,
        )


def _joined(kinds: Sequence[str]) -> str:
    """Names that differ at the end alone as one, such as ``self_attn.q_proj+k_proj``."""
    first, _, _ = kinds[0].rpartition(".")
    same = [kind.removeprefix(f"{first}.") for kind in kinds[1:]]
    return "+".join([kinds[0], *same])
