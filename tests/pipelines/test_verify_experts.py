"""`qkern.verify` of mixtures of experts, whose names and stacks differ between files and models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.models import inject

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
# Multiples of 32, which GPTQ's layout needs.
SIZES = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
LINEARS = 2 * (4 + 3 * 4)


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """Maker of 16-bit folders, each made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("models") / model_type
            model = inject(tiny(model_type, dtype=torch.bfloat16, num_experts_per_tok=4, **SIZES))
            qkern.save(model, made[model_type])
        return made[model_type]

    return make


def checks(verification):
    return {check.name: check for check in verification.checks}


def fused(folder, model):
    """Put stacks of a model's experts into a folder in the place of single ones."""
    file = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if ".experts." not in name}
    stacks = {name: value.contiguous() for name, value in model.state_dict().items() if ".experts." in name}
    assert len(stacks) == 4
    save_file({**tensors, **stacks}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("method", "scheme", "format"),
    [("rtn", "w4g32", "gptq"), ("rtn", "w4g32", "compressed-tensors"), ("awq", "w4g32z", "awq")],
)
def test_sound_mixtures(original, tmp_path, model_type, method, scheme, format):
    calibration = IDS if method == "awq" else None
    options = {"method": method, "scheme": scheme, "format": format, "calibration": calibration}
    qkern.quantize(original(model_type), output=tmp_path / "out", **options)
    found = qkern.verify(tmp_path / "out", against=original(model_type))
    assert found.is_sound, found.as_dict()
    assert checks(found)["error"].count == checks(found)["runtime"].count == LINEARS
    assert len(found.errors) == LINEARS
    norm = "model.layers.0.post_attention_layernorm.weight"
    before, after = (
        load_file(folder / "model.safetensors")[norm] for folder in (original(model_type), tmp_path / "out")
    )
    assert torch.equal(before, after) == (method == "rtn")  # AWQ moved factors, into routers too


def test_factors_of_norms_are_known_up_to_rounding(original, tmp_path):
    folder, name = tmp_path / "out", "model.layers.0.mlp.gate.weight"
    options = {"method": "awq", "scheme": "w4g32z", "calibration": IDS, "output": folder}
    qkern.quantize(original("qwen3_moe"), **options)
    tensors = load_file(folder / "model.safetensors")
    before = load_file(original("qwen3_moe") / "model.safetensors")[name]
    assert not torch.equal(tensors[name], before)
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = checks(qkern.verify(folder, against=original("qwen3_moe")))["original"].problems
    assert problem.startswith(f"{name} is not quantized and differs from the original's by ")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_16_bit_mixtures(original, tmp_path, model_type):
    assert qkern.verify(original(model_type), against=original(model_type)).is_sound
    model = qkern.load(original(model_type))
    qkern.save(model, tmp_path / "fused")
    fused(tmp_path / "fused", model)
    found = qkern.verify(tmp_path / "fused", against=original(model_type))
    assert found.is_sound, found.as_dict()
    assert checks(found)["weights"].count > LINEARS


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_fused_16_bit_experts_beside_quantized_linears(original, tmp_path, model_type):
    folder = tmp_path / "out"
    qkern.quantize(original(model_type), method="rtn", scheme="w4g32", skip=["experts"], output=folder)
    assert qkern.verify(folder, against=original(model_type)).is_sound
    fused(folder, qkern.load(original(model_type)))
    found = qkern.verify(folder, against=original(model_type))
    assert found.is_sound, found.as_dict()
    file, name = folder / "model.safetensors", "model.layers.1.mlp.experts.gate_up_proj"
    tensors = load_file(file)
    changed = tensors[name].clone()
    changed[2, -1] = -changed[2, -1]  # the last row of an expert's second half
    save_file({**tensors, name: changed}, file)
    (problem,) = checks(qkern.verify(folder, against=original(model_type)))["original"].problems
    assert problem.startswith("model.layers.1.mlp.experts.2.up_proj.weight is not quantized and differs")
    save_file({**tensors, name: changed[:3].contiguous()}, file)
    (problem,) = checks(qkern.verify(folder))["tensors"].problems
    assert problem == f"{name} has the shape {[3, *changed.shape[1:]]}: the model has {list(changed.shape)}"


def test_damage_is_named_as_the_files_do(original, tmp_path):
    folder = tmp_path / "out"
    qkern.quantize(original("mixtral"), method="rtn", scheme="w4g32", format="gptq", output=folder)
    file, layer = folder / "model.safetensors", "model.layers.0.block_sparse_moe.experts.1.w3"
    tensors = load_file(file)
    tensors[f"{layer}.scales"][0, 0] = torch.nan
    gate = tensors.pop("model.layers.1.block_sparse_moe.gate.weight")
    assert gate.shape == (4, 64)
    save_file(tensors, file)
    found = checks(qkern.verify(folder))
    assert found["values"].problems == (f"{layer}: 1 scales are NaN or Inf",)
    assert found["tensors"].problems == ("model.layers.1.block_sparse_moe.gate.weight is missing",)
