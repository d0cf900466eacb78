"""QuantLinear where the code of others meets it: exporters, readers of ``weight``, wrong arguments."""

import pickle

import pytest
import torch
from torch import nn

from qkern import InputError, QuantEmbedding, QuantLinear
from qkern.ops import dequant_matmul, dequantize_groupwise

N, K = 24, 80


def make_layer(bias=True):
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(K, N, bias=bias), "w4g32")


@pytest.mark.parametrize("bias", [False, True])
def test_export_of_the_bare_layer(bias):
    layer = make_layer(bias).pack()
    x = torch.randn(3, K)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
    copied = pickle.loads(pickle.dumps(layer)).pack()
    assert torch.equal(torch.export.export(copied, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_input_that_is_no_tensor(bias):
    layer = make_layer(bias)
    with pytest.raises(InputError, match="x must be a tensor: got list"):
        layer([1.0] * K)
    with pytest.raises(InputError, match="x must be a tensor: got list"):
        dequant_matmul([1.0] * K, layer.quantized())
    with pytest.raises(InputError, match="weight must be quantized: got Tensor, allowed are PackedWeight"):
        dequant_matmul(torch.randn(2, K), torch.zeros(N, K))


@pytest.mark.parametrize("packed", [False, True])
def test_dense_weight_is_a_copy_asked_for_by_name(packed):
    layer = make_layer()
    dense = dequantize_groupwise(layer.quantized(), torch.bfloat16)
    if packed:
        layer.pack()
    assert torch.equal(layer.dequantize(torch.bfloat16), dense)
    assert layer.dequantize().dtype == torch.float32
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"QuantLinear has no attribute 'weight'.*dequantize\(dtype\)"):
        _ = layer.weight
    with pytest.raises(InputError, match="meta device and has no values"):
        layer.to("meta").dequantize()


def test_dense_table_of_an_embedding():
    torch.manual_seed(0)
    embedding = QuantEmbedding.from_embedding(nn.Embedding(10, 32), "w4g32")
    assert torch.equal(embedding.dequantize(), embedding(torch.arange(10)))
    with pytest.raises(AttributeError, match="QuantEmbedding has no attribute 'weight'"):
        _ = embedding.weight
