"""GPTQ and AWQ on the way into a GGUF: each layer is done when the writer comes to its first tensor."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern.calibration import LayerStream
from qkern.errors import InputError, UnsupportedError
from qkern.models import column_weight, describe, set_column_weight
from qkern.ops import gguf_decode, gguf_encode
from qkern.ops.gguf_encode.fields import LAYOUTS
from qkern.pipelines.calibration import calibration_ids
from qkern.pipelines.checks import choose_targets
from qkern.pipelines.layerwise import capture, fold_scales, stages_of
from qkern.pipelines.load import usable_device
from qkern.pipelines.source import open_source
from qkern.quantizers import (
    HessianAccumulator,
    gguf_output_error,
    quantize_gptq_gguf,
    search_gguf_scales,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from qkern.gguf import PlannedTensor
    from qkern.ops.gguf_types import GGUFType

__all__ = ["CalibratedLayers", "check_types"]

logger = logging.getLogger(__name__)


def check_types(method: str, types: Iterable[GGUFType]) -> None:
    """Refuse types of linears that leave a method nothing to choose, or that it does not encode.

    Raises
    ------
    InputError
        If no linear gets a type that has codes.
    UnsupportedError
        If one gets a type that GPTQ does not encode.
    """
    kinds = sorted({type.name for type in types if type.block > 1})
    if not kinds:
        raise InputError(
            f"method {method} chooses codes, and no linear gets any: choose a quantized type (--type), or "
            "use method='rtn'"
        )
    others = [kind for kind in kinds if kind not in LAYOUTS]
    if method == "gptq" and others:
        raise UnsupportedError(
            f"GPTQ encodes {', '.join(LAYOUTS)}, and linears get {', '.join(others)}: choose another type "
            "(--type), or use method='rtn' or 'awq'"
        )


@dataclass(slots=True)
class _Done:
    """What became of one layer, by names in the checkpoint: blocks of linears, other tensors that changed."""

    index: int = -1
    blocks: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class CalibratedLayers:
    """The layers of a model, each through GPTQ or AWQ when its first tensor is asked for.

    One layer is in memory at a time, so tensors must be asked for in the order of the layers, and each once.

    Parameters
    ----------
    model : str or Path
        16-bit folder or hub id.
    method : str
        ``"gptq"`` or ``"awq"``.
    calibration, samples, length, seed, device
        As in `qkern.quantize`.
    errors : dict
        Takes in the squared error of each linear's outputs, relative, as the linears are done; by their
        names in the file.

    Raises
    ------
    InputError
        If the model is quantized already, or the calibration cannot be used.
    UnsupportedError
        If AWQ's scales cannot be folded in this architecture.
    """

    def __init__(
        self,
        model: Any,
        method: str,
        calibration: Any,
        *,
        samples: int,
        length: int,
        seed: int,
        device: str,
        errors: dict[str, float],
    ) -> None:
        target_device = usable_device(device)
        source = open_source(model)
        self.method = method
        self.errors = errors
        self.structure = describe(source.model)
        if method == "awq" and self.structure.architecture is None:
            raise UnsupportedError(
                f"awq folds scales, and qkern has no data for the architecture "
                f"{source.model.config.model_type} to fold them by: use method='gptq'"
            )
        self.names = choose_targets(source.model, self.structure, (), ()).layers
        self.ids = calibration_ids(source, calibration, None, samples, length, seed)
        self.stream = LayerStream(
            source.model,
            self.structure.layers,
            source.weights,
            head=self.structure.head,
            device=target_device,
        )
        self._linears: dict[str, PlannedTensor] = {}
        self._done = _Done()

    def applied_to(
        self, tensors: Sequence[PlannedTensor], to_file: Callable[[str, Tensor], Tensor]
    ) -> list[PlannedTensor]:
        """Return the tensors of an export with the blocks that the method chooses.

        Parameters
        ----------
        tensors : sequence of PlannedTensor
            In the order of the layers.
        to_file : callable
            From a tensor's name in the checkpoint and its value, or its blocks row by row, to the order of
            rows (and the value) that the file has.

        Raises
        ------
        InputError
            If no linear gets a type that has codes.
        UnsupportedError
            If a linear of the layers is no tensor of the file by itself, or has a type that GPTQ does not
            encode.
        """
        planned = {tensor.source: tensor for tensor in tensors}
        linears = {
            f"{self.stream.prefix(index)}{name}.weight"
            for index, names in enumerate(self.names)
            for name in names
        }
        strangers = sorted(linears - planned.keys())
        if strangers:
            raise UnsupportedError(
                f"method {self.method} needs each linear to be a tensor of the file, and {strangers[0]} is "
                "none; use method='rtn'"
            )
        self._linears = {name: planned[name] for name in linears}
        check_types(self.method, (tensor.type for tensor in self._linears.values()))
        head = None if self.structure.tied else f"{self.structure.head}.weight"
        prefix = f"{self.structure.layers}."
        result = []
        for tensor in tensors:
            blocks: Callable[[], Tensor | None] | None = None
            if tensor.source in linears:
                blocks = partial(self._blocks, tensor.source, to_file)
            elif tensor.source.startswith(prefix):
                blocks = partial(self._changed_blocks, tensor, to_file)
            elif tensor.source == head:
                blocks = partial(self._head_blocks, tensor)
            result.append(replace(tensor, blocks=blocks))
        return result

    def _blocks(self, name: str, to_file: Callable[[str, Tensor], Tensor]) -> Tensor:
        return to_file(name, self._layer_of(name).blocks.pop(name))

    def _changed_blocks(
        self, tensor: PlannedTensor, to_file: Callable[[str, Tensor], Tensor]
    ) -> Tensor | None:
        """Encode what folding changed beside the linears; None for what it left alone."""
        changed = self._layer_of(tensor.source).tensors.pop(tensor.source, None)
        if changed is None:
            return None
        rows = to_file(tensor.source, changed).reshape(-1, tensor.shape[-1])
        return gguf_encode(rows, tensor.type.name)

    def _layer_of(self, name: str) -> _Done:
        index = int(name.removeprefix(f"{self.structure.layers}.").partition(".")[0])
        self._run_up_to(index)
        if self._done.index > index:
            raise RuntimeError(f"{name} was asked for after layer {self._done.index}")
        return self._done

    def _run_up_to(self, index: int) -> None:
        while self._done.index < index:
            self._done = self._run(self._done.index + 1)

    @torch.no_grad()
    def _run(self, index: int) -> _Done:
        """Quantize a layer, with the layers before it as the file has them."""
        done = _Done(index)
        names, architecture, stream = self.names[index], self.structure.architecture, self.stream
        if index == 0:
            stream.embed(self.ids)
        with stream.layer(index) as layer:
            stages = stages_of(stream, architecture, index, names)
            if self.method == "awq":
                search = partial(self._search_scales, layer, stream.prefix(index))
                # Norms and biases are fp32 in the file.
                where = stream, architecture, index, names
                fold_scales(*where, HessianAccumulator, search, dtype=torch.float32)
                done.tensors.update(self._changed(layer, index))
            for stage in stages:
                for group, seen in capture(stream, index, stage, HessianAccumulator).items():
                    for name in group:
                        self._take(done, layer, index, name, seen)
            stream.advance(index)
        files = [self._linears[name].name for name in done.blocks]
        worst = max(files, key=self.errors.__getitem__, default="none")
        logger.info(
            "layer %d of %d: worst error %.2e (%s)",
            index + 1,
            self.structure.count,
            self.errors.get(worst, 0.0),
            worst,
        )
        return done

    def _search_scales(
        self,
        layer: nn.Module,
        prefix: str,
        linears: Sequence[str],
        seen: HessianAccumulator,
        share: Tensor | None,
    ) -> Tensor:
        weights = [column_weight(layer.get_submodule(name)) for name in linears]
        types = [self._linears[f"{prefix}{name}.weight"].type.name for name in linears]
        return search_gguf_scales(weights, seen, types, share=share)

    def _changed(self, layer: nn.Module, index: int) -> dict[str, Tensor]:
        """Tell what folding changed beside the linears' weights."""
        prefix = self.stream.prefix(index)
        result = {}
        for name, parameter in layer.named_parameters():
            full = prefix + name
            if full not in self._linears:
                value = parameter.detach().cpu()
                if not torch.equal(value, self.stream.weights.get(full).to(value.dtype)):
                    result[full] = value
        return result

    def _take(self, done: _Done, layer: nn.Module, index: int, name: str, seen: HessianAccumulator) -> None:
        """Encode one linear, and give it the value that its blocks stand for."""
        module = layer.get_submodule(name)
        weight = column_weight(module)
        full = f"{self.stream.prefix(index)}{name}.weight"
        kind = self._linears[full].type.name
        notes: tuple[str, ...] = ()
        try:
            if self.method == "gptq" and kind in LAYOUTS:
                result = quantize_gptq_gguf(weight, seen.value, kind)
                blocks, error, notes = result.blocks, result.error, result.notes
            else:
                importance = seen.diagonal.cpu() if seen.tokens else None
                blocks = gguf_encode(weight.cpu(), kind, importance=importance)
                error = gguf_output_error(weight, blocks, kind, seen.value)
        except InputError as refused:
            raise InputError(f"{full}: {refused}") from None
        for note in notes:
            logger.warning("%s: %s", full, note)
        set_column_weight(module, gguf_decode(blocks, kind).to(weight.device))
        done.blocks[full] = blocks
        self.errors[self._linears[full].name] = error

    @torch.no_grad()
    def _head_blocks(self, tensor: PlannedTensor) -> Tensor:
        """Round the head to nearest, weighed by what reaches it."""
        self._run_up_to(self.structure.count - 1)
        seen = HessianAccumulator(tensor.shape[-1], self.stream.device)
        self.stream.watch_head(seen.add)
        weight = tensor.read()
        assert isinstance(weight, Tensor)  # the model is a 16-bit one
        try:
            return gguf_encode(weight, tensor.type.name, importance=seen.diagonal)
        except InputError as refused:
            raise InputError(f"{tensor.source}: {refused}") from None
