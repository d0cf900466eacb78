"""``qkern export-gguf``: a model folder to a GGUF that llama.cpp runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


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
    max_shard_size: Annotated[
        str | None, typer.Option(help="Cut into files of at most this size, such as 5GB; default: one file.")
    ] = None,
    modelfile: Annotated[bool, typer.Option(help="Write Ollama's Modelfile beside the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as a GGUF file that llama.cpp runs."""
    from qkern.pipelines.export_gguf import export_gguf

    report = export_gguf(
        model,
        output,
        kind,
        pure=pure,
        pre_tokenizer=pre_tokenizer,
        max_shard_size=max_shard_size,
        modelfile=modelfile,
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "path": str(report.path),
                    "files": [str(file) for file in report.files],
                    "type": report.type,
                    "tensors": report.counts,
                    "weights": report.weights,
                    "file_bytes": report.file_bytes,
                    "bpw_file": report.bpw_file,
                    "exact": report.exact,
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
    table.add_column("exact", justify="right")
    for name, count in report.counts.items():
        table.add_row(name, str(count), f"{report.weights[name]:,}", str(report.exact_counts[name]))
    Console().print(table)
    # Outside the table, which would fold a long path.
    typer.echo(
        f"{report.type}, {report.file_bytes / 1e6:.2f} MB, bpw_file {report.bpw_file:.3f}: {report.path}"
    )
