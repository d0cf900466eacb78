"""Names of tensors in checkpoints are those that transformers, too, writes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qkern.errors import UnsupportedError
from qkern.nn import expert_parameters, expert_parts, own_name, stored_name, unfuse_experts

SIZES = {
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "rotary_dim": 8,
    "shared_expert_intermediate_size": 80,
    "topk_group": 1,
}
MORE = {"lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0}}
# Architectures whose experts become linears, by what checkpoints call these: otherwise than transformers,
RENAMED = (
    "axk1",
    "axk2",
    "ernie4_5_moe",
    "exaone_moe",
    "hy_v3",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "mixtral",
    "phimoe",
)
# the same,
SAME = (
    "afmoe",
    "cohere2_moe",
    "deepseek_v2",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "hunyuan_v1_moe",
    "jamba",
    "mellum",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
    "solar_open",
)
# or nothing, as they hold the stacks,
STACKED = ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "inkling_text")
EXPERTS = ".experts."
# Renamings of transformers' that change what they made once more.
UNSTABLE = ("axk1", "laguna")


@pytest.fixture
def mixture(tiny):
    return lambda model_type: tiny(model_type, **SIZES, **MORE.get(model_type, {}))


def test_every_architecture_is_here(mixture):
    known = {*RENAMED, *SAME, *STACKED}
    others = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    found = set()
    for model_type in others:
        if {"num_experts", "num_local_experts", "n_routed_experts"}.isdisjoint(
            dir(CONFIG_MAPPING[model_type])
        ):
            continue
        try:
            with torch.device("meta"):
                model = mixture(model_type)
        except Exception:  # some are not built of these sizes, for many reasons
            continue
        if expert_parts(model):
            found.add(model_type)
    assert not found


@pytest.mark.parametrize("model_type", [*RENAMED, *SAME])
def test_names_are_those_that_transformers_writes(model_type, mixture, tmp_path):
    model = mixture(model_type)
    model.save_pretrained(tmp_path)
    assert unfuse_experts(model)
    own = list(model.state_dict())
    stored = [stored_name(model_type, name) for name in own]
    written = load_file(tmp_path / "model.safetensors")
    if model_type != "kimi_linear":  # whose convolutions are stacked
        assert {*stored, "lm_head.weight"} == {*written, "lm_head.weight"}
    assert {name for name in stored if ".experts." in name} == {
        name for name in written if ".experts." in name
    }
    assert (stored != own) == (model_type in RENAMED)
    assert [own_name(model_type, name) for name in stored] == own
    assert ([own_name(model_type, name) for name in own] == own) == (model_type not in UNSTABLE)


@pytest.mark.parametrize("model_type", [*RENAMED, *SAME, *STACKED])
def test_transformers_writes_experts_as_before(model_type, mixture, tmp_path):
    model = mixture(model_type)
    model.save_pretrained(tmp_path / "fused")
    assert unfuse_experts(model)
    model.save_pretrained(tmp_path / "linears")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "linears"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("skip", [(), ["layers.0"]], ids=["all", "some"])
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("model_type", ["granitemoe", "lfm2_moe", "mixtral", "phimoe", "qwen3_moe"])
def test_so_it_does_of_some_and_after_loading(model_type, loaded, skip, mixture, tmp_path):
    model = mixture(model_type)
    model.save_pretrained(tmp_path / "fused")
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert unfuse_experts(model, skip=skip)
    copy.deepcopy(model).save_pretrained(tmp_path / "linears")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "linears"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_unfusing_by_steps_adds_each_conversion_once(mixture):
    once, steps = mixture("mixtral"), mixture("mixtral")
    unfuse_experts(once)
    for skip in (["layers.0"], [], []):
        unfuse_experts(steps, skip=skip)
    assert len(steps._weight_conversions) == len(once._weight_conversions)


def test_a_part_of_a_model_is_refused(mixture, tmp_path):
    for model_type in ("mixtral", "granitemoe"):
        model = mixture(model_type)
        with pytest.raises(UnsupportedError, match="Model may be a part of a model"):
            unfuse_experts(model.model)
        assert expert_parameters(model)
    model = mixture("qwen3_moe")
    assert unfuse_experts(model.model)  # whose names are those of checkpoints
    mixture("mixtral").model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    assert unfuse_experts(base)
    base.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "saved"))
    assert before.keys() == after.keys()


def test_names_that_nothing_reads_are_not_written(mixture, tmp_path):
    for model_type in ("mixtral", "granitemoe"):
        model = mixture(model_type)
        unfuse_experts(model)
        with pytest.raises(UnsupportedError, match="save_original_format=False writes names of experts"):
            copy.deepcopy(model).save_pretrained(tmp_path / model_type, save_original_format=False)
        assert not (tmp_path / model_type).exists()
    model = mixture("qwen3_moe")
    unfuse_experts(model)
    model.save_pretrained(tmp_path / "same", save_original_format=False)
    assert not expert_parameters(model)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "same", output_loading_info=True)
    assert expert_parameters(again)
    assert not any(found.values())


def test_modules_have_names_too():
    assert stored_name("mixtral", "model.layers.1.mlp.gate") == "model.layers.1.block_sparse_moe.gate"
    expert = "model.layers.1.mlp.experts.12.up_proj"
    assert stored_name("mixtral", expert) == "model.layers.1.block_sparse_moe.experts.12.w3"
    assert stored_name("qwen3_moe", expert) == expert
    # What transformers has in memory is in no checkpoint of the original, and keeps its name.
    fused = "model.layers.1.mlp.experts.down_proj"
    assert stored_name("mixtral", fused) == "model.layers.1.block_sparse_moe.experts.down_proj"
    assert own_name("mixtral", stored_name("mixtral", fused)) == fused
