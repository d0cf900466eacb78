"""The texts of a search: what codes are chosen by, and what assignments are scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from qkern.calibration import bounded_length
from qkern.errors import FormatError, InputError
from qkern.pipelines.calibration import calibration_ids, split_ids

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.pipelines.source import Source

__all__ = ["Texts"]

# Seed of the draw: searches with other seeds have the same candidates and losses.
_SEED: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Sequences that codes are chosen by, and those that assignments are scored on.

    The former are those that `qkern.quantize` draws for as many samples: the codes that are scored are then
    those that it writes.
    """

    calibration: Tensor
    scored: Tensor

    @classmethod
    def draw(
        cls,
        source: Source,
        calibration: Any,
        text: Any,
        tokenizer: Any,
        samples: int,
        length: int,
        tokens: int,
    ) -> Self:
        """Draw both, from one text or two; arguments are those of `qkern.sensitivity`.

        Of one text that is too short for both, half at most is scored on, and fewer `samples` are left.

        Raises
        ------
        InputError
            If there is too little text, or the numbers make no sense.
        """
        bounded = bounded_length(source.model.config, length)
        count = max(1, tokens // bounded)
        if tokens < 2:
            raise InputError(f"tokens must be at least 2: got {tokens}; the default is 12288")
        if text is None:
            ids, scored = split_ids(source, calibration, tokenizer, samples, bounded, _SEED, count)
        else:
            ids = calibration_ids(source, calibration, tokenizer, samples, bounded, _SEED)
            try:
                scored = calibration_ids(source, text, tokenizer, count, bounded, _SEED, "search")
            except (InputError, FormatError) as error:
                raise type(error)(f"text (--text): {error}") from error
        if scored.shape[1] < 4:
            raise InputError(
                f"perplexity needs sequences of 4 tokens: got length {scored.shape[1]}; 2048 is the default"
            )
        return cls(calibration=ids, scored=scored)
