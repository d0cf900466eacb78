"""Training on the grid: which layers are prepared or refused, and that what is stored was trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import qkern
from qkern import FakeQuantLinear, InputError, OutlierLinear, QuantLinear, UnsupportedError, replace_linears
from qkern.demo import MODEL
from qkern.nn import compute_mode, quant_linears
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines import convert_qat, export_gguf, load, prepare_qat, quantize, save
from qkern.search import MixedPrecision

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model, ids=IDS):
    with torch.no_grad(), compute_mode(model, None):
        return model(input_ids=ids).logits.float()


def train(model, steps=3, lr=1e-3, ids=IDS):
    """Change every weight by real steps; the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr), []
    for _ in range(steps):
        found = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(found, ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def prepared(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def test_every_linear_but_the_head_is_prepared(tiny):
    model = tiny("llama")
    assignment = prepare_qat(model, "w4g32")
    assert assignment == MixedPrecision(dict.fromkeys(prepared(model), "w4g32"))
    assert len(prepared(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert qkern.prepare_qat is prepare_qat
    assert qkern.convert_qat is convert_qat


def test_skip_and_assignment_choose_layers(tiny):
    model = tiny("llama")
    prepare_qat(model, "w2g32", skip=("lm_head", "*.layers.0.*", "o_proj"), search="minmax")
    assert all(".layers.1." in name and "o_proj" not in name for name in prepared(model))
    assert len(prepared(model)) == 6
    assert {layer.search for layer in prepared(model).values()} == {"minmax"}

    model = tiny("llama")
    mixed = {"*.mlp.*": "w3g32z", "q_proj": "w8", "layers.0.self_attn.o_proj": "16", "lm_head": "nf4g16"}
    assignment = prepare_qat(model, assignment=mixed, learn_scales=True)
    found = {name: str(layer.scheme) for name, layer in prepared(model).items()}
    assert found == assignment.choices
    assert sorted(found.values()) == ["nf4g16"] + ["w3g32z"] * 6 + ["w8"] * 2
    assert all(layer.scales is not None for layer in prepared(model).values())


def test_what_is_frozen_stays_frozen(tiny):
    model = tiny("qwen2")  # whose queries have biases
    model.requires_grad_(False)
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight.requires_grad_(True)
    layers[1].self_attn.k_proj.bias.requires_grad_(True)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prepare_qat(model, "w4g32")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert len(expected) == 2


def test_a_shared_layer_stays_shared_and_encoders_call_the_layers():
    torch.manual_seed(0)
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepare_qat(model, "w4g16")
    assert isinstance(model[0], FakeQuantLinear)
    assert model[2] is model[0]

    encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    prepare_qat(encoder, "w2g16")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))


def test_layers_that_cannot_be_trained_are_refused_by_name(tiny):
    tied = tiny("qwen2")
    with pytest.raises(UnsupportedError, match=r"lm_head shares its weight with model\.embed_tokens"):
        prepare_qat(tied, "w4g32", skip=())
    with pytest.raises(UnsupportedError, match="lm_head shares its weight"):
        prepare_qat(tied, assignment={"*": "w4g32"})
    assert not prepared(tied)
    experts = tiny("mixtral")
    assert "model.layers.0.mlp.experts.1.down_proj" in prepare_qat(experts, "w4g32").choices
    experts = tiny("mixtral")
    chosen = prepare_qat(experts, assignment={"*.experts.*.down_proj": "w4g32"})
    assert {name.rpartition(".")[2] for name in chosen.choices} == {"down_proj"}
    experts = tiny("mixtral")
    assert not [name for name in prepare_qat(experts, "w4g32", skip=("experts",)).choices if "expert" in name]


def test_outlier_linears_are_refused_by_name(tiny):
    model = tiny("llama")
    replace_linears(model, {"model.layers.1.mlp.up_proj": "w8a8"}, kind=OutlierLinear)
    for learn_scales in (False, True):
        with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.up_proj is an OutlierLinear"):
            prepare_qat(model, "w8a8", learn_scales=learn_scales)
    assert not prepared(model)


def test_refusals_name_what_is_wrong(tiny):
    model = tiny("llama")
    with pytest.raises(InputError, match="a scheme or an assignment"):
        prepare_qat(model)
    with pytest.raises(InputError, match="a scheme or an assignment"):
        prepare_qat(model, "w4g32", assignment={"*": "w4g32"})
    with pytest.raises(InputError, match="'w5'"):
        prepare_qat(model, "w5")
    for nothing in ({"scheme": "16"}, {"assignment": {"*": "16"}}):
        with pytest.raises(InputError, match="leaves every linear 16-bit"):
            prepare_qat(model, **nothing)
    with pytest.raises(InputError, match="leaves none"):
        prepare_qat(model, "w4g32", skip=("*",))
    with pytest.raises(InputError, match="itself a linear layer"):
        prepare_qat(nn.Linear(4, 4), "w4")
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: .*blocks of 256"):
        prepare_qat(tiny("llama"), "q4_k")
    with pytest.raises(InputError, match="call prepare_qat"):
        convert_qat(model)
    prepare_qat(model, "w4g32")
    with pytest.raises(InputError, match=r"prepared already: model\.layers\.0"):
        prepare_qat(model, "w4g32")


@pytest.mark.parametrize(
    ("layer", "choice", "words"),
    [
        ("dense", "w4g32d", "w4g32d"),
        ("dense", "q4_k", "blocks of 256"),
        ("quantized", "w8", "its own scheme and scales"),
        ("act_order", "w4g32", "group_index"),
        ("conv1d", "q8_0", "Conv1D"),
    ],
)
def test_nothing_is_prepared_when_the_last_layer_is_refused(layer, choice, words):
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(96, 96), "last": nn.Linear(96, 96)})
    if layer == "conv1d":
        model["last"] = Conv1D(96, 96)
    if layer in ("quantized", "act_order"):
        model["last"] = QuantLinear.from_linear(model["last"], "w4g32")
    if layer == "act_order":
        model["last"].group_index = torch.arange(96, dtype=torch.int32) // 32
    is_gguf = "_" in choice
    mixed = {"first": "q8_0" if is_gguf else "w4g32", "last": choice}
    with pytest.raises((InputError, UnsupportedError), match=rf"last\.weight: .*{words}"):
        prepare_qat(model, assignment=mixed, learn_scales=not is_gguf)
    assert not prepared(model)
    prepare_qat(model, assignment={"first": "w4g32"})


def test_other_verbs_refuse_a_model_in_training(tiny, tmp_path):
    model = tiny("llama")
    prepare_qat(model, assignment={"q_proj": "w4g32"})
    for verb in (
        lambda: save(model, tmp_path / "never"),
        lambda: quantize(model, method="rtn", scheme="w4g32", output=tmp_path / "never"),
    ):
        with pytest.raises(UnsupportedError, match=r"got 2 FakeQuantLinear, first model.*convert_qat"):
            verb()
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("spelling", ["w2g32", "w4g32z", "w3g48", "w4t", "w8a8", "nf4g16"])
def test_converted_model_computes_what_was_trained(tiny, spelling, learn_scales):
    model = tiny("llama")
    prepare_qat(model, spelling, learn_scales=learn_scales)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected, weights = logits(model), {name: layer.dequantize() for name, layer in prepared(model).items()}
    assert torch.equal(logits(model.eval()), expected)
    assignment = convert_qat(model)
    assert set(assignment.choices) == set(weights)
    for name, layer in quant_linears(model).items():
        assert torch.equal(layer.dequantize(), weights.pop(name))
    assert not weights
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spelling", ["w4g32", "w3g32z"])
def test_a_bf16_model_is_trained_saved_and_loaded(tiny, tmp_path, spelling):
    model = tiny("qwen2", dtype=torch.bfloat16)
    prepare_qat(model, spelling, learn_scales=True)
    assert {layer.weight.dtype for layer in prepared(model).values()} == {torch.float32}
    train(model, lr=1e-5)  # far below what bf16 holds of a weight of 0.1
    assert any(layer.weight.bfloat16().float().ne(layer.weight).any() for layer in prepared(model).values())
    expected = logits(model)
    with pytest.raises(UnsupportedError, match="convert_qat"):
        save(model, tmp_path / "unfinished")
    assert not (tmp_path / "unfinished").exists()
    convert_qat(model)
    # Both round activations to bf16, which leaves either 0.0075 to 0.0086 from the same weights in fp32.
    assert (logits(model) - expected).norm() <= 2**-6 * expected.norm()
    save(model, tmp_path / "trained", format="compressed-tensors")
    loaded = load(tmp_path / "trained")
    assert torch.equal(logits(loaded), logits(model))


def test_a_weight_that_broke_leaves_all_of_the_model_in_training(tiny):
    model = tiny("llama")
    assignment = prepare_qat(model, "w4g32")
    broken = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        broken[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight: .*NaN"):
        convert_qat(model)
    assert len(prepared(model)) == 14
    with torch.no_grad():
        broken[0, 0] = 0.0
    assert convert_qat(model) == assignment


def test_training_goes_on_from_its_state_dict(tiny):
    def make():
        model = tiny("llama")
        prepare_qat(model, "w2g32z", learn_scales=True)
        return model

    model, other = make(), make()
    train(model)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("spelling", ["w2g32", "w4g32z"])
def test_training_goes_on_from_gptq(tiny, spelling):
    source = tiny("llama")
    model = quantize(source, method="gptq", scheme=spelling, calibration=IDS)
    codes = {name: layer.quantized() for name, layer in quant_linears(model).items()}
    expected = logits(model)
    for wrong in ({"scheme": spelling}, {"scheme": "w8", "learn_scales": True}):
        with pytest.raises(InputError, match="its own scheme and scales"):
            prepare_qat(copy.deepcopy(model), **wrong)
    prepare_qat(model, spelling, learn_scales=True)
    for name, layer in prepared(model).items():
        assert torch.equal(layer.quantized().codes, codes[name].codes)
        assert torch.equal(layer.quantized().scales, codes[name].scales)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    losses = train(model)
    assert losses[-1] < losses[0]
    convert_qat(model)
    assert all(isinstance(layer, QuantLinear) for layer in quant_linears(model).values())


def test_trainer_saves_a_loaded_model_in_training(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    quantize(tiny("llama"), method="rtn", scheme="w4g32", output=tmp_path / "quantized")
    model = load(tmp_path / "quantized", dtype=torch.float32)
    prepare_qat(model, "w4g32", learn_scales=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none"
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    assert Trainer(model=model, args=arguments, train_dataset=data).train().global_step == 1
    stored = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    convert_qat(model)
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(load(tmp_path / "trained", dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_has_the_blocks_that_were_trained(tiny, tmp_path, dtype):
    from transformers import AutoTokenizer

    # Of Llama's queries and keys the file has the rows in another order.
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options = {"vocab_size": len(tokenizer), "bos_token_id": None, "pad_token_id": None}
    model = tiny("llama", hidden_size=256, intermediate_size=256, dtype=dtype, **options)
    chosen = {"self_attn.*": "q5_1", "mlp.up_proj": "q2_k", "gate_proj": "q5_k", "down_proj": "q6_k"}
    chosen = {f"*.{pattern}" if "*" in pattern else pattern: kind for pattern, kind in chosen.items()}
    prepare_qat(model, assignment=chosen)
    train(model, steps=1, lr=1e-4)
    trained = {name: layer.dequantize() for name, layer in prepared(model).items()}
    assert len(trained) == 14
    assignment = convert_qat(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(input_ids=IDS)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0", assignment=assignment)
    assert {gguf_type(kind).name for kind in chosen.values()} <= set(report.counts)
    loaded = load(tmp_path / "model.gguf")
    for name, expected in trained.items():
        assert torch.equal(loaded.get_submodule(name).weight, expected), name
