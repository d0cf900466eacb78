"""PEFT's LoRA over `QuantLinear`: QLoRA on quantized checkpoints, and merging back into them.

Importing this module is all that it takes: ``get_peft_model``, ``PeftModel.from_pretrained`` and
``add_adapter`` then put adapters on a model of `qkern.load` as on any other.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from qkern.errors import InputError, UnsupportedError
from qkern.nn import QuantEmbedding, QuantLinear, quant_linears, stored_name
from qkern.nn.state import QuantModule
from qkern.pipelines.load import config_dtype, unmark_quantized
from qkern.quantizers import requantize
from qkern.schemes import FLOAT_DTYPES

try:
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, PeftType
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import (
        BaseTunerLayer,
        _ExcludedModule,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )

    from qkern.integrations.peft_experts import has_linear_experts, refuse_stacks
except ImportError as error:
    raise ImportError(f"adapters need PEFT 0.21 or later: pip install 'peft>=0.21' ({error})") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["LoraQuantLinear", "MergeReport", "MergedLayer", "QuantLoraModel", "merge"]

logger = logging.getLogger(__name__)

# All others ask the base for its dense weight, and most change it, which codes cannot follow.
INITIALIZATIONS = (True, False, "gaussian")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayer:
    """What merging did to a linear.

    Parameters
    ----------
    scheme : str
        The scheme that it was rounded to; ``"float32"``, say, if it was left dense.
    update : float
        ``|dW|^2 / |W + dW|^2``: how much the adapters change the weight.
    error : float
        ``|Q - W - dW|^2 / |W + dW|^2``: how much rounding changes the sum; on a grid at most `update`, and
        as much where all of it was rounded away.
    """

    scheme: str
    update: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Result of `merge`.

    Parameters
    ----------
    model : PreTrainedModel
        The base model with the adapters in its weights.
    layers : mapping of str to MergedLayer
        Every quantized linear that had an adapter.
    """

    model: Any = field(repr=False)
    layers: Mapping[str, MergedLayer]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model as JSON values, for the recipe of `qkern.save`."""
        return {name: asdict(layer) for name, layer in self.layers.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Merge:
    """What a layer keeps while adapters are merged into it: its base, to which unmerging returns."""

    base: QuantLinear
    facts: MergedLayer


class LoraQuantLinear(Linear):  # type: ignore[misc]
    """LoRA, rsLoRA or DoRA over a `QuantLinear`; PEFT makes it.

    Merging adds the adapters to the decoded weight and rounds the sum, see `qkern.quantizers.requantize`;
    several adapters are added before it is rounded once. Unmerging returns to the base bit for bit.

    Parameters
    ----------
    base_layer : QuantLinear
        Stays as it is: only adapters are trained.
    adapter_name : str
        Name of the first adapter.
    config : LoraConfig
        Its settings.
    **kwargs
        Further arguments of PEFT's layers.

    Attributes
    ----------
    merge_dtype : torch.dtype or None
        Merging leaves a dense layer of this dtype; None: it rounds to the scheme of the base.
    merge_report : dict of str to MergedLayer, or None
        Where merging notes what it did, by the name of the layer.
    """

    base_layer: Any
    merged_adapters: list[str]
    merge_dtype: torch.dtype | None = None
    merge_report: dict[str, MergedLayer] | None = None
    _merge: _Merge | None = None

    def __init__(self, base_layer: QuantLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        # A quantized Conv1D holds [N, K] as all others do.
        config = copy.copy(config)
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def unmerged(self) -> QuantLinear:
        """The base without what is merged."""
        base: QuantLinear = self.base_layer if self._merge is None else self._merge.base
        return base

    @property
    def merged_facts(self) -> MergedLayer | None:
        """What the last merge did; None while nothing is merged."""
        return None if self._merge is None else self._merge.facts

    # What PEFT asks of a layer ---------------------------------------------------------------------------

    def _get_in_out_features(self, module: QuantLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # No dtype: adapters keep the one that they are made with, fp32.
        return next(chain(base_layer.buffers(), base_layer.parameters())).device, None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Kinds of adapters by the options that ask for them."""
        return {(): None, ("use_dora",): _Dora}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        """Return the kind of adapter that a config asks for; None for LoRA.

        Raises
        ------
        UnsupportedError
            On an initialization or a variant that is not supported over codes.
        """
        if config.init_lora_weights not in INITIALIZATIONS:
            raise UnsupportedError(
                f"init_lora_weights={config.init_lora_weights!r} is not supported over QuantLinear: allowed "
                f"are {', '.join(map(repr, INITIALIZATIONS))}"
            )
        try:
            if config.use_qalora:
                raise ValueError("use_qalora")
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise UnsupportedError(
                f"not supported over QuantLinear: {error}; LoRA, rsLoRA (use_rslora) and DoRA (use_dora) are"
            ) from error

    # Dense for a moment ----------------------------------------------------------------------------------

    def dense(self) -> Linear:
        """Return this layer over a decoded copy of its base, in fp32 and unmerged; adapters are shared."""
        twin = Linear.__new__(Linear)
        twin.__dict__ |= self.__dict__ | {
            "_modules": self._modules | {"base_layer": self.unmerged.to_linear()},
            "merged_adapters": [],
            "_caches": {},
        }
        return twin

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the weight of the base, and round it.

        Parameters
        ----------
        safe_merge : bool
            PEFT checks the sum for NaN. Without it rounding does.
        adapter_names : sequence of str, optional
            Default: those that are active.

        Raises
        ------
        InputError
            If the sum has NaN or Inf, or a scale overflows its dtype; nothing is merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        dense = self.dense()
        dense.merge(safe_merge=safe_merge, adapter_names=names)
        merged, facts = self._rounded(dense.base_layer)
        self._merge = _Merge(base=self.unmerged, facts=facts)
        self.base_layer, self.merged_adapters = merged, names
        name = self.kwargs["target_name"]
        if self.merge_report is not None:
            self.merge_report[name] = facts
        logger.info(
            "merged %s into %s as %s: update %.3g, error %.3g",
            ", ".join(names),
            name,
            facts.scheme,
            facts.update,
            facts.error,
        )

    def _rounded(self, total: nn.Linear) -> tuple[nn.Module, MergedLayer]:
        """Return what takes the place of the base, whose weight plus adapters is that of `total`."""
        base, weight = self.unmerged, total.weight.detach()
        merged: nn.Module
        if self.merge_dtype is None:
            merged = base.with_weight(requantize(weight, base.quantized()), total.bias)
            scheme, values = str(base.scheme), merged.dequantize()
        else:
            merged = total.to(self.merge_dtype)
            scheme, values = str(self.merge_dtype).removeprefix("torch."), merged.weight.float()
        facts = MergedLayer(
            scheme=scheme,
            update=_relative(weight - base.dequantize(), weight),
            error=_relative(values - weight, weight),
        )
        return merged, facts

    def unmerge(self) -> None:
        """Take all merged adapters out again: the base is what it was, bit for bit."""
        if self._merge is None:
            super().unmerge()  # which warns
            return
        self.base_layer = self.unmerged
        self.merged_adapters, self._merge = [], None

    # While something is merged, the base is no child, as a model would store and count it then.

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's, of the unmerged base too."""
        if self._merge is not None:
            self._merge.base.train(mode)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraQuantLinear:
        if self._merge is not None:
            self._merge.base._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


class _Dora(DoraLinearVariant):  # type: ignore[misc]
    """DoRA, whose norms are those of the decoded weight plus the adapter."""

    @staticmethod
    def init(module: LoraQuantLinear, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(module.dense(), adapter_name, **kwargs)

    @staticmethod
    def forward(
        module: LoraQuantLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        # PEFT's own multiplies by the decoded weight, which then lives until the backward pass.
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        magnitude, base = module.lora_magnitude_vector[active_adapter], module.base_layer
        with torch.no_grad():
            norm = magnitude.get_weight_norm(base.dequantize(), B.weight @ A.weight, scaling)
        factor = magnitude.weight / norm
        dropped = dropout(x)
        product = result if dropped is x else base(dropped)
        if base.bias is not None:
            product = product - base.bias
        out: Tensor = result + (factor - 1) * product + factor * B(A(dropped)) * scaling
        return out


class QuantLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's tuner for LoRA, which knows `QuantLinear` too, and experts that are linears."""

    _names_of: str = ""
    """``model_type`` of a model whose experts are linears."""

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if has_linear_experts(model):
            refuse_stacks(peft_config.target_parameters, model)
            self._names_of = getattr(getattr(model, "config", None), "model_type", "")
        _refuse_to_train(peft_config, model)
        peft_config._register_custom_module({QuantLinear: LoraQuantLinear})
        if str(peft_config.target_modules).lower() == "all-linear":
            # PEFT's own search, which knows dense layers, leaves names in the place of the word.
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _quantized_targets(model)

    def _check_target_module_exists(self, peft_config: LoraConfig, key: str) -> Any:
        # Targets may have the names of checkpoints too, such as w1, which those of older adapters have.
        found = super()._check_target_module_exists(peft_config, key)
        stored = stored_name(self._names_of, key)
        if stored == key or isinstance(found, _ExcludedModule):
            return found
        other = super()._check_target_module_exists(peft_config, stored)
        return other if isinstance(other, _ExcludedModule) else found or other

    def _check_merge_allowed(self) -> None:
        # PEFT refuses what transformers calls gptq, as the kernels that it knows cannot merge.
        model: Any = self.model
        method = model.__dict__.pop("quantization_method", None) if quant_linears(model) else None
        try:
            super()._check_merge_allowed()
        finally:
            if method is not None:
                model.quantization_method = method

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, LoraQuantLinear):
            # The adapter is on the base's device already; PEFT would look for that of a weight.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


def _refuse_to_train(config: LoraConfig, model: nn.Module) -> None:
    keys = tuple(config.modules_to_save or ())
    named = [
        name
        for name, module in model.named_modules()
        if name.endswith(keys) and any(isinstance(part, QuantModule) for part in module.modules())
    ]
    if named:
        raise UnsupportedError(
            "modules_to_save names quantized layers, or modules that hold some, and codes cannot be trained: "
            f"{', '.join(named)}; name linears in target_modules, or keep them 16-bit (skip=) when quantizing"
        )


def _quantized_targets(model: Any) -> set[str]:
    """Names of the quantized linears but the head, and those that are inside an adapter layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for name, module in quant_linears(model).items()
        if module is not head and not name.endswith(".base_layer")
    }


def merge(
    model: PeftModel,
    *,
    adapter_names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Merge adapters into a quantized model and take the adapter layers out, in place.

    Parameters
    ----------
    model : PeftModel
        Over a transformers model with `QuantLinear`; it is used up.
    adapter_names : sequence of str, optional
        Default: those that are active. What is merged already is taken out first.
    dtype : torch.dtype, optional
        fp32, fp16 or bf16: decode every quantized linear and leave the whole model in this dtype, which
        loses less than rounding to nearest if the result is then given to `qkern.quantize` with GPTQ.
        None: round to the schemes that the linears have.

    Returns
    -------
    MergeReport
        With the model, for `qkern.save` or `qkern.quantize`. Its parameters are in the dtype of its config,
        which ``prepare_model_for_kbit_training`` may have left.

    Raises
    ------
    InputError
        If `model` is no PeftModel with LoRA or has no such adapter, or an adapter has NaN or Inf; nothing is
        touched then. Also if a scale overflows its dtype; layers before it are merged already.
    ValueError
        Of PEFT's, if a sum of base and adapters overflows; layers before it are merged already.
    UnsupportedError
        If `dtype` is given for a model with a quantized embedding.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, QuantLoraModel):
        raise InputError(
            f"merge takes a PeftModel with LoRA adapters: got {type(model).__name__}; make one with "
            "get_peft_model or PeftModel.from_pretrained, after importing qkern.integrations.peft"
        )
    unknown = sorted(set(adapter_names or ()) - set(model.peft_config))
    if unknown:
        raise InputError(f"no adapters {', '.join(unknown)}: allowed are {', '.join(model.peft_config)}")
    base = model.base_model.model
    if not any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            "this model has no adapter layers left: merge takes them out of the model that it is given; load "
            "the base and the adapter again to merge them otherwise"
        )
    if dtype not in (None, *FLOAT_DTYPES):
        raise InputError(f"dtype must be fp32, fp16, bf16 or None: got {dtype!r}")
    if dtype is not None and any(isinstance(module, QuantEmbedding) for module in base.modules()):
        raise UnsupportedError(
            "a quantized embedding is not decoded by merge: leave dtype out, or put the adapter on a model "
            "whose embedding is 16-bit"
        )
    _refuse_nonfinite(base, adapter_names or model.active_adapters)
    layers: dict[str, MergedLayer] = {}
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            layer.unmerge()
    _tell_layers(base, dtype, layers)
    # No layer is held here, so that each goes, with its old base, once it is merged.
    del layer
    try:
        merged: Any = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    finally:
        _tell_layers(base, None, None)
    if dtype is not None:
        for name, linear in quant_linears(merged).items():
            merged.set_submodule(name, linear.to_linear(dtype))
        merged.config.dtype = dtype
        unmark_quantized(merged)
    kept = config_dtype(merged.config)
    for parameter in merged.parameters():
        # Not merged.to(dtype), which would round the rotary frequencies.
        if kept is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(kept)
    _warn_of_lost_updates(layers)
    return MergeReport(model=merged, layers=layers)


def _refuse_nonfinite(model: nn.Module, adapters: Sequence[str]) -> None:
    for name, parameter in model.named_parameters():
        layer, _, part = name.partition(".lora_")
        adapter = part.partition(".")[2].partition(".")[0]  # of A.default.weight, say
        if adapter in adapters and not parameter.isfinite().all():
            raise InputError(
                f"{layer}: the adapter {adapter} has NaN or Inf values in lora_{part}, with which every "
                "output would be NaN: take a checkpoint from before; nothing was merged"
            )


def _tell_layers(model: nn.Module, dtype: torch.dtype | None, report: dict[str, MergedLayer] | None) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraQuantLinear):
            layer.merge_dtype, layer.merge_report = dtype, report


def _warn_of_lost_updates(layers: Mapping[str, MergedLayer]) -> None:
    lost = [name for name, facts in layers.items() if facts.error > facts.update / 2]
    if lost:
        logger.warning(
            "rounding took back more than half of what the adapters changed in %d of %d linears (%s%s): "
            "merge with dtype=torch.bfloat16 and quantize the result with GPTQ, or keep the adapter beside "
            "the model",
            len(lost),
            len(layers),
            ", ".join(lost[:4]),
            ", ..." if len(lost) > 4 else "",
        )


def _relative(change: Tensor, weight: Tensor) -> float:
    tiny = torch.finfo(torch.float32).tiny
    return float(change.square().sum() / weight.square().sum().clamp(min=tiny))


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantLoraModel
