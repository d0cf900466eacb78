"""What transformers does to the tensors of a file on their way into a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from zipfile import is_zipfile

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from qkern.checkpoints import open_safetensors
from qkern.errors import FormatError
from qkern.nn.naming import linear_renamings, stacks_experts

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

__all__ = ["WEIGHT", "LayerConverter", "linear_experts", "source_of", "stored_names"]

WEIGHT: Final = "weight"


def source_of(model: Any) -> str:
    """Say where the tensors of a model come from."""
    # transformers keeps the name as text.
    return "the state_dict" if model.name_or_path in ("", "None") else str(model.name_or_path)


def stored_names(files: list[str] | None) -> set[str]:
    """Names of the tensors in the files of a checkpoint; of a state_dict nothing is known."""
    return {name for file in files or () for name in _names_in(file)}


def _names_in(file: str) -> Collection[str]:
    if file.endswith(".safetensors"):
        return list(open_safetensors(Path(file)).keys())
    # Files of old versions of torch cannot be mapped. What cannot be read is refused by transformers.
    tensors = torch.load(file, map_location="meta", mmap=is_zipfile(file), weights_only=True)
    return cast("dict[str, Tensor]", tensors).keys()


def linear_experts(conversions: list[Any]) -> list[Any]:
    """Return transformers' conversions for a model whose experts are linears: renamed, and not stacked."""
    kept = [entry for entry in conversions if not stacks_experts(entry)]
    return [*kept, *linear_renamings(conversions)]


class LayerConverter(WeightConverter):  # type: ignore[misc]
    """Gathers the stored tensors of each weight, plain or quantized.

    Parameters
    ----------
    parts : collection of str
        Last parts of the names of a quantized layer's tensors.
    """

    dtype: torch.dtype | None = None
    """Dtype of a plain weight in the model."""

    def __init__(self, parts: Collection[str]) -> None:
        patterns = [_pattern(part) for part in sorted({*parts, WEIGHT})]
        super().__init__(patterns, rf"\.{WEIGHT}", operations=[_Nothing()])

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Tensor]:
        """Give a plain weight back by its name, and a quantized one to the quantizer.

        Raises
        ------
        FormatError
            If tensors of a quantized layer are missing, left over or contradict each other.
        """
        found = {_part(pattern): tensors for pattern, tensors in self.materialize_tensors().items()}
        sources = sorted(self.layer_targets[layer_name])
        if len(sources) != len(found):
            raise FormatError(
                f"{source_of(model)}: {', '.join(sources)} are the same tensors of {layer_name}"
            )
        parts = {part: tensors[0] for part, tensors in found.items()}
        if parts.keys() == {WEIGHT} and parts[WEIGHT].is_floating_point():
            return {layer_name: parts[WEIGHT].to(self.dtype)}
        stored = sources[0].rpartition(".")[0]
        layer = layer_name.removesuffix(f".{WEIGHT}")
        hf_quantizer.load_layer(model, layer, stored, parts, loading_info.missing_keys)
        return {}


def _pattern(part: str) -> str:
    return rf"\.{part}$"


def _part(pattern: str) -> str:
    return pattern[2:-1]


class _Nothing(ConversionOps):  # type: ignore[misc]
    """Stands where transformers wants an operation; its errors would become a line of a report."""

    def convert(self, input_dict: dict[str, Any], *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
