"""What is done to tensors between a checkpoint and a GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLUS_ONE", "ROW_TO_VECTOR", "UNCHANGED", "Change", "Config", "rotary"]

Config = Mapping[str, Any]
"""A transformers configuration as a dictionary, defaults filled in."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a tensor on its way into the file.

    Parameters
    ----------
    to_file : callable
        From tensor and configuration to the tensor of the file.
    from_file : callable
        Undoes it.
    """

    to_file: Callable[[Tensor, Config], Tensor]
    from_file: Callable[[Tensor, Config], Tensor]


def rotary(heads: str) -> Change:
    """Reorder rows: llama.cpp's llama rotates pairs of neighbours, transformers the two halves of a head."""

    def to_file(tensor: Tensor, config: Config) -> Tensor:
        halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def from_file(tensor: Tensor, config: Config) -> Tensor:
        pairs = tensor.reshape(config[heads], -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    return Change(to_file, from_file)


UNCHANGED: Final = Change(lambda tensor, _: tensor, lambda tensor, _: tensor)
# transformers adds the one when it multiplies.
PLUS_ONE: Final = Change(lambda tensor, _: tensor.float() + 1, lambda tensor, _: tensor - 1)
ROW_TO_VECTOR: Final = Change(lambda tensor, _: tensor.squeeze(0), lambda tensor, _: tensor.unsqueeze(0))
