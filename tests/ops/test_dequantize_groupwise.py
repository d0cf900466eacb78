"""dequantize_groupwise: the formula in NumPy, every backend bit for bit, rows into a caller's buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError
from qkern.ops import dequantize_groupwise, pack_bits
from qkern.ops.codebooks import codebook
from qkern.ops.dequantize_groupwise import dequantize_rows
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

OP = "dequantize_groupwise"
SCHEMES = ["w2g16", "w3g32z", "w4g128", "w4g48z", "w8", "w8t", "w4tz", "w2z", "nf4g64", "fp4", "nf4t"]
SHAPES = [(1, 1), (3, 17), (2, 256), (5, 300), (7, 513), (4, 0), (0, 64)]


def random_weight(
    shape: tuple[int, ...],
    spelling: str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    offsets: bool = False,
    act_order: bool = False,
) -> tuple[QuantizedWeight, torch.Tensor]:
    """A weight with random parts, and its codes."""
    scheme = Scheme.parse(spelling)
    *experts, N, K = shape
    g = torch.Generator().manual_seed(N * 1000 + K)
    codes = torch.randint(0, scheme.levels, (int(np.prod([*experts, N])), K), dtype=torch.uint8, generator=g)
    packed = pack_bits(codes, scheme.bits, backend="reference")
    groups = (*experts, *scheme.scale_shape(N, K))
    if act_order:
        groups = (*groups[:-1], 5)
    scales = (torch.randn(groups, generator=g) * 0.1).to(scale_dtype)
    zeros = torch.randint(0, scheme.levels, groups, dtype=torch.uint8, generator=g)
    weight = QuantizedWeight(
        codes=packed.reshape(*experts, N, scheme.code_words(K)),
        scales=scales,
        zeros=zeros if scheme.zero_point and not offsets else None,
        offsets=torch.randn(groups, generator=g).to(scale_dtype) if offsets else None,
        group_index=torch.randint(0, 5, (K,), dtype=torch.int32, generator=g) if act_order else None,
        shape=tuple(shape),
        scheme=scheme,
    )
    return weight, codes


def formula(qw: QuantizedWeight, codes: torch.Tensor) -> np.ndarray:
    """Weights in fp32, element by element in NumPy."""
    scheme, K = qw.scheme, qw.K
    out = np.zeros((codes.shape[0], K), dtype=np.float32)
    scales = qw.scales.float().reshape(-1, qw.scales.shape[-1]).numpy()
    group_size = K if scheme.group_size is None else scheme.group_size
    for n in range(codes.shape[0]):
        row = n // qw.N if scheme.per_tensor else n
        for k in range(K):
            g = int(qw.group_index[k]) if qw.group_index is not None else k // group_size
            q, s = np.float32(codes[n, k].item()), scales[row, g]
            if scheme.codebook:
                out[n, k] = codebook(scheme.codebook).values.numpy()[codes[n, k]] * s
            elif qw.offsets is not None:
                out[n, k] = q * s + qw.offsets.float().reshape(scales.shape).numpy()[row, g]
            else:
                z = scheme.midpoint if qw.zeros is None else int(qw.zeros.reshape(scales.shape)[row, g])
                out[n, k] = (q - np.float32(z)) * s
    return out.reshape(qw.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


@pytest.mark.parametrize("spelling", SCHEMES)
def test_dequantize_groupwise_follows_the_formula(backend: str, spelling: str) -> None:
    for shape in [(1, 1), (3, 17), (2, 130), (2, 3, 40)]:
        qw, codes = random_weight(shape, spelling)
        assert np.array_equal(dequantize_groupwise(qw, backend=backend).numpy(), formula(qw, codes)), shape


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequantize_groupwise_equals_reference(cpu_tier: str, spelling: str, dtype: torch.dtype) -> None:
    for i, shape in enumerate([*SHAPES, (3, 5, 65), (2, 0, 8), (0, 4, 8)]):
        qw, _ = random_weight(shape, spelling, scale_dtype=FLOAT_DTYPES[i % 3])
        expected = dequantize_groupwise(qw, dtype, backend="reference")
        assert same_bits(dequantize_groupwise(qw, dtype, backend="cpu"), expected), shape


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantize_groupwise_with_offsets_and_group_index(
    backend: str, offsets: bool, act_order: bool
) -> None:
    for shape in [(3, 17), (4, 300), (2, 3, 65)]:
        qw, codes = random_weight(
            shape, "w4g32z", offsets=offsets, act_order=act_order, scale_dtype=torch.float32
        )
        assert np.array_equal(dequantize_groupwise(qw, backend=backend).numpy(), formula(qw, codes)), shape


def test_dequantize_groupwise_with_group_index_on_a_codebook(backend: str) -> None:
    qw, codes = random_weight((3, 90), "nf4g32", act_order=True)
    assert np.array_equal(dequantize_groupwise(qw, backend=backend).numpy(), formula(qw, codes))


@given(N=st.integers(0, 9), K=st.integers(0, 600), bits=st.sampled_from([2, 3, 4, 8]), g=st.integers(1, 300))
def test_dequantize_groupwise_equals_reference_for_any_shape(
    cpu_tier: str, N: int, K: int, bits: int, g: int
) -> None:
    qw, _ = random_weight((N, K), f"w{bits}g{g}z")
    expected = dequantize_groupwise(qw, torch.bfloat16, backend="reference")
    assert same_bits(dequantize_groupwise(qw, torch.bfloat16, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequantize_groupwise_rounds_every_scale_as_torch_does(cpu_tier: str, dtype: torch.dtype) -> None:
    # Code 9 of a symmetric 4-bit grid is 1: the weight is the scale itself, rounded once. All fp16 values
    # as scales, and fp32 values around the rounding boundaries of the narrow dtypes.
    for scales in (
        torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16),
        torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16),
        (torch.arange(65536, dtype=torch.int64) * 65521 - 2**31).to(torch.int32).view(torch.float32),
        (torch.arange(65536, dtype=torch.int64) * 4096 + 0x38000000).to(torch.int32).view(torch.float32),
    ):
        codes = torch.full((65536, 1), 9, dtype=torch.int32)
        qw = QuantizedWeight(
            codes=codes, scales=scales[:, None], shape=(65536, 1), scheme=Scheme.parse("w4g1")
        )
        got = dequantize_groupwise(qw, dtype, backend="cpu")[:, 0]
        expected = scales.float().to(dtype)
        number = ~expected.isnan()
        assert torch.equal(got.isnan(), ~number)
        assert same_bits(got[number], expected[number])


def test_dequantize_groupwise_propagates_nan_and_inf(backend: str) -> None:
    qw, _ = random_weight((4, 64), "w4g32")
    qw.scales[1, 0], qw.scales[2, 1] = torch.nan, torch.inf
    out = dequantize_groupwise(qw, backend=backend)
    assert out[1, :32].isnan().all()
    assert not out[2, 32:].isfinite().any()
    assert out[0].isfinite().all()
    assert out[1, 32:].isfinite().all()


def test_dequantize_groupwise_reads_strided_parts(backend: str) -> None:
    qw, codes = random_weight((6, 70), "w4g16z")
    strided = QuantizedWeight(
        codes=qw.codes.T.contiguous().T,
        scales=qw.scales.repeat(1, 2)[:, :5],
        zeros=qw.zeros.T.contiguous().T if qw.zeros is not None else None,
        shape=qw.shape,
        scheme=qw.scheme,
    )
    assert np.array_equal(dequantize_groupwise(strided, backend=backend).numpy(), formula(qw, codes))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequantize_rows_writes_only_its_rows(cpu_tier: str, dtype: torch.dtype) -> None:
    for spelling in ("w3g32z", "w4t"):
        qw, _ = random_weight((20, 90), spelling)
        whole = dequantize_groupwise(qw, dtype, backend="reference")
        buffer = torch.full((9, 120), 7.0, dtype=dtype)
        assert dequantize_rows(qw, 5, 12, buffer[1:8, 10:100]).data_ptr() == buffer[1:8, 10:100].data_ptr()
        expected = torch.full((9, 120), 7.0, dtype=dtype)
        expected[1:8, 10:100] = whole[5:12]
        assert same_bits(buffer, expected)


def test_dequantize_groupwise_names_what_is_wrong() -> None:
    qw, _ = random_weight((4, 32), "w4g16", act_order=True)
    with pytest.raises(InputError, match=r"torch\.float64"):
        dequantize_groupwise(qw, torch.float64)
    with pytest.raises(InputError, match="got Tensor"):
        dequantize_groupwise(qw.codes)  # type: ignore[arg-type]
    assert qw.group_index is not None
    qw.group_index[7] = 5
    with pytest.raises(InputError, match=r"0\.\.4"):
        dequantize_groupwise(qw)
    with pytest.raises(InputError, match=r"3\.\.5 of \(4, 32\)"):
        dequantize_rows(qw, 3, 5, torch.zeros(2, 32))
    with pytest.raises(InputError, match="adjacent columns"):
        dequantize_rows(qw, 0, 2, torch.zeros(2, 64)[:, ::2])


@pytest.mark.slow
def test_dequantize_groupwise_offsets_beyond_two_to_the_31() -> None:
    N, K = 33_000, 65_600  # 2.16e9 weights; only sampled rows are written
    scheme = Scheme.parse("w2")
    codes = torch.zeros(N, scheme.code_words(K), dtype=torch.int32)
    codes[-1] = 0x1B1B1B1B
    qw = QuantizedWeight(codes=codes, scales=torch.ones(N, 1), shape=(N, K), scheme=scheme)
    out = torch.empty(2, K)
    dequantize_rows(qw, N - 2, N, out)
    assert (out[0] == -2).all()
    assert torch.equal(out[1], torch.tensor([1.0, 0.0, -1.0, -2.0]).repeat(K // 4))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequantize_groupwise_past_the_caches_equals_reference(cpu_tier: str, dtype: torch.dtype) -> None:
    # Results of 4 MiB and more are streamed in whole lines: rows that begin at a line, and rows that do not.
    for K in (4096, 4104):
        qw, _ = random_weight((520, K), "w4g32z")
        found = dequantize_groupwise(qw, dtype, backend="cpu")
        assert torch.equal(found, dequantize_groupwise(qw, dtype, backend="reference"))
