"""Speed of the GGUF decoders, beside the gguf package's.

    python bench/bench_gguf_decode.py [--rows 256] [--columns 4096]

MB/s of fp32 output in processor time on one thread, the best of five runs taken in turn.
"""

from __future__ import annotations

import argparse
import time

import torch

from gguf import GGMLQuantizationType, quants
from qkern.ops import gguf_decode, gguf_encode
from qkern.ops._native import core
from qkern.ops.gguf_types import GGUF_TYPES


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, arguments.columns)
    print(f"tier {core().active_tier()}, {arguments.rows} x {arguments.columns}, one thread, MB/s of fp32")
    print(f"{'type':6}{'qkern':>9}{'gguf':>9}   faster")
    for name, kind in GGUF_TYPES.items():
        if name == "f32":  # a copy
            continue
        raw = gguf_encode(x, name)
        peers = {
            "qkern": lambda raw=raw, name=name: gguf_decode(raw, name),
            "gguf": lambda raw=raw, kind=kind: quants.dequantize(raw.numpy(), GGMLQuantizationType(kind.id)),
        }
        seconds = dict.fromkeys(peers, float("inf"))
        for _ in range(5):
            for peer, decode in peers.items():
                begin = time.thread_time()
                decode()
                seconds[peer] = min(seconds[peer], time.thread_time() - begin)
        rates = "".join(f"{x.nbytes / 1e6 / seconds[peer]:9.0f}" for peer in peers)
        print(f"{name:6}{rates}{seconds['gguf'] / seconds['qkern']:8.1f}x")


if __name__ == "__main__":
    main()
