"""QuantLinear in a model that trains, and as a dense layer."""

import copy

import pytest
import torch
from torch import nn

from qkern import QuantLinear


def make_linear(**options):
    torch.manual_seed(0)
    return nn.Linear(80, 24, **options)


@pytest.mark.parametrize(("spelling", "training"), [("w4g32", "float"), ("w8a8", "int8")])
def test_auto_is_float_in_training_without_gradients_too(spelling, training):
    layer = QuantLinear.from_linear(make_linear(), spelling)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
    inference = {}
    for compute in ("auto", "int8", "float"):
        layer.compute = compute
        inference[compute] = layer(x)
    assert torch.equal(inference["auto"], inference["int8"])
    assert not torch.equal(inference["auto"], inference["float"])
    nn.Sequential(layer).train()
    with torch.no_grad():
        for compute, same in (("auto", training), ("int8", "int8"), ("float", "float")):
            layer.compute = compute
            assert torch.equal(layer(x), inference[same])
            assert layer.compute == compute
        layer.compute = "auto"
        assert torch.equal(copy.deepcopy(layer)(x), inference[training])
        assert torch.equal(layer.eval()(x), inference["auto"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_linear_is_dense_frozen_and_a_copy(dtype):
    layer = QuantLinear.from_linear(make_linear(dtype=torch.bfloat16), "w4g32z").eval()
    dense = layer.to_linear(dtype)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert torch.equal(dense.weight, layer.dequantize(dtype))
    assert torch.equal(dense.bias, layer.bias.to(dtype))
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    dense.bias.data.zero_()
    assert layer.bias.abs().max() > 0
    assert QuantLinear.from_linear(make_linear(bias=False), "w4g32").to_linear().bias is None
