"""``qkern compare``: models beside the one that they were made of."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qkern.pipelines.compare import Comparison


class DType(StrEnum):
    """What folders are scored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO = "auto"


def _lengths(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is no list of numbers such as 1,512,6144") from error


def command(
    original: Annotated[str, typer.Argument(help="Folder, hub id or .gguf that KL and top-1 refer to.")],
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids and .gguf files to compare.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 held-out text to score.", show_default="the one that ships")
    ] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of it that are scored.")] = 16384,
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window.")] = 512,
    prompt_lengths: Annotated[
        str, typer.Option(help="Lengths of prompts that speed is measured at, those that a model reads.")
    ] = "1,6144,14336,30720",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are made after a prompt.")] = 32,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that each model continues; may be given again.", show_default="three from the text"
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of such texts, one a line.")] = None,
    skip_original: Annotated[
        bool, typer.Option("--skip-original", help="Do not run the original: no KL, no top-1.")
    ] = False,
    dtype: Annotated[
        DType, typer.Option(help="What folders are scored in; auto: the checkpoint's dtype.")
    ] = DType.FLOAT32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps (not in llama.cpp).")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md, pictures and compare.json; new or empty.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Size, speed, memory and quality of models beside their original, each in a process of its own.

    A model that does not load, fit in memory or come to an end has the reason in its row. Exit code 1 if none
    but the original could be measured.
    """
    from qkern.checkpoints import check_output, new_folder
    from qkern.demo import HELDOUT
    from qkern.errors import InputError
    from qkern.evaluation import read_text
    from qkern.pipelines import compare
    from qkern.plotting import has_matplotlib
    from qkern.plotting.compare import write_report

    if prompt and prompts is not None:
        raise InputError("--prompt and --prompts both say what is continued: give one of them")
    chosen = [line for line in read_text(prompts).splitlines() if line.strip()] if prompts else prompt
    lengths = _lengths(prompt_lengths)
    if output is not None:
        check_output(output)  # not after an hour of measuring
    comparison = compare(
        original,
        models,
        text=text or HELDOUT,
        tokens=tokens,
        window=window,
        prompt_lengths=lengths,
        new_tokens=new_tokens,
        prompts=chosen or None,
        skip_original=skip_original,
        dtype=dtype.value,
        device=device,
    )
    if as_json:
        typer.echo(json.dumps(comparison.as_dict()))
    else:
        _print(comparison)
    if output is not None:
        with new_folder(output) as folder:
            write_report(comparison, folder)
        if not as_json:
            pictures = "" if has_matplotlib() else " (no pictures: pip install matplotlib)"
            typer.echo(f"report: {output / 'report.md'}{pictures}")
    if comparison.is_empty:
        raise InputError("no model could be measured beside the original; the reasons are beside their names")


def _print(comparison: Comparison) -> None:
    import sys

    from rich.console import Console

    from qkern.cli._tables import print_table
    from qkern.plotting.compare import model_table, remarks, sample_table, speed_table

    # A file or pipe has no width of its own.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(comparison.machine)
    print_table(console, "Size and quality", model_table(comparison), left=("model", "runner"))
    print_table(console, "Speed", speed_table(comparison), left=("model",))
    samples = sample_table(comparison)
    print_table(console, "Samples", samples, left=samples[0])
    for remark in remarks(comparison):
        console.print(f"- {remark}", soft_wrap=True)
