"""Finding the linear layers of a model, and putting quantized ones in their place."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from torch import nn

from qkern.errors import InputError, UnsupportedError
from qkern.nn.embedding import QuantEmbedding
from qkern.nn.experts import expert_parameters, refuse_experts, unfuse_experts
from qkern.nn.fake_quant import FakeQuantLinear
from qkern.nn.linear import COMPUTE, QuantLinear, is_conv1d
from qkern.nn.names import ROUTERS, lies_in, places
from qkern.nn.naming import bind_save, bound_save, renames_experts, save_pretrained
from qkern.nn.state import QuantModule
from qkern.schemes import Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

__all__ = [
    "UNTOUCHED",
    "Assignment",
    "compute_mode",
    "exchange",
    "named_linears",
    "naming_weight",
    "quant_linears",
    "replace_linears",
    "report_subclasses",
]

logger = logging.getLogger(__name__)

UNTOUCHED: Final = ("lm_head", *ROUTERS)
"""What stays 16-bit unless it is named."""

Wanted = TypeVar("Wanted", bound=nn.Module)


def named_linears(model: nn.Module, *, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Linear layers of a model by name: exact ``nn.Linear``, transformers' ``Conv1D`` and `QuantLinear`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    skip : sequence of str
        Names to leave out, or those of modules around them, as in `name_matches`.

    Returns
    -------
    dict of str to nn.Module
        In the model's order; a module with several names appears under the first.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or is_conv1d(module) or isinstance(module, QuantLinear))
        and not lies_in(name, skip)
    }


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every `QuantLinear` of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@runtime_checkable
class Assignment(Protocol):
    """What says by names which linears get which scheme, such as `qkern.MixedPrecision`."""

    def schemes(self, names: Iterable[str]) -> dict[str, Scheme]:
        """Schemes of those among the names that are to be quantized."""
        ...


def replace_linears(
    model: nn.Module,
    scheme: Scheme | str | Mapping[str, Scheme | str] | Assignment,
    *,
    skip: Sequence[str] = UNTOUCHED,
    modules: Collection[str] | None = None,
    kind: type[QuantLinear] = QuantLinear,
    **quantize: Any,
) -> list[str]:
    """Quantize the linear layers of a model in place, rounding to the nearest code.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Experts that are 3-D parameters become linears first, see `unfuse_experts`.
    scheme : Scheme, str, mapping or MixedPrecision
        For example ``"w4g128"``; or the scheme of each linear to replace by its full name, or an assignment,
        which take the place of `skip` and `modules`.
    skip : sequence of str
        Layers to leave as they are, by their name or that of a module around them: exact names, name
        suffixes (``"down_proj"``, ``"experts"``) or globs (``"*.layers.0.*"``). Default: the output head
        and routers.
    modules : collection of str, optional
        Replace only these names; each must be a linear layer.
    kind : type
        `QuantLinear`, or `OutlierLinear` for LLM.int8() (scheme ``w8a8``).
    **quantize
        Further arguments of `qkern.ops.quantize_groupwise`, such as ``search="mse"``, and of the kind's
        `from_linear`.

    Returns
    -------
    list of str
        Names of the layers that were replaced.

    Notes
    -----
    `qkern.save` writes the model. Its own ``save_pretrained`` refuses, if it is `model` and not one around it
    that is asked.

    Raises
    ------
    InputError
        If nothing matched, if a name in `modules` is no linear layer, or if a weight has NaN or Inf (the
        message names it; layers before it are replaced already).
    UnsupportedError
        On experts in 3-D parameters that `unfuse_experts` does not know and neither `skip` nor `modules`
        leaves out.
    """
    if isinstance(scheme, Assignment):
        unfuse_experts(model)
        scheme = scheme.schemes(named_linears(model))
        if not scheme:
            raise InputError("the assignment leaves every linear 16-bit: there is nothing to replace")
    if isinstance(scheme, Mapping):
        if modules is not None:
            raise InputError("the mapping says which linear layers are replaced: leave modules out")
        modules, skip = set(scheme), ()
        schemes = {name: as_scheme(one) for name, one in scheme.items()}
    else:
        uniform = as_scheme(scheme)
        schemes = defaultdict(lambda: uniform)
    if modules is None:
        refuse_experts(model, skip=skip)
        unfuse_experts(model, skip=skip)
        report_subclasses(model, skip)
    else:
        _unfuse_owners(model, modules)
    wanted = {
        name: module
        for name, module in named_linears(model, skip=skip).items()
        if not isinstance(module, QuantLinear)
    }
    if modules is not None:
        unknown = sorted(set(modules) - set(wanted))
        if unknown:
            raise InputError(
                f"not linear layers that can be replaced: {', '.join(unknown)}; "
                f"allowed are {', '.join(wanted)}"
            )
        wanted = {name: module for name, module in wanted.items() if name in modules}
    if not wanted:
        raise InputError(
            f"no linear layer to replace in {type(model).__name__}: skip={tuple(skip)!r} leaves none; "
            "pass a model with nn.Linear or Conv1D layers, or skip fewer"
        )
    replaced = exchange(
        model, wanted, lambda name, module: kind.from_linear(module, schemes[name], **quantize)
    )
    if hasattr(type(model), "save_pretrained") and bound_save(model) in (None, save_pretrained):
        bind_save(model, _save_unless_quantized)
    return replaced


def _save_unless_quantized(self: Any, *arguments: Any, **options: Any) -> None:
    has_codes = any(isinstance(module, QuantModule) for module in self.modules())
    if getattr(self, "_hf_peft_config_loaded", False) or not has_codes:
        write = save_pretrained if renames_experts(self) else type(self).save_pretrained
        write(self, *arguments, **options)
        return
    raise UnsupportedError(
        f"save_pretrained of {type(self).__name__} would write buffers of QuantLinear, which nothing reads: "
        "write a checkpoint with qkern.save(model, folder)"
    )


def exchange(
    model: nn.Module, wanted: dict[str, Wanted], make: Callable[[str, Wanted], nn.Module]
) -> list[str]:
    """Put another module in the place of some, under all names that each has.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    wanted : dict of str to nn.Module
        Modules of the model by name; emptied on the way, so that each old one can go before the next is made.
    make : callable
        Makes the new one from name and module.

    Returns
    -------
    list of str
        The names.

    Raises
    ------
    InputError
        If the model is itself one of them.
    InputError, UnsupportedError
        What `make` raised, naming the weight; modules before it are replaced already.
    """
    if "" in wanted:
        raise InputError("the model is itself a linear layer: use from_linear of the layer's class instead")
    where = places(model)
    replaced = []
    try:
        for name in list(wanted):
            # Popped, so that the old layer goes at once: the peak is the model and one layer, not two models.
            module = wanted.pop(name)
            with naming_weight(name):
                made = make(name, module)
            for parent, attribute in where[id(module)]:
                setattr(parent, attribute, made)
            replaced.append(name)
    finally:
        _leave_fused_paths(model)
    return replaced


@contextmanager
def naming_weight(name: str) -> Iterator[None]:
    """Put the weight of the layer `name` into errors that are raised inside the block."""
    try:
        yield
    except (InputError, UnsupportedError) as error:
        raise type(error)(f"{name}.weight: {error}") from error


def _leave_fused_paths(model: nn.Module) -> None:
    """Make torch's encoders call their layers one by one: their fused kernels take dense weights."""
    for module in model.modules():
        if not any(isinstance(part, QuantLinear | FakeQuantLinear) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # as for an activation that the fused kernel does not have
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _unfuse_owners(model: nn.Module, names: Collection[str]) -> None:
    """Unfuse the experts that some of `names` lie in, and no others."""
    owners = {parameter.rpartition(".")[0] for parameter in expert_parameters(model)}
    untouched = [owner for owner in owners if not any(name.startswith(f"{owner}.") for name in names)]
    unfuse_experts(model, skip=untouched)


def report_subclasses(model: nn.Module, skip: Sequence[str]) -> None:
    """Warn of subclasses of nn.Linear, which `named_linears` leaves out."""
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not lies_in(name, skip)
    ]
    if left:
        logger.warning(
            "left unquantized, as subclasses of nn.Linear may compute something else: %s", ", ".join(left)
        )


@contextmanager
def compute_mode(model: nn.Module, compute: str | None) -> Iterator[None]:
    """Make every quantized layer of `model` use one kind of arithmetic inside the block.

    Parameters
    ----------
    model : nn.Module
        A model with `QuantLinear` or `QuantEmbedding` modules, or with none.
    compute : str or None
        ``"auto"``, ``"float"`` or ``"int8"``; None: int8 activations where the scheme says a8, float in all
        others.

    Raises
    ------
    InputError
        On another name.
    """
    if compute is not None and compute not in COMPUTE:
        raise InputError(f"unknown compute: got {compute!r}, allowed are {', '.join(COMPUTE)}")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    before = [layer.compute for layer in layers]
    for layer in layers:
        layer.compute = compute or ("float" if layer.scheme.act_bits is None else "int8")
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.compute = value
