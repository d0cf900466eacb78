"""gptq_update: the reference against the formula in NumPy, every tier against the reference bit for bit."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError
from qkern.ops import _cuda, gptq_update
from qkern.ops.codebooks import codebook as find_codebook
from qkern.ops.gptq_update import cuda, reference

if TYPE_CHECKING:
    from types import ModuleType

OP = "gptq_update"
SHAPES = [
    (1, 1),
    (3, 2),
    (16, 16),
    (17, 15),
    (31, 17),
    (5, 64),
    (40, 128),
    (33, 100),
    (2, 333),
    (0, 5),
    (5, 0),
]


def problem(
    N: int, B: int, bits: int = 4, groups: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed + 1000 * N + B)
    weight = torch.randn(N, B, generator=g)
    inputs = torch.randn(B, 2 * B + 1, generator=g)
    hessian = inputs @ inputs.T / max(B, 1) + 0.1 * torch.eye(B)
    hinv = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True) if B else torch.zeros(0, 0)
    scales = (torch.rand(N, groups, generator=g) + 0.2) * (4.0 / (1 << bits))
    zeros = torch.randint(0, 1 << bits, (N, groups), dtype=torch.uint8, generator=g)
    group_index = torch.randint(0, groups, (B,), dtype=torch.int32, generator=g)
    return weight, hinv, scales, zeros, group_index


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        torch.equal(a, b) if a.dtype == torch.uint8 else torch.equal(a.view(torch.int32), b.view(torch.int32))
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_update_follows_the_formula(backend: str, bits: int) -> None:
    weight, hinv, scales, zeros, group_index = problem(6, 20, bits)
    codes, errors = gptq_update(weight, hinv, scales, zeros, group_index, bits=bits, backend=backend)
    h, top = hinv.numpy(), np.float32((1 << bits) - 1)
    for n in range(weight.shape[0]):
        w = weight[n].numpy().copy()
        for j in range(weight.shape[1]):
            s, z = scales[n, group_index[j]].numpy(), np.float32(zeros[n, group_index[j]])
            q = np.clip(np.rint(w[j] / s) + z, np.float32(0), top)
            e = (w[j] - (q - z) * s) / h[j, j]
            assert codes[n, j] == q
            assert errors[n, j].item() == e
            w[j + 1 :] -= e * h[j, j + 1 :]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_gptq_update_follows_the_formula_of_codebooks(backend: str, name: str) -> None:
    weight, hinv, scales, _, group_index = problem(4, 12)
    scales = scales * 8
    codes, errors = gptq_update(
        weight, hinv, scales, None, group_index, bits=4, codebook=name, backend=backend
    )
    table, h = find_codebook(name).values.numpy(), hinv.numpy()
    for n in range(weight.shape[0]):
        w = weight[n].numpy().copy()
        for j in range(weight.shape[1]):
            s = scales[n, group_index[j]].numpy()
            level = table[codes[n, j]]
            assert abs(w[j] / s - level) == np.abs(w[j] / s - table).min()
            e = (w[j] - level * s) / h[j, j]
            assert errors[n, j].item() == e
            w[j + 1 :] -= e * h[j, j + 1 :]


@pytest.mark.parametrize("name", [None, "nf4", "fp4"])
def test_gptq_update_equals_reference(cpu_tier: str, name: str | None) -> None:
    for N, B in SHAPES:
        weight, hinv, scales, zeros, group_index = problem(N, B)
        args = (weight, hinv, scales, None if name else zeros, group_index)
        expected = gptq_update(*args, bits=4, codebook=name, backend="reference")
        got = gptq_update(*args, bits=4, codebook=name, backend="cpu")
        assert same_bits(got[0], expected[0]), (N, B)
        assert same_bits(got[1], expected[1]), (N, B)


@given(N=st.integers(1, 40), B=st.integers(1, 70), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 9))
def test_gptq_update_equals_reference_for_any_shape(
    cpu_tier: str, N: int, B: int, bits: int, seed: int
) -> None:
    weight, hinv, scales, zeros, group_index = problem(N, B, bits, groups=1 + seed, seed=seed)
    weight[:, ::3] *= 10.0 ** (seed - 4)
    expected = gptq_update(weight, hinv, scales, zeros, group_index, bits=bits, backend="reference")
    got = gptq_update(weight, hinv, scales, zeros, group_index, bits=bits, backend="cpu")
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])


def test_gptq_update_takes_the_widest_block(cpu_tier: str) -> None:
    weight, _, scales, zeros, group_index = problem(18, 1024)
    g = torch.Generator().manual_seed(0)
    hinv = (0.02 * torch.randn(1024, 1024, generator=g)).triu(1) + torch.eye(1024)
    expected = gptq_update(weight, hinv, scales, zeros, group_index, bits=4, backend="reference")
    got = gptq_update(weight, hinv, scales, zeros, group_index, bits=4, backend="cpu")
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])


def test_gptq_update_leaves_its_inputs_alone(backend: str) -> None:
    inputs = problem(20, 40)
    before = [tensor.clone() for tensor in inputs]
    gptq_update(*inputs, bits=4, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_gptq_update_reads_strided_inputs(backend: str) -> None:
    weight, hinv, scales, zeros, group_index = problem(16, 48)
    expected = gptq_update(weight, hinv, scales, zeros, group_index, bits=4, backend="reference")
    wide = torch.zeros(16, 100)
    wide[:, 20:68] = weight
    tall = torch.zeros(60, 60)
    tall[6:54, 5:53] = hinv
    for w, h in ((wide[:, 20:68], tall[6:54, 5:53]), (weight.T.contiguous().T, hinv.T.contiguous().T)):
        codes, errors = gptq_update(
            w,
            h,
            scales.T.contiguous().T,
            zeros.T.contiguous().T,
            group_index.repeat(2)[:48],
            bits=4,
            backend=backend,
        )
        assert same_bits(codes, expected[0])
        assert same_bits(errors, expected[1])


@pytest.mark.parametrize("codebook", [None, "nf4", "fp4"])
def test_gptq_update_keeps_nan_in_its_row(backend: str, codebook: str | None) -> None:
    weight, hinv, scales, zeros, group_index = problem(20, 24)
    zeros = zeros if codebook is None else None

    def update(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return gptq_update(
            weight, hinv, scales, zeros, group_index, bits=4, codebook=codebook, backend=backend
        )

    clean = update(backend)
    weight[3, 5], weight[18, 0] = torch.nan, torch.inf
    codes, errors = update(backend)
    lowest = {None: 0, "nf4": 0, "fp4": 11}[codebook]
    assert errors[3, 5:].isnan().all()
    assert (codes[3, 5:] == lowest).all()
    assert not errors[18].isfinite().any()
    assert same_bits(codes, update("reference")[0])
    others = [n for n in range(20) if n not in (3, 18)]
    assert same_bits(codes[others], clean[0][others])
    assert same_bits(errors[others], clean[1][others])


def test_gptq_update_names_what_is_wrong() -> None:
    weight, hinv, scales, zeros, group_index = problem(4, 8)
    with pytest.raises(InputError, match="at most 1024"):
        gptq_update(torch.zeros(2, 1025), hinv, scales, zeros, group_index, bits=4)
    with pytest.raises(InputError, match=r"torch\.float64"):
        gptq_update(weight.double(), hinv, scales, zeros, group_index, bits=4)
    with pytest.raises(InputError, match="hinv must be"):
        gptq_update(weight, hinv[:7], scales, zeros, group_index, bits=4)
    with pytest.raises(InputError, match="scales must be"):
        gptq_update(weight, hinv, scales[:3], zeros, group_index, bits=4)
    with pytest.raises(InputError, match="zeros must be"):
        gptq_update(weight, hinv, scales, zeros.int(), group_index, bits=4)
    with pytest.raises(InputError, match=r"0\.\.2"):
        gptq_update(weight, hinv, scales, zeros, group_index + 3, bits=4)
    with pytest.raises(InputError, match="got neither"):
        gptq_update(weight, hinv, scales, None, group_index, bits=4)
    with pytest.raises(InputError, match="got both"):
        gptq_update(weight, hinv, scales, zeros, group_index, bits=4, codebook="nf4")
    with pytest.raises(InputError, match="bits must be"):
        gptq_update(weight, hinv, scales, zeros, group_index, bits=5)


# The CUDA kernel, compiled for the CPU.


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits agree; a NaN may be any NaN."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0))


def check_cuda(*args: torch.Tensor | None, bits: int = 4, codebook: str | None = None) -> None:
    expected = reference.update(*args, bits, codebook)
    codes, errors = gptq_update(*args, bits=bits, codebook=codebook, backend="cuda")
    assert torch.equal(codes, expected[0])
    assert same_values(errors, expected[1])


@pytest.mark.parametrize("narrow", [False, True], ids=["", "narrow"])
@pytest.mark.parametrize("B", [1, 31, 96, 128, 129, 300, 1024])
def test_cuda_takes_blocks_of_any_width(
    emulator: ModuleType, B: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = SimpleNamespace(gptq_update=functools.partial(emulator.gptq_update, narrow=narrow))
    monkeypatch.setattr(_cuda, "module", lambda: kernel)
    N = 34 if B <= 129 else 3
    g = torch.Generator().manual_seed(B)
    weight, scales = torch.randn(N, B, generator=g), 0.3 + 0.2 * torch.rand(N, 9, generator=g)
    # Groups begin at multiples of four columns; a small hinv keeps the weights in range.
    groups = (torch.arange(B) // 32 % 9).int()
    hinv = (0.02 * torch.randn(B, B, generator=g)).triu(1) + torch.diag(0.5 + torch.rand(B, generator=g))
    zeros = torch.randint(0, 16, (N, 9), dtype=torch.uint8, generator=g)
    for codebook in (None, "nf4", "fp4"):
        check_cuda(weight, hinv, scales, None if codebook else zeros, groups, codebook=codebook)
    # Rows that leave the fast path, and lines of hinv that are not aligned.
    weight[1, B // 2], weight[2, B - 1], weight[0, 0] = torch.nan, -torch.inf, 1e30
    shifted = torch.zeros(B * B + 1)[1:].view(B, B).copy_(hinv)
    check_cuda(weight, shifted, scales, zeros, groups)


@pytest.mark.parametrize("codebook", [None, "nf4", "fp4"])
def test_cuda_gives_the_same_bits_at_the_ends_of_the_range(
    emulator: ModuleType, codebook: str | None
) -> None:
    weight, hinv, scales, zeros, _ = problem(40, 24)
    zeros, groups = None if codebook else zeros, (torch.arange(24) // 8).int()
    # Zeros of both signs, ties, what divides exactly; eight rows each whose weights or scales are extreme.
    weight[::3] = torch.where(weight[::3] > 0, 0.0, -0.0)
    weight[1::6] = scales[1::6][:, groups.long()] * torch.arange(-6, 6, 0.5)
    weight[:8] *= torch.tensor([1e-20, 1e-30, 1e-39, 1e-42, 1e20, 1e30, 1e38, 1.0])[:, None]
    scales[8:16] *= torch.tensor([0.0, 1e-20, 1e20, torch.inf, torch.nan, 1e-40, 1e38, 1.0])[:, None]
    for factor in (hinv, -hinv, torch.eye(24), -torch.eye(24), 3e-7 * torch.eye(24)):
        check_cuda(weight, factor, scales, zeros, groups, codebook=codebook)
        check_cuda(weight, factor, -scales, zeros, groups, codebook=codebook)
        # What one row needs is seen only where no other row of its warp needs it too.
        for row in range(16):
            w, s, z = (t[row : row + 1] for t in (weight, scales, scales if zeros is None else zeros))
            check_cuda(w, factor, s, None if zeros is None else z, groups, codebook=codebook)
    for column in (7, 23):
        for diagonal in (0.0, 1e-30, 1e30, 3e38, torch.nan):
            factor = hinv.clone()
            factor[column, column] = diagonal
            check_cuda(
                weight[16:],
                factor,
                scales[16:],
                zeros if zeros is None else zeros[16:],
                groups,
                codebook=codebook,
            )


def test_cuda_rounds_tiny_errors_once(emulator: ModuleType) -> None:
    # All codes are those of zero: what is divided has exponents at which a remainder loses its last bits.
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 32, generator=g) * 10.0 ** -torch.arange(24, 40).repeat_interleave(16)[:, None]
    hinv = torch.diag(0.5 + torch.rand(32, generator=g))
    zeros, groups = torch.full((256, 1), 8, dtype=torch.uint8), torch.zeros(32, dtype=torch.int32)
    check_cuda(weight, hinv, torch.ones(256, 1), zeros, groups)


@pytest.mark.parametrize("B", [3, 129])
def test_cuda_sums_the_losses_of_columns_that_exist(emulator: ModuleType, B: int) -> None:
    g = torch.Generator().manual_seed(0)
    weight, scales = torch.randn(9, B, generator=g), torch.ones(9, 1)
    # A zero has an error at this zero point, and must have none beyond the last column.
    zeros, groups = torch.full((9, 1), 255, dtype=torch.uint8), torch.zeros(B, dtype=torch.int32)
    codes, losses = torch.empty(9, B, dtype=torch.uint8), torch.empty(9)
    errors = cuda.run(weight, torch.eye(B), scales, zeros, groups, 4, None, codes, losses)
    expected = torch.zeros(9)
    for column in errors.unbind(1):
        expected = expected + column * column
    assert same_bits(losses, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_takes_any_zero_point(emulator: ModuleType, bits: int) -> None:
    weight, hinv, scales, zeros, groups = problem(33, 40, bits)
    for index in (groups, groups.sort().values, torch.zeros_like(groups)):
        check_cuda(weight, hinv, scales, zeros, index, bits=bits)
    check_cuda(weight, hinv, scales, torch.full_like(zeros, 255), torch.zeros_like(groups), bits=bits)


@pytest.mark.parametrize("codebook", [None, "nf4"])
def test_cuda_does_not_depend_on_the_order_of_threads(emulator: ModuleType, codebook: str | None) -> None:
    weight, hinv, scales, zeros, _ = problem(36, 150)
    weight[3, 5] = torch.inf
    groups = (torch.arange(150) // 64).int()
    for seed in range(1, 5):
        emulator.set_seed(seed)
        check_cuda(weight, hinv, scales, None if codebook else zeros, groups, codebook=codebook)
