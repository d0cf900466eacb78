from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qkern.ops import dequantize_groupwise, pack_bits, unpack_bits
from qkern.quantizers import quantize_rtn

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return script("quality")


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return script("quality_peers")


def test_layers_table_ranks_the_methods(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "LAYERS", {"small": (32, 128), "ragged": (16, 72)})
    monkeypatch.setattr(quality, "SEEN", 512)
    monkeypatch.setattr(quality, "FRESH", 256)
    monkeypatch.setattr(quality, "gptqmodel_python", lambda named: named)
    quality.main(["--layers", "--schemes", "w3g32", "w4g32z", "--ggml-types"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| scheme | method | bits | error, small | error, ragged | seconds |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| w")]
    assert len(rows) == 2 * (len(quality.METHODS) + 1)
    errors = {(row[0], row[1]): [float(cell) for cell in row[3:5]] for row in rows if row[2]}
    for scheme in ("w3g32", "w4g32z"):
        for column in range(2):
            rtn, gptq = errors[scheme, "RTN"][column], errors[scheme, "GPTQ"][column]
            assert gptq < 0.7 * rtn
            assert errors[scheme, "AWQ"][column] < rtn
    absent = [row for row in rows if not row[2]]
    assert [row[3] for row in absent] == ["not installed"] * 2
    assert lines[-1].startswith("Qwen2.5-0.5B: not run here; `python bench/quality.py Qwen/")


def test_a_failing_peer_is_a_row_that_says_why(quality: ModuleType, tmp_path: Path) -> None:
    found = quality.peer(sys.executable, "ggml", tmp_path / "missing.safetensors", "--type", "q4_0")
    assert isinstance(found, str)
    assert found.startswith("failed: ")
    assert "missing.safetensors" in found


def test_a_model_needs_a_text(quality: ModuleType) -> None:
    with pytest.raises(SystemExit) as stopped:
        quality.main(["somewhere"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("first_version", [False, True])
def test_the_peers_gptq_decoder_reads_gptq_files(peers: ModuleType, bits: int, first_version: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_rtn(torch.randn(64, 96, generator=generator), f"w{bits}g32z")
    assert weight.zeros is not None
    zeros = weight.zeros.T.contiguous()
    stored = ((zeros.int() - int(first_version)) % 2**bits).to(torch.uint8)
    entry: dict[str, Any] = {
        "qweight": pack_bits(unpack_bits(weight.codes, bits, shape=(64, 96)), bits, layout="gptq"),
        "qzeros": pack_bits(stored, bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": torch.arange(96, dtype=torch.int32) // 32,
    }
    found = peers.decode_gptq(entry, bits, first_version)
    torch.testing.assert_close(found, dequantize_groupwise(weight), rtol=1e-6, atol=0)


def test_the_peers_awq_decoder_reads_awq_files(peers: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_rtn(torch.randn(16, 64, generator=generator), "w4g32z")
    assert weight.zeros is not None
    codes = unpack_bits(weight.codes, 4, shape=(16, 64))
    entry = {
        "qweight": pack_bits(codes, 4, layout="awq"),
        # Zero points are packed along the outputs too: pack_bits takes [N, K] and gives [K, N/8].
        "qzeros": pack_bits(weight.zeros, 4, layout="awq"),
        "scales": weight.scales.T.contiguous(),
    }
    found = peers.decode_awq(entry, 32)
    torch.testing.assert_close(found, dequantize_groupwise(weight), rtol=1e-6, atol=0)
