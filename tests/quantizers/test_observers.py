from __future__ import annotations

import numpy as np
import pytest
import torch

from qkern.errors import InputError
from qkern.quantizers import OBSERVERS, ActivationRange, ActivationSample

# Half a bin, of which there are 1,024 from one power of two to the next.
HALF_BIN = 2.0**-11


def activations(seed: int = 0, size: int = 20_011) -> torch.Tensor:
    """Heavy-tailed, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.exp(torch.randn(size, generator=generator))


def bound(x: torch.Tensor, observer: str, chunks: int = 3, **options: float) -> float:
    seen = ActivationRange(observer, **options)
    for chunk in x.chunk(chunks):
        seen.add(chunk)
    return 127 * float(seen.scale())


def squared_error(x: torch.Tensor, largest: float) -> float:
    scale = largest / 127
    values = x.double().numpy()
    return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).sum())


def test_minmax_is_the_largest_magnitude() -> None:
    x = activations()
    assert bound(x, "minmax") == pytest.approx(float(np.abs(x.numpy()).max()), rel=1e-6)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_numpys(percentile: float) -> None:
    x = activations()
    expected = np.percentile(np.abs(x.numpy()), percentile, method="inverted_cdf")
    assert bound(x, "percentile", percentile=percentile) == pytest.approx(expected, rel=1.01 * HALF_BIN)


def test_mse_finds_the_least_error_of_a_fine_grid() -> None:
    for seed in range(3):
        x = activations(seed)
        largest = float(x.abs().max())
        found = squared_error(x, bound(x, "mse"))
        least = min(squared_error(x, largest * ratio) for ratio in np.linspace(0.01, 1, 1000))
        assert least <= found * 1.0001 < 1.01 * least
        assert found < 0.95 * squared_error(x, largest)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_chunks_dtypes_and_order_do_not_matter(observer: str) -> None:
    x = activations().bfloat16()
    once = bound(x, observer, chunks=1)
    assert bound(x.float(), observer, chunks=7) == once
    assert bound(x.flip(0)[:, None].T, observer) == once


@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_huge_and_tiny_values(observer: str) -> None:
    assert bound(torch.zeros(10), observer) == 127  # a scale of 1: any is right, and 0 is none
    mostly = torch.zeros(100_000)
    mostly[7] = 3.0
    assert bound(mostly, observer) == pytest.approx(3, rel=0.01)
    for value in (1e38, 3e38, 1e-30):
        assert bound(torch.tensor([-value]), observer) == pytest.approx(value, rel=0.01)
    with pytest.raises(InputError, match="no activations were seen"):
        bound(torch.zeros(0), observer, chunks=1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    x = torch.tensor([[1.0, broken]])
    for seen in (ActivationRange("mse"), ActivationSample(2)):
        with pytest.raises(InputError, match="NaN or Inf"):
            seen.add(x)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="unknown observer: got 'max', allowed are minmax, percentile, mse"):
        ActivationRange("max")
    for percentile in (0.0, 100.1, float("nan")):
        with pytest.raises(InputError, match="percentile must lie above 0"):
            ActivationRange("percentile", percentile=percentile)
    with pytest.raises(InputError, match="must be floating: got torch"):
        ActivationRange().add(torch.arange(3))
    with pytest.raises(InputError, match=r"activations must be \[..., 4\]: got \(2, 3\)"):
        ActivationSample(4).add(torch.zeros(2, 3))


def test_a_sample_has_all_of_a_few_tokens_and_an_even_draw_of_many() -> None:
    few = ActivationSample(3, limit=8)
    rows = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1))
    few.add(rows)
    assert few.tokens == 6
    assert torch.equal(few.rows.sort(0).values, rows.view(6, 3).sort(0).values)
    many = ActivationSample(1, limit=400)
    places = torch.arange(10_000.0)[:, None]
    for chunk in places.split(777):
        many.add(-chunk)
    assert many.tokens == 10_000
    assert many.rows.shape == (400, 1)
    assert float(many.largest) == 9999
    drawn = -many.rows.flatten()
    assert len(drawn.unique()) == 400
    # Uniform: the mean of 400 lies within four deviations, and every tenth has its share.
    assert abs(float(drawn.mean()) - 5000) < 4 * 2887 / 20
    assert (torch.histc(drawn, 10, 0, 10_000) > 15).all()
