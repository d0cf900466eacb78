"""Speed and error of the GGUF encoders, beside ggml's own where llama-cpp-python is installed.

    python bench/bench_gguf_encode.py [--rows 256] [--columns 4096] [--importance]

MB/s of fp32 input in processor time on one thread, the best of five runs taken in turn; the error is the
weighted squared error over ggml's, and in the last column that of the worst 256 weights.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import torch

from qkern.ops import gguf_decode, gguf_encode
from qkern.ops._native import core
from qkern.ops.gguf_types import GGUF_TYPES


def ggml_encoder():
    """Make a function like `gguf_encode` of ggml's encoder; None without llama-cpp-python."""
    try:
        import llama_cpp
    except ImportError:
        return None
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    sizes, pointer = [ctypes.c_int64] * 3, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *sizes, pointer]

    def encode(x, name, importance=None):
        kind = GGUF_TYPES[name]
        out = torch.zeros(len(x), kind.row_bytes(x.shape[1]), dtype=torch.uint8)
        weights = None if importance is None else importance.data_ptr()
        library.ggml_quantize_chunk(kind.id, x.data_ptr(), out.data_ptr(), 0, *x.shape, weights)
        return out

    return encode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--importance", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, arguments.columns) * 0.02
    weights = torch.ones(arguments.columns)
    importance = None
    if arguments.importance:
        importance = weights = torch.distributions.Chi2(1.0).sample((arguments.columns,)) + 0.01
    encoders = {"qkern": gguf_encode, "ggml": ggml_encoder()}
    encoders = {name: encode for name, encode in encoders.items() if encode is not None}
    print(f"tier {core().active_tier()}, {arguments.rows} x {arguments.columns}, one thread, MB/s of fp32")
    print(f"{'type':6}" + "".join(f"{name:>9}" for name in encoders) + "   faster   error   worst block")
    for name in (name for name, kind in GGUF_TYPES.items() if kind.block > 1):
        seconds = dict.fromkeys(encoders, float("inf"))
        errors = {}
        for _ in range(5):
            for peer, encode in encoders.items():
                begin = time.thread_time()
                encoded = encode(x, name, importance=importance)
                seconds[peer] = min(seconds[peer], time.thread_time() - begin)
                error = (gguf_decode(encoded, name) - x).square() * weights
                errors[peer] = error.reshape(-1, 256).sum(1)
        line = f"{name:6}" + "".join(f"{x.nbytes / 1e6 / seconds[peer]:9.0f}" for peer in encoders)
        if "ggml" in encoders:
            ratio = errors["qkern"] / errors["ggml"]
            total = errors["qkern"].sum() / errors["ggml"].sum()
            line += f"{seconds['ggml'] / seconds['qkern']:8.1f}x{total:8.4f}{ratio.max():14.3f}"
        print(line)


if __name__ == "__main__":
    main()
