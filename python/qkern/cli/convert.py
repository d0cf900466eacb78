"""``qkern convert``: a quantized model in another checkpoint format."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qkern.pipelines import ConversionReport


class TargetFormat(StrEnum):
    """What is written."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"


def command(
    model: Annotated[
        str, typer.Argument(help="Folder (GPTQ, AWQ, compressed-tensors, bitsandbytes), hub id or .gguf.")
    ],
    to: Annotated[TargetFormat, typer.Option(help="Format to write.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    requantize: Annotated[
        str | None,
        typer.Option(
            help="Round layers that the format does not hold again: nearest, or a scheme.",
            show_default="they are refused",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a quantized model in another format, its weights bit for bit the same."""
    from qkern.pipelines import convert

    report = convert(model, output, to.value, requantize=requantize, max_shard_size=max_shard_size)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _print(report)


def _print(report: ConversionReport) -> None:
    changes: dict[tuple[str, str, bool], list[float]] = {}
    for layer in report.layers.values():
        changes.setdefault((layer.before, layer.after, layer.is_exact), []).append(layer.error)
    for (before, after, is_exact), errors in changes.items():
        how = "exact" if is_exact else f"rounded again, error up to {max(errors):.2e}"
        typer.echo(f"{len(errors):4} layers {before} to {after}: {how}")
    for name, before in report.decoded.items():
        typer.echo(f"decoded     {name} from {before}")
    typer.echo(f"{report.before} to {report.after} in {report.seconds:.1f} s, written to {report.output}")
