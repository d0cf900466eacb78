"""Calibration documents packed into equally long sequences of tokens."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qkern.calibration.texts import Document

__all__ = ["bounded_length", "calibration_hash", "make_batches", "split_batches"]

logger = logging.getLogger(__name__)


def bounded_length(config: Any, length: int) -> int:
    """`length`, or the longest sequence that the model takes if that is shorter.

    Raises
    ------
    InputError
        If `length` is less than 2.
    """
    if length < 2:
        raise InputError(f"length must be at least 2 tokens: got {length}; the default is 2048")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        logger.info("sequences of %d tokens instead of %d: all that the model takes", limit, length)
        return limit
    return length


def make_batches(
    tokenizer: Any,
    texts: Sequence[Document] | Tensor,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    vocabulary: int | None = None,
    what: str = "calibration",
) -> Tensor:
    """Pack documents into sequences of `length` tokens, without padding and without overlap.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        Encodes texts, each with the special tokens it adds by itself; may be None for token ids.
    texts : sequence of str or list of int, or Tensor
        Documents, joined in order; an integer tensor ``[S, T]`` of ready sequences is cut to `samples`.
    samples : int
        Sequences wanted; of more that the text holds they are drawn with `seed`, of fewer all are used.
    length : int
        Tokens in a sequence.
    seed : int
        Seed of the draw.
    vocabulary : int, optional
        Number of token ids that the model knows; larger ids are an error.
    what : str
        What errors call the text.

    Returns
    -------
    Tensor
        int64 ``[S, length]``.

    Raises
    ------
    InputError
        If the text is empty, shorter than one sequence, or in sequences of one token.
    """
    packed, order = _packed(tokenizer, texts, samples, length, seed, what)
    return _checked(packed[order[:samples].sort().values], vocabulary, what)


def split_batches(
    tokenizer: Any,
    texts: Sequence[Document] | Tensor,
    *,
    aside: int,
    samples: int,
    length: int,
    seed: int = 0,
    vocabulary: int | None = None,
    what: str = "calibration",
) -> tuple[Tensor, Tensor]:
    """Pack documents as `make_batches` does, and set others aside that it would not draw.

    Parameters
    ----------
    aside : int
        Sequences to set aside; of a short text half at most.
    tokenizer, texts, samples, length, seed, vocabulary, what
        As in `make_batches`. Of a short text fewer than `samples` are left.

    Returns
    -------
    chosen, others : Tensor
        int64 ``[S, length]`` and ``[A, length]``; the first is what `make_batches` draws for ``samples=S``.

    Raises
    ------
    InputError
        As `make_batches`, and if there is one sequence alone.
    """
    packed, order = _packed(tokenizer, texts, samples, length, seed, what, aside)
    aside = min(aside, len(packed) // 2)
    count = min(samples, len(packed) - aside)
    if aside == 0:
        raise InputError(
            f"{what} text holds one sequence of {packed.shape[1]} tokens, and a search needs one to choose "
            "codes by and another to score them on: give more text, another one to score on (--text FILE), "
            "or a smaller length"
        )
    chosen, others = (
        _checked(packed[part.sort().values], vocabulary, what)
        for part in (order[:count], order[count : count + aside])
    )
    return chosen, others


def _packed(
    tokenizer: Any,
    texts: Sequence[Document] | Tensor,
    samples: int,
    length: int,
    seed: int,
    what: str,
    aside: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return all sequences, and the order in which they are drawn; ready ones have that order."""
    if samples < 1:
        raise InputError(f"samples must be at least 1: got {samples}; the default is 128")
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.is_floating_point() or texts.numel() == 0:
            raise InputError(
                f"ids of the {what} text must be an integer tensor [sequences, tokens]: got {texts.dtype} "
                f"{tuple(texts.shape)}"
            )
        return texts[:, :length], torch.arange(len(texts), device=texts.device)
    packed = _sequences(tokenizer, texts, length, what)
    if len(packed) < samples + aside:
        logger.info(
            "%s text holds %d sequences of %d tokens, %d were asked for",
            *(what, len(packed), length, samples + aside),
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    return packed, torch.randperm(len(packed), generator=generator, device="cpu")


def _checked(batch: Tensor, vocabulary: int | None, what: str) -> Tensor:
    if batch.shape[1] < 2:
        raise InputError(
            f"{what} text is in sequences of one token, which nothing can be measured on: give longer ones"
        )
    batch = batch.long().cpu()
    if vocabulary is not None and (int(batch.max()) >= vocabulary or int(batch.min()) < 0):
        raise InputError(
            f"ids of the {what} text go from {int(batch.min())} to {int(batch.max())} but the model's "
            f"vocabulary has {vocabulary} entries: use the model's own tokenizer"
        )
    return batch


def _sequences(tokenizer: Any, texts: Sequence[Document], length: int, what: str) -> Tensor:
    ids: list[int] = []
    for document in texts:
        if isinstance(document, str):
            if tokenizer is None:
                raise InputError(
                    f"the {what} text needs a tokenizer: the model has none; give lists of token ids"
                )
            ids.extend(tokenizer(document, verbose=False)["input_ids"])
        else:
            ids.extend(document)
    windows = len(ids) // length
    if windows == 0:
        raise InputError(
            f"{what} text is shorter than one sequence: it has {len(ids)} tokens, {length} are needed; "
            "give more text or a smaller length"
        )
    return torch.tensor(ids[: windows * length], dtype=torch.int64, device="cpu").reshape(windows, length)


def calibration_hash(batch: Tensor) -> str:
    """SHA-256 of the token ids and their shape: equal exactly when two runs saw the same calibration."""
    digest = hashlib.sha256(repr(tuple(batch.shape)).encode())
    digest.update(batch.contiguous().numpy().tobytes())
    return digest.hexdigest()
