"""torch's fp32 products by oneDNN where that rounds nothing: twice as fast as by MKL on AMD."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["fast_products"]

# fp32 products come to 1e-6, those of bf16 to 3e-3.
_ROUNDING: Final = 1e-5


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let torch multiply fp32 matrices by oneDNN inside the block, if it does so in fp32 on this CPU.

    oneDNN is asked for by leave to use bf16, of which it makes use on CPUs with units for that alone. Inside
    the block `torch.get_float32_matmul_precision` raises, as always when single backends were set.
    """
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if device.type != "cpu" or setting is None or not torch.backends.mkldnn.enabled or not _is_fp32():
        yield
        return
    with _leave_for_bf16():
        yield


@contextmanager
def _leave_for_bf16() -> Iterator[None]:
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    # What is as in all of oneDNN may have come from there, and goes on following it.
    before = "none" if before == backend.fp32_precision else before
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


@cache
def _is_fp32() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    with _leave_for_bf16():
        product = a @ b
    exact = a.double() @ b.double()
    return bool((product - exact).abs().max() <= _ROUNDING * exact.abs().max())
