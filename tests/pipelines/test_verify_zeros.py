"""Symmetric GPTQ files whose zero points are no midpoint: one that a writer chose is noted, damage fails."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.nn import named_linears, quant_linears
from qkern.ops import pack_bits, unpack_bits

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llama"
    model = tiny("llama", dtype=torch.bfloat16)
    for layer in named_linears(model).values():
        # Short normal rows have no outliers, and codes of 8 bits spread so far that a step is little.
        layer.weight.data *= layer.weight.abs() / layer.weight.std()
        layer.weight.data -= layer.weight.mean()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gptq-w2g32", "gptq_v2-w4g32", "gptq-w8"])
def made(request, original, tmp_path_factory):
    """A folder, and the bits of its codes."""
    format, _, scheme = request.param.partition("-")
    folder = tmp_path_factory.mktemp("made") / request.param
    qkern.quantize(original, method="rtn", scheme=scheme, format=format, output=folder, device="cpu")
    return folder, int(scheme[1])


@pytest.fixture
def changed(made, tmp_path):
    """Maker of a copy in which the unpacked codes or zero points of layers are others."""

    def change(parts, function, layers=None):
        source, bits = made
        folder = shutil.copytree(source, tmp_path / "changed")
        stored = load_file(folder / "model.safetensors")
        for name, words in stored.items():
            owner, _, part = name.rpartition(".")
            if part not in parts or (layers is not None and owner not in layers):
                continue
            rows = words.t().contiguous() if part == "qweight" else words
            values = unpack_bits(rows, bits, (len(rows), rows.shape[1] * 32 // bits), layout="dense")
            packed = pack_bits(function(values), bits, layout="dense")
            stored[name] = (packed.t() if part == "qweight" else packed).contiguous()
        save_file(stored, folder / "model.safetensors")
        return folder

    return change


def less(values):
    return values.clamp(min=1) - 1


def check(found, name):
    return next(check for check in found.checks if check.name == name)


def test_another_zero_point_is_noted(changed, original, made):
    folder = changed(("qweight", "qzeros"), less)
    found = qkern.verify(folder)
    assert found.is_sound, found.as_dict()
    (note,) = check(found, "values").notes
    assert f"14 layers are symmetric around the zero point {(1 << made[1] - 1) - 1}" in note
    assert check(found, "weights").status == "passed"
    if made[1] > 2:  # the lowest of four codes is lost
        assert qkern.verify(folder, against=original).is_sound
    layers = quant_linears(qkern.load(folder)).values()
    assert {layer.scheme.zero_point for layer in layers} == {True}
    assert "got w" in " ".join(check(qkern.verify(folder, runtime="vllm"), "runtime").problems)


@pytest.mark.parametrize("layers", [None, {LAYER}])
@pytest.mark.parametrize("move", [less, lambda values: values + 1])
def test_codes_that_stay_tell_of_damage(changed, layers, move):
    found = qkern.verify(changed(("qzeros",), move, layers))
    assert [check.name for check in found.checks if check.status == "failed"] == ["values"]
    assert len(check(found, "values").problems) == (14 if layers is None else 1)
    assert check(found, "values").notes == ()


@pytest.mark.parametrize("off", [0.02, 0.024])
def test_weights_off_to_one_side_are_no_other_zero_point(original, tmp_path, off):
    """A step of 8 bits is not above what the mean of weights may be off 0: then it is damage."""
    stored = load_file(original / "model.safetensors")
    for name, weight in stored.items():
        if name.endswith("_proj.weight"):
            stored[name] = weight - off * weight.std()
    shutil.copytree(original, tmp_path / "original")
    save_file(stored, tmp_path / "original" / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "made"
    options = {"method": "rtn", "scheme": "w8", "format": "gptq", "device": "cpu"}
    qkern.quantize(tmp_path / "original", output=folder, **options)
    stored = load_file(folder / "model.safetensors")
    stored |= {name: words - 0x01010101 for name, words in stored.items() if name.endswith("qzeros")}
    save_file(stored, folder / "model.safetensors")
    found = qkern.verify(folder)
    assert len(check(found, "values").problems) == 14
    assert check(found, "values").notes == ()


def test_one_layer_on_a_grid_of_its_own_is_damage(changed):
    found = qkern.verify(changed(("qweight", "qzeros"), less, {LAYER}))
    assert [problem.partition(":")[0] for problem in check(found, "values").problems] == [LAYER]


def test_rare_deviations_are_damage(changed):
    def one(values):
        values[0, 3] -= 1
        return values

    found = qkern.verify(changed(("qzeros",), one, {LAYER}))
    assert check(found, "values").problems[0].startswith(f"{LAYER}: zero points [")
    assert not found.is_sound
