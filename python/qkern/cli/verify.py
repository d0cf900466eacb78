"""``qkern verify``: a quantized model read independently, and compared with its original."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qkern.pipelines import Verification

# Problems of a check that are shown; --json has all.
SHOWN = 8


class Runtime(StrEnum):
    """Whose rules must hold."""

    TORCH = "torch"
    VLLM = "vllm"
    GGUF = "gguf"


def command(
    model: Annotated[
        str,
        typer.Argument(help="Folder (GPTQ, AWQ, compressed-tensors, bitsandbytes, 16-bit), hub id or .gguf."),
    ],
    against: Annotated[
        str | None, typer.Option(help="The 16-bit original, to compare names, weights and logits with.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 held-out text for the KL.", show_default="the one that ships")
    ] = None,
    runtime: Annotated[
        Runtime | None, typer.Option(help="Whose rules must hold.", show_default="torch, of a .gguf gguf")
    ] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the text that are scored.")] = 2048,
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window, at most the model's.")] = 512,
    max_kl: Annotated[float, typer.Option(help="Largest mean KL(original || model), nats.")] = 2.0,
    no_kl: Annotated[
        bool, typer.Option("--no-kl", help="Measure no KL, for which the original is loaded in fp32.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a quantized model as it lies on the disk. Exits with 1 if a check failed."""
    if no_kl and text is not None:
        raise typer.BadParameter("--no-kl measures nothing on a --text: give one of them")
    from qkern.demo import HELDOUT
    from qkern.pipelines import verify

    result = verify(
        model,
        against=against,
        text=None if no_kl else text or HELDOUT,
        runtime=None if runtime is None else runtime.value,
        tokens=tokens,
        window=window,
        max_kl=max_kl,
    )
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        _print(result)
    if not result.is_sound:
        raise typer.Exit(1)


def _print(result: Verification) -> None:
    from qkern.pipelines.verify import CHECKS

    for check in result.checks:
        value = "" if check.value is None else f" {check.value:.5f}"
        note = check.skipped if check.status == "skipped" else f"{CHECKS[check.name]} ({check.count}){value}"
        typer.echo(f"{check.status:8} {check.name:11} {note}")
        for problem in check.problems[:SHOWN]:
            typer.echo(f"         - {problem}")
        if len(check.problems) > SHOWN:
            typer.echo(f"         - and {len(check.problems) - SHOWN} more")
        for noted in check.notes:
            typer.echo(f"         note: {noted}")
    typer.echo(
        f"{result.path}: {result.format or 'no format'}, {'sound' if result.is_sound else 'not sound'}"
    )
