"""Weights that were rounded more than once on their way are measured on all these grids, and no looser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gguf
import qkern
from qkern.demo import CALIBRATION, MODEL
from qkern.pipelines.history import with_grid

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")

    def make(scheme, **options):
        if scheme == "16":
            return MODEL
        if not (folder / scheme).exists():
            if options:
                options |= {"calibration": CALIBRATION, "samples": 16, "length": 256}
            qkern.quantize(
                MODEL, scheme=scheme, output=folder / scheme, device="cpu", **{"method": "rtn", **options}
            )
        return folder / scheme

    return make


def follow(source, steps, where):
    """Convert and export one after the other; return the last result."""
    for number, step in enumerate(steps):
        if step in ("gptq", "awq", "compressed-tensors"):
            target = where / f"{number}-{step}"
            qkern.convert(source, target, step, requantize="nearest")
        else:
            target = where / f"{number}-{step}.gguf"
            qkern.export_gguf(source, target, step)
        source = target
    return source


@pytest.mark.parametrize(
    ("scheme", "method", "steps"),
    [
        ("w3g128", "gptq", ("awq", "gptq")),
        ("w3g128", "gptq", ("awq", "q4_0")),
        ("w3g128", "gptq", ("q4_0", "awq")),
        ("w3g128", "gptq", ("awq", "q4_0", "compressed-tensors")),
        ("w4g128", "gptq", ("f16",)),
        ("w4g128", "gptq", ("q4_k_m", "compressed-tensors")),
        ("w8", "rtn", ("q4_0", "awq")),
        ("16", "rtn", ("q4_k_m", "compressed-tensors", "gptq")),
        ("16", "rtn", ("q8_0", "gptq", "awq", "q4_0")),
        ("nf4g64d", "rtn", ("gptq", "q8_0")),
    ],
)
def test_sound_after_several_steps(made, tmp_path, scheme, method, steps):
    result = follow(made(scheme, method=method) if method != "rtn" else made(scheme), steps, tmp_path)
    found = qkern.verify(result, against=MODEL)
    assert found.is_sound, found.as_dict()
    assert found.errors


@pytest.mark.parametrize(
    ("before", "after", "is_exact", "expected"),
    [
        (["w4g128"], "w4g128", True, []),
        (["w3g128"], "w4g128", True, ["w3g128"]),
        (["w3g128"], "q4_0", False, ["w3g128", "q4_0"]),
        (["w3g128", "w4g128"], "w4g128", True, ["w3g128", "w4g128"]),
    ],
)
def test_what_is_said(before, after, is_exact, expected):
    assert with_grid(before, after, is_exact=is_exact) == expected


def problems_of(path):
    return [line for check in qkern.verify(path, against=MODEL).checks for line in check.problems]


def test_blocks_of_a_gguf_that_had_a_scale_a_row(made, tmp_path):
    path = follow(made("w8"), ("q4_0",), tmp_path)
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    blocks = tensor.data.copy().reshape(-1, 18)
    scales = blocks[::64, :2].copy().view(np.float16) * np.float16(1.35)
    blocks[::64, :2] = scales.view(np.uint8)
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + blocks.size] = blocks.tobytes()
    path.write_bytes(content)
    assert any(line.startswith("blk.1.ffn_up.weight: ") and " groups " in line for line in problems_of(path))


def test_groups_of_a_checkpoint_that_had_a_scale_a_row(made, tmp_path):
    qkern.convert(made("w8"), tmp_path / "out", "awq", requantize="w4g128z")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    words = tensors[f"{LAYER}.qzeros"].view(-1)[:3]
    words += torch.where(words & 15 == 15, -1, 1).int()  # the lowest nibble of each
    save_file(tensors, file, metadata={"format": "pt"})
    assert any(
        line.startswith(f"{LAYER}: ") and "off to one side" in line for line in problems_of(tmp_path / "out")
    )
