"""Perplexity, KL and agreement with the original, all from one reading of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qkern.evaluation.kl import Interval, paired_bootstrap
from qkern.evaluation.perplexity import token_losses, with_error
from qkern.evaluation.reference import ReferenceReader

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.evaluation.reference import ReferenceWriter
    from qkern.evaluation.windows import Logits

__all__ = ["Score", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a model does on a text.

    Parameters
    ----------
    perplexity, standard_error : float
        By `perplexity`'s rule.
    scored_tokens : int
        Tokens that the perplexity is over.
    positions : int
        Positions that `kl` and `agreement` are over.
    kl : Interval or None
        Mean of KL(original || model) in nats and its bootstrap 95 % interval; None without an original.
    agreement : float or None
        Share of the positions at which both find the same token likeliest.
    """

    perplexity: float
    standard_error: float
    scored_tokens: int
    positions: int
    kl: Interval | None = None
    agreement: float | None = None


def score(
    run: Logits,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    reference: ReferenceWriter | ReferenceReader | None = None,
) -> Score:
    """Read a text once, in the windows of `perplexity` and `kl_divergence`.

    Parameters
    ----------
    run : Logits
        From ids ``[B, T]`` to logits ``[B, T, V]``; see `runner`.
    ids : Tensor
        int64 ``[T]``, held-out tokens.
    window, bos
        As in `perplexity`.
    reference : ReferenceWriter or ReferenceReader, optional
        Keeps the logits, for the original, or compares them with what was kept.

    Returns
    -------
    Score
        With KL and agreement if they were compared.

    Raises
    ------
    InputError
        As `perplexity` and `kl_divergence` do.
    """

    def watched(batch: Tensor) -> Tensor:
        logits = run(batch)
        if reference is not None:
            reference(logits.flatten(0, 1))
        return logits

    losses = token_losses(watched, ids, window=window, bos=bos)
    perplexity, error = with_error(losses)
    kl = agreement = None
    if isinstance(reference, ReferenceReader):
        values = reference.kl
        kl = paired_bootstrap(values, np.zeros_like(values), window=window)
        agreement = reference.agreement
    return Score(
        perplexity=perplexity,
        standard_error=error,
        scored_tokens=int(losses.size),
        positions=len(losses) * window,
        kl=kl,
        agreement=agreement,
    )
