"""Speed of quantize_activations, as bytes of activations and codes a second, into fresh outputs.

python bench/bench_quantize_activations.py [--rows 4096] [--columns 4096] [--threads 1] [--tier avx512vnni]
"""

from __future__ import annotations

import torch

import measure
from qkern.ops import quantize_activations


def rows(N, K):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(N, K).to(dtype)
        for group_size in (None, 128, 32):
            moved = x.nbytes + x.numel()
            name = f"{str(dtype).removeprefix('torch.')} {f'g{group_size}' if group_size else 'per token'}"
            yield name, moved, lambda x=x, g=group_size: quantize_activations(x, group_size=g, backend="cpu")


if __name__ == "__main__":
    measure.run(__doc__, rows)
