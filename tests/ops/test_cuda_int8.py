"""What the int8 kernels of CUDA have that others have not: tiles of rows, splits of K, slabs, alignment.

The kernels run compiled for the CPU; the tests of each op run them against the reference too (conftest.py).
"""

from __future__ import annotations

import functools

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import (
    _cuda,
    dequant_matmul,
    int8_linear,
    int8_matmul,
    pack_bits,
    quantize_activations,
    unpack_weight,
)
from qkern.ops.dequant_matmul import cuda as matmul_cuda
from qkern.ops.dequant_matmul import cuda_layout
from qkern.ops.int8_matmul import cuda, reference, schema
from qkern.ops.quantize_activations import cuda as activations_cuda
from qkern.schemes import FLOAT_DTYPES, PackedWeight, QuantizedWeight, Scheme


@functools.cache
def packed(spelling: str, N: int, K: int, *, offsets: bool = False) -> PackedWeight:
    scheme, g = Scheme.parse(spelling), torch.Generator().manual_seed(N + K)
    shape = scheme.scale_shape(N, K)
    qw = QuantizedWeight(
        codes=pack_bits(
            torch.randint(0, 256, (N, K), dtype=torch.uint8, generator=g), 8, backend="reference"
        ),
        scales=torch.randn(shape, generator=g) * 0.1,
        zeros=torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        if scheme.zero_point and not offsets
        else None,
        offsets=torch.randn(shape, generator=g) if offsets else None,
        shape=(N, K),
        scheme=scheme,
    )
    return cuda_layout.pack(qw)


def codes_of(M: int, K: int) -> torch.Tensor:
    return torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=torch.Generator().manual_seed(M))


def both(x: torch.Tensor, weight: PackedWeight, *, zero: bool, out_dtype: torch.dtype = torch.float32):
    """The result of the kernels and that of the reference."""
    M, g = x.shape[0], torch.Generator().manual_seed(1)
    integers = out_dtype == torch.int32
    scales = None if integers else torch.rand(M, 1, generator=g)
    bias = None if integers else torch.randn(weight.N, generator=g)
    x_zero = torch.randint(-128, 128, (M, 1), dtype=torch.int8, generator=g) if zero else None
    ours = int8_matmul(x, scales, weight, bias, out_dtype=out_dtype, x_zero=x_zero)
    return ours, reference.matmul(x, scales, unpack_weight(weight), bias, x_zero, out_dtype)


@pytest.fixture
def native(emulator, monkeypatch):
    """The emulator, no way around the kernels, and a torch that is as strict as on a GPU."""
    product = torch._int_mm

    def strict(a, b, *, out):
        assert a.shape[0] > 16
        assert all(size % 8 == 0 for size in (a.shape[1], a.stride(0), b.shape[1], b.stride(1)))
        return product(a, b, out=out)

    def refuse(*arguments):
        raise AssertionError("the weight was unpacked")

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(schema, "unpack_weight", refuse)
    return emulator


@pytest.mark.parametrize("spelling", ["w8", "w8z", "w8t"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 33, 64, 65])
def test_rows_of_x(native, spelling, zero, M):
    # K is large enough for blocks to share it, and the last tile is half beyond the last group.
    weight = packed(spelling, 72, 2075)
    form = matmul_cuda._weight(weight.blob, weight.layout, 72, 2075, weight.spelling)
    assert form.splits(2, cuda._WARPS, cuda._RESIDENT) == 4
    for out_dtype in (torch.int32, torch.float16):
        ours, expected = both(codes_of(M, 2075), weight, zero=zero, out_dtype=out_dtype)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize("zero", [False, True])
def test_float_offsets(native, M, zero):
    ours, expected = both(codes_of(M, 200), packed("w8z", 70, 200, offsets=True), zero=zero)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("spelling", ["w8", "w8z"])
def test_same_bits_whatever_the_order_of_threads(native, spelling):
    weight, x = packed(spelling, 70, 2048), codes_of(9, 2048)
    for seed in range(4):
        native.set_seed(seed)
        ours, expected = both(x, weight, zero=True)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("M", [3, 17])
def test_devices_without_clusters(native, monkeypatch, M):
    monkeypatch.setattr(_cuda, "capability", lambda device: (8, 0))
    for out_dtype in (torch.int32, torch.bfloat16):
        ours, expected = both(codes_of(M, 2075), packed("w8z", 130, 2075), zero=True, out_dtype=out_dtype)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("M", [2, 65])
@pytest.mark.parametrize(("spelling", "zero"), [("w8", False), ("w8z", True)])
def test_sums_too_long_for_int32_are_cut_as_the_reference_cuts_them(native, monkeypatch, M, spelling, zero):
    # The limit is far too far away for the emulator.
    monkeypatch.setattr(reference, "exact_columns", lambda **which: 300)
    for K in (300, 301, 512, 1100):
        ours, expected = both(codes_of(M, K), packed(spelling, 70, K), zero=zero)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("zero", [False, True])
def test_several_slabs(native, monkeypatch, zero):
    monkeypatch.setattr(cuda, "_SLAB_BYTES", 64 * 256)
    ours, expected = both(codes_of(66, 200), packed("w8z", 150, 200), zero=zero)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("M", [5, 65])
@pytest.mark.parametrize(
    ("first", "width", "K"), [(0, 256, 130), (8, 264, 131), (1, 256, 128), (0, 257, 130)]
)
def test_rows_that_are_not_aligned(native, M, first, width, K):
    wide = codes_of(M, width + first)  # what lies beyond the columns of x must not count
    for x in (wide[:, first : first + K], wide[:, first : first + K].T.contiguous().T):
        ours, expected = both(x, packed("w8", 64, K), zero=True)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("M", [0, 1, 65])
@pytest.mark.parametrize(("N", "K"), [(4, 0), (0, 70), (0, 0)])
def test_empty_shapes(native, M, N, K):
    for out_dtype in (torch.int32, torch.float32):
        ours, expected = both(codes_of(M, K), packed("w8z", N, K), zero=True, out_dtype=out_dtype)
        assert ours.shape == (M, N)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("M", [3, 65])
def test_compute_int8_of_w8a8_stays_native(emulator, monkeypatch, dtype, M):
    weight = packed("w8za8", 70, 200)
    x = torch.randn(M, 200, generator=torch.Generator().manual_seed(M)).to(dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(0))
    expected = int8_linear(x, unpack_weight(weight), bias, backend="reference")
    monkeypatch.setattr(cuda_layout, "unpack", lambda *arguments: pytest.fail("the weight was unpacked"))
    assert torch.equal(dequant_matmul(x, weight, bias), expected)
    assert torch.equal(dequant_matmul(x.T.contiguous().T, weight, bias), expected)


def test_compute_int8_of_w8_keeps_a_scale_a_block(emulator):
    weight = packed("w8", 70, 200)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    expected = dequant_matmul(x, unpack_weight(weight), compute="int8", backend="reference")
    assert torch.equal(dequant_matmul(x, weight, compute="int8"), expected)


def test_opcheck(native):
    weight = packed("w8z", 37, 130)
    static = (weight.layout, weight.N, weight.K, weight.spelling)
    x, zero = codes_of(6, 130).view(2, 3, 130), torch.full((2, 3, 1), 4, dtype=torch.int8)
    scales = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(0))
    arguments = (x, scales, weight.blob, torch.ones(37), zero, *static, torch.bfloat16)
    torch.library.opcheck(torch.ops.qkern.int8_matmul, arguments)


def test_what_the_kernels_cannot_follow_is_refused(emulator):
    weight, x, scales = packed("w8", 70, 128), codes_of(2, 128), torch.ones(2, 1)

    def call(x=x, scales=scales, blob=weight.blob, bias=None, zero=None):
        cuda.matmul(x, scales, blob, bias, zero, weight.layout, 70, weight.spelling, torch.float32)

    for wrong, name in (
        ({"x": x.to("meta")}, "x_codes"),
        ({"scales": scales.to("meta")}, "x_scales"),
        ({"bias": torch.ones(70, device="meta")}, "bias"),
        ({"zero": torch.ones(1, dtype=torch.int8, device="meta")}, "x_zero"),
    ):
        with pytest.raises(InputError, match=f"{name} is on the wrong device: got meta, allowed is cpu"):
            call(**wrong)
    with pytest.raises(InputError, match="must be contiguous uint8"):
        call(blob=weight.blob[:-1])
    shifted = torch.zeros(weight.blob.numel() + 8, dtype=torch.uint8)[8:].copy_(weight.blob)
    with pytest.raises(InputError, match="multiple of 16 bytes"):
        call(blob=shifted)
    with pytest.raises(InputError, match="scale is on the wrong device"):
        activations_cuda.quantize(torch.ones(2, 3), 3, torch.ones(1, device="meta"), 0)


def test_a_weight_packed_for_cuda_is_refused_elsewhere():
    weight = packed("w8", 70, 128)
    with pytest.raises(InputError, match=r"packed for CUDA, which cannot run: .* not on a CUDA device"):
        int8_matmul(codes_of(2, 128), 1.0, weight, out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("K", [1023, 1024, 1025, 1032, 4096, 16384, 16385, 20000])
def test_tokens_of_a_block_and_longer_than_its_registers(emulator, dtype, K):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(K)).to(dtype)
    x[1, -1] = -300.0  # where the last thread looks
    for arguments in ({}, {"scale": 0.03, "zero": -7}, {"group_size": 1100}):
        ours = quantize_activations(x, **arguments, backend="cuda")
        expected = quantize_activations(x, **arguments, backend="reference")
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 8, 32, 20])
def test_activations_that_are_not_aligned(emulator, dtype, group_size):
    wide = torch.randn(5, 260, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (wide[:, 1:65], wide[:, :64], wide[:, 8:75], wide.T[:64].T, wide[:0]):
        ours = quantize_activations(x, group_size=group_size, backend="cuda")
        expected = quantize_activations(x, group_size=group_size, backend="reference")
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("scale", [0.0371, 1e-30, 3e-39, 1e36, 3.3e38])
def test_codes_near_a_tie_are_those_of_the_quotient(emulator, scale):
    ties = (torch.arange(-130, 130) + 0.5) * scale
    near = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(-torch.tensor(torch.inf))]
    x = torch.stack([*near, ties * 1.0001, ties * 0.9999]).nan_to_num(posinf=3e38, neginf=-3e38)
    for arguments in ({}, {"scale": scale, "zero": 3}):
        ours = quantize_activations(x, **arguments, backend="cuda")
        expected = quantize_activations(x, **arguments, backend="reference")
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("K", [40, 3000])
def test_activations_that_are_not_finite(emulator, value, K):
    x = torch.ones(3, K)
    x[1, K - 2] = value
    for arguments in ({}, {"scale": 0.1}, {"scale": torch.tensor([float("nan")])}, {"group_size": 16}):
        ours = quantize_activations(x, **arguments, backend="cuda")
        expected = quantize_activations(x, **arguments, backend="reference")
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
        assert torch.equal(ours[1].isnan(), expected[1].isnan())
