"""Every architecture that is exported: llama.cpp computes what transformers computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gguf
from qkern.checkpoints import CheckpointWriter
from qkern.errors import FormatError, UnsupportedError
from qkern.gguf import ARCHITECTURES, GGUFFile
from qkern.nn import quant_linears
from qkern.ops import dequantize_groupwise, quantize_groupwise
from qkern.pipelines import export_gguf, load, quantize
from qkern.schemes import Scheme

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FACTORS = {"long_factor": [1.5 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)]}
LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
        **FACTORS,
    },
}
VARIANTS = {
    "mixtral": {},
    "mixtral-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "mixtral-eight": {"num_local_experts": 8, "head_dim": 32},
    "qwen2_moe": {},
    "qwen2_moe-tied": {"tie_word_embeddings": True},
    "qwen3_moe": {"tie_word_embeddings": False},
    "qwen3_moe-tied": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 8},
    "gemma2-wide": {
        "sliding_window": 16,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "num_key_value_heads": 4,
        "final_logit_softcapping": 12.0,
        "attn_logit_softcapping": 20.0,
    },
    "phi3": {},
    "phi3-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "phi3-partial": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "phi3-longrope": LONGROPE,
}
FUSED = ["mixtral", "qwen2_moe", "qwen3_moe"]


def fuse_experts(folder, model):
    """Rewrite a checkpoint as transformers has the model in memory: experts as 3-D parameters."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def in_memory(weights, model):
    """Weights of a file as the model has them: experts as 3-D parameters, a tied head twice."""
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for layer in range(model.config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts."
        own = {name: weights.pop(name) for name in list(weights) if name.startswith(experts)}
        if own:
            gate, up, down = (
                torch.stack([own[name] for name in own if name.endswith(f"{part}_proj.weight")])
                for part in ("gate", "up", "down")
            )
            weights |= {f"{experts}gate_up_proj": torch.cat((gate, up), 1), f"{experts}down_proj": down}
    return weights


def assert_same_logits(runner, model, lengths=(3, 17, 48)):
    # sdpa leaves soft-capping out.
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(0, 2000, (1, length), generator=generator)
        with torch.inference_mode():
            expected = model(ids).logits
        error = (runner(ids) - expected).abs().max() / expected.abs().max()
        assert error < 1e-3


def folder_of(variant, model_folder):
    return model_folder(variant.split("-")[0], **VARIANTS[variant])


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "phi3-longrope"])
def test_logits_equal_those_of_transformers(variant, model_folder, run_gguf, tmp_path):
    folder, model = folder_of(variant, model_folder)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert_same_logits(run_gguf(tmp_path / "model.gguf"), model)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLDER = {
    "llama": ({"rope_type": "default"}, None, None),
    "llama-linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, None),
    "llama-llama3": ({"rope_type": "llama3", **LLAMA3}, {"rope_type": "llama3", **LLAMA3}, None),
    "phi3": (
        {"rope_type": "longrope", "original_max_position_embeddings": 256, **FACTORS},
        {"type": "longrope", **FACTORS},
        {"max_position_embeddings": 512, "original_max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("variant", OLDER)
def test_an_older_configuration_gives_the_same_file(variant, model_folder, tmp_path):
    rope, scaling, sizes = OLDER[variant]
    rope = {"rope_theta": 500.0, **rope}
    folder, _ = model_folder(variant.split("-")[0], rope_parameters=rope, **(sizes or {}))
    export_gguf(folder, tmp_path / "new.gguf", "f32")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "old.gguf", "f32")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "phi3"])
def test_quantized_files_run(kind, model_type, model_folder, run_gguf, tmp_path):
    # All experts of a token, lest a router near a tie chooses another one once activations are rounded.
    settings = {"num_experts_per_tok": 4} if model_type in FUSED else VARIANTS[model_type]
    folder, model = model_folder(model_type, hidden_size=256, **settings)
    model.set_attn_implementation("eager")
    export_gguf(folder, tmp_path / "model.gguf", kind)
    with GGUFFile(tmp_path / "model.gguf") as file:
        model.load_state_dict(in_memory(dict(file.state_dict()), model))
    ids = torch.arange(1, 400, 8)[None]
    with torch.inference_mode():
        expected = model(ids).logits
    error = (run_gguf(tmp_path / "model.gguf")(ids) - expected).norm() / expected.norm()
    # llama.cpp rounds activations: to int8 beside quantized weights, to 16 bits beside 16-bit ones.
    assert error < (0.005 if kind == "f16" else 0.05)


@pytest.mark.parametrize("model_type", FUSED)
def test_experts_as_3d_parameters_give_the_same_file(model_type, model_folder, tmp_path):
    folder, model = model_folder(model_type)
    assert any(".experts.0." in name for name in load_file(folder / "model.safetensors"))
    export_gguf(folder, tmp_path / "one.gguf", "q8_0")
    fuse_experts(folder, model)
    export_gguf(folder, tmp_path / "fused.gguf", "q8_0")
    assert (tmp_path / "fused.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize(("context", "lengths"), [(256, (3, 17, 200)), (512, (257, 300, 400))])
def test_longrope_has_factors_for_short_and_long_contexts(context, lengths, model_folder, run_gguf, tmp_path):
    folder, model = folder_of("phi3-longrope", model_folder)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    # transformers chooses by the text's length, llama.cpp by the context's.
    assert_same_logits(run_gguf(tmp_path / "model.gguf", context), model, lengths)


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_weights_come_back(variant, model_folder, tmp_path):
    folder, _ = folder_of(variant, model_folder)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    stored = load_file(folder / "model.safetensors")
    architecture = ARCHITECTURES[variant.split("-")[0]]
    expected = {architecture.own_name(name): tensor for name, tensor in stored.items()}
    with GGUFFile(tmp_path / "model.gguf") as file:
        weights = dict(file.state_dict())
    if variant == "qwen2_moe-tied":
        assert torch.equal(weights.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        # Gemma's norms are stored with one added, which rounds.
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6 if "norm" in name else 0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(model_type):
    architecture = ARCHITECTURES[model_type]
    config = {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "qkv_bias": True}
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[number]}
    names = {name.rpartition(".")[0] for name in architecture.names(config).values()}
    assert names <= known


REFUSED = {
    "norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False .*allowed is True"),
    "shared": ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True .*allowed is False"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
    "every second": ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100 .*allowed is 16"),
    "head": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
    "windows": ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types .*full_attention"),
    "rope": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary scaling 'dynamic' .*allowed are default, linear, yarn",
    ),
    "llama3": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "rotary scaling 'llama3' .*allowed are default, linear, yarn",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(what, model_folder, tmp_path):
    model_type, changes, message = REFUSED[what]
    folder, _ = model_folder(model_type, sliding_window=8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedError, match=message):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_head_for_which_llama_cpp_has_no_tensor_is_refused(model_folder, tmp_path):
    folder, _ = model_folder("gemma2", sliding_window=8)
    tensors = load_file(folder / "model.safetensors")
    for name, change in (("same", 0), ("other", 1)):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if change:
            with pytest.raises(
                UnsupportedError, match=r"lm_head\.weight differs from the embedding, .*gemma2"
            ):
                export_gguf(folder, tmp_path / f"{name}.gguf", "f32")
        else:
            export_gguf(folder, tmp_path / f"{name}.gguf", "f32")
    assert [file.name for file in tmp_path.iterdir()] == ["same.gguf"]


def test_a_missing_expert_is_named(model_folder, tmp_path):
    folder, _ = model_folder("mixtral")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".1." in name and ".experts.2." in name and "w2" in name)
    tensors["model.layers.0.mlp.experts.9.down_proj.weight"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        FormatError,
        match=r"missing are \['model.layers.1.mlp.experts.2.down_proj.weight'\], left over are .*experts.9",
    ):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def test_experts_of_a_quantized_checkpoint(model_folder, tmp_path):
    folder, model = model_folder("qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    expected = {}
    with CheckpointWriter(tmp_path / "quantized", format="compressed-tensors") as writer:
        for name, tensor in load_file(folder / "model.safetensors").items():
            if ".experts." in name:
                weight = quantize_groupwise(tensor, Scheme.parse("w4g32"))
                writer.add_quantized(name.removesuffix(".weight"), weight)
                expected[name] = dequantize_groupwise(weight).float()
            else:
                writer.add_tensor(name, tensor)
                expected[name] = tensor
        writer.finish(model.config, tokenizer_from=folder)
    export_gguf(tmp_path / "quantized", tmp_path / "model.gguf", "f32")
    with GGUFFile(tmp_path / "model.gguf") as file:
        weights = dict(file.state_dict())
    assert set(weights) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    # In the type of their grid they keep their codes.
    report = export_gguf(tmp_path / "quantized", tmp_path / "codes.gguf", "q4_0")
    with GGUFFile(tmp_path / "codes.gguf") as file:
        weights = dict(file.state_dict())
    assert all(torch.equal(weights[name], expected[name]) for name in weights if ".experts." in name)
    assert all(exact for name, exact in report.exact.items() if "_exps" in name)


@pytest.mark.parametrize("model_type", FUSED)
def test_codes_of_quantized_experts_are_kept(model_type, model_folder, tmp_path):
    sizes = {} if model_type == "mixtral" else {"moe_intermediate_size": 64}
    folder, _ = model_folder(model_type, hidden_size=128, shared_expert_intermediate_size=64, **sizes)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    quantize(folder, scheme="w4g32", calibration=ids, output=tmp_path / "quantized")
    export_gguf(tmp_path / "quantized", tmp_path / "model.gguf", "q4_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        written = dict(file.state_dict())
    linears = quant_linears(load(tmp_path / "quantized"))
    experts = [name for name in linears if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        assert torch.equal(written[f"{name}.weight"], linears[name].dequantize()), name
