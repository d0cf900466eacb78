"""What any decoder shows without data about its architecture: its layers and its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qkern.errors import UnsupportedError
from qkern.models.architecture import Architecture, architecture_for
from qkern.nn import ROUTERS

__all__ = ["Structure", "describe", "is_router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Where things are in one model.

    Parameters
    ----------
    layers : str
        Path of the list of decoder layers.
    count : int
        Number of decoder layers.
    head : str or None
        Path of the output head.
    tied : bool
        The head is the input embedding.
    architecture : Architecture or None
        Known data, None for an unknown architecture.
    """

    layers: str
    count: int
    head: str | None
    tied: bool
    architecture: Architecture | None


def describe(model: Any) -> Structure:
    """Find the decoder layers and the head of a transformers causal LM.

    An architecture without data is taken apart by shape alone: its decoder layers are the longest
    `ModuleList` that is not inside another, of several equally long ones the one with the most parameters.

    Raises
    ------
    UnsupportedError
        If the model has no `ModuleList` at all, or a known type is not laid out as its data says.
    """
    architecture = architecture_for(model.config)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    if architecture is not None:
        try:
            layers = model.get_submodule(architecture.layers)
        except AttributeError:
            raise UnsupportedError(
                f"{type(model).__name__} has no {architecture.layers}, which every {architecture.model_type} "
                "causal LM has; pass the causal LM, not a part or a wrapper of it"
            ) from None
        path = architecture.layers
    else:
        lists: list[tuple[int, int, str]] = []
        for name, module in model.named_modules():
            # Outer lists come first; a list inside another one holds the experts of a layer, not layers.
            inside = any(name.startswith(f"{outer}.") for _, _, outer in lists)
            if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
                lists.append((len(module), sum(p.numel() for p in module.parameters()), name))
        if not lists:
            raise UnsupportedError(
                f"{type(model).__name__} has no list of decoder layers (nn.ModuleList): "
                "qkern quantizes decoder-only language models"
            )
        path = max(lists, key=lambda entry: entry[:2])[2]
        layers = model.get_submodule(path)
    return Structure(
        layers=path,
        count=len(layers),
        head=None if head is None else names.get(id(head)),
        tied=tied,
        architecture=architecture,
    )


def is_router(name: str) -> bool:
    """Whether a linear of this name chooses experts."""
    return name.rpartition(".")[2] in ROUTERS
