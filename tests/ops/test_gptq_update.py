"""gptq_update: the reference against the formula in NumPy, every tier against the reference bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError
from qkern.ops import gptq_update
from qkern.ops.codebooks import codebook as find_codebook

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
