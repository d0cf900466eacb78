"""Speed of gptq_update, N * B * (B - 1) operations for blocks of B columns, beside its torch reference.

python bench/bench_gptq_update.py [--shape 4096x1] [--cases native] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job, relative_error
from table import VERSION

__all__ = ["VERSION", "prepare"]

CASES = [f"B={B} {name}" for B in (64, 128, 256, 512) for name in ("native", "reference")]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import gptq_update

    N, (columns, name) = case["N"], case["variant"].split()
    B, generator = int(columns[2:]), torch.Generator().manual_seed(0)
    weight = torch.randn(N, B, generator=generator)
    hinv = (0.1 * torch.randn(B, B, generator=generator)).triu(1) + torch.eye(B)
    scales = torch.rand(N, 1, generator=generator) + 0.1
    zeros, index = torch.full((N, 1), 8, dtype=torch.uint8), torch.zeros(B, dtype=torch.int32)
    backend = "cpu" if name == "native" else "reference"

    def update(rows: int, backend: str) -> Any:
        return gptq_update(weight[:rows], hinv, scales[:rows], zeros[:rows], index, bits=4, backend=backend)

    codes, errors = update(16, backend)
    truth = update(16, "reference")
    return Job(
        calls=[lambda: update(N, backend)],
        error=table.differing((codes,), truth[:1]) + relative_error(errors, truth[1]),
        allowed=1e-5,
        operations=N * B * (B - 1),
        facts={"tier": table.tier()} if name == "native" else {},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES, unit="GOP/s", N=4096, K=1)
