"""Fused experts and the same as linears: outputs, memory, names, and what is left as it is."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.evaluation import bpw_linear
from qkern.nn import (
    ExpertPart,
    Experts,
    QuantLinear,
    as_linears,
    compute_mode,
    expert_parameters,
    expert_parts,
    named_linears,
    quant_linears,
    refuse_experts,
    replace_linears,
    unfuse_experts,
)

IDS = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(0))
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
OWNERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("model_type", MIXTURES)
def test_outputs_are_those_of_the_fused_experts(model_type, tiny):
    model = tiny(model_type)
    model.set_experts_implementation("eager")
    expected = logits(model)
    # Whatever implementation is chosen: it is about the fused ones.
    model.set_experts_implementation("grouped_mm")
    assert unfuse_experts(model) == OWNERS
    assert expert_parameters(model) == []
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert unfuse_experts(model) == []


def test_weights_are_views_of_the_fused_ones(tiny):
    model = tiny("mixtral")
    fused = model.model.layers[0].mlp.experts
    gate_up, down = fused.gate_up_proj, fused.down_proj
    unfuse_experts(model)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts[1].up_proj.weight, gate_up[1, 96:])
    down.data[2, 0, 0] = 7.0
    assert experts[2].down_proj.weight[0, 0] == 7.0
    assert experts[2].down_proj.weight.untyped_storage().data_ptr() == down.untyped_storage().data_ptr()
    assert all(parameter.requires_grad for parameter in experts.parameters())


def test_meta_weights_stay_meta(tiny):
    model = tiny("qwen3_moe").to("meta")
    assert unfuse_experts(model) == OWNERS
    experts = model.model.layers[1].mlp.experts
    assert all(parameter.is_meta for parameter in experts.parameters())
    assert experts[3].gate_proj.weight.shape == (48, 64)
    assert (experts[3].gate_proj.out_features, experts[3].gate_proj.in_features) == (48, 64)


def test_only_routed_tokens_reach_an_expert(tiny):
    model = tiny("mixtral")
    unfuse_experts(model)
    experts = model.model.layers[0].mlp.experts
    x, seen = torch.randn(4, 64), {}
    expected = 0.5 * experts[2](x[1])
    for number, expert in enumerate(experts):
        expert.gate_proj.register_forward_pre_hook(lambda _, args, n=number: seen.update({n: args[0]}))
    # 4 is no expert: transformers gives that number to tokens of other devices.
    out = experts(x, torch.tensor([[0, 2], [2, 4], [4, 4], [2, 0]]), torch.full((4, 2), 0.5))
    assert set(seen) == {0, 2}
    assert torch.equal(seen[0], x[[0, 3]])
    assert torch.equal(seen[2], x[[0, 1, 3]])
    assert torch.equal(out[2], torch.zeros(64))
    assert torch.allclose(out[1], expected, atol=1e-6)


def test_gradients_copies_and_pickles(tiny):
    model = tiny("qwen3_moe", num_hidden_layers=1)
    unfuse_experts(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    experts = pickle.loads(pickle.dumps(model.model.layers[0].mlp.experts))
    assert isinstance(experts, Experts)
    model(IDS).logits.sum().backward()
    assert model.model.layers[0].mlp.experts[0].up_proj.weight.grad.abs().sum() > 0


class Fused(nn.Module):
    """Experts as transformers has them, with something changed."""

    def __init__(self, change=None, count=3):
        super().__init__()
        self.change = change
        gate_up, down = torch.randn(count, 32, 12), torch.randn(count, 12, 16)
        if change == "transposed":
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        if change == "ungated":
            self.up_proj = nn.Parameter(gate_up)
        else:
            self.gate_up_proj = nn.Parameter(gate_up)
        self.down_proj = nn.Parameter(down)
        if change == "biased":
            self.gate_up_proj_bias = nn.Parameter(torch.randn(count, 32))
        self.act_fn = (lambda gate, up: gate.tanh() * up) if change == "paired" else nn.GELU()

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for token, (numbers, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for number, share in zip(numbers, shares, strict=True):
                both = self.gate_up_proj[number] @ hidden[token]
                gate, up = (both[::2], both[1::2]) if self.change == "interleaved" else both.chunk(2)
                if self.change == "clamped":
                    up = up.clamp(-7, 7)
                inner = self.act_fn(gate, up) if self.change == "paired" else self.act_fn(gate) * up
                out[token] += share * (self.down_proj[number] @ inner)
        return out


class Model(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.gate = nn.Linear(12, 3)
        self.experts = Fused(*args, **kwargs)


@pytest.mark.parametrize("count", [1, 3])
def test_a_module_is_known_by_what_it_computes(count):
    model = Model(count=count)
    given = torch.randn(5, 12), torch.randint(count, (5, 2)), torch.rand(5, 2)
    expected = model.experts(*given)
    assert unfuse_experts(model) == ["experts"]
    assert torch.allclose(model.experts(*given), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "transposed": r"experts has gate_up_proj \(3, 12, 32\) and down_proj \(3, 16, 12\), not \[E, 2 I, H\]",
    "ungated": "experts has up_proj, down_proj: known are gate_up_proj",
    "biased": "experts has gate_up_proj, down_proj, gate_up_proj_bias: known are",
    "interleaved": "experts computes something else than the weighted sum of",
    "clamped": "experts computes something else than the weighted sum of",
    "paired": "experts computes something else than the weighted sum of",
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_experts_are_refused_by_name(change):
    model = Model(change)
    assert unfuse_experts(model) == []
    with pytest.raises(UnsupportedError, match=REFUSED[change]) as info:
        refuse_experts(model)
    assert "leave them 16-bit with skip=['experts']" in str(info.value)
    refuse_experts(model, skip=["experts"])
    with pytest.raises(UnsupportedError, match="stacks of experts, cannot be quantized"):
        replace_linears(model, "w4g4")
    assert not quant_linears(model)


def test_a_shared_module_is_replaced_everywhere():
    model = nn.ModuleList([Model(), Model()])
    model[1].experts = model[0].experts
    assert unfuse_experts(model) == ["0.experts"]
    assert model[1].experts is model[0].experts
    assert isinstance(model[1].experts, Experts)


def test_skipped_ones_stay(tiny):
    model = tiny("mixtral")
    assert unfuse_experts(model, skip=["layers.0"]) == OWNERS[1:]
    assert expert_parameters(model, skip=["down_proj"]) == [f"{OWNERS[0]}.gate_up_proj"]
    assert unfuse_experts(model, skip=["*.mlp.experts"]) == []


class TestReplaceLinears:
    def test_experts_are_quantized_and_routers_are_not(self, tiny):
        model = tiny("qwen2_moe")
        names = replace_linears(model, "w4g16")
        assert len(names) == 2 * (4 + 3 + 3 * 4)
        assert not any("gate" in name.split(".") or "shared_expert_gate" in name for name in names)
        assert bpw_linear(model, skip=("lm_head", "shared_expert_gate")) == 5.0

    def test_outputs_are_those_of_the_decoded_weights(self, tiny):
        model = tiny("qwen3_moe")
        dense = copy.deepcopy(model)
        unfuse_experts(dense)
        replace_linears(model, "w4g16")
        for name, linear in quant_linears(model).items():
            dense.get_submodule(name).weight.data = linear.dequantize()
        with compute_mode(model, "float"):
            assert torch.allclose(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
            assert torch.equal(
                logits(model), logits(model)
            )  # gate and up as one call, now that they are packed

    def test_skipped_experts_stay_fused(self, tiny):
        model = tiny("mixtral")
        assert len(replace_linears(model, "w4g16", skip=("lm_head", "experts"))) == 8
        assert len(expert_parameters(model)) == 4
        # They count: leaving them out is no compression.
        quantized, kept = 64 * 64 * 2 + 32 * 64 * 2, 4 * 3 * 96 * 64
        assert bpw_linear(model) == pytest.approx((5 * quantized + 32 * kept) / (quantized + kept))

    def test_one_expert_or_one_matrix_can_be_skipped(self, tiny):
        names = replace_linears(tiny("mixtral"), "w4g16", skip=("lm_head", "experts.0", "*.3.up_proj"))
        assert len(names) == 8 + 2 * (4 * 3 - 3 - 1)

    def test_by_name(self, tiny):
        model = tiny("mixtral")
        wanted = f"{OWNERS[1]}.2.up_proj"
        assert replace_linears(model, {wanted: "w4g16"}) == [wanted]
        assert isinstance(model.get_submodule(wanted), QuantLinear)
        assert len(expert_parameters(model)) == 2  # the other layer's are as they were
        with pytest.raises(
            InputError, match=r"not linear layers that can be replaced: .*experts\.9\.up_proj"
        ):
            replace_linears(model, "w4g16", modules=[f"{OWNERS[0]}.9.up_proj"])


def test_parts_of_fused_parameters(tiny):
    model = tiny("mixtral")
    state = model.state_dict()
    fused = expert_parts(model)
    assert set(fused) == {f"{owner}.{leaf}" for owner in OWNERS for leaf in ("gate_up_proj", "down_proj")}
    unfuse_experts(model)
    assert expert_parts(model) == fused
    values = {own: part for name in state for own, part in as_linears(name, state[name], fused).items()}
    assert list(sorted(values)) == sorted(model.state_dict())
    for name in named_linears(model):
        assert torch.equal(values[f"{name}.weight"], model.get_submodule(name).weight), name


@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 2), (5, 6, 2), (4, 5, 2)])
def test_a_parameter_of_another_shape_is_named(shape):
    part = ExpertPart("mlp.gate_up_proj", 0, 4, 1, 2)
    assert part.of(torch.zeros(4, 6, 2)).shape == (3, 2)
    with pytest.raises(
        FormatError, match=r"tensor mlp\.gate_up_proj must be \[4, rows, columns\], the rows in 2"
    ):
        part.of(torch.zeros(shape))
