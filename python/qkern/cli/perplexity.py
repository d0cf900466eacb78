"""``qkern perplexity``: perplexity of a model folder or a GGUF on a text, by llama.cpp's rule."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Compute(StrEnum):
    """What the quantized layers do with activations."""

    FLOAT = "float"
    INT8 = "int8"


class Runner(StrEnum):
    """What runs a GGUF."""

    LLAMA_CPP = "llama.cpp"
    QKERN = "qkern"


def command(
    model: Annotated[str, typer.Argument(help="Model folder, .gguf file or hub id.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to read.")],
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window.")] = 512,
    compute: Annotated[
        Compute | None,
        typer.Option(
            help="Keep activations, or quantize them to int8 (not in llama.cpp).",
            show_default="int8 where the scheme says a8, else float",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps (not in llama.cpp).")] = "auto",
    runner: Annotated[
        Runner | None, typer.Option(help="What runs a .gguf file.", show_default="llama.cpp")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a model on a text.

    As llama.cpp's perplexity tool: windows without overlap; the second half of each is scored, the first
    is context; a tokenizer's BOS replaces the first token of each window.
    """
    from qkern.errors import InputError
    from qkern.evaluation import read_text, token_losses
    from qkern.evaluation.perplexity import with_error

    is_gguf = model.endswith(".gguf")
    if runner is Runner.LLAMA_CPP and not is_gguf:
        raise InputError(f"llama.cpp runs .gguf files: got {model}; export it first, or leave --runner out")
    content = read_text(text)
    run, ids, bos, source = (
        _open_gguf(model, content, window, compute, device)
        if is_gguf and runner is not Runner.QKERN
        else _open(model, content, device)
    )
    arithmetic = None if compute is None else compute.value
    losses = token_losses(run, ids, window=window, bos=bos, compute=arithmetic)
    perplexity, error = with_error(losses)
    result = {
        "perplexity": perplexity,
        "standard_error": error,
        "tokens": int(ids.numel()),
        "scored_tokens": int(losses.size),
        "windows": len(losses),
        "window": window,
        "runner": source,
        "compute": (arithmetic or "as the schemes say") if source == "qkern" else None,
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            f"perplexity {result['perplexity']:.4f} +/- {result['standard_error']:.4f} "
            f"({result['scored_tokens']} tokens scored in {result['windows']} windows of {window}, {source})"
        )


def _open(model: str, text: str, device: str) -> tuple[Any, Any, int | None, str]:
    from qkern.evaluation import bos_if_added, token_ids
    from qkern.pipelines.load import load_with_tokenizer

    loaded, tokenizer = load_with_tokenizer(model, device=device)
    return loaded, token_ids(tokenizer, text), bos_if_added(tokenizer), "qkern"


def _open_gguf(
    model: str, text: str, window: int, compute: Compute | None, device: str
) -> tuple[Any, Any, int | None, str]:
    from qkern.errors import UnsupportedError
    from qkern.evaluation.llama_cpp import LlamaCpp

    if compute is Compute.INT8:
        raise UnsupportedError(
            "--compute int8 does not apply to a GGUF, which llama.cpp runs by itself; leave --compute out, "
            "or add --runner qkern"
        )
    if device != "auto":
        raise UnsupportedError(
            "--device does not apply to a GGUF, which llama.cpp runs by itself; leave --device out, "
            "or add --runner qkern"
        )
    llama = LlamaCpp(model, context=window)
    return llama, llama.tokenize(text), llama.bos, "llama.cpp"
