"""``qkern sensitivity``: what each choice for each linear costs while all others stay as they are."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkern.errors import InputError

if TYPE_CHECKING:
    from qkern.pipelines import SensitivityReport

logger = logging.getLogger(__name__)


class RuntimeName(StrEnum):
    """What will load the result."""

    TORCH = "torch"
    VLLM = "vllm"
    GGUF = "gguf"


class CandidateMethod(StrEnum):
    """How the codes of candidates are chosen."""

    GPTQ = "gptq"
    RTN = "rtn"


Model = Annotated[str, typer.Argument(help="Model folder or hub id, 16-bit safetensors.")]
Calibration = Annotated[
    str,
    typer.Option(help="Text file, .jsonl of 'text' or 'messages', or the name of a Hugging Face dataset."),
]
Text = Annotated[
    str | None,
    typer.Option(help="Text that KL is measured on.", show_default="sequences of the calibration, set aside"),
]
RuntimeOption = Annotated[
    RuntimeName, typer.Option(help="What will load the result: legal choices, and what must share one.")
]
Alleles = Annotated[
    str | None,
    typer.Option(
        help="Choices, separated by commas: schemes (w3g128, w3g128a8), GGUF types (q4_k), or 16.",
        show_default="by runtime",
    ),
]
_IN_GGUF = "GGUF: yes, unless a target counts linears alone"
Head = Annotated[
    bool | None, typer.Option("--head/--no-head", help="The output head too.", show_default=_IN_GGUF)
]
Embedding = Annotated[
    bool | None,
    typer.Option(
        "--embedding/--no-embedding",
        help="GGUF: the embedding too, and a head that is tied to it.",
        show_default=_IN_GGUF,
    ),
]
MethodOption = Annotated[CandidateMethod, typer.Option(help="How codes are chosen.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[int, typer.Option(min=4, help="Tokens of a sequence, at most the model's.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens that KL is measured on.")]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="KL over the original's likeliest tokens alone.", show_default="all tokens"),
]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="Dequantized weights in plain linears instead of real kernels.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Store = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps candidates and losses for later runs.", show_default="none is kept"),
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on from the store or <output>.partial, or empty it.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def split(alleles: str | None) -> list[str] | None:
    """Choices of a command line."""
    return None if alleles is None else [part.strip() for part in alleles.split(",") if part.strip()]


def command(
    model: Model,
    calibration: Calibration,
    text: Text = None,
    runtime: RuntimeOption = RuntimeName.TORCH,
    alleles: Alleles = None,
    head: Head = None,
    embedding: Embedding = None,
    method: MethodOption = CandidateMethod.GPTQ,
    samples: Samples = 128,
    length: Length = 2048,
    tokens: Tokens = 12288,
    top_k: TopK = None,
    simulate: Simulate = False,
    device: Device = "auto",
    store: Store = None,
    resume: Resume = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; must not exist.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write: heat maps, layer by kind (needs matplotlib).")
    ] = None,
    allele: Annotated[
        str | None, typer.Option(help="Choice to print the table of.", show_default="that of fewest bits")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Measure the KL that each choice costs, one linear (or group that shares a choice) at a time.

    A killed run goes on where it stopped when the same command is given again, if it has --output or --store.
    """
    from qkern.pipelines import sensitivity
    from qkern.search import parse_choice, spell_choice

    named = split(alleles)
    if allele is not None:
        allele = spell_choice(parse_choice(allele))
        if named is not None and allele not in map(spell_choice, map(parse_choice, named)):
            raise InputError(f"no linear has the choice {allele!r}: there are {', '.join(named)}")
    if plot is not None:
        from qkern.pipelines.search_report import check_apart
        from qkern.plotting import check_picture

        check_picture(plot)
        check_apart({"--output": output, "--store": store, "--plot": plot})
    report = sensitivity(
        model,
        calibration=calibration,
        text=text,
        runtime=runtime.value,
        alleles=named,
        head=head,
        embedding=embedding,
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
    if plot is not None:
        _plot(report, plot)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _print(report, allele)
    for path in (output, plot):
        if path is not None and not as_json:
            typer.echo(f"written to {path}")


def _plot(report: SensitivityReport, path: Path) -> None:
    from qkern.plotting import plot_heat

    maps: dict[str, dict[str, dict[str, float]]] = {}
    for spelling in dict.fromkeys(spelling for gene in report.genes for spelling in gene.kl):
        rows = maps[spelling] = {str(gene.layer): {} for gene in report.genes}
        for gene in report.genes:
            if spelling in gene.kl:
                rows[str(gene.layer)][gene.kind] = gene.kl[spelling]
    plot_heat(maps, path, label="KL, nats", rows="layer")


def _print(report: SensitivityReport, allele: str | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    known = list(dict.fromkeys(spelling for gene in report.genes for spelling in gene.kl))
    if allele is not None and allele not in known:  # by now the measurement is worth more than an error
        logger.warning("no linear had the choice %r: there are %s", allele, ", ".join(known))
        allele = None
    kinds = list(dict.fromkeys(gene.kind for gene in report.genes))
    cells: dict[int, dict[str, str]] = {}
    for gene in report.genes:
        shown = next(iter(gene.kl)) if allele is None else allele
        cells.setdefault(gene.layer, {})[gene.kind] = f"{gene.kl[shown]:.1e}" if shown in gene.kl else ""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    headings = ends if len(set(ends)) == len(kinds) else kinds
    # Narrow enough for the seven linears of a layer in 80 columns.
    title = f"KL in nats with one of them in {allele or 'its smallest choice'}, the others 16-bit"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0))
    table.add_column("layer", justify="right")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, row in cells.items():
        table.add_row(str(layer), *(row.get(kind, "") for kind in kinds))
    console = Console(markup=False, highlight=False)
    console.print(table)
    totals = Table(title="all of them: sum of the KL, mean error of their outputs")
    for heading in ("choice", "bits a weight", "KL", "error"):
        totals.add_column(heading, justify="left" if heading == "choice" else "right")
    for spelling in known:
        genes = [gene for gene in report.genes if spelling in gene.kl]
        errors = [gene.error[spelling] for gene in genes if spelling in gene.error]
        weights = sum(gene.weights for gene in genes)
        totals.add_row(
            spelling + ("" if len(genes) == len(report.genes) else f" ({len(genes)} of {len(report.genes)})"),
            f"{sum(gene.bits[spelling] * gene.weights for gene in genes) / weights:.3f}",
            f"{sum(gene.kl[spelling] for gene in genes):.5f}",
            f"{sum(errors) / len(errors):.2e}" if errors else "",
        )
    console.print(totals)
    typer.echo(f"scored on {report.tokens:,} tokens, candidates by {report.method}, {report.seconds:.0f} s")
