"""One decoder layer through RTN, GPTQ or AWQ: capture, fold, quantize, put the result in its place."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from qkern.models import column_weight, fold_linear, fold_norm, pair_channels, set_column_weight
from qkern.ops import dequantize_groupwise
from qkern.quantizers import (
    GPTQConfig,
    HessianAccumulator,
    output_error,
    quantize_gptq,
    quantize_rtn,
    search_clip,
    search_scales,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from qkern.calibration import LayerStream
    from qkern.calibration.streaming import Stage
    from qkern.models import Architecture, Structure
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = [
    "Finished",
    "LayerRecord",
    "Settings",
    "capture",
    "fold_scales",
    "quantize_head",
    "quantize_layer",
    "stages_of",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is done to every linear.

    Parameters
    ----------
    method : str
        ``"rtn"``, ``"gptq"`` or ``"awq"``.
    scheme : Scheme or None
        Grid of the codes; None: by linear.
    schemes : mapping
        Where `scheme` is None: full name of every linear to quantize to its grid.
    gptq : GPTQConfig
        How GPTQ runs.
    search : str
        How RTN chooses scales, ``"minmax"`` or ``"mse"``; also AWQ after its clipping.
    scale_only : bool
        AWQ stops after folding its scales.
    """

    method: str
    scheme: Scheme | None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    search: str = "minmax"
    scale_only: bool = False

    def scheme_of(self, name: str) -> Scheme:
        """Grid of the linear with this full name."""
        return self.schemes[name] if self.scheme is None else self.scheme

    @property
    def spelling(self) -> str:
        """What a report says of the scheme."""
        return "mixed" if self.scheme is None else str(self.scheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """How one linear went.

    Parameters
    ----------
    scheme : str
        Spelling of the scheme; ``"16-bit"`` when only scales were folded.
    error : float
        Squared error relative to what was there before: of the outputs over the calibration tokens for
        GPTQ and AWQ, of the weights for RTN.
    notes : tuple of str
        What did not go the plain way.
    seconds : float
        Time of the linear's quantizer.
    """

    scheme: str
    error: float
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What became of one decoder layer, on the CPU, by names in the model.

    Parameters
    ----------
    weights : dict
        Linear to its quantized weight.
    tensors : dict
        Other tensors of the layer that changed, in the dtype they are stored in.
    records : dict
        Linear to its record.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, LayerRecord] = field(default_factory=dict)

    def put_into(self, layer: nn.Module, prefix: str) -> None:
        """Set the parameters of an fp32 layer to exactly what the output will hold."""
        for name, weight in self.weights.items():
            module = layer.get_submodule(name.removeprefix(prefix))
            _set(module, weight)
        for name, tensor in self.tensors.items():
            owner, _, leaf = name.removeprefix(prefix).rpartition(".")
            parameter = getattr(layer.get_submodule(owner), leaf)
            parameter.data = tensor.to(parameter.device, parameter.dtype)


def quantize_layer(
    stream: LayerStream, structure: Structure, index: int, names: Sequence[str], settings: Settings
) -> Finished:
    """Quantize linears of a layer inside its ``stream.layer`` block, and leave the result in the layer.

    Parameters
    ----------
    stream : LayerStream
        Embedded and advanced to this layer, unless the method is RTN.
    structure : Structure
        Of the model.
    index : int
        The layer.
    names : sequence of str
        Linears inside the layer to quantize.
    settings : Settings
        How.
    """
    finished = Finished()
    layer, prefix = stream.layers[index], stream.prefix(index)
    if settings.method == "rtn":
        for name in names:
            _take(finished, layer, prefix, name, settings, None)
        return finished
    stages = stages_of(stream, structure.architecture, index, names)
    if settings.method == "awq":

        def search(linears: Sequence[str], statistics: HessianAccumulator, share: Tensor | None) -> Tensor:
            weights = [column_weight(layer.get_submodule(name)) for name in linears]
            schemes = [settings.scheme_of(prefix + name) for name in linears]
            return search_scales(weights, statistics, schemes, share=share)

        fold_scales(stream, structure.architecture, index, names, stages, search)
        _store_changes(finished, stream, index, names, settings)
    if settings.scale_only:
        return finished
    for stage in stages:
        for group, seen in capture(stream, index, stage).items():
            for name in group:
                _take(finished, layer, prefix, name, settings, seen)
    return finished


def quantize_head(stream: LayerStream, head: str, settings: Settings) -> Finished:
    """Quantize the output head after the last layer; nothing is folded into it."""
    from qkern.calibration import filled

    finished = Finished()
    module = stream.model.get_submodule(head)
    where: dict[str, Any] = {"prefix": f"{head}.", "dtype": torch.float32, "device": stream.device}
    seen = None
    if settings.method != "rtn":
        seen = HessianAccumulator(module.in_features, stream.device)
        stream.watch_head(seen.add)
    with filled(module, stream.weights, **where):
        _take(finished, stream.model, "", head, settings, seen)
    return finished


def _take(
    finished: Finished,
    layer: nn.Module,
    prefix: str,
    name: str,
    settings: Settings,
    seen: HessianAccumulator | None,
) -> None:
    """Quantize one linear, record it, and give it the value that its codes stand for."""
    started = time.monotonic()
    module = layer.get_submodule(name)
    weight = column_weight(module)
    notes: tuple[str, ...] = ()
    full = prefix + name
    scheme = settings.scheme_of(full)
    if settings.method == "gptq" and seen is not None:
        result = quantize_gptq(weight, seen.value, scheme, settings.gptq)
        quantized, error, notes = result.weight, result.error, result.notes
    else:
        clipped = weight
        if settings.method == "awq" and seen is not None and seen.tokens:
            clipped = search_clip(weight, seen, scheme)
        search: Any = settings.search
        quantized = quantize_rtn(clipped, scheme, search=search)
        if seen is not None and seen.tokens:
            error = output_error(weight, quantized, seen.value)
        else:
            change = (weight - dequantize_groupwise(quantized)).square().sum()
            error = float(change / weight.square().sum().clamp(min=torch.finfo(torch.float32).tiny))
            if seen is not None:
                notes = ("rounded to nearest: no calibration token reached it",)
    _set(module, quantized)
    for note in notes:
        logger.warning("%s%s: %s", prefix, name, note)
    finished.weights[full] = quantized.to("cpu")
    finished.records[full] = LayerRecord(
        scheme=str(scheme), error=error, notes=notes, seconds=time.monotonic() - started
    )


def _set(module: nn.Module, quantized: QuantizedWeight) -> None:
    device = column_weight(module).device
    set_column_weight(module, dequantize_groupwise(quantized.to(device)))


def stages_of(
    stream: LayerStream, architecture: Architecture | None, index: int, names: Sequence[str]
) -> list[Stage]:
    """Linears to quantize in the order of their execution, from the architecture's data or by looking."""
    if architecture is not None:
        chosen = [tuple(name for name in group if name in names) for group in architecture.sequential]
        if sum(map(len, chosen)) == len(names):
            return [(group,) for group in chosen if group]
    return stream.discover(index, names)


def capture(
    stream: LayerStream, index: int, groups: Iterable[tuple[str, ...]]
) -> dict[tuple[str, ...], HessianAccumulator]:
    """Statistics of each group's shared input with the layer as it is now."""
    groups = tuple(groups)
    layer = stream.layers[index]
    seen = {}
    for group in groups:
        features = column_weight(layer.get_submodule(group[0])).shape[1]
        seen[group] = HessianAccumulator(features, stream.device)
    stream.run(index, watch={group[0]: seen[group].add for group in groups})
    return seen


def fold_scales(
    stream: LayerStream,
    architecture: Architecture | None,
    index: int,
    names: Sequence[str],
    stages: Sequence[Stage],
    search: Callable[[Sequence[str], HessianAccumulator, Tensor | None], Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Search AWQ's scales with the layer as it was and fold them.

    Scores are the squared errors of the linears' own outputs, over all calibration tokens through their
    second moments; they do not see the attention or MLP around the linears, which would have to run once
    for each ratio and linear.

    Parameters
    ----------
    stream, architecture, index, names, stages
        As in `quantize_layer` and `stages_of`.
    search : callable
        From linears that share an input, its statistics, and the channels that share a scale, to the scales.
    dtype : torch.dtype, optional
        Dtype in which norms will be stored; default: that of the checkpoint.
    """
    config = stream.model.config
    if architecture is None:
        return
    layer, prefix, weights = stream.layers[index], stream.prefix(index), stream.weights
    seen: dict[str, HessianAccumulator] = {}
    for group, statistics in capture(stream, index, chain.from_iterable(stages)).items():
        seen.update(dict.fromkeys(group, statistics))
    for entry in architecture.norm_linears:
        # A linear that stays 16-bit must stay as it is, so its norm does too.
        if not all(name in names for name in entry.linears):
            continue
        scales = search(entry.linears, seen[entry.linears[0]], None)
        fold_norm(
            layer.get_submodule(entry.norm),
            [layer.get_submodule(name) for name in entry.linears],
            scales,
            offset=architecture.norm_offset,
            dtype=dtype or weights.get(f"{prefix}{entry.norm}.weight").dtype,
        )
    for pair in architecture.linear_linears:
        if pair.first not in names or pair.second not in names:
            continue
        first, second = layer.get_submodule(pair.first), layer.get_submodule(pair.second)
        rows, share = pair_channels(config, pair, first, second)
        scales = search((pair.second,), seen[pair.second], share)
        fold_linear(first, second, scales, rows=rows, share=share)


def _store_changes(
    finished: Finished, stream: LayerStream, index: int, names: Sequence[str], settings: Settings
) -> None:
    """Keep what folding changed beside the weights to be quantized, rounded to its stored dtype."""
    layer, prefix = stream.layers[index], stream.prefix(index)
    quantized = set() if settings.scale_only else {f"{name}.weight" for name in names}
    for name, parameter in layer.named_parameters():
        if name in quantized:
            continue
        old = stream.weights.get(prefix + name)
        new = parameter.detach().to("cpu", old.dtype)
        if torch.equal(new, old):
            continue
        finished.tensors[prefix + name] = new
        parameter.data = new.to(parameter.device, parameter.dtype)
    if settings.scale_only:
        for name in names:
            finished.records[prefix + name] = LayerRecord(scheme="16-bit", error=0.0)
