"""Every native op under another default device or dtype of torch, and with tensors on two devices."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from qkern.errors import InputError
from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    gguf_decode,
    gguf_encode,
    gptq_update,
    int8_linear,
    pack_bits,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
    unpack_bits,
    unpack_weight,
)
from qkern.ops._native import force_tier
from qkern.ops.quantize_groupwise.nested import dynamic_table

if TYPE_CHECKING:
    from collections.abc import Iterator

N, K = 24, 96
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
GPTQ = (
    WEIGHT[:, :32].contiguous(),
    torch.eye(32) + 0.1,
    torch.full((N, 1), 0.1),
    torch.full((N, 1), 8, dtype=torch.uint8),
    torch.zeros(32, dtype=torch.int32),
)


def quantize(spelling: str, **arguments: object) -> list[torch.Tensor]:
    qw = quantize_groupwise(WEIGHT, spelling, backend="cpu", **arguments)
    return [qw.codes, qw.scales, dequantize_groupwise(qw, torch.float16, backend="cpu")]


def multiply(spelling: str, rows: int) -> list[torch.Tensor]:
    qw = quantize_groupwise(WEIGHT, spelling)
    if qw.scheme.group_size is not None:
        qw = replace(qw, group_index=(torch.arange(K, device="cpu") * 7 % qw.scales.shape[1]).int())
    packed = pack_weight(qw, backend="cpu")
    x = WEIGHT[:1].repeat(rows, 1)
    codes = unpack_weight(packed).codes
    return [
        packed.blob,
        codes,
        *(dequant_matmul(x, packed, compute=compute) for compute in ("int8", "float")),
    ]


def by_slabs() -> list[torch.Tensor]:
    with force_tier("scalar"):  # one of the tiers that leave many rows to torch's matmul
        return multiply("w8", 60)


def gradient() -> list[torch.Tensor]:
    x = WEIGHT[:3].clone().requires_grad_()
    dequant_matmul(x, quantize_groupwise(WEIGHT, "w4g32"), compute="float").square().sum().backward()
    return [x.grad]


def int8() -> list[torch.Tensor]:
    qw = quantize_groupwise(WEIGHT, "w8z")
    return [int8_linear(WEIGHT, qw), int8_linear(WEIGHT, qw, x_scale=0.02, x_zero=3)]


def bits() -> list[torch.Tensor]:
    codes = unpack_bits(quantize_groupwise(WEIGHT, "w3g32").codes, 3, (N, K), backend="cpu")
    return [codes, pack_bits(codes, 4, layout="awq", backend="cpu")]


def encode(importance: torch.Tensor | None) -> list[torch.Tensor]:
    raw = gguf_encode(WEIGHT, "q4_0", importance=importance)
    return [raw, gguf_decode(raw, "q4_0", backend="cpu")]


CALLS = {
    "quantize": lambda: quantize("w4g32z"),
    "quantize double": lambda: quantize("nf4g32d"),
    "quantize tensor": lambda: quantize("w8t"),
    "quantize mse": lambda: quantize("w2g16", search="mse"),
    "bits": bits,
    "gptq": lambda: list(gptq_update(*GPTQ, bits=4, backend="cpu")),
    "activations": lambda: list(quantize_activations(WEIGHT, group_size=32, backend="cpu")),
    "no activations": lambda: list(quantize_activations(WEIGHT[:, :0], backend="cpu")),
    "matmul": lambda: multiply("w4g32z", 3),
    "matmul of a codebook": lambda: multiply("nf4g16", 3),
    "matmul of many rows": lambda: multiply("w8", 60),
    "matmul by slabs": by_slabs,
    "gradient": gradient,
    "int8": int8,
    "gguf": lambda: encode(None),
    "gguf of no importance": lambda: encode(torch.zeros(K, dtype=torch.float32, device="cpu")),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_defaults(name):
    expected = CALLS[name]()
    dynamic_table.cache_clear()  # made anew under the default device
    for defaults in (torch.device("meta"), default_dtype(torch.float64), default_dtype(torch.bfloat16)):
        with defaults:
            results = CALLS[name]()
        for got, wanted in zip(results, expected, strict=True):
            assert got.dtype == wanted.dtype
            assert got.is_cpu
            assert torch.equal(got, wanted)


def test_tensors_on_another_device_are_an_error_and_no_crash():
    qw = quantize_groupwise(WEIGHT, "w4g32z")
    for name in ("scales", "zeros"):
        mixed = replace(qw, **{name: getattr(qw, name).to("meta")})
        for use in (dequantize_groupwise, pack_weight):
            with pytest.raises(InputError, match="must be on the CPU"):
                use(mixed, backend="cpu")
    for i in range(1, len(GPTQ) - 1):
        with pytest.raises(InputError, match="must be on the CPU"):
            gptq_update(*GPTQ[:i], GPTQ[i].to("meta"), *GPTQ[i + 1 :], bits=4, backend="cpu")
