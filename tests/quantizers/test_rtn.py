from __future__ import annotations

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import dequantize_groupwise
from qkern.quantizers import quantize_rtn


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_each_expert_is_quantized_as_if_alone() -> None:
    stack = weight(3, 10, 70)
    together = dequantize_groupwise(quantize_rtn(stack, "w4g32z"))
    alone = [dequantize_groupwise(quantize_rtn(expert, "w4g32z")) for expert in stack]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32", "w4", "w4g32z", "w2g32z"])
def test_mse_search_lowers_the_weighted_error(spelling: str) -> None:
    original = weight(32, 128) ** 3  # heavy tails
    importance = torch.linspace(0.01, 2, 128)

    def error(search: str, importance_used: torch.Tensor | None) -> float:
        quantized = quantize_rtn(original, spelling, search=search, importance=importance_used)  # type: ignore[arg-type]
        return float(((dequantize_groupwise(quantized) - original) ** 2 * importance).sum())

    weighted = error("mse", importance)
    assert weighted < 0.95 * error("minmax", None)
    assert weighted < 1.02 * error("mse", None)  # zero points are searched, not solved for


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        quantize_rtn(torch.full((2, 8), torch.nan), "w4")
