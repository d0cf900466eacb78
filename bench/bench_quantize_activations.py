"""Speed of quantize_activations, as bytes of activations and codes a second, into fresh outputs.

python bench/bench_quantize_activations.py [--shape 4096x4096] [--cases g128] [--tier avx512vnni]
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job
from table import VERSION

__all__ = ["VERSION", "prepare"]

CASES = [f"{dtype} {group}" for dtype in ("float32", "bfloat16") for group in ("token", "g128", "g32")]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import quantize_activations

    dtype, spelled = case["variant"].split()
    group = None if spelled == "token" else int(spelled[1:])
    x = torch.randn(case["N"], case["K"], generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype)
    )
    found = quantize_activations(x[:16], group_size=group, backend="cpu")
    return Job(
        calls=[lambda: quantize_activations(x, group_size=group, backend="cpu")],
        error=table.differing(found, quantize_activations(x[:16], group_size=group, backend="reference")),
        bytes=x.nbytes + x.numel(),
        facts={"tier": table.tier()},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES)
