"""`qkern.verify` of GGUF files: what is sound passes, damage is caught by its check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gguf
import qkern
from qkern.demo import CALIBRATION, MODEL
from qkern.errors import UnsupportedError


def failed(verification):
    return {check.name for check in verification.checks if check.status == "failed"}


def problems(verification, name):
    return " ".join(next(check.problems for check in verification.checks if check.name == name))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "q4_0.gguf"
    qkern.export_gguf(MODEL, path, "q4_0")
    return path


def test_sound_gguf(file):
    found = qkern.verify(file, against=MODEL)
    assert found.is_sound, found.as_dict()
    assert (found.format, found.runtime, len(found.errors)) == ("gguf", "gguf", 29)
    assert failed(qkern.verify(file, runtime="vllm")) == {"runtime"}


@pytest.mark.parametrize(
    ("scheme", "method", "types"),
    [
        ("w4g128", "gptq", ("q4_0", "q8_0", "q4_k_m")),
        ("w3g128", "gptq", ("q4_0",)),
        ("w4g128z", "rtn", ("q5_0", "q4_1")),
        ("w8", "rtn", ("q8_0",)),
        ("nf4g64", "rtn", ("q8_0",)),
    ],
)
def test_exports_of_quantized_models_are_measured_on_the_grid_they_had(tmp_path, scheme, method, types):
    given = {} if method == "rtn" else {"calibration": CALIBRATION, "samples": 16, "length": 256}
    qkern.quantize(MODEL, method=method, scheme=scheme, output=tmp_path / "made", device="cpu", **given)
    for kind in types:
        path = tmp_path / f"{kind}.gguf"
        qkern.export_gguf(tmp_path / "made", path, kind)
        found = qkern.verify(path, against=MODEL)
        assert found.is_sound, (kind, found.as_dict())
    # What it says of itself loosens no more than that.
    content = bytearray(path.read_bytes())
    start, stored = blocks(path, "blk.0.ffn_up.weight")
    content[start : start + stored.numel()] = stored.flip(0).numpy().tobytes()
    path.write_bytes(content)
    assert failed(qkern.verify(path, against=MODEL)) == {"error"}


def test_what_a_gguf_says_of_its_source_may_be_damaged(tmp_path):
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=tmp_path / "made")
    path = tmp_path / "made.gguf"
    qkern.export_gguf(tmp_path / "made", path, "q4_0")
    path.write_bytes(path.read_bytes().replace(b'"w4g128"', b'"w5g128"', 1))
    assert "qkern.grids is damaged: not a scheme, a GGUF type" in problems(qkern.verify(path), "config")


def test_grids_of_vectors_are_not_looked_at(tmp_path):
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=tmp_path / "made")
    path = tmp_path / "made.gguf"
    qkern.export_gguf(tmp_path / "made", path, "q4_0")
    path.write_bytes(path.read_bytes().replace(b'"blk.0.ffn_up"', b'"output_norm" ', 1))
    found = qkern.verify(path, against=MODEL)
    assert found.is_sound, found.as_dict()


def blocks(file, name):
    """First byte of a tensor, and its blocks."""
    reader = gguf.GGUFReader(file)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    return int(tensor.data_offset), torch.from_numpy(tensor.data.copy())


def flipped_byte(file):
    start, stored = blocks(file, "blk.0.ffn_up.weight")
    codes = stored.view(-1, 18)
    # Of codes far from the middle, which move by many steps; others a method could have chosen.
    far = ((codes[:, 2:] & 15) < 3).nonzero()[0]
    return start + int(far[0]) * 18 + 2 + int(far[1])


def test_flipped_byte_of_a_gguf(file, tmp_path):
    copy = tmp_path / "flipped.gguf"
    content = bytearray(file.read_bytes())
    content[flipped_byte(file)] ^= 0xFF
    copy.write_bytes(content)
    assert qkern.verify(copy).is_sound
    found = qkern.verify(copy, against=MODEL)
    assert failed(found) == {"error"}
    assert "blk.0.ffn_up.weight: 1 of " in problems(found, "error")


def test_gguf_types_that_are_not_read_are_not_judged(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        np.zeros((2, 66), np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedError, match=r"1 tensors of the GGUF types iq2_xxs \(first: blk\.0\.ffn_up"
    ):
        qkern.verify(path)


def test_damaged_gguf(file, tmp_path):
    copy = tmp_path / "damaged.gguf"
    content = bytearray(file.read_bytes())
    start, stored = blocks(file, "blk.1.attn_q.weight")
    content[start : start + 2] = b"\x00\x7e"  # a NaN for a scale
    copy.write_bytes(content)
    assert "values" in failed(qkern.verify(copy))
    # Rows of another head, as if nobody had looked at how llama.cpp orders them.
    row = stored.shape[1]
    rows = file.read_bytes()[start : start + 256 * row]
    copy.write_bytes(file.read_bytes().replace(rows, rows[64 * row :] + rows[: 64 * row]))
    assert failed(qkern.verify(copy, against=MODEL)) == {"error"}
    copy.write_bytes(file.read_bytes()[:-1000])
    assert "files" in failed(qkern.verify(copy))


def test_gguf_that_is_not_loaded(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    tiny("qwen3_moe", vocab_size=len(tokenizer), **ends).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    qkern.export_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    found = qkern.verify(tmp_path / "model.gguf", against=tmp_path / "model")
    assert found.is_sound, found.as_dict()
    checks = {check.name: check for check in found.checks}
    assert {name for name, check in checks.items() if check.status == "skipped"} == {
        "weights",
        "generation",
        "kl",
    }
    assert "has architecture 'qwen3moe'" in checks["weights"].skipped
    # Rows of 48 are no blocks: those stacks of experts are f16.
    assert (checks["error"].count, checks["original"].count) == (14, 27)
