"""``qkern search``: the best bits for each linear within a size."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkern.cli.sensitivity import (
    Alleles,
    AsJSON,
    Calibration,
    CandidateMethod,
    Device,
    Embedding,
    Head,
    Length,
    MethodOption,
    Model,
    Resume,
    RuntimeName,
    RuntimeOption,
    Samples,
    Simulate,
    Store,
    Text,
    Tokens,
    TopK,
    split,
)

if TYPE_CHECKING:
    from qkern.pipelines import SearchReport


def command(
    model: Model,
    calibration: Calibration,
    output: Annotated[
        Path, typer.Option(help="Assignment to write, JSON; with --pareto a folder. Must not exist.")
    ],
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits of all tensors (GGUF: of the file) over all weights.")
    ] = None,
    target_bpw_linear: Annotated[float | None, typer.Option(help="Bits of the linears over theirs.")] = None,
    target_compression: Annotated[
        float | None, typer.Option(help="Bytes of all tensors over the original's.")
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option(help="Bytes of all tensors (GGUF: of the file).")
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Every size in one run (NSGA-II).")] = False,
    population: Annotated[int, typer.Option(min=2, help="Assignments in a generation.")] = 20,
    generations: Annotated[int, typer.Option(min=1, help="Generations, the first included.")] = 12,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the genetic and the random search; texts are drawn alike.")
    ] = 0,
    finalists: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Best assignments that are quantized by themselves, to choose from.",
            show_default="4; none for --method rtn or --pareto",
        ),
    ] = None,
    runtime: RuntimeOption = RuntimeName.TORCH,
    alleles: Alleles = None,
    head: Head = None,
    embedding: Embedding = None,
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="GGUF: mixture for what is not searched, as in export-gguf.",
            show_default="q4_k_m",
        ),
    ] = None,
    method: MethodOption = CandidateMethod.GPTQ,
    text: Text = None,
    samples: Samples = 128,
    length: Length = 2048,
    tokens: Tokens = 12288,
    top_k: TopK = None,
    simulate: Simulate = False,
    device: Device = "auto",
    store: Store = None,
    resume: Resume = True,
    as_json: AsJSON = False,
) -> None:
    """Search which linear gets how many bits, by a genetic algorithm on real quantized weights.

    Give one target. Lagrangian, greedy and random search are reported beside the result. A killed run goes on
    where it stopped when the same command is given again.
    """
    from qkern.pipelines import search_assignment
    from qkern.pipelines.search import MIXTURE

    report = search_assignment(
        model,
        calibration=calibration,
        target_bpw=target_bpw,
        target_bpw_linear=target_bpw_linear,
        target_compression=target_compression,
        target_bytes=target_bytes,
        pareto=pareto,
        population=population,
        generations=generations,
        seed=seed,
        finalists=finalists,
        text=text,
        runtime=runtime.value,
        alleles=split(alleles),
        head=head,
        embedding=embedding,
        type=type,
        method=method.value,
        samples=samples,
        length=length,
        tokens=tokens,
        top_k=top_k,
        simulate=simulate,
        device=device,
        store=store,
        resume=resume,
        output=output,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    _print(report)
    typer.echo(f"written to {output}")
    if not pareto:
        gguf = runtime is RuntimeName.GGUF
        words = ["export-gguf" if gguf else "quantize", model, "--assignment", str(output)]
        words += ["--method", method.value]
        if gguf or method is CandidateMethod.GPTQ:
            if text is None and report.samples < samples:
                typer.echo(f"the calibration text is short: {report.samples} sequences of it were used")
            # As many sequences as were calibrated on, which may be fewer than were asked for.
            drawn = {"calibration": calibration, "samples": report.samples, "length": length}
            drawn["device"] = device
            usual = {"samples": 128, "length": 2048, "device": "auto"}
            for name, value in drawn.items():
                words += [] if usual.get(name) == value else [f"--{name}", str(value)]
        words += ["--type", MIXTURE if type is None else type] if gguf else ["--format", "compressed-tensors"]
        words += ["--output", "OUTPUT.gguf" if gguf else "OUTPUT"]
        typer.echo("next: " + shlex.join(["qkern", *words]))


def _print(report: SearchReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.target}; KL on {report.tokens:,} tokens that the search saw")
    for heading in ("found by", "KL", "perplexity", "MB", "bpw_file", "bpw_linear", "linears"):
        table.add_column(heading, justify="left" if heading in ("found by", "linears") else "right")
    for row in (*((report.best,) if report.best else ()), *report.others):
        counts = Counter(row.assignment.choices.values())
        table.add_row(
            row.found_by,
            f"{row.kl:.5f}",
            f"{row.perplexity:.3f}",
            f"{row.bytes / 1e6:.3f}",
            f"{row.bpw_file:.4f}",
            f"{row.bpw_linear:.4f}",
            ", ".join(f"{count} {spelling}" for spelling, count in sorted(counts.items())),
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    if report.finalists:
        assert report.best is not None
        tried = Table(title="finalists, each quantized by itself: the least KL is the result")
        for heading in ("found by", "KL", "by candidates", ""):
            tried.add_column(heading, justify="right" if heading in ("KL", "by candidates") else "left")
        for one in report.finalists:
            mark = "result" if one.assignment == report.best.assignment else ""
            tried.add_row(one.found_by, f"{one.kl:.5f}", f"{one.by_candidates:.5f}", mark)
        console.print(tried)
    typer.echo(
        f"perplexity of the original {report.perplexity:.3f}; {report.evaluations} assignments evaluated, "
        f"seed {report.seed}, {report.seconds:.0f} s; more text tells how much of a difference is left"
    )
