"""Ceilings of this machine: bytes read and copied a second, products a second.

    python bench/roofline.py [--threads 2]

`contestants` gives them to a benchmark, which measures them interleaved with everything else; `ceilings`
reads them off the records. A ceiling is the best of several ways to do the same: reading one to sixteen
sequences a thread, copying with plain and streaming stores, int8 products in each instruction that the
machine has. `roofline.cpp` is compiled for this machine on the first use, into
build/bench.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import contestant
import measure

SOURCE = Path(__file__).with_suffix(".cpp")
FOLDER = Path(__file__).resolve().parents[1] / "build" / "bench"
READS = ("1 sequence", "4 sequences", "4, prefetched", "8 sequences", "16 sequences")
COPIES = ("plain", "streaming")
INSTALL = "install a C++17 compiler, or name one in the environment variable CXX"


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load `roofline.cpp`."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise ImportError("no C++ compiler")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {platform.node()}".encode()).hexdigest()[:12]
    path = FOLDER / f"roofline-{key}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        options = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(temporary)], check=True)
        temporary.rename(path)
    loaded = ctypes.CDLL(str(path))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    loaded.roofline_read.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int]
    loaded.roofline_copy.argtypes = [pointer, pointer, size, ctypes.c_int, ctypes.c_int]
    loaded.roofline_read.restype = loaded.roofline_copy.restype = None
    loaded.roofline_peak_name.restype = ctypes.c_char_p
    loaded.roofline_peak.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    loaded.roofline_peak.restype = ctypes.c_double
    return loaded


def peaks() -> list[str]:
    """Names of the products that this machine has: ``["int8 zmm", .., "bf16", "fp32"]``."""
    return [library().roofline_peak_name(i).decode() for i in range(library().roofline_peaks())]


def VERSION() -> str:
    return f"roofline.cpp, {', '.join(peaks())}"


@functools.cache
def buffer(size: int) -> tuple[Any, int]:
    """Bytes that are in memory, and the address of the first whole line."""
    import numpy as np

    memory = np.ones(size + 64, np.uint8)
    return memory, -(-memory.ctypes.data // 64) * 64


def prepare(case: dict[str, Any]) -> contestant.Job:
    """``{"ceiling": "read 0"}``, ``"copy 1"`` or a name of `peaks`; `size` bytes, `rounds` of products."""
    threads, native = case["threads"], library()
    kind, _, which = case["ceiling"].partition(" ")
    size = case["size"] // (4096 * threads) * 4096 * threads
    if kind == "read":
        call = functools.partial(native.roofline_read, buffer(size)[1], size, threads, int(which))
        return contestant.Job(calls=[call], bytes=size)
    if kind == "copy":
        half = size // 2 // (64 * threads) * 64 * threads
        source = buffer(size)[1]
        call = functools.partial(native.roofline_copy, source + half, source, half, threads, int(which))
        return contestant.Job(calls=[call], bytes=2 * half)
    if case["ceiling"] not in peaks():
        raise contestant.Absent(f"this machine has no {case['ceiling']}")
    call = functools.partial(native.roofline_peak, peaks().index(case["ceiling"]), case["rounds"], threads)
    # How much one round is does not change: two are enough to ask.
    operations = native.roofline_peak(peaks().index(case["ceiling"]), 2, threads) / 2 * case["rounds"]
    return contestant.Job(calls=[call], operations=operations)


def contestants(*, size: int = 512 << 20, rounds: int = 1 << 21) -> list[measure.Contestant]:
    """Every ceiling, to be measured beside other contestants."""
    names = [f"read {i}" for i in range(len(READS))] + [f"copy {i}" for i in range(len(COPIES))]
    return [
        measure.Contestant(
            name=name, module="roofline", case={"ceiling": name, "size": size, "rounds": rounds}
        )
        for name in (*names, *peaks())
    ]


def ceilings(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Read the best rates of each kind off the records, round by round.

    GB/s of ``read`` and ``copy``, GOP/s of ``int8``, ``bf16`` and ``fp32``; nothing without a compiler. The
    best way is the one with the best median. The kinds of int8 product are there under their own names too:
    a kernel of the AVX2 tier is held against ``"int8 maddubs"``.
    """
    best: dict[str, list[float]] = {}
    for record in records:
        if record["module"] != "roofline" or "rounds" not in record:
            continue
        name, work = record["contestant"], record["bytes"] or record["operations"]
        rates = [work / seconds / 1e9 for seconds in record["rounds"]]
        for key in (name.split()[0], name) if name.startswith("int8") else (name.split()[0],):
            if key not in best or statistics.median(rates) > statistics.median(best[key]):
                best[key] = rates
    return best


def part(record: dict[str, Any], work: str, rates: list[float]) -> float:
    """How much of a ceiling is reached: the median over rounds, as both drift together; NaN without one."""
    if not rates:
        return math.nan
    pairs = zip(record["rounds"], rates, strict=False)
    return statistics.median(record[work] / seconds / 1e9 / rate for seconds, rate in pairs)


def summary(records: list[dict[str, Any]]) -> str:
    """Write the ceilings in a line."""
    rates = {name: statistics.median(rates) for name, rates in ceilings(records).items()}
    return ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())


def main() -> None:
    options = measure.parse(measure.parser(__doc__))
    records = measure.records("roofline", measure.race(contestants(), options), options)
    for record in records:
        rate = (record["bytes"] or record["operations"]) / record["seconds"] / 1e9
        kind, _, which = record["contestant"].partition(" ")
        label = {"read": READS, "copy": COPIES}.get(kind)
        name = f"{kind}, {label[int(which)]}" if label else record["contestant"]
        unit = "GB/s" if record["bytes"] else "GOP/s"
        print(f"{name:28}{rate:9.1f} {unit}{100 * record['spread']:6.1f} % spread")
    print(summary(records))


if __name__ == "__main__":
    main()
