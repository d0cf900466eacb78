"""The machine code of the CUDA kernels: the instructions that were meant, and no registers in local memory.

cuobjdump comes with CUDA, or in the package nvidia-cuda-cuobjdump with the `test` extra.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from qkern.ops import _cuda

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def cuobjdump() -> str | None:
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    return str(packaged) if packaged.exists() else shutil.which("cuobjdump")


def dump(what: str) -> str:
    tool = cuobjdump()
    assert tool is not None
    path = str(Path(_cuda.module().__file__).resolve())
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels() -> dict[str, Counter[str]]:
    """Instructions of each kernel of every architecture in the module."""
    found: dict[str, Counter[str]] = {}
    text = dump("-sass")
    arch, counts = "", Counter[str]()
    for line in text.splitlines():
        if line.startswith("arch ="):
            arch = line.split()[-1]
        elif "Function :" in line:
            counts = found.setdefault(f"{arch} {line.split()[-1]}", Counter())
        elif match := INSTRUCTION.match(line):
            counts[match[1]] += 1
    return found


def of(name: str) -> dict[str, Counter[str]]:
    chosen = {kernel: counts for kernel, counts in kernels().items() if name in kernel}
    assert chosen, f"no kernel is named {name}: {sorted(kernels())[:5]}"
    return chosen


@pytest.fixture(autouse=True)
def _module() -> None:
    if not (_cuda.build() or "").startswith("nvcc"):
        pytest.skip(f"no CUDA kernels in this build: {_cuda.build()}")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")


def test_the_compiler_reports_no_spills():
    report = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert len(report) >= len(kernels())
    assert [name for name, _, stack, local in report if int(stack) or int(local)] == []
    assert max(int(registers) for _, registers, _, _ in report) <= 255


def test_no_register_goes_to_local_memory():
    spilled = {
        kernel: {name: count for name, count in counts.items() if name.startswith(("STL", "LDL"))}
        for kernel, counts in kernels().items()
    }
    assert {kernel: found for kernel, found in spilled.items() if found} == {}


@pytest.mark.parametrize("name", ["matmul_kernel", "matmul_batch_kernel"])
def test_products_run_on_tensor_cores_and_weights_arrive_16_bytes_at_a_time(name):
    for kernel, counts in of(name).items():
        if "sm_7" in kernel:
            continue
        assert sum(count for name, count in counts.items() if name.startswith("HMMA.16816.F32")) >= 16, kernel
        assert sum(count for name, count in counts.items() if re.match(r"LDGSTS\..*128", name)) >= 4, kernel


def test_int8_products_run_on_tensor_cores_and_weights_arrive_16_bytes_at_a_time():
    for kernel, counts in of("int8_kernel").items():
        instruction = "IMMA.8816.S8.S8" if "sm_7" in kernel else "IMMA.16832.S8.S8"
        assert sum(count for name, count in counts.items() if name.startswith(instruction)) >= 8, kernel
        copies = r"LDG\..*128" if "sm_7" in kernel else r"LDGSTS\..*128"
        assert sum(count for name, count in counts.items() if re.match(copies, name)) >= 8, kernel


@pytest.mark.parametrize("name", ["quantize_group", "decode_codes_kernel"])
def test_what_is_read_once_arrives_16_bytes_at_a_time(name):
    for kernel, counts in of(name).items():
        assert sum(count for op, count in counts.items() if re.match(r"LDG\..*128", op)) >= 3, kernel


@pytest.mark.parametrize("name", ["decode_tile", "dequantize"])
def test_floats_leave_16_bytes_at_a_time(name):
    for kernel, counts in of(name).items():
        whole = name == "decode_tile" or "ELb1EE" in kernel
        assert not whole or any(re.match(r"STG\..*128", op) for op in counts), kernel


@pytest.mark.parametrize("name", ["dequantize", "int8_kernel", "scale_kernel"])
def test_nothing_is_contracted_where_bits_are_compared(name):
    # The kernels that divide have fused multiply-adds inside their divisions; these have no division.
    for kernel, counts in of(name).items():
        assert not [op for op in counts if op.startswith("FFMA")], kernel
