"""`quantize` with a scheme a linear: what is written, loaded and refused."""

import json

import pytest
import torch

from qkern.cli import main
from qkern.errors import InputError, UnsupportedError
from qkern.nn import compute_mode, quant_linears
from qkern.pipelines import load, quantize, save
from qkern.search import MixedPrecision

IDS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
MIXED = {
    "self_attn.q_proj": "w2g32",
    "*.layers.0.mlp.*": "w8",
    "*.layers.1.mlp.*": "w3g32",
    "layers.0.self_attn.o_proj": "16",
    "lm_head": "w4g32",
}


def logits(model):
    with torch.no_grad(), compute_mode(model, "float"):
        return model(input_ids=IDS).logits.float()


@pytest.fixture
def folder(tiny, tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("format", [None, "gptq_v2"])
def test_every_linear_gets_its_scheme(folder, tmp_path, method, format):
    out = tmp_path / "out"
    report = quantize(folder, method=method, assignment=MIXED, calibration=IDS, output=out, format=format)
    loaded = load(out)
    found = {name: str(layer.scheme) for name, layer in quant_linears(loaded).items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": "w2g32",
        "model.layers.1.self_attn.q_proj": "w2g32",
        **{f"model.layers.0.mlp.{name}_proj": "w8" for name in ("gate", "up", "down")},
        **{f"model.layers.1.mlp.{name}_proj": "w3g32" for name in ("gate", "up", "down")},
        "lm_head": "w4g32",
    }
    assert {name: record.scheme for name, record in report.layers.items()} == found
    assert report.kept["model.layers.0.self_attn.o_proj"] == "16-bit by the assignment"
    assert (report.scheme, report.format) == ("mixed", format or "compressed-tensors")
    recipe = json.loads((out / "qkern.json").read_text())
    assert recipe["arguments"]["assignment"] == MIXED
    # The same from memory.
    source = load(folder)
    returned = quantize(source, method=method, assignment=MixedPrecision(MIXED), calibration=IDS)
    assert torch.equal(logits(loaded), logits(returned))


def test_one_scheme_by_assignment_is_that_scheme(folder, tmp_path):
    everything = {"*.layers.*": "w4g32"}
    options = {"method": "gptq", "calibration": IDS}
    # Its format is that of mixtures, whose bytes a search counts.
    report = quantize(folder, **options, assignment=everything, output=tmp_path / "a")
    assert report.format == "compressed-tensors"
    quantize(folder, **options, scheme="w4g32", output=tmp_path / "b", format="compressed-tensors")
    save(quantize(folder, **options, assignment=everything), tmp_path / "c")
    one, *others = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert [other == one for other in others] == [True, True]


def test_the_command(folder, tmp_path, capsys):
    path = MixedPrecision({"*.mlp.*": "w4g32"}).write(tmp_path / "assignment.json")
    arguments = ["quantize", str(folder), "--method", "rtn", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--assignment", str(path), "--json"])
    assert end.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scheme"] == "mixed"
    assert len(report["layers"]) == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "w4"}, InputError, "got scheme 'w4' too"),
        ({"skip": "lm_head"}, InputError, "leave skip and include out"),
        ({"assignment": {"mlp.up": "w4"}}, InputError, r"'mlp.up' names no tensor"),
        ({"assignment": {"*.mlp.*": "w4", "up_proj": "w8"}}, InputError, r"up_proj twice"),
        ({"assignment": {"*": "16"}}, InputError, "nothing to quantize"),
        ({"assignment": {"up_proj": "q4_k"}}, UnsupportedError, "use it with export-gguf"),
        (
            {"assignment": {"up_proj": "w8a8"}, "format": "gptq"},
            UnsupportedError,
            r"up_proj: GPTQ .* drop a8",
        ),
        ({"assignment": "missing.json"}, InputError, r"cannot read the assignment missing\.json"),
        ({"format": "awq"}, UnsupportedError, "awq does not hold"),
        ({"assignment": {"up_proj": "w4g48"}, "format": "gptq"}, UnsupportedError, "does not hold"),
    ],
)
def test_refusals_before_any_work(folder, tmp_path, options, error, message):
    arguments = {"method": "rtn", "assignment": MIXED, "output": tmp_path / "out", **options}
    with pytest.raises(error, match=message):
        quantize(folder, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tied_head_is_refused(tiny):
    with pytest.raises(UnsupportedError, match="lm_head is tied"):
        quantize(tiny("qwen2"), method="rtn", assignment={"lm_head": "w8"})
