"""quantize_groupwise: the grid in NumPy, the search against brute force, every backend bit for bit."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError, UnsupportedError
from qkern.ops import dequantize_groupwise, quantize_groupwise, unpack_bits
from qkern.ops.codebooks import codebook
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

OP = "quantize_groupwise"
SCHEMES = ["w2g16", "w3g32z", "w4g128", "w4g48z", "w8", "w8g64z", "w8t", "w4tz", "nf4g64", "fp4g64", "fp4t"]
SHAPES = [(1, 1), (3, 17), (5, 300), (4, 513), (2, 3, 40), (3, 0), (0, 64), (2, 0, 8)]
HEADER = Path(__file__).parents[2] / "csrc" / "include" / "qkern" / "codebooks.h"


def random_weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def codes_of(qw: QuantizedWeight) -> np.ndarray:
    rows = qw.codes.flatten(0, -2)
    codes = unpack_bits(rows, qw.scheme.bits, (rows.shape[0], qw.K), backend="reference")
    return codes.reshape(qw.shape).numpy()


def assert_same(a: QuantizedWeight, b: QuantizedWeight, context: object = None) -> None:
    assert torch.equal(a.codes, b.codes), context
    assert a.scales.dtype == b.scales.dtype
    assert a.scales.shape == b.scales.shape
    assert torch.equal(a.scales.float(), b.scales.float()), context
    assert (a.zeros is None) == (b.zeros is None)
    if a.zeros is not None and b.zeros is not None:
        assert torch.equal(a.zeros, b.zeros), context


@functools.cache
def reference_case(
    spelling: str, search: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, dict[str, object], QuantizedWeight]:
    """A weight, options and the reference's result, which the tiers share."""
    i = SHAPES.index(shape)
    weight = random_weight(shape).to(FLOAT_DTYPES[i % 3])
    options = {"search": search, "scale_dtype": FLOAT_DTYPES[(i + 1) % 3]}
    return weight, options, quantize_groupwise(weight, spelling, backend="reference", **options)


@functools.cache
def importance_cases(
    spelling: str,
) -> list[tuple[torch.Tensor, torch.Tensor, QuantizedWeight]]:
    """Weights, importances and the reference's results."""
    weight, experts = random_weight((6, 200)), random_weight((2, 6, 200))
    importance = random_weight((6, 200), 9).abs()
    importance[:, 100:] = 0
    pairs = [
        (weight, part) for part in (importance, importance[2], importance.T.contiguous().T, torch.zeros(200))
    ]
    pairs += [(experts, part) for part in (importance[0], importance, random_weight((2, 6, 200), 3).abs())]
    return [
        (w, i, quantize_groupwise(w, spelling, importance=i, search="mse", backend="reference"))
        for w, i in pairs
    ]


def grid_of(group: np.ndarray, scheme: Scheme, scale_dtype: np.dtype) -> tuple[np.float32, np.float32]:
    """Scale and zero point of one group by the formula, in fp32."""
    f32 = np.float32
    low, high = min(f32(0), group.min(initial=0)), max(f32(0), group.max(initial=0))
    if scheme.zero_point:
        scale = ((high - low) / f32(scheme.levels - 1)).astype(scale_dtype).astype(f32)
        scale = f32(1) if scale == 0 else scale
        return scale, np.clip(np.rint(-low / scale), 0, scheme.levels - 1)
    reach = f32(1) if scheme.codebook else f32(scheme.midpoint - 0.5)
    scale = (max(high, -low) / reach).astype(scale_dtype).astype(f32)
    return f32(1) if scale == 0 else scale, f32(scheme.midpoint)


def check_against_formula(weight: torch.Tensor, qw: QuantizedWeight, scale_dtype: np.dtype) -> None:
    """Compare every code, scale and zero point of ``[N, K]`` with the formula, group by group."""
    scheme, (N, K) = qw.scheme, qw.shape
    values, codes = weight.float().numpy(), codes_of(qw)
    width = K if scheme.group_size is None else scheme.group_size
    for n in range(N):
        for g in range(qw.scales.shape[1]):
            part = np.s_[n, g * width : (g + 1) * width]
            group = values if scheme.per_tensor else values[part]
            row = 0 if scheme.per_tensor else n
            scale, zero = grid_of(group, scheme, scale_dtype)
            assert qw.scales[row, g].float().item() == scale
            x = values[part] / scale
            if scheme.codebook:
                table = codebook(scheme.codebook).values.numpy()
                nearest = np.abs(x[:, None] - table).min(1)
                # fp32 distances: a value within rounding of a midpoint may go either way.
                assert np.all(np.abs(x - table[codes[part]]) <= nearest + 1e-6)
                continue
            if scheme.zero_point:
                assert qw.zeros is not None
                assert qw.zeros[row, g].item() == zero
            assert np.array_equal(
                codes[part], np.clip(np.rint(x) + zero, 0, scheme.levels - 1).astype(np.uint8)
            )


@pytest.mark.parametrize("spelling", SCHEMES)
def test_quantize_groupwise_follows_the_formula(backend: str, spelling: str) -> None:
    for shape in [(1, 1), (3, 17), (4, 200)]:
        for dtype in FLOAT_DTYPES:
            weight = random_weight(shape).to(dtype)
            qw = quantize_groupwise(weight, spelling, backend=backend)
            check_against_formula(weight, qw, np.dtype(np.float16))


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_quantize_groupwise_equals_reference(cpu_tier: str, spelling: str, search: str) -> None:
    for shape in SHAPES:
        weight, options, expected = reference_case(spelling, search, shape)
        assert_same(quantize_groupwise(weight, spelling, backend="cpu", **options), expected, shape)


@functools.cache
def streamed_case(spelling: str, K: int) -> tuple[torch.Tensor, QuantizedWeight]:
    # Codes of 4 MiB and more are streamed in whole lines.
    N = -(-(4 << 20) // (4 * Scheme.parse(spelling).code_words(K)))
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    return weight, quantize_groupwise(weight, spelling, backend="reference")


@pytest.mark.parametrize(
    ("spelling", "K"), [("w3g16", 2112), ("w4g32z", 2048), ("nf4g64", 2048), ("w8g128", 2080)]
)
def test_quantize_groupwise_streams_many_codes(cpu_tier: str, spelling: str, K: int) -> None:
    weight, expected = streamed_case(spelling, K)
    assert_same(quantize_groupwise(weight, spelling, backend="cpu"), expected, weight.shape)


@given(
    N=st.integers(0, 6),
    K=st.integers(0, 400),
    spelling=st.sampled_from(["w2", "w3g7z", "w4g33", "w4g128z", "w8g50", "w8z", "nf4g65", "w2t", "w3tz"]),
    search=st.sampled_from(["minmax", "mse"]),
    power=st.integers(-30, 30),
    seed=st.integers(0, 99),
)
def test_quantize_groupwise_equals_reference_for_any_values(
    cpu_tier: str, N: int, K: int, spelling: str, search: str, power: int, seed: int
) -> None:
    weight = random_weight((N, K), seed) * 10.0**power
    weight[:, ::5] *= 100.0
    options = {"search": search, "scale_dtype": torch.float32}
    expected = quantize_groupwise(weight, spelling, backend="reference", **options)
    assert_same(quantize_groupwise(weight, spelling, backend="cpu", **options), expected)


@given(values=st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_quantize_groupwise_is_within_half_a_step(cpu_tier: str, values: list[float]) -> None:
    weight = torch.tensor([values])
    for spelling in ("w4", "w8z"):
        qw = quantize_groupwise(weight, spelling, scale_dtype=torch.float32, backend="cpu")
        error = (dequantize_groupwise(qw) - weight).abs().max().item()
        assert error <= 0.5001 * qw.scales.item() if weight.abs().max() > 0 else error == 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("spelling", ["w2g32", "w2g64z", "w3g32z", "w4g64"])
def test_quantize_groupwise_decides_ties_as_the_reference(
    cpu_tier: str, spelling: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-6, 7, (64, 512), generator=generator) / 4  # halves of a step are among them
    unit = torch.tensor([0.75, 1.0, 1e-5, 3.0, 1e-8])[torch.randint(0, 5, (64, 1), generator=generator)]
    weight = (steps * unit * torch.rand(64, 1, generator=generator).round(decimals=1)).to(dtype)
    weight[3], weight[4, ::2] = 0.0, -0.0
    for scale_dtype in FLOAT_DTYPES:
        for search in ("minmax", "mse"):
            options = {"search": search, "scale_dtype": scale_dtype}
            expected = quantize_groupwise(weight, spelling, backend="reference", **options)
            assert_same(quantize_groupwise(weight, spelling, **options), expected, options)


@pytest.mark.parametrize("spelling", ["w4g128", "w4g128z", "w3tz", "w8t", "nf4g64"])
def test_quantize_groupwise_reads_strided_weights(backend: str, spelling: str) -> None:
    whole = random_weight((40, 300))
    for weight in (whole[::3, :130], whole[:, 7:200], whole.T, whole[:, ::2], whole[:1].expand(4, 300)):
        expected = quantize_groupwise(weight.contiguous(), spelling, backend="reference")
        assert_same(quantize_groupwise(weight, spelling, backend=backend), expected)
    experts = random_weight((4, 6, 80)).transpose(0, 1)
    expected = quantize_groupwise(experts.contiguous(), spelling, backend="reference")
    assert_same(quantize_groupwise(experts, spelling, backend=backend), expected)


def test_quantize_groupwise_of_experts_is_that_of_each(backend: str) -> None:
    weight = random_weight((3, 5, 70))
    for spelling in ("w4g32z", "w4tz", "nf4t"):
        whole = quantize_groupwise(weight, spelling, backend=backend)
        for e in range(3):
            one = quantize_groupwise(weight[e], spelling, backend=backend)
            assert torch.equal(whole.codes[e], one.codes)
            assert torch.equal(whole.scales[e], one.scales)


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_quantize_groupwise_of_a_zero_group(backend: str, search: str) -> None:
    weight = random_weight((3, 64))
    weight[1, :32] = 0
    weight[2] = -0.0
    for spelling, zero in (("w4g32", 8), ("w4g32z", 0), ("w2g32", 2)):
        qw = quantize_groupwise(weight, spelling, search=search, backend=backend)
        assert qw.scales[1, 0] == 1
        assert (qw.scales[2] == 1).all()
        assert (codes_of(qw)[1, :32] == zero).all()
        assert (dequantize_groupwise(qw, backend=backend)[2] == 0).all()


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_quantize_groupwise_of_scales_that_underflow(backend: str, search: str) -> None:
    weight = random_weight((2, 64)) * 1e-12  # far below the smallest fp16
    qw = quantize_groupwise(weight, "w4g32", search=search, backend=backend)
    assert (qw.scales == 1).all()
    assert (codes_of(qw) == 8).all()


def test_quantize_groupwise_of_denormal_weights(backend: str) -> None:
    weight = random_weight((2, 64)) * 1e-40
    for search in ("minmax", "mse"):
        options = {"search": search, "scale_dtype": torch.float32}
        qw = quantize_groupwise(weight, "w4g32", backend=backend, **options)
        assert_same(qw, quantize_groupwise(weight, "w4g32", backend="reference", **options))
        assert (qw.scales.abs() < 1e-38).all()


def test_quantize_groupwise_of_one_huge_outlier(backend: str) -> None:
    weight = random_weight((2, 128))
    weight[0, 40] = 3e4
    for spelling in ("w4g64", "w4g64z"):
        qw = quantize_groupwise(weight, spelling, backend=backend)
        check_against_formula(weight, qw, np.dtype(np.float16))
        best = quantize_groupwise(weight, spelling, search="mse", backend=backend)
        assert abs(dequantize_groupwise(best)[0, 40].item() - 3e4) < 3e3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_quantize_groupwise_refuses_non_finite_weights(backend: str, bad: float, search: str) -> None:
    for dtype in FLOAT_DTYPES:
        for position in ((0, 0), (29, 99), (17, 64)):
            weight = random_weight((30, 100)).to(dtype)
            weight[position] = bad
            for spelling in ("w4g64", "w4z", "w4t", "nf4g64"):
                with pytest.raises(InputError, match="NaN or Inf"):
                    quantize_groupwise(weight, spelling, search=search, backend=backend)


def test_quantize_groupwise_refuses_scales_that_overflow(backend: str) -> None:
    weight = random_weight((4, 64))
    weight[3, 5] = 1e6
    for spelling in ("w4g32", "w4g32z", "nf4t"):
        with pytest.raises(InputError, match=r"scale_dtype=torch\.float32"):
            quantize_groupwise(weight, spelling, backend=backend)
        qw = quantize_groupwise(weight, spelling, scale_dtype=torch.float32, backend=backend)
        assert torch.isfinite(qw.scales).all()
    with pytest.raises(InputError, match=r"overflows torch\.float32"):
        quantize_groupwise(torch.tensor([[3e38, -3e38]]), "w4z", scale_dtype=torch.float32, backend=backend)


def squared_error(
    weight: torch.Tensor, qw: QuantizedWeight, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted squared error of each group, in float64."""
    difference = (dequantize_groupwise(qw, backend="reference").double() - weight.double()) ** 2
    if importance is not None:
        difference = difference * importance.double()
    width = qw.scheme.group_length(qw.K)
    return torch.nn.functional.pad(difference, (0, -qw.K % width)).unflatten(1, (-1, width)).sum(-1)


def best_error(group: np.ndarray, importance: np.ndarray, scheme: Scheme) -> float:
    """Smallest error over a fine grid of fp16 scales of both signs, and over every zero point."""
    span = (max(group.max(), 0) - min(group.min(), 0)) if scheme.zero_point else 2 * np.abs(group).max()
    factors = np.concatenate([np.linspace(0.15, 1.6, 160), np.linspace(0.97, 1.02, 60)])
    scales = (span / (scheme.levels - 1) * factors).astype(np.float16).astype(np.float64)
    if not scheme.zero_point:
        scales = np.concatenate([scales, -scales])
    zeros = range(scheme.levels) if scheme.zero_point else (scheme.midpoint,)
    x = np.rint(group / scales[:, None])
    return min(
        float(
            (importance * ((np.clip(x + z, 0, scheme.levels - 1) - z) * scales[:, None] - group) ** 2)
            .sum(1)
            .min()
        )
        for z in zeros
    )


@pytest.mark.parametrize("spelling", ["w2g64", "w3g64", "w4g64", "w8g64", "w2g64z", "w3g64z", "w4g64z"])
@pytest.mark.parametrize("weighted", [False, True])
def test_quantize_groupwise_mse_is_near_the_optimum(spelling: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    gaussian = torch.randn(10, 64, generator=generator)
    heavy = torch.randn(10, 64, generator=generator) / torch.rand(10, 64, generator=generator).sqrt()
    shifted = torch.randn(10, 64, generator=generator) + 1.5
    weight = torch.cat([gaussian, heavy, shifted])
    importance = torch.rand(weight.shape, generator=generator) ** 3 if weighted else None
    qw = quantize_groupwise(weight, spelling, search="mse", importance=importance)
    found = squared_error(weight, qw, importance)[:, 0].numpy()
    weights = np.ones(weight.shape) if importance is None else importance.double().numpy()
    best = np.array(
        [best_error(*pair, qw.scheme) for pair in zip(weight.double().numpy(), weights, strict=True)]
    )
    # Measured: 1.00 to 1.01 on average for up to 4 bits, 1.03 at 8 bits, where min-max is at 1.1.
    assert found.sum() <= (1.05 if qw.scheme.bits == 8 else 1.015) * best.sum()


@pytest.mark.parametrize("spelling", SCHEMES)
def test_quantize_groupwise_mse_is_never_worse_than_minmax(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    for seed in range(3):
        weight = random_weight((20, 256), seed) * random_weight((20, 256), seed + 50).abs()
        importance = random_weight((20, 256), seed + 100).abs()
        for weights in (None, importance, importance[0]):
            found = squared_error(
                weight, quantize_groupwise(weight, spelling, search="mse", importance=weights), weights
            )
            plain = squared_error(weight, quantize_groupwise(weight, spelling), weights)
            if scheme.per_tensor:
                found, plain = found.sum(), plain.sum()
            # The sums that are compared are fp32.
            assert (found <= plain * (1 + 1e-5)).all()
            assert found.sum() < plain.sum()


@pytest.mark.parametrize("spelling", ["w4g64", "w3g48z", "w8", "w2t", "nf4g64"])
def test_quantize_groupwise_weighs_by_importance(cpu_tier: str, spelling: str) -> None:
    for weight, importance, expected in importance_cases(spelling):
        got = quantize_groupwise(weight, spelling, importance=importance, search="mse", backend="cpu")
        assert_same(got, expected)


def test_quantize_groupwise_of_ones_as_importance_changes_nothing(backend: str) -> None:
    weight = random_weight((6, 200))
    plain = quantize_groupwise(weight, "w4g64z", search="mse", backend=backend)
    ones = quantize_groupwise(weight, "w4g64z", search="mse", importance=torch.ones(200), backend=backend)
    assert_same(ones, plain)


def test_quantize_groupwise_decides_codebook_ties_like_bitsandbytes(backend: str) -> None:
    # The first weight makes the scale 1. A midpoint goes down in NF4, to the smaller magnitude in FP4.
    for name, chosen in (("nf4", lambda low, high: low), ("fp4", lambda low, high: min(low, high, key=abs))):
        book = codebook(name)
        ordered = book.ordered.double()
        middle = ((ordered[1:] + ordered[:-1]) / 2).float()
        weight = torch.cat([torch.ones(1), middle])[None]
        qw = quantize_groupwise(weight, name, scale_dtype=torch.float32, backend=backend)
        values = book.values[torch.from_numpy(codes_of(qw)[0, 1:]).long()].tolist()
        exact = [
            m.item() == (a + b).item() / 2 for m, a, b in zip(middle, ordered[:-1], ordered[1:], strict=True)
        ]
        pairs = list(zip(ordered[:-1].tolist(), ordered[1:].tolist(), strict=True))
        assert sum(exact) >= 2
        assert [v for v, e in zip(values, exact, strict=True) if e] == [
            chosen(*pair) for pair, e in zip(pairs, exact, strict=True) if e
        ]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_are_the_same_numbers_in_the_header(name: str) -> None:
    text = HEADER.read_text(encoding="utf-8")
    body = re.search(rf"k{name.title()} = with_cells\(\{{(.*?)\n\}}\);", text, re.DOTALL)
    assert body is not None
    lists = [
        [
            np.inf if word == "HUGE_VALF" else float(word.removesuffix("f"))
            for word in re.split(r",\s*", part.strip())
        ]
        for part in re.findall(r"\{([^{}]+)\}", body[1])
    ]
    book = codebook(name)
    values, ordered, thresholds, codes = (np.array(part, dtype=np.float32) for part in lists)
    count = len(book.ordered)
    assert np.array_equal(values, book.values.numpy())
    assert np.array_equal(ordered[:count], book.ordered.numpy())
    assert np.array_equal(thresholds[: count - 1], book.thresholds.numpy())
    assert np.isinf(thresholds[count - 1 :]).all()
    assert np.array_equal(codes[:count], book.codes.numpy())
    assert np.array_equal(book.values[book.codes.long()].numpy(), book.ordered.numpy())


@pytest.mark.parametrize("spelling", ["nf4g64d", "w4g32d", "w4g16zd", "w8td"])
def test_quantize_groupwise_of_double_quantized_scales(backend: str, spelling: str) -> None:
    plain = spelling.removesuffix("d")
    for shape in ((20, 300), (2, 5, 70), (0, 64), (3, 0)):
        weight = random_weight(shape)
        qw = quantize_groupwise(weight, spelling, backend=backend)
        exact = quantize_groupwise(weight, plain, scale_dtype=torch.float32, backend="reference")
        assert qw.nested is not None
        assert qw.scales.dtype == torch.float32
        assert_same(qw, quantize_groupwise(weight, spelling, backend="reference"))
        # The stored form decodes to the scales, element by element.
        for i, code in enumerate(qw.nested.codes.tolist()):
            value = np.float32(qw.nested.table[code]) * np.float32(qw.nested.absmax[i // qw.nested.block])
            assert qw.scales.reshape(-1)[i].item() == value + np.float32(qw.nested.offset)
        # Entries of the table are at most 0.0141 apart, relative to the largest distance from the mean.
        spread = (exact.scales - exact.scales.mean()).abs().max() if exact.scales.numel() else 0
        assert ((qw.scales - exact.scales).abs() <= 0.0072 * spread + 1e-6).all()
        if not qw.scheme.codebook:
            # Codes are chosen against the decoded scales.
            error = (dequantize_groupwise(qw) - weight).abs()
            ends = (torch.from_numpy(codes_of(qw)) == 0) | (
                torch.from_numpy(codes_of(qw)) == qw.scheme.levels - 1
            )
            width = max(qw.scheme.group_length(qw.K), 1)
            steps = qw.scales.expand(*qw.shape[:-1], qw.scales.shape[-1]).repeat_interleave(width, -1)
            assert (error <= 0.5001 * steps[..., : qw.K])[~ends].all()


def test_quantize_groupwise_of_equal_scales_nests_exactly(backend: str) -> None:
    qw = quantize_groupwise(torch.ones(3, 64), "nf4g16d", backend=backend)
    assert torch.equal(dequantize_groupwise(qw, backend=backend), torch.ones(3, 64))


@pytest.mark.parametrize("spelling", SCHEMES)
def test_quantize_groupwise_on_a_grid_that_is_given(backend: str, spelling: str) -> None:
    for shape in [(5, 300), (2, 3, 40), (3, 0), (0, 64)]:
        for dtype in FLOAT_DTYPES:
            found = quantize_groupwise(random_weight(shape), spelling, search="mse", scale_dtype=dtype)
            weight = random_weight(shape, 1).to(dtype)  # beyond the ends of a grid that is another's
            grid = {"scales": found.scales, "zeros": found.zeros}
            qw = quantize_groupwise(weight, spelling, backend=backend, **grid)
            assert_same(qw, quantize_groupwise(weight, spelling, backend="reference", **grid), shape)
            assert torch.equal(qw.scales, found.scales)
            # What lies on the grid keeps its codes.
            again = quantize_groupwise(dequantize_groupwise(found), spelling, backend=backend, **grid)
            assert torch.equal(dequantize_groupwise(again), dequantize_groupwise(found))


def test_quantize_groupwise_on_a_given_grid_is_the_formula(backend: str) -> None:
    weight, scales = random_weight((4, 96)), torch.tensor([0.5, -0.25, 0.125]).repeat(4, 1).half()
    zeros = torch.arange(12, dtype=torch.uint8).reshape(4, 3)
    qw = quantize_groupwise(weight, "w4g32z", scales=scales, zeros=zeros, backend=backend)
    steps, shifts = (part.double().repeat_interleave(32, 1) for part in (scales, zeros))
    assert np.array_equal(codes_of(qw), ((weight.double() / steps).round() + shifts).clamp(0, 15).numpy())
    # Strides of the grid, and a scale that is 0.
    strided = scales.T.contiguous().T
    assert_same(quantize_groupwise(weight, "w4g32z", scales=strided, zeros=zeros, backend=backend), qw)
    zero = torch.zeros_like(scales)
    assert (
        dequantize_groupwise(quantize_groupwise(weight, "w4g32", scales=zero, backend=backend)) == 0
    ).all()


def test_quantize_groupwise_refuses_a_grid_that_does_not_fit() -> None:
    weight, scales = random_weight((4, 64)), torch.ones(4, 2)
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    for options, match in (
        ({"scales": scales[:, :1]}, r"\(4, 2\): got torch\.float32 \(4, 1\)"),
        ({"scales": scales.double()}, r"torch\.float64"),
        ({"zeros": zeros}, "got None"),
        ({"scales": scales, "zeros": zeros}, "w4g32 excludes zeros"),
        ({"scales": scales, "search": "mse"}, "search='mse'"),
        ({"scales": scales, "scale_dtype": torch.float16}, "not cast: got scale_dtype=torch.float16 for"),
        ({"scales": scales * torch.nan}, "NaN or Inf"),
    ):
        with pytest.raises(InputError, match=match):
            quantize_groupwise(weight, "w4g32", **options)
    with pytest.raises(InputError, match="w4g32z needs zeros"):
        quantize_groupwise(weight, "w4g32z", scales=scales)
    with pytest.raises(InputError, match=r"zeros must be uint8 \(4, 2\)"):
        quantize_groupwise(weight, "w4g32z", scales=scales, zeros=zeros.int())
    with pytest.raises(InputError, match="NaN or Inf"):
        quantize_groupwise(weight / 0, "w4g32", scales=scales)
    with pytest.raises(UnsupportedError, match="w4g32d"):
        quantize_groupwise(weight, "w4g32d", scales=scales)


def test_quantize_groupwise_names_what_is_wrong() -> None:
    weight = random_weight((4, 32))
    ones = torch.ones(32)
    with pytest.raises(InputError, match=r"torch\.int64"):
        quantize_groupwise(weight.long(), "w4")
    with pytest.raises(InputError, match=r"\(32,\)"):
        quantize_groupwise(ones, "w4")
    with pytest.raises(InputError, match="group_size must be at least 1"):
        quantize_groupwise(weight, "w4g0")
    with pytest.raises(InputError, match=r"torch\.int8"):
        quantize_groupwise(weight, "w4", scale_dtype=torch.int8)
    with pytest.raises(InputError, match="'best'"):
        quantize_groupwise(weight, "w4", search="best")
    with pytest.raises(InputError, match="search='mse'"):
        quantize_groupwise(weight, "w4", importance=ones)
    with pytest.raises(InputError, match=r"\(32,\) or \(4, 32\)"):
        quantize_groupwise(weight, "w4", search="mse", importance=ones[:4])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite and not negative"):
            quantize_groupwise(weight, "w4", search="mse", importance=torch.full((32,), bad))
    with pytest.raises(UnsupportedError, match="cuda"):
        quantize_groupwise(weight, "w4", backend="cuda")


@pytest.mark.slow
def test_quantize_groupwise_offsets_beyond_two_to_the_31() -> None:
    N, K = 33_000, 65_600  # 2.16e9 weights: the last row lies beyond 2**31 elements
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    weight[-1] = torch.randn(K)
    whole = quantize_groupwise(weight, "w2g128", backend="cpu")
    last = quantize_groupwise(weight[-1:], "w2g128", backend="reference")
    assert torch.equal(whole.codes[-1:], last.codes)
    assert torch.equal(whole.scales[-1:], last.scales)
    assert (whole.scales[:-1] == 1).all()


def test_a_zero_group_where_denormals_count_as_zero():
    w = torch.zeros(16, 256)
    w[:, 128:] = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    before = quantize_groupwise(w, "w4g128", backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        after = quantize_groupwise(w, "w4g128", backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(before.scales, after.scales)
    assert torch.equal(before.codes, after.codes)
    assert (after.scales[:, 0] == 1).all()
