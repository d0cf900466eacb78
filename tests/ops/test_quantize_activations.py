"""quantize_activations: every backend bit for bit the formula; shapes, strides, NaN and Inf."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError, UnsupportedError
from qkern.ops import quantize_activations
from qkern.schemes import FLOAT_DTYPES

OP = "quantize_activations"


def formula(x: torch.Tensor, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a finite matrix in NumPy, fp32 step by step."""
    values = x.float().numpy()
    M, K = values.shape
    step = group_size or max(K, 1)
    codes = np.zeros((M, K), dtype=np.int8)
    groups = 1 if group_size is None else -(-K // group_size)
    scales = np.zeros((M, groups), dtype=np.float32)
    for g in range(groups):
        chunk = values[:, g * step : (g + 1) * step]
        if chunk.size == 0:
            continue
        scale = np.abs(chunk).max(1) / np.float32(127)
        scales[:, g] = scale
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where(scale[:, None] > 0, chunk / scale[:, None], np.float32(0))
        codes[:, g * step : (g + 1) * step] = np.rint(np.clip(ratio, -127, 127)).astype(np.int8)
    return codes, scales


@pytest.mark.parametrize("group_size", [None, 1, 7, 32, 128, 200, 1000])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_codes_and_scales_are_the_formula_bit_for_bit(backend, dtype, group_size):
    for M, K in ((0, 5), (1, 1), (3, 0), (2, 17), (5, 256), (9, 300)):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(dtype)
        codes, scales = quantize_activations(x, group_size=group_size, backend=backend)
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        expected_codes, expected_scales = formula(x, group_size)
        assert np.array_equal(scales.numpy(), expected_scales)
        assert np.array_equal(codes.numpy(), expected_codes)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=150),
    group_size=st.one_of(st.none(), st.integers(1, 160)),
)
def test_any_finite_floats(backend, bits, group_size):
    x = torch.tensor(np.array([bits], dtype=np.uint32).view(np.float32))
    x = torch.where(torch.isfinite(x), x, 1.0)
    codes, scales = quantize_activations(x, group_size=group_size, backend=backend)
    expected_codes, expected_scales = formula(x, group_size)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(codes.numpy(), expected_codes)


def test_ties_go_to_even(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scales = quantize_activations(x, backend=backend)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert scales.tolist() == [[1.0]]


def test_leading_dimensions_and_strides(backend):
    base = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_activations(base[:, :40].contiguous(), group_size=16, backend=backend)
    for view in (base[:, :40], base[:, :40].T.contiguous().T):
        again = quantize_activations(view, group_size=16, backend=backend)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)
    q, s = quantize_activations(base[:, :40].reshape(2, 3, 4, 40), group_size=16, backend=backend)
    assert torch.equal(q, codes.view(2, 3, 4, 40))
    assert torch.equal(s, scales.view(2, 3, 4, 3))
    q, s = quantize_activations(base[0, :40], group_size=16, backend=backend)
    assert torch.equal(q, codes[0])
    assert torch.equal(s, scales[0])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_non_finite_values_show_in_their_scale(backend, dtype):
    x = torch.ones(3, 300, dtype=dtype)
    x[0, 200] = float("nan")
    x[1, 5] = -float("inf")
    codes, scales = quantize_activations(x, group_size=128, backend=backend)
    assert torch.isnan(scales[0, 1])
    assert scales[1, 0] == float("inf")
    assert codes[0, 128:256].eq(0).all()
    assert codes[1, 5] == -127
    assert codes[1, :5].eq(0).all()
    clean = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    assert torch.equal(torch.isfinite(scales), clean)
    assert codes[2].eq(127).all()


def test_a_group_longer_than_the_row_is_the_row(backend):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_activations(x, backend=backend)
    for group_size in (41, 2**63 - 1):
        again = quantize_activations(x, group_size=group_size, backend=backend)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


def test_zero_rows_have_scale_zero(backend):
    codes, scales = quantize_activations(torch.zeros(2, 64), group_size=32, backend=backend)
    assert codes.eq(0).all()
    assert scales.eq(0).all()


def test_the_torch_op_refuses_what_its_kernels_could_not_read():
    for arguments in ((0,), (None, torch.ones(0)), (None, torch.ones(1, dtype=torch.float16))):
        with pytest.raises(InputError, match=r"call qkern\.ops\.quantize_activations"):
            torch.ops.qkern.quantize_activations(torch.randn(3, 40), *arguments)


def test_opcheck():
    for group_size in (None, 16):
        torch.library.opcheck(torch.ops.qkern.quantize_activations, (torch.randn(3, 40), group_size))


def test_errors():
    with pytest.raises(InputError, match="x must be fp32, fp16 or bf16"):
        quantize_activations(torch.ones(2, 3, dtype=torch.int8))
    with pytest.raises(InputError, match="x must be"):
        quantize_activations(torch.tensor(1.0))
    with pytest.raises(InputError, match="group_size must be at least 1: got 0"):
        quantize_activations(torch.ones(2, 3), group_size=0)
    with pytest.raises(UnsupportedError, match="cuda"):
        quantize_activations(torch.ones(2, 3), backend="cuda")
