"""The CUDA backend inside torch: the torch op, compilers, devices, the layer's direct call.

On the emulator with tensors on the CPU, and on a GPU where there is one; test_gpu.py has what needs one.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError
from qkern.nn import QuantLinear
from qkern.nn.shared_input import SharedInput
from qkern.ops import _cuda, dequant_matmul, pack_weight, quantize_groupwise
from qkern.ops.dequant_matmul import cuda

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.schemes import PackedWeight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cuda-emulated", pytest.param("cuda-gpu", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where tensors of the CUDA backend lie; layers pack for it."""
    monkeypatch.setattr("qkern.nn.linear.pack_weight", lambda weight: pack_weight(weight, backend="cuda"))
    if request.param == "cuda-gpu":
        yield torch.device("cuda", 0)
    else:
        with _cuda.emulated(request.getfixturevalue("cuda_emulator")):
            yield torch.device("cpu")


def packed(spelling: str, N: int, K: int, device: torch.device | str) -> PackedWeight:
    g = torch.Generator().manual_seed(N + K)
    weight = quantize_groupwise(torch.randn(N, K, generator=g) / 4, spelling, backend="reference")
    return pack_weight(weight.to(device), backend="cuda")


def layer(spelling: str, N: int, K: int, device: torch.device | str, *, bias: bool = True) -> QuantLinear:
    torch.manual_seed(N)
    linear = torch.nn.Linear(K, N, bias=bias).half()
    made = QuantLinear.from_linear(linear, spelling, backend="reference").to(device)
    if made.scheme.act_bits is None:
        made.compute = "float"  # what a GPU takes for "auto"; the emulator's tensors are on the CPU
    return made


def activations(*shape: int, device: torch.device | str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


# 3: one pass; 20: the same for more rows; 70: slabs. fp32 goes by slabs, int8 through the reference.
@pytest.mark.parametrize(
    ("rows", "dtype", "compute"),
    [
        (3, torch.float16, "float"),
        (3, torch.bfloat16, "int8"),
        (20, torch.bfloat16, "float"),
        (70, torch.float16, "float"),
        (3, torch.float32, "float"),
    ],
)
def test_opcheck(device, rows, dtype, compute):
    weight = packed("w4g32z", 24, 64, device)
    static = (weight.layout, weight.N, weight.K, weight.spelling)
    x = activations(rows, 64, device=device, dtype=dtype).requires_grad_()
    for bias in (None, torch.ones(24, dtype=dtype, device=device, requires_grad=True)):
        torch.library.opcheck(torch.ops.qkern.dequant_matmul, (x, weight.blob, bias, *static, compute))
    grad = activations(rows, 24, device=device, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.qkern.dequant_matmul_backward, (grad, weight.blob, *static))


def test_a_group_of_linears(device):
    weights = [packed("w4g32", n, 64, device) for n in (24, 16)]
    x = activations(3, 64, device=device)
    arguments = (
        x,
        [weight.blob for weight in weights],
        [None, torch.ones(16, dtype=torch.float16, device=device)],
        weights[0].layout,
        [24, 16],
        64,
        ["w4g32", "w4g32"],
        "float",
    )
    torch.library.opcheck(torch.ops.qkern.dequant_matmul_group, arguments)
    for out, weight, bias in zip(
        torch.ops.qkern.dequant_matmul_group(*arguments), weights, arguments[2], strict=True
    ):
        assert torch.equal(out, dequant_matmul(x, weight, bias, compute="float"))


def test_a_layer_calls_the_kernel_directly(device, monkeypatch):
    made = layer("w4g32z", 24, 64, device).pack()
    assert isinstance(made._handle, cuda.LinearHandle)
    calls = []
    monkeypatch.setattr(QuantLinear, "_dispatch", lambda self, x, bias: calls.append(x))
    with torch.no_grad():
        for shape in ((64,), (3, 64), (1, 20, 64), (0, 64)):
            x = activations(*shape, device=device)
            apart = x.repeat_interleave(2, -1)[..., ::2]
            transposed = x.transpose(0, -1).contiguous().transpose(0, -1)
            for values in (x, apart, transposed):
                expected = dequant_matmul(values, made._packed(), made.bias, compute="float")
                assert torch.equal(made(values), expected)
    assert calls == []


def test_a_layer_with_int8_activations(device):
    made = layer("w8a8", 24, 64, device)
    x = activations(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(made(x), dequant_matmul(x, made._packed(), made.bias, compute="int8"))


def test_gradients_go_through_autograd(device):
    made = layer("w4g32", 24, 64, device)
    x = activations(3, 64, device=device, dtype=torch.float32).requires_grad_()
    made(x).square().sum().backward()
    weight = made.quantized().to("cpu")
    from qkern.ops import dequantize_groupwise

    dense = dequantize_groupwise(weight, backend="reference").double()
    exact = x.detach().cpu().double() @ dense.T + made.bias.cpu().double()
    expected = 2 * exact @ dense
    assert float((x.grad.cpu().double() - expected).norm() / expected.norm()) < 1e-5


def test_a_layer_says_what_is_wrong(device):
    made = layer("w4g32", 24, 64, device).pack()
    with torch.no_grad():
        with pytest.raises(InputError, match=r"wrong shape: got \[3, 63\]"):
            made(torch.ones(3, 63, dtype=torch.float16, device=device))
        with pytest.raises(InputError, match=r"wrong dtype: got torch\.float64"):
            made(torch.ones(3, 64, dtype=torch.float64, device=device))
    handle = made._handle
    with pytest.raises(InputError, match="wrong device: got meta"):
        handle(torch.ones(3, 64, dtype=torch.float16, device="meta"))
    x = torch.ones(3, 64, dtype=torch.float16, device=device)
    wrong = [
        torch.ones(24, device="meta"),
        torch.ones(23, device=device),
        torch.ones(24, dtype=torch.bfloat16, device=device),
        torch.ones(48, device=device)[::2],
    ]
    for bias in wrong:
        with pytest.raises(InputError, match="bias must be contiguous"):
            handle(x, bias)
    static = (made.layout, 24, 64, "w4g32", "float")
    with pytest.raises(InputError, match=r"wrong shape: got \[3, 128\]"):
        torch.ops.qkern.dequant_matmul(torch.cat([x, x], 1), made.blob, None, *static)


def test_a_handle_follows_a_blob_that_moves(device):
    made = layer("w4g32", 24, 64, device).pack()
    x = activations(3, 64, device=device)
    with torch.no_grad():
        expected = made(x)
        made.blob.data = made.blob.data.clone()
        assert torch.equal(made(x), expected)


def test_layers_that_share_their_input_are_called_each(device):
    layers = [layer("w4g32", n, 64, device).pack() for n in (24, 16)]
    with torch.no_grad():
        assert SharedInput()(layers, activations(3, 64, device=device)) is None


def test_a_copied_layer_is_the_same(device):
    made = layer("w4g32z", 24, 64, device).pack()
    x = activations(3, 64, device=device)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("rows", [1, 20, 70])
def test_compiles_without_graph_breaks(device, rows):
    torch._dynamo.reset()
    model = torch.nn.Sequential(layer("w4g32z", 24, 64, device), torch.nn.SiLU(), layer("w8", 16, 24, device))
    x = activations(rows, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="inductor" if x.is_cuda else "aot_eager")
        assert torch.allclose(compiled(x), expected, rtol=1e-3, atol=1e-3)
        # Another number of rows, and the same graph.
        x = activations(rows + 1, 64, device=device)
        assert torch.allclose(compiled(x), model(x), rtol=1e-3, atol=1e-3)


def test_the_current_device_changes_only_if_it_must(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    assert isinstance(_cuda.on_device(torch.device("cuda", 0)), nullcontext)
    guard = _cuda.on_device(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1


def test_a_device_that_failed_is_asked_again(monkeypatch):
    answers = iter(["cudaErrorMemoryAllocation", "", "never asked"])

    class Module:
        ARCHITECTURES = "90a"

        @staticmethod
        def probe() -> str:
            return next(answers)

    monkeypatch.setattr(_cuda, "_load", lambda: (Module, None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_cuda, "_proven", set())
    first = _cuda.why_not_cuda(torch.device("cuda", 3))
    assert first is not None
    assert "cudaErrorMemoryAllocation on cuda:3, an sm_90" in first
    assert _cuda.why_not_cuda(torch.device("cuda", 3)) is None
    assert _cuda.why_not_cuda(torch.device("cuda", 3)) is None
