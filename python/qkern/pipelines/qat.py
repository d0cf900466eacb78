"""Quantization-aware training: a model's linears trained on the grid on which they will be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qkern.errors import InputError, UnsupportedError
from qkern.nn import (
    FakeQuantLinear,
    OutlierLinear,
    QuantLinear,
    expert_parameters,
    named_linears,
    refuse_experts,
    unfuse_experts,
)
from qkern.nn.replace import UNTOUCHED, exchange, naming_weight, report_subclasses
from qkern.ops.gguf_types import GGUFType
from qkern.pipelines.checks import refuse_adapters
from qkern.pipelines.load import save_as_quantized
from qkern.search import MixedPrecision, parse_choice, spell_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qkern.schemes import Scheme

__all__ = ["convert_qat", "prepare_qat"]


def prepare_qat(
    model: nn.Module,
    scheme: Scheme | GGUFType | str | None = None,
    *,
    assignment: MixedPrecision | Mapping[str, Any] | str | Path | None = None,
    skip: Sequence[str] = UNTOUCHED,
    learn_scales: bool = False,
    search: str = "mse",
    scale_dtype: torch.dtype = torch.float16,
) -> MixedPrecision:
    """Put a `FakeQuantLinear` in the place of the linear layers of a model, to train it.

    Parameters
    ----------
    model : nn.Module
        Changed in place. The masters of the replaced layers are fp32, in a bf16 model too. What is frozen
        stays so, as all dense weights that `load` reads beside quantized ones, or decodes of a GGUF;
        `QuantLinear` layers of the same scheme go on from their codes and scales, with
        ``learn_scales=True``, and are trained. Experts that are 3-D parameters become linears first, see
        `unfuse_experts`.
    scheme : Scheme, GGUFType or str, optional
        For example ``"w2g64"`` or ``"q4_k"``, of every linear that `skip` does not name.
    assignment : MixedPrecision, mapping, str or Path, optional
        Schemes or GGUF types by names, ends of names or globs, or the JSON file that holds them, in place of
        `scheme` and `skip`; what it does not name stays as it is.
    skip : sequence of str
        Layers to leave as they are, as in `qkern.replace_linears`.
    learn_scales, search, scale_dtype
        As in `FakeQuantLinear`; a `QuantLinear` keeps its own.

    Returns
    -------
    MixedPrecision
        What is trained on what, by full names: an assignment that `qkern.quantize` and `qkern.export_gguf`
        take.

    Raises
    ------
    InputError
        If nothing matches, or the model is prepared already or has adapters of PEFT. Also if the values of a
        weight cannot be rounded (the message names it): only then layers before it are replaced already.
    UnsupportedError
        On a layer that shares its weight, such as a tied head, on experts in 3-D parameters that
        `unfuse_experts` does not know and that are not left out, and as `FakeQuantLinear`.
    """
    refuse_adapters(model)
    _refuse_prepared(model)
    if (scheme is None) == (assignment is None):
        raise InputError(
            f"prepare_qat takes a scheme or an assignment: got {scheme=}, {assignment=}; pass one of them"
        )
    if scheme is not None:
        choices = _choices_of_scheme(model, scheme, skip)
    else:
        assert assignment is not None
        choices = _choices_of_assignment(model, MixedPrecision.of(assignment))
    linears = named_linears(model)
    wanted = {name: linears[name] for name in choices}
    _refuse_outliers(wanted)
    _refuse_shared(model, wanted)
    options: dict[str, Any] = {
        "learn_scales": learn_scales,
        "search": search,
        "scale_dtype": scale_dtype,
    }
    for name, linear in wanted.items():
        with naming_weight(name):
            _check_choice(linear, choices[name], options)
    exchange(model, wanted, lambda name, linear: _trainable(linear, choices[name], options))
    return _assignment(choices)


def convert_qat(model: nn.Module) -> MixedPrecision:
    """Put in the place of every `FakeQuantLinear` what it was trained to be.

    Of schemes that is a `QuantLinear` with the same weight, which `qkern.save` writes. Of GGUF types it is
    the dense fp32 master weight: after ``save_pretrained`` `qkern.export_gguf`, with the assignment that is
    returned and without calibration or importance, makes the trained blocks of it. The whole model is then
    made fp32.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    MixedPrecision
        What was trained on what, by full names.

    Raises
    ------
    InputError
        If there is nothing to convert, the model has adapters of PEFT, or a weight has NaN or Inf; nothing is
        converted then.
    """
    refuse_adapters(model)
    layers = _prepared(model)
    if not layers:
        raise InputError(f"no FakeQuantLinear in {type(model).__name__}: call prepare_qat and train it first")
    assignment = _assignment({name: layer.scheme for name, layer in layers.items()})
    is_dense = any(isinstance(layer.scheme, GGUFType) for layer in layers.values())
    made = {}
    for name, layer in layers.items():
        with naming_weight(name):
            made[name] = layer.convert()
    exchange(model, layers, lambda name, _: made.pop(name))
    if is_dense:
        model.float()
    elif hasattr(model, "save_pretrained") and not hasattr(model, "hf_quantizer"):
        save_as_quantized(model)
    return assignment


def _assignment(choices: Mapping[str, Scheme | GGUFType]) -> MixedPrecision:
    return MixedPrecision({name: spell_choice(choice) for name, choice in choices.items()})


def _prepared(model: nn.Module) -> dict[str, FakeQuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def _refuse_prepared(model: nn.Module) -> None:
    for name in _prepared(model):
        raise InputError(
            f"the model is prepared already: {name} is a FakeQuantLinear; give all layers at once, as "
            "an assignment where they differ"
        )


def _choices_of_scheme(
    model: nn.Module, scheme: Scheme | GGUFType | str, skip: Sequence[str]
) -> dict[str, Scheme | GGUFType]:
    choice = parse_choice(scheme) if isinstance(scheme, str) else scheme
    if choice is None:
        raise InputError("the scheme leaves every linear 16-bit: there is nothing to train for")
    refuse_experts(model, skip=skip)
    unfuse_experts(model, skip=skip)
    report_subclasses(model, skip)
    choices = dict.fromkeys(named_linears(model, skip=skip), choice)
    if not choices:
        raise InputError(
            f"no linear layer to train in {type(model).__name__}: skip={tuple(skip)!r} leaves none; pass a "
            "model with nn.Linear or Conv1D layers, or skip fewer"
        )
    return choices


def _choices_of_assignment(model: nn.Module, assignment: MixedPrecision) -> dict[str, Scheme | GGUFType]:
    unfuse_experts(model)
    linears, experts = named_linears(model), expert_parameters(model)
    found = assignment.resolve([*linears, *experts])
    choices = {name: choice for name, choice in found.items() if choice is not None}
    refused = [name for name in choices if name in experts]
    if refused:
        raise UnsupportedError(
            f"the assignment names {refused[0]}, a 3-D parameter with several experts, which is not trained "
            "on a grid: leave it out"
        )
    if not choices:
        raise InputError("the assignment leaves every linear 16-bit: there is nothing to train for")
    return choices


def _refuse_outliers(wanted: Mapping[str, nn.Module]) -> None:
    for name, layer in wanted.items():
        if isinstance(layer, OutlierLinear):
            raise UnsupportedError(
                f"{name} is an OutlierLinear, whose outlier activations no training on a grid leaves "
                "unquantized: leave it out, or begin with the 16-bit model"
            )


def _refuse_shared(model: nn.Module, wanted: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight another module has too: the two would be trained apart."""
    own = {id(layer.weight): name for name, layer in wanted.items() if not isinstance(layer, QuantLinear)}
    for other, module in model.named_modules():
        for parameter in module._parameters.values():
            name = own.get(id(parameter))
            if name is not None and wanted[name] is not module:
                raise UnsupportedError(
                    f"{name} shares its weight with {other}, and training would part them: leave it 16-bit "
                    "(skip, or '16' in the assignment)"
                )


def _check_choice(linear: nn.Module, choice: Scheme | GGUFType, options: Mapping[str, Any]) -> None:
    """Refuse what `_trainable` cannot make, before it has made any."""
    if isinstance(linear, QuantLinear) and (choice != linear.scheme or not options["learn_scales"]):
        raise InputError(
            "a layer that is quantized goes on with its own scheme and scales: got "
            f"{spell_choice(choice)} and learn_scales={options['learn_scales']} for {linear.scheme}; pass "
            f"scheme={str(linear.scheme)!r} and learn_scales=True, or begin with the 16-bit model"
        )
    FakeQuantLinear.check(linear, choice, **options)


def _trainable(linear: nn.Module, choice: Scheme | GGUFType, options: Mapping[str, Any]) -> nn.Module:
    if not isinstance(linear, QuantLinear):
        return FakeQuantLinear.from_linear(linear, choice, **options)
    made = FakeQuantLinear.from_quantized(linear.quantized(), linear.bias)
    return made.train(linear.training)
