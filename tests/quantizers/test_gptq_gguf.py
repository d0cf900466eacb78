"""GPTQ on GGUF's grids: the codes in the blocks are its own, and lose less than rounding does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops import _native, gguf_decode, gguf_encode
from qkern.ops.gguf_encode.fields import LAYOUTS, read_fields
from qkern.ops.gguf_types import GGUF_TYPES
from qkern.ops.gptq_update import block
from qkern.quantizers import HessianAccumulator, gguf_output_error, quantize_gptq, quantize_gptq_gguf

TYPES = [name for name in LAYOUTS if name in GGUF_TYPES]
N, K = 24, 512


def problem(rows: int = N, features: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and the Hessian of inputs that are correlated and differ in power."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * torch.arange(1, features + 1) ** -0.5
    power = torch.rand(features, generator=generator) + 0.1
    accumulator = HessianAccumulator(features)
    accumulator.add(torch.randn(1500, features, generator=generator) @ mix.T * power)
    weight = torch.randn(rows, features, generator=generator) * 0.1
    weight *= 1 + torch.rand(rows, features, generator=generator) ** 8 * 4
    return weight, accumulator.value


@pytest.mark.parametrize("name", TYPES)
def test_outputs_change_less_than_by_the_best_rounding(name: str) -> None:
    weight, hessian = problem()
    result = quantize_gptq_gguf(weight, hessian, name)
    plain = gguf_output_error(weight, gguf_encode(weight, name), name, hessian)
    weighted = gguf_encode(weight, name, importance=hessian.diagonal())
    assert result.error < 0.4 * min(plain, gguf_output_error(weight, weighted, name, hessian))
    # What it says is what the bytes do.
    assert result.error == pytest.approx(gguf_output_error(weight, result.blocks, name, hessian), rel=1e-3)
    assert result.blocks.shape == (N, GGUF_TYPES[name].row_bytes(K))
    assert result.notes == ()


@pytest.mark.parametrize("name", TYPES)
def test_every_sweep_lowers_the_loss(name: str) -> None:
    weight, hessian = problem()
    # Without damping the reported error is the very loss that the sweeps lower.
    errors = [quantize_gptq_gguf(weight, hessian, name, damp=0, sweeps=sweeps).error for sweeps in (0, 1, 3)]
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("name", TYPES)
def test_each_code_is_the_nearest_to_a_target_that_the_others_leave(name: str) -> None:
    weight, hessian = problem(rows=8, features=256)
    damp = 0.05
    layout = LAYOUTS[name]
    result = quantize_gptq_gguf(weight, hessian, name, damp=damp, sweeps=8)
    decoded = gguf_decode(result.blocks, name).double()
    damped = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(256)
    # With all other columns as they are, the loss of a column is least where its gradient is 0.
    away = weight.double() - decoded
    wanted = decoded + away @ damped / damped.diagonal()
    fields = read_fields(result.blocks.reshape(-1, layout.bytes), layout)
    step = (fields.d * fields.scales).abs().repeat_interleave(layout.group, 1).reshape(8, 256).double()
    codes = fields.codes.reshape(8, 256)
    inside = (codes > 0) & (codes < (1 << layout.bits) - 1) & (step > 0)
    # Sweeps move a group at once and need not end where no single code can be bettered, but nearly do.
    near = (wanted - decoded).abs() <= 0.5001 * step
    assert inside.float().mean() > 0.25
    assert near[inside].float().mean() > 0.85
    rounded = gguf_decode(gguf_encode(weight, name), name).double()
    blind = rounded + (weight.double() - rounded) @ damped / damped.diagonal()
    assert near[inside].float().mean() > ((blind - rounded).abs() <= 0.5 * step)[inside].float().mean()


def test_an_identity_hessian_is_plain_rounding() -> None:
    weight, _ = problem()
    result = quantize_gptq_gguf(weight, torch.eye(K), "q8_0", sweeps=0)
    encoded = gguf_decode(gguf_encode(weight, "q8_0"), "q8_0")
    # No column can make up for another: only the search of the scale is left.
    assert (gguf_decode(result.blocks, "q8_0") - weight).square().sum() <= (encoded - weight).square().sum()


def test_four_bits_without_minima_are_those_of_a_group_of_32() -> None:
    weight, hessian = problem()
    ours, theirs = quantize_gptq_gguf(weight, hessian, "q4_0"), quantize_gptq(weight, hessian, "w4g32")
    assert ours.error == pytest.approx(theirs.error, rel=0.05)


@pytest.mark.parametrize("name", TYPES)
def test_rows_and_columns_without_anything(name: str) -> None:
    weight, hessian = problem()
    weight[3] = 0
    weight[5, :256] = 0
    weight[:, 300:340] = 0
    dead = [0, 17, 511]
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = quantize_gptq_gguf(weight, hessian, name)
    decoded = gguf_decode(result.blocks, name)
    assert decoded.isfinite().all()
    assert not decoded[3].any()
    assert result.notes == ("3 of 512 input columns saw no activation",)
    assert result.error == pytest.approx(gguf_output_error(weight, result.blocks, name, hessian), rel=1e-3)
    # A dead column is rounded to nearest by itself: it is no further away than a step of its group.
    span = weight.abs().amax(1, keepdim=True)
    assert ((decoded - weight)[:, dead].abs() <= span).all()


def test_no_activation_at_all() -> None:
    weight, hessian = problem()
    result = quantize_gptq_gguf(weight, torch.zeros_like(hessian), "q4_k")
    assert result.error == 0.0
    change = gguf_decode(result.blocks, "q4_k") - weight
    plain = gguf_decode(gguf_encode(weight, "q4_k"), "q4_k") - weight
    assert change.square().sum() <= 1.01 * plain.square().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights(dtype: torch.dtype) -> None:
    weight, hessian = problem()
    narrow = weight.to(dtype)
    assert torch.equal(
        quantize_gptq_gguf(narrow, hessian, "q4_k").blocks,
        quantize_gptq_gguf(narrow.float(), hessian, "q4_k").blocks,
    )


def test_an_odd_number_of_legacy_blocks() -> None:
    weight, hessian = problem(features=352)
    result = quantize_gptq_gguf(weight, hessian, "q5_1")
    encoded = gguf_encode(weight, "q5_1", importance=hessian.diagonal())
    assert result.error < 0.5 * gguf_output_error(weight, encoded, "q5_1", hessian)


@pytest.mark.parametrize("name", ["q4_0", "q5_k", "q6_k"])
def test_plain_torch_does_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(rows=8)
    native = quantize_gptq_gguf(weight, hessian, name)
    monkeypatch.setattr(block, "_on_cpu", lambda tensor: False)
    plain = quantize_gptq_gguf(weight, hessian, name)
    # Products are summed in another order, and a code that was near a border falls the other way.
    assert plain.error == pytest.approx(native.error, rel=0.03)


def test_the_weight_is_left_alone() -> None:
    weight, hessian = problem()
    before, measured = weight.clone(), hessian.clone()
    quantize_gptq_gguf(weight, hessian, "q4_k", sweeps=0)
    quantize_gptq_gguf(weight, hessian, "q4_k")
    assert torch.equal(weight, before)
    assert torch.equal(hessian, measured)


def test_a_poisoned_hessian_falls_to_rounding(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = problem()
    hessian[5, 6] = torch.nan
    result = quantize_gptq_gguf(weight, hessian, "q4_k")
    assert torch.equal(result.blocks, gguf_encode(weight, "q4_k"))
    assert result.notes == ("rounded to nearest: the Hessian has NaN or Inf",)
    assert result.notes[0] in caplog.text


@pytest.mark.skipif(_native.core().active_tier() == "scalar", reason="products are torch's there")
@pytest.mark.parametrize("name", ["q4_k", "q4_0", "q2_k"])
def test_any_number_of_threads_gives_the_same_blocks(name: str) -> None:
    weight, hessian = problem(rows=200, features=768)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize_gptq_gguf(weight, hessian, name).blocks)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["q4_0", "q2_k"])
def test_targets_beyond_fp16_fall_to_rounding(name: str, caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = problem()
    weight *= 65000 / weight.abs().max()
    result = quantize_gptq_gguf(weight, hessian, name)
    assert torch.equal(result.blocks, gguf_encode(weight, name))
    assert len(result.notes) == 1
    assert "beyond fp16 scales" in result.notes[0]
    assert result.notes[0] in caplog.text
    # A weight that is itself too large is refused, whatever its errors do.
    with pytest.raises(InputError, match="cannot hold the values"):
        quantize_gptq_gguf(2 * weight, hessian, name)


@pytest.mark.parametrize("name", TYPES)
def test_no_rows(name: str) -> None:
    weight, hessian = problem(rows=0)
    result = quantize_gptq_gguf(weight, hessian, name)
    assert result.blocks.shape == (0, GGUF_TYPES[name].row_bytes(K))
    assert result.error == 0.0


def test_wrong_arguments_are_named() -> None:
    weight, hessian = problem(features=96)
    with pytest.raises(InputError, match="blocks of 256 weights: got rows of 96"):
        quantize_gptq_gguf(weight, hessian, "q4_k")
    with pytest.raises(UnsupportedError, match=r"GPTQ encodes q4_0, .*: got f16; use method rtn"):
        quantize_gptq_gguf(weight, hessian, "f16")
    with pytest.raises(InputError, match="unknown GGUF tensor type: got 'w4g32'"):
        quantize_gptq_gguf(weight, hessian, "w4g32")
    with pytest.raises(InputError, match=r"hessian of a weight with K=96 must be floating \[96, 96\]"):
        quantize_gptq_gguf(weight, hessian[:5], "q4_0")
    with pytest.raises(InputError, match=r"damp must be in 0\.\.1 and sweeps at least 0: got 2 and 2"):
        quantize_gptq_gguf(weight, hessian, "q4_0", damp=2)
    weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="weight has NaN or Inf"):
        quantize_gptq_gguf(weight, hessian, "q4_0")
