"""What the benchmarks of the memory-bound ops share: timing, and the copy bandwidth they are held against."""

from __future__ import annotations

import argparse
import time

import torch

from qkern.ops._native import core, force_tier


def best_seconds(call, threads, repeats=7):
    """Least time of `call`: processor time of the one thread, or wall-clock time of several."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    call()
    best = float("inf")
    for _ in range(repeats):
        begin = clock()
        call()
        best = min(best, clock() - begin)
    return best


def copy_gbps(threads, size_bytes=1 << 27):
    """Bytes read and written a second by torch's copy, the roof of an op that moves memory."""
    source, target = torch.ones(size_bytes // 4), torch.ones(size_bytes // 4)
    return 2 * size_bytes / best_seconds(lambda: target.copy_(source), threads) / 1e9


def run(description, rows, *, default_rows=4096, default_columns=4096):
    """Parse the options and print a table: `rows(N, K)` yields (name, bytes moved, call)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=default_rows)
    parser.add_argument("--columns", type=int, default=default_columns)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tier", default=core().active_tier())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with force_tier(arguments.tier):
        roof = copy_gbps(arguments.threads)
        clock = "processor time" if arguments.threads == 1 else "wall-clock time"
        print(
            f"tier {arguments.tier}, {arguments.rows} x {arguments.columns}, {arguments.threads} thread(s), "
            f"{clock}; copy {roof:.1f} GB/s"
        )
        for name, moved, call in rows(arguments.rows, arguments.columns):
            seconds = best_seconds(call, arguments.threads)
            gbps = moved / seconds / 1e9
            print(f"{name:28}{1e3 * seconds:9.2f} ms{gbps:8.1f} GB/s{100 * gbps / roof:6.0f} % of copy")
