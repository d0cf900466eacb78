"""Speed of quantize_groupwise, as bytes of weights, codes and scales a second.

python bench/bench_quantize_groupwise.py [--rows 4096] [--columns 4096] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

import torch

import measure
from qkern.ops import quantize_groupwise


def rows(N, K):
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(N, K).to(dtype)
        for spelling in ("w8", "w4g128", "w4g128z", "w4g32", "w3g128", "w2g64", "nf4g64"):
            qw = quantize_groupwise(weight, spelling)
            moved = weight.nbytes + qw.codes.nbytes + qw.scales.nbytes
            name = f"{spelling} {str(dtype)[6:]}"
            yield name, moved, lambda w=weight, s=spelling: quantize_groupwise(w, s, backend="cpu")
    part = torch.randn(N // 8, K)
    for spelling in ("w8", "w4g128", "w4g128z", "w2g64", "nf4g64"):
        name = f"{spelling} mse (1/8 of rows)"
        yield name, part.nbytes, lambda s=spelling: quantize_groupwise(part, s, search="mse", backend="cpu")


if __name__ == "__main__":
    measure.run(__doc__, rows)
