"""Perplexity by the rule of llama.cpp's perplexity tool, so that the numbers can be compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.evaluation.windows import Model, batches, log_probabilities, runner, split_windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["perplexity", "token_losses", "with_error"]


def token_losses(
    model: Model,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    batch_size: int = 4,
    compute: str | None = None,
) -> NDArray[np.float64]:
    """Negative log-likelihood in nats of every scored token; see `perplexity` for which are scored.

    Returns
    -------
    ndarray
        float64 ``[windows, window - window // 2 - 1]``.

    Raises
    ------
    InputError
        If the text is shorter than one window, the window longer than the model's context, or a loss not
        finite.
    """
    windows = split_windows(ids, window, bos)
    first = window // 2
    losses = []
    run = runner(model, compute)
    for batch in batches(windows, batch_size, "Perplexity"):
        scored = run(batch)[:, first:-1].flatten(0, 1)
        targets = batch[:, first + 1 :].reshape(-1, 1).to(scored.device)
        for rows, log_probs in log_probabilities(scored):
            losses.append(-log_probs.gather(1, targets[rows])[:, 0].cpu())
    result: NDArray[np.float64] = torch.cat(losses).double().reshape(len(windows), -1).numpy()
    broken = int((~np.isfinite(result)).sum())
    if broken:
        raise InputError(
            f"the model gives no finite loss for {broken} of {result.size} scored tokens: its logits have "
            "NaN or Inf; check its weights, and load it in bf16 or fp32 if fp16 overflows"
        )
    return result


def with_error(losses: NDArray[np.float64]) -> tuple[float, float]:
    """Perplexity and its standard error from `token_losses`.

    Scored tokens are taken as independent, which is what llama.cpp's own +/- does.
    """
    value = math.exp(losses.mean())
    return value, value * float(losses.std()) / math.sqrt(losses.size)


def perplexity(
    model: Model,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    batch_size: int = 4,
    compute: str | None = None,
) -> float:
    """Perplexity of a token stream, windowed as llama.cpp's perplexity tool does it.

    The stream is cut into windows of `window` tokens without overlap, and a shorter rest is dropped.
    Each window is read from its start with no memory of the one before. Its first half is context only:
    the logits at positions ``window // 2`` to ``window - 2`` are scored against the tokens that follow
    them, which makes ``window - window // 2 - 1`` tokens a window (255 of 512). The result is the
    exponential of the mean negative log-likelihood over all scored tokens of all windows.

    Parameters
    ----------
    model : Model
        A Hugging Face causal LM, or a function from ids ``[B, T]`` to logits ``[B, T, V]``.
    ids : Tensor
        int64 ``[T]``, the whole text tokenized once with the tokenizer's own special tokens.
    window : int
        Tokens of a window; at least 4, at most the model's context.
    bos : int, optional
        For a tokenizer that begins every text with this token: it replaces the first token of each
        window, as in llama.cpp. None for tokenizers that add none.
    batch_size : int
        Windows that run together; it does not change the result beyond rounding.
    compute : str, optional
        ``"float"`` keeps activations, ``"int8"`` quantizes them in every `QuantLinear`; default: int8 where
        the scheme says a8, else float.

    Returns
    -------
    float
        The perplexity.

    Raises
    ------
    InputError
        If the text is shorter than one window, the window longer than the model's context, or a loss not
        finite.
    """
    losses = token_losses(model, ids, window=window, bos=bos, batch_size=batch_size, compute=compute)
    return math.exp(losses.mean())
