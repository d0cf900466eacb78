"""The injected form of a model: outlier channels as large models have them, the function unchanged."""

from __future__ import annotations

from typing import Any, Final

import torch

from qkern.errors import UnsupportedError
from qkern.models.architecture import known_architectures
from qkern.models.folding import fold_norm
from qkern.models.structure import describe
from qkern.nn import unfuse_experts

__all__ = ["FACTOR", "FRACTION", "inject"]

FRACTION: Final = 0.01
FACTOR: Final = 30.0


def inject(model: Any, *, seed: int = 0) -> Any:
    """Multiply 1 % of each norm's channels by 30 and divide the columns that read them by 30, in place.

    Applies to every norm that feeds linears, the last one included unless the head is tied to the
    embedding. The output is unchanged up to rounding in the model's dtype, so use an fp32 model.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM of a known architecture; its experts become linears, see `unfuse_experts`.
    seed : int
        Seed of the choice of channels.

    Returns
    -------
    PreTrainedModel
        `model` itself.

    Raises
    ------
    UnsupportedError
        For an architecture without data about which linears read which norm.
    """
    structure = describe(model)
    architecture = structure.architecture
    if architecture is None:
        raise UnsupportedError(
            f"the injected form needs to know which linears read which norm: {model.config.model_type} is "
            f"not among {', '.join(known_architectures())}"
        )
    unfuse_experts(model)
    generator = torch.Generator("cpu").manual_seed(seed)
    for layer in model.get_submodule(structure.layers):
        for entry in architecture.in_layer(layer).norm_linears:
            linears = [layer.get_submodule(name) for name in (*entry.linears, *entry.routers)]
            _inject_norm(layer.get_submodule(entry.norm), linears, architecture.norm_offset, generator)
    if structure.head is not None and not structure.tied:
        head = model.get_submodule(structure.head)
        _inject_norm(
            model.get_submodule(architecture.final_norm), [head], architecture.norm_offset, generator
        )
    return model


def _inject_norm(norm: Any, linears: list[Any], offset: float, generator: torch.Generator) -> None:
    size = norm.weight.numel()
    chosen = torch.randperm(size, generator=generator, device="cpu")[: max(1, round(FRACTION * size))]
    scale = torch.ones(size, dtype=torch.float32, device="cpu")
    scale[chosen] = 1 / FACTOR
    fold_norm(norm, linears, scale.to(norm.weight.device), offset=offset)
