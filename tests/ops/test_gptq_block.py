"""GPTQ's block beyond gptq_update: every tier against plain torch bit for bit, products in their budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from qkern.ops import _cuda, _native
from qkern.ops.codebooks import codebook
from qkern.ops.gptq_update import block as ops
from qkern.ops.gptq_update.block import Block
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

SHAPES = [(1, 1), (17, 15), (33, 33), (40, 128), (3, 150)]
SPELLINGS = ["w4", "w2z", "w3z", "w8", "nf4g32", "fp4g32"]


def problem(N: int, B: int, spelling: str, group_index: Tensor) -> tuple[Block, Tensor, Tensor, Tensor]:
    """A block inside wider tensors, targets beside its weights, and R and its inverse."""
    g = torch.Generator().manual_seed(1000 * N + B)
    scheme, groups = Scheme.parse(spelling), 3
    inputs = torch.randn(B, 2 * B + 1, generator=g)
    hessian = inputs @ inputs.T / B + 0.1 * torch.eye(B)
    local = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    wide = torch.randn(N, B + 7, generator=g)
    valid = [c for c in range(1 << scheme.bits) if not (scheme.codebook == "fp4" and c == 8)]
    codes = torch.tensor(valid, dtype=torch.uint8)[torch.randint(0, len(valid), (N, B + 3), generator=g)]
    scales = (0.2 * torch.rand(N, groups, generator=g) + 0.3) * (4.0 if scheme.codebook else 1.0)
    zeros = torch.full((N, groups), scheme.midpoint, dtype=torch.uint8)
    if scheme.zero_point:
        zeros = torch.randint(0, 1 << scheme.bits, (N, groups), dtype=torch.uint8, generator=g)
    state = Block(
        scheme=scheme,
        origin=wide[:, 2 : 2 + B],
        codes=codes[:, 1 : 1 + B],
        change=torch.zeros(N, B + 5)[:, 3 : 3 + B],
        scales=scales,
        zeros=zeros,
        group_index=group_index,
    )
    state.change.copy_(state.origin - values(state))
    target = state.origin + 0.1 * torch.randn(N, B, generator=g)
    return state, target, local, torch.linalg.inv(local).triu()


def values(state: Block) -> Tensor:
    """What the codes of a block stand for."""
    index = state.group_index.long()
    if state.scheme.codebook is not None:
        levels = codebook(state.scheme.codebook).values[state.codes.long()]
    else:
        levels = state.codes.float() - state.zeros[:, index].float()
    return levels * state.scales[:, index]


def both_ways(
    monkeypatch: pytest.MonkeyPatch, state: Block, call: Callable[[Block], Tensor]
) -> tuple[Block, Tensor]:
    """Run natively and in plain torch on copies: all that they write must have the same bits."""
    results = []
    for native in (True, False):
        monkeypatch.setattr(ops, "_on_cpu", lambda tensor, native=native: native)
        copy = replace(
            state, codes=state.codes.clone(), change=state.change.clone(), scales=state.scales.clone()
        )
        results.append((copy, call(copy)))
    (one, losses), (other, expected) = results
    assert torch.equal(losses, expected)
    for name in ("codes", "change", "scales"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.change, one.origin - values(one))
    return one, losses


def one_group(B: int) -> Tensor:
    return torch.ones(B, dtype=torch.int32)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_quantize_gives_the_same_bits(cpu_tier: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for N, B in SHAPES:
        groups = torch.arange(B, dtype=torch.int32) // 7 % 3
        state, target, _, hinv = problem(N, B, spelling, groups)
        made, losses = both_ways(monkeypatch, state, lambda b, t=target, h=hinv: ops.quantize(b, t, h))
        exact = ((target - values(made)).double() @ torch.linalg.inv(hinv.double())).square().sum(1)
        torch.testing.assert_close(losses.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("act", ["quantize", "search", "improve"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_cuda_kernel_gives_the_same_bits(
    cuda_emulator: ModuleType, spelling: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for N, B in SHAPES:
        groups = torch.arange(B, dtype=torch.int32) // 7 % 3 if act == "quantize" else one_group(B)
        state, target, local, hinv = problem(N, B, spelling, groups)
        candidates = torch.stack([state.scales[:, 1] * ratio for ratio in (1.0, 0.8, 0.9, 1.1)])
        arguments = {
            "quantize": (target, hinv),
            "search": (target, hinv, candidates),
            "improve": (target, hinv, local, 2, torch.float16),
        }[act]

        def run(b: Block, arguments: tuple[object, ...] = arguments) -> Tensor:
            call: Callable[..., Tensor] = getattr(ops, act)
            if not ops._on_cpu(b.origin):
                return call(b, *arguments)
            # Tensors on the CPU go to its own kernels unless those are ruled out.
            with monkeypatch.context() as patch, _cuda.emulated(cuda_emulator):
                patch.setattr(ops, "_on_cpu", lambda tensor: False)
                patch.delattr(ops.reference, "update")
                return call(b, *arguments)

        both_ways(monkeypatch, state, run)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_search_gives_the_same_bits_and_takes_the_least_loss(
    cpu_tier: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for N, B in SHAPES:
        state, target, _, hinv = problem(N, B, spelling, one_group(B))
        candidates = torch.stack([state.scales[:, 1] * ratio for ratio in (1.0, 0.8, 0.9, 1.1)])
        made, losses = both_ways(
            monkeypatch, state, lambda b, t=target, h=hinv, c=candidates: ops.search(b, t, h, c)
        )
        assert (made.scales[:, 1] == candidates).any(0).all()
        for scales in candidates:
            trial = replace(state, scales=state.scales.clone(), codes=state.codes.clone())
            trial.scales[:, 1] = scales
            assert (losses <= ops.quantize(trial, target, hinv)).all()


@pytest.mark.parametrize("fits", [0, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_improve_gives_the_same_bits_and_never_loses(
    cpu_tier: str, spelling: str, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bettered = 0
    for N, B in SHAPES:
        groups = one_group(B) if fits else torch.arange(B, dtype=torch.int32) // 7 % 3
        state, target, local, hinv = problem(N, B, spelling, groups)

        def run(b: Block, t: Tensor = target, h: Tensor = hinv, r: Tensor = local) -> Tensor:
            return ops.improve(b, t, h, r, fits, torch.float16)

        made, gains = both_ways(monkeypatch, state, run)
        before, after = (
            ((target - values(b)).double() @ local.double()).square().sum(1) for b in (state, made)
        )
        assert (gains >= 0).all()
        torch.testing.assert_close(gains.double(), before - after, rtol=1e-3, atol=1e-4)
        same = gains == 0
        assert torch.equal(made.codes[same], state.codes[same])
        bettered += int((~same).sum())
        # A second turn starts from the first.
        assert (ops.improve(made, target, hinv, local, fits, torch.float16) <= gains + 1e-5).all()
    assert bettered > 50


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 0, 4), (0, 5, 3), (5, 256, 32), (31, 257, 33), (230, 700, 128)]
)
def test_product_is_as_exact_as_torch(cpu_tier: str, shape: tuple[int, int, int]) -> None:
    N, K, columns = shape
    g = torch.Generator().manual_seed(0)
    a = torch.randn(N, K + 3, generator=g)[:, :K]
    b, base = torch.randn(K, columns, generator=g), torch.randn(N, columns + 2, generator=g)[:, 1:-1]
    for added in (None, base):
        exact = a.double() @ b.double() + (0 if added is None else added.double())
        plain = a @ b + (0 if added is None else added)
        budget = 2 * (plain.double() - exact).square().mean().sqrt() + 1e-12
        made = ops.product(a, b, added)
        if made.numel():
            assert (made.double() - exact).square().mean().sqrt() <= budget
        # Other strides, and fewer rows, change no bit.
        if cpu_tier != "scalar":
            assert torch.equal(ops.product(a, b.T.contiguous().T, added), made)
            half = N // 2
            assert torch.equal(ops.product(a[half:], b, None if added is None else added[half:]), made[half:])


def test_product_does_not_depend_on_threads(cpu_tier: str) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 600, generator=g), torch.randn(600, 128, generator=g)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.product(a, b))
    finally:
        torch.set_num_threads(threads)
    if cpu_tier != "scalar":  # torch's own product there
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def noise_of_fixed_point(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Ten times what rounding to the units of 64 rows usually costs each element."""

    def lengths_and_units(of: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = torch.linalg.vector_norm(of, dim=dim, keepdim=True)
        most = of.abs().amax(dim, keepdim=True)
        # The squares of very small and very large numbers are no floats: then it is a bound.
        known = torch.where((length > 1e-15) & (length < 1e19), length, 8 * most)
        return length, torch.maximum(known / 46000, most / 32760)

    noise = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for k in range(0, a.shape[1], 64):
        row_length, row_unit = lengths_and_units(a[:, k : k + 64].double(), 1)
        column_length, column_unit = lengths_and_units(b[k : k + 64].double(), 0)
        noise += (row_length * column_unit) ** 2 + (row_unit * column_length) ** 2
    return 10 * (noise / 12).sqrt()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 0, 4), (0, 5, 3), (6, 255, 32), (31, 257, 33), (920, 1030, 80)]
)
def test_fixed_point_is_as_exact_as_it_says(cpu_tier: str, shape: tuple[int, int, int]) -> None:
    N, K, columns = shape
    g = torch.Generator().manual_seed(0)
    # Rows and columns of very different sizes, each with some numbers much larger than the rest.
    sizes = torch.logspace(-20, 15, N)[:, None], torch.logspace(-15, 10, columns)
    a = sizes[0] * torch.randn(N, K, generator=g) ** 3
    b, base = sizes[1] * torch.randn(K, columns, generator=g) ** 3, sizes[0] * sizes[1]
    if K > 5:
        a[:, 3] = b[5] = 0
        a[N // 2] = 0
    for added in (None, base):
        made = ops.product(a, b, added, fixed=True)
        exact = a.double() @ b.double() + (0 if added is None else added.double())
        allowed = noise_of_fixed_point(a, b) + 1e-6 * exact.abs()
        assert ((made.double() - exact).abs() <= allowed).all()
        if cpu_tier == "scalar":
            continue
        # Other strides, fewer rows and other threads change no bit.
        half = N // 2
        strided = b.T.contiguous().T
        rest = None if added is None else added[half:]
        assert torch.equal(ops.product(a[half:], strided, rest, fixed=True), made[half:])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(ops.product(a, b, added, fixed=True), made)
        finally:
            torch.set_num_threads(threads)


def test_fixed_point_is_another_kernel_where_it_is_faster() -> None:
    a, b = torch.randn(32, 512), torch.randn(512, 32)
    fixed = _native.core().active_tier() in ("avx512vnni", "avx512bf16")
    assert torch.equal(ops.product(a, b, fixed=True), ops.product(a, b)) == (not fixed)


@pytest.mark.parametrize("huge", [5e37, 3e38])
def test_fixed_point_of_the_largest_numbers(cpu_tier: str, huge: float) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 200, generator=g), torch.randn(200, 40, generator=g)
    # Eight times such a number, its segment's bound of length, is beyond fp32.
    a[:14, 64:128] = 0.0
    a[:14, 70] = huge
    b[70, :20], b[70, 20:] = 0.0, 1e-4  # nothing, and about a unit of its segment
    made = ops.product(a, b, fixed=True).double()
    exact = a.double() @ b.double()
    assert ((made - exact).abs() <= noise_of_fixed_point(a, b) + 1e-6 * exact.abs()).all()
    # Where the number meets nothing the other segments keep their digits.
    assert (made - exact)[:, :20].abs().max() < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(cpu_tier: str, bad: float) -> None:
    a, b = torch.rand(20, 300) + 1, torch.rand(300, 40) + 1
    plain = ops.product(a, b, fixed=True)
    a[7, 270] = bad
    b[290, 33] = bad
    made = ops.product(a, b, fixed=True)
    lost = torch.zeros(20, 40, dtype=torch.bool)
    lost[7] = lost[:, 33] = True
    assert not torch.isfinite(made[lost]).any()
    assert torch.equal(made[~lost], plain[~lost]) or cpu_tier == "scalar"


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64])
def test_gather_takes_rows_and_columns(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    matrix = (100 * torch.rand(40, 60, generator=g)).to(dtype)
    rows, columns = torch.randperm(40, generator=g)[:33], torch.randperm(60, generator=g)
    for source in (matrix, matrix.T.contiguous().T):
        assert torch.equal(ops.gather(source, columns), matrix[:, columns])
        assert torch.equal(ops.gather(source, columns, rows), matrix[rows][:, columns])
