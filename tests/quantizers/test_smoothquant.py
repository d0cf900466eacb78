from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import dequant_matmul, quantize_groupwise
from qkern.quantizers import (
    ActivationRange,
    ActivationSample,
    grouped_query_share,
    search_smoothing,
    smoothing_scales,
)

if TYPE_CHECKING:
    from torch import Tensor

T, K = 300, 96
LOUD = [5, 50, 77]


def inputs(seed: int = 0, tokens: int = T) -> Tensor:
    """Some channels 30 times as loud as the others."""
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= 30
    return x


def weight(rows: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def measured(w: Tensor, x: Tensor, scales: Tensor, scheme: str, static: Tensor | None = None) -> float:
    """Squared error of the output as it will be computed, relative to the output."""
    quantized = quantize_groupwise(w * scales, scheme)
    if static is not None:
        quantized = replace(quantized, input_scale=static)
    y = x.double() @ w.double().T
    return float(
        (dequant_matmul(x / scales, quantized, compute="int8") - y).square().sum() / y.square().sum()
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_the_formula_over_its_median(alpha: float) -> None:
    x, w = inputs().abs().amax(0), weight().abs().amax(0)
    expected = x.double() ** alpha / w.double() ** (1 - alpha)
    expected /= expected.median()
    torch.testing.assert_close(smoothing_scales(x, w, alpha).double(), expected, rtol=1e-5, atol=0)


def test_unused_channels_get_a_scale_that_nothing_breaks_by() -> None:
    x, w = inputs().abs().amax(0), weight().abs().amax(0)
    plain = {alpha: smoothing_scales(x, w, alpha) for alpha in (0.0, 0.5, 1.0)}
    x[3] = w[7] = 0.0
    for alpha, before in plain.items():
        scales = smoothing_scales(x, w, alpha)
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
        # As though they had the floor of 1e-4 of the largest.
        least_x, least_w = x.clone(), w.clone()
        least_x[3], least_w[7] = 1e-4 * x.max(), 1e-4 * w.max()
        torch.testing.assert_close(scales, smoothing_scales(least_x, least_w, alpha))
        kept = [channel for channel in range(K) if channel not in (3, 7)]
        ratio = scales[kept] / before[kept]  # the median moves all others alike
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert torch.equal(smoothing_scales(torch.zeros(4), torch.zeros(4), 0.5), torch.ones(4))


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32a8", "w2g32za8", "w8za8"])
@pytest.mark.parametrize("observer", [None, "minmax", "mse"])
def test_the_search_never_loses_by_its_own_measure(scheme: str, observer: str | None) -> None:
    for seed in range(2):
        x, w = inputs(seed), [weight(seed=10 + seed), weight(24, seed=20 + seed)]
        options = {"observer": observer}
        found = search_smoothing(w, x, scheme, **options)
        errors = {a: search_smoothing(w, x, scheme, alpha=a, **options).error for a in (0.0, 0.5, 0.75, 1.0)}
        assert found.error <= min(errors.values())
        assert found.alpha in [step / 20 for step in range(21)] + [None]
        if found.alpha in errors:
            assert found.error == errors[found.alpha]


def test_loud_channels_cost_nothing_any_more() -> None:
    x, w = inputs(), weight()
    quiet = x.clone()
    quiet[:, LOUD] /= 30
    ones = torch.ones(K)
    plain = measured(w, quiet, ones, "w8a8")
    spoilt = measured(w, x, ones, "w8a8")
    found = search_smoothing([w], x, "w8a8")
    assert found.alpha is not None
    assert measured(w, x, found.scales, "w8a8") == pytest.approx(found.error, rel=1e-4)
    assert found.error < 0.2 * spoilt
    # The function of the two together is that of the weights on quieter channels, at most.
    assert found.error < 1.5 * plain


def test_a_static_scale_is_measured_as_such() -> None:
    x, w = inputs(), weight()
    for observer in ("minmax", "mse"):
        found = search_smoothing([w], x, "w8a8", observer=observer)
        seen = ActivationRange(observer)
        seen.add(x / found.scales)
        assert measured(w, x, found.scales, "w8a8", seen.scale()) == pytest.approx(found.error, rel=1e-3)
        dynamic = search_smoothing([w], x, "w8a8", alpha=found.alpha or 0.0)
        assert found.error > dynamic.error


def test_where_nothing_helps_nothing_is_scaled() -> None:
    # Every channel alike: scales only make weights uneven, which 2 bits feel most.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 8, generator=generator).sign()
    w = torch.randn(16, 8, generator=generator).sign()
    found = search_smoothing([w], x, "w2a8")
    assert torch.equal(found.scales, torch.ones(8))


def test_weights_without_int8_activations_count_with_their_own_arithmetic() -> None:
    x, w = inputs(), [weight(), weight(seed=2)]
    both = search_smoothing(w, x, ["w8a8", "w4g32"], alpha=0.5)
    energy = [float((x @ one.T).square().sum()) for one in w]
    scaled = quantize_groupwise(w[1] * both.scales, "w4g32")
    second = float((dequant_matmul(x / both.scales, scaled, compute="float") - x @ w[1].T).square().sum())
    first = measured(w[0], x, both.scales, "w8a8") * energy[0]
    assert both.error == pytest.approx((first + second) / sum(energy), rel=1e-3)


def test_query_heads_of_a_value_head_share_their_scales() -> None:
    share = grouped_query_share(6, 2, 16)
    found = search_smoothing([weight()], inputs(), "w8a8", alpha=0.5, share=share)
    heads = found.scales.view(2, 3, 16)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    # The loudest of the three decides.
    x, w = inputs().abs().amax(0).view(2, 3, 16), weight().abs().amax(0).view(2, 3, 16)
    expected = smoothing_scales(x.amax(1).flatten(), w.amax(1).flatten(), 0.5).view(2, 16)
    torch.testing.assert_close(heads[:, 0], expected)


def test_a_sample_takes_the_place_of_the_activations() -> None:
    x, w = inputs(), weight()
    sample = ActivationSample(K)
    for chunk in x.split(64):
        sample.add(chunk)
    one, two = search_smoothing([w], sample, "w8a8"), search_smoothing([w], x, "w8a8")
    assert one.alpha == two.alpha
    torch.testing.assert_close(one.scales, two.scales)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], inputs(), "w8a8"), {}, "got 0 weights and 0 schemes"),
        (([weight()], inputs(), ["w8a8", "w8a8"]), {}, "got 1 weights and 2 schemes"),
        (([weight(), weight()[:, 1:]], inputs(), "w8a8"), {}, r"weights must be floating \[N, 96\]"),
        (([weight()], inputs()[:, 1:], "w8a8"), {}, r"activations must be \[..., 96\]"),
        (([weight()], ActivationSample(K), "w8a8"), {}, "inputs must be tokens of 96 features: got 0 tokens"),
        (([weight()], inputs(), "w8"), {}, "got w8, which keeps them"),
        (([weight()], inputs(), "w8a8"), {"alpha": -0.1}, "alpha must be 'auto' or a number from 0 to 1"),
        (([weight()], inputs(), "w8a8"), {"alpha": "best"}, "alpha must be"),
        (([weight()], inputs(), "w8a8"), {"alpha": True}, "alpha must be"),
        (([weight()], inputs(), "w8a8"), {"alpha": float("nan")}, "alpha must be"),
        (([weight()], inputs(), "w8a8"), {"steps": 0}, "steps must be at least 1"),
        (([weight()], inputs(), "w8a8"), {"observer": "max"}, "unknown observer"),
        (([weight() / 0], inputs(), "w8a8"), {}, "NaN or Inf"),
        (([weight()], inputs() / 0, "w8a8"), {}, "NaN or Inf"),
        (([weight()], inputs(), "w8a8"), {"share": torch.arange(3)}, "share must be int64"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search_smoothing(*arguments, **options)  # type: ignore[arg-type]
