"""`qkern demo` end to end on fewer tokens, and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qkern.demo import CALIBRATION, HELDOUT, MODEL, SEARCH, report, run, speed
from qkern.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def test_shipped_model_and_texts_are_there_and_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.glob("*.safetensors")) <= 6_000_000
    texts = [path.read_text(encoding="utf-8") for path in (CALIBRATION, SEARCH, HELDOUT)]
    assert all(len(text) > 50_000 for text in texts)
    paragraphs = [set(text.split("\n")) - {""} for text in texts]
    assert not (paragraphs[0] & paragraphs[1])
    assert not (paragraphs[0] & paragraphs[2])
    assert not (paragraphs[1] & paragraphs[2])


def test_demo_quantizes_reloads_exports_and_reports(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    run.make_output(output)
    quality = run.run_quality(output, windows=4, samples=16)
    assert [(row.method, row.scheme) for row in quality[1:]] == [
        (method, scheme) for method, scheme, _ in run.RUNS
    ]
    assert quality[0].kl == 0
    assert all(0 < row.kl < 5 for row in quality[1:])
    assert all(row.file_bytes < quality[0].file_bytes for row in quality[1:])
    gguf = run.run_gguf(output, types=("q4_k_m",))
    assert gguf[0].continuation is not None
    assert gguf[0].continuation.startswith(run.PROMPT)
    mlp = speed.run_speed(hidden=256, intermediate=512, rounds=1)
    assert [row.weights for row in mlp] == ["bf16", *speed.SCHEMES]
    assert all(row.resident_bytes < mlp[0].resident_bytes for row in mlp[1:])
    path = report.write_report(output, quality, mlp, gguf, machine="test")
    text = path.read_text(encoding="utf-8")
    assert all(row.scheme in text for row in quality)


def test_demo_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(InputError, match="new, empty or an earlier demo's"):
        run.make_output(tmp_path)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_demo_starts_over_in_its_own_folder(tmp_path: Path) -> None:
    for _ in range(2):
        run.make_output(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [run.MARK]
        (tmp_path / "w4g128-gptq").mkdir()
        (tmp_path / "w4g128-gptq" / "model.safetensors").write_bytes(b"old")
        (tmp_path / "report.md").write_text("old", encoding="utf-8")
