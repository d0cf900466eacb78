"""KL of genomes layer by layer, against whole models with the same layers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from qkern.evaluation import kl_divergence, perplexity
from qkern.models import column_weight, describe
from qkern.nn import QuantLinear, compute_mode
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.search import EMBEDDING, ORIGINAL, RUNTIMES, Evaluator, Space, candidate_key, make_space


@pytest.fixture(autouse=True)
def uneven_chunks(monkeypatch):
    # Two sequences at a time and a last chunk of one.
    monkeypatch.setattr("qkern.search.evaluator._CHUNK_TOKENS", 48)


def whole(model, space, candidates, genome):
    """Return the model with a genome's layers on qkern's kernels."""
    changed = copy.deepcopy(model)
    for gene, allele in zip(space.genes, genome, strict=True):
        if allele == ORIGINAL or gene.alleles[allele] == "16":
            continue
        packed = candidates.layer(gene.layer)
        for name in gene.names:
            parent, _, leaf = name.rpartition(".")
            linear = changed.get_submodule(name)
            made = QuantLinear.from_quantized(packed[candidate_key(name, gene.alleles[allele])], linear.bias)
            setattr(changed.get_submodule(parent), leaf, made)
    return changed


def expected_kl(model, space, candidates, genome, ids, compute="float"):
    changed = whole(model, space, candidates, genome)
    found = kl_divergence(
        model, changed, ids.flatten(), window=ids.shape[1], allow_short=True, compute=compute
    )
    return float(found.mean())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "mixtral"])
def test_kl_is_that_of_the_whole_model(tiny, problem, ids, model_type):
    model = tiny(model_type).eval()
    stream, space, candidates = problem(model, ("w2g16", "w4g32", "16"))
    evaluator = Evaluator(stream, space, candidates, ids)
    rng = np.random.default_rng(0)
    genomes = [tuple(int(a) for a in rng.integers(-1, 3, size=len(space))) for _ in range(4)]
    genomes += [(ORIGINAL,) * len(space), *space.ends()]
    found = evaluator.kl(genomes)
    for genome, kl in zip(genomes, found, strict=True):
        assert kl == pytest.approx(expected_kl(model, space, candidates, genome, ids), rel=1e-3, abs=1e-8)
    assert found[4] == found[6] == 0  # left as it is, and the largest allele, which is the original
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    assert not any(isinstance(module, QuantLinear) for module in stream.model.modules())


def test_simulated_and_real_agree(tiny, problem, ids):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model)
    genomes = [space.uniform("w2g16"), tuple(index % 3 for index in range(len(space)))]
    real = Evaluator(stream, space, candidates, ids).kl(genomes)
    simulated = Evaluator(stream, space, candidates, ids, simulate=True).kl(genomes)
    assert simulated == pytest.approx(real, rel=1e-4)
    dense = copy.deepcopy(model)
    for gene in space.genes:
        (name,) = gene.names
        packed = candidates.layer(gene.layer)[candidate_key(name, "w2g16")]
        column_weight(dense.get_submodule(name)).copy_(dequantize_groupwise(packed))
    with torch.no_grad():
        one = dense(input_ids=ids).logits
        changed = whole(model, space, candidates, genomes[0])
        with compute_mode(changed, "float"):
            other = changed(input_ids=ids).logits
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


def test_the_head_is_a_gene_too(tiny, problem, ids):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model, head=True)
    assert space.genes[-1].names == ("lm_head",)
    evaluator = Evaluator(stream, space, candidates, ids)
    genomes = [(ORIGINAL,) * (len(space) - 1) + (0,), (1,) * (len(space) - 1) + (2,), (1,) * len(space)]
    for genome, kl in zip(genomes, evaluator.kl(genomes), strict=True):
        assert kl == pytest.approx(expected_kl(model, space, candidates, genome, ids), rel=1e-3)


def test_int8_activations_are_run(tiny, problem, ids):
    model = tiny("llama").eval()
    found = {}
    for allele, compute in (("w4g32", "float"), ("w4g32a8", "int8")):
        stream, space, candidates = problem(model, (allele,))
        genome = space.uniform(allele)
        (found[allele],) = Evaluator(stream, space, candidates, ids).kl([genome])
        expected = expected_kl(model, space, candidates, genome, ids, compute=compute)
        assert found[allele] == pytest.approx(expected, rel=1e-3)
        (simulated,) = Evaluator(stream, space, candidates, ids, simulate=True).kl([genome])
        assert simulated == pytest.approx(found[allele], rel=1e-3)
    assert found["w4g32"] != pytest.approx(found["w4g32a8"], rel=1e-3)


def test_portions_and_first_chunks(tiny, problem, ids):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model)
    evaluator = Evaluator(stream, space, candidates, ids)
    assert evaluator.chunks == [48, 48, 24]
    rng = np.random.default_rng(0)
    genomes = [tuple(int(a) for a in rng.integers(0, 3, size=len(space))) for _ in range(5)]
    at_once = evaluator.kl(genomes)
    small = Evaluator(stream, space, candidates, ids, states=1, kept=0)
    candidates.asked.clear()
    assert small.kl(genomes) == at_once
    assert candidates.asked.count(0) == 5
    first = evaluator.kl(genomes, slice(2))
    rest = evaluator.kl(genomes, slice(2, None))
    assert first == pytest.approx(
        [expected_kl(model, space, candidates, genome, ids[:4]) for genome in genomes], rel=1e-3
    )
    assert [(96 * one + 24 * other) / 120 for one, other in zip(first, rest, strict=True)] == pytest.approx(
        at_once, rel=1e-6
    )


@pytest.mark.parametrize("kept", [0, 60000, 70000, 1 << 29])
def test_states_of_earlier_calls_are_kept(tiny, problem, ids, monkeypatch, kept):
    stream, space, candidates = problem(tiny("llama").eval())
    runs = []
    through = stream.through
    monkeypatch.setattr(stream, "through", lambda index, states: runs.append(index) or through(index, states))
    evaluator = Evaluator(stream, space, candidates, ids, kept=kept)
    genome = (0,) * len(space)
    changed = (*genome[:-1], 1)  # in the last layer
    found = [evaluator.kl([one], chunks) for chunks in (slice(2), slice(None)) for one in (genome, changed)]
    fresh = Evaluator(stream, space, candidates, ids, kept=0)
    runs.clear()
    again = [fresh.kl([one], chunks) for chunks in (slice(2), slice(None)) for one in (genome, changed)]
    assert found == again
    assert runs == 2 * [0, 0, 1, 1] + 2 * [0, 0, 0, 1, 1, 1]
    runs.clear()
    evaluator.kl([changed])
    evaluator.kl([genome])
    # Of 64 fp32 features; 5 sequences of 24 tokens are 30720 bytes a layer. The first was dropped by 70000.
    again = 2 * [0, 0, 0, 1, 1, 1]
    assert runs == {0: again, 60000: again, 70000: [1, 1, 1]}.get(kept, [])
    assert evaluator._kept._bytes <= kept


def test_an_interrupted_call_leaves_the_layer_as_it_was(tiny, problem, ids, monkeypatch):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model)
    first, second, *rest = space.genes  # of q_proj and k_proj
    names = (*first.names, *second.names)
    tied = Space((replace(first, names=names, weights=first.weights + second.weights), *rest))
    evaluator = Evaluator(stream, tied, candidates, ids)
    make = evaluator._module

    def fail_at_the_second(linear, *arguments):
        if linear is stream.layers[0].get_submodule("self_attn.k_proj"):
            raise MemoryError("no memory")
        return make(linear, *arguments)

    monkeypatch.setattr(evaluator, "_module", fail_at_the_second)
    with pytest.raises(MemoryError, match="no memory"):
        evaluator.kl([(0,) * len(tied)])
    assert not any(isinstance(module, QuantLinear) for module in stream.model.modules())
    assert evaluator.kl([(ORIGINAL,) * len(tied)]) == [0.0]


def test_the_likeliest_tokens_alone(tiny, problem, ids):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model)
    genome = space.uniform("w2g16")
    (full,) = Evaluator(stream, space, candidates, ids).kl([genome])
    found = {k: Evaluator(stream, space, candidates, ids, top_k=k).kl([genome])[0] for k in (1, 8, 96, 500)}
    # Merging outcomes loses information and never adds any.
    assert 0 < found[1] < found[8] < full
    assert found[96] == pytest.approx(full, rel=1e-3) == found[500]
    changed = whole(model, space, candidates, genome)
    with torch.no_grad(), compute_mode(changed, "float"):
        p, q = (m(input_ids=ids).logits.double().softmax(-1).flatten(0, 1) for m in (model, changed))
    top = p.topk(8).indices
    p, q = (torch.cat([d.gather(-1, top), 1 - d.gather(-1, top).sum(-1, keepdim=True)], -1) for d in (p, q))
    assert found[8] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_perplexity_is_that_of_the_whole_model(tiny, problem, ids):
    model = tiny("llama").eval()
    stream, space, candidates = problem(model, head=True)
    genomes = [(ORIGINAL,) * len(space), (0,) * len(space)]
    found = Evaluator(stream, space, candidates, ids).perplexity(genomes)
    expected = [
        perplexity(whole(model, space, candidates, genome), ids.flatten(), window=ids.shape[1])
        for genome in genomes
    ]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_embedding_is_a_gene_too(tiny, problem, ids, model_type):
    model = tiny(model_type).eval()
    stream, _, _ = problem(model)
    structure = describe(model)
    assert structure.tied == (model_type != "llama")
    alleles = ("q4_0", "q8_0")
    space, _ = make_space(model, structure, RUNTIMES["gguf"], alleles, embedding=True)
    assert space.genes[0].layer == EMBEDDING
    (name,) = space.genes[0].names
    assert model.get_submodule(name) is model.get_input_embeddings()

    class Encoded:
        def layer(self, index):
            return {
                candidate_key(name, kind): gguf_encode(column_weight(model.get_submodule(name)), kind)
                for gene in space.genes
                if gene.layer == index
                for name in gene.names
                for kind in gene.alleles
            }

    evaluator = Evaluator(stream, space, Encoded(), ids)
    rest = len(space) - 1
    genomes = [
        (0,) + (ORIGINAL,) * rest,
        (1,) * (1 + rest),
        (ORIGINAL,) + (1,) * rest,
        (ORIGINAL,) * (1 + rest),
    ]
    found = evaluator.kl(genomes)
    assert found[3] == 0 < found[1] < found[0]
    for genome, kl in zip(genomes, found, strict=True):
        dense = copy.deepcopy(model)
        for gene, allele in zip(space.genes, genome, strict=True):
            for name in gene.names if allele != ORIGINAL else ():
                weight = column_weight(dense.get_submodule(name))  # tied, the head's too
                weight.copy_(gguf_decode(gguf_encode(weight, gene.alleles[allele]), gene.alleles[allele]))
        expected = kl_divergence(model, dense, ids.flatten(), window=ids.shape[1], allow_short=True)
        assert kl == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-8)
    assert evaluator.kl(genomes, slice(1, 2)) != found
    assert model.get_input_embeddings() is not stream.model.get_input_embeddings()
    assert all(parameter.is_meta for parameter in stream.model.parameters())
