"""Speed of dequant_matmul beside torch's linear on dense weights and the bandwidth of a read loop.

python bench/bench_dequant_matmul.py [--shape 18944x3584] [--schemes w4g128,w8] [--rows 1,32] [--threads 1]

Weights are rotated over --rotate MB, so that they come from memory. GB/s counts the information of the
weight, N * K * (bits + 16 / group) / 8; "of read" holds it against a sum over as many bytes in the same run.
One thread is timed in processor time, several in wall-clock time: on a busy machine only the first means
anything.
--slabs compares compute float with and without torch's matmul on decoded slabs, which sets the thresholds in
python/qkern/ops/dequant_matmul/cpu.py.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from qkern.ops import pack_weight
from qkern.ops._native import core, force_tier
from qkern.ops.dequant_matmul import LinearHandle
from qkern.schemes import QuantizedWeight, Scheme


def least_seconds(calls, threads, repeats):
    """Least time of one call, going round through `calls`."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls[0]()
    best = float("inf")
    for i in range(max(repeats, len(calls))):
        begin = clock()
        calls[i % len(calls)]()
        best = min(best, clock() - begin)
    return best


def read_gbps(rotate_bytes, threads):
    """Bytes read a second by torch's sum of int64, which does nothing but load and add."""
    chunk = 64 << 20
    buffers = [torch.ones(chunk // 8, dtype=torch.int64) for _ in range(max(rotate_bytes // chunk, 1))]
    return chunk / least_seconds([buffer.sum for buffer in buffers], threads, 16) / 1e9


def random_weight(N, K, spelling):
    """Any codes do for timing; the scales keep the products finite."""
    scheme = Scheme.parse(spelling)
    shape = scheme.scale_shape(N, K)
    words = torch.randint(-(2**31), 2**31 - 1, (N, scheme.code_words(K)), dtype=torch.int32)
    zeros = torch.randint(0, scheme.levels, shape, dtype=torch.uint8) if scheme.zero_point else None
    scales = (torch.rand(shape) * 0.01).half()
    return QuantizedWeight(codes=words, scales=scales, shape=(N, K), scheme=scheme, zeros=zeros)


def copies(packed, rotate_bytes):
    """Make handles on enough copies of a weight to fill `rotate_bytes`."""
    count = max(rotate_bytes // packed.blob.numel(), 1)
    return [LinearHandle(replace(packed, blob=packed.blob.clone())) for _ in range(count)]


def compare_slabs(N, K, spelling, rows, threads):
    from qkern.ops.dequant_matmul import cpu

    handle = LinearHandle(pack_weight(random_weight(N, K, spelling)))
    chosen = cpu.slab_rows
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M in rows:
            x = torch.randn(M, K).to(dtype)
            times = []
            for threshold in (1 << 60, 1):
                cpu.slab_rows = lambda _, threshold=threshold: threshold
                times.append(1e3 * least_seconds([lambda x=x: handle(x, None, "float")], threads, 4))
            print(f"{dtype!s:15} M {M:5}  kernel {times[0]:8.2f} ms  slabs {times[1]:8.2f} ms")
    cpu.slab_rows = chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="18944x3584")
    parser.add_argument("--schemes", default="w4g128,w4g32z,w3g128,w2g64,w8,nf4g64")
    parser.add_argument("--rows", default="1,4,8,32,128,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tier", default=core().active_tier())
    parser.add_argument("--rotate", type=int, default=512, help="MB of weights to go round through")
    parser.add_argument("--slabs", action="store_true")
    arguments = parser.parse_args()
    N, K = (int(size) for size in arguments.shape.split("x"))
    rows, threads = [int(M) for M in arguments.rows.split(",")], arguments.threads
    rotate = arguments.rotate << 20
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with force_tier(arguments.tier), torch.inference_mode():
        if arguments.slabs:
            compare_slabs(N, K, arguments.schemes.split(",")[0], rows, threads)
            return
        read = read_gbps(rotate, threads)
        print(f"tier {arguments.tier}, {N} x {K}, {threads} thread(s), read {read:.1f} GB/s, x in bf16")
        dense = {}
        for dtype in (torch.bfloat16, torch.float32):
            count = max(rotate // (N * K * dtype.itemsize), 1)
            weights = [torch.randn(N, K, dtype=dtype) for _ in range(count)]
            for M in rows:
                x = torch.randn(M, K, dtype=dtype)
                calls = [lambda x=x, w=w: F.linear(x, w) for w in weights]
                dense[dtype, M] = least_seconds(calls, threads, 4 if M < 128 else 2)
        print("scheme     bits  compute     M        ms   GB/s  of read   GOP/s  of bf16  of fp32")
        for spelling in arguments.schemes.split(","):
            qw = random_weight(N, K, spelling)
            handles = copies(pack_weight(qw), rotate)
            bits = qw.scheme.bits + 16 / qw.scheme.group_length(K)
            for compute in ("int8", "float"):
                for M in rows:
                    x = torch.randn(M, K, dtype=torch.bfloat16)
                    calls = [functools.partial(handle, x, None, compute) for handle in handles]
                    best = least_seconds(calls[: 2 if M >= 128 else None], threads, 2 if M >= 128 else 16)
                    gbps = N * K * bits / 8 / best / 1e9
                    print(
                        f"{spelling:10}{bits:5.2f}  {compute:7}{M:6}{1e3 * best:10.3f}{gbps:7.1f}"
                        f"{100 * gbps / read:7.0f} %{2 * M * N * K / best / 1e9:8.0f}"
                        f"{best / dense[torch.bfloat16, M]:9.3f}{best / dense[torch.float32, M]:9.3f}"
                    )


if __name__ == "__main__":
    main()
