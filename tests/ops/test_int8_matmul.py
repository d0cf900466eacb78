"""int8_matmul: the integers exact on every backend and tier, the scaling to the bit, bad input, the op."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError, UnsupportedError
from qkern.nn import QuantLinear
from qkern.ops import (
    dequant_matmul,
    int8_linear,
    int8_matmul,
    pack_bits,
    pack_weight,
    quantize_activations,
)
from qkern.ops._native import core, force_tier
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

OP = "int8_matmul"
# Panels of 16 to 64 rows, several of them, ragged; one column, a quad and parts, more than a step.
SHAPES = [(1, 1), (3, 17), (16, 128), (37, 130), (65, 300), (130, 1029)]
# One row, every height of a register tile, more than one tile of rows.
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 98)
VARIANTS = ("w8", "w8z", "w8t", "w8tz", "w8a8", "w8 offsets")


@functools.cache
def weight(shape: tuple[int, int], variant: str, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """A weight with random parts; code 0, which is -128, is among them."""
    spelling, _, offsets = variant.partition(" ")
    scheme, (N, K) = Scheme.parse(spelling + ("z" if offsets else "")), shape
    g = torch.Generator().manual_seed(N * 1000 + K)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    codes[:, : K // 4] = 0
    scales = scheme.scale_shape(N, K)
    return QuantizedWeight(
        codes=pack_bits(codes, 8, backend="reference"),
        scales=(torch.randn(scales, generator=g) * 0.1).to(scale_dtype),
        zeros=torch.randint(0, 256, scales, dtype=torch.uint8, generator=g)
        if scheme.zero_point and not offsets
        else None,
        offsets=torch.randn(scales, generator=g).to(scale_dtype) if offsets else None,
        shape=shape,
        scheme=scheme,
    )


def integers(qw: QuantizedWeight) -> np.ndarray:
    """``q - z`` as int64, from the bytes."""
    N, K = qw.shape
    codes = qw.codes.numpy().view(np.uint8).reshape(N, qw.codes.shape[1] * 4)[:, :K].astype(np.int64)
    if qw.offsets is not None:
        return codes
    return codes - (128 if qw.zeros is None else qw.zeros.numpy().astype(np.int64))


def activations(M: int, K: int) -> torch.Tensor:
    """Codes with as many -128 as a saturating product needs to go wrong."""
    g = torch.Generator().manual_seed(M + 7 * K)
    codes = torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=g)
    codes[:, : K // 3] = -128
    return codes


def token_zeros(M: int) -> torch.Tensor:
    return torch.randint(-128, 128, (M, 1), dtype=torch.int8, generator=torch.Generator().manual_seed(M))


def exact_sums(x: torch.Tensor, qw: QuantizedWeight, x_zero: torch.Tensor | int | None) -> np.ndarray:
    zero = x_zero.numpy().astype(np.int64) if isinstance(x_zero, torch.Tensor) else x_zero or 0
    # float64 holds every one of these integers, and BLAS multiplies them.
    return ((x.numpy().astype(np.float64) - zero) @ integers(qw).T.astype(np.float64)).astype(np.int64)


def scaled(
    sums: np.ndarray, x_scales: torch.Tensor, qw: QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The scaling as the op's README has it, in fp32 step by step; no offsets."""
    total = torch.from_numpy(sums.astype(np.float32))
    y = total * (qw.scales.float().T * x_scales)
    return y if bias is None else y + bias


# ---- integers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_sums_are_exact(backend, variant):
    for shape in (*SHAPES, (0, 5), (4, 0)):
        qw = weight(shape, variant)
        packed = pack_weight(qw, backend=backend)
        for M in ROWS:
            x = activations(M, shape[1])
            for x_zero in (None, -128, token_zeros(M)):
                got = int8_matmul(x, None, packed, out_dtype=torch.int32, x_zero=x_zero, backend=backend)
                assert got.dtype == torch.int32
                assert np.array_equal(got.numpy(), exact_sums(x, qw, x_zero)), (shape, M, x_zero)


@given(N=st.integers(1, 70), K=st.integers(1, 600), M=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_sums_of_extreme_codes_are_exact(backend, N, K, M, seed):
    generator = np.random.default_rng(seed)
    extremes = np.array([0, 1, 127, 128, 129, 255], dtype=np.uint8)
    q, a = generator.choice(extremes, (N, K)), generator.choice(extremes, (M, K)).view(np.int8)
    qw = QuantizedWeight(
        codes=pack_bits(torch.from_numpy(q), 8, backend="reference"),
        scales=torch.ones(N, 1),
        shape=(N, K),
        scheme=Scheme.parse("w8"),
    )
    x = torch.from_numpy(a)
    got = int8_matmul(x, None, qw, out_dtype=torch.int32, backend=backend)
    assert np.array_equal(got.numpy(), exact_sums(x, qw, None))


@pytest.mark.parametrize(
    ("spelling", "x_zero", "most"), [("w8", None, 131_071), ("w8", 127, 65_793), ("w8z", 127, 33_025)]
)
def test_the_longest_sums_that_fit(backend, spelling, x_zero, most):
    """Every product is the largest: the last K that is allowed fills int32, the next is refused."""
    x = torch.full((1, most), -128, dtype=torch.int8)
    scheme = Scheme.parse(spelling)
    qw = QuantizedWeight(
        codes=torch.zeros(1, most // 4 + 1, dtype=torch.int32)[:, : -(-most // 4)],
        scales=torch.full((1, 1), 2.0**-20),
        zeros=torch.full((1, 1), 255, dtype=torch.uint8) if scheme.zero_point else None,
        shape=(1, most),
        scheme=scheme,
    )
    product = (255 if scheme.zero_point else 128) * (128 + (x_zero or 0))
    assert product * most < 2**31 <= product * (most + 1)
    packed = pack_weight(qw, backend=backend)
    got = int8_matmul(x, None, packed, out_dtype=torch.int32, x_zero=x_zero, backend=backend)
    assert got.item() == product * most
    longer = 3 * most + 5
    qw = replace(qw, codes=torch.zeros(1, -(-longer // 4), dtype=torch.int32), shape=(1, longer))
    x = torch.full((2, longer), -128, dtype=torch.int8)
    packed = pack_weight(qw, backend=backend)
    with pytest.raises(InputError, match="could overflow"):
        int8_matmul(x, None, packed, out_dtype=torch.int32, x_zero=x_zero, backend=backend)
    y = int8_matmul(x, 1.0, packed, out_dtype=torch.float32, x_zero=x_zero, backend=backend)
    torch.testing.assert_close(
        y.double(), torch.full((2, 1), product * longer * 2.0**-20).double(), rtol=3e-7, atol=0
    )


# ---- scaling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_scaling_is_the_formula_to_the_bit(backend, variant, dtype):
    for i, shape in enumerate(SHAPES):
        qw = weight(shape, variant, FLOAT_DTYPES[i % 3])
        packed = pack_weight(qw, backend=backend)
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(i)).to(dtype)
        for M in (1, 7, 98):
            x, scales = activations(M, shape[1]), torch.rand(M, 1, generator=torch.Generator().manual_seed(M))
            for b, x_zero in ((None, None), (bias, None), (bias.float(), token_zeros(M))):
                y = int8_matmul(x, scales, packed, b, out_dtype=dtype, x_zero=x_zero, backend=backend)
                expected = scaled(exact_sums(x, qw, x_zero), scales, qw, None if b is None else b.float())
                assert torch.equal(y, expected.to(dtype))


def test_one_scale_and_zero_for_all(backend):
    qw = weight((37, 130), "w8z")
    x = activations(5, 130)
    each = int8_matmul(
        x,
        torch.full((5, 1), 0.25),
        qw,
        out_dtype=torch.float32,
        x_zero=torch.full((5, 1), -3, dtype=torch.int8),
        backend=backend,
    )
    for scale in (0.25, torch.tensor(0.25), torch.tensor([[0.25]])):
        for zero in (-3, torch.tensor(-3, dtype=torch.int8)):
            y = int8_matmul(x, scale, qw, out_dtype=torch.float32, x_zero=zero, backend=backend)
            assert torch.equal(y, each)


@pytest.mark.parametrize("x_zero", [None, 17])
def test_offsets(backend, x_zero):
    qw = weight((37, 130), "w8 offsets", torch.float32)
    x, scales = activations(9, 130), torch.rand(9, 1)
    y = int8_matmul(x, scales, qw, out_dtype=torch.float32, x_zero=x_zero, backend=backend)
    real = integers(qw) * qw.scales.double().numpy() + qw.offsets.double().numpy()
    terms = scales.double().numpy() * (x.numpy().astype(np.float64) - (x_zero or 0))
    np.testing.assert_allclose(
        y.double().numpy(), terms @ real.T, atol=4e-7 * (np.abs(terms) @ np.abs(real.T)).max()
    )
    with pytest.raises(InputError, match="offsets"):
        int8_matmul(x, None, qw, out_dtype=torch.int32, backend=backend)


def test_non_finite_scales_stay_in_their_row_and_column(backend):
    qw = weight((65, 300), "w8")
    scales = qw.scales.clone()
    scales[7] = float("nan")
    x_scales = torch.ones(9, 1)
    x_scales[2], x_scales[4] = float("nan"), float("inf")
    x = activations(9, 300)
    y = int8_matmul(x, x_scales, replace(qw, scales=scales), out_dtype=torch.float32, backend=backend)
    bad = ~torch.isfinite(y)
    assert bad[[2, 4]].all()
    assert bad[:, 7].all()
    bad[[2, 4]] = False
    bad[:, 7] = False
    assert not bad.any()


def test_strides_and_leading_dimensions(backend):
    qw = weight((37, 130), "w8")
    base = activations(24, 260)
    scales = torch.rand(24, 1)
    y = int8_matmul(base[:, :130].contiguous(), scales, qw, out_dtype=torch.float32, backend=backend)
    for view in (base[:, :130], base[:, :130].T.contiguous().T):
        again = int8_matmul(view, scales, qw, out_dtype=torch.float32, backend=backend)
        assert torch.equal(again, y)
    strided = torch.cat([scales, scales], 1)[:, :1]
    assert torch.equal(int8_matmul(base[:, :130], strided, qw, out_dtype=torch.float32, backend=backend), y)
    cube = int8_matmul(
        base[:, :130].reshape(2, 3, 4, 130),
        scales.view(2, 3, 4, 1),
        qw,
        out_dtype=torch.float32,
        backend=backend,
    )
    assert torch.equal(cube, y.view(2, 3, 4, 37))
    row = int8_matmul(base[0, :130], scales[0], qw, out_dtype=torch.float32, backend=backend)
    assert torch.equal(row, y[0])


def test_the_same_bits_for_any_number_of_threads(cpu_tier):
    packed = pack_weight(weight((130, 1029), "w8z"), backend="cpu")
    x, scales = activations(200, 1029), torch.rand(200, 1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(int8_matmul(x, scales, packed, out_dtype=torch.float32, x_zero=5))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- from floats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_w8a8_weight_quantizes_a_token_at_a_time(backend, dtype):
    """dequant_matmul, QuantLinear and the two steps by hand: the same bits."""
    for shape in (*SHAPES[1:], (0, 5), (4, 0)):
        qw = weight(shape, "w8a8")
        packed = pack_weight(qw, backend=backend)
        bias = torch.randn(shape[0]).to(dtype)
        for M in (0, 1, 5, 98):
            x = torch.randn(M, shape[1], generator=torch.Generator().manual_seed(M)).to(dtype)
            y = int8_linear(x, packed, bias, backend=backend)
            assert y.dtype == dtype
            codes, scales = quantize_activations(x, backend=backend)
            assert torch.equal(int8_matmul(codes, scales, packed, bias, out_dtype=dtype, backend=backend), y)
            whole = dequant_matmul(x, packed, bias, compute="int8", backend=backend)
            if backend == "cpu":
                assert torch.equal(whole, y)
                layer = QuantLinear.from_quantized(qw, bias)
                assert torch.equal(layer(x), y)
            else:  # its dequant_matmul sums rounded products, in another order
                tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
                assert y.numel() == 0 or (whole - y).abs().max() <= tolerance * y.abs().max()


def test_error_of_int8_activations_on_gaussians(backend):
    g = torch.Generator().manual_seed(0)
    layer = QuantLinear.from_linear(torch.nn.Linear(1024, 256, bias=False), "w8a8")
    x = torch.randn(64, 1024, generator=g)
    exact = dequant_matmul(x.double().float(), layer.quantized(), compute="float")
    y = int8_linear(x, layer.quantized(), backend=backend)
    # One scale a token of 1024: the step is about 3.3 / 127 of sigma, its error 1 / sqrt(12) of that.
    assert (y - exact).norm() / exact.norm() < 0.009


def test_gradients_of_a_w8a8_layer():
    qw = weight((37, 130), "w8a8", torch.float32)
    x = torch.randn(5, 130, requires_grad=True)
    y = dequant_matmul(x, qw)
    assert torch.equal(y.detach(), int8_linear(x.detach(), qw))
    y.sum().backward()
    expected = torch.from_numpy(integers(qw)).double() * qw.scales.double()
    torch.testing.assert_close(x.grad.double(), expected.sum(0).expand(5, -1), rtol=1e-5, atol=1e-4)
    with pytest.raises(UnsupportedError, match="no gradient"):
        int8_linear(x, qw)
    with pytest.raises(UnsupportedError, match="no gradient"):
        int8_matmul(activations(5, 130), torch.ones(5, 1, requires_grad=True), qw, out_dtype=torch.float32)
    with torch.no_grad():
        int8_linear(x, qw)


@pytest.mark.parametrize("zero", [0, 9, -128, 127])
def test_static_activations(backend, zero):
    qw = weight((37, 130), "w8z")
    x = torch.randn(9, 130, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0], x[0, 1] = 1e30, -1e30  # saturate
    for scale in (0.02, torch.tensor([0.02])):
        codes, scales = quantize_activations(x, scale=scale, zero=zero, backend=backend)
        step = x.numpy() / np.float32(0.02)
        expected = np.rint(np.clip(step, -128 - zero, 127 - zero)) + zero
        assert np.array_equal(codes.numpy(), expected.astype(np.int8))
        assert torch.equal(scales, torch.full((9, 1), 0.02))
        y = int8_linear(x, qw, x_scale=scale, x_zero=zero, backend=backend)
        assert torch.equal(y, scaled(exact_sums(codes, qw, zero), scales, qw, None))


def test_non_finite_activations_show(backend):
    x = torch.ones(5, 130)
    x[1, 3], x[2, 129] = float("nan"), -float("inf")
    for arguments in ({}, {"x_scale": 0.1}, {"x_scale": 0.1, "x_zero": 4}):
        y = int8_linear(x, weight((37, 130), "w8"), backend=backend, **arguments)
        assert (~torch.isfinite(y)).all(1).tolist() == [False, True, True, False, False]
        assert torch.isfinite(y[[0, 3, 4]]).all()


# ---- as others call it ---------------------------------------------------------------------------------


def test_the_torch_op_refuses_what_its_kernels_could_not_read():
    qw = weight((16, 128), "w8")
    packed = pack_weight(qw)
    x, scales = torch.ones(2, 128, dtype=torch.int8), torch.ones(2, 1)
    static = (packed.layout, 16, 128, packed.spelling, torch.float32)
    for arguments in (
        (x, None, packed.blob, None, None),
        (x, scales.half(), packed.blob, None, None),
        (x.float(), scales, packed.blob, None, None),
        (x, scales, packed.blob, torch.ones(1), None),
    ):
        with pytest.raises(InputError, match=r"call qkern\.ops\.int8_matmul"):
            torch.ops.qkern.int8_matmul(*arguments, *static)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_opcheck(backend_name):
    packed = pack_weight(weight((37, 130), "w8z"), backend=backend_name)
    static = (packed.layout, packed.N, packed.K, packed.spelling)
    x = activations(6, 130).view(2, 3, 130)
    op = torch.ops.qkern.int8_matmul
    for bias, zero in ((None, None), (torch.ones(37), torch.full((2, 3, 1), 4, dtype=torch.int8))):
        torch.library.opcheck(op, (x, torch.rand(2, 3, 1), packed.blob, bias, zero, *static, torch.bfloat16))
    torch.library.opcheck(op, (x, None, packed.blob, None, None, *static, torch.int32))


def test_compiles_without_a_graph_break():
    packed = pack_weight(weight((37, 130), "w8a8"))
    bias = torch.ones(37)

    def step(x):
        return torch.relu(int8_linear(x * 2, packed, bias)) + int8_linear(x, packed, x_scale=0.05, x_zero=3)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 3, 7):
        x = torch.randn(M, 130)
        assert torch.equal(compiled(x), step(x))


def test_errors(backend):
    qw, x = weight((16, 128), "w8"), activations(3, 128)
    ones = torch.ones(3, 1)
    f32 = torch.float32
    cases = [
        ((x.float(), ones, qw), {"out_dtype": f32}, "x_codes must be int8"),
        ((x[:, 1:], ones, qw), {"out_dtype": f32}, r"\[\.\.\., 128\]"),
        ((x, ones[:2], qw), {"out_dtype": f32}, "x_scales must be"),
        ((x, ones.half(), qw), {"out_dtype": f32}, "x_scales must be"),
        ((x, None, qw), {"out_dtype": f32}, "x_scales is None"),
        ((x, ones, qw), {"out_dtype": torch.int32}, "int32 output has no scales"),
        ((x, None, qw, torch.ones(16)), {"out_dtype": torch.int32}, "int32"),
        ((x, ones, qw), {"out_dtype": torch.float64}, "out_dtype must be"),
        ((x, ones, qw, torch.ones(15)), {"out_dtype": f32}, "bias must be"),
        ((x, ones, qw), {"out_dtype": f32, "x_zero": 128}, "x_zero must lie in"),
        ((x, ones, qw), {"out_dtype": f32, "x_zero": torch.tensor(3)}, "x_zero must be"),
        ((x, ones, weight_of("w4")), {"out_dtype": f32}, "8-bit weights, not w4"),
        ((x, ones, weight_of("w8g32")), {"out_dtype": f32}, "groups of w8g32"),
        ((x, ones, indexed()), {"out_dtype": f32}, "group"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            int8_matmul(*arguments, **options, backend=backend)
    with pytest.raises(InputError, match="x has the wrong shape"):
        int8_linear(torch.ones(2, 127), qw, backend=backend)
    for options, message in (
        ({"zero": 3}, "goes with a scale"),
        ({"scale": 0.0}, "above 0"),
        ({"scale": 1.0, "zero": 128}, "zero must lie"),
        ({"scale": 1.0, "group_size": 3}, "excludes group_size"),
        ({"scale": torch.ones(2)}, "one element"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_activations(torch.ones(2, 3), **options, backend=backend)


def test_a_backend_that_cannot_run_says_so():
    with pytest.raises(UnsupportedError, match="cuda"):
        int8_matmul(
            activations(3, 128), 1.0, weight((16, 128), "w8"), out_dtype=torch.float32, backend="cuda"
        )


def weight_of(spelling: str) -> QuantizedWeight:
    scheme = Scheme.parse(spelling)
    return QuantizedWeight(
        codes=torch.zeros(16, scheme.code_words(128), dtype=torch.int32),
        scales=torch.ones(scheme.scale_shape(16, 128)),
        shape=(16, 128),
        scheme=scheme,
    )


def indexed() -> QuantizedWeight:
    """Per channel by its scheme, but its columns name two groups."""
    return replace(
        weight_of("w8"), scales=torch.ones(16, 2), group_index=torch.arange(128, dtype=torch.int32) % 2
    )


def test_a_corrupt_blob_is_refused():
    packed = pack_weight(weight((16, 128), "w8"), backend="cpu")
    x = activations(3, 128)
    for wrong, message in (
        (replace(packed, blob=packed.blob[:100]), "shorter than its header"),
        (replace(packed, N=17), "another shape"),
    ):
        with pytest.raises(InputError, match=message):
            int8_matmul(x, 1.0, wrong, out_dtype=torch.float32)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Of the weight, of the activations and of the output, each by itself; sampled rows."""
    scheme = Scheme.parse("w8")

    def check(M: int, N: int, K: int) -> None:
        words = torch.arange(N * K // 4, dtype=torch.int32).mul_(-1640531527).view(N, K // 4)
        qw = QuantizedWeight(codes=words, scales=torch.ones(N, 1), shape=(N, K), scheme=scheme)
        packed = pack_weight(qw)
        x = torch.arange(M * K // 8, dtype=torch.int64).mul_(-7046029254386353131).view(torch.int8).view(M, K)
        y = int8_matmul(x, None, packed, out_dtype=torch.int32)
        tokens, channels = torch.tensor([0, M // 2, M - 1]), torch.tensor([0, 1, N // 2, N - 1])
        sample = replace(qw, codes=words[channels], scales=torch.ones(4, 1), shape=(4, K))
        assert np.array_equal(y[tokens][:, channels].numpy(), exact_sums(x[tokens], sample, None))

    check(2, 40_000, 55_000)
    check(40_000, 16, 55_000)
    check(50_000, 44_000, 8)


def test_the_registry_says_what_it_cannot_do():
    from qkern.ops.registry import Backend, Request, explain

    for spelling, able in (
        ("w8", True),
        ("w8za8", True),
        ("w8g128", False),
        ("w4", False),
        ("nf4g64", False),
    ):
        request = Request(device=torch.device("cpu"), scheme=Scheme.parse(spelling))
        for name in (Backend.CPU, Backend.REFERENCE):
            assert (explain("int8_matmul", name, request) is None) == able


def test_tiers_give_the_same_bits():
    packed = pack_weight(weight((65, 300), "w8 offsets"), backend="cpu")
    x, scales = activations(13, 300), torch.rand(13, 1)
    results = []
    for tier in core().usable_tiers():
        with force_tier(tier):
            results.append(int8_matmul(x, scales, packed, torch.ones(65), out_dtype=torch.bfloat16, x_zero=1))
    assert all(torch.equal(result, results[0]) for result in results)
