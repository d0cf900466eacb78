"""Mixtures of experts through the public verbs: methods and formats, names on disk, what stays 16-bit."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.checkpoints import QuantizedCheckpoint, TensorFolder
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.models import inject
from qkern.nn import (
    compute_mode,
    expert_parameters,
    named_linears,
    quant_linears,
    stored_name,
    unfuse_experts,
)
from qkern.ops import dequantize_groupwise
from qkern.pipelines.checks import strangers
from qkern.quantizers import GPTQConfig, HessianAccumulator, quantize_gptq, quantize_rtn

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
quantize_module = sys.modules["qkern.pipelines.quantize"]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# Multiples of 32, which GPTQ's layout needs.
SIZES = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
METHODS = {
    "rtn": {"method": "rtn", "scheme": "w4g32"},
    "gptq": {"method": "gptq", "scheme": "w4g32", "calibration": IDS},
    "awq": {"method": "awq", "scheme": "w4g32z", "calibration": IDS},
    "smoothquant": {"method": "smoothquant", "scheme": "w8a8", "calibration": IDS, "alpha": 0.5},
}


@torch.no_grad()
def logits(model):
    with compute_mode(model, None):
        return model(IDS).logits


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Maker of 16-bit folders, each made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("models") / model_type
            tiny(model_type, dtype=torch.bfloat16, **SIZES).save_pretrained(made[model_type])
        return made[model_type]

    return make


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        *((name, "gptq") for name in MIXTURES),
        *(("qwen2_moe", method) for method in METHODS if method != "gptq"),
    ],
)
def test_every_linear_is_quantized_or_named(tiny, folder, tmp_path, model_type, method):
    options = METHODS[method]
    report = qkern.quantize(folder(model_type), **options, output=tmp_path / "out")
    shared = 3 if model_type == "qwen2_moe" else 0
    assert len(report.layers) == 2 * (4 + 3 * 4 + shared)
    routers = {f"model.layers.{index}.mlp.gate" for index in range(2)}
    gates = {f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2) if shared}
    assert set(report.kept) == {"lm_head"} | routers | gates
    loaded = qkern.load(tmp_path / "out")
    assert set(quant_linears(loaded)) == set(report.layers)
    assert set(named_linears(loaded)) | set(strangers(loaded)) == set(report.layers) | set(report.kept)
    # The same from memory, and after the reload; and close to the original, but not it.
    model = tiny(model_type, dtype=torch.bfloat16, **SIZES)
    returned, original = qkern.quantize(model, **options), logits(model)
    assert torch.equal(logits(loaded), logits(returned))
    error = (logits(loaded) - original).square().mean() / original.square().mean()
    assert 1e-6 < error < 0.1
    assert len(expert_parameters(model)) == 4  # the given model is as it was


@pytest.mark.parametrize(
    ("model_type", "format"),
    [
        ("mixtral", "gptq"),
        ("mixtral", "gptq_v2"),
        ("mixtral", "awq"),
        ("mixtral", "compressed-tensors"),
        ("qwen2_moe", "gptq"),
        ("qwen3_moe", "gptq"),
    ],
)
def test_names_are_the_originals(folder, tmp_path, model_type, format):
    source, scheme = folder(model_type), "w4g32z" if format == "awq" else "w4g32"
    qkern.quantize(source, method="rtn", scheme=scheme, output=tmp_path / "out", format=format)
    original, written = TensorFolder(source), TensorFolder(tmp_path / "out")
    experts = {name.removesuffix(".weight") for name in original if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    assert {name.rpartition(".")[0] for name in written if ".experts." in name} == experts
    plain = {name for name in original if name in written}
    assert len([name for name in plain if name.endswith(".gate.weight")]) == 2
    assert all(torch.equal(written[name], original[name]) for name in plain)
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        layers = set(checkpoint.entries)
    assert {f"{name}.weight" for name in layers} == set(original) - plain
    # What readers must know of 16-bit linears, and the recipe, say the same names.
    gate = stored_name(model_type, "model.layers.1.mlp.gate")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = str([config.get(key) for key in ("ignore", "modules_to_not_convert", "dynamic")])
    assert gate in told.replace("\\", "")
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert set(recipe["layers"]) == layers
    assert gate in recipe["kept"]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_source_gives_the_same_files(tiny, folder, tmp_path, model_type):
    source = folder(model_type)
    model = tiny(model_type, dtype=torch.bfloat16, **SIZES)
    # A checkpoint may have experts as transformers has them in memory.
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((source / "config.json").read_bytes())
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    unfused = copy.deepcopy(model)
    assert qkern.unfuse_experts(unfused)
    given = {"folder": source, "fused": fused, "memory": model, "unfused": unfused}
    for place, one in given.items():
        qkern.quantize(one, **METHODS["gptq"], output=tmp_path / "out" / place)
    qkern.save(qkern.quantize(model, **METHODS["gptq"]), tmp_path / "out" / "saved", format="gptq")
    expected = load_file(tmp_path / "out" / "folder" / "model.safetensors")
    for place in ("fused", "memory", "unfused", "saved"):
        found = load_file(tmp_path / "out" / place / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), place
        config = json.loads((tmp_path / "out" / place / "config.json").read_text())
        assert f"-:^{stored_name(model_type, 'model.layers.0.mlp.gate')}$" in {
            rule.replace("\\", "") for rule in config["quantization_config"]["dynamic"]
        }


def test_gptq_beats_rounding_on_the_outputs_of_the_experts(tiny):
    model = tiny("mixtral", num_hidden_layers=1)
    unfuse_experts(model)
    ids = torch.randint(3, 96, (24, 64), generator=torch.Generator().manual_seed(2))
    block, seen, errors = model.model.layers[0].mlp, [], {}
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        handle.remove()
        expected = block(seen[0])
        for method in ("rtn", "gptq"):
            # Attention stays as it is, so that the experts see the same.
            calibration = ids if method == "gptq" else None
            made = qkern.quantize(
                model, method=method, scheme="w3g32", skip=["self_attn"], calibration=calibration
            )
            assert len(quant_linears(made)) == 12
            out = made.model.layers[0].mlp(seen[0])
            errors[method] = float((out - expected).square().sum() / expected.square().sum())
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_each_expert_has_the_hessian_of_its_tokens(tiny):
    model, seen = tiny("mixtral"), []
    unfuse_experts(model)
    made = qkern.quantize(model, scheme="w3g32", calibration=IDS, skip=["self_attn"])
    experts = model.model.layers[0].mlp.experts
    for expert in experts:
        seen.append(HessianAccumulator(64))
        expert.gate_proj.register_forward_pre_hook(lambda _, args, at=seen[-1]: at.add(args[0]))
    logits(model)
    for number, (expert, statistics) in enumerate(zip(experts, seen, strict=True)):
        assert 0 < statistics.tokens < IDS.numel()
        for name in ("gate_proj", "up_proj"):
            weight = getattr(expert, name).weight.detach()
            wanted = quantize_gptq(weight, statistics.value, "w3g32", GPTQConfig()).weight.codes
            found = made.get_submodule(f"model.layers.0.mlp.experts.{number}.{name}").quantized().codes
            assert (found == wanted).float().mean() > 0.99


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_no_token_reaches_is_rounded_and_named(tiny, tmp_path, caplog, method):
    model = tiny("mixtral", num_experts_per_tok=1)  # two tokens reach two of four experts at most
    options = {**METHODS[method], "calibration": IDS[:1, :2], "format": "compressed-tensors"}
    report = qkern.quantize(model, **options, output=tmp_path / "out")
    note = "rounded to nearest: no calibration token reached it"
    unreached = [name for name, record in report.layers.items() if note in record.notes]
    assert len(unreached) >= 2 * 2 * 3
    assert all(".experts." in name for name in unreached)
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())["layers"]
    for name in unreached:
        assert f"{name}: {note}" in caplog.text
        assert recipe[stored_name("mixtral", name)]["notes"] == [note]
        assert report.layers[name].error > 0
    if method == "awq":
        return  # whose scales change what is rounded
    unfuse_experts(model)
    loaded = quant_linears(qkern.load(tmp_path / "out"))
    for name in loaded:
        weight = model.get_submodule(name).weight.detach()
        rounded = quantize_rtn(weight, "w4g32", search="mse")
        if name in unreached:
            assert torch.equal(loaded[name].quantized().codes, rounded.codes)
        # One token says little of an expert, and the damping keeps its weights near what they were.
        change = (loaded[name].dequantize() - weight).square().sum()
        assert change < 2 * (dequantize_groupwise(rounded) - weight).square().sum()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_scales_are_folded_into_experts_and_routers(tiny, tmp_path, model_type):
    model = inject(tiny(model_type, num_experts_per_tok=4))
    before, options = (
        logits(model),
        {"method": "awq", "scheme": "w3g32z", "calibration": IDS, "skip": ["layers.1"]},
    )
    qkern.quantize(model, **options, scale_only=True, output=tmp_path / "out")
    folded = qkern.load(tmp_path / "out")  # by transformers
    assert torch.allclose(logits(folded), before, rtol=1e-4, atol=1e-4)
    unfuse_experts(folded)
    changed = {
        name
        for name, value in folded.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    owner = "model.layers.0.mlp"
    linears = {f"{owner}.experts.{e}.{part}_proj.weight" for e in range(4) for part in ("gate", "up", "down")}
    assert linears | {f"{owner}.gate.weight", "model.layers.0.post_attention_layernorm.weight"} <= changed
    assert not any(name.startswith("model.layers.1.") for name in changed)


def test_assignments_name_experts_by_pattern(folder, tmp_path):
    mixed = {"*.experts.*.down_proj": "w8", "*.experts.?.gate_proj": "w4g32", "experts.0.up_proj": "w4g32"}
    options = {"assignment": mixed, "method": "rtn"}
    planned = qkern.plan(folder("mixtral"), **options, timed=False)
    report = qkern.quantize(folder("mixtral"), **options, output=tmp_path / "out")
    assert {record.scheme for name, record in report.layers.items() if "down" in name} == {"w8"}
    assert len(report.layers) == 2 * (4 + 4 + 1)
    assert planned.bytes_after == sum(tensor.nbytes for tensor in TensorFolder(tmp_path / "out").values())
    loaded = quant_linears(qkern.load(tmp_path / "out"))
    assert {name: str(linear.scheme) for name, linear in loaded.items()} == {
        name: record.scheme for name, record in report.layers.items()
    }


@pytest.mark.parametrize("model_type", MIXTURES)
def test_what_stays_16_bit_is_counted(tiny, folder, tmp_path, caplog, model_type):
    caplog.set_level("INFO")
    report = qkern.quantize(folder(model_type), **METHODS["rtn"], output=tmp_path / "out")
    model = tiny(model_type, **SIZES)
    total = sum(parameter.numel() for parameter in model.parameters())
    unfuse_experts(model)
    left = total - sum(model.get_submodule(name).weight.numel() for name in report.layers)
    assert report.kept_parameters == left
    assert f"{left} of {total} parameters stay 16-bit" in caplog.text
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert recipe["kept_parameters"] == report.as_dict()["kept_parameters"] == left
    planned = qkern.plan(folder(model_type), **METHODS["rtn"], timed=False)
    assert planned.parameters == total
    assert {name: planned.kept[name] for name in report.kept} == report.kept


def test_kept_experts_are_written_each_by_itself(tiny, folder, tmp_path):
    source = folder("mixtral")
    report = qkern.quantize(source, **METHODS["rtn"], skip=["experts"], output=tmp_path / "out")
    assert len(report.layers) == 8
    assert report.kept["model.layers.1.mlp.experts.3.up_proj"] == "named in skip"
    model = tiny("mixtral", dtype=torch.bfloat16, **SIZES)
    qkern.replace_linears(model, "w4g32", skip=("lm_head", "experts"))
    assert len(expert_parameters(model)) == 4
    qkern.save(model, tmp_path / "saved", format="gptq")
    original, saved = TensorFolder(source), TensorFolder(tmp_path / "saved")
    assert set(saved) == set(TensorFolder(tmp_path / "out"))
    told = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["dynamic"]
        for name in ("saved", "out")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 2 * (4 * 3 + 1)  # experts and routers
    assert all(torch.equal(saved[name], original[name]) for name in saved if ".experts." in name)
    assert torch.equal(logits(qkern.load(tmp_path / "saved")), logits(qkern.load(tmp_path / "out")))


def test_fused_16_bit_experts_beside_quantized_linears_are_loaded(tiny, folder, tmp_path):
    file = tmp_path / "out" / "model.safetensors"
    qkern.quantize(folder("mixtral"), **METHODS["rtn"], skip=["experts"], output=tmp_path / "out")
    expected = logits(qkern.load(tmp_path / "out"))
    tensors = {name: value for name, value in load_file(file).items() if ".experts." not in name}
    for name, value in tiny("mixtral", dtype=torch.bfloat16, **SIZES).state_dict().items():
        if ".experts." in name:
            tensors[name] = value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(qkern.load(tmp_path / "out")), expected)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({**tensors, name: tensors[name][:3].contiguous()}, file)
    with pytest.raises(FormatError, match=rf"{name} must be \[4, rows, columns\].*: got \[3, 64, 96\]"):
        qkern.load(tmp_path / "out")


def test_a_16_bit_model_is_saved_and_loaded(tiny, tmp_path):
    model = tiny("mixtral")
    original = logits(model)
    qkern.save(model, tmp_path / "fused")
    assert torch.equal(logits(qkern.load(tmp_path / "fused")), original)
    unfuse_experts(model)
    qkern.save(model, tmp_path / "unfused")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in TensorFolder(tmp_path / "unfused")
    assert torch.allclose(logits(qkern.load(tmp_path / "unfused")), original, atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    options = {**METHODS["gptq"], "format": "compressed-tensors"}
    qkern.quantize(folder("qwen2_moe"), **options, output=tmp_path / "whole")
    step = quantize_module.quantize_layer

    def stop(stream, structure, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return step(stream, structure, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "quantize_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            qkern.quantize(folder("qwen2_moe"), **options, output=tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    qkern.quantize(folder("qwen2_moe"), **options, output=tmp_path / "out")
    whole, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == again


def test_experts_that_are_not_known_are_refused_by_name(tiny, tmp_path):
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 192))
    owner = r"model\.layers\.0\.mlp\.experts"
    with pytest.raises(UnsupportedError, match=rf"4 3-D .*{owner}\.gate_up_proj.*; {owner} has") as info:
        qkern.quantize(model, method="rtn")
    assert "skip=['experts']" in str(info.value)
    with pytest.raises(UnsupportedError, match="4 3-D parameters"):
        qkern.plan(model)
    report = qkern.quantize(model, **METHODS["rtn"], skip=["experts"], output=tmp_path / "out")
    assert len(report.layers) == 8
    assert "no plain linear" in report.kept["model.layers.0.mlp.experts"]


def test_patterns_that_match_nothing_are_named(folder):
    with pytest.raises(InputError, match=r"'experts\.9' in skip or include matches no linear"):
        qkern.quantize(folder("mixtral"), method="rtn", skip=["experts.9"])
