"""torch's integer matmul on dense int8 weights: int8 by int8 to int32, scaled by two multiplications."""

from __future__ import annotations

import functools
from typing import Any

from contestant import Absent, Job, copies, relative_error, sample_rows

INSTALL = "pip install torch"


def VERSION() -> str:
    import torch

    return f"torch {torch.__version__}"


def variants(scheme: str) -> list[str]:
    return ["torch int_mm"] if scheme == "w8" else []


@functools.lru_cache(maxsize=1)
def weights(N: int, K: int, rotate: int) -> list[Any]:
    import torch

    made = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return [made, *(made.clone() for _ in range(copies(made.nbytes, rotate) - 1))]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    N, K, M = case["N"], case["K"], case["M"]
    if not hasattr(torch, "_int_mm"):
        raise Absent("this torch has no _int_mm")
    held = weights(N, K, case["rotate"])
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (M, K), dtype=torch.int8, generator=generator)
    x_scales, w_scales = torch.rand(M, 1, generator=generator), torch.rand(N, generator=generator)

    def multiply(weight: Any) -> Any:
        return (torch._int_mm(codes, weight.T) * (x_scales * w_scales)).bfloat16()

    rows = sample_rows(N)
    truth = codes.double() @ held[0][rows].double().T * (x_scales.double() * w_scales[rows].double())
    return Job(
        calls=[functools.partial(multiply, weight) for weight in held],
        error=relative_error(multiply(held[0])[:, rows], truth),
        allowed=3e-3,
        bytes=held[0].nbytes,
        operations=2 * M * N * K,
    )
