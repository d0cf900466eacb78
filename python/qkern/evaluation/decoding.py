"""Reading a prompt and going on token by token: what speed is measured of, and greedy text made with."""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from qkern.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

__all__ = ["Decoder", "Speed", "TransformersDecoder", "continued", "measure_speed"]

# Tokens of a prompt that run together: bounds the activations, and what attention makes of a long prompt.
_CHUNK: Final = 512
REPETITIONS: Final = 3
# What has taken this long is not repeated.
_ENOUGH_SECONDS: Final = 60.0


class Decoder(Protocol):
    """A model with a key-value cache."""

    @property
    def context(self) -> int | None:
        """Tokens that it reads at most, if it says so."""
        ...

    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything and read int64 ``[T]``; logits ``[V]`` of the last."""
        ...

    def step(self, token: int) -> Tensor:
        """Read one more token; its logits ``[V]``."""
        ...


class TransformersDecoder:
    """A transformers causal LM with the cache that it makes itself, as its ``generate`` runs it.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        # Logits of a whole prompt may take more memory than the model.
        last = {"logits_to_keep": 1}
        self._arguments = last if last.keys() <= inspect.signature(model.forward).parameters.keys() else {}

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at most, if its config says so."""
        context: int | None = getattr(self._model.config, "max_position_embeddings", None)
        return context

    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything and read int64 ``[T]``; logits ``[V]`` of the last."""
        self._cache = None
        for chunk in torch.split(ids, _CHUNK):
            logits = self._read(chunk)
        return logits

    def step(self, token: int) -> Tensor:
        """Read one more token; its logits ``[V]``."""
        return self._read(torch.tensor([token]))

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        output = self._model(
            ids[None].to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            **self._arguments,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens a second after a prompt of one length.

    Parameters
    ----------
    prompt : int
        Tokens of the prompt.
    prefill, decode : float or None
        Tokens a second while the prompt is read, and of single tokens after it; medians.
    prefill_spread, decode_spread : float
        Distance of the quartiles over the median: how far the machine's noise goes.
    runs : int
        How often the prompt was read.
    absent : str or None
        Why there are no numbers.
    """

    prompt: int
    prefill: float | None = None
    decode: float | None = None
    prefill_spread: float = 0.0
    decode_spread: float = 0.0
    runs: int = 0
    absent: str | None = None


def continued(decoder: Decoder, ids: Tensor, new_tokens: int, ends: Collection[int] = ()) -> list[int]:
    """Likeliest tokens after a prompt, one by one.

    Parameters
    ----------
    decoder : Decoder
        The model.
    ids : Tensor
        int64 ``[T]``.
    new_tokens : int
        Tokens at most.
    ends : collection of int
        Tokens that end the text.

    Returns
    -------
    list of int
        Without the token that ended it.

    Raises
    ------
    InputError
        If the prompt is empty or too long.
    """
    _check_fits(decoder, len(ids), new_tokens)
    made: list[int] = []
    token = int(decoder.prefill(ids).argmax())
    while token not in ends:
        made.append(token)
        if len(made) == new_tokens:
            break
        token = int(decoder.step(token).argmax())
    return made


def measure_speed(decoder: Decoder, ids: Tensor, prompt: int, new_tokens: int) -> Speed:
    """Time a prompt and single tokens after it, up to three times.

    Parameters
    ----------
    decoder : Decoder
        The model.
    ids : Tensor
        int64 ``[T]``, a text that is repeated as often as the prompt needs.
    prompt : int
        Tokens of the prompt.
    new_tokens : int
        Single tokens after it.

    Returns
    -------
    Speed
        Without numbers where the model does not read so many tokens.
    """
    try:
        _check_fits(decoder, prompt, new_tokens)
    except InputError as error:
        return Speed(prompt=prompt, absent=str(error))
    text = ids.repeat(-(-prompt // len(ids)))[:prompt]
    prefills: list[float] = []
    steps: list[float] = []
    begun = time.perf_counter()
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        # The token itself is waited for: a GPU runs ahead of its caller.
        token = int(decoder.prefill(text).argmax())
        prefills.append(time.perf_counter() - started)
        for _ in range(new_tokens):
            started = time.perf_counter()
            token = int(decoder.step(token).argmax())
            steps.append(time.perf_counter() - started)
        if time.perf_counter() - begun > _ENOUGH_SECONDS:
            break
    return Speed(
        prompt=prompt,
        prefill=prompt / statistics.median(prefills),
        decode=1 / statistics.median(steps),
        prefill_spread=_spread(prefills),
        decode_spread=_spread(steps),
        runs=len(prefills),
    )


def _check_fits(decoder: Decoder, prompt: int, new_tokens: int) -> None:
    if prompt == 0:
        raise InputError("the prompt has no tokens: give a text")
    if decoder.context is not None and prompt + new_tokens > decoder.context:
        raise InputError(f"the model reads {decoder.context} tokens, {new_tokens} new ones among them")


def _spread(seconds: list[float]) -> float:
    if len(seconds) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle
