"""Candidates of a search: every linear in every allele, as codes, kept on disk layer by layer."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern import _progress
from qkern.calibration import Replay
from qkern.errors import InputError
from qkern.models import column_weight, set_column_weight
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.ops.gguf_types import GGUFType
from qkern.pipelines.imatrix import squares
from qkern.pipelines.layerwise import Finished, LayerRecord, capture, stages_of
from qkern.quantizers import (
    GPTQConfig,
    HessianAccumulator,
    gguf_output_error,
    output_error,
    quantize_gptq,
    quantize_gptq_gguf,
    quantize_rtn,
)
from qkern.search import EMBEDDING, KEPT, candidate_key, parse_choice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from qkern.calibration import LayerStream
    from qkern.models import Structure
    from qkern.pipelines.partial import Partial
    from qkern.schemes import QuantizedWeight, Scheme
    from qkern.search import Gene, MixedPrecision, Space

__all__ = ["METHODS", "CandidateStore", "make_candidates"]

logger = logging.getLogger(__name__)

METHODS: Final = ("gptq", "rtn")


class _Seen(HessianAccumulator):
    """What `quantize` goes by, and the importance that `imatrix` finds, to the last bit."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self._squares = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        super().add(x)
        self._squares += squares(x)

    @property
    def importance(self) -> Tensor:
        """fp32 ``[K]``: mean square of each feature."""
        return self._squares.float() / self.tokens


class CandidateStore:
    """What `make_candidates` made, from its folder.

    Parameters
    ----------
    partial : Partial
        The folder.
    space : Space
        Of which candidates are asked for.
    base : MixedPrecision, optional
        See `make_candidates`.
    """

    def __init__(self, partial: Partial, space: Space, base: MixedPrecision | None = None) -> None:
        self.partial = partial
        self.genes: dict[int, list[Gene]] = defaultdict(list)
        for gene in space.genes:
            self.genes[gene.layer].append(gene)
        choices = {} if base is None else dict(base.choices)
        self.base = choices
        digest = hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:8]
        self._prefix = f"after-{digest}-layer" if choices else "layer"

    def wanted(self, index: int) -> dict[str, list[str]]:
        """Linears of a layer by allele."""
        names: dict[str, list[str]] = defaultdict(list)
        for gene in self.genes.get(index, ()):
            for spelling in gene.alleles:
                if spelling != KEPT:
                    names[spelling] += gene.names
        return names

    def missing(self, index: int) -> list[str]:
        """Alleles of a layer that are not there yet; with a base all, because its own are needed to go on."""
        wanted = list(self.wanted(index))
        missing = [s for s in wanted if not self.partial.path(self._file(index, s)).is_file()]
        return wanted if missing and self.base else missing

    def save(self, index: int, spelling: str, finished: Finished) -> None:
        """Keep one allele of all linears of a layer."""
        self.partial.save(self._file(index, spelling), finished)

    def layer(self, index: int) -> dict[str, QuantizedWeight | Tensor]:
        """Candidates of a layer by `candidate_key`."""
        found: dict[str, QuantizedWeight | Tensor] = {}
        for spelling in self.wanted(index):
            finished = self._load(index, spelling)
            found |= {**finished.weights, **finished.tensors}
        return found

    def errors(self) -> dict[tuple[str, str], float]:
        """Relative squared error of the outputs over the calibration tokens, by linear and allele."""
        return {
            (name, spelling): self._load(index, spelling).records[name].error
            for index in self.genes
            for spelling, names in self.wanted(index).items()
            for name in names
        }

    def _load(self, index: int, spelling: str) -> Finished:
        name = self._file(index, spelling)
        finished = self.partial.load(name)
        if finished is None:
            raise InputError(f"{self.partial.folder} lost {name}: run again")
        names = self.wanted(index)[spelling]
        keys = finished.weights.keys() | finished.tensors.keys()
        if keys != {candidate_key(one, spelling) for one in names} or finished.records.keys() != set(names):
            raise InputError(f"{self.partial.path(name)} is damaged: remove it and run again")
        return finished

    def _file(self, index: int, spelling: str) -> str:
        # Which linears an allele has depends on the runtime and on the other alleles.
        names = hashlib.sha256(" ".join(self.wanted(index)[spelling]).encode()).hexdigest()[:8]
        return f"{self._prefix}-{index:05}.{spelling}.{names}"


@torch.no_grad()
def make_candidates(
    stream: LayerStream,
    structure: Structure,
    space: Space,
    ids: Tensor,
    method: str,
    partial: Partial,
    *,
    base: MixedPrecision | None = None,
) -> CandidateStore:
    """Quantize every linear in every allele.

    Parameters
    ----------
    stream : LayerStream
        Of the original model.
    structure : Structure
        Of the model.
    space : Space
        What is wanted.
    ids : Tensor
        Calibration tokens int64 ``[S, T]``.
    method : {"gptq", "rtn"}
        How codes are chosen.
    partial : Partial
        Where they are kept; what is there is not made again.
    base : MixedPrecision, optional
        What the linears before the one at hand have, whose activations codes are chosen by, as `quantize`
        does it: candidates of `base` itself are what `quantize` makes of it, and those of its neighbours are
        close. Default: the original's activations, for what is changed by itself.
    """
    store = CandidateStore(partial, space, base)
    _make_embedding(stream, store)
    last = max((index for index in store.genes if store.missing(index)), default=-1)
    if last < 0:
        return store
    stream.embed(ids)
    with _progress.task(f"candidates, {method}", total=last + 1, unit="layer") as progress:
        for index in range(min(last + 1, structure.count)):
            with stream.layer(index) as layer:
                replay = Replay(layer)
                if index in store.genes:
                    _make_layer(stream, structure, layer, index, method, store, replay)
                if index < last:
                    stream.advance(index, replay)
            progress.advance()
        if last == structure.count:
            _make_head(stream, str(structure.head), method, store, last)
            progress.advance()
    return store


def _make_layer(
    stream: LayerStream,
    structure: Structure,
    layer: nn.Module,
    index: int,
    method: str,
    store: CandidateStore,
    replay: Replay,
) -> None:
    """Make what a layer lacks, and leave the base's choices in it."""
    prefix, missing = stream.prefix(index), store.missing(index)
    modules = {
        name: layer.get_submodule(name.removeprefix(prefix))
        for gene in store.genes[index]
        for name in gene.names
    }
    if missing:
        stages = stages_of(
            stream, structure.architecture, index, [name.removeprefix(prefix) for name in modules]
        )
        if not store.base:
            stages = [tuple(chain.from_iterable(stages))]  # nothing changes from stage to stage: one run
        made = {spelling: Finished() for spelling in missing}
        wanted = store.wanted(index)
        for stage in stages:
            for group, seen in capture(stream, index, stage, _Seen, replay).items():
                names = [prefix + name for name in group]
                for spelling, finished in made.items():
                    for name in names:
                        if name in wanted[spelling]:
                            _make(finished, name, column_weight(modules[name]), seen, spelling, method)
                present: dict[str, QuantizedWeight | Tensor] = {}
                for finished in made.values():
                    present |= {**finished.weights, **finished.tensors}
                _put(store.base, {name: modules[name] for name in names}, present)
        for spelling, finished in made.items():
            store.save(index, spelling, finished)
    if store.base:
        _put(store.base, modules, store.layer(index))


def _put(
    base: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, QuantizedWeight | Tensor],
) -> None:
    """Give linears the values that the base's choice for them stands for."""
    for name, module in modules.items():
        spelling = base.get(name, KEPT)
        if spelling == KEPT:
            continue
        candidate = candidates[candidate_key(name, spelling)]
        device = column_weight(module).device
        if isinstance(candidate, Tensor):
            set_column_weight(module, gguf_decode(candidate, spelling).to(device))
        else:
            set_column_weight(module, dequantize_groupwise(candidate.to(device)))


def _make_embedding(stream: LayerStream, store: CandidateStore) -> None:
    """Round the embedding to nearest, which no text weighs."""
    for gene in store.genes.get(EMBEDDING, ()):
        (name,) = gene.names
        table = stream.weights.get(f"{name}.weight").float()
        seen = _Seen(table.shape[1])
        for spelling in store.missing(EMBEDDING):
            finished = Finished()
            _make(finished, name, table, seen, spelling, "rtn")
            store.save(EMBEDDING, spelling, finished)


def _make_head(stream: LayerStream, head: str, method: str, store: CandidateStore, index: int) -> None:
    from qkern.calibration import filled

    module = stream.model.get_submodule(head)
    seen = _Seen(module.in_features, stream.device)
    stream.watch_head(seen.add)
    with filled(module, stream.weights, prefix=f"{head}.", dtype=torch.float32, device=stream.device):
        for spelling in store.missing(index):
            finished = Finished()
            _make(finished, head, column_weight(module), seen, spelling, method, is_head=True)
            store.save(index, spelling, finished)


def _make(
    finished: Finished,
    name: str,
    weight: Tensor,
    seen: _Seen,
    spelling: str,
    method: str,
    *,
    is_head: bool = False,
) -> None:
    """Quantize a matrix in one allele, as `qkern.quantize` or `qkern.export_gguf` will."""
    choice = parse_choice(spelling)
    started = time.monotonic()
    key = candidate_key(name, spelling)
    try:
        if isinstance(choice, GGUFType):
            finished.tensors[key], error, notes = _encoded(weight, seen, choice, method, is_head=is_head)
        else:
            assert choice is not None
            finished.weights[key], error, notes = _quantized(weight, seen, choice, method)
    except InputError as refused:
        raise InputError(f"{name}: {refused}") from None
    for note in notes:
        logger.warning("%s in %s: %s", name, spelling, note)
    finished.records[name] = LayerRecord(
        scheme=spelling, error=error, notes=notes, seconds=time.monotonic() - started
    )


def _quantized(
    weight: Tensor, seen: _Seen, scheme: Scheme, method: str
) -> tuple[QuantizedWeight, float, tuple[str, ...]]:
    grid = scheme.weight_only()
    by_gptq = method == "gptq"
    if by_gptq and seen.tokens:
        result = quantize_gptq(weight, seen.value, grid, GPTQConfig())
        weight_, error, notes = result.weight, result.error, result.notes
    else:
        # `quantize` rounds an expert that no token reaches by GPTQ's search for scales.
        weight_, notes = quantize_rtn(weight, grid, search="mse" if by_gptq else None), ()
        error = output_error(weight, weight_, _moments(seen))
    return replace(weight_.to("cpu"), scheme=scheme), error, notes


def _encoded(
    weight: Tensor, seen: _Seen, kind: GGUFType, method: str, *, is_head: bool
) -> tuple[Tensor, float, tuple[str, ...]]:
    importance: Tensor | None = seen.importance
    if method == "gptq":
        if kind.block > 1 and not is_head:
            result = quantize_gptq_gguf(weight, seen.value, kind.name)
            return result.blocks, result.error, result.notes
        importance = seen.diagonal.cpu()
    elif is_head:
        importance = None
    blocks = gguf_encode(weight.cpu(), kind.name, importance=importance if seen.tokens else None)
    return blocks, gguf_output_error(weight, blocks, kind.name, _moments(seen)), ()


def _moments(seen: _Seen) -> Tensor:
    """Second moments of what was seen; without any the error is that of the weights."""
    if seen.tokens:
        return seen.value
    return torch.eye(len(seen.value), dtype=seen.value.dtype, device=seen.value.device)
