"""parallel_for: torch's pool beside torch, its own without it, never a hang, never a thread too many."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qkern import _core
from qkern.ops import dequantize_groupwise, quantize_groupwise

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc"
)

BESIDE_TORCH = """
import os, sys, torch
from qkern import _core
from qkern.ops import quantize_groupwise

def count():
    return len(os.listdir("/proc/self/task"))

weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

def digest():
    return int(quantize_groupwise(weight, "w4g128", backend="cpu").codes.sum())

# One thread: nothing is started.
torch.set_num_threads(1)
before = count()
expected = digest()
print("one", count() - before)

# Two threads: those that torch itself would start.
torch.set_num_threads(2)
first = digest()
ours = count()
torch.randn(2000, 2000).exp().sum()
print("two", first == expected, count() - ours, count() - before)

# After fork: the parent's threads are not there.
child = os.fork()
if child == 0:
    os._exit(0 if digest() == expected and count() == 1 else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("parent", digest() == expected)
print("pool", _core.thread_pool())
"""

WITHOUT_TORCH = """
import array, importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
N, K = 64, 1024
codes = bytearray(i * 7 % 16 for i in range(N * K))

def pack(threads):
    source, packed = (array.array("B", codes), array.array("I", bytes(N * K // 2)))
    status = core.pack_bits(codes=source.buffer_info()[0], codes_stride=K, N=N, K=K, bits=4, layout=0,
                            packed=packed.buffer_info()[0], threads=threads)
    assert status == 0
    return packed.tobytes()

def count():
    return len(os.listdir("/proc/self/task"))

assert "torch" not in sys.modules
expected = pack(1)
assert count() == 1
print("pool", core.thread_pool())
assert all(pack(3) == expected for _ in range(200))
print("threads", count())
results = []
def work():
    results.extend(pack(3) == expected for _ in range(100))
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
deadline = time.monotonic() + 10  # a joined thread takes a moment to leave /proc
while count() > 3 and time.monotonic() < deadline: time.sleep(0.01)
print("at once", len(results), all(results), count())
child = os.fork()
if child == 0:
    os._exit(0 if pack(3) == expected and count() == 1 else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_proc
def test_beside_torch_no_thread_is_added_and_fork_does_not_hang() -> None:
    one, two, child, parent, pool = run(BESIDE_TORCH)
    assert one == "one 0"
    assert two.startswith("two True 0 "), two  # torch's next op starts nothing: the pool is shared
    assert two.removeprefix("two True 0 ") in ("0", "1"), two
    assert child == "child 0"
    assert parent == "parent True"
    assert pool in ("pool gomp", "pool kmp")


@needs_proc
def test_without_torch_a_pool_of_its_own_serves() -> None:
    pool, threads, at_once, child = run(WITHOUT_TORCH, _core.__file__)
    assert pool == "pool own"
    assert threads == "threads 3"
    assert at_once == "at once 400 True 3"
    assert child == "child 0"


def test_four_python_threads_at_once_get_the_same_results() -> None:
    weights = [torch.randn(64, 200, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [quantize_groupwise(weight, "w4g64z", backend="reference") for weight in weights]
    barrier = threading.Barrier(4)

    def work(i: int) -> bool:
        barrier.wait()
        for _ in range(50):
            qw = quantize_groupwise(weights[i], "w4g64z", backend="cpu")
            if not torch.equal(qw.codes, expected[i].codes):
                return False
            if not torch.equal(
                dequantize_groupwise(qw), dequantize_groupwise(expected[i], backend="reference")
            ):
                return False
        return True

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(work, range(4))) == [True] * 4


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(301, 130, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(quantize_groupwise(weight, "w3g32z", search="mse", backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result.codes, results[0].codes) for result in results)
    assert all(torch.equal(result.scales, results[0].scales) for result in results)


def test_calls_release_the_gil() -> None:
    weight = torch.randn(1000, 4096)
    moments: list[float] = []
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        quantize_groupwise(weight, "nf4g64", search="mse", backend="cpu")
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        moments.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = span
    # Were the lock held, nothing of this thread would fall into the middle of the call.
    third = (end - begin) / 3
    assert any(begin + third < moment < end - third for moment in moments)
