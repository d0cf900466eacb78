"""A static scale of the activations: what it computes, and that it survives what torch does to modules."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from qkern import InputError, QuantLinear
from qkern.nn import SharedInput
from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    int8_linear,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
    unpack_weight,
)
from qkern.ops.dequant_matmul.reference import fake_quantize

N, K = 24, 80
SCALE = 0.02


def weight(scheme="w8a8", seed=0):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.1
    return replace(quantize_groupwise(w, scheme), input_scale=torch.tensor([SCALE]))


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(packed=True):
    layer = QuantLinear.from_quantized(weight(), torch.arange(N).float() / 8)
    return layer.pack() if packed else layer


def expected(x, qw, bias=None):
    """The formula in float64: rounded and clipped by the one scale."""
    codes = (x.double() / SCALE).round().clamp(-128, 127)
    y = codes * SCALE @ dequantize_groupwise(qw, torch.float32).double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("scheme", ["w8a8", "w8za8", "w8ta8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_rounds_by_the_one_scale(scheme, dtype):
    layer = QuantLinear.from_quantized(weight(scheme), torch.arange(N).float() / 8)
    for shape in ((), (1,), (5,), (2, 3), (0,)):
        x = inputs(*shape, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        found = expected(x, layer.quantized(), layer.bias)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(y.double(), found, rtol=tolerance, atol=tolerance)
    # Not what a scale a token gives, nor float activations.
    x = inputs(5)
    plain = replace(layer.quantized(), input_scale=None)
    for compute in ("int8", "float"):
        assert not torch.equal(layer(x), dequant_matmul(x, plain, layer.bias, compute=compute))
    layer.compute = "float"
    assert torch.equal(layer(x), dequant_matmul(x, plain, layer.bias, compute="float"))


@pytest.mark.parametrize("compute", ["auto", "float"])
def test_the_direct_call_is_what_the_op_gives(compute):
    layer = make()
    layer.compute = compute
    for x in (
        inputs(3),
        inputs(2, 3, dtype=torch.bfloat16),
        inputs(),
        inputs(0),
        inputs(8)[::2],
        inputs(4).T.T,
    ):
        direct = layer(x)
        with torch.profiler.profile():  # which sees every op
            assert torch.equal(layer(x), direct)
    with pytest.raises(InputError, match=r"x has the wrong shape: got \[2, 79\], allowed is \[..., 80\]"):
        layer(inputs(2)[:, 1:])
    with pytest.raises(InputError, match=r"x has the wrong dtype: got torch.int64"):
        layer(inputs(2).long())


def test_values_beyond_the_range_are_clipped():
    x = torch.zeros(2, K)
    x[0, 3], x[1, 5] = 1000.0, -1000.0
    y = make()(x) - torch.arange(N).float() / 8
    dense = dequantize_groupwise(weight(), torch.float32)
    torch.testing.assert_close(y[0], 127 * SCALE * dense[:, 3])
    torch.testing.assert_close(y[1], -128 * SCALE * dense[:, 5])
    x[0, 0] = torch.nan
    assert make()(x)[0].isnan().all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_ops_agree_and_packing_is_reversible(name):
    qw, x = weight(), inputs(7)
    packed = pack_weight(qw, backend=name)
    assert torch.equal(unpack_weight(packed).input_scale, qw.input_scale)
    y = dequant_matmul(x, packed)
    assert torch.equal(dequant_matmul(x, qw), y)
    assert torch.equal(int8_linear(x, packed), y)
    assert torch.equal(int8_linear(x, packed, x_scale=SCALE), y)
    for other in ("reference", "cpu"):
        torch.testing.assert_close(dequant_matmul(x, packed, backend=other), y)
    codes, scales = quantize_activations(x, scale=SCALE)
    dynamic = dequant_matmul(x, replace(qw, input_scale=None), compute="int8")
    assert not torch.equal(dynamic, y)
    # Between the two the activations' rounding is all that differs.
    fake = fake_quantize(x, replace(qw, input_scale=None))
    dense = dequantize_groupwise(qw, torch.float32)
    torch.testing.assert_close(y - dynamic, (codes * scales - fake) @ dense.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
class TestStates:
    def check(self, layer):
        assert layer.input_scale.dtype == torch.float32
        assert torch.equal(layer.input_scale, torch.tensor([SCALE]))
        assert torch.equal(layer.quantized().input_scale, torch.tensor([SCALE]))
        torch.testing.assert_close(
            layer(inputs(3)).double(),
            expected(inputs(3), weight(), torch.arange(N) / 8),
            rtol=1e-3,
            atol=1e-3,
        )

    def test_state_dict(self, packed):
        layer = make(packed)
        state = layer.state_dict()
        assert torch.equal(state["input_scale"], torch.tensor([SCALE]))
        other = QuantLinear.empty(N, K, "w8a8", bias=True, input_scale=True, device="meta")
        other.load_state_dict(state, assign=True)
        self.check(other)
        again = make(packed)
        again.load_state_dict({**state, "input_scale": torch.tensor([1.0])})
        assert torch.equal(again.quantized().input_scale, torch.tensor([1.0]))
        again.load_state_dict(state)
        self.check(again)
        with pytest.raises(InputError, match=r"allowed is .*scales float16 \[24, 1\], the scales in"):
            QuantLinear.empty(N, K, "w8a8", bias=True).load_state_dict(state)

    def test_copies_and_casts(self, packed):
        layer = make(packed)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
            make(packed).half(),
            make(packed).to(torch.bfloat16).float(),
            make(packed).pack().unpack(),
            make(packed).share_memory(),
        )
        for other in copies:
            self.check(other)
        self.check(layer)

    def test_a_move_to_meta_and_the_repr(self, packed):
        layer = make(packed).to("meta")
        assert layer.input_scale.is_meta
        assert layer(inputs(2).to("meta")).shape == (2, N)
        assert "w8a8" in repr(make(packed))


def test_compiled_in_one_graph_with_the_same_result():
    model = nn.Sequential(make(), nn.ReLU(), QuantLinear.from_quantized(weight_of(N)))
    x = inputs(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def weight_of(columns):
    w = torch.randn(8, columns, generator=torch.Generator().manual_seed(2))
    return replace(quantize_groupwise(w, "w8a8"), input_scale=torch.tensor([0.1]))


def test_gradients_pass_straight_through():
    layer, x = make(), inputs(3).requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer(x.detach()))
    y.sum().backward()
    dense = dequantize_groupwise(layer.quantized(), torch.float32)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, K))


def test_the_torch_op():
    packed, x = pack_weight(weight()), inputs(3)
    arguments = (packed.blob, None, packed.layout, N, K, "w8a8", "int8", packed.input_scale)
    torch.library.opcheck(torch.ops.qkern.dequant_matmul.default, (x, *arguments))
    torch.library.opcheck(torch.ops.qkern.dequant_matmul.default, (x.requires_grad_(), *arguments))


def test_linears_that_share_their_input_keep_their_scales():
    layers = [make(), QuantLinear.from_quantized(weight(seed=3))]
    shared, x = SharedInput(), inputs(3)
    for layer in layers:
        layer(x)
    outs = shared(layers, x)
    assert outs is None
    traced = torch.compile(lambda x: shared(layers, x) or [layer(x) for layer in layers], backend="eager")
    for layer, out in zip(layers, traced(x), strict=True):
        assert torch.equal(out, layer(x))


def test_what_does_not_go_together():
    plain = quantize_groupwise(torch.randn(N, K), "w4g16a8")
    with pytest.raises(InputError, match=r"a static input_scale goes with w8a8.*: got w4g16a8"):
        replace(plain, input_scale=torch.tensor([1.0]))
    with pytest.raises(InputError, match=r"goes with w8a8.*: got w8"):
        replace(quantize_groupwise(torch.randn(N, K), "w8"), input_scale=torch.tensor([1.0]))
    with pytest.raises(InputError, match=r"input_scale must be fp32 \(1,\): got torch.float16 \(1,\)"):
        replace(weight(), input_scale=torch.ones(1, dtype=torch.float16))
    assert weight().stored_bits == replace(weight(), input_scale=None).stored_bits + 32
