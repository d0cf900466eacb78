"""Layers trained on their grid: the stored weight in the forward, gradients as by the formulas in float64."""

import copy
import io

import pytest
import torch
from torch import nn

from qkern import FakeQuantLinear, InputError, QuantLinear, UnsupportedError
from qkern.nn import compute_mode
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode, quantize_groupwise
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul.reference import fake_quantize
from qkern.ops.gguf_types import gguf_type
from qkern.schemes import FLOAT_DTYPES, Scheme

SCHEMES = ["w2g16", "w2g32z", "w3g48z", "w3", "w4g32", "w8z", "w8t", "w4tz", "nf4g16", "fp4g32", "nf4t"]
TYPES = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]
SUPER = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]


def linear(N=24, K=100, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias)


def inputs(M=7, K=100, seed=1):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def spread(values, scheme, K):
    return values.double().repeat_interleave(scheme.group_length(K), 1)[:, :K]


def lsq(weight, scales, zeros, scheme):
    """The rounded weight in float64, rounding straight through and clipping as torch differentiates it."""
    K = weight.shape[1]
    steps = spread(scales, scheme, K)
    if scheme.codebook:
        ordered = codebook(scheme.codebook).ordered.double()
        clipped = (weight / steps).clamp(ordered[0], ordered[-1])
        nearest = ordered[(clipped.detach()[..., None] - ordered).abs().argmin(-1)]
    else:
        zero = scheme.midpoint if zeros is None else spread(zeros, scheme, K)
        low, high = torch.as_tensor(-zero), torch.as_tensor(scheme.levels - 1 - zero)
        clipped = torch.minimum(torch.maximum(weight / steps, low), high)
        nearest = clipped.detach().round()
    return (clipped + (nearest - clipped).detach()) * steps


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_weight_is_the_one_that_is_stored(spelling, search):
    dense = linear()
    for scale_dtype in FLOAT_DTYPES:
        layer = FakeQuantLinear.from_linear(dense, spelling, search=search, scale_dtype=scale_dtype)
        expected = quantize_groupwise(dense.weight, spelling, search=search, scale_dtype=scale_dtype)
        assert torch.equal(layer.quantized().codes, expected.codes)
        assert torch.equal(layer.quantized().scales, expected.scales)
        assert torch.equal(layer.dequantize(), dequantize_groupwise(expected))
    assert layer.weight is not dense.weight
    assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_converted_layer_has_the_same_bits_and_output(spelling, learn_scales):
    layer = FakeQuantLinear.from_linear(linear(), spelling, learn_scales=learn_scales)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight) * 0.03)  # as training would
        if learn_scales:
            layer.scales.mul_(1.0 + torch.rand_like(layer.scales))
    converted = layer.convert()
    assert isinstance(converted, QuantLinear)
    assert torch.equal(converted.dequantize(), layer.dequantize())
    with compute_mode(converted, "float"), torch.no_grad():
        torch.testing.assert_close(converted(inputs()), layer(inputs()), rtol=1e-6, atol=1e-6)
    assert torch.equal(converted.bias, layer.bias)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_gradient_goes_straight_through_scales_that_follow(spelling):
    layer = FakeQuantLinear.from_linear(linear(), spelling)
    x, grad = inputs().requires_grad_(), torch.randn(7, 24)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, (grad.double().T @ x.double()).float())
    torch.testing.assert_close(x.grad, (grad.double() @ layer.dequantize().double()).float())
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("spelling", SCHEMES)
def test_learned_scales_have_the_gradients_of_lsq(spelling):
    scheme = Scheme.parse(spelling)
    layer = FakeQuantLinear.from_linear(linear(), spelling, learn_scales=True)
    with torch.no_grad():
        # Weights beyond the ends, and scales of both signs.
        layer.scales.mul_(torch.rand_like(layer.scales) * 0.3 + 0.4)
        layer.scales[::2].neg_()
    x, grad = inputs(), torch.randn(7, 24)
    layer(x).backward(grad)

    weight = layer.weight.detach().double().requires_grad_()
    scales = layer.scales.detach().half().double().requires_grad_()
    rounded = lsq(weight, scales, layer.zeros, scheme)
    torch.testing.assert_close(layer.dequantize().double(), rounded, rtol=1e-6, atol=1e-7)
    rounded.backward(grad.double().T @ x.double())
    clipped = (weight.grad == 0).double().mean()
    assert 0.01 < clipped < 0.9
    torch.testing.assert_close(layer.weight.grad, weight.grad.float(), rtol=1e-5, atol=1e-5)
    count = weight.numel() if scheme.per_tensor else scheme.group_length(100)
    highest = 1 if scheme.codebook else scheme.levels - 1 if scheme.zero_point else scheme.midpoint - 1
    expected = (scales.grad / (count * highest) ** 0.5).float()
    # Sums of terms of both signs: rounding is relative to the largest.
    torch.testing.assert_close(layer.scales.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_a_weight_at_the_end_of_the_grid_is_not_clipped(spelling, dtype):
    stored = quantize_groupwise(linear(N=96).weight, spelling, search="mse", scale_dtype=dtype)
    stored.scales[::2].neg_()
    layer = FakeQuantLinear.from_quantized(stored)
    layer.dequantize().sum().backward()
    assert (layer.weight.grad == 1).all()  # all lie on levels


@pytest.mark.parametrize("spelling", ["w4g32", "w2g32z"])
def test_codes_and_no_decoded_weight_wait_for_the_backward_pass(spelling):
    layer = FakeQuantLinear.from_linear(linear(N=64, K=128, bias=False), spelling, learn_scales=True)
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        values = layer.dequantize()
    assert saved.pop(layer.weight.untyped_storage().data_ptr()) == values.nbytes
    assert 0 < sum(saved.values()) < values.nbytes / 4


def test_frozen_scales_leave_a_fixed_grid():
    layer = FakeQuantLinear.from_linear(linear(), "w4g32z", learn_scales=True)
    layer.scales.requires_grad_(False)
    before = layer.quantized()
    layer(inputs()).sum().backward()
    assert layer.scales.grad is None
    with torch.no_grad():
        layer.weight.sub_(layer.weight.grad)
    assert torch.equal(layer.quantized().scales, before.scales)
    assert torch.equal(layer.quantized().zeros, before.zeros)
    assert not torch.equal(layer.quantized().codes, before.codes)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_learned_scales_are_used_as_they_are_stored(dtype):
    layer = FakeQuantLinear.from_linear(linear(), "w4g32", learn_scales=True, scale_dtype=dtype)
    with torch.no_grad():
        layer.scales.add_(1e-6)
        layer.scales[0, 0], layer.scales[0, 1] = 0.0, -1e-46
    found = layer.quantized().scales
    assert found.dtype == dtype
    assert torch.equal(found[1:], layer.scales[1:].to(dtype))
    assert 0 < found[0, 0] < 1e-7  # never 0, which nothing could train away from again
    layer(inputs()).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(layer.dequantize()).all()


def test_a_scale_that_crossed_zero_comes_back():
    layer = FakeQuantLinear.from_linear(linear(), "w4g32", learn_scales=True)
    with torch.no_grad():
        layer.scales.zero_()
    layer(inputs()).square().sum().backward()
    assert torch.isfinite(layer.scales.grad).all()
    assert (layer.scales.grad != 0).any()


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("spelling", ["w8a8", "w4g32a8", "w4g32za8", "nf4g16a8"])
def test_activations_are_rounded_as_by_int8_compute(spelling, learn_scales):
    layer = FakeQuantLinear.from_linear(linear(), spelling, learn_scales=learn_scales)
    x = inputs().requires_grad_()
    out = layer(x)
    stored = layer.quantized()
    seen = fake_quantize(x.detach(), stored)
    # The CPU kernels round a codebook's entries to 2**-16 of the largest.
    table = 2**-16 * seen.abs().sum(1).max() * stored.scales.abs().max() if stored.scheme.codebook else 0.0
    with torch.no_grad(), compute_mode(converted := layer.convert(), "int8"):
        torch.testing.assert_close(converted(x), out, rtol=1e-5, atol=float(1e-5 + table))
    assert not torch.equal(seen, x)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize())
    if not learn_scales:
        torch.testing.assert_close(layer.weight.grad, grad.T @ seen)


@pytest.mark.parametrize("spelling", ["w8a8", "w4g32za8"])
def test_rounded_activations_are_multiplied_in_fp32_under_autocast(spelling):
    layer = FakeQuantLinear.from_linear(linear(), spelling)
    expected = layer(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(inputs()), expected)
        assert torch.equal(torch.compile(layer, backend="eager")(inputs()), expected)


@pytest.mark.parametrize("name", TYPES + SUPER)
def test_gguf_types_have_the_values_of_their_blocks(name):
    dense = linear(N=8, K=256)
    layer = FakeQuantLinear.from_linear(dense, gguf_type(name))
    expected = gguf_decode(gguf_encode(dense.weight, name), name)
    assert torch.equal(layer.dequantize(), expected)
    x = inputs(K=256)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, dense.bias))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(8, 256))
    converted = layer.convert()
    assert type(converted) is nn.Linear
    assert torch.equal(gguf_encode(converted.weight, name), gguf_encode(layer.weight, name))


@pytest.mark.parametrize("choice", ["w4g32", "w8a8", gguf_type("q4_0")], ids=str)
def test_masters_stay_fp32_in_a_bf16_model(choice):
    dense = linear(K=128).bfloat16()
    layer = FakeQuantLinear.from_linear(dense, choice).bfloat16().half().to(torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert torch.equal(layer.weight, dense.weight.float())
    x = inputs(K=128).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    converted = layer.convert()
    if isinstance(converted, QuantLinear):
        assert converted.bias.dtype == torch.bfloat16
        compute = "int8" if choice == "w8a8" else "float"
        with torch.no_grad(), compute_mode(converted, compute):
            torch.testing.assert_close(converted(x), out, rtol=2**-7, atol=2**-7)


def test_learned_scales_and_zero_points_survive_conversions_of_the_module():
    layer = FakeQuantLinear.from_linear(linear(), "w4g32z", learn_scales=True)
    before = layer.quantized()
    layer.to(torch.bfloat16).double()
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.quantized().scales, before.scales)
    assert torch.equal(layer.quantized().codes, before.codes)
    moved = layer.to("meta")
    assert moved.weight.is_meta
    assert moved.zeros.dtype == torch.uint8


@pytest.mark.parametrize(
    ("choice", "learn_scales"), [("w2g16", False), ("w4g32z", True), (gguf_type("q4_1"), False)], ids=str
)
def test_state_is_saved_loaded_copied_and_pickled(choice, learn_scales):
    def make(seed):
        return FakeQuantLinear.from_linear(linear(K=128, seed=seed), choice, learn_scales=learn_scales)

    trained, other = make(0), make(1)
    expected = {"weight", "bias"} | ({"scales", "zeros"} if learn_scales else set())
    assert trained.state_dict().keys() == expected
    other.load_state_dict(trained.state_dict())
    buffer = io.BytesIO()
    torch.save(trained, buffer)
    buffer.seek(0)
    for copied in (other, copy.deepcopy(trained), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied.dequantize(), trained.dequantize())


def test_evaluation_is_the_same_function():
    layer = FakeQuantLinear.from_linear(linear(), "w2g16", learn_scales=True)
    assert layer.training
    out = layer(inputs())
    with torch.inference_mode():
        assert torch.equal(layer.eval()(inputs()), out)
    assert not layer.convert().training


def test_autocast_and_compiled_models_run_the_same():
    layer = FakeQuantLinear.from_linear(linear(), "w4g32", learn_scales=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(inputs())
    assert out.dtype == torch.bfloat16
    expected = layer(inputs())
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(inputs()), expected)
    compiled(inputs()).sum().backward()
    assert layer.scales.grad is not None


def test_training_goes_on_from_a_quantized_weight():
    dense = linear()
    for spelling in ("w2g16", "w4g32z", "w8"):
        stored = quantize_groupwise(dense.weight, spelling, search="mse", scale_dtype=torch.bfloat16)
        layer = FakeQuantLinear.from_quantized(stored, dense.bias)
        assert torch.equal(layer.quantized().codes, stored.codes)
        assert torch.equal(layer.quantized().scales, stored.scales)
        assert torch.equal(layer.dequantize(), dequantize_groupwise(stored))
        assert layer.scales.requires_grad


def test_conv1d_is_transposed():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 100)
    layer = FakeQuantLinear.from_linear(conv, "w8")
    torch.testing.assert_close(layer(inputs()), conv(inputs()), rtol=0.05, atol=0.05)
    assert layer.weight.is_contiguous()
    with pytest.raises(UnsupportedError, match="Conv1D"):
        FakeQuantLinear.from_linear(conv, gguf_type("q8_0"))


def test_refusals_name_what_is_wrong():
    dense = linear(K=96)
    with pytest.raises(UnsupportedError, match="w4g32d"):
        FakeQuantLinear.from_linear(dense, "w4g32d")
    for wrong in ({"learn_scales": True}, {"search": "minmax"}):
        with pytest.raises(UnsupportedError, match=f"{next(iter(wrong))}.*q4_0"):
            FakeQuantLinear.from_linear(dense, gguf_type("q4_0"), **wrong)
    with pytest.raises(InputError, match="blocks of 256"):
        FakeQuantLinear.from_linear(dense, gguf_type("q4_k"))
    with pytest.raises(InputError, match="'best'"):
        FakeQuantLinear.from_linear(dense, "w4g32", search="best")
    with pytest.raises(UnsupportedError, match="Bilinear"):
        FakeQuantLinear.from_linear(nn.Bilinear(2, 2, 2), "w4g32")
    with pytest.raises(InputError, match="meta"):
        FakeQuantLinear.from_linear(nn.Linear(4, 4, device="meta"), "w4", learn_scales=True)
    layer = FakeQuantLinear.from_linear(dense, "w4g32", learn_scales=True)
    with pytest.raises(InputError, match="wrong shape"):
        layer(torch.randn(3, 95))
    with pytest.raises(UnsupportedError, match="q4_0"):
        FakeQuantLinear.from_linear(dense, gguf_type("q4_0")).quantized()
    for broken in (layer.weight, layer.scales):
        with torch.no_grad():
            broken[0, 0] = torch.nan
        with pytest.raises(InputError, match="NaN or Inf"):
            layer(torch.randn(3, 96))
        with torch.no_grad():
            broken[0, 0] = 0.1


def test_a_grid_that_is_more_than_scales_and_zero_points_is_refused():
    stored = quantize_groupwise(linear(K=96).weight, "w4g32")
    layer = QuantLinear.from_quantized(stored)
    layer.group_index = torch.arange(96, dtype=torch.int32) // 32
    with pytest.raises(UnsupportedError, match="group_index"):
        FakeQuantLinear.from_quantized(layer.quantized())
    experts = quantize_groupwise(torch.randn(2, 8, 32), "w4g32")
    with pytest.raises(UnsupportedError, match=r"\(2, 8, 32\)"):
        FakeQuantLinear.from_quantized(experts)


def test_repr_says_scheme_and_scales():
    assert "scheme=w4g32, scales=mse" in repr(FakeQuantLinear.from_linear(linear(), "w4g32"))
    assert "scales=learned" in repr(FakeQuantLinear.from_linear(linear(), "w4g32", learn_scales=True))
    assert "scheme=q4_0" in repr(FakeQuantLinear.from_linear(linear(K=64), gguf_type("q4_0")))
