"""`qkern quantize`: arguments arrive, the table and the JSON are on stdout, errors have their exit codes."""

import json

import pytest
import torch

from qkern import cli
from qkern.nn import quant_linears
from qkern.pipelines import load


@pytest.fixture
def text(tmp_path):
    letters = torch.randint(26, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chr(97 + i) for i in letters))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_the_line_of_the_readme(capsys, folder, text, tmp_path):
    code, out, err = run(
        capsys,
        *("quantize", folder, "--method", "gptq", "--scheme", "w4g32", "--calibration", text),
        *("--format", "gptq", "--output", tmp_path / "out"),
    )
    assert code == 0, err
    assert "w4g32" in out
    assert "14 quantized, 1 kept 16-bit" in out
    assert "relative error" in out
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "layer 1 of 2: mean error" in err
    assert len(quant_linears(load(tmp_path / "out"))) == 14


def test_json_and_every_option_arrives(capsys, folder, text, tmp_path):
    code, out, err = run(
        capsys,
        *("quantize", folder, "--calibration", text, "--output", tmp_path / "out", "--json"),
        *("--scheme", "w3g32z", "--format", "gptq_v2", "--skip", "down_proj", "--skip", "o_proj"),
        *("--include", "lm_head", "--samples", 3, "--length", 20, "--seed", 5, "--damp", 0.1),
        *("--act-order", "desc_act", "--static-groups", "--search", "mse", "--device", "cpu"),
        *("--max-shard-size", "20KB", "--no-resume"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert (report["method"], report["scheme"], report["format"]) == ("gptq", "w3g32z", "gptq_v2")
    assert len(report["layers"]) == 2 * 5 + 1
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert recipe["arguments"] == {
        "method": "gptq",
        "scheme": "w3g32z",
        "skip": ["down_proj", "o_proj"],
        "include": ["lm_head"],
        "search": "mse",
        "device": "cpu",
        "damp": 0.1,
        "act_order": "desc_act",
        "static_groups": True,
        "block_size": 128,
    }
    assert recipe["calibration"]["shape"] == [3, 20]
    assert recipe["calibration"]["seed"] == 5
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_scale_only(capsys, folder, text, tmp_path):
    arguments = (
        "quantize",
        folder,
        "--method",
        "awq",
        "--scheme",
        "w4g32z",
        "--scale-only",
        "--calibration",
        text,
    )
    code, out, err = run(capsys, *arguments, "--output", tmp_path / "out")
    assert code == 0, err
    assert "16-bit" in out
    assert not quant_linears(load(tmp_path / "out"))


@pytest.mark.parametrize("alpha", ["auto", 0.25])
def test_smoothquant(capsys, folder, text, tmp_path, alpha):
    code, out, err = run(
        capsys,
        *("quantize", folder, "--method", "smoothquant", "--alpha", alpha, "--calibration", text),
        *("--activations", "static", "--observer", "percentile", "--output", tmp_path / "out"),
    )
    assert code == 0, err
    assert "w8a8" in out
    assert "compressed-tensors" in out
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert recipe["arguments"]["alpha"] == alpha
    assert recipe["arguments"]["observer"] == "percentile"
    layers = quant_linears(load(tmp_path / "out"))
    assert len(layers) == 14
    assert all(layer.input_scale is not None for layer in layers.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "obq"),
        ("--observer", "max"),
        ("--activations", "off"),
        ("--format", "gguf"),
        ("--samples", "0"),
        ("--act-order", "random"),
        ("--damp", "much"),
    ],
)
def test_usage_errors_exit_2(capsys, folder, tmp_path, arguments):
    code, out, err = run(capsys, "quantize", folder, "--output", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert "Usage: qkern quantize" in err
    assert "Value error" not in err
    assert run(capsys, "quantize", folder)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "rtn", "--scheme", "w4g0"), "group_size must be at least 1"),
        (("--method", "rtn", "--scheme", "w7"), "unsupported bits"),
        ((), "calibration is missing"),
        (("--calibration", "no/such/file.txt"), "calibration file not found"),
        (("--method", "rtn", "--scheme", "w4g64z", "--format", "awq"), "no work was done"),
        (
            ("--method", "smoothquant", "--alpha", "much"),
            "alpha must be 'auto' or a number from 0 to 1: got 'much'",
        ),
        (("--observer", "mse"), "use activations='static' (--activations static)"),
        (("--method", "gptq", "--alpha", "0.5", "--scheme", "w4g128"), "SmoothQuant makes room for int8"),
    ],
)
def test_failures_exit_1_with_one_line(capsys, folder, tmp_path, arguments, message):
    code, out, err = run(capsys, "quantize", folder, "--output", tmp_path / "out", *arguments)
    assert (code, out) == (1, "")
    error = err.splitlines()[-1]
    assert error.startswith("qkern: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
