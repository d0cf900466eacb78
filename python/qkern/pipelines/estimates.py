"""What a run takes: memory by how it walks the layers, time from one layer and samples of its matrices."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from qkern.calibration import LayerStream, Weights
from qkern.calibration.streaming import CHUNK_TOKENS
from qkern.models import Architecture, Structure, column_weight
from qkern.nn import role
from qkern.ops import gguf_decode, gguf_encode
from qkern.ops.gguf_types import GGUFType
from qkern.pipelines.layerwise import Finished, Settings, Statistics, capture, quantize_linear, stages_of
from qkern.quantizers import (
    ActivationSample,
    HessianAccumulator,
    gguf_output_error,
    quantize_gptq_gguf,
    search_gguf_scales,
    search_scales,
    search_smoothing,
)
from qkern.schemes import Scheme
from qkern.search import parse_choice, stored_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Job", "encode_seconds", "peak_bytes", "run_seconds"]

logger = logging.getLogger(__name__)

# Larger matrices are timed by a corner of this size.
_ROWS: Final = 512
_COLUMNS: Final = 1024
# What the timed layer may cost: operations, and tokens beyond which nothing is learnt.
_OPERATIONS: Final = 2e11
_TOKENS: Final = 8192
# Methods that need second moments, and the tokens of a sample that do for the other one.
_MOMENTS: Final = ("gptq", "awq")
_SAMPLE_TOKENS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run over the layers of a model.

    Parameters
    ----------
    model : PreTrainedModel
        Without weights.
    structure : Structure
        Of it.
    method : str
        One of `qkern.pipelines.checks.METHODS`.
    linears : mapping
        Full name of every linear to quantize to the spelling of its scheme or GGUF type.
    settings : Settings or None
        Of the schemes; None for GGUF types.
    samples, length : int
        Calibration sequences and tokens in each.
    """

    model: Any
    structure: Structure
    method: str
    linears: Mapping[str, str]
    settings: Settings | None
    samples: int
    length: int

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a linear."""
        N, K = column_weight(self.model.get_submodule(name)).shape
        return N, K

    def inside(self, index: int) -> list[str]:
        """Linears to quantize of a layer, by their names in it."""
        prefix = f"{self.structure.layers}.{index}."
        return [name.removeprefix(prefix) for name in self.linears if name.startswith(prefix)]

    @property
    def fullest(self) -> int:
        """The layer with the most weights to quantize."""
        prefix = f"{self.structure.layers}."

        def weights(index: int) -> int:
            shapes = (self.shape(f"{prefix}{index}.{name}") for name in self.inside(index))
            return sum(N * K for N, K in shapes)

        return max(range(self.structure.count), key=weights)


def peak_bytes(job: Job) -> int:
    """Memory that a run takes at its peak, beyond what the process has before it.

    Everything is fp32 but what is finished. Counted are the layer at hand with its finished codes, twice (on
    the way to the disk), and the larger of: a tensor that is copied, while it is looked through for NaN; the
    hidden states twice, or once and the second moments of a stage, and the outputs of a chunk of tokens;
    the hidden states, the second moments and the scratch of one linear. Outside the layers the embedding
    has its turn, and the head if it is quantized.
    """
    structure, model, method = job.structure, job.model, job.method
    layers = list(model.get_submodule(structure.layers))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    head = job.linears.get(str(structure.head))
    outside = [parameter.numel() for parameter in model.parameters() if id(parameter) not in inside]
    calibrated = method != "rtn"
    hidden = 4 * job.samples * job.length * model.config.get_text_config().hidden_size * calibrated
    # isfinite has a copy of bf16 magnitudes and two masks.
    peaks = [4 * max(outside, default=0)]
    if calibrated:
        surroundings = 4 * sum(outside)
        if structure.head is not None and not structure.tied:
            surroundings -= 4 * model.get_submodule(structure.head).weight.numel()
        peaks.append(surroundings + hidden)
    for index in {job.fullest, 0}:
        names = [f"{structure.layers}.{index}.{name}" for name in job.inside(index)]
        weights = 4 * sum(parameter.numel() for parameter in layers[index].parameters())
        finished = sum(stored_bits(job.linears[name], job.shape(name)) for name in names) // 8
        phases = [2 * hidden + _chunk(job, names) * calibrated]
        if calibrated:
            moments = _moments(job, index)
            phases.append(hidden + moments + _chunk(job, names))
            # The weights that share a scale, scaled and rounded.
            phases.append(hidden + moments + 3 * _folding(job, index)[1])
            phases += [hidden + moments + _scratch(job, name) for name in names]
        else:
            phases += [_scratch(job, name) for name in names]
        peaks.append(weights + 2 * finished + max(phases))
    if head is not None:
        name = str(structure.head)
        N, K = job.shape(name)
        peaks.append(hidden + 4 * (N * K + K * K * calibrated) + _scratch(job, name))
    return max(peaks)


def _chunk(job: Job, names: list[str]) -> int:
    """Bytes of what the linears of a layer give and, once, take in for a chunk of tokens.

    Experts run one after another, at most with all tokens.
    """
    tokens = min(max(1, CHUNK_TOKENS // job.length), job.samples) * job.length
    prefix = len(f"{job.structure.layers}.")
    shapes = [job.shape(name) for name in {role(name[prefix:]): name for name in names}.values()]
    return 4 * tokens * (sum(N for N, _ in shapes) + max((K for _, K in shapes), default=0))


def _moments(job: Job, index: int) -> int:
    """Bytes of what is measured at once: second moments of a stage, or what folding looks at."""
    prefix = f"{job.structure.layers}.{index}."
    stages: Counter[str] = Counter()
    for group in _groups(job, index):
        stages[role(group[0])] += 4 * job.shape(prefix + group[0])[1] ** 2
    measured = max(stages.values(), default=0) if job.method in _MOMENTS else 0
    return max(measured, _folding(job, index)[0])


def _folding(job: Job, index: int) -> tuple[int, int]:
    """Bytes of what a method that folds measures in a layer, and of the most weights that share a scale."""
    data = _data(job, index)
    if data is None or job.method not in ("awq", "smoothquant"):
        return 0, 0
    prefix, names = f"{job.structure.layers}.{index}.", set(job.inside(index))
    norms = [
        entry.linears for entry in data.norm_linears if entry.linears and names.issuperset(entry.linears)
    ]
    pairs = [(pair.second,) for pair in data.linear_linears if {pair.first, pair.second} <= names]
    columns = [job.shape(prefix + group[0])[1] for group in (*norms, *pairs)]
    seen = sum(4 * K * (_SAMPLE_TOKENS if job.method == "smoothquant" else K) for K in columns)
    sizes = [
        sum(N * K for N, K in (job.shape(prefix + name) for name in group)) for group in (*norms, *pairs)
    ]
    return seen, 4 * max(sizes, default=0)


def _data(job: Job, index: int) -> Architecture | None:
    architecture = job.structure.architecture
    layer = job.model.get_submodule(f"{job.structure.layers}.{index}")
    return None if architecture is None else architecture.in_layer(layer)


def _groups(job: Job, index: int) -> list[tuple[str, ...]]:
    """Linears that share an input; where nothing is known of the architecture each by itself."""
    names = job.inside(index)
    data = _data(job, index)
    if data is None:
        return [(name,) for name in names]
    groups = [tuple(name for name in group if name in names) for group in data.sequential]
    return [group for group in groups if group]


def _scratch(job: Job, name: str) -> int:
    """Bytes that the quantizer of a linear needs beside its weight and second moments."""
    N, K = job.shape(name)
    if job.method == "gptq":
        # The Hessian damped, its factor and that in order; later one of them, and weight, difference, codes.
        return 4 * max(3 * K * K, K * K + 5 * N * K // 2)
    # AWQ's clipping: groups, what is clipped, decoded, wrong, wrong through the moments, their product, best.
    return 4 * N * K * (7 if job.method == "awq" else 3)


def run_seconds(job: Job, device: torch.device) -> float:
    """Estimate the time of the layers of a run, disks left out.

    A layer of the model's shape runs a few tokens, all passes of the method; its tokens are taken to cost
    alike, and layers too. The quantizer runs on random matrices, of large ones on a corner: its time
    grows with N K and, as far as it multiplies by second moments, with N K K and K K K.
    """
    seconds = 0.0
    if job.method != "rtn":
        seconds += job.structure.count * _layer_seconds(job, device)
    known: dict[tuple[int, int], float] = {}
    usual = Counter(job.linears.values()).most_common(1)[0][0]
    for name in job.linears:
        shape = job.shape(name)
        if shape not in known:
            known[shape] = _matrix_seconds(job, usual, *shape, device)
        seconds += known[shape]
    return seconds


def encode_seconds(weights: Mapping[tuple[str, int], int]) -> float:
    """Estimate the time of rounding tensors of a GGUF to nearest, by type and columns how many weights."""
    seconds = 0.0
    for (kind, K), count in weights.items():
        rows = max(1, _ROWS * 256 // K)
        taken = _timed(partial(_encode, "rtn", torch.randn(rows, K), None, kind))
        seconds += taken * count / (rows * K)
    return seconds


def _timed(run: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of a call: the least of five, or of as many as begin within half a second."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.5:
        started = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _layer_seconds(job: Job, device: torch.device) -> float:
    """Seconds of all tokens through one layer, in every pass that the method makes."""
    index = job.fullest
    prefix = f"{job.structure.layers}.{index}."
    names = job.inside(index)
    weights = _Constant(job.model, prefix)
    shapes = [job.shape(prefix + name) for name in names]
    operations = 2 * sum(3 * N * K for N, K in shapes) + 2 * sum(K * K for _, K in shapes)
    tokens = int(min(_TOKENS, job.samples * job.length, max(64, _OPERATIONS / max(operations, 1))))
    length = min(job.length, max(1, tokens // 4))
    few = max(1, tokens // 4 // length)

    def seconds(rows: int) -> float:
        stream = LayerStream(job.model, job.structure.layers, weights, head=job.structure.head, device=device)
        stream.embed(torch.zeros(rows, length, dtype=torch.int64))
        return _timed(lambda: _passes(job, stream, index, names), device)

    # What does not grow with the tokens, as clearing the second moments, is told apart by two measurements.
    one, other = seconds(few), seconds(4 * few)
    slope = max(other - one, 0.0) / (3 * few * length) or other / (4 * few * length)
    fixed = max(one - slope * few * length, 0.0)
    return fixed + slope * job.samples * job.length


@torch.no_grad()
def _passes(job: Job, stream: LayerStream, index: int, names: list[str]) -> None:
    with stream.layer(index):
        stages = stages_of(stream, job.structure.architecture, index, names)
        if job.method in ("awq", "smoothquant"):
            make = HessianAccumulator if job.method == "awq" else ActivationSample
            capture(stream, index, chain.from_iterable(stages), make)
        for stage in stages if job.method in _MOMENTS else ():
            capture(stream, index, stage, HessianAccumulator)
        stream.through(index, stream.states)


class _Constant(Weights):
    """Weights that are all alike, and take no memory outside the layer that is run."""

    def __init__(self, model: Any, prefix: str) -> None:
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._prefix = prefix
        super().__init__({}, {name: name for name in self._shapes}, "the estimate")

    def get(self, name: str) -> Tensor:
        value = torch.tensor(0.01).expand(self._shapes[name])
        return value.contiguous() if name.startswith(self._prefix) else value


def _matrix_seconds(job: Job, spelling: str, N: int, K: int, device: torch.device) -> float:
    rows, columns = min(N, _ROWS), min(K, _COLUMNS)
    seconds = _sample(job, spelling, rows, columns, device)
    if columns == K or job.method not in _MOMENTS:
        return seconds * (N * K) / (rows * columns)
    # a N K + b (N K K + K K K / 20), from two widths.
    half = columns // 2
    (x, y), (u, v) = ((rows * k, k * k * (rows + k / 20)) for k in (columns, half))
    second = _sample(job, spelling, rows, half, device)
    b = min(max((seconds / x - second / u) / (y / x - v / u), 0.0), seconds / y)
    a = (seconds - b * y) / x
    return a * N * K + b * K * K * (N + K / 20)


@torch.no_grad()
def _sample(job: Job, spelling: str, N: int, K: int, device: torch.device) -> float:
    """Seconds of the quantizer of one linear with random weights and activations."""
    generator = torch.Generator().manual_seed(0)
    holder = nn.ModuleDict({"linear": nn.Linear(K, N, bias=False)})
    stored = (torch.randn(N, K, generator=generator) / K**0.5).to(torch.bfloat16)
    choice = parse_choice(spelling)
    base = job.settings or Settings(method=job.method, scheme=None)
    settings = replace(base, scheme=choice if isinstance(choice, Scheme) else None)
    seen, sample = Statistics(settings, K, device), ActivationSample(K, device)
    tokens = torch.randn(min(K, _SAMPLE_TOKENS), K, generator=generator).to(device)
    seen.add(tokens)
    sample.add(tokens)

    def run() -> None:
        weight = stored.to(device, torch.float32)
        holder["linear"].weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(choice, GGUFType):
            _encode(job.method, weight, seen.moments, choice.name)
            return
        if job.method == "awq" and seen.moments is not None and choice is not None:
            search_scales([weight], seen.moments, [choice])
        if settings.alpha is not None and choice is not None and choice.act_bits is not None:
            alpha: Any = settings.alpha
            search_smoothing([weight], sample, [choice], alpha=alpha)
        quantize_linear(Finished(), holder, "", "linear", settings, seen)

    return _timed(run, device)


def _encode(method: str, weight: Tensor, seen: HessianAccumulator | None, kind: str) -> None:
    if seen is None:
        gguf_decode(gguf_encode(weight.cpu(), kind), kind)
    elif method == "gptq":
        gguf_decode(quantize_gptq_gguf(weight, seen.value, kind).blocks, kind)
    else:
        search_gguf_scales([weight], seen, [kind])
        blocks = gguf_encode(weight.cpu(), kind, importance=seen.diagonal.cpu())
        gguf_output_error(weight, blocks, kind, seen.value)
