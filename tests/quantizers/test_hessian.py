from __future__ import annotations

import logging

import pytest
import torch

from qkern.errors import InputError
from qkern.quantizers import HessianAccumulator
from qkern.quantizers.hessian import factorize, triangular_inverse

K = 48


def correlated(tokens: int, features: int = K, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * torch.arange(1, features + 1) ** -0.5
    return torch.randn(tokens, features, generator=generator) @ mix.T


def accumulated(x: torch.Tensor) -> HessianAccumulator:
    accumulator = HessianAccumulator(x.shape[-1])
    accumulator.add(x)
    return accumulator


def exact(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.double().T @ x.double() / x.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uneven_batches_give_the_mean_over_all_tokens(dtype: torch.dtype) -> None:
    x = correlated(1000).to(dtype)
    accumulator = HessianAccumulator(K)
    for batch in x.split([1, 0, 499, 7, 493]):
        accumulator.add(batch.unsqueeze(0))
    assert accumulator.tokens == 1000
    torch.testing.assert_close(accumulator.value.double(), exact(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(accumulator.diagonal.double(), exact(x).diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(accumulator.mean_abs.double(), x.double().abs().mean(0), rtol=1e-5, atol=0)


def test_many_huge_tokens_do_not_overflow() -> None:
    x = torch.full((4096, 3), 1e18)  # the sum of squares is past fp32, their mean is not
    accumulator = HessianAccumulator(3)
    for batch in x.split(2048):
        accumulator.add(batch)
    torch.testing.assert_close(accumulator.value, torch.full((3, 3), 2e36), rtol=1e-4, atol=0)


def test_many_small_batches_keep_their_digits() -> None:
    x = correlated(20_000, 8)
    accumulator = HessianAccumulator(8)
    for batch in x.split(2):
        accumulator.add(batch)
    assert (accumulator.value.double() - exact(x)).abs().max() < 2e-5 * exact(x).abs().max()


def test_merge_is_one_stream() -> None:
    x = correlated(300)
    one, two = accumulated(x[:100]), accumulated(x[100:])
    one.merge(two)
    one.merge(HessianAccumulator(K))
    assert one.tokens == 300
    torch.testing.assert_close(one.value, accumulated(x).value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.mean_abs, accumulated(x).mean_abs)


def test_scaled_is_what_the_folded_model_would_accumulate() -> None:
    x, scales = correlated(200), torch.linspace(0.1, 9, K)
    scaled, expected = accumulated(x).scaled(scales), accumulated(x / scales)
    assert scaled.tokens == 200
    torch.testing.assert_close(scaled.value, expected.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.mean_abs, expected.mean_abs)


def test_wrong_activations_are_refused() -> None:
    accumulator = HessianAccumulator(K)
    with pytest.raises(InputError, match=r"must be floating \[\.\.\., 48\]"):
        accumulator.add(torch.zeros(3, K + 1))
    with pytest.raises(InputError, match="int64"):
        accumulator.add(torch.zeros(3, K, dtype=torch.int64))
    with pytest.raises(InputError, match="cannot merge"):
        accumulator.merge(HessianAccumulator(K + 1))
    with pytest.raises(InputError, match="at least 1"):
        HessianAccumulator(0)


def test_root_inverse_is_the_textbook_factor() -> None:
    hessian = accumulated(correlated(500)).value
    factor = factorize(hessian, 0.05)
    assert factor is not None
    assert factor.damp == 0.05
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    assert factor.shift == pytest.approx(0.05 * float(hessian.diagonal().mean()))
    assert torch.equal(factor.root, factor.root.triu())
    torch.testing.assert_close(factor.root.double() @ factor.root.double().T, damped, rtol=1e-5, atol=1e-4)
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(
        triangular_inverse(factor.root).double(), textbook, rtol=0, atol=2e-5 * float(textbook.abs().max())
    )


def test_rank_deficient_hessian_needs_no_more_damping() -> None:
    factor = factorize(accumulated(correlated(K // 4)).value, 0.05)
    assert factor is not None
    assert factor.damp == 0.05


def test_double_precision_saves_what_single_cannot_factor() -> None:
    # Condition 1e9: single precision rounds the small eigenvalues below zero, double does not.
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).double())[0]
    spectrum = torch.logspace(0, -9, 64, dtype=torch.float64)
    hessian = (basis * spectrum) @ basis.T
    hessian = (hessian + hessian.T) / 2
    assert int(torch.linalg.cholesky_ex(hessian.float().flip(0, 1))[1]) != 0
    factor = factorize(hessian, 0.0)
    assert factor is not None
    assert factor.damp == 0.0


def test_damping_is_raised_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.3  # smallest eigenvalue -0.3
    with caplog.at_level(logging.WARNING):
        factor = factorize(hessian, 0.05)
    assert factor is not None
    assert factor.damp == pytest.approx(0.4)
    assert [record.args for record in caplog.records] == [(0.05, 0.1), (0.1, 0.2), (0.2, 0.4)]


def test_undamped_failure_starts_at_one_percent() -> None:
    factor = factorize(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.0)
    assert factor is not None
    assert factor.damp == 0.01


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poisoned_hessian_has_no_factor(poison: float) -> None:
    hessian = torch.eye(4)
    hessian[2, 3] = poison
    assert factorize(hessian, 0.05) is None


def test_hopeless_hessian_has_no_factor() -> None:
    assert factorize(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.05) is None
