"""SmoothQuant and int8 activations on whole models: what is folded, rounded, written and read back."""

import json
import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qkern.errors import FormatError, UnsupportedError
from qkern.models import LinearPair, architecture_for, inject, known_architectures
from qkern.nn import compute_mode, named_linears, quant_linears
from qkern.pipelines import layerwise, load, quantize, save
from qkern.pipelines.checks import strangers
from qkern.quantizers import ActivationRange

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
IDS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
SMOOTH = {"method": "smoothquant", "calibration": IDS}


def logits(model, compute="auto"):
    with torch.no_grad(), compute_mode(model, compute):
        return model(input_ids=IDS).logits.float()


def error(found, original):
    return float((found - original).square().mean() / original.square().mean())


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    inject(tiny("llama")).save_pretrained(path)
    return path


@pytest.mark.parametrize("alpha", ["auto", 0.5])
@pytest.mark.parametrize("model_type", known_architectures())
def test_every_architecture(tiny, tmp_path, model_type, alpha):
    # All experts of a token, lest a router near a tie chooses another one once activations are rounded.
    chosen = {"num_experts_per_tok": 4} if model_type in MIXTURES else {}
    model = inject(tiny(model_type, **chosen))
    original = logits(model)
    report = quantize(model, **SMOOTH, alpha=alpha, output=tmp_path / "out")
    assert (report.scheme, report.format) == ("w8a8", "compressed-tensors")
    assert set(report.layers) | set(report.kept) == set(named_linears(model)) | set(strangers(model))
    loaded = load(tmp_path / "out")
    assert all(str(layer.scheme) == "w8a8" for layer in quant_linears(loaded).values())
    assert torch.equal(logits(loaded), logits(quantize(model, **SMOOTH, alpha=alpha)))
    # Close to the original, closer than without; and really with int8 activations.
    plain = quantize(model, method="rtn", scheme="w8a8")
    assert 1e-7 < error(logits(loaded), original) < 0.5 * error(logits(plain), original)
    assert not torch.equal(logits(loaded), logits(loaded, "float"))
    # What is left with float activations is the rounding of 8-bit weights.
    assert error(logits(loaded, "float"), original) < 1e-3
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert recipe["arguments"]["alpha"] == alpha
    alphas = {record.alpha for record in report.layers.values()}
    assert alphas - {None}
    if alpha == 0.5:
        assert alphas - {None} == {0.5}


@pytest.mark.parametrize("model_type", known_architectures())
def test_folding_preserves_the_function_to_the_last_digits(tiny, model_type, monkeypatch):
    model = inject(tiny(model_type))
    state = {}

    def take_all(finished, stream, index, *rest):
        layer = stream.layers[index]
        state.update({stream.prefix(index) + n: p.detach().clone() for n, p in layer.named_parameters()})

    monkeypatch.setattr(layerwise, "_store_changes", take_all)
    quantize(model, **SMOOTH, alpha=0.7)
    before = logits(model)
    changed = model.state_dict() | state
    assert sum(not torch.equal(changed[name], model.state_dict()[name]) for name in state) >= 4
    model.load_state_dict(changed)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_a_wrong_map_of_the_architecture_is_noticed(tiny, monkeypatch):
    model = tiny("llama")
    right = architecture_for(model.config)
    # A factor does not pass the activation behind the gate.
    pair = LinearPair(first="mlp.gate_proj", second="mlp.down_proj", kind="gated")
    wrong = replace(right, linear_linears=(pair,))
    monkeypatch.setattr("qkern.models.structure.architecture_for", lambda config: wrong)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 computes something else after folding"):
        quantize(model, **SMOOTH)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant"])
def test_static_scales(folder, tmp_path, method, observer):
    options = {"method": method, "scheme": "w8a8", "calibration": IDS, "activations": "static"}
    quantize(folder, **options, observer=observer, output=tmp_path / "out")
    model = load(tmp_path / "out")
    layers = quant_linears(model)
    assert all(layer.input_scale.shape == (1,) for layer in layers.values())
    # Of the first layer it is known what its input was.
    if method != "smoothquant":
        seen = ActivationRange(observer)
        original = load(folder)
        hook = original.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda module, args: seen.add(args[0])
        )
        logits(original)
        hook.remove()
        found = layers["model.layers.0.self_attn.q_proj"].input_scale
        torch.testing.assert_close(found, seen.scale())
    assert torch.equal(
        layers["model.layers.0.mlp.up_proj"].input_scale, layers["model.layers.0.mlp.gate_proj"].input_scale
    )
    # One scale for all costs more than one a token, and is what runs.
    original = logits(load(folder))
    dynamic = quantize(folder, **{**options, "activations": "dynamic"})
    assert error(logits(dynamic), original) < error(logits(model), original) < 0.2
    # The same from memory, and written again.
    assert torch.equal(logits(quantize(folder, **options, observer=observer)), logits(model))
    save(model, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).exists()
    again = load_file(tmp_path / "again" / "model.safetensors")
    before = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before | again)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_transformers_runs_the_same_model(folder, tmp_path, activations):
    """With the compressed-tensors package, which rounds activations too."""
    quantize(folder, **SMOOTH, activations=activations, output=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            theirs = model(input_ids=IDS).logits
    ours = load(tmp_path / "out")
    if activations == "static":
        assert error(logits(ours), theirs) < 1e-9
    # Per token its range is 127.5 steps and ours 127: errors alike in size, not the same ones.
    exact = logits(ours, "float")
    assert 0.5 < error(logits(ours), exact) / error(theirs, exact) < 2


def test_gptq_rounds_the_smoothed_weights(folder):
    options = {"method": "gptq", "scheme": "w4g32a8", "calibration": IDS}
    original = logits(load(folder))
    plain, smooth = quantize(folder, **options), quantize(folder, **options, alpha="auto")
    assert error(logits(smooth), original) < error(logits(plain), original)
    assert smooth.qkern_report.recipe["arguments"]["alpha"] == "auto"
    assert torch.equal(logits(quantize(folder, **options, alpha="auto", search="loss")), logits(smooth))


def test_mixtures_say_what_each_linear_is(folder, tmp_path):
    assignment = {"*.self_attn.*": "w8a8", "down_proj": "w4g32a8", "gate_proj": "w4g32", "up_proj": "w4g32"}
    report = quantize(folder, **SMOOTH, assignment=assignment, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = {tuple(group["targets"]): group for group in config["config_groups"].values()}
    assert {group["format"] for group in groups.values()} == {"int-quantized", "pack-quantized"}
    smoothed = {name for name, record in report.layers.items() if record.alpha is not None}
    assert any("q_proj" in name for name in smoothed)
    assert not any("gate_proj" in name or "up_proj" in name for name in smoothed)
    model = load(tmp_path / "out")
    schemes = {name.rpartition(".")[2]: str(layer.scheme) for name, layer in quant_linears(model).items()}
    assert schemes == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "w8a8"),
        "down_proj": "w4g32a8",
        "gate_proj": "w4g32",
        "up_proj": "w4g32",
    }
    assert torch.equal(logits(model), logits(quantize(folder, **SMOOTH, assignment=assignment)))
    with pytest.raises(UnsupportedError, match=r"of one scale a channel, w8a8: got w4g32a8"):
        quantize(folder, **SMOOTH, assignment=assignment, activations="static")


@pytest.mark.parametrize("scheme", ["w2g32a8", "w4g32za8", "w8g32a8", "w4a8", "w8za8"])
def test_other_schemes_with_int8_activations(folder, tmp_path, scheme):
    quantize(folder, **SMOOTH, scheme=scheme, output=tmp_path / "out")
    model = load(tmp_path / "out")
    assert {str(layer.scheme) for layer in quant_linears(model).values()} == {scheme}
    assert torch.equal(logits(model), logits(quantize(folder, **SMOOTH, scheme=scheme)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"


def test_the_head_too(folder, tmp_path):
    quantize(folder, **SMOOTH, include=["lm_head"], activations="static", output=tmp_path / "out")
    model = load(tmp_path / "out")
    assert float(model.lm_head.input_scale) > 0
    assert error(logits(model), logits(load(folder))) < 0.05


def test_an_unknown_architecture_is_refused(tiny):
    with pytest.raises(
        UnsupportedError, match=r"SmoothQuant folds scales, and qkern has no data for .*gpt_neox"
    ):
        quantize(tiny("gpt_neox"), **SMOOTH)
    # Static scales need no folding.
    model = quantize(
        tiny("gpt_neox"),
        method="rtn",
        scheme="w8a8",
        calibration=IDS,
        activations="static",
        observer="minmax",
    )
    assert all(layer.input_scale is not None for layer in quant_linears(model).values())


def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    options = {**SMOOTH, "activations": "static"}
    quantize(folder, **options, output=tmp_path / "expected")
    original = layerwise.quantize_layer

    def killed(stream, structure, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return original(stream, structure, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(import_module("qkern.pipelines.quantize"), "quantize_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, **options, output=tmp_path / "out")
    with pytest.raises(
        Exception, match=r"holds finished layers of another run \(observer was 'mse', now 'minmax'\)"
    ):
        quantize(folder, **options, observer="minmax", output=tmp_path / "out")
    quantize(folder, **options, output=tmp_path / "out")
    for name in ("model.safetensors", "qkern.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_damaged_files(folder, tmp_path):
    quantize(folder, **SMOOTH, activations="static", output=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj"

    def fails(message, **changed):
        tensors = {**whole, **{f"{name}.{part}": value for part, value in changed.items()}}
        save_file({key: value for key, value in tensors.items() if value is not None}, file)
        with pytest.raises(FormatError, match=message):
            load(tmp_path / "out")

    fails(r"up_proj.input_scale is missing", input_scale=None)
    fails(r"up_proj.input_scale must be above 0 and finite: got -1", input_scale=torch.tensor([-1.0]))
    fails(r"up_proj.input_scale must be above 0 and finite: got nan", input_scale=torch.tensor([torch.nan]))
    fails(r"input_scale must be float32 or .* \[1\]: got float32 \[2\]", input_scale=torch.ones(2))
    fails(r"up_proj.input_zero_point is not 0", input_zero_point=torch.tensor([3], dtype=torch.int8))
    fails(r"up_proj.weight must be int8", weight=whole[f"{name}.weight"].float())
    fails(r"up_proj.weight is missing", weight=None)
    fails(r"belong to layers without weight_scale", weight_scale=None)
    # What older writers added is understood.
    zero = torch.zeros(1, dtype=torch.int8)
    scale = whole[f"{name}.input_scale"].reshape(())
    save_file({**whole, f"{name}.input_zero_point": zero, f"{name}.input_scale": scale}, file)
    found = load(tmp_path / "out").get_submodule(name).input_scale
    assert torch.equal(found, whole[f"{name}.input_scale"])
