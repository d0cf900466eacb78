"""Speed of dequantize_groupwise into a buffer that exists, as bytes read and written a second.

python bench/bench_dequantize_groupwise.py [--rows 4096] [--columns 4096] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

import torch

import measure
from qkern.ops import quantize_groupwise
from qkern.ops.dequantize_groupwise import dequantize_rows


def rows(N, K):
    weight = torch.randn(N, K)
    for spelling in ("w8", "w4g128", "w4g32z", "w3g128", "w2g64", "nf4g64"):
        qw = quantize_groupwise(weight, spelling)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(N, K, dtype=dtype)
            moved = qw.codes.nbytes + qw.scales.nbytes + out.nbytes
            yield f"{spelling} {str(dtype)[6:]}", moved, lambda q=qw, o=out: dequantize_rows(q, 0, N, o)


if __name__ == "__main__":
    measure.run(__doc__, rows)
