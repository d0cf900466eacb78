import json
import platform
from pathlib import Path

import pytest
import torch

import qkern
from qkern import cli
from qkern.cli import info
from qkern.ops._native import core, force_tier

KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["info", *arguments])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_json_holds_the_facts(capsys):
    facts = json.loads(run(capsys, "--json"))
    assert facts["qkern"] == qkern.__version__
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["usable_tiers"] == core().usable_tiers()
    assert facts["cpu"]["active_tier"] in facts["cpu"]["usable_tiers"]
    assert set(facts["cpu"]["usable_tiers"]) <= set(facts["cpu"]["compiled_tiers"])
    assert "scalar" in facts["cpu"]["compiled_tiers"]
    assert facts["cpu"]["thread_pool"]


def test_matrix_covers_every_op_backend_and_scheme(capsys):
    matrix = json.loads(run(capsys, "--json"))["matrix"]
    cells = {(row["op"], row["backend"], row["scheme"]): row["reason"] for row in matrix}
    assert len(cells) == len(matrix)
    ops = {op for op, _, _ in cells}
    assert {"quantize_groupwise", "dequantize_groupwise", "pack_bits", "gptq_update", "dequant_matmul"} <= ops
    for op in ops:
        backends = {backend for name, backend, _ in cells if name == op}
        assert len(cells) >= len(backends) * len(info.SCHEMES)
    assert cells["dequant_matmul", "cpu", "w4g128"] is None
    assert cells["dequant_matmul", "reference", "w4g128"] is None


def test_kernels_are_those_that_run(capsys):
    usable = core().usable_tiers()
    for tier in usable:
        with force_tier(tier):
            kernels = json.loads(run(capsys, "--json"))["cpu"]["kernels"]
        assert kernels["unpack_bits"] == kernels["pack_bits"]
        below = usable[: usable.index(tier) + 1]
        for op, found in kernels.items():
            files = {file.stem for file in (KERNELS / op.removeprefix("un")).glob("*.cpp")}
            assert found == [name for name in below if name in files][-1]


@pytest.mark.parametrize("width", ["80", None])
def test_text_fits_80_columns(capsys, monkeypatch, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", width)
    lines = run(capsys).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["active", "tier", core().active_tier()] for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:1].isalpha()}
    assert rows["op"] == ["cpu", "reference"]
    assert rows["dequant_matmul"] == [core().kernel_tier("dequant_matmul"), "yes"]
    assert rows["gguf_encode"] == [core().kernel_tier("gguf_encode"), "-"]


def test_text_says_what_does_not_run(capsys, monkeypatch):
    facts = info.collect()
    for row in facts["matrix"]:
        if row["op"] in ("pack_bits", "unpack_bits") and row["backend"] == "cpu":
            row["reason"] = "no module"
        if row["op"] == "gptq_update" and row["scheme"].startswith("nf4"):
            row["reason"] = "uniform grids only"
    monkeypatch.setattr(info, "collect", lambda: facts)
    out = run(capsys)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:1].isalpha()}
    assert rows["pack_bits"] == ["-", "yes"]
    kernel = core().kernel_tier("gptq_update")
    assert " ".join(rows["gptq_update"]) == f"{kernel}, 9 of 11 schemes yes, 9 of 11 schemes"
    text = " ".join(out.split())
    assert "not gptq_update on cpu in nf4g64 nf4g64d: uniform grids only" in text
    assert "not pack_bits, unpack_bits on cpu: no module" in text


def test_cuda_says_why_not(capsys):
    cuda = json.loads(run(capsys, "--json"))["cuda"]
    assert cuda["native_module"].startswith(("built by nvcc", "not built", "does not load"))
    assert cuda["torch_built_for"] == torch.version.cuda


def test_missing_native_module_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(
        "qkern.ops._native.why_not_cpu", lambda device: "the native module does not load (reason)"
    )
    cpu = json.loads(run(capsys, "--json"))["cpu"]
    assert cpu == {"native_module": "the native module does not load (reason)"}
