"""torch's own low-bit products on a CPU: `_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm`, bf16."""

from __future__ import annotations

import functools
from typing import Any

from contestant import Absent, Job, copies, relative_error, sample_rows
from peers import grid, information

INSTALL = "pip install torch"


def VERSION() -> str:
    import torch

    return f"torch {torch.__version__}"


def variants(scheme: str) -> list[str]:
    found = grid(scheme)
    names = {4: "torch int4pack", 8: "torch int8pack"}
    return [names[found[0]]] if found and found[0] in names else []


@functools.lru_cache(maxsize=2)
def weights(scheme: str, N: int, K: int, rotate: int) -> tuple[list[Any], Any]:
    """Make the calls' arguments, and decode the rows that are checked."""
    import torch

    found = grid(scheme)
    assert found is not None
    bits, group, _ = found
    generator, rows = torch.Generator().manual_seed(0), sample_rows(N)
    if bits == 8:  # one scale a row is all that it knows
        codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        scales = (torch.rand(N, generator=generator) * 0.01 + 0.01).bfloat16()
        truth = codes[rows].double() * scales[rows].double()[:, None]
        size = codes.nbytes + scales.nbytes
        return [(codes.clone(), scales) for _ in range(copies(size, rotate))], truth
    if group not in (32, 64, 128, 256) or N % 16 or K % group:
        raise Absent("holds groups of 32, 64, 128 and 256 of rows that 16 divides")
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = (torch.rand(K // group, N, 2, generator=generator) * 0.01 + 0.01).bfloat16()
    scale, zero = (part[:, rows].T.double().repeat_interleave(group, 1) for part in scales.unbind(-1))
    truth = (codes[rows].double() - 8) * scale + zero
    size = packed.nbytes + scales.nbytes
    return [(packed.clone(), group, scales.clone()) for _ in range(copies(size, rotate))], truth


def prepare(case: dict[str, Any]) -> Job:
    import torch

    N, K, M = case["N"], case["K"], case["M"]
    arguments, decoded = weights(case["scheme"], N, K, case["rotate"])
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    aten = torch.ops.aten
    product = aten._weight_int8pack_mm if len(arguments[0]) == 2 else aten._weight_int4pack_mm_for_cpu
    return Job(
        calls=[functools.partial(product, x, *rest) for rest in arguments],
        error=relative_error(product(x, *arguments[0])[:, sample_rows(N)], x.double() @ decoded.T),
        allowed=1e-2,
        bytes=information(case["scheme"], N, K),
        operations=2 * M * N * K,
    )
