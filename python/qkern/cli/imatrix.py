"""``qkern imatrix``: how strongly calibration text drives each column of a model's linears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, 16-bit safetensors.")],
    calibration: Annotated[
        str,
        typer.Option(
            help="Text file, .jsonl of 'text' or 'messages', or the name of a Hugging Face dataset."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="File to write: .gguf, or .dat in llama.cpp's old form; must not exist.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence, at most the model's.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the calibration's draw.")] = 0,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="An entry for the output head too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Collect an importance matrix: how much the errors of each column count when a GGUF is made."""
    from qkern.pipelines import imatrix

    matrix = imatrix(
        model,
        calibration=calibration,
        output=output,
        samples=samples,
        length=length,
        seed=seed,
        process_output=process_output,
        device=device,
    )
    unreached = sum(int((entry.counts == 0).sum()) for entry in matrix.entries.values())
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "path": str(output),
                    "entries": len(matrix.entries),
                    "sequences": matrix.chunk_count,
                    "length": matrix.chunk_size,
                    "unreached": unreached,
                }
            )
        )
        return
    typer.echo(
        f"{len(matrix.entries)} tensors over {matrix.chunk_count} sequences of {matrix.chunk_size} tokens: "
        f"{output}"
    )
    if unreached:
        typer.echo(f"{unreached} matrices of experts were reached by no token: give more calibration text")
