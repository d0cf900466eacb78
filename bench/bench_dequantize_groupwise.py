"""Speed of dequantize_groupwise into a buffer that exists, as bytes read and written a second.

python bench/bench_dequantize_groupwise.py [--shape 4096x4096] [--cases bfloat16] [--tier avx512]
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job
from table import VERSION

__all__ = ["VERSION", "prepare"]

SCHEMES = ("w8", "w4g128", "w4g32z", "w3g128", "w2g64", "nf4g64")
CASES = [f"{scheme} {dtype}" for scheme in SCHEMES for dtype in ("float32", "bfloat16", "float16")]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import dequantize_groupwise, quantize_groupwise
    from qkern.ops.dequantize_groupwise import dequantize_rows

    spelling, dtype = case["variant"].split()
    N, K = case["N"], case["K"]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    qw, out = quantize_groupwise(weight, spelling), torch.empty(N, K, dtype=getattr(torch, dtype))
    dequantize_rows(qw, 0, N, out)
    truth = dequantize_groupwise(quantize_groupwise(weight[:16], spelling), out.dtype, backend="reference")
    return Job(
        calls=[lambda: dequantize_rows(qw, 0, N, out)],
        error=table.differing((out[:16],), (truth,)),
        bytes=qw.codes.nbytes + qw.scales.nbytes + out.nbytes,
        facts={"tier": table.tier()},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES)
