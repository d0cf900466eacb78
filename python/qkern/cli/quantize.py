"""``qkern quantize``: RTN, GPTQ, AWQ or SmoothQuant on a model folder, in a format that is deployed."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qkern.pipelines import QuantizationReport


class Method(StrEnum):
    """How codes are chosen."""

    GPTQ = "gptq"
    AWQ = "awq"
    RTN = "rtn"
    SMOOTHQUANT = "smoothquant"


class Activations(StrEnum):
    """When int8 activations get their scales."""

    DYNAMIC = "dynamic"
    STATIC = "static"


class Observer(StrEnum):
    """How static scales are chosen."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class CheckpointFormat(StrEnum):
    """What is written."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"
    BITSANDBYTES = "bitsandbytes"


class ActOrder(StrEnum):
    """Order of the columns in GPTQ."""

    GROUP_AWARE = "group-aware"
    DESC_ACT = "desc_act"
    NONE = "none"


class Search(StrEnum):
    """How scales are chosen."""

    MINMAX = "minmax"
    MSE = "mse"
    LOSS = "loss"
    ABSMAX = "absmax"


def command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, 16-bit safetensors.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    method: Annotated[Method, typer.Option(help="Algorithm; rtn needs no calibration.")] = Method.GPTQ,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="For example w4g128, w4g128z, w8, w8a8.",
            show_default="w4g128, awq: w4g128z, smoothquant: w8a8",
        ),
    ] = None,
    assignment: Annotated[
        Path | None,
        typer.Option(
            help="JSON file that maps names of linears to schemes; those it leaves out stay 16-bit."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, .jsonl of 'text' or 'messages', or the name of a Hugging Face dataset."
        ),
    ] = None,
    format: Annotated[
        CheckpointFormat | None,
        typer.Option(
            help="Checkpoint format; default: awq for w4 with zero points, gptq for symmetric w4 and w8, "
            "bitsandbytes for nf4 and fp4, else compressed-tensors.",
            show_default="by scheme",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Linear to leave 16-bit: name, end of a name, or glob. Repeatable."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Quantize lm_head or a router too. Repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence, at most the model's.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the calibration's draw.")] = 0,
    damp: Annotated[float, typer.Option(help="GPTQ: damping of the Hessian.")] = 0.05,
    act_order: Annotated[ActOrder, typer.Option(help="GPTQ: order of columns.")] = ActOrder.GROUP_AWARE,
    static_groups: Annotated[
        bool, typer.Option("--static-groups", help="GPTQ: scales of all groups before the first column.")
    ] = False,
    search: Annotated[
        Search | None,
        typer.Option(
            help="How scales are chosen; loss is GPTQ's own and takes about twice the time.",
            show_default="gptq: loss, else minmax",
        ),
    ] = None,
    scale_only: Annotated[
        bool, typer.Option("--scale-only", help="AWQ: write the 16-bit model with the scales folded in.")
    ] = False,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="SmoothQuant: auto, or the share of the range that weights take over, 0 to 1; with gptq the "
            "smoothed weights are rounded by it.",
            show_default="smoothquant: auto",
        ),
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="Schemes with a8: a scale for each token, or one from calibration.")
    ] = Activations.DYNAMIC,
    observer: Annotated[
        Observer | None, typer.Option(help="How static scales are chosen.", show_default="mse")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from <output>.partial, or remove it.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a causal LM layer by layer and write a checkpoint.

    A killed run goes on where it stopped when the same command is given again.
    """
    from qkern.pipelines import quantize

    report = quantize(
        model,
        output=output,
        method=method.value,
        scheme=scheme,
        assignment=assignment,
        calibration=calibration,
        format=None if format is None else format.value,
        skip=skip or (),
        include=include or (),
        samples=samples,
        length=length,
        seed=seed,
        damp=damp,
        act_order=act_order.value,
        static_groups=static_groups,
        search=None if search is None else search.value,
        scale_only=scale_only,
        alpha=_number(alpha),
        activations=activations.value,
        observer=None if observer is None else observer.value,
        device=device,
        max_shard_size=max_shard_size,
        resume=resume,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _print(report)


def _number(alpha: str | None) -> float | str | None:
    try:
        return None if alpha is None else float(alpha)
    except ValueError:
        return alpha


def _print(report: QuantizationReport) -> None:
    from rich.console import Console
    from rich.table import Table

    worst = max(report.layers.items(), key=lambda item: item[1].error, default=None)
    noted = sum(1 for record in report.layers.values() if record.notes)
    rows = {
        "method": report.method,
        "scheme": report.scheme,
        "format": report.format or "16-bit",
        "linears": f"{len(report.layers)} quantized, {len(report.kept)} kept 16-bit",
        "parameters": f"{report.kept_parameters:,} stay 16-bit",
        "bits per weight": f"{report.bpw_linear:.3f}",
        "relative error": f"mean {report.mean_error:.2e}"
        + ("" if worst is None else f", worst {worst[1].error:.2e} ({worst[0]})"),
        "notes": f"{noted} layers, see qkern.json" if noted else "none",
        "time": f"{report.seconds:.1f} s",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)
    typer.echo(f"written to {report.output}")  # outside the table, which would fold a long path
