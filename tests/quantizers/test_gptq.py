from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops import _native, dequantize_groupwise, unpack_bits
from qkern.quantizers import GPTQConfig, HessianAccumulator, output_error, quantize_gptq, quantize_rtn
from qkern.schemes import QuantizedWeight, Scheme

N, K = 40, 112


def problem(rows: int = N, features: int = K, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of inputs whose features are correlated and differ in power."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * torch.arange(1, features + 1) ** -0.5
    power = torch.rand(features, generator=generator) + 0.1
    accumulator = HessianAccumulator(features)
    accumulator.add(torch.randn(tokens, features, generator=generator) @ mix.T * power)
    return torch.randn(rows, features, generator=generator) * 0.1, accumulator.value


def codes_of(quantized: QuantizedWeight) -> Tensor:
    return unpack_bits(quantized.codes, quantized.scheme.bits, shape=quantized.shape)


def textbook(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damp: float,
    order: list[int],
    groups: list[int],
    static: bool,
) -> tuple[Tensor, Tensor]:
    """GPTQ as published, in float64, one column at a time: (dequantized weight, codes).

    `order` is the processing order, `groups` the group of each original column.
    """
    w, h = weight.double()[:, order], hessian.double()[order][:, order]
    group = [groups[column] for column in order]
    h = h + damp * h.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    top, mid = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)

    def grid(part: Tensor) -> tuple[Tensor, Tensor]:
        if scheme.zero_point:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low).float() / top).half().double()
            return scale, (-low / scale).round().clamp(0, top)
        scale = (part.abs().amax(1).float() / (mid - 0.5)).half().double()
        return scale, torch.full_like(scale, mid)

    def members(number: int) -> list[int]:
        return [place for place, other in enumerate(group) if other == number]

    grids = {number: grid(w[:, members(number)]) for number in set(group)} if static else {}
    result, codes = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.uint8)
    for j in range(w.shape[1]):
        if group[j] not in grids:
            grids[group[j]] = grid(w[:, members(group[j])])
        scale, zero = grids[group[j]]
        q = ((w[:, j] / scale).round() + zero).clamp(0, top)
        result[:, j], codes[:, j] = (q - zero) * scale, q.to(torch.uint8)
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w[:, j:] -= torch.outer(error, inverse[j, j:])
    back = torch.tensor(order).argsort()
    return result[:, back], codes[:, back]


def energy(matrix: Tensor, hessian: Tensor) -> float:
    return float(((matrix.double() @ hessian.double()) * matrix.double()).sum())


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32", "w8g32", "w4g32z", "w2g48z", "w4"])
@pytest.mark.parametrize("act_order", ["none", "group-aware", "desc_act"])
@pytest.mark.parametrize("static", [False, True])
def test_equals_the_textbook(spelling: str, act_order: Any, static: bool) -> None:
    weight, hessian = problem()
    scheme = Scheme.parse(spelling)
    length = scheme.group_length(K)
    groups = [column // length for column in range(K)]
    by_importance = sorted(range(K), key=lambda column: -float(hessian[column, column]))
    if act_order == "none":
        order = list(range(K))
    elif act_order == "desc_act":
        order = by_importance
        if not static:
            groups = [by_importance.index(column) // length for column in range(K)]
    else:
        mean = {g: hessian.diagonal()[g * length : (g + 1) * length].mean() for g in set(groups)}
        order = sorted(by_importance, key=lambda column: -float(mean[groups[column]]))
    result = quantize_gptq(
        weight,
        hessian,
        scheme,
        GPTQConfig(act_order=act_order, static_groups=static, search="minmax", block_size=40),
    )
    expected, codes = textbook(weight, hessian, scheme, damp=0.05, order=order, groups=groups, static=static)
    if groups == sorted(groups):
        assert result.weight.group_index is None
    else:
        assert result.weight.group_index is not None
        assert result.weight.group_index.tolist() == groups
    # fp32 may round a weight halfway between two codes the other way, and that row differs from there on.
    rows_equal = (codes_of(result.weight) == codes).all(1)
    assert rows_equal.float().mean() >= 0.9
    same = dequantize_groupwise(result.weight)[rows_equal].double()
    torch.testing.assert_close(same, expected[rows_equal], rtol=2e-3, atol=1e-6)
    least = energy(weight - expected, hessian)
    assert energy(weight - dequantize_groupwise(result.weight), hessian) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("spelling", ["w3g32", "w2g48z", "w3"])
@pytest.mark.parametrize("act_order", ["none", "group-aware"])
def test_the_mse_search_weighs_what_later_columns_cannot_make_up_for(spelling: str, act_order: Any) -> None:
    weight, hessian = problem()
    config = GPTQConfig(search="mse", act_order=act_order, static_groups=True)
    made = quantize_gptq(weight, hessian, spelling, config).weight
    importance = hessian.diagonal()
    order = torch.arange(K)
    if act_order == "group-aware":
        length = Scheme.parse(spelling).group_length(K)
        mean = torch.stack([part.mean() for part in importance.split(length)])
        order = importance.argsort(descending=True)
        order = order[mean.argsort(descending=True).argsort()[order // length].argsort(stable=True)]
    damped = hessian.double() + 0.05 * importance.mean() * torch.eye(K)
    inverse = torch.linalg.inv(damped[order][:, order])
    cost = torch.empty(K)
    # GPTQ loses the square of a column's error divided by this diagonal.
    cost[order] = (1 / torch.linalg.cholesky(inverse, upper=True).diagonal() ** 2).float()
    wanted = quantize_rtn(weight, spelling, search="mse", importance=cost)
    assert (made.scales == wanted.scales).float().mean() > 0.95
    blind = quantize_rtn(weight, spelling, search="mse")
    assert (made.scales == blind.scales).float().mean() < 0.7


@pytest.mark.parametrize(
    "spelling", ["w2g16", "w3g32", "w4g64", "w8", "w2g32z", "w4g100z", "w4t", "nf4g32", "fp4g64"]
)
@pytest.mark.parametrize("options", [
    {"act_order": "none"},
    {"act_order": "desc_act"},
    {"act_order": "desc_act", "static_groups": True},
    {"search": "minmax"},
    {"search": "minmax", "static_groups": True},
    {"search": "mse"},
    {"search": "mse", "static_groups": True, "act_order": "none"},
    {"search": "loss"},
])  # fmt: skip
def test_beats_rounding_to_nearest(spelling: str, options: dict[str, Any]) -> None:
    for seed in range(2):
        weight, hessian = problem(seed=seed)
        result = quantize_gptq(weight, hessian, spelling, GPTQConfig(**options))
        search = "minmax" if options.get("search") == "minmax" else "mse"
        rounded = quantize_rtn(weight, spelling, search=search)
        assert result.error < output_error(weight, rounded, hessian)
        assert result.error == pytest.approx(output_error(weight, result.weight, hessian), rel=5e-3)
        assert result.notes == ()


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32", "w4g32z"])
def test_each_search_loses_less_than_the_one_before(spelling: str) -> None:
    errors = []
    for search in ("minmax", "mse", "loss"):
        options: dict[str, Any] = {"search": search}
        errors.append(
            sum(quantize_gptq(*problem(seed=s), spelling, GPTQConfig(**options)).error for s in range(3))
        )
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("spelling", ["w2g32", "w4g32z", "w3", "w4t", "nf4g32"])
@pytest.mark.parametrize("static", [False, True])
def test_sweeps_only_lower_the_loss(spelling: str, static: bool) -> None:
    weight, hessian = problem()
    errors = []
    for sweeps in (0, 1, 3):
        # Without damping the reported error is the very loss that the sweeps lower.
        config = GPTQConfig(search="loss", sweeps=sweeps, static_groups=static, block_size=48, damp=0)
        result = quantize_gptq(weight, hessian, spelling, config)
        assert result.error == pytest.approx(output_error(weight, result.weight, hessian), rel=5e-3)
        errors.append(result.error)
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-4)


@pytest.mark.parametrize("spelling", ["w3g32", "w4", "w4g64z"])
def test_block_size_changes_nothing_but_rounding_noise(spelling: str) -> None:
    weight, hessian = problem()
    results = [
        quantize_gptq(weight, hessian, spelling, GPTQConfig(block_size=size, search="minmax"))
        for size in (1, 24, 128)
    ]
    for other in results[1:]:
        assert (codes_of(other.weight) == codes_of(results[0].weight)).float().mean() > 0.98
        assert other.error == pytest.approx(results[0].error, rel=0.02)


def test_dead_columns_keep_their_own_value_and_disturb_no_other() -> None:
    weight, hessian = problem()
    dead = [3, 40, 111]
    hessian[dead] = 0
    hessian[:, dead] = 0
    config = GPTQConfig(static_groups=True, search="minmax")
    result = quantize_gptq(weight, hessian, "w4g32", config)
    assert result.notes == ("3 of 112 input columns saw no activation",)
    # Static scales are those of rounding to nearest, so the dead columns' codes are too.
    nearest = quantize_rtn(weight, "w4g32")
    assert torch.equal(codes_of(result.weight)[:, dead], codes_of(nearest)[:, dead])
    changed = weight.clone()
    changed[:, dead] = 0
    alive = [column for column in range(K) if column not in dead]
    # Unchanged where no scale hangs on a dead column.
    again = quantize_gptq(changed, hessian, "w4g32", config)
    same_scales = (again.weight.scales == result.weight.scales).all(1)
    assert same_scales.sum() > N // 2
    assert torch.equal(
        codes_of(again.weight)[same_scales][:, alive], codes_of(result.weight)[same_scales][:, alive]
    )
    assert result.error == pytest.approx(output_error(weight, result.weight, hessian), rel=5e-3)


def test_no_activation_at_all_is_rounding_to_nearest() -> None:
    weight, hessian = problem()
    result = quantize_gptq(weight, torch.zeros_like(hessian), "w4g32", GPTQConfig(search="minmax"))
    assert torch.equal(result.weight.codes, quantize_rtn(weight, "w4g32").codes)
    assert result.error == 0.0
    assert result.notes == ("112 of 112 input columns saw no activation",)


@pytest.mark.parametrize("search", ["minmax", "mse", "loss"])
def test_a_poisoned_hessian_falls_to_rtn_for_this_layer(
    search: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weight, hessian = problem()
    hessian[5, 6] = torch.nan
    with caplog.at_level(logging.WARNING):
        result = quantize_gptq(weight, hessian, "w4g32", GPTQConfig(search=search))
    nearest = quantize_rtn(weight, "w4g32", search="minmax" if search == "minmax" else "mse")
    assert torch.equal(result.weight.codes, nearest.codes)
    assert torch.equal(result.weight.scales, nearest.scales)
    assert result.notes == ("rounded to nearest: the Hessian has NaN or Inf",)
    assert 0 < result.error < 0.02
    assert "rounded to nearest" in caplog.text


def test_an_indefinite_hessian_is_damped_until_it_is_not(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = problem()
    shift = 0.15 * hessian.diagonal().mean()
    hessian.diagonal().sub_(torch.linalg.eigvalsh(hessian)[0] + shift)
    with caplog.at_level(logging.WARNING):
        result = quantize_gptq(weight, hessian, "w4g32")
    assert result.notes == ("damping raised from 0.05 to 0.2",)
    assert "not positive definite" in caplog.text


def test_a_hopeless_hessian_falls_to_rtn() -> None:
    weight, _ = problem()
    hessian = torch.full((K, K), 5.0)
    hessian.diagonal().fill_(1.0)
    result = quantize_gptq(weight, hessian, "w4g32", GPTQConfig(search="minmax"))
    assert result.notes == (
        "rounded to nearest: the Hessian is not positive definite even with full damping",
    )
    assert torch.equal(result.weight.codes, quantize_rtn(weight, "w4g32").codes)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 50), (7, 33), (0, 16)])
@pytest.mark.parametrize("spelling", ["w4g32", "w2", "w4g16z"])
def test_odd_shapes(shape: tuple[int, int], spelling: str) -> None:
    weight, hessian = problem(*shape)
    result = quantize_gptq(weight, hessian, spelling)
    assert result.weight.shape == shape
    assert bool(torch.isfinite(dequantize_groupwise(result.weight)).all())
    assert 0 <= result.error < 1


@pytest.mark.parametrize("search", ["minmax", "mse", "loss"])
def test_the_scale_of_the_hessian_does_not_matter(search: Any) -> None:
    weight, hessian = problem()
    config = GPTQConfig(search=search)
    expected = quantize_gptq(weight, hessian, "w3g32", config)
    for factor in (2.0**-60, 2.0**60):
        result = quantize_gptq(weight, hessian * factor, "w3g32", config)
        assert torch.equal(result.weight.codes, expected.weight.codes)
        assert result.error == pytest.approx(expected.error, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_other_strides(dtype: torch.dtype) -> None:
    weight, hessian = problem()
    half = weight.to(dtype)
    strided = half.T.contiguous().T
    result, expected = quantize_gptq(strided, hessian, "w4g32"), quantize_gptq(half.float(), hessian, "w4g32")
    assert torch.equal(result.weight.codes, expected.weight.codes)


def test_arguments_are_left_alone_and_runs_repeat() -> None:
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    one, two = (quantize_gptq(weight, hessian, "w3g32z") for _ in range(2))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.equal(one.weight.codes, two.weight.codes)
    assert one.error == two.error


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_have_the_dtype_asked_for(scale_dtype: torch.dtype) -> None:
    weight, hessian = problem()
    result = quantize_gptq(weight, hessian, "w4g32", GPTQConfig(scale_dtype=scale_dtype))
    assert result.weight.scales.dtype == scale_dtype
    # The error was measured with the stored scales.
    assert result.error == pytest.approx(output_error(weight, result.weight, hessian), rel=5e-3)


def test_wrong_arguments_are_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(InputError, match=r"hessian of a weight with K=112 must be floating \[112, 112\]"):
        quantize_gptq(weight, hessian[:5, :5], "w4")
    with pytest.raises(InputError, match="matrix"):
        quantize_gptq(weight[0], hessian, "w4")
    with pytest.raises(InputError, match="NaN or Inf"):
        quantize_gptq(weight.index_fill(0, torch.tensor(2), torch.inf), hessian, "w4")
    with pytest.raises(UnsupportedError, match="nf4g32d"):
        quantize_gptq(weight, hessian, "nf4g32d")


@pytest.mark.parametrize("options", [
    {"damp": -0.1}, {"damp": 1.5}, {"block_size": 0}, {"block_size": 5000}, {"candidates": 0}, {"sweeps": -1},
    {"act_order": "random"}, {"search": "grid"}, {"scale_dtype": torch.int8},
])  # fmt: skip
def test_configurations_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        GPTQConfig(**options)


@pytest.mark.skipif(_native.core().active_tier() == "scalar", reason="products are torch's there")
@pytest.mark.parametrize("search", ["minmax", "mse", "loss"])
def test_any_number_of_threads_gives_the_same_weight(search: Any) -> None:
    weight, hessian = problem(200, 640)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize_gptq(weight, hessian, "w4g128", GPTQConfig(search=search)).weight)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scales, results[0].scales)
