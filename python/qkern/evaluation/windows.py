"""Cutting a token stream into windows, and running a model over them in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from qkern._progress import track
from qkern.errors import InputError, reason_of
from qkern.nn import compute_mode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Logits",
    "Model",
    "batches",
    "bos_if_added",
    "log_probabilities",
    "read_text",
    "runner",
    "split_windows",
    "token_ids",
    "window_logits",
]

Logits = Callable[[Tensor], Tensor]
"""Token ids ``[B, T]`` to logits ``[B, T, V]``."""
Model = nn.Module | Logits
"""A Hugging Face causal LM (anything whose output has ``logits``) or a `Logits` function."""

# Rows of logits that are normalized at a time in float64: bounds the scratch to 8 * 256 * V bytes.
_ROWS: Final = 256


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file.

    Raises
    ------
    InputError
        If the file is missing, not UTF-8 or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the text file {path}: {reason_of(error)}; name a UTF-8 text file"
        ) from error
    if not text.strip():
        raise InputError(f"the text file {path} is empty: give a text of at least one window of tokens")
    return text


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Tokenize a text as one stream, with the special tokens that the tokenizer itself adds.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Called once on the whole text.
    text : str
        The text.

    Returns
    -------
    Tensor
        int64 ``[T]``.
    """
    # verbose=False: the text may be longer than the model's context; it is cut into windows next.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")


def bos_if_added(tokenizer: Any) -> int | None:
    """Token with which this tokenizer begins every text, or None if it adds none."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def split_windows(ids: Tensor, window: int, bos: int | None) -> Tensor:
    """Cut int64 ``[T]`` into ``[T // window, window]``; a shorter rest at the end is dropped.

    With `bos`, the first token of every window is replaced by it.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids must be one row of integer token ids [T]: got {ids.dtype} {tuple(ids.shape)}")
    if window < 4:
        raise InputError(f"window must be at least 4 tokens: got {window}; 512 is usual")
    if len(ids) < window:
        raise InputError(
            f"the text is shorter than one window: got {len(ids)} tokens, a window has {window}; "
            "give a longer text or a smaller window"
        )
    windows = ids[: len(ids) // window * window].reshape(-1, window).long().clone()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def runner(model: Model, compute: str | None) -> Logits:
    """Return a function from ids ``[B, T]`` to logits ``[B, T, V]`` on the model's device.

    It runs the model in evaluation mode, without gradients, in `qkern.nn.compute_mode`, and leaves the model
    as it was.
    """
    if not isinstance(model, nn.Module):
        return _checked(model)
    module = model
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    # A key-value cache that nobody reads costs memory for every window.
    config = getattr(module, "config", None)
    arguments = {"use_cache": False} if hasattr(config, "use_cache") else {}
    context = getattr(config, "max_position_embeddings", None)

    def run(ids: Tensor) -> Tensor:
        if context is not None and ids.shape[-1] > context:
            raise InputError(
                f"a window must fit the model's context: got {ids.shape[-1]} tokens, "
                f"{type(module).__name__} reads {context}; give a smaller window"
            )
        training = module.training
        module.eval()
        try:
            with compute_mode(module, compute), torch.inference_mode():
                output = module(ids.to(device), **arguments)
        finally:
            module.train(training)
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        return logits

    return _checked(run)


def _checked(function: Logits) -> Logits:
    def run(ids: Tensor) -> Tensor:
        logits = function(ids)
        if logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise InputError(
                f"the model must return logits [B, T, V] for ids {tuple(ids.shape)}: "
                f"got {tuple(logits.shape)}"
            )
        return logits

    return run


def batches(windows: Tensor, batch_size: int, description: str) -> Iterator[Tensor]:
    """Yield up to `batch_size` windows at a time, with progress."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: got {batch_size}")
    pieces: tuple[Tensor, ...] = torch.split(windows, batch_size)
    yield from track(pieces, description, unit="batch")


def window_logits(
    model: Model,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    batch_size: int = 4,
    compute: str | None = None,
) -> Tensor:
    """Logits of every position of every full window, to be compared with several models.

    Parameters
    ----------
    model : Model
        A Hugging Face causal LM, or a function from ids ``[B, T]`` to logits ``[B, T, V]``.
    ids : Tensor
        int64 ``[T]``.
    window : int
        Tokens of a window.
    bos : int, optional
        Replaces the first token of every window.
    batch_size : int
        Windows that run together.
    compute : str, optional
        ``"float"``, or ``"int8"`` for int8 activations; default: int8 where the scheme says a8, else float.

    Returns
    -------
    Tensor
        fp32 ``[T // window * window, V]`` on the CPU.
    """
    windows = split_windows(ids, window, bos)
    run = runner(model, compute)
    return torch.cat(
        [run(batch).flatten(0, 1).float().cpu() for batch in batches(windows, batch_size, "Reference logits")]
    )


def log_probabilities(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of ``[P, V]`` logits as float64 log-probabilities (fp32 on MPS), a block at a time."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, min(start + _ROWS, len(logits)))
        yield rows, torch.log_softmax(logits[rows].to(dtype), dim=-1)
