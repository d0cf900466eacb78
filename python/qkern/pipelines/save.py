"""From a model with `QuantLinear` modules to a checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints import (
    CheckpointWriter,
    bitsandbytes_details,
    check_output,
    format_named,
    refusals,
)
from qkern.errors import InputError, UnsupportedError
from qkern.nn import (
    OutlierLinear,
    QuantEmbedding,
    QuantLinear,
    as_linears,
    expert_parts,
    named_linears,
    quant_linears,
    stored_name,
)
from qkern.pipelines.checks import default_format, refuse_adapters, refuse_training, strangers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from qkern.checkpoints.base import Format

__all__ = ["StoredLayers", "choose_format", "plain_tensors", "save"]

BITSANDBYTES: Final = "bitsandbytes"


def save(
    model: Any,
    path: str | Path,
    *,
    format: str | None = None,
    tokenizer: Any | None = None,
    max_shard_size: int | str = "5GB",
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Write a transformers model to a folder that `load`, and runtimes that know the format, read.

    Parameters
    ----------
    model : PreTrainedModel
        Its `QuantLinear` modules are written in `format`, everything else as it is.
    path : str or Path
        Must not exist, or be an empty folder, and not lie in the folder that the model was loaded from.
    format : str or None
        ``gptq``, ``gptq_v2``, ``awq``, ``compressed-tensors`` or ``bitsandbytes``; None: the first that
        `quantize` would take for the scheme; for mixtures and assignments compressed-tensors, or gptq_v2
        where only that holds the layers; for `OutlierLinear` bitsandbytes, which alone does. A model without
        quantized layers is written as 16-bit.
    tokenizer : tokenizer, str, Path or None
        Saved beside the model; a folder or hub id is copied from.
    max_shard_size : int or str
        Bytes, or a size such as ``"5GB"``.
    recipe : mapping or None
        Goes into ``qkern.json``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If the folder is not empty, the model has adapters or is none of transformers, or an argument is not
        understood.
    UnsupportedError
        If the format cannot hold a layer; the message says why and nothing is written.
    QkernError
        If the disk is full; nothing is left behind.
    """
    if not hasattr(model, "config"):
        raise InputError(
            f"a model that is written to a folder is one of transformers: got {type(model).__name__}; of "
            "other modules save the state_dict()"
        )
    check_output(path, source=getattr(model, "name_or_path", None))
    stored = StoredLayers.of(model, format)
    fmt = stored.format
    with CheckpointWriter(
        path,
        format=None if fmt is None else fmt.name,
        max_shard_size=max_shard_size,
        naming=partial(stored_name, str(model.config.model_type)),
    ) as writer:
        for name, layer in stored.layers.items():
            writer.add_quantized(name, layer.quantized(), layer.bias)
        dtype = None
        # Beside quantized layers runtimes expect each expert by itself.
        parts = {} if fmt is None else expert_parts(model)
        for name, tensor in plain_tensors(model):
            for own, value in as_linears(name, tensor, parts).items():
                writer.add_tensor(own, value)
            if dtype is None and tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")  # runtimes load everything in one dtype
        if getattr(model, "generation_config", None) is not None:
            writer.add_json("generation_config.json", json.loads(model.generation_config.to_json_string()))
        config = {**model.config.to_dict(), "dtype": dtype}
        config["architectures"] = config.get("architectures") or [type(model).__name__]
        return writer.finish(
            config, recipe, tokenizer_from=tokenizer, skipped=stored.skipped, details=stored.details(dtype)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayers:
    """What of a model is stored as codes, and how.

    Parameters
    ----------
    layers : dict of str to QuantLinear
        By name in the model.
    skipped : list of str
        Modules with a matrix of weights that stay 16-bit, as runtimes must know them.
    format : Format or None
        None: there are no layers.
    threshold : float or None
        See `OutlierLinear`.
    """

    layers: dict[str, QuantLinear]
    skipped: list[str]
    format: Format | None
    threshold: float | None

    @classmethod
    def of(cls, model: Any, format: str | None) -> StoredLayers:
        """Choose how a model is stored; `format` as in `save`.

        Raises
        ------
        InputError
            If the model has adapters, or a format is named and there are no layers.
        UnsupportedError
            If the format cannot hold a layer, or no format holds a module of the model.
        """
        refuse_adapters(model)
        refuse_training(model)
        _refuse_embeddings(model)
        layers = quant_linears(model)
        skipped = _skipped(model, layers)
        threshold = _threshold(layers, format)
        report = getattr(model, "qkern_report", None)
        fmt = choose_format(
            layers,
            skipped,
            format if threshold is None else BITSANDBYTES,
            is_assigned=report is not None and "assignment" in report.recipe["arguments"],
        )
        return cls(layers=layers, skipped=skipped, format=fmt, threshold=threshold)

    def details(self, dtype: str | None) -> dict[str, Any]:
        """Fields of the description that the weights do not tell; `dtype` is the name of the model's."""
        if self.format is None or self.format.name != BITSANDBYTES:
            return {}
        return bitsandbytes_details(dtype, self.threshold)

    def description(self, model: Any, *, act_order: bool, details: Mapping[str, Any]) -> dict[str, Any]:
        """``quantization_config`` as `CheckpointWriter` writes it, under the names of a checkpoint.

        Parameters
        ----------
        model : PreTrainedModel
            What the layers are of.
        act_order : bool
            Whether any of them has a group index.
        details : mapping
            Further fields.
        """
        assert self.format is not None
        naming = partial(stored_name, str(model.config.model_type))
        return self.format.config(
            {naming(name): layer.scheme for name, layer in self.layers.items()},
            act_order=act_order,
            static={naming(name) for name, layer in self.layers.items() if layer.input_scale is not None},
            skipped=[naming(name) for name in self.skipped],
            details={**details, **self.details(str(model.dtype).removeprefix("torch."))},
        )


def _skipped(model: Any, layers: Mapping[str, QuantLinear]) -> list[str]:
    parts = expert_parts(model)
    # Fused experts are stored as linears.
    fused = {parameter.rpartition(".")[0] for parameter in parts}
    experts = [weight.removesuffix(".weight") for weights in parts.values() for weight in weights]
    names = dict.fromkeys([*named_linears(model), *experts, *strangers(model)])
    return [name for name in names if name not in layers and name not in fused]


def _refuse_embeddings(model: Any) -> None:
    embeddings = [name for name, module in model.named_modules() if isinstance(module, QuantEmbedding)]
    if embeddings:
        raise UnsupportedError(
            f"no checkpoint format holds quantized embeddings: got {', '.join(embeddings)}; "
            "keep them 16-bit, or export to GGUF"
        )


def _threshold(layers: Mapping[str, QuantLinear], format: str | None) -> float | None:
    """From which magnitude on activations are outliers in all of the layers; None: in none."""
    found = {layer.threshold if isinstance(layer, OutlierLinear) else None for layer in layers.values()}
    if len(found) > 1:
        thresholds = ", ".join(sorted(str(value) for value in found))
        raise UnsupportedError(
            f"no checkpoint format holds several thresholds of outliers: got {thresholds}; give every "
            "OutlierLinear the same, and have no other quantized layers"
        )
    threshold = next(iter(found), None)
    if threshold is not None and format not in (None, BITSANDBYTES):
        raise UnsupportedError(
            f"{format} says nothing of outliers, which OutlierLinear leaves unquantized: use {BITSANDBYTES}"
        )
    return threshold


def choose_format(
    layers: Mapping[str, QuantLinear], skipped: Sequence[str], name: str | None, *, is_assigned: bool = False
) -> Format | None:
    """Return the named format, or the first that holds the layers beside linears `skipped` that are 16-bit.

    `is_assigned` says that an assignment chose the schemes, see `default_format`.

    Raises
    ------
    InputError
        If a format is named and there are no layers.
    UnsupportedError
        If the format, or every default one, cannot hold them; the message says why.
    """
    if not layers:
        if name is not None:
            raise InputError(
                f"format {name!r} needs quantized layers, and the model has none; quantize it first"
            )
        return None
    schemes = {key: layer.scheme for key, layer in layers.items()}
    sizes = {key: (layer.scheme, layer.out_features, layer.in_features) for key, layer in layers.items()}
    # One at a time: unpacking a packed layer makes a copy.
    act_order = any(layer.quantized().group_index is not None for layer in layers.values())
    candidates: list[str] = [name] if name else ["compressed-tensors", "gptq_v2"]
    codebooks = any(scheme.codebook is not None for scheme in schemes.values())
    if name is None and (codebooks or next(iter(layers.values())).quantized().scales.dtype == torch.float16):
        candidates = [*default_format(set(schemes.values()), is_assigned=is_assigned), *candidates]
    reasons = {}
    for candidate in candidates:
        fmt = format_named(candidate)
        refused = refusals(fmt, sizes, act_order=act_order)
        together = fmt.holds_together(schemes, skipped)
        if not refused and together is None:
            return fmt
        lines = [f"{key}: {reason}" for key, reason in list(refused.items())[:4]]
        reasons[candidate] = "; ".join(lines or [str(together)])
    raise UnsupportedError(
        ". ".join(f"{candidate} does not hold the model: {reason}" for candidate, reason in reasons.items())
    )


def plain_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and persistent buffers outside `QuantLinear` modules; of tied ones the first."""
    seen: set[int] = set()
    for owner, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        stored = {
            **module._parameters,
            **{
                name: buffer
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            },
        }
        for leaf, tensor in stored.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{owner}.{leaf}" if owner else leaf
            if tensor.is_meta:
                raise InputError(f"{name} has no value (meta device): load the weights before saving")
            yield name, tensor.detach()
