"""The verb on whole models: every architecture, method and format, from folders and from memory."""

import json
import logging
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkern.calibration import streaming
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.models import describe, inject, known_architectures
from qkern.nn import QuantLinear, compute_mode, named_linears, quant_linears
from qkern.ops import dequantize_groupwise, unpack_bits
from qkern.pipelines import load, quantize
from qkern.pipelines.checks import default_format
from qkern.quantizers import GPTQConfig, HessianAccumulator, columns, quantize_gptq, quantize_rtn
from qkern.schemes import Scheme

IDS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")  # in test_experts.py
ALL = (*(known for known in known_architectures() if known not in MIXTURES), "gpt_neox")


def logits(model):
    with torch.no_grad(), compute_mode(model, "float"):
        return model(input_ids=IDS).logits.float()


def codes(weight):
    return unpack_bits(weight.codes, weight.scheme.bits, (weight.N, weight.K), layout="dense")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A Llama in bf16, in several shards."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(path, max_shard_size="40KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("model_type", ALL)
def test_every_architecture_and_method(tiny, tmp_path, model_type, method):
    model = tiny(model_type, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    options = {"method": method, "scheme": "w4g32z", "calibration": IDS}
    report = quantize(tmp_path / "model", **options, output=tmp_path / "out", format="gptq_v2")
    # Every linear is quantized or named.
    assert set(report.layers) | set(report.kept) == set(named_linears(model))
    assert set(report.kept) == {"lm_head"}
    # 4 bits, 16 for a scale and 4 for a zero point in 32; a short last group costs a little more.
    assert 4.6 < report.bpw_linear < 4.8
    assert not (tmp_path / "out.partial").exists()
    loaded = load(tmp_path / "out")
    assert set(quant_linears(loaded)) == set(report.layers)
    # The same from memory, and after the reload.
    returned = quantize(model, **options)
    assert torch.equal(logits(loaded), logits(returned))
    # Close to the original, and not the original.
    original = logits(model)
    error = (logits(loaded) - original).square().mean() / original.square().mean()
    assert 1e-6 < error < 0.05


def test_the_given_model_is_not_modified(tiny):
    model, again = tiny("qwen2"), tiny("qwen2")
    result = quantize(model, method="awq", calibration=IDS, scheme="w4g32z")
    for before, after in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert not quant_linears(model)
    # What was not quantized or folded is shared, not copied, and still tied.
    assert result.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert result.lm_head.weight is result.model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in result.parameters())
    assert result.qkern_report.scheme == "w4g32z"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_sharded_folder_gives_what_the_model_in_memory_gives(folder, tiny, method):
    options = {"method": method, "calibration": IDS, "scheme": "w3g32"}
    one = quantize(folder, **options)
    two = quantize(tiny("llama", dtype=torch.bfloat16), **options)
    assert one.model.norm.weight.dtype == one.config.dtype == torch.bfloat16
    assert torch.equal(logits(one), logits(two))


def test_the_result_does_not_depend_on_the_folder_it_came_from(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", method="rtn", scheme="w4g32")
    expected = logits(result)
    file = tmp_path / "model" / "model.safetensors"
    with file.open("r+b") as raw:
        raw.write(b"\xff" * file.stat().st_size)
    assert torch.equal(logits(result), expected)


@contextmanager
def torch_defaults(dtype, device):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "meta"), (torch.bfloat16, "cpu")])
def test_defaults_of_torch_change_nothing(tiny, tmp_path, method, dtype, device):
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    options = {"method": method, "scheme": "w4g32z", "calibration": IDS.tolist(), "length": 32, "samples": 3}
    options |= {"format": "compressed-tensors" if method == "rtn" else "gptq_v2"}
    quantize(tmp_path / "model", **options, output=tmp_path / "expected")
    with torch_defaults(dtype, device):
        quantize(tmp_path / "model", **options, output=tmp_path / "out")
        loaded = load(tmp_path / "out")
    for file in ("model.safetensors", "qkern.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert torch.equal(logits(loaded), logits(load(tmp_path / "expected")))


def test_rtn_rounds_every_linear(folder, tiny):
    result = quantize(folder, method="rtn", scheme="w4g32")
    for name, linear in named_linears(tiny("llama", dtype=torch.bfloat16)).items():
        if name == "lm_head":
            continue
        made = result.get_submodule(name).quantized()
        wanted = quantize_rtn(linear.weight.detach().float(), "w4g32")
        assert torch.equal(made.codes, wanted.codes), name
        assert torch.equal(made.scales, wanted.scales), name


def test_gptq_is_true_sequential(tiny, monkeypatch):
    """Each group sees what its quantized predecessors, in its layer and before, make of the text."""
    monkeypatch.setattr(streaming, "CHUNK_TOKENS", 64)
    result = quantize(tiny("llama"), calibration=IDS, scheme="w2g32")
    model, float_model = tiny("llama"), tiny("llama")
    groups = describe(model).architecture.sequential

    def hessian(model, name):
        seen = HessianAccumulator(model.get_submodule(name).in_features)
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.add(args[0]))
        with torch.no_grad():
            for chunk in IDS.split(2):
                model(input_ids=chunk)
        handle.remove()
        return seen.value

    for index in range(2):
        for group in groups:
            value = hessian(model, f"model.layers.{index}.{group[0]}")
            if (index, group[0]) != (0, "self_attn.q_proj"):
                blind = hessian(float_model, f"model.layers.{index}.{group[0]}")
                assert (value - blind).abs().max() > 1e-2 * blind.abs().max()
            for part in group:
                name = f"model.layers.{index}.{part}"
                linear = model.get_submodule(name)
                wanted = quantize_gptq(linear.weight.detach(), value, "w2g32", GPTQConfig())
                made = result.get_submodule(name).quantized()
                # Rounding of the Hessian may move a code that lies on an edge.
                assert (codes(made) == codes(wanted.weight)).float().mean() > 0.999, name
                record = result.qkern_report.layers[name]
                assert record.error == pytest.approx(wanted.error, rel=1e-2)
                linear.weight.data = dequantize_groupwise(made)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "gpt2"])
def test_awq_folds_scales_that_help(tiny, model_type):
    model = inject(tiny(model_type))
    rounded = quantize(model, method="rtn", scheme="w3g32z")
    awq = quantize(model, method="awq", scheme="w3g32z", calibration=IDS)
    assert 0 < awq.qkern_report.mean_error < rounded.qkern_report.mean_error
    reference = logits(model)
    assert (logits(awq) - reference).square().mean() < 0.7 * (logits(rounded) - reference).square().mean()


def test_awq_on_an_unknown_architecture_says_what_it_skips(tiny, caplog):
    options = {"method": "awq", "scheme": "w4g32z", "calibration": IDS}
    for _ in range(2):  # once a run, and in every run
        caplog.clear()
        quantize(tiny("gpt_neox"), **options)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "gpt_neox" in warnings[0]
        assert "scales are skipped (norm to linears, linear to linear)" in warnings[0]
    with pytest.raises(UnsupportedError, match="no data for the architecture gpt_neox to fold them by"):
        quantize(tiny("gpt_neox"), **options, scale_only=True)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_scale_only_writes_the_same_function_in_16_bit(tiny, tmp_path, model_type):
    model = inject(tiny(model_type))
    report = quantize(
        model, method="awq", scheme="w4g32z", calibration=IDS, scale_only=True, output=tmp_path / "out"
    )
    assert report.format is None
    assert {record.scheme for record in report.layers.values()} == {"16-bit"}
    loaded = load(tmp_path / "out")
    assert not quant_linears(loaded)
    reference = logits(model)
    assert (logits(loaded) - reference).abs().max() < 1e-4 * reference.abs().max()
    moved = [
        name
        for name, parameter in loaded.named_parameters()
        if not torch.equal(parameter, model.get_parameter(name))
    ]
    assert len(moved) >= 6
    # Rounding it is then as good as AWQ without its clipping, and far better than rounding the original.
    plain, scaled = (quantize(m, method="rtn", scheme="w4g32z") for m in (model, loaded))
    assert (logits(scaled) - reference).square().mean() < 0.5 * (logits(plain) - reference).square().mean()


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("w4g128", "gptq"),
        ("w8", "gptq"),
        ("w4g128z", "awq"),
        ("w3g128", "compressed-tensors"),
        ("w2g64", "compressed-tensors"),
        ("w8g128z", "compressed-tensors"),
    ],
)
def test_default_format_follows_the_scheme(scheme, wanted):
    assert default_format({Scheme.parse(scheme)})[0] == wanted


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "rtn", "scheme": "w4g32"}, "gptq"),
        ({"method": "awq", "scheme": "w4g32z", "calibration": IDS}, "awq"),
        # K = 96 is no multiple of 64, which only GPTQ can do without.
        ({"method": "rtn", "scheme": "w4g64z"}, "gptq_v2"),
        ({"method": "rtn", "scheme": "w3"}, "compressed-tensors"),
        ({"method": "gptq", "scheme": "w4g32", "act_order": "desc_act", "calibration": IDS}, "gptq"),
        # Static groups keep each column in its own, so AWQ holds any order of the columns.
        (
            {
                "method": "gptq",
                "scheme": "w4g32z",
                "act_order": "desc_act",
                "static_groups": True,
                "calibration": IDS,
            },
            "awq",
        ),
    ],
)
def test_written_format(folder, tmp_path, options, wanted):
    report = quantize(folder, **options, output=tmp_path / "out")
    assert report.format == wanted
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantize(folder, **options)))


def test_format_that_cannot_hold_layers_is_refused_before_any_work(folder, tmp_path):
    # The calibration does not even exist.
    options = {"method": "awq", "scheme": "w4g64z", "calibration": tmp_path / "missing.txt"}
    with pytest.raises(UnsupportedError, match=r"no work was done: awq does not hold model\.layers\.0\.mlp"):
        quantize(folder, **options, output=tmp_path / "out", format="awq")
    assert list(tmp_path.iterdir()) == []
    # Skipping the layers makes it possible.
    options["calibration"] = IDS
    report = quantize(folder, **options, skip=["down_proj"], output=tmp_path / "out", format="awq")
    assert report.kept["model.layers.1.mlp.down_proj"] == "named in skip"
    assert len(report.layers) == 12


def test_recipe_and_report(folder, tmp_path):
    report = quantize(folder, calibration=IDS, scheme="w4g32", samples=4, output=tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert {"qkern", "torch", "transformers", "format"} <= set(recipe)
    assert recipe["arguments"]["method"] == "gptq"
    assert recipe["arguments"]["damp"] == 0.05
    assert recipe["calibration"]["shape"] == [4, 32]
    assert len(recipe["calibration"]["sha256"]) == 64
    assert set(recipe["layers"]) == set(report.layers)
    for name, facts in recipe["layers"].items():
        assert facts["scheme"] == "w4g32"
        assert facts["error"] == report.layers[name].error > 0
    assert recipe["kept"] == {"lm_head": "output head"}
    stated = json.loads(json.dumps(report.as_dict()))
    assert stated["mean_error"] == report.mean_error
    assert stated["layers"]["model.layers.0.mlp.up_proj"]["seconds"] > 0


def test_head_is_quantized_when_included(folder, tiny, tmp_path):
    report = quantize(folder, calibration=IDS, scheme="w4g32", include=["lm_head"], output=tmp_path / "out")
    assert report.kept == {}
    loaded = load(tmp_path / "out")
    assert isinstance(loaded.lm_head, QuantLinear)
    # Its Hessian comes from what the quantized layers make of the text.
    body = quantize(folder, calibration=IDS, scheme="w4g32")
    seen = HessianAccumulator(64)
    body.lm_head.register_forward_pre_hook(lambda _, args: seen.add(args[0].float()))
    logits(body.float())
    wanted = quantize_gptq(body.lm_head.weight.detach(), seen.value, "w4g32", GPTQConfig())
    assert (codes(loaded.lm_head.quantized()) == codes(wanted.weight)).float().mean() > 0.99


def test_tied_head_cannot_be_quantized(tiny):
    with pytest.raises(UnsupportedError, match="lm_head is tied to the input embedding"):
        quantize(tiny("qwen2"), method="rtn", include=["lm_head"])
    with pytest.raises(
        UnsupportedError, match=r"by patterns that do not fit it, such as 'model\.layers\.\*'"
    ):
        quantize(tiny("qwen2"), method="rtn", assignment={"*": "w4g32"})
    quantize(tiny("qwen2"), method="rtn", assignment={"model.layers.*": "w4g32"})


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class Experts(torch.nn.Module):
    """Chooses by token between two experts; a third one is never chosen."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(64, 2)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        first = (self.gate(x)[..., 0] > 0).unsqueeze(-1)
        result = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (first, ~first), strict=False):
            rows = chosen.squeeze(-1)
            result[rows] = expert(x[rows])
        return result


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_as_modules_are_quantized(tiny, method):
    model = tiny("llama")
    model.config.model_type = "mixture"
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Experts()
    result = quantize(model, method=method, scheme="w4g32z", calibration=IDS)
    report = result.qkern_report
    assert len(report.layers) == 2 * (4 + 6)
    assert report.kept["model.layers.0.mlp.gate"] == "router"
    notes = report.layers["model.layers.0.mlp.experts.2.up"].notes
    assert notes == ("rounded to nearest: no calibration token reached it",)
    assert not report.layers["model.layers.0.mlp.experts.1.up"].notes
    # Named, the router is quantized too.
    named = quantize(model, method="rtn", scheme="w4g32z", include=["gate"])
    assert isinstance(named.model.layers[0].mlp.gate, QuantLinear)


def test_texts_go_through_the_tokenizer_beside_the_model(tiny, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{chr(97 + i): i + 3 for i in range(26)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    letters = [int(i) for i in torch.randint(26, (80,), generator=torch.Generator().manual_seed(2))]
    (tmp_path / "a.txt").write_text(" ".join(chr(97 + i) for i in letters))
    options = {"scheme": "w4g32", "length": 40}
    with pytest.raises(FormatError, match="has no tokenizer"):
        quantize(tmp_path / "model", calibration=tmp_path / "a.txt", **options)
    with pytest.raises(InputError, match="came from no folder: pass tokenizer="):
        quantize(model, calibration=tmp_path / "a.txt", **options)
    tokenizer.save_pretrained(tmp_path / "model")
    one = quantize(tmp_path / "model", calibration=tmp_path / "a.txt", **options)
    two = quantize(model, calibration=tmp_path / "a.txt", tokenizer=tokenizer, **options)
    from_folder = quantize(
        model, calibration=tmp_path / "a.txt", tokenizer=str(tmp_path / "model"), **options
    )
    three = quantize(model, calibration=[[i + 3 for i in letters]], **options)
    assert torch.equal(logits(one), logits(three))
    assert torch.equal(logits(two), logits(three))
    assert torch.equal(logits(from_folder), logits(three))
    quantize(tmp_path / "model", method="rtn", scheme="w4g32", output=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_head_of_its_own_wins_over_a_config_that_ties_it(tiny, tmp_path, caplog):
    # As transformers does: two different tensors in the files are not one.
    model = tiny("llama", tie_word_embeddings=False)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    expected = logits(quantize(model, method="rtn", scheme="w4g32"))
    assert torch.equal(logits(quantize(folder, method="rtn", scheme="w4g32")), expected)
    assert "another head" in caplog.text
    quantize(folder, method="rtn", scheme="w4g32", output=tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    model.config.tie_word_embeddings = True
    quantize(model, method="rtn", scheme="w4g32", output=tmp_path / "from-memory")
    assert torch.equal(logits(load(tmp_path / "from-memory")), expected)


def test_tensors_without_a_place_are_named(tiny, tmp_path, caplog):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    quantize(tmp_path / "model", method="rtn", scheme="w4g32")
    assert "no place" not in caplog.text
    more = {
        "model.layers.2.extra.weight": torch.ones(2, 2),
        "model.layers.0.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    quantize(tmp_path / "model", method="rtn", scheme="w4g32")
    assert "holds 1 tensors" in caplog.text
    assert "model.layers.2.extra.weight" in caplog.text


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_folder_of_several_dtypes_gives_what_its_output_gives(tiny, tmp_path, method):
    # The config names the dtype that all of it is loaded in.
    model = tiny("qwen2", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data = parameter.data.float()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "model")
    options = {"method": method, "scheme": "w8g32", "calibration": IDS}
    returned = quantize(tmp_path / "model", **options)
    assert {parameter.dtype for parameter in returned.parameters()} == {torch.bfloat16}
    quantize(tmp_path / "model", **options, output=tmp_path / "out")
    assert torch.equal(logits(returned), logits(load(tmp_path / "out")))


def test_a_lone_name_to_skip_is_one_name(tiny):
    model = quantize(tiny("llama"), method="rtn", scheme="w4g32", skip="down_proj")
    assert set(model.qkern_report.kept) == {
        "lm_head",
        *(f"model.layers.{index}.mlp.down_proj" for index in range(2)),
    }


def test_a_hessian_beyond_saving_costs_one_layer_and_is_named(folder, tmp_path, monkeypatch, caplog):
    calls = []

    def factorize(hessian, damp, order):
        calls.append(damp)
        return None if len(calls) == 1 else original(hessian, damp, order)

    original = columns.factorize
    monkeypatch.setattr(columns, "factorize", factorize)
    quantize(folder, method="gptq", scheme="w4g32", calibration=IDS, output=tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    layers = json.loads((tmp_path / "out" / "qkern.json").read_text())["layers"]
    assert [layer for layer, facts in layers.items() if facts["notes"]] == [name]
    assert "rounded to nearest" in layers[name]["notes"][0]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any(message.startswith(f"{name}: rounded to nearest") for message in warnings)
