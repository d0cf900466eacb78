"""Calibration texts of a verb as token ids for its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qkern.calibration import bounded_length, load_texts, load_tokenizer, make_batches, split_batches
from qkern.calibration.texts import check_source
from qkern.checkpoints import model_folder
from qkern.errors import InputError

if TYPE_CHECKING:
    from qkern.pipelines.source import Source

__all__ = ["calibration_ids", "split_ids"]


def calibration_ids(
    source: Source,
    calibration: Any,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    what: str = "calibration",
) -> Tensor:
    """Token ids int64 ``[S, T]`` of calibration texts, or others that errors call `what`, for a model.

    Raises
    ------
    InputError
        If there is no source, or none that can be used.
    """
    tokenizer, texts = _documents(source, calibration, tokenizer, what)
    return make_batches(tokenizer, texts, samples=samples, seed=seed, what=what, **_limits(source, length))


def split_ids(
    source: Source, calibration: Any, tokenizer: Any, samples: int, length: int, seed: int, aside: int
) -> tuple[Tensor, Tensor]:
    """Like `calibration_ids`, and other sequences that are set aside: int64 ``[S, T]`` and ``[A, T]``.

    Raises
    ------
    InputError
        As `calibration_ids`, and if there is one sequence alone.
    """
    tokenizer, texts = _documents(source, calibration, tokenizer, "calibration")
    limits = _limits(source, length)
    return split_batches(tokenizer, texts, aside=aside, samples=samples, seed=seed, **limits)


def _limits(source: Source, length: int) -> dict[str, Any]:
    vocabulary = source.model.get_input_embeddings().num_embeddings
    return {"length": bounded_length(source.model.config, length), "vocabulary": vocabulary}


def _documents(source: Source, calibration: Any, tokenizer: Any, what: str) -> tuple[Any, Any]:
    """Return a tokenizer, if one is needed, and texts or token ids."""
    if calibration is None:
        raise InputError(
            "calibration is missing: activations are measured on text; give a .txt or .jsonl file "
            "(--calibration FILE), a list of texts or token ids; qkern quantize needs none for method='rtn' "
            "without static scales"
        )
    check_source(calibration, what)
    if isinstance(calibration, Tensor):
        return None, calibration
    ready = isinstance(calibration, (list, tuple)) and not any(
        isinstance(entry, str) for entry in calibration
    )
    if not ready and tokenizer is None:
        tokenizer = source.tokenizer()
    elif not ready and isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(model_folder(tokenizer))
    return tokenizer, load_texts(calibration, tokenizer=tokenizer, what=what)
