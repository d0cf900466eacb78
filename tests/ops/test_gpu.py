"""What needs a GPU beyond the tests of each op: graphs, streams, compilation, layers that move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from qkern.nn import QuantLinear
from qkern.ops import dequant_matmul, dequantize_groupwise, pack_weight, quantize_groupwise

if TYPE_CHECKING:
    from qkern.schemes import PackedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# Not "backend", which conftest.py has its own values for.
BACKENDS = ["cuda", "triton"]
ROWS = [1, 8, 40, 300]  # each has a way of its own through them
N, K = 520, 2112


def packed(backend: str, spelling: str = "w4g64z") -> PackedWeight:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).cuda()
    return pack_weight(quantize_groupwise(weight, spelling, backend="reference"), backend=backend)


def activations(M: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_graph_replays_the_same_bits_on_new_values(kernels, M):
    weight, x = packed(kernels), activations(M)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dequant_matmul(x, weight, compute="float")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequant_matmul(x, weight, compute="float")
    for seed in (1, 2):
        x.copy_(activations(M, seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, dequant_matmul(activations(M, seed), weight, compute="float"))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_every_run_and_every_stream_gives_the_same_bits(kernels, M):
    weights = [packed(kernels), packed(kernels, "w3g32")]
    x = activations(M)
    alone = [dequant_matmul(x, weight, compute="float") for weight in weights]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in weights]
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, weight, results in zip(streams, weights, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(dequant_matmul(x, weight, compute="float"))
    torch.cuda.synchronize()
    for results, expected in zip(found, alone, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_uses_the_native_kernels_and_moves(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N, dtype=dtype)
    layer = QuantLinear.from_linear(linear, "w4g64")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer = layer.cuda()
    x = activations(5, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
    assert layer.layout.startswith("cuda.")
    decoded = dequantize_groupwise(layer.quantized())
    exact = x.double() @ decoded.double().T + linear.bias.cuda().double()
    dense = torch.nn.functional.linear(x, decoded.to(dtype), linear.bias.cuda())
    assert (y.double() - exact).norm() <= 2 * (dense.double() - exact).norm()
    back = layer.cpu().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kernels", BACKENDS)
def test_the_torch_op_keeps_its_contract(kernels):
    weight = packed(kernels)
    x = activations(3).requires_grad_()
    args = (x, weight.blob, None, weight.layout, N, K, str(weight.scheme), "float")
    torch.library.opcheck(torch.ops.qkern.dequant_matmul.default, args)


def test_a_compiled_layer_gives_what_it_gives_eagerly():
    layer = QuantLinear.from_linear(torch.nn.Linear(K, N, dtype=torch.float16), "w4g64").cuda()
    x = activations(4)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_weight_on_a_device_that_is_not_the_current_one(kernels):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    there = pack_weight(
        quantize_groupwise(weight.to("cuda:1"), "w4g64z", backend="reference"), backend=kernels
    )
    y = dequant_matmul(activations(3).to("cuda:1"), there, compute="float")
    assert torch.equal(y.cpu(), dequant_matmul(activations(3), packed(kernels), compute="float").cpu())
