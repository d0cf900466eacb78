"""Putting quantized layers into models, and never leaving one out in silence."""

import logging

import pytest
import torch
from torch import nn

import qkern
from qkern import InputError, QuantEmbedding, QuantLinear, UnsupportedError
from qkern.nn import (
    compute_mode,
    expert_parameters,
    name_matches,
    named_linears,
    quant_linears,
    replace_linears,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, 10)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


ALL = ["layers.0.up_proj", "layers.0.down_proj", "layers.1.up_proj", "layers.1.down_proj"]


@pytest.mark.parametrize(
    ("skip", "replaced"),
    [
        (("lm_head",), ALL),
        ((), [*ALL, "lm_head"]),
        (("lm_head", "down_proj"), ["layers.0.up_proj", "layers.1.up_proj"]),
        (("lm_head", "layers.0.up_proj"), ALL[1:]),
        (("lm_head", "layers.0.*"), ALL[2:]),
        (("lm_head", "*.1.*"), ALL[:2]),
        (("lm_head", "proj"), ALL),
    ],
)
def test_skip(skip, replaced):
    model = Model()
    assert replace_linears(model, "w4g16", skip=skip) == replaced
    assert list(quant_linears(model)) == replaced
    kinds = {name: type(module) for name, module in named_linears(model).items()}
    assert kinds == {name: QuantLinear if name in replaced else nn.Linear for name in [*ALL, "lm_head"]}


def test_output_stays_close_and_public_name_is_the_same_function():
    assert qkern.replace_linears is replace_linears
    model, x = Model(), torch.randn(4, 32)
    before = model(x)
    replace_linears(model, "w8", skip=())
    with compute_mode(model, "float"):
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


def test_named_modules_only():
    model = Model()
    assert replace_linears(model, "w4", modules=["layers.1.up_proj"]) == ["layers.1.up_proj"]
    assert list(quant_linears(model)) == ["layers.1.up_proj"]
    with pytest.raises(InputError, match=r"not linear layers that can be replaced: layers\.9"):
        replace_linears(model, "w4", modules=["layers.9"])


def test_a_scheme_for_each_name():
    model = Model()
    mixed = qkern.MixedPrecision({"up_proj": "w4g16", "layers.1.down_proj": "w2g16", "lm_head": "w8"})
    replaced = replace_linears(model, mixed.schemes(named_linears(model)))
    assert {name: str(layer.scheme) for name, layer in quant_linears(model).items()} == {
        "layers.0.up_proj": "w4g16",
        "layers.1.up_proj": "w4g16",
        "layers.1.down_proj": "w2g16",
        "lm_head": "w8",
    }
    assert len(replaced) == 4
    with pytest.raises(InputError, match="the assignment leaves every linear 16-bit"):
        replace_linears(Model(), qkern.MixedPrecision({"up_proj": "16"}))
    directly = Model()
    assert replace_linears(directly, qkern.MixedPrecision({"up_proj": "w4g16", "lm_head": "16"})) == [
        "layers.0.up_proj",
        "layers.1.up_proj",
    ]
    with pytest.raises(InputError, match=r"not linear layers that can be replaced: layers\.0"):
        replace_linears(model, {"layers.0": "w4"})
    with pytest.raises(InputError, match="leave modules out"):
        replace_linears(model, {"layers.0.down_proj": "w4"}, modules=["lm_head"])


def test_quantize_arguments_arrive():
    model = Model()
    replace_linears(model, "w4g16", scale_dtype=torch.float32)
    assert {layer.scales.dtype for layer in quant_linears(model).values()} == {torch.float32}


def test_shared_layer_is_replaced_under_every_name():
    model = Model()
    model.layers[1].up_proj = model.layers[0].up_proj
    replace_linears(model, "w4g16")
    assert model.layers[1].up_proj is model.layers[0].up_proj
    assert isinstance(model.layers[1].up_proj, QuantLinear)


def test_layer_that_one_parent_holds_twice():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert replace_linears(model, "w4g16") == ["0"]
    assert isinstance(model[0], QuantLinear)
    assert model[2] is model[0]


def test_encoders_of_torch_call_the_quantized_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    replace_linears(model, "w8g32")
    dense = nn.TransformerEncoder(layer, 2).eval()
    dense.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "linear" not in name}, strict=False
    )
    for name, quantized in quant_linears(model).items():
        dense.get_submodule(name).weight.data = quantized.dequantize()
        dense.get_submodule(name).bias.data = quantized.bias.data
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), compute_mode(model, "float"):
        torch.testing.assert_close(model.layers[0](x), dense.layers[0](x))
        found, reference = model(x, src_key_padding_mask=mask), dense(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], reference[~mask])


def test_gpt2_conv1d_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        names = replace_linears(model, "w8")
        assert len(names) == 8
        assert "transformer.h.1.attn.c_attn" in names
        with compute_mode(model, "float"):
            torch.testing.assert_close(model(ids).logits, before, rtol=0.02, atol=0.02)


def test_nothing_to_replace():
    with pytest.raises(InputError, match="no linear layer to replace in Sequential"):
        replace_linears(nn.Sequential(nn.ReLU()), "w4")
    with pytest.raises(InputError, match="no linear layer to replace in Model"):
        replace_linears(Model(), "w4", skip=["*"])
    with pytest.raises(InputError, match="itself a linear layer"):
        replace_linears(nn.Linear(4, 4), "w4", skip=())


def test_bad_weight_is_named():
    model = Model()
    with torch.no_grad():
        model.layers[1].up_proj.weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.up_proj\.weight: .*NaN"):
        replace_linears(model, "w4g16")


def test_bad_scheme():
    with pytest.raises(InputError, match="unsupported bits"):
        replace_linears(Model(), "w5")


def test_subclass_of_linear_is_left_and_named(caplog):
    class Special(nn.Linear):
        pass

    model = Model()
    model.layers[0].up_proj = Special(32, 48)
    with caplog.at_level(logging.WARNING):
        assert replace_linears(model, "w4g16") == ALL[1:]
    assert "layers.0.up_proj" in caplog.text


class TestExperts:
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 16, 32))

    def make(self):
        model = Model()
        model.layers[1].experts = self.Experts()
        model.conv = nn.Conv1d(2, 2, 3)
        return model

    def test_are_refused_by_name(self):
        model = self.make()
        assert expert_parameters(model) == ["layers.1.experts.gate_up_proj", "layers.1.experts.down_proj"]
        with pytest.raises(
            UnsupportedError,
            match=r"gate_up_proj, layers\.1\.experts\.down_proj; layers\.1\.experts has .* and an act_fn",
        ):
            replace_linears(model, "w4g16")
        assert not quant_linears(model)

    @pytest.mark.parametrize("skip", [("lm_head", "experts"), ("lm_head", "*experts*")])
    def test_can_be_skipped(self, skip):
        assert replace_linears(self.make(), "w4g16", skip=skip) == ALL


def test_name_matches():
    assert name_matches("a.b.c", ["b.c"])
    assert name_matches("a.b.c", ["a.*"])
    assert not name_matches("a.bc", ["c"])
    assert not name_matches("a.b.c", [])


class TestComputeMode:
    def test_sets_and_restores_every_layer(self):
        model = Model()
        replace_linears(model, "w4g16")
        model.embedding = QuantEmbedding.from_embedding(nn.Embedding(8, 16), "w4")
        layers = [*quant_linears(model).values(), model.embedding]
        layers[1].compute = "int8"

        def fail_inside():
            with compute_mode(model, "float"):
                assert [layer.compute for layer in layers] == ["float"] * 5
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        assert [layer.compute for layer in layers] == ["auto", "int8", "auto", "auto", "auto"]

    def test_none_is_what_schemes_say(self):
        model = Model()
        replace_linears(model, "w4g16", skip=("lm_head", "layers.1.*"))
        replace_linears(model, "w4g16a8", skip=("lm_head", "layers.0.*"))
        with compute_mode(model, None):
            found = {name: layer.compute for name, layer in quant_linears(model).items()}
        assert found == {name: "float" if ".0." in name else "int8" for name in ALL}

    def test_unknown_name(self):
        with pytest.raises(InputError, match="allowed are auto, float, int8"), compute_mode(Model(), "fp8"):
            pass
