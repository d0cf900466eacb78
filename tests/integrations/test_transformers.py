"""transformers' own entry points on qkern: the same logits as `qkern.load`, and nothing random is loaded."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import qkern
from qkern.demo import MODEL
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.integrations.hf_config import STORED
from qkern.integrations.hf_methods import QkernConfig, disable, enable
from qkern.nn import QuantEmbedding, quant_linears, unfuse_experts

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
TEXTS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
Q_PROJ = "model.layers.0.self_attn.q_proj"
RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq", "calibration": TEXTS}
DESC_ACT: dict[str, Any] = {**GPTQ, "act_order": "desc_act"}
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "gptq", "w2g32", RTN),
    ("llama", "gptq", "w3", RTN),
    ("llama", "gptq", "w4g32", DESC_ACT),
    ("llama", "gptq", "w8g64", RTN),  # 64 does not divide 96: a short last group
    ("llama", "gptq_v2", "w2z", RTN),
    ("llama", "gptq_v2", "w3g32z", DESC_ACT),
    ("llama", "gptq_v2", "w4g32z", RTN),
    ("llama", "gptq_v2", "w8g64z", RTN),
    ("llama", "awq", "w4g32z", RTN),
    ("llama", "awq", "w4", RTN),
    ("llama", "compressed-tensors", "w2g32", RTN),
    ("llama", "compressed-tensors", "w3g32z", RTN),
    ("llama", "compressed-tensors", "w4g16z", RTN),
    ("llama", "compressed-tensors", "w8", RTN),
    ("llama", "compressed-tensors", "w8a8", RTN),  # int-quantized: codes are called weight
    ("qwen2", "compressed-tensors", "w8a8", {**RTN, "activations": "static", "calibration": TEXTS}),
    ("qwen2", "awq", "w4g32z", RTN),  # tied embeddings
    ("gpt2", "gptq", "w4g32", RTN),  # Conv1D
    ("phi3", "gptq_v2", "w4g32z", DESC_ACT),
    ("mixtral", "gptq", "w4g32", {**RTN, "skip": ["experts"]}),
    ("qwen3_moe", "compressed-tensors", "w4g32", {**RTN, "skip": ["experts"]}),
]


@pytest.fixture(scope="module")
def llama(originals: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint of Llama, in shards; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    qkern.quantize(originals("llama"), scheme="w4g32", output=folder, max_shard_size="30KB", **RTN)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def from_pretrained(*arguments: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(*arguments, **options)


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def description(folder: Path) -> dict[str, Any]:
    """quantization_config of a folder, its lists without their order."""
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "format", "scheme", "options"), CASES, ids=["-".join(case[:3]) for case in CASES]
)
def test_logits_are_those_of_load(
    originals: Any, tmp_path: Path, kind: str, format: str, scheme: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "quantized"
    qkern.quantize(originals(kind), scheme=scheme, format=format, output=folder, **options)
    expected = qkern.load(folder)
    model = from_pretrained(folder)
    assert sorted(quant_linears(model)) == sorted(quant_linears(expected)) != []
    before = load_file(folder / "model.safetensors")

    model.save_pretrained(tmp_path / "saved")
    assert bool(unfuse_experts(model)) == ("skip" in options)  # stacks sum in another order
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(model(IDS).logits, logits(expected))  # nothing wants gradients, so the same arithmetic
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for again in (qkern.load(tmp_path / "saved"), from_pretrained(tmp_path / "saved")):
        unfuse_experts(again)
        assert torch.equal(logits(again), logits(expected))
    assert description(tmp_path / "saved") == description(folder)


def test_mixed_bits(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    bits = {"q_proj": "w8", "k_proj": "w2g32", "v_proj": "w3", "o_proj": "w4g32"}
    names = [f"model.layers.{index}.self_attn.{name}" for index in range(2) for name in bits]
    qkern.replace_linears(model, {name: bits[name.rpartition(".")[2]] for name in names})
    for format in ("gptq", "compressed-tensors"):
        qkern.save(model, tmp_path / format, format=format)
        loaded = from_pretrained(tmp_path / format)
        assert torch.equal(logits(loaded), logits(qkern.load(tmp_path / format)))
        assert {name: str(layer.scheme) for name, layer in quant_linears(loaded).items()} == {
            name: bits[name.rpartition(".")[2]] for name in names
        }
        loaded.save_pretrained(tmp_path / f"{format}-saved")
        assert torch.equal(logits(from_pretrained(tmp_path / f"{format}-saved")), logits(loaded))


def test_generate(llama: Path) -> None:
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(IDS),
    }
    expected = qkern.load(llama).generate(IDS, **options)
    assert expected.shape == (2, 17)
    assert torch.equal(from_pretrained(llama).generate(IDS, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(llama: Path, dtype: torch.dtype) -> None:
    model = from_pretrained(llama, dtype=dtype)
    assert model.dtype == dtype
    scales = quant_linears(model)[Q_PROJ].scales
    assert scales is not None
    assert scales.dtype == torch.float16  # as stored
    assert torch.equal(logits(model), logits(qkern.load(llama, dtype=dtype)))


def test_dtype_of_the_config(llama: Path) -> None:
    assert from_pretrained(llama, dtype="auto").dtype == from_pretrained(llama).dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"dtype must be .* got torch\.float64"):
        from_pretrained(llama, dtype=torch.float64)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(llama: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    model = from_pretrained(llama, device_map=device_map)
    assert torch.equal(logits(model), logits(qkern.load(llama)))


def test_device_map_of_a_disk_is_refused(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(UnsupportedError, match="cannot be offloaded to disk"):
        from_pretrained(llama, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path)


def test_devices_are_chosen_by_the_size_of_codes(llama: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers.integrations.accelerate import compute_module_sizes

    quantizer = STORED["gptq"].from_dict(
        json.loads((llama / "config.json").read_text())["quantization_config"]
    )
    quantizer = AUTO_QUANTIZER_MAPPING["gptq"](quantizer, pre_quantized=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
        quantizer.preprocess_model(
            model, checkpoint_files=[str(file) for file in llama.glob("*.safetensors")]
        )
    sizes, _ = compute_module_sizes(model, quantizer)
    # 4 bits a weight, and 16 more for 32 of them; the bias is bf16.
    assert sizes[Q_PROJ] == 64 * 64 * 4.5 / 8 + 64 * 2


def test_other_options_of_from_pretrained(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "repository" / "inside")
    model, info = from_pretrained(
        tmp_path / "repository", subfolder="inside", attn_implementation="eager", output_loading_info=True
    )
    assert model.config._attn_implementation == "eager"
    assert not any(info.values())
    config = transformers.AutoConfig.from_pretrained(llama)
    given = from_pretrained(llama, config=config, use_safetensors=True)
    assert torch.equal(logits(given), logits(qkern.load(llama)))


def test_state_dict(llama: Path) -> None:
    tensors = {
        name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    config = transformers.AutoConfig.from_pretrained(llama)
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(logits(model), logits(qkern.load(llama)))
    spoilt = tensors | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], torch.nan)}
    with pytest.raises(FormatError, match=r"the state_dict: model\.norm\.weight has NaN or Inf values"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=spoilt)
    del tensors["model.norm.weight"]
    with pytest.raises(FormatError, match=r"the state_dict does not fit .* missing: model\.norm\.weight"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


@pytest.mark.parametrize("scheme", ["w4g32z", "w4g32", "w3g32", None])
def test_a_model_is_pickled(
    folders: dict[str, Path], originals: Any, tmp_path: Path, scheme: str | None
) -> None:
    made = {"quantization_config": QkernConfig("w4g32")} if scheme is None else {}
    model = from_pretrained(originals("llama") if scheme is None else folders[scheme], **made)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(qkern.load(tmp_path / "saved")), logits(model))


def test_shards_on_saving(llama: Path, tmp_path: Path) -> None:
    from_pretrained(llama).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(qkern.load(llama)))
    qkern.save(from_pretrained(llama), tmp_path / "other", format="compressed-tensors")
    assert torch.equal(logits(from_pretrained(tmp_path / "other")), logits(qkern.load(llama)))


def test_description_survives_saving(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "described"
    shutil.copytree(llama, folder)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**stored, "damp_percent": 0.0123, "dynamic": {"-:absent": {}}})
    from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved == {**stored, "damp_percent": 0.0123}


def test_names_of_a_bare_decoder(llama: Path, rewrite: Any, tmp_path: Path) -> None:
    bare = rewrite(
        llama,
        tmp_path / "bare",
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    )
    assert torch.equal(logits(from_pretrained(bare)), logits(qkern.load(llama)))


def test_names_that_the_caller_maps(llama: Path, rewrite: Any, tmp_path: Path) -> None:
    renamed = rewrite(
        llama,
        tmp_path / "renamed",
        lambda tensors: {name.replace("model.", "backbone.", 1): tensor for name, tensor in tensors.items()},
    )
    model = from_pretrained(renamed, key_mapping={r"^backbone\.": "model."})
    assert torch.equal(logits(model), logits(qkern.load(llama)))


def test_bias_that_the_architecture_has_not(llama: Path, rewrite: Any, tmp_path: Path) -> None:
    bias = {f"model.layers.{index}.mlp.up_proj.bias": torch.randn(96).bfloat16() for index in range(2)}
    folder = rewrite(llama, tmp_path / "biased", lambda tensors: tensors | bias)
    model = from_pretrained(folder)
    assert torch.equal(model.get_submodule("model.layers.1.mlp.up_proj").bias, bias.popitem()[1])
    assert torch.equal(logits(model), logits(qkern.load(folder)))


def test_quantized_head_is_not_tied(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    qkern.replace_linears(model, "w8", skip=())
    qkern.save(model, tmp_path / "head")
    edit_config(tmp_path / "head", tie_word_embeddings=True)  # as other writers leave it
    loaded = from_pretrained(tmp_path / "head")
    assert "lm_head" in quant_linears(loaded)
    assert torch.equal(logits(loaded), logits(qkern.load(tmp_path / "head")))
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False


def test_pipeline(tmp_path: Path) -> None:
    qkern.quantize(MODEL, scheme="w4g128", output=tmp_path / "model", **RTN)
    run = transformers.pipeline("text-generation", model=str(tmp_path / "model"))
    assert quant_linears(run.model)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    text = run("And the king said unto", **options)[0]["generated_text"]
    plain = transformers.pipeline(
        "text-generation", model=qkern.load(tmp_path / "model"), tokenizer=run.tokenizer
    )
    assert text == plain("And the king said unto", **options)[0]["generated_text"] != ""


def test_adapters_can_be_trained(llama: Path) -> None:
    model = from_pretrained(llama)
    assert model.hf_quantizer.is_trainable
    assert model.is_quantized
    assert not any(parameter.requires_grad for parameter in model.parameters())
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantize(originals: Any, tmp_path: Path, kind: str) -> None:
    qkern.quantize(originals(kind), scheme="w4g32", output=tmp_path / "model", **RTN)
    model = from_pretrained(tmp_path / "model", dtype=torch.float32)
    for layer in quant_linears(model).values():
        layer.compute = "float"
    expected = logits(model)
    model = model.dequantize()
    assert not quant_linears(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")  # a plain model again
    assert torch.equal(logits(from_pretrained(tmp_path / "dense")), logits(model))


def test_decoded_models_are_saved_without_a_description(llama: Path, tmp_path: Path) -> None:
    model = from_pretrained(llama, dtype=torch.float32)
    for name, layer in quant_linears(model).items():
        model.set_submodule(name, layer.to_linear())
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    for load in (from_pretrained, qkern.load):
        assert torch.equal(logits(load(tmp_path / "dense")), logits(model))
    assert not model.is_quantized


def test_what_save_refuses_is_refused_by_save_pretrained(llama: Path, tmp_path: Path) -> None:
    trained = from_pretrained(llama)
    qkern.prepare_qat(trained, "w4g32", learn_scales=True)
    embedded = from_pretrained(llama)
    table = QuantEmbedding.from_embedding(embedded.get_input_embeddings(), "w8")
    embedded.set_input_embeddings(table)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for model, reason in ((trained, "layers in training"), (embedded, "quantized embeddings")):
        for folder in ("saved", "saved/deeper/still", "mine", "mine/deeper"):
            with pytest.raises(UnsupportedError, match=f"no checkpoint format holds {reason}"):
                model.save_pretrained(tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


# What does not fit


def without(*ends: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


BROKEN = {
    "a layer": (
        without(
            "0.self_attn.q_proj.qweight",
            *(f"0.self_attn.q_proj.{part}" for part in ("qzeros", "scales", "g_idx")),
        ),
        rf"missing: {Q_PROJ}\.weight",
    ),
    "a part": (without("0.self_attn.q_proj.qzeros"), rf"tensor {Q_PROJ}\.qzeros is missing"),
    "codes": (without("0.self_attn.q_proj.qweight"), rf"tensor {Q_PROJ}\.qweight is missing"),
    "a norm": (without("model.norm.weight"), r"missing: model\.norm\.weight"),
    "biases": (
        without("q_proj.bias"),
        rf"missing: {Q_PROJ}\.bias, model\.layers\.1\.self_attn\.q_proj\.bias",
    ),
    "left over": (
        lambda tensors: (
            tensors | {"model.extra.weight": torch.ones(3), "model.layers.0.stray": torch.ones(1)}
        ),
        r"left over: model\.extra\.weight, model\.layers\.0\.stray",
    ),
    "a layer too many": (
        lambda tensors: (
            tensors
            | {
                name.replace("layers.1.", "layers.2."): tensor.clone()
                for name, tensor in tensors.items()
                if "layers.1.mlp" in name
            }
        ),
        r"left over: model\.layers\.2\.mlp\.down_proj\.weight",
    ),
    "both": (
        lambda tensors: tensors | {f"{Q_PROJ}.weight": torch.ones(64, 64)},
        rf"{Q_PROJ} is there both quantized and plain",
    ),
    "another shape": (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(32)},
        r"of another shape: model\.norm\.weight",
    ),
    "a layer of another shape": (
        lambda tensors: (
            tensors
            | {
                f"{Q_PROJ}.{part}": tensors[f"model.layers.0.self_attn.k_proj.{part}"].clone()
                for part in ("qweight", "qzeros", "scales", "g_idx")
            }
        ),
        rf"of another shape: {Q_PROJ}",
    ),
    "scales": (
        lambda tensors: tensors | {f"{Q_PROJ}.scales": torch.full((2, 64), torch.nan).half()},
        rf"the scales of {Q_PROJ} have NaN",
    ),
    "an embedding": (
        lambda tensors: {
            name.replace("model.layers.0.self_attn.q_proj", "model.embed_tokens"): tensor
            for name, tensor in without("embed_tokens.weight")(tensors).items()
        },
        r"left over: model\.embed_tokens\.",
    ),
    "nothing quantized": (without("qweight"), r"no tensor name ends in \.qweight"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_by_name(
    llama: Path, rewrite: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    change, message = BROKEN[what]
    folder = rewrite(llama, tmp_path / "broken", change)
    with pytest.raises(FormatError, match=message) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "LOAD REPORT" not in capfd.readouterr().err  # one error, and no advice that contradicts it


def test_integers_without_scales_are_refused(originals: Any, rewrite: Any, tmp_path: Path) -> None:
    qkern.quantize(originals("llama"), scheme="w8a8", output=tmp_path / "int8", **RTN)
    folder = rewrite(tmp_path / "int8", tmp_path / "broken", without("0.self_attn.q_proj.weight_scale"))
    with pytest.raises(FormatError, match=rf"{Q_PROJ}\.weight_scale is missing"):
        from_pretrained(folder)


def test_other_kernels_are_refused(llama: Path) -> None:
    with (
        pytest.warns(UserWarning, match="already has a `quantization_config`"),
        pytest.raises(InputError, match="backend='marlin' is about other kernels"),
    ):
        from_pretrained(llama, quantization_config=GPTQConfig(bits=4, backend="marlin"))


def test_config_for_a_checkpoint_that_has_one(llama: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = from_pretrained(llama, quantization_config=GPTQConfig(bits=4))
    assert torch.equal(logits(model), logits(qkern.load(llama)))


def test_dequantizing_on_loading(originals: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    qkern.quantize(
        originals("llama"), scheme="w8", format="compressed-tensors", output=tmp_path / "w8", **RTN
    )
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        dense = from_pretrained(
            tmp_path / "w8", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    expected = logits(qkern.load(tmp_path / "w8", dtype=torch.float32, compute="float"))
    assert not quant_linears(dense)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=1e-5)


# Taking over and giving back


def test_disabling_gives_everything_back() -> None:
    ours = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    enable()
    assert ours == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    disable()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is transformers.quantizers.quantizer_gptq.GptqHfQuantizer
    assert AUTO_QUANTIZER_MAPPING["awq"] is transformers.quantizers.quantizer_awq.AwqQuantizer
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is CompressedTensorsConfig
    disable()
    qkern.enable()
    assert ours == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_importing_enables(monkeypatch: pytest.MonkeyPatch) -> None:
    disable()
    monkeypatch.delitem(sys.modules, "qkern.integrations.transformers", raising=False)
    importlib.import_module("qkern.integrations.transformers")
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is STORED["gptq"]


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("awq", {"bits": 4, "version": "gemv"}),
        ("gptq", {"bits": 4, "format": "marlin"}),
        ("compressed-tensors", {"format": "float-quantized"}),
    ],
)
def test_what_qkern_does_not_read_is_left_to_transformers(
    caplog: pytest.LogCaptureFixture, method: str, fields: dict[str, Any]
) -> None:
    theirs = STORED[method].__bases__[1]
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[method].from_dict({"quant_method": method, **fields})
    assert type(config) is theirs
    assert "left to transformers" in caplog.text
    assert "is not read" in caplog.text


def test_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.quantizers.base.HfQuantizer, "get_new_dtype")
    with pytest.raises(UnsupportedError, match=r"5\.21 or newer"):
        enable()
