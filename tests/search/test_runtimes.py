"""What a runtime can load, what that costs, and which linears share a choice."""

import pytest
import torch

from qkern.checkpoints import format_named
from qkern.errors import InputError, UnsupportedError
from qkern.models import column_weight, describe
from qkern.nn import named_linears, unfuse_experts
from qkern.ops import gguf_encode
from qkern.quantizers import quantize_rtn
from qkern.search import RUNTIMES, make_space, runtime_named, stored_bits


@pytest.mark.parametrize("spelling", ["w2g16", "w2g64", "w3g32", "w4g32z", "w8", "w4", "w3z"])
@pytest.mark.parametrize("shape", [(24, 96), (7, 64), (33, 192)])
def test_sizes_are_those_of_what_is_written(spelling, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quantize_rtn(weight, spelling)
    assert stored_bits(spelling, shape) == packed.stored_bits
    if packed.scheme.group_size is None or shape[1] % packed.scheme.group_size == 0:
        tensors = format_named("compressed-tensors").encode("x", packed)
        assert stored_bits(spelling, shape, in_file=True) == 8 * sum(t.nbytes for t in tensors.values())


def test_sizes_of_gguf_types_and_of_what_stays():
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    for kind in ("q2_k", "q3_k", "q4_0", "q8_0"):
        assert stored_bits(kind, (3, 512)) == 8 * gguf_encode(weight, kind).numel()
    assert stored_bits("16", (3, 512)) == 16 * 3 * 512
    assert stored_bits("16", (3, 512), kept=8 * weight.nbytes) == 32 * 3 * 512


def test_matrices_of_a_gene_are_one_tensor_of_a_gguf_and_several_of_a_checkpoint():
    shapes = [(3, 256)] * 5  # 252 bytes of Q2_K each, and tensors are padded to 32
    assert stored_bits("q2_k", *shapes) == 8 * 5 * 3 * 84
    assert stored_bits("q2_k", *shapes, in_file=True) == 8 * 1280
    assert stored_bits("w3g128", *shapes, in_file=True) == 5 * stored_bits("w3g128", shapes[0], in_file=True)


def space_of(model, runtime, *args, **kwargs):
    return make_space(model, describe(model), runtime_named(runtime), *args, **kwargs)


def test_torch_searches_every_linear_by_itself(tiny):
    model = tiny("llama")
    space, kept = space_of(model, "torch", ("w2g16", "w4g32", "16"))
    assert [gene.names for gene in space.genes] == [(n,) for n in named_linears(model) if n != "lm_head"]
    assert kept == {"lm_head": "output head"}
    gene = space.genes[0]
    N, K = column_weight(model.get_submodule(gene.names[0])).shape
    assert gene.alleles == ("w2g16", "w4g32", "16")
    assert gene.bits == (3 * N * K, N * K * 9 // 2, 32 * N * K)  # the model is fp32
    with_head, kept = space_of(model, "torch", ("w2g16",), head=True)
    assert with_head.genes[-1].names == ("lm_head",)
    assert with_head.genes[-1].layer == 2
    assert not kept


def test_vllm_ties_what_it_fuses(tiny):
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    space, _ = space_of(model, "vllm", ("w2g64", "w4g128"))
    names = [tuple(name.rpartition(".")[2] for name in gene.names) for gene in space.genes[:4]]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    for gene in space.genes:
        assert gene.weights == sum(model.get_submodule(name).weight.numel() for name in gene.names)


def test_rules_of_vllm():
    vllm = runtime_named("vllm")
    for scheme in ("w4g128", "w4", "w8g32", "w8"):
        assert vllm.refusal(scheme, 64, 256, format="gptq") is None
    for scheme in ("w3g128", "w2g64", "w4g128z", "w4g256"):
        for format in ("gptq", "gptq_v2"):
            assert "vLLM takes GPTQ with 4 and 8 bits" in vllm.refusal(scheme, 64, 256, format=format)
    assert vllm.refusal("w4g128z", 64, 256, format="awq") is None
    assert vllm.refusal("w3g128", 64, 256) is None
    assert "zero points with 4 and 8 bits alone" in vllm.refusal("w3g128z", 64, 256)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_that_do_the_same_share_a_choice(tiny, model_type):
    model = tiny(model_type, hidden_size=128, intermediate_size=256, moe_intermediate_size=256)
    unfuse_experts(model)
    experts = {name for name in named_linears(model) if name.startswith("model.layers.0.mlp.experts.")}
    assert len(experts) == 4 * 3

    def chosen(runtime, *alleles):
        space, _ = space_of(model, runtime, alleles)
        return [set(gene.names) for gene in space.genes if experts.intersection(gene.names)]

    genes = chosen("torch", "w4g32")
    assert genes == [
        {n for n in experts if n.endswith(part)} for part in ("gate_proj", "up_proj", "down_proj")
    ]
    assert chosen("gguf", "q4_0") == genes
    assert chosen("vllm", "w4g128") == [experts]


def test_what_a_runtime_cannot_load_is_no_allele(tiny):
    model = tiny("llama")  # 64 columns
    with pytest.raises(
        UnsupportedError, match=r"no linear can have w4g32 in runtime vllm: .*multiples of 64 rows"
    ):
        space_of(model, "vllm", ("w4g32", "16"))
    with pytest.raises(UnsupportedError, match="takes GGUF types such as q4_k: got w4"):
        space_of(model, "gguf", ("w4",))
    with pytest.raises(UnsupportedError, match="takes schemes such as w4g128: got q4_k"):
        space_of(model, "torch", ("q4_k",))
    with pytest.raises(InputError, match="not a scheme"):
        space_of(model, "torch", ("w5",))
    with pytest.raises(InputError, match="unknown runtime 'exl3': allowed are torch, vllm, gguf"):
        runtime_named("exl3")
    with pytest.raises(UnsupportedError, match="lm_head is tied"):
        space_of(tiny("qwen2"), "torch", head=True)


def test_an_allele_that_nothing_is_left_of_is_named(tiny):
    model = tiny("llama")  # 64 columns, and 96
    with pytest.raises(
        UnsupportedError, match=r"no linear can have w4g32a8 .* takes as many bits as w4g32; leave it out"
    ):
        space_of(model, "torch", ("w2g16", "w4g32", "w4g32a8"))
    with pytest.raises(InputError, match="there is nothing to choose: got no alleles"):
        space_of(model, "torch", ())


def test_rows_without_super_blocks_get_the_small_types(tiny):
    space, _ = space_of(tiny("llama", hidden_size=64, intermediate_size=256), "gguf")
    by_name = {gene.names[0].rpartition(".")[2]: gene.alleles for gene in space.genes}
    assert by_name["q_proj"] == ("q4_0", "q5_0", "q8_0", "16")
    assert set(by_name["down_proj"]) >= set(RUNTIMES["gguf"].alleles)


def test_the_embedding_of_a_gguf_is_a_gene(tiny):
    model = tiny("qwen2")
    space, kept = space_of(model, "gguf", ("q4_0", "q8_0"), embedding=True)
    first = space.genes[0]
    assert (first.layer, first.names, first.alleles) == (-1, ("model.embed_tokens",), ("q4_0", "q8_0"))
    assert first.bits[1] == 8 * gguf_encode(model.model.embed_tokens.weight.detach(), "q8_0").numel()
    assert not kept  # the head is the embedding
    space, kept = space_of(tiny("llama"), "gguf", ("q4_0",), embedding=True, head=True)
    assert [gene.names for gene in (space.genes[0], space.genes[-1])] == [
        ("model.embed_tokens",),
        ("lm_head",),
    ]
    assert space_of(tiny("llama"), "gguf", ("q4_0",), embedding=True)[1] == {"lm_head": "output head"}
    with pytest.raises(UnsupportedError, match=r"no checkpoint format holds quantized .* got runtime vllm"):
        space_of(model, "vllm", embedding=True)
