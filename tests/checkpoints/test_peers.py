"""GPTQ and AWQ layers that GPTQModel packed: `tests/interop/golden.py` made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qkern.checkpoints import FORMATS
from qkern.ops import dequantize_groupwise
from qkern.schemes import Scheme

FILE = load_file(Path(__file__).parent / "golden" / "gptqmodel.safetensors")
LAYERS = sorted({key.split("/")[0] for key in FILE})


def test_all_layers_are_there() -> None:
    assert len(LAYERS) == 14


@pytest.mark.parametrize("layer", LAYERS)
def test_we_decode_and_write_the_peers_bytes(layer: str) -> None:
    name, spelling, *act_order = layer.split()
    scheme = Scheme.parse(spelling)
    tensors = {
        f"m.{key.split('/')[1]}": tensor for key, tensor in FILE.items() if key.startswith(f"{layer}/")
    }
    decoded = tensors.pop("m.decoded")
    fmt = FORMATS[name]
    config = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": not scheme.zero_point,
        "zero_point": scheme.zero_point,
        "desc_act": bool(act_order),
    }
    qw = fmt.decode("m", tensors, fmt.entry_of(config)("m"))
    assert qw.scheme == scheme
    assert (qw.group_index is not None) == bool(act_order)
    assert torch.equal(dequantize_groupwise(qw, torch.float16), decoded)
    written = fmt.encode("m", qw)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key
