"""`qkern.convert` between all formats: the same weights, bit for bit, or refused by name."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.checkpoints import CheckpointWriter, read_json, read_quantized
from qkern.demo import MODEL
from qkern.errors import InputError, OutputError, UnsupportedError
from qkern.nn import compute_mode, quant_linears
from qkern.ops import dequantize_groupwise
from qkern.pipelines.conversion import regrouped, widened

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llama"
    model = tiny("llama", dtype=torch.bfloat16)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def quantized(original, tmp_path_factory):
    """Maker of quantized folders; each is made once."""
    made = {}

    def make(scheme, format, **options):
        key = (str(scheme), format, *sorted(options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / format
            arguments = {"assignment": scheme} if isinstance(scheme, dict) else {"scheme": scheme}
            given = {"method": "rtn", "output": made[key], "format": format, "device": "cpu"}
            qkern.quantize(original, **{**given, **arguments, **options})
        return made[key]

    return make


@pytest.fixture(scope="module")
def act_order(quantized):
    options = {"method": "gptq", "act_order": "desc_act", "calibration": IDS}
    return quantized("w4g32", "gptq_v2", **options)


def logits(path):
    model = qkern.load(path, dtype=torch.float32)
    with torch.no_grad(), compute_mode(model, "float"):
        return model(IDS).logits


def weights(path):
    with read_quantized(path) as checkpoint:
        return {name: checkpoint.weight(name) for name in checkpoint.entries}


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z", "w4"])
@pytest.mark.parametrize("before", FORMATS)
def test_all_pairs_are_exact(quantized, tmp_path, scheme, before):
    source = quantized(scheme, before)
    expected, wanted = weights(source), logits(source)
    for after in FORMATS:
        report = qkern.convert(source, tmp_path / after, after)
        assert (report.before, report.after, report.is_exact) == (before, after, True)
        assert {layer.after for layer in report.layers.values()} == {scheme}
        found = weights(tmp_path / after)
        assert found.keys() == expected.keys()
        for name, qw in expected.items():
            assert found[name].scheme == qw.scheme
            assert torch.equal(found[name].codes, qw.codes)
            assert torch.equal(found[name].scales, qw.scales)
            assert qw.zeros is None or torch.equal(found[name].zeros, qw.zeros)
        assert torch.equal(logits(tmp_path / after), wanted)


def test_what_is_written_beside_weights(quantized, tmp_path):
    source = quantized("w4g32", "gptq")
    report = qkern.convert(source, tmp_path / "out", "compressed-tensors", max_shard_size="30KB")
    assert len(list(report.output.glob("model-*-of-*.safetensors"))) > 2
    for file in ("generation_config.json", "tokenizer_config.json"):
        assert (report.output / file).read_bytes() == (source / file).read_bytes()
    assert not (report.output / "quantize_config.json").exists()
    config, before = read_json(report.output / "config.json"), read_json(source / "config.json")
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert {**config, "quantization_config": None} == {**before, "quantization_config": None}
    recipe = read_json(report.output / "qkern.json")
    assert recipe["converted_from"] == "gptq"
    assert recipe["source_recipe"]["arguments"]["method"] == "rtn"
    layer = recipe["layers"]["model.layers.1.mlp.down_proj"]
    assert layer == {"scheme": "w4g32", "before": "w4g32", "after": "w4g32", "is_exact": True, "error": 0.0}
    assert json.loads(json.dumps(report.as_dict()))["layers"].keys() == report.layers.keys()
    assert qkern.verify(report.output).is_sound


def test_gptq_keeps_its_damping(quantized, tmp_path):
    source = quantized("w4g32", "gptq", method="gptq", damp=0.02, calibration=IDS)
    qkern.convert(source, tmp_path / "out", "gptq_v2")
    assert read_json(tmp_path / "out" / "quantize_config.json")["damp_percent"] == 0.02


# Other codes for the same weights


def assert_same_weights(path, source):
    found, expected = weights(path), weights(source)
    for name, qw in expected.items():
        assert torch.equal(dequantize_groupwise(found[name]), dequantize_groupwise(qw)), name
    # Kernels add up the groups of a row one after the other.
    torch.testing.assert_close(logits(path), logits(source), atol=1e-5, rtol=1e-5)


def test_narrow_codes_become_wide_ones_in_awq(quantized, tmp_path):
    for scheme in ("w3g32", "w2g32z"):
        source = quantized(scheme, "compressed-tensors")
        report = qkern.convert(source, tmp_path / scheme, "awq")
        wide = f"w4{scheme[2:]}"
        assert {(la.before, la.after, la.is_exact) for la in report.layers.values()} == {(scheme, wide, True)}
        assert_same_weights(tmp_path / scheme, source)
        assert qkern.verify(tmp_path / scheme).is_sound


def test_groups_are_cut_where_the_target_needs_it(quantized, tmp_path):
    source = quantized("w8g64", "gptq")  # 64 does not divide 96: a short last group
    report = qkern.convert(source, tmp_path / "cut", "compressed-tensors")
    after = {name: layer.after for name, layer in report.layers.items()}
    assert after["model.layers.0.mlp.down_proj"] == "w8g32"
    assert after["model.layers.0.mlp.up_proj"] == "w8g64"
    assert_same_weights(tmp_path / "cut", source)
    # AWQ has one size for all layers.
    mixed = quantized({"q_proj": "w4g64", "up_proj": "w4g32", "k_proj": "w4"}, "gptq")
    report = qkern.convert(mixed, tmp_path / "mixed", "awq")
    assert {layer.after for layer in report.layers.values()} == {"w4g32"}
    assert report.is_exact
    assert_same_weights(tmp_path / "mixed", mixed)


def test_forms_hold_the_same_weights(quantized):
    for name, qw in weights(quantized("w3g32z", "compressed-tensors")).items():
        for form in (regrouped(qw, 16), widened(qw, 4), widened(qw, 8)):
            assert torch.equal(dequantize_groupwise(form), dequantize_groupwise(qw)), name
        assert regrouped(qw, 64) is None


# What the target does not hold


def refused(source, tmp_path, to, match):
    before = leftovers(tmp_path)
    with pytest.raises(UnsupportedError, match=match) as info:
        qkern.convert(source, tmp_path / "out", to)
    assert "model.layers.0." in str(info.value)
    assert leftovers(tmp_path) == before
    return str(info.value)


def test_refusals_name_the_layers(quantized, act_order, tmp_path):
    text = refused(act_order, tmp_path, "awq", "AWQ has no group index")
    assert "and 10 more layers" in text
    assert "--requantize" in text
    refused(act_order, tmp_path, "compressed-tensors", "no longer reads a group index")
    refused(quantized("w8g32", "gptq"), tmp_path, "awq", "AWQ has 4 bits only")
    refused(quantized("w8a8", "compressed-tensors"), tmp_path, "gptq", "does not say that activations")
    assert qkern.convert(act_order, tmp_path / "v1", "gptq").is_exact
    assert torch.equal(logits(tmp_path / "v1"), logits(act_order))


def test_scales_that_fp16_does_not_hold(quantized, tmp_path):
    model = qkern.load(quantized("w4g32", "gptq"))
    for linear in quant_linears(model).values():
        linear.scales = linear.scales.float() * (1 + 2**-20)
    qkern.save(model, tmp_path / "fine", format="compressed-tensors")
    refused(tmp_path / "fine", tmp_path, "gptq", "do not fit exactly")
    report = qkern.convert(tmp_path / "fine", tmp_path / "rounded", "gptq", requantize="nearest")
    assert not report.is_exact
    assert qkern.verify(tmp_path / "rounded").is_sound


def test_zero_points_of_0_in_v1(quantized, tmp_path):
    model = qkern.load(quantized("w4g32z", "gptq_v2"))
    quant_linears(model)["model.layers.1.mlp.up_proj"].zeros[3, 1] = 0
    qkern.save(model, tmp_path / "zero", format="gptq_v2")
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj: a zero point of 0 does not fit"):
        qkern.convert(tmp_path / "zero", tmp_path / "out", "gptq")
    report = qkern.convert(tmp_path / "zero", tmp_path / "out", "gptq", requantize="nearest")
    rounded = {name: layer for name, layer in report.layers.items() if not layer.is_exact}
    assert list(rounded) == ["model.layers.1.mlp.up_proj"]
    assert 0 < rounded["model.layers.1.mlp.up_proj"].error < 0.2


def test_requantize(quantized, act_order, tmp_path):
    report = qkern.convert(act_order, tmp_path / "awq", "awq", requantize="nearest")
    assert {(la.after, la.is_exact) for la in report.layers.values()} == {("w4g32", False)}
    assert all(0 < layer.error < 0.15 for layer in report.layers.values())
    expected = {name: dequantize_groupwise(qw) for name, qw in weights(act_order).items()}
    for name, qw in weights(tmp_path / "awq").items():
        error = (dequantize_groupwise(qw) - expected[name]).norm() / expected[name].norm()
        assert float(error) == pytest.approx(report.layers[name].error)
    report = qkern.convert(act_order, tmp_path / "named", "compressed-tensors", requantize="w8g16")
    assert {layer.after for layer in report.layers.values()} == {"w8g16"}
    assert max(layer.error for layer in report.layers.values()) < 0.01
    # What the target holds is not touched.
    report = qkern.convert(quantized("w4g32", "gptq"), tmp_path / "same", "awq", requantize="w8")
    assert report.is_exact
    # Only the mark is left out: weights and codes are the same.
    source = quantized("w8a8", "compressed-tensors")
    for asked in ("nearest", "w8"):
        report = qkern.convert(source, tmp_path / asked, "gptq", requantize=asked)
        assert {(la.before, la.after, la.is_exact) for la in report.layers.values()} == {("w8a8", "w8", True)}
        assert torch.equal(logits(tmp_path / asked), logits(source))
    with pytest.raises(UnsupportedError, match="cannot be rounded to what awq holds: AWQ has 4 bits only"):
        qkern.convert(act_order, tmp_path / "none", "awq", requantize="w8")


# Mixtures of experts


def told(folder):
    """What a configuration says of 16-bit linears."""
    quantization = read_json(folder / "config.json")["quantization_config"]
    return {
        name: sorted(quantization.get(name) or ()) for name in ("ignore", "modules_to_not_convert", "dynamic")
    }


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_mixtures_are_written_as_quantize_does(tiny, tmp_path, model_type):
    source, made, given = tmp_path / "source", tmp_path / "made", {"method": "rtn", "scheme": "w4g32"}
    tiny(model_type, moe_intermediate_size=64).save_pretrained(source)
    for name in FORMATS:
        qkern.quantize(source, **given, format=name, output=made / name)
    for before, after in (("gptq", "awq"), ("gptq", "compressed-tensors"), ("awq", "gptq")):
        out = tmp_path / f"{before}-{after}"
        assert qkern.convert(made / before, out, after).is_exact
        assert told(out) == told(made / after)
        assert "gate" in str(told(out))
        found, expected = (load_file(path / "model.safetensors") for path in (out, made / after))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert qkern.verify(out, against=source).is_sound


def test_fused_16_bit_experts_are_written_each_by_itself(tiny, tmp_path):
    model, source = tiny("mixtral"), tmp_path / "source"
    model.save_pretrained(source)
    given = {"method": "rtn", "scheme": "w4g32", "skip": ["experts"]}
    for name in ("gptq", "awq"):
        qkern.quantize(source, **given, format=name, output=tmp_path / name)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if ".experts." not in name}
    tensors |= {name: value for name, value in model.state_dict().items() if ".experts." in name}
    save_file(tensors, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    qkern.convert(tmp_path / "gptq", tmp_path / "out", "awq")
    assert told(tmp_path / "out") == told(tmp_path / "awq")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "awq"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")

    def make(kind, **options):
        path = folder / f"{kind}-{len(options)}.gguf"
        if not path.exists():
            qkern.export_gguf(MODEL, path, kind, **options)
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "to", "scheme", "embedding"),
    [("q4_0", "awq", "w4g32", "q6_k"), ("q8_0", "gptq", "w8g32", "q8_0")],
)
def test_gguf_with_a_grid(gguf, tmp_path, kind, to, scheme, embedding):
    report = qkern.convert(gguf(kind), tmp_path / "out", to)
    assert report.decoded == {"model.embed_tokens.weight": embedding}
    found = qkern.verify(tmp_path / "out", against=MODEL)
    assert found.is_sound, found.as_dict()
    assert {(la.before, la.after, la.is_exact) for la in report.layers.values()} == {(scheme, scheme, True)}
    assert len(report.layers) == 28
    models = [qkern.load(path, dtype=torch.float32) for path in (gguf(kind), tmp_path / "out")]
    with torch.no_grad():
        both = []
        for model in models:
            # Of the GGUF's table the rows that are looked up are the same; a float head multiplies by them.
            with compute_mode(model, "float"):
                both.append(model.model(torch.arange(32)[None]).last_hidden_state)
    assert torch.equal(*both)
    from transformers import AutoTokenizer

    text = "And the king said unto Daniel"
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (MODEL, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_gguf_without_a_grid(gguf, tmp_path):
    with pytest.raises(UnsupportedError, match=r"layers\.0\.\S+: q4_k is no grid of gptq"):
        qkern.convert(gguf("q4_k_m"), tmp_path / "out", "gptq")
    assert leftovers(tmp_path) == []
    with pytest.raises(UnsupportedError, match="float offsets"):
        qkern.convert(gguf("q4_1"), tmp_path / "out", "gptq_v2")
    report = qkern.convert(gguf("q4_k_m"), tmp_path / "out", "compressed-tensors", requantize="nearest")
    assert {(la.before, la.after) for la in report.layers.values()} == {("q4_k", "w4g32z"), ("q6_k", "w8g16")}
    found = qkern.verify(tmp_path / "out", against=MODEL)
    assert found.is_sound, found.as_dict()
    assert report.decoded == {"model.embed_tokens.weight": "q6_k"}
    assert 0 < found.errors["model.embed_tokens"] < 0.05


# The outside


def test_interrupted_write_leaves_nothing(quantized, tmp_path, monkeypatch):
    writes = []

    def full(self, name, tensor):
        with self._writing():
            writes.append(name)
            if len(writes) == 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._shards.add(name, tensor)

    monkeypatch.setattr(CheckpointWriter, "_add", full)
    with pytest.raises(OutputError, match="free space"):
        qkern.convert(quantized("w4g32", "gptq"), tmp_path / "out", "awq")
    assert len(writes) == 20
    assert leftovers(tmp_path) == []


def test_arguments(original, quantized, tmp_path):
    source = quantized("w4g32", "gptq")
    with pytest.raises(InputError, match="unknown checkpoint format"):
        qkern.convert(source, tmp_path / "out", "exl2")
    with pytest.raises(UnsupportedError, match="is not quantized"):
        qkern.convert(original, tmp_path / "out", "awq")
    with pytest.raises(InputError, match="not a scheme"):
        qkern.convert(source, tmp_path / "out", "awq", requantize="close")
    with pytest.raises(InputError, match="stays as it is"):
        qkern.convert(source, source / "inside", "awq")
    with pytest.raises(InputError, match="max_shard_size"):
        qkern.convert(source, tmp_path / "out", "awq", max_shard_size="big")
    assert leftovers(tmp_path) == []
