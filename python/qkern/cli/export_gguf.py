"""``qkern export-gguf``: a model folder to a GGUF that llama.cpp runs."""

from __future__ import annotations

import json
from dataclasses import asdict
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
            help="llama.cpp's mixtures: q2_k, q2_k_s, q3_k_s|m|l, q4_k_s|m, q5_k_s|m, q6_k, q4_0, q4_1, "
            "q5_0, q5_1, q8_0, iq4_nl, iq4_xs; or f16, bf16, f32.",
        ),
    ] = "q4_k_m",
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE",
            help="Type of the tensors in whose llama.cpp name the regular expression is found, such as "
            "ffn_down=q6_k; the first that matches wins. Repeatable.",
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(help="Type of token_embd.weight; comes before --tensor-type.")
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option(help="Type of output.weight, or of a tied embedding; comes before --tensor-type."),
    ] = None,
    pure: Annotated[bool, typer.Option(help="The base type for every other matrix.")] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of a byte-level pre-tokenizer, where it is not recognized."),
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
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Cut into files of this size, such as 5GB, larger tensors alone; default: one file."
        ),
    ] = None,
    modelfile: Annotated[bool, typer.Option(help="Write Ollama's Modelfile beside the file.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; print every tensor's type and all sizes.")
    ] = False,
    assignment: Annotated[
        Path | None,
        typer.Option(help="JSON file of the model's names and types; what it leaves out is --type's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as a GGUF file that llama.cpp runs."""
    from qkern.pipelines.export_gguf import export_gguf

    report = export_gguf(
        model,
        output,
        kind,
        assignment=assignment,
        tensor_types=_tensor_types(tensor_type or []),
        token_embedding_type=token_embedding_type,
        output_tensor_type=output_tensor_type,
        pure=pure,
        pre_tokenizer=pre_tokenizer,
        method=method.value,
        calibration=calibration,
        imatrix=imatrix,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        max_shard_size=max_shard_size,
        modelfile=modelfile,
        dry_run=dry_run,
    )
    if as_json:
        content: dict[str, object] = {
            "path": str(report.path),
            "files": [str(file) for file in report.files],
            "type": report.type,
            "tensors": report.counts,
            "weights": report.weights,
            "file_bytes": report.file_bytes,
            "bpw_file": report.bpw_file,
            "exact": report.exact,
            "method": report.method,
            "errors": report.errors,
        }
        if dry_run:
            content["plan"] = [asdict(tensor) for tensor in report.tensors]
        typer.echo(json.dumps(content))
        return
    if dry_run:
        # One a line and unfolded, for whoever searches or counts them.
        width = max(len(tensor.name) for tensor in report.tensors)
        for tensor in report.tensors:
            shape = "x".join(map(str, tensor.shape))
            typer.echo(f"{tensor.name:{width}}  {tensor.type:6}  {shape:>13}  {tensor.bytes:>14,} bytes")
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("type")
    table.add_column("tensors", justify="right")
    table.add_column("weights", justify="right")
    table.add_column("exact", justify="right")
    for name, count in report.counts.items():
        table.add_row(
            name, str(count), f"{report.weights[name]:,}", "" if dry_run else str(report.exact_counts[name])
        )
    Console().print(table)
    # Outside the table, which would fold a long path.
    size = f"{report.file_bytes:,} bytes" if dry_run else f"{report.file_bytes / 1e6:.2f} MB"
    written = ", not written" if dry_run else ""
    typer.echo(f"{report.type}, {size}, bpw_file {report.bpw_file:.3f}{written}: {report.path}")


def _tensor_types(pairs: list[str]) -> dict[str, str]:
    types: dict[str, str] = {}
    for pair in pairs:
        pattern, _, kind = pair.rpartition("=")
        if not pattern or not kind:
            raise typer.BadParameter(
                f"--tensor-type must be PATTERN=TYPE, such as ffn_down=q6_k: got {pair!r}"
            )
        if pattern in types:
            raise typer.BadParameter(f"--tensor-type {pattern}= is there twice, {types[pattern]} and {kind}")
        types[pattern] = kind
    return types
