"""``qkern plan``: sizes, memory, time and problems of a quantization, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkern.cli.quantize import CheckpointFormat, Method  # noqa: TC001 - read by typer

if TYPE_CHECKING:
    from qkern.pipelines import Plan


def command(
    model: Annotated[str, typer.Argument(help="Model folder, or id of a hub model that is on this disk.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="As in quantize.", show_default="w4g128, awq: w4g128z, smoothquant: w8a8"),
    ] = None,
    assignment: Annotated[
        Path | None, typer.Option(help="JSON file of names and schemes, or names and GGUF types.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="As in export-gguf.", show_default="q4_k_m where GGUF is asked for"),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Algorithm.", show_default="gptq; of a GGUF rtn")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="What is to load the result: torch, vllm or gguf.", show_default="what it is written for"
        ),
    ] = None,
    format: Annotated[
        CheckpointFormat | None, typer.Option(help="As in quantize.", show_default="by scheme")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="As in quantize. Repeatable.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="As in quantize. Repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence, at most the model's.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Where it would go; that disk is looked at.", show_default="here")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Estimate the time, by running for some seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what quantize or export-gguf would write, need and take. Exits with 1 if it could not be loaded."""
    from qkern.pipelines import plan

    result = plan(
        model,
        scheme=scheme,
        assignment=assignment,
        type=kind,
        method=None if method is None else method.value,
        runtime=runtime,
        format=None if format is None else format.value,
        skip=skip or (),
        include=include or (),
        samples=samples,
        length=length,
        device=device,
        output=output,
        max_shard_size=max_shard_size,
        timed=timed,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print(result)
    if not result.is_loadable:
        raise typer.Exit(1)


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = Table()
    for name in ("tensors", "stored as"):
        kinds.add_column(name)
    for name in ("count", "shape", "bytes"):
        kinds.add_column(name, justify="right")
    for row in plan.rows:
        shape = "" if row.shape is None else " x ".join(map(str, row.shape))
        kinds.add_row(row.kind, row.choice, str(row.count), shape, f"{row.bytes:,}")
    console = Console(markup=False, highlight=False)
    console.print(kinds)
    bits = 8 * plan.bytes_before / plan.parameters
    seconds = "" if plan.seconds is None else f"about {_duration(plan.seconds)}, "
    lines = {
        "run": f"{plan.method} {plan.scheme}, {plan.format or 'no format holds it'}, for {plan.runtime}",
        "before": f"{plan.bytes_before:,} bytes, {bits:.3f} bits a weight",
        "after": f"{plan.bytes_after:,} bytes, bpw_file {plan.bpw_file:.3f}, "
        f"bpw_linear {plan.bpw_linear:.3f}",
        "loaded": _size(plan.loaded),
        "peak memory": f"about {_size(plan.memory)}, {_size(plan.memory_free)} free",
        "disk": f"{_size(plan.disk)}, {_size(plan.disk_free)} free",
        "time": f"{seconds}{plan.basis}",
    }
    for name, value in lines.items():
        typer.echo(f"{name:12} {value}")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"kept         {names[0]}{more}: {reason}")
    for warning in plan.warnings:
        typer.echo(f"warning      {warning}")
    for problem in plan.problems:
        typer.echo(f"problem      {problem}")


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
