"""Tiny models with every candidate of every linear."""

import pytest
import torch

from qkern.calibration import LayerStream, Weights, meta_copy
from qkern.models import column_weight, describe
from qkern.nn import named_linears
from qkern.quantizers import quantize_rtn
from qkern.schemes import Scheme
from qkern.search import Gene, Space, candidate_key

ALLELES = ("w2g16", "w4g32", "w8")


def weights_of(model):
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return Weights(tensors, {name: name for name in tensors}, "the model")


class Rounded:
    """Candidates in memory, rounded to nearest."""

    def __init__(self, model, space):
        self.model, self.space, self.asked = model, space, []

    def layer(self, index):
        self.asked.append(index)
        return {
            candidate_key(name, allele): quantize_rtn(column_weight(self.model.get_submodule(name)), allele)
            for gene in self.space.genes
            if gene.layer == index
            for name in gene.names
            for allele in gene.alleles
            if allele != "16"
        }


@pytest.fixture
def problem():
    """Return a function from a model to its stream, space and candidates."""

    def make(model, alleles=ALLELES, head=False):
        structure = describe(model)
        genes = []
        for name, module in named_linears(model).items():
            inside = name.startswith(f"{structure.layers}.")
            if not inside and not (head and name == structure.head):
                continue
            N, K = column_weight(module).shape
            sizes = [16 * N * K if a == "16" else _bits(Scheme.parse(a), N, K) for a in alleles]
            layer = (
                int(name.removeprefix(f"{structure.layers}.").split(".")[0]) if inside else structure.count
            )
            genes.append(
                Gene(names=(name,), layer=layer, weights=N * K, alleles=tuple(alleles), bits=tuple(sizes))
            )
        space = Space(tuple(genes))
        stream = LayerStream(meta_copy(model), structure.layers, weights_of(model), head=structure.head)
        return stream, space, Rounded(model, space)

    return make


def _bits(scheme, N, K):
    return N * K * scheme.bits + 16 * N * scheme.num_groups(K)


@pytest.fixture
def ids():
    return torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
