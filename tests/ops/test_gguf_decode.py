"""gguf_decode: every backend and tier gives the bits of the gguf package, for any bytes."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from qkern.errors import InputError, UnsupportedError
from qkern.ops import gguf_decode, gguf_encode
from qkern.ops._native import force_tier, usable_tiers
from qkern.ops.gguf_types import GGUF_TYPES, GGUFType, gguf_type_by_id

BACKENDS = ["reference", *usable_tiers()]
BLOCKS = [name for name, kind in GGUF_TYPES.items() if kind.block > 1]


def decode(raw, name, runner):
    if runner == "reference":
        return gguf_decode(raw, name, backend="reference")
    with force_tier(runner):
        return gguf_decode(raw, name, backend="cpu")


def same_bits(a, b):
    """Equal bit for bit; a NaN equals any NaN."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("runner", BACKENDS)
@pytest.mark.parametrize("name", GGUF_TYPES)
def test_any_bytes_decode_to_the_bits_of_the_gguf_package(name, runner):
    kind = GGUF_TYPES[name]
    generator = torch.Generator().manual_seed(kind.id)
    raw = torch.randint(0, 256, (7, kind.row_bytes(768)), dtype=torch.uint8, generator=generator)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = torch.from_numpy(quants.dequantize(raw.numpy(), GGMLQuantizationType(kind.id)).copy())
    assert expected.shape == (7, 768)
    assert same_bits(decode(raw, name, runner), expected)


@pytest.mark.parametrize("runner", BACKENDS)
@pytest.mark.parametrize("name", GGUF_TYPES)
def test_no_blocks(name, runner):
    for rows, blocks in ((0, 2), (3, 0), (0, 0)):
        kind = GGUF_TYPES[name]
        decoded = decode(torch.empty(rows, blocks * kind.bytes, dtype=torch.uint8), name, runner)
        assert decoded.shape == (rows, blocks * kind.block)
        assert decoded.dtype == torch.float32


def half(value):
    return list(np.float16(value).tobytes())


# Blocks written by hand from csrc/include/qkern/gguf_blocks.h, and the weights they stand for.
GOLDEN = {
    "q4_0": (half(0.5) + [0x1F] + [0x88] * 15, {0: 3.5, 16: -3.5, 1: 0.0}),
    "q4_1": (half(0.5) + half(-1) + [0x1F] + [0] * 15, {0: 6.5, 16: -0.5, 1: -1.0}),
    "q5_0": (
        half(2) + [1, 0, 0, 0x80] + [0x03] + [0] * 14 + [0x50],
        {0: 6.0, 16: -32.0, 31: 10.0, 15: -32.0},
    ),
    "q5_1": (half(2) + half(1) + [2, 0, 1, 0] + [0] * 16, {0: 1.0, 1: 33.0, 16: 33.0}),
    "q8_0": (half(0.25) + [127, 128] + [0] * 30, {0: 31.75, 1: -32.0, 2: 0.0}),
    # scale[0] = 63, min[0] = 1; scale[4] = 0b110001 and min[4] = 0b010010 are split over two bytes.
    "q4_k": (
        half(0.5)
        + half(2)
        + [0xFF, 0, 0, 0, 0x41, 0, 0, 0, 0x21, 0, 0, 0]
        + [0x0F]
        + [0] * 63
        + [0x02]
        + [0] * 63,
        {0: 470.5, 1: -2.0, 32: 0.0, 128: 13.0, 129: -36.0},
    ),
    "q5_k": (
        half(1) + half(0) + [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] + [0x03] + [0] * 31 + [0x21] + [0] * 127,
        {0: 17.0, 32: 36.0, 1: 0.0},
    ),
    # Weights 0, 32, 64, 96 share a byte; sub-block 0 has scale 3 and minimum 2, 2 scale 15, 4 minimum 1.
    "q2_k": (
        [0x23, 0, 0x0F, 0, 0x10, 0, 0, 0, 0x01]
        + [0] * 7
        + [0b11100100]
        + [0] * 31
        + [0x02]
        + [0] * 31
        + half(0.5)
        + half(2),
        {0: -4.0, 1: -4.0, 32: 7.5, 64: -2.0, 96: 0.0, 128: 1.0},
    ),
    # scale[0] = 0b101111 and scale[8] = 0b010001; the third bit of weight 128 is bit 4 of hmask[0].
    "q3_k": (
        [0b00010010]
        + [0] * 31
        + [0b11]
        + [0] * 31
        + [0b01]
        + [0] * 31
        + [0x1F]
        + [0] * 7
        + [0b00010010, 0, 0, 0]
        + half(0.5),
        {0: -7.5, 1: -30.0, 32: -0.0, 128: -7.5, 129: 30.0},
    ),
    "iq4_nl": (half(0.5) + [0xF0] + [0x78] * 15, {0: -63.5, 16: 56.5, 1: 0.5, 17: -5.0}),
    # scale[1] = 0b110010, scale[7] = 0b001111.
    "iq4_xs": (
        half(0.5)
        + [0b00001100, 0b00000000]
        + [0x20, 0, 0, 0xF0]
        + [0] * 16
        + [0x9F]
        + [0] * 95
        + [0x08]
        + [0] * 15,
        {0: 2032.0, 32: 1017.0, 48: 117.0, 33: -1143.0, 224: -8.5},
    ),
    "q6_k": (
        [0xF1] + [0] * 127 + [0b11100100] + [0] * 63 + [1, 0, 2, 0, 255, 0, 128, 0] + [0] * 8 + half(0.5),
        {0: -15.5, 32: -16.0, 64: -7.5, 96: -1024.0},
    ),
}


@pytest.mark.parametrize("runner", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_made_by_hand(name, runner):
    raw, expected = GOLDEN[name]
    weights = decode(torch.tensor([raw], dtype=torch.uint8), name, runner)[0]
    assert {index: weights[index].item() for index in expected} == expected


@pytest.mark.parametrize("shape", [(0, 18), (1, 0), (2, 3, 36), (36,)])
def test_shapes_and_strides(shape):
    raw = torch.randint(0, 255, shape, dtype=torch.uint8)
    decoded = gguf_decode(raw, "q4_0")
    assert decoded.shape == (*shape[:-1], shape[-1] // 18 * 32)
    strided = torch.stack((raw, raw), dim=-1)[..., 0]
    assert same_bits(gguf_decode(strided, "q4_0"), decoded)


def test_bytes_that_are_no_blocks_are_refused():
    with pytest.raises(InputError, match="multiples of 18 bytes"):
        gguf_decode(torch.zeros(2, 19, dtype=torch.uint8), "q4_0")
    with pytest.raises(InputError, match=r"q9_k.*allowed are"):
        gguf_decode(torch.zeros(2, 18, dtype=torch.uint8), "q9_k")


def test_every_type_of_llama_cpp_is_decoded_or_refused_by_name():
    for kind in GGMLQuantizationType:
        name = kind.name.lower()
        if name in GGUF_TYPES:
            block, size = GGML_QUANT_SIZES[kind]
            assert gguf_type_by_id(int(kind)) == GGUFType(name, int(kind), block, size)
            continue
        with pytest.raises(
            UnsupportedError, match=rf"type not offered: got '{name}', allowed are f32, .*iq4_xs"
        ):
            gguf_decode(torch.zeros(2, 18, dtype=torch.uint8), name)
        with pytest.raises(
            UnsupportedError, match=rf"type {int(kind)} \({name}\) is not decoded: allowed are"
        ):
            gguf_type_by_id(int(kind))
    with pytest.raises(UnsupportedError, match=r"type 999 is not decoded"):
        gguf_type_by_id(999)


@pytest.mark.parametrize("name", BLOCKS)
def test_encoded_rows_decode_to_the_bits_of_ggml(name):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'")
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    decoder = getattr(library, f"dequantize_row_{name.replace('_k', '_K')}")
    decoder.restype, decoder.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    kind = GGUF_TYPES[name]
    generator = torch.Generator().manual_seed(kind.id)
    noise = torch.randint(0, 256, (9, kind.row_bytes(768)), dtype=torch.uint8, generator=generator)
    for raw in (gguf_encode(torch.randn(9, 768, generator=generator), name), noise):
        expected = torch.empty(9, 768)
        decoder(raw.data_ptr(), expected.data_ptr(), expected.numel())
        for runner in BACKENDS:
            assert same_bits(decode(raw, name, runner), expected), runner
