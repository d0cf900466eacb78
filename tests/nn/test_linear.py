"""QuantLinear: what it computes, and how its weight survives everything that torch does to modules."""

import copy
import io
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkern import InputError, QuantizedWeight, QuantLinear, UnsupportedError
from qkern.nn import state
from qkern.nn.state import FORM
from qkern.ops import dequant_matmul, dequantize_groupwise, quantize_groupwise
from qkern.ops._native import core, force_tier
from qkern.ops.dequant_matmul.checks import check_input

SCHEMES = ("w2g16", "w3g32z", "w4g32", "w4g32z", "w4", "w8", "w8t", "nf4g16", "w4g32a8")
N, K = 24, 80


def make_linear(bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def make_weight(kind="plain"):
    weight = quantize_groupwise(make_linear().weight.detach(), "w4g32z")
    if kind == "offsets":
        scales = weight.scales
        offsets = (-weight.zeros.float() * scales.float()).to(scales.dtype)
        return replace(weight, zeros=None, offsets=offsets)
    if kind == "nested":
        return quantize_groupwise(make_linear().weight.detach(), "nf4g16d")
    if kind == "act_order":
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(weight.scales.shape[1], (K,), generator=generator, dtype=torch.int32)
        return replace(weight, group_index=index)
    return weight


KINDS = ("plain", "offsets", "act_order", "nested")


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(layer, x):
    weight = dequantize_groupwise(layer.quantized(), torch.float32).double()
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), weight, bias)


def assert_close(found, reference, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), reference, rtol=tolerance, atol=tolerance)


def form_of(layer):
    return {name: t for name, t in layer.state_dict().items() if name in FORM}


def assert_same_form(found, reference):
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# What it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_dequantize_then_linear(scheme, bias):
    layer = QuantLinear.from_linear(make_linear(bias), scheme)
    layer.compute = "float"
    for shape in ((), (1,), (5,), (2, 3), (0,)):
        x = inputs(*shape)
        y = layer(x)
        assert y.shape == (*shape, N)
        assert_close(y, expected(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_and_bias_follow_the_dtype_of_the_input(dtype):
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    layer.compute = "float"
    x = inputs(3, dtype=dtype)
    assert_close(layer(x), expected(layer, x), dtype)


def test_auto_is_int8_for_inference_and_float_with_gradients():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    x = inputs(4)
    by_compute = {}
    for compute in ("auto", "int8", "float"):
        layer.compute = compute
        by_compute[compute] = layer(x)
    assert torch.equal(by_compute["auto"], by_compute["int8"])
    assert not torch.equal(by_compute["auto"], by_compute["float"])
    layer.compute = "auto"
    assert_close(layer(x.requires_grad_()).detach(), expected(layer, x.detach()))
    with torch.no_grad():
        assert torch.equal(layer(x), by_compute["int8"])


@pytest.mark.parametrize("tier", core().usable_tiers())
def test_every_tier_reads_the_same_packed_weight(tier):
    layer = QuantLinear.from_linear(make_linear(), "w4g32z").pack()
    layer.compute = "float"
    x = inputs(3)
    with force_tier(tier):
        assert_close(layer(x), expected(layer, x))


def test_non_contiguous_input():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    layer.compute = "float"
    x = inputs(6, seed=3).repeat(1, 2)[::2, ::2]
    assert not x.is_contiguous()
    assert_close(layer(x), expected(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_input_is_that_of_the_dequantized_layer(kind):
    weight = make_weight(kind)
    layer = QuantLinear.from_quantized(weight, torch.randn(N))
    x = inputs(2, 3).requires_grad_()
    dense = dequantize_groupwise(weight, torch.float32)
    upstream = torch.randn(2, 3, N)
    (found,) = torch.autograd.grad(layer(x), x, upstream)
    (reference,) = torch.autograd.grad(F.linear(x, dense, layer.bias), x, upstream)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


def test_bias_can_be_trained():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    assert not layer.bias.requires_grad
    layer.bias.requires_grad_()
    layer(inputs(5)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((N,), 5.0))


def test_weight_packed_in_inference_mode_serves_gradients_later():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    with torch.inference_mode():
        layer(inputs(2))
    x = inputs(2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


# Transformations and tracing ------------------------------------------------------------------------------


def test_compile_full_graph_packs_by_itself_and_sees_new_weights():
    torch._dynamo.reset()
    model = nn.Sequential(QuantLinear.from_linear(make_linear(), "w4g32"), nn.ReLU())
    model[0].compute = "float"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(4)
    with torch.no_grad():
        assert_close(compiled(x), expected(model[0], x).relu())
        model[0].load_state_dict(QuantLinear.from_linear(make_linear(seed=7), "w4g32").state_dict())
        assert_close(compiled(x), expected(model[0], x).relu())


def test_compiled_gradient():
    torch._dynamo.reset()
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(4).requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (reference,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, reference)


def test_modes_and_tracers_see_the_op():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    x = inputs(2)
    eager = layer(x)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        recorded = layer(x)
    assert "qkern::dequant_matmul" in seen
    assert torch.equal(recorded, eager)
    graph = make_fx(layer)(x)
    assert any("dequant_matmul" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), eager)


def test_vmap_equals_a_loop():
    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    layer.compute = "float"
    x = inputs(3, 4)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(row) for row in x]))


def test_export():
    model = nn.Sequential(QuantLinear.from_linear(make_linear(), "w4g32").pack())
    x = inputs(3)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert "qkern.dequant_matmul" in program.graph_module.code
    with pytest.raises(InputError, match=r"call pack\(\) on the module before"):
        torch.export.export(
            nn.Sequential(QuantLinear.from_linear(make_linear(), "w4g32")), (x,), strict=False
        )


def test_fake_tensors_and_a_default_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(4, K)).shape == (4, N)
    layer.unpack().compute = "float"
    x = inputs(40)
    with torch.device("meta"):
        y = layer(x)
    assert_close(y, expected(layer, x))


def test_forward_mode_is_refused():
    from torch.autograd import forward_ad

    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    x = inputs(2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            layer(dual)


def test_profiler_sees_the_op():
    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    with torch.profiler.profile() as profile:
        layer(inputs(2))
    assert any("qkern::dequant_matmul" in event.key for event in profile.key_averages())


def test_meta_gives_shapes_only():
    layer = QuantLinear.empty(N, K, "w4g32", bias=True, device="meta")
    y = layer(torch.empty(2, 3, K, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.bfloat16, "meta")
    with pytest.raises(InputError, match="meta device"):
        layer(inputs(2))


# The two states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
class TestStates:
    def make(self, kind, packed):
        weight = make_weight(kind)
        layer = QuantLinear.from_quantized(weight, torch.arange(N).float())
        if packed:
            layer.pack()
        assert (layer.layout is not None) == packed
        form = {name: t for name, t in state.form_of(weight).items() if t is not None}
        return layer, form

    def test_state_dict_is_form_2(self, kind, packed):
        layer, form = self.make(kind, packed)
        assert_same_form(form_of(layer), form)
        assert set(layer.state_dict(prefix="a.")) == {f"a.{name}" for name in (*form, "bias")}

    def test_quantized_is_exact(self, kind, packed):
        layer, form = self.make(kind, packed)
        weight = layer.quantized()
        assert isinstance(weight, QuantizedWeight)
        assert_same_form({name: t for name, t in state.form_of(weight).items() if t is not None}, form)

    def test_deepcopy_and_pickle(self, kind, packed):
        layer, form = self.make(kind, packed)
        layer.compute = "float"
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        x = inputs(2)
        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert other.layout is None
            assert_same_form(form_of(other), form)
            assert torch.equal(other(x), layer(x))
            assert other.compute == "float"
        assert packed == (layer.layout is not None) or layer.layout is not None

    def test_copy_is_independent(self, kind, packed):
        layer, form = self.make(kind, packed)
        other = copy.deepcopy(layer)
        other.unpack().codes.zero_()
        assert_same_form(form_of(layer), form)

    @pytest.mark.parametrize(
        "cast", ["half", "double", "bfloat16", "to_half", "type_half"], ids=lambda name: name
    )
    def test_dtype_casts_do_not_touch_the_weight(self, kind, packed, cast):
        layer, form = self.make(kind, packed)
        if cast == "to_half":
            layer.to(torch.float16)
        elif cast == "type_half":
            layer.type(torch.float16)
        else:
            getattr(layer, cast)()
        assert_same_form(form_of(layer), form)
        assert layer.bias.dtype == {"double": torch.float64, "bfloat16": torch.bfloat16}.get(
            cast, torch.float16
        )
        assert (layer.layout is not None) == packed
        assert torch.isfinite(layer(inputs(2))).all()

    def test_load_state_dict_in_either_state(self, kind, packed):
        source, form = self.make(kind, packed)
        target, _ = self.make(kind, packed)
        target.unpack()
        target.codes = target.codes.flip(0).clone()
        if packed:
            target.pack()
        target.load_state_dict(source.state_dict())
        assert_same_form(form_of(target), form)
        assert torch.equal(target(inputs(2)), source(inputs(2)))

    def test_moved_to_meta_and_back_by_loading(self, kind, packed):
        layer, form = self.make(kind, packed)
        state = layer.state_dict()
        layer.to("meta")
        assert layer.layout is None
        assert all(tensor.device.type == "meta" for tensor in layer.state_dict().values())
        layer.load_state_dict(state, assign=True)
        assert_same_form(form_of(layer), form)
        assert layer(inputs(2)).shape == (2, N)


def test_forward_packs_and_frees_the_form_2_buffers():
    layer = QuantLinear.from_linear(make_linear(), "w4g32z")
    assert layer.layout is None
    assert layer.codes is not None
    layer(inputs(1))
    assert layer.layout is not None
    assert [name for name in FORM if getattr(layer, name) is not None] == []
    assert dict(layer.named_buffers()).keys() == {"blob"}


def test_loading_on_meta_then_assign_shares_the_tensors():
    source = QuantLinear.from_linear(make_linear(), "w4g32z")
    layer = QuantLinear.empty(N, K, "w4g32z", bias=True, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.codes.data_ptr() == source.codes.data_ptr()
    assert torch.equal(layer(inputs(2)), source(inputs(2)))


def test_scales_are_never_recast_on_load():
    weight = quantize_groupwise(make_linear().weight.detach(), "w4g32", scale_dtype=torch.bfloat16)
    source = QuantLinear.from_quantized(weight)
    layer = QuantLinear.empty(N, K, "w4g32", scale_dtype=torch.float16)
    layer.load_state_dict(source.state_dict())
    assert layer.scales.dtype == torch.bfloat16
    assert_same_form(form_of(layer), form_of(source))


def test_act_order_may_number_more_groups():
    weight = make_weight("act_order")
    extra = torch.ones(N, 5, dtype=weight.scales.dtype)
    more = replace(
        weight,
        scales=torch.cat([weight.scales, extra], 1),
        zeros=torch.cat([weight.zeros, extra.to(torch.uint8)], 1),
    )
    source = QuantLinear.from_quantized(more)
    layer = QuantLinear.empty(N, K, "w4g32z", group_index=True)
    layer.load_state_dict(source.state_dict())
    assert_same_form(form_of(layer), form_of(source))


def test_partial_load_into_a_packed_layer_keeps_the_rest():
    layer = QuantLinear.from_linear(make_linear(), "w4g32z").pack()
    form = {name: tensor.clone() for name, tensor in form_of(layer).items()}
    layer.load_state_dict({"bias": torch.zeros(N)}, strict=False)
    assert_same_form(form_of(layer), form)
    doubled = form["scales"] * 2
    layer.load_state_dict({"scales": doubled}, strict=False)
    assert_same_form(form_of(layer), form | {"scales": doubled})


def test_strict_load_names_what_is_missing_and_what_is_too_much():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    state = layer.state_dict()
    del state["scales"]
    del state["codes"]
    state["zeros"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Missing key.*codes.*scales[\s\S]*Unexpected key.*zeros"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*codes"):
        layer.pack().load_state_dict({"bias": torch.zeros(N)})


def test_share_memory_of_a_packed_layer():
    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    before = layer(inputs(2))
    layer.share_memory()
    assert layer.blob.is_shared()
    assert torch.equal(layer(inputs(2)), before)


def test_first_forward_in_several_threads():
    x = inputs(2)
    for _ in range(5):
        layer = QuantLinear.from_linear(make_linear(), "w4g32z")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(layer, [x] * 4))
        assert all(torch.equal(result, results[0]) for result in results)


def test_readers_may_meet_the_first_forward_in_another_thread():
    weight = quantize_groupwise(make_linear().weight.detach(), "w4g32z")
    x = inputs(1)
    actions = (
        lambda layer: layer(x),
        lambda layer: layer(x),
        lambda layer: layer.state_dict()["codes"],
        lambda layer: copy.deepcopy(layer).quantized().codes,
    )
    expected = [QuantLinear.from_quantized(weight)(x)] * 2 + [weight.codes] * 2
    meet = threading.Barrier(len(actions))

    def act(action, layer):
        meet.wait()
        return action(layer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places between almost any two steps
    try:
        with ThreadPoolExecutor(len(actions)) as pool:
            for _ in range(300):
                results = pool.map(act, actions, [QuantLinear.from_quantized(weight)] * len(actions))
                assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    finally:
        sys.setswitchinterval(interval)


def test_stored_bits_are_the_same_in_both_states():
    layer = QuantLinear.from_linear(make_linear(), "w4g32z")
    groups = -(-K // 32)
    assert layer.stored_bits == N * K * 4 + N * groups * (16 + 4)
    assert layer.pack().stored_bits == N * K * 4 + N * groups * (16 + 4)


# Making one, and errors ----------------------------------------------------------------------------------


def test_from_conv1d_transposes():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(N, K)
    nn.init.normal_(conv.bias)
    layer = QuantLinear.from_linear(conv, "w8")
    layer.compute = "float"
    assert (layer.in_features, layer.out_features) == (K, N)
    torch.testing.assert_close(layer(inputs(3)), conv(inputs(3)), atol=5e-3, rtol=5e-3)


def test_from_linear_keeps_dtype_and_mode():
    layer = QuantLinear.from_linear(make_linear(dtype=torch.bfloat16).eval(), "w4g32")
    assert layer.bias.dtype == torch.bfloat16
    assert not layer.training
    assert layer.scales.dtype == torch.float16


def test_from_meta_linear_is_empty():
    layer = QuantLinear.from_linear(nn.Linear(K, N, device="meta"), "w4g32z")
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "bias": (N,),
        "codes": (N, K // 8),
        "scales": (N, 3),
        "zeros": (N, 3),
    }


def test_repr_tells_scheme_and_state():
    layer = QuantLinear.from_linear(make_linear(), "w4g32z")
    assert repr(layer) == (
        f"QuantLinear(in_features={K}, out_features={N}, scheme=w4g32z, bias=True, compute=auto, "
        "packs at the first forward)"
    )
    assert f", packed as {layer.pack().layout})" in repr(layer)
    assert ", no values yet)" in repr(layer.to("meta"))
    assert ", no values yet)" in repr(QuantLinear(layer.scheme, N, K))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrong_input_shape(packed, requires_grad):
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    if packed:
        layer.pack()
    message = rf"x has the wrong shape: got \[2, {K + 1}\], allowed is \[\.\.\., {K}\].*; transpose"
    with pytest.raises(InputError, match=message):
        layer(torch.randn(2, K + 1, requires_grad=requires_grad))


@pytest.mark.parametrize("grad", [False, True])
def test_wrong_input_dtype(grad):
    layer = QuantLinear.from_linear(make_linear(), "w4g32").pack()
    message = rf"wrong dtype: got torch\.float64 \[2, {K}\], allowed are torch\.float32.*; convert it"
    with pytest.raises(InputError, match=message):
        layer(torch.ones(2, K, dtype=torch.float64, requires_grad=grad))


def test_wrong_input_device():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    message = r"x is on the wrong device: got cpu, allowed is meta.*; move x with x\.to\('meta'\)"
    with pytest.raises(InputError, match=message):
        check_input(inputs(2), K, torch.device("meta"))
    with pytest.raises(InputError, match="wrong device: got meta, allowed is cpu"):
        dequant_matmul(inputs(2).to("meta"), layer.quantized())


def test_wrong_arguments():
    for scheme in (None, 4):
        with pytest.raises(InputError, match=rf"not a scheme: got {type(scheme).__name__}"):
            QuantLinear.from_linear(make_linear(), scheme)
    with pytest.raises(UnsupportedError, match=r"takes an nn\.Linear.*got ReLU"):
        QuantLinear.from_linear(nn.ReLU(), "w4")
    with pytest.raises(InputError, match=rf"bias must be \[{N}\]"):
        QuantLinear.from_quantized(make_weight(), torch.zeros(N + 1))
    with pytest.raises(InputError, match="no weight yet"):
        QuantLinear(make_weight().scheme, N, K).quantized()
    with pytest.raises(InputError, match="unknown compute: got 'fp8', allowed are auto, float, int8"):
        QuantLinear.from_linear(make_linear(), "w4").compute = "fp8"
    stack = quantize_groupwise(torch.randn(2, N, K), "w4")
    with pytest.raises(UnsupportedError, match="a module of each expert"):
        QuantLinear.from_quantized(stack)


def test_wrong_dtype_in_a_state_dict():
    layer = QuantLinear.from_linear(make_linear(), "w4g32")
    state = layer.state_dict()
    state["codes"] = state["codes"].to(torch.int64)
    with pytest.raises(InputError, match=r"got codes int64 .*; allowed is codes int32"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("saved", ["w8g32", "w4g16", "w4g32z", "w4"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_dict_of_another_scheme(saved, strict):
    source = nn.Sequential(nn.ReLU(), nn.ModuleDict({"proj": QuantLinear.from_linear(make_linear(), saved)}))
    target = nn.Sequential(nn.ReLU(), nn.ModuleDict({"proj": QuantLinear.empty(N, K, "w4g32", bias=True)}))
    arriving = source[1]["proj"].codes
    with pytest.raises(InputError) as info:
        target.load_state_dict(source.state_dict(), strict=strict)
    message = str(info.value)
    assert message.startswith(
        f"1.proj: the weight that arrives is not one of this QuantLinear, w4g32 [{N}, {K}]: "
    )
    assert f"got codes int32 {list(arriving.shape)}, scales float16 " in message
    assert f"; allowed is codes int32 [{N}, 10], scales float16 [{N}, 3], the scales" in message
    assert message.endswith("or read a checkpoint with qkern.load")


def test_a_state_dict_with_half_a_weight():
    layer = QuantLinear.from_linear(make_linear(), "w4g32z")
    state = layer.state_dict()
    del state["zeros"]
    with pytest.raises(
        InputError, match=r"^the state_dict: .*got codes .*, scales .*; allowed is .*zeros uint8"
    ):
        layer.load_state_dict(state)
