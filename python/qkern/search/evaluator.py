"""KL of whole genomes, all of them one decoder layer at a time, so that a large model never is in memory."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn

from qkern.evaluation.kl import divergence, with_rest
from qkern.nn import QuantLinear
from qkern.ops import dequant_matmul, dequantize_groupwise, gguf_decode
from qkern.search.assignment import KEPT
from qkern.search.space import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from qkern.calibration import LayerStream
    from qkern.schemes import QuantizedWeight
    from qkern.search.space import Gene, Genome, Space

__all__ = ["ORIGINAL", "Candidates", "Evaluator", "candidate_key"]

ORIGINAL: Final = -1
"""Allele of a gene that is left as it is, whether or not the runtime could load that."""
# Rows of logits that are compared at a time: bounds the scratch to a few times 256 * V * 4 bytes.
_ROWS: Final = 256
# Tokens of a chunk: what a stage of a search can be made of, and still enough for the kernels.
_CHUNK_TOKENS: Final = 1024
# Bytes up to which the original's probabilities are kept: those of all of the text, or none.
_EXPECTED: Final = 1 << 28


def candidate_key(name: str, spelling: str) -> str:
    """Key of a tensor's candidate in `Candidates`."""
    return f"{name}@{spelling}"


class Candidates(Protocol):
    """Quantized tensors, packed, by layer."""

    def layer(self, index: int) -> Mapping[str, QuantizedWeight | Tensor]:
        """Candidates of a layer by `candidate_key`; a tensor is uint8 ``[N, row bytes]`` of a GGUF type."""
        ...


class Evaluator:
    """Scores genomes by KL(original || genome) over the calibration tokens.

    All genomes of a call go through a layer before any goes on to the next one, and genomes that agree up
    to a layer share their states up to it, those of the latest calls included. So changing one gene costs
    the layers from there on alone.

    Parameters
    ----------
    stream : LayerStream
        Of the original model.
    space : Space
        The genes.
    candidates : Candidates
        What the alleles stand for.
    ids : Tensor
        int64 ``[S, T]``.
    top_k : int, optional
        Compare the probabilities of the original's likeliest tokens, and all others as one; default: of all.
    simulate : bool
        Put the dequantized weights into the model's own linears, instead of running the codes on qkern's
        kernels.
    states : int
        Bytes of hidden states that may be alive in a call; genomes are taken in portions to fit.
    kept : int
        Bytes of hidden states that are kept from call to call beside them, the latest. None are if those of
        one genome are more: they would be gone before they are asked for.
    """

    def __init__(
        self,
        stream: LayerStream,
        space: Space,
        candidates: Candidates,
        ids: Tensor,
        *,
        top_k: int | None = None,
        simulate: bool = False,
        states: int = 2 << 30,
        kept: int = 1 << 29,
    ) -> None:
        self.stream = stream
        self.top_k = top_k
        self.space = space
        self.candidates = candidates
        self.simulate = simulate
        self._limit = states
        self._kept = _Latest(0)
        self._ids = ids
        self._first = self._embedded()
        self._sizes = [len(state) for state in stream.states]
        self.chunks = [size * ids.shape[1] for size in self._sizes]
        """Tokens of each chunk of sequences that `kl` can be asked for."""
        count = len(stream.layers)
        # Genes come in the order of the layers: where those of a layer end.
        self._ends = [sum(gene.layer <= index for gene in space.genes) for index in range(count + 1)]
        original = (ORIGINAL,) * len(space)
        self._expected: dict[tuple[int, int, int], Tensor] = {}
        self._reference = self._walk([original])[original[: self._ends[-2]]]
        if count * sum(state.nbytes for state in self._reference) <= kept:
            self._kept = _Latest(kept)

    def kl(self, genomes: Sequence[Genome], chunks: slice = slice(None)) -> list[float]:
        """KL of each genome in nats, over some chunks of sequences."""
        expected = self._reference[chunks]
        result: list[float] = []
        for some in self._portions(genomes, expected):
            result += self._compare(some, self._walk(some, chunks), chunks)
        return result

    def _portions(self, genomes: Sequence[Genome], states: list[Tensor]) -> Iterator[Sequence[Genome]]:
        """Cut genomes into portions whose states fit the limit, in and out of a layer."""
        count = max(1, self._limit // (2 * sum(state.nbytes for state in states)))
        for start in range(0, len(genomes), count):
            yield genomes[start : start + count]

    def _embedded(self) -> dict[Genome, list[Tensor]]:
        """Compute what the first layer receives, by allele of the embedding if that is a gene."""
        stream = self.stream
        first: dict[Genome, list[Tensor]] = {}
        for gene in self._genes(EMBEDDING):
            (name,) = gene.names
            embedding = stream.model.get_submodule(name)
            for allele in range(len(gene.alleles)):
                make = self._maker(EMBEDDING, {name: embedding})
                _set_submodule(stream.model, name, make(gene, name, allele))
                try:
                    stream.embed(self._ids, tokens=_CHUNK_TOKENS)
                finally:
                    _set_submodule(stream.model, name, embedding)
                first[allele,] = stream.states
        stream.embed(self._ids, tokens=_CHUNK_TOKENS)
        first[(ORIGINAL,) * len(self._genes(EMBEDDING))] = stream.states
        return first

    @torch.no_grad()
    def _walk(self, genomes: Sequence[Genome], chunks: slice = slice(None)) -> dict[Genome, list[Tensor]]:
        """Return the outputs of the last layer by genome without the head's genes."""
        states = {prefix: first[chunks] for prefix, first in self._first.items()}
        numbers = range(len(self._sizes))[chunks]
        done = len(self._genes(EMBEDDING))
        for index, end in enumerate(self._ends[:-1]):
            with self.stream.layer(index) as layer, self._places(layer, index) as place:
                after: dict[Genome, list[Tensor]] = {}
                # In order, so that neighbours differ little.
                for prefix in sorted({genome[:end] for genome in genomes}):
                    after[prefix] = []
                    for number, state in zip(numbers, states[prefix[:done]], strict=True):
                        key = index, prefix, number
                        output = self._kept.get(key)
                        if output is None:
                            place(prefix[done:])
                            (output,) = self.stream.through(index, [state])
                        self._kept.put(key, output)
                        after[prefix].append(output)
            states, done = after, end
        return states

    @contextmanager
    def _places(self, layer: nn.Module, index: int) -> Iterator[Callable[[Sequence[int]], None]]:
        """Give what puts alleles of a layer's genes in their places; all is as before at the end."""
        prefix = self.stream.prefix(index)
        genes = self._genes(index)
        make = self._maker(
            index, {full: layer.get_submodule(full.removeprefix(prefix)) for full in _names(genes)}
        )

        placed: list[int | None] = [ORIGINAL] * len(genes)

        def place(alleles: Sequence[int]) -> None:
            for number, (gene, allele) in enumerate(zip(genes, alleles, strict=True)):
                if placed[number] == allele:
                    continue
                placed[number] = None  # until all of them are
                for full in gene.names:
                    _set_submodule(layer, full.removeprefix(prefix), make(gene, full, allele))
                placed[number] = allele

        try:
            yield place
        finally:
            place([ORIGINAL] * len(genes))

    def _genes(self, index: int) -> list[Gene]:
        return [gene for gene in self.space.genes if gene.layer == index]

    def _maker(self, index: int, linears: Mapping[str, nn.Module]) -> Callable[[Gene, str, int], nn.Module]:
        """Return what makes the module of an allele, once each."""
        packed = self.candidates.layer(index) if linears else {}
        made: dict[str, nn.Module] = {}

        def make(gene: Gene, full: str, allele: int) -> nn.Module:
            spelling = KEPT if allele == ORIGINAL else gene.alleles[allele]
            if spelling == KEPT:
                return linears[full]
            key = candidate_key(full, spelling)
            if key not in made:
                made[key] = self._module(linears[full], packed[key], spelling)
            return made[key]

        return make

    def _module(self, linear: Any, candidate: QuantizedWeight | Tensor, spelling: str) -> nn.Module:
        device = self.stream.device
        if isinstance(candidate, Tensor):
            return _dense(linear, gguf_decode(candidate, spelling).to(device))
        if self.simulate and candidate.scheme.act_bits is None:
            return _dense(linear, dequantize_groupwise(candidate.to(device)))
        if self.simulate:
            return _Simulated(linear, candidate.to(device))
        made = QuantLinear.from_quantized(candidate.to(device), linear.bias)
        made.compute = "int8" if candidate.scheme.act_bits else "float"
        return made

    def perplexity(self, genomes: Sequence[Genome]) -> list[float]:
        """Perplexity of each genome, sequences being the windows of `qkern.evaluation.perplexity`."""
        return [one for some in self._portions(genomes, self._reference) for one in self._perplexity(some)]

    def _perplexity(self, genomes: Sequence[Genome]) -> list[float]:
        outputs, last = self._walk(genomes), self._ends[-2]
        chunks = torch.split(self._ids, self._sizes)
        sums = dict.fromkeys(genomes, 0.0)
        with self._ending() as through:
            for chunk, sequences in enumerate(chunks):
                for sequence, ids in enumerate(sequences):
                    # The first half is context, the last token has no next one.
                    for start in range(len(ids) // 2, len(ids) - 1, _ROWS):
                        some = slice(start, min(start + _ROWS, len(ids) - 1))
                        following = ids[some.start + 1 : some.stop + 1, None].to(self.stream.device)
                        for genome in sums:
                            logs = through(outputs[genome[:last]][chunk][sequence, some], genome)
                            sums[genome] -= float(logs.gather(1, following).double().sum())
        count = len(self._ids) * (self._ids.shape[1] - self._ids.shape[1] // 2 - 1)
        return [math.exp(sums[genome] / count) for genome in genomes]

    def _compare(
        self, genomes: Sequence[Genome], outputs: dict[Genome, list[Tensor]], chunks: slice
    ) -> list[float]:
        """KL of genomes from the outputs of the last layer, over some chunks."""
        last = self._ends[-2]
        left = [ORIGINAL] * len(self.space)
        sums = dict.fromkeys(genomes, 0.0)
        positions = 0
        with self._ending() as through:
            for chunk, number in enumerate(range(len(self._sizes))[chunks]):
                original = self._reference[number]
                # Rows are cut inside sequences, so that none exceeds the model's context.
                for sequence, start in product(range(len(original)), range(0, original.shape[1], _ROWS)):
                    some = slice(start, start + _ROWS)
                    p = self._expected.get((number, sequence, start))
                    if p is None:
                        p = through(original[sequence, some], left)
                        if self._ids.numel() * p[0].nbytes <= _EXPECTED:
                            self._expected[number, sequence, start] = p
                    top = None if self.top_k is None else p.topk(min(self.top_k, p.shape[-1])).indices
                    if top is not None:
                        p = with_rest(p.gather(-1, top))
                    positions += len(p)
                    for genome in sums:
                        q = through(outputs[genome[:last]][chunk][sequence, some], genome)
                        if top is not None:
                            q = with_rest(q.gather(-1, top))
                        sums[genome] += float(divergence(p, q).sum())
        return [sums[genome] / positions for genome in genomes]

    @contextmanager
    def _ending(self) -> Iterator[Callable[[Tensor, Sequence[int]], Tensor]]:
        """Give what goes from outputs of the last layer and a genome's head to log-probabilities."""
        stream, name = self.stream, str(self.stream.head)
        head = stream.model.get_submodule(name)
        # A tied head is the embedding, and so is its gene, unless the runtime holds a head of its own.
        layer = len(stream.layers)
        if not self._genes(layer) and head.weight is stream.model.get_input_embeddings().weight:
            layer = EMBEDDING
        places = [place for place, gene in enumerate(self.space.genes) if gene.layer == layer]
        with stream.ending() as logits:
            make = self._maker(layer, dict.fromkeys(_names(self._genes(layer)), head))

            @torch.no_grad()
            def through(rows: Tensor, genome: Sequence[int]) -> Tensor:
                for place in places:
                    gene = self.space.genes[place]
                    _set_submodule(stream.model, name, make(gene, gene.names[0], genome[place]))
                return torch.log_softmax(logits(rows), -1)

            try:
                yield through
            finally:
                _set_submodule(stream.model, name, head)


class _Latest:
    """Tensors that were asked for last, up to some bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._found: dict[Hashable, Tensor] = {}  # the latest last

    def get(self, key: Hashable) -> Tensor | None:
        return self._found.get(key)

    def put(self, key: Hashable, value: Tensor) -> None:
        """Make a tensor the latest, and drop the others that are too many."""
        if self._found.pop(key, None) is None:
            self._bytes += value.nbytes
        self._found[key] = value
        while self._bytes > self._limit:
            self._bytes -= self._found.pop(next(iter(self._found))).nbytes


def _set_submodule(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)


def _names(genes: Sequence[Gene]) -> list[str]:
    return [name for gene in genes for name in gene.names]


def _dense(module: Any, weight: Tensor) -> nn.Module:
    """Give a linear, or an embedding with all that it does beside, another weight ``[N, K]``."""
    if not isinstance(module, nn.Embedding):
        return _Dense(module, weight)
    made = copy.copy(module)
    made._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    return made


class _Simulated(nn.Module):
    """A linear with int8 activations, in plain torch."""

    def __init__(self, linear: Any, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return dequant_matmul(x, self.weight, self.bias, compute="int8", backend="reference")


class _Dense(nn.Module):
    """A linear with another weight ``[N, K]`` and its own bias."""

    def __init__(self, linear: Any, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
