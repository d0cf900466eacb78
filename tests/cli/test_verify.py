"""`qkern verify` and `qkern convert` from the command line: what they print, and how they end."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
import qkern.pipelines.verify
from qkern import cli

verify = sys.modules["qkern.pipelines.verify"]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(map(str, arguments)))
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "gptq"
    qkern.quantize(folder, method="rtn", scheme="w4g32", format="gptq", output=path, device="cpu")
    return path


def test_sound(capsys, quantized, folder):
    code, out, _ = run(capsys, "verify", quantized, "--against", folder, "--tokens", 128, "--window", 32)
    assert code == 0
    assert out.splitlines()[-1] == f"{quantized}: gptq, sound"
    lines = {line.split()[1]: line.split()[0] for line in out.splitlines()[:-1]}
    assert set(lines.values()) == {"passed"}
    assert "kl          KL(original || model) is within its limit (128) 0.0" in out
    options = ("--tokens", 128, "--window", 32, "--max-kl", 1e-9)
    code, out, _ = run(capsys, "verify", quantized, "--against", folder, *options)
    assert code == 1
    assert "failed   kl" in out
    assert "nats a token: allowed is 1e-09" in out


def test_notes(capsys, quantized, monkeypatch):
    monkeypatch.setattr(verify, "_check_runtime", lambda *others: others[-1].note("runtime", "a: is odd"))
    code, out, _ = run(capsys, "verify", quantized)
    assert code == 0
    assert "         note: a: is odd\n" in out


def test_no_kl(capsys, quantized, folder, monkeypatch):
    loaded, load = [], verify.load
    monkeypatch.setattr(
        verify, "load", lambda path, **options: loaded.append(str(path)) or load(path, **options)
    )
    code, out, _ = run(capsys, "verify", quantized, "--against", folder, "--no-kl")
    assert (code, loaded) == (0, [str(quantized)])
    assert "skipped  kl          no text was given (--text)" in out
    assert run(capsys, "verify", quantized, "--no-kl", "--text", folder / "text")[0] == 2


def test_few_tokens_are_one_window(capsys, quantized, folder):
    code, out, _ = run(capsys, "verify", quantized, "--against", folder, "--tokens", 24)
    assert code == 0
    assert "is within its limit (24) 0.0" in out


def test_not_sound(capsys, quantized, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in quantized.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensor[0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors")
    code, out, _ = run(capsys, "verify", copy)
    assert code == 1
    assert "failed   values" in out
    assert "         - and 6 more\n" in out
    assert "skipped  error       no original was given (--against)" in out
    assert out.splitlines()[-1] == f"{copy}: gptq, not sound"
    code, out, _ = run(capsys, "verify", copy, "--json")
    found = json.loads(out)
    assert (code, found["is_sound"], found["format"]) == (1, False, "gptq")
    values = next(check for check in found["checks"] if check["name"] == "values")
    assert values["status"] == "failed"
    assert len(values["problems"]) == 14


def test_errors_and_usage(capsys, tmp_path):
    code, _, err = run(capsys, "verify", tmp_path / "missing")
    assert code == 1
    assert "does not exist" in err
    assert run(capsys, "verify")[0] == 2
    assert run(capsys, "verify", tmp_path, "--runtime", "mlx")[0] == 2
    assert run(capsys, "convert", tmp_path)[0] == 2
    arguments = ("convert", tmp_path, "--output", tmp_path / "out", "--to", "bitsandbytes")
    assert run(capsys, *arguments)[0] == 2


def test_convert(capsys, quantized, tmp_path):
    code, out, _ = run(capsys, "convert", quantized, "--to", "awq", "--output", tmp_path / "awq")
    assert code == 0
    assert out.splitlines()[0] == "  14 layers w4g32 to w4g32: exact"
    assert out.splitlines()[-1].endswith(f"written to {tmp_path / 'awq'}")
    code, out, _ = run(
        capsys, "convert", tmp_path / "awq", "--to", "gptq_v2", "--output", tmp_path / "v2", "--json"
    )
    found = json.loads(out)
    assert (code, found["before"], found["after"], found["is_exact"]) == (0, "awq", "gptq_v2", True)
    code, out, err = run(capsys, "convert", quantized, "--to", "awq", "--output", tmp_path / "awq")
    assert (code, out) == (1, "")
    assert "exists and is not empty" in err


def test_convert_says_what_was_rounded(capsys, folder, tmp_path):
    qkern.quantize(folder, method="rtn", scheme="w8g32", format="gptq", output=tmp_path / "w8", device="cpu")
    code, out, err = run(capsys, "convert", tmp_path / "w8", "--to", "awq", "--output", tmp_path / "awq")
    assert (code, out) == (1, "")
    assert "AWQ has 4 bits only" in err
    assert "--requantize" in err
    arguments = ("--to", "awq", "--output", tmp_path / "awq", "--requantize", "nearest")
    code, out, _ = run(capsys, "convert", tmp_path / "w8", *arguments)
    assert code == 0
    assert out.startswith("  14 layers w8g32 to w4g32: rounded again, error up to ")
