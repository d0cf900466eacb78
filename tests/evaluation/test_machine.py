"""Memory of a process, and what is free."""

import subprocess
import sys

import numpy as np

from qkern.evaluation import machine

MORE = """
from qkern.evaluation.machine import peak_bytes
before = peak_bytes()
held = bytearray(300 << 20)
held[::4096] = b"x" * len(held[::4096])
del held
print(before, peak_bytes())
"""


def test_the_peak_stays_and_is_the_process_own():
    # The parent holds more than the child ever will: a child of it must not count that.
    ballast = np.ones(600 << 20, dtype=np.uint8)
    result = subprocess.run([sys.executable, "-c", MORE], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert before < ballast.nbytes
    assert 300 << 20 <= after - before + (8 << 20) <= 340 << 20


def test_free_memory_is_the_least_of_system_and_container(monkeypatch, tmp_path):
    free = machine.available_bytes()
    assert 0 < free < 1 << 50
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_bytes() == 3_000_000
    (tmp_path / "memory.stat").write_text("anon 7\nfile 9\nactive_file 200000\ninactive_file 50000\n")
    assert machine.available_bytes() == 3_250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes() > 3_000_000


def test_machine_is_one_line():
    assert "torch" in machine.machine()
    assert "\n" not in machine.machine()
