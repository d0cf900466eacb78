"""Triton's gptq_update, quantize_activations, int8_matmul and codes on a given grid: the reference's bits.

On a machine without a GPU they run in Triton's interpreter; test_triton.py compiles them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import (
    _triton,
    dequant_matmul,
    dequantize_groupwise,
    gptq_update,
    int8_linear,
    int8_matmul,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
)
from qkern.ops.dequant_matmul import triton as matmul_host
from qkern.ops.dequant_matmul import triton_layout
from qkern.ops.gptq_update import block as gptq_block
from qkern.ops.gptq_update import reference as gptq_reference
from qkern.ops.gptq_update import triton as gptq_host
from qkern.ops.int8_matmul import reference as int8_reference
from qkern.ops.int8_matmul import triton as int8_host
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
OPS = ("dequant_matmul", "gptq_update", "int8_matmul", "quantize_activations", "quantize_groupwise")
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # to compare NaNs bit for bit

# numpy, which the interpreter computes with, warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# Triton decides when a function is decorated: its own at its first import (torch's, maybe), ours at theirs.
LATE = INTERPRETED and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if INTERPRETED and not LATE:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in OPS:
            _triton.kernels(name)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = RAW[a.itemsize]
    a, b = a.contiguous().cpu(), b.contiguous().cpu()
    return a.dtype == b.dtype and torch.equal(a.view(raw), b.view(raw))


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits agree; a NaN may be any NaN."""
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0))


def activations(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=generator(M + 7 * K)).to(DEVICE, dtype)


# ---- gptq_update ---------------------------------------------------------------------------------------


def column_block(N: int, B: int, bits: int = 4, groups: int = 3) -> tuple[torch.Tensor, ...]:
    """Weight, factor, scales, zeros and groups of a block; a small factor keeps the weights in range."""
    g = generator(1000 * N + B)
    hinv = (0.05 * torch.randn(B, B, generator=g)).triu(1) + torch.diag(0.5 + torch.rand(B, generator=g))
    block = (
        torch.randn(N, B, generator=g),
        hinv + 7.0 * torch.ones(B, B).tril(-1),  # what no one reads
        (torch.rand(N, groups, generator=g) + 0.2) * (4.0 / (1 << bits)),
        torch.randint(0, 1 << bits, (N, groups), dtype=torch.uint8, generator=g),
        torch.randint(0, groups, (B,), dtype=torch.int32, generator=g),
    )
    return tuple(tensor.to(DEVICE) for tensor in block)


def check_columns(*block: torch.Tensor | None, bits: int = 4, codebook: str | None = None) -> None:
    expected = gptq_reference.update(*(None if t is None else t.cpu() for t in block), bits, codebook)
    codes, errors = gptq_update(*block, bits=bits, codebook=codebook, backend="triton")
    assert same_bits(codes, expected[0])
    assert same_values(errors, expected[1])


@pytest.mark.parametrize("shape", [(1, 1), (17, 15), (2, 140), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("book", [None, "nf4", "fp4"])
def test_columns_have_the_bits_of_the_reference(shape, book):
    weight, hinv, scales, zeros, index = column_block(*shape)
    check_columns(weight, hinv, scales, None if book else zeros, index, codebook=book)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_columns_of_any_bits_and_panels(bits, monkeypatch):
    monkeypatch.setattr(gptq_host, "_PANEL", 8)
    block = column_block(18, 29, bits)
    check_columns(*block, bits=bits)
    check_columns(*block[:3], torch.full_like(block[3], 255), block[4], bits=bits)


@pytest.mark.parametrize("book", [None, "nf4", "fp4"])
def test_columns_at_the_ends_of_the_range(book):
    weight, hinv, scales, zeros, index = column_block(30, 12)
    index = torch.arange(12, dtype=torch.int32, device=DEVICE) // 4
    # Zeros of both signs, ties, what is not finite, extreme sizes and scales; a diagonal that divides badly.
    weight[::3] = torch.where(weight[::3] > 0, 0.0, -0.0)
    weight[1::6] = scales[1::6][:, index.long()] * torch.arange(-3, 3, 0.5, device=DEVICE)
    sizes = [1e-39, 1e-42, 1e20, 1e38, torch.nan, torch.inf, -torch.inf]
    for row, size in enumerate(sizes):
        weight[4 + row, row] = size
        scales[12 + row] *= size
    for diagonal in (1.0, 0.0, 3e38):
        factor = hinv.clone()
        factor[7, 7] *= diagonal
        check_columns(weight, factor, scales, None if book else zeros, index, codebook=book)


def test_columns_with_strides_and_losses():
    weight, hinv, scales, zeros, index = column_block(9, 21)
    expected = gptq_reference.update(
        weight.cpu(), hinv.cpu(), scales.cpu(), zeros.cpu(), index.cpu(), 4, None
    )
    wide = torch.zeros(40, 40, device=DEVICE)
    wide[3:24, 5:26] = hinv
    codes = torch.zeros(9, 30, dtype=torch.uint8, device=DEVICE)
    losses = torch.empty(9, device=DEVICE)
    errors = gptq_host.run(
        weight.T.contiguous().T,
        wide[3:24, 5:26],
        scales.T.contiguous().T,
        zeros.T.contiguous().T,
        index.repeat(2)[:21],
        4,
        None,
        codes[:, 4:25],
        losses,
    )
    assert same_bits(codes[:, 4:25], expected[0])
    assert not codes[:, :4].any()
    assert not codes[:, 25:].any()
    assert same_bits(errors, expected[1])
    total = torch.zeros(9)
    for column in expected[1].unbind(1):
        total = total + column * column
    assert same_bits(losses, total)
    assert torch.equal(
        gptq_host.run(
            weight[:, :0], hinv[:0, :0], scales, zeros, index[:0], 4, None, codes[:, :0], losses
        ).cpu(),
        torch.empty(9, 0),
    )
    assert not losses.any()


@pytest.mark.parametrize("spelling", ["w4z", "nf4"])
def test_gptq_s_search_and_sweeps_run_on_the_kernel(spelling, monkeypatch):
    target, hinv, scales, zeros, _ = column_block(6, 10)
    hinv = hinv.triu()
    index = torch.ones(10, dtype=torch.int32, device=DEVICE)
    made = gptq_block.Block(
        scheme=Scheme.parse(spelling),
        origin=target + 0.1,
        codes=torch.zeros(6, 10, dtype=torch.uint8, device=DEVICE),
        change=torch.zeros(6, 10, device=DEVICE),
        scales=scales,
        zeros=zeros,
        group_index=index,
    )
    candidates = torch.stack([scales[:, 1] * ratio for ratio in (1.0, 0.8, 1.2)])
    monkeypatch.setattr(gptq_block, "_on_cpu", lambda tensor: False)
    results, calls, run = [], [], gptq_host.run
    monkeypatch.setattr(gptq_host, "run", lambda *args: calls.append(1) or run(*args))
    for reason in (None, "because"):
        monkeypatch.setattr(_triton, "why_not_triton", lambda device, reason=reason: reason)
        copy = replace(made, codes=made.codes.clone(), change=made.change.clone(), scales=scales.clone())
        found = gptq_block.search(copy, target, hinv, candidates)
        local = torch.linalg.inv(hinv.cpu()).triu().to(DEVICE)
        gains = gptq_block.improve(copy, target, hinv, local, 1, torch.float16)
        results.append((found, gains, copy.codes, copy.change, copy.scales))
        # One run for each candidate and the best of them, two of the sweep.
        assert len(calls) >= 5
    assert len(calls) <= 6
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))


# ---- quantize_activations, int8_matmul -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_activations_have_the_codes_and_scales_of_the_reference(dtype):
    x = torch.randn(6, 300, generator=generator(0))
    x[1, 3], x[2, 7], x[3], x[4, :40] = torch.nan, -torch.inf, 0.0, 1e-44
    x = x.to(DEVICE, dtype)
    options: list[dict[str, Any]] = [{"group_size": size} for size in (None, 1, 7, 32, 1000)]
    options += [{"scale": 0.02, "zero": zero} for zero in (0, 9, -128, 127)]
    for values in (x, x.T.contiguous().T, x[:, ::3], x[:0], x[:, :0], x.view(2, 3, 300)):
        for arguments in options if values is x else options[2::4]:
            codes, scales = quantize_activations(values, **arguments, backend="triton")
            expected = quantize_activations(values.cpu(), **arguments, backend="reference")
            assert same_bits(codes, expected[0])
            assert same_values(scales, expected[1])


def test_long_tokens_are_quantized_in_steps():
    x = torch.randn(2, 5000, generator=generator(0)).to(DEVICE)
    codes, scales = quantize_activations(x, backend="triton")
    expected = quantize_activations(x.cpu(), backend="reference")
    assert same_bits(codes, expected[0])
    assert same_bits(scales, expected[1])


def parts(
    shape: tuple[int, int], spelling: str, *, scale_dtype: torch.dtype = torch.float16, offsets: bool = False
) -> QuantizedWeight:
    """An 8-bit weight with random parts."""
    scheme, (N, K) = Scheme.parse(spelling), shape
    g = generator(N * 1000 + K)
    words, grid = scheme.code_words(K), scheme.scale_shape(N, K)
    codes = torch.randint(-(2**31), 2**31, (N, words), generator=g).to(torch.int32)
    if K % 4:
        codes[:, -1] &= (1 << K % 4 * 8) - 1
    return QuantizedWeight(
        codes=codes,
        scales=(torch.randn(grid, generator=g) * 0.1).to(scale_dtype),
        zeros=torch.randint(0, 256, grid, dtype=torch.uint8, generator=g)
        if scheme.zero_point and not offsets
        else None,
        offsets=torch.randn(grid, generator=g).to(scale_dtype) if offsets else None,
        shape=shape,
        scheme=scheme,
    ).to(DEVICE)


def integers(M: int, K: int) -> torch.Tensor:
    return torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=generator(M + 7 * K)).to(DEVICE)


VARIANTS: list[dict[str, Any]] = [
    {"spelling": "w8"},
    {"spelling": "w8z"},
    {"spelling": "w8tz", "scale_dtype": torch.bfloat16},
    {"spelling": "w8z", "offsets": True, "scale_dtype": torch.float32},
]
VARIANT_IDS = ["w8", "w8z", "w8tz", "offsets"]


def check_product(qw: QuantizedWeight, M: int, x_zero: torch.Tensor | int | None, dtype: torch.dtype) -> None:
    """The bits of the reference, on the weight and on its packed form."""
    x, packed = integers(M, qw.K), pack_weight(qw, backend="triton")
    scales = bias = None
    if dtype != torch.int32:
        scales, bias = torch.rand(M, 1, generator=generator(M)).to(DEVICE), activations(1, qw.N, dtype)[0]
    y = int8_matmul(x, scales, packed, bias, out_dtype=dtype, x_zero=x_zero)
    there = [None if value is None else value.cpu() for value in (scales, bias)]
    x_zero = x_zero.cpu() if isinstance(x_zero, torch.Tensor) else x_zero
    expected = int8_matmul(
        x.cpu(), there[0], qw.to("cpu"), there[1], out_dtype=dtype, x_zero=x_zero, backend="reference"
    )
    assert same_bits(y, expected)


@pytest.mark.parametrize("widen", [False, True], ids=["", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_int8_products_have_the_bits_of_the_reference(variant, widen, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(int8_host, "_lacks_int8", lambda device: widen)
    for shape, M in (((3, 17), 2), ((37, 130), 9), ((4, 0), 2), ((0, 4), 2), ((2, 600), 0)):
        qw = parts(shape, **variant)
        for x_zero in (None, -128, integers(M, 1)):
            for dtype in FLOAT_DTYPES if qw.offsets is not None else (torch.int32, torch.bfloat16):
                check_product(qw, M, x_zero, dtype)


@pytest.mark.parametrize("M", [16, 17, 65])
def test_every_int8_tile_has_the_bits_of_the_reference(M):
    check_product(parts((70, 600), "w8"), M, None, torch.float32)


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_segments_of_a_long_k_are_those_of_the_reference(variant, monkeypatch):
    # They begin and end within a block of 512 columns.
    monkeypatch.setattr(int8_reference, "exact_columns", lambda **kind: 300)
    qw = parts((5, 1100), **variant)
    for x_zero in (None, 5):
        check_product(qw, 3, x_zero, torch.float32)
    with pytest.raises(InputError, match=r"could overflow|offsets"):
        check_product(qw, 3, None, torch.int32)


def test_the_largest_int8_sums():
    qw = parts((1, 3000), "w8z")
    qw = replace(qw, codes=torch.zeros_like(qw.codes), zeros=torch.full_like(qw.zeros, 255))
    x = torch.full((1, 3000), -128, dtype=torch.int8, device=DEVICE)
    y = int8_matmul(x, None, qw, out_dtype=torch.int32, x_zero=127, backend="triton")
    assert y.item() == 255 * 255 * 3000


def test_int8_products_take_strides_and_one_group_of_any_order():
    qw = parts((9, 70), "w8")
    x, scales = integers(70, 12), torch.rand(3, 2, generator=generator(0)).to(DEVICE)
    packed = pack_weight(qw, backend="triton")
    ordered = pack_weight(replace(qw, group_index=torch.zeros(70, dtype=torch.int32, device=DEVICE)))
    y = int8_matmul(x[:, :3].T.contiguous(), scales[:, :1], packed, out_dtype=torch.float32)
    for weight in (packed, ordered):
        strided = int8_matmul(x.T[:3], scales[:, :1], weight, out_dtype=torch.float32, backend="triton")
        assert torch.equal(strided, y)
    whole = int8_matmul(x.T.view(4, 3, 70), 0.5, packed, out_dtype=torch.float16)
    assert whole.shape == (4, 3, 9)
    index = torch.arange(70, dtype=torch.int32, device=DEVICE) % 2
    two = replace(qw, scales=qw.scales.expand(9, 2).contiguous(), group_index=index)
    with pytest.raises(InputError, match="got 2 groups"):
        int8_matmul(x.T, 0.5, two, out_dtype=torch.float16, backend="triton")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_w8a8_weight_is_multiplied_as_integers(dtype, monkeypatch):
    qw = parts((9, 70), "w8a8", scale_dtype=torch.float32)
    packed = pack_weight(qw, backend="triton")
    x, bias = activations(3, 70, dtype), activations(1, 9, dtype)[0]
    x[1, 3] = torch.nan
    expected = int8_linear(x.cpu(), qw.to("cpu"), bias.cpu(), backend="reference")

    def refuse(*arguments: Any) -> QuantizedWeight:
        raise AssertionError("the weight is unpacked")

    with monkeypatch.context() as patch:
        patch.setattr(triton_layout, "unpack", refuse)
        y = dequant_matmul(x, packed, bias)
    assert same_values(y, expected)
    assert same_values(int8_linear(x, packed, bias, backend="triton"), expected)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()
    for empty in (x[:0], x[:, :0]):
        weight = qw if empty.shape[1] else parts((9, 0), "w8a8", scale_dtype=torch.float32)
        ours = dequant_matmul(empty, weight, bias, backend="triton")
        assert torch.equal(ours, bias.expand(len(empty), 9))
    inputs = activations(3, 70, torch.float32).requires_grad_()
    dequant_matmul(inputs, packed).sum().backward()
    columns = dequantize_groupwise(qw, torch.float32).sum(0)
    torch.testing.assert_close(inputs.grad, columns.expand(3, 70), rtol=1e-5, atol=1e-4)


def test_a_weight_packed_for_triton_says_why_it_cannot_run(monkeypatch):
    packed = pack_weight(parts((9, 70), "w8a8"), backend="triton")
    monkeypatch.setattr(_triton, "why_not_triton", lambda device: "it is away")
    for call in (
        lambda: int8_matmul(integers(3, 70), 1.0, packed, out_dtype=torch.float32),
        lambda: dequant_matmul(activations(3, 70, torch.float32), packed, compute="int8"),
    ):
        with pytest.raises(InputError, match="packed for Triton, which cannot run: it is away"):
            call()


def test_the_int8_op_keeps_its_contract():
    packed = pack_weight(parts((9, 70), "w8z"), backend="triton")
    zero = torch.full((3, 1), 4, dtype=torch.int8, device=DEVICE)
    arguments = (integers(3, 70), torch.rand(3, 1, device=DEVICE), packed.blob, None, zero)
    static = (packed.layout, 9, 70, packed.spelling, torch.bfloat16)
    torch.library.opcheck(torch.ops.qkern.int8_matmul.default, (*arguments, *static))


def test_int8_products_autotune(monkeypatch):
    import triton

    packed = pack_weight(parts((9, 70), "w8"), backend="triton")
    x = integers(3, 70)
    expected = int8_matmul(x, None, packed, out_dtype=torch.int32)
    times = iter([2.0, 2.0, 1.0, *[3.0] * 100])

    def timed(call: Any) -> float:
        assert torch.equal(call(), expected)
        return next(times)

    monkeypatch.setattr(_triton, "autotuned", lambda device: True)
    monkeypatch.setattr(triton.testing, "do_bench", timed)
    assert torch.equal(int8_matmul(x, None, packed, out_dtype=torch.int32), expected)
    state = matmul_host._weight(packed.blob, packed.layout, 9, 70, packed.spelling)
    assert state.tuned == {(16, torch.int8): replace(int8_host.config(3), rows=8, warps=8)}


@pytest.mark.parametrize("spelling", ["w2g16", "w3g32z", "w4g7z", "w8t", "w4tz", "nf4g32"])
def test_codes_on_a_grid_that_is_given(spelling):
    for shape in ((9, 70), (2, 3, 33)):
        found = quantize_groupwise(torch.randn(shape, generator=generator(0)), spelling, search="mse")
        weight = torch.randn(shape, generator=generator(1))
        expected = quantize_groupwise(
            weight, spelling, scales=found.scales, zeros=found.zeros, backend="reference"
        )
        grid = found.to(DEVICE)
        ours = quantize_groupwise(
            weight.to(DEVICE), spelling, scales=grid.scales, zeros=grid.zeros, backend="triton"
        )
        assert torch.equal(ours.codes.cpu(), expected.codes)
        assert torch.equal(ours.scales.cpu(), found.scales)
        assert found.zeros is None or torch.equal(ours.zeros.cpu(), found.zeros)


if LATE:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    @pytest.mark.timeout(900)
    def test_in_a_process_whose_triton_interprets():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
        )
        assert result.returncode == 0, result.stdout
