"""``qkern export-gguf``: a model folder to a GGUF that llama.cpp runs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """How codes are chosen."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"


def command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id; 16-bit or quantized.")],
    output: Annotated[Path, typer.Option(help="File to write; must not exist.")],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_m, q6_k, f16, bf16 or f32 (llama.cpp's mixtures).",
        ),
    ] = "q4_k_m",
    pure: Annotated[bool, typer.Option(help="The base type for every matrix.")] = False,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognized.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Algorithm of the layers; gptq and awq need --calibration.")
    ] = Method.RTN,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Weigh errors by the activations of this text: a file, .jsonl of 'text' or 'messages', or a "
            "Hugging Face dataset."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Weigh errors by this importance matrix, qkern's or llama.cpp's.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence, at most the model's.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the calibration's draw.")] = 0,
    device: Annotated[str, typer.Option(help="Of the calibration: auto, cpu, cuda, cuda:1, mps")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as one GGUF file that llama.cpp runs."""
    from qkern.pipelines.export_gguf import export_gguf

    report = export_gguf(
        model,
        output,
        kind,
        pure=pure,
        pre_tokenizer=pre_tokenizer,
        method=method.value,
        calibration=calibration,
        imatrix=imatrix,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "path": str(report.path),
                    "type": report.type,
                    "tensors": report.counts,
                    "weights": report.weights,
                    "file_bytes": report.file_bytes,
                    "bpw_file": report.bpw_file,
                    "method": report.method,
                    "errors": report.errors,
                }
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("type")
    table.add_column("tensors", justify="right")
    table.add_column("weights", justify="right")
    for name, count in report.counts.items():
        table.add_row(name, str(count), f"{report.weights[name]:,}")
    Console().print(table)
    # Outside the table, which would fold a long path.
    typer.echo(
        f"{report.type}, {report.file_bytes / 1e6:.2f} MB, bpw_file {report.bpw_file:.3f}: {report.path}"
    )
