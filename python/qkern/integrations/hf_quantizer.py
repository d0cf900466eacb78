"""transformers' quantizers: from a checkpoint or a 16-bit model to `QuantLinear`, while it is loaded.

The linears stay in their places on the meta device until everything is loaded; then a `QuantLinear` takes the
place of each. Names, devices, shards and ties are transformers' work, as for any model; experts are linears
here, not stacks of them, unless all of them stay 16-bit.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from qkern.checkpoints import decode_layer, detect
from qkern.errors import FormatError, InputError, QkernError, UnsupportedError
from qkern.integrations.hf_config import WRITTEN, QkernConfig, StoredConfig
from qkern.integrations.hf_conversion import WEIGHT, LayerConverter, linear_experts, source_of, stored_names
from qkern.models import column_weight, describe, fuse_forwards
from qkern.nn import (
    OutlierLinear,
    QuantLinear,
    expert_parts,
    named_linears,
    quant_linears,
    replace_linears,
    stored_name,
    unfuse_experts,
)
from qkern.nn.linear import is_conv1d
from qkern.nn.naming import bind_save, renames_experts, save_as_stored, stacks_experts
from qkern.nn.naming import save_pretrained as save_named
from qkern.pipelines import quantize
from qkern.pipelines.checks import find_targets, log_kept, target_names
from qkern.pipelines.load import COMPUTED, mark_quantized, model_names, refuse_misfits, refuse_nonfinite
from qkern.pipelines.save import StoredLayers, plain_tensors
from qkern.quantizers import quantize_rtn
from qkern.schemes import FLOAT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, MutableSet

    from transformers.core_model_loading import WeightConverter

    from qkern.pipelines.layerwise import Settings
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["CheckpointQuantizer", "LoadTimeQuantizer", "QkernQuantizer"]

logger = logging.getLogger(__name__)

# What transformers lets a caller say about a checkpoint that has a description, and what of it qkern can do.
_LOADING: Final[dict[str, tuple[Any, ...]]] = {
    "backend": (None, "auto"),
    "use_optimized_inference": (None, False),
}


class QkernQuantizer(HfQuantizer):  # type: ignore[misc]
    """What loading a quantized checkpoint and quantizing on loading share.

    Parameters
    ----------
    quantization_config
        Of the model.
    **kwargs
        transformers' ``pre_quantized``.
    """

    format_name: str | None
    """What ``save_pretrained`` writes; None: the first format that holds the layers."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.linears: dict[str, Any] = {}
        self.conv1d: set[str] = set()
        self.element_sizes: dict[str, float] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.thresholds: dict[str, float | None] = {}
        self.failure: QkernError | None = None
        self.watched = False
        self.stacks = False

    # Before loading ----------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what the modules cannot be: on disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedError(
                "a QuantLinear cannot be offloaded to disk: device_map puts parts of the model there; use "
                'device_map="cpu", a larger max_memory, or fewer bits'
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of everything that is not quantized; refuse one that the kernels do not take."""
        if dtype not in FLOAT_DTYPES:
            raise InputError(
                f"dtype must be one that the kernels compute in: got {dtype}, allowed are "
                f"{', '.join(map(str, FLOAT_DTYPES))}"
            )
        return dtype

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes a weight will take for each of its elements, by which devices are chosen."""
        size = self.element_sizes.get(param_name)
        return cast("float", super().param_element_size(model, param_name, param)) if size is None else size

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "a QuantLinear cannot be split over processes: load without tp_plan and distributed_config"
            )
        tensors = stored_names(checkpoint_files)
        owners = {parameter.rpartition(".")[0] for parameter in expert_parts(model)}
        modules = {owner: model.get_submodule(owner) for owner in owners}
        fused = _fused_in(tensors, model)
        model._weight_conversions = []  # it is whole; transformers sets them when it is loaded
        unfuse_experts(model)
        self.linears = named_linears(model)
        self.conv1d = {name for name, linear in self.linears.items() if is_conv1d(linear)}
        self._prepare(model, tensors)
        self.stacks = not self._takes_experts(model) and _are_stacked(tensors, model, fused)
        for owner in modules if self.stacks else fused:  # else linears once all is loaded
            model.set_submodule(owner, modules[owner])
        self._watch(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return how stored tensors become those of the model, experts stacked only if none is quantized."""
        kept = weight_conversions if self.stacks else linear_experts(weight_conversions)
        return cast("list[Any]", super().update_weight_conversions(kept, model))

    def _takes_experts(self, model: Any) -> bool:
        """Whether a linear of an expert is to be quantized."""
        return any(part in self.element_sizes for parts in expert_parts(model).values() for part in parts)

    @abstractmethod
    def _prepare(self, model: Any, tensors: set[str]) -> None:
        """Get ready for tensors of these names; the model is on the meta device."""

    def _expect(self, layer: str, scheme: Scheme) -> None:
        """Take note of how much memory the linear `layer` will need."""
        N, K = column_weight(self.linears[layer]).shape
        bits = QuantLinear.empty(N, K, scheme, device="meta").stored_bits
        self.element_sizes[f"{layer}.{WEIGHT}"] = bits / 8 / max(N * K, 1)

    def _watch(self, model: Any) -> None:
        """Let the last look that transformers has at what was loaded refuse what does not fit.

        It only reports missing and left-over tensors; the hooks of a quantizer are not told of them.
        """
        adjust = model._adjust_missing_and_unexpected_keys
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

        def refuse(loading_info: Any) -> None:
            del model._adjust_missing_and_unexpected_keys
            self.watched = True
            adjust(loading_info)
            missing, left_over = loading_info.missing_keys, loading_info.unexpected_keys
            mismatched = {str(entry[0]) for entry in loading_info.mismatched_keys}
            # Some versions set whatever arrives where there is a quantizer.
            state = model.state_dict()
            mismatched |= {name for name, shape in shapes.items() if state[name].shape != shape}
            left_over = {
                name for name in left_over if not any(re.search(pattern, name) for pattern in COMPUTED)
            }
            try:
                if self.failure is not None:
                    raise self.failure
                _refuse_stacks(model, missing, left_over)
                refuse_misfits(source_of(model), missing=missing, left_over=left_over, mismatched=mismatched)
            except QkernError:
                # Else transformers would report them too, and raise an error of its own.
                loading_info.missing_keys, loading_info.unexpected_keys = set(), set()
                loading_info.mismatched_keys = set()
                raise
            self._install(model)

        model._adjust_missing_and_unexpected_keys = refuse

    def take(self, layer: str, weight: QuantizedWeight, missing: MutableSet[str]) -> None:
        """Keep the weight of a linear; until all is loaded the linear itself holds its place."""
        self.weights[layer] = weight
        self.linears[layer].weight._is_hf_initialized = True
        missing.discard(f"{layer}.{WEIGHT}")

    def _install(self, model: Any) -> None:
        """Put a `QuantLinear` in the place of every linear whose weight was taken."""
        for layer in list(self.weights):
            linear = self.linears[layer]
            weight, threshold = self.weights.pop(layer), self.thresholds.get(layer)
            made = (
                QuantLinear.from_quantized(weight)
                if threshold is None
                else OutlierLinear.from_quantized(weight, threshold=threshold)
            )
            made.bias = linear.bias
            model.set_submodule(layer, made)
        self.linears.clear()  # those that were replaced would live on here
        if not self.stacks:
            unfuse_experts(model)

    # After loading -----------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.watched:
            raise UnsupportedError(
                f"transformers {transformers.__version__} did not say which tensors were missing: "
                "use qkern.load"
            )
        # What is saved is encoded below, not by running these backwards.
        model._weight_conversions = [
            entry for entry in model._weight_conversions if not isinstance(entry, LayerConverter)
        ]
        save_as_stored(model)  # also if the files had transformers' names: the description has the others
        bind_save(model, save_pretrained)
        model.requires_grad_(False)
        self._finish(model)
        refuse_nonfinite(source_of(model), model)
        if quant_linears(model):
            mark_quantized(model)
        fuse_forwards(model)

    def _finish(self, model: Any) -> None:
        """Do what needs the whole model."""

    def remove_quantization_config(self, model: Any) -> None:
        """Take all that says otherwise from a model that is dense by now."""
        super().remove_quantization_config(model)
        model.is_loaded_in_8bit = False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if not isinstance(dtype, torch.dtype):  # a saved config has its name
            dtype = model.dtype
        for name, layer in quant_linears(model).items():
            model.set_submodule(name, _dense(layer, dtype, conv1d=name in self.conv1d))
        return model

    # What transformers asks --------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: gradients flow through it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Tensors that ``save_pretrained`` writes, whose description goes into the model's config.

        All are made before one is written: beside the model its quantized layers are in memory once more,
        encoded. `qkern.save` holds one of them at a time.

        Raises
        ------
        InputError
            If the model has adapters that transformers does not know of.
        UnsupportedError
            If no format, or not the one that was asked for, holds the layers.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # then adapters alone are saved
            return None, {}
        stored = StoredLayers.of(model, self.format_name if quant_linears(model) else None)
        if stored.format is None:  # what was quantized is dense by now
            self.remove_quantization_config(model)
            return None, {}
        tensors = dict(plain_tensors(model))
        act_order = False
        for name, layer in stored.layers.items():
            weight = layer.quantized().to("cpu")
            tensors |= stored.format.encode(name, weight)
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach()
            act_order |= weight.group_index is not None
        description = stored.description(model, act_order=act_order, details=self._details())
        self.quantization_config = WRITTEN[description["quant_method"]].from_dict(description)
        model.config.quantization_config = self.quantization_config
        return tensors, {}

    def _details(self) -> dict[str, Any]:
        """Fields of the description that formats do not write themselves, such as ``damp_percent``."""
        return {}


def _fused_in(tensors: set[str], model: Any) -> set[str]:
    """Names of modules with experts of which files with these tensors have no linears."""
    if not tensors:
        return set()  # nothing is known of them
    modules = {name.rsplit(".", 2)[0] for name in model_names(tensors, model).values()}
    return {
        parameter.rpartition(".")[0]
        for parameter, parts in expert_parts(model).items()
        if modules.isdisjoint(part.rsplit(".", 2)[0] for part in parts)
    }


def _are_stacked(tensors: set[str], model: Any, fused: Collection[str]) -> bool:
    """Whether transformers itself makes stacks of all the experts but those that are `fused` in the files."""
    linears = {
        part
        for parameter, parts in expert_parts(model).items()
        if parameter.rpartition(".")[0] not in fused
        for part in parts
    }
    known = any(map(stacks_experts, get_model_conversion_mapping(model)))
    return (
        bool(tensors)
        and (known or not linears)
        and all(stored_name(model.config.model_type, part) in tensors for part in linears)
    )


def _refuse_stacks(model: Any, missing: Collection[str], left_over: Collection[str]) -> None:
    """Refuse experts that turn out to be fused; a state_dict says so too late."""
    stacks = [
        name
        for name, parts in expert_parts(model).items()
        if name in left_over and any(part in missing for part in parts)
    ]
    if stacks:
        raise UnsupportedError(
            f"{source_of(model)}: {', '.join(stacks[:4])}{', ...' if len(stacks) > 4 else ''} are stacks of "
            "experts, which are read from files only, each layer's all stacks or all linears: write the "
            "tensors to a folder and load that, or give a tensor for each expert"
        )


def save_pretrained(self: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
    """Write a model as transformers does, but leave no folder behind where `QkernQuantizer` refuses it."""
    folder = Path(save_directory)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    write = save_named if renames_experts(self) else type(self).save_pretrained
    try:
        write(self, save_directory, *arguments, **options)
    except QkernError:
        with suppress(OSError):  # of one that is not there or not empty, which is no news beside the refusal
            for path in made:
                path.rmdir()
        raise


def _dense(layer: QuantLinear, dtype: torch.dtype, *, conv1d: bool) -> nn.Module:
    """Linear, or transformers' Conv1D, with the weights that a `QuantLinear` stands for."""
    linear = layer.to_linear(dtype).requires_grad_(True)
    if not conv1d:
        return linear
    made: nn.Module = transformers.pytorch_utils.Conv1D(layer.out_features, layer.in_features)
    made.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    made.bias = nn.Parameter(made.bias.detach().to(linear.weight)) if linear.bias is None else linear.bias
    return made.train(layer.training)


class CheckpointQuantizer(QkernQuantizer):
    """Loads the layers of a checkpoint in one of `qkern.checkpoints.FORMATS`."""

    def __init__(self, quantization_config: StoredConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        detected = detect({"quantization_config": quantization_config.to_dict()})
        assert detected is not None
        self.format, self.description = detected
        self.format_name = self.format.name
        for name, allowed in _LOADING.items():
            asked = getattr(quantization_config, name, None)
            if asked not in (*allowed, self.description.get(name)):
                raise InputError(
                    f"{name}={asked!r} is about other kernels than qkern's: leave it out, or call "
                    "qkern.disable() to load with transformers' own"
                )

    def _prepare(self, model: Any, tensors: set[str]) -> None:
        suffix = f".{self.format.marker}"
        layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
        if tensors and not layers:
            raise FormatError(
                f"{source_of(model)}: config.json says {self.format.name}, but no tensor name ends in "
                f"{suffix}; remove quantization_config if the weights are 16-bit, else correct it"
            )
        self.entry_of = self._reading(model, self.format.entry_of, self.description)
        for stored, layer in model_names(layers, model).items():
            linear = self.linears.get(layer)
            if linear is None:
                continue  # named when it turns out to be left over
            self._expect(layer, self._reading(model, self.entry_of, stored).scheme)
            if f"{stored}.bias" in tensors and linear.bias is None:  # some files have one for every layer
                linear.bias = nn.Parameter(torch.empty(column_weight(linear).shape[0], device="meta"))
            _untie(model, layer)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return how stored tensors become layers."""
        return [LayerConverter(self.format.parts)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Cast nothing on reading that may be a part of a layer."""
        if isinstance(converter, LayerConverter):
            converter.dtype = dtype
            return None
        return cast("torch.dtype | None", super().get_new_dtype(converter, param, dtype))

    def load_layer(
        self, model: Any, layer: str, stored: str, parts: Mapping[str, Tensor], missing: MutableSet[str]
    ) -> None:
        """Decode and keep the layer that is called `stored` in the file and `layer` in the model."""
        linear = self.linears.get(layer)
        if linear is None:
            refuse_misfits(source_of(model), left_over=[f"{stored}.{part}" for part in parts])
        entry = self._reading(model, self.entry_of, stored)
        if WEIGHT in parts and not entry.in_place:
            raise FormatError(f"{source_of(model)}: {stored} is there both quantized and plain")
        # Copied: what safetensors returns is a view of the file, which may change later.
        tensors = {f"{stored}.{part}": tensor.to("cpu", copy=True) for part, tensor in parts.items()}
        weight = self._reading(model, decode_layer, self.format, stored, tensors, entry)
        if weight.shape != column_weight(linear).shape:
            refuse_misfits(source_of(model), mismatched=[stored])
        self.thresholds[layer] = entry.threshold
        device = next(iter(parts.values())).device
        self.take(layer, weight.to(device), missing)

    @staticmethod
    def _reading(model: Any, read: Any, *arguments: Any) -> Any:
        """Let errors name the model."""
        try:
            return read(*arguments)
        except FormatError as error:
            raise FormatError(f"{source_of(model)}: {error}") from None

    def _finish(self, model: Any) -> None:
        del self.entry_of  # the quantizer lives on in the model, and a closure cannot be pickled
        if getattr(self.quantization_config, "dequantize", False):
            self._dequantize(model).requires_grad_(True)

    def _details(self) -> dict[str, Any]:
        # dynamic names layers, and is written anew.
        return {name: value for name, value in self.description.items() if name != "dynamic"}


def _untie(model: Any, layer: str) -> None:
    """Let a quantized head have a weight of its own, whatever the config ties it to."""
    if model.all_tied_weights_keys.pop(f"{layer}.{WEIGHT}", None) is not None:
        model.config.tie_word_embeddings = False


class LoadTimeQuantizer(QkernQuantizer):
    """Quantizes the linears of a 16-bit model, by `QkernConfig`."""

    def __init__(self, quantization_config: QkernConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise FormatError(
                "config.json holds a QkernConfig, which describes no checkpoint: write the model with "
                "save_pretrained or qkern.save"
            )
        self.format_name = quantization_config.format
        self.settings: Settings = quantization_config.settings()
        self.schemes: dict[str, Scheme] = {}

    def _takes_experts(self, model: Any) -> bool:
        # What a method that reads text takes comes out later.
        return self.settings.reads_text or super()._takes_experts(model)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse parts on disk, and where a method runs the whole model, several devices."""
        super().validate_environment(*args, device_map=device_map, **kwargs)
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if self.settings.reads_text and len(devices) > 1:
            raise UnsupportedError(
                f"method {self.settings.method} quantizes a model on one device: device_map names "
                f"{', '.join(sorted(map(str, devices)))}; load on one, or use qkern.quantize with output="
            )

    def _prepare(self, model: Any, tensors: set[str]) -> None:
        options = self.quantization_config.options
        structure = describe(model)
        # Ties are made after loading.
        tied = f"{structure.head}.{WEIGHT}" in model.all_tied_weights_keys
        named = [options.get(name, ()) for name in ("skip", "include")]
        skip, include = ((names,) if isinstance(names, str) else names for names in named)
        self.settings, targets = find_targets(
            model, replace(structure, tied=tied), self.settings, options.get("assignment"), skip, include
        )
        if self.settings.reads_text:
            return  # the whole model is needed first
        names = target_names(structure, targets)
        for layer in names:
            scheme = self.settings.scheme_of(layer)
            self.schemes[f"{layer}.{WEIGHT}"] = scheme
            self._expect(layer, scheme)
        log_kept(model, names, targets)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight is rounded when it is read."""
        return param_name in self.schemes

    def get_quantize_ops(self) -> ConversionOps:
        """Return what rounds a weight."""
        return _Rounding(self)

    def _finish(self, model: Any) -> None:
        config = self.quantization_config
        if self.settings.reads_text:
            _graft(model, quantize(model, method=config.method, scheme=config.scheme, **config.options))
        # A weight that is cut out of a larger one, as those of experts that the files have fused, was not
        # offered, or may not have been.
        rest = {
            name: self.schemes[f"{name}.{WEIGHT}"]
            for name, linear in named_linears(model).items()
            if not isinstance(linear, QuantLinear) and f"{name}.{WEIGHT}" in self.schemes
        }
        if rest:
            search: Any = self.settings.search
            replace_linears(model, rest, search=search)
        for layer in quant_linears(model).values():
            layer.compute = config.compute


class _Rounding(ConversionOps):  # type: ignore[misc]
    """Rounds weights to nearest and gives them to the quantizer."""

    def __init__(self, quantizer: LoadTimeQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *arguments: Any, missing_keys: Any, **kwargs: Any
    ) -> dict[str, Any]:
        rest = {}
        for name, value in input_dict.items():
            scheme = self.quantizer.schemes.get(name)
            if scheme is None:
                rest[name] = value
                continue
            tensor = value[0] if isinstance(value, list) else value
            layer = name.removesuffix(f".{WEIGHT}")
            try:
                self._round(layer, tensor, scheme, missing_keys)
            except QkernError as error:
                # Kept: transformers would make of it a line of a report.
                self.quantizer.failure = self.quantizer.failure or type(error)(f"{name}: {error}")
        return rest

    def _round(self, layer: str, tensor: Tensor, scheme: Scheme, missing: MutableSet[str]) -> None:
        expected = self.quantizer.linears[layer].weight.shape
        if tensor.shape != expected:
            raise FormatError(f"the file has {list(tensor.shape)}, and by the config it is {list(expected)}")
        matrix = tensor.t() if layer in self.quantizer.conv1d else tensor
        search: Any = self.quantizer.settings.search
        self.quantizer.take(layer, quantize_rtn(matrix, scheme, search=search), missing)


def _graft(model: Any, quantized: Any) -> None:
    """Give `model` the linears of `quantized`, a copy of it, and everything else that was changed there."""
    for name, layer in quant_linears(quantized).items():
        model.set_submodule(name, layer.to(column_weight(model.get_submodule(name)).device))
    values = dict(quantized.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = values[name].data.to(parameter.device)
    model.qkern_report = quantized.qkern_report
