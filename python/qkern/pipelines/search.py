"""The verbs `sensitivity` and `search_assignment`: candidates first, then losses of whole assignments."""

from __future__ import annotations

import json
import logging
import operator
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkern.calibration import LayerStream, calibration_hash
from qkern.errors import InputError
from qkern.gguf.writer import write_whole
from qkern.models import describe
from qkern.pipelines.candidates import METHODS
from qkern.pipelines.load import usable_device
from qkern.pipelines.partial import Partial, partial_folder
from qkern.pipelines.quantize import run_key
from qkern.pipelines.search_problem import Plan, Problem
from qkern.pipelines.search_report import SearchReport, SensitivityReport, new_file, new_folder
from qkern.pipelines.search_texts import Texts
from qkern.pipelines.sizes import Sizes, Target
from qkern.pipelines.source import open_source
from qkern.search import check_population, check_pymoo, runtime_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["MIXTURE", "search_assignment", "sensitivity"]

logger = logging.getLogger(__name__)

FINALISTS: Final = 4
MIXTURE: Final = "q4_k_m"
"""For what is not searched in a GGUF."""


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
    path = new_file(output, store)
    calibration = list(calibration) if isinstance(calibration, Iterator) else calibration  # read twice
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
    finalists: int | None = None,
    text: Any = None,
    runtime: str = "torch",
    alleles: Sequence[str] | None = None,
    head: bool | None = None,
    embedding: bool | None = None,
    type: str | None = None,
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
    finalists : int, optional
        So many of the best assignments that the genetic algorithm evaluated are quantized each by itself, as
        `qkern.quantize` or `qkern.export_gguf` will do it with the report's `samples`; the best of these and
        of the Lagrangian optimum is the result. 0 takes the best by the candidates. Default: 4; none when
        rounding to nearest, whose codes are the candidates', or for a front.
    type : str, optional
        Mixture for what is not searched in a GGUF, as in `qkern.export_gguf`; default: q4_k_m.
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
    if type is not None and runtime_named(runtime).name != "gguf":
        raise InputError(f"type is a mixture of GGUF types, for runtime gguf: got {type!r} for {runtime}")
    finalists = _finalists(finalists, method, pareto=pareto)
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
    path = new_folder(output, store) if pareto else new_file(output, store)
    calibration = list(calibration) if isinstance(calibration, Iterator) else calibration  # read twice
    drawn: dict[str, Any] = {"calibration": calibration, "samples": samples, "length": length}
    export = {"model": model, "type": MIXTURE if type is None else type, "method": method, **drawn}
    searched: dict[str, Any] = {"head": head, "embedding": embedding}
    plan = _plan(model, runtime, alleles, method, device=device, export=export, target=target, **searched)
    budget = None if target is None else plan.sizes.budget(target, plan.space)
    texts = Texts.draw(plan.source, calibration, text, tokenizer, samples, length, tokens)
    with _opened(plan, texts, path, store, resume=resume, top_k=top_k, simulate=simulate) as problem:
        options: dict[str, Any] = {"population": population, "generations": generations, "seed": seed}
        found = problem.front(options) if budget is None else problem.search(budget, finalists, options)
        report = problem.search_report(found, target, seed, started, path)
        if path is not None:
            report.write(path)
    return report


def _finalists(wanted: int | None, method: str, *, pareto: bool) -> int:
    """Return how many assignments are quantized by themselves."""
    none = "a front" if pareto else "rounding to nearest" if method == "rtn" else None
    if wanted is None:
        return 0 if none else FINALISTS
    try:
        count = operator.index(wanted)
    except TypeError:
        count = -1
    if count < 0:
        raise InputError(f"finalists must be a whole number from 0: got {wanted!r}")
    if count and none:
        raise InputError(f"{none} has no finalists: got {wanted}; leave them out (--finalists)")
    return count


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
) -> Plan:
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
    return Plan(
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
    plan: Plan,
    texts: Texts,
    output: Path | None,
    store: str | Path | None,
    *,
    resume: bool,
    top_k: int | None,
    simulate: bool,
) -> Iterator[Problem]:
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
        words = {"contents": "files of candidates", "elsewhere": "output" if store is None else "store"}
        partial = stack.enter_context(Partial(folder, key, resume=resume, **words))
        try:
            stream = LayerStream(
                plan.source.model,
                plan.structure.layers,
                plan.source.weights,
                head=plan.structure.head,
                device=plan.device,
            )
            yield Problem(
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
