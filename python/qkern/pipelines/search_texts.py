"""The texts of a search: what codes are chosen by, and what assignments are scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from qkern.calibration import bounded_length
from qkern.errors import FormatError, InputError
from qkern.pipelines.quantize import calibration_ids

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.pipelines.source import Source

__all__ = ["Texts"]

# Seed of the draw: searches with other seeds have the same candidates and losses.
_SEED: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Sequences that codes are chosen by, and those that assignments are scored on."""

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

        Raises
        ------
        InputError
            If there is too little text, or the numbers make no sense.
        """
        bounded = bounded_length(source.model.config, length)
        count = max(1, tokens // bounded)
        if tokens < 2:
            raise InputError(f"tokens must be at least 2: got {tokens}; the default is 12288")
        if text is not None:
            ids = calibration_ids(source, calibration, tokenizer, samples, bounded, _SEED)
            try:
                scored = calibration_ids(source, text, tokenizer, count, bounded, _SEED, "text to score on")
            except (InputError, FormatError) as error:
                raise type(error)(f"text (--text): {error}") from error
            return cls(calibration=ids, scored=scored)._checked()
        ids = calibration_ids(source, calibration, tokenizer, samples + count, bounded, _SEED)
        if len(ids) < 2:
            raise InputError(
                f"the calibration text holds one sequence of {ids.shape[1]} tokens, and a search needs one "
                "to choose codes by and another to score them on: give more text, another one to score on "
                "(--text FILE), or a smaller length"
            )
        # At most half of them, evenly spread.
        count = min(count, len(ids) // 2)
        aside = {round((index + 0.5) * len(ids) / count - 0.5) for index in range(count)}
        rest = [index for index in range(len(ids)) if index not in aside]
        return cls(calibration=ids[rest][:samples], scored=ids[sorted(aside)])._checked()

    def _checked(self) -> Self:
        length = self.scored.shape[1]
        if length < 4:
            raise InputError(
                f"perplexity needs sequences of 4 tokens: got length {length}; 2048 is the default"
            )
        return self
