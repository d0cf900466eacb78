"""Saving and loading whole models: logits are the same bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

from qkern import QuantEmbedding, QuantLinear, replace_linears
from qkern.checkpoints import FORMATS, read_json
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.nn import named_linears, quant_linears
from qkern.ops import pack_bits, quantize_groupwise, unpack_bits
from qkern.pipelines import load, save
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=128, bos_token_id=1, eos_token_id=2
    ),
    "phi3": Phi3Config(**SIZES),
}
IDS = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(0))
_MODELS: dict[tuple[str, torch.dtype], Any] = {}


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    if (kind, dtype) not in _MODELS:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # initialized to zero, which hides a lost bias
                    parameter.normal_(std=0.1)
        _MODELS[kind, dtype] = model
    return copy.deepcopy(_MODELS[kind, dtype])


def use_float(model: Any) -> Any:
    for linear in quant_linears(model).values():
        linear.compute = "float"
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def with_group_index(model: Any, scheme: Scheme) -> None:
    """Give every quantized linear columns whose groups are out of order."""
    generator = torch.Generator().manual_seed(2)
    for linear in quant_linears(model).values():
        qw = linear.quantized()
        order = torch.randperm(qw.K, generator=generator)
        codes = unpack_bits(qw.codes, scheme.bits, (qw.N, qw.K), layout="dense")[:, order]
        index = (torch.arange(qw.K, dtype=torch.int32) // scheme.group_length(qw.K))[order]
        linear.unpack()
        linear._adopt(
            QuantizedWeight(
                codes=pack_bits(codes, scheme.bits, layout="dense"),
                scales=qw.scales,
                shape=qw.shape,
                scheme=scheme,
                zeros=qw.zeros,
                group_index=index,
            )
        )


CASES = [
    ("gptq", "w2g32", False),
    ("gptq", "w3", True),
    ("gptq", "w4g32", True),
    ("gptq", "w8g64", False),  # 64 does not divide 96: a short last group
    ("gptq_v2", "w2z", False),
    ("gptq_v2", "w3g32z", True),
    ("gptq_v2", "w4g32z", True),
    ("gptq_v2", "w8g64z", True),
    ("awq", "w4g32z", False),
    ("awq", "w4", False),
    ("compressed-tensors", "w2g32", False),
    ("compressed-tensors", "w3g32z", False),
    ("compressed-tensors", "w4g16z", False),
    ("compressed-tensors", "w8", False),
]


# Every scheme on Llama; on the other architectures each format, with and without a group index.
ON_ALL = [CASES[2], CASES[3], CASES[5], CASES[8], CASES[10]]
RUNS = [(kind, *case) for kind in CONFIGS for case in (CASES if kind == "llama" else ON_ALL)]


@pytest.mark.parametrize(("kind", "format", "spelling", "act_order"), RUNS)
def test_logits_survive_save_and_load(
    tmp_path: Path, kind: str, format: str, spelling: str, act_order: bool
) -> None:
    scheme = Scheme.parse(spelling)
    model = model_of(kind)
    replaced = replace_linears(model, scheme)
    if act_order and scheme.group_size is not None:
        with_group_index(model, scheme)
    expected = logits(use_float(model))
    save(model, tmp_path / "out", format=format, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "out", compute="float")
    assert sorted(quant_linears(loaded)) == sorted(replaced)
    assert torch.equal(logits(loaded), expected)
    assert loaded.dtype == torch.bfloat16
    for name, linear in quant_linears(model).items():
        before, after = linear.quantized(), loaded.get_submodule(name).quantized()
        assert before.scheme == after.scheme
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(before.scales, after.scales)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sixteen_bit_models_and_their_buffers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    save(model, tmp_path / "plain")
    loaded = load(tmp_path / "plain")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    replace_linears(model, "w8g32")
    save(model, tmp_path / "quantized", format="gptq")
    buffers = dict(load(tmp_path / "quantized").named_buffers())
    for name, buffer in loaded.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_second_generation_is_the_same_file(tmp_path: Path, kind: str) -> None:
    first = quantized_folder(tmp_path, kind)
    second = save(load(first), tmp_path / "again", format="gptq")
    for name in ("model.safetensors", "quantize_config.json", "qkern.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def quantized_folder(
    tmp_path: Path, kind: str = "llama", format: str = "gptq", scheme: str = "w4g32"
) -> Path:
    model = model_of(kind)
    replace_linears(model, scheme)
    return save(model, tmp_path / "out", format=format)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu0"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here .*use auto or cpu"):
        load(tmp_path, device=device)


def test_dtype_and_device(tmp_path: Path) -> None:
    model = model_of("qwen2")
    replace_linears(model, "w4g32", scale_dtype=torch.bfloat16)
    save(model, tmp_path / "out", format="compressed-tensors")
    loaded = load(tmp_path / "out", dtype=torch.float32, device="auto")
    assert loaded.dtype == torch.float32
    assert loaded.config.dtype == torch.float32
    linear = loaded.model.layers[0].self_attn.q_proj
    assert linear.scales.dtype == torch.bfloat16
    assert linear.bias.dtype == torch.float32
    assert linear.compute == "auto"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    assert getattr(loaded.config, "quantization_config", None) is None
    with pytest.raises(InputError, match="compute"):
        load(tmp_path / "out", compute="int4")


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "float64", 32])
def test_another_dtype(tmp_path, dtype):
    with pytest.raises(InputError, match=rf"unknown dtype: got {dtype!r}, allowed are torch\.float32, "):
        load(tmp_path, dtype=dtype)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", torch.float16), ("auto", torch.bfloat16)])
def test_names_of_dtypes(tiny, tmp_path, dtype, expected):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, dtype=dtype).dtype is expected


@pytest.mark.parametrize(
    ("spellings", "dequantize"),
    [
        (("w4g16", "w3g32", "w8"), False),
        # Loading packed zero points, transformers has no other way, and this one takes a single scheme.
        (("w4g16z",), True),
    ],
)
def test_transformers_loads_the_same_model(
    tmp_path: Path, spellings: tuple[str, ...], dequantize: bool
) -> None:
    """transformers with the compressed-tensors package is another reader of the same folder."""
    model = model_of("llama", torch.float32)
    names = list(named_linears(model, skip=["lm_head"]))
    for i, spelling in enumerate(spellings):
        replace_linears(model, spelling, modules=names[i :: len(spellings)], scale_dtype=torch.float32)
    save(model, tmp_path / "out", format="compressed-tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
        other = logits(theirs)
    ours = logits(load(tmp_path / "out", compute="float"))
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    assert (ours - logits(model_of("llama", torch.float32))).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_mixed_schemes(tmp_path: Path, format: str) -> None:
    model = model_of("llama")
    names = list(named_linears(model, skip=["lm_head"]))
    replace_linears(model, "w4g32", modules=names[:5])
    replace_linears(model, "w2g16", modules=names[5:8])
    replace_linears(model, "w8", modules=names[8:12])
    expected = logits(use_float(model))
    save(model, tmp_path / "out", format=format)
    loaded = load(tmp_path / "out", compute="float")
    assert torch.equal(logits(loaded), expected)
    assert {name: str(linear.scheme) for name, linear in quant_linears(loaded).items()} == {
        **dict.fromkeys(names[:5], "w4g32"),
        **dict.fromkeys(names[5:8], "w2g16"),
        **dict.fromkeys(names[8:12], "w8"),
    }
    recipe = read_json(tmp_path / "out" / "qkern.json")
    assert recipe["layers"][names[0]]["scheme"] == "w4g32"


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "qwen2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tied_embeddings_that_differ_in_the_file_are_kept_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized_folder(tmp_path, "qwen2")
    head = torch.randn(128, 64).bfloat16()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    loaded = load(folder)
    assert torch.equal(loaded.lm_head.weight, head)
    assert not torch.equal(loaded.model.embed_tokens.weight, head)
    assert "kept apart" in caplog.text


def test_a_quantized_head_unties(tmp_path: Path) -> None:
    model = model_of("qwen2")
    replace_linears(model, "w4g32", skip=())
    assert isinstance(model.lm_head, QuantLinear)
    expected = logits(use_float(model))
    for format in FORMATS.keys() - {"bitsandbytes"}:  # which has no integers of 4 bits
        folder = save(model, tmp_path / format, format=format)
        assert read_json(folder / "config.json")["tie_word_embeddings"] is False
        assert torch.equal(logits(load(folder, compute="float")), expected)
    assert read_json(tmp_path / "gptq" / "config.json")["quantization_config"]["lm_head"] is True


def test_names_of_a_bare_decoder(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "gpt2")
    expected = logits(load(folder, compute="float"))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(folder, strip)
    assert torch.equal(logits(load(folder, compute="float")), expected)


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path, format: str) -> None:
    folder = quantized_folder(tmp_path, format=format, scheme="w4")
    expected = logits(load(folder, compute="float"))
    # Not run before the file changes: the first forward would copy the weights.
    loaded = load(folder, compute="float")
    file = folder / "model.safetensors"
    with file.open("r+b") as raw:
        raw.write(b"\xff" * file.stat().st_size)
    assert torch.equal(logits(loaded), expected)


def test_a_bias_that_the_architecture_lacks_is_kept(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    bias = torch.randn(64).half()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": bias}))
    loaded = load(folder)
    assert torch.equal(loaded.model.layers[0].self_attn.o_proj.bias, bias.bfloat16())


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    model = model_of("llama")
    model.generation_config.top_k = 7
    replace_linears(model, "w4g32")
    folder = save(model, tmp_path / "out", tokenizer=source, recipe={"method": "rtn"})
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert read_json(folder / "qkern.json")["method"] == "rtn"
    assert load(folder).generation_config.top_k == 7

    class Tokenizer:
        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("[]")

    assert (save(model, tmp_path / "other", tokenizer=Tokenizer()) / "tokenizer.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("w4g32", "gptq"), ("w4g32z", "awq"), ("w3g32", "compressed-tensors"), ("w8g64z", "gptq_v2")],
)
def test_default_format(tmp_path: Path, scheme: str, expected: str) -> None:
    model = model_of("llama")
    replace_linears(model, scheme)
    assert read_json(save(model, tmp_path / "out") / "qkern.json")["format"] == expected


def test_save_refuses(tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match="needs quantized layers"):
        save(model, tmp_path / "out", format="gptq")
    replace_linears(model, "w3g32")
    with pytest.raises(UnsupportedError, match=r"awq does not hold .*q_proj: AWQ has 4 bits"):
        save(model, tmp_path / "out", format="awq")
    with pytest.raises(InputError, match="unknown checkpoint format"):
        save(model, tmp_path / "out", format="ggml")
    with pytest.raises(InputError, match="max_shard_size"):
        save(model, tmp_path / "out", max_shard_size="many")
    embedded = model_of("qwen2")
    replace_linears(embedded, "w4g32")
    embedded.model.embed_tokens = QuantEmbedding.from_embedding(embedded.model.embed_tokens, "w4g32")
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens"):
        save(embedded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(InputError, match="not empty"):
        save(model, tmp_path / "out")


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (lambda t: t.update(stranger=torch.ones(3)), "left over: stranger"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"of another shape: model\.norm\.weight"),
        (lambda t: [t.pop(name) for name in list(t) if LAYER in name], rf"missing: {LAYER}\.weight"),
        (
            lambda t: t.update(
                {name.replace(LAYER, "odd"): t.pop(name) for name in list(t) if LAYER in name}
            ),
            "left over: odd",
        ),
        (
            lambda t: t.update(
                {
                    name.replace(LAYER, "model.layers.1.mlp.act_fn"): t[name]
                    for name in list(t)
                    if LAYER in name
                }
            ),
            r"left over: model\.layers\.1\.mlp\.act_fn",
        ),
        (lambda t: t.update({f"{LAYER}.bias": torch.ones(3)}), rf"of another shape: {LAYER}\.bias"),
        (
            lambda t: t.update(
                {
                    name: t[name.replace(LAYER, "model.layers.1.mlp.down_proj")]
                    for name in list(t)
                    if LAYER in name
                }
            ),
            rf"of another shape: {LAYER}",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model(tmp_path: Path, change: Any, problem: str) -> None:
    folder = quantized_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(FormatError, match=problem):
        load(folder)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "gpt2")
    rewrite(folder, lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias"))
    with pytest.raises(FormatError, match=r"missing: transformer\.h\.1\.attn\.c_attn\.bias"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(stranger=torch.ones(3)), "left over: stranger"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"of another shape: model\.norm\.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight has NaN or Inf"),
        (lambda t: t["lm_head.weight"][3].fill_(float("inf")), r"lm_head\.weight has NaN or Inf"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_plain_tensors_are_never_random(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], quantized: bool, change: Any, problem: str
) -> None:
    folder = quantized_folder(tmp_path) if quantized else save(model_of("llama"), tmp_path / "out")
    rewrite(folder, change)
    capfd.readouterr()
    with pytest.raises(FormatError, match=problem):
        load(folder)
    assert capfd.readouterr() == ("", "")


def test_weights_whose_sum_overflows_are_loaded(tmp_path: Path) -> None:
    model = model_of("llama")
    torch.nn.init.constant_(model.model.norm.weight, 3e38)
    load(save(model, tmp_path / "out"))


def test_transformers_draws_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    folder = save(model_of("llama"), tmp_path / "out")
    logging.enable_progress_bar()
    capfd.readouterr()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"architectures": None}, InputError, "names no architectures"),
        ({"architectures": []}, InputError, "names no architectures"),
        ({"model_type": "unheard-of"}, FormatError, r"config\.json is no configuration"),
        ({"model_type": None}, FormatError, r"config\.json is no configuration"),
        ({"hidden_size": "wide"}, FormatError, r"config\.json"),
        ({"num_hidden_layers": 3}, FormatError, r"missing: model\.layers\.2"),
        ({"quantization_config": {"quant_method": "aqlm"}}, FormatError, "aqlm"),
        ({"quantization_config": None}, FormatError, r"missing|left over"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, change: dict, error: type, problem: str) -> None:
    folder = quantized_folder(tmp_path)
    config = read_json(folder / "config.json") | change
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(error, match=problem):
        load(folder)


def test_a_configuration_that_cannot_be_built(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "qwen2")
    config = read_json(folder / "config.json") | {"num_attention_heads": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"ZeroDivisionError.*use the config\.json that belongs"):
        load(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nothing")


def test_saved_codes_are_those_of_the_quantizer(tmp_path: Path) -> None:
    weight = model_of("llama").model.layers[0].mlp.down_proj.weight.detach()
    loaded = load(quantized_folder(tmp_path, scheme="w8g32"))
    expected = quantize_groupwise(weight, "w8g32")
    found = loaded.model.layers[0].mlp.down_proj.quantized()
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_save_pretrained_of_a_loaded_model_is_save(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("llama"))
    replace_linears(model, "w4g32")
    loaded = load(save(model, tmp_path / "first"))
    for again, folder in ((loaded, "second"), (copy.deepcopy(loaded), "third")):
        again.save_pretrained(tmp_path / folder)
        assert torch.equal(load(tmp_path / folder)(IDS).logits, loaded(IDS).logits)
    with pytest.raises(InputError, match=r"takes save_directory and max_shard_size: got push_to_hub"):
        loaded.save_pretrained(tmp_path / "fourth", push_to_hub=True)
    loaded.save_pretrained(tmp_path / "fourth", is_main_process=False)
    assert not (tmp_path / "fourth").exists()
