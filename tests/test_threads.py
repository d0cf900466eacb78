"""parallel_for: torch's pool beside torch, its own without it, never a hang, never a thread too many."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qkern import _core
from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    gguf_decode,
    gguf_encode,
    gptq_update,
    pack_bits,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
    unpack_bits,
    unpack_weight,
)

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
tiny = weight[:20].contiguous()

def digest():
    return int(quantize_groupwise(weight, "w4g128", backend="cpu").codes.sum())

# One thread: nothing is started.
torch.set_num_threads(1)
before = count()
expected = digest()
print("one", count() - before)

# A tiny call is not worth waking a thread.
torch.set_num_threads(2)
quantize_groupwise(tiny, "w4g128", backend="cpu")
print("tiny", count() - before)

# Two threads: those that torch itself would start.
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

FORK_AFTER_TORCH = """
import os, torch
from qkern.ops import quantize_groupwise

torch.set_num_threads(2)
weight = torch.randn(1024, 1024)
weight.exp().sum()  # torch has started its pool, qkern has not used it
child = os.fork()
if child == 0:
    quantize_groupwise(weight, "w4g128", backend="cpu")
    os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SECOND_RUNTIME = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from qkern import _core
from qkern.ops import quantize_groupwise
torch.set_num_threads(2)
quantize_groupwise(torch.randn(512, 512), "w4g128", backend="cpu")
print(_core.thread_pool())
"""

WITHOUT_TORCH = """
import array, importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
N, K = 256, 1024
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


def run(script: str, *arguments: str, timeout: float = 120) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    # A group of its own: a child of the script that hangs goes with it.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors
    return output.splitlines()


@needs_proc
def test_beside_torch_no_thread_is_added_and_fork_does_not_hang() -> None:
    one, tiny, two, child, parent, pool = run(BESIDE_TORCH)
    assert one == "one 0"
    assert tiny == "tiny 0"
    assert two.startswith("two True 0 "), two  # torch's next op starts nothing: the pool is shared
    assert two.removeprefix("two True 0 ") in ("0", "1"), two
    assert child == "child 0"
    assert parent == "parent True"
    assert pool in ("pool gomp", "pool kmp")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_does_not_enter_the_pool_that_torch_started_before_the_fork() -> None:
    assert run(FORK_AFTER_TORCH, timeout=30) == ["child 0"]


@pytest.mark.skipif(
    _core.thread_pool() != "gomp" or shutil.which("cc") is None,
    reason="torch has LLVM's runtime here, or there is no C compiler",
)
def test_another_runtime_in_the_process_is_not_used(tmp_path: Path) -> None:
    source, library = tmp_path / "second.c", tmp_path / "second.so"
    names = ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")
    source.write_text(
        "void abort(void);\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in names)
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert run(SECOND_RUNTIME, str(library)) == ["gomp"]


@needs_proc
def test_without_torch_a_pool_of_its_own_serves() -> None:
    pool, threads, at_once, child = run(WITHOUT_TORCH, _core.__file__)
    assert pool == "pool own"
    assert threads == "threads 3"
    assert at_once == "at once 400 True 3"
    assert child == "child 0"


def test_four_python_threads_at_once_get_the_same_results() -> None:
    weights = [torch.randn(512, 200, generator=torch.Generator().manual_seed(i)) for i in range(4)]
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


def every_op(weight: torch.Tensor) -> list[torch.Tensor]:
    """Results of every native op; a piece is about 33,000 elements, so each has several."""
    N, K = weight.shape
    out = []
    for spelling, search in (("w3g32z", "mse"), ("w4t", "minmax"), ("w2g100z", "minmax")):
        qw = quantize_groupwise(weight, spelling, search=search, backend="cpu")
        packed = pack_weight(qw, backend="cpu")
        unpacked = unpack_weight(packed)
        assert torch.equal(unpacked.codes, qw.codes)
        assert torch.equal(unpacked.scales, qw.scales)
        out += [qw.codes, qw.scales, dequantize_groupwise(qw, backend="cpu")]
        for rows in (1, 5, 100):  # the last prepares several pieces and multiplies by two chunks of rows
            out += [dequant_matmul(weight[:rows], packed, compute=compute) for compute in ("float", "int8")]
    for layout in ("dense", "gptq", "awq"):
        codes = unpack_bits(qw.codes, 2, (N, K), backend="cpu")
        words = pack_bits(codes, 4, layout=layout, backend="cpu")
        assert torch.equal(unpack_bits(words, 4, (N, K), layout=layout, backend="cpu"), codes)
        out.append(words)
    B = 128
    hinv = torch.eye(B) + 0.1 * torch.randn(B, B, generator=torch.Generator().manual_seed(1)).triu(1)
    grid = torch.full((N, 1), 0.1), torch.full((N, 1), 8, dtype=torch.uint8)
    out += gptq_update(weight[:, :B], hinv, *grid, torch.zeros(B, dtype=torch.int32), bits=4, backend="cpu")
    out += quantize_activations(weight, group_size=64, backend="cpu")
    raw = gguf_encode(weight[:, :256].contiguous(), "q4_0")
    return [*out, raw, gguf_decode(raw, "q4_0")]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(304, 330, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(every_op(weight))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


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
