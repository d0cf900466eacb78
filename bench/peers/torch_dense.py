"""torch's linear on dense weights: what quantization has to beat."""

from __future__ import annotations

import functools
from typing import Any

from contestant import Job, copies, relative_error, sample_rows

INSTALL = "pip install torch"
# Rounding of the products, of the sum where it is kept in bf16, and of the result.
ALLOWED = {"bfloat16": 1e-2, "float32": 1e-5}


def VERSION() -> str:
    import torch

    return f"torch {torch.__version__}"


def variants(scheme: str) -> list[str]:
    return ["torch bf16", "torch fp32"]


@functools.lru_cache(maxsize=4)
def weights(dtype: str, N: int, K: int, rotate: int) -> list[Any]:
    import torch

    made = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return [made, *(made.clone() for _ in range(copies(made.nbytes, rotate) - 1))]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    N, K, M = case["N"], case["K"], case["M"]
    dtype = "bfloat16" if case["variant"] == "torch bf16" else "float32"
    held = weights(dtype, N, K, case["rotate"])
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(held[0].dtype)
    rows, linear = sample_rows(N), torch.nn.functional.linear
    truth = x.double() @ held[0][rows].double().T
    return Job(
        calls=[functools.partial(linear, x, weight) for weight in held],
        error=relative_error(linear(x, held[0])[:, rows], truth),
        allowed=ALLOWED[dtype],
        bytes=held[0].nbytes,
        operations=2 * M * N * K,
    )
