"""What a call costs beside the kernel, by pytest-benchmark: ``pytest bench/micro.py``.

A weight so small that its product takes well under a microsecond: what is left is Python, the dispatch and
the entry into the native module. `native` is the bare call with addresses made ready; the eager overhead of a
QuantLinear is the difference to it. One thread, so that no pool has to wake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from qkern import QuantLinear
from qkern.ops import dequant_matmul, pack_weight, quantize_groupwise
from qkern.ops._native import DTYPE_CODES, core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N, K = 16, 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def calls() -> dict[str, Callable[[], object]]:
    linear, x = torch.nn.Linear(K, N, bias=False), torch.randn(1, K)
    qw = quantize_groupwise(linear.weight.detach(), "w4g32")
    layer, packed = QuantLinear.from_quantized(qw), pack_weight(qw, backend="cpu")
    layer.pack()
    native, out = core().Linear(packed.blob.data_ptr(), packed.blob.numel()), torch.empty(1, N)
    arguments = (x.data_ptr(), DTYPE_CODES[x.dtype], 1, K, out.data_ptr(), 0, 0, True, 1)
    kept = (x, packed, out)  # the addresses point into these
    return {
        "native": lambda kept=kept: native(*arguments),
        "QuantLinear": lambda: layer(x),
        "dequant_matmul": lambda: dequant_matmul(x, packed),
        "torch linear": lambda: linear(x),
        "torch F.linear": lambda: torch.nn.functional.linear(x, linear.weight),
    }


NAMES = ("native", "QuantLinear", "dequant_matmul", "torch linear", "torch F.linear")


@pytest.mark.parametrize("name", NAMES)
def test_call(benchmark: Callable[..., object], name: str) -> None:
    benchmark(calls()[name])
