"""`qkern.convert` of bitsandbytes folders: codebooks are rounded again, int8 rows stay as they are."""

from __future__ import annotations

import pytest
import torch

import qkern
from qkern.checkpoints import read_json, read_quantized
from qkern.errors import UnsupportedError
from qkern.nn import compute_mode
from qkern.ops import dequantize_groupwise

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(original, tmp_path_factory):
    """Maker of bitsandbytes folders by their scheme; each is made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(name):
        if not (folder / name).exists():
            if name == "int8":
                qkern.save(qkern.load(original, int8=True), folder / name)
            else:
                qkern.quantize(
                    original, method="rtn", scheme=name, format="bitsandbytes", output=folder / name
                )
        return folder / name

    return make


def weights(path):
    with read_quantized(path) as checkpoint:
        return {name: dequantize_groupwise(checkpoint.weight(name)) for name in checkpoint.entries}


def logits(path):
    model = qkern.load(path, dtype=torch.float32)
    with torch.no_grad(), compute_mode(model, "float"):
        return model(IDS).logits


@pytest.mark.parametrize(
    ("to", "quant_method"),
    [("gptq", "gptq"), ("gptq_v2", "gptq"), ("awq", "awq"), ("compressed-tensors", "compressed-tensors")],
)
@pytest.mark.parametrize("scheme", ["nf4g32", "fp4g32d"])
def test_codebooks_are_rounded_again(made, tmp_path, scheme, to, quant_method):
    with pytest.raises(
        UnsupportedError, match=rf"layers\.0\.\S+: \S+ stores integer codes, not the {scheme[:3]}"
    ):
        qkern.convert(made(scheme), tmp_path / "none", to)
    assert not list(tmp_path.iterdir())
    expected = weights(made(scheme))
    for asked, after in (("nearest", "w4g32"), ("w4g16", "w4g16")):
        report = qkern.convert(made(scheme), tmp_path / asked, to, requantize=asked)
        assert (report.before, report.is_exact) == ("bitsandbytes", False)
        assert {(layer.before, layer.after) for layer in report.layers.values()} == {(scheme, after)}
        assert qkern.verify(tmp_path / asked).is_sound
        for name, weight in weights(tmp_path / asked).items():
            error = float((weight - expected[name]).norm() / expected[name].norm())
            assert error == pytest.approx(report.layers[name].error)
            assert 0 < error < 0.2
    found = read_json(tmp_path / "nearest" / "config.json")["quantization_config"]
    assert found["quant_method"] == quant_method


def test_int8_rows_keep_their_weights(made, original, tmp_path):
    # No other format leaves outliers of activations alone: weights alone are quantized.
    report = qkern.convert(made("int8"), tmp_path / "w8", "compressed-tensors")
    assert {(la.before, la.after, la.is_exact) for la in report.layers.values()} == {("w8a8", "w8", True)}
    # Without a threshold both quantize all columns.
    report = qkern.convert(made("w8a8"), tmp_path / "w8a8", "compressed-tensors")
    assert {(la.before, la.after, la.is_exact) for la in report.layers.values()} == {("w8a8", "w8a8", True)}
    for before, after in (("int8", "w8"), ("w8a8", "w8a8")):
        found, expected = weights(tmp_path / after), weights(made(before))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(logits(tmp_path / after), logits(made(before)))
        assert qkern.verify(tmp_path / after, against=original).is_sound


def test_scales_of_rows_are_fp32(made, tmp_path):
    with pytest.raises(UnsupportedError, match=r"layers\.0\.\S+: .*stores fp16 scales .* do not fit exactly"):
        qkern.convert(made("int8"), tmp_path / "out", "gptq")
    report = qkern.convert(made("int8"), tmp_path / "out", "gptq", requantize="nearest")
    assert {layer.after for layer in report.layers.values()} == {"w8"}
    assert 0 < max(layer.error for layer in report.layers.values()) < 0.01


def test_bitsandbytes_is_not_written(made, tmp_path):
    with pytest.raises(UnsupportedError, match="convert does not write bitsandbytes"):
        qkern.convert(made("nf4g32"), tmp_path / "out", "bitsandbytes", requantize="nearest")
