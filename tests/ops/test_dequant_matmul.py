"""dequant_matmul: packing exact, products within their budgets on every tier, the torch op, bad input."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qkern.ops import (
    dequant_matmul,
    pack_bits,
    pack_weight,
    unpack_bits,
    unpack_weight,
)
from qkern.ops._native import core, force_tier
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul import cpu
from qkern.ops.dequant_matmul.reference import activation_blocks, fake_quantize
from qkern.schemes import FLOAT_DTYPES, NestedScales, QuantizedWeight, Scheme

OP = "dequant_matmul"
SCHEMES = [
    "w2g16z",
    "w2g64",
    "w3g32z",
    "w3g128",
    "w4g128",
    "w4g48z",
    "w4g7",
    "w4g1",
    "w8g96z",
    "w8",
    "w8t",
    "nf4g64",
    "fp4",
]
SHAPES = [(1, 1), (3, 17), (16, 128), (65, 300), (130, 257)]
ROWS = (1, 2, 5, 13)
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # to compare NaNs bit for bit


@functools.cache
def weight(
    shape: tuple[int, int],
    spelling: str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    offsets: bool = False,
    act_order: bool = False,
) -> QuantizedWeight:
    """A weight with random parts."""
    scheme, (N, K) = Scheme.parse(spelling), shape
    g = torch.Generator().manual_seed(N * 1000 + K)
    codes = torch.randint(0, scheme.levels, (N, K), dtype=torch.uint8, generator=g)
    groups = (N, 5) if act_order else scheme.scale_shape(N, K)
    return QuantizedWeight(
        codes=pack_bits(codes, scheme.bits, backend="reference"),
        scales=(torch.randn(groups, generator=g) * 0.1).to(scale_dtype),
        zeros=torch.randint(0, scheme.levels, groups, dtype=torch.uint8, generator=g)
        if scheme.zero_point and not offsets
        else None,
        offsets=torch.randn(groups, generator=g).to(scale_dtype) if offsets else None,
        # Group 3 stays empty, the others are uneven.
        group_index=torch.tensor([0, 1, 2, 4, 4, 4])[torch.randint(0, 6, (K,), generator=g)].int()
        if act_order
        else None,
        shape=shape,
        scheme=scheme,
    )


VARIANTS = [
    *({"spelling": spelling} for spelling in SCHEMES),
    {"spelling": "w4g32z", "offsets": True, "scale_dtype": torch.float32},
    {"spelling": "w3g100z", "offsets": True, "scale_dtype": torch.bfloat16},
    {"spelling": "w4g64", "act_order": True, "scale_dtype": torch.bfloat16},
    {"spelling": "w3g64z", "act_order": True},
    {"spelling": "w8g64z", "act_order": True, "offsets": True},
]


def label(variant: dict[str, object]) -> str:
    return "-".join(str(value) if key == "spelling" else key for key, value in variant.items())


def variants(function):
    return pytest.mark.parametrize("variant", VARIANTS, ids=label)(function)


def exact_weight(qw: QuantizedWeight) -> torch.Tensor:
    """The weight in float64, from the formula and nothing that is under test."""
    scheme, (N, K) = qw.scheme, qw.shape
    codes = unpack_bits(qw.codes, scheme.bits, (N, K), backend="reference").double()
    group = qw.group_index
    if group is None:
        group = torch.arange(K) // max(scheme.group_length(K), 1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.double().expand(N, -1)[:, group.long()]

    if scheme.codebook is not None:
        return codebook(scheme.codebook).values.double()[codes.long()] * spread(qw.scales)
    if qw.offsets is not None:
        return codes * spread(qw.scales) + spread(qw.offsets)
    zero = scheme.midpoint if qw.zeros is None else spread(qw.zeros)
    return (codes - zero) * spread(qw.scales)


def activations(M: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + 7 * K)).to(dtype)


def assert_same_weight(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.shape, a.scheme) == (b.shape, b.scheme)
    for name in ("codes", "scales", "zeros", "offsets", "group_index"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            raw = RAW[left.itemsize]
            assert torch.equal(left.view(raw), right.view(raw)), name


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).abs().max()) if exact.numel() else 0.0


# ---- packing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 64), (4, 0), (0, 0), (64, 1024)], ids=str)
@variants
def test_unpack_is_the_inverse_of_pack(variant, shape, backend_name):
    qw = weight(shape, **variant)
    packed = pack_weight(qw, backend=backend_name)
    assert (packed.N, packed.K, packed.scheme) == (*shape, qw.scheme)
    assert_same_weight(unpack_weight(packed), qw)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES, ids=str)
def test_every_bit_of_a_scale_survives(scale_dtype, backend_name):
    qw = weight((65, 64), "w4g32", scale_dtype=scale_dtype)
    raw = torch.randint(
        0, 256, (qw.scales.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    qw = replace(qw, scales=raw.view(scale_dtype).view(qw.scales.shape))  # NaN payloads, Inf, subnormals
    assert_same_weight(unpack_weight(pack_weight(qw, backend=backend_name)), qw)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_nested_scales_survive(backend_name):
    qw = weight((5, 96), "nf4g32")
    nested = NestedScales(
        codes=torch.arange(15, dtype=torch.uint8),
        table=torch.linspace(-1, 1, 256),
        absmax=torch.rand(4),
        offset=0.1234567890123,
        block=4,
    )
    qw = replace(qw, scheme=replace(qw.scheme, double_quant=True), scales=qw.scales.float(), nested=nested)
    back = unpack_weight(pack_weight(qw, backend=backend_name))
    assert_same_weight(back, qw)
    assert back.nested is not None
    assert (back.nested.offset, back.nested.block) == (nested.offset, nested.block)
    for name in ("codes", "table", "absmax"):
        assert torch.equal(getattr(back.nested, name), getattr(nested, name))


def test_a_blob_is_a_function_of_its_weight():
    qw = weight((130, 257), "w3g32z")
    first = pack_weight(qw, backend="cpu").blob
    torch.full((first.numel(),), 0xAB, dtype=torch.uint8)  # what the next allocation may find in its memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = pack_weight(qw, backend="cpu").blob
    torch.set_num_threads(threads)
    assert torch.equal(first, second)


def test_packed_size_is_the_information():
    N, K = 4096, 4096
    qw = weight((64, K), "w4g128")
    rows = replace(qw, codes=qw.codes.repeat(N // 64, 1), scales=qw.scales.repeat(N // 64, 1), shape=(N, K))
    assert pack_weight(rows, backend="cpu").blob.numel() <= N * K * (4 + 16 / 128) / 8 + 4096


# ---- products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@variants
def test_float_error_is_at_most_twice_that_of_plain_torch(backend, variant, dtype):
    for shape in SHAPES:
        qw = weight(shape, **variant)
        packed, dense = pack_weight(qw, backend=backend), exact_weight(qw)
        ours = plain = largest = 0.0
        for M in ROWS:
            x = activations(M, shape[1], dtype)
            exact = x.double() @ dense.T
            plain = max(plain, error(F.linear(x, dense.to(dtype)), exact))
            y = dequant_matmul(x, packed, compute="float")
            assert y.dtype == dtype
            ours, largest = max(ours, error(y, exact)), max(largest, float(exact.abs().max()))
        # torch splits even a sum of 17 products over the lanes of a register and gets it nearly exact: two
        # roundings of the output are always allowed.
        assert ours <= max(2 * plain, 2 * torch.finfo(dtype).eps * largest), shape


@pytest.mark.parametrize("spelling", ["w4g128", "w8", "w2g64z"])
def test_float_error_of_long_rows(cpu_tier, spelling):
    K = 8192
    qw = weight((64, K), spelling)
    packed, dense = pack_weight(qw), exact_weight(qw)
    for M in (1, 2, 4, 31):
        x = activations(M, K)
        exact = x.double() @ dense.T
        plain = error(F.linear(x, dense.float()), exact)
        assert error(dequant_matmul(x, packed, compute="float"), exact) <= 2 * plain


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@variants
def test_int8_error_is_that_of_the_quantized_activations(backend, variant, dtype):
    for shape in SHAPES:
        qw = weight(shape, **variant)
        packed, dense = pack_weight(qw, backend=backend), exact_weight(qw)
        for M in ROWS:
            x = activations(M, shape[1], dtype)
            exact = x.double() @ dense.T
            rounded = int8_activations(x, qw)
            y = dequant_matmul(x, packed, compute="int8")
            assert y.dtype == dtype
            budget = 1.05 * error(rounded @ dense.T, exact) + float_budget(rounded, qw, dense, dtype)
            assert error(y, exact) <= budget, (shape, M)


def float_budget(x: torch.Tensor, qw: QuantizedWeight, dense: torch.Tensor, dtype: torch.dtype) -> float:
    """What compute int8 may add to the error of its activations, which is all of it when those are exact.

    Four times the error of plain torch with the same activations (blocks are summed one after the other, and
    with groups of one column that is a chain of K sums), and the rounding of the output. The native kernels
    hold a codebook as 16-bit integers: half of 2^-15 of its largest entry a weight.
    """
    exact = x @ dense.T
    plain = F.linear(x.float(), dense.float()).to(dtype)
    budget = 4 * error(plain, exact) + torch.finfo(dtype).eps * float(exact.abs().max())
    if qw.scheme.codebook is not None:
        largest = qw.scales.double().abs().max()
        budget += 2.0**-16 * float(x.abs().sum(1).max() * largest)
    return budget


def int8_activations(x: torch.Tensor, qw: QuantizedWeight) -> torch.Tensor:
    """The activations of compute int8 in float64: scale and rounding in fp32, block by block."""
    K = qw.K
    group = qw.group_index
    if group is None:
        group = torch.arange(K) // max(qw.scheme.group_length(K), 1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for g in range(int(group.max()) + 1 if K else 0):
        columns = (group == g).nonzero()[:, 0]
        for block in columns.split(128) if len(columns) else ():
            values = x[:, block].float()
            scale = values.abs().amax(1, keepdim=True) / 127
            codes = torch.where(scale > 0, values / scale, 0).round().clamp(-127, 127)
            out[:, block] = codes.double() * scale.double()
    return out


@variants
def test_reference_blocks_are_those_of_the_definition(variant):
    qw = weight((3, 300), **variant)
    x = activations(4, 300)
    torch.testing.assert_close(fake_quantize(x, qw).double(), int8_activations(x, qw), rtol=1e-6, atol=0)
    assert len(activation_blocks(qw).unique()) == int(activation_blocks(qw).max()) + 1


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("spelling", ["w2g48z", "w4g128", "w3g32z", "w8", "nf4g64"])
def test_many_rows(cpu_tier, spelling, compute):
    # Beyond a chunk of rows (132, and 264 of bf16 pairs), with a ragged rest.
    N, K, M = (70, 200, 137) if cpu_tier == "scalar" else (200, 384, 275)
    qw = weight((N, K), spelling)
    packed, dense = pack_weight(qw), exact_weight(qw)
    for dtype in FLOAT_DTYPES:
        x = activations(M, K, dtype)
        exact = x.double() @ dense.T
        y = dequant_matmul(x, packed, compute=compute)
        if compute == "float":
            bound = 2 * error(F.linear(x, dense.to(dtype)), exact)
        else:
            rounded = int8_activations(x, qw)
            bound = 1.05 * error(rounded @ dense.T, exact) + float_budget(rounded, qw, dense, dtype)
        assert error(y, exact) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", ["w2g16", "w3g40z", "w4g128z", "w4g32", "w8", "nf4g64"])
def test_every_number_of_rows(cpu_tier, spelling, dtype):
    # Every tile of compute float and what is left beside it, in a whole panel and in one of 16 rows.
    N, K = 80, 200
    offsets = spelling == "w4g128z"
    packed = pack_weight(weight((N, K), spelling, offsets=offsets))
    dense = exact_weight(weight((N, K), spelling, offsets=offsets))
    x = activations(131, K, dtype)
    exact, size = x.double() @ dense.T, x.abs().double() @ dense.abs().T
    bound = (4e-6 if dtype == torch.float32 else 2.0**-7) * float(size.max())
    for M in (*range(1, 29), 47, 49, 97, 127, 128, 129, 131):
        y = dequant_matmul(x[:M], packed, compute="float")
        assert error(y, exact[:M]) <= bound, M


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("spelling", ["w4g32z", "w8", "nf4g64"])
def test_float_error_beside_outliers(cpu_tier, spelling, dtype):
    qw = weight((130, 512), spelling)
    packed, dense = pack_weight(qw), exact_weight(qw)
    for M in (1, 2, 20):
        x = activations(M, 512, torch.float32)
        x[:, ::100] *= 1000
        x = x.to(dtype)
        exact = x.double() @ dense.T
        plain = error(F.linear(x, dense.to(dtype)), exact)
        assert error(dequant_matmul(x, packed, compute="float"), exact) <= 2 * plain


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_powers_of_two_change_only_the_exponent(cpu_tier, compute):
    packed = pack_weight(weight((70, 300), "w4g64"))
    for M in (1, 7, 40):
        for dtype in (torch.float32, torch.bfloat16):
            x = activations(M, 300, dtype)
            y = dequant_matmul(x, packed, compute=compute)
            for power in (-80, 80):
                scaled = dequant_matmul(x * 2.0**power, packed, compute=compute)
                assert torch.equal(scaled, y * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_near_the_end_of_the_exponents(cpu_tier, dtype):
    qw = weight((70, 300), "w4g64")
    packed, dense = pack_weight(qw), exact_weight(qw)
    for M in (1, 20):
        for power in (-122, 110):
            x = (activations(M, 300) * 2.0**power).to(dtype)
            exact, size = x.double() @ dense.T, x.abs().double() @ dense.abs().T
            rounded = (4e-6 if dtype == torch.float32 else 2.0**-7) * float(size.max())
            # Subnormal activations, or what is as small beside the others, may count as zero.
            lost = 2.0**-126 * float(dense.abs().sum(1).max())
            assert error(dequant_matmul(x, packed, compute="float"), exact) <= rounded + lost


def test_large_products_by_torch(monkeypatch):
    monkeypatch.setattr(cpu, "_torch_has_amx", lambda: True)
    qw = weight((130, 257), "w4g48z")
    x = activations(40, 257, torch.bfloat16)
    bias = activations(1, 130, torch.bfloat16)[0]
    exact = x.double() @ exact_weight(qw).T + bias.double()
    plain = error(F.linear(x, exact_weight(qw).bfloat16(), bias), exact)
    assert cpu.slab_rows(x.dtype) <= 40
    assert error(dequant_matmul(x, pack_weight(qw), bias, compute="float"), exact) <= 2 * plain


@given(
    N=st.integers(0, 80),
    K=st.integers(0, 290),
    M=st.integers(0, 9),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.one_of(st.none(), st.integers(1, 300)),
    asymmetric=st.booleans(),
    compute=st.sampled_from(["float", "int8"]),
)
def test_every_backend_agrees_with_the_formula(backend, N, K, M, bits, group, asymmetric, compute):
    scheme = Scheme(bits=bits, group_size=group, zero_point=asymmetric)
    qw = weight((N, K), str(scheme))
    x = activations(M, K)
    y = dequant_matmul(x, pack_weight(qw, backend=backend), compute=compute)
    dense = exact_weight(qw)
    exact = (int8_activations(x, qw) if compute == "int8" else x.double()) @ dense.T
    assert y.shape == (M, N)
    size = float((x.abs().double() @ dense.abs().T).max()) if exact.numel() else 0.0
    assert error(y, exact) <= 4e-6 * size


def test_tiers_and_batch_sizes_agree_on_integer_sums():
    # With scales of 1 and x on the int8 grid every product is an integer that fp32 holds: equal means exact.
    qw = weight((96, 256), "w4g128z")
    qw = replace(qw, scales=torch.ones_like(qw.scales))
    x = torch.randint(-127, 128, (14, 256), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::128] = 127.0  # the scale of every block is 1
    exact = (x.double() @ exact_weight(qw).T).float()
    for tier in core().usable_tiers():
        with force_tier(tier):
            packed = pack_weight(qw)
            for M in range(1, 15):
                assert torch.equal(dequant_matmul(x[:M], packed, compute="int8"), exact[:M]), (tier, M)


@variants
def test_tiers_with_fma_agree_bit_for_bit_on_int8(variant):
    qw = weight((130, 300), **variant)
    packed = pack_weight(qw, backend="cpu")
    for M in (1, 7, 20):
        x = activations(M, 300, torch.bfloat16)
        results = []
        for tier in core().usable_tiers():
            if tier != "scalar":
                with force_tier(tier):
                    results.append(dequant_matmul(x, packed, compute="int8"))
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_the_largest_sums_do_not_overflow(cpu_tier, compute):
    K = 1024
    scheme = Scheme(bits=8, zero_point=True)
    for code, zero in ((255, 0), (0, 255)):
        qw = QuantizedWeight(
            codes=pack_bits(torch.full((17, K), code, dtype=torch.uint8), 8),
            scales=torch.ones(17, 1),
            zeros=torch.full((17, 1), zero, dtype=torch.uint8),
            shape=(17, K),
            scheme=scheme,
        )
        for sign in (-1.0, 1.0):
            x = torch.full((13, K), sign * 127)
            y = dequant_matmul(x, pack_weight(qw), compute=compute)
            assert torch.equal(y, torch.full((13, 17), sign * 127 * (code - zero) * K))


# ---- shapes, strides, values ---------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_rank_and_strides_of_x(backend, compute):
    N, K = 20, 96
    qw = weight((N, K), "w4g32z")
    packed = pack_weight(qw, backend=backend)
    base = activations(24, 2 * K)

    def same(left, right):
        # torch's own matmul, which the reference uses, sums a row differently in another batch; so does
        # compute float, which has its own kernels for few rows and for many.
        exact = backend == "cpu" and compute == "int8"
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(left, right, **tolerance)

    expected = dequant_matmul(base[:, :K].contiguous(), packed, compute=compute)
    same(dequant_matmul(base[:, :K], packed, compute=compute), expected)
    same(dequant_matmul(base[:, :K].T.contiguous().T, packed, compute=compute), expected)
    same(dequant_matmul(base[::2, :K], packed, compute=compute), expected[::2])
    blown_up = dequant_matmul(base[:, :K].view(2, 3, 4, K), packed, compute=compute)
    same(blown_up, expected.view(2, 3, 4, N))
    same(dequant_matmul(base[0, :K], packed, compute=compute), expected[0])
    repeated = dequant_matmul(base[:1, :K].expand(3, K), packed, compute=compute)
    same(repeated, expected[:1].expand(3, N))
    every_other = base[:, ::2]
    same(
        dequant_matmul(every_other, packed, compute=compute),
        dequant_matmul(every_other.contiguous(), packed, compute=compute),
    )
    misaligned = torch.empty(24 * K + 1)[1:].view(24, K).copy_(base[:, :K])
    same(dequant_matmul(misaligned, packed, compute=compute), expected)


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_empty_dimensions(backend, compute):
    for M, N, K in ((0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (40, 5, 0)):
        packed = pack_weight(weight((N, K), "w4g32"), backend=backend)
        bias = torch.arange(N, dtype=torch.float32)
        y = dequant_matmul(torch.ones(M, K), packed, bias, compute=compute)
        assert y.shape == (M, N)
        if K == 0:
            assert torch.equal(y, bias.expand(M, N))


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias(backend, dtype, compute):
    packed = pack_weight(weight((37, 64), "w4g32"), backend=backend)
    for M in (1, 40):
        x = activations(M, 64, dtype)
        wide = dequant_matmul(x.float(), packed, compute="float")
        for bias_dtype in {dtype, torch.float32}:
            bias = activations(1, 37)[0].to(bias_dtype)
            y = dequant_matmul(x, packed, bias, compute=compute)
            assert y.dtype == dtype
            # 1 % is int8's error at this K; a bias that is lost or misplaced is of the order of 1.
            tolerance = 4 * torch.finfo(dtype).eps if compute == "float" else 0.02
            torch.testing.assert_close(y.float(), wide + bias.float(), rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_reach_their_row_and_no_other(backend, value, compute):
    K = 300
    packed = pack_weight(weight((33, K), "w4g64"), backend=backend)
    for M in (3, 14, 40):
        for column in (0, 150, K - 1):
            x = activations(M, K)
            clean = dequant_matmul(x, packed, compute=compute)
            x[1, column] = value
            y = dequant_matmul(x, packed, compute=compute)
            assert not torch.isfinite(y[1]).any()
            others = [m for m in range(M) if m != 1]
            assert torch.equal(y[others], clean[others])


def test_zero_and_outlier_blocks(backend):
    K = 256
    packed = pack_weight(weight((33, K), "w4g128"), backend=backend)
    dense = exact_weight(weight((33, K), "w4g128"))
    x = torch.zeros(3, K)
    x[1, 5] = 1e36  # one huge outlier among small values of its block, fine values in the next
    x[1, 128:] = 1e-3
    x[2, 7] = 1e-44  # below 127 of the smallest subnormal: quantizes to zero
    y = dequant_matmul(x, packed, compute="int8")
    assert torch.equal(y[0], torch.zeros(33))
    assert torch.equal(y[2], torch.zeros(33))
    assert error(y[1], x[1].double() @ dense.T) <= 1e-5 * 1e36 * float(dense.abs().max())


def test_non_finite_scales_reach_their_column_and_no_other(backend):
    qw = weight((70, 64), "w4g32")
    for value in (float("nan"), float("inf")):
        scales = qw.scales.clone()
        scales[65, 1] = value
        bad = replace(qw, scales=scales)
        for compute in ("float", "int8"):
            y = dequant_matmul(activations(2, 64), pack_weight(bad, backend=backend), compute=compute)
            assert not torch.isfinite(y[:, 65]).any()
            assert torch.isfinite(y[:, :65]).all()
            assert torch.isfinite(y[:, 66:]).all()


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_results_do_not_depend_on_threads_or_on_the_run(cpu_tier, compute):
    N, K = (300, 256) if cpu_tier == "scalar" else (700, 768)
    packed = pack_weight(weight((N, K), "w4g128"))
    threads = torch.get_num_threads()
    for M in (1, 5, 20):
        x = activations(M, K)
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(dequant_matmul(x, packed, compute=compute))
        torch.set_num_threads(threads)
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    N, K = 40_000, 55_000
    words = (
        torch.arange(N * (K // 16 + 1), dtype=torch.int32).mul_(-1640531527).view(N, -1)[:, : -(-K * 2 // 32)]
    )
    qw = QuantizedWeight(
        codes=words.contiguous(), scales=torch.rand(N, 1).half(), shape=(N, K), scheme=Scheme.parse("w2")
    )
    packed = pack_weight(qw)
    x = activations(2, K)
    y = dequant_matmul(x, packed, compute="float")
    for row in (0, 1, N // 2, N - 65, N - 1):
        one = replace(qw, codes=qw.codes[row : row + 1], scales=qw.scales[row : row + 1], shape=(1, K))
        exact = x.double() @ exact_weight(one).T
        assert error(y[:, row : row + 1], exact) <= 1e-5 * float(x.abs().sum(1).max())
