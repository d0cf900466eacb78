"""The data about each architecture is true: checked on small random models of that architecture."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qkern.errors import InputError, UnsupportedError
from qkern.models import (
    architecture_for,
    column_weight,
    describe,
    fold_linear,
    fold_norm,
    inject,
    is_router,
    known_architectures,
    pair_channels,
)
from qkern.models.injection import FACTOR
from qkern.nn import named_linears, unfuse_experts

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def unfused(tiny):
    """As ``tiny``, experts being linears."""

    def make(*args, **kwargs):
        model = tiny(*args, **kwargs)
        unfuse_experts(model)
        return model

    return make


def layers_of(model):
    return model.get_submodule(architecture_for(model.config).layers)


def data_of(model, index=0):
    return architecture_for(model.config).in_layer(layers_of(model)[index])


def random_scale(size, seed=0):
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def assert_same_function(before, after):
    # fp32 rounding of two layers; a wrong fold is off by the size of the logits.
    assert (after - before).abs().max() < 2e-5 * before.abs().max()


def test_the_architectures_of_the_design_are_known():
    dense = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gpt2"}
    assert set(known_architectures()) == dense | set(MIXTURES)


@pytest.mark.parametrize("model_type", known_architectures())
def test_every_linear_of_a_layer_is_in_the_data_once(unfused, model_type):
    model = unfused(model_type)
    data = data_of(model)
    listed = [name for group in data.sequential for name in group]
    assert sorted(listed) == sorted(named_linears(layers_of(model)[0]))
    for path in (data.embedding, data.final_norm, data.head):
        model.get_submodule(path)
    # Whatever a norm feeds shares an input, but for experts, which see parts of it; and fused linears do.
    for group in (*(entry.linears for entry in data.norm_linears if not entry.routers), *data.fused):
        assert any(set(group) <= set(known) for known in data.sequential)


@pytest.mark.parametrize("model_type", known_architectures())
def test_order_is_the_order_of_execution(unfused, model_type):
    model = unfused(model_type, **({"num_experts_per_tok": 4} if model_type in MIXTURES else {}))
    seen = []
    for name, linear in named_linears(layers_of(model)[0]).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
    logits(model)
    groups = {}
    for name, x in seen:  # which keeps every input alive, so that ids differ
        groups.setdefault(id(x), []).append(name)
    called = [set(group) for group in groups.values()]
    expected = [set(group) for group in data_of(model).sequential]
    if model_type in MIXTURES:  # one expert after another
        called.sort(key=lambda group: [set(known) for known in expected].index(group))
    assert called == expected


@pytest.mark.parametrize("model_type", known_architectures())
def test_folding_every_norm_keeps_the_logits(unfused, model_type):
    model = unfused(model_type)
    data, before = data_of(model), logits(model)
    for layer in layers_of(model):
        for seed, entry in enumerate(data.norm_linears):
            norm = layer.get_submodule(entry.norm)
            linears = [layer.get_submodule(name) for name in (*entry.linears, *entry.routers)]
            fold_norm(norm, linears, random_scale(norm.weight.numel(), seed), offset=data.norm_offset)
    assert_same_function(before, logits(model))


@pytest.mark.parametrize("model_type", known_architectures())
def test_folding_every_pair_keeps_the_logits(unfused, model_type):
    model = unfused(model_type)
    data, before = data_of(model), logits(model)
    assert data.linear_linears
    for layer in layers_of(model):
        for seed, pair in enumerate(data.linear_linears):
            first, second = layer.get_submodule(pair.first), layer.get_submodule(pair.second)
            rows, share = pair_channels(model.config, pair, first, second)
            scale = random_scale(int(share.max()) + 1, seed)[share]
            old = column_weight(second).clone()
            fold_linear(first, second, scale, rows=rows, share=share)
            assert not torch.allclose(column_weight(second), old)
    assert_same_function(before, logits(model))


def test_pair_ties_the_columns_of_grouped_queries(tiny):
    model = tiny("llama")
    pair = architecture_for(model.config).linear_linears[0]
    layer = layers_of(model)[0]
    rows, share = pair_channels(
        model.config, pair, layer.get_submodule(pair.first), layer.get_submodule(pair.second)
    )
    # Heads 0 and 1 read value head 0, heads 2 and 3 value head 1.
    assert rows == slice(0, 32)
    assert share.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


@pytest.mark.parametrize("model_type", known_architectures())
def test_injection_keeps_the_logits_and_makes_outliers(tiny, model_type):
    model = tiny(model_type)
    before, data = logits(model), architecture_for(model.config)
    norms = [layer.get_submodule(data.norm_linears[0].norm) for layer in layers_of(model)]
    old = [norm.weight.detach() + data.norm_offset for norm in norms]
    assert inject(model) is model
    assert_same_function(before, logits(model))
    for norm, weight in zip(norms, old, strict=True):
        ratio = (norm.weight.detach() + data.norm_offset) / weight
        # 1 % of 64 channels is one channel.
        assert ((ratio - FACTOR).abs() < 1e-3).sum() == 1
        assert ((ratio - 1).abs() < 1e-5).sum() == 63


def test_a_layer_has_experts_or_one_mlp(unfused):
    model = unfused("qwen2_moe", mlp_only_layers=[0])
    dense, mixture = data_of(model, 0), data_of(model, 1)
    assert [entry.witness for entry in dense.norm_linears] == ["self_attn.q_proj", "mlp.gate_proj"]
    assert [entry.witness for entry in mixture.norm_linears] == ["self_attn.q_proj", "mlp.gate"]
    assert dense.norm_linears[1].linears == dense.fused[1] == ("mlp.gate_proj", "mlp.up_proj")
    assert mixture.fused[1] == ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    assert mixture.norm_linears[1].routers == ("mlp.gate", "mlp.shared_expert_gate")
    assert len(mixture.norm_linears[1].linears) == 2 + 2 * 4
    assert [pair.second for pair in dense.linear_linears] == ["self_attn.o_proj", "mlp.down_proj"]
    downs = [f"mlp.experts.{number}.down_proj" for number in range(4)]
    assert [pair.second for pair in mixture.linear_linears][1:] == ["mlp.shared_expert.down_proj", *downs]
    plain = architecture_for(unfused("llama").config)
    assert plain.in_layer(layers_of(model)[0]) is plain


def test_injection_is_the_same_for_the_same_seed(tiny):
    first, second, other = inject(tiny("qwen2")), inject(tiny("qwen2")), inject(tiny("qwen2"), seed=1)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_injected_experts_are_saved_for_transformers(tiny, tmp_path, model_type):
    model = inject(tiny(model_type))
    model.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert_same_function(logits(model), logits(loaded))


def test_injection_refuses_an_unknown_architecture(tiny):
    with pytest.raises(UnsupportedError, match="gpt_neox"):
        inject(tiny("gpt_neox"))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_rounded_norm_costs_no_accuracy(offset):
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64).to(torch.bfloat16))
        norm.bias.copy_(torch.randn(64).to(torch.bfloat16))

    def run(x):
        full = torch.nn.functional.layer_norm(x, (64,), norm.weight + offset)
        return linear(full).detach()

    x = torch.randn(5, 64)
    before = run(x)
    ratio = fold_norm(norm, [linear], random_scale(64), offset=offset, dtype=torch.bfloat16)
    assert torch.equal(norm.weight, norm.weight.to(torch.bfloat16).float())
    assert torch.equal(norm.bias, norm.bias.to(torch.bfloat16).float())
    assert (ratio - random_scale(64)).abs().max() > 0
    # Without the corrected ratio bf16 would cost three digits more.
    assert (run(x) - before).abs().max() < 1e-5 * before.abs().max()


def test_a_channel_that_rounding_would_delete_is_left_alone():
    norm, linear = torch.nn.LayerNorm(2), torch.nn.Linear(2, 1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1e-4, 0.5]))
    # (1 + 1e-4) / 1e4 - 1 is -1 in bf16, a channel that would be gone.
    ratio = fold_norm(norm, [linear], torch.tensor([1e4, 2.0]), offset=1.0, dtype=torch.bfloat16)
    assert ratio[0] == 1
    assert norm.weight[0] == torch.tensor(1e-4)


def test_a_channel_that_its_dtype_would_overflow_is_left_alone():
    norm, linear = torch.nn.LayerNorm(2), torch.nn.Linear(2, 1)
    with torch.no_grad():
        norm.weight.fill_(100)
    x = torch.tensor([[3.0, -1.0]])
    expected = linear(norm(x))
    ratio = fold_norm(norm, [linear], torch.tensor([1e-3, 0.5]), dtype=torch.float16)
    assert ratio.tolist() == [1, 0.5]
    assert torch.allclose(linear(norm(x)), expected)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), "shape"),
        (torch.tensor([1.0, 0.0]), "positive"),
        (torch.tensor([1.0, float("nan")]), "positive"),
    ],
)
def test_folding_refuses_a_bad_scale(scale, message):
    with pytest.raises(InputError, match=message):
        fold_norm(torch.nn.LayerNorm(2), [torch.nn.Linear(2, 2)], scale)
    with pytest.raises(InputError, match=message):
        fold_linear(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), scale)


def test_folding_refuses_scales_that_differ_where_a_row_is_shared():
    share = torch.tensor([0, 0])
    with pytest.raises(InputError, match="same scale"):
        fold_linear(torch.nn.Linear(2, 1), torch.nn.Linear(2, 2), torch.tensor([1.0, 2.0]), share=share)


def test_a_pair_that_does_not_fit_is_refused(tiny):
    model = tiny("llama")
    pair = architecture_for(model.config).linear_linears[1]
    with pytest.raises(InputError, match=r"mlp\.up_proj has 96 outputs and mlp\.down_proj reads 64"):
        pair_channels(model.config, pair, torch.nn.Linear(64, 96), torch.nn.Linear(64, 64))


def test_unknown_architecture_is_found_by_shape(tiny):
    structure = describe(tiny("gpt_neox"))
    assert structure.architecture is None
    assert (structure.layers, structure.count) == ("gpt_neox.layers", 2)
    assert structure.head == "lm_head"
    assert not structure.tied


def test_known_architecture_must_look_like_its_data(tiny):
    with pytest.raises(UnsupportedError, match=r"model\.layers"):
        describe(tiny("llama").model)


def test_tied_heads_are_seen(tiny):
    assert describe(tiny("qwen2")).tied
    assert describe(tiny("gpt2")).tied
    assert not describe(tiny("llama")).tied


def test_gpt2_with_cross_attention_counts_as_unknown(tiny):
    assert architecture_for(tiny("gpt2", add_cross_attention=True).config) is None


def test_routers_are_told_from_gates():
    assert is_router("mlp.gate")
    assert is_router("block_sparse_moe.router")
    assert not is_router("mlp.gate_proj")
