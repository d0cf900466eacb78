"""Speed of gptq_update beside its torch reference, the best of several runs taken in turn.

python bench/bench_gptq_update.py [--rows 4096] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

import argparse

import torch

from measure import best_seconds
from qkern.ops import gptq_update
from qkern.ops._native import core, force_tier


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tier", default=core().active_tier())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    N = arguments.rows
    print(f"tier {arguments.tier}, {N} rows, {arguments.threads} thread(s)")
    for B in (64, 128, 256, 512):
        weight = torch.randn(N, B)
        hinv = (0.1 * torch.randn(B, B)).triu(1) + torch.eye(B)
        scales, zeros = torch.rand(N, 1) + 0.1, torch.full((N, 1), 8, dtype=torch.uint8)
        inputs = (weight, hinv, scales, zeros, torch.zeros(B, dtype=torch.int32))
        with force_tier(arguments.tier):
            native = best_seconds(
                lambda x=inputs: gptq_update(*x, bits=4, backend="cpu"), arguments.threads, 5
            )
            plain = best_seconds(
                lambda x=inputs: gptq_update(*x, bits=4, backend="reference"), arguments.threads, 2
            )
        gflops = N * B * (B - 1) / native / 1e9
        ours, theirs = f"{1e3 * native:9.2f} ms{gflops:8.1f} GFLOP/s", f"{1e3 * plain:9.2f} ms"
        print(f"B {B:4}{ours}   reference {theirs}{plain / native:7.1f}x")


if __name__ == "__main__":
    main()
