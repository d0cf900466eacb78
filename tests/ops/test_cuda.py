"""What the CUDA kernels have that other backends have not: splits of K, schedules, layouts, devices.

The kernels run compiled for the CPU; the tests of each op run them against the reference too (conftest.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError, UnsupportedError
from qkern.ops import (
    _cuda,
    dequant_matmul,
    dequantize_groupwise,
    int8_linear,
    pack_weight,
    quantize_groupwise,
    unpack_weight,
)
from qkern.ops.dequant_matmul import cuda

if TYPE_CHECKING:
    from qkern.schemes import PackedWeight

SCHEMES = ["w2g32", "w2g64z", "w3g64", "w3g32z", "w4g128", "w4g128z", "w8", "w8g32z", "nf4g64", "fp4g32"]


def packed(spelling: str, N: int, K: int) -> PackedWeight:
    g = torch.Generator().manual_seed(N + K)
    weight = quantize_groupwise(torch.randn(N, K, generator=g), spelling)
    return pack_weight(weight, backend="cuda")


def error(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> tuple[float, float]:
    """Error against float64, and that of torch's linear on the decoded weight in the same dtype."""
    decoded = dequantize_groupwise(unpack_weight(weight))
    exact = x.double() @ decoded.double().T
    dense = (x.float() @ decoded.to(x.dtype).float().T).to(x.dtype)
    return tuple(float((other.double() - exact).norm() / exact.norm()) for other in (y, dense))


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 8, 16, 17, 64])
def test_one_pass_over_the_weight(emulator, spelling, dtype, M):
    # K is large enough for blocks to share it, and its last tile is half beyond the last group.
    weight = packed(spelling, 72, 2080)
    form = cuda._weight(weight.blob, weight.layout, 72, 2080, weight.spelling)
    assert form.splits_for(M) == (2 if M <= 16 else 4)
    x = torch.randn(M, 2080, generator=torch.Generator().manual_seed(M)).to(dtype)
    y = dequant_matmul(x, weight, compute="float")
    ours, dense = error(y, x, weight)
    assert ours <= 2 * dense


@pytest.mark.parametrize("M", [5, 40])
@pytest.mark.parametrize("spelling", ["w3g32z", "w4g128"])
def test_same_bits_whatever_the_order_of_threads(emulator, spelling, M):
    weight = packed(spelling, 70, 2048)
    x = torch.randn(M, 2048, generator=torch.Generator().manual_seed(0)).half()
    first = dequant_matmul(x, weight, compute="float")
    for seed in range(1, 5):
        emulator.set_seed(seed)
        assert torch.equal(dequant_matmul(x, weight, compute="float"), first)


@pytest.mark.parametrize("M", [3, 19])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32], ids=str)
def test_devices_without_clusters_give_the_same_bits(emulator, monkeypatch, bias_dtype, M):
    weight = packed("w4g64z", 130, 2048)
    x = torch.randn(M, 2048, generator=torch.Generator().manual_seed(0)).half()
    bias = torch.randn(130, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
    shared = dequant_matmul(x, weight, bias, compute="float")
    monkeypatch.setattr(_cuda, "capability", lambda device: (8, 0))
    weight = replace(weight, blob=weight.blob.clone())  # what is known of it has clusters
    assert not cuda._weight(weight.blob, weight.layout, 130, 2048, weight.spelling).clusters
    assert torch.equal(dequant_matmul(x, weight, bias, compute="float"), shared)


@pytest.mark.parametrize("spelling", ["w3g32z", "w4g64", "w8", "nf4g64"])
@pytest.mark.parametrize("M", [3, 12, 20, 64])
def test_little_shared_memory_and_no_asynchronous_copies(emulator, monkeypatch, spelling, M):
    weight = packed(spelling, 130, 1056)
    x = torch.randn(M, 1056, generator=torch.Generator().manual_seed(0)).half()
    expected = dequant_matmul(x, weight, compute="float")
    monkeypatch.setattr(_cuda, "capability", lambda device: (7, 5))
    weight = replace(weight, blob=weight.blob.clone())
    emulator.set_small(True)
    for seed in (0, 1):
        emulator.set_seed(seed)
        assert torch.equal(dequant_matmul(x, weight, compute="float"), expected)


def test_bf16_on_devices_without_it(emulator, monkeypatch):
    weight = packed("w4g64z", 70, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(_cuda, "capability", lambda device: (7, 5))
    ours, dense = error(dequant_matmul(x, weight, compute="float"), x, weight)
    assert ours <= 2 * dense


def test_splits_fill_the_device(emulator, monkeypatch):
    weight = packed("w4g128", 64, 4096)
    form = cuda._weight(weight.blob, weight.layout, 64, 4096, weight.spelling)
    monkeypatch.setattr(_cuda, "processors", lambda device: 132)
    assert [form.splits_for(M) for M in (1, 16, 17, 64)] == [4, 4, 8, 8]


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_are_not_aligned(emulator, offset):
    weight = packed("w4g32", 64, 100)
    wide = torch.randn(2, 116, generator=torch.Generator().manual_seed(0)).half()
    x = wide[:, offset : offset + 100]
    ours, dense = error(dequant_matmul(x, weight, compute="float"), x, weight)
    assert ours <= 2 * dense


def test_nan_and_inf_stay_in_their_row_and_token(emulator):
    weight = unpack_weight(packed("w4g64", 70, 128))
    scales = weight.scales.clone()
    scales[3, 1] = torch.nan
    weight = pack_weight(replace(weight, scales=scales), backend="cuda")
    x = torch.ones(4, 128, dtype=torch.float16)
    x[2, 5] = torch.inf
    bad = ~torch.isfinite(dequant_matmul(x, weight, compute="float"))
    expected = torch.zeros(4, 70, dtype=torch.bool)
    expected[:, 3] = expected[2] = True
    assert torch.equal(bad, expected)


def test_a_layout_that_does_not_go_with_the_blob_is_refused(emulator):
    weight = packed("w4g64", 70, 128)
    for layout in (
        "cuda.m64/f16/none/2/64/plain",
        "cuda.m64/f16/none/x/64/plain/0",
        "cuda.m64/f16/none/2/63/plain/0",
    ):
        with pytest.raises(InputError, match="unknown layout"):
            unpack_weight(replace(weight, layout=layout))
    for layout in ("cuda.m64/f32/none/2/64/plain/0", "cuda.m64/f16/none/4/64/plain/0"):
        with pytest.raises(InputError, match="must be contiguous uint8"):
            unpack_weight(replace(weight, layout=layout))
    short = weight.blob[: 2 * (512 * 4 + 128)]
    with pytest.raises(InputError, match="is not that of a w4g64"):
        unpack_weight(replace(weight, layout="cuda.m64/f16/none/1/64/plain/0", blob=short))
    with pytest.raises(InputError, match="must be contiguous uint8"):
        dequant_matmul(torch.ones(1, 128).half(), replace(weight, blob=weight.blob[:-1]), compute="float")


def test_what_the_kernels_cannot_follow_is_refused(emulator):
    weight = packed("w4g64", 70, 128)
    x = torch.ones(1, 128).half()
    buffer = torch.zeros(weight.blob.numel() + 64, dtype=torch.uint8)
    offset = 8 - buffer.data_ptr() % 8
    shifted = buffer[offset : offset + weight.blob.numel()]
    if shifted.data_ptr() % 16 == 0:
        shifted = buffer[offset + 8 : offset + 8 + weight.blob.numel()]
    with pytest.raises(InputError, match="multiple of 16 bytes"):
        dequant_matmul(x, replace(weight, blob=shifted.copy_(weight.blob)), compute="float")
    with pytest.raises(InputError, match=r"bias must be .* on cpu, where the weight is: got .* on meta"):
        cuda.matmul(
            x, weight.blob, torch.ones(70, device="meta"), weight.layout, 70, 128, weight.spelling, "float"
        )


def test_an_empty_gradient(emulator):
    weight = pack_weight(quantize_groupwise(torch.ones(4, 0), "w4g32"), backend="cuda")
    assert cuda.input_gradient(torch.ones(3, 4), weight.blob, weight.layout, 4, 0, weight.spelling).shape == (
        3,
        0,
    )


def test_int8_products_of_a_packed_weight(emulator):
    weight = packed("w8", 70, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half()
    expected = int8_linear(x, unpack_weight(weight), backend="reference")
    assert torch.equal(int8_linear(x, weight), expected)


def test_the_kernels_say_why_they_cannot_run():
    weight = quantize_groupwise(torch.ones(4, 32), "w4g32")
    with pytest.raises(UnsupportedError, match="not on a CUDA device"):
        pack_weight(weight, backend="cuda")
    assert "cpu" in _cuda.why_not_cuda(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_driver_the_module_loads_and_says_so():
    build = _cuda.build()
    assert build is not None
    loaded, reason = _cuda._load()
    if build.startswith("nvcc"):
        assert reason is None
        assert "cuda" in loaded.probe()
    else:
        assert build in reason
