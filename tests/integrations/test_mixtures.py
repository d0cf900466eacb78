"""Mixtures of experts through transformers: experts are `QuantLinear`, under the names of the checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, MixtralForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import qkern
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.integrations import hf_methods
from qkern.integrations.hf_methods import QkernConfig
from qkern.integrations.hf_quantizer import LoadTimeQuantizer
from qkern.nn import (
    Experts,
    OutlierLinear,
    QuantLinear,
    expert_parameters,
    own_name,
    quant_linears,
    stored_name,
    unfuse_experts,
)

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
TEXTS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# Multiples of 32, which GPTQ's layout needs.
SIZES = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
STORED = stored_name("mixtral", EXPERT)
RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq", "calibration": TEXTS}
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    *((kind, "gptq", "w4g32", {**GPTQ, "act_order": "desc_act"}) for kind in MIXTURES),
    *((kind, "compressed-tensors", "w8a8", RTN) for kind in MIXTURES),  # whose codes are called weight
    ("mixtral", "gptq_v2", "w3g32z", RTN),
    ("mixtral", "awq", "w4g32z", RTN),
    ("mixtral", "compressed-tensors", "w4g32", RTN),
    ("qwen2_moe", "awq", "w4g32z", RTN),
    ("qwen3_moe", "gptq", "w4g32", {**RTN, "skip": ["layers.0.mlp.experts", "experts.1.up_proj"]}),
    ("mixtral", "gptq", None, {**RTN, "assignment": {"*.experts.*.down_proj": "w8", "q_proj": "w4g32"}}),
]


@pytest.fixture(scope="module")
def mixture(originals: Any) -> Any:
    """Maker of 16-bit folders."""
    return lambda kind: originals(kind, **SIZES)


@pytest.fixture(scope="module")
def mixtral(mixture: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint, in shards; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("quantized") / "mixtral"
    qkern.quantize(mixture("mixtral"), scheme="w4g32", output=folder, max_shard_size="60KB", **RTN)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def from_pretrained(*arguments: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(*arguments, **options)


def same_tensors(one: Path, other: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    return before.keys() == after.keys() and all(
        torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


def description(folder: Path) -> dict[str, Any]:
    """quantization_config of a folder, its lists without their order."""
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "format", "scheme", "options"), CASES, ids=["-".join(map(str, case[:3])) for case in CASES]
)
def test_logits_are_those_of_load(
    mixture: Any, tmp_path: Path, kind: str, format: str, scheme: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "quantized"
    qkern.quantize(mixture(kind), scheme=scheme, format=format, output=folder, **options)
    expected = qkern.load(folder)
    model = from_pretrained(folder)
    assert isinstance(model.model.layers[1].mlp.experts, Experts)
    assert sorted(quant_linears(model)) == sorted(quant_linears(expected))
    assert any(".experts." in name for name in quant_linears(model))
    assert torch.equal(logits(model), logits(expected))

    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(folder, tmp_path / "saved")
    assert description(folder) == description(tmp_path / "saved")
    for again in (qkern.load(tmp_path / "saved"), from_pretrained(tmp_path / "saved")):
        assert torch.equal(logits(again), logits(expected))


@pytest.mark.parametrize(
    ("kind", "scheme"), [("mixtral", "nf4g32d"), ("qwen2_moe", "fp4g32"), ("qwen3_moe", "w8a8")]
)
def test_experts_that_bitsandbytes_does_not_know(
    mixture: Any, tmp_path: Path, kind: str, scheme: str
) -> None:
    pytest.importorskip("bitsandbytes")
    if scheme == "w8a8":
        model = from_pretrained(mixture(kind))
        qkern.replace_linears(model, scheme, kind=OutlierLinear)
        for layer in quant_linears(model).values():
            layer.threshold = 0.125  # of what reaches the experts here, some is larger
        qkern.save(model, tmp_path / "quantized")
    else:
        qkern.quantize(mixture(kind), scheme=scheme, output=tmp_path / "quantized", **RTN)
    expected, model = qkern.load(tmp_path / "quantized"), from_pretrained(tmp_path / "quantized")
    assert {type(layer) for layer in quant_linears(model).values()} == {
        OutlierLinear if scheme == "w8a8" else QuantLinear
    }
    assert quant_linears(model).keys() == quant_linears(expected).keys()
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", tmp_path / "quantized")
    assert description(tmp_path / "saved") == description(tmp_path / "quantized")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(expected))


def test_what_is_refused_of_experts_that_bitsandbytes_does_not_know(mixture: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = tmp_path / "out"
    qkern.quantize(mixture("mixtral"), scheme="nf4g32", output=folder, **RTN)
    with pytest.raises(InputError, match=r"kernels compute in: got torch\.float64"):
        from_pretrained(folder, dtype=torch.float64)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    stored = config["quantization_config"]
    offload = {"llm_int8_enable_fp32_cpu_offload": True}
    file.write_text(json.dumps(config | {"quantization_config": stored | offload}))
    with pytest.raises(UnsupportedError, match="cannot be offloaded to disk"):
        from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)
    bits = {"load_in_4bit": False, "load_in_8bit": True, "_load_in_4bit": False, "_load_in_8bit": True}
    file.write_text(json.dumps(config | {"quantization_config": stored | bits}))
    with pytest.raises(FormatError, match=r"no tensor name ends in \.SCB; .* else correct it"):
        from_pretrained(folder)


def test_16_bit_experts_beside_bitsandbytes_layers_are_left_to_transformers(
    mixture: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    qkern.quantize(mixture("mixtral"), scheme="nf4g64", skip=["experts"], output=tmp_path / "out", **RTN)
    model = from_pretrained(tmp_path / "out")
    assert isinstance(model.hf_quantizer, Bnb4BitHfQuantizer)
    assert not quant_linears(model)


def test_16_bit_files_are_left_to_bitsandbytes_unseen(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.delattr(hf_methods, "stored_names")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = from_pretrained(mixture("mixtral"), quantization_config=config)
    assert isinstance(model.hf_quantizer, Bnb4BitHfQuantizer)


def test_generate(mixtral: Path) -> None:
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(IDS),
    }
    expected = qkern.load(mixtral).generate(IDS, **options)
    assert expected.shape == (2, 17)
    assert torch.equal(from_pretrained(mixtral).generate(IDS, **options), expected)


def test_device_map(mixtral: Path) -> None:
    pytest.importorskip("accelerate")
    assert torch.equal(logits(from_pretrained(mixtral, device_map="auto")), logits(qkern.load(mixtral)))


def test_a_state_dict(mixtral: Path) -> None:
    tensors = {
        name: value for file in mixtral.glob("*.safetensors") for name, value in load_file(file).items()
    }
    config = AutoConfig.from_pretrained(mixtral)
    model = MixtralForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(logits(model), logits(qkern.load(mixtral)))


def test_experts_that_stay_16_bit_stay_stacks(mixture: Any, rewrite: Any, tmp_path: Path) -> None:
    skip = ["experts"]
    qkern.quantize(mixture("mixtral"), scheme="w4g32", skip=skip, output=tmp_path / "out", **RTN)
    names = rewrite(
        tmp_path / "out",
        tmp_path / "names",
        lambda tensors: {own_name("mixtral", name): tensor for name, tensor in tensors.items()},
    )
    config = QkernConfig("w4g32", skip=skip)
    for implementation in ("eager", "grouped_mm"):
        options = {"experts_implementation": implementation}
        expected = qkern.load(tmp_path / "out")
        for model in (
            from_pretrained(tmp_path / "out", **options),
            from_pretrained(mixture("mixtral"), quantization_config=config, **options),
        ):
            assert len(expert_parameters(model)) == 4
            assert model.config._experts_implementation == implementation
            assert quant_linears(model).keys() == quant_linears(expected).keys()
            assert torch.allclose(logits(model), logits(expected), rtol=0.05, atol=0.05)
    # transformers does not stack these, nor those of one layer only.
    assert not expert_parameters(from_pretrained(names))
    some = QkernConfig("w4g32", skip=["layers.0.mlp.experts"])
    assert not expert_parameters(from_pretrained(mixture("mixtral"), quantization_config=some))


def test_names_of_transformers_become_those_of_checkpoints(
    mixtral: Path, rewrite: Any, tmp_path: Path
) -> None:
    renamed = rewrite(
        mixtral,
        tmp_path / "renamed",
        lambda tensors: {own_name("mixtral", name): tensor for name, tensor in tensors.items()},
    )
    assert f"{EXPERT}.qweight" in load_file(renamed / "model.safetensors")
    model = from_pretrained(renamed)
    assert torch.equal(logits(model), logits(qkern.load(mixtral)))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", rewrite(mixtral, tmp_path / "whole", dict))


def test_names_that_nothing_reads_are_not_written(mixtral: Path, folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="save_original_format=False writes names of experts"):
        from_pretrained(mixtral).save_pretrained(tmp_path / "saved", save_original_format=False)
    assert not (tmp_path / "saved").exists()
    from_pretrained(folders["w4g32"]).save_pretrained(tmp_path / "dense", save_original_format=False)
    assert same_tensors(tmp_path / "dense", folders["w4g32"])


def test_fused_16_bit_experts_beside_quantized_linears(
    mixture: Any, tiny: Any, rewrite: Any, tmp_path: Path
) -> None:
    qkern.quantize(mixture("mixtral"), scheme="w4g32", skip=["experts"], output=tmp_path / "out", **RTN)
    state = tiny("mixtral", dtype=torch.bfloat16, **SIZES).state_dict()
    experts = {name: tensor.contiguous() for name, tensor in state.items() if ".experts." in name}
    fused = rewrite(
        tmp_path / "out",
        tmp_path / "fused",
        lambda tensors: {name: t for name, t in tensors.items() if ".experts." not in name} | experts,
    )
    model = from_pretrained(fused)
    model.save_pretrained(tmp_path / "saved")
    assert unfuse_experts(model)  # whose sums are those of `load`
    assert torch.equal(logits(model), logits(qkern.load(fused)))
    assert same_tensors(tmp_path / "saved", tmp_path / "out")
    name = "model.layers.0.mlp.experts.down_proj"
    less = rewrite(fused, tmp_path / "less", lambda tensors: tensors | {name: tensors[name][:3].contiguous()})
    with pytest.raises(FormatError, match=rf"of another shape: {name}"):
        from_pretrained(less)


@pytest.mark.parametrize("load", [from_pretrained, qkern.load])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_decoded_model_is_a_plain_checkpoint_again(
    mixture: Any, tmp_path: Path, kind: str, load: Any
) -> None:
    qkern.quantize(mixture(kind), scheme="w4g32", output=tmp_path / "model", **RTN)
    model = load(tmp_path / "model", dtype=torch.float32)
    for name, layer in quant_linears(model).items():
        model.set_submodule(name, layer.to_linear(torch.float32))
    model.save_pretrained(tmp_path / "dense")
    assert (
        load_file(tmp_path / "dense" / "model.safetensors").keys()
        == load_file(mixture(kind) / "model.safetensors").keys()
    )
    dense, found = from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(found.values())
    assert expert_parameters(dense)  # transformers' own
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def without(*ends: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


BROKEN = {
    "a layer": (
        without(*(f"0.block_sparse_moe.experts.1.w3.{part}" for part in PARTS)),
        rf"missing: {EXPERT}\.weight",
    ),
    "a part": (without("0.block_sparse_moe.experts.1.w3.qzeros"), rf"tensor {STORED}\.qzeros is missing"),
    "a router": (without("0.block_sparse_moe.gate.weight"), r"missing: model\.layers\.0\.mlp\.gate\.weight"),
    "an expert too many": (
        lambda tensors: (
            tensors
            | {name.replace("experts.3.", "experts.4."): tensor.clone() for name, tensor in tensors.items()}
        ),
        r"left over: model\.layers\.0\.mlp\.experts\.4\.down_proj\.weight",
    ),
    "another shape": (
        lambda tensors: (
            tensors | {f"{STORED}.{part}": tensors[f"{STORED[:-2]}w2.{part}"].clone() for part in PARTS}
        ),
        rf"of another shape: {STORED}",
    ),
    "both": (
        lambda tensors: tensors | {f"{STORED}.weight": torch.ones(96, 64)},
        rf"{STORED} is there both quantized and plain",
    ),
    "the stack too": (
        lambda tensors: tensors | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 64, 96)},
        r"left over: model\.layers\.0\.mlp\.experts\.down_proj;",
    ),
    "scales": (
        lambda tensors: tensors | {f"{STORED}.scales": torch.full((2, 96), torch.nan).half()},
        rf"the scales of {STORED} have NaN",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_by_name(
    mixtral: Path, rewrite: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    change, message = BROKEN[what]
    folder = rewrite(mixtral, tmp_path / "broken", change)
    with pytest.raises(FormatError, match=message) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_int8_experts_of_another_shape(mixture: Any, rewrite: Any, tmp_path: Path) -> None:
    qkern.quantize(mixture("qwen3_moe"), scheme="w8a8", output=tmp_path / "int8", **RTN)
    for what, change, message in (
        ("scales", without(f"{EXPERT}.weight_scale"), rf"{EXPERT}\.weight_scale is missing"),
        ("codes", without(f"{EXPERT}.weight"), rf"{EXPERT}\.weight is missing"),
    ):
        with pytest.raises(FormatError, match=message):
            from_pretrained(rewrite(tmp_path / "int8", tmp_path / what, change))


# Quantizing on loading

LOAD_TIME: list[tuple[str, str, dict[str, Any]]] = [
    *((kind, "w4g32", RTN) for kind in MIXTURES),
    *((kind, "w4g32", GPTQ) for kind in MIXTURES),
    ("qwen2_moe", "w3g32z", {**RTN, "search": "mse", "skip": ["layers.1.mlp.experts", "experts.2.up_proj"]}),
    ("qwen3_moe", "w4g32z", {"method": "awq", "calibration": TEXTS}),
    ("mixtral", "w8a8", {"method": "smoothquant", "alpha": 0.5, "calibration": TEXTS}),
]


@pytest.mark.parametrize(
    ("kind", "scheme", "options"),
    LOAD_TIME,
    ids=[f"{case[0]}-{case[1]}-{case[2]['method']}" for case in LOAD_TIME],
)
def test_quantizing_on_loading_is_quantize(
    mixture: Any, tmp_path: Path, kind: str, scheme: str, options: dict[str, Any]
) -> None:
    qkern.quantize(mixture(kind), scheme=scheme, **options, output=tmp_path / "quantized")
    expected = qkern.load(tmp_path / "quantized")
    model = from_pretrained(mixture(kind), quantization_config=QkernConfig(scheme, **options))
    assert quant_linears(model).keys() == quant_linears(expected).keys()
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", tmp_path / "quantized")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(expected))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the linears that were rounded while weights were read, in this order."""
    names: list[str] = []
    take = LoadTimeQuantizer.take

    def noting(self: Any, layer: str, *arguments: Any) -> None:
        names.append(layer)
        take(self, layer, *arguments)

    monkeypatch.setattr(LoadTimeQuantizer, "take", noting)
    return names


def test_experts_are_rounded_as_they_are_read(
    mixture: Any, taken: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qkern")
    model = from_pretrained(mixture("qwen2_moe"), quantization_config=QkernConfig("w4g32"))
    assert sorted(taken) == sorted(quant_linears(model))
    left = sum(parameter.numel() for parameter in model.parameters())
    total = left + sum(layer.out_features * layer.in_features for layer in quant_linears(model).values())
    assert f"{left} of {total} parameters stay 16-bit" in caplog.text
    for kept in (
        "1 lm_head (output head)",
        "2 model.layers.#.mlp.gate (",
        "2 model.layers.#.mlp.shared_expert_gate (",
    ):
        assert kept in caplog.text


@pytest.mark.parametrize("kind", MIXTURES)
def test_files_that_have_the_experts_fused(
    mixture: Any, tiny: Any, tmp_path: Path, taken: list[str], kind: str
) -> None:
    model = tiny(kind, dtype=torch.bfloat16, **SIZES)
    model.config.save_pretrained(tmp_path / "fused")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "fused" / "model.safetensors",
        metadata={"format": "pt"},
    )
    expected = from_pretrained(mixture(kind), quantization_config=QkernConfig("w4g32"))
    taken.clear()
    model = from_pretrained(tmp_path / "fused", quantization_config=QkernConfig("w4g32"))
    assert taken
    assert not any(".experts." in name for name in taken)
    assert quant_linears(model).keys() == quant_linears(expected).keys()
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_bin_files_that_have_the_experts_fused(tiny: Any, tmp_path: Path, kind: str, zipped: bool) -> None:
    model = tiny(kind, dtype=torch.bfloat16, **SIZES)
    expected = qkern.quantize(model, method="rtn", scheme="w4g32")
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    model = from_pretrained(tmp_path, quantization_config=QkernConfig("w4g32"))
    assert torch.equal(logits(model), logits(expected))


def test_a_state_dict_that_has_the_experts_fused(tiny: Any, mixture: Any, mixtral: Path) -> None:
    original = tiny("mixtral", dtype=torch.bfloat16, **SIZES)
    fused = {name: tensor for name, tensor in original.state_dict().items() if ".experts." in name}
    with pytest.raises(UnsupportedError, match=r"the state_dict: model\.layers\.0\.mlp\.experts\.\w+, "):
        MixtralForCausalLM.from_pretrained(
            None,
            config=original.config,
            state_dict=original.state_dict(),
            quantization_config=QkernConfig("w4g32"),
        )
    tensors = {
        name: tensor
        for file in mixtral.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".experts." not in name
    }
    with pytest.raises(UnsupportedError, match="stacks of experts, which are read from files only"):
        MixtralForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(mixtral), state_dict=tensors | fused
        )


# Stacks under another name, linears under other names, and beside them convolutions that are stacked.
OTHERS: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "conv"],
        "num_dense_layers": 0,
    },
    "kimi_linear": {
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("skip", [(), ("experts",)], ids=["all", "no experts"])
@pytest.mark.parametrize("kind", OTHERS)
def test_architectures_with_other_names(tiny: Any, tmp_path: Path, kind: str, skip: tuple[str, ...]) -> None:
    original = tiny(kind, dtype=torch.bfloat16, **OTHERS[kind])
    original.save_pretrained(tmp_path / "16-bit")
    expected = qkern.quantize(original, method="rtn", scheme="w8", skip=skip)
    model = from_pretrained(tmp_path / "16-bit", quantization_config=QkernConfig("w8", skip=skip))
    assert quant_linears(model).keys() == quant_linears(expected).keys()
    assert any(".experts." in name for name in quant_linears(model)) != bool(skip)
    assert torch.allclose(logits(model), logits(expected), rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_experts_that_are_not_known_are_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    tiny("gpt_oss", dtype=torch.bfloat16, num_local_experts=4, head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        from_pretrained(tmp_path, quantization_config=QkernConfig("w4g32"))
    options = {"skip": ["experts"]}
    model = from_pretrained(tmp_path, quantization_config=QkernConfig("w4g32", **options))
    assert len(quant_linears(model)) == 8
    expected = qkern.quantize(tmp_path, scheme="w4g32", **RTN, **options)
    assert torch.equal(logits(model), logits(expected))
