import json
import platform

import pytest
import torch

import qkern
from qkern import cli
from qkern.cli import info
from qkern.ops._native import core


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


def test_text_shows_tiers_and_matrix(capsys):
    out = run(capsys)
    assert "active tier" in out
    assert core().active_tier() in out
    rows = [line.split() for line in out.splitlines() if line.startswith("dequant_matmul")]
    assert [row[1] for row in rows] == ["cpu", "reference"]
    assert all(len(row) == 2 + len(info.SCHEMES) and row[4] == "yes" for row in rows)


def test_cuda_says_why_not(capsys):
    cuda = json.loads(run(capsys, "--json"))["cuda"]
    if cuda["native_module"] != "loaded":
        assert cuda["native_module"].startswith(("not built", "does not load"))
    assert cuda["torch_built_for"] == torch.version.cuda


def test_missing_native_module_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(
        "qkern.ops._native.why_not_cpu", lambda device: "the native module does not load (reason)"
    )
    cpu = json.loads(run(capsys, "--json"))["cpu"]
    assert cpu == {"native_module": "the native module does not load (reason)"}
