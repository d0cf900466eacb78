"""What of a matrix its grid explains: rounding and clipping, and no more."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.demo import CALIBRATION, MODEL
from qkern.models.injection import inject
from qkern.ops import dequantize_groupwise, quantize_groupwise
from qkern.pipelines.verification.original import Matrix, compare_matrix

IDS = torch.randint(0, 512, (8, 128), generator=torch.Generator().manual_seed(0))


def rounded(rows):
    return dequantize_groupwise(quantize_groupwise(rows, "w4g128"))


@pytest.mark.parametrize(
    ("factor", "is_explained"), [(1.0, True), (1.09, False), (1 / 1.09, True), (1 / 1.13, False)]
)
def test_clipped_rows_are_shorter_by_less_than_rounding(factor, is_explained):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values = rounded(weight)
    values[7] *= factor
    error = float((rounded(weight) - weight).norm() / weight.norm())
    assert 1.09 < 1 + error < 1.13
    _, problems = compare_matrix(weight, Matrix(values=values, round=rounded, group_size=128))
    assert [problem.partition(",")[0] for problem in problems] == (
        [] if is_explained else ["1 of 64 rows have the wrong length"]
    )


@pytest.mark.parametrize(
    ("factors", "is_explained"),
    [((1 / 1.09, 1 / 1.09, 1.0), True), ((1 / 1.09, 1 / 1.09, 1.09), False), ((1.0, 1.0, 1.09), True)],
)
def test_clipping_explains_no_row_of_which_much_is_longer(factors, is_explained):
    weight = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    values = rounded(weight)
    values[7] *= torch.tensor(factors).repeat_interleave(128)
    _, problems = compare_matrix(weight, Matrix(values=values, round=rounded, group_size=128))
    assert [problem.partition(",")[0] for problem in problems] == (
        [] if is_explained else ["1 of 64 rows have the wrong length"]
    )


def test_a_converted_folder_is_measured_on_the_grid_it_had(tmp_path):
    given = {"calibration": CALIBRATION, "samples": 16, "length": 256, "device": "cpu"}
    qkern.quantize(MODEL, method="gptq", scheme="w3g128", output=tmp_path / "made", **given)
    assert qkern.convert(tmp_path / "made", tmp_path / "awq", "awq").is_exact
    assert qkern.verify(tmp_path / "awq", against=MODEL).is_sound
    qkern.export_gguf(MODEL, tmp_path / "model.gguf", "q4_k_m")
    qkern.convert(tmp_path / "model.gguf", tmp_path / "gptq", "gptq", requantize="nearest")
    found = qkern.verify(tmp_path / "gptq", against=MODEL)
    assert found.is_sound, found.as_dict()
    # 6 bits in the GGUF, and not quantized any more.
    assert 0.001 < found.errors["model.embed_tokens"] < 0.05
    embedding = load_file(tmp_path / "gptq" / "model.safetensors")
    embedding["model.embed_tokens.weight"][[5, 6]] = embedding["model.embed_tokens.weight"][[6, 5]]
    save_file(embedding, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    found = qkern.verify(tmp_path / "gptq", against=MODEL)
    (problem,) = [line for check in found.checks for line in check.problems if "cosine" in line]
    assert problem.startswith("model.embed_tokens: 2 of ")
    assert "leave it out" in next(check for check in found.checks if check.name == "error").notes[0]


@pytest.mark.parametrize(("scheme", "format"), [("w4g128z", "awq"), ("w3g128z", "compressed-tensors")])
def test_awq_of_random_outliers_is_explained(tiny, tmp_path, scheme, format):
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
    inject(tiny("llama", **sizes)).save_pretrained(tmp_path / "original")
    options = {"scheme": scheme, "format": format, "calibration": IDS, "device": "cpu"}
    qkern.quantize(tmp_path / "original", method="awq", output=tmp_path / "made", **options)
    found = qkern.verify(tmp_path / "made", against=tmp_path / "original")
    assert found.is_sound, found.as_dict()
