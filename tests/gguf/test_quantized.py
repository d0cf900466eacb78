"""A weight whose grid a type has goes into its blocks, and out of them, without being rounded again."""

from dataclasses import replace

import pytest
import torch

import gguf
from qkern.gguf import GGUFTensor
from qkern.gguf.quantized import blocks_of, exact_type, map_rows, quantized_of, same_grid
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode, pack_bits, quantize_groupwise
from qkern.ops.gguf_types import gguf_type
from qkern.schemes import Scheme

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
SCHEMES = [
    f"w{bits}{group}{zero}"
    for bits in (2, 3, 4, 8)
    for group in ("", "t", "g32", "g96")
    for zero in ("", "z")
]
# Narrowest first; with zero points the codes less z need a sign.
HOLDS = {2: "q4_0", 3: "q4_0", 4: "q4_0", 8: "q8_0"}


def quantized(scheme, rows=5, K=192, **options):
    generator = torch.Generator().manual_seed(0)
    return quantize_groupwise(torch.randn(rows, K, generator=generator), scheme, **options)


def decoded(blocks, kind):
    """What the gguf package takes the blocks for."""
    number = getattr(gguf.GGMLQuantizationType, kind.upper())
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), number).copy())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_blocks_are_the_weights(spelling, kind):
    qw = quantized(spelling)
    blocks = blocks_of(qw, gguf_type(kind))
    if not same_grid(gguf_type(kind), qw.scheme):
        # Eight bits with zero points may happen to fit; nothing else does.
        assert blocks is None or (qw.scheme.bits == 8 and qw.scheme.zero_point and kind == "q8_0")
        return
    assert blocks.shape == (5, gguf_type(kind).row_bytes(192))
    expected = dequantize_groupwise(qw)
    if kind in ("q4_1", "q5_1"):
        # Only m = -z * s is rounded, to half a unit of fp16's eleven bits.
        offset = qw.scales.float() * (qw.scheme.midpoint if qw.zeros is None else qw.zeros.float())
        bound = 2.0**-11 * offset.abs().max()
        assert (decoded(blocks, kind) - expected).abs().max() <= bound
    else:
        assert torch.equal(decoded(blocks, kind), expected)
    assert torch.equal(gguf_decode(blocks, kind), decoded(blocks, kind))


def test_the_smallest_type_without_rounding():
    assert exact_type([Scheme.parse("w4g128"), Scheme.parse("w2g64")]) == gguf_type("q4_0")
    assert exact_type([Scheme.parse("w4g128"), Scheme.parse("w4g128z")]) == gguf_type("q5_0")
    assert exact_type([Scheme.parse("w4g128z"), Scheme.parse("w8")]) == gguf_type("q8_0")
    for held in ("w8g32z", "nf4g64", "w4g48"):
        assert exact_type([Scheme.parse("w4g128"), Scheme.parse(held)]) is None
    assert exact_type([]) is None


@pytest.mark.parametrize("kind", TYPES)
def test_what_a_type_does_not_hold(kind):
    kind = gguf_type(kind)
    assert blocks_of(quantized("nf4g64"), kind) is None
    assert blocks_of(quantized("w4g48"), kind) is None  # the second block has two groups
    assert blocks_of(quantized("w4g64", K=80), kind) is None  # the last block is half a block
    qw = quantized("w4g64")
    scattered = torch.arange(192, dtype=torch.int32) % 3
    assert blocks_of(replace(qw, group_index=scattered), kind) is None
    # Act-order that moves whole blocks is none to a block.
    moved = torch.arange(192, dtype=torch.int32).flip(0) // 64
    assert torch.equal(
        gguf_decode(blocks_of(replace(qw, group_index=moved), gguf_type("q4_0")), "q4_0"),
        dequantize_groupwise(replace(qw, group_index=moved)),
    )
    tiny = replace(qw, scales=torch.full(qw.scales.shape, 1e-12))
    huge = replace(qw, scales=torch.full(qw.scales.shape, 1e12))
    assert blocks_of(tiny, kind) is None
    assert blocks_of(huge, kind) is None


def test_scales_that_are_no_fp16_numbers_are_rounded_once():
    qw = quantized("w4g64", scale_dtype=torch.float32)
    exact = dequantize_groupwise(qw)
    direct = gguf_decode(blocks_of(qw, gguf_type("q4_0")), "q4_0")
    error = (direct - exact).abs()
    assert error.max() > 0
    assert bool((error <= 2.0**-11 * exact.abs()).all())
    again = gguf_decode(gguf_encode(exact, "q4_0"), "q4_0")
    assert error.square().sum() <= 1.001 * (again - exact).square().sum()
    # Eight bits have no search to find the grid again.
    eight = quantized("w8g64", scale_dtype=torch.float32)
    exact = dequantize_groupwise(eight)
    direct = (gguf_decode(blocks_of(eight, gguf_type("q8_0")), "q8_0") - exact).square().sum()
    again = (gguf_decode(gguf_encode(exact, "q8_0"), "q8_0") - exact).square().sum()
    assert direct < 0.1 * again


def test_a_stack_is_its_matrices_in_turn():
    weights = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2))
    qw = quantize_groupwise(weights, "w4g32z")
    blocks = blocks_of(qw, gguf_type("q5_0"))
    assert torch.equal(decoded(blocks, "q5_0").view(3, 4, 64), dequantize_groupwise(qw))


def test_bf16_scales_of_common_size_are_fp16_numbers():
    qw = quantized("w4g64", scale_dtype=torch.bfloat16)
    assert torch.equal(gguf_decode(blocks_of(qw, gguf_type("q4_0")), "q4_0"), dequantize_groupwise(qw))


def test_the_ends_of_the_codes():
    """Every code, with scales of either sign, at the place of every other."""
    for spelling, kind in (("w4g32", "q4_0"), ("w8g32", "q8_0"), ("w4g32z", "q5_0")):
        qw = quantized(spelling, rows=8, K=256)
        bits = qw.scheme.bits
        codes = (torch.arange(256).repeat(8, 1) + torch.arange(8).unsqueeze(1)) % (1 << bits)
        signs = torch.where(torch.arange(8).unsqueeze(1) % 2 == 0, 1.0, -1.0).half()
        qw = replace(qw, codes=pack_bits(codes.byte(), bits), scales=qw.scales * signs)
        assert torch.equal(decoded(blocks_of(qw, gguf_type(kind)), kind), dequantize_groupwise(qw))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_blocks_to_the_neutral_form_and_back(kind):
    weights = torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    blocks = gguf_encode(weights, kind)
    tensor = GGUFTensor(raw=blocks.flatten(), type=kind, shape=(6, 160))
    qw = quantized_of(tensor)
    assert torch.equal(dequantize_groupwise(qw), decoded(blocks, kind))
    assert torch.equal(blocks_of(qw, gguf_type(kind)), blocks)


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "q4_k", "f16"])
def test_other_types_are_not_the_neutral_form(kind):
    blocks = gguf_encode(torch.ones(2, 256), kind)
    assert quantized_of(GGUFTensor(raw=blocks.flatten(), type=kind, shape=(2, 256))) is None


@pytest.mark.parametrize("spelling", ["w4g64", "w4g64z", "w8", "w4t"])
def test_rows_are_reordered(spelling):
    qw = quantized(spelling, rows=6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = map_rows(qw, lambda tensor: tensor[order])
    assert torch.equal(dequantize_groupwise(moved), dequantize_groupwise(qw)[order])
