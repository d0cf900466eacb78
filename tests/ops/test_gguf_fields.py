"""The numbers of GGUF blocks: any bytes come back, and stand for what the gguf package says."""

import numpy as np
import pytest
import torch

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from qkern.ops.gguf_encode.fields import LAYOUTS, read_fields, write_fields


def random_blocks(name, count=64):
    """Blocks of any bytes, but for the fp16 numbers, which are finite."""
    layout = LAYOUTS[name]
    generator = np.random.default_rng(layout.bytes)
    blocks = generator.integers(0, 256, (count, layout.bytes), dtype=np.uint8)
    for at in (layout.d, layout.dmin):
        if at is not None:
            halves = generator.standard_normal((count, 1)).astype(np.float16)
            blocks[:, at : at + 2] = halves.view(np.uint8)
    return torch.from_numpy(blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_are_those_of_ggml(name):
    layout = LAYOUTS[name]
    assert GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == (layout.block, layout.bytes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_block_comes_back_to_the_byte(name):
    blocks = random_blocks(name)
    assert torch.equal(write_fields(read_fields(blocks, LAYOUTS[name]), LAYOUTS[name]), blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_numbers_stand_for_the_weights_bit_for_bit(name):
    blocks, layout = random_blocks(name), LAYOUTS[name]
    fields = read_fields(blocks, layout)
    expected = quants.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()])
    assert torch.equal(fields.values(layout), torch.from_numpy(expected.copy()))
    assert int(fields.codes.max()) < 1 << layout.bits
    assert fields.scales.shape == (64, layout.groups)
    if layout.scales:
        assert layout.lowest <= fields.scales.min() <= fields.scales.max() <= layout.highest
    assert (fields.minima is None) == (layout.dmin is None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_blocks(name):
    layout = LAYOUTS[name]
    fields = read_fields(torch.empty(0, layout.bytes, dtype=torch.uint8), layout)
    assert fields.values(layout).shape == (0, layout.block)
    assert write_fields(fields, layout).shape == (0, layout.bytes)
