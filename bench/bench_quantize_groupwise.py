"""Speed of quantize_groupwise, as bytes of weights, codes and scales a second, into fresh outputs.

python bench/bench_quantize_groupwise.py [--shape 4096x4096] [--cases minmax] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job
from table import VERSION

__all__ = ["VERSION", "prepare"]

SCHEMES = ("w8", "w4g128", "w4g128z", "w4g32", "w3g128", "w2g64", "nf4g64")
CASES = [f"{scheme} {dtype} minmax" for dtype in ("float32", "bfloat16") for scheme in SCHEMES]
# The search is slow: an eighth of the rows.
CASES += [f"{scheme} float32 mse" for scheme in ("w8", "w4g128", "w4g128z", "w2g64", "nf4g64")]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import quantize_groupwise

    spelling, dtype, search = case["variant"].split()
    rows = case["N"] if search == "minmax" else max(case["N"] // 8, 1)
    weight = torch.randn(rows, case["K"], generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype)
    )
    qw = quantize_groupwise(weight, spelling, search=search, backend="cpu")
    plain = quantize_groupwise(weight[:16], spelling, search=search, backend="reference")
    zeros = None if qw.zeros is None else qw.zeros[:16]
    found = (qw.codes[:16], qw.scales[:16], zeros)
    return Job(
        calls=[lambda: quantize_groupwise(weight, spelling, search=search, backend="cpu")],
        error=table.differing(found, (plain.codes, plain.scales, plain.zeros)),
        bytes=weight.nbytes + qw.codes.nbytes + qw.scales.nbytes,
        facts={"tier": table.tier()},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES)
