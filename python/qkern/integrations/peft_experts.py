"""PEFT on experts that are linears: it takes those of many architectures for stacks of matrices.

Importing this stops it from turning targets, and the tensors of adapters, into those of stacks that such a
model does not have.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from peft.utils import transformers_weight_conversion as conversion
from transformers.integrations import peft as native

from qkern.errors import UnsupportedError
from qkern.integrations.hf_conversion import linear_experts
from qkern.nn import Experts, expert_parts, quant_linears, unfuse_experts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["has_linear_experts", "refuse_stacks"]


def has_linear_experts(model: nn.Module) -> bool:
    """Whether experts are linears; beside `QuantLinear` they become so here, as `qkern.load` has them."""
    if quant_linears(model):
        unfuse_experts(model)
    return any(isinstance(module, Experts) for module in model.modules())


def refuse_stacks(targets: list[str] | None, model: nn.Module) -> None:
    """Refuse ``target_parameters`` that are stacks elsewhere, in a model whose experts are linears.

    Raises
    ------
    UnsupportedError
        Naming them, and what to write.
    """
    stacks = {
        target: [name.split(".")[-2] for name in parts]
        for parameter, parts in expert_parts(model).items()
        for target in targets or ()
        if f".{parameter}".endswith(f".{target}")
    }
    if stacks:
        named = ", ".join(sorted(stacks))
        linears = dict.fromkeys(name for names in stacks.values() for name in names)
        raise UnsupportedError(
            f"target_parameters names {named}: stacks of experts, which are linears here; "
            f"write target_modules={list(linears)}; an adapter that was trained on stacks fits the 16-bit "
            "model alone"
        )


def _of_targets(theirs: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(theirs)
    def convert(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if not has_linear_experts(model):
            theirs(peft_config, model=model, conversions=conversions)

    return convert


def _of_tensors(theirs: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(theirs)
    def conversions(model: nn.Module, *arguments: Any, **options: Any) -> list[Any]:
        found = theirs(model, *arguments, **options)
        return linear_experts(found) if has_linear_experts(model) else found

    return conversions


conversion.convert_peft_config_for_transformers = _of_targets(conversion.convert_peft_config_for_transformers)
for _module in (conversion, native):
    _module.get_model_conversion_mapping = _of_tensors(_module.get_model_conversion_mapping)
