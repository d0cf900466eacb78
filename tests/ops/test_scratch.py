"""Plain torch, which is what runs on MPS, keeps its temporaries within a limit at the sizes of 7B models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    int8_matmul,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
)
from qkern.ops._scratch import LIMIT, pieces, rows_within
from qkern.ops.quantize_groupwise.reference import row_bytes
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, QuantizedWeight):
        return [x for x in (value.codes, value.scales, value.zeros) if x is not None]
    return [tensor for each in value for tensor in tensors_in(each)]


def scratch(call: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator had given out at once during the call, less those of the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
        kept = sum(tensor.nbytes for tensor in tensors_in(result))
    live = most = 0
    # In the order in which they happened.
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most - kept


def random_weight(N: int, K: int, spelling: str, *, offsets: bool = False, act_order: bool = False):
    scheme = Scheme.parse(spelling)
    generator = torch.Generator().manual_seed(N + K)
    shape = scheme.scale_shape(N, K)
    scales = torch.rand(shape, generator=generator).half() / 100
    words = torch.randint(-(2**31), 2**31, (N, scheme.code_words(K)), generator=generator)
    zeros = torch.randint(0, scheme.levels, shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        codes=words.int(),
        scales=scales,
        shape=(N, K),
        scheme=scheme,
        zeros=zeros if scheme.zero_point and not offsets else None,
        offsets=scales * 3 if offsets else None,
        group_index=torch.randperm(K, generator=generator).int() % shape[1] if act_order else None,
    )


def test_counter_sees_what_was_allocated_and_freed():
    def call():
        first = torch.zeros(8 * MIB, dtype=torch.uint8)
        second = first + 1  # two alive
        del first
        return (second + 1)[: 2 * MIB].clone()  # two again, beside the part that is kept

    slack = 4096  # numbers that become tensors
    assert 0 <= scratch(call) - 16 * MIB < slack
    assert 0 <= scratch(lambda: torch.zeros(5 * MIB, dtype=torch.uint8)) < slack
    # Inside of an operator too: torch casts all integers before it adds them up.
    kept = torch.zeros(MIB, dtype=torch.int8)
    assert 0 <= scratch(lambda: kept.sum(dtype=torch.int64)) - 8 * MIB < slack


def test_pieces_cover_every_row_once():
    for rows, each in ((0, 8), (1, 8), (10, 8), (10, 0), (10, 1000), (7, 24)):
        cut = list(pieces(rows, each, 64))
        assert [row for piece in cut for row in range(piece.start, piece.stop)] == list(range(rows))
        assert all(piece.stop - piece.start <= rows_within(each, 64) for piece in cut)
    assert rows_within(8, 64) == 8
    assert rows_within(1000, 64) == 1


# N is short of a model's, but several times what fits at once: a chunk is as large as it would be there.
MATMUL = (
    ("w4g128", {}, 256, 18944),
    ("w3g128z", {}, 256, 18944),
    ("w2g64z", {"offsets": True}, 1200, 3584),
    ("w4g128", {"act_order": True}, 256, 14336),
    ("w8a8", {}, 256, 18944),
    ("w8t", {}, 1200, 3584),
    ("nf4g64", {}, 256, 18944),
    ("w4g128", {}, 40000, 33),
)


@pytest.mark.parametrize(("spelling", "form", "N", "K"), MATMUL)
def test_dequant_matmul_stays_within_the_limit(spelling, form, N, K):
    qw = random_weight(N, K, spelling, **form)
    packed, bias = pack_weight(qw, backend="reference"), torch.randn(N)
    arguments = packed.blob, packed.layout, N, K, spelling
    for M in (1, 512):
        x, grad = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
        for call in (
            lambda x=x: dequant_matmul(x, packed, bias, compute="float"),
            lambda x=x: dequant_matmul(x, packed, bias, compute="int8"),
            lambda grad=grad: torch.ops.qkern.dequant_matmul_backward(grad, *arguments),
        ):
            used = scratch(call)
            assert used <= LIMIT


def test_a_whole_layer_stays_within_the_limit():
    packed = pack_weight(random_weight(18944, 3584, "w4g128"), backend="reference")
    x = torch.randn(1, 3584).bfloat16()
    # The weights are 34 MB packed, 136 MB in bf16.
    used = scratch(lambda: dequant_matmul(x, packed, compute="float"))
    assert LIMIT // 4 < used <= LIMIT


@pytest.mark.parametrize("form", [{}, {"offsets": True}])
@pytest.mark.parametrize("K", [3584, 18944])
def test_int8_ops_stay_within_the_limit(K, form):
    packed = pack_weight(random_weight(5 * MIB // K, K, "w8z", **form), backend="reference")
    for M in (1, 512):
        x = torch.randn(M, K).bfloat16()
        for arguments in ({}, {"scale": 0.1, "zero": 3}):
            used = scratch(
                lambda x=x, arguments=arguments: quantize_activations(x, backend="reference", **arguments)
            )
            assert used <= LIMIT
        codes, scales = quantize_activations(x, scale=0.1, zero=3, backend="reference")
        used = scratch(
            lambda codes=codes, scales=scales: int8_matmul(
                codes, scales, packed, x_zero=3, out_dtype=torch.bfloat16, backend="reference"
            )
        )
        assert used <= LIMIT


@pytest.mark.parametrize("spelling", ["w4g128", "w3g128z", "nf4g64"])
def test_dequantize_stays_within_the_limit(spelling):
    # Rows of an embedding's table, as many as a long prompt has.
    qw = random_weight(4096, 3584, spelling)
    used = scratch(lambda: dequantize_groupwise(qw, torch.bfloat16, backend="reference"))
    assert used <= LIMIT


@pytest.mark.parametrize(
    ("spelling", "search"),
    [("w4g128", "minmax"), ("w3g24z", "mse"), ("w4g8", "mse"), ("nf4g64d", "mse"), ("w8", "mse")],
)
def test_quantize_takes_no_more_a_weight_than_it_is_cut_for(spelling, search):
    weight = torch.randn(256, 1024).bfloat16()
    importance = torch.rand(1024) if search == "mse" else None
    used = scratch(
        lambda: quantize_groupwise(
            weight, spelling, search=search, importance=importance, backend="reference"
        )
    )
    assert used <= 256 * row_bytes(Scheme.parse(spelling), 1024)
