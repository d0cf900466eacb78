"""Names of tensors in checkpoints are those that transformers, too, writes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qkern.nn import own_name, stored_name, unfuse_experts

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
RENAMED = ("ernie4_5_moe", "exaone_moe", "minimax", "minimax_m2", "mixtral", "phimoe")
SAME = ("flex_olmo", "glm4_moe", "hunyuan_v1_moe", "jamba", "olmoe", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("model_type", [*RENAMED, *SAME])
def test_names_are_those_that_transformers_writes(model_type, tiny, tmp_path):
    model = tiny(model_type, **SIZES)
    model.save_pretrained(tmp_path)
    assert unfuse_experts(model)
    own = [name for name in model.state_dict() if name != "lm_head.weight"]
    stored = [stored_name(model_type, name) for name in own]
    assert set(stored) == set(load_file(tmp_path / "model.safetensors")) - {"lm_head.weight"}
    assert (stored != own) == (model_type in RENAMED)
    assert [own_name(model_type, name) for name in stored] == own
    assert [own_name(model_type, name) for name in own] == own


@pytest.mark.parametrize("skip", [(), ["layers.0"]], ids=["all", "some"])
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "qwen3_moe"])
def test_transformers_writes_linears_of_experts_as_before(model_type, loaded, skip, tiny, tmp_path):
    model = tiny(model_type, **SIZES)
    model.save_pretrained(tmp_path / "fused")
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert unfuse_experts(model, skip=skip)
    copy.deepcopy(model).save_pretrained(tmp_path / "linears")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "linears"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_modules_have_names_too():
    assert stored_name("mixtral", "model.layers.1.mlp.gate") == "model.layers.1.block_sparse_moe.gate"
    expert = "model.layers.1.mlp.experts.12.up_proj"
    assert stored_name("mixtral", expert) == "model.layers.1.block_sparse_moe.experts.12.w3"
    assert stored_name("qwen3_moe", expert) == expert
    # What transformers has in memory is in no checkpoint of the original, and keeps its name.
    fused = "model.layers.1.mlp.experts.down_proj"
    assert stored_name("mixtral", fused) == "model.layers.1.block_sparse_moe.experts.down_proj"
    assert own_name("mixtral", stored_name("mixtral", fused)) == fused
