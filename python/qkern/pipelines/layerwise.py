"""One decoder layer through a method: capture, fold, quantize, put the result in its place."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import torch

from qkern.calibration import stages_by_role
from qkern.errors import UnsupportedError
from qkern.models import column_weight, fold_linear, fold_norm, pair_channels, set_column_weight
from qkern.ops import dequantize_groupwise
from qkern.quantizers import (
    ActivationRange,
    ActivationSample,
    GPTQConfig,
    HessianAccumulator,
    output_error,
    quantize_gptq,
    quantize_rtn,
    search_clip,
    search_scales,
    search_smoothing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from qkern.calibration import LayerStream, Replay
    from qkern.calibration.streaming import Stage
    from qkern.models import Architecture, Structure
    from qkern.schemes import QuantizedWeight, Scheme

__all__ = [
    "Finished",
    "LayerRecord",
    "Settings",
    "Statistics",
    "capture",
    "fold_scales",
    "quantize_head",
    "quantize_layer",
    "quantize_linear",
    "stages_of",
]

logger = logging.getLogger(__name__)

# Folding is exact but for rounding: to fp32, and of a norm's bias to the dtype it is stored in.
_UNCHANGED: Final = 0.02


class Observer(Protocol):
    """Anything that is shown the activations of a linear, chunk by chunk."""

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., K]``."""
        ...


class Counter(Observer, Protocol):
    """An observer that knows how many tokens it was shown."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        ...


Seen = TypeVar("Seen", bound=Observer)
Counted = TypeVar("Counted", bound=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is done to every linear.

    Parameters
    ----------
    method : str
        ``"rtn"``, ``"gptq"``, ``"awq"`` or ``"smoothquant"``.
    scheme : Scheme or None
        Grid of the codes; None: by linear.
    schemes : mapping
        Where `scheme` is None: full name of every linear to quantize to its grid.
    gptq : GPTQConfig
        How GPTQ runs.
    search : str or None
        How RTN chooses scales, also AWQ after its clipping; None: as `quantize_rtn` does by the scheme.
    scale_only : bool
        AWQ stops after folding its scales.
    alpha : float, "auto" or None
        SmoothQuant's, before SmoothQuant itself or GPTQ rounds the weights; None: nothing is smoothed.
    observer : str or None
        How static scales of activations are chosen; None: activations are quantized per token.
    """

    method: str
    scheme: Scheme | None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    search: str | None = None
    scale_only: bool = False
    alpha: float | str | None = None
    observer: str | None = None

    @property
    def measures(self) -> bool:
        """Whether rounding the weights or activations needs to know the activations."""
        return self.method in ("gptq", "awq") or self.observer is not None

    @property
    def folds(self) -> bool:
        """Whether scales are folded before."""
        return self.method == "awq" or self.alpha is not None

    @property
    def reads_text(self) -> bool:
        """Whether there have to be calibration texts."""
        return self.measures or self.folds

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
        GPTQ and AWQ, of the weights for RTN and SmoothQuant.
    notes : tuple of str
        What did not go the plain way.
    seconds : float
        Time of the linear's quantizer.
    alpha : float or None
        SmoothQuant's, if it scaled the linear's input.
    """

    scheme: str
    error: float
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    alpha: float | None = None


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
        Embedded and advanced to this layer, if the settings read text.
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
    stages: Sequence[Stage] = [tuple((name,) for name in names)]
    if settings.reads_text:
        stages = stages_of(stream, structure.architecture, index, names)
    alphas: dict[str, float | None] = {}
    if settings.folds:
        alphas = _fold(stream, structure, index, names, settings)
        _store_changes(finished, stream, index, names, settings)
    if settings.scale_only:
        return finished
    for stage in stages:
        seen: dict[tuple[str, ...], Statistics | None] = dict.fromkeys(stage)
        if settings.measures:
            seen.update(capture(stream, index, stage, partial(Statistics, settings)))
        for group in stage:
            for name in group:
                quantize_linear(finished, layer, prefix, name, settings, seen[group], alphas.get(name))
    return finished


def _fold(
    stream: LayerStream,
    structure: Structure,
    index: int,
    names: Sequence[str],
    settings: Settings,
) -> dict[str, float | None]:
    """Fold scales of AWQ or SmoothQuant into the layer; return SmoothQuant's alpha by linear."""
    layer, prefix = stream.layers[index], stream.prefix(index)
    alphas: dict[str, float | None] = {}

    def matrices(linears: Sequence[str]) -> tuple[list[Tensor], list[Scheme]]:
        weights = [column_weight(layer.get_submodule(name)) for name in linears]
        return weights, [settings.scheme_of(prefix + name) for name in linears]

    def scale(linears: Sequence[str], statistics: HessianAccumulator, share: Tensor | None) -> Tensor:
        weights, schemes = matrices(linears)
        return search_scales(weights, statistics, schemes, share=share)

    def smooth(linears: Sequence[str], sample: ActivationSample, share: Tensor | None) -> Tensor | None:
        weights, schemes = matrices(linears)
        if all(scheme.act_bits is None for scheme in schemes):
            return None
        options: Any = {"alpha": settings.alpha, "observer": settings.observer}
        # GPTQ's own search needs more than a sample.
        options["search"] = "mse" if settings.search == "mse" else "minmax"
        found = search_smoothing(weights, sample, schemes, share=share, **options)
        alphas.update(dict.fromkeys(linears, found.alpha))
        return found.scales

    where = stream, structure.architecture, index, names
    if settings.alpha is None:
        fold_scales(*where, HessianAccumulator, scale)
    else:
        fold_scales(*where, ActivationSample, smooth)
    return alphas


def quantize_head(stream: LayerStream, head: str, settings: Settings) -> Finished:
    """Quantize the output head after the last layer; nothing is folded into it."""
    from qkern.calibration import filled

    finished = Finished()
    module = stream.model.get_submodule(head)
    where: dict[str, Any] = {"prefix": f"{head}.", "dtype": torch.float32, "device": stream.device}
    seen = None
    if settings.measures:
        seen = Statistics(settings, module.in_features, stream.device)
        stream.watch_head(seen.add)
    with filled(module, stream.weights, **where):
        quantize_linear(finished, stream.model, "", head, settings, seen)
    return finished


class Statistics:
    """What is measured of a linear's input: moments for GPTQ and AWQ, the range for a static scale."""

    def __init__(self, settings: Settings, features: int, device: torch.device) -> None:
        self.moments = HessianAccumulator(features, device) if settings.method in ("gptq", "awq") else None
        self.range = None if settings.observer is None else ActivationRange(settings.observer, device)

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., K]``."""
        for part in (self.moments, self.range):
            if part is not None:
                part.add(x)


def quantize_linear(
    finished: Finished,
    layer: nn.Module,
    prefix: str,
    name: str,
    settings: Settings,
    seen: Statistics | None,
    alpha: float | None = None,
) -> None:
    """Quantize one linear, record it, and give it the value that its codes stand for."""
    started = time.monotonic()
    module = layer.get_submodule(name)
    weight = column_weight(module)
    notes: tuple[str, ...] = ()
    full = prefix + name
    scheme = settings.scheme_of(full)
    moments, values = (None, None) if seen is None else (seen.moments, seen.range)
    reached = moments if moments is not None and moments.tokens else None
    if settings.method == "gptq" and reached is not None:
        result = quantize_gptq(weight, reached.value, scheme, settings.gptq)
        quantized, error, notes = result.weight, result.error, result.notes
    else:
        clipped = weight if reached is None else search_clip(weight, reached, scheme)
        search: Any = settings.gptq.search if settings.method == "gptq" else settings.search
        # GPTQ's own search needs activations.
        quantized = quantize_rtn(clipped, scheme, search="mse" if search == "loss" else search)
        if reached is not None:
            error = output_error(weight, quantized, reached.value)
        else:
            change = (weight - dequantize_groupwise(quantized)).square().sum()
            error = float(change / weight.square().sum().clamp(min=torch.finfo(torch.float32).tiny))
        if reached is None and moments is not None:
            notes = ("rounded to nearest: no calibration token reached it",)
    if values is not None and scheme.act_bits is not None:
        if values.count:
            quantized = replace(quantized, input_scale=values.scale().to(quantized.device))
        else:
            notes += ("its activations stay dynamic: no calibration token reached it",)
    _set(module, quantized)
    for note in notes:
        logger.warning("%s%s: %s", prefix, name, note)
    finished.weights[full] = quantized.to("cpu")
    finished.records[full] = LayerRecord(
        scheme=str(scheme), error=error, notes=notes, seconds=time.monotonic() - started, alpha=alpha
    )


def _set(module: nn.Module, quantized: QuantizedWeight) -> None:
    device = column_weight(module).device
    set_column_weight(module, dequantize_groupwise(quantized.to(device)))


def stages_of(
    stream: LayerStream, architecture: Architecture | None, index: int, names: Sequence[str]
) -> list[Stage]:
    """Linears to quantize in the order of their execution, from the architecture's data or by looking."""
    if architecture is not None:
        known = architecture.in_layer(stream.layers[index]).sequential
        chosen = [tuple(name for name in group if name in names) for group in known]
        if sum(map(len, chosen)) == len(names):
            return stages_by_role(group for group in chosen if group)
    return stream.discover(index, names)


def capture(
    stream: LayerStream,
    index: int,
    groups: Iterable[tuple[str, ...]],
    make: Callable[[int, torch.device], Seen],
    replay: Replay | None = None,
) -> dict[tuple[str, ...], Seen]:
    """Show each group's shared input, with the layer as it is now, to what `make` gives for its features.

    `replay` is that of `LayerStream.run`.
    """
    groups = tuple(groups)
    layer = stream.layers[index]
    seen = {}
    for group in groups:
        features = column_weight(layer.get_submodule(group[0])).shape[1]
        seen[group] = make(features, stream.device)
    stream.run(index, watch={group[0]: seen[group].add for group in groups}, replay=replay)
    return seen


def fold_scales(
    stream: LayerStream,
    architecture: Architecture | None,
    index: int,
    names: Sequence[str],
    make: Callable[[int, torch.device], Counted],
    search: Callable[[Sequence[str], Counted, Tensor | None], Tensor | None],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Search the scales of AWQ or SmoothQuant with the layer as it was, fold them, and look that it still is.

    Scores are the squared errors of the linears' own outputs; they do not see the attention or MLP around
    the linears, which would have to run once for each candidate and linear.

    Parameters
    ----------
    stream, architecture, index, names
        As in `quantize_layer` and `stages_of`.
    make : callable
        From the features and the device of an input to what collects its statistics.
    search : callable
        From linears that share an input, its statistics, and the channels that share a scale, to the scales;
        None: as they are.
    dtype : torch.dtype, optional
        Dtype in which norms will be stored; default: that of the checkpoint.

    Raises
    ------
    UnsupportedError
        If the layer computes something else afterwards: the data about its architecture does not fit it.
    """
    config = stream.model.config
    if architecture is None:
        return
    layer, prefix, weights = stream.layers[index], stream.prefix(index), stream.weights
    data = architecture.in_layer(layer)
    # A linear that stays 16-bit must stay as it is, so what feeds it does too.
    norms = [entry for entry in data.norm_linears if entry.linears and set(entry.linears) <= set(names)]
    pairs = [pair for pair in data.linear_linears if pair.first in names and pair.second in names]
    watched = dict.fromkeys([*(entry.witness for entry in norms), *(pair.second for pair in pairs)])
    seen = capture(stream, index, ((name,) for name in watched), make)
    sample = stream.states[:1]
    before = stream.through(index, sample)[0]
    for entry in norms:
        scales = search(entry.linears, seen[entry.witness,], None)
        if scales is None:
            continue
        fold_norm(
            layer.get_submodule(entry.norm),
            [layer.get_submodule(name) for name in (*entry.linears, *entry.routers)],
            scales,
            offset=architecture.norm_offset,
            dtype=dtype or weights.get(f"{prefix}{entry.norm}.weight").dtype,
        )
    for pair in pairs:
        if not seen[pair.second,].tokens:
            continue  # an expert that no token reached
        first, second = layer.get_submodule(pair.first), layer.get_submodule(pair.second)
        rows, share = pair_channels(config, pair, first, second)
        scales = search((pair.second,), seen[pair.second,], share)
        if scales is not None:
            fold_linear(first, second, scales, rows=rows, share=share)
    added = (before - sample[0]).norm().clamp(min=torch.finfo(torch.float32).tiny)
    change = float((stream.through(index, sample)[0] - before).norm() / added)
    if not change <= _UNCHANGED:
        raise UnsupportedError(
            f"{prefix[:-1]} computes something else after folding scales into it ({change:.1%} of what it "
            f"adds to its input changed): qkern's data about {architecture.model_type} does not fit this "
            "model; use a method that folds nothing, rtn or gptq without alpha"
        )


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
